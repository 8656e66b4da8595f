"""What a user did, ever: how often, how lately and when last with each item and with each value of some item columns.

Exact while that is smaller, and a sketch of a fixed size beyond (`sketch.py`). **Exactly** kept are the different
items of a history, with their values at the time: for each the number of events, that number fading at each half-life,
and the time of the last. All that is asked of the history is a sum or a maximum over these rows, so a column, or a pair
of columns, costs nothing more. A history of more different items than `Layout.most_rows` is kept as a sketch
from then on: which of the two follows from the events alone, whatever their order, and so it is the same for the job,
the server and training. Exact rows of two parts of a history add up to those of the whole.

Stored: tables of values and times, rows as places in them, compressed; the fading numbers of what happened once
follow from its time and are not stored.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import numpy as np

from feature_repo.contract.arrow import NO_VALUE
from feature_repo.history.envelope import EnvelopeError, Identity, Sealed, seal, unseal
from feature_repo.history.sketch import (
    DEPTH,
    LARGEST_EXPONENT,
    MAGIC,
    MICROS_PER_DAY,
    NEVER,
    Layout,
    Sketch,
    SketchError,
    beside,
    least_of_slots,
    mean_of_slots,
)

EXACT = 2
SKETCHED = 0
_NUMBER = struct.Struct("<I")
PLACES = ("<u1", "<u2", "<u4")


@dataclass(frozen=True)
class Readings:
    """What counts say of N keys.

    Args:
        counts_NCK: of each column: events of all time, then fading counts, one for each half-life; NaN where a row has no
            key.
        days_NC: since the last event; NaN where there was none, or a row has no key.
        totals_NK: events of all keys together, as they are counted.
    """

    counts_NCK: np.ndarray
    days_NC: np.ndarray
    totals_NK: np.ndarray

    @staticmethod
    def of_slots(
        counts: np.ndarray,
        last: np.ndarray,
        time: int,
        slots: Sequence[int],
        totals_K: np.ndarray,
    ) -> Readings:
        """Readings of keys by slot: of several keys of one column the mean, and the latest time.

        Args:
            counts: counts × N × slots; NaN where a row has no key.
            last: N × slots, microseconds of the last event; `NEVER` where there was none.
            time: of the reading, microseconds.
            totals_K: of all events.
        """
        days = np.where(last == NEVER, np.nan, (time - last.astype(np.float64)) / MICROS_PER_DAY)
        return Readings(
            mean_of_slots(counts, slots).transpose(1, 2, 0),
            least_of_slots(days, slots),
            np.broadcast_to(totals_K, (len(last), len(totals_K))),
        )

    def of_known(self, known_N: np.ndarray) -> Readings:
        """The same where items that are not known were never there, whatever cells they share with others.

        Args:
            known_N: bool; the item is the first column.
        """
        counts = self.counts_NCK.copy()
        days = self.days_NC.copy()
        counts[~known_N, 0] = 0
        days[~known_N, 0] = np.nan
        return replace(self, counts_NCK=counts, days_NC=days)


class UserCounts:
    """Counts of one user's events; `add` and `merge` change it.

    Example:
        >>> layout = Layout(("item_id", "brand"), (1, 1), (7.0, 30.0), width=64)
        >>> counts = UserCounts(layout)
        >>> counts.add([np.array([17]), np.array([3])], np.array([1_000_000]))
        >>> counts.read([np.array([17]), np.array([4])], 1_000_000).counts_NCK[0, :, 0]
        array([1., 0.])

    Args:
        layout: which keys are counted, and how many rows are kept exactly.
    """

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        # The moment that weights are relative to
        self.at = 0
        self._rows_RS = np.zeros((0, sum(layout.slots)), np.int64)
        self._weights_RK = np.zeros((0, len(layout.rates)))
        self._last_R = np.zeros(0, np.int64)
        self._sketch: Sketch | None = None

    @property
    def is_exact(self) -> bool:
        """True while rows are kept and no sketch."""
        return self._sketch is None

    @property
    def empty(self) -> bool:
        return not len(self._last_R) if self._sketch is None else self._sketch.empty

    def add(self, codes: Sequence[np.ndarray], times: np.ndarray) -> None:
        """Count events.

        Args:
            codes: for each column the values of N events as `arrow.value_codes` gives them, N or N × slots.
            times: of the N events, microseconds, in any order.
        """
        if not len(times):
            return
        if self._sketch is not None:
            self._sketch.add(self.layout.positions(codes), times)
            return
        self._make_room(int(times.max()))
        weights = np.exp2((times - self.at)[:, None] * self.layout.rates)
        self._add_rows(beside(codes), weights, times)

    def read(self, codes: Sequence[np.ndarray], time: int) -> Readings:
        """Read the counts of some keys at a time.

        A row with several keys of one column, such as an item of three genres, reads their mean, and the latest of
        their times.

        Args:
            codes: of N keys, as of `add`.
            time: microseconds, not before the newest event.
        """
        if self._sketch is not None:
            counts, last = self._sketch.read_with_last(self.layout.positions(codes), time)
            totals_K = self._sketch.total(time)
        else:
            counts, last = self._read_rows(beside(self.layout.keys(codes)), time)
            totals_K = self._weights_RK.sum(axis=0) * np.exp2((self.at - time) * self.layout.rates)
        return Readings.of_slots(counts, last, time, self.layout.key_slots, totals_K)

    def merge(self, other: Self) -> None:
        """Add the counts of a further part of the history.

        Raises:
            ValueError: the layouts differ.
        """
        if other.layout != self.layout:
            raise ValueError(f"counts of {other.layout} cannot be added to those of {self.layout}")
        if other.empty:
            return
        if self._sketch is None and other._sketch is None:
            self._make_room(other.at)
            moved = np.exp2((other.at - self.at) * self.layout.rates)
            self._add_rows(other._rows_RS, other._weights_RK * moved, other._last_R)
            return
        mine = self._as_sketch()
        mine.merge(other._as_sketch())
        self._become(mine)

    def to_bytes(self, user_id: int | str, identity: Identity) -> bytes:
        """The bytes to store under the user's key.

        Args:
            identity: of the events; its fingerprint is the layout's.
        """
        if self._sketch is not None:
            payload = self._sketch.payload(identity.as_of)
            shape = (self.layout.parts, DEPTH)
            return seal(MAGIC, Sealed(SKETCHED, 0, shape, identity, payload), user_id)
        self._move(identity.as_of)
        # Of the header's two numbers, which are shorts
        shape = (len(self._last_R), self._rows_RS.shape[1])
        payload = zlib.compress(self._packed())
        return seal(MAGIC, Sealed(EXACT, 0, shape, identity, payload), user_id)

    def _add_rows(self, rows: np.ndarray, weights: np.ndarray, last: np.ndarray) -> None:
        """Add rows, in any order and any number of times, to the kept ones."""
        self._rows_RS, place = distinct_rows(np.concatenate([self._rows_RS, rows]))
        number = len(self._rows_RS)
        both = np.concatenate([self._weights_RK, weights])
        self._weights_RK = np.stack(
            [np.bincount(place, column, number) for column in both.T], axis=1
        )
        times = np.concatenate([self._last_R, last])
        self._last_R = np.full(number, NEVER)
        np.maximum.at(self._last_R, place, times)
        if number > self.layout.most_rows:
            self._become(self._as_sketch())

    def _as_sketch(self) -> Sketch:
        """The sketch of the same events."""
        if self._sketch is not None:
            return self._sketch
        sketch = Sketch(self.layout)
        if len(self._last_R):
            positions = self.layout.positions(_columns(self._rows_RS, self.layout.slots))
            sketch.add_weighted(positions, self._weights_RK, self._last_R, self.at)
        return sketch

    def _become(self, sketch: Sketch) -> None:
        """Keep a sketch from now on."""
        self._sketch = sketch
        self._rows_RS = self._rows_RS[:0]
        self._weights_RK = self._weights_RK[:0]
        self._last_R = self._last_R[:0]

    def _read_rows(self, wanted_NS: np.ndarray, time: int) -> tuple[np.ndarray, np.ndarray]:
        """Counts × N × slots, and N × slots times of the last event; NaN and `NEVER` where a row has no key."""
        decay = np.exp2((self.at - time) * self.layout.rates)
        counts = np.full((len(self.layout.rates), *wanted_NS.shape), np.nan)
        last = np.full(wanted_NS.shape, NEVER)
        rows = beside(self.layout.keys(_columns(self._rows_RS, self.layout.slots)))
        first = 0
        for slots in self.layout.key_slots:
            column = slice(first, first + slots)
            first += slots
            kept = rows[:, column]
            there = kept != NO_VALUE
            owner = np.nonzero(there)[0]
            keys, place = np.unique(kept[there], return_inverse=True)
            sums = [np.bincount(place, w[owner], len(keys)) for w in self._weights_RK.T]
            newest = np.full(len(keys) + 1, NEVER)
            np.maximum.at(newest, place, self._last_R[owner])
            # A key that never was has the place behind all, where nothing was counted.
            asked = wanted_NS[:, column]
            found = np.searchsorted(keys, asked)
            among = np.r_[keys, NO_VALUE][found] == asked
            found = np.where(among & (asked != NO_VALUE), found, len(keys))
            for number, of_all in enumerate(sums):
                counts[number, :, column] = np.r_[of_all, 0.0][found] * decay[number]
            last[:, column] = newest[found]
        counts[:, wanted_NS == NO_VALUE] = np.nan
        return counts, last

    def _packed(self) -> bytes:
        """Rows as tables and places."""
        parts = [_NUMBER.pack(len(self._last_R))]
        for column in self._rows_RS.T:
            parts += _table(column)
        parts += _table(self._last_R)
        counts = np.rint(self._weights_RK[:, 0]).astype("<u4")
        several = counts > 1
        parts += [counts.tobytes(), self._weights_RK[several, 1:].T.astype("<f4").tobytes()]
        return b"".join(parts)

    def _make_room(self, newest: int) -> None:
        """Move the moment of reference where the weights of new events would grow too large."""
        if self.empty:
            self.at = newest
        elif (newest - self.at) * self.layout.rates.max() > LARGEST_EXPONENT:
            self._move(newest)

    def _move(self, at: int) -> None:
        if not self.empty:
            self._weights_RK *= np.exp2((self.at - at) * self.layout.rates)
        self.at = at


def from_bytes(layout: Layout, data: bytes, user_id: int | str) -> tuple[UserCounts, Identity]:
    """Decode stored counts, with their user and their time.

    Raises:
        SketchError: damaged, a different user's, or in an unknown layout.
    """
    # 1. Open the envelope, which names the user and the layout.
    try:
        sealed = unseal(MAGIC, data, user_id, "counts")
    except EnvelopeError as error:
        raise SketchError(str(error)) from error
    identity = sealed.identity
    if identity.fingerprint != layout.fingerprint:
        raise SketchError(
            f"counts of user {user_id!r} have layout {identity.fingerprint}, the contract declares {layout.fingerprint}: "
            "rebuild and materialise user_history"
        )
    # 2. Rows, or a sketch.
    counts = UserCounts(layout)
    try:
        if sealed.kind == EXACT:
            _unpack(counts, sealed.payload, identity.as_of)
        elif sealed.kind == SKETCHED:
            counts._become(Sketch.of_payload(layout, sealed.payload, identity.as_of))
        else:
            raise ValueError(f"kind {sealed.kind}")
    except (ValueError, struct.error, zlib.error) as error:
        raise SketchError(
            f"counts of user {user_id!r} have {len(sealed.payload)} bytes of kind {sealed.kind}, which no version wrote: {error}"
        ) from error
    return counts, identity


def _unpack(counts: UserCounts, payload: bytes, as_of: int) -> None:
    """Set the rows of `_packed`.

    Raises:
        ValueError: no such rows.
    """
    layout = counts.layout
    reader = _Reader(_inflated(payload, layout))
    (number,) = _NUMBER.unpack(reader.take(_NUMBER.size))
    if number > layout.most_rows:
        raise ValueError(f"{number} rows, more than {layout.most_rows}")
    columns = [reader.table(number) for _ in range(sum(layout.slots))]
    last = reader.table(number)
    times = np.frombuffer(reader.take(4 * number), "<u4").astype(np.float64)
    several = times > 1
    fading = len(layout.rates) - 1
    kept = np.frombuffer(reader.take(4 * fading * int(several.sum())), "<f4").reshape(fading, -1)
    reader.end()
    if (times < 1).any() or not np.isfinite(kept).all() or (kept < 0).any():
        raise ValueError("NaN, infinity or less than nothing")
    weights = np.exp2((last - as_of)[:, None] * layout.rates)
    weights[:, 0] = times
    weights[several, 1:] = kept.T
    counts.at = as_of
    counts._rows_RS = np.stack(columns, axis=1) if number else counts._rows_RS
    counts._weights_RK = weights
    counts._last_R = last


def _inflated(payload: bytes, layout: Layout) -> bytes:
    """Decompress, up to what the rows of a layout can need.

    Raises:
        ValueError: it goes on behind that.
    """
    columns = sum(layout.slots) + 1
    most = 64 + layout.most_rows * (12 * columns + 4 * len(layout.rates)) + 8 * columns
    stream = zlib.decompressobj()
    found = stream.decompress(payload, most)
    if stream.unconsumed_tail or not stream.eof or stream.unused_data:
        raise ValueError("rows that go on, or end early")
    return found


class _Reader:
    """Reads parts of bytes, one behind the other."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def take(self, number: int) -> bytes:
        """The next so many bytes.

        Raises:
            ValueError: there are fewer.
        """
        found = self._data[self._at : self._at + number]
        if len(found) != number:
            raise ValueError("it ends early")
        self._at += number
        return found

    def table(self, rows: int) -> np.ndarray:
        """A column of `_table`.

        Raises:
            ValueError: a row names no entry.
        """
        (size,) = _NUMBER.unpack(self.take(_NUMBER.size))
        if size > rows:
            raise ValueError("a table of more values than rows")
        values = np.frombuffer(self.take(8 * size), "<i8")
        kind = np.dtype(_kind(size))
        places = np.frombuffer(self.take(kind.itemsize * rows), kind)
        if rows and places.max() >= size:
            raise ValueError("a row names a value that there is none of")
        return values[places]

    def end(self) -> None:
        """Refuse what stands behind.

        Raises:
            ValueError: there are bytes left.
        """
        if self._at != len(self._data):
            raise ValueError("bytes behind its end")


def _table(column: np.ndarray) -> list[bytes]:
    """A column's different values, and each row's place among them."""
    values, places = np.unique(column, return_inverse=True)
    return [
        _NUMBER.pack(len(values)),
        values.astype("<i8").tobytes(),
        places.astype(_kind(len(values))).tobytes(),
    ]


def _kind(size: int) -> str:
    """The narrowest whole number that names so many entries."""
    return PLACES[(size > 1 << 8) + (size > 1 << 16)]


def _columns(rows_RS: np.ndarray, slots: Sequence[int]) -> list[np.ndarray]:
    """Codes of each column: R, or R × slots where there are several."""
    parts = np.split(rows_RS, np.cumsum(slots)[:-1], axis=1)
    return [part if part.shape[1] > 1 else part[:, 0] for part in parts]


def distinct_rows(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Different rows in order, and the place of each among them."""
    order = np.lexsort(rows.T[::-1])
    ordered = rows[order]
    new = np.r_[True, (ordered[1:] != ordered[:-1]).any(axis=1)][: len(rows)]
    place = np.empty(len(rows), np.int64)
    place[order] = np.cumsum(new) - 1
    return ordered[new], place
