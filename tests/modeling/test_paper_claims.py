"""Claims are read off benchmarks' rows as they are written, and said to be what the rows say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from feature_repo.settings import Settings
from modeling.benchmarks import paper_claims
from modeling.benchmarks.published import AMORTISED, HIFORMER, PAPERS
from modeling.benchmarks.published_costs import COSTS, Cost, Judged, _made_crosses, _pyramid
from modeling.benchmarks.shapes import shaped
from modeling.claims import Difference, pair_name


def test_every_recipe_of_a_claim_can_be_trained_on_any_data() -> None:
    for paper in PAPERS:
        for name in paper.recipes:
            assert shaped(name, "any data").name


def test_a_claim_of_made_data_wants_several_seeds_and_a_gap_beyond_their_spread() -> None:
    def rows(gain: float, seeds: int = 5) -> list[dict[str, Any]]:
        one = {"auc_deviation": 0.01, "seeds": seeds}
        return [
            {"ranker": "bound", "auc": 0.9},
            {"ranker": "heteroatt", "auc": 0.8 + gain, **one},
            {"ranker": "transformer", "auc": 0.8, **one},
        ]

    judged = _made_crosses("heteroatt", "transformer")
    assert judged(rows(0.05)).holds
    assert not judged(rows(0.005)).holds
    assert not judged(rows(-0.05)).holds
    assert judged(rows(0.05, seeds=1)) == Judged("–", holds=False)


def test_a_pyramid_is_judged_by_its_row() -> None:
    what = "pyramid / every row in every layer"
    assert _pyramid([{"what": what, "flop_ratio": 2.4, "ratio": 2.0}]).holds
    assert not _pyramid([{"what": what, "flop_ratio": 0.9, "ratio": 2.0}]).holds


def test_a_benchmark_is_run_once_and_its_figures_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = []

    def run(command: list[str], **_: Any) -> None:
        runs.append(command)
        Path(command[-1]).write_text(json.dumps({"rows": [{"value": 3}]}))

    monkeypatch.setattr(paper_claims.subprocess, "run", run)
    monkeypatch.setenv("MEMOIR_HOME", str(tmp_path))
    cost = Cost(
        "A paper",
        "it is three",
        "modeling.benchmarks.operators --threads 1",
        lambda rows: Judged(str(rows[0]["value"]), rows[0]["value"] == 3),
    )
    for _ in range(2):
        (line,) = paper_claims.cost_lines(Settings.from_env(), [cost], quick=True)
        assert (line.figure, line.verdict) == ("3", "replicated")
    assert len(runs) == 1
    assert runs[0][1:5] == ["-m", "modeling.benchmarks.operators", "--threads", "1"]
    assert "--quick" in runs[0]


def test_what_was_not_run_is_said_and_no_worse_needs_the_margin() -> None:
    claim = AMORTISED.claims[0]
    name = pair_name(claim.ours, claim.theirs)
    found = [
        Difference(name, "ndcg@10", -0.001, -0.003, 0.001, 0.3),
        Difference(name, "gauc", -0.004, -0.008, 0.0, 0.05),
    ]
    lines = paper_claims._lines(AMORTISED, "a log", found, ("ndcg@10", "gauc"))
    assert lines[0].verdict == "replicated by ndcg@10; undecided by gauc"
    assert {line.verdict for line in lines[1:]} == {"not run"}
    assert len(paper_claims._lines(HIFORMER, "a log", [], ("gauc",))) == len(HIFORMER.claims)


def test_the_page_has_a_table_for_each_paper(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MEMOIR_HOME", str(tmp_path))
    lines = [
        paper_claims.Line(cost.paper, cost.says, cost.benchmark, "1", "replicated")
        for cost in COSTS
    ]
    page = paper_claims.write(Settings.from_env(), lines, 5)
    text = page.with_suffix(".md").read_text()
    for cost in COSTS:
        assert f"## {cost.paper}" in text
        assert cost.says in text
