"""What each way to read a history is worth where no feature counts it for the ranker.

Match features, counts and relations are withheld, so that a history is known by what a ranker reads of it alone;
statistics of items and users stay, or those of users go too. Beside the readers stand counters: trees, a regression
and a mean pool that are given exact counts of the candidate in its user's history, and a mean pool with counts in as
many bytes as summary tokens have (exact too where a history's items are few enough, and a hashed sketch beyond).

`--part attention` instead trains the readers that look for events like the candidate with the papers' attention and with
ours (`matching=False` and `True`), without match features and with all, over the same rows of items: what those rows
are worth is not in that difference.

Each run is kept below MEMOIR_HOME and not repeated: stop it, and the same command goes on.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from feature_repo.benchmarks import parser, report
from feature_repo.settings import Settings
from modeling.benchmarks.memory import (
    COMMON,
    EVERY,
    QUICK,
    RANKERS,
    claimed,
    recipe_of,
    row_of,
    runs_of,
    untrained,
)
from modeling.claims import PAIRED, Sums, difference
from modeling.evaluation.trained_baselines import trained_baselines
from modeling.recipes import SERVICE, Recipe
from modeling.training_set.encodings import Encodings
from modeling.training_set.sample import Sample

NO_MATCHES = "no match features"
OWN_COUNTS = "own counts"
# KiB of counts that are as large as 64 summary tokens of 65 numbers in half precision
AS_TOKENS = 8
HASHED = f"mean pool, counts in {AS_TOKENS} KiB, hashed where they are more"
# Of events, beside `memory.RANKERS`: model, events read, config
MORE: dict[str, tuple[str, int, dict[str, Any]]] = {
    "amortised": (
        "amortised_dlrm",
        1000,
        {"num_layers": 1, "num_heads": 2, "interaction": "cross", "cross_rank": 64},
    ),
    "hstu": (
        "amortised_dlrm",
        500,
        {
            "num_layers": 1,
            "num_heads": 2,
            "fusion": "append_self",
            "causal": True,
            "attention": "pointwise",
            "interaction": "cross",
            "cross_rank": 64,
        },
    ),
    "onetrans": (
        "onetrans",
        1000,
        {
            "num_heads": 2,
            "num_layers": 2,
            "expansion": 2,
            "request_tokens": 3,
            "candidate_tokens": 3,
        },
    ),
}
# Attention that finds events like the candidate
ATTENTION = (
    "attention_1000",
    "sim",
    "twin",
    "persrec",
    "vista_stream",
    "amortised",
    "hstu",
    "onetrans",
)
READERS = ("mean_pool", "vista_addressed", *ATTENTION)
QUICK_READERS = ("mean_pool", "amortised")


def main() -> None:
    """Run."""
    flags = parser("modeling.benchmarks.reading", __doc__)
    flags.add_argument("--seeds", type=int, default=5, help="of each run (default 5)")
    flags.add_argument("--readers", nargs="+", choices=READERS, help="default: all")
    flags.add_argument("--part", choices=("readers", "attention"), default="readers")
    flags.add_argument(
        "--every",
        type=int,
        nargs=2,
        default=EVERY,
        help="each n-th training request, each m-th of those that evaluate (default: %(default)s)",
    )
    arguments = flags.parse_args()
    torch.set_num_threads(1)
    settings = Settings.from_env()
    every = QUICK if arguments.quick else tuple(arguments.every)
    readers = tuple(arguments.readers or (QUICK_READERS if arguments.quick else READERS))
    seeds = 1 if arguments.quick else arguments.seeds
    if arguments.part == "attention":
        attention = tuple(name for name in readers if name in ATTENTION)
        rows = by_attention(settings, every, attention, seeds)
    else:
        rows = without_matches(settings, every, readers, seeds)
    config = {"dataset": settings.dataset, "every": every, "seeds": seeds, "part": arguments.part}
    report("reading", config, rows, arguments.json)


def without_matches(
    settings: Settings, every: tuple[int, int], readers: tuple[str, ...], seeds: int
) -> list[dict[str, Any]]:
    """Every reader without match features, counters beside them, and what is claimed of them."""
    sums: dict[str, Sums] = {}
    rows = []
    # 1. What needs no training, and what reads nothing of a history.
    encodings = Encodings(settings, SERVICE, sample=Sample(every=every))
    for name, one in untrained(encodings).items():
        rows.append(row_of("untrained", None, name, one))
    nothing = trained_baselines(settings, encodings, recipe_of("mean_pool", NO_MATCHES))
    rows += [row_of("nothing read", None, b.name, b.sums, b.cpu_seconds) for b in nothing]
    # 2. Readers.
    for name in readers:
        sums[name], cost = runs_of(settings, encodings, _recipe(name, NO_MATCHES), seeds)
        rows.append(row_of(NO_MATCHES, None, name, sums[name], cost))
    # 3. Counters.
    exact = Encodings(settings, SERVICE, sample=Sample(every=every, counts="exact"))
    pool = recipe_of("mean_pool", OWN_COUNTS)
    for baseline in trained_baselines(settings, exact, pool):
        name = f"{baseline.name}, exact counts"
        rows.append(row_of(OWN_COUNTS, None, name, baseline.sums, baseline.cpu_seconds))
    small = Encodings(settings, SERVICE, sample=Sample(every=every, counts=AS_TOKENS))
    for name, counted in (("mean pool, exact counts", exact), (HASHED, small)):
        sums[name], cost = runs_of(settings, counted, pool, seeds)
        rows.append(row_of(OWN_COUNTS, None, name, sums[name], cost))
    # 4. Each reader less the mean pool, and less the counter of as many bytes.
    claims = [
        difference(f"{name} − {beside}", metric, sums[name][metric], sums[beside][metric])
        for metric in PAIRED
        for beside in ("mean_pool", HASHED)
        if beside in sums
        for name in readers
        if name != beside
    ]
    return rows + claimed("reading", claims)


def by_attention(
    settings: Settings, every: tuple[int, int], readers: tuple[str, ...], seeds: int
) -> list[dict[str, Any]]:
    """Readers with the papers' attention and with ours, without match features and with all."""
    encodings = Encodings(settings, SERVICE, sample=Sample(every=every))
    rows = []
    claims = []
    for arm in (NO_MATCHES, "all features"):
        for name in readers:
            ours = _recipe(name, arm)
            papers = replace(ours, config={**ours.config, "matching": False})
            sums, cost = runs_of(settings, encodings, ours, seeds)
            of_papers, papers_cost = runs_of(settings, encodings, papers, seeds)
            rows.append(row_of(arm, None, f"{name}, papers' attention", of_papers, papers_cost))
            rows.append(row_of(arm, None, name, sums, cost))
            claims += [
                difference(
                    f"{name}: ours − papers', {arm}", metric, sums[metric], of_papers[metric]
                )
                for metric in PAIRED
            ]
    return rows + claimed("attention", claims)


def _recipe(name: str, arm: str) -> Recipe:
    if name in RANKERS:
        return recipe_of(name, arm)
    model, length, config = MORE[name]
    return replace(
        recipe_of("mean_pool", arm),
        name=f"reading_{name}",
        model=model,
        config={**COMMON, **config},
        history_length=length,
    )


if __name__ == "__main__":
    main()
