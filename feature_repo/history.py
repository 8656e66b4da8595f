"""Two stored forms of a user's history: the history log that training slices, and the packed history that serving reads.

**History log**: one row per user, columns are lists of events, oldest first; one Arrow IPC file per partition, read
by memory map. Item ids are dictionary-encoded within a part. A history is the slice `[history_end - L, history_end)`
of a user's row, where `history_end` comes from the feature view `user_stats`: the point-in-time join carries
eight bytes for each example, whatever L is.

**Packed history**: the newest N events of one user as bytes, the value of the feature view `user_history`:

    magic "MHIS" 4 | layout u8 | contract fingerprint 8 | events u32 | Arrow record batch (no schema) | crc32 u32

The checksum is seeded with the user's key, so another user's value under this key is noticed as well.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from feature_repo.arrow import history_schema, micros
from feature_repo.schema import EVENT_TIMESTAMP, Contract
from feature_repo.tables import JobFolder

MAGIC = b"MHIS"
LAYOUT = 1
_HEADER = struct.Struct("<4sB8sI")
_CRC = struct.Struct("<I")


class HistoryError(ValueError):
    """Stored bytes are no packed history of this user and contract; the message says what differs."""


def pack(contract: Contract, user_id: int | str, events: pa.Table) -> bytes:
    """Pack a user's events, oldest first.

    Args:
        events: columns of `contract.history_columns`.
    """
    batches = events.cast(history_schema(contract)).combine_chunks().to_batches()
    batch = batches[0] if batches else pa.RecordBatch.from_pylist([], schema=history_schema(contract))
    header = _HEADER.pack(MAGIC, LAYOUT, bytes.fromhex(contract.fingerprint), batch.num_rows)
    body = header + batch.serialize().to_pybytes()
    return body + _CRC.pack(checksum(user_id, body))


def unpack(contract: Contract, user_id: int | str, data: bytes) -> pa.RecordBatch:
    """The events of a packed history, oldest first.

    Raises:
        HistoryError: damaged, truncated, of another layout or contract, or stored for another user.
    """
    if len(data) < _HEADER.size + _CRC.size:
        raise HistoryError(f"packed history of user {user_id!r} has {len(data)} bytes: too short to be one")
    magic, layout, fingerprint, count = _HEADER.unpack_from(data)
    if magic != MAGIC:
        raise HistoryError(f"value of user {user_id!r} starts with {magic!r}, not {MAGIC!r}: no packed history")
    if layout != LAYOUT:
        raise HistoryError(f"packed history of user {user_id!r} has layout {layout}; this version reads {LAYOUT}")
    if fingerprint.hex() != contract.fingerprint:
        raise HistoryError(
            f"packed history of user {user_id!r} was written under contract {fingerprint.hex()}, "
            f"this is {contract.fingerprint}: rebuild and materialise user_history"
        )
    body, (crc,) = data[: -_CRC.size], _CRC.unpack_from(data, len(data) - _CRC.size)
    if crc != checksum(user_id, body):
        raise HistoryError(f"packed history of user {user_id!r} fails its checksum: damaged, or another user's")
    batch = pa.ipc.read_record_batch(pa.py_buffer(body[_HEADER.size :]), history_schema(contract))
    if batch.num_rows != count:
        raise HistoryError(f"packed history of user {user_id!r} holds {batch.num_rows} events, its header says {count}")
    return batch


def checksum(user_id: int | str, body: bytes) -> int:
    """CRC-32 seeded with a user's key: bytes stored for another user do not match."""
    return zlib.crc32(body, zlib.crc32(str(user_id).encode()))


def log_part(contract: Contract, events: pa.Table) -> pa.RecordBatch:
    """One partition's events as a log part: one row per user, list columns, item ids dictionary-encoded.

    Args:
        events: sorted by (user, time, source position); columns of the `events` table.
    """
    user_column = events[contract.user.join_key].combine_chunks()
    starts = run_starts(user_column)
    offsets = pa.array(np.r_[starts, len(user_column)], pa.int64())
    arrays: list[pa.Array] = [user_column.take(pa.array(starts))]
    names = [contract.user.join_key]
    for column in contract.history_columns:
        values = events[column.name].combine_chunks()
        if column.name == contract.item.join_key:
            values = _sorted_dictionary(values)
        arrays.append(pa.LargeListArray.from_arrays(offsets, values))
        names.append(column.name)
    return pa.RecordBatch.from_arrays(arrays, names=names)


def run_starts(keys: pa.Array) -> np.ndarray:
    """Positions at which a new key starts, for keys that stand together."""
    if not len(keys):
        return np.zeros(0, np.int64)
    changed = pc.not_equal(keys.slice(1), keys.slice(0, len(keys) - 1)).to_numpy(zero_copy_only=False)
    return np.flatnonzero(np.r_[True, changed])


def run_ends(starts: np.ndarray, length: int) -> np.ndarray:
    """Ends of the runs that start at `starts` in a column of this length."""
    return np.r_[starts[1:], length].astype(np.int64)[: len(starts)]


def newest_rows(rows: pa.Table, key: str) -> pa.Table:
    """The newest row of each key of a table with event timestamps."""
    rows = rows.sort_by([(key, "ascending"), (EVENT_TIMESTAMP, "ascending")])
    return rows.take(pa.array(run_ends(run_starts(rows[key].combine_chunks()), rows.num_rows) - 1))


def _sorted_dictionary(values: pa.Array) -> pa.DictionaryArray:
    encoded = values.dictionary_encode()
    order = pc.array_sort_indices(encoded.dictionary).to_numpy()
    rank = np.empty(len(order), np.int32)
    rank[order] = np.arange(len(order), dtype=np.int32)
    return pa.DictionaryArray.from_arrays(
        pa.array(rank[encoded.indices.to_numpy()]), encoded.dictionary.take(pa.array(order))
    )


@dataclass(frozen=True)
class Histories:
    """Events of several requests, flat: request b owns `[offsets[b], offsets[b + 1])`, oldest first.

    `item_keys` are integers of which equal ones mean the same item (within this object and the `item_keys` of the
    candidates that came with it); `columns` hold the other event columns, times in microseconds.
    """

    offsets: np.ndarray
    item_keys: np.ndarray
    columns: dict[str, np.ndarray]

    @property
    def lengths(self) -> np.ndarray:
        """Events of each request."""
        return np.diff(self.offsets)

    @property
    def times(self) -> np.ndarray:
        """Event times, microseconds."""
        return self.columns[EVENT_TIMESTAMP]

    def newest(self, length: int) -> Histories:
        """The newest `length` events of each request."""
        return self.take(np.maximum(self.offsets[1:] - length, self.offsets[:-1]), self.offsets[1:])

    def take(self, starts: np.ndarray, ends: np.ndarray) -> Histories:
        """Any slices `[starts[b], ends[b])` as the histories of new requests."""
        lengths = ends - starts
        offsets = np.r_[0, np.cumsum(lengths)]
        flat = np.arange(offsets[-1]) + np.repeat(starts - offsets[:-1], lengths)
        return Histories(offsets, self.item_keys[flat], {name: column[flat] for name, column in self.columns.items()})


class HistoryLog:
    """The history log, memory-mapped; item keys are row numbers of `items`, the sorted ids of all parts.

    Args:
        contract: the dataset's contract.
        folder: job folder of `user_history`.
        paths: only these parts; default: all.
    """

    def __init__(self, contract: Contract, folder: JobFolder, paths: Sequence[str] | None = None) -> None:
        self.contract = contract
        paths = folder.paths("history_log") if paths is None else paths
        parts = [pa.ipc.open_file(folder.open(path)).get_batch(0) for path in paths]
        item, user = contract.item.join_key, contract.user.join_key
        self.items: pa.Array = pc.unique(pa.concat_arrays([part[item].values.dictionary for part in parts])).sort()
        self._item_key = [pc.index_in(part[item].values.dictionary, self.items).to_numpy() for part in parts]
        self._codes = [part[item].values.indices.to_numpy() for part in parts]
        self._columns = {
            c.name: [
                micros(part[c.name].values) if c.name == EVENT_TIMESTAMP else part[c.name].values.to_numpy()
                for part in parts
            ]
            for c in contract.history_columns
            if c.name != item
        }
        self.users: pa.Array = pa.concat_arrays([part[user] for part in parts])
        self._start = np.concatenate([part[item].offsets.to_numpy()[:-1] for part in parts])
        self._count = np.concatenate([np.diff(part[item].offsets.to_numpy()) for part in parts])
        self._part = np.repeat(np.arange(len(parts)), [part.num_rows for part in parts])

    @property
    def lengths(self) -> np.ndarray:
        """Events of each row."""
        return self._count

    def rows_of(self, user_ids: pa.Array) -> np.ndarray:
        """Row of each user in the log, -1 where the log has none."""
        return pc.fill_null(pc.index_in(user_ids, self.users), -1).to_numpy().astype(np.int64)

    def gather(self, rows: np.ndarray, history_end: np.ndarray, length: int | None = None) -> Histories:
        """Late gather: events `[history_end - length, history_end)` of each row; all up to `history_end` without a length.

        Raises:
            HistoryError: a `history_end` lies beyond what the log holds; the log and the index are of different runs.
        """
        ends = np.where(rows >= 0, history_end, 0)
        if (beyond := ends > self._of_known(self._count, rows)).any():
            row = int(rows[np.flatnonzero(beyond)[0]])
            raise HistoryError(
                f"history_end {int(ends[beyond][0])} of user {self.users[row]} lies beyond the {int(self._count[row])} events in the "
                "log: index and log are of different runs; run `python -m beam_jobs user_history` and `feast apply` again"
            )
        starts = np.zeros_like(ends) if length is None else np.maximum(ends - length, 0)
        lengths = ends - starts
        offsets = np.r_[0, np.cumsum(lengths)]
        base = self._of_known(self._start, rows) + starts
        flat = np.arange(offsets[-1]) + np.repeat(base - offsets[:-1], lengths)
        owner = np.repeat(self._of_known(self._part, rows), lengths)
        item_keys = np.empty(len(flat), np.int64)
        columns = {name: np.empty(len(flat), parts[0].dtype) for name, parts in self._columns.items()}
        for part in np.unique(owner):
            mine = owner == part
            at = flat[mine]
            item_keys[mine] = self._item_key[part][self._codes[part][at]]
            for name, parts in self._columns.items():
                columns[name][mine] = parts[part][at]
        return Histories(offsets, item_keys, columns)

    @staticmethod
    def _of_known(values: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Values of the rows that the log has; 0 for the others."""
        found = np.zeros(len(rows), np.int64)
        found[rows >= 0] = values[rows[rows >= 0]]
        return found


def from_batches(
    contract: Contract, batches: Sequence[pa.RecordBatch | None], candidates: pa.Array
) -> tuple[Histories, np.ndarray]:
    """Unpacked histories beside the candidates of the same requests: `Histories`, and the candidates' item keys."""
    schema = history_schema(contract)
    whole = pa.Table.from_batches([batch for batch in batches if batch is not None], schema)
    item = contract.item.join_key
    ids = pa.concat_arrays([whole[item].combine_chunks(), candidates.cast(schema.field(item).type)])
    keys = ids.dictionary_encode().indices.to_numpy().astype(np.int64)
    offsets = np.r_[0, np.cumsum([0 if batch is None else batch.num_rows for batch in batches])]
    columns = {
        c.name: micros(whole[c.name]) if c.name == EVENT_TIMESTAMP else whole[c.name].to_numpy()
        for c in contract.history_columns
        if c.name != item
    }
    return Histories(offsets, keys[: whole.num_rows], columns), keys[whole.num_rows :]
