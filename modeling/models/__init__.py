"""One file, one paper, one Config; all behind `base.Ranker`."""

from __future__ import annotations

from dataclasses import asdict, fields
from typing import Any

from modeling.batch import FeatureSizes
from modeling.models.base import Ranker

__all__ = ["NAMES", "Ranker", "build"]

NAMES = ("amortised_dlrm",)


def build(name: str, config: dict[str, Any] | object, sizes: FeatureSizes) -> Ranker:
    """A model by name, with its config as an object or as plain values.

    Raises:
        ValueError: no such model, or a config value that the model does not know.
    """
    if name not in NAMES:
        raise ValueError(f"no model {name!r}; there are {NAMES}")
    from modeling.models import amortised_dlrm as module

    plain = config if isinstance(config, dict) else asdict(config)  # type: ignore[call-overload]
    known = {f.name for f in fields(module.Config)}
    if unknown := sorted(set(plain) - known):
        raise ValueError(f"model {name!r} does not know {unknown}; its config has {sorted(known)}")
    return module.AmortisedDLRM(module.Config(**plain), sizes)
