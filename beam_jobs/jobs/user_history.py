"""Job `user_history`: events → history log, user statistics, and for the online store the newest
events of each user beside a sketch of all.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import ClassVar

import apache_beam as beam
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from beam_jobs.engine.build import BuildTables
from beam_jobs.engine.job import Job, refuse_lost_events
from beam_jobs.engine.partition import Key, sort_by_key_and_time
from beam_jobs.engine.parts import Built
from beam_jobs.engine.plan import ReadOnce, RunPlan, Unit
from beam_jobs.jobs.events import by_user, in_histories, num_partitions
from feature_repo.contract.arrow import EPOCH, arrow_schema, micros, value_codes
from feature_repo.contract.contract import Contract
from feature_repo.contract.counts import Counts
from feature_repo.contract.key_index import KeyIndex
from feature_repo.history import history, known, user_stats
from feature_repo.history.counts import UserCounts
from feature_repo.history.envelope import Identity
from feature_repo.history.sketch import Layout
from feature_repo.home.tables import parquet_bytes

item_profiles = ReadOnce(lambda plan: plan.read_input("events", "item_profile"))


def build(plan: RunPlan, key: Key, events: pa.Table) -> Iterator[Built]:
    """One partition of users: a log part, statistics, and packed newest events."""
    contract = plan.contract
    partition = key[1]
    read = events.num_rows
    events = in_histories(contract, sort_by_key_and_time(events, contract.user.join_key))
    remembered: list[np.ndarray] = []
    if contract.remembered:
        remembered = remembered_codes(contract, events, item_profiles(plan))
    log = history.log_part(contract, events, remembered)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, log.schema) as writer:
        writer.write_batch(log)
    counts = Counts({"users": log.num_rows, "events": read, "shown": read - events.num_rows})
    yield Built("history_log", f"part-{partition:05d}.arrow", sink.getvalue(), log.num_rows, counts)
    stats = user_stats.build(contract, events)
    holding = known.replaced_at(events) == known.NEVER
    packed = packed_rows(
        contract,
        events.filter(pa.array(holding)).combine_chunks(),
        stats,
        [codes[holding] for codes in remembered],
    )
    for table, rows in (("user_stats", stats), ("user_history", packed)):
        yield Built(table, f"part-{partition:05d}.parquet", parquet_bytes(rows), rows.num_rows)


def remembered_codes(contract: Contract, events: pa.Table, profiles: pa.Table) -> list[np.ndarray]:
    """Codes of each event's item in the columns that sketches count, as `history.as_numbers` gives
    them: of the newest profile that was known at the event, or of the first one.

    Args:
        profiles: rows of `item_profile`.
    """
    item = contract.item.join_key
    profiles = profiles.sort_by([(name, "ascending") for name in (item, "event_timestamp")])
    keys = profiles[item].combine_chunks()
    starts = history.run_starts(keys)
    place = KeyIndex(keys.take(pa.array(starts))).places(events[item])
    # Items by their place, then times by their rank: one number says which profile is the newest.
    owner = np.repeat(np.arange(len(starts)), history.run_ends(starts, len(keys)) - starts)
    times = np.r_[micros(profiles["event_timestamp"]), micros(events["event_timestamp"])]
    rank = np.unique(times, return_inverse=True)[1]
    held = owner * len(times) + rank[: len(owner)]
    newest = np.searchsorted(held, place * len(times) + rank[len(owner) :], side="right") - 1
    row = np.maximum(newest, starts[place]) if len(starts) else newest
    taken = pa.array(row, mask=place < 0)
    return [
        history.as_numbers(column, profiles[column.name].combine_chunks().take(taken))
        for column in contract.remembered
    ]


def packed_rows(
    contract: Contract, events: pa.Table, stats: pa.Table, remembered: Sequence[np.ndarray] = ()
) -> pa.Table:
    """Each user's newest events, as many as are kept online, packed; and a sketch of all of them.
    Stamped like the user's newest statistics. A user whose events were all struck has no row.

    Args:
        events: the ones that hold, sorted by user and time.
        stats: what `user_stats.build` says of them.
        remembered: codes of their items in the columns that sketches count.
    """
    user = events[contract.user.join_key].combine_chunks()
    starts = history.run_starts(user)
    ends = history.run_ends(starts, len(user))
    newest = newest_stats(contract, stats)
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
    sketches = sketched(contract, events, newest, remembered)
    stamps = newest["event_timestamp"].combine_chunks()
    return pa.table(
        [ids, pa.array(packed, pa.binary()), pa.array(sketches, pa.binary()), stamps, stamps],
        schema=arrow_schema(contract.table("user_history")),
    )


def newest_stats(contract: Contract, stats: pa.Table) -> pa.Table:
    """The newest row of each user who has events."""
    key = stats[contract.user.join_key].combine_chunks()
    rows = stats.take(pa.array(history.run_ends(history.run_starts(key), len(key)) - 1))
    return rows.filter(pc.greater(rows[user_stats.END], 0))


def sketched(
    contract: Contract, events: pa.Table, newest: pa.Table, remembered: Sequence[np.ndarray]
) -> list[bytes]:
    """A sketch of each user's events of the first action, in its envelope.

    Args:
        newest: statistics of each user of these events; else as in `packed_rows`.
    """
    layout = Layout.of(contract)
    time = micros(events["event_timestamp"])
    counted = events["action"].to_numpy() == 0
    codes = [value_codes(events[contract.item.join_key]), *remembered]
    found = []
    start = 0
    for row in newest.to_pylist():
        number = row["history_end"]
        chosen = start + np.flatnonzero(counted[start : start + number])
        counts = UserCounts(layout)
        counts.add([c[chosen] for c in codes], time[chosen])
        last = int(time[start + number - 1])
        made = (row["event_timestamp"] - EPOCH) // timedelta(microseconds=1)
        identity = Identity(layout.fingerprint, last, made, number, row["history_digest"])
        found.append(counts.to_bytes(row[contract.user.join_key], identity))
        start += number
    return found


class UserHistoryJob(Job):
    """Events → histories; every event is counted."""

    name = "user_history"
    doc = "events → history log, user statistics, newest events packed beside a sketch of all"
    reads: ClassVar = {"events": ("events",)}

    def steps(self, plan: RunPlan) -> beam.PTransform:
        """Events → pieces by user → parts."""
        return BuildTables(plan, by_user, build)

    def num_parts(self, plan: RunPlan, units: int) -> int:
        return 3 * num_partitions(plan)

    def account(self, plan: RunPlan, units: Sequence[Unit], counts: Counts) -> None:
        refuse_lost_events(plan, units, counts)


JOB = UserHistoryJob()
