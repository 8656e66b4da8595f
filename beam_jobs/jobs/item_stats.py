"""Job `item_stats`: events → windowed counts and mean values of each item, stamped at the midnight
that closes a day.

A row appears only where a number changes: a day with events, or one on which events leave a window.
So a point-in-time join finds the true windowed count at any midnight, and a quiet item costs
nothing. An event that arrived late counts from the midnight after it arrived; one that was
replaced, until the midnight after that. Beside events stand users: how many have any event of the item, and how many
since a few days. What sells to new users is not what sells to the same ones again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import apache_beam as beam
import numpy as np
import pyarrow as pa

from beam_jobs.engine.build import BuildTables
from beam_jobs.engine.job import Job, refuse_lost_events
from beam_jobs.engine.partition import Key, sort_by_key_and_time
from beam_jobs.engine.parts import Built
from beam_jobs.engine.plan import RunPlan, Unit
from beam_jobs.jobs.events import by_item, in_histories, num_partitions
from feature_repo.contract.arrow import arrow_schema, from_micros, micros, value_codes
from feature_repo.contract.contract import Contract
from feature_repo.contract.counts import Counts
from feature_repo.contract.schema import STAT_WINDOWS_DAYS
from feature_repo.history.history import run_ends, run_starts
from feature_repo.history.known import NEVER, known_from, replaced_at
from feature_repo.history.sums import Exact, stat_values
from feature_repo.history.transforms import MICROS_PER_DAY
from feature_repo.home.tables import parquet_bytes

# A midnight after all others, in days
FAR = 1 << 40


def build(plan: RunPlan, key: Key, events: pa.Table) -> Iterator[Built]:
    """One partition of items."""
    rows = stat_rows(plan.contract, in_histories(plan.contract, events), plan.as_of)
    yield Built(
        "item_stats",
        f"part-{key[1]:05d}.parquet",
        parquet_bytes(rows),
        rows.num_rows,
        Counts({"events": events.num_rows}),
    )


@dataclass(frozen=True)
class _Spans:
    """Spans that hold from a midnight until another; days since 1970.

    Args:
        item: number of each one's item.
        start, end: holds at midnights from `start` on and before `end`.
        midnight: that closes the day on which it happened.
    """

    item: np.ndarray
    start: np.ndarray
    end: np.ndarray
    midnight: np.ndarray

    def take(self, chosen: np.ndarray) -> _Spans:
        return _Spans(
            self.item[chosen], self.start[chosen], self.end[chosen], self.midnight[chosen]
        )


@dataclass(frozen=True)
class _Changes:
    """By how much sums change at midnights: a row for each item, midnight and sum, not one for all sums.

    Args:
        sum: number of the sum.
        by: how much it changes, int64.
    """

    item: np.ndarray
    when: np.ndarray
    sum: np.ndarray
    by: np.ndarray

    @staticmethod
    def of(item: np.ndarray, when: np.ndarray, number: int, by: np.ndarray | int) -> _Changes:
        """Changes of one sum."""
        return _Changes(
            item, when, np.full(len(item), number, np.int8), np.broadcast_to(by, len(item))
        )

    @staticmethod
    def joined(parts: Sequence[_Changes]) -> _Changes:
        return _Changes(
            np.concatenate([part.item for part in parts]),
            np.concatenate([part.when for part in parts]),
            np.concatenate([part.sum for part in parts]),
            np.concatenate([part.by for part in parts]),
        )

    def take(self, chosen: np.ndarray) -> _Changes:
        return _Changes(self.item[chosen], self.when[chosen], self.sum[chosen], self.by[chosen])


def stat_rows(contract: Contract, events: pa.Table, as_of: int | None) -> pa.Table:
    """Statistics of all items in `events`, a row for each item and midnight at which one changes.

    Args:
        events: user, item, action, time and the dataset's `stat_value`, in any order.
        as_of: rows stamped later are not knowable yet and left out.
    """
    # 1. From which midnight on each event holds, and until which; what holds at none is in no sum.
    events = sort_by_key_and_time(events, contract.item.join_key)
    item = events[contract.item.join_key].combine_chunks()
    starts = run_starts(item)
    replaced = replaced_at(events)
    spans = _Spans(
        np.repeat(np.arange(len(starts)), run_ends(starts, len(item)) - starts),
        known_from(events) // MICROS_PER_DAY + 1,
        np.where(replaced == NEVER, FAR, replaced // MICROS_PER_DAY + 1),
        micros(events["event_timestamp"]) // MICROS_PER_DAY + 1,
    )
    primary = (events["action"].to_numpy() == 0) & (spans.end > spans.start)
    other = (events["action"].to_numpy() != 0) & (spans.end > spans.start)
    users = value_codes(events[contract.user.join_key])
    # 2. What changes: events and users, with their windows; other events; sums of values. In this order the sums stand.
    windows = 1 + len(STAT_WINDOWS_DAYS)
    sums = 2 * windows + 4
    held = spans.take(primary)
    values = stat_values(contract, events)
    there = primary & values.there
    valued = spans.take(there)
    value = Exact.of(values.numbers[there])
    changes = _Changes.joined(
        [
            *_windowed(held, 0),
            *_windowed(_holders(held, users[primary]), windows),
            *_whole(spans.take(other), 2 * windows, 1),
            *_whole(valued, 2 * windows + 1, 1),
            *_whole(valued, 2 * windows + 2, value.high),
            *_whole(valued, 2 * windows + 3, value.low),
        ]
    )
    if as_of is not None:
        changes = changes.take(changes.when * MICROS_PER_DAY <= as_of)
    # 3. Sums become means, and counts the columns of the table.
    owner, when, counts = _running(changes, sums)
    number = counts[-3]
    mean = np.where(
        number > 0, Exact(counts[-2], counts[-1]).floats() / np.maximum(number, 1), np.nan
    )
    means = [pa.array(mean.astype(np.float32), from_pandas=True)]
    known = from_micros(when * MICROS_PER_DAY)
    ids = item.take(pa.array(starts)).take(pa.array(owner)) if len(starts) else item
    columns = [
        ids,
        *(pa.array(row) for row in counts[:-3]),
        *(means if contract.spec.stat_value else ()),
        known,
        known,
    ]
    return pa.table(columns, schema=arrow_schema(contract.table("item_stats")))


def _whole(spans: _Spans, number: int, by: np.ndarray | int) -> list[_Changes]:
    """Changes of a sum: what spans add from their start, and take away at their end."""
    added = _Changes.of(spans.item, spans.start, number, by)
    ends = np.flatnonzero(spans.end != FAR)
    return [added, _Changes.of(spans.item[ends], spans.end[ends], number, -added.by[ends])]


def _windowed(spans: _Spans, first: int) -> list[_Changes]:
    """How many spans there are, and how many whose day lies within each window: it leaves at the end of its days, unless
    it ends before, and never enters one whose days are over when it starts.

    Args:
        first: sum of all; those of the windows come behind.
    """
    parts = _whole(spans, first, 1)
    for number, days in enumerate(STAT_WINDOWS_DAYS, first + 1):
        leaves = np.minimum(spans.midnight + days, spans.end)
        within = np.flatnonzero(leaves > spans.start)
        parts.append(_Changes.of(spans.item[within], spans.start[within], number, 1))
        parts.append(_Changes.of(spans.item[within], leaves[within], number, -1))
    return parts


def _holders(spans: _Spans, users: np.ndarray) -> _Spans:
    """From when until when each user has any event of an item; the day is that of the first one that holds.

    Args:
        spans: of events, sorted by item and time.
        users: a code of each event's user.
    """
    # 1. All events of a user and an item together, oldest first.
    order = np.lexsort((users, spans.item))
    spans = spans.take(order)
    users = users[order]
    new = np.r_[True, (np.diff(spans.item) != 0) | (np.diff(users) != 0)][: len(users)]
    first = np.flatnonzero(new)
    if not len(first):
        return spans
    # 2. Of most pairs the first event is the first to be known, and holds for ever.
    lasting = np.logical_and.reduceat(spans.end == FAR, first)
    simple = lasting & (np.minimum.reduceat(spans.start, first) == spans.start[first])
    found = [spans.take(first[simple])]
    # 3. Of the others, whose events came late or were replaced, the first one changes.
    last = np.r_[first[1:], len(users)]
    for start, stop in zip(first[~simple].tolist(), last[~simple].tolist(), strict=True):
        found.append(_firsts(spans.take(np.arange(start, stop))))
    return _Spans(
        np.concatenate([part.item for part in found]),
        np.concatenate([part.start for part in found]),
        np.concatenate([part.end for part in found]),
        np.concatenate([part.midnight for part in found]),
    )


def _firsts(spans: _Spans) -> _Spans:
    """Which of a user's events of one item is the first that holds, from when until when."""
    moments = np.unique(np.r_[spans.start, spans.end])
    # A day that no event has: at such a moment nothing holds.
    days = [
        spans.midnight[(spans.start <= moment) & (moment < spans.end)].min(initial=FAR)
        for moment in moments.tolist()
    ]
    day = np.array(days)
    change = np.flatnonzero(np.r_[True, np.diff(day) != 0])
    start = moments[change]
    end = np.r_[start[1:], FAR]
    held = day[change] != FAR
    return _Spans(spans.item[:1].repeat(int(held.sum())), start[held], end[held], day[change][held])


def _running(changes: _Changes, sums: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Items, midnights and sums of each row at which a sum changes."""
    order = np.lexsort((changes.when, changes.item))
    item, when = changes.item[order], changes.when[order]
    new = np.r_[True, (np.diff(item) != 0) | (np.diff(when) != 0)][: len(when)]
    first = np.flatnonzero(new)
    step = np.zeros((sums, len(first)), np.int64)
    if not len(first):
        return item, when, step
    # Whole numbers, so that sums are exact whatever their order
    np.add.at(step, (changes.sum[order], np.cumsum(new) - 1), changes.by[order])
    # Running sums across all items, less what stood before each item's first row.
    running = np.cumsum(step, axis=1)
    owner = item[first]
    item_first = np.flatnonzero(np.r_[True, np.diff(owner) != 0])
    base = np.concatenate([np.zeros((sums, 1), np.int64), running[:, item_first[1:] - 1]], axis=1)
    counts = running - np.repeat(base, np.diff(np.r_[item_first, len(owner)]), axis=1)
    # What comes and goes on one midnight is no change.
    kept = step.any(axis=0)
    return owner[kept], when[first][kept], counts[:, kept]


class ItemStatsJob(Job):
    """Events → statistics of items; every event is counted."""

    name = "item_stats"
    doc = "events → windowed counts and mean values by item"
    reads: ClassVar = {"events": ("events",)}

    def steps(self, plan: RunPlan) -> beam.PTransform:
        """Events → pieces by item → parts."""
        return BuildTables(plan, by_item, build)

    def num_parts(self, plan: RunPlan, units: int) -> int:
        return num_partitions(plan)

    def account(self, plan: RunPlan, units: Sequence[Unit], counts: Counts) -> None:
        refuse_lost_events(plan, units, counts)


JOB = ItemStatsJob()
