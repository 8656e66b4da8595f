"""From the logits of all tasks to what is ranked by.

A task that is given another one has the conditional probability as its logit (bought once clicked);
its own probability is the product along the chain. The score is the mean of the tasks'
probabilities under the weights that the dataset declares (`SPEC.rank_by`).
"""

from __future__ import annotations

import numpy as np

from feature_repo.contract.schema import DatasetSpec

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
