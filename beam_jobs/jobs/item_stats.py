"""Job `item_stats`: events → windowed counts and mean values of each item, stamped at the midnight
that closes a day.

A row appears only where a number changes: a day with events, or one on which events leave a window.
So a point-in-time join finds the true windowed count at any midnight, and a quiet item costs
nothing. An event that arrived late counts from the midnight after it arrived; one that was
replaced, until the midnight after that.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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
from feature_repo.contract.arrow import arrow_schema, from_micros, micros
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


def stat_rows(contract: Contract, events: pa.Table, as_of: int | None) -> pa.Table:
    """Statistics of all items in `events`, a row for each item and midnight at which one changes.

    Args:
        events: item, action, time and the dataset's `stat_value`, in any order.
        as_of: rows stamped later are not knowable yet and left out.
    """
    # 1. The numbers of each event, and the midnights from which its item's statistics count it, and no longer.
    events = sort_by_key_and_time(events, contract.item.join_key)
    item = events[contract.item.join_key].combine_chunks()
    starts = run_starts(item)
    number = np.repeat(np.arange(len(starts)), run_ends(starts, len(item)) - starts)
    midnight = micros(events["event_timestamp"]) // MICROS_PER_DAY + 1
    known = known_from(events) // MICROS_PER_DAY + 1
    replaced = replaced_at(events)
    until = np.where(replaced == NEVER, FAR, replaced // MICROS_PER_DAY + 1)
    # What did not hold for a midnight is in no sum.
    counts = until > known
    primary = ((events["action"].to_numpy() == 0) & counts).astype(np.int64)
    other = counts - primary
    values = stat_values(contract, events)
    value = Exact.of(np.where(primary, values.numbers, 0))
    valued = primary * values.there

    # 2. What changes, by item and midnight.
    # One delta row for each event, and one for each window that it leaves: at the end of its days, unless it is
    # replaced before; it never enters a window whose days are over when it arrives.
    nothing = np.zeros_like(primary)
    leaves = [np.minimum(midnight + days, until) for days in STAT_WINDOWS_DAYS]
    within = [primary * (leave > known) for leave in leaves]
    deltas = [np.stack([primary, *within, other, valued, value.high, value.low])]
    for index in range(len(STAT_WINDOWS_DAYS)):
        leaving = [nothing] * (5 + len(STAT_WINDOWS_DAYS))
        leaving[1 + index] = -within[index]
        deltas.append(np.stack(leaving))
    whens = [known, *leaves]
    if (until != FAR).any():
        # All sums but those of windows lose what was replaced.
        gone = until != FAR
        of_windows = [nothing] * len(STAT_WINDOWS_DAYS)
        lost = [-primary, *of_windows, -other, -valued, -value.high, -value.low]
        deltas.append(np.stack(lost) * gone)
        whens.append(until)
    when = np.concatenate(whens)
    what = np.tile(number, len(whens))
    delta = np.concatenate(deltas, axis=1)
    changes = delta.any(axis=0)
    if as_of is not None:
        changes &= when * MICROS_PER_DAY <= as_of
    when = when[changes]
    what = what[changes]
    delta = delta[:, changes]

    # 3. Running sums across all items, less what stood before each item's first row.
    order = np.lexsort((when, what))
    when = when[order]
    what = what[order]
    delta = delta[:, order]
    first = np.flatnonzero(np.r_[True, (np.diff(what) != 0) | (np.diff(when) != 0)][: len(when)])
    running = (
        np.cumsum(delta, axis=1)[:, np.r_[first[1:], len(when)].astype(np.int64) - 1]
        if len(when)
        else delta
    )
    owner = what[first]
    before = np.zeros_like(running)
    if len(owner):
        item_first = np.flatnonzero(np.r_[True, np.diff(owner) != 0])
        base = np.concatenate(
            [np.zeros((len(running), 1), np.int64), running[:, item_first[1:] - 1]], axis=1
        )
        before = np.repeat(base, np.diff(np.r_[item_first, len(owner)]), axis=1)
    counts = running - before
    # 4. Sums become means, and counts the columns of the table.
    number = counts[-3]
    sums = Exact(counts[-2], counts[-1]).floats()
    mean = np.where(number > 0, sums / np.maximum(number, 1), np.nan)
    means = [pa.array(mean.astype(np.float32), from_pandas=True)]
    known = from_micros(when[first] * MICROS_PER_DAY)
    ids = item.take(pa.array(starts)).take(pa.array(owner)) if len(starts) else item
    columns = [
        ids,
        *(pa.array(row) for row in counts[:-3]),
        *(means if contract.spec.stat_value else ()),
        known,
        known,
    ]
    return pa.table(columns, schema=arrow_schema(contract.table("item_stats")))


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
