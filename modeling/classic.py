"""Trained floors without ids and without a sequence: logistic regression and gradient-boosted trees
on the same dense numbers that rankers get.

What a ranker adds must show beside these. scikit-learn fits both; what is missing (NaN) is a state
of its own for trees, and a flag beside the mean for the regression.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from modeling.columns import within
from modeling.encoder import Encoded, Encoder
from modeling.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Iterator

Classic = Literal["trees", "logistic regression"]
CLASSICS: tuple[Classic, ...] = ("trees", "logistic regression")
MOST_ROWS: dict[str, int] = {"trees": 1 << 21, "logistic regression": 1 << 18}
CHUNK = 2_000  # requests scored at a time


def classic_scores(
    kind: Classic, encoder: Encoder, train: Encoded, test: Encoded, task: int, seed: int
) -> np.ndarray:
    """Scores of all test candidates, as logits.

    Args:
        encoder: says which inputs are withheld.
        train: requests are taken evenly from all of it, up to `MOST_ROWS` candidates.
        task: number of the label.

    Raises:
        DataError: scikit-learn is not installed.
    """
    try:
        from sklearn.ensemble import HistGradientBoostingClassifier
    except ImportError as error:
        raise DataError(
            "trees and logistic regression need scikit-learn: pip install scikit-learn"
        ) from error
    features, labels = _sampled(encoder, train, task, MOST_ROWS[kind], seed)
    model: Any
    if kind == "trees":
        model = HistGradientBoostingClassifier(
            max_iter=200, max_leaf_nodes=63, early_stopping=True, random_state=seed
        )
    else:
        model = _regression(seed)
    model.fit(features, labels)
    return np.concatenate([model.decision_function(part) for part in _parts(encoder, test)])


def _regression(seed: int) -> Any:
    from sklearn.impute import SimpleImputer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    return make_pipeline(
        SimpleImputer(add_indicator=True, keep_empty_features=True),
        StandardScaler(),
        LogisticRegression(max_iter=300, random_state=seed),
    )


def _sampled(
    encoder: Encoder, train: Encoded, task: int, most: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Features and labels of requests spread evenly over the training period."""
    # The seed moves which requests are taken, so that seeds differ in more than the trees' own.
    step = -(-len(train.candidate_item) // most) or 1
    chosen = np.arange(seed % step, len(train), step)
    features = _features(encoder, train, chosen)
    lengths = train.num_candidates[chosen]
    rows = np.repeat(train.candidate_offsets[chosen], lengths) + within(lengths)
    labels = train.labels[rows][:, task]
    known = ~np.isnan(labels)
    return features[known], labels[known]


def _parts(encoder: Encoder, encoded: Encoded) -> Iterator[np.ndarray]:
    for start in range(0, len(encoded), CHUNK):
        yield _features(encoder, encoded, np.arange(start, min(start + CHUNK, len(encoded))))


def _features(encoder: Encoder, encoded: Encoded, chosen: np.ndarray) -> np.ndarray:
    """Dense numbers of candidates and of their requests, float32, without what is withheld."""
    lengths = encoded.num_candidates[chosen]
    rows = np.repeat(encoded.candidate_offsets[chosen], lengths) + within(lengths)
    withheld = encoder.withheld
    candidate = encoded.candidate_dense[rows][:, ~withheld.candidate_dense]
    if withheld.user:
        return candidate
    return np.concatenate([candidate, encoded.dense_BG[chosen].repeat(lengths, axis=0)], axis=1)
