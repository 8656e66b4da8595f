"""Wukong: stacked factorisation machines beside linear compression (Zhang et al., arXiv
2403.02545).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import relu

from modeling.baselines import base
from modeling.layers.interaction import Interaction, all_tokens


@dataclass(frozen=True)
class Config(base.Config):
    """Each layer gives `fm_tokens` interacted and `linear_tokens` compressed tokens."""

    num_layers: int = 2
    fm_tokens: int = 8
    linear_tokens: int = 8
    # Columns of Y in X (X^T Y)
    fm_rank: int = 8
    hidden: int = 128


class Wukong(base.Baseline):
    """X_{l+1} = LN([FMB(X_l), LCB(X_l)] + residual)."""

    config: Config

    def make_interaction(self, request: int, candidate: int) -> Interaction:
        return Stack(request + candidate, self.config)


class Stack(Interaction):
    """Layers; the residual is compressed linearly where the number of tokens changes."""

    def __init__(self, tokens: int, config: Config) -> None:
        super().__init__()
        after = config.fm_tokens + config.linear_tokens
        sizes = [tokens, *[after] * config.num_layers]
        self.layers = nn.ModuleList(Layer(size, config) for size in sizes[:-1])
        self.out = (0, after * config.width)

    def forward(self, request_BRD: Tensor, candidate_BCND: Tensor) -> tuple[Tensor | None, Tensor]:
        """Nothing of the request, all of the candidate."""
        rows = all_tokens(request_BRD, candidate_BCND)
        for layer in self.layers:
            rows = layer(rows)
        return None, rows.flatten(2)


class Layer(nn.Module):
    """FMB: a network over X (X^T Y); LCB: W_L X."""

    def __init__(self, tokens: int, config: Config) -> None:
        super().__init__()
        width = config.width
        after = config.fm_tokens + config.linear_tokens
        self.width = width
        self.project = nn.Parameter(torch.randn(tokens, config.fm_rank) * tokens**-0.5)
        self.machine = nn.Sequential(
            nn.LayerNorm(tokens * config.fm_rank),
            nn.Linear(tokens * config.fm_rank, config.hidden),
            nn.ReLU(),
            nn.Linear(config.hidden, config.fm_tokens * width),
        )
        self.compress = nn.Parameter(torch.randn(config.linear_tokens, tokens) * tokens**-0.5)
        self.residual = (
            nn.Parameter(torch.randn(after, tokens) * tokens**-0.5) if after != tokens else None
        )
        self.norm = nn.LayerNorm(width)

    def forward(self, rows: Tensor) -> Tensor:
        """B × C × T × D → B × C × (fm_tokens + linear_tokens) × D."""
        crossed = rows @ (rows.transpose(-1, -2) @ self.project)
        interacted = relu(self.machine(crossed.flatten(-2))).unflatten(-1, (-1, self.width))
        kept = rows if self.residual is None else self.residual @ rows
        normed: Tensor = self.norm(torch.cat([interacted, self.compress @ rows], dim=-2) + kept)
        return normed
