"""Requests for items that their user never had: who is in them, and what they look like."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from feature_repo.contract.arrow import micros
from feature_repo.history.history import Histories
from modeling import recipes
from modeling.training_set.dataset import Warehouse
from modeling.training_set.encodings import Encodings
from modeling.training_set.never_had import Sales, block_examples, never_had_examples
from modeling.training_set.sample import NeverHad, Sample

PROTOCOL = NeverHad(most=3, negatives=7, train_negatives=5)


@pytest.fixture(scope="module")
def warehouse(shop: Any) -> Warehouse:
    return Warehouse(shop.settings)


def examples_of(warehouse: Warehouse, negatives: int = 7) -> tuple[pa.Table, pa.Table]:
    """All requests as they are declared, and those of the protocol."""
    declared = pa.concat_tables([rows for _, rows in warehouse.pieces(10_000)])
    sales = Sales(warehouse.contract, warehouse.item_stats(PROTOCOL.by), PROTOCOL.by)
    made = never_had_examples(
        warehouse.contract, warehouse.log, sales, PROTOCOL, declared, negatives
    )
    return declared, made


def sold(warehouse: Warehouse, item: str, time: int) -> int:
    """The item's statistic at a time, by plain search."""
    stats = warehouse.item_stats(PROTOCOL.by)
    own = stats.filter(pc.equal(stats["item_id"], item)).sort_by("event_timestamp")
    place = int(np.searchsorted(micros(own["event_timestamp"]), time, side="right"))
    return int(own[PROTOCOL.by][place - 1].as_py()) if place else 0


def test_candidates_are_new_to_the_user_and_sold_of_late(warehouse: Warehouse) -> None:
    declared, made = examples_of(warehouse)
    log = warehouse.log
    items = np.array(log.items.to_pylist())
    wanted = {
        (row["request_id"], row["item_id"])
        for row in declared.filter(pc.equal(declared["label_purchase"], 1)).to_pylist()
    }
    of_request: dict[str, list[dict[str, Any]]] = {}
    for row in made.to_pylist():
        of_request.setdefault(row["request_id"], []).append(row)
    assert len(of_request) > 20
    for request, rows in list(of_request.items())[::5]:
        time = int(rows[0]["event_timestamp"].timestamp() * 1e6)
        row = log.rows_of(pa.array([rows[0]["user_id"]], pa.int64()))
        had = set(items[log.known_at(row, time).item_keys].tolist()) if row[0] >= 0 else set()
        asked = [row["item_id"] for row in rows]
        assert len(set(asked)) == len(asked)
        assert not had & set(asked)
        labels = [row["label_purchase"] for row in rows]
        assert 1 <= sum(labels) <= PROTOCOL.most
        assert len(labels) - sum(labels) <= 7
        for row in rows:
            assert row["label_purchase"] == ((request, row["item_id"]) in wanted)
            assert sold(warehouse, row["item_id"], time) > 0


def test_no_other_request_has_such_an_item(warehouse: Warehouse) -> None:
    """What is left out has nothing that the protocol asks about."""
    declared, made = examples_of(warehouse)
    left = set(declared["request_id"].to_pylist()) - set(made["request_id"].to_pylist())
    assert left
    log = warehouse.log
    items = np.array(log.items.to_pylist())
    rows = declared.filter(pc.equal(declared["label_purchase"], 1)).to_pylist()
    for row in [row for row in rows if row["request_id"] in left][::3]:
        time = int(row["event_timestamp"].timestamp() * 1e6)
        user = log.rows_of(pa.array([row["user_id"]], pa.int64()))
        had = set(items[log.known_at(user, time).item_keys].tolist()) if user[0] >= 0 else set()
        assert row["item_id"] in had or not sold(warehouse, row["item_id"], time)


def test_the_draw_is_the_same_every_time_and_in_any_order(warehouse: Warehouse) -> None:
    declared, made = examples_of(warehouse)
    assert examples_of(warehouse)[1].equals(made)
    assert made.schema.equals(declared.schema)
    starts = [split for split, _ in warehouse.pieces(200)]
    assert len(starts) > 3
    sales = Sales(warehouse.contract, warehouse.item_stats(PROTOCOL.by), PROTOCOL.by)
    pieces = [
        never_had_examples(warehouse.contract, warehouse.log, sales, PROTOCOL, rows, 7)
        for _, rows in warehouse.pieces(200)
    ]
    keys = [("request_id", "ascending"), ("item_id", "ascending")]
    assert pa.concat_tables(pieces).sort_by(keys).equals(made.sort_by(keys))


def test_a_place_says_nothing_about_a_label(warehouse: Warehouse) -> None:
    _, made = examples_of(warehouse)
    first = np.unique(np.array(made["request_id"].to_pylist()), return_index=True)[1]
    labels = made["label_purchase"].to_numpy()
    assert abs(labels[first].mean() - labels.mean()) < 0.15


def test_items_are_drawn_by_what_they_sold() -> None:
    stats = pa.table(
        {
            "item_id": pa.array([f"{n}" for n in range(40)]),
            "event_timestamp": pa.array([5] * 40, pa.timestamp("us", "UTC")),
            "count_28d": pa.array([100 if n < 4 else int(n < 20) for n in range(40)]),
        }
    )
    from modeling.training_set.never_had import _drawn

    taken = np.zeros(40, bool)
    taken[0] = True
    weights = stats["count_28d"].to_numpy()
    rng = np.random.default_rng(0)
    counts = np.zeros(40)
    for _ in range(500):
        drawn = _drawn(rng, weights, taken, 5)
        assert len(set(drawn.tolist())) == 5
        counts[drawn] += 1
    assert counts[0] == 0
    assert counts[20:].sum() == 0
    assert counts[1:4].min() > 450
    # Fewer where fewer are left
    assert sorted(_drawn(rng, weights, weights != 100, 9).tolist()) == [0, 1, 2, 3]


def test_encoded_requests_of_the_protocol_know_no_match(shop: Any) -> None:
    recipe = recipes.load("amortised_dlrm_tiny")
    encodings = Encodings(shop.settings, recipe.service, sample=Sample(protocol=PROTOCOL))
    test = encodings.period(recipe, "test")
    names = list(encodings.encoder_of(recipe).dense_names)
    dense = np.asarray(test.encoded.candidate_dense)
    assert (dense[:, names.index("match_times")] == 0).all()
    assert np.isnan(dense[:, names.index("life_item_days_ago")]).all()
    plain = Encodings(shop.settings, recipe.service).set_of(recipe)
    assert plain.identity != encodings.set_of(recipe).identity


def test_blocks_ask_for_the_end_of_each_user(warehouse: Warehouse) -> None:
    declared = next(iter(warehouse.pieces(10_000)))[1]
    log = warehouse.log
    made = dict(block_examples(warehouse.contract, log, declared.schema, 3, (1, 1)))
    assert list(made) == ["train", "validation", "test"]
    asked: dict[str, dict[str, list[int]]] = {}
    for split, rows in made.items():
        assert rows.schema.equals(declared.schema)
        assert pc.all(pc.equal(rows["label_purchase"], 1)).as_py()
        for user, time in zip(
            rows["user_id"].to_pylist(), micros(rows["event_timestamp"]), strict=True
        ):
            asked.setdefault(user, {}).setdefault(split, []).append(int(time))
    everybody = np.arange(len(log.users))
    events = log.gather(everybody, log.lengths, columns=["action", "event_timestamp"])
    for row, user in enumerate(log.users.to_pylist()):
        own = slice(events.offsets[row], events.offsets[row + 1])
        bought = events.times[own][events.columns["action"][own] == 0]
        found = asked.get(user, {})
        # Few purchases make no block, and the first basket of a user has no past.
        if len(bought) < 3 or bought[-3] == events.times[own][0]:
            assert not found
            continue
        [time] = set(found["test"])
        # All of a basket is in one request.
        assert time == bought[-3]
        items = events.item_keys[own][events.columns["action"][own] == 0]
        assert len(found["test"]) == len(set(items[bought >= time].tolist()))
        if "validation" in found:
            assert max(found["validation"]) < time
        # Blocks part all that is asked for in order.
        assert max(found.get("train", [0])) <= min(found.get("validation", [time]))


@pytest.mark.parametrize(
    ("times", "validation", "test"),
    [
        # An event at the time of the block's first belongs to it, though it makes no block of its own.
        ([1, 5, 5, 6, 7], [], [11, 12, 13, 14]),
        # A basket larger than two blocks is one request.
        ([1, 2, *[9] * 9], [], list(range(12, 21))),
        ([1, 2, 3, 4, 5, 6, 7], [11, 12, 13], [14, 15, 16]),
        # Nothing is known before the first.
        ([1, 2, 3], [], []),
        ([], [], []),
    ],
)
def test_what_happened_at_one_time_is_in_one_block(
    warehouse: Warehouse, times: list[int], validation: list[int], test: list[int]
) -> None:
    contract = warehouse.contract
    items = pa.array([str(10 + place) for place in range(len(times))], pa.string())
    events = Histories(
        np.array([0, len(times)]),
        np.arange(len(times)),
        {"action": np.zeros(len(times), np.int8), "event_timestamp": np.array(times, np.int64)},
    )
    log = SimpleNamespace(
        users=pa.array([7], pa.int64()),
        items=items,
        lengths=np.array([len(times)]),
        gather=lambda *_, **__: events,
    )
    schema = warehouse.examples_schema()
    made = dict(block_examples(contract, log, schema, 3, (1, 1)))  # type: ignore[arg-type]
    found = {name: [int(i) for i in rows["item_id"].to_pylist()] for name, rows in made.items()}
    assert found == {"train": [], "validation": validation, "test": test}


def test_blocks_are_thinned_by_requests(warehouse: Warehouse) -> None:
    declared = next(iter(warehouse.pieces(10_000)))[1]
    log = warehouse.log
    parts = (warehouse.contract, log, declared.schema, 3)
    whole, few = (dict(block_examples(*parts, every)) for every in ((1, 1), (2, 3)))
    for split, step in (("train", 2), ("test", 3)):
        requests = whole[split]["request_id"].unique()
        assert len(few[split]["request_id"].unique()) == -(-len(requests) // step)
