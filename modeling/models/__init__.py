"""One file, one paper, one Config; all behind `base.Ranker`. What they are compared with:
`modeling/baselines/`.
"""

from __future__ import annotations

import importlib
from dataclasses import asdict, fields
from typing import Any, cast

from modeling.errors import RecipeError
from modeling.inputs.batch import FeatureSizes
from modeling.models.base import Ranker
from modeling.registry import CLASSES, NAMES, module_of

__all__ = ["NAMES", "Ranker", "build", "config_class", "model_class", "module_of"]


def config_class(name: str) -> type:
    """The dataclass of a model's config."""
    found: type = importlib.import_module(module_of(name)).Config
    return found


def model_class(name: str) -> type[Ranker]:
    """A model's class."""
    found: type[Ranker] = getattr(importlib.import_module(module_of(name)), CLASSES[name][1])
    return found


def build(name: str, config: dict[str, Any] | object, sizes: FeatureSizes) -> Ranker:
    """A model by name, with its config as an object or as plain values.

    Raises:
        RecipeError: no such model, or a config value that the model does not know.
    """
    made = config_class(name)
    plain = config if isinstance(config, dict) else asdict(config)  # type: ignore[call-overload]
    known = {f.name for f in fields(made)}
    if unknown := sorted(set(plain) - known):
        raise RecipeError(f"model {name!r} does not know {unknown}; its config has {sorted(known)}")
    model: Any = model_class(name)
    return cast(Ranker, model(made(**plain), sizes))
