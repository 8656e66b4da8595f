"""Ranking runs: a recipe with a seed on a dataset's tables, trained and evaluated; and recipes ×
seeds side by side.

The training set is made once and shared by all runs. Each run has a folder of its own, resumes, and is
not repeated.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch

from feature_repo.catalogue import Catalogue
from feature_repo.code import code_digest
from feature_repo.settings import Settings
from feature_repo.tables import digest_of
from modeling import models, recipes
from modeling.batch import Batch
from modeling.changes import Changes, changed
from modeling.claims import (
    Difference,
    Sums,
    differences,
    of_seeds,
    read_sums,
    write_sums,
)
from modeling.comparison import by_recipe, comparison_folder, quality_by_cost, spread
from modeling.console import console, print_table
from modeling.dataset import SPLITS, refuse_nothing_positive
from modeling.encoder import Encoded, Encoder
from modeling.encodings import Encodings
from modeling.errors import RecipeError
from modeling.evaluate import measure, plain_metrics, primary_number, primary_task
from modeling.floors import floors_of
from modeling.memory import keep_freed_memory
from modeling.models.base import Ranker, TokenMaker
from modeling.recipes import SERVICE, SERVICE_WITH_TOKENS, Recipe
from modeling.registry import training_code
from modeling.report import plots, write_page
from modeling.trained_floors import TrainedFloor, sums_by_user, trained_floors
from modeling.trainer import PER_USER, Trainer, locked_run, predict
from modeling.training_set import Period

if TYPE_CHECKING:
    from feature_repo.schema import DatasetSpec
    from modeling.changes import Comparison

METRICS = ("gauc", "ndcg@10", "auc", "log_loss")


def build_model(recipe: Recipe, encoder: Encoder, train: Encoded) -> Ranker:
    """A fresh model of the recipe; its seed decides the weights."""
    torch.manual_seed(recipe.training.seed)
    model = models.build(recipe.model, recipe.config, encoder.sizes)
    model.fit_statistics(encoder.training_sample(train))
    return model


def dense_parameters(model: torch.nn.Module) -> int:
    """Parameters beside embedding tables."""
    tables = {
        id(p) for m in model.modules() if isinstance(m, torch.nn.Embedding) for p in m.parameters()
    }
    return sum(p.numel() for p in model.parameters() if id(p) not in tables)


def history_parameters(model: Ranker, batch: Batch) -> int:
    """Parameters beside embedding tables that read histories and nothing else: those that have a
    gradient where requests have histories and none where these are taken away, and all of stage 1
    where summary tokens are made.

    What events share with candidates or features, such as an appended candidate's layers, is not
    counted.
    """
    without = replace(batch.user, mask_BL=torch.zeros_like(batch.user.mask_BL))
    reading = _with_gradient(model, batch) - _with_gradient(model, replace(batch, user=without))
    if isinstance(model, TokenMaker):
        stage_1 = model.stage_1()
        reading |= {id(p) for name, p in model.named_parameters() if name in stage_1}
    tables = {
        id(module.weight) for module in model.modules() if isinstance(module, torch.nn.Embedding)
    }
    return sum(p.numel() for p in model.parameters() if id(p) in reading - tables)


def _with_gradient(model: Ranker, batch: Batch) -> set[int]:
    """Which parameters the scores of a batch depend on, by identity."""
    model.zero_grad(set_to_none=True)
    scores = model(batch)[batch.candidates.mask_BC]
    # Squares, so that no two candidates' gradients cancel.
    scores.square().sum().backward()
    found = {
        id(p) for p in model.parameters() if p.grad is not None and bool(p.grad.abs().sum() > 0)
    }
    model.zero_grad(set_to_none=True)
    return found


def variant(
    recipe: Recipe, seed: int, epochs: int | None = None, learning_rate: float | None = None
) -> Recipe:
    """The recipe under another seed, and with other epochs or another learning rate, which its name
    then tells.
    """
    name, training = recipe.name, replace(recipe.training, seed=seed)
    if epochs is not None:
        name, training = f"{name}@{epochs}", replace(training, epochs=epochs)
    if learning_rate is not None:
        name, training = f"{name}@{learning_rate:g}", replace(training, learning_rate=learning_rate)
    return replace(recipe, name=name, training=training)


@dataclass(frozen=True)
class ComparedRun:
    """A recipe with a seed on a training set: what it depends on, and where it is kept."""

    identity: str
    folder: Path


def run_of(settings: Settings, encodings: Encodings, recipe: Recipe) -> ComparedRun:
    """The run of a recipe in a comparison."""
    identity = digest_of(
        [
            asdict(recipe),
            encodings.set_of(recipe).identity,
            training_code(recipe, settings.dataset),
            code_digest("modeling.metrics"),
        ]
    )
    name = f"{recipe.name}-seed{recipe.training.seed}-{identity[:8]}"
    return ComparedRun(identity, Path(settings.path("comparison", name)))


def stored_sums(settings: Settings, encodings: Encodings, recipe: Recipe) -> Sums:
    """The paired metrics of a finished run, by user.

    Raises:
        ShardError: they are damaged or gone.
    """
    return read_sums(run_of(settings, encodings, recipe).folder / PER_USER)


def train_and_evaluate(
    settings: Settings, encodings: Encodings, recipe: Recipe, device: str = "cpu"
) -> dict[str, Any]:
    """One run to its end, or the result of a finished one.

    Returns:
        Recipe, seed, parameters with and without embeddings (OneTrans's count its last layer's S
        weights, which nothing reads), training summary, test metrics.
    """
    run = run_of(settings, encodings, recipe)
    folder, identity = run.folder, run.identity
    stored = Path(folder, "result.json")
    if stored.exists() and (done := json.loads(stored.read_text()))["identity"] == identity:
        return cast(dict[str, Any], done)
    with locked_run(folder):
        return _train_and_evaluate(encodings, recipe, folder, identity, device)


def _train_and_evaluate(
    encodings: Encodings, recipe: Recipe, folder: Path, identity: str, device: str
) -> dict[str, Any]:
    keep_freed_memory()
    encoder = encodings.encoder_of(recipe)
    train, validation = (encodings.period(recipe, name).encoded for name in SPLITS[:2])
    model = build_model(recipe, encoder, train)
    trainer = Trainer(model, encoder, recipe.training, Path(folder), identity, device)
    summary = trainer.fit(train, validation)
    test = encodings.period(recipe, "test")
    best = cast(Ranker, trainer.load_best())
    logits = predict(best, encoder, test.encoded)
    by_task = {
        task.name: measure(test.encoded, test.users, logits[:, number], number)
        for number, task in enumerate(encoder.contract.spec.tasks)
    }
    spec = encoder.contract.spec
    found, number = by_task[primary_task(spec)], primary_number(spec)
    write_sums(folder / PER_USER, sums_by_user(test, logits[:, number], number))
    result = {
        "identity": identity,
        "recipe": recipe.name,
        "seed": recipe.training.seed,
        "parameters": sum(p.numel() for p in model.parameters()),
        "dense_parameters": dense_parameters(model),
        "history_parameters": history_parameters(best, _longest(encoder, train).to(device)),
        "summary": summary,
        "test": plain_metrics(found),
        "tasks": {name: plain_metrics(row) for name, row in by_task.items()},
    }
    draft = folder / ".result.draft"
    draft.write_text(json.dumps(result, indent=1))
    draft.replace(folder / "result.json")
    return result


def _longest(encoder: Encoder, encoded: Encoded, number: int = 8) -> Batch:
    """Some of the requests with the longest histories."""
    return encoder.collate(encoded, np.argsort(encoder.events_read(encoded))[-number:])


def compare(settings: Settings, asked: Comparison) -> None:
    """Run what is not finished, then write and print the comparison.

    With several learning rates, each recipe gets the same trials: seed 1 at every rate, and the
    rate of the best validation NDCG@10 for all its seeds.

    Raises:
        RecipeError: a recipe is no ranking recipe, or recipes read different feature services.
        DataError: a period has no positive, or scikit-learn is not installed.
    """
    torch.set_num_threads(asked.threads)
    alike = Changes(assignments=asked.assignments)
    chosen = [changed(ranking_recipe(name), alike) for name in asked.recipes]
    services, made_by = {r.service for r in chosen}, sorted({r.tokens for r in chosen if r.tokens})
    if (
        len(services - {SERVICE_WITH_TOKENS}) > 1
        or (made_by and services - {SERVICE, SERVICE_WITH_TOKENS})
        or len(made_by) > 1
    ):
        raise RecipeError(
            f"recipes of one comparison must read one feature service and one recipe's tokens, these read {sorted(services)} and "
            f"tokens of {made_by}"
        )
    console.print("compare: joining features point-in-time", highlight=False)
    tokens = None
    if made_by:
        made = Catalogue(settings.catalogue_url).tokens_of_recipe(settings.dataset, made_by[0])
        tokens = (made.fingerprint, (made.num_tokens, made.width))
    encodings = Encodings(settings, SERVICE_WITH_TOKENS if made_by else chosen[0].service, tokens)
    title = encodings.set_of(chosen[0]).describe()
    console.print(f"compare: {title}", highlight=False)
    test, contract = encodings.period(chosen[0], "test"), encodings.encoder_of(chosen[0]).contract
    labels = np.asarray(test.encoded.labels)
    refuse_nothing_positive(contract, "test", (labels == 1).sum(axis=0))
    # Trees first: what is missing for them shows before hours of training, not after.
    floors = trained_floors(settings, encodings, chosen[0])
    runs = [run for recipe in chosen for run in _runs_of(settings, encodings, recipe, asked)]
    claims = claims_of(runs, floors)
    floor_rows = floor_lines(contract.spec, test) + classic_lines(floors)
    folder = comparison_folder(
        Path(settings.path("comparison")).parent, [run.result for run in runs]
    )
    page = _write(folder, title, contract.spec, [run.result for run in runs], floor_rows, claims)
    print_table(summary_lines([run.result for run in runs]) + floor_rows)
    print_table(claim_lines(claims))
    console.print(f"comparison: {page}", highlight=False, soft_wrap=True)


@dataclass(frozen=True)
class FinishedRun:
    """A run's stored result, and its paired metrics by user."""

    result: dict[str, Any]
    sums: Sums


def _runs_of(
    settings: Settings, encodings: Encodings, recipe: Recipe, asked: Comparison
) -> list[FinishedRun]:
    """All seeds of a recipe, at the learning rate that is best for the first."""

    def run(seed: int, rate: float | None) -> FinishedRun:
        one = variant(recipe, seed, asked.epochs, rate)
        console.print(f"compare: {one.name}, seed {seed}", highlight=False)
        result = train_and_evaluate(settings, encodings, one, asked.device)
        return FinishedRun(result, stored_sums(settings, encodings, one))

    rates: tuple[float | None, ...] = asked.learning_rates or (None,)
    trials = [run(1, rate) for rate in rates]
    best = int(np.argmax([trial.result["summary"]["best_validation_ndcg@10"] for trial in trials]))
    return [trials[best], *(run(seed, rates[best]) for seed in range(2, asked.seeds + 1))]


def _write(
    folder: Path,
    title: str,
    spec: DatasetSpec,
    results: list[dict[str, Any]],
    floor_rows: list[list[str]],
    claims: list[Difference],
) -> Path:
    """Write `comparison.json` and the page; returns the page's path."""
    content = {"title": title, "results": results, "claims": [asdict(claim) for claim in claims]}
    (folder / "comparison.json").write_text(json.dumps(content, indent=1))
    differences = "Differences, paired over users and seeds, after Holm's correction"
    more = {differences: claim_lines(claims)}
    if len(spec.tasks) > 1:
        more |= {f"Task {task.name}": summary_lines(results, task.name) for task in spec.tasks}
    return write_page(
        folder / "comparison.html",
        "Ranking comparison",
        [f"{title}. Test period; mean ± standard deviation over seeds."],
        summary_lines(results) + floor_rows,
        {"quality_by_cost": quality_by_cost(plots(), results, "validation NDCG@10")},
        more,
    )


def summary_lines(results: list[dict[str, Any]], task: str | None = None) -> list[list[str]]:
    """A row for each recipe: test metrics over seeds, sizes, and what training cost.

    Args:
        task: whose metrics; default: the primary task's.
    """
    head = [
        "recipe",
        "seeds",
        *METRICS,
        "validation ndcg@10",
        "parameters",
        "beside embeddings",
        "of history alone",
        "CPU s",
    ]
    rows = []
    for name, runs in by_recipe(results).items():
        cells = [
            spread([(_tested(run, task)[metric] or {}).get("value") for run in runs])
            for metric in METRICS
        ]
        validation = spread([run["summary"]["best_validation_ndcg@10"] for run in runs])
        sizes = [
            f"{runs[0][size]:,}" if size in runs[0] else "–"  # a run of before has no such count
            for size in ("parameters", "dense_parameters", "history_parameters")
        ]
        cost = statistics.mean(run["summary"]["cpu_seconds"] for run in runs)
        rows.append([name, str(len(runs)), *cells, validation, *sizes, f"{cost:,.0f}"])
    return [head, *rows]


def _tested(run: dict[str, Any], task: str | None) -> dict[str, Any]:
    found: dict[str, Any] = run["test"] if task is None else run["tasks"][task]
    return found


def classic_lines(floors: Sequence[TrainedFloor]) -> list[list[str]]:
    """Rows of the trained floors."""
    rows = []
    for floor in floors:
        cells = [spread([(run[m] or {}).get("value") for run in floor.test]) for m in METRICS]
        seeds, cost = str(len(floor.test)), f"{floor.cpu_seconds:,.0f}"
        rows.append([f"{floor.name}, dense numbers", seeds, *cells, "–", "–", "–", "–", cost])
    return rows


def claims_of(runs: Sequence[FinishedRun], floors: Sequence[TrainedFloor]) -> list[Difference]:
    """Each recipe less the trees on the same numbers, and less the first recipe named."""
    by_name: dict[str, list[Sums]] = {}
    for run in runs:
        by_name.setdefault(run.result["recipe"], []).append(run.sums)
    sums = {name: of_seeds(found) for name, found in by_name.items()}
    first = next(iter(sums))
    trees = next(floor.sums for floor in floors if floor.name == "trees")
    pairs = [(name, "trees") for name in sums]
    pairs += [(name, first) for name in sums if name != first]
    return differences(pairs, {**sums, "trees": trees})


def claim_lines(claims: Sequence[Difference]) -> list[list[str]]:
    """A row for each claim."""
    return [["difference", "metric", "value", "95 % interval", "p", "verdict"]] + [
        [
            c.name,
            c.metric,
            f"{c.value:+.4f}",
            f"[{c.low:+.4f}, {c.high:+.4f}]",
            f"{c.p:.4f}",
            c.verdict,
        ]
        for c in claims
    ]


def floor_lines(spec: DatasetSpec, test: Period) -> list[list[str]]:
    """Rows of the scorings that need no training, on the same candidates."""
    number = primary_number(spec)
    labels, offsets = np.asarray(test.encoded.labels)[:, number], test.encoded.candidate_offsets
    rows = []
    for name, scores in floors_of(test.floors, labels, offsets).items():
        found = measure(test.encoded, test.users, scores, number, calibrated=False)
        cells = [f"{found[m].value:.4f}" if m in found else "–" for m in METRICS]
        rows.append([name, "–", *cells, "–", "0", "0", "0", "0"])
    return rows


def ranking_recipe(name: str) -> Recipe:
    """The ranking recipe of that name.

    Raises:
        RecipeError: there is none, or it is a next-item recipe.
    """
    recipe = recipes.load(name)
    if not isinstance(recipe, Recipe):
        raise RecipeError(
            f"{name} is a next-item recipe and cannot be compared with ranking recipes"
        )
    return recipe
