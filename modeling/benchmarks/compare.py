"""All rankers on a dataset, side by side: quality with intervals, what they cost, and what of the five
papers' claims holds here. One HTML and one Markdown page.

Each run is kept below MEMOIR_HOME and not repeated: stop it, and the same command goes on. Runs are
shared out among processes of one thread each.
"""

from __future__ import annotations

import multiprocessing
import os
import statistics
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from feature_repo.benchmarks import hardware, parser, report
from feature_repo.settings import Settings
from modeling.benchmarks import memory
from modeling.benchmarks.published import HYDRAREC, MARGIN, PAPERS, Claim, Paper
from modeling.benchmarks.request_cost import CANDIDATES, Cost, cost_of
from modeling.claims import PAIRED, Difference, Sums, decided, difference, of_seeds
from modeling.comparison import next_item_recipe
from modeling.console import console
from modeling.encodings import Encodings
from modeling.ranking import (
    FinishedRun,
    classic_lines,
    floor_lines,
    ranking_recipe,
    stored_sums,
    summary_lines,
    train_and_evaluate,
)
from modeling.recipes import SERVICE, Recipe, ranking
from modeling.report import BLUE, GREY, ORANGE, Section, plots, png_of, write_sections
from modeling.trained_floors import TrainedFloor, trained_floors

BESIDE = ("vista_addressed", "mean_pool", "sim", "twin")
THINNED = {"complete_journey": (4, 2)}  # each fourth training request, each second that evaluates
QUICK = (20, 10)


@dataclass(frozen=True)
class Asked:
    """One dataset's part of a comparison: all that a worker must know of it."""

    settings: Settings
    every: tuple[int, int]
    epochs: int | None


@dataclass(frozen=True)
class Found:
    """What came out of one dataset.

    Args:
        claims: by name, as `paired` names them.
        next_item: the same of the next-item recipes' NDCG@10 and HR@10.
    """

    asked: Asked
    title: str
    results: list[dict[str, Any]]
    floor_rows: list[list[str]]
    claims: list[Difference]
    costs: dict[str, Cost]
    curve: list[dict[str, Any]]
    next_item: list[Difference] = field(default_factory=list)

    @property
    def name(self) -> str:
        """Of the dataset."""
        return self.asked.settings.dataset


def main() -> None:
    """Run."""
    flags = parser("modeling.benchmarks.compare", __doc__)
    flags.add_argument("--datasets", nargs="+", default=["online_retail"])
    flags.add_argument("--seeds", type=int, default=5, help="of each recipe (default 5)")
    flags.add_argument(
        "--recipes", nargs="+", help="ranking recipes (default: all that claims name)"
    )
    flags.add_argument("--epochs", type=int, help="default: the recipe's; 1 with --quick")
    flags.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    flags.add_argument("--curve", action="store_true", help="also quality by visible events")
    flags.add_argument("--next_item", action="store_true", help="also HydraRec beside SASRec")
    arguments = flags.parse_args()
    torch.set_num_threads(1)
    seeds = 1 if arguments.quick else arguments.seeds
    epochs = 1 if arguments.quick and arguments.epochs is None else arguments.epochs
    named = [name for paper in PAPERS for name in paper.recipes]
    names = arguments.recipes or list(dict.fromkeys([*named, *BESIDE]))
    if arguments.quick and not arguments.recipes:
        names = list(BESIDE)
    of_all = Settings.from_env()
    found = []
    for dataset in arguments.datasets:
        every = QUICK if arguments.quick else THINNED.get(dataset, (1, 1))
        asked = Asked(of_dataset(of_all, dataset), every, epochs)
        found.append(
            one_dataset(
                asked,
                names,
                seeds,
                arguments.workers,
                curve=arguments.curve,
                next_item=arguments.next_item,
            )
        )
    folder = Path(of_all.root if "://" not in of_all.root else ".memoir", "comparison")
    page = write(folder, found, seeds)
    rows = [row for one in found for row in _rows(one)]
    config = {"datasets": arguments.datasets, "seeds": seeds, "epochs": epochs, "page": page.name}
    report("compare", config, rows, arguments.json)
    console.print(f"comparison: {page}", highlight=False, soft_wrap=True)


def of_dataset(settings: Settings, dataset: str) -> Settings:
    """The same surroundings, of another dataset."""
    if dataset == settings.dataset:
        return settings
    before = os.environ.get("MEMOIR_DATASET")
    os.environ["MEMOIR_DATASET"] = dataset
    try:
        return Settings.from_env()
    finally:
        if before is None:
            del os.environ["MEMOIR_DATASET"]
        else:
            os.environ["MEMOIR_DATASET"] = before


def one_dataset(
    asked: Asked,
    names: Sequence[str],
    seeds: int,
    workers: int,
    *,
    curve: bool,
    next_item: bool,
) -> Found:
    """Run what is not finished of a dataset, and pair it."""
    settings = asked.settings
    encodings = Encodings(settings, SERVICE, every=asked.every)
    first = recipe_of(names[0], settings.dataset)
    title = encodings.set_of(first).describe()
    console.print(f"compare: {settings.dataset}, {title}", highlight=False)
    test, contract = encodings.period(first, "test"), encodings.encoder_of(first).contract
    floors = trained_floors(settings, encodings, first, min(seeds, 3))
    tasks = [(name, seed) for name in names for seed in range(1, seeds + 1)]
    if next_item:
        tasks += [(name, seed) for name in HYDRAREC.recipes for seed in range(1, seeds + 1)]
    runs = run_all(asked, tasks, workers)
    ranked = {name: [runs[name, seed] for seed in range(1, seeds + 1)] for name in names}
    sums = {name: of_seeds([run.sums for run in found]) for name, found in ranked.items()}
    costs = {name: cost_of(encodings, recipe_of(name, settings.dataset)) for name in names}
    later = []
    if next_item:
        of_next = {
            name: of_seeds([runs[name, seed].sums for seed in range(1, seeds + 1)])
            for name in HYDRAREC.recipes
        }
        later = decided(
            [
                difference(paired(c.ours, c.theirs), m, of_next[c.ours][m], of_next[c.theirs][m])
                for c in HYDRAREC.claims
                for m in ("ndcg@10", "hr@10")
            ]
        )
    return Found(
        asked,
        title,
        [run.result for found in ranked.values() for run in found],
        floor_lines(contract.spec, test) + classic_lines(floors),
        claims_of(sums, floors),
        costs,
        memory.curve(settings, asked.every, memory.VISIBLE, seeds, 1) if curve else [],
        later,
    )


def run_all(
    asked: Asked, tasks: Sequence[tuple[str, int]], workers: int
) -> dict[tuple[str, int], FinishedRun]:
    """Every recipe and seed, in as many processes as there are workers."""
    found: dict[tuple[str, int], FinishedRun] = {}
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=spawn, initializer=_start) as pool:
        waiting = {pool.submit(run_one, asked, *task): task for task in tasks}
        for done in as_completed(waiting):
            name, seed = waiting[done]
            found[name, seed] = done.result()
            ndcg = found[name, seed].sums["ndcg@10"].value
            console.print(
                f"compare: {asked.settings.dataset}, {len(found)} of {len(tasks)} runs: {name}, seed {seed}, NDCG@10 {ndcg:.4f}",
                highlight=False,
                soft_wrap=True,
            )
    return found


def _start() -> None:
    """Of a worker: one thread, and no bars of several processes over one another."""
    torch.set_num_threads(1)
    console.quiet = True


@cache
def _encodings(settings: Settings, every: tuple[int, int]) -> Encodings:
    return Encodings(settings, SERVICE, every=every)


def run_one(asked: Asked, name: str, seed: int) -> FinishedRun:
    """One run, or what is stored of it."""
    if name in HYDRAREC.recipes:
        return _next_item(asked, name, seed)
    recipe = recipe_of(name, asked.settings.dataset)
    training = replace(recipe.training, seed=seed)
    if asked.epochs is not None:
        training = replace(training, epochs=asked.epochs)
    recipe = replace(recipe, training=training)
    encodings = _encodings(asked.settings, asked.every)
    result = train_and_evaluate(asked.settings, encodings, recipe)
    return FinishedRun(result, stored_sums(asked.settings, encodings, recipe))


def recipe_of(name: str, dataset: str) -> Recipe:
    """The ranking recipe of a name: in a dataset's own shape where it has one, so that parameters
    are equal.
    """
    return ranking.for_dataset(name, dataset) if name in ranking.MODELS else ranking_recipe(name)


def _next_item(asked: Asked, name: str, seed: int) -> FinishedRun:
    from modeling import next_item

    source = next_item.open_source(asked.settings, None)
    recipe = next_item.variant(next_item_recipe(name), seed, asked.epochs)
    result = next_item.train_and_evaluate(source, recipe)
    return FinishedRun(result, next_item.stored_sums(source, recipe))


def paired(ours: str, theirs: str) -> str:
    """Name of a difference."""
    return f"{ours} − {theirs}"


def claims_of(sums: dict[str, Sums], floors: Sequence[TrainedFloor]) -> list[Difference]:
    """Every recipe less trees and less a mean pool, and what the papers compare; corrected together."""
    trees = next(floor.sums for floor in floors if floor.name == "trees")
    pairs = [(name, "trees") for name in sums]
    pairs += [(name, "mean_pool") for name in sums if name != "mean_pool" and "mean_pool" in sums]
    pairs += [
        (c.ours, c.theirs)
        for paper in PAPERS
        for c in paper.claims
        if c.ours in sums and c.theirs in sums
    ]
    of = {**sums, "trees": trees}
    return decided(
        [
            difference(paired(ours, theirs), metric, of[ours][metric], of[theirs][metric])
            for ours, theirs in dict.fromkeys(pairs)
            for metric in PAIRED
        ]
    )


def verdict(claim: Claim, found: Difference) -> str:
    """What a difference says of a claim.

    "No worse" is replicated where the interval excludes a loss of `MARGIN`, and not replicated where
    it excludes anything smaller.
    """
    if claim.expected == "no worse":
        if found.low > -MARGIN:
            return "replicated"
        return "not replicated" if found.high < -MARGIN else "undecided"
    return {"above": "replicated", "below": "not replicated"}.get(found.verdict, "undecided")


def write(folder: Path, found: Sequence[Found], seeds: int) -> Path:
    """Write the two pages and their pictures; returns the HTML page's path."""
    plt = plots()
    sections = []
    for one in found:
        rows = summary_lines(one.results)
        pictures = {f"{one.name}_frontier": _frontier(plt, one)}
        sections.append(Section(f"{one.name}: quality", one.title, rows + one.floor_rows, pictures))
        cost_rows = [["recipe", "ms a request", "ms one more event", "bytes a user"]]
        for name, cost in one.costs.items():
            event = "–" if cost.one_event_ms is None else f"{cost.one_event_ms:.2f}"
            cost_rows.append([name, f"{cost.request_ms:.2f}", event, f"{cost.bytes_a_user:,.0f}"])
        events = statistics.mean(cost.events for cost in one.costs.values())
        said = (
            f"CPU of one thread, {CANDIDATES} candidates, the longest histories ({events:,.0f} events in the mean). Bytes are those "
            "of summary tokens in fp16, or of the events that the model reads."
        )
        sections.append(Section(f"{one.name}: cost", said, cost_rows))
        if one.curve:
            curves = {f"{one.name}_history": _history(plt, one.curve)}
            sections.append(
                Section(f"{one.name}: visible events", "", _curve_rows(one.curve), curves)
            )
        sections.append(
            Section(
                f"{one.name}: differences",
                "Paired over users and seeds, 95 % intervals, after Holm's correction over this table.",
                _difference_rows(one.claims),
            )
        )
    for paper in (*PAPERS, HYDRAREC):
        sections.append(Section(paper.title, paper.about, _paper_rows(paper, found)))
    about = [
        f"{hardware()}; {seeds} seeds; mean ± standard deviation over seeds. Floors stand below the recipes.",
        "A claim is replicated, not replicated or undecided by the paired interval of NDCG@10; one of no loss is replicated "
        f"where the interval excludes a loss of {MARGIN}.",
    ]
    return write_sections(folder, "compare", "Rankers side by side", about, sections)


def _paper_rows(paper: Paper, found: Sequence[Found]) -> list[list[str]]:
    rows = [["claim", "here", "data", "NDCG@10", "95 % interval", "verdict"]]
    for claim in paper.claims:
        for one in found:
            name = paired(claim.ours, claim.theirs)
            of = one.next_item if paper is HYDRAREC else one.claims
            known = [c for c in of if c.name == name and c.metric == "ndcg@10"]
            if not known:
                rows.append([claim.says, name, one.name, "–", "–", "not run"])
                continue
            (c,) = known
            interval = f"[{c.low:+.4f}, {c.high:+.4f}]"
            said = verdict(claim, c)
            rows.append([claim.says, name, one.name, f"{c.value:+.4f}", interval, said])
    return rows


def _difference_rows(claims: Sequence[Difference]) -> list[list[str]]:
    rows = [["difference", *(f"{metric}" for metric in PAIRED)]]
    for name in dict.fromkeys(claim.name for claim in claims):
        cells = {claim.metric: str(claim) for claim in claims if claim.name == name}
        rows.append([name, *(cells[metric] for metric in PAIRED)])
    return rows


def _curve_rows(curve: Sequence[dict[str, Any]]) -> list[list[str]]:
    rows = [["visible events", "ranker", *PAIRED]]
    for row in curve:
        if row["case"] == "curve":
            figures = [f"{row[metric]:.4f}" for metric in PAIRED]
            rows.append([str(row["visible"]), row["ranker"], *figures])
        else:
            metric = next(name for name in PAIRED if name in row)
            said = f"{row[metric]:+.4f} [{row['low']:+.4f}, {row['high']:+.4f}], {row['verdict']}"
            cells = [said if metric == name else "" for name in PAIRED]
            rows.append(["difference", row["ranker"], *cells])
    return rows


def _frontier(plt: Any, one: Found) -> bytes:
    """Quality against what a request costs, with intervals over seeds."""
    figure, axes = plt.subplots(figsize=(7.2, 4.6))
    quality: dict[str, list[float]] = {}
    for result in one.results:
        quality.setdefault(result["recipe"], []).append(result["test"]["ndcg@10"]["value"])
    points = {name: (one.costs[name].request_ms, np.mean(of)) for name, of in quality.items()}
    best = float("-inf")
    for name, (cost, value) in sorted(points.items(), key=lambda pair: pair[1]):
        on_frontier, best = value > best, max(best, float(value))
        spread = np.std(quality[name], ddof=1) if len(quality[name]) > 1 else 0
        colour = ORANGE if on_frontier else BLUE
        axes.errorbar(cost, value, yerr=spread, fmt="o", color=colour, markersize=4, linewidth=1)
        axes.annotate(
            name, (cost, value), textcoords="offset points", xytext=(4, 3), fontsize=7, color=GREY
        )
    axes.set(
        xscale="log",
        xlabel=f"CPU ms a request of {CANDIDATES} candidates",
        ylabel="NDCG@10",
        title=f"{one.name}: quality and cost; nothing cheaper is better than the orange ones",
    )
    return png_of(plt, figure)


def _history(plt: Any, curve: Sequence[dict[str, Any]]) -> bytes:
    figure, axes = plt.subplots(figsize=(7.2, 4.6))
    rows = [row for row in curve if row["case"] == "curve"]
    numbers = list(dict.fromkeys(row["visible"] for row in rows))
    for name in dict.fromkeys(row["ranker"] for row in rows):
        of = {row["visible"]: row["ndcg@10"] for row in rows if row["ranker"] == name}
        axes.plot(
            [numbers.index(number) for number in of],
            list(of.values()),
            ".-",
            label=name,
            linewidth=1,
        )
    axes.set_xticks(range(len(numbers)), [str(number) for number in numbers])
    axes.set(xlabel="events that are visible", ylabel="NDCG@10", title="What a longer memory adds")
    axes.legend(frameon=False, fontsize=7)
    return png_of(plt, figure)


def _rows(one: Found) -> list[dict[str, Any]]:
    """What the closing JSON line holds of a dataset."""
    rows: list[dict[str, Any]] = []
    for result in one.results:
        figures = {metric: result["test"][metric]["value"] for metric in PAIRED}
        rows.append(
            {
                "data": one.name,
                "recipe": result["recipe"],
                "seed": result["seed"],
                **figures,
                "train_cpu_s": round(result["summary"]["cpu_seconds"]),
                "request_ms": one.costs[result["recipe"]].request_ms,
            }
        )
    for claim in (*one.claims, *one.next_item):
        rows.append(
            {
                "data": one.name,
                "recipe": claim.name,
                claim.metric: claim.value,
                "low": claim.low,
                "high": claim.high,
                "p": claim.p,
                "verdict": claim.verdict,
            }
        )
    return rows


if __name__ == "__main__":
    main()
