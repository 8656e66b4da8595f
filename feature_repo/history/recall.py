"""A user's counts as they were at each request, rebuilt from the history log, read for candidates.

Training reads here what serving reads from the store: the counts of all events before the request, exact or in a
sketch (`counts.py`), hash collisions included. A user's requests are visited oldest first; between two of them only
the events in between are added.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property

import numpy as np

from feature_repo.contract.arrow import NO_VALUE, value_codes
from feature_repo.history.counts import Readings, distinct_rows
from feature_repo.history.history import HistoryLog, remembered_name
from feature_repo.history.sketch import (
    DEPTH,
    MICROS,
    Layout,
    Sketch,
    beside,
)


class Recall:
    """Readings of counts as they were at requests.

    Args:
        log: the history log.
        layout: of the counts; default: as the dataset declares.
        newest: count only so many events before each request; default: all.
        exact: count without collisions however many items there are, which no store of a fixed size can serve.
    """

    def __init__(
        self,
        log: HistoryLog,
        layout: Layout | None = None,
        *,
        newest: int | None = None,
        exact: bool = False,
    ) -> None:
        self.log = log
        self.newest = newest
        self.exact = exact
        self.layout = layout or Layout.of(log.contract)

    @cached_property
    def _item_codes(self) -> np.ndarray:
        return value_codes(self.log.items)

    def read(
        self,
        rows: np.ndarray,
        ends: np.ndarray,
        times: np.ndarray,
        offsets: np.ndarray,
        codes: Sequence[np.ndarray],
    ) -> Readings:
        """Readings of all candidates.

        Args:
            rows: of each request's user in the log, -1 for none.
            ends: events known at each request.
            times: of the requests, microseconds.
            offsets: request b's candidates are `[offsets[b], offsets[b + 1])`.
            codes: of the candidates, for each column of the layout.
        """
        names = len(self.layout.names)
        counts = np.empty((offsets[-1], names, len(self.layout.rates)), np.float32)
        days = np.empty((offsets[-1], names), np.float32)
        totals = np.empty((offsets[-1], len(self.layout.rates)), np.float32)
        order = np.lexsort((ends, rows))
        first = np.flatnonzero(np.r_[True, np.diff(rows[order]) != 0][: len(order)])
        for start, stop in zip(first, np.r_[first[1:], len(order)], strict=True):
            asked = order[start:stop]
            spans = [np.arange(offsets[b], offsets[b + 1]) for b in asked]
            known = ends[asked] if rows[asked[0]] >= 0 else np.zeros(len(asked), np.int64)
            candidates = np.concatenate(spans)
            found = self._of_user(
                int(rows[asked[0]]),
                known,
                times[asked],
                [len(span) for span in spans],
                [c[candidates] for c in codes],
            )
            counts[candidates] = found.counts_NCK
            days[candidates] = found.days_NC
            totals[candidates] = found.totals_NK
        return Readings(counts, days, totals)

    def _of_user(
        self,
        row: int,
        ends: np.ndarray,
        times: np.ndarray,
        sizes: list[int],
        codes: Sequence[np.ndarray],
    ) -> Readings:
        """Readings of one user's requests, oldest first."""
        # Of users with late events no request's past is the beginning of the next one's: each is read by itself.
        if len(times) > 1 and self.log.any_late(np.array([row])):
            bounds = np.r_[0, np.cumsum(sizes)]
            return _joined(
                [
                    self._of_user(
                        row,
                        ends[[n]],
                        times[[n]],
                        [sizes[n]],
                        [c[bounds[n] : bounds[n + 1]] for c in codes],
                    )
                    for n in range(len(times))
                ]
            )
        # 1. Read all events that the newest of the requests knows, once for all requests.
        names = ["action", "event_timestamp", *map(remembered_name, self.layout.columns[1:])]
        history = self.log.gather(np.array([row]), ends[-1:], columns=names, times=times[-1:])
        # 2. Keep the first action; places in the history become places among the kept events.
        counted = np.flatnonzero(history.columns["action"] == 0)
        event_codes = [
            self._item_codes[history.item_keys],
            *(history.columns[n] for n in names[2:]),
        ]
        events = [c[counted] for c in event_codes]
        event_times = history.times[counted]
        oldest = np.zeros_like(ends) if self.newest is None else ends - self.newest
        begins = np.searchsorted(counted, oldest)
        ends = np.searchsorted(counted, ends)
        # 3. Visit the requests: add the events since the request before, then read.
        exactly = self._exactly(beside(events), begins, ends)
        books = dict.fromkeys(np.unique(exactly).tolist())
        found = []
        first = 0
        for begin, end, time, size, exact in zip(
            begins.tolist(), ends.tolist(), times.tolist(), sizes, exactly.tolist(), strict=True
        ):
            book = books[exact] or _Book.of(self.layout, events, codes, event_times, exact=exact)
            books[exact] = book
            book.bring_to(begin, end)
            found.append(book.read(first, first + size, time))
            first += size
        return _joined(found)

    def _exactly(self, rows_ES: np.ndarray, begins: np.ndarray, ends: np.ndarray) -> np.ndarray:
        """Which requests' counts are exact: those of few enough different items, bool."""
        if self.exact:
            return np.ones(len(ends), bool)
        _, which = distinct_rows(rows_ES)
        if self.newest is not None:
            different = [
                len(np.unique(which[begin:end]))
                for begin, end in zip(begins.tolist(), ends.tolist(), strict=True)
            ]
            return np.array(different, np.int64) <= self.layout.most_rows
        new = np.zeros(len(which), bool)
        new[np.unique(which, return_index=True)[1]] = True
        return np.r_[0, np.cumsum(new)][ends] <= self.layout.most_rows


class _Book:
    """Counts of a user's events that go forward in time, read for candidates."""

    def __init__(
        self,
        layout: Layout,
        events: np.ndarray,
        candidates: np.ndarray,
        times: np.ndarray,
        resolution: int = MICROS,
    ) -> None:
        self._layout = layout
        self._resolution = resolution
        self._events = events
        self._candidates = candidates
        self._times = times
        self._sketch = Sketch(layout, resolution)
        self._begin = 0
        self._end = 0

    @staticmethod
    def of(
        layout: Layout,
        events: Sequence[np.ndarray],
        candidates: Sequence[np.ndarray],
        times: np.ndarray,
        *,
        exact: bool,
    ) -> _Book:
        """A book of all events and candidates of a user; nothing is counted yet.

        Args:
            exact: a cell for each key; else the layout's cells.
        """
        if not exact:
            return _Book(layout, layout.positions(events), layout.positions(candidates), times)
        # Each key gets a cell of its own, numbered through all columns; one row of hashing is enough.
        number = len(times)
        size = 0
        cells = []
        for of_events, of_candidates in zip(
            layout.keys(events), layout.keys(candidates), strict=True
        ):
            both = np.concatenate([beside([of_events]), beside([of_candidates])])
            keys, place = np.unique(both, return_inverse=True)
            place = np.where(keys[place] == NO_VALUE, -1, place + size)
            cells.append(place.reshape(both.shape))
            size += len(keys)
        width = -(-size // (DEPTH * layout.parts))
        own = replace(layout, width=max(width, 1))
        whole = np.concatenate(cells, axis=1)
        each = np.where(whole < 0, own.size, whole)[..., None]
        return _Book(own, each[:number], each[number:], times, resolution=1)

    def bring_to(self, begin: int, end: int) -> None:
        """Count the events `[begin, end)`; earlier ones of them were counted already."""
        # What leaves a window cannot be taken out: anew
        if begin != self._begin:
            self._sketch = Sketch(self._layout, self._resolution)
            self._begin = begin
            self._end = begin
        done = slice(self._end, end)
        self._sketch.add(self._events[done], self._times[done])
        self._end = end

    def read(self, start: int, stop: int, time: int) -> Readings:
        """Read candidates `[start, stop)` at a time."""
        asked = self._candidates[start:stop]
        counts, last = self._sketch.read_with_last(asked, time)
        return Readings.of_slots(
            counts, last, time, self._layout.key_slots, self._sketch.total(time)
        )


def _joined(parts: Sequence[Readings]) -> Readings:
    """Readings of several requests, one behind the other."""
    return Readings(
        np.concatenate([part.counts_NCK for part in parts]),
        np.concatenate([part.days_NC for part in parts]),
        np.concatenate([part.totals_NK for part in parts]),
    )
