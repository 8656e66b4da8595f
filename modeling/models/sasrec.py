"""SASRec: causal softmax attention over a sequence, next item at every position.

Source: Kang and McAuley, "Self-Attentive Sequential Recommendation", arXiv 1808.09781, section 3.
Trained with the full softmax (Klenitskiy and Vasilev, arXiv 2309.07602), sampled softmax, or gBCE
(gSASRec, arXiv 2308.07192); never with one negative, which is under-trained and proves nothing.

Differs: queries, keys and values are all projected from the normed rows (the original norms queries
only). `gated=True, activation="swiglu"` are the layers of eSASRec (arXiv 2508.06450).
"""

from __future__ import annotations

from dataclasses import dataclass

from modeling.models.sequence import SequenceConfig, SequenceRanker


@dataclass(frozen=True)
class Config(SequenceConfig):
    """Two blocks of one head, feed-forward of width D with ReLU; see `SequenceConfig`."""


class SASRec(SequenceRanker):
    """See the module docstring."""
