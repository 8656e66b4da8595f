"""DIN: fields and what target attention reads of the history, into a network (Zhou et al., arXiv
1706.06978).

The attention itself is `layers/target_attention.py`, which the other baselines may read the history
by as well.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.functional import relu

from modeling.baselines import base
from modeling.layers.interaction import Interaction, SplitLinear


@dataclass(frozen=True)
class Config(base.Config):
    """`hidden`: width of the network's first layer."""

    hidden: int = 128


class DIN(base.Baseline):
    """No crosses beyond the attention's."""

    config: Config

    def make_interaction(self, request: int, candidate: int) -> Interaction:
        """One wide layer; the heads are the next."""
        return Deep(request * self.config.width, candidate * self.config.width, self.config.hidden)


class Deep(Interaction):
    """A layer over all fields."""

    def __init__(self, request: int, candidate: int, hidden: int) -> None:
        super().__init__()
        self.first = SplitLinear(request, candidate, hidden)
        self.out = (0, hidden)
        self.norm = nn.LayerNorm(hidden)

    def forward(self, request_BRD: Tensor, candidate_BCND: Tensor) -> tuple[Tensor | None, Tensor]:
        """Nothing of the request, all of the candidate."""
        return None, self.norm(relu(self.first(request_BRD.flatten(1), candidate_BCND.flatten(2))))
