"""A network and trees as one ranker: a weighted sum of their logits, with the weights under which the validation period
is ranked best.

Trees read counts and no event; a network reads the history. Whether their sum ranks above either is
the data's to say: `evaluate` shows the trees beside it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from modeling import models
from modeling.inputs.batch import Batch, Candidates, FeatureSizes, TrainingSample, UserInputs
from modeling.metrics import auc_by_user, ndcg_at
from modeling.models import base
from modeling.models.base import Ranker, TokenMaker
from modeling.trees.trees import Trees

START = "(all alike)"
# Deviations below it are rounding
ROUNDING = 1e-9
# Mixtures that are tried
SHARES = 21
# Of requests, over which the best mixture is a mean
RESAMPLES = 200


@dataclass(frozen=True)
class UserState:
    """What both keep of the user."""

    network: base.UserState
    trees: base.UserState


class Blend(Ranker):
    """Logits of a network and of trees, summed with a weight each, for each task.

    Example:
        >>> blend = Blend(network, trees)
        >>> blend.weight_T2.fill_(0.5)
        >>> blend(batch).shape
        torch.Size([64, 105, 1])
    """

    weight_T2: Tensor
    shift_T: Tensor

    def __init__(self, network: Ranker, trees: Trees) -> None:
        super().__init__()
        self.network = network
        self.trees = trees
        self.sizes = network.sizes
        self.register_buffer("weight_T2", torch.full((self.sizes.tasks, 2), 0.5))
        self.register_buffer("shift_T", torch.zeros(self.sizes.tasks))

    def fit_statistics(self, sample: TrainingSample) -> None:
        self.network.fit_statistics(sample)

    @property
    def text_names(self) -> tuple[str, ...]:
        return self.trees.text_names

    @property
    def texts(self) -> dict[str, str]:
        return self.trees.texts

    def take_texts(self, texts: Mapping[str, str]) -> None:
        self.trees.take_texts(texts)

    @property
    def token_maker(self) -> TokenMaker | None:
        return self.network.token_maker

    @property
    def can_extend(self) -> bool:
        return self.network.can_extend

    def encode_user(self, user: UserInputs) -> UserState:
        return UserState(self.network.encode_user(user), self.trees.encode_user(user))

    def extend_user(self, user_state: UserState, new_events: UserInputs) -> UserState:
        """The network's state grows; trees take the new request's numbers."""
        extended = self.network.extend_user(user_state.network, new_events)
        return UserState(extended, self.trees.encode_user(new_events))

    def must_refresh(self, user_state: UserState) -> Tensor:
        return self.network.must_refresh(user_state.network)

    def score(self, user_state: UserState, candidates: Candidates) -> Tensor:
        """Score candidates by both. logits_BCT."""
        of_network = self.network.score(user_state.network, candidates)
        of_trees = self.trees.score(user_state.trees, candidates)
        first, second = self.weight_T2.unbind(-1)
        logits: Tensor = of_network * first + of_trees * second + self.shift_T
        return logits

    def training_forward(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """Train the network alone."""
        return self.network.training_forward(batch)


@dataclass(frozen=True)
class Contribution:
    """What a column adds to a candidate's logit by trees.

    Args:
        value: as trees read it; NaN where it is missing.
    """

    name: str
    value: float
    effect: float


def trees_of(model: Ranker) -> Trees | None:
    """The trees that a ranker is, or has beside its network."""
    if isinstance(model, Blend):
        return model.trees
    return model if isinstance(model, Trees) else None


def tree_effects(
    model: Ranker, batch: Batch, names: Sequence[str], task: int
) -> list[Contribution]:
    """What each column adds to the logit of a batch's first candidate, by LightGBM's `pred_contrib` (Lundberg et
    al., 2020); what all candidates start from stands last, as `START`. They sum to what trees add to the logit.

    Args:
        names: of the columns, in order (`columns.column_names`).

    Raises:
        ValueError: the ranker has no trees.
    """
    trees = trees_of(model)
    if trees is None:
        raise ValueError(f"{type(model).__name__} has no trees to explain")
    weight = float(model.weight_T2[task, 1]) if isinstance(model, Blend) else 1.0
    row = trees.columns.of_batch(batch)[:1]
    effects = weight * trees.contributions(row, task)[0]
    values = [*row[0].tolist(), float("nan")]
    named = zip([*names, START], values, effects.tolist(), strict=True)
    return [Contribution(name, value, effect) for name, value, effect in named]


def build_ranker(
    name: str, config: dict[str, Any], sizes: FeatureSizes, trees: dict[str, Any] | None
) -> Ranker:
    """A model by name, blended with trees where they have a config.

    Raises:
        RecipeError: no such model, or a config value that it or the trees do not know.
    """
    network = models.build(name, config, sizes)
    if trees is None:
        return network
    beside = models.build("trees", trees, sizes)
    assert isinstance(beside, Trees)
    return Blend(network, beside)


def best_share(scores_N2: np.ndarray, labels_N: np.ndarray, offsets: np.ndarray) -> float:
    """The share of the first of two scores, each taken for its deviation, under which requests are ranked best: of
    `SHARES` mixtures the one of the best NDCG@10 and AUC within requests together, each over how far the two scores' own
    differ from request to request: NDCG@10, which varies four times as much, would else decide alone. It is the mean
    over resamples of the requests, so that of mixtures as good as one another the middle is taken and not an end; 0
    where no request tells. Likelihood is no guide: trees that learn an order are no probabilities.

    Args:
        labels_N: of requests that neither score was fitted by, nor the second stopped by.
        offsets: request b's candidates are `[offsets[b], offsets[b + 1])`.
    """
    deviation = deviations(scores_N2)
    first = np.linspace(0, 1, SHARES)
    requests = len(offsets) - 1
    owner = np.repeat(np.arange(requests), np.diff(offsets))
    metrics_2SB = np.empty((2, SHARES, requests))
    for row, share in enumerate(first):
        mixed = scores_N2 @ ([share, 1 - share] / deviation)
        metrics_2SB[0, row] = ndcg_at(labels_N, mixed, offsets)
        metrics_2SB[1, row], _ = auc_by_user(labels_N, mixed, owner, requests)
    metrics_2SB = metrics_2SB[:, :, ~np.isnan(metrics_2SB).any(axis=(0, 1))]
    number = metrics_2SB.shape[2]
    if not number:
        return 0.0
    varies_2 = deviations((metrics_2SB[:, -1] - metrics_2SB[:, 0]).T)
    told_SB = metrics_2SB[0] / varies_2[0] + metrics_2SB[1] / varies_2[1]
    alike = np.full(number, 1 / number)
    drawn = np.random.default_rng(0).multinomial(number, alike, RESAMPLES)
    return float(first[(drawn @ told_SB.T).argmax(axis=1)].mean())


def deviations(values_NK: np.ndarray) -> np.ndarray:
    """Standard deviation of each column, K; 1 where all are alike but for rounding, so that to divide by it changes
    nothing.
    """
    deviation = values_NK.std(axis=0)
    return np.where(deviation > ROUNDING, deviation, 1.0)
