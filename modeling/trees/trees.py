"""Trees as a ranker: one forest for each task, calibrated so that its sum is a logit.

A forest reads numbers and categories of the request and of the candidate (`columns.py`): statistics, matches
between history and candidate, the sketch. It reads no event itself; a network beside it does (`blend.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from modeling.inputs.batch import Candidates, FeatureSizes, TrainingSample, UserInputs
from modeling.models.base import Ranker
from modeling.trees.columns import TreeColumns
from modeling.trees.fitting import TreesConfig as Config
from modeling.trees.forest import Forest

__all__ = ["Config", "Trees", "UserState"]


@dataclass(frozen=True)
class UserState:
    """The request's numbers and categories, as they are."""

    user: UserInputs


class Trees(Ranker):
    """Scores by forests.

    Example:
        >>> trees = Trees(Config(), encoder.sizes)
        >>> trees.take_texts({"trees-0.txt": booster.model_to_string()})
        >>> trees(batch).shape
        torch.Size([64, 105, 1])

    Attributes:
        scale_T, shift_T: of each task's sum, after which it is a logit (Platt, 1999).
    """

    scale_T: Tensor
    shift_T: Tensor

    def __init__(self, config: Config, sizes: FeatureSizes) -> None:
        super().__init__()
        self.config = config
        self.sizes = sizes
        self.columns = TreeColumns.of(sizes)
        self.forests: tuple[Forest, ...] = ()
        # By task, for explanations
        self._boosters: dict[int, Any] = {}
        self.register_buffer("scale_T", torch.ones(sizes.tasks, dtype=torch.float64))
        self.register_buffer("shift_T", torch.zeros(sizes.tasks, dtype=torch.float64))

    def fit_statistics(self, sample: TrainingSample) -> None:
        """Trees need no scales."""

    @property
    def text_names(self) -> tuple[str, ...]:
        return tuple(f"trees-{task}.txt" for task in range(self.sizes.tasks))

    @property
    def texts(self) -> dict[str, str]:
        return {n: forest.text for n, forest in zip(self.text_names, self.forests, strict=True)}

    def take_texts(self, texts: Mapping[str, str]) -> None:
        """Take each task's forest.

        Raises:
            ForestError: a text holds none that is read here.
            ValueError: one reads other columns than there are.
        """
        forests = tuple(Forest(texts[name]) for name in self.text_names)
        number = self.columns.numbers + len(self.columns.categories)
        for name, forest in zip(self.text_names, forests, strict=True):
            if len(forest.names) != number:
                raise ValueError(
                    f"{name} reads {len(forest.names)} columns, this contract has {number}: train and export again"
                )
        self.forests = forests
        self._boosters = {}

    def contributions(self, rows_NF: np.ndarray, task: int) -> np.ndarray:
        """What each column adds to a logit, N × (columns + 1); the last is where every candidate starts. Rows sum
        to logits.
        """
        import lightgbm

        # Reading a text takes longer than a request may.
        if task not in self._boosters:
            self._boosters[task] = lightgbm.Booster(model_str=self.forests[task].text)
        found = np.asarray(self._boosters[task].predict(rows_NF, pred_contrib=True, num_threads=1))
        scaled: np.ndarray = found * float(self.scale_T[task])
        scaled[:, -1] += float(self.shift_T[task])
        return scaled

    def encode_user(self, user: UserInputs) -> UserState:
        """Trees read no events, and are walked on the host."""
        return UserState(user.events(0, 0).to("cpu"))

    def score(self, user_state: UserState, candidates: Candidates) -> Tensor:
        """Score candidates of a request together. logits_BCT."""
        rows_BCF = self.columns.rows(user_state.user, candidates.to("cpu"))
        flat = rows_BCF.flatten(0, 1).numpy()
        sums_NT = np.stack([forest.scores(flat) for forest in self.forests], axis=1)
        sums = torch.from_numpy(sums_NT).to(self.scale_T.device)
        logits: Tensor = (sums * self.scale_T + self.shift_T).float()
        return logits.unflatten(0, rows_BCF.shape[:2])
