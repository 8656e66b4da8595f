"""The places of keys in a column of keys, looked up in time that depends on how many are asked for,
not on how many there are.

`pyarrow.compute.index_in` hashes the whole column anew for each call: 83 ms at a million keys, for
however few are asked. Here that is done once: 64-bit hashes in order, and where hashes that begin
with the same bits start. A look-up is then a handful of gathers, at 16 bytes a key.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

# Half as many keys as buckets: the longest bucket stays short
_SLACK_BITS = 1
_CHUNK = 1 << 20


class KeyIndex:
    """An index over distinct keys, whole numbers or text.

    >>> KeyIndex(pa.array(["a", "b"])).places(pa.array(["b", "z"])).tolist()
    [1, -1]
    """

    def __init__(self, keys: pa.Array) -> None:
        self.keys = keys
        hashes = _hashes(keys)
        self._place = np.argsort(hashes, kind="stable").astype(
            np.int32 if len(keys) < 2**31 else np.int64
        )
        self._hash = hashes[self._place]
        self._shift = np.uint64(64 - max(len(keys).bit_length() + _SLACK_BITS, 1))
        buckets = np.arange(1 << int(np.uint64(64) - self._shift), dtype=np.uint64) << self._shift
        self._start = np.searchsorted(self._hash, buckets).astype(np.int64)

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def nbytes(self) -> int:
        """Bytes of the keys and of their index."""
        return int(self.keys.nbytes + self._place.nbytes + self._hash.nbytes + self._start.nbytes)

    def places(self, wanted: pa.Array | pa.ChunkedArray) -> np.ndarray:
        """Place of each wanted key, int64; -1 where there is no such key."""
        if isinstance(wanted, pa.ChunkedArray):
            wanted = wanted.combine_chunks()
        if wanted.type != self.keys.type:
            wanted = wanted.cast(self.keys.type)
        found = np.full(len(wanted), -1, np.int64)
        if not len(self.keys) or not len(wanted):
            return found
        hashes = _hashes(wanted)
        at = self._start[(hashes >> self._shift).astype(np.int64)]
        asked = np.arange(len(wanted))
        # One step along every bucket at a time, until the hash is found or the bucket has passed
        # it.
        while len(asked):
            within = at < len(self._hash)
            at = at[within]
            asked = asked[within]
            here = self._hash[at]
            sought = hashes[asked]
            match = here == sought
            found[asked[match]] = self._place[at[match]]
            on = here < sought
            at = at[on] + 1
            asked = asked[on]
        return self._verified(wanted, found)

    def _verified(self, wanted: pa.Array, found: np.ndarray) -> np.ndarray:
        """Without nulls, and without texts that share a hash with another; these are looked up the
        slow way.
        """
        if wanted.null_count:
            found[pc.is_null(wanted).to_numpy(zero_copy_only=False)] = -1
        # The hash of a whole number is its own
        if pa.types.is_integer(self.keys.type):
            return found
        hit = np.flatnonzero(found >= 0)
        same = pc.equal(self.keys.take(pa.array(found[hit])), wanted.take(pa.array(hit)))
        if not pc.all(same).as_py():
            return pc.fill_null(pc.index_in(wanted, self.keys), -1).to_numpy().astype(np.int64)
        return found


def _hashes(keys: pa.Array) -> np.ndarray:
    """A uint64 for each key, spread evenly; of text, Python's own hash, which holds within a
    process.
    """
    if pa.types.is_integer(keys.type):
        values = (
            pc.fill_null(keys, 0).to_numpy(zero_copy_only=False).astype(np.int64).view(np.uint64)
        )
    else:
        parts = [
            np.fromiter(
                map(hash, keys.slice(start, _CHUNK).to_pylist()),
                np.int64,
                min(_CHUNK, len(keys) - start),
            )
            for start in range(0, len(keys), _CHUNK)
        ]
        values = np.concatenate([np.zeros(0, np.int64), *parts]).view(np.uint64)
    with np.errstate(over="ignore"):
        values = (values ^ (values >> np.uint64(33))) * np.uint64(0xFF51AFD7ED558CCD)
        values = (values ^ (values >> np.uint64(33))) * np.uint64(0xC4CEB9FE1A85EC53)
    return values ^ (values >> np.uint64(33))
