"""Ranking runs: a recipe with a seed on a dataset's tables, trained and evaluated; and recipes ×
seeds side by side.

The training set is made once and shared by all runs. Each run has a folder of its own, resumes, and is
not repeated.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch

from feature_repo.catalogue import Catalogue
from feature_repo.code import code_digest
from feature_repo.settings import Settings
from feature_repo.tables import digest_of
from modeling import models, recipes
from modeling.batch import Encoded, Encoder
from modeling.claims import PAIRED, Difference, PerUser, decided, difference, of_seeds, per_user
from modeling.classic import CLASSICS, Classic, classic_scores
from modeling.comparison import by_recipe, comparison_folder, quality_by_cost, spread
from modeling.console import console, print_table
from modeling.dataset import SPLITS, Tokens
from modeling.errors import RecipeError
from modeling.evaluate import measure, plain_metrics, primary_task
from modeling.floors import floors_of
from modeling.memory import keep_freed_memory
from modeling.metrics import defined
from modeling.models.base import Ranker
from modeling.recipes import SERVICE, SERVICE_WITH_TOKENS, Recipe
from modeling.registry import training_code
from modeling.report import plots, write_page
from modeling.shards import read_shard, write_shard
from modeling.trainer import Trainer, locked_run, predict
from modeling.training_set import Options, Period, TrainingSet, open_training_set

if TYPE_CHECKING:
    from feature_repo.schema import DatasetSpec
    from modeling.command import Comparison

METRICS = ("gauc", "ndcg@10", "auc", "log_loss")
PER_USER = "per_user.arrow"  # the paired metrics of a run, by user


class Encodings:
    """Training sets of a comparison: made or opened once for all recipes that read them alike.

    Args:
        service: feature service that they join.
        tokens: version and shape of stored summary tokens, where some recipe reads them.
        visible: events before a request that anything may be known of; default: all.
        every: of the requests only each so manieth, in training and in evaluation.
    """

    def __init__(
        self,
        settings: Settings,
        service: str,
        tokens: Tokens | None = None,
        visible: int | None = None,
        every: tuple[int, int] = (1, 1),
    ) -> None:
        from feature_repo.store import open_store

        self._settings, self._store = settings, open_store(settings)
        self._service, self._tokens, self._visible = service, tokens, visible
        self._every = every
        self._opened = cache(self._open)

    def set_of(self, recipe: Recipe) -> TrainingSet:
        """The training set that a recipe reads."""
        return self._opened(recipe.min_item_count)

    def encoder_of(self, recipe: Recipe) -> Encoder:
        """Its encoder."""
        tokens = recipe.tokens is not None
        return self.set_of(recipe).encoder(
            recipe.history_length, tokens=tokens, without=recipe.without
        )

    def period(self, recipe: Recipe, name: str) -> Period:
        """One of its periods."""
        return self.set_of(recipe).period(name, tokens=recipe.tokens is not None)

    def _open(self, min_item_count: int) -> TrainingSet:
        options = Options(self._service, min_item_count, self._tokens, self._visible, self._every)
        return open_training_set(self._settings, self._store, options)


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


def variant(
    recipe: Recipe, seed: int, epochs: int | None = None, learning_rate: float | None = None
) -> Recipe:
    """The recipe under another seed, and with other epochs or another learning rate, which its name
    then tells.
    """
    name, changes = recipe.name, {"seed": seed}
    if epochs is not None:
        name, changes = f"{name}@{epochs}", {**changes, "epochs": epochs}
    training = replace(recipe.training, **changes)
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


def primary_number(spec: DatasetSpec) -> int:
    """Number of the primary task."""
    return [task.name for task in spec.tasks].index(primary_task(spec))


def sums_by_user(test: Period, scores: np.ndarray, task: int) -> dict[str, PerUser]:
    """The paired metrics of a scoring, by user."""
    known = defined(np.asarray(test.encoded.labels)[:, task], test.encoded.candidate_offsets)
    _, numbered = np.unique(test.users[known.requests], return_inverse=True)
    return per_user(known.labels, scores[known.rows], known.offsets, numbered)


def _plain(sums: dict[str, PerUser]) -> dict[str, np.ndarray]:
    """As a shard holds them."""
    return {
        f"{metric} {part}": getattr(one, part)[0]
        for metric, one in sums.items()
        for part in ("total", "weight")
    }


def stored_sums(folder: Path) -> dict[str, PerUser]:
    """The paired metrics of a finished run, by user.

    Raises:
        ShardError: they are damaged or gone.
    """
    stored = read_shard(folder / PER_USER)
    return {
        metric: PerUser(stored[f"{metric} total"][None], stored[f"{metric} weight"][None])
        for metric in PAIRED
    }


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
    if (
        stored.exists()
        and Path(folder, PER_USER).exists()
        and (done := json.loads(stored.read_text()))["identity"] == identity
    ):
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
    logits = predict(cast(Ranker, trainer.load_best()), encoder, test.encoded)
    by_task = {
        task.name: measure(test.encoded, test.users, logits[:, number], number)
        for number, task in enumerate(encoder.contract.spec.tasks)
    }
    spec = encoder.contract.spec
    found, number = by_task[primary_task(spec)], primary_number(spec)
    write_shard(folder / PER_USER, _plain(sums_by_user(test, logits[:, number], number)))
    result = {
        "identity": identity,
        "folder": str(folder),
        "recipe": recipe.name,
        "seed": recipe.training.seed,
        "parameters": sum(p.numel() for p in model.parameters()),
        "dense_parameters": dense_parameters(model),
        "summary": summary,
        "test": plain_metrics(found),
        "tasks": {name: plain_metrics(row) for name, row in by_task.items()},
    }
    draft = folder / ".result.draft"
    draft.write_text(json.dumps(result, indent=1))
    draft.replace(folder / "result.json")
    return result


def compare(settings: Settings, asked: Comparison) -> None:
    """Run what is not finished, then write and print the comparison.

    With several learning rates, each recipe gets the same trials: seed 1 at every rate, and the
    rate of the best validation NDCG@10 for all its seeds.

    Raises:
        RecipeError: a recipe is no ranking recipe, or recipes read different feature services.
    """
    torch.set_num_threads(asked.threads)
    chosen = [_ranking_recipe(name) for name in asked.recipes]
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
    results: list[dict[str, Any]] = []

    def run(recipe: Recipe, seed: int, rate: float | None) -> dict[str, Any]:
        one = variant(recipe, seed, asked.epochs, rate)
        console.print(f"compare: {one.name}, seed {seed}", highlight=False)
        return train_and_evaluate(settings, encodings, one, asked.device)

    for recipe in chosen:
        rates: tuple[float | None, ...] = asked.learning_rates or (None,)
        trials = [run(recipe, 1, rate) for rate in rates]
        best = int(np.argmax([trial["summary"]["best_validation_ndcg@10"] for trial in trials]))
        results.append(trials[best])
        results += [run(recipe, seed, rates[best]) for seed in range(2, asked.seeds + 1)]
    folder = comparison_folder(Path(settings.path("comparison")).parent, results)
    contract = encodings.encoder_of(chosen[0]).contract
    lines = summary_lines(results)
    lines += floor_lines(contract.spec, encodings.period(chosen[0], "test"))
    trained = trained_floors(settings, encodings, chosen[0])
    lines += classic_lines(trained)
    claims = claims_of(results, trained)
    pictures = {"quality_by_cost": quality_by_cost(plots(), results, "validation NDCG@10")}
    (folder / "comparison.json").write_text(
        json.dumps(
            {
                "title": title,
                "results": results,
                "floors": [asdict(floor) for floor in trained],
                "claims": [asdict(claim) for claim in claims],
            },
            indent=1,
        )
    )
    subtitle = f"{title}. Test period; mean ± standard deviation over seeds."
    tasks = [task.name for task in contract.spec.tasks]
    more = {
        "Differences, paired over users and seeds, after Holm's correction": claim_lines(claims)
    }
    more |= {f"Task {name}": summary_lines(results, name) for name in tasks if len(tasks) > 1}
    page = folder / "comparison.html"
    write_page(page, "Ranking comparison", [subtitle], lines, pictures, more)
    print_table(lines)
    print_table(claim_lines(claims))
    console.print(f"comparison: {page}", highlight=False, soft_wrap=True)


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
        "CPU s",
    ]
    rows = []
    for name, runs in by_recipe(results).items():
        cells = [
            spread([(_tested(run, task)[metric] or {}).get("value") for run in runs])
            for metric in METRICS
        ]
        validation = spread([run["summary"]["best_validation_ndcg@10"] for run in runs])
        sizes = [f"{runs[0][size]:,}" for size in ("parameters", "dense_parameters")]
        cost = statistics.mean(run["summary"]["cpu_seconds"] for run in runs)
        rows.append([name, str(len(runs)), *cells, validation, *sizes, f"{cost:,.0f}"])
    return [head, *rows]


def _tested(run: dict[str, Any], task: str | None) -> dict[str, Any]:
    found: dict[str, Any] = run["test"] if task is None else run["tasks"][task]
    return found


@dataclass(frozen=True)
class TrainedFloor:
    """Trees or a regression on the same numbers, over seeds where they have any.

    Args:
        test: metrics of each seed, as `plain_metrics` gives them.
        cpu_seconds: of fitting and scoring, mean over seeds.
        folders: of its runs, where the sums by user are.
    """

    name: str
    test: list[dict[str, Any]]
    cpu_seconds: float
    folders: list[str]


def trained_floors(
    settings: Settings, encodings: Encodings, recipe: Recipe, seeds: int = 1
) -> list[TrainedFloor]:
    """The trained floors on what a recipe reads of dense numbers; kept, and not fitted again."""
    found = []
    for kind in CLASSICS:
        results = [
            _trained_floor(settings, encodings, recipe, kind, seed)
            for seed in range(1, (seeds if kind == "trees" else 1) + 1)
        ]
        cost = statistics.mean(result["cpu_seconds"] for result in results)
        folders = [result["folder"] for result in results]
        found.append(TrainedFloor(kind, [result["test"] for result in results], cost, folders))
    return found


def _trained_floor(
    settings: Settings, encodings: Encodings, recipe: Recipe, kind: Classic, seed: int
) -> dict[str, Any]:
    code = code_digest("modeling.classic", "modeling.metrics")
    identity = digest_of([kind, seed, encodings.set_of(recipe).identity, recipe.without, code])
    folder = Path(
        settings.path("comparison", f"{kind.replace(' ', '_')}-seed{seed}-{identity[:8]}")
    )
    stored = folder / "result.json"
    if stored.exists():
        return cast(dict[str, Any], json.loads(stored.read_text()))
    console.print(f"compare: {kind}, seed {seed}", highlight=False)
    with locked_run(folder):
        encoder, test = encodings.encoder_of(recipe), encodings.period(recipe, "test")
        train, number = (
            encodings.period(recipe, "train").encoded,
            primary_number(encoder.contract.spec),
        )
        started = time.process_time()
        scores = classic_scores(kind, encoder, train, test.encoded, number, seed)
        spent = time.process_time() - started
        write_shard(folder / PER_USER, _plain(sums_by_user(test, scores, number)))
        found = measure(test.encoded, test.users, scores, number)
        result = {"test": plain_metrics(found), "cpu_seconds": spent, "folder": str(folder)}
        draft = folder / ".result.draft"
        draft.write_text(json.dumps(result, indent=1))
        draft.replace(stored)
    return result


def classic_lines(floors: Sequence[TrainedFloor]) -> list[list[str]]:
    """Rows of the trained floors."""
    rows = []
    for floor in floors:
        cells = [spread([(run[m] or {}).get("value") for run in floor.test]) for m in METRICS]
        seeds, cost = str(len(floor.test)), f"{floor.cpu_seconds:,.0f}"
        rows.append([f"{floor.name}, dense numbers", seeds, *cells, "–", "–", "–", cost])
    return rows


def claims_of(
    results: Sequence[dict[str, Any]], floors: Sequence[TrainedFloor]
) -> list[Difference]:
    """Each recipe less the trees on the same numbers, and less the first recipe named."""
    sums = {
        name: of_seeds([stored_sums(Path(run["folder"])) for run in runs])
        for name, runs in by_recipe(list(results)).items()
    }
    trees = next(floor for floor in floors if floor.name == "trees")
    against = {"trees": of_seeds([stored_sums(Path(folder)) for folder in trees.folders])}
    first = next(iter(sums))
    against[first] = sums[first]
    pairs = [(name, other) for other in against for name in sums if name != other]
    return decided(
        [
            difference(f"{name} − {other}", metric, sums[name][metric], against[other][metric])
            for name, other in pairs
            for metric in PAIRED
        ]
    )


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
        rows.append([name, "–", *cells, "–", "0", "0", "0"])
    return rows


def _ranking_recipe(name: str) -> Recipe:
    recipe = recipes.load(name)
    if not isinstance(recipe, Recipe):
        raise RecipeError(
            f"{name} is a next-item recipe and cannot be compared with ranking recipes"
        )
    return recipe
