"""Records of users → online store: a user's newest row of statistics, packed history and sketch, together, and with
every acknowledged event that the tables do not know.

A server may add an event of a user at any moment. So each record is made of the tables' row and of what the log holds
beyond it, and replaces the stored one only if the log has not grown meanwhile; else it is made again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing
from datetime import timedelta
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from beam_jobs.engine.partition import from_ipc
from beam_jobs.engine.plan import ReadOnce, RunPlan
from beam_jobs.engine.steps import WriteView
from beam_jobs.jobs.user_history import item_profiles, remembered_codes
from feature_repo.contract.arrow import EPOCH, arrow_schema, from_micros, micros
from feature_repo.contract.contract import Contract
from feature_repo.contract.schema import CREATED_TIMESTAMP, EVENT_TIMESTAMP
from feature_repo.history import user_stats
from feature_repo.history.record import Extended, Record, extended
from feature_repo.home.erased import erased_of
from feature_repo.raw.acknowledged import history_events
from feature_repo.store.event_log import Entry, UserId
from feature_repo.store.online_users import HISTORY, STATS, Logged, ManyRows, user_records
from feature_repo.store.received import Beyond, Received, open_log

# Stands for both views of a record
RECORDS = "user_records"
# Users of one round trip, or of one transaction
PIECE = 500
Row = dict[str, Any]


def _read_beyond(plan: RunPlan) -> Beyond:
    history = plan.pinned["user_history"]
    before = history.received_before
    # The rows of a run as of an earlier time are older ones.
    if plan.as_of is not None and plan.as_of < history.as_of_micros:
        before = min(before, plan.as_of)
    return Received(plan.home, plan.contract).beyond(history.received, before)


# What was acknowledged and the tables do not know, as far as it may have left the log
beyond = ReadOnce(_read_beyond, lambda plan: Received(plan.home, plan.contract).state())
erased = ReadOnce(lambda plan: erased_of(plan.home))


def users_by_http(plan: RunPlan) -> pa.Array:
    """Users of whom an event was ever acknowledged, who may have a record that no table knows; not the erased
    ones.
    """
    user = plan.contract.user.join_key
    received = Received(plan.home, plan.contract).users()
    logged = pa.array(_logged(plan), received.type)
    found = pa.table({user: pc.unique(pa.concat_arrays([received, logged]))})
    return erased(plan).without(found, user)[user].combine_chunks()


def users_beyond(plan: RunPlan) -> set[UserId]:
    """Users of whom something was acknowledged that the tables do not know, or may not."""
    return {*beyond(plan).lacking, *_logged(plan)}


def _logged(plan: RunPlan) -> list[UserId]:
    log = open_log(plan.settings)
    if log is None:
        return []
    with closing(log):
        return list(log.users())


def record_schema(contract: Contract) -> pa.Schema:
    """Columns of records between two steps: of both views, the user and both times first."""
    views = [arrow_schema(contract.table(view)) for view in (HISTORY, STATS)]
    keys = (contract.user.join_key, EVENT_TIMESTAMP, CREATED_TIMESTAMP)
    features = [field for schema in views for field in schema if field.name not in keys]
    return pa.schema([*(views[0].field(name) for name in keys), *features])


def records_of(contract: Contract, stats: pa.Table, histories: pa.Table) -> pa.Table:
    """Records of users as the tables have them; no history of a user whose events were all struck.

    Args:
        stats: a row of each user.
        histories: of the users who have events.
    """
    user = contract.user.join_key
    place = pc.index_in(stats[user].combine_chunks(), histories[user].combine_chunks())
    taken = histories.take(place)
    columns = dict(zip(taken.column_names, taken.columns, strict=True))
    columns |= dict(zip(stats.column_names, stats.columns, strict=True))
    schema = record_schema(contract)
    return pa.table([columns[name] for name in schema.names], schema=schema)


def tombstones(schema: pa.Schema, key: str, values: pa.Array, at: int) -> pa.Table:
    """Rows of nulls for some keys.

    Args:
        key: the key's column.
        at: their time, microseconds.
    """
    columns = {field.name: pa.nulls(len(values), field.type) for field in schema}
    stamps = from_micros(np.full(len(values), at))
    columns |= {f.name: stamps for f in schema if pa.types.is_timestamp(f.type)}
    return pa.table({**columns, key: values}, schema=schema)


class WriteOnline(WriteView):
    """Write rows of one view online, or records of users: `(view, Arrow IPC)` in, `(view, rows written)` out."""

    def __init__(self, plan: RunPlan) -> None:
        super().__init__(plan)
        self._records: Any = None

    def setup(self) -> None:
        super().setup()
        self._records = user_records(self._store, self.plan.contract, None)

    def process(self, element: tuple[str, bytes]) -> Iterator[tuple[str, int]]:
        view, data = element
        if view != RECORDS:
            yield from super().process(element)
            return
        rows = from_ipc(data)
        for start in range(0, rows.num_rows, PIECE):
            self._write(rows.slice(start, PIECE))
        yield HISTORY, rows.num_rows
        yield STATS, rows.num_rows

    def _write(self, rows: pa.Table) -> None:
        """Write records; those of users whose log grew meanwhile again, until none did."""
        contract = self.plan.contract
        user = contract.user.join_key
        while rows.num_rows:
            logged = self._records.logged(rows[user].to_pylist())
            rows, logged = self._with_what_came(rows, logged)
            features = {
                view: rows.select([c.name for c in contract.table(view).columns])
                for view in (HISTORY, STATS)
            }
            known = micros(rows[EVENT_TIMESTAMP])
            many = ManyRows(rows[user].to_pylist(), features, known)
            rows = rows.filter(pa.array(~self._records.replace(many, logged)))

    def _with_what_came(
        self, rows: pa.Table, logged: Sequence[Logged]
    ) -> tuple[pa.Table, list[Logged]]:
        """Records with the acknowledged events that their tables do not know, those behind the others; and what
        is logged of each.
        """
        user = self.plan.contract.user.join_key
        users = rows[user].to_pylist()
        came = beyond(self.plan)
        lacking = [came.of(one, log.entries) for one, log in zip(users, logged, strict=True)]
        order = sorted(range(len(users)), key=lambda place: bool(lacking[place]))
        complete = sum(not entries for entries in lacking)
        changed = rows.take(pa.array(order[complete:], pa.int64())).to_pylist()
        made = [
            row | _extended_row(self.plan, row, lacking[place])
            for row, place in zip(changed, order[complete:], strict=True)
        ]
        same = rows.take(pa.array(order[:complete], pa.int64()))
        both = pa.concat_tables([same, pa.Table.from_pylist(made, schema=rows.schema)])
        return both, [logged[place] for place in order]


def _extended_row(plan: RunPlan, row: Row, entries: Sequence[Entry]) -> Row:
    """Columns of a record that change by the events that came."""
    contract = plan.contract
    user_id = row[contract.user.join_key]
    if erased(plan) and erased(plan).hash_of(user_id) in erased(plan).users:
        return {}
    statistics = [column.name for column in contract.table(STATS).columns]
    record = Record(row["history"], row["sketch"], {name: row[name] for name in statistics})
    found = _extended(plan, user_id, record, entries)
    after = {"history": found.record.history, "sketch": found.record.sketch, **found.record.stats}
    if not found.added.num_rows:
        return after
    stamp = EPOCH + timedelta(microseconds=found.known)
    # A tombstone's time says when the tables had nothing; the events say more.
    if row[user_stats.END] is not None:
        stamp = max(stamp, row[EVENT_TIMESTAMP])
    return {**after, EVENT_TIMESTAMP: stamp, CREATED_TIMESTAMP: stamp}


def _extended(plan: RunPlan, user_id: UserId, record: Record, entries: Sequence[Entry]) -> Extended:
    contract = plan.contract
    numbers = [entry.number for entry in entries]
    events = history_events(contract, user_id, numbers, [entry.event for entry in entries])

    def remembered(fresh: pa.Table) -> Sequence[np.ndarray]:
        if not contract.remembered:
            return []
        return remembered_codes(contract, fresh, item_profiles(plan))

    return extended(contract, user_id, record, events, remembered)
