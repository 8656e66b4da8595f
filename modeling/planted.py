"""Planted-signal requests: what a user likes shows only in events long ago, and the AUC that can be
reached is known.

Items fall into groups, item i into group i mod G. A user likes a few groups. Of the oldest events a
share is of liked groups; all other events, the newest ones among them, are of any. A candidate of a
liked group is positive with one probability, any other with a smaller one. So a ranker that reads
the newest events only is at chance, and none can beat `attainable_auc`, which knows the liked
groups.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from modeling.batch import Batch, Candidates, FeatureSizes, UserInputs

DAYS = 1000.0  # that a history spans


@dataclass(frozen=True)
class Planted:
    """What is drawn.

    Args:
        events: of each history.
        planted: share of the history, its oldest part, that holds the signal.
        strength: share of that part's events which are of liked groups by intent.
        positive: probability of a positive label in liked groups, and in others.
    """

    events: int
    items: int = 1024
    groups: int = 16
    liked: int = 4
    planted: float = 0.5
    strength: float = 0.5
    positive: tuple[float, float] = (0.7, 0.1)

    @property
    def sizes(self) -> FeatureSizes:
        """Items and nothing else."""
        return FeatureSizes(self.items, 1, self.events)

    @property
    def attainable_auc(self) -> float:
        """AUC of whoever knows the liked groups; half of the candidates are of one."""
        high, low = self.positive
        of_positives, of_negatives = (
            high / (high + low),
            (1 - high) / (2 - high - low),
        )  # that are of liked groups
        ties = of_positives * of_negatives + (1 - of_positives) * (1 - of_negatives)
        return of_positives * (1 - of_negatives) + ties / 2

    def draw(
        self, users: int, candidates: int, seed: int, newest: int | None = None
    ) -> tuple[Batch, Tensor]:
        """Requests of users that no other seed draws.

        Args:
            newest: only so many events of each history, the newest ones; default: all.

        Returns:
            The batch, and which candidates are of liked groups, bool B × C.
        """
        rng = np.random.default_rng([seed, self.events])
        liked = rng.permuted(np.tile(np.arange(self.groups), (users, 1)), axis=1)[:, : self.liked]
        history = rng.integers(0, self.items, (users, self.events))
        old = int(self.planted * self.events)
        chosen = np.take_along_axis(liked, rng.integers(0, self.liked, (users, old)), 1)
        intended = history[:, :old] // self.groups * self.groups + chosen
        history[:, :old] = np.where(
            rng.random((users, old)) < self.strength, intended, history[:, :old]
        )
        item = rng.integers(0, self.items, (users, candidates))
        rest = rng.permuted(np.tile(np.arange(self.groups), (users, 1)), axis=1)
        is_liked = (rest[:, :, None] == liked[:, None]).any(-1)
        others = rest[~is_liked].reshape(users, -1)
        good = rng.random((users, candidates)) < 0.5
        group = np.where(
            good,
            np.take_along_axis(liked, rng.integers(0, self.liked, item.shape), 1),
            np.take_along_axis(others, rng.integers(0, others.shape[1], item.shape), 1),
        )
        item = item // self.groups * self.groups + group
        label = rng.random(item.shape) < np.where(good, *self.positive)
        start = 0 if newest is None else max(self.events - newest, 0)
        kept = torch.from_numpy(history[:, start:])
        days = torch.linspace(DAYS, 0, self.events)[
            start:
        ]  # however many events, they are of the same years
        age = days.log1p().expand(kept.shape)
        user = UserInputs(
            item_BL=kept,
            action_BL=torch.zeros_like(kept),
            age_BL=age.contiguous(),
            gap_BL=torch.full(kept.shape, DAYS / self.events).log1p(),
            event_BLE=torch.zeros(*kept.shape, 0),
            mask_BL=torch.ones(kept.shape, dtype=torch.bool),
            field_BU=torch.zeros(users, 0, dtype=torch.long),
            dense_BG=torch.zeros(users, 0),
        )
        chosen_items = Candidates(
            item_BC=torch.from_numpy(item),
            category_BCK=torch.zeros(*item.shape, 0, dtype=torch.long),
            dense_BCF=torch.zeros(*item.shape, 0),
            mask_BC=torch.ones(item.shape, dtype=torch.bool),
        )
        return Batch(
            user, chosen_items, torch.from_numpy(label)[..., None].float()
        ), torch.from_numpy(good)
