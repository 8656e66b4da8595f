"""Scorings that need no training: what any ranker must beat on the same candidates."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pyarrow.compute as pc

from feature_repo.contract.arrow import value_codes
from feature_repo.contract.schema import STAT_WINDOWS_DAYS
from feature_repo.history.recall import Recall
from feature_repo.history.sketch import Layout
from modeling.inputs.encoder import Encoded, Encoder
from modeling.inputs.relations import RELATION_FEATURES
from modeling.metrics import defined, mean_ndcg
from modeling.training_set.dataset import JoinedRequests

RANDOM = "random"
# Fitted: `trained_baselines.py`
TREES = "trees"
POPULARITY = "popularity, best window"
FREQUENCY = "own frequency"
FADED = "own frequency, fading"
# Own frequency, items of equal frequency by popularity: personalised popularity (
# arXiv 2409.04329)
PERSONAL = "own frequency, then popularity"
# An item graph that nothing trained (arXiv 2605.07125), one step from the newest events: `near_all` of the relations
GRAPH = "item graph"
# Events that own frequencies are counted over, beside all
NEWEST = (50, 500)
HALF_LIFE_DAYS = 30.0
_WINDOW = "popularity:"


def baseline_scores(joined: JoinedRequests, visible: int | None = None) -> dict[str, np.ndarray]:
    """Scores of all candidates, by the name of each scoring.

    Args:
        visible: events before a request that are known; default: all.
    """
    requests = joined.requests
    found = {
        f"{_WINDOW}{name}": pc.fill_null(requests.candidate_columns[name], 0).to_numpy()
        for name in ("count_total", *(f"count_{days}d" for days in STAT_WINDOWS_DAYS))
    }
    layout = Layout((joined.log.contract.item.join_key,), (1,), (HALF_LIFE_DAYS,), 1)
    codes = value_codes(requests.items)[requests.candidate_keys]
    narrower = [newest for newest in NEWEST if visible is None or newest < visible]
    for newest in (*narrower, visible):
        recall = Recall(joined.log, layout, newest=newest, exact=True)
        counts = recall.read(
            joined.log_rows,
            joined.history_ends,
            requests.times,
            requests.candidate_offsets,
            [codes],
        )
        name = "" if newest == visible else f", last {newest}"
        found[FREQUENCY + name] = counts.counts_NCK[:, 0, 0]
        found[FADED + name] = counts.counts_NCK[:, 0, 1]
    popularity = found[f"{_WINDOW}count_total"]
    # Below 1, so that it decides between equal frequencies alone
    found[PERSONAL] = found[FREQUENCY] + popularity / (1 + popularity)
    return {name: scores.astype(np.float64) for name, scores in found.items()}


def graph_scores(encoder: Encoder, encoded: Encoded) -> np.ndarray:
    """How near each candidate is to the history along the item graph; 0 where nothing is known."""
    column = list(encoder.dense_names).index(RELATION_FEATURES[0])
    return np.nan_to_num(np.asarray(encoded.candidate_dense)[:, column])


def baselines_of(
    scores: Mapping[str, np.ndarray], labels: np.ndarray, offsets: np.ndarray
) -> dict[str, np.ndarray]:
    """Random, popularity, and the own frequencies that say anything; popularity over the window that is
    best on these very requests.

    Args:
        scores: of `baseline_scores`.
        labels: of all candidates, for one task; NaN where it is undefined.
        offsets: request b's candidates are `[offsets[b], offsets[b + 1])`.
    """
    known = defined(labels, offsets)
    windows = [values for name, values in scores.items() if name.startswith(_WINDOW)]
    quality = [mean_ndcg(known.labels, values[known.rows], known.offsets) for values in windows]
    own = _telling(
        {name: values for name, values in scores.items() if not name.startswith(_WINDOW)},
        known.rows,
    )
    best = windows[int(np.nanargmax(quality))] if not np.isnan(quality).all() else windows[0]
    random = np.random.default_rng(0).random(len(labels))
    return {**own, POPULARITY: best, RANDOM: random}


def _telling(own: Mapping[str, np.ndarray], rows: np.ndarray) -> dict[str, np.ndarray]:
    """Drop own frequencies that order nothing, because no user acts on an item twice, and
    windows that come to the same as all events.
    """
    found: dict[str, np.ndarray] = {}
    for name, values in own.items():
        counts = values[rows]
        whole = FADED if name.startswith(FADED) else FREQUENCY
        same = name != whole and whole in own and np.array_equal(counts, own[whole][rows])
        if len(counts) and counts.min() < counts.max() and not same:
            found[name] = values
    return found
