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

Beside its counts a cell holds the time of the newest event of its keys; the smallest of a key's cells is read, so that a
reading is never too early. Stored, counts are whole numbers, fading counts float32 and times whole seconds. Only events of
the dataset's first action are counted. What a user has of few items is kept exactly instead (`counts.py`).
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

MAGIC = b"MSKT"
# Raised when cells or hashes change their meaning
VERSION = 3
DEPTH = 4
# What an item of a history is reckoned to cost where it is kept exactly
ROW_BYTES = 32
MICROS_PER_DAY = 86_400_000_000
MICROS = 1_000_000
# A time before any event
NEVER = np.iinfo(np.int64).min
# Weights are relative to a moment that is moved forward once they have grown by 2^64.
LARGEST_EXPONENT = 64.0
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
        most_rows: different items that are kept exactly (`counts.py`), beyond which there is a sketch.
        pairs: places of two columns whose values are counted together too, as one key.

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
    most_rows: int = 0
    pairs: tuple[tuple[int, int], ...] = ()

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
        size = (kibibytes or memory.kibibytes) * 1024
        # A count, its fading ones, and the time of the last event
        cells = size // (4 * (2 + len(memory.half_lives_days)))
        width = max(cells // (DEPTH * (2 if remembered else 1)), 1)
        pairs = tuple((columns.index(one), columns.index(other)) for one, other in memory.pairs)
        return Layout(columns, slots, memory.half_lives_days, width, size // ROW_BYTES, pairs)

    @cached_property
    def names(self) -> tuple[str, ...]:
        """What is counted: the columns, then the pairs."""
        pairs = (f"{self.columns[one]}_{self.columns[other]}" for one, other in self.pairs)
        return (*self.columns, *pairs)

    @cached_property
    def key_slots(self) -> tuple[int, ...]:
        """Keys that a row may have of each of `names`."""
        return (*self.slots, *(1 for _ in self.pairs))

    def keys(self, codes: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Keys of rows for each of `names`: the columns' codes, and what two of them come to together.

        Args:
            codes: for each column the values of N rows as `arrow.value_codes` gives them, N or
                N × slots.
        """
        return [*codes, *(pair_codes(codes[one], codes[other]) for one, other in self.pairs)]

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
        names = [zlib.crc32(name.encode()) for name in self.names]
        column = np.repeat(np.array(names, np.uint64), self.key_slots)[:, None]
        return _spread(column * np.uint64(DEPTH) + np.arange(DEPTH, dtype=np.uint64))

    @cached_property
    def _first(self) -> np.ndarray:
        """First cell of each slot's row, int64, slots × DEPTH."""
        part = np.repeat(np.arange(len(self.names)) > 0, self.key_slots)
        return (part[:, None] * DEPTH + np.arange(DEPTH)) * self.width

    def positions(self, codes: Sequence[np.ndarray]) -> np.ndarray:
        """Cells of keys, int64, N × slots of all `names` × DEPTH; `size` where there is no key.

        Args:
            codes: of the columns, as of `keys`.
        """
        keys = beside(self.keys(codes))
        hashed = _spread(keys.view(np.uint64)[..., None] ^ self._salts) >> np.uint64(33)
        cells = self._first + (hashed % np.uint64(self.width)).astype(np.int64)
        cells[keys == NO_VALUE] = self.size
        return cells


class Sketch:
    """Counts of one user's events in cells; `add` and `merge` change it.

    Args:
        layout: which keys have which cells.
        resolution: microseconds to whose multiples times of the last event are rounded up; stored are whole seconds.
    """

    def __init__(self, layout: Layout, resolution: int = MICROS) -> None:
        self.layout = layout
        self.resolution = resolution
        # The last cell takes what has no key, and is read by nobody.
        self.cells = np.zeros((len(layout.rates), layout.size + 1))
        # Of all events together; never changed in place, since readings hold it
        self.totals_K = np.zeros(len(layout.rates))
        # The time of the newest event of any key of a cell
        self.last = np.full(layout.size + 1, NEVER)
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
        weights = np.exp2((times - self.at)[:, None] * self.layout.rates)
        self._add(positions, weights, times)

    def add_weighted(
        self, positions: np.ndarray, weights_NK: np.ndarray, last: np.ndarray, at: int
    ) -> None:
        """Add what was counted of N rows elsewhere.

        Args:
            positions: of the rows' keys, N × slots × DEPTH.
            weights_NK: of each row, relative to the moment `at`.
            last: time of each row's newest event, microseconds.
        """
        if not len(last):
            return
        self._make_room(max(at, int(last.max())))
        self._add(positions, weights_NK * np.exp2((at - self.at) * self.layout.rates), last)

    def _add(self, positions: np.ndarray, weights_NK: np.ndarray, last: np.ndarray) -> None:
        self.totals_K = self.totals_K + weights_NK.sum(axis=0)
        index = positions.ravel()
        each = positions[0].size
        rounded = -(-last // self.resolution) * self.resolution
        np.maximum.at(self.last, index, rounded.repeat(each))
        if len(index) < _BULK:
            rows = np.arange(len(self.cells))[:, None] * self.cells.shape[1]
            np.add.at(
                self.cells.reshape(-1),
                (rows + index).ravel(),
                weights_NK.T.repeat(each, axis=1).ravel(),
            )
            return
        for row, weight in zip(self.cells, weights_NK.T, strict=True):
            row += np.bincount(index, weight.repeat(each), len(row))

    def read(self, positions: np.ndarray, time: int) -> np.ndarray:
        """Return the counts of some keys at a time, N × `names` × counts; NaN where a row has no key.

        A row with several keys of one column, such as an item of three genres, reads their mean.

        Args:
            positions: of the keys, N × slots × DEPTH.
            time: microseconds, not before the newest event.
        """
        counts, _ = self.read_with_last(positions, time)
        return mean_of_slots(counts, self.layout.key_slots).transpose(1, 2, 0)

    def total(self, time: int) -> np.ndarray:
        """All events at a time, and how many of them have not faded: one number for each count."""
        if self.empty:
            return self.totals_K
        faded: np.ndarray = self.totals_K * np.exp2((self.at - time) * self.layout.rates)
        return faded

    def read_with_last(self, positions: np.ndarray, time: int) -> tuple[np.ndarray, np.ndarray]:
        """Return counts × N × slots, NaN where a row has no key, and N × slots times of the last event, `NEVER` where
        there was none. A time may be later than the key's own, as a count may be larger.
        """
        nothing = positions[..., 0] == self.layout.size
        values = self.cells[:, positions].min(axis=-1)
        values[:, nothing] = np.nan
        if not self.empty:
            values *= np.exp2((self.at - time) * self.layout.rates)[:, None, None]
        last = self.last[positions].min(axis=-1)
        last[nothing] = NEVER
        return values, last

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
        moved = np.exp2((other.at - self.at) * self.layout.rates)
        self.cells += other.cells * moved[:, None]
        self.totals_K = self.totals_K + other.totals_K * moved
        np.maximum(self.last, other.last, out=self.last)

    def bounds(self, time: int) -> np.ndarray:
        """By how much a reading at a time may exceed the truth, parts × counts: e / width · total.

        A reading exceeds its part's bound with a probability of at most e^-DEPTH.
        """
        rows = self.cells[:, :-1].reshape(len(self.cells), self.layout.parts, DEPTH, -1)
        total = rows[:, :, 0].sum(-1) * np.exp2((self.at - time) * self.layout.rates)[:, None]
        return np.e / self.layout.width * total.T

    def payload(self, as_of: int) -> bytes:
        """The cells as bytes, relative to a moment: counts, fading counts, seconds of the last event."""
        self._move(as_of)
        kept = self.cells[:, :-1]
        seconds = np.maximum(self.last[:-1] // MICROS, 0)
        parts = (np.rint(kept[0]).astype("<u4"), kept[1:].astype("<f4"), seconds.astype("<u4"))
        return b"".join(part.tobytes() for part in parts)

    @staticmethod
    def of_payload(layout: Layout, payload: bytes, as_of: int) -> Sketch:
        """The sketch of `payload`.

        Raises:
            ValueError: no sketch of this layout has such bytes.
        """
        sketch = Sketch(layout)
        rows = len(layout.rates)
        if len(payload) != 4 * (rows + 1) * layout.size:
            raise ValueError(f"{len(payload)} bytes for {layout.size} cells")
        cells = np.frombuffer(payload, "<f4").reshape(rows + 1, layout.size)
        whole = cells.view("<u4")
        if not np.isfinite(cells[1:-1]).all() or (cells[1:-1] < 0).any():
            raise ValueError("NaN, infinity or less than nothing")
        sketch.cells[0, :-1] = whole[0]
        sketch.cells[1:, :-1] = cells[1:-1]
        seconds = whole[-1].astype(np.int64)
        sketch.last[:-1] = np.where(seconds > 0, seconds * MICROS, NEVER)
        # Each event added to one cell of each row of items.
        sketch.totals_K = sketch.cells[:, : layout.width].sum(axis=1)
        sketch.at = as_of
        sketch.empty = not whole[0].any()
        return sketch

    def _make_room(self, newest: int) -> None:
        """Move the moment of reference where the weights of new events would grow too large."""
        if self.empty:
            self.at = newest
            self.empty = False
        elif (newest - self.at) * self.layout.rates.max() > LARGEST_EXPONENT:
            self._move(newest)

    def _move(self, at: int) -> None:
        if not self.empty:
            faded = np.exp2((self.at - at) * self.layout.rates)
            self.cells *= faded[:, None]
            self.totals_K = self.totals_K * faded
        self.at = at


def beside(codes: Sequence[np.ndarray]) -> np.ndarray:
    """Codes of several columns, N or N × slots each, as N × slots of all."""
    return np.concatenate([c if c.ndim > 1 else c[:, None] for c in codes], axis=1)


def pair_codes(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """A code for each two codes; `NO_VALUE` where one of them is."""
    with np.errstate(over="ignore"):
        mixed = _spread(_spread(one.view(np.uint64)) + other.view(np.uint64)).view(np.int64)
    return np.where((one == NO_VALUE) | (other == NO_VALUE), NO_VALUE, mixed)


def mean_of_slots(values: np.ndarray, slots: Sequence[int]) -> np.ndarray:
    """Counts × N × slots → counts × N × columns: the mean over a column's slots that are no NaN."""
    if max(slots) == 1:
        return values
    there = ~np.isnan(values)
    starts = np.r_[0, np.cumsum(slots)[:-1]]
    total = np.add.reduceat(np.where(there, values, 0), starts, axis=-1)
    number = np.add.reduceat(there.astype(np.float64), starts, axis=-1)
    return total / np.where(number > 0, number, np.nan)


def least_of_slots(values: np.ndarray, slots: Sequence[int]) -> np.ndarray:
    """Values of N × slots → N × columns: the least of a column's slots that are no NaN."""
    if max(slots) == 1:
        return values
    starts = np.r_[0, np.cumsum(slots)[:-1]]
    found: np.ndarray = np.fmin.reduceat(values, starts, axis=-1)
    return found


def _spread(values: np.ndarray) -> np.ndarray:
    """Spread every bit over all 64 (the finaliser of MurmurHash3)."""
    with np.errstate(over="ignore"):
        mixed = (values ^ (values >> np.uint64(33))) * np.uint64(0xFF51AFD7ED558CCD)
        mixed = (mixed ^ (mixed >> np.uint64(33))) * np.uint64(0xC4CEB9FE1A85EC53)
        return mixed ^ (mixed >> np.uint64(33))
