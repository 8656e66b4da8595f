"""DCNv2: cross layers beside a deep network (Wang et al., arXiv 2008.13535)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import relu

from modeling.baselines import base
from modeling.layers.interaction import SplitLinear


@dataclass(frozen=True)
class Config(base.Config):
    """`rank` 0 keeps the cross matrices whole."""

    num_layers: int = 2
    rank: int = 0
    hidden: int = 128


class DCNv2(base.Baseline):
    """x_{l+1} = x_0 ⊙ (W x_l + b) + x_l, parallel to a deep layer."""

    config: Config

    def make_interaction(self, request: int, candidate: int) -> base.Interaction:
        """Cross and deep in parallel."""
        return CrossAndDeep(request, candidate, self.config)


class CrossAndDeep(base.Interaction):
    """The first cross and the deep layer multiply the request's half once per request."""

    def __init__(self, request: int, candidate: int, config: Config) -> None:
        super().__init__()
        known, rest = request * config.width, candidate * config.width
        width, rank = known + rest, config.rank
        self.first: nn.Module = SplitLinear(known, rest, rank or width)
        self.first_up = nn.Linear(rank, width) if rank else None
        self.crosses = nn.ModuleList(
            nn.Sequential(nn.Linear(width, rank, bias=False), nn.Linear(rank, width))
            if rank
            else nn.Linear(width, width)
            for _ in range(config.num_layers - 1)
        )
        self.deep = SplitLinear(known, rest, config.hidden)
        self.out = (0, width + config.hidden)

    def forward(self, request_BRD: Tensor, candidate_BCND: Tensor) -> tuple[Tensor | None, Tensor]:
        """Nothing of the request, all of the candidate."""
        start = base.all_tokens(request_BRD, candidate_BCND).flatten(2)
        request, candidate = request_BRD.flatten(1), candidate_BCND.flatten(2)
        crossed = self.first(request, candidate)
        crossed = start * (crossed if self.first_up is None else self.first_up(crossed)) + start
        for cross in self.crosses:
            crossed = torch.addcmul(crossed, start, cross(crossed))
        return None, torch.cat([crossed, relu(self.deep(request, candidate))], dim=-1)
