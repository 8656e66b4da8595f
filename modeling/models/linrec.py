"""LinRec: linear attention with an L2-normalised ELU kernel, causal.

Source: Liu, Cai, Zhang et al., "LinRec: Linear Attention Mechanism for Long-term Sequential
Recommender Systems", arXiv 2411.01537 (SIGIR 2023), equations 7 to 10; the operator is in
modeling/layers/linear_attention.py.

Differs: LinRec's reference code masks neither padding nor the future and trains only the last
position; this one is causal and exact, so every position is trained, and it streams with K × K
numbers for each head and layer.
"""

from __future__ import annotations

from dataclasses import dataclass

from modeling.layers.block import Activation
from modeling.models.sequence import OperatorName, SequenceConfig, SequenceRanker


@dataclass(frozen=True)
class Config(SequenceConfig):
    """Two blocks of eight heads; see `SequenceConfig`."""

    operators: tuple[OperatorName, ...] = ("linrec", "linrec")
    num_heads: int = 8
    activation: Activation = "gelu"
    expansion: int = 4


class LinRec(SequenceRanker):
    """See the module docstring."""
