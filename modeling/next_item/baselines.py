"""Scorers that need no training by gradients, on the same targets as a next-item model: how often an item was taken,
what followed the last one, and EASE.

All are fitted on training events alone; a history is every event before the target, as for a model.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from modeling.evaluation.item_graphs import EASE, Ease
from modeling.next_item import leave_one_out
from modeling.next_item.leave_one_out import Scorer
from modeling.next_item.sequences import Sequences

POPULARITY = "popularity"
FOLLOWERS = "what followed the last item"
# Catalogues up to which EASE is fitted: it inverts a matrix of as many squared
EASE_CATALOGUE = 8_192
# So little that it parts equal numbers and no others
TIE = 1e-6


class Popularity(Scorer):
    """How often training has an item."""

    def __init__(self, sequences: Sequences) -> None:
        trained = sequences.items[_is_trained(sequences)].astype(np.int64) - 1
        self.count_I = torch.from_numpy(
            np.bincount(trained, minlength=sequences.num_items).astype(np.float32)
        )

    def scores(self, sequences: Sequences, starts: np.ndarray, stops: np.ndarray) -> Tensor:
        return self.count_I.expand(len(starts), -1).clone()


class Followers(Scorer):
    """How often an item came right behind the last one of a history; among equals the popular one first."""

    def __init__(self, sequences: Sequences) -> None:
        from scipy import sparse

        items = sequences.num_items
        rows = np.flatnonzero(_is_trained(sequences))
        # Not a user's first event, which is behind another user's last.
        rows = rows[~np.isin(rows, sequences.offsets[:-1])]
        before = sequences.items[rows - 1] - 1
        behind = sequences.items[rows] - 1
        # Doubles: beside a large count the share of the popular one would be lost in single precision.
        count = np.ones(len(rows), np.float64)
        self._followed = sparse.csr_matrix((count, (before, behind)), shape=(items, items))
        popular = Popularity(sequences).count_I.double()
        self._tie_I = TIE * popular / popular.max().clamp(min=1)

    def scores(self, sequences: Sequences, starts: np.ndarray, stops: np.ndarray) -> Tensor:
        last = sequences.items[stops - 1] - 1
        return torch.from_numpy(self._followed[last].toarray()) + self._tie_I


class EaseScorer(Scorer):
    """EASE over the items of the whole history (`evaluation/item_graphs.py`)."""

    def __init__(self, sequences: Sequences) -> None:
        trained = _is_trained(sequences)
        owner = np.repeat(np.arange(len(sequences)), sequences.lengths)
        items = sequences.num_items
        self._ease = Ease.fit(owner[trained], sequences.items[trained] - 1, items, most=items)

    def scores(self, sequences: Sequences, starts: np.ndarray, stops: np.ndarray) -> Tensor:
        history = [
            sequences.items[start:stop].astype(np.int64) - 1
            for start, stop in zip(starts, stops, strict=True)
        ]
        everything = np.arange(sequences.num_items)
        found = self._ease.scores(history, [everything] * len(history))
        return torch.from_numpy(np.stack(found).astype(np.float32))


def baseline_metrics(sequences: Sequences) -> dict[str, dict[str, float]]:
    """Metrics of each baseline on the test targets, FULL; EASE only where the catalogue is small enough."""
    kinds: dict[str, Any] = {POPULARITY: Popularity, FOLLOWERS: Followers}
    if sequences.num_items <= EASE_CATALOGUE:
        kinds[EASE] = EaseScorer
    return {
        name: leave_one_out.evaluate(kind(sequences), sequences, "test")
        for name, kind in kinds.items()
    }


def _is_trained(sequences: Sequences) -> np.ndarray:
    """Which events training may see."""
    ends = np.repeat(sequences.training_ends(), sequences.lengths)
    trained: np.ndarray = np.arange(len(sequences.items)) < ends
    return trained
