"""From the logits of all tasks to what is ranked by.

A task that is given another one has the conditional probability as its logit (bought once clicked);
its own probability is the product along the chain. The score is the mean of the tasks'
probabilities under the weights that the dataset declares (`SPEC.rank_by`).
"""

from __future__ import annotations

import math

import numpy as np

from feature_repo.contract.schema import DatasetSpec, Examples

# A probability is kept away from 0 and 1 by this much before it becomes a logit
SMALLEST = 1e-12


def sigmoid(logits: np.ndarray) -> np.ndarray:
    """Probabilities, float64."""
    return 1 / (1 + np.exp(-logits.astype(np.float64)))


def probabilities(spec: DatasetSpec, logits_NT: np.ndarray) -> np.ndarray:
    """Probability of each task's label, float64, N × T: of a given task both must happen."""
    found = sigmoid(logits_NT)
    names = [task.name for task in spec.tasks]
    for number, task in enumerate(spec.tasks):
        # A task before it, whose probability is already whole
        if task.given:
            found[:, number] *= found[:, names.index(task.given)]
    return found


def ranking_logits(spec: DatasetSpec, logits_NT: np.ndarray) -> np.ndarray:
    """Return the logits that candidates are ordered by, float64, N. Where one task alone is
    ranked by and none is given, it is that task's logit, unchanged.
    """
    weights = spec.weights
    names = [task.name for task in spec.tasks]
    (first, _), *more = weights.items()
    if not more and not spec.tasks[names.index(first)].given:
        return logits_NT[:, names.index(first)].astype(np.float64)
    each = probabilities(spec, logits_NT)
    total = sum(weight * each[:, names.index(name)] for name, weight in weights.items())
    score = np.clip(total / sum(weights.values()), SMALLEST, 1 - SMALLEST)
    return np.log(score) - np.log1p(-score)


def weighted(spec: DatasetSpec, values: list[float]) -> float:
    """Weighted mean of a figure over the tasks that define it; NaN if no task does."""
    weights = np.array([spec.weights.get(task.name, 0.0) for task in spec.tasks])
    found = np.array(values)
    known = ~np.isnan(found) & (weights > 0)
    if not known.any():
        return float("nan")
    return float((found[known] * weights[known]).sum() / weights[known].sum())


def sampling_shift(spec: DatasetSpec, train: np.ndarray, validation: np.ndarray) -> np.ndarray:
    """Return what to add to each task's logits so that they are probabilities of a period that is
    evaluated, T values: where negatives are drawn, training draws some for each positive and
    evaluation as many for each request, so that the share of positives differs. 0 where the log says
    what was shown, and of a task that is given another one, for which nothing is drawn.

    Args:
        train, validation: labels of all candidates of a period, N × T, NaN where undefined.
    """
    shift = np.zeros(len(spec.tasks))
    if spec.requests.examples is not Examples.ACTIONS:
        return shift
    for number, task in enumerate(spec.tasks):
        odds = [_odds(labels[:, number]) for labels in (validation, train)]
        if not task.given and all(odds):
            shift[number] = math.log(odds[0] / odds[1])
    return shift


def _odds(labels: np.ndarray) -> float:
    """Positives for each negative; 0 if either is missing."""
    positive = int((labels == 1).sum())
    negative = int((labels == 0).sum())
    return positive / negative if negative else 0.0


def primary_task(spec: DatasetSpec) -> str:
    """The task that weighs most in what is ranked by; of like ones the first."""
    return max(spec.weights.items(), key=lambda named: named[1])[0]


def primary_number(spec: DatasetSpec) -> int:
    """Its number among the tasks."""
    return [task.name for task in spec.tasks].index(primary_task(spec))
