"""Job `user_history`: events → history log, user statistics, and the newest events of each user for
the online store.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import numpy as np
import pyarrow as pa

from beam_jobs.events import by_user, in_histories, num_partitions, stat_values
from beam_jobs.options import TableOptions
from beam_jobs.partition import Key, sort_by_key_and_time
from beam_jobs.runs import BuildTables, Built, Job, RunPlan, account_of_events
from feature_repo import history
from feature_repo.arrow import arrow_schema, from_micros, hash_keys, micros
from feature_repo.schema import Contract
from feature_repo.sums import Exact
from feature_repo.tables import parquet_bytes


def build(plan: RunPlan, key: Key, events: pa.Table) -> Iterator[Built]:
    """One partition of users: a log part, statistics, and packed newest events."""
    contract, partition = plan.contract, key[1]
    read = events.num_rows
    events = in_histories(contract, sort_by_key_and_time(events, contract.user.join_key))
    log = history.log_part(contract, events)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, log.schema) as writer:
        writer.write_batch(log)
    counts = {"users": log.num_rows, "events": read, "shown": read - events.num_rows}
    yield Built("history_log", f"part-{partition:05d}.arrow", sink.getvalue(), log.num_rows, counts)
    for table, rows in (
        ("user_stats", stat_rows(contract, events)),
        ("user_history", packed_rows(contract, events)),
    ):
        yield Built(table, f"part-{partition:05d}.parquet", parquet_bytes(rows), rows.num_rows)


def stat_rows(contract: Contract, events: pa.Table) -> pa.Table:
    """A row for each user and distinct event time: what the events up to it come to, known just
    after it.

    Args:
        events: sorted by user and time.
    """
    user, time = events[contract.user.join_key].combine_chunks(), micros(events["event_timestamp"])
    starts = history.run_starts(user)
    first = np.repeat(starts, history.run_ends(starts, len(user)) - starts)
    last_of_instant = np.r_[(np.diff(time) != 0) | (np.diff(first) != 0), True][: len(user)]
    at = np.flatnonzero(last_of_instant)
    primary = events["action"].to_numpy() == 0
    value = stat_values(contract, events)
    values = Exact.of(np.where(primary, value.numbers, 0))

    def to_date(counted: np.ndarray) -> np.ndarray:
        running = np.r_[0, np.cumsum(counted)]
        return (running[at + 1] - running[first[at]]).astype(np.int64)

    number = to_date(primary & value.there)
    total = Exact(to_date(values.high), to_date(values.low)).floats()
    mean = np.where(number > 0, total / np.maximum(number, 1), np.nan)
    means = [pa.array(mean.astype(np.float32), from_pandas=True), pa.array(number)]
    columns = history.event_columns(contract, events)
    digests = history.event_digests(
        hash_keys(events[contract.item.join_key]), columns, np.arange(len(user)) - first
    )
    known = from_micros(time[at] + 1)
    return pa.table(
        [
            user.take(pa.array(at)),
            pa.array(at - first[at] + 1),
            pa.array(to_date(digests)),
            pa.array(time[first[at]] // 1_000_000),
            pa.array(to_date(~primary)),
            *(means if contract.spec.stat_value else ()),
            known,
            known,
        ],
        schema=arrow_schema(contract.table("user_stats")),
    )


def packed_rows(contract: Contract, events: pa.Table) -> pa.Table:
    """Each user's newest events, as many as are kept online, packed, stamped just after the last of
    them.

    Args:
        events: sorted by user and time.
    """
    user, time = events[contract.user.join_key].combine_chunks(), micros(events["event_timestamp"])
    starts = history.run_starts(user)
    ends = history.run_ends(starts, len(user))
    length = contract.spec.num_history_online
    columns = events.select([c.name for c in contract.history_columns])
    ids = user.take(pa.array(starts))
    packed = [
        history.pack(
            contract,
            user_id,
            columns.slice(max(start, end - length), end - max(start, end - length)),
        )
        for user_id, start, end in zip(ids.to_pylist(), starts.tolist(), ends.tolist(), strict=True)
    ]
    known = from_micros(time[ends - 1] + 1)
    return pa.table(
        [ids, pa.array(packed, pa.binary()), known, known],
        schema=arrow_schema(contract.table("user_history")),
    )


JOB = Job(
    name="user_history",
    doc="events → history log, user statistics, newest events packed",
    reads={"events": ("events",)},
    options=TableOptions,
    steps=partial(BuildTables, read=by_user, build=build),
    account=account_of_events,
    num_parts=lambda plan, units: 3 * num_partitions(plan),
)
