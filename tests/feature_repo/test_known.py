"""Nothing sees what had not arrived, or misses what had: histories, statistics, sketches and counts of items from
random logs with late, repeated, corrected and struck lines, against plain Python that reads the lines themselves.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from beam_jobs.engine.partition import sort_by_key_and_time, split_by_hash
from beam_jobs.jobs.item_stats import stat_rows
from feature_repo.contract.arrow import arrow_schema, from_micros, micros
from feature_repo.contract.contract import ARRIVAL, REPLACED, Contract, contract
from feature_repo.contract.schema import STAT_WINDOWS_DAYS
from feature_repo.datasets import load_contract
from feature_repo.history import history, user_stats
from feature_repo.history.counts import UserCounts
from feature_repo.history.history import HistoryError, HistoryLog
from feature_repo.history.known import NEVER, known_before
from feature_repo.history.recall import Recall
from feature_repo.history.sketch import Layout
from feature_repo.history.transforms import MICROS_PER_DAY
from feature_repo.home.tables import JobFolder
from feature_repo.raw import lines

SPEC = replace(load_contract("online_retail").spec, event_identity=("event_id",))
CONTRACT = contract(SPEC)
USERS = (1, 2, 3)
ITEMS = ("10001", "10002A", "10003")


@dataclass(frozen=True)
class Line:
    """A line of a log: all times in microseconds."""

    event: int
    user: int
    item: str
    action: int
    time: int
    quantity: int
    arrival: int
    struck: bool

    def says(self) -> tuple[Any, ...]:
        return self.user, self.item, self.action, self.time, self.quantity


def logs(step: int) -> st.SearchStrategy[list[Line]]:
    """Logs of few events, so that many lines name the same one."""
    line = st.builds(
        Line,
        event=st.integers(0, 6),
        user=st.sampled_from(USERS),
        item=st.sampled_from(ITEMS),
        action=st.integers(0, 1),
        time=st.integers(0, 9).map(lambda n: n * step),
        quantity=st.integers(1, 2),
        arrival=st.integers(0, 14).map(lambda n: n * step),
        struck=st.sampled_from([False, False, False, True]),
    )
    return st.lists(line, max_size=24)


def as_lines(log: list[Line], *, arrivals: bool = True) -> pa.Table:
    """Lines as `parse` makes them."""
    n = len(log)
    stamps = from_micros(np.array([line.arrival for line in log], np.int64))
    late = np.array([line.arrival <= line.time for line in log], bool)
    columns: dict[str, Any] = {
        "user_id": pa.array([line.user for line in log], pa.int64()),
        "item_id": pa.array([line.item for line in log], pa.string()),
        "action": pa.array([line.action for line in log], pa.int8()),
        "event_timestamp": from_micros(np.array([line.time for line in log], np.int64)),
        "event_id": pa.array([str(line.event) for line in log], pa.string()),
        "quantity": pa.array([line.quantity for line in log], pa.float32()),
        "unit_price": pa.array([0.5 * line.quantity for line in log], pa.float32()),
        "source_position": pa.array(np.arange(n)),
        ARRIVAL.name: pa.array(micros(stamps), mask=late).cast(stamps.type),
        REPLACED.name: pa.nulls(n, stamps.type),
    }
    if not arrivals:
        columns[ARRIVAL.name] = stamps = pa.nulls(n, stamps.type)
    schema = arrow_schema(CONTRACT.table("events"))
    table = pa.table([columns[name] for name in schema.names], schema=schema)
    table = table.append_column(lines.LINE, pa.array(np.arange(n)))
    table = table.append_column(lines.ARRIVED, stamps)
    return table.append_column(lines.DELETED, pa.array([line.struck for line in log], pa.bool_()))


def events_of(log: list[Line], *, arrivals: bool = True) -> pa.Table:
    resolved = lines.resolve(as_lines(log, arrivals=arrivals), SPEC.event_identity)
    kept = resolved.events.num_rows
    assert kept + resolved.dropped.num_rows == sum(not line.struck for line in log)
    assert len(resolved.reasons) == resolved.dropped.num_rows
    return sort_by_key_and_time(resolved.events, "user_id", ("source_position",))


def known_lines(log: list[Line], at: int) -> list[tuple[int, Line]]:
    """What somebody who reads the lines as they arrive knows just before a time: of each event its last line, and
    the place of the first of the lines that said the same in a row.
    """
    by_event = defaultdict(list)
    order = sorted(range(len(log)), key=lambda n: (log[n].arrival, n))
    for place in order:
        if log[place].arrival < at:
            by_event[log[place].event].append(place)
    found = []
    for places in by_event.values():
        last = log[places[-1]]
        if last.struck or last.time >= at:
            continue
        first = places[-1]
        for place in reversed(places[:-1]):
            if log[place].struck or log[place].says() != last.says():
                break
            first = place
        found.append((first, last))
    return found


def history_of(log: list[Line], user: int, at: int) -> list[Line]:
    own = [(first, line) for first, line in known_lines(log, at) if line.user == user]
    return [line for _, line in sorted(own, key=lambda pair: (pair[1].time, pair[0]))]


def open_log(folder: Path, events: pa.Table, made: Contract = CONTRACT) -> HistoryLog:
    path = folder / "part.arrow"
    part = history.log_part(made, events)
    with pa.ipc.new_file(str(path), part.schema) as writer:
        writer.write_batch(part)
    return HistoryLog(made, JobFolder(str(folder), "user_history"), [str(path)])


def index_at(index: pa.Table, user: int, at: int) -> dict[str, Any] | None:
    """The row of the statistics that a point-in-time join finds."""
    rows = index.filter(
        pa.array((micros(index["event_timestamp"]) <= at) & (index["user_id"].to_numpy() == user))
    )
    return rows.to_pylist()[-1] if rows.num_rows else None


def assert_all_is_known_and_nothing_else(folder: Path, log: list[Line], times: list[int]) -> None:
    events = events_of(log)
    index = user_stats.build(CONTRACT, events)
    if not events.num_rows:
        return
    opened = open_log(folder, events)
    layout = Layout.of(CONTRACT)
    recall = Recall(opened)
    for at in times:
        for user in USERS:
            expected = history_of(log, user, at)
            row = index_at(index, user, at) or dict.fromkeys(index.column_names)
            assert (row["history_end"] or 0) == len(expected)
            place = opened.rows_of(pa.array([user]))
            ends = np.array([len(expected)])
            # 1. The history, whole and its newest events.
            for length in (None, 2):
                got = opened.gather(place, ends, length, times=np.array([at]))
                wanted = expected[-length:] if length else expected
                found = [opened.items[int(key)].as_py() for key in got.item_keys]
                assert found == [line.item for line in wanted]
                assert got.times.tolist() == [line.time for line in wanted]
                assert got.columns["action"].tolist() == [line.action for line in wanted]
                assert got.columns["quantity"].tolist() == [line.quantity for line in wanted]
            # 2. The statistics.
            bought = [line for line in expected if line.action == 0]
            if expected:
                assert row["first_event_s"] == min(line.time for line in expected) // 1_000_000
                assert row["other_events"] == len(expected) - len(bought)
                whole = opened.gather(place, ends, times=np.array([at]))
                assert row["history_digest"] == whole.digests(opened.item_hashes)[-1]
            elif row["history_end"] == 0:
                assert row["first_event_s"] is None
                assert row["history_digest"] == 0
            mean = np.mean([0.5 * line.quantity for line in bought]) if bought else None
            assert row["user_mean_unit_price"] == (None if mean is None else pytest.approx(mean))
            # 3. The counts.
            codes = [recall._item_codes]
            read = recall.read(place, ends, np.array([at]), np.array([0, len(codes[0])]), codes)
            counts = UserCounts(layout)
            keys = {item.as_py(): number for number, item in enumerate(opened.items)}
            own = np.array([codes[0][keys[line.item]] for line in bought], np.int64)
            stamps = np.array([line.time for line in bought], np.int64)
            counts.add([own], stamps)
            now = counts.read(codes, at)
            np.testing.assert_allclose(read.counts_NCK, now.counts_NCK, rtol=1e-6)
            np.testing.assert_allclose(read.days_NC, now.days_NC, rtol=1e-5)


QUICK = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@QUICK
@given(logs(step=1))
def test_a_request_sees_what_had_arrived_and_nothing_else(tmp_path: Path, log: list[Line]) -> None:
    assert_all_is_known_and_nothing_else(tmp_path, log, list(range(17)))


@pytest.mark.whole
def test_no_request_of_2000_logs_sees_what_had_not_arrived(tmp_path: Path, promises: Any) -> None:
    checked = []

    @settings(max_examples=2000, deadline=None, database=None)
    @given(logs(step=1))
    def check(log: list[Line]) -> None:
        assert_all_is_known_and_nothing_else(tmp_path, log, list(range(17)))
        checked.append(len(log))

    check()
    promises.note(
        "late, repeated, corrected and struck lines, 2,000 random logs",
        "no request sees what had not arrived, or misses what had",
        f"{sum(checked):,} lines, {len(checked) * 17 * len(USERS):,} requests: history, statistics, sketch as an oracle has them",
        held=len(checked) >= 2000,
        seed=0,
    )


@QUICK
@given(logs(step=MICROS_PER_DAY // 2), st.integers(0, 16).map(lambda n: n * MICROS_PER_DAY // 2))
def test_counts_of_items_are_those_of_the_lines_that_had_arrived(
    log: list[Line], as_of: int
) -> None:
    """At each midnight, and of a run that knows only what arrived before a time."""
    events = events_of(log)
    rows = stat_rows(CONTRACT, events, None)
    cut = stat_rows(CONTRACT, known_before(events, as_of), as_of)
    for day in range(1, 45):
        midnight = day * MICROS_PER_DAY
        known = [line for _, line in known_lines(log, midnight)]
        for item in ITEMS:
            own = [line for line in known if line.item == item]
            bought = [line for line in own if line.action == 0]
            for table in (rows, cut) if midnight <= as_of else (rows,):
                stamps = micros(table["event_timestamp"])
                mask = (stamps <= midnight) & np.array(
                    [i == item for i in table["item_id"].to_pylist()], bool
                )
                found = table.filter(pa.array(mask)).to_pylist()
                row = found[-1] if found else defaultdict(int)
                assert row["count_total"] == len(bought)
                assert row["other_total"] == len(own) - len(bought)
                for days in STAT_WINDOWS_DAYS:
                    recent = [
                        line for line in bought if line.time // MICROS_PER_DAY + 1 + days > day
                    ]
                    assert row[f"count_{days}d"] == len(recent)
                first: dict[int, int] = {}
                for line in bought:
                    first[line.user] = min(line.time, first.get(line.user, line.time))
                assert row["users_total"] == len(first)
                for days in STAT_WINDOWS_DAYS:
                    new = [at for at in first.values() if at // MICROS_PER_DAY + 1 + days > day]
                    assert row[f"users_{days}d"] == len(new)


@QUICK
@given(logs(step=1), st.integers(0, 16))
def test_a_run_of_the_past_is_what_was_known_then(log: list[Line], as_of: int) -> None:
    """`--as_of`: statistics of what was known before a time are the whole run's up to it."""
    events = events_of(log)
    whole = user_stats.build(CONTRACT, events)
    then = user_stats.build(CONTRACT, known_before(events, as_of))
    assert then.equals(whole.filter(pa.array(micros(whole["event_timestamp"]) <= as_of)))


@QUICK
@given(logs(step=1), st.randoms())
def test_neither_files_nor_rows_decide_where_lines_say_when_they_arrived(
    log: list[Line], random: Any
) -> None:
    """Lines of distinct arrivals, in any order."""
    log = [replace(line, arrival=2 * place + 3) for place, line in enumerate(log)]
    shuffled = list(log)
    random.shuffle(shuffled)
    one, other = (events_of(some).drop_columns(["source_position"]) for some in (log, shuffled))
    key = [(name, "ascending") for name in one.column_names]
    assert one.sort_by(key).equals(other.sort_by(key))


@QUICK
@given(logs(step=1))
def test_without_arrivals_the_line_that_stands_last_holds(log: list[Line]) -> None:
    events = events_of(log, arrivals=False)
    last = {line.event: line for line in log}
    expected = {(e, *line.says()) for e, line in last.items() if not line.struck}
    names = ("event_id", "user_id", "item_id", "action", "event_timestamp", "quantity")
    rows = zip(
        *(
            events[name].to_pylist() if name != "event_timestamp" else micros(events[name]).tolist()
            for name in names
        ),
        strict=True,
    )
    assert {(int(row[0]), *row[1:]) for row in rows} == expected
    assert events[ARRIVAL.name].null_count == events[REPLACED.name].null_count == len(events)


def test_a_line_without_its_identity_is_an_event_of_its_own() -> None:
    line = Line(1, 1, "10001", 0, 5, 1, 5, struck=False)
    table = as_lines([line, line, line])
    place = table.schema.get_field_index("event_id")
    nameless = table.set_column(place, "event_id", pa.array([None, "1", None], pa.string()))
    assert lines.resolve(nameless, ("event_id",)).events.num_rows == 3
    assert lines.resolve(table, ("event_id",)).events.num_rows == 1
    assert lines.resolve(table, ("event_id",)).reasons == [lines.REPEATED] * 2


@given(logs(step=1), st.integers(1, 5))
def test_lines_of_one_event_come_to_one_partition(log: list[Line], number: int) -> None:
    table = as_lines(log)
    identity = ("event_id", "event_timestamp")
    parts = list(split_by_hash(table, lines.identity_hashes(table, identity), number))
    assert sum(part.num_rows for _, part in parts) == len(log)
    seen: dict[tuple[Any, ...], int] = {}
    for partition, part in parts:
        for key in zip(*(part[name].to_pylist() for name in identity), strict=True):
            assert seen.setdefault(key, partition) == partition


def test_a_log_whose_index_knows_other_events_is_refused(tmp_path: Path) -> None:
    late = Line(1, 1, "10001", 0, 5, 1, 9, struck=False)
    opened = open_log(tmp_path, events_of([late]))
    assert opened.gather(np.array([0]), np.array([1]), times=np.array([10])).times.tolist() == [5]
    with pytest.raises(HistoryError, match="different runs"):
        opened.gather(np.array([0]), np.array([1]), times=np.array([9]))
    assert opened.lengths.tolist() == [1]
    assert NEVER > 10**18
