"""What a user's events come to, in one place: `build` makes the statistics of whole histories (the job), `add`
extends a user's by new events (the server), `subtract` takes events back (a request about the past), and
`read_names` says which of them a ranker reads.

Every statistic but two is a sum of a whole number of each event, so that the three agree to the last digit, and a
mean is such a sum over such a count; the first event's time is kept.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from feature_repo.contract.arrow import MICROS, arrow_schema, from_micros, hash_keys, micros
from feature_repo.contract.contract import Contract
from feature_repo.contract.schema import EVENT_TIMESTAMP
from feature_repo.history.history import (
    event_columns,
    event_digests,
    mean_names,
    run_ends,
    run_starts,
    sum_names,
)
from feature_repo.history.known import NEVER, is_on_time, known_from, replaced_at
from feature_repo.history.sums import Exact, stat_values

FIRST = "first_event_s"
END = "history_end"
DIGEST = "history_digest"
OTHERS = "other_events"


@dataclass(frozen=True)
class _Counted:
    """What each event adds.

    Args:
        sums: by statistic, int64; the digest wraps around.
    """

    sums: dict[str, np.ndarray]


@dataclass(frozen=True)
class _Changes:
    """What changed what is known of users, in the order of users and instants: an event became known, or a
    later line of it arrived and it ceased to hold.

    Args:
        event: place of the event.
        sign: 1 or -1.
        when: microseconds; just after this the change is known.
        first: of each change the first one of its user.
    """

    event: np.ndarray
    sign: np.ndarray
    when: np.ndarray
    first: np.ndarray

    @staticmethod
    def of(user: pa.Array, events: pa.Table) -> _Changes:
        number = len(user)
        starts = run_starts(user)
        owner = np.repeat(np.arange(len(starts)), run_ends(starts, number) - starts)
        event = np.arange(number)
        if is_on_time(events):
            return _Changes(event, np.ones(number, np.int64), known_from(events), starts[owner])
        replaced = replaced_at(events)
        ceased = np.flatnonzero(replaced != NEVER)
        event = np.r_[event, ceased]
        sign = np.r_[np.ones(number, np.int64), np.full(len(ceased), -1)]
        when = np.r_[known_from(events), replaced[ceased]]
        order = np.lexsort((event, when, owner[event]))
        owner = owner[event][order]
        first = np.flatnonzero(np.r_[True, np.diff(owner) != 0])
        return _Changes(event[order], sign[order], when[order], first[owner])


def build(contract: Contract, events: pa.Table) -> pa.Table:
    """A row of `user_stats` for each user and instant at which something changed: what the events known by then
    come to, known just after it.

    Args:
        events: sorted by user and time.
    """
    user = events[contract.user.join_key].combine_chunks()
    changes = _Changes.of(user, events)
    # 1. One row for each instant of a user: its last change, `at`, and the user's first one.
    first = changes.first
    last_of_instant = np.r_[(np.diff(changes.when) != 0) | (np.diff(first) != 0), True][
        : len(first)
    ]
    at = np.flatnonzero(last_of_instant)
    counted = _counted(contract, events)

    def to_date(each: np.ndarray) -> np.ndarray:
        with np.errstate(over="ignore"):
            running = np.r_[0, np.cumsum(each[changes.event] * changes.sign)]
            return (running[at + 1] - running[first[at]]).astype(np.int64)

    # 2. Sums of all events up to it, exact whatever the order (`sums.py`).
    columns: dict[str, pa.Array] = {
        name: pa.array(to_date(each)) for name, each in counted.sums.items()
    }
    columns[FIRST] = _first_events(events, changes, at)
    if contract.spec.stat_value:
        mean, number = mean_names(contract)
        sums = Exact(*(columns[name].to_numpy() for name in sum_names(contract)))
        means = _means(sums, columns[number].to_numpy())
        columns[mean] = pa.array(means, from_pandas=True)
    # 3. A row is known just after its newest change.
    columns[contract.user.join_key] = user.take(pa.array(changes.event[at]))
    known = from_micros(changes.when[at] + 1)
    schema = arrow_schema(contract.table("user_stats"))
    return pa.table([columns.get(name, known) for name in schema.names], schema=schema)


def _first_events(events: pa.Table, changes: _Changes, at: np.ndarray) -> pa.Array:
    """Seconds of the first event that each row knows of."""
    time = micros(events[EVENT_TIMESTAMP])
    if is_on_time(events):
        return pa.array(time[changes.event[changes.first[at]]] // MICROS)
    if (changes.sign > 0).all():
        return pa.array(_least_so_far(time[changes.event] // MICROS, changes.first)[at])
    # The first of those that hold is not a sum: a heap of all that were known, without those that ceased to hold.
    found: list[int | None] = []
    waiting: list[tuple[int, int]] = []
    ceased: set[int] = set()
    begun = -1
    for change in range(len(changes.event)):
        event = int(changes.event[change])
        if changes.first[change] != begun:
            begun = int(changes.first[change])
            waiting = []
            ceased = set()
        if changes.sign[change] > 0:
            heapq.heappush(waiting, (int(time[event]), event))
        else:
            ceased.add(event)
        while waiting and waiting[0][1] in ceased:
            heapq.heappop(waiting)
        found.append(waiting[0][0] // MICROS if waiting else None)
    return pa.array(found, pa.int64()).take(pa.array(at))


def _least_so_far(seconds: np.ndarray, first: np.ndarray) -> np.ndarray:
    """The least of each user's numbers up to each one.

    Args:
        first: the place of the user's first number.
    """
    # Each user's numbers are moved below those of the users before, so that one running minimum serves all.
    user = np.cumsum(first == np.arange(len(first)))
    base = seconds.min(initial=0)
    width = seconds.max(initial=0) - base + 1
    return np.minimum.accumulate(seconds - base - user * width) + base + user * width


def add(contract: Contract, stats: Mapping[str, Any], events: pa.Table) -> dict[str, Any]:
    """A user's statistics with further events.

    Args:
        stats: by name; nulls for a user without statistics.
        events: at least one.
    """
    counted = _counted(contract, events)
    found = {name: _plus(stats[name], each.sum()) for name, each in counted.sums.items()}
    first = int(micros(events[EVENT_TIMESTAMP]).min() // MICROS)
    found[FIRST] = first if stats[FIRST] is None else min(stats[FIRST], first)
    return found | _mean(contract, found)


def subtract(
    contract: Contract, stats: Mapping[str, Any], events: pa.Table | pa.RecordBatch
) -> dict[str, Any]:
    """A user's statistics as they were before their newest events came; at least one older event remains.

    Args:
        events: the newest ones, in the order of time.
    """
    counted = _counted(contract, events)
    found = {name: _plus(stats[name], -each.sum()) for name, each in counted.sums.items()}
    found[FIRST] = stats[FIRST]
    return found | _mean(contract, found)


def unknown(contract: Contract) -> dict[str, None]:
    """The statistics of a user without any."""
    return dict.fromkeys(column.name for column in contract.table("user_stats").columns)


def read_names(contract: Contract) -> tuple[str, str, str, str]:
    """Names of the statistics that a ranker reads: first event, events, other events, and mean value; the
    last is "" where no number is declared.
    """
    mean = mean_names(contract)[0] if contract.spec.stat_value else ""
    return FIRST, END, OTHERS, mean


def _counted(contract: Contract, events: pa.Table | pa.RecordBatch) -> _Counted:
    """What each event adds."""
    primary = events["action"].to_numpy() == 0
    value = stat_values(contract, events)
    valued = primary & value.there
    exact = Exact.of(np.where(valued, value.numbers, 0.0))
    sums = {
        END: np.ones(events.num_rows, np.int64),
        DIGEST: event_digests(
            hash_keys(events[contract.item.join_key]), event_columns(contract, events)
        ),
        OTHERS: (~primary).astype(np.int64),
    }
    if contract.spec.stat_value:
        sums[mean_names(contract)[1]] = valued.astype(np.int64)
        sums |= dict(zip(sum_names(contract), (exact.high, exact.low), strict=True))
    return _Counted(sums)


def _plus(before: int | None, more: np.int64) -> int:
    """A sum that wraps around like the columns that hold it."""
    with np.errstate(over="ignore"):
        return int(np.int64(before or 0) + more)


def _mean(contract: Contract, stats: Mapping[str, Any]) -> dict[str, float | None]:
    """The mean of the dataset's number, of statistics that have its sum; none where no number is kept."""
    if not contract.spec.stat_value:
        return {}
    mean, number = mean_names(contract)
    if not stats[number]:
        return {mean: None}
    sums = Exact(*(np.array([stats[name]]) for name in sum_names(contract)))
    return {mean: float(_means(sums, np.array([stats[number]]))[0])}


def _means(sums: Exact, number: np.ndarray) -> np.ndarray:
    """Sums over their counts, float32; NaN where nothing was counted."""
    means = np.where(number > 0, sums.floats() / np.maximum(number, 1), np.nan)
    return means.astype(np.float32)
