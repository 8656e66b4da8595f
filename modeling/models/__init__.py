"""One file, one paper, one Config; all behind `base.Ranker`. What they are compared with: `modeling/baselines/`."""

from __future__ import annotations

import importlib
from dataclasses import asdict, fields
from typing import Any, cast

from modeling.batch import FeatureSizes
from modeling.models.base import Ranker

__all__ = ["NAMES", "Ranker", "build"]

_CLASSES = {  # model → room and class; its module is `<room>.<model>`, the module's config is `Config`
    "amortised_dlrm": ("models", "AmortisedDLRM"),
    "autoint": ("baselines", "AutoInt"),
    "bert4rec": ("models", "BERT4Rec"),
    "dcnv2": ("baselines", "DCNv2"),
    "din": ("baselines", "DIN"),
    "dlrm": ("baselines", "DLRM"),
    "hiformer": ("models", "Hiformer"),
    "hstu": ("models", "HSTU"),
    "hydrarec": ("models", "HydraRec"),
    "linrec": ("models", "LinRec"),
    "onetrans": ("models", "OneTrans"),
    "rankmixer": ("baselines", "RankMixer"),
    "sasrec": ("models", "SASRec"),
    "transformer": ("baselines", "Transformer"),
    "vista": ("models", "VISTA"),
    "wukong": ("baselines", "Wukong"),
}
NAMES = tuple(_CLASSES)


def build(name: str, config: dict[str, Any] | object, sizes: FeatureSizes) -> Ranker:
    """A model by name, with its config as an object or as plain values.

    Raises:
        ValueError: no such model, or a config value that the model does not know.
    """
    if name not in NAMES:
        raise ValueError(f"no model {name!r}; there are {NAMES}")
    room, class_name = _CLASSES[name]
    module = importlib.import_module(f"modeling.{room}.{name}")
    plain = config if isinstance(config, dict) else asdict(config)  # type: ignore[call-overload]
    known = {f.name for f in fields(module.Config)}
    if unknown := sorted(set(plain) - known):
        raise ValueError(f"model {name!r} does not know {unknown}; its config has {sorted(known)}")
    return cast(Ranker, getattr(module, class_name)(module.Config(**plain), sizes))
