"""Mean pool and a network: each action's mean item beside all other features, through two layers.

Any reading of a history must beat it: it forgets which item was when.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.functional import gelu

from modeling.baselines import base
from modeling.layers.interaction import Interaction, SplitLinear
from modeling.layers.reader import History


@dataclass(frozen=True)
class Config(base.Config):
    """`hidden` units of the first layer; the heads are the second."""

    history: History = "bags"
    hidden: int = 128


class MeanPool(base.Baseline):
    """See the module docstring."""

    config: Config

    def make_interaction(self, request: int, candidate: int) -> Interaction:
        return Together(request, candidate, self.config)


class Together(Interaction):
    """All tokens side by side through a layer; the request's half is multiplied once per request."""

    def __init__(self, request: int, candidate: int, config: Config) -> None:
        super().__init__()
        width = config.width
        hidden = config.hidden
        self.first = SplitLinear(request * width, candidate * width, hidden)
        self.dropout = nn.Dropout(config.dropout)
        self.out = (0, hidden)

    def forward(self, request_BRD: Tensor, candidate_BCND: Tensor) -> tuple[None, Tensor]:
        hidden = gelu(self.first(request_BRD.flatten(1), candidate_BCND.flatten(2)))
        return None, self.dropout(hidden)
