"""Trees and a regression as runs of a comparison: fitted once for each seed, and kept."""

from __future__ import annotations

import json
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from feature_repo.atomic import atomic_write
from feature_repo.home.code import code_digest
from feature_repo.home.tables import digest_of
from feature_repo.settings import Settings
from modeling.claims import Sums, of_seeds, read_sums, write_sums
from modeling.console import console
from modeling.evaluation.classic import CLASSICS, FULL_TREES, QUICK_TREES, Classic, classic_scores
from modeling.evaluation.evaluate import measure, plain_metrics
from modeling.inputs.tasks import primary_number
from modeling.metrics import defined, per_user
from modeling.recipes import Recipe
from modeling.training.trainer import PER_USER, locked_run
from modeling.training_set.encodings import Encodings
from modeling.training_set.training_set import Period
from modeling.trees.fitting import TreesConfig


@dataclass(frozen=True)
class TrainedBaseline:
    """A baseline over its seeds.

    Args:
        test: metrics of each seed, as `evaluate.plain_metrics` gives them.
        cpu_seconds: of fitting and scoring, mean over seeds.
        sums: the paired metrics by user.
    """

    name: str
    test: list[dict[str, Any]]
    cpu_seconds: float
    sums: Sums


def trained_baselines(
    settings: Settings, encodings: Encodings, recipe: Recipe, seeds: int = 1
) -> list[TrainedBaseline]:
    """The baselines on what a recipe reads of numbers and categories; the regression has one seed.

    Raises:
        DataError: scikit-learn is not installed.
        RunError: another process fits this very baseline.
    """
    found = []
    for kind in CLASSICS:
        numbers = range(1, (seeds if kind == "trees" else 1) + 1)
        folders = [_fitted(settings, encodings, recipe, kind, seed) for seed in numbers]
        results = [json.loads((folder / "result.json").read_text()) for folder in folders]
        cost = statistics.mean(result["cpu_seconds"] for result in results)
        sums = of_seeds([read_sums(folder / PER_USER) for folder in folders])
        found.append(TrainedBaseline(kind, [result["test"] for result in results], cost, sums))
    return found


def quick_trees(settings: Settings, encodings: Encodings, recipe: Recipe) -> TrainedBaseline:
    """Trees that take seconds (`classic.QUICK_TREES`): what any model is told beside.

    Raises:
        DataError, RunError: see `trained_baselines`.
    """
    folder = _fitted(settings, encodings, recipe, "trees", 1, QUICK_TREES)
    result = json.loads((folder / "result.json").read_text())
    sums = read_sums(folder / PER_USER)
    return TrainedBaseline("trees", [result["test"]], result["cpu_seconds"], sums)


def _fitted(
    settings: Settings,
    encodings: Encodings,
    recipe: Recipe,
    kind: Classic,
    seed: int,
    config: TreesConfig = FULL_TREES,
) -> Path:
    """Folder of a baseline's run, which is fitted where it is not there."""
    code = code_digest("modeling.evaluation.classic", "modeling.metrics")
    made_of = [kind, seed, encodings.set_of(recipe).identity, recipe.ablated, code]
    identity = digest_of([*made_of, asdict(config)])
    name = f"{kind.replace(' ', '_')}-seed{seed}-{identity[:8]}"
    folder = Path(settings.path("comparison", name))
    if (folder / "result.json").exists():
        return folder
    console.print(f"{kind}, seed {seed}: fitting", highlight=False)
    with locked_run(folder):
        encoder = encodings.encoder_of(recipe)
        train, validation, test = (
            encodings.period(recipe, name) for name in ("train", "validation", "test")
        )
        number = primary_number(encoder.contract.spec)
        started = time.process_time()
        scores = classic_scores(
            kind, encoder, train.encoded, validation.encoded, test.encoded, number, seed, config
        )
        spent = time.process_time() - started
        write_sums(folder / PER_USER, sums_by_user(test, scores, number))
        measured = plain_metrics(measure(test.encoded, test.users, scores, number))
        with atomic_write(folder / "result.json") as draft:
            draft.write_text(json.dumps({"test": measured, "cpu_seconds": spent}, indent=1))
    return folder


def sums_by_user(test: Period, scores: np.ndarray, task: int) -> Sums:
    """The paired metrics of a scoring, by user."""
    known = defined(np.asarray(test.encoded.labels)[:, task], test.encoded.candidate_offsets)
    _, numbered = np.unique(test.users[known.requests], return_inverse=True)
    return per_user(known.labels, scores[known.rows], known.offsets, numbered)
