"""DCNv2: cross layers beside a deep network (Wang et al., arXiv 2008.13535)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import relu

from modeling.baselines import base
from modeling.layers.interaction import CrossNetwork, Interaction, SplitLinear


@dataclass(frozen=True)
class Config(base.Config):
    """`rank` 0 keeps the cross matrices whole."""

    num_layers: int = 2
    rank: int = 0
    hidden: int = 128


class DCNv2(base.Baseline):
    """x_{l+1} = x_0 ⊙ (W x_l + b) + x_l, parallel to a deep layer."""

    config: Config

    def make_interaction(self, request: int, candidate: int) -> Interaction:
        return CrossAndDeep(request, candidate, self.config)


class CrossAndDeep(Interaction):
    """Both multiply the request's half once per request."""

    def __init__(self, request: int, candidate: int, config: Config) -> None:
        super().__init__()
        width = config.width
        self.cross = CrossNetwork(request, candidate, width, config.num_layers, config.rank)
        self.deep = SplitLinear(request * width, candidate * width, config.hidden)
        self.out = (0, self.cross.out[1] + config.hidden)

    def forward(self, request_BRD: Tensor, candidate_BCND: Tensor) -> tuple[Tensor | None, Tensor]:
        """Nothing of the request, all of the candidate."""
        _, crossed = self.cross(request_BRD, candidate_BCND)
        return None, torch.cat(
            [crossed, relu(self.deep(request_BRD.flatten(1), candidate_BCND.flatten(2)))], dim=-1
        )
