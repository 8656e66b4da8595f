"""Which share of all events items of a value have: what a user's count of the value would be, did the user act like
everybody.

A count says most of all what is popular; beside what was to be expected of it, it says what is the user's own
(`transforms.py`). Shares follow from the statistics of items and nothing else: the events of all items that have a
value by then, of the events of all. A server reads them of the items that it has loaded, training of the
statistics as they were at each request.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from feature_repo.contract.arrow import NO_VALUE, micros
from feature_repo.contract.contract import Contract
from feature_repo.contract.key_index import KeyIndex
from feature_repo.history.history import as_numbers
from feature_repo.history.sketch import Layout, mean_of_slots


@dataclass(frozen=True)
class ItemEvents:
    """By how much the events of items changed, row by row.

    Args:
        codes: of each row's item, for each remembered column, R or R × slots.
        times: microseconds.
        numbers: of events; negative where an item lost its value.
    """

    codes: Sequence[np.ndarray]
    times: np.ndarray
    numbers: np.ndarray

    @staticmethod
    def now(codes: Sequence[np.ndarray], counts: np.ndarray) -> ItemEvents:
        """Items as they are now, whatever was before.

        Args:
            counts: events of each item; NaN where it has no statistics.
        """
        return ItemEvents(codes, np.zeros(len(counts), np.int64), np.nan_to_num(counts))


class Shares:
    """Shares by value and time.

    Args:
        layout: what is counted; its first column is the item.
        changes: of all items.

    Example:
        >>> layout = Layout(("item_id", "brand"), (1, 1), (7.0,), width=64)
        >>> shares = Shares(layout, ItemEvents.now([np.array([3, 3, 4])], np.array([5.0, 1.0, 2.0])))
        >>> shares.read([np.array([17]), np.array([3])], np.array([9]), np.array([5.0]))
        array([[0.625, 0.75 ]])
    """

    def __init__(self, layout: Layout, changes: ItemEvents) -> None:
        self._layout = layout
        whole = np.zeros(len(changes.times), np.int64)
        self._all = _Running.of(whole, changes.times, changes.numbers)
        keys = layout.keys([whole, *changes.codes])[1:]
        self._of_value = [_Running.of(key, changes.times, changes.numbers) for key in keys]

    def read(
        self, codes: Sequence[np.ndarray], times: np.ndarray, counts: np.ndarray
    ) -> np.ndarray:
        """Shares at N times, N × `Layout.names`; of several keys of one name the mean, NaN without a key.

        Args:
            codes: of N items, for each column of the layout, the item first.
            times: microseconds.
            counts: events of each item by then; NaN where it has no statistics.
        """
        total = np.maximum(self._all.read(np.zeros(len(times), np.int64), times), 1)
        keys = self._layout.keys(codes)[1:]
        each = [np.nan_to_num(counts)[:, None]]
        for running, key in zip(self._of_value, keys, strict=True):
            key_NS = key if key.ndim > 1 else key[:, None]
            at = np.repeat(times, key_NS.shape[1])
            found = running.read(key_NS.ravel(), at).reshape(key_NS.shape)
            each.append(np.where(key_NS == NO_VALUE, np.nan, found))
        means = mean_of_slots(np.concatenate(each, axis=1)[None], self._layout.key_slots)[0]
        return means / total[:, None]


@dataclass(frozen=True)
class _Running:
    """Sums by key that change over time, sorted by key and time.

    Args:
        keys: each once.
        moments: each once.
        places: number of a key times `span` and number of its moment, of each sum.
        sums: from that moment on.
    """

    keys: np.ndarray
    moments: np.ndarray
    places: np.ndarray
    sums: np.ndarray

    @staticmethod
    def of(keys: np.ndarray, times: np.ndarray, numbers: np.ndarray) -> _Running:
        """Sums of what changed; a row of several keys changes each of them."""
        slots = keys.shape[1] if keys.ndim > 1 else 1
        flat = keys.ravel()
        there = flat != NO_VALUE
        own, key = np.unique(flat[there], return_inverse=True)
        moments, moment = np.unique(times, return_inverse=True)
        places, place = np.unique(
            key * (len(moments) + 1) + np.repeat(moment, slots)[there], return_inverse=True
        )
        change = np.bincount(place, np.repeat(numbers, slots)[there], len(places))
        running = np.cumsum(change)
        first = np.searchsorted(places, np.arange(len(own)) * (len(moments) + 1))
        before = np.r_[0.0, running][first]
        owner = places // (len(moments) + 1)
        return _Running(own, moments, places, running - before[owner])

    def read(self, keys: np.ndarray, times: np.ndarray) -> np.ndarray:
        """Sums of N keys at N times; 0 of what never was."""
        key = np.searchsorted(self.keys, keys)
        known = np.r_[self.keys, NO_VALUE][key] == keys
        moment = np.searchsorted(self.moments, times, side="right")
        first = key * (len(self.moments) + 1)
        # The newest sum before the next moment; before the key's first there is none.
        place = np.searchsorted(self.places, first + moment) - 1
        held = np.r_[self.places, -1][place] >= first
        return np.where(known & held, np.r_[self.sums, 0.0][place], 0.0)


def changes_of(contract: Contract, stats: pa.Table, profiles: pa.Table) -> ItemEvents:
    """What changed of items' events and values, by the statistics and profiles of all times.

    An item that gets another value takes its events along.

    Args:
        stats: rows of `item_stats`.
        profiles: rows of `item_profile`.
    """
    item = contract.item.join_key
    # 1. Both tables beside each other: by item, then by time; at one time a profile stands first.
    keys = pa.concat_arrays([stats[item].combine_chunks(), profiles[item].combine_chunks()])
    index = KeyIndex(keys.unique())
    owner = index.places(keys)
    made = np.maximum(micros(profiles["event_timestamp"]), micros(profiles["created_timestamp"]))
    times = np.r_[micros(stats["event_timestamp"]), made]
    of_profile = np.arange(len(keys)) >= len(stats)
    order = np.lexsort((~of_profile, times, owner))
    owner, times, of_profile = owner[order], times[order], of_profile[order]
    # 2. The newest row of each table at each moment; the places of others stay below an item's first.
    first = np.flatnonzero(np.r_[True, np.diff(owner) != 0][: len(owner)])
    begin = np.repeat(first, np.diff(np.r_[first, len(owner)]))
    rows = np.arange(len(owner))
    source = np.r_[np.arange(len(stats)), np.arange(len(profiles))][order]
    stat = np.maximum.accumulate(np.where(of_profile, -1, rows))
    profile = np.maximum.accumulate(np.where(of_profile, rows, -1))
    counts = np.r_[stats["count_total"].to_numpy(), 0]
    count = counts[np.where(stat >= begin, source[stat], -1)]
    held = np.where(profile >= begin, source[profile], -1)
    # 3. Each row takes the events of the row before from its value, and gives its own to that of now.
    before = np.where(rows == begin, 0, np.r_[0, count[:-1]])
    before_held = np.where(rows == begin, -1, np.r_[-1, held[:-1]])
    changed = (before != count) | (before_held != held)
    owned = np.r_[before_held[changed], held[changed]]
    taken = pa.array(owned, mask=owned < 0)
    codes = [
        as_numbers(column, profiles[column.name].combine_chunks().take(taken))
        for column in contract.remembered
    ]
    numbers = np.r_[-before[changed], count[changed]]
    return ItemEvents(codes, np.tile(times[changed], 2), numbers)
