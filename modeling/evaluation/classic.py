"""Trained baselines without ids and without a sequence, on the same numbers that rankers get: gradient-boosted
trees, which read categories too, and logistic regression.

A ranker's gain must show beside these. LightGBM fits the trees, in the way of served trees
(`modeling/trees`); scikit-learn the regression. What is missing (NaN) is a separate state for trees, and a flag
beside the mean for the regression.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from modeling.console import console
from modeling.errors import DataError
from modeling.inputs.augment import ablation_of
from modeling.inputs.columns import within
from modeling.inputs.encoder import Encoded, Encoder
from modeling.trees.fitting import (
    FEWEST,
    TreesConfig,
    calibrated,
    fit_forest,
    forest_scores,
    tree_rows,
)
from modeling.trees.forest import Forest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

Classic = Literal["trees", "logistic regression"]
CLASSICS: tuple[Classic, ...] = ("trees", "logistic regression")
# As strong as `python -m modeling train trees`
FULL_TREES = TreesConfig()
# In a quarter of the time, a little less well
QUICK_TREES = TreesConfig(
    "rank_xendcg", num_trees=150, num_leaves=40, learning_rate=0.1, patience=15
)
# Candidates that a baseline is fitted on at most
MOST_ROWS: dict[str, int] = {"trees": 1 << 21, "logistic regression": 1 << 18}
# Requests scored at a time
CHUNK = 2_000
# Values of a column without which it is left out
LEAST_KNOWN = 20


def classic_scores(
    kind: Classic,
    encoder: Encoder,
    train: Encoded,
    validation: Encoded,
    test: Encoded,
    task: int,
    seed: int,
    trees: TreesConfig = FULL_TREES,
) -> np.ndarray:
    """Scores of all test candidates: logits, the trees' by the validation period. Columns with hardly any known value
    are left out and said; where there is nothing to learn from, all scores are 0, which is said too.

    Args:
        encoder: says which inputs are withheld.
        train: requests are taken evenly from all of it, up to `MOST_ROWS` candidates of the kind.
        validation: on which trees stop to grow and become logits; the regression has no use for it.
        task: number of the label.

    Raises:
        DataError: scikit-learn is not installed.
    """
    if kind == "trees":
        return fit_trees(trees, encoder, train, validation, task, seed)(test)
    return _regression_scores(encoder, train, test, task, seed)


def fit_trees(
    config: TreesConfig,
    encoder: Encoder,
    train: Encoded,
    validation: Encoded,
    task: int,
    seed: int,
) -> Callable[[Encoded], np.ndarray]:
    """Trees that make logits of all candidates of a period; zeros where there is nothing to learn from."""
    rows = tree_rows(encoder, train, seed=seed, most=MOST_ROWS["trees"])
    held_out = tree_rows(encoder, validation)
    width = len(encoder.dense_names) + len(encoder.user_dense_names)
    names = np.array([*encoder.dense_names, *encoder.user_dense_names])
    known = ~np.isnan(rows.rows_NF[:, :width])
    _say_unknown("trees", names[(known.sum(0) < LEAST_KNOWN) & ~_withheld(encoder)])
    try:
        fitted = fit_forest(config, encoder, rows, held_out, task, seed)
    except DataError:
        return lambda period: _nothing("trees", period)
    forest = Forest(fitted.text)
    # Sums that order requests are no logits yet.
    scale, shift = calibrated(
        forest_scores(forest, encoder, validation), held_out.labels_NT[:, task]
    )
    return lambda period: forest_scores(forest, encoder, period) * (scale or 1.0) + shift


def _regression_scores(
    encoder: Encoder, train: Encoded, test: Encoded, task: int, seed: int
) -> np.ndarray:
    kind = "logistic regression"
    # 1. Sample the training period; leave out columns with hardly any known value.
    features, labels = _sampled(encoder, train, task, MOST_ROWS[kind], seed)
    kept = (~np.isnan(features)).sum(0) >= LEAST_KNOWN
    names = np.array([*encoder.dense_names, *encoder.user_dense_names])
    _say_unknown(kind, names[~_withheld(encoder)][~kept])
    # 2. With no column, or fewer than two labels of a kind, every score is 0.
    rarest = int(np.bincount(labels.astype(np.int64), minlength=2).min())
    if not kept.any() or rarest < FEWEST:
        return _nothing(kind, test)
    # 3. Fit, then score the test period in parts.
    import torch
    from threadpoolctl import threadpool_limits

    model = _regression(seed)
    # scikit-learn brings an OpenMP of its own, whose threads would spin beside those of others.
    with threadpool_limits(torch.get_num_threads()):
        model.fit(features[:, kept], labels)
        parts = [model.decision_function(part[:, kept]) for part in _parts(encoder, test)]
    return np.concatenate(parts)


def _say_unknown(kind: str, names: np.ndarray) -> None:
    if len(names):
        console.print(
            f"{kind}: without {', '.join(names)}, of which hardly anything is known",
            highlight=False,
        )


def _nothing(kind: str, test: Encoded) -> np.ndarray:
    console.print(f"{kind}: nothing to learn from; every score is 0", highlight=False)
    return np.zeros(len(test.candidate_item))


def _withheld(encoder: Encoder) -> np.ndarray:
    """Which numbers of candidates and requests a comparison withholds, bool."""
    withheld = ablation_of(encoder)
    of_user = np.full(len(encoder.user_dense_names), withheld.user)
    return np.concatenate([withheld.candidate_dense, of_user])


def _regression(seed: int) -> Any:
    try:
        from sklearn.impute import SimpleImputer
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler
    except ImportError as error:
        raise DataError(
            "logistic regression needs scikit-learn: pip install scikit-learn"
        ) from error
    return make_pipeline(
        SimpleImputer(add_indicator=True, keep_empty_features=True),
        StandardScaler(),
        LogisticRegression(max_iter=300, random_state=seed),
    )


def _sampled(
    encoder: Encoder, train: Encoded, task: int, most: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Features and labels of requests spread evenly over the training period."""
    # The seed moves which requests are taken, so that seeds differ.
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
    of_request = encoded.dense_BG[chosen].repeat(lengths, axis=0)
    both = np.concatenate([encoded.candidate_dense[rows], of_request], axis=1)
    return both[:, ~_withheld(encoder)]
