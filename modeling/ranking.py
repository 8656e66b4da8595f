"""Ranking runs: a recipe with a seed on a dataset's tables, trained and evaluated; and recipes ×
seeds side by side.

The tables are joined once and shared by all runs. Each run has a folder of its own, resumes, and is
not repeated.
"""

from __future__ import annotations

import json
import statistics
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch

from feature_repo.catalogue import Catalogue
from feature_repo.code import code_digest
from feature_repo.settings import Settings
from feature_repo.tables import JobFolder, digest_of
from modeling import models, recipes
from modeling.batch import Encoded, Encoder
from modeling.comparison import by_recipe, comparison_folder, quality_by_cost, spread
from modeling.console import console, print_table
from modeling.dataset import SPLITS, Split, Warehouse, refuse_without_positives, vocabularies
from modeling.errors import RecipeError
from modeling.evaluate import floors_of, measure, plain_metrics, primary_task
from modeling.memory import keep_freed_memory
from modeling.models.base import Ranker
from modeling.recipes import SERVICE, SERVICE_WITH_TOKENS, Recipe
from modeling.registry import training_code
from modeling.report import plots, write_page
from modeling.trainer import Trainer, locked_run, predict

if TYPE_CHECKING:
    from feature_repo.schema import Contract
    from modeling.command import Comparison

METRICS = ("gauc", "ndcg@10", "auc", "log_loss")


@dataclass(frozen=True)
class Periods:
    """Joined training, validation and test requests of a dataset, and the digest of the tables they
    come from.
    """

    contract: Contract
    train: Split
    validation: Split
    test: Split
    digest: str
    tokens: tuple[str, tuple[int, int]] | None = None
    token_run: str | None = None  # digest of the job that stored them

    @staticmethod
    def of(
        settings: Settings, service: str, tokens: tuple[str, tuple[int, int]] | None = None
    ) -> Periods:
        """Join all three periods through a feature service.

        Args:
            tokens: version and shape of stored summary tokens, where some recipe reads them.

        Raises:
            TableNotBuiltError: a Beam job has not run.
            StaleFeaturesError: tables were built under another contract.
        """
        from feature_repo.store import open_store

        warehouse, store = Warehouse(settings), open_store(settings)
        token_run = JobFolder(settings.home, "summary_tokens").require().digest if tokens else None
        train, validation, test = (warehouse.split(store, service, name, tokens) for name in SPLITS)
        return Periods(
            warehouse.contract, train, validation, test, warehouse.digest, tokens, token_run
        )

    def describe(self) -> str:
        """The dataset and its counts in a line."""
        splits = (self.train, self.validation, self.test)
        counts = [
            f"{len(split.requests):,} {name}" for name, split in zip(SPLITS, splits, strict=True)
        ]
        return f"{self.contract.spec.title}, requests: {', '.join(counts)}"


class Encodings:
    """Encoded periods, once for all recipes that read them alike."""

    def __init__(self, periods: Periods) -> None:
        self.periods = periods
        self._encoded = cache(self._encode)

    def of(self, recipe: Recipe) -> tuple[Encoder, Encoded, Encoded, Encoded]:
        """Encoder, and training, validation and test requests of a recipe."""
        encoder, encoded = self._encoded(recipe.min_item_count)
        tokens = self.periods.tokens if recipe.tokens else None
        own = Encoder(
            self.periods.contract,
            encoder.vocabularies,
            recipe.history_length,
            tokens[1] if tokens else (0, 0),
        )
        if tokens is None:
            train, validation, test = (replace(period, gather_tokens=None) for period in encoded)
            return own, train, validation, test
        return own, *encoded

    def _encode(self, min_item_count: int) -> tuple[Encoder, tuple[Encoded, Encoded, Encoded]]:
        periods = self.periods
        encoder = Encoder(
            periods.contract, vocabularies(periods.contract, periods.train, min_item_count), 1
        )
        train, validation, test = (
            encoder.featurise(s.requests) for s in (periods.train, periods.validation, periods.test)
        )
        return encoder, (train, validation, test)


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


def train_and_evaluate(
    settings: Settings, encodings: Encodings, recipe: Recipe, device: str = "cpu"
) -> dict[str, Any]:
    """One run to its end, or the result of a finished one.

    Returns:
        Recipe, seed, parameters with and without embeddings (OneTrans's count its last layer's S
        weights, which nothing reads), training summary, test metrics.
    """
    identity = digest_of(
        [
            asdict(recipe),
            encodings.periods.digest,
            [encodings.periods.tokens, encodings.periods.token_run] if recipe.tokens else None,
            encodings.periods.contract.fingerprint,
            training_code(recipe, settings.dataset),
            code_digest("modeling.metrics"),
        ]
    )
    folder = settings.path("comparison", f"{recipe.name}-seed{recipe.training.seed}-{identity[:8]}")
    stored = Path(folder, "result.json")
    if stored.exists() and (done := json.loads(stored.read_text()))["identity"] == identity:
        return cast(dict[str, Any], done)
    with locked_run(folder):
        return _train_and_evaluate(encodings, recipe, folder, identity, device)


def _train_and_evaluate(
    encodings: Encodings, recipe: Recipe, folder: Path, identity: str, device: str
) -> dict[str, Any]:
    keep_freed_memory()
    encoder, train, validation, test = encodings.of(recipe)
    model = build_model(recipe, encoder, train)
    trainer = Trainer(model, encoder, recipe.training, Path(folder), identity, device)
    summary = trainer.fit(train, validation)
    logits = predict(cast(Ranker, trainer.load_best()), encoder, test)
    users = encodings.periods.test.users.dictionary_encode().indices.to_numpy()
    by_task = {
        task.name: measure(test, users, logits[:, number], number)
        for number, task in enumerate(encoder.contract.spec.tasks)
    }
    found = by_task[primary_task(encoder.contract.spec)]
    result = {
        "identity": identity,
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
    periods = Periods.of(settings, SERVICE_WITH_TOKENS if made_by else chosen[0].service, tokens)
    for name, split in (
        ("train", periods.train),
        ("validation", periods.validation),
        ("test", periods.test),
    ):
        refuse_without_positives(periods.contract, name, split)
    encodings = Encodings(periods)
    title = encodings.periods.describe()
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
    lines = summary_lines(results) + floor_lines(periods, encodings.of(chosen[0])[3])
    pictures = {"quality_by_cost": quality_by_cost(plots(), results, "validation NDCG@10")}
    (folder / "comparison.json").write_text(
        json.dumps({"title": title, "results": results}, indent=1)
    )
    subtitle = f"{title}. Test period; mean ± standard deviation over seeds."
    tasks = [task.name for task in periods.contract.spec.tasks]
    more = {f"Task {name}": summary_lines(results, name) for name in tasks if len(tasks) > 1}
    page = folder / "comparison.html"
    write_page(page, "Ranking comparison", [subtitle], lines, pictures, more)
    print_table(lines)
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


def floor_lines(periods: Periods, test: Encoded) -> list[list[str]]:
    """Rows of the scorings that need no training, on the same candidates."""
    spec = periods.contract.spec
    users = periods.test.users.dictionary_encode().indices.to_numpy()
    number = [task.name for task in spec.tasks].index(primary_task(spec))
    rows = []
    for name, scores in floors_of(periods.test).items():
        found = measure(test, users, scores, number, calibrated=False)
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
