"""`--set` changes any field of a recipe, typed; bundles go live where they are no worse than what
is there.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from feature_repo import cli
from feature_repo.home.catalogue import Catalogue
from modeling import recipes
from modeling.__main__ import app
from modeling.bundle import promotion
from modeling.comparison.processes import wait_passively
from modeling.errors import RecipeError
from modeling.training.changes import Changes, changed


def test_fields_of_recipe_model_and_training_are_set_by_type() -> None:
    words = (
        "model.width=32",
        "training.learning_rate=0.5",
        "history_length=20",
        "model.causal=false",
    )
    made = changed(recipes.load("vista_tiny"), Changes(3, 5, words))
    assert (made.config["width"], made.config["causal"], made.history_length) == (32, False, 20)
    assert (made.training.learning_rate, made.training.seed, made.training.epochs) == (0.5, 3, 5)
    assert changed(recipes.load("vista_tiny"), Changes()) == recipes.load("vista_tiny")


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("model.widht=3", "did you mean width"),
        ("model.width=wide", "expected int"),
        ("training.epochs=2.5", "expected int"),
        ("modl.width=3", "expected a field of the recipe"),
        ("name=x", "has no such field"),
        ("width", "expects a field and a value"),
        ("model.attention=cubic", "expected"),
    ],
)
def test_what_a_recipe_does_not_have_is_refused(word: str, says: str) -> None:
    with pytest.raises(RecipeError, match=says):
        changed(recipes.load("vista_tiny"), Changes(assignments=(word,)))


def estimate(value: float) -> dict[str, float]:
    return {"value": value, "low": value - 0.01, "high": value + 0.01}


def evaluation(model: float, baseline: float = 0.5, first: float = 0.0) -> dict[str, Any]:
    metrics = {
        "model": {"ndcg@10": estimate(model), "gauc": estimate(model)},
        "own frequency": {"ndcg@10": estimate(baseline)},
        "popularity, best window": {"ndcg@10": estimate(0.1), "gauc": estimate(0.1)},
    }
    return {
        "metrics": metrics,
        "unknown": {"first": first, "chance": 0.01, "most": 0.02, "percentile": 0.4},
        "against_trees": {},
    }


def beside_trees(value: float, trees: float, low: float, high: float) -> dict[str, Any]:
    """An evaluation of `value`, and how far below or above trees it surely is."""
    found = evaluation(value)
    paired = {"value": value - trees, "low": low, "high": high}
    found["metrics"]["trees"] = {"ndcg@10": estimate(trees), "gauc": estimate(trees)}
    return found | {"against_trees": {"ndcg@10": paired}}


@pytest.fixture
def catalogue(tmp_path: Path) -> Catalogue:
    """One bundle, live, measured on the test requests `t1`."""
    made = Catalogue(f"sqlite:///{tmp_path}/c.db")
    for digest, value in (("a" * 64, 0.6), ("b" * 64, 0.7)):
        metrics = {"ndcg@10": estimate(value), "gauc": estimate(value)}
        made.add_bundle(
            digest=digest,
            dataset="d",
            recipe="r",
            fingerprint="f",
            path="bundles/x",
            metrics=metrics,
        )
    made.set_live("d", "a" * 64)
    made.note_comparison("a" * 64, "t1", "")
    return made


@pytest.mark.parametrize(
    ("found", "test", "held"),
    [
        (evaluation(0.60), "t1", []),
        (evaluation(0.595), "t1", []),  # within the live bundle's interval
        (evaluation(0.55), "t1", ["the live r@"]),
        (
            evaluation(0.55),
            "t2",
            [],
        ),  # measured on other requests: the figures say nothing about each other
        (evaluation(0.45), "t2", ["own frequency is better"]),
        (evaluation(0.65, first=0.5), "t1", ["nobody knows comes first"]),
        (beside_trees(0.595, 0.6, -0.009, -0.001), "t1", ["trees on the same numbers are better"]),
        (beside_trees(0.595, 0.6, -0.011, 0.001), "t1", []),  # may be chance
        (beside_trees(0.605, 0.6, 0.001, 0.009), "t1", []),
        # The live one is below trees itself.
        (beside_trees(0.64, 0.65, -0.015, -0.005), "t1", []),
    ],
)
def test_a_bundle_is_held_back_where_it_ranks_worse(
    found: dict[str, Any], test: str, held: list[str], catalogue: Catalogue
) -> None:
    reasons = promotion.reasons_against(
        found, catalogue.live_or_none("d"), catalogue, "b" * 64, test
    )
    assert (
        len(reasons.hold)
        >= len(held)
        == sum(any(text in line for line in reasons.hold) for text in held)
    )
    assert bool(reasons.hold) == bool(held)


def test_where_nothing_is_live_a_poor_model_is_said_to_be_one_and_goes_live(
    catalogue: Catalogue,
) -> None:
    reasons = promotion.reasons_against(evaluation(0.4), None, catalogue, "b" * 64, "t1")
    assert reasons.hold == []
    assert "own frequency is better" in reasons.warn[0]
    behind = promotion.reasons_against(
        beside_trees(0.6, 0.61, -0.02, -0.001), None, catalogue, "b" * 64, "t1"
    )
    assert behind.hold == []
    assert behind.warn == [
        "trees on the same numbers are better on ndcg@10 (0.6100 against 0.6000)"
    ]
    unknown = promotion.reasons_against(evaluation(0.9, first=0.5), None, catalogue, "b" * 64, "t1")
    assert "nobody knows" in unknown.hold[0]


def test_the_bundle_before_comes_back(catalogue: Catalogue) -> None:
    catalogue.set_live("d", "b" * 64)
    assert catalogue.live_before("d").digest == "a" * 64
    catalogue.note_comparison("a" * 64, "t1", "too weak")
    assert catalogue.held_back("d", "a" * 64) == "too weak"
    catalogue.set_live("d", "a" * 64)
    assert catalogue.held_back("d", "a" * 64) == ""


@pytest.mark.parametrize("width", [80, 120, 200])
def test_a_table_fits_the_terminal(width: int, capsys: pytest.CaptureFixture[str]) -> None:
    from modeling.console import print_table

    rows = [
        ["", *(f"metric {n}" for n in range(7))],
        *([name, *["0.1234 ±0.0123"] * 7] for name in ("a model", "baseline")),
    ]
    print_table(rows, width)
    shown = capsys.readouterr().out
    assert max(len(line.rstrip()) for line in shown.splitlines()) <= width
    assert all(f"metric {n}" in shown for n in range(7))
    assert shown.count("0.1234 ±0.0123") == 14


@pytest.mark.parametrize(("flags", "threads"), [((), 1), (("--threads", "3"), 3)])
@pytest.mark.parametrize("command", ["train", "evaluate"])
def test_one_thread_computes_unless_more_are_asked_for(
    command: str, flags: tuple[str, ...], threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", taken.append)
    assert cli.run(lambda: app([command, "no_such_recipe", *flags])) != 0
    assert taken == [threads]
    assert cli.run(lambda: app([command, "no_such_recipe", "--threads", "0"])) != 0
    assert taken == [threads]


def test_threads_that_wait_for_others_sleep_unless_somebody_says_otherwise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(os, "environ", {"OMP_WAIT_POLICY": "ACTIVE"})
    wait_passively()
    assert os.environ == {
        "OMP_WAIT_POLICY": "ACTIVE",
        "GOMP_SPINCOUNT": "0",
        "KMP_BLOCKTIME": "0",
    }
