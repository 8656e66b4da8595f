"""Next-item recipes side by side: recipes × seeds on one log, one table, and pictures of what
quality costs.

`compare` writes `comparison.json`, `comparison.html` and the pictures beside the runs: NDCG@10
against training CPU seconds, and speed and peak memory of each recipe's encoder against the length
of the history.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator, Sequence
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

from feature_repo.home.tables import digest_of
from feature_repo.settings import Settings
from modeling import recipes
from modeling.comparison.scaling import encoder_cost
from modeling.console import console, print_table
from modeling.errors import RecipeError
from modeling.evaluation.report import plots, png_of, write_page
from modeling.next_item.leave_one_out import CUTOFFS
from modeling.recipes import NextItemRecipe
from modeling.training.changes import Changes, changed

if TYPE_CHECKING:
    from modeling.training.changes import Comparison

METRICS = ("ndcg@10", "hr@10", "mrr@10")
LENGTHS = (512, 2048, 8192)
COLOURS = (
    "#2f6fb0",
    "#d9822b",
    "#3b8f4e",
    "#a8406c",
    "#7a5fb0",
    "#8a8a8a",
    "#b09a2f",
    "#2f9aa0",
    "#c0504d",
    "#555555",
)


def compare(settings: Settings, asked: Comparison) -> None:
    """Run what is not finished, then write and print the comparison.

    Raises:
        RecipeError: a recipe is no next-item recipe.
    """
    import torch

    from modeling.next_item.next_item import open_source, train_and_evaluate, variant

    torch.set_num_threads(asked.threads)
    alike = Changes(assignments=asked.assignments)
    chosen = [changed(next_item_recipe(name), alike) for name in asked.recipes]
    source = open_source(settings, asked.data, asked.split)
    console.print(f"compare: {source.describe()}", highlight=False)
    results: list[dict[str, Any]] = []
    for recipe in chosen:
        for seed in range(1, asked.seeds + 1):
            console.print(f"compare: {recipe.name}, seed {seed}", highlight=False)
            results.append(
                train_and_evaluate(source, variant(recipe, seed, asked.epochs), asked.device)
            )
    folder = comparison_folder(source.runs.parent, results)
    page = write(folder, source.describe(), results, [])
    print_table(summary_lines(results))
    if asked.scaling:
        scaling = [cost for recipe in chosen for cost in _scaling(recipe)]
        page = write(folder, source.describe(), results, scaling)
    console.print(f"comparison: {page}", highlight=False, soft_wrap=True)


def comparison_folder(parent: Path, results: list[dict[str, Any]]) -> Path:
    """Make and return a comparison's folder, named by its recipes and by the identity of each run."""
    names = list(by_recipe(results))
    runs = digest_of([[r["recipe"], r["seed"], r.get("identity")] for r in results])
    more = f"_and_{len(names) - 1}_more" if len(names) > 1 else ""
    folder = parent / "comparisons" / f"{names[0]}{more}-{runs[:8]}"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def next_item_recipe(name: str) -> NextItemRecipe:
    """The next-item recipe of that name.

    Raises:
        RecipeError: no recipe has that name, or it is a ranking recipe.
    """
    recipe = recipes.load(name)
    if not isinstance(recipe, NextItemRecipe):
        raise RecipeError(
            f"{name} is a ranking recipe and cannot be compared with next-item recipes: see `python -m modeling recipes`"
        )
    return recipe


def metric_lines(result: dict[str, Any]) -> list[list[str]]:
    """All metrics of one run: a row for each protocol."""
    return _lines("protocol", result["test"])


def baseline_lines(found: dict[str, dict[str, float]]) -> list[list[str]]:
    """All metrics of scorings that need no training: a row for each."""
    return _lines("baseline", found)


def _lines(head: str, found: dict[str, dict[str, float]]) -> list[list[str]]:
    names = [f"{name}@{k}" for name in ("hr", "ndcg", "mrr") for k in CUTOFFS]
    return [[head, *names]] + [
        [row, *(f"{metrics[name]:.4f}" for name in names)] for row, metrics in found.items()
    ]


def summary_lines(results: list[dict[str, Any]]) -> list[list[str]]:
    """A row for each recipe: test metrics (FULL) as mean ± standard deviation over seeds, and what
    they cost.
    """
    head = ["recipe", "seeds", *METRICS, "validation ndcg@10", "parameters", "CPU s"]
    rows = []
    for name, runs in by_recipe(results).items():
        cells = [spread([run["test"]["FULL"][metric] for run in runs]) for metric in METRICS]
        validation = spread([run["summary"]["best_validation_ndcg@10"] for run in runs])
        cost = statistics.mean(run["summary"]["cpu_seconds"] for run in runs)
        rows.append(
            [name, str(len(runs)), *cells, validation, f"{runs[0]['parameters']:,}", f"{cost:,.0f}"]
        )
    return [head, *rows]


def by_recipe(results: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Results of each recipe, in the order of first appearance."""
    found: dict[str, list[dict[str, Any]]] = {}
    for result in results:
        found.setdefault(result["recipe"], []).append(result)
    return found


def spread(values: Sequence[float | None]) -> str:
    """Format the mean of the defined values, with their standard deviation if there are several."""
    known = [value for value in values if value is not None]
    if not known:
        return "–"
    mean = statistics.mean(known)
    return f"{mean:.4f}" if len(known) == 1 else f"{mean:.4f} ± {statistics.stdev(known):.4f}"


def write(
    folder: Path, title: str, results: list[dict[str, Any]], scaling: list[dict[str, Any]]
) -> Path:
    """Write `comparison.json`, the pictures and the page; returns the page's path."""
    plt = plots()
    pictures = {"quality_by_cost": quality_by_cost(plt, results, "validation NDCG@10, FULL")}
    if scaling:
        pictures["cost_by_length"] = _cost_by_length(plt, scaling)
    stored = {"title": title, "results": results, "scaling": scaling}
    (folder / "comparison.json").write_text(json.dumps(stored, indent=1))
    subtitle = (
        f"{title}. Whole catalogue, seen items removed; mean ± standard deviation over seeds."
    )
    return write_page(
        folder / "comparison.html",
        "Next-item comparison",
        [subtitle],
        summary_lines(results),
        pictures,
    )


def _scaling(recipe: NextItemRecipe) -> list[dict[str, Any]]:
    console.print(
        f"compare: encoder of {recipe.name} at {', '.join(map(str, LENGTHS))} events",
        highlight=False,
    )
    return [
        {"recipe": recipe.name, **encoder_cost(recipe.model, recipe.config, length)}
        for length in LENGTHS
    ]


def quality_by_cost(plt: Any, results: list[dict[str, Any]], quality: str) -> bytes:
    """A picture: validation quality against training CPU seconds, a curve for each run."""
    figure, axes = plt.subplots(figsize=(6.4, 4.2))
    for colour, (name, runs) in zip(_colours(), by_recipe(results).items(), strict=False):
        for number, run in enumerate(runs):
            curve = run["summary"]["curve"]
            label = name if number == 0 else None
            axes.plot(
                [c for c, _ in curve],
                [q for _, q in curve],
                ".-",
                color=colour,
                label=label,
                linewidth=1,
            )
    axes.set(xlabel="training, CPU seconds", ylabel=quality)
    axes.legend(frameon=False, fontsize=8)
    return png_of(plt, figure)


def _cost_by_length(plt: Any, scaling: list[dict[str, Any]]) -> bytes:
    figure, (speed, memory) = plt.subplots(1, 2, figsize=(10, 4.2))
    for colour, (name, rows) in zip(_colours(), by_recipe(scaling).items(), strict=False):
        lengths = [row["length"] for row in rows]
        speed.plot(
            lengths, [row["tokens_per_cpu_s"] for row in rows], ".-", color=colour, label=name
        )
        memory.plot(lengths, [row["peak_mb"] for row in rows], ".-", color=colour, label=name)
    speed.set(
        xscale="log",
        yscale="log",
        xlabel="events",
        ylabel="tokens per CPU second, forward and backward",
    )
    memory.set(xscale="log", yscale="log", xlabel="events", ylabel="peak memory of the process, MB")
    speed.legend(frameon=False, fontsize=8)
    return png_of(plt, figure)


def _colours() -> Iterator[str]:
    return cycle(COLOURS)
