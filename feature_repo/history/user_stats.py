"""What a user's events come to, in one place: `build` makes the statistics of whole histories (the job), `add`
extends a user's by new events (the server), `subtract` takes events back (a request about the past), and
`read_names` says which of them a ranker reads.

Every statistic but two is a sum of a whole number of each event, so that the three agree to the last digit;
the first event's time is kept, and a mean is a sum over a count.
"""

from __future__ import annotations

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
)
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
        values: whose mean is kept, float64; 0 of an event without one.
    """

    sums: dict[str, np.ndarray]
    values: np.ndarray


def build(contract: Contract, events: pa.Table) -> pa.Table:
    """A row of `user_stats` for each user and distinct event time: what the events up to it come to, known
    just after it.

    Args:
        events: sorted by user and time.
    """
    user = events[contract.user.join_key].combine_chunks()
    time = micros(events[EVENT_TIMESTAMP])
    # 1. One row for each instant of a user: its last event, `at`, and the user's first event, `first`.
    starts = run_starts(user)
    first = np.repeat(starts, run_ends(starts, len(user)) - starts)
    last_of_instant = np.r_[(np.diff(time) != 0) | (np.diff(first) != 0), True][: len(user)]
    at = np.flatnonzero(last_of_instant)
    counted = _counted(contract, events, np.arange(len(user)) - first)

    def to_date(each: np.ndarray) -> np.ndarray:
        running = np.r_[0, np.cumsum(each)]
        return (running[at + 1] - running[first[at]]).astype(np.int64)

    # 2. Sums of all events up to it, exact whatever the order (`sums.py`).
    columns: dict[str, pa.Array] = {
        name: pa.array(to_date(each)) for name, each in counted.sums.items()
    }
    columns[FIRST] = pa.array(time[first[at]] // MICROS)
    if contract.spec.stat_value:
        mean, number = mean_names(contract)
        values = Exact.of(counted.values)
        total = Exact(to_date(values.high), to_date(values.low)).floats()
        having = columns[number].to_numpy()
        means = np.where(having > 0, total / np.maximum(having, 1), np.nan)
        columns[mean] = pa.array(means.astype(np.float32), from_pandas=True)
    # 3. A row is known just after its newest event.
    columns[contract.user.join_key] = user.take(pa.array(at))
    known = from_micros(time[at] + 1)
    schema = arrow_schema(contract.table("user_stats"))
    return pa.table([columns.get(name, known) for name in schema.names], schema=schema)


def add(contract: Contract, stats: Mapping[str, Any], events: pa.Table) -> dict[str, Any]:
    """A user's statistics with events that follow.

    Args:
        stats: by name; nulls for a user without statistics.
        events: at least one, in the order of time.
    """
    end = stats[END] or 0
    counted = _counted(contract, events, end + np.arange(events.num_rows))
    found = {name: _plus(stats[name], each.sum()) for name, each in counted.sums.items()}
    first = stats[FIRST]
    found[FIRST] = int(micros(events[EVENT_TIMESTAMP])[0] // MICROS) if first is None else first
    return found | _mean(contract, stats, found, counted.values.sum())


def subtract(
    contract: Contract, stats: Mapping[str, Any], events: pa.Table | pa.RecordBatch
) -> dict[str, Any]:
    """A user's statistics as they were before their newest events came; at least one older event remains.

    Args:
        events: the newest ones, in the order of time.
    """
    positions = stats[END] - events.num_rows + np.arange(events.num_rows)
    counted = _counted(contract, events, positions)
    found = {name: _plus(stats[name], -each.sum()) for name, each in counted.sums.items()}
    found[FIRST] = stats[FIRST]
    return found | _mean(contract, stats, found, -counted.values.sum())


def unknown(contract: Contract) -> dict[str, None]:
    """The statistics of a user without any."""
    return dict.fromkeys(column.name for column in contract.table("user_stats").columns)


def read_names(contract: Contract) -> tuple[str, str, str, str]:
    """Names of the statistics that a ranker reads: first event, events, other events, and mean value; the
    last is "" where no number is declared.
    """
    mean = mean_names(contract)[0] if contract.spec.stat_value else ""
    return FIRST, END, OTHERS, mean


def _counted(
    contract: Contract, events: pa.Table | pa.RecordBatch, positions: np.ndarray
) -> _Counted:
    """What each event adds.

    Args:
        positions: place of each event in its user's history, from 0.
    """
    primary = events["action"].to_numpy() == 0
    value = stat_values(contract, events)
    valued = primary & value.there
    sums = {
        END: np.ones(events.num_rows, np.int64),
        DIGEST: event_digests(
            hash_keys(events[contract.item.join_key]), event_columns(contract, events), positions
        ),
        OTHERS: (~primary).astype(np.int64),
    }
    if contract.spec.stat_value:
        sums[mean_names(contract)[1]] = valued.astype(np.int64)
    return _Counted(sums, np.where(valued, value.numbers, 0.0).astype(np.float64))


def _plus(before: int | None, more: np.int64) -> int:
    """A sum that wraps around like the columns that hold it."""
    with np.errstate(over="ignore"):
        return int(np.int64(before or 0) + more)


def _mean(
    contract: Contract, before: Mapping[str, Any], after: Mapping[str, Any], more: float
) -> dict[str, float | None]:
    """The mean of the dataset's number after its sum changed by so much; none where no number is kept."""
    if not contract.spec.stat_value:
        return {}
    mean, number = mean_names(contract)
    total = (before[mean] or 0.0) * (before[number] or 0) + float(more)
    return {mean: total / after[number] if after[number] else None}
