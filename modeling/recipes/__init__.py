"""A recipe is a function that returns one run's full config; one module per model."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Training:
    """How a run trains. One seed controls initial weights, dropout and order."""

    epochs: int = 4
    max_requests: int = 64  # requests in a batch
    max_candidates: int = 6144  # padded candidates in a batch
    learning_rate: float = 2e-3
    weight_decay: float = 1e-5
    warmup_steps: int = 50
    clip_norm: float = 1.0
    patience: int = 2  # epochs without a better validation NDCG@10 before the run stops
    checkpoint_steps: int = 100
    seed: int = 1


@dataclass(frozen=True)
class Recipe:
    """A run: which model, with which config, on which features, trained how."""

    name: str
    model: str
    service: str
    config: dict[str, Any]
    history_length: int  # events that the encoder reads
    min_item_count: int = 5  # rarer items share one embedding
    training: Training = field(default_factory=Training)


def load(name: str) -> Recipe:
    """The recipe of that name.

    Raises:
        ValueError: no such recipe; the message lists those that exist.
    """
    found = all_recipes()
    if name not in found:
        raise ValueError(f"no recipe {name!r}; there are {sorted(found)}")
    return found[name]()


def all_recipes() -> dict[str, Callable[[], Recipe]]:
    """Every recipe function by name."""
    found: dict[str, Callable[[], Recipe]] = {}
    for module_info in pkgutil.iter_modules(__path__):
        module = importlib.import_module(f"modeling.recipes.{module_info.name}")
        found |= {name: getattr(module, name) for name in module.RECIPES}
    return found
