"""The page of all rankers: what is paired, what a claim is said to be, and that a second call reads
what is there.
"""

from __future__ import annotations

import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from modeling import recipes
from modeling.benchmarks import compare
from modeling.benchmarks.published import HYDRAREC, PAPERS, Claim
from modeling.claims import PAIRED, Difference
from modeling.comparison.ranking import FinishedRun
from modeling.inputs.batch import Batch
from modeling.metrics import PerUser
from modeling.recipes import NextItemRecipe
from modeling.training.trainer import LossError
from modeling.training.training_run import history_parameters
from tests.modeling.test_invariants import SIZES, candidates, make, user_inputs

ABOVE = Claim("better", "a", "b")
NO_WORSE = Claim("no worse", "a", "b", "no worse")


@pytest.mark.parametrize(
    ("claim", "low", "high", "decided", "said"),
    [
        (ABOVE, 0.01, 0.03, "above", "replicated"),
        (ABOVE, -0.03, -0.01, "below", "not replicated"),
        (ABOVE, -0.01, 0.03, "undecided", "undecided"),
        (ABOVE, 0.001, 0.03, "undecided", "undecided"),  # after Holm's correction
        (NO_WORSE, -0.004, 0.001, "undecided", "replicated"),
        (NO_WORSE, -0.004, -0.001, "below", "replicated"),
        (NO_WORSE, -0.02, 0.001, "undecided", "undecided"),
        (NO_WORSE, -0.02, -0.006, "below", "not replicated"),
    ],
)
def test_what_a_difference_says_of_a_claim(
    claim: Claim, low: float, high: float, decided: Any, said: str
) -> None:
    found = Difference("a − b", "ndcg@10", (low + high) / 2, low, high, 0.01, decided)
    assert compare.verdict(claim, found) == said


def test_claims_name_recipes_that_exist() -> None:
    for paper in PAPERS:
        for dataset in ("online_retail", "some_shop"):
            for name in paper.recipes:
                assert compare.recipe_of(name, dataset).name == name
    assert all(isinstance(recipes.load(name), NextItemRecipe) for name in HYDRAREC.recipes)


def test_a_page_of_tiny_recipes(
    shop: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In a process of its own, as workers are; then again, from what is kept."""
    monkeypatch.setenv("MEMOIR_HOME", shop.settings.root)
    monkeypatch.setattr(compare, "PAPERS", (*PAPERS[:1],))
    stored = tmp_path / "found.json"
    names = ["onetrans_tiny", "vista_addressed_tiny", "vista_trees_tiny", "trees_tiny"]
    ask = ["compare", "--recipes", *names, "--seeds", "2"]
    monkeypatch.setattr(
        sys, "argv", [*ask, "--epochs", "1", "--workers", "1", "--json", str(stored)]
    )
    compare.main()
    said = capsys.readouterr().out
    assert said.count("NDCG@10 0.") == 8
    assert json.loads(said.splitlines()[-1]) == json.loads(stored.read_text())
    told = next(line for line in said.splitlines() if line.startswith("comparison: "))
    page = Path(told.removeprefix("comparison: "))
    assert page.parent.parent == Path(shop.settings.root, "comparisons")
    text = page.with_suffix(".md")
    rows = json.loads(stored.read_text())["rows"]
    named = [row["recipe"] for row in rows]
    assert named[:8] == [name for name in names for _ in range(2)]
    assert named.count("vista_addressed_tiny − trees") == 2
    for name in (
        "onetrans_tiny − trees",
        "own frequency",
        "popularity, best window",
        "item graph, two steps",
        "EASE",
        "not run",
    ):
        assert name in page.read_text()
        assert name in text.read_text()
    assert f"{shop.settings.dataset}_frontier.png" in text.read_text()
    root = Path(shop.settings.root)
    results = [*root.rglob("run.json"), *root.rglob("result.json")]
    assert len(results) > 4
    before = {path: path.stat().st_mtime_ns for path in results}
    compare.main()
    again = json.loads(stored.read_text())["rows"]
    assert [row.get("ndcg@10") for row in again] == [row.get("ndcg@10") for row in rows]
    assert before == {path: path.stat().st_mtime_ns for path in results}


def test_a_run_without_a_result_costs_no_other(shop: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What its message says stands on the page; metrics that are undefined are no number."""
    real = compare.ProcessPoolExecutor

    class Threads(real):  # type: ignore[valid-type,misc]
        """In this process, where a run can be replaced."""

        def __new__(cls, workers: int, **_: Any) -> Any:
            return ThreadPoolExecutor(workers)

    def run(asked: Any, name: str, seed: int) -> FinishedRun:
        if name == "din":
            raise LossError("loss is nan")
        one = {metric: PerUser(np.ones((1, 3)), np.ones((1, 3))) for metric in PAIRED}
        return FinishedRun({"recipe": name, "seed": seed}, one)

    monkeypatch.setattr(compare, "ProcessPoolExecutor", Threads)
    monkeypatch.setattr(compare, "run_one", run)
    asked = compare.Asked(shop.settings, (1, 1), 1)
    found, failed = compare.run_all(asked, [("din", 1), ("vista", 1)], 1)
    assert list(found) == [("vista", 1)]
    assert failed == {"din, seed 1": "loss is nan"}


def test_parameters_that_read_histories_alone_are_counted() -> None:
    """A reader beside features is counted whole, a stage 1 too; layers that candidates share are not,
    and a mean pool has none.
    """

    def count(name: str) -> int:
        batch = Batch(user_inputs([9, 5], 1), candidates(2, 4, 1), torch.zeros(2, 4, SIZES.tasks))
        return history_parameters(make(name), batch)

    din = make("baseline_din")
    parts = [din.get_submodule("reader"), din.get_submodule("features.events")]
    whole = sum(p.numel() for part in parts for p in part.parameters())
    tables = [m for part in parts for m in part.modules() if isinstance(m, torch.nn.Embedding)]
    assert count("baseline_din") == whole - sum(table.weight.numel() for table in tables)
    assert count("baseline_mean_pool") == 0
    vista = make("vista")
    assert count("vista") >= sum(
        p.numel() for p in vista.get_submodule("stage_1.layers").parameters()
    )
    assert 0 < count("amortised_self") < count("amortised_concat")
