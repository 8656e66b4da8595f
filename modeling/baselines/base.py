"""A baseline: feature tokens and a token read from the history → an interaction → the heads that
all models share.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from modeling.inputs.batch import Candidates, FeatureSizes, UserInputs
from modeling.layers.features import FeatureTokens
from modeling.layers.interaction import Interaction, TaskHeads
from modeling.layers.reader import History, HistoryReader, with_read
from modeling.models.base import Ranker


@dataclass(frozen=True)
class Config:
    """Fields of every baseline's config."""

    width: int = 32
    history: History = "din"
    history_hidden: int = 16
    # Events like the candidate are found by their codes (`layers/matching.py`); False: the papers' attention
    matching: bool = True
    # None: twice the width
    head_hidden: int | None = None
    dropout: float = 0.0


@dataclass(frozen=True)
class UserState:
    """The request's tokens, and what the history reader prepared."""

    request_BRD: Tensor
    history: Any


class Baseline(Ranker):
    """See the module docstring."""

    def __init__(self, config: Config, sizes: FeatureSizes) -> None:
        super().__init__()
        self.config = config
        self.sizes = sizes
        self.features = FeatureTokens(sizes, config.width, bags=True)
        self.reader = None
        if config.history != "bags":
            self.reader = HistoryReader(
                config.width,
                sizes.actions,
                self.features.events.size,
                config.history,
                config.history_hidden,
                matching=config.matching,
            )
        number = self.features.num_candidate + (self.reader is not None)
        self.interaction = self.make_interaction(self.features.num_request, number)
        self.heads = TaskHeads(
            *self.interaction.out,
            config.head_hidden or 2 * config.width,
            sizes.tasks,
            config.dropout,
        )

    @abstractmethod
    def make_interaction(self, request: int, candidate: int) -> Interaction:
        """The interaction of so many request and candidate tokens."""

    def encode_user(self, user: UserInputs) -> UserState:
        """The request's tokens and the history's half of the reader."""
        items = self.features.item(user.item_BL)
        request = self.features.request(user, items_BLD=items)
        return UserState(
            request,
            None
            if self.reader is None
            else self.reader.prepare(user, items, self.features.events(user)),
        )

    def score(self, user_state: UserState, candidates: Candidates) -> Tensor:
        tokens = with_read(self.features.candidates(candidates), self.reader, user_state.history)
        logits: Tensor = self.heads(*self.interaction(user_state.request_BRD, tokens))
        return logits
