"""All rankers on a dataset, side by side: quality with intervals, what they cost, and what of the five
papers' claims holds here. One HTML and one Markdown page.

Each run is kept below MEMOIR_HOME and not repeated: stop it, and the same command goes on. Recipes ×
seeds are shared out among processes of one thread each; the curve of visible events (`--curve`) is
that of `modeling.benchmarks.memory`, one run after another. A page has a folder of its own for each
set of runs.
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

from feature_repo.benchmarks import commit, hardware, parser, report
from feature_repo.errors import ExpectedError, SettingsError
from feature_repo.settings import Settings
from modeling.benchmarks import memory
from modeling.benchmarks.published import HYDRAREC, MARGIN, PAPERS, Claim, Paper
from modeling.benchmarks.request_cost import CANDIDATES, Cost, cost_of
from modeling.benchmarks.shapes import shaped
from modeling.claims import PAIRED, Difference, Sums, differences, of_seeds, pair_name
from modeling.comparison.comparison import comparison_folder, next_item_recipe
from modeling.comparison.ranking import (
    FinishedRun,
    baseline_lines,
    classic_lines,
    finish,
    summary_lines,
)
from modeling.console import console
from modeling.evaluation.report import BLUE, GREY, ORANGE, Section, plots, png_of, write_sections
from modeling.evaluation.trained_baselines import TrainedBaseline, trained_baselines
from modeling.recipes import SERVICE, Recipe
from modeling.training_set.dataset import refuse_nothing_positive
from modeling.training_set.encodings import Encodings
from modeling.training_set.sample import Sample

BESIDE = ("vista_addressed", "mean_pool", "sim", "twin")
THINNED = {"complete_journey": (4, 2)}  # each fourth training request, each second that evaluates
QUICK = (20, 10)  # the same with --quick
SEEDS_OF_TREES = 3


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
        against_baselines: each recipe less trees and less a mean pool.
        claims: what the papers compare.
        next_item: the same of the next-item recipes' NDCG@10 and HR@10.
        failed: runs that have no result, and why.
    """

    asked: Asked
    title: str
    results: list[dict[str, Any]]
    baseline_rows: list[list[str]]
    against_baselines: list[Difference]
    claims: list[Difference]
    costs: dict[str, Cost]
    curve: list[dict[str, Any]]
    next_item: list[Difference] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.asked.settings.dataset


def main() -> None:
    """Run."""
    flags = parser("modeling.benchmarks.compare", __doc__)
    flags.add_argument("--datasets", nargs="+", default=["online_retail"])
    flags.add_argument("--seeds", type=int, default=5, help="of each recipe (default 5)")
    flags.add_argument(
        "--recipes", nargs="+", help="ranking recipes (default: all that claims name)"
    )
    flags.add_argument(
        "--epochs", type=int, help="of rankers (default: the recipe's; 1 with --quick)"
    )
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
    page = write(found, seeds)
    rows = [row for one in found for row in _rows(one)]
    config = {"datasets": arguments.datasets, "seeds": seeds, "epochs": epochs, "page": page.name}
    console.print(f"comparison: {page}", highlight=False, soft_wrap=True)
    report("compare", config, rows, arguments.json)


def of_dataset(settings: Settings, dataset: str) -> Settings:
    """The same surroundings, of another dataset.

    Raises:
        SettingsError: a production profile, which reads its dataset from the environment.
    """
    if dataset == settings.dataset:
        return settings
    if settings.profile != "local":
        raise SettingsError(
            f"the {settings.profile} profile serves MEMOIR_DATASET={settings.dataset} alone: compare {dataset} in a call of its own"
        )
    return replace(
        settings,
        dataset=dataset,
        home=f"{settings.root}/{dataset}",
        catalogue_url=settings.catalogue_url.replace(f"/{settings.dataset}/", f"/{dataset}/"),
    )


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
    encodings = Encodings(settings, SERVICE, sample=Sample(every=asked.every))
    recipes_of = {name: recipe_of(name, settings.dataset) for name in names}
    first = recipes_of[names[0]]
    title = encodings.set_of(first).describe()
    console.print(f"compare: {settings.dataset}, {title}", highlight=False)
    for recipe in recipes_of.values():
        encodings.set_of(recipe)  # made here, so that no two workers make the same one
    test = encodings.period(first, "test")
    contract = encodings.encoder_of(first).contract
    refuse_nothing_positive(contract, "test", (np.asarray(test.encoded.labels) == 1).sum(axis=0))
    baselines = trained_baselines(settings, encodings, first, min(seeds, SEEDS_OF_TREES))
    numbers = range(1, seeds + 1)
    tasks = [(name, seed) for name in names for seed in numbers]
    if next_item:
        tasks += [(name, seed) for name in HYDRAREC.recipes for seed in numbers]
    runs, failed = run_all(asked, tasks, workers)
    whole = [name for name in names if all((name, seed) in runs for seed in numbers)]
    sums = {name: of_seeds([runs[name, seed].sums for seed in numbers]) for name in whole}
    later = [name for name in HYDRAREC.recipes if all((name, seed) in runs for seed in numbers)]
    of_later = {name: of_seeds([runs[name, seed].sums for seed in numbers]) for name in later}
    visible = memory.CURVE_QUICK if asked.every == QUICK else memory.CURVE_VISIBLE
    return Found(
        asked,
        title,
        [runs[name, seed].result for name in whole for seed in numbers],
        baseline_lines(encodings, first) + classic_lines(baselines),
        less_baselines(sums, baselines),
        of_papers(PAPERS, sums, PAIRED),
        {name: cost_of(settings, encodings, _as_asked(asked, name, 1)) for name in whole},
        memory.curve(settings, asked.every, visible, memory.CURVE, memory.CURVE, seeds, 1)
        if curve
        else [],
        of_papers((HYDRAREC,), of_later, ("ndcg@10", "hr@10")),
        failed,
    )


def run_all(
    asked: Asked, tasks: Sequence[tuple[str, int]], workers: int
) -> tuple[dict[tuple[str, int], FinishedRun], dict[str, str]]:
    """Every recipe and seed, in as many processes as there are workers.

    Returns:
        Finished runs; and why the others, such as one whose loss became infinite, have no result.
    """
    found: dict[tuple[str, int], FinishedRun] = {}
    failed: dict[str, str] = {}
    # A fork of a process whose torch has threads may hang.
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=spawn, initializer=_start) as pool:
        waiting = {pool.submit(run_one, asked, *task): task for task in tasks}
        for done in as_completed(waiting):
            name, seed = waiting[done]
            error = done.exception()
            if isinstance(error, ExpectedError):
                failed[f"{name}, seed {seed}"] = str(error)
                outcome = f"no result: {error}"
            elif error is not None:
                pool.shutdown(cancel_futures=True)
                raise error
            else:
                found[name, seed] = done.result()
                outcome = f"NDCG@10 {found[name, seed].sums['ndcg@10'].value:.4f}"
            console.print(
                f"compare: {asked.settings.dataset}, {len(found) + len(failed)} of {len(tasks)} runs: {name}, seed {seed}, {outcome}",
                highlight=False,
                soft_wrap=True,
            )
    return found, failed


def _start() -> None:
    """Of a worker: one thread, and no bars of several processes over one another."""
    torch.set_num_threads(1)
    console.quiet = True


@cache
def _encodings(settings: Settings, every: tuple[int, int]) -> Encodings:
    return Encodings(settings, SERVICE, sample=Sample(every=every))


def run_one(asked: Asked, name: str, seed: int) -> FinishedRun:
    """One run, or what is stored of it."""
    if name in HYDRAREC.recipes:
        return _next_item(asked, name, seed)
    encodings = _encodings(asked.settings, asked.every)
    return finish(asked.settings, encodings, _as_asked(asked, name, seed))


def _as_asked(asked: Asked, name: str, seed: int) -> Recipe:
    """The recipe that a run of this comparison trains."""
    recipe = recipe_of(name, asked.settings.dataset)
    training = replace(recipe.training, seed=seed)
    if asked.epochs is not None:
        training = replace(training, epochs=asked.epochs)
    return replace(recipe, training=training)


def recipe_of(name: str, dataset: str) -> Recipe:
    """The ranking recipe of a name: in a dataset's own shape where it has one, so that parameters
    are equal.
    """
    return shaped(name, dataset)


def _next_item(asked: Asked, name: str, seed: int) -> FinishedRun:
    from modeling.next_item import next_item

    source = next_item.open_source(asked.settings, None)
    recipe = next_item.variant(next_item_recipe(name), seed)
    result = next_item.train_and_evaluate(source, recipe)
    return FinishedRun(result, next_item.stored_sums(source, recipe))


def less_baselines(sums: dict[str, Sums], baselines: Sequence[TrainedBaseline]) -> list[Difference]:
    """Every recipe less trees and less a mean pool, corrected together."""
    trees = next(baseline.sums for baseline in baselines if baseline.name == "trees")
    against = ["trees", *(["mean_pool"] if "mean_pool" in sums else [])]
    pairs = [(ours, theirs) for theirs in against for ours in sums if ours != theirs]
    return differences(pairs, {**sums, "trees": trees})


def of_papers(
    papers: Sequence[Paper], sums: dict[str, Sums], metrics: Sequence[str]
) -> list[Difference]:
    """What papers compare, of recipes that were run; corrected together."""
    pairs = [
        (claim.ours, claim.theirs)
        for paper in papers
        for claim in paper.claims
        if claim.ours in sums and claim.theirs in sums
    ]
    return differences(dict.fromkeys(pairs), sums, metrics)


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


def write(found: Sequence[Found], seeds: int) -> Path:
    """Write the two pages and their pictures; returns the HTML page's path."""
    plt = plots()
    sections = [section for one in found for section in _of_dataset(plt, one)]
    for paper in (*PAPERS, HYDRAREC):
        sections.append(Section(paper.title, paper.about, _paper_rows(paper, found)))
    epochs = found[0].asked.epochs
    # The recipes that were run, whether asked for or not, so that the line makes this very page.
    names = dict.fromkeys(result["recipe"] for one in found for result in one.results)
    command = (
        f"python -m modeling.benchmarks.compare --datasets {' '.join(one.name for one in found)} --seeds {seeds} "
        f"--recipes {' '.join(names)}"
    )
    about = [
        f"{command}{'' if epochs is None else f' --epochs {epochs}'}; commit {commit()}, {hardware()}.",
        "Test period; mean ± standard deviation over seeds; baselines stand below the recipes. Differences are paired over users and "
        "seeds, with 95 % intervals, and decided after Holm's correction over their table.",
        "Of a paper, “above” is replicated where NDCG@10 is decidedly above, after Holm's correction over all papers' claims; “no "
        f"worse” where the interval of the difference, uncorrected, excludes a loss of {MARGIN}.",
    ]
    root = found[0].asked.settings.path().parent
    folder = comparison_folder(root, [result for one in found for result in one.results])
    return write_sections(folder, "compare", "Rankers side by side", about, sections)


def _of_dataset(plt: Any, one: Found) -> list[Section]:
    """Quality, cost, visible events and differences on one dataset."""
    train, evaluated = one.asked.every
    thinned = (
        ""
        if train == 1
        else f"; each {train}th training request, each {evaluated}th that evaluates"
    )
    failed = "".join(f" {run}: {why}." for run, why in one.failed.items())
    quality = Section(
        f"{one.name}: quality",
        f"{one.title}{thinned}.{failed}",
        summary_lines(one.results) + one.baseline_rows,
        {f"{one.name}_frontier": _frontier(plt, one)},
    )
    cost_rows = [
        [
            "recipe",
            "events read",
            "ms a request",
            "of it scoring",
            "ms one more event",
            "bytes a user",
        ]
    ]
    for name, cost in one.costs.items():
        event = "–" if cost.one_event_ms is None else f"{cost.one_event_ms:.2f}"
        times = [f"{cost.events:,.0f}", f"{cost.request_ms:.2f}", f"{cost.score_ms:.2f}"]
        cost_rows.append([name, *times, event, f"{cost.bytes_a_user:,.0f}"])
    said = (
        f"CPU of one thread, {CANDIDATES} candidates, the users of the longest histories. A request is ranked from stored summary "
        "tokens where the model makes some that can be extended, else the user is encoded from events; “scoring” is what is left "
        "where a cache has the user's state. Bytes are those of tokens in fp16 and their streams in fp32, or of the events read."
    )
    sections = [quality, Section(f"{one.name}: cost", said, cost_rows)]
    if one.curve:
        curves = {f"{one.name}_history": _history(plt, one.curve)}
        said = (
            "All inputs know the newest so many events of each user and no more. Recipes of modeling.benchmarks.memory, one epoch; "
            "all seeds at 50, 500 and all events, one between."
        )
        rows = _curve_rows(one.curve)
        sections.append(Section(f"{one.name}: visible events", said, rows, curves))
    rows = _difference_rows(one.against_baselines)
    return [*sections, Section(f"{one.name}: less trees, less a mean pool", "", rows)]


def _paper_rows(paper: Paper, found: Sequence[Found]) -> list[list[str]]:
    rows = [["claim", "here", "data", "NDCG@10", "95 % interval", "verdict"]]
    for claim in paper.claims:
        for one in found:
            name = pair_name(claim.ours, claim.theirs)
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
    rows = [["visible events", "ranker", "seeds", *PAIRED]]
    for row in curve:
        if row["case"] == "curve":
            figures = [
                f"{row[metric]:.4f}" + (f" ± {row[f'{metric} ±']:.4f}" if row["seeds"] > 1 else "")
                for metric in PAIRED
            ]
            rows.append([str(row["visible"]), row["ranker"], str(row["seeds"]), *figures])
        else:
            metric = next(name for name in PAIRED if name in row)
            said = f"{row[metric]:+.4f} [{row['low']:+.4f}, {row['high']:+.4f}], {row['verdict']}"
            cells = [said if metric == name else "" for name in PAIRED]
            rows.append(["difference", row["ranker"], "", *cells])
    return rows


def _frontier(plt: Any, one: Found) -> bytes:
    """Quality against what a request costs, with deviations over seeds."""
    figure, axes = plt.subplots(figsize=(7.2, 4.6))
    best = float("-inf")
    for name in sorted(one.costs, key=lambda name: one.costs[name].request_ms):
        runs = [result for result in one.results if result["recipe"] == name]
        values = [value for run in runs if (value := _value(run, "ndcg@10")) is not None]
        if not values:
            continue
        place = (one.costs[name].request_ms, statistics.mean(values))
        spread = statistics.stdev(values) if len(values) > 1 else 0
        colour = ORANGE if place[1] > best else BLUE
        best = max(best, place[1])
        axes.errorbar(*place, yerr=spread, fmt="o", color=colour, markersize=4, linewidth=1)
        axes.annotate(
            name, place, textcoords="offset points", xytext=(4, 3), fontsize=7, color=GREY
        )
    axes.set(
        xscale="log",
        xlabel=f"CPU ms a request of {CANDIDATES} candidates",
        ylabel="NDCG@10",
        title=f"{one.name}: quality and cost; nothing cheaper is better than the orange ones",
    )
    return png_of(plt, figure)


def _value(result: dict[str, Any], metric: str) -> float | None:
    """A test metric; None where it is undefined."""
    found = result["test"][metric]
    return None if found is None else float(found["value"])


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
        figures = {metric: _value(result, metric) for metric in PAIRED}
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
    for claim in (*one.against_baselines, *one.claims, *one.next_item):
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
