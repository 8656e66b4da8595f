"""What can be served, beside tuned trees: each recipe over seeds on the dataset in force.

Every recipe gets as many trials, chosen on the validation period with seed 1: trees configurations
(`recipes/trees.py`), alone and in a blend; a network without trees learning rates. Differences to the trees are paired
over users and seeds, and corrected by Holm's method; scorings that need no training stand beside.

Each run is kept below MEMOIR_HOME and not repeated: stop it, and the same command goes on.
"""

from __future__ import annotations

import statistics
from typing import Any

import torch

from feature_repo.benchmarks import parser, report
from feature_repo.settings import Settings
from modeling.benchmarks.memory import claimed, row_of, untrained
from modeling.claims import PAIRED, Sums, difference, of_seeds
from modeling.comparison.ranking import ranking_recipe, seeds_of
from modeling.recipes import SERVICE
from modeling.training.changes import Comparison
from modeling.training_set.encodings import Encodings
from modeling.training_set.sample import Sample

TREES = "trees"
RECIPES = ("vista_trees", "amortised_trees")
RATES = (4e-3, 2e-3, 8e-3)
QUICK = (40, 20)


def main() -> None:
    """Run."""
    flags = parser("modeling.benchmarks.bundles", __doc__)
    flags.add_argument("--recipes", nargs="+", default=RECIPES, help="beside trees")
    flags.add_argument("--seeds", type=int, default=5, help="of each recipe (default 5)")
    flags.add_argument(
        "--trials",
        type=int,
        choices=range(1, len(RATES) + 1),
        default=2,
        help="of each (default 2)",
    )
    flags.add_argument(
        "--every",
        type=int,
        nargs=2,
        default=(1, 1),
        help="each n-th training request, each m-th of those that evaluate (default: all)",
    )
    arguments = flags.parse_args()
    torch.set_num_threads(1)
    settings = Settings.from_env()
    every = QUICK if arguments.quick else tuple(arguments.every)
    seeds = 1 if arguments.quick else arguments.seeds
    trials = 1 if arguments.quick else arguments.trials
    names = (TREES, *arguments.recipes)
    rows = beside_trees(settings, every, names, seeds, RATES[:trials])
    config = {"dataset": settings.dataset, "every": every, "seeds": seeds, "trials": trials}
    report("bundles", config, rows, arguments.json)


def beside_trees(
    settings: Settings,
    every: tuple[int, int],
    names: tuple[str, ...],
    seeds: int,
    rates: tuple[float, ...],
) -> list[dict[str, Any]]:
    """A row for each recipe, and its difference to the first."""
    encodings = Encodings(settings, SERVICE, sample=Sample(every=every))
    asked = Comparison(names, seeds=seeds, learning_rates=rates)
    rows = []
    sums: dict[str, Sums] = {}
    for name in names:
        runs = seeds_of(settings, encodings, ranking_recipe(name), asked)
        sums[name] = of_seeds([run.sums for run in runs])
        cost = statistics.mean(run.result["summary"]["cpu_seconds"] for run in runs)
        validation = [run.result["summary"]["best_validation_ndcg@10"] for run in runs]
        row = row_of("bundles", None, runs[0].result["recipe"], sums[name], cost)
        rows.append(row | {"validation ndcg@10": statistics.mean(validation)})
    for name, one in untrained(encodings, ranking_recipe(names[0])).items():
        rows.append(row_of("untrained", None, name, one))
    claims = [
        difference(f"{name} − {names[0]}", metric, sums[name][metric], sums[names[0]][metric])
        for metric in PAIRED
        for name in names[1:]
    ]
    return rows + claimed("bundles", claims)


if __name__ == "__main__":
    main()
