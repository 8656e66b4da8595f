"""One file, one paper, one Config; all behind `base.Ranker`."""

from __future__ import annotations

import importlib
from dataclasses import asdict, fields
from typing import Any, cast

from modeling.batch import FeatureSizes
from modeling.models.base import Ranker

__all__ = ["NAMES", "Ranker", "build"]

_CLASSES = {  # module → the class in it; each module's config is `Config`
    "amortised_dlrm": "AmortisedDLRM",
    "bert4rec": "BERT4Rec",
    "hstu": "HSTU",
    "hydrarec": "HydraRec",
    "linrec": "LinRec",
    "sasrec": "SASRec",
}
NAMES = tuple(_CLASSES)


def build(name: str, config: dict[str, Any] | object, sizes: FeatureSizes) -> Ranker:
    """A model by name, with its config as an object or as plain values.

    Raises:
        ValueError: no such model, or a config value that the model does not know.
    """
    if name not in NAMES:
        raise ValueError(f"no model {name!r}; there are {NAMES}")
    module = importlib.import_module(f"modeling.models.{name}")
    plain = config if isinstance(config, dict) else asdict(config)  # type: ignore[call-overload]
    known = {f.name for f in fields(module.Config)}
    if unknown := sorted(set(plain) - known):
        raise ValueError(f"model {name!r} does not know {unknown}; its config has {sorted(known)}")
    return cast(Ranker, getattr(module, _CLASSES[name])(module.Config(**plain), sizes))
