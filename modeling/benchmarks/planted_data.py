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

from modeling.inputs.batch import Batch, Candidates, FeatureSizes, UserInputs

DAYS = 1000.0  # that a history spans


@dataclass(frozen=True)
class Planted:
    """Settings of the drawn data.

    Args:
        events: of each history.
        planted: share of the history, its oldest part, that holds the signal.
        strength: share of that part's events which belong to liked groups by intent.
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
    def kinds(self) -> int:
        """Item i is of kind i modulo these: its group."""
        return self.groups

    @property
    def sizes(self) -> FeatureSizes:
        return FeatureSizes(self.items, 1, self.events)

    @property
    def attainable_auc(self) -> float:
        """AUC of a scorer that knows the liked groups; half of the candidates are of one."""
        return attainable_auc(self.positive)

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
        # However many events, they are of the same years.
        gap = np.full(self.events, DAYS / self.events, np.float32)
        return _batch(history, gap, item, label, newest), torch.from_numpy(good)


@dataclass(frozen=True)
class PlantedPairs:
    """Requests whose labels depend on the candidate and on what followed what, long ago.

    There are R kinds of habit. A session is an event of A_r and, a minute later, one of some B_s.
    Of a user's old sessions those of held habits end in their own B_r, those of the others in each
    other's; the newest sessions end in any. Every A and every B comes once in R sessions, of every
    user: counts say nothing, in whatever window and however they fade. A candidate C_r is positive
    with one probability where its habit is held, and with a smaller one where it is not.

    Items 0 … 3R · `each` - 1: item i is of kind i mod 3R; the kinds are A_0 … A_{R-1}, B_0 …, C_0 ….

    Args:
        events: of each history, rounded down to whole blocks of R sessions of two.
        habits: R, an even number; a user holds half of them.
        each: items of a kind.
        planted: share of the history, its oldest part, that holds the signal.
        positive: probability of a positive label where a habit is held, and where it is not.

    Example:
        >>> batch, held = PlantedPairs(events=1000).draw(users=4, candidates=20, seed=1)
    """

    events: int
    habits: int = 8
    each: int = 8
    planted: float = 0.5
    positive: tuple[float, float] = (0.7, 0.1)

    @property
    def kinds(self) -> int:
        """Item i is of kind i modulo these."""
        return 3 * self.habits

    @property
    def sizes(self) -> FeatureSizes:
        return FeatureSizes(self.kinds * self.each, 1, self.events)

    @property
    def attainable_auc(self) -> float:
        """AUC of a scorer that knows the habits; half of the candidates are of a held one."""
        return attainable_auc(self.positive)

    def draw(
        self, users: int, candidates: int, seed: int, newest: int | None = None
    ) -> tuple[Batch, Tensor]:
        """Requests of users that no other seed draws.

        Args:
            newest: only so many events of each history, the newest ones; default: all.

        Returns:
            The batch, and which candidates are of held habits, bool B × C.
        """
        rng = np.random.default_rng([seed, self.events, 2])
        number = self.habits
        # 1. Which B ends a session of each A: its own where the habit is held; the others' are
        # passed round among those that are not.
        order = rng.permuted(np.tile(np.arange(number), (users, 1)), axis=1)
        held = order[:, : number // 2]
        others = order[:, number // 2 :]
        ends = np.tile(np.arange(number), (users, 1))
        np.put_along_axis(ends, others, np.roll(others, 1, axis=1), axis=1)

        # 2. Sessions, the old ones by habit. Every block of R sessions has every A and every B once:
        # were they drawn one by one, held habits would show in how counts of A and B differ.
        blocks = self.events // (2 * number)
        sessions = blocks * number
        every = np.tile(np.arange(number), (users, blocks, 1))
        first = rng.permuted(every, axis=2).reshape(users, sessions)
        second = np.take_along_axis(ends, first, axis=1)
        old = np.arange(sessions) < round(self.planted * blocks) * number
        anyhow = rng.permuted(every, axis=2).reshape(users, sessions)
        second = np.where(old, second, anyhow)
        kinds = np.stack([first, number + second], axis=2).reshape(users, 2 * sessions)
        history = kinds + 3 * number * rng.integers(0, self.each, kinds.shape)

        # 3. Candidates of held habits and of others, alike many.
        good = rng.random((users, candidates)) < 0.5
        drawn = rng.integers(0, number // 2, (users, candidates))
        habit = np.where(
            good, np.take_along_axis(held, drawn, 1), np.take_along_axis(others, drawn, 1)
        )
        item = 2 * number + habit + 3 * number * rng.integers(0, self.each, habit.shape)
        label = rng.random(item.shape) < np.where(good, *self.positive)
        gap = np.where(np.arange(2 * sessions) % 2, 1 / 1440, DAYS / sessions).astype(np.float32)
        gap[0] = 0
        return _batch(history, gap, item, label, newest), torch.from_numpy(good)


def attainable_auc(positive: tuple[float, float]) -> float:
    """Return the AUC of a scorer that knows which candidates are good, if half of them are.

    Args:
        positive: probability of a positive label of a good candidate, and of a bad one.
    """
    high, low = positive
    of_positives = high / (high + low)
    of_negatives = (1 - high) / (2 - high - low)  # that are of liked groups
    ties = of_positives * of_negatives + (1 - of_positives) * (1 - of_negatives)
    return of_positives * (1 - of_negatives) + ties / 2


def _batch(
    history: np.ndarray,
    gap_days: np.ndarray,
    item: np.ndarray,
    label: np.ndarray,
    newest: int | None,
) -> Batch:
    """Histories of items alone, and their candidates, as a batch.

    Args:
        gap_days: days before each event, alike for all users.
    """
    start = 0 if newest is None else max(history.shape[1] - newest, 0)
    kept = torch.from_numpy(history[:, start:])
    days = torch.from_numpy(gap_days.sum() - np.cumsum(gap_days))[start:].float()
    gaps = torch.from_numpy(gap_days)[start:].clone()
    gaps[:1] = 0
    users = len(history)
    user = UserInputs(
        item_BL=kept,
        action_BL=torch.zeros_like(kept),
        age_BL=days.log1p().expand(kept.shape).contiguous(),
        gap_BL=gaps.log1p().expand(kept.shape).contiguous(),
        event_BLE=torch.zeros(*kept.shape, 0),
        mask_BL=torch.ones(kept.shape, dtype=torch.bool),
        field_BU=torch.zeros(users, 0, dtype=torch.long),
        dense_BG=torch.zeros(users, 0),
    )
    chosen = Candidates(
        item_BC=torch.from_numpy(item),
        category_BCK=torch.zeros(*item.shape, 0, dtype=torch.long),
        dense_BCF=torch.zeros(*item.shape, 0),
        mask_BC=torch.ones(item.shape, dtype=torch.bool),
    )
    return Batch(user, chosen, torch.from_numpy(label)[..., None].float())
