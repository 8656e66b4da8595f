"""Recipes of VISTA and of rankers that read its summary tokens. Torch is not imported here: a
recipe is plain data.
"""

from __future__ import annotations

from typing import Any

from modeling.recipes import SERVICE, SERVICE_WITH_TOKENS, Recipe, Training

RECIPES = (
    "vista",
    "vista_stream",
    "vista_addressed",
    "vista_addressed_tiny",
    "vista_tiny",
    "vista_bidirectional_tiny",
    "vista_stage_2_tiny",
    "amortised_tokens_tiny",
    "onetrans_tokens_tiny",
)

LAYERS: dict[str, Any] = {"num_heads": 2, "summary_layers": 2, "ranking_layers": 2}
STREAM: dict[str, Any] = {**LAYERS, "causal": True, "seed_role": "target"}
# Events that `vista` reads and reconstructs
LENGTH = 256
# Days: a half-life that fades nothing
FOREVER = 1e6
# Events: what a recipe reads whose state is kept as events come
WHOLE_HISTORY = 1 << 20
SMALL: dict[str, Any] = {**STREAM, "width": 16, "num_seeds": 4, "block": 4}
SECONDS = Training(epochs=2, max_requests=16, max_candidates=1024, checkpoint_steps=5)


def vista() -> Recipe:
    """VISTA as its paper has it: every event reads every other, 128 summary tokens, the whole history reconstructed."""
    config = {
        **LAYERS,
        "width": 32,
        "num_seeds": 128,
        "cross_rank": 64,
        "dropout": 0.1,
        "reconstructed": LENGTH,
    }
    return _large("vista", config)


def vista_stream() -> Recipe:
    """VISTA, whose summary tokens take new events one by one: events read the blocks before their own."""
    config = {
        **STREAM,
        "width": 32,
        "num_seeds": 32,
        "cross_rank": 64,
        "dropout": 0.1,
        "block": 16,
        "reconstructed": 32,
    }
    return _large("vista_stream", config)


def _large(name: str, config: dict[str, Any]) -> Recipe:
    training = Training(epochs=2, learning_rate=4e-3)
    return Recipe(name, "vista", SERVICE, config, history_length=LENGTH, training=training)


def vista_addressed() -> Recipe:
    """Summary tokens of a whole history that keep which items it held, how often and how lately."""
    config = {
        "width": 32,
        "code_width": 64,
        "num_slots": 64,
        "half_lives_days": (FOREVER,),
        "cross_rank": 64,
        "dropout": 0.1,
    }
    training = Training(epochs=2, learning_rate=4e-3)
    return Recipe(
        "vista_addressed", "vista_addressed", SERVICE, config, WHOLE_HISTORY, training=training
    )


def vista_addressed_tiny() -> Recipe:
    """Seconds on any machine, for tests."""
    config = {"width": 16, "code_width": 8, "num_slots": 4, "half_lives_days": (30.0, 7.0)}
    return Recipe(
        "vista_addressed_tiny",
        "vista_addressed",
        SERVICE,
        config,
        history_length=16,
        min_item_count=2,
        training=SECONDS,
    )


def vista_tiny() -> Recipe:
    """Seconds on any machine, for tests."""
    return Recipe(
        "vista_tiny", "vista", SERVICE, SMALL, history_length=16, min_item_count=2, training=SECONDS
    )


def vista_bidirectional_tiny() -> Recipe:
    """The paper's stage 1, for tests."""
    config = {**SMALL, "causal": False, "seed_role": "source"}
    return Recipe(
        "vista_bidirectional_tiny",
        "vista",
        SERVICE,
        config,
        history_length=16,
        min_item_count=2,
        training=SECONDS,
    )


def vista_stage_2_tiny() -> Recipe:
    """Stage 2 alone, trained on stored tokens."""
    config = {**SMALL, "causal": False, "reconstruction": 0.0, "stored": True}
    return _reading("vista_stage_2_tiny", "vista", config)


def amortised_tokens_tiny() -> Recipe:
    """The amortised DLRM with stored tokens before its events."""
    return _reading(
        "amortised_tokens_tiny", "amortised_dlrm", {"width": 16, "num_layers": 1, "num_heads": 2}
    )


def onetrans_tokens_tiny() -> Recipe:
    """OneTrans with stored tokens before its events."""
    return _reading(
        "onetrans_tokens_tiny", "onetrans", {"width": 16, "num_layers": 2, "num_heads": 2}
    )


def _reading(name: str, model: str, config: dict[str, Any]) -> Recipe:
    return Recipe(
        name,
        model,
        SERVICE_WITH_TOKENS,
        config,
        16,
        min_item_count=2,
        tokens="vista_tiny",
        training=SECONDS,
    )
