"""Next-item recipes. Within a data set they differ in operator, mask and objective only; torch is
not imported here.

`*_ml1m`: MovieLens-1M as `user item` lines (3,416 items), 200 events. `*_beauty`: Amazon Beauty
5-core, 50 events. Neither is shipped: `--data` names the file. `*_retail` read a dataset's own log,
times included. `*_tiny` run on anything in seconds, for tests.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from modeling.recipes import NextItemRecipe, NextItemTraining, Objective

ML1M = {"width": 64, "num_heads": 1, "dropout": 0.1, "expansion": 1, "activation": "relu"}
ML1M_TRAINING = NextItemTraining(epochs=55, learning_rate=2e-3, final_learning_rate=0.02)


def _ml1m(name: str, model: str, objective: Objective = "softmax", **config: Any) -> NextItemRecipe:
    """The common net of the comparison on MovieLens-1M: published SASRec's shape, one feed-forward
    for all.
    """
    return NextItemRecipe(
        name, model, {**ML1M, **config}, objective=objective, training=ML1M_TRAINING
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
    config = {**ML1M, "width": 192, "num_heads": 2, "dropout": 0.5}
    training = replace(
        ML1M_TRAINING, epochs=24, learning_rate=1e-3, validate_epochs=2, averaging=0.998
    )
    return NextItemRecipe(
        "sasrec_beauty", "sasrec", config, 50, "sampled_softmax", 1024, training=training
    )


def sasrec_retail() -> NextItemRecipe:
    """SASRec on a dataset's own log, such as the shipped Online Retail."""
    return _retail("sasrec_retail", "sasrec")


def hydrarec_retail() -> NextItemRecipe:
    """HydraRec-causal, temporal context by learned positions."""
    return _retail("hydrarec_retail", "hydrarec")


def hydrarec_gaps_retail() -> NextItemRecipe:
    """HydraRec-causal, temporal context by learned positions and bucketed time gaps."""
    return _retail("hydrarec_gaps_retail", "hydrarec", time_gaps=True)


def hydrarec_decayed_retail() -> NextItemRecipe:
    """HydraRec-causal, temporal context by learned positions and a decayed prefix sum."""
    return _retail(
        "hydrarec_decayed_retail", "hydrarec", operators=("decayed_hydra", "decayed_hydra")
    )


def hydrarec_streaming_retail() -> NextItemRecipe:
    """HydraRec-causal that streams: decayed prefix sum, time gaps, no positions."""
    operators = ("decayed_hydra", "decayed_hydra")
    return _retail(
        "hydrarec_streaming_retail",
        "hydrarec",
        operators=operators,
        positions="none",
        time_gaps=True,
    )


def _retail(name: str, model: str, **config: Any) -> NextItemRecipe:
    common = {**ML1M, "dropout": 0.3, **config}
    training = replace(ML1M_TRAINING, epochs=20, validate_epochs=2)
    return NextItemRecipe(name, model, common, windows="all", training=training)


def sasrec() -> NextItemRecipe:
    """SASRec on any log or file."""
    return replace(sasrec_retail(), name="sasrec")


def hydrarec() -> NextItemRecipe:
    """HydraRec-causal on any log or file."""
    return replace(hydrarec_retail(), name="hydrarec")


def hydrarec_streaming() -> NextItemRecipe:
    """HydraRec-causal that takes new events exactly, on any log."""
    return replace(hydrarec_streaming_retail(), name="hydrarec_streaming")


def sasrec_tiny() -> NextItemRecipe:
    """Seconds on any machine."""
    return _tiny("sasrec_tiny", "sasrec")


def hydrarec_tiny() -> NextItemRecipe:
    """Seconds on any machine."""
    return _tiny("hydrarec_tiny", "hydrarec", operators=("hydra", "decayed_hydra"))


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


ANYWHERE = ("sasrec", "hydrarec", "hydrarec_streaming")
RECIPES = tuple(
    name
    for name, value in list(globals().items())
    if callable(value)
    and (name.endswith(("_ml1m", "_beauty", "_retail", "_tiny")) or name in ANYWHERE)
    and not name.startswith("_")
)
