"""Shares of everybody's events by value: as plain counting at any time, and as a server has them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
from hypothesis import given, settings
from hypothesis import strategies as st

from feature_repo.contract.arrow import NO_VALUE, arrow_schema, from_micros, value_codes
from feature_repo.history.counts import Readings
from feature_repo.history.shares import ItemEvents, Shares, changes_of
from feature_repo.history.sketch import Layout
from feature_repo.history.transforms import sketch_features, sketch_names
from tests.feature_repo.test_sketch import BRANDED, MICROS_PER_DAY, START

LAYOUT = Layout.of(BRANDED)
ITEMS = ["a", "b", "c", "d"]
BRANDS = ["x", "y", None]
WORDS = [["mug"], ["mug", "red"], [], None]
# (item, day, count) and (item, day, brand, words)
STATS = st.lists(
    st.tuples(st.sampled_from(ITEMS), st.integers(0, 9), st.integers(0, 20)),
    unique_by=lambda row: row[:2],
)
PROFILES = st.lists(
    st.tuples(
        st.sampled_from(ITEMS),
        st.integers(0, 9),
        st.sampled_from(BRANDS),
        st.sampled_from(WORDS),
    ),
    unique_by=lambda row: row[:2],
)


def stamps(days: list[int]) -> pa.Array:
    return from_micros(START + np.array(days, np.int64) * MICROS_PER_DAY)


def tables(stats: list[Any], profiles: list[Any]) -> tuple[pa.Table, pa.Table]:
    """Rows of `item_stats` and `item_profile`, as far as shares read them."""
    columns = {c.name: c for c in BRANDED.remembered}
    schema = arrow_schema(BRANDED.table("item_profile"))
    of_stats = pa.table(
        {
            "item_id": pa.array([item for item, _, _ in stats], pa.string()),
            "event_timestamp": stamps([day for _, day, _ in stats]),
            "count_total": pa.array([count for _, _, count in stats], pa.int64()),
        }
    )
    values = zip(columns, ([row[2] for row in profiles], [row[3] for row in profiles]), strict=True)
    of_profiles = pa.table(
        {
            "item_id": pa.array([row[0] for row in profiles], pa.string()),
            "event_timestamp": stamps([row[1] for row in profiles]),
            "created_timestamp": stamps([row[1] for row in profiles]),
            **{name: pa.array(given, schema.field(name).type) for name, given in values},
        }
    )
    return of_stats, of_profiles


def known_by(rows: list[Any], day: int) -> dict[str, Any]:
    """The newest row of each item."""
    return {row[0]: row for row in sorted(rows, key=lambda row: row[1]) if row[1] <= day}


def candidates() -> list[np.ndarray]:
    words = value_codes(pa.array(["mug", "red", "blue", "mug"]))
    bags = np.c_[words, [words[1], NO_VALUE, NO_VALUE, NO_VALUE], np.full((4, 6), NO_VALUE)]
    return [value_codes(pa.array(ITEMS)), value_codes(pa.array(["x", "y", None, "z"])), bags]


@settings(max_examples=150, deadline=None)
@given(STATS, PROFILES)
def test_shares_are_those_of_plain_counting_at_any_time(
    stats: list[Any], profiles: list[Any]
) -> None:
    shares = Shares(LAYOUT, changes_of(BRANDED, *tables(stats, profiles)))
    for day in (-1, 0, 3, 9, 20):
        counts = {item: row[2] for item, row in known_by(stats, day).items()}
        values = known_by(profiles, day)
        total = max(sum(counts.values()), 1)

        def of(place: int, value: str, values: Any = values, counts: Any = counts) -> int:
            return sum(
                counts.get(item, 0)
                for item, row in values.items()
                if value in ([row[2]] if place == 2 else row[3] or [])
            )

        own = np.array([counts.get(item, np.nan) for item in ITEMS])
        found = shares.read(candidates(), np.full(4, START + day * MICROS_PER_DAY), own) * total
        np.testing.assert_allclose(found[:, 0], np.nan_to_num(own))
        np.testing.assert_allclose(found[:, 1], [of(2, "x"), of(2, "y"), np.nan, of(2, "z")])
        # Of several words the mean
        mug, red = of(3, "mug"), of(3, "red")
        np.testing.assert_allclose(found[:, 2], [(mug + red) / 2, red, of(3, "blue"), mug])


def test_an_item_that_changes_its_brand_takes_its_events_along() -> None:
    made = tables(
        [("a", 1, 6), ("b", 2, 2)], [("a", 0, "x", None), ("b", 0, "y", None), ("a", 5, "y", None)]
    )
    shares = Shares(LAYOUT, changes_of(BRANDED, *made))
    times = START + np.array([4, 6]) * MICROS_PER_DAY
    asked = [
        value_codes(pa.array(["a", "a"])),
        value_codes(pa.array(["x", "y"])),
        np.full((2, 8), NO_VALUE),
    ]
    np.testing.assert_allclose(shares.read(asked, times, np.array([6.0, 6.0]))[:, 1], [0.75, 1.0])


@settings(max_examples=50, deadline=None)
@given(STATS.filter(bool), PROFILES)
def test_items_as_they_are_now_give_what_their_past_gives(
    stats: list[Any], profiles: list[Any]
) -> None:
    """What a server makes of the items that it loads is what training reads at that time."""
    now = np.full(4, START + 50 * MICROS_PER_DAY)
    over_time = Shares(LAYOUT, changes_of(BRANDED, *tables(stats, profiles)))
    newest = known_by(stats, 50)
    brands, words = (
        [known_by(profiles, 50).get(item, (None,) * 4)[place] for item in ITEMS] for place in (2, 3)
    )
    own = np.array([newest.get(item, (0, 0, np.nan))[2] for item in ITEMS], np.float64)
    bags = np.full((4, 8), NO_VALUE)
    for row, own_words in enumerate(words):
        spelt = value_codes(pa.array(own_words or [], pa.string()))
        bags[row, : len(spelt)] = spelt
    held = ItemEvents.now([value_codes(pa.array(brands, pa.string())), bags], own)
    at_once = Shares(LAYOUT, held).read(candidates(), np.zeros(4, np.int64), own)
    np.testing.assert_allclose(at_once, over_time.read(candidates(), now, own))


def test_lifts_say_by_how_much_a_count_is_above_the_expected_one() -> None:
    names = sketch_names(BRANDED)
    halves = len(LAYOUT.rates)
    counts = np.zeros((2, len(LAYOUT.names), halves))
    counts[0, 0, 0] = 4
    totals = np.full((2, halves), 20.0)
    shares = np.full((2, len(LAYOUT.names)), 0.1)
    shares[1, 1] = np.nan
    readings = Readings(counts, np.full(counts.shape[:2], np.nan), totals)
    found = dict(zip(names, sketch_features(readings, shares).T, strict=True))
    np.testing.assert_allclose(found["life_item_lift"], np.log([4.5 / 2.5, 0.5 / 2.5]), rtol=1e-6)
    assert np.isnan(found[f"life_{LAYOUT.names[1]}_lift"][1])
    # Nobody expects anything of a user without events.
    empty = replace(readings, totals_NK=np.zeros_like(totals))
    assert sketch_features(empty, shares)[1, names.index("life_item_lift")] == 0
