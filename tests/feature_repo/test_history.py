"""Histories against an oracle of plain Python: log slice = packed history = what was known then."""

from __future__ import annotations

import math
import struct
from collections import defaultdict
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from beam_jobs.engine.partition import sort_by_key_and_time
from beam_jobs.jobs.user_history import packed_rows
from feature_repo.contract.arrow import EPOCH, arrow_schema, history_schema, micros
from feature_repo.contract.contract import contract
from feature_repo.contract.schema import Column, DType
from feature_repo.datasets import load_contract
from feature_repo.history import history, user_stats
from feature_repo.history.history import Histories, HistoryError, HistoryLog
from feature_repo.history.transforms import (
    CONTEXT_FIELDS,
    MATCH_FEATURES,
    MICROS_PER_DAY,
    context_fields,
    match_features,
    user_features,
)
from feature_repo.home.tables import JobFolder

CONTRACT = load_contract("online_retail")
EVENTS = st.lists(
    st.tuples(
        st.integers(1, 4),
        st.sampled_from(["10001", "10002A", "10003"]),
        st.integers(0, 1),
        st.integers(0, 9),
        st.integers(1, 5),
    ),
    max_size=40,
)


def events_table(rows: list[tuple[int, str, int, int, int]]) -> pa.Table:
    columns = list(zip(*rows, strict=True)) if rows else [[]] * 5
    table = pa.table(
        [
            pa.array(columns[0], pa.int64()),
            pa.array(columns[1], pa.string()),
            pa.array(columns[2], pa.int8()),
            pa.array(columns[3], pa.int64()).cast(pa.timestamp("us", "UTC")),
            pa.array(columns[4], pa.float32()),
            pa.array([0.37 * q for q in columns[4]], pa.float32()),
            pa.array(range(len(rows)), pa.int64()),
            *[pa.nulls(len(rows), pa.timestamp("us", "UTC"))] * 2,
        ],
        schema=arrow_schema(CONTRACT.table("events")),
    )
    return sort_by_key_and_time(table, "user_id")


def oracle(
    rows: list[tuple[int, str, int, int, int]],
) -> dict[int, list[tuple[str, int, int, int]]]:
    """User → events, oldest first, ties in source order."""
    found = defaultdict(list)
    for user, item, action, at, quantity in rows:
        found[user].append((item, action, at, quantity))
    return {user: sorted(events, key=lambda e: e[2]) for user, events in found.items()}


def open_log(folder: Path, events: pa.Table) -> HistoryLog:
    part = history.log_part(CONTRACT, events)
    with pa.ipc.new_file(str(folder / "part.arrow"), part.schema) as writer:
        writer.write_batch(part)

    class OnePart(JobFolder):
        def paths(self, table: str) -> list[str]:
            return [str(folder / "part.arrow")]

    return HistoryLog(CONTRACT, OnePart(str(folder), "user_history"))


@settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(EVENTS, st.integers(1, 6))
def test_log_slice_equals_oracle_at_every_instant(
    tmp_path: Path, rows: list[Any], length: int
) -> None:
    events, truth = events_table(rows), oracle(rows)
    index = user_stats.build(CONTRACT, events)
    log = open_log(tmp_path, events)
    for at in range(11):  # a request at this very microsecond
        known = (
            index.filter(pa.array(micros(index["event_timestamp"]) <= at))
            if index.num_rows
            else index
        )
        for user in (1, 2, 3, 4, 99):
            ends = [
                e
                for u, e in zip(
                    known["user_id"].to_pylist(), known["history_end"].to_pylist(), strict=True
                )
                if u == user
            ]
            got = log.gather(
                log.rows_of(pa.array([user], pa.int64())), np.array([max(ends, default=0)]), length
            )
            expected = [e for e in truth.get(user, []) if e[2] < at][-length:]
            assert [log.items[int(k)].as_py() for k in got.item_keys] == [e[0] for e in expected]
            assert got.columns["action"].tolist() == [e[1] for e in expected]
            assert got.times.tolist() == [e[2] for e in expected]
            assert got.columns["quantity"].tolist() == [e[3] for e in expected]


@settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(EVENTS, st.integers(1, 6))
def test_packed_history_equals_log_slice_at_the_same_instant(
    tmp_path: Path, rows: list[Any], length: int
) -> None:
    events = events_table(rows)
    kept = contract(replace(CONTRACT.spec, num_history_online=length))
    log, newest = (
        open_log(tmp_path, events),
        packed_rows(kept, events, user_stats.build(kept, events)),
    )
    for user, packed in zip(
        newest["user_id"].to_pylist(), newest["history"].to_pylist(), strict=True
    ):
        online = history.unpack(CONTRACT, user, packed)
        row = log.rows_of(pa.array([user], pa.int64()))
        offline = log.gather(row, log._count[row], length)
        assert online["item_id"].to_pylist() == [
            log.items[int(k)].as_py() for k in offline.item_keys
        ]
        assert micros(online["event_timestamp"]).tolist() == offline.times.tolist()
        for name in ("action", "quantity", "unit_price"):
            assert online[name].to_pylist() == offline.columns[name].tolist()


def test_an_event_at_the_request_time_is_not_in_its_history() -> None:
    events = events_table([(1, "10001", 0, 5, 1), (1, "10003", 0, 7, 1)])
    index = user_stats.build(CONTRACT, events)
    assert micros(index["event_timestamp"]).tolist() == [6, 8]
    assert index["history_end"].to_pylist() == [1, 2]


def packed_example(more: int = 0) -> bytes:
    """Two events, and so many more."""
    rows = [(1, "10001", 0, 5, 1), (1, "10003", 1, 7, 2)]
    events = events_table(rows + [(1, "10002", 0, 8 + number, 3) for number in range(more)])
    newest = packed_rows(CONTRACT, events, user_stats.build(CONTRACT, events))
    return newest["history"][0].as_py()


def test_every_truncation_and_bit_flip_of_a_packed_history_is_noticed() -> None:
    data = packed_example()
    assert history.unpack(CONTRACT, 1, data).num_rows == 2
    for length in range(len(data)):
        with pytest.raises(HistoryError):
            history.unpack(CONTRACT, 1, data[:length])
    for position in range(len(data)):
        for bit in range(8):
            broken = bytearray(data)
            broken[position] ^= 1 << bit
            with pytest.raises(HistoryError):
                history.unpack(CONTRACT, 1, bytes(broken))


# Plain columns, and compressed ones
@pytest.mark.parametrize("more", [0, 60])
def test_every_wrong_byte_behind_a_right_checksum_is_refused_or_harmless(more: int) -> None:
    """The checksum tells damage, not malice: whatever the bytes say, they decode to events or to
    the one declared error.
    """
    data = packed_example(more)
    schema = history_schema(CONTRACT)
    for position in range(len(data) - 4):
        for value in (0x00, 0x7F, 0xFF):
            body = bytearray(data[:-4])
            body[position] = value
            forged = bytes(body) + struct.pack("<I", history.checksum(1, bytes(body)))
            try:
                batch = history.unpack(CONTRACT, 1, forged)
            except HistoryError:
                continue
            assert batch.schema == schema
            assert np.isfinite(batch["unit_price"].to_numpy()).all()
            batch.to_pylist()


def test_a_history_that_was_packed_before_compression_is_read() -> None:
    data = packed_example(60)
    whole = history.unpack(CONTRACT, 1, data)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, whole.schema) as writer:
        writer.write_batch(whole)
    header = struct.calcsize(history._HEADER.format)
    body = data[:header] + sink.getvalue().to_pybytes()
    plain = body + struct.pack("<I", history.checksum(1, body))
    assert history.unpack(CONTRACT, 1, plain).equals(whole)
    assert len(data) < 0.7 * len(plain)


def test_a_history_of_a_wider_contract_is_read_by_name() -> None:
    extra = Column("margin", DType.FLOAT32, "added later")
    wider = contract(replace(CONTRACT.spec, event_features=(*CONTRACT.spec.event_features, extra)))
    events = events_table([(1, "10001", 0, 5, 1), (1, "10003", 1, 7, 2)])
    more = events.append_column("margin", pa.array([0.5, 0.25], pa.float32()))
    packed = packed_rows(wider, more, user_stats.build(wider, more))["history"][0].as_py()
    assert history.unpack(CONTRACT, 1, packed).equals(history.unpack(CONTRACT, 1, packed_example()))
    assert history.unpack(wider, 1, packed)["margin"].to_pylist() == [0.5, 0.25]
    with pytest.raises(HistoryError, match="no column margin"):
        history.unpack(wider, 1, packed_example())


@settings(max_examples=100, deadline=None)
@given(EVENTS.filter(bool), st.data())
def test_a_corrected_event_changes_the_digest_from_there_on_and_of_no_one_else(
    rows: list[Any], data: st.DataObject
) -> None:
    at = data.draw(st.integers(0, len(rows) - 1))
    user, item, action, time, quantity = rows[at]
    corrected = [*rows[:at], (user, item, action, time, quantity + 1), *rows[at + 1 :]]
    before, after = (
        user_stats.build(CONTRACT, events_table(some)).to_pylist() for some in (rows, corrected)
    )
    assert len(before) == len(after)
    for one, other in zip(before, after, strict=True):
        assert (one["user_id"], one["event_timestamp"]) == (
            other["user_id"],
            other["event_timestamp"],
        )
        touched = one["user_id"] == user and micros_of(one) > time
        assert (one["history_digest"] != other["history_digest"]) == touched


@settings(
    max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(EVENTS.filter(bool))
def test_the_digest_of_a_log_slice_is_the_one_that_the_statistics_carry(
    tmp_path: Path, rows: list[Any]
) -> None:
    events = events_table(rows)
    log = open_log(tmp_path, events)
    histories = log.gather(np.arange(len(log.users)), log.lengths)
    digests = histories.digests(log.item_hashes)
    for row in user_stats.build(CONTRACT, events).to_pylist():
        place = log.rows_of(pa.array([row["user_id"]]))[0]
        assert digests[histories.offsets[place] + row["history_end"] - 1] == row["history_digest"]


def test_another_users_or_contracts_history_is_refused() -> None:
    data = packed_example()
    with pytest.raises(HistoryError, match="another user"):
        history.unpack(CONTRACT, 2, data)
    with pytest.raises(HistoryError, match="written under another contract"):
        history.unpack(load_contract("movielens_1m"), 1, data)


def test_a_log_and_an_index_of_different_runs_are_noticed(tmp_path: Path) -> None:
    log = open_log(tmp_path, events_table([(1, "10001", 0, 5, 1)]))
    with pytest.raises(HistoryError, match="different runs"):
        log.gather(np.array([0]), np.array([2]), 5)


def plain_match(
    events: list[tuple[int, int, int]],
    candidate: int,
    now: int,
    item: list[float],
    user_mean: float,
) -> list[float]:
    """Match features of one candidate in plain Python; events are (item key, action, time)."""
    count, others, item_mean = item
    hits = [i for i, e in enumerate(events) if e[0] == candidate and e[1] == 0]
    last = hits[-1] if hits else None
    return [
        np.log1p(len(hits)),
        len(hits) / max(len(events), 1),
        np.log1p(sum(e[0] == candidate and e[1] != 0 for e in events)),
        np.log1p((now - events[last][2]) / MICROS_PER_DAY) if last is not None else math.nan,
        np.log1p(len(events) - last) if last is not None else math.nan,
        math.nan
        if math.isnan(item_mean) or math.isnan(user_mean)
        else np.log(item_mean / user_mean),
        math.nan if math.isnan(others) else others / max(count + others, 1),
    ]


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.lists(
                st.tuples(st.integers(0, 5), st.integers(0, 1), st.integers(0, 10**12)), max_size=12
            ),
            st.lists(st.integers(0, 8), max_size=6),
        ),
        min_size=1,
        max_size=5,
    )
)
def test_match_features_equal_plain_python_for_any_number_of_requests(requests: list[Any]) -> None:
    now = 10**12 + 5
    histories = [sorted(events, key=lambda e: e[2]) for events, _ in requests]
    flat = [e for events in histories for e in events]
    together = Histories(
        np.cumsum([0, *map(len, histories)]),
        np.array([e[0] for e in flat], np.int64),
        {
            "action": np.array([e[1] for e in flat], np.int8),
            "event_timestamp": np.array([e[2] for e in flat], np.int64),
        },
    )
    candidates = [c for _, c in requests]
    known = [
        [float(c), float(c % 3), 1.5 + c] if c % 4 else [math.nan] * 3
        for some in candidates
        for c in some
    ]
    means = [2.5 if len(events) % 2 else math.nan for events in histories]
    got = match_features(
        together,
        np.cumsum([0, *map(len, candidates)]),
        np.array([c for some in candidates for c in some], np.int64),
        np.full(len(requests), now),
        tuple(np.array(known).reshape(-1, 3).T),
        np.array(means),
    )
    pairs = [(b, c) for b, some in enumerate(candidates) for c in some]
    expected = [
        plain_match(histories[b], c, now, known[i], means[b]) for i, (b, c) in enumerate(pairs)
    ]
    np.testing.assert_allclose(
        got, np.array(expected, np.float32).reshape(-1, len(MATCH_FEATURES)), rtol=1e-6
    )
    statistics = [
        [e[0][2] / 1e6, len(e), sum(x[1] for x in e), m] if e else [math.nan] * 4
        for e, m in zip(histories, means, strict=True)
    ]
    users = user_features(together, np.full(len(requests), now), *np.array(statistics).T)
    for row, events, mean in zip(users, histories, means, strict=True):
        if not events:
            assert np.isnan(row).all()
            continue
        expected_row = [
            np.log1p((now - events[0][2]) / MICROS_PER_DAY),
            np.log1p(len(events)),
            sum(e[1] for e in events) / len(events),
            np.log1p(mean),
            np.log1p((now - events[-1][2]) / MICROS_PER_DAY),
        ]
        np.testing.assert_allclose(row, expected_row, rtol=1e-5, atol=1e-7)


def test_hour_and_weekday_are_those_of_the_calendar() -> None:
    times = [datetime(2026, 11, 22, 8, 59, 59, tzinfo=UTC), datetime(1969, 12, 31, 23, tzinfo=UTC)]
    found = context_fields(np.array([int(time.timestamp() * 1e6) for time in times]))
    assert found.tolist() == [[8, 6], [23, 2]]  # a Sunday, a Wednesday
    assert found.max(0).tolist() < list(CONTEXT_FIELDS.values())


@settings(max_examples=100, deadline=None)
@given(EVENTS)
def test_user_statistics_equal_plain_python_at_every_instant(rows: list[Any]) -> None:
    events = events_table(rows)
    found = user_stats.build(CONTRACT, events).to_pylist()
    prices = events["unit_price"].to_pylist()
    everything = list(
        zip(events["user_id"].to_pylist(), events["action"].to_pylist(), micros(events["event_timestamp"]), prices, strict=True)
    )  # fmt: skip
    assert {(row["user_id"], micros_of(row) - 1) for row in found} == {
        (e[0], e[2]) for e in everything
    }
    for row in found:
        known = [e for e in everything if e[0] == row["user_id"] and e[2] < micros_of(row)]
        bought = [e[3] for e in known if e[1] == 0]
        assert row["history_end"] == len(known)
        assert row["other_events"] == len(known) - len(bought)
        assert row["first_event_s"] == min(e[2] for e in known) // 1_000_000
        if bought:
            assert row["user_mean_unit_price"] == pytest.approx(sum(bought) / len(bought), rel=1e-5)
        else:
            assert row["user_mean_unit_price"] is None


@settings(max_examples=200, deadline=None)
@given(EVENTS, st.integers(0, 39))
def test_user_statistics_are_built_extended_and_taken_back_alike(rows: list[Any], cut: int) -> None:
    """build(a + b) == add(build(a), b), and subtract(add(x, b), b) == x; a mean up to its rounding."""
    rows = sorted(((1, *row[1:]) for row in rows), key=lambda row: row[3])
    events = events_table(rows)
    older, newer = events.slice(0, cut), events.slice(cut)
    if not len(newer):
        return
    before = stats_of(older)
    after = user_stats.add(CONTRACT, before, newer)
    assert_same_stats(after, stats_of(events))
    if len(older):
        assert_same_stats(user_stats.subtract(CONTRACT, after, newer), before)


def stats_of(events: pa.Table) -> dict[str, Any]:
    """The newest statistics of the one user of these events."""
    names = user_stats.unknown(CONTRACT)
    if not len(events):
        return dict(names)
    newest = user_stats.build(CONTRACT, events).to_pylist()[-1]
    return {name: newest[name] for name in names}


def assert_same_stats(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        same = value if value is None or "mean" not in name else pytest.approx(value, rel=1e-5)
        assert found[name] == same, name


def micros_of(row: dict[str, Any]) -> int:
    return (row["event_timestamp"] - EPOCH) // timedelta(microseconds=1)


def test_offline_slice_equals_online_value_for_random_customers(shop: Any) -> None:
    """Through the stores: packed history read with Feast's SDK against the log."""
    contract = load_contract("online_retail")
    log = HistoryLog(contract, JobFolder(shop.settings.home, "user_history"))
    users = log.users.to_pylist()
    rng = np.random.default_rng(0)
    chosen = [int(u) for u in rng.choice(users, 25, replace=False)]
    read = shop.store.get_online_features(
        features=["user_history:history", "user_stats:history_end"],
        entity_rows=[{"user_id": u} for u in chosen],
    ).to_dict()
    for user, packed, end in zip(chosen, read["history"], read["history_end"], strict=True):
        online = history.unpack(contract, user, packed)
        offline = log.gather(log.rows_of(pa.array([user], pa.int64())), np.array([end]), 512)
        assert online["item_id"].to_pylist() == [
            log.items[int(k)].as_py() for k in offline.item_keys
        ]
        assert micros(online["event_timestamp"]).tolist() == offline.times.tolist()


def test_offline_slice_equals_online_value_at_random_instants(
    tmp_path: Path, shop: Any, helpers: Any
) -> None:
    """Build the online value as of an instant, and slice the log of the whole data at that
    instant.
    """
    contract = load_contract("online_retail")
    log = HistoryLog(contract, JobFolder(shop.settings.home, "user_history"))
    index = JobFolder(shop.settings.home, "user_history").read("user_stats")
    for as_of in (
        "2011-03-01T10:30:00+00:00",
        "2011-08-17T00:00:00+00:00",
        "2011-11-20T15:00:00+00:00",
    ):
        then = helpers.settings_in(tmp_path / as_of[:10], "online_retail", shop.data)
        helpers.run_jobs(then, "events", "user_history", as_of=as_of, num_partitions=2)
        packed = JobFolder(then.home, "user_history").read("user_history")
        instant = JobFolder(then.home, "user_history").require().as_of_micros
        known = index.filter(pa.array(micros(index["event_timestamp"]) <= instant))
        ends = dict(
            zip(known["user_id"].to_pylist(), known["history_end"].to_pylist(), strict=True)
        )  # the last row of a user wins
        assert set(packed["user_id"].to_pylist()) == set(ends)
        for user, value in zip(
            packed["user_id"].to_pylist(), packed["history"].to_pylist(), strict=True
        ):
            online = history.unpack(contract, user, value)
            offline = log.gather(
                log.rows_of(pa.array([user], pa.int64())), np.array([ends[user]]), 512
            )
            assert online["item_id"].to_pylist() == [
                log.items[int(k)].as_py() for k in offline.item_keys
            ]
            assert micros(online["event_timestamp"]).tolist() == offline.times.tolist()
