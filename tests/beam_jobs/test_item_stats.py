"""Item statistics against a few lines of plain Python, at every midnight."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
from hypothesis import given, settings
from hypothesis import strategies as st

from beam_jobs.jobs.item_stats import stat_rows
from feature_repo.contract.arrow import from_micros, micros
from feature_repo.contract.contract import contract
from feature_repo.contract.schema import STAT_WINDOWS_DAYS, Column, DType
from feature_repo.datasets import load_contract
from feature_repo.history.transforms import MICROS_PER_DAY

CONTRACT = load_contract("online_retail")
EVENTS = st.lists(
    st.tuples(
        st.sampled_from(["a", "b", "c"]),
        st.integers(0, 1),
        st.integers(0, 60 * MICROS_PER_DAY - 1),
        st.sampled_from([0.5, 1.0, 2.25]),
        st.integers(1, 3),
    ),
    max_size=30,
)


def events_table(rows: list[Any]) -> pa.Table:
    columns = list(zip(*rows, strict=True)) if rows else [[]] * 5
    return pa.table(
        {
            "item_id": pa.array(columns[0], pa.string()),
            "action": pa.array(columns[1], pa.int8()),
            "event_timestamp": from_micros(np.array(columns[2], np.int64)),
            "unit_price": pa.array(columns[3], pa.float32()),
            "user_id": pa.array(columns[4], pa.int64()),
        }
    )


def known_at(rows: list[Any], item: str, midnight: int) -> dict[str, Any]:
    """What an item's statistics are at a midnight: whole days before it."""
    now = midnight * MICROS_PER_DAY
    bought = [
        (at, price) for i, action, at, price, _ in rows if i == item and action == 0 and at < now
    ]
    first: dict[int, int] = {}
    for i, action, at, _, user in rows:
        if i == item and action == 0 and at < now:
            first[user] = min(at, first.get(user, at))
    truth: dict[str, Any] = {
        "count_total": len(bought),
        "users_total": len(first),
        "other_total": sum(i == item and a == 1 and at < now for i, a, at, _, _ in rows),
    }
    for days in STAT_WINDOWS_DAYS:
        begin = now - days * MICROS_PER_DAY
        truth[f"users_{days}d"] = sum(at >= begin for at in first.values())
        truth[f"count_{days}d"] = sum(at >= begin for at, _ in bought)
    truth["mean_unit_price"] = (
        float(np.float32(sum(price for _, price in bought) / len(bought))) if bought else None
    )
    return truth


@settings(max_examples=150, deadline=None)
@given(EVENTS)
def test_the_newest_row_at_any_midnight_is_the_truth(rows: list[Any]) -> None:
    stats = stat_rows(CONTRACT, events_table(rows), None)
    found = stats.to_pylist()
    stamps = (micros(stats["event_timestamp"]) // MICROS_PER_DAY).tolist()
    for item in "abc":
        mine = [
            (stamp, row) for stamp, row in zip(stamps, found, strict=True) if row["item_id"] == item
        ]
        assert [stamp for stamp, _ in mine] == sorted({stamp for stamp, _ in mine})
        for midnight in range(0, 95):
            newest = [row for stamp, row in mine if stamp <= midnight][-1:]
            truth = known_at(rows, item, midnight)
            if newest:
                assert {name: newest[0][name] for name in truth} == truth
            else:
                assert truth["count_total"] == truth["other_total"] == 0


@settings(max_examples=50, deadline=None)
@given(EVENTS, st.integers(0, 70))
def test_rows_that_are_not_knowable_yet_are_left_out(rows: list[Any], day: int) -> None:
    as_of = day * MICROS_PER_DAY + 5
    whole = stat_rows(CONTRACT, events_table(rows), None)
    cut = stat_rows(CONTRACT, events_table([r for r in rows if r[2] < as_of]), as_of)
    assert cut.equals(whole.filter(pa.array(micros(whole["event_timestamp"]) <= as_of)))


def test_means_of_values_whose_sums_pass_every_machine_integer_are_right() -> None:
    """Whole numbers near 2³¹, and prices near 1e12, a million-fold of which int64 holds nine."""
    for kind, dtype, value in (
        ("int32", DType.INT32, 2_000_000_000),
        ("float32", DType.FLOAT32, 1e12),
    ):
        spec = replace(CONTRACT.spec, event_features=(Column("unit_price", dtype, ""),))
        rows = [("a", 0, n * MICROS_PER_DAY, 1.0, 1) for n in range(50)]
        events = events_table(rows).set_column(3, "unit_price", pa.array([value] * 50, kind))
        found = stat_rows(contract(spec), events, None)
        assert found["count_total"].to_pylist()[-1] == 50
        assert set(found["mean_unit_price"].to_pylist()) == {float(np.float32(value))}
