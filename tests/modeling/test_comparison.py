"""Next-item commands: train, evaluate and compare recipes on a plain file; refusals are one
line.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from feature_repo import cli
from feature_repo.home.tables import JobFolder
from modeling import __main__ as entry
from modeling import models, recipes
from modeling.benchmarks import shapes
from modeling.benchmarks.shapes import shaped
from modeling.comparison import comparison
from modeling.comparison.ranking import Trial, trials_of
from modeling.errors import RecipeError
from modeling.inputs.batch import FeatureSizes
from modeling.inputs.columns import GroupSizes
from modeling.recipes import NextItemRecipe, load
from modeling.recipes.trees import TRIALS
from modeling.training.changes import Changes, changed
from modeling.training.training_run import dense_parameters

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file of 150 users around a circle of 130 items, and a home of its own."""
    monkeypatch.setenv("MEMOIR_HOME", str(tmp_path / "home"))
    rng = np.random.default_rng(0)
    path = tmp_path / "walks.txt"
    with open(path, "w") as out:
        for user in range(150):
            start, length = rng.integers(0, 130), rng.integers(3, 25)
            out.writelines(f"{user} {(start + step) % 130 + 1}\n" for step in range(length))
    return path


def run(*arguments: str | Path) -> int:
    return cli.run(lambda: entry.app([str(a) for a in arguments]))


def test_train_and_evaluate_show_the_test_metrics(
    lines: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("train", "hydrarec_next_tiny", "--data", lines, "--epochs", "1", "--seed", "4") == 0
    trained = "".join(capsys.readouterr())
    assert "walks.txt, 150 users, 130 items" in trained
    assert "hydrarec_next_tiny@1, seed 4, test targets" in trained
    assert all(name in trained for name in ("FULL", "U100", "P100", "ndcg@10", "mrr@20"))
    assert run("evaluate", "hydrarec_next_tiny", "--data", lines) == 1  # another seed, other epochs
    assert "is not trained to its end on walks.txt: train it first" in " ".join(
        "".join(capsys.readouterr()).split()
    )
    assert (
        run("evaluate", "hydrarec_next_tiny", "--data", lines, "--epochs", "1", "--seed", "4") == 0
    )
    said = "".join(capsys.readouterr())
    assert all(
        name in said for name in ("FULL", "popularity", "what followed the last item", "EASE")
    )


def rows_of(printed: str) -> list[str]:
    """The model's rows on the whole catalogue."""
    return [line for line in printed.splitlines() if line.strip().startswith("FULL")]


def test_a_finished_run_is_shown_again_and_not_repeated(
    lines: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("train", "sasrec_tiny", "--data", lines) == 0
    first = "".join(capsys.readouterr())
    assert run("evaluate", "sasrec_tiny", "--data", lines) == 0
    again = "".join(capsys.readouterr())
    assert "epoch 0" in first
    assert "epoch 0" not in again
    assert run("train", "sasrec_tiny", "--data", lines) == 0
    assert "train sasrec_tiny: up to date" in "".join(capsys.readouterr())
    assert rows_of(again) == rows_of(first) != []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("train", "sasrec_tiny", "--data", "none.txt"), "none.txt is no file"),
        (("train", "amortised_dlrm_tiny", "--data", "x"), "--data is for next-item recipes"),
        (("compare", "amortised_dlrm_tiny", "sasrec_tiny", "--data", "x"), "is a ranking recipe"),
        (("compare", "amortised_dlrm_tiny", "--data", "x"), "--data is for next-item recipes"),
        (("compare", "onetrans_tiny"), "nothing is built"),
        (("compare", "no_such", "--data", "x"), "no recipe 'no_such'"),
        (("train", "sasrec_tiny"), "nothing is built"),
    ],
)
def test_refusals_say_what_to_do(
    lines: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], message: str
) -> None:
    assert run(*arguments) == 1
    assert message in " ".join("".join(capsys.readouterr()).split())


def test_a_next_item_recipe_says_that_nothing_is_served(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for words in (("about", "hydrarec_next_tiny"), ("export", "hydrarec_next_tiny")):
        assert run(*words) == 0
        assert "nothing is exported or served" in " ".join(capsys.readouterr().out.split())


def test_compare_writes_table_pictures_and_page(
    lines: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ["sasrec_tiny", "bert4rec_tiny"]
    assert run("compare", *names, "--data", lines, "--seeds", "2", "--no_scaling") == 0
    said = "".join(capsys.readouterr())
    page = Path(
        next(line for line in said.splitlines() if line.startswith("comparison: ")).removeprefix(
            "comparison: "
        )
    )
    stored = json.loads((page.parent / "comparison.json").read_text())
    assert [(r["recipe"], r["seed"]) for r in stored["results"]] == [
        (n, s) for n in names for s in (1, 2)
    ]
    text = page.read_text()
    for name in names:
        assert name in text
        values = [r["test"]["FULL"]["ndcg@10"] for r in stored["results"] if r["recipe"] == name]
        assert f"{np.mean(values):.4f} ± {np.std(values, ddof=1):.4f}" in text
    assert (page.parent / "quality_by_cost.png").read_bytes()[:4] == b"\x89PNG"
    assert text.count("data:image/png") == 1


def test_compare_at_another_budget_keeps_runs_of_its_own(
    lines: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("train", "sasrec_tiny", "--data", lines) == 0
    assert run("compare", "sasrec_tiny", "--data", lines, "--epochs", "1", "--no_scaling") == 0
    assert "sasrec_tiny@1 " in "".join(capsys.readouterr())
    assert run("evaluate", "sasrec_tiny", "--data", lines) == 0


def test_the_page_shows_cost_by_length_where_it_was_measured(tmp_path: Path) -> None:
    result = {
        "recipe": "some <b>",
        "parameters": 3,
        "test": {"FULL": dict.fromkeys(comparison.METRICS, 0.5)},
    }
    result["summary"] = {
        "best_validation_ndcg@10": 0.5,
        "cpu_seconds": 2.0,
        "curve": [[1.0, 0.1], [2.0, 0.5]],
    }
    cost = [
        {"recipe": "some <b>", "length": n, "tokens_per_cpu_s": 1e4, "peak_mb": 300.0}
        for n in (512, 2048)
    ]
    page = comparison.write(tmp_path, "title", [result], cost).read_text()
    assert page.count("data:image/png") == 2
    assert "some &lt;b&gt;" in page


def test_ranking_recipes_are_compared_on_the_same_join(
    shop: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two recipes, two rates each, two seeds at the better one; a second call reads what is
    there.
    """
    monkeypatch.setenv("MEMOIR_HOME", shop.settings.root)
    names = ("onetrans_tiny", "amortised_dlrm_tiny")
    ask = ("compare", *names, "--seeds", "2", "--learning_rates", "1e-3", "1e-2", "--epochs", "1")
    assert run(*ask) == 0
    said = "".join(capsys.readouterr())
    assert said.count("train: step") + said.count("epoch 0") >= 6
    told = next(line for line in said.splitlines() if line.startswith("comparison: "))
    page = Path(told.removeprefix("comparison: "))
    assert page.parent.parent == Path(shop.settings.home) / "comparisons"
    for baseline in ("own frequency", "popularity, best window", "random"):
        assert baseline in said
        assert baseline in page.read_text()
    stored = json.loads(page.with_suffix(".json").read_text())["results"]
    assert [(r["recipe"].split("@")[0], r["seed"]) for r in stored] == [
        (n, s) for n in names for s in (1, 2)
    ]
    for first, second in (stored[:2], stored[2:]):
        assert first["recipe"] == second["recipe"]
        name, _, rate = first["recipe"].split("@")
        kept = Path(shop.settings.path("runs", name)).glob("*/run.json")
        of_rate = {
            result["settings"]["training"]["learning_rate"]: result
            for result in map(json.loads, (path.read_text() for path in kept))
            if result["seed"] == 1 and result["settings"]["training"]["epochs"] == 1
        }
        chosen = of_rate.pop(float(rate))
        other = of_rate[0.001 if float(rate) == 0.01 else 0.01]
        # Chosen by both metrics of the validation period, which are kept
        assert sum(chosen["validation"].values()) >= sum(other["validation"].values())
        assert first["dense_parameters"] < first["parameters"]
        assert 0 < first["test"]["gauc"]["value"] < 1
        assert f"{first['recipe']}" in page.read_text()
    assert run(*ask) == 0
    assert "epoch 0" not in "".join(capsys.readouterr())
    # What was compared is a run like any other.
    name, _, rate = stored[1]["recipe"].split("@")
    same = (name, "--seed", "2", "--epochs", "1", "--set", f"training.learning_rate={rate}")
    assert run("train", *same) == 0
    assert f"train {name}: up to date" in "".join(capsys.readouterr())
    assert run("evaluate", *same) == 0
    assert run("export", *same, "--not_live") == 0
    assert "is recorded, not live" in " ".join("".join(capsys.readouterr()).split())


def test_trees_try_as_many_configurations_as_networks_try_learning_rates() -> None:
    rates = (1e-3, 4e-3, 1e-2)
    network, trees = (trials_of(load(name), rates) for name in ("vista", "trees"))
    assert len(network) == len(trees) == 3
    assert [trial.label for trial in network] == [("0.001",), ("0.004",), ("0.01",)]
    # The first is what they are; each other one is something else.
    configs = [changed(load("trees"), Changes(assignments=trial.changes)).config for trial in trees]
    assert configs[0] == load("trees").config
    assert configs[1] != configs[0] != configs[2] != configs[1]
    # A blend's trees try the same, beside a network that learns at the first rate.
    blends = trials_of(load("vista_trees"), rates)
    assert [trial.label for trial in blends] == [("0.001", *trial.label) for trial in trees]
    second = changed(load("vista_trees"), Changes(assignments=blends[1].changes))
    assert second.training.learning_rate == 1e-3
    assert {**load("trees").config, **second.trees} == configs[1]
    # Whatever is tried is a field that trees have.
    for name in ("trees", "vista_trees"):
        for trial in trials_of(load(name), [1e-3] * len(TRIALS)):
            changed(load(name), Changes(assignments=trial.changes))
    with pytest.raises(RecipeError, match="configurations at most"):
        trials_of(load("trees"), [1e-3] * (len(TRIALS) + 1))
    assert trials_of(load("vista"), ()) == [Trial()]


def test_next_item_training_reads_the_log_that_the_beam_job_built(
    shop: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One history format: without --data the dataset's own log is read, with its times."""
    monkeypatch.setenv("MEMOIR_HOME", shop.settings.root)
    from modeling.next_item import next_item

    source = next_item.open_source(shop.settings, None)
    assert source.sequences.times is not None
    counts = source.sequences.counts
    assert counts["repeats_dropped"] > 0
    assert counts["other_actions_dropped"] > 0  # returns
    logged = JobFolder(shop.settings.home, "user_history").require().counts["events"]
    assert counts["events"] + counts["repeats_dropped"] + counts["other_actions_dropped"] == logged
    recipe = recipes.load("hydrarec_next_tiny")
    assert isinstance(recipe, NextItemRecipe)
    timed = recipes.replace_config(recipe, time_gaps=True)
    # Slices that begin later than the event before them: the gap before a slice is no gap within
    # it.
    sequences = source.sequences
    assert sequences.times is not None
    later = np.flatnonzero(np.diff(sequences.times) > 0)[:40] + 1
    owners = np.searchsorted(sequences.offsets, later, side="right") - 1
    within = later > sequences.offsets[owners]
    assert within.any()
    events, _, _ = sequences.packed(later[within], sequences.offsets[owners[within] + 1])
    assert float(events.gap_N.max()) > 0
    assert (events.gap_N[events.packing.from_oldest == 0] == 0).all()
    assert set(next_item.train_and_evaluate(source, timed)["test"]) >= {"FULL"}


def test_every_recipe_builds_its_model(tmp_path: Path) -> None:
    """Recipes are data: this is where a wrong name or value would show."""
    from modeling import models
    from modeling.inputs.batch import FeatureSizes

    for name, function in recipes.all_recipes().items():
        recipe = function()
        assert recipe.name == name
        if isinstance(recipe, NextItemRecipe):
            models.build(
                recipe.model,
                recipe.config,
                FeatureSizes(50, 1, recipe.history_length),
            )
            continue
        tokens = (8, 16) if recipe.tokens else (0, 0)
        sizes = FeatureSizes(
            50,
            2,
            recipe.history_length,
            request=GroupSizes((5, 24), (1, 1), numbers=5),
            candidate=GroupSizes((7,), (8,), numbers=17),
            event=GroupSizes(numbers=1),
            item=GroupSizes((7,), (8,)),
            tokens=tokens,
        )
        assert recipe.tokens is None or recipes.load(recipe.tokens).model == "vista"
        with torch.device("meta"):
            models.build(recipe.model, recipe.config, sizes)


SIZES = {  # of the vocabularies and features of the whole datasets
    "online_retail": FeatureSizes(
        3061,
        2,
        96,
        request=GroupSizes((31, 24, 7), (1, 1, 1), numbers=5),
        candidate=GroupSizes((1958,), (8,), numbers=17),
        event=GroupSizes(numbers=2),
    ),
    "movielens_1m": FeatureSizes(
        3350,
        2,
        128,
        request=GroupSizes((3, 8, 22, 24, 7), (1,) * 5, numbers=5),
        candidate=GroupSizes((19, 82), (8, 1), numbers=17),
        event=GroupSizes(numbers=1),
    ),
}


@pytest.mark.parametrize("dataset", SIZES)
def test_the_models_of_a_comparison_have_equal_parameters(dataset: str) -> None:
    made = [shaped(name, dataset) for name in ("onetrans", *shapes.SIZES[dataset])]
    counts = {
        r.name: dense_parameters(models.build(r.model, r.config, SIZES[dataset])) for r in made
    }
    assert max(counts.values()) <= 1.05 * min(counts.values()), counts


def test_next_item_benchmark_prints_rows_and_one_json_line(lines: Path, tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "modeling.benchmarks.next_item",
        "--data",
        str(lines),
        "--recipe",
        "sasrec_tiny",
    ]
    command += ["--seeds", "2", "--json", str(tmp_path / "out.json")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    figures = json.loads(done.stdout.strip().splitlines()[-1])
    assert figures == json.loads((tmp_path / "out.json").read_text())
    assert [(row["seed"], row["protocol"]) for row in figures["rows"]] == [
        (seed, protocol) for seed in (1, 2) for protocol in ("FULL", "U100", "P100")
    ] + [("mean", protocol) for protocol in ("FULL", "U100", "P100")]
    assert figures["config"]["recipe"] == "sasrec_tiny"
    full = [row["ndcg@10"] for row in figures["rows"] if row["protocol"] == "FULL"]
    assert full[2] == pytest.approx((full[0] + full[1]) / 2)
