"""Recipes of the amortised DLRM. Torch is not imported here: a recipe is plain data."""

from __future__ import annotations

from modeling.recipes import Recipe, Training

RECIPES = ("amortised_dlrm", "amortised_dlrm_tiny")


def amortised_dlrm() -> Recipe:
    """Amortised DLRM, cross-attention; causal, its places counted from the oldest event, so that a kept state takes new
    events.
    """
    return Recipe(
        name="amortised_dlrm",
        model="amortised_dlrm",
        service="ranking_v1",
        config={
            "width": 48,
            "num_layers": 2,
            "num_heads": 4,
            "dropout": 0.1,
            "causal": True,
            "positions": "from_oldest",
        },
        history_length=256,
        history_block=64,
    )


def amortised_dlrm_tiny() -> Recipe:
    """Seconds on any machine, for tests."""
    return Recipe(
        name="amortised_dlrm_tiny",
        model="amortised_dlrm",
        service="ranking_v1",
        config={"width": 16, "num_layers": 1, "num_heads": 2, "dropout": 0.0},
        history_length=16,
        min_item_count=2,
        training=Training(epochs=2, max_requests=16, max_candidates=1024, checkpoint_steps=5),
    )
