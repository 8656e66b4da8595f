"""The gain of OneTrans from width, depth and length, and its price: one of them changed at a time.

Four sizes each, one recipe otherwise (`BASE`). A slope is of the metric against the doubling of a request's FLOPs, by least squares;
the paper (arXiv 2510.26104) has length before depth before width, and a gain that is near linear in the logarithm of FLOPs. Differences between the largest size and the smallest are paired over users and seeds.

Runs are kept below MEMOIR_HOME: stop it, and the same command goes on. Sizes that two cores cannot train wait for a GPU.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from feature_repo.benchmarks import parser, report
from feature_repo.settings import Settings
from modeling import models
from modeling.benchmarks.worlds import flops
from modeling.claims import PAIRED, Difference, Sums, decided, difference, of_seeds
from modeling.comparison.ranking import FinishedRun, finish
from modeling.recipes import SERVICE, Recipe, Training
from modeling.recipes.ranking import ONETRANS
from modeling.training_set.encodings import Encodings
from modeling.training_set.sample import Sample

# width, layers, events
BASE = (32, 2, 128)
AXES: dict[str, tuple[tuple[int, int, int], ...]] = {
    "width": ((16, 2, 128), BASE, (64, 2, 128), (128, 2, 128)),
    "depth": ((32, 1, 128), BASE, (32, 4, 128), (32, 6, 128)),
    "length": ((32, 2, 32), BASE, (32, 2, 512), (32, 2, 1024)),
}
QUICK: dict[str, tuple[tuple[int, int, int], ...]] = {"width": ((16, 1, 16), (32, 1, 16))}


def main() -> None:
    """Run."""
    flags = parser("modeling.benchmarks.scaling", __doc__)
    flags.add_argument("--seeds", type=int, default=1, help="of each size (default 1)")
    flags.add_argument(
        "--every",
        type=int,
        nargs=2,
        default=(4, 2),
        help="each n-th training request, each m-th of those that evaluate (default: 4 2)",
    )
    flags.add_argument("--device", default="cpu")
    arguments = flags.parse_args()
    torch.set_num_threads(1)
    settings = Settings.from_env()
    every = (120, 60) if arguments.quick else tuple(arguments.every)
    axes = QUICK if arguments.quick else AXES
    seeds = 1 if arguments.quick else arguments.seeds
    encodings = Encodings(settings, SERVICE, sample=Sample(every=every))
    runs = {
        shape: [
            finish(settings, encodings, _recipe(shape, seed), arguments.device)
            for seed in range(1, seeds + 1)
        ]
        for shape in dict.fromkeys(shape for axis in axes.values() for shape in axis)
    }
    costs = {shape: _flops(encodings, shape) for shape in runs}
    rows = [_row(axis, shape, runs[shape], costs[shape]) for axis in axes for shape in axes[axis]]
    rows += [_slope(axis, shapes, runs, costs) for axis, shapes in axes.items()]
    claims = [claim for axis, shapes in axes.items() for claim in _claims(axis, shapes, runs)]
    rows += [
        {
            "axis": one.name,
            one.metric: one.value,
            "low": one.low,
            "high": one.high,
            "verdict": one.verdict,
        }
        for one in decided(claims)
    ]
    config = {"dataset": settings.dataset, "every": every, "seeds": seeds}
    report("scaling", config, rows, arguments.json)


def _recipe(shape: tuple[int, int, int], seed: int) -> Recipe:
    width, layers, events = shape
    config = {**ONETRANS, "width": width, "num_layers": layers, "dropout": 0.1}
    training = Training(epochs=1, seed=seed)
    name = f"onetrans_{width}_{layers}_{events}"
    return Recipe(name, "onetrans", SERVICE, config, events, training=training)


def _flops(encodings: Encodings, shape: tuple[int, int, int]) -> float:
    """FLOPs of the request with the longest history."""
    recipe = _recipe(shape, 1)
    encoder = encodings.encoder_of(recipe)
    encoded = encodings.period(recipe, "test").encoded
    batch = encoder.collate(encoded, np.array([int(np.argmax(encoded.events_known))]))
    model = models.build("onetrans", recipe.config, encoder.sizes).eval()
    with torch.inference_mode():
        return float(flops(lambda: model(batch)))


def _row(
    axis: str, shape: tuple[int, int, int], runs: Sequence[FinishedRun], cost: float
) -> dict[str, Any]:
    width, layers, events = shape
    return {
        "axis": axis,
        "width": width,
        "layers": layers,
        "events": events,
        **{metric: _mean(runs, metric) for metric in PAIRED},
        "mflop": cost / 1e6,
        "train_cpu_s": statistics.mean(run.result["summary"]["cpu_seconds"] for run in runs),
        "parameters": runs[0].result["dense_parameters"],
    }


def _mean(runs: Sequence[FinishedRun], metric: str) -> float:
    return statistics.mean(run.sums[metric].value for run in runs)


def _slope(
    axis: str,
    shapes: Sequence[tuple[int, int, int]],
    runs: dict[tuple[int, int, int], list[FinishedRun]],
    costs: dict[tuple[int, int, int], float],
) -> dict[str, Any]:
    """The gain for each doubling of FLOPs."""
    doublings = [math.log2(costs[shape]) for shape in shapes]
    slopes = {
        metric: float(np.polyfit(doublings, [_mean(runs[shape], metric) for shape in shapes], 1)[0])
        for metric in PAIRED
    }
    return {"axis": f"{axis}: slope", **slopes}


def _claims(
    axis: str,
    shapes: Sequence[tuple[int, int, int]],
    runs: dict[tuple[int, int, int], list[FinishedRun]],
) -> list[Difference]:
    smallest, largest = (_sums(runs[shape]) for shape in (shapes[0], shapes[-1]))
    return [
        difference(f"{axis}: largest − smallest", metric, largest[metric], smallest[metric])
        for metric in PAIRED
    ]


def _sums(runs: Sequence[FinishedRun]) -> Sums:
    return of_seeds([run.sums for run in runs])


if __name__ == "__main__":
    main()
