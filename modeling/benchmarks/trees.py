"""Trees: what scoring a request's candidates costs, beside LightGBM's own.

A forest is fitted on random numbers and categories in the shape that is asked for, then scores candidates of one
request: its own words of candidates (`modeling/trees/forest.py`) and LightGBM's walk, on one thread. Scores are
compared; the floor is reading the rows once.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import lightgbm
import numpy as np
import torch

from feature_repo.benchmarks import parser, report
from modeling.trees.forest import Forest

NUMBERS = 35
CATEGORIES = (20, 300, 1_000, 3_000)
ROWS = 200_000
REPEATS = 60


def main() -> None:
    """Run."""
    flags = parser("modeling.benchmarks.trees", __doc__)
    flags.add_argument("--trees", type=int, default=300)
    flags.add_argument("--leaves", type=int, default=40)
    arguments = flags.parse_args()
    torch.set_num_threads(1)
    number = ROWS // 20 if arguments.quick else ROWS
    rng = np.random.default_rng(0)
    rows = _rows(number, rng)
    text = _fitted(rows, arguments.trees, arguments.leaves, rng)
    forest = Forest(text)
    booster = lightgbm.Booster(model_str=text)
    found = []
    for candidates in (50, 500, 2_000):
        some = _rows(candidates, rng)
        expected = np.asarray(booster.predict(some, raw_score=True, num_threads=1))
        found.append(_timed(forest, booster, some, expected))
    config = {"trees": arguments.trees, "leaves": arguments.leaves, "columns": rows.shape[1]}
    report("trees", config, found, arguments.json)


def _rows(number: int, rng: np.random.Generator) -> np.ndarray:
    """Numbers, a tenth of them missing, and categories of which few are frequent."""
    numbers = rng.normal(size=(number, NUMBERS)).astype(np.float32)
    numbers[rng.random(numbers.shape) < 0.1] = np.nan
    categories = [np.floor(size * rng.random(number) ** 3) for size in CATEGORIES]
    return np.column_stack([numbers, *categories]).astype(np.float32)


def _fitted(rows: np.ndarray, trees: int, leaves: int, rng: np.random.Generator) -> str:
    known = np.nan_to_num(rows)
    appeal = known[:, :12].sum(1) + 2 * (known[:, -3:] % 7).sum(1) / 7
    labels = appeal + rng.normal(size=len(rows)) > np.median(appeal)
    settings: dict[str, Any] = {
        "objective": "binary",
        "num_leaves": leaves,
        "learning_rate": 0.06,
        "max_cat_threshold": 8,
        "num_threads": 1,
        "verbose": -1,
    }
    categories = list(range(NUMBERS, rows.shape[1]))
    data = lightgbm.Dataset(rows, labels.astype(np.float32), categorical_feature=categories)
    text: str = lightgbm.train(settings, data, trees).model_to_string()
    return text


def _timed(
    forest: Forest, booster: lightgbm.Booster, rows: np.ndarray, expected: np.ndarray
) -> dict[str, Any]:
    """Both side by side, in turn, on the same rows."""

    def lightgbms() -> Any:
        return booster.predict(rows, raw_score=True, num_threads=1)

    calls: dict[str, Callable[[], Any]] = {
        "ours": lambda: forest.scores(rows),
        "lightgbm": lightgbms,
        "floor": lambda: np.nansum(rows),
    }
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(REPEATS):
        for name, call in calls.items():
            started = time.perf_counter()
            call()
            times[name].append(1000 * (time.perf_counter() - started))
    ms = {name: statistics.median(taken) for name, taken in times.items()}
    return {
        "candidates": len(rows),
        "ours_ms": ms["ours"],
        "lightgbm_ms": ms["lightgbm"],
        "ratio": ms["lightgbm"] / ms["ours"],
        "floor_ms": ms["floor"],
        "largest_difference": float(np.abs(forest.scores(rows) - expected).max()),
    }


if __name__ == "__main__":
    main()
