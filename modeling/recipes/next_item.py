"""Next-item recipes for a dataset's own log, or any file of `user item` lines. They differ in operator, mask and
objective only; torch is not imported here.

Those in the shapes of published comparisons are in `modeling/benchmarks/next_item_shapes.py`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from modeling.recipes import NextItemRecipe, NextItemTraining, Objective

# Published SASRec's shape on MovieLens-1M, with one feed-forward for all.
NET = {"width": 64, "num_heads": 1, "dropout": 0.1, "expansion": 1, "activation": "relu"}
TRAINING = NextItemTraining(
    epochs=20, learning_rate=2e-3, final_learning_rate=0.02, validate_epochs=2
)
DECAYED = ("decayed_hydra", "decayed_hydra")


def _recipe(
    name: str, model: str, objective: Objective = "softmax", **config: Any
) -> NextItemRecipe:
    net = {**NET, "dropout": 0.3, **config}
    return NextItemRecipe(name, model, net, objective=objective, windows="all", training=TRAINING)


def sasrec() -> NextItemRecipe:
    """SASRec with the full softmax: what the others are held against."""
    return _recipe("sasrec", "sasrec")


def gsasrec() -> NextItemRecipe:
    """SASRec with gBCE, 256 shared negatives, t = 0.75: for very many items."""
    return replace(_recipe("gsasrec", "sasrec", "gbce"), num_negatives=256)


def gated() -> NextItemRecipe:
    """Gated layers with SwiGLU and averaged weights, which did best here on MovieLens-1M."""
    net: dict[str, Any] = {
        "width": 96,
        "num_heads": 2,
        "gated": True,
        "activation": "swiglu",
        "expansion": 2,
    }
    return replace(_recipe("gated", "sasrec", **net), training=replace(TRAINING, averaging=0.998))


def hydrarec_next() -> NextItemRecipe:
    """HydraRec-causal, temporal context by learned positions."""
    return _recipe("hydrarec_next", "hydrarec")


def hydrarec_decayed() -> NextItemRecipe:
    """HydraRec-causal, temporal context by learned positions and a decayed prefix sum."""
    return _recipe("hydrarec_decayed", "hydrarec", operators=DECAYED)


def hydrarec_gaps() -> NextItemRecipe:
    """HydraRec-causal, temporal context by learned positions and bucketed time gaps."""
    return _recipe("hydrarec_gaps", "hydrarec", time_gaps=True)


def hydrarec_streaming() -> NextItemRecipe:
    """HydraRec-causal that takes new events exactly: decayed prefix sum, time gaps, no positions."""
    return _recipe(
        "hydrarec_streaming", "hydrarec", operators=DECAYED, positions="none", time_gaps=True
    )


def linrec() -> NextItemRecipe:
    """LinRec-causal."""
    return _recipe("linrec", "linrec", num_heads=8)


def kernel_linear() -> NextItemRecipe:
    """Linear attention with a denominator (1 + ELU), causal."""
    return _recipe("kernel_linear", "hydrarec", operators=("kernel_linear", "kernel_linear"))


def hstu() -> NextItemRecipe:
    """HSTU with position bias."""
    return _recipe("hstu", "hstu")


def bert4rec() -> NextItemRecipe:
    """BERT4Rec: Cloze, bidirectional softmax."""
    return _recipe("bert4rec", "bert4rec", "cloze", num_heads=2)


def hydrarec_cloze() -> NextItemRecipe:
    """HydraRec-bidirectional: Cloze, sums that decay with distance both ways, by half in three events at first, and φ of
    ELU: what a search on MovieLens-1M found (`modeling.benchmarks.ablation --study bidirectional`).
    """
    return _recipe(
        "hydrarec_cloze",
        "hydrarec",
        "cloze",
        causal=False,
        operators=DECAYED,
        initial_decay=0.8,
        feature_map="elu",
    )


def sasrec_tiny() -> NextItemRecipe:
    """Seconds on any machine."""
    return _tiny("sasrec_tiny", "sasrec")


def hydrarec_next_tiny() -> NextItemRecipe:
    """Seconds on any machine."""
    return _tiny("hydrarec_next_tiny", "hydrarec", operators=("hydra", "decayed_hydra"))


def bert4rec_tiny() -> NextItemRecipe:
    """Seconds on any machine."""
    return _tiny("bert4rec_tiny", "bert4rec", "cloze")


def _tiny(name: str, model: str, objective: Objective = "softmax", **config: Any) -> NextItemRecipe:
    training = NextItemTraining(
        epochs=2,
        batch_sequences=16,
        validate_epochs=1,
        checkpoint_steps=3,
        warmup_steps=2,
        averaging=0.9,
    )
    return NextItemRecipe(
        name,
        model,
        {"width": 16, "dropout": 0.1, **config},
        12,
        objective,
        windows="all",
        training=training,
    )


RECIPES = (
    "bert4rec",
    "bert4rec_tiny",
    "gated",
    "gsasrec",
    "hstu",
    "hydrarec_cloze",
    "hydrarec_decayed",
    "hydrarec_gaps",
    "hydrarec_next",
    "hydrarec_streaming",
    "hydrarec_next_tiny",
    "kernel_linear",
    "linrec",
    "sasrec",
    "sasrec_tiny",
)
