"""Item graphs that need a log and no training by gradients, as further baselines of a comparison: two steps along the
neighbours of items, and EASE.

Both read which items a user has had by the request, and nothing else. They know items by the histories of all users
before the validation period, as relations do (`inputs/relations.py`).
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import numpy as np

from feature_repo.contract.arrow import iso_micros
from feature_repo.history.history import HistoryLog
from modeling.inputs.relations import Relations
from modeling.training_set.dataset import Warehouse
from modeling.training_set.item_relations import items_by_user
from modeling.training_set.training_set import Period

TWO_STEPS = "item graph, two steps"
EASE = "EASE"
# Requests scored at a time
CHUNK = 256
# Items that EASE knows, those of the most users: its weights are as many squared
EASE_ITEMS = 4_096
# Added to the diagonal of EASE's Gram matrix, as its paper does where users are thousands
EASE_L2 = 250.0


def two_steps(
    relations: Relations, history: list[np.ndarray], candidates: list[np.ndarray]
) -> list[np.ndarray]:
    """A walk of at most two steps from the items of each history: the chance to stand on each candidate after one step,
    and after two. An item graph that nothing trained ties or wins on ten of fourteen public logs (arXiv 2605.07125).

    Args:
        relations: their newest slice is walked.
        history: rows of the items of each request's history, each once.
        candidates: rows of each request's candidates.
    """
    step = _steps(relations)
    scores = []
    for start in range(0, len(history), CHUNK):
        begun = _one_hot(history[start : start + CHUNK], step.shape[0])
        once = begun @ step
        reached = once + once @ step
        for place, rows in enumerate(candidates[start : start + CHUNK]):
            at = reached[place]
            dense = np.zeros(step.shape[0], np.float32)
            dense[at.indices] = at.data
            scores.append(dense[rows])
    return scores


def _steps(relations: Relations) -> Any:
    """From each item to its neighbours, by strength."""
    from scipy import sparse

    [one] = relations.newest().slices
    items = len(relations.ids) + 1
    most = one.neighbours_IK.shape[1]
    there = one.neighbours_IK.ravel() > 0
    rows = np.arange(len(one.neighbours_IK)).repeat(most)[there]
    strengths = one.strengths_IK.ravel()[there].astype(np.float32)
    total = np.bincount(rows, strengths, items)
    return sparse.csr_matrix(
        (strengths / total[rows], (rows, one.neighbours_IK.ravel()[there])), shape=(items, items)
    )


def _one_hot(histories: list[np.ndarray], items: int) -> Any:
    from scipy import sparse

    owner = np.repeat(np.arange(len(histories)), [len(rows) for rows in histories])
    rows = np.concatenate([np.zeros(0, np.int64), *histories])
    return sparse.csr_matrix(
        (np.ones(len(rows), np.float32), (owner, rows)), shape=(len(histories), items)
    )


class Ease:
    """EASE (Steck 2019, equation 8): each item's score is a weighted sum over the items of the history, the weights in
    closed form, none from an item to itself.

    Example:
        >>> ease = Ease.fit(np.array([0, 0, 1, 1, 2]), np.array([1, 2, 1, 2, 2]), 3)
        >>> ease.scores([np.array([1])], [np.array([2])])[0].shape
        (1,)

    Args:
        place: of each item among those that it knows; -1 of the others.
        weights: from and to each item that it knows.
    """

    def __init__(self, place: np.ndarray, weights: np.ndarray) -> None:
        self.place = place
        self.weights = weights

    @staticmethod
    def fit(
        user: np.ndarray, item: np.ndarray, items: int, most: int = EASE_ITEMS, l2: float = EASE_L2
    ) -> Ease:
        """Weights of the items that most users have.

        Args:
            user, item: each pair once.
            items: how many there are.
        """
        from scipy import sparse

        often = np.argsort(-np.bincount(item, minlength=items), kind="stable")[:most]
        place = np.full(items, -1)
        place[often] = np.arange(len(often))
        kept = place[item] >= 0
        everybody, row = np.unique(user[kept], return_inverse=True)
        had = sparse.csr_matrix(
            (np.ones(len(row), np.float32), (row, place[item[kept]])),
            shape=(len(everybody), len(often)),
        )
        gram = (had.T @ had).toarray().astype(np.float64)
        gram[np.diag_indices_from(gram)] += l2
        inverse = np.linalg.inv(gram)
        weights = -inverse / np.diag(inverse)
        np.fill_diagonal(weights, 0)
        return Ease(place, weights.astype(np.float32))

    def scores(self, history: list[np.ndarray], candidates: list[np.ndarray]) -> list[np.ndarray]:
        """Scores of each request's candidates; 0 of an item that it does not know.

        Args:
            history: items of each request's history, each once.
        """
        found = []
        for own, rows in zip(history, candidates, strict=True):
            known = self.place[own]
            summed = self.weights[known[known >= 0]].sum(axis=0)
            at = self.place[rows]
            found.append(np.where(at >= 0, np.append(summed, 0)[at], 0))
        return found


def graph_baselines(
    warehouse: Warehouse, relations: Relations, period: Period
) -> dict[str, np.ndarray]:
    """Both baselines on a period's candidates, by name.

    Args:
        relations: that the period was encoded with.
    """
    log = warehouse.log
    offsets = period.encoded.candidate_offsets
    asked = np.split(np.asarray(period.relation_rows), offsets[1:-1])
    row_of = relations.rows_of(log.items)
    had = [rows[rows > 0] for rows in _had_by(log, row_of, period)]
    until = iso_micros(warehouse.contract.spec.requests.validation_from)
    user, item = items_by_user(log, until)
    known = row_of[item] > 0
    ease = Ease.fit(user[known], row_of[item[known]], len(relations.ids) + 1)
    return {
        TWO_STEPS: np.concatenate(two_steps(relations, had, asked)),
        EASE: np.concatenate(ease.scores(had, asked)),
    }


def _had_by(log: HistoryLog, row_of: np.ndarray, period: Period) -> Iterator[np.ndarray]:
    """Rows of the different items of each request's history, as far as it is visible."""
    for start in range(0, len(period.encoded), CHUNK):
        chosen = np.arange(start, min(start + CHUNK, len(period.encoded)))
        histories = period.encoded.gather(chosen, int(log.lengths.max(initial=1)))
        for first, last in pairwise(histories.offsets.tolist()):
            yield np.unique(row_of[histories.item_keys[first:last]])
