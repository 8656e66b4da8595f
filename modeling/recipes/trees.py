"""Recipes of gradient-boosted trees, alone and blended with a network. LightGBM is not imported here: a recipe is
plain data.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from modeling.recipes import SERVICE, Recipe, Training
from modeling.recipes.vista import vista_addressed, vista_stream, vista_tiny

RECIPES = (
    "trees",
    "trees_binary",
    "trees_tiny",
    "vista_trees",
    "vista_addressed_trees",
    "amortised_trees",
    "vista_trees_tiny",
)
# Trees cross features; a network beside them has to read the history.
ONE_LAYER = {"summary_layers": 1, "ranking_layers": 1, "cross_layers": 1}
# What trees try where a network tries learning rates, alone or in a blend, in this order; the first is what they are
TRIALS = (
    "",
    "num_leaves=40",
    "objective=rank_xendcg",
    "smallest_leaf=400",
    "column_share=0.9",
    "num_leaves=20",
    "objective=binary",
    "learning_rate=0.1",
)
# Trees of the tests: seconds on any machine
TINY: dict[str, Any] = {"num_trees": 8, "num_leaves": 6, "smallest_leaf": 5, "objective": "binary"}


def trees() -> Recipe:
    """Gradient-boosted trees that learn the order within requests."""
    return _trees("trees", {})


def trees_binary() -> Recipe:
    """Gradient-boosted trees that learn the probability of a label."""
    return _trees("trees_binary", {"objective": "binary"})


def vista_trees() -> Recipe:
    """The default: what `make demo` trains. VISTA as a stream, its logits blended with those of trees: a smaller network
    than alone, which reads fewer events.
    """
    alone = vista_stream()
    return replace(
        alone,
        name="vista_trees",
        config={**alone.config, "width": 24, **ONE_LAYER},
        history_length=128,
        training=replace(alone.training, epochs=1),
        trees={},
    )


def vista_addressed_trees() -> Recipe:
    """Summary tokens of a whole history, blended with trees."""
    return replace(vista_addressed(), name="vista_addressed_trees", trees={})


def amortised_trees() -> Recipe:
    """The amortised DLRM over a thousand events, blended with trees."""
    config = {
        "width": 32,
        "num_layers": 1,
        "num_heads": 2,
        "interaction": "cross",
        "cross_rank": 64,
        "bags": True,
        "dropout": 0.1,
    }
    training = Training(epochs=1, learning_rate=4e-3)
    return Recipe(
        "amortised_trees",
        "amortised_dlrm",
        SERVICE,
        config,
        history_length=1000,
        training=training,
        trees={},
    )


def trees_tiny() -> Recipe:
    """Seconds on any machine, for tests."""
    return replace(_trees("trees_tiny", TINY), min_item_count=2)


def vista_trees_tiny() -> Recipe:
    """A blend that makes summary tokens, in seconds."""
    return replace(vista_tiny(), name="vista_trees_tiny", trees=TINY)


def _trees(name: str, config: dict[str, Any]) -> Recipe:
    # Trees read no event; the encoder wants to read one at least.
    return Recipe(name, "trees", SERVICE, config, history_length=1, training=Training())
