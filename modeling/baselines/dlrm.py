"""DLRM: dot products of all pairs of fields (Naumov et al., arXiv 1906.00091)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from modeling.baselines import base
from modeling.layers.interaction import DotInteraction, Interaction


@dataclass(frozen=True)
class Config(base.Config):
    """Pooled sequences and target attention unless told otherwise."""


class DLRM(base.Baseline):
    """Pairs and the fields themselves go to the heads."""

    def make_interaction(self, request: int, candidate: int) -> Interaction:
        return Dot(request, candidate, self.config.width)


class Dot(Interaction):
    """Pairs beside fields."""

    def __init__(self, request: int, candidate: int, width: int) -> None:
        super().__init__()
        self.dot = DotInteraction(request, candidate)
        self.out = (
            self.dot.request_pairs.shape[1] + request * width,
            self.dot.pairs.shape[1] + candidate * width,
        )

    def forward(self, request_BRD: Tensor, candidate_BCND: Tensor) -> tuple[Tensor | None, Tensor]:
        within, across = self.dot(request_BRD, candidate_BCND)
        return (
            torch.cat([within, request_BRD.flatten(1)], dim=-1),
            torch.cat([across, candidate_BCND.flatten(2)], dim=-1),
        )
