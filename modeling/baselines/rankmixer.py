"""RankMixer: parameter-free token mixing and a feed-forward network for each token (arXiv
2507.15551).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from modeling.baselines import base
from modeling.layers.interaction import Interaction, SplitLinear
from modeling.layers.per_token import PerTokenFeedForward


@dataclass(frozen=True)
class Config(base.Config):
    """T tokens of `mixed_width`, a multiple of T; "transformer" is the separate sequence module of
    its tables.
    """

    num_layers: int = 2
    num_tokens: int = 8
    mixed_width: int = 64
    expansion: int = 2


class RankMixer(base.Baseline):
    """Differs: tokens are split from one projection of all features, as OneTrans's Auto-Split, not
    by hand-made groups.
    """

    config: Config

    def make_interaction(self, request: int, candidate: int) -> Interaction:
        if self.config.mixed_width % self.config.num_tokens:
            raise ValueError(
                f"mixed_width {self.config.mixed_width} is no multiple of num_tokens {self.config.num_tokens}"
            )
        return Mixer(request * self.config.width, candidate * self.config.width, self.config)


class Mixer(Interaction):
    """S = LN(mix(X) + X); X' = LN(PFFN(S) + S); the mean over tokens goes to the heads."""

    def __init__(self, request: int, candidate: int, config: Config) -> None:
        super().__init__()
        tokens = config.num_tokens
        width = config.mixed_width
        self.tokens = tokens
        self.out = (0, width)
        self.split = SplitLinear(request, candidate, tokens * width)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2 * config.num_layers))
        self.networks = nn.ModuleList(
            PerTokenFeedForward(tokens, width, config.expansion * width)
            for _ in range(config.num_layers)
        )

    def forward(self, request_BRD: Tensor, candidate_BCND: Tensor) -> tuple[Tensor | None, Tensor]:
        """Nothing of the request, all of the candidate."""
        rows = self.split(request_BRD.flatten(1), candidate_BCND.flatten(2)).unflatten(
            -1, (self.tokens, -1)
        )
        for number, network in enumerate(self.networks):
            # Head h of every token → token h
            mixed = rows.unflatten(-1, (self.tokens, -1)).transpose(2, 3).flatten(3)
            rows = self.norms[2 * number](mixed + rows)
            rows = self.norms[2 * number + 1](network(rows) + rows)
        return None, rows.mean(2)
