"""BERT4Rec: bidirectional softmax attention, trained to fill in masked events.

Source: Sun et al., "BERT4Rec: Sequential Recommendation with Bidirectional Encoder Representations
from Transformer", arXiv 1904.06690, section 3. Every masked event becomes [MASK]; inference appends
[MASK] to the history. It must be trained long to reach its published numbers (Petrov and Macdonald,
arXiv 2207.07483).

Differs: pre-norm blocks, no projection before the tied head and no bias of items, as in all
sequence models here.
"""

from __future__ import annotations

from dataclasses import dataclass

from modeling.layers.block import Activation
from modeling.models.sequence import SequenceConfig, SequenceRanker


@dataclass(frozen=True)
class Config(SequenceConfig):
    """Two blocks of two heads, feed-forward of width 4D with GELU; see `SequenceConfig`."""

    num_heads: int = 2
    causal: bool = False
    activation: Activation = "gelu"
    expansion: int = 4


class BERT4Rec(SequenceRanker):
    """See the module docstring."""
