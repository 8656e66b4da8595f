"""A user's sketch as it was at each request, rebuilt from the history log, read for candidates.

Training reads here what serving reads from the store: the sketch of all events before the request
(`sketch.py`), hash collisions included. A user's requests are visited oldest first; between two of
them only the events in between are added.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property

import numpy as np

from feature_repo.contract.arrow import NO_VALUE, value_codes
from feature_repo.history.history import HistoryLog, remembered_name
from feature_repo.history.sketch import DEPTH, Layout, Sketch, beside


class Recall:
    """Readings of sketches as they were at requests.

    Args:
        log: the history log.
        layout: of the sketches; default: as the dataset declares.
        newest: count only so many events before each request; default: all.
        exact: count without collisions, in as many cells as there are keys: the plain twin, which no
            store of a fixed size can serve.
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
    ) -> np.ndarray:
        """Readings of all candidates, N × columns × counts, float32; NaN where one has no key.

        Args:
            rows: of each request's user in the log, -1 for none.
            ends: events known at each request.
            times: of the requests, microseconds.
            offsets: request b's candidates are `[offsets[b], offsets[b + 1])`.
            codes: of the candidates, for each column of the layout.
        """
        counts = len(self.layout.rates)
        columns = len(self.layout.columns)
        found = np.empty((offsets[-1], columns, counts), np.float32)
        order = np.lexsort((ends, rows))
        first = np.flatnonzero(np.r_[True, np.diff(rows[order]) != 0][: len(order)])
        for start, stop in zip(first, np.r_[first[1:], len(order)], strict=True):
            asked = order[start:stop]
            spans = [np.arange(offsets[b], offsets[b + 1]) for b in asked]
            known = ends[asked] if rows[asked[0]] >= 0 else np.zeros(len(asked), np.int64)
            candidates = np.concatenate(spans)
            found[candidates] = self._of_user(
                int(rows[asked[0]]),
                known,
                times[asked],
                [len(span) for span in spans],
                [c[candidates] for c in codes],
            )
        return found

    def _of_user(
        self,
        row: int,
        ends: np.ndarray,
        times: np.ndarray,
        sizes: list[int],
        codes: Sequence[np.ndarray],
    ) -> np.ndarray:
        """Readings of one user's requests, oldest first."""
        # Of users with late events no request's past is the beginning of the next one's: each is read by itself.
        if len(times) > 1 and self.log.any_late(np.array([row])):
            bounds = np.r_[0, np.cumsum(sizes)]
            return np.concatenate(
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
        event_codes = [self._item_codes[history.item_keys]]
        event_codes += [history.columns[name] for name in names[2:]]
        layout, events, candidates = self._positions(event_codes, codes)
        # 2. Keep the first action; places in the history become places among the kept events.
        counted = np.flatnonzero(history.columns["action"] == 0)
        events = events[counted]
        event_times = history.times[counted]
        oldest = np.zeros_like(ends) if self.newest is None else ends - self.newest
        begins = np.searchsorted(counted, oldest)
        ends = np.searchsorted(counted, ends)
        # 3. Visit the requests: add the events since the request before, then read.
        found = []
        first = 0
        done = 0
        sketch = Sketch(layout)
        for begin, end, time, size in zip(
            begins.tolist(), ends.tolist(), times.tolist(), sizes, strict=True
        ):
            # What leaves the window cannot be taken out: anew
            if self.newest is not None:
                sketch = Sketch(layout)
                done = begin
            sketch.add(events[done:end], event_times[done:end])
            found.append(sketch.read(candidates[first : first + size], time))
            first = first + size
            done = end
        return np.concatenate(found)

    def _positions(
        self, events: Sequence[np.ndarray], candidates: Sequence[np.ndarray]
    ) -> tuple[Layout, np.ndarray, np.ndarray]:
        """Cells of events and candidates, and the layout that they are of."""
        if not self.exact:
            return self.layout, self.layout.positions(events), self.layout.positions(candidates)
        # Each key gets a cell of its own, numbered through all columns; one row of hashing is enough.
        number = len(events[0])
        size = 0
        cells = []
        for of_events, of_candidates in zip(events, candidates, strict=True):
            both = np.concatenate([beside([of_events]), beside([of_candidates])])
            keys, place = np.unique(both, return_inverse=True)
            place = np.where(keys[place] == NO_VALUE, -1, place + size)
            cells.append(place.reshape(both.shape))
            size += len(keys)
        width = -(-size // (DEPTH * self.layout.parts))
        layout = replace(self.layout, width=max(width, 1))
        whole = np.concatenate(cells, axis=1)
        each = np.where(whole < 0, layout.size, whole)[..., None]
        return layout, each[:number], each[number:]
