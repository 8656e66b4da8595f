"""Trees fitted on the shards that networks train on, batch by batch with the same things hidden."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch

from modeling.errors import DataError, RecipeError
from modeling.inputs.augment import forget, hide
from modeling.inputs.batch import Batch
from modeling.inputs.encoder import Encoded, Encoder
from modeling.trees.columns import PLAIN, TreeColumns, column_names
from modeling.trees.forest import Forest

Objective = Literal["binary", "lambdarank", "rank_xendcg"]
# Requests that become rows at a time
CHUNK = 256
# Labels of each kind without which there is nothing to fit
FEWEST = 2
NEWTON_STEPS = 50
RIDGE = 1e-6
TOLERANCE = 1e-9
# Deviation, for its size, below which scores are all alike
FLAT = 1e-6
# Candidates that a forest is fitted on at most: memory follows them
MOST_ROWS = 1 << 22


@dataclass(frozen=True)
class TreesConfig:
    """What LightGBM is asked for.

    Args:
        objective: "lambdarank" learns the order within a request (Burges, 2010); "rank_xendcg" does in a quarter of
            the time, a little less well (Bruch, 2021); "binary" learns the probability of a label.
        num_trees: at most; fewer where the validation period gains nothing for `patience` of them.
        smallest_leaf: candidates in a leaf, at least.
        column_share: of the columns that each tree may read; `row_share` of the requests' candidates likewise.
        category_smooth: candidates by which a rare category is drawn to the mean.
        categories_left: most categories that a split sends to one side: large sets memorise.
        rank_positions: places from the top that lambdarank looks at: its time follows them.
    """

    objective: Objective = "lambdarank"
    num_trees: int = 300
    num_leaves: int = 80
    learning_rate: float = 0.05
    smallest_leaf: int = 100
    column_share: float = 0.5
    row_share: float = 0.8
    l2: float = 1.0
    category_smooth: float = 20.0
    categories_left: int = 8
    rank_positions: int = 30
    patience: int = 30

    def __post_init__(self) -> None:
        for name in ("num_trees", "patience"):
            if getattr(self, name) < 1:
                raise RecipeError(f"{name} of trees is at least 1, not {getattr(self, name)}")


@dataclass(frozen=True)
class TreeRows:
    """Candidates of a period as trees read them.

    Args:
        rows_NF: float32.
        labels_NT: NaN where a task is undefined.
        candidates_R: of each request.
    """

    rows_NF: np.ndarray
    labels_NT: np.ndarray
    candidates_R: np.ndarray


@dataclass(frozen=True)
class FittedForest:
    """Trees of one task.

    Args:
        text: LightGBM's.
        out_of_fold_N: sums of the held-out candidates, each half of the requests by as many of the trees as rank the
            other half best: by the requests that stopped them trees seem better than they are. Each half has the
            deviation that all trees give it, so that a weight found on such sums is right for the sums of all trees. None
            where out-of-fold sums were not asked for, or a half has not two labels of each kind.
    """

    text: str
    out_of_fold_N: np.ndarray | None = None


def tree_rows(
    encoder: Encoder,
    encoded: Encoded,
    hidden: float = 0.0,
    seed: int = 0,
    most: int = MOST_ROWS,
) -> TreeRows:
    """Rows of a period; of a longer one, requests spread evenly over it, up to so many candidates.

    Args:
        hidden: share of candidates that become unknown, and as many that lose their statistics
            (`inputs/augment.py`); 0 takes rows as they are.
    """
    columns = TreeColumns.of(encoder.sizes)
    step = -(-len(encoded.candidate_item) // most) or 1
    # The seed moves which requests are taken, so that seeds differ in more than the trees' own.
    requests = np.arange(seed % step, len(encoded), step)
    rng = np.random.default_rng(seed)
    rows = []
    labels = []
    for batch in _batches(encoder, encoded, requests):
        shown = batch
        if hidden:
            shown = forget(encoder, hide(encoder, batch, hidden, rng), rng)
        rows.append(columns.of_batch(shown))
        labels.append(batch.labels_BCT[batch.candidates.mask_BC].numpy())
    return TreeRows(np.concatenate(rows), np.concatenate(labels), encoded.num_candidates[requests])


def _batches(encoder: Encoder, encoded: Encoded, requests: np.ndarray) -> Iterator[Batch]:
    for start in range(0, len(requests), CHUNK):
        yield encoder.collate(encoded, requests[start : start + CHUNK])


def fit_forests(
    config: TreesConfig,
    encoder: Encoder,
    train: TreeRows,
    validation: TreeRows,
    seed: int,
    tell: Callable[[int, float], None] = lambda tree, quality: None,
    out_of_fold: bool = False,
) -> list[FittedForest]:
    """A forest for each task.

    Args:
        tell: takes each tree's number and the validation period's figure behind it.
        out_of_fold: whether `FittedForest.out_of_fold_N` is asked for.

    Raises:
        DataError: a task has no two labels of each kind to learn from.
    """
    return [
        fit_forest(config, encoder, train, validation, task, seed, tell, out_of_fold)
        for task in range(train.labels_NT.shape[1])
    ]


def forest_scores(forest: Forest, encoder: Encoder, encoded: Encoded) -> np.ndarray:
    """A forest's sums for all candidates of a period, float64, in their order."""
    columns = TreeColumns.of(encoder.sizes)
    parts = [
        forest.scores(columns.of_batch(batch))
        for batch in _batches(encoder, encoded, np.arange(len(encoded)))
    ]
    return np.concatenate(parts) if parts else np.zeros(0)


def fit_forest(
    config: TreesConfig,
    encoder: Encoder,
    train: TreeRows,
    validation: TreeRows,
    task: int,
    seed: int,
    tell: Callable[[int, float], None] = lambda tree, quality: None,
    out_of_fold: bool = False,
) -> FittedForest:
    """A forest for one task.

    Raises:
        DataError: the task has no two labels of each kind to learn from.
    """
    import lightgbm

    name = encoder.contract.labels[task]
    ranks = config.objective != "binary"
    parameters: dict[str, Any] = {
        "objective": config.objective,
        "num_iterations": config.num_trees,
        "metric": "ndcg" if ranks else "binary_logloss",
        "eval_at": [10],
        "num_leaves": config.num_leaves,
        "learning_rate": config.learning_rate,
        "min_data_in_leaf": config.smallest_leaf,
        "feature_fraction": config.column_share,
        "bagging_fraction": config.row_share,
        "bagging_freq": 1,
        "lambda_l2": config.l2,
        "cat_smooth": config.category_smooth,
        "max_cat_threshold": config.categories_left,
        "lambdarank_truncation_level": config.rank_positions,
        "num_threads": torch.get_num_threads(),
        "deterministic": True,
        # The same trees as row by row, a tenth sooner, and whatever the number of threads
        "force_col_wise": True,
        "seed": seed,
        "verbose": -1,
    }
    # What counts say of a category's values, trees read as counts: the values themselves are then memorised.
    counted = {PLAIN.sub("_", f"{column.name}_id") for column in encoder.contract.remembered}
    names = column_names(encoder)
    if counted & set(names):
        parameters["interaction_constraints"] = [
            [place for place, column in enumerate(names) if column not in counted]
        ]
    # 1. What each task's label is defined for; the whole validation period first, which stops the trees.
    data = _dataset(parameters, encoder, train, task, ranks, name)
    first = _of_first_half(validation)
    halves = [_of_candidates(validation, part) for part in (first, ~first)] if out_of_fold else []
    if min((_fewest(half, task) for half in halves), default=0) < FEWEST:
        halves = []
    held_out = [
        _dataset(parameters, encoder, rows, task, ranks, name, data)
        for rows in (validation, *halves)
    ]
    booster = lightgbm.Booster(parameters, data)
    for number, one in enumerate(held_out):
        booster.add_valid(one, str(number))
    # 2. Tree by tree, until the validation period gains nothing.
    figures: list[list[float]] = []
    best = [0] * len(held_out)
    while len(figures) < config.num_trees and len(figures) < best[0] + config.patience:
        booster.update()
        figures.append([result[2] for result in booster.eval_valid()])
        tell(len(figures), figures[-1][0])
        # How many trees each set is ranked best by
        gained = np.array(figures) if ranks else -np.array(figures)
        best = (1 + gained.argmax(axis=0)).tolist()
    text: str = booster.model_to_string(num_iteration=best[0])
    if not halves:
        return FittedForest(text)
    # 3. Each half by the trees that the other one stopped.
    out_of_fold_N = np.empty(len(validation.rows_NF))
    for part, other in ((first, best[2]), (~first, best[1])):
        by_all, by_some = (
            np.asarray(booster.predict(validation.rows_NF[part], raw_score=True, num_iteration=n))
            for n in (best[0], other)
        )
        deviation = by_some.std()
        out_of_fold_N[part] = by_some * (by_all.std() / deviation if deviation > 0 else 1.0)
    return FittedForest(text, out_of_fold_N)


def _of_first_half(rows: TreeRows) -> np.ndarray:
    """Which candidates are of the first half of the requests, N."""
    candidates = rows.candidates_R[: len(rows.candidates_R) // 2].sum()
    return np.arange(len(rows.rows_NF)) < candidates


def _fewest(rows: TreeRows, task: int) -> int:
    """Labels of the rarer kind."""
    labels = rows.labels_NT[:, task]
    return int(min((labels > 0).sum(), (labels <= 0).sum()))


def _of_candidates(rows: TreeRows, part_N: np.ndarray) -> TreeRows:
    """The same rows with the labels of some candidates alone."""
    return replace(rows, labels_NT=np.where(part_N[:, None], rows.labels_NT, np.float32(np.nan)))


def _dataset(
    parameters: dict[str, Any],
    encoder: Encoder,
    rows: TreeRows,
    task: int,
    ranks: bool,
    name: str,
    reference: Any = None,
) -> Any:
    """A period as LightGBM takes it.

    Raises:
        DataError: it holds fewer than two labels of a kind.
    """
    import lightgbm

    labels = rows.labels_NT[:, task]
    known = ~np.isnan(labels)
    positive = labels[known] > 0
    if _fewest(rows, task) < FEWEST:
        raise DataError(
            f"trees need {FEWEST} positives and {FEWEST} negatives of {name}; there are {positive.sum()} and "
            f"{(~positive).sum()}: give training and validation more requests, or train a recipe without trees"
        )
    group = None
    if ranks:
        request = np.repeat(np.arange(len(rows.candidates_R)), rows.candidates_R)
        group = np.bincount(request[known], minlength=len(rows.candidates_R))
        group = group[group > 0]
    return lightgbm.Dataset(
        rows.rows_NF if known.all() else rows.rows_NF[known],
        positive.astype(np.float32),
        group=group,
        reference=reference,
        feature_name=column_names(encoder),
        categorical_feature=TreeColumns.of(encoder.sizes).categories,
        params=parameters,
        free_raw_data=True,
    )


def calibrated(scores_N: np.ndarray, labels_N: np.ndarray) -> tuple[float, float]:
    """Scale and shift that make scores the logits of labels (Platt, 1999): the pair of greatest likelihood under his
    targets, which keep it finite where scores part the labels. Scores that tell nothing get scale 0.

    Args:
        labels_N: NaN where undefined.
    """
    known = ~np.isnan(labels_N)
    scores = scores_N[known].astype(np.float64)
    positive = labels_N[known] > 0
    many = (int((~positive).sum()), int(positive.sum()))
    targets = np.where(positive, (many[1] + 1) / (many[1] + 2), 1 / (many[0] + 2))
    middle = scores.mean()
    deviation = scores.std()
    rate = targets.mean()
    start = math.log(rate / (1 - rate))
    # All alike but for rounding
    if deviation <= FLAT * max(abs(middle), 1.0):
        return 0.0, start
    design = np.stack([(scores - middle) / deviation, np.ones(len(scores))], axis=1)

    def loss(weights: np.ndarray) -> float:
        logits = design @ weights
        return float((np.logaddexp(0, logits) - targets * logits).sum())

    weights = np.array([0.0, start])
    for _ in range(NEWTON_STEPS):
        chance = 1 / (1 + np.exp(-design @ weights))
        slope = design.T @ (targets - chance)
        curvature = (design * (chance * (1 - chance))[:, None]).T @ design
        step = np.linalg.solve(curvature + RIDGE * np.eye(2), slope)
        # A whole step may leap over the valley.
        while loss(weights + step) > loss(weights) and np.abs(step).max() > TOLERANCE:
            step /= 2
        weights += step
        if np.abs(step).max() < TOLERANCE:
            break
    # Upside down is worse than nothing
    scale = max(float(weights[0] / deviation), 0.0)
    return scale, float(weights[1] - scale * middle) if scale else start
