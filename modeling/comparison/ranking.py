"""Ranking recipes × seeds side by side.

The training set is made once and shared by all runs (`training_run.py`); no run is repeated.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from feature_repo.home.catalogue import Catalogue
from feature_repo.settings import Settings
from modeling import recipes
from modeling.claims import Difference, Sums, differences, of_seeds
from modeling.comparison.comparison import by_recipe, comparison_folder, quality_by_cost, spread
from modeling.console import console, print_table
from modeling.errors import RecipeError
from modeling.evaluation.evaluate import measure
from modeling.evaluation.measured import measured, sums_of, validated
from modeling.evaluation.report import plots, write_page
from modeling.evaluation.trained_baselines import TrainedBaseline, trained_baselines
from modeling.evaluation.untrained import untrained_scores
from modeling.inputs.tasks import primary_number
from modeling.recipes import SERVICE, SERVICE_WITH_TOKENS, Recipe
from modeling.recipes.trees import TRIALS
from modeling.training.changes import Changes, changed
from modeling.training.training_run import open_run, train
from modeling.training_set.dataset import refuse_nothing_positive
from modeling.training_set.encodings import Encodings

if TYPE_CHECKING:
    from feature_repo.contract.schema import DatasetSpec
    from modeling.training.changes import Comparison

METRICS = ("gauc", "ndcg@10", "auc", "log_loss")


def compare(settings: Settings, asked: Comparison) -> None:
    """Run what is not finished, then write and print the comparison.

    With several learning rates, each recipe gets the same trials: seed 1 at every rate, and for all its seeds
    the rate whose NDCG@10 and GAUC of the validation period have the best sum. Trees, which have no such rate,
    try as many configurations (`recipes/trees.py`).

    Raises:
        RecipeError: a recipe is no ranking recipe, or recipes read different feature services.
        DataError: a period has no positive, or scikit-learn is not installed.
    """
    torch.set_num_threads(asked.threads)
    # 1. Recipes, which must read the same inputs to be compared.
    alike = Changes(assignments=asked.assignments)
    chosen = [changed(ranking_recipe(name), alike) for name in asked.recipes]
    # What cannot be tried shows before hours of training, not after.
    for recipe in chosen:
        trials_of(recipe, asked.learning_rates)
    services = {r.service for r in chosen}
    made_by = sorted({r.tokens for r in chosen if r.tokens})
    if (
        len(services - {SERVICE_WITH_TOKENS}) > 1
        or (made_by and services - {SERVICE, SERVICE_WITH_TOKENS})
        or len(made_by) > 1
    ):
        raise RecipeError(
            f"recipes of one comparison must read one feature service and one recipe's tokens, these read {sorted(services)} and "
            f"tokens of {made_by}"
        )
    # 2. Encodings and a test period that all recipes share.
    console.print("compare: joining features point-in-time", highlight=False)
    tokens = None
    if made_by:
        tokens = Catalogue(settings.catalogue_url).tokens_of_recipe(settings.dataset, made_by[0])
    encodings = Encodings(settings, SERVICE_WITH_TOKENS if made_by else chosen[0].service, tokens)
    title = encodings.set_of(chosen[0]).describe()
    console.print(f"compare: {title}", highlight=False)
    test = encodings.period(chosen[0], "test")
    contract = encodings.encoder_of(chosen[0]).contract
    labels = np.asarray(test.encoded.labels)
    refuse_nothing_positive(contract, "test", (labels == 1).sum(axis=0))
    # Trees first: what is missing for them shows before hours of training, not after.
    baselines = trained_baselines(settings, encodings, chosen[0])
    # 3. Train and test every recipe and seed, unless the result is stored.
    runs = [run for recipe in chosen for run in seeds_of(settings, encodings, recipe, asked)]
    claims = claims_of(runs, baselines)
    # 4. Write the page and print the tables.
    baseline_rows = baseline_lines(encodings, chosen[0]) + classic_lines(baselines)
    folder = comparison_folder(
        Path(settings.path("comparison")).parent, [run.result for run in runs]
    )
    page = _write(folder, title, contract.spec, [run.result for run in runs], baseline_rows, claims)
    print_table(summary_lines([run.result for run in runs]) + baseline_rows)
    print_table(claim_lines(claims))
    console.print(f"comparison: {page}", highlight=False, soft_wrap=True)


@dataclass(frozen=True)
class FinishedRun:
    """A run's stored result, and its paired metrics by user."""

    result: dict[str, Any]
    sums: Sums


def finish(
    settings: Settings,
    encodings: Encodings,
    recipe: Recipe,
    device: str = "cpu",
    label: str = "",
) -> FinishedRun:
    """Train and test a recipe's run, or read what is stored of it.

    Args:
        label: stands for the recipe's name in the result.
    """
    run = open_run(settings, recipe, encodings.sample)
    catalogue = Catalogue(settings.catalogue_url)
    train(run, encodings, catalogue, device)
    result = measured(run, encodings, device) | {"recipe": label or recipe.name}
    return FinishedRun(result, sums_of(run))


def label_of(name: str, epochs: int | None = None) -> str:
    """A recipe's name with the epochs that a comparison gives it: `onetrans@3`; a trial stands behind it."""
    return name if epochs is None else f"{name}@{epochs}"


def seeds_of(
    settings: Settings, encodings: Encodings, recipe: Recipe, asked: Comparison
) -> list[FinishedRun]:
    """All seeds of a recipe, as the trial has it that is best for the first."""

    def of(seed: int, trial: Trial) -> Recipe:
        return changed(recipe, Changes(seed, asked.epochs, trial.changes))

    def run(seed: int, trial: Trial) -> FinishedRun:
        label = "@".join([label_of(recipe.name, asked.epochs), *trial.label])
        console.print(f"compare: {label}, seed {seed}", highlight=False)
        return finish(settings, encodings, of(seed, trial), asked.device, label)

    trials = trials_of(recipe, asked.learning_rates)
    tried = [run(1, trial) for trial in trials]
    best = 0
    if len(trials) > 1:
        tried_runs = [open_run(settings, of(1, trial), encodings.sample) for trial in trials]
        # The sum of what is claimed later, in the units that it is claimed in
        found = [sum(validated(one, encodings, asked.device).values()) for one in tried_runs]
        best = int(np.argmax(found))
    return [tried[best], *(run(seed, trials[best]) for seed in range(2, asked.seeds + 1))]


@dataclass(frozen=True)
class Trial:
    """One setting of a recipe that a comparison tries.

    Args:
        changes: as `--set` has them.
        label: what is added to the recipe's name.
    """

    changes: tuple[str, ...] = ()
    label: tuple[str, ...] = ()


def trials_of(recipe: Recipe, learning_rates: Sequence[float]) -> list[Trial]:
    """A trial for each learning rate; of trees as many configurations. A blend's network learns at the first rate, and
    its trees try what trees try.

    Raises:
        RecipeError: more rates than trees have configurations.
    """
    if not learning_rates:
        return [Trial()]
    rates = [Trial((f"training.learning_rate={r!r}",), (f"{r:g}",)) for r in learning_rates]
    if recipe.model != "trees" and recipe.trees is None:
        return rates
    if len(learning_rates) > len(TRIALS):
        raise RecipeError(
            f"trees try {len(TRIALS)} configurations at most, not as many as {len(learning_rates)} learning rates"
        )
    group = "model" if recipe.model == "trees" else "trees"
    first = Trial() if group == "model" else rates[0]
    return [
        Trial((*first.changes, f"{group}.{change}"), (*first.label, change)) if change else first
        for change in TRIALS[: len(learning_rates)]
    ]


def _write(
    folder: Path,
    title: str,
    spec: DatasetSpec,
    results: list[dict[str, Any]],
    baseline_rows: list[list[str]],
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
        summary_lines(results) + baseline_rows,
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
            # An undefined metric is null in the result.
            spread([(_metrics(run, task)[metric] or {}).get("value") for run in runs])
            for metric in METRICS
        ]
        validation = spread([run["summary"]["best_validation_ndcg@10"] for run in runs])
        # Seeds do not change sizes, so the first run's stand for all.
        sizes = [
            # A run of before has no such count
            f"{runs[0][size]:,}" if size in runs[0] else "–"
            for size in ("parameters", "dense_parameters", "history_parameters")
        ]
        cost = statistics.mean(run["summary"]["cpu_seconds"] for run in runs)
        rows.append([name, str(len(runs)), *cells, validation, *sizes, f"{cost:,.0f}"])
    return [head, *rows]


def _metrics(run: dict[str, Any], task: str | None) -> dict[str, Any]:
    found: dict[str, Any] = run["test"] if task is None else run["tasks"][task]
    return found


def classic_lines(baselines: Sequence[TrainedBaseline]) -> list[list[str]]:
    """Rows of the trained baselines."""
    rows = []
    for baseline in baselines:
        cells = [spread([(run[m] or {}).get("value") for run in baseline.test]) for m in METRICS]
        seeds = str(len(baseline.test))
        cost = f"{baseline.cpu_seconds:,.0f}"
        rows.append([baseline.name, seeds, *cells, "–", "–", "–", "–", cost])
    return rows


def claims_of(
    runs: Sequence[FinishedRun], baselines: Sequence[TrainedBaseline]
) -> list[Difference]:
    """Each recipe less the trees on the same numbers, and less the first recipe named."""
    by_name: dict[str, list[Sums]] = {}
    for run in runs:
        by_name.setdefault(run.result["recipe"], []).append(run.sums)
    sums = {name: of_seeds(found) for name, found in by_name.items()}
    first = next(iter(sums))
    trees = next(baseline.sums for baseline in baselines if baseline.name == "trees")
    # Trees may be a recipe of the comparison too, tuned as all of them are.
    beside = "trees" if "trees" not in sums else "trees as a baseline"
    pairs = [(name, beside) for name in sums]
    pairs += [(name, first) for name in sums if name != first]
    return differences(pairs, {**sums, beside: trees})


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


def baseline_lines(encodings: Encodings, recipe: Recipe) -> list[list[str]]:
    """Rows of the scorings that need no training, on the test candidates that the recipe is asked about."""
    test = encodings.period(recipe, "test")
    number = primary_number(encodings.encoder_of(recipe).contract.spec)
    rows = []
    for name, scores in untrained_scores(encodings, recipe).items():
        found = measure(test.encoded, test.users, scores, number, calibrated=False)
        cells = [f"{found[m].value:.4f}" if m in found else "–" for m in METRICS]
        rows.append([name, "–", *cells, "–", "0", "0", "0", "0"])
    return rows


def ranking_recipe(name: str) -> Recipe:
    """The ranking recipe of that name.

    Raises:
        RecipeError: no recipe has that name, or it is a next-item recipe.
    """
    recipe = recipes.load(name)
    if not isinstance(recipe, Recipe):
        raise RecipeError(
            f"{name} is a next-item recipe and cannot be compared with ranking recipes"
        )
    return recipe
