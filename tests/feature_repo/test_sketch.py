"""Sketches of a whole history: no reading is too small, few are too large, and how the events came
in makes no difference.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from beam_jobs.engine.partition import sort_by_key_and_time
from beam_jobs.jobs.user_history import packed_rows, remembered_codes
from feature_repo.contract.arrow import NO_VALUE, TIMESTAMP, arrow_schema, from_micros, value_codes
from feature_repo.contract.contract import ARRIVAL, REPLACED, Contract, contract
from feature_repo.contract.schema import CATEGORY, Column, DType, Memory
from feature_repo.datasets import load_contract
from feature_repo.history import history, sketch, user_stats
from feature_repo.history.counts import Readings, from_bytes
from feature_repo.history.history import HistoryLog
from feature_repo.history.recall import Recall
from feature_repo.history.sketch import (
    DEPTH,
    MICROS_PER_DAY,
    NEVER,
    Layout,
    Sketch,
    beside,
)
from feature_repo.home.tables import JobFolder

START = 1_600_000_000_000_000
LAYOUT = Layout(("item_id", "brand", "genres"), (1, 1, 3), (7.0, 90.0), width=512)
SHOP = load_contract("online_retail")
BRANDED: Contract = contract(
    replace(
        SHOP.spec,
        item_features=(
            *SHOP.spec.item_features,
            Column("brand", DType.STRING, "who makes it", kind=CATEGORY, nullable=True),
        ),
        memory=Memory(by=("brand", "description_tokens"), kibibytes=32),
    )
)


def drawn(seed: int, events: int, items: int = 60, years: float = 1.0) -> tuple[list[Any], Any]:
    """Codes of so many events, some without a brand, with up to three genres; and their times."""
    rng = np.random.default_rng(seed)
    genres = rng.integers(0, 6, (events, 3))
    genres[rng.random(genres.shape) < 0.4] = NO_VALUE
    brand = np.where(rng.random(events) < 0.2, NO_VALUE, rng.integers(0, 9, events))
    times = START + np.sort(rng.integers(0, int(years * 365 * MICROS_PER_DAY), events))
    return [rng.zipf(1.4, events) % items, brand, genres], times


def sketch_of(codes: list[Any], times: np.ndarray, layout: Layout = LAYOUT) -> Sketch:
    sketch = Sketch(layout)
    sketch.add(layout.positions(codes), times)
    return sketch


def truth(codes: np.ndarray, times: np.ndarray, key: int, time: int, layout: Layout) -> np.ndarray:
    """Counts of one key, by plain counting."""
    ages = time - times[(beside([codes]) == key).any(axis=1)]
    half = np.array([math.inf, *layout.half_lives_days]) * MICROS_PER_DAY
    return np.exp2(-ages[:, None] / half).sum(axis=0)


def read_all(sketch: Sketch, time: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Readings of all keys there are: 60 items, 9 brands, 6 genres."""
    layout, nothing = sketch.layout, np.full(60, NO_VALUE)
    keys = np.arange(60)
    read = sketch.read(layout.positions([keys, keys % 9, np.c_[keys % 6, nothing, nothing]]), time)
    return read[:, 0], read[:9, 1], read[:6, 2]


def all_true(codes: list[Any], times: np.ndarray, layout: Layout, time: int) -> list[np.ndarray]:
    return [
        np.array([truth(column, times, key, time, layout) for key in range(number)])
        for column, number in zip(codes, (60, 9, 6), strict=True)
    ]


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(0, 300), st.sampled_from([1, 16, 512]))
def test_no_reading_is_too_small(seed: int, events: int, width: int) -> None:
    layout, now = replace(LAYOUT, width=width), START + 400 * MICROS_PER_DAY
    codes, times = drawn(seed, events)
    read = read_all(sketch_of(codes, times, layout), now)
    for found, true in zip(read, all_true(codes, times, layout, now), strict=True):
        assert (found >= true * (1 - 1e-9)).all()


@pytest.mark.parametrize("width", [8, 16, 64])
def test_few_readings_exceed_their_bound(width: int) -> None:
    """At most e^-DEPTH of them: 75 keys of sixty users, one salt of the hash each."""
    now, above, number = START + 400 * MICROS_PER_DAY, np.zeros(3), 0
    for seed in range(60):
        layout = replace(LAYOUT, width=width, columns=(f"item{seed}", f"b{seed}", f"g{seed}"))
        codes, times = drawn(seed, 300)
        sketch = sketch_of(codes, times, layout)
        bounds, true = sketch.bounds(now), all_true(codes, times, layout, now)
        for column, found in enumerate(read_all(sketch, now)):
            above += (found > true[column] + bounds[min(column, 1)] + 1e-9).sum(axis=0)
            number += len(found)
    assert (above / number <= math.exp(-DEPTH)).all()


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 300), st.integers(1, 40))
def test_parts_of_a_history_add_up_to_the_whole(seed: int, events: int, parts: int) -> None:
    codes, times = drawn(seed, events, years=30.0)
    whole, positions = sketch_of(codes, times), LAYOUT.positions(codes)
    rng = np.random.default_rng(seed)
    one_by_one, merged = Sketch(LAYOUT), Sketch(LAYOUT)
    for chosen in np.array_split(np.arange(events), parts):
        one_by_one.add(positions[chosen], times[chosen])
    for chosen in np.array_split(rng.permutation(events), parts):
        part = Sketch(LAYOUT)
        part.add(positions[chosen], times[chosen])
        merged.merge(part)
    now = int(times[-1])
    expected = whole.read(positions, now)
    for other in (one_by_one, merged):
        found = other.read(positions, now)
        assert np.array_equal(found[..., 0], expected[..., 0], equal_nan=True)
        np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-12)


def test_a_bag_reads_the_mean_of_its_values_and_nothing_reads_nan() -> None:
    codes = [
        np.array([1, 2]),
        np.array([NO_VALUE, 5]),
        np.array([[7, 8, NO_VALUE], [7, NO_VALUE, 9]]),
    ]
    sketch = sketch_of(codes, np.array([START, START]))
    wanted = [np.array([1]), np.array([NO_VALUE]), np.array([[7, 8, 10]])]
    read = sketch.read(LAYOUT.positions(wanted), START)[0]
    assert read[0, 0] == 1
    assert np.isnan(read[1]).all()
    assert read[2, 0] == pytest.approx((2 + 1 + 0) / 3)


@pytest.mark.parametrize("events", [0, 3, 4000])
def test_cells_come_back_from_their_bytes(events: int) -> None:
    codes, times = drawn(1, events, items=3000)
    sketch = sketch_of(codes, times)
    now = int(times[-1]) if events else START
    found = Sketch.of_payload(LAYOUT, sketch.payload(now), now)
    positions = LAYOUT.positions(codes)
    later = now + 50 * MICROS_PER_DAY
    for one, other in zip(
        found.read_with_last(positions, later), sketch.read_with_last(positions, later), strict=True
    ):
        np.testing.assert_allclose(one, other, rtol=1e-6)


def test_a_reading_of_the_last_time_is_never_too_early() -> None:
    codes, times = drawn(5, 200)
    layout = replace(LAYOUT, width=8)
    items = np.arange(60)
    nothing = np.full(60, NO_VALUE)
    wanted = [items, nothing, np.c_[nothing, nothing, nothing]]
    _, last = sketch_of(codes, times, layout).read_with_last(
        layout.positions(wanted), int(times[-1])
    )
    for item in range(60):
        own = times[codes[0] == item]
        if len(own):
            assert last[item, 0] >= own[-1]
    assert (last[:, 1] == NEVER).all()


# --- out of the history log ---


def events_of(rows: list[tuple[int, str, int, int]]) -> pa.Table:
    """Events (user, item, action, day) of the branded shop."""
    columns = list(zip(*rows, strict=True)) if rows else [[]] * 4
    times = START + np.array(columns[3], np.int64) * MICROS_PER_DAY
    values = {
        "user_id": pa.array(columns[0], pa.int64()),
        "item_id": pa.array(columns[1], pa.string()),
        "action": pa.array(columns[2], pa.int8()),
        "event_timestamp": from_micros(times),
        "quantity": pa.array(np.ones(len(times), np.float32)),
        "unit_price": pa.array(np.ones(len(times), np.float32)),
        "source_position": pa.array(np.arange(len(times))),
        ARRIVAL.name: pa.nulls(len(times), TIMESTAMP),
        REPLACED.name: pa.nulls(len(times), TIMESTAMP),
    }
    schema = arrow_schema(BRANDED.table("events"))
    return sort_by_key_and_time(
        pa.table([values[n] for n in schema.names], schema=schema), "user_id"
    )


def profiles_of(rows: list[tuple[str, int, str | None, list[str]]]) -> pa.Table:
    """Item profiles (item, day, brand, words)."""
    stamps = from_micros(START + np.array([r[1] for r in rows]) * MICROS_PER_DAY)
    values = {
        "item_id": pa.array([r[0] for r in rows]),
        "description": pa.nulls(len(rows), pa.string()),
        "description_tokens": pa.array([r[3] for r in rows], pa.list_(pa.string())),
        "brand": pa.array([r[2] for r in rows], pa.string()),
        "item_known": pa.array(np.ones(len(rows), np.int8)),
        "event_timestamp": stamps,
        "created_timestamp": stamps,
    }
    schema = arrow_schema(BRANDED.table("item_profile"))
    return pa.table([values[name] for name in schema.names], schema=schema)


PROFILES = profiles_of(
    [
        ("10001", 0, "a", ["red", "mug"]),
        ("10001", 30, "b", ["blue", "mug"]),
        ("10002A", 5, None, []),
        ("10003", 2, "b", ["mug"]),
    ]
)
EVENTS = st.lists(
    st.tuples(
        st.integers(1, 3),
        st.sampled_from(["10001", "10002A", "10003", "10009"]),
        st.integers(0, 1),
        st.integers(0, 60),
    ),
    max_size=30,
)


def test_an_event_is_counted_under_what_its_item_was_then() -> None:
    events = events_of(
        [(1, "10001", 0, day) for day in (0, 10, 29, 30, 45)] + [(1, "10009", 0, 50)]
    )
    brand, words = remembered_codes(BRANDED, events, PROFILES)
    a, b = value_codes(pa.array(["a", "b"]))
    assert brand.tolist() == [a, a, a, b, b, NO_VALUE]
    assert words[0, :3].tolist() == [*value_codes(pa.array(["red", "mug"])), NO_VALUE]
    early = events_of([(1, "10003", 0, 0)])  # before anything was known of it
    assert remembered_codes(BRANDED, early, PROFILES)[0].tolist() == [b]


def open_log(folder: Path, events: pa.Table) -> HistoryLog:
    part = history.log_part(BRANDED, events, remembered_codes(BRANDED, events, PROFILES))
    path = str(folder / "part.arrow")
    with pa.ipc.new_file(path, part.schema) as writer:
        writer.write_batch(part)
    return HistoryLog(BRANDED, JobFolder(str(folder), "user_history"), [path])


def assert_alike(one: Readings, other: Readings) -> None:
    np.testing.assert_allclose(one.counts_NCK, other.counts_NCK, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(one.days_NC, other.days_NC, rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(one.totals_NK, other.totals_NK, rtol=1e-5, atol=1e-7)


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(EVENTS, st.sampled_from([None, 1, 4]))
def test_recall_equals_plain_counting_at_every_request(
    tmp_path: Path, rows: list[Any], newest: int | None
) -> None:
    events = events_of(rows)
    log, codes = open_log(tmp_path, events), remembered_codes(BRANDED, events, PROFILES)
    items = pa.array(["10001", "10003", "10077"])
    wanted = [
        value_codes(items),
        value_codes(pa.array(["a", "b", None])),
        np.c_[value_codes(pa.array(["mug", "red", "none"])), np.full((3, 7), NO_VALUE)],
    ]
    times = START + np.array([0, 7, 31, 61]) * MICROS_PER_DAY
    users = [1, 2, 3, 99]
    asked = [(user, int(time)) for user in users for time in times]
    event_users, event_times = events["user_id"].to_numpy(), events["event_timestamp"]
    event_times = event_times.cast(pa.int64()).to_numpy()
    ends = [int(((event_users == u) & (event_times < t)).sum()) for u, t in asked]
    order = np.random.default_rng(len(rows)).permutation(len(asked))  # requests in any order
    log_rows = log.rows_of(pa.array([asked[at][0] for at in order]))
    found = {}
    # Exact whatever comes, exact up to the declared size, and a sketch from the third item on.
    layouts = {True: None, False: None, "sketch": replace(Layout.of(BRANDED), most_rows=2)}
    for exact, chosen_layout in layouts.items():
        found[exact] = Recall(log, chosen_layout, newest=newest, exact=exact is True).read(
            log_rows,
            np.array(ends)[order],
            np.array([asked[at][1] for at in order]),
            np.arange(len(asked) + 1) * 3,
            [np.tile(c, (len(asked), *(1,) * (c.ndim - 1))) for c in wanted],
        )
    layout = Layout.of(BRANDED)
    primary = events["action"].to_numpy() == 0
    for place, at in enumerate(order):
        user, time = asked[at]
        own = np.flatnonzero((event_users == user) & (event_times < time))
        own = own[primary[own]] if newest is None else own[-newest:][primary[own[-newest:]]]
        for row in range(3):
            for column, key in enumerate((wanted[0][row], wanted[1][row], wanted[2][row, 0])):
                of_events = [value_codes(events["item_id"]), *codes][column][own]
                expected = truth(of_events, event_times[own], int(key), time, layout)
                if key == NO_VALUE:
                    expected = np.full_like(expected, np.nan)
                got = found[True].counts_NCK[3 * place + row, column]
                np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-7)
                ages = (
                    time - event_times[own][(beside([of_events]) == key).any(axis=1)]
                ) / MICROS_PER_DAY
                days = found[True].days_NC[3 * place + row, column]
                if key == NO_VALUE or not len(ages):
                    assert np.isnan(days)
                elif column < 2:
                    assert days == pytest.approx(ages.min(), abs=1e-4)
    # So few items are kept exactly; so few keys do not meet in a cell of every row: a sketch says the same, and times
    # to the second.
    assert_alike(found[False], found[True])
    assert_alike(found["sketch"], found[True])


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(EVENTS.filter(bool), st.booleans())
def test_the_stored_counts_are_what_training_read(
    tmp_path: Path, rows: list[Any], exact: bool
) -> None:
    """The job's bytes, read at a request, against the log's slice at the same instant: exact, and beyond that."""
    with pytest.MonkeyPatch.context() as patch:
        if not exact:
            patch.setattr(sketch, "ROW_BYTES", 1 << 40)
        stored_is_what_training_read(tmp_path, rows, exact)


def stored_is_what_training_read(tmp_path: Path, rows: list[Any], exact: bool) -> None:
    events = events_of(rows)
    log, codes = open_log(tmp_path, events), remembered_codes(BRANDED, events, PROFILES)
    index = user_stats.build(BRANDED, events)
    stored = packed_rows(BRANDED, events, index, codes)
    layout, now = Layout.of(BRANDED), START + 90 * MICROS_PER_DAY
    wanted = [
        value_codes(pa.array(["10001", "10002A", "10009"])),
        value_codes(pa.array(["a", "b", None])),
        np.c_[value_codes(pa.array(["mug", "blue", "none"])), np.full((3, 7), NO_VALUE)],
    ]
    for user, data in zip(stored["user_id"].to_pylist(), stored["sketch"].to_pylist(), strict=True):
        counts, identity = from_bytes(layout, data, user)
        row = log.rows_of(pa.array([user]))
        end = log.lengths[row]
        newest = index.filter(pa.array(index["user_id"].to_numpy() == user)).to_pylist()[-1]
        assert (identity.num_events, identity.digest) == (
            newest["history_end"],
            newest["history_digest"],
        )
        offline = Recall(log).read(row, end, np.array([now]), np.array([0, 3]), wanted)
        assert counts.is_exact == (exact or counts.empty)
        assert_alike(counts.read(wanted, now), offline)
