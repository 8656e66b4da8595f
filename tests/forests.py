"""Small forests that LightGBM fits in a test."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import lightgbm
import numpy as np


def forest_on(
    rows_NF: np.ndarray, labels_N: np.ndarray, categories: Sequence[int] = (), **parameters: Any
) -> str:
    """The text of a forest fitted on these rows."""
    settings = {
        "objective": "binary",
        "num_leaves": 8,
        "min_data_in_leaf": 5,
        "min_data_per_group": 5,
        "cat_smooth": 1.0,
        "num_threads": 1,
        "deterministic": True,
        "verbose": -1,
        **parameters,
    }
    trees = settings.pop("num_trees", 12)
    data = lightgbm.Dataset(
        rows_NF, labels_N.astype(np.float32), categorical_feature=list(categories)
    )
    text: str = lightgbm.train(settings, data, trees).model_to_string()
    return text
