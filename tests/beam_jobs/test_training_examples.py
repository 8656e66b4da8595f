"""Training examples: what is asked, against which negatives, in which period."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from beam_jobs.jobs.training_examples import ItemPool, ItemTables, NotEnoughItemsError, example_rows
from feature_repo.contract.arrow import from_micros, micros
from feature_repo.datasets import load_contract
from feature_repo.home.tables import JobFolder


@pytest.fixture(scope="module")
def tables(shop: Any) -> tuple[pa.Table, pa.Table, pa.Table]:
    folder = JobFolder
    home = shop.settings.home
    return (
        folder(home, "events").read("events"),
        folder(home, "item_stats").read("item_stats"),
        folder(home, "training_examples").read("training_examples"),
    )


def test_positives_are_the_distinct_items_of_each_customer_and_invoice_time(tables: Any) -> None:
    events, _, examples = tables
    truth = defaultdict(set)
    for user, item, action, at in zip(
        *(events[n].to_pylist() for n in ("user_id", "item_id", "action", "event_timestamp")),
        strict=True,
    ):
        if action == 0:
            truth[user, at].add(item)
    found = defaultdict(list)
    for row in examples.filter(pc.equal(examples["label_purchase"], 1)).to_pylist():
        found[row["user_id"], row["event_timestamp"]].append(row["item_id"])
    assert {key: sorted(items) for key, items in found.items()} == {
        key: sorted(items) for key, items in truth.items()
    }


def test_negatives_are_distinct_never_positive_and_known_by_the_requests_time(tables: Any) -> None:
    events, _, examples = tables
    sold_since = events.group_by("item_id").aggregate([("event_timestamp", "min")])
    first = dict(
        zip(
            sold_since["item_id"].to_pylist(),
            sold_since["event_timestamp_min"].to_pylist(),
            strict=True,
        )
    )
    by_request = defaultdict(list)
    for row in examples.to_pylist():
        by_request[row["request_id"]].append(row)
    for rows in by_request.values():
        items = [row["item_id"] for row in rows]
        assert len(set(items)) == len(items)
        assert len({(row["user_id"], row["event_timestamp"], row["split"]) for row in rows}) == 1
        for row in rows:
            if not row["label_purchase"]:
                assert first[row["item_id"]] < row["event_timestamp"]


def test_numbers_of_negatives_follow_the_protocol(tables: Any, shop: Any) -> None:
    examples = tables[2]
    counts = (
        examples.group_by(["request_id", "split"])
        .aggregate([("label_purchase", "sum"), ("label_purchase", "count")])
        .to_pylist()
    )
    short = 0
    for row in counts:
        positives = row["label_purchase_sum"]
        negatives = row["label_purchase_count"] - row["label_purchase_sum"]
        if row["split"] == "train":
            assert negatives <= 4 * positives
            short += negatives < 4 * positives
        else:
            assert negatives == 100
    manifest = JobFolder(shop.settings.home, "training_examples").require()
    assert manifest.counts["requests_short_of_negatives"] == short
    assert manifest.counts["positives_label_purchase"] == sum(
        row["label_purchase_sum"] for row in counts
    )
    assert set(examples["split"].to_pylist()) == {"train", "validation", "test"}


def test_periods_are_split_by_request_time(tables: Any) -> None:
    rules = load_contract("online_retail").spec.requests
    for row in tables[2].to_pylist():
        at = row["event_timestamp"].isoformat()
        if at < rules.validation_from:
            expected = "train"
        else:
            expected = "validation" if at < rules.test_from else "test"
        assert row["split"] == expected


def test_the_draw_does_not_depend_on_partitions_or_order(tables: Any, shop: Any) -> None:
    events, stats, _ = tables
    stats = ItemTables(stats, JobFolder(shop.settings.home, "events").read("item_profile"))
    whole, _ = example_rows("online_retail", events, stats, 17)
    shuffled = events.take(pa.array(np.argsort(events["user_id"].to_numpy() % 7, kind="stable")))
    one_by_one = [
        example_rows("online_retail", events.filter(pc.equal(events["user_id"], u)), stats, 17)[0]
        for u in pc.unique(events["user_id"]).sort().to_pylist()
    ]
    assert example_rows("online_retail", shuffled, stats, 17)[0].equals(whole)
    assert pa.concat_tables(one_by_one).combine_chunks().equals(whole.combine_chunks())
    assert not example_rows("online_retail", events, stats, 18)[0].equals(whole)


def test_labels_do_not_stand_in_any_place_of_their_own(tables: Any) -> None:
    """Candidates are shuffled: otherwise ties in a score would rank positives first."""
    rows = tables[2].to_pylist()
    place = defaultdict(list)
    for row in rows:
        place[row["request_id"]].append(row["label_purchase"])
    full = [labels for labels in place.values() if 0 < sum(labels) < len(labels)]
    relative = [np.flatnonzero(labels).mean() / (len(labels) - 1) for labels in full]
    assert abs(np.mean(relative) - 0.5) < 0.03


def pool_of(counts: list[int]) -> ItemPool:
    items = pa.array([f"i{n:03d}" for n in range(len(counts))])
    stats = pa.table(
        {
            "item_id": items,
            "event_timestamp": from_micros(np.zeros(len(counts), np.int64)),
            "count_total": counts,
        }
    )
    pool = ItemPool(items, stats, profiles_of([]), "item_id")
    pool.advance(0)
    return pool


def profiles_of(since: list[tuple[str, int]]) -> pa.Table:
    """Rows of `item_profile`: items, and since when they are known."""
    times = from_micros(np.array([at for _, at in since], np.int64))
    items = pa.array([item for item, _ in since], pa.string())
    return pa.table({"item_id": items, "event_timestamp": times, "created_timestamp": times})


def test_new_items_are_drawn_at_their_share_from_when_they_are_known_on() -> None:
    """Ten items with statistics, and ninety that somebody has bought today for the first time."""
    items = pa.array([f"i{n:03d}" for n in range(100)])
    stats = pa.table(
        {
            "item_id": items[:10],
            "event_timestamp": from_micros(np.zeros(10, np.int64)),
            "count_total": [5] * 10,
        }
    )
    pool = ItemPool(
        items, stats, profiles_of([(item, 7) for item in items[10:].to_pylist()]), "item_id"
    )
    rng = np.random.default_rng(0)
    pool.advance(6)
    assert max(pool.draw(rng, np.zeros(0, np.int64), 50)) < 10
    pool.advance(7)
    drawn = np.concatenate([pool.draw(rng, np.zeros(0, np.int64), 8) for _ in range(2000)])
    assert (
        abs((drawn >= 10).mean() - 0.5 * 0.93) < 0.03
    )  # half by popularity, which new items have none of


def test_candidates_without_statistics_are_not_all_positive() -> None:
    """Forty customers buy an item each on one day, all new: whoever comes later is also asked about
    the others' items.
    """
    number, morning = 40, int(np.datetime64("2011-01-20T08:00", "us").astype(int))
    times = from_micros(morning + 60_000_000 * np.arange(number))
    items = [f"n{n:02d}" for n in range(number)]
    columns = {
        "user_id": list(range(number)),
        "item_id": items,
        "action": pa.array([0] * number, pa.int8()),
    }
    events = pa.table({**columns, "event_timestamp": times})
    stats = pa.table(
        {"item_id": ["old"], "event_timestamp": from_micros(np.array([0])), "count_total": [1]}
    )
    known = profiles_of(
        [(item, int(at) + 1) for item, at in zip(items, micros(times), strict=True)]
    )
    rows = example_rows("online_retail", events, ItemTables(stats, known), 1)[0].to_pylist()
    new = [row["label_purchase"] for row in rows if row["item_id"] != "old"]
    assert sum(new) == number
    assert len(new) > 3 * number


def test_an_item_that_occurs_twice_in_a_request_is_one_candidate(shop: Any) -> None:
    at = int(np.datetime64("2011-01-20T10:00", "us").astype(int))
    events = pa.table({
        "user_id": [1] * 3, "item_id": ["a", "b", "a"], "action": pa.array([0] * 3, pa.int8()),
        "event_timestamp": from_micros(np.full(3, at)),
    })  # fmt: skip
    stats = pa.table(
        {"item_id": ["a"], "event_timestamp": from_micros(np.array([0])), "count_total": [1]}
    )
    rows, counts = example_rows("online_retail", events, ItemTables(stats, profiles_of([])), 1)
    assert sorted(rows["item_id"].to_pylist()) == ["a", "b"]
    assert counts["repeats_in_requests"] == 1


def test_half_of_the_negatives_follow_popularity_and_half_are_uniform() -> None:
    pool = pool_of([1000] * 10 + [1] * 990)
    rng = np.random.default_rng(0)
    drawn = np.concatenate([pool.draw(rng, np.zeros(0, np.int64), 8) for _ in range(2000)])
    assert abs((drawn < 10).mean() - (0.5 * 10_000 / 10_990 + 0.5 * 0.01)) < 0.05


def test_a_small_pool_gives_all_it_has() -> None:
    pool = pool_of([5, 0, 3, 1])
    drawn = pool.draw(np.random.default_rng(0), np.array([0]), 10)
    assert sorted(drawn.tolist()) == [1, 2, 3]


def test_too_few_items_for_an_evaluation_request_is_an_error() -> None:
    contract = load_contract("online_retail")
    at = int(np.datetime64("2011-11-20T10:00", "us").astype(int))
    events = pa.table({
        "user_id": [1], "item_id": ["i000"], "action": pa.array([0], pa.int8()), "event_timestamp": from_micros(np.array([at])),
    })  # fmt: skip
    stats = pa.table(
        {"item_id": ["i000"], "event_timestamp": from_micros(np.array([0])), "count_total": [1]}
    )
    with pytest.raises(NotEnoughItemsError, match="protocol needs 100"):
        example_rows(contract.spec.name, events, ItemTables(stats, profiles_of([])), 1)
