"""Benchmarks of quality on a small shop: their tables have every ranker, every baseline and every claim."""

from __future__ import annotations

import itertools
from typing import Any

from modeling.benchmarks import bundles, memory
from modeling.training_set.sample import NeverHad

EVERY = (1, 1)
UNTRAINED = {"own frequency, then popularity", "item graph", "item graph, two steps", "EASE"}


def rankers(rows: list[dict[str, Any]], case: str) -> list[str]:
    return [row["ranker"] for row in rows if row["case"] == case]


def test_bundles_stand_beside_trees_and_what_needs_no_training(shop: Any) -> None:
    names = ("trees_tiny", "vista_trees_tiny")
    rows = bundles.beside_trees(shop.settings, EVERY, names, 2, ())
    assert rankers(rows, "bundles") == list(names)
    assert set(rankers(rows, "untrained")) >= UNTRAINED
    claims = [row for row in rows if row["case"] == "bundles: difference"]
    assert [row["ranker"] for row in claims] == ["vista_trees_tiny − trees_tiny"] * 2
    assert all(row["low"] <= row["high"] for row in claims)


def test_a_curve_of_recipes_has_all_lengths(shop: Any) -> None:
    names = ("vista_trees_tiny",)
    rows = memory.curve(shop.settings, EVERY, (3, None), names, names, 1, 1)
    found = {(row["ranker"], row["visible"]) for row in rows if row["case"] == "curve"}
    of_all = {*UNTRAINED, "vista_trees_tiny", "trees", "logistic regression"}
    assert found >= set(itertools.product(of_all, (3, "all")))
    assert "vista_trees_tiny − trees, all events" in rankers(rows, "curve: difference")


def test_requests_for_items_never_had_are_ranked_at_all_lengths(shop: Any) -> None:
    names = ("trees_tiny", "vista_trees_tiny")
    protocol = NeverHad(by="count_total")
    rows = memory.never_had(shop.settings, EVERY, protocol, 1, (3, None), names)
    found = {(row["ranker"], row["visible"]) for row in rows if row["case"] == "never had"}
    assert found >= set(itertools.product((*names, *UNTRAINED), (3, "all")))
    said = rankers(rows, "never had: difference")
    for claim in (
        "trees_tiny: all − 3 events",
        "vista_trees_tiny: all − 3 events",
        "vista_trees_tiny − trees_tiny",
    ):
        assert said.count(claim) == 2
