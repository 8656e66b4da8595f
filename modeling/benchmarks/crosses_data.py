"""Requests of wide categorical fields whose labels rest on declared crosses and on nothing else; what can be reached is
known in closed form.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from math import comb, exp, log
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from modeling.inputs.batch import Batch, Candidates, FeatureSizes, UserInputs
from modeling.inputs.columns import GroupSizes

# Pairs of fields, the request's first: two cross request and candidate, two the candidate's own, two form a chain
PAIRS = ((0, 4), (1, 5), (6, 7), (8, 9), (2, 8), (3, 7))


class Bound(NamedTuple):
    """The figures that nobody can beat, and that a scorer reaches who knows the crosses."""

    auc: float
    log_loss: float


class Drawn(NamedTuple):
    """Requests, and the logits that their labels were drawn by, B × C."""

    batch: Batch
    logits_BC: Tensor


@dataclass(frozen=True)
class Crosses:
    """Settings of the drawn data.

    Each declared pair of fields has a table of signs, values × values: a value of either field meets as many +1 as -1, so
    that no field alone says anything. The pairs form no circle, so that their signs are independent. A
    candidate is positive with probability σ(strength × the sum of its signs).

    Args:
        values: of every field; even.
        tables: seed of the signs.

    Example:
        >>> drawn = Crosses().draw(requests=64, candidates=16, seed=1)
        >>> drawn.batch.labels_BCT.shape
        torch.Size([64, 16, 1])
    """

    values: int = 32
    request_fields: int = 4
    candidate_fields: int = 6
    pairs: tuple[tuple[int, int], ...] = PAIRS
    strength: float = 1.0
    tables: int = 0

    @property
    def sizes(self) -> FeatureSizes:
        def fields(number: int) -> GroupSizes:
            # 0 stands for no value.
            return GroupSizes((self.values + 1,) * number, (1,) * number)

        return FeatureSizes(
            2,
            1,
            1,
            request=fields(self.request_fields),
            candidate=fields(self.candidate_fields),
        )

    @cached_property
    def signs(self) -> np.ndarray:
        """+1 or -1, pairs × values × values."""
        rng = np.random.default_rng([self.tables, self.values])
        half = np.repeat([1.0, -1.0], self.values // 2)
        found = []
        for _ in self.pairs:
            # A circulant of shuffled values: balanced in every row and column, and of full rank for most draws.
            first, second = rng.permutation(self.values), rng.permutation(self.values)
            found.append(rng.permutation(half)[(first[:, None] + second) % self.values])
        return np.stack(found)

    @property
    def bound(self) -> Bound:
        """The figures of a scorer that knows the signs: their sum is binomial."""
        number = len(self.pairs)
        weight = np.array([comb(number, k) for k in range(number + 1)]) / 2**number
        chance = np.array(
            [1 / (1 + exp(-self.strength * (2 * k - number))) for k in range(number + 1)]
        )
        positive = weight * chance / (weight @ chance)
        negative = weight * (1 - chance) / (weight @ (1 - chance))
        below = np.r_[0, np.cumsum(negative)[:-1]]
        entropy = [-p * log(p) - (1 - p) * log(1 - p) for p in chance]
        return Bound(float(positive @ (below + negative / 2)), float(weight @ np.array(entropy)))

    def draw(self, requests: int, candidates: int, seed: int) -> Drawn:
        """Requests that no other seed draws; candidates of a request share its fields."""
        rng = np.random.default_rng([seed, self.tables, 3])
        asked = rng.integers(0, self.values, (requests, self.request_fields))
        offered = rng.integers(0, self.values, (requests, candidates, self.candidate_fields))
        every = np.concatenate([np.repeat(asked[:, None], candidates, axis=1), offered], axis=2)
        logits = self.strength * sum(
            self.signs[number, every[..., first], every[..., second]]
            for number, (first, second) in enumerate(self.pairs)
        )
        labels = rng.random(logits.shape) < 1 / (1 + np.exp(-logits))
        user = UserInputs(
            item_BL=torch.zeros(requests, 1, dtype=torch.long),
            action_BL=torch.zeros(requests, 1, dtype=torch.long),
            age_BL=torch.zeros(requests, 1),
            gap_BL=torch.zeros(requests, 1),
            event_BLE=torch.zeros(requests, 1, 0),
            mask_BL=torch.zeros(requests, 1, dtype=torch.bool),
            field_BU=torch.from_numpy(asked + 1),
            dense_BG=torch.zeros(requests, 0),
        )
        chosen = Candidates(
            item_BC=torch.ones(requests, candidates, dtype=torch.long),
            category_BCK=torch.from_numpy(offered + 1),
            dense_BCF=torch.zeros(requests, candidates, 0),
            mask_BC=torch.ones(requests, candidates, dtype=torch.bool),
        )
        batch = Batch(user, chosen, torch.from_numpy(labels)[..., None].float())
        return Drawn(batch, torch.from_numpy(logits))
