"""Records of users → online store: a user's newest row of statistics, packed history and sketch, together, and with
every acknowledged event that the tables do not know.

A server may add an event of a user at any moment. So each record is made of the tables' row and of what the log holds
beyond it, and replaces the stored one only if the log has not grown meanwhile; else it is made again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing
from threading import Lock
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from beam_jobs.engine.partition import from_ipc
from beam_jobs.engine.plan import ReadOnce, RunPlan
from beam_jobs.engine.steps import WriteView
from beam_jobs.jobs.user_history import item_profiles, remembered_codes
from feature_repo.contract import limits
from feature_repo.contract.arrow import arrow_schema, from_micros, micros
from feature_repo.contract.contract import Contract
from feature_repo.contract.schema import CREATED_TIMESTAMP, EVENT_TIMESTAMP
from feature_repo.history.record import ARRIVED, Extended, Record, extended
from feature_repo.home.erased import erased_of
from feature_repo.raw.acknowledged import EVENT, NUMBER, POSITIONS, parse_acknowledged
from feature_repo.store.event_log import Entry, UserId
from feature_repo.store.online_users import HISTORY, STATS, Logged, ManyRows, user_records
from feature_repo.store.received import Beyond, Received, open_log

# Stands for both views of a record
RECORDS = "user_records"
# Users of one round trip
PIECE = 1000
Row = dict[str, Any]


class _Read:
    """The last reading of `beyond`, with its run and how many files there were."""

    lock = Lock()
    of: tuple[str, int, int] | None = None
    found = Beyond({}, {})


erased = ReadOnce(lambda plan: erased_of(plan.home))


def beyond(plan: RunPlan) -> Beyond:
    """What was acknowledged and the tables do not know, as far as it may have left the log."""
    received = Received(plan.home, plan.contract)
    with _Read.lock:
        # Files may have come since this process read them.
        state = (plan.run_id, len(received.files()), received.num_trimmed())
        if _Read.of != state:
            history = plan.pinned["user_history"]
            before = history.received_before
            # The rows of a run as of an earlier time are older ones.
            if plan.as_of is not None and plan.as_of < history.as_of_micros:
                before = min(before, plan.as_of)
            _Read.found = received.beyond(history.received, before)
            _Read.of = state
        return _Read.found


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
    columns = {**dict(zip(taken.column_names, taken.columns, strict=True))}
    columns |= dict(zip(stats.column_names, stats.columns, strict=True))
    schema = record_schema(contract)
    return pa.table([columns[name] for name in schema.names], schema=schema)


def nobody(contract: Contract, users: pa.Array, at: int) -> pa.Table:
    """Records without a value.

    Args:
        at: their time, microseconds.
    """
    schema = record_schema(contract)
    columns = {field.name: pa.nulls(len(users), field.type) for field in schema}
    stamps = from_micros(np.full(len(users), at))
    columns |= {EVENT_TIMESTAMP: stamps, CREATED_TIMESTAMP: stamps}
    columns[contract.user.join_key] = users
    return pa.table(columns, schema=schema)


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
        user = self.plan.contract.user.join_key
        while rows.num_rows:
            users = rows[user].to_pylist()
            logged = self._records.logged(users)
            made = self._with_what_came(rows, logged)
            features = {
                view: made.select([c.name for c in self.plan.contract.table(view).columns])
                for view in (HISTORY, STATS)
            }
            replaced = self._records.replace(
                ManyRows(users, features, micros(made[EVENT_TIMESTAMP])), logged
            )
            rows = rows.filter(pa.array(~replaced))

    def _with_what_came(self, rows: pa.Table, logged: Sequence[Logged]) -> pa.Table:
        """Records with the acknowledged events that their tables do not know."""
        plan = self.plan
        user = plan.contract.user.join_key
        came = beyond(plan)
        late = [
            (place, entries)
            for place, (user_id, log) in enumerate(zip(rows[user].to_pylist(), logged, strict=True))
            if (entries := came.of(user_id, log.entries))
        ]
        if not late:
            return rows
        changed = rows.take(pa.array([place for place, _ in late])).to_pylist()
        for row, (_, entries) in zip(changed, late, strict=True):
            row |= _extended_row(plan, row, entries)
        untouched = np.ones(rows.num_rows, bool)
        untouched[[place for place, _ in late]] = False
        kept = rows.filter(pa.array(untouched))
        both = pa.concat_tables([kept, pa.Table.from_pylist(changed, schema=rows.schema)])
        order = np.argsort(
            np.r_[np.flatnonzero(untouched), [place for place, _ in late]], kind="stable"
        )
        return both.take(pa.array(order))


def _extended_row(plan: RunPlan, row: Row, entries: Sequence[Entry]) -> Row:
    """What changes in a record by the events that came."""
    contract = plan.contract
    user_id = row[contract.user.join_key]
    if erased(plan) and erased(plan).hash_of(user_id) in erased(plan).users:
        return {}
    statistics = [column.name for column in contract.table(STATS).columns]
    record = Record(row["history"], row["sketch"], {name: row[name] for name in statistics})
    found = _extended(plan, user_id, record, entries)
    after = {"history": found.record.history, "sketch": found.record.sketch, **found.record.stats}
    stored = micros(pa.array([row[EVENT_TIMESTAMP]], from_micros(np.zeros(1)).type))[0]
    # A tombstone's time says when the tables had nothing; the events say more.
    known = found.known if record.history is None else max(int(stored), found.known)
    stamp = from_micros(np.array([known or int(stored)]))[0].as_py()
    return {**after, EVENT_TIMESTAMP: stamp, CREATED_TIMESTAMP: stamp}


def _extended(plan: RunPlan, user_id: UserId, record: Record, entries: Sequence[Entry]) -> Extended:
    contract = plan.contract
    user = contract.user.join_key
    rows = pa.table(
        {
            user: pa.array([user_id] * len(entries)),
            NUMBER: pa.array([entry.number for entry in entries]),
            EVENT: pa.array([entry.event for entry in entries]),
        }
    )
    # What the next run of `events` will set aside is no event here either.
    parsed = parse_acknowledged(contract, rows, "log").events
    kept = limits.check(contract.table("events"), parsed).kept
    events = kept.select([column.name for column in contract.history_columns])
    number = kept["source_position"].to_numpy() - POSITIONS
    events = events.append_column(ARRIVED, pa.array(number))

    def remembered(fresh: pa.Table) -> Sequence[np.ndarray]:
        if not contract.remembered:
            return []
        return remembered_codes(contract, fresh, item_profiles(plan))

    return extended(contract, user_id, record, events, remembered)
