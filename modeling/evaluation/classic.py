"""Trained baselines without ids and without a sequence: logistic regression and gradient-boosted trees
on the same dense numbers that rankers get.

A ranker's gain must show beside these. scikit-learn fits both; what is missing (NaN) is a separate
state for trees, and a flag beside the mean for the regression.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from modeling.console import console
from modeling.errors import DataError
from modeling.inputs.augment import ablation_of
from modeling.inputs.columns import within
from modeling.inputs.encoder import Encoded, Encoder

if TYPE_CHECKING:
    from collections.abc import Iterator

Classic = Literal["trees", "logistic regression"]
CLASSICS: tuple[Classic, ...] = ("trees", "logistic regression")
MOST_ROWS: dict[str, int] = {"trees": 1 << 21, "logistic regression": 1 << 18}
# Requests scored at a time
CHUNK = 2_000
# Values of a column, and labels of a kind: the least leaf of a tree
LEAST_KNOWN = 20


def classic_scores(
    kind: Classic,
    encoder: Encoder,
    train: Encoded,
    test: Encoded,
    task: int,
    seed: int,
    most: int | None = None,
) -> np.ndarray:
    """Scores of all test candidates, as logits. Columns with hardly any known value are left out
    and said; where there is nothing to learn from, all scores are 0, which is said too.

    Args:
        encoder: says which inputs are withheld.
        train: requests are taken evenly from all of it, up to `most` candidates.
        task: number of the label.
        most: default: `MOST_ROWS` of the kind.

    Raises:
        DataError: scikit-learn is not installed.
    """
    try:
        from sklearn.ensemble import HistGradientBoostingClassifier
    except ImportError as error:
        raise DataError(
            "trees and logistic regression need scikit-learn: pip install scikit-learn"
        ) from error
    import torch
    from threadpoolctl import threadpool_limits

    # 1. Sample the training period; leave out columns with hardly any known value.
    features, labels = _sampled(encoder, train, task, most or MOST_ROWS[kind], seed)
    kept = (~np.isnan(features)).sum(0) >= LEAST_KNOWN
    if not kept.all():
        names = np.array(_names(encoder))[~kept]
        console.print(
            f"{kind}: without {', '.join(names)}, of which hardly anything is known",
            highlight=False,
        )
    # 2. With no column, or fewer than two labels of a kind, every score is 0.
    rarest = int(np.bincount(labels.astype(np.int64), minlength=2).min())
    if not kept.any() or rarest < 2:
        console.print(f"{kind}: nothing to learn from; every score is 0", highlight=False)
        return np.zeros(len(test.candidate_item))
    # 3. Fit, then score the test period in parts.
    model: Any
    if kind == "trees":
        model = HistGradientBoostingClassifier(
            max_iter=200,
            max_leaf_nodes=63,
            # Early stopping holds out a stratified share, which needs enough of the rarer label.
            early_stopping=rarest >= LEAST_KNOWN,
            random_state=seed,
        )
    else:
        model = _regression(seed)
    # scikit-learn brings an OpenMP of its own, whose threads would spin beside those of others.
    with threadpool_limits(torch.get_num_threads()):
        model.fit(features[:, kept], labels)
        parts = [model.decision_function(part[:, kept]) for part in _parts(encoder, test)]
    return np.concatenate(parts)


def _names(encoder: Encoder) -> list[str]:
    """Names of the columns that `_features` makes."""
    withheld = ablation_of(encoder)
    names = np.array(encoder.dense_names)[~withheld.candidate_dense].tolist()
    return names if withheld.user else [*names, *encoder.user_dense_names]


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
    withheld = ablation_of(encoder)
    candidate = encoded.candidate_dense[rows][:, ~withheld.candidate_dense]
    if withheld.user:
        return candidate
    return np.concatenate([candidate, encoded.dense_BG[chosen].repeat(lengths, axis=0)], axis=1)
