"""HydraRec: sequential recommendation in time linear in both history and width.

Source: Mushtaque, "An Efficient Attention Mechanism for Sequential Recommendation Tasks: HydraRec",
arXiv 2501.01242; the operator from Bolya et al., "Hydra Attention", arXiv 2209.07484
(modeling/layers/hydra.py).

| paper | here |
|---|---|
| Hydra attention in a Transformer recommender, causal, next-item | `Config()`, objective softmax |
| the same, bidirectional, as BERT4Rec | `Config(causal=False)`, objective cloze |
| temporal context | `positions` (default) · `time_gaps` · operator "decayed_hydra" |
| – | hybrid stacks: `operators=("softmax", "hydra")`, softmax first (arXiv 2209.07484 gains most from the last layers) |

State of a user: one D-vector a layer, so num_layers × D floats whatever the history's length; a new
event costs O(layers × D²). Exact with `positions` "none" or "from_oldest".

Differs: only the abstract is public, so everything but the operator is chosen: blocks as in SASRec
with GELU and width 4D (our recipes have SASRec's ReLU and width D, as all that they are compared
with); LayerNorm on the operator's output, which grows with the history; the temporal modes as listed.
"""

from __future__ import annotations

from dataclasses import dataclass

from modeling.layers.block import Activation
from modeling.models.sequence import OperatorName, SequenceConfig, SequenceRanker


@dataclass(frozen=True)
class Config(SequenceConfig):
    """Two Hydra layers; see `SequenceConfig`."""

    operators: tuple[OperatorName, ...] = ("hydra", "hydra")
    activation: Activation = "gelu"
    expansion: int = 4


class HydraRec(SequenceRanker):
    """See the module docstring."""
