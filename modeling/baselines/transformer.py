"""Transformer over feature tokens: one projection for all, task tokens, pruned last layer (arXiv
2311.05884's baseline).
"""

from __future__ import annotations

from dataclasses import dataclass

from modeling.layers.heterogeneous import Kind
from modeling.models import hiformer


@dataclass(frozen=True)
class Config(hiformer.Config):
    """Hiformer's sizes with homogeneous layers; "hetero" makes it HeteroAtt."""

    kind: Kind = "vanilla"
    num_layers: int = 2


class Transformer(hiformer.Hiformer):
    """Hiformer without heterogeneity: the same tokens, heads and pruning."""
