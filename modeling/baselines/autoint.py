"""AutoInt: self-attention over fields, all of whose outputs are read (Song et al., arXiv
1810.11921).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.functional import relu

from modeling.baselines import base
from modeling.layers.interaction import Interaction, all_tokens


@dataclass(frozen=True)
class Config(base.Config):
    """Heads split the width."""

    num_layers: int = 2
    num_heads: int = 2


class AutoInt(base.Baseline):
    """No scale of 1/√d in the attention, a linear residual, ReLU."""

    config: Config

    def make_interaction(self, request: int, candidate: int) -> Interaction:
        return FieldAttention(request + candidate, self.config)


class FieldAttention(Interaction):
    """Every token asks in every layer, since the heads read all."""

    def __init__(self, tokens: int, config: Config) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.out = (0, tokens * config.width)
        self.layers = nn.ModuleList(
            nn.Linear(config.width, 4 * config.width, bias=False) for _ in range(config.num_layers)
        )

    def forward(self, request_BRD: Tensor, candidate_BCND: Tensor) -> tuple[Tensor | None, Tensor]:
        """Nothing of the request, all of the candidate."""
        rows = all_tokens(request_BRD, candidate_BCND)
        for layer in self.layers:
            query, key, value, residual = layer(rows).chunk(4, dim=-1)
            query, key, value = (
                part.unflatten(-1, (self.num_heads, -1)).transpose(2, 3)
                for part in (query, key, value)
            )
            read = (query @ key.transpose(-1, -2)).softmax(-1) @ value
            rows = relu(read.transpose(2, 3).flatten(3) + residual)
        return None, rows.flatten(2)
