"""A sketch of a user's whole history: how often, ever and lately, with each item and with each value
of some item columns, at a size that does not grow.

Source: count-min sketch (Cormode and Muthukrishnan, 2005) over forward-decayed weights (Cormode,
Shkapenyuk, Srivastava and Xu, 2009).

Each key (an item, a brand, …) has one cell in each of `DEPTH` rows, by hash. An event adds to the
cells of its keys, once for each half-life: 1 to the count of all time, and 2^(t / half-life) to a
count that fades. What is read of a key is the smallest of its cells. Weights are never negative, so

    true weight ≤ reading,   and   P(reading > true + e / width · total) ≤ e^-DEPTH

with `total` the weight of all keys in that part of the sketch (`Sketch.bounds`). Items have a part
of their own, the columns share another. A sketch is a sum over events: sketches of two parts of a
history add up to the sketch of the whole, and an event more is an addition to some cells.

Stored, counts are whole numbers and fading counts float32; a sketch that is mostly empty is stored
as its filled cells. Only events of the dataset's first action are counted.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Self

import numpy as np

from feature_repo.contract.arrow import NO_VALUE
from feature_repo.contract.contract import Contract
from feature_repo.history.envelope import EnvelopeError, Identity, Sealed, seal, unseal

MAGIC = b"MSKT"
# Raised when cells or hashes change their meaning
VERSION = 1
DEPTH = 4
MICROS_PER_DAY = 86_400_000_000
# Weights are relative to a moment that is moved forward once they have grown by 2^64.
LARGEST_EXPONENT = 64.0
DENSE = 0
SPARSE = 1
# Cells to be added to; from here on one pass over the sketch is cheaper
_BULK = 512


class SketchError(ValueError):
    """Stored bytes are no sketch of this user and layout; the message says what differs."""


@dataclass(frozen=True)
class Layout:
    """Which keys have which cells.

    Args:
        columns: names of what is counted: the item first.
        slots: keys that a row may have of each: 1, or more of a bag.
        half_lives_days: of the counts that fade.
        width: cells of a row, in each part.

    Example:
        >>> layout = Layout(("item_id", "brand"), (1, 1), (7.0, 30.0), width=64)
        >>> sketch = Sketch(layout)
        >>> sketch.add(layout.positions([np.array([17]), np.array([3])]), np.array([1_000_000]))
        >>> sketch.read(layout.positions([np.array([17]), np.array([4])]), 1_000_000)[0, :, 0]
        array([1., 0.])
    """

    columns: tuple[str, ...]
    slots: tuple[int, ...]
    half_lives_days: tuple[float, ...]
    width: int

    @staticmethod
    def of(contract: Contract, kibibytes: int | None = None) -> Layout:
        """The layout that a dataset declares.

        Args:
            kibibytes: instead of the declared size.
        """
        memory = contract.spec.memory
        remembered = contract.remembered
        columns = (contract.item.join_key, *(c.name for c in remembered))
        slots = (1, *(c.slots for c in remembered))
        cells = (kibibytes or memory.kibibytes) * 1024 // (4 * (1 + len(memory.half_lives_days)))
        width = max(cells // (DEPTH * (2 if remembered else 1)), 1)
        return Layout(columns, slots, memory.half_lives_days, width)

    @property
    def parts(self) -> int:
        """Parts that share no cell: items, and all columns together."""
        return 2 if len(self.columns) > 1 else 1

    @property
    def size(self) -> int:
        return self.parts * DEPTH * self.width

    @cached_property
    def rates(self) -> np.ndarray:
        """By how much the exponent of each count grows in a microsecond: 0 for the count of all
        time.
        """
        return np.array([0.0, *(1 / (days * MICROS_PER_DAY) for days in self.half_lives_days)])

    @cached_property
    def fingerprint(self) -> str:
        """32 hexadecimal digits over everything that cells depend on."""
        content = [VERSION, DEPTH, asdict(self)]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:32]

    @cached_property
    def _salts(self) -> np.ndarray:
        """Return the salts that tell columns and rows apart before hashing, uint64, slots × DEPTH."""
        names = [zlib.crc32(name.encode()) for name in self.columns]
        column = np.repeat(np.array(names, np.uint64), self.slots)[:, None]
        return _spread(column * np.uint64(DEPTH) + np.arange(DEPTH, dtype=np.uint64))

    @cached_property
    def _first(self) -> np.ndarray:
        """First cell of each slot's row, int64, slots × DEPTH."""
        part = np.repeat(np.arange(len(self.columns)) > 0, self.slots)
        return (part[:, None] * DEPTH + np.arange(DEPTH)) * self.width

    def positions(self, codes: Sequence[np.ndarray]) -> np.ndarray:
        """Cells of keys, int64, N × slots of all columns × DEPTH; `size` where there is no key.

        Args:
            codes: for each column the values of N rows as `arrow.value_codes` gives them, N or
                N × slots.
        """
        keys = beside(codes)
        hashed = _spread(keys.view(np.uint64)[..., None] ^ self._salts) >> np.uint64(33)
        cells = self._first + (hashed % np.uint64(self.width)).astype(np.int64)
        cells[keys == NO_VALUE] = self.size
        return cells


class Sketch:
    """Counts of one user's events; `add` and `merge` change it.

    Args:
        layout: which keys have which cells.
    """

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        # The last cell takes what has no key, and is read by nobody.
        self.cells = np.zeros((len(layout.rates), layout.size + 1))
        # The moment that weights are relative to
        self.at = 0
        self.empty = True

    def add(self, positions: np.ndarray, times: np.ndarray) -> None:
        """Count events.

        Args:
            positions: of the events' keys, N × slots × DEPTH.
            times: of the N events, microseconds, in any order.
        """
        if not len(times):
            return
        self._make_room(int(times.max()))
        weights = np.exp2((times - self.at) * self.layout.rates[:, None])
        index = positions.ravel()
        each = positions[0].size
        if len(index) < _BULK:
            rows = np.arange(len(self.cells))[:, None] * self.cells.shape[1]
            np.add.at(
                self.cells.reshape(-1), (rows + index).ravel(), weights.repeat(each, axis=1).ravel()
            )
            return
        for row, weight in zip(self.cells, weights, strict=True):
            row += np.bincount(index, weight.repeat(each), len(row))

    def read(self, positions: np.ndarray, time: int) -> np.ndarray:
        """Return the counts of some keys at a time, N × columns × counts; NaN where a row has no key.

        A row with several keys of one column, such as an item of three genres, reads their mean.

        Args:
            positions: of the keys, N × slots × DEPTH.
            time: microseconds, not before the newest event.
        """
        values = self.cells[:, positions].min(axis=-1)
        values[:, positions[..., 0] == self.layout.size] = np.nan
        if not self.empty:
            values *= np.exp2((self.at - time) * self.layout.rates)[:, None, None]
        return mean_of_slots(values, self.layout.slots).transpose(1, 2, 0)

    def merge(self, other: Self) -> None:
        """Add the counts of a second sketch.

        Raises:
            ValueError: the layouts differ.
        """
        if other.layout != self.layout:
            raise ValueError(f"a sketch of {other.layout} cannot be added to one of {self.layout}")
        if other.empty:
            return
        self._make_room(other.at)
        self.cells += other.cells * np.exp2((other.at - self.at) * self.layout.rates)[:, None]

    def bounds(self, time: int) -> np.ndarray:
        """By how much a reading at a time may exceed the truth, parts × counts: e / width · total.

        A reading exceeds its part's bound with a probability of at most e^-DEPTH.
        """
        rows = self.cells[:, :-1].reshape(len(self.cells), self.layout.parts, DEPTH, -1)
        total = rows[:, :, 0].sum(-1) * np.exp2((self.at - time) * self.layout.rates)[:, None]
        return np.e / self.layout.width * total.T

    def to_bytes(self, user_id: int | str, identity: Identity) -> bytes:
        """The bytes to store under the user's key.

        Args:
            identity: of the events; its fingerprint is the layout's.
        """
        self._move(identity.as_of)
        filled = np.flatnonzero(self.cells[0, :-1])
        sparse = len(filled) * (4 + 4 * len(self.cells)) < 4 * len(self.cells) * self.layout.size
        kept = self.cells[:, filled] if sparse else self.cells[:, :-1]
        parts = [filled.astype("<u4").tobytes()] if sparse else []
        parts += [np.rint(kept[0]).astype("<u4").tobytes(), kept[1:].astype("<f4").tobytes()]
        kind = SPARSE if sparse else DENSE
        shape = (self.layout.parts, DEPTH)
        return seal(MAGIC, Sealed(kind, 0, shape, identity, b"".join(parts)), user_id)

    def _make_room(self, newest: int) -> None:
        """Move the moment of reference where the weights of new events would grow too large."""
        if self.empty:
            self.at = newest
            self.empty = False
        elif (newest - self.at) * self.layout.rates.max() > LARGEST_EXPONENT:
            self._move(newest)

    def _move(self, at: int) -> None:
        if not self.empty:
            self.cells *= np.exp2((self.at - at) * self.layout.rates)[:, None]
        self.at = at


def from_bytes(layout: Layout, data: bytes, user_id: int | str) -> tuple[Sketch, Identity]:
    """Decode a stored sketch, with its user and its time.

    Raises:
        SketchError: damaged, a different user's, or in an unknown layout.
    """
    # 1. Open the envelope, which names the user and the layout.
    try:
        sealed = unseal(MAGIC, data, user_id, "counts")
    except EnvelopeError as error:
        raise SketchError(str(error)) from error
    if sealed.identity.fingerprint != layout.fingerprint:
        raise SketchError(
            f"counts of user {user_id!r} have layout {sealed.identity.fingerprint}, the contract declares {layout.fingerprint}: "
            "rebuild and materialise user_history"
        )
    # Whole counts first, then a row for each half-life; sparse ones name their cells before.
    sketch = Sketch(layout)
    rows = len(layout.rates)
    each = 4 * (rows + 1) if sealed.kind == SPARSE else 4 * rows
    number, rest = divmod(len(sealed.payload), each)
    if (
        rest
        or sealed.kind not in (DENSE, SPARSE)
        or (sealed.kind == DENSE and number != layout.size)
    ):
        raise SketchError(
            f"counts of user {user_id!r} have {len(sealed.payload)} bytes of kind {sealed.kind}, which no version wrote"
        )
    # 2. Read the counts into their cells, and refuse what no sum of weights can be.
    filled = np.arange(number)
    payload = sealed.payload
    if sealed.kind == SPARSE:
        filled = np.frombuffer(payload, "<u4", number)
        payload = payload[4 * number :]
        # A cell `size` exists and takes what has no key, so no stored count may name it.
        if number and filled.max() >= layout.size:
            raise SketchError(f"counts of user {user_id!r} name cells that there are none of")
    sketch.cells[0, filled] = np.frombuffer(payload, "<u4", number)
    fading = np.frombuffer(payload, "<f4", offset=4 * number).reshape(rows - 1, number)
    if not np.isfinite(fading).all() or (fading < 0).any():
        raise SketchError(f"counts of user {user_id!r} hold NaN, infinity or less than nothing")
    sketch.cells[1:, filled] = fading
    sketch.at = sealed.identity.as_of
    sketch.empty = not number
    return sketch, sealed.identity


def beside(codes: Sequence[np.ndarray]) -> np.ndarray:
    """Codes of several columns, N or N × slots each, as N × slots of all."""
    return np.concatenate([c if c.ndim > 1 else c[:, None] for c in codes], axis=1)


def mean_of_slots(values: np.ndarray, slots: Sequence[int]) -> np.ndarray:
    """Counts × N × slots → counts × N × columns: the mean over a column's slots that are no NaN."""
    if max(slots) == 1:
        return values
    there = ~np.isnan(values)
    starts = np.r_[0, np.cumsum(slots)[:-1]]
    total = np.add.reduceat(np.where(there, values, 0), starts, axis=-1)
    number = np.add.reduceat(there.astype(np.float64), starts, axis=-1)
    return total / np.where(number > 0, number, np.nan)


def _spread(values: np.ndarray) -> np.ndarray:
    """Spread every bit over all 64 (the finaliser of MurmurHash3)."""
    with np.errstate(over="ignore"):
        mixed = (values ^ (values >> np.uint64(33))) * np.uint64(0xFF51AFD7ED558CCD)
        mixed = (mixed ^ (mixed >> np.uint64(33))) * np.uint64(0xC4CEB9FE1A85EC53)
        return mixed ^ (mixed >> np.uint64(33))
