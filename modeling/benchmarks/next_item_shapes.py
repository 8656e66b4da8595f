"""Next-item recipes in the shapes of published comparisons, which `modeling.benchmarks.next_item` and
`modeling.benchmarks.ablation` train.

`*_ml1m`: MovieLens-1M as `user item` lines (3,416 items), 200 events. `*_beauty`: Amazon Beauty 5-core, 50
events. Neither is shipped: `--data` names the file. Within a data set they differ in operator, mask and
objective only.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from modeling.comparison.comparison import next_item_recipe
from modeling.recipes import NextItemRecipe, NextItemTraining, Objective
from modeling.recipes.next_item import NET

ML1M_TRAINING = NextItemTraining(epochs=55, learning_rate=2e-3, final_learning_rate=0.02)


def _ml1m(name: str, model: str, objective: Objective = "softmax", **config: Any) -> NextItemRecipe:
    """The common net of the comparison on MovieLens-1M: published SASRec's shape, one feed-forward
    for all.
    """
    return NextItemRecipe(
        name, model, {**NET, **config}, objective=objective, training=ML1M_TRAINING
    )


def sasrec_ml1m() -> NextItemRecipe:
    """SASRec with the full softmax: the yardstick that the harness must reproduce."""
    return _ml1m("sasrec_ml1m", "sasrec")


def sasrec_sampled_ml1m() -> NextItemRecipe:
    """SASRec with 512 shared negatives."""
    return replace(_ml1m("sasrec_sampled_ml1m", "sasrec", "sampled_softmax"), num_negatives=512)


def gsasrec_ml1m() -> NextItemRecipe:
    """SASRec with gBCE, 256 shared negatives, t = 0.75."""
    return replace(_ml1m("gsasrec_ml1m", "sasrec", "gbce"), num_negatives=256)


def hydrarec_ml1m() -> NextItemRecipe:
    """HydraRec-causal, temporal context by learned positions."""
    return _ml1m("hydrarec_ml1m", "hydrarec")


def hydrarec_decayed_ml1m() -> NextItemRecipe:
    """HydraRec-causal, temporal context by a decayed prefix sum, and learned positions."""
    return _ml1m("hydrarec_decayed_ml1m", "hydrarec", operators=("decayed_hydra", "decayed_hydra"))


def hydrarec_streaming_ml1m() -> NextItemRecipe:
    """HydraRec-causal with a decayed prefix sum and no positions: its states extend exactly."""
    operators = ("decayed_hydra", "decayed_hydra")
    return _ml1m("hydrarec_streaming_ml1m", "hydrarec", operators=operators, positions="none")


def hydrarec_hybrid_ml1m() -> NextItemRecipe:
    """Softmax in the first layer, decayed Hydra in the last."""
    return _ml1m("hydrarec_hybrid_ml1m", "hydrarec", operators=("softmax", "decayed_hydra"))


def linrec_ml1m() -> NextItemRecipe:
    """LinRec-causal."""
    return _ml1m("linrec_ml1m", "linrec", num_heads=8)


def kernel_linear_ml1m() -> NextItemRecipe:
    """Linear attention with a denominator (1 + ELU), causal."""
    operators = ("kernel_linear", "kernel_linear")
    return _ml1m("kernel_linear_ml1m", "hydrarec", operators=operators)


def hstu_ml1m() -> NextItemRecipe:
    """HSTU with position bias; the file has no times."""
    return _ml1m("hstu_ml1m", "hstu")


def bert4rec_ml1m() -> NextItemRecipe:
    """BERT4Rec: Cloze, bidirectional softmax."""
    return _ml1m("bert4rec_ml1m", "bert4rec", "cloze", num_heads=2)


def hydrarec_bidirectional_ml1m() -> NextItemRecipe:
    """HydraRec-bidirectional: Cloze, Hydra."""
    return _ml1m("hydrarec_bidirectional_ml1m", "hydrarec", "cloze", causal=False)


def gated_ml1m() -> NextItemRecipe:
    """The best: gated layers with SwiGLU, trained on all windows, averaged weights."""
    config = {
        "width": 96,
        "num_heads": 2,
        "dropout": 0.15,
        "gated": True,
        "activation": "swiglu",
        "expansion": 2,
    }
    training = replace(
        ML1M_TRAINING, epochs=22, learning_rate=3e-3, validate_epochs=2, averaging=0.998
    )
    return NextItemRecipe("gated_ml1m", "sasrec", config, windows="all", training=training)


def hydrarec_decayed_bidirectional_ml1m() -> NextItemRecipe:
    """HydraRec-bidirectional whose sums decay with distance both ways."""
    operators = ("decayed_hydra", "decayed_hydra")
    return _ml1m(
        "hydrarec_decayed_bidirectional_ml1m",
        "hydrarec",
        "cloze",
        causal=False,
        operators=operators,
    )


def hydrarec_hybrid_bidirectional_ml1m() -> NextItemRecipe:
    """HydraRec-bidirectional with a softmax layer first."""
    operators = ("softmax", "decayed_hydra")
    return _ml1m(
        "hydrarec_hybrid_bidirectional_ml1m", "hydrarec", "cloze", causal=False, operators=operators
    )


def sasrec_beauty() -> NextItemRecipe:
    """SASRec with 1,024 shared negatives and averaged weights, on Amazon Beauty 5-core."""
    config = {**NET, "width": 192, "num_heads": 2, "dropout": 0.5}
    training = replace(
        ML1M_TRAINING, epochs=24, learning_rate=1e-3, validate_epochs=2, averaging=0.998
    )
    return NextItemRecipe(
        "sasrec_beauty", "sasrec", config, 50, "sampled_softmax", 1024, training=training
    )


SHAPES = {
    shape.__name__: shape
    for shape in (
        bert4rec_ml1m,
        gated_ml1m,
        gsasrec_ml1m,
        hstu_ml1m,
        hydrarec_bidirectional_ml1m,
        hydrarec_decayed_bidirectional_ml1m,
        hydrarec_decayed_ml1m,
        hydrarec_hybrid_bidirectional_ml1m,
        hydrarec_hybrid_ml1m,
        hydrarec_ml1m,
        hydrarec_streaming_ml1m,
        kernel_linear_ml1m,
        linrec_ml1m,
        sasrec_beauty,
        sasrec_ml1m,
        sasrec_sampled_ml1m,
    )
}


def shaped(name: str) -> NextItemRecipe:
    """The recipe of a name, of a published comparison or of `modeling/recipes`.

    Raises:
        RecipeError: neither has a next-item recipe of that name.
    """
    return SHAPES[name]() if name in SHAPES else next_item_recipe(name)
