"""Evaluation of a run on the test period, beside three baselines on the same candidates."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from feature_repo.history import Histories
from feature_repo.schema import Contract
from modeling.batch import Encoded, Encoder, RequestColumns
from modeling.dataset import Split
from modeling.errors import NotTrainedError
from modeling.metrics import PROBABILITY, RANKING, Estimate, evaluate, ndcg_at
from modeling.models.base import Ranker
from modeling.trainer import predict

MODEL = "model"
EMPTY = "same network, empty history"
FREQUENCY = "own frequency"
POPULARITY = "popularity to date"
HISTORY_BINS = (0, 1, 5, 20, 50, 100, 250, 1_000_000_000)


@dataclass(frozen=True)
class UnknownFirst:
    """How often an item that nobody knows comes first among a request's candidates.

    Args:
        first: share of requests.
        chance: what it would be if scores were drawn at random.
        most: the largest share that chance explains, at three standard deviations.
        percentile: mean place among the others, 0 for below all.
    """

    first: float
    chance: float
    most: float
    percentile: float


@dataclass(frozen=True)
class Evaluation:
    """Metrics of the model and the baselines, the figures behind the report's pictures, and what
    unknown items do.
    """

    metrics: dict[str, dict[str, Estimate]]
    figures: dict[str, Any]
    counts: dict[str, int]
    unknown: UnknownFirst


def evaluate_run(model: Ranker, encoder: Encoder, test: Split) -> Evaluation:
    """Everything that is measured of a model on the test period.

    Raises:
        ScoresError: the model gives NaN.
    """
    requests = test.requests
    encoded = encoder.featurise(requests)
    logits = predict(model, encoder, encoded)
    empty = predict(model, encoder, encoder.featurise(without_history(requests, encoder.contract)))
    users = test.users.dictionary_encode().indices.to_numpy()
    popularity = (
        pc.fill_null(requests.candidate_columns["count_total"], 0).to_numpy().astype(np.float64)
    )
    scorings = {
        MODEL: (logits, _sigmoid(logits)),
        EMPTY: (empty, _sigmoid(empty)),
        FREQUENCY: (test.purchases_of_candidate.astype(np.float64), None),
        POPULARITY: (popularity, None),
    }
    labels, offsets = encoded.labels, encoded.candidate_offsets
    found = {
        name: evaluate(labels, scores, offsets, users, probability)
        for name, (scores, probability) in scorings.items()
    }
    counts = {"requests": len(requests), "candidates": len(requests.candidate_keys)}
    return Evaluation(
        found,
        picture_figures(encoded, logits, test.history_lengths),
        counts,
        unknown_first(model, encoder, encoded, logits),
    )


def unknown_first(
    model: Ranker, encoder: Encoder, encoded: Encoded, logits: np.ndarray
) -> UnknownFirst:
    """Score one unknown item for each request, and see where it would stand."""
    sizes, offsets = encoded.num_candidates, encoded.candidate_offsets
    unknown = predict(model, encoder, encoder.unknown_candidates(encoded))
    best = np.maximum.reduceat(logits, offsets[:-1])
    below = (
        np.add.reduceat((logits < np.repeat(unknown, sizes)).astype(np.float64), offsets[:-1])
        / sizes
    )
    chance = 1 / (sizes + 1)
    spread = math.sqrt(float((chance * (1 - chance)).sum())) / len(sizes)
    mean = float(chance.mean())
    return UnknownFirst(
        float((unknown > best).mean()), mean, mean + 3 * spread, float(below.mean())
    )


def unknown_line(unknown: dict[str, float]) -> str:
    """The same in a line, from `evaluation.json`."""
    return (
        f"an item that nobody knows comes first in {unknown['first']:.2%} of requests (by chance {unknown['chance']:.2%}), "
        f"above {unknown['percentile']:.0%} of the candidates on average"
    )


def floors(metrics: dict[str, Any]) -> list[str]:
    """Scorings that a model must not fall below: those that need no training."""
    return [name for name in (FREQUENCY, POPULARITY) if name in metrics]


def without_history(requests: RequestColumns, contract: Contract) -> RequestColumns:
    """The same requests of users of whom nothing is known yet."""

    def gather(chosen: np.ndarray, length: int) -> Histories:
        histories = requests.gather(chosen, length)
        nothing = np.zeros(len(chosen), np.int64)
        return histories.take(nothing, nothing)

    known = {c.name for c in contract.table("user_stats").columns}
    nothing_known = {
        n: pa.nulls(len(c), c.type) if n in known else c for n, c in requests.user_columns.items()
    }
    return replace(requests, gather=gather, user_columns=nothing_known)


def picture_figures(
    encoded: Encoded, logits: np.ndarray, history_lengths: np.ndarray
) -> dict[str, Any]:
    """Numbers for calibration, NDCG@10 by history length and the score histogram."""
    probability, labels = _sigmoid(logits), encoded.labels
    order = np.array_split(np.argsort(probability, kind="stable"), 20)
    ndcg = ndcg_at(labels, logits, encoded.candidate_offsets)
    by_length = []
    for low, high in itertools.pairwise(HISTORY_BINS):
        inside = (history_lengths >= low) & (history_lengths < high) & ~np.isnan(ndcg)
        if inside.any():
            if high == low + 1:
                name = str(low)
            else:
                name = f"{low}+" if high == HISTORY_BINS[-1] else f"{low}-{high - 1}"
            by_length.append([name, int(inside.sum()), float(ndcg[inside].mean())])
    edges = np.linspace(0, 1, 41)
    return {
        "calibration": [
            [float(probability[part].mean()), float(labels[part].mean())]
            for part in order
            if len(part)
        ],
        "ndcg_by_history_length": by_length,
        "histogram": {
            "edges": edges.tolist(),
            "positive": np.histogram(probability[labels > 0], edges)[0].tolist(),
            "negative": np.histogram(probability[labels == 0], edges)[0].tolist(),
        },
    }


def write(folder: Path, identity: str, found: Evaluation) -> None:
    """Write `evaluation.json` in the run's folder; what is undefined is left out there."""
    metrics = {
        name: {
            metric: asdict(estimate)
            for metric, estimate in row.items()
            if not math.isnan(estimate.value)
        }
        for name, row in found.metrics.items()
    }
    content = {
        "identity": identity,
        "metrics": metrics,
        "figures": found.figures,
        "counts": found.counts,
        "unknown": asdict(found.unknown),
    }
    draft = folder / ".evaluation.draft"
    draft.write_text(json.dumps(content, indent=1, allow_nan=False))
    draft.replace(folder / "evaluation.json")


def read(folder: Path) -> dict[str, Any]:
    """The run's `evaluation.json`.

    Raises:
        NotTrainedError: the run has not been evaluated.
    """
    path = folder / "evaluation.json"
    if not path.exists():
        raise NotTrainedError(
            f"{folder} has no evaluation: run `python -m modeling evaluate` first"
        )
    return json.loads(path.read_text())


def metric_rows(metrics: dict[str, dict[str, dict[str, float]]]) -> list[list[str]]:
    """The metrics table as text: a heading row, then a row for each scoring."""
    names = [*RANKING, *PROBABILITY]
    rows = [["", *(n.replace("_", " ") for n in names)]]
    for scoring, values in metrics.items():
        cells = []
        for name in names:
            value = values.get(name)
            cells.append(
                f"{value['value']:.4f} ±{(value['high'] - value['low']) / 2:.4f}" if value else "–"
            )
        rows.append([scoring, *cells])
    return rows


def unbeaten(
    metrics: dict[str, dict[str, dict[str, float]]], names: tuple[str, ...] = ("ndcg@10", "gauc")
) -> list[str]:
    """Baselines whose interval overlaps the model's, or lies above it."""
    model = {name: Estimate(**metrics[MODEL][name]) for name in names if name in metrics[MODEL]}
    return [
        f"{scoring} on {name}"
        for scoring in metrics
        if scoring != MODEL
        for name in model
        if name in metrics[scoring] and not model[name].beats(Estimate(**metrics[scoring][name]))
    ]


def contract_line(contract: Contract, counts: dict[str, int]) -> str:
    """What was evaluated, in a line."""
    return f"{contract.spec.title}, requests from {contract.spec.requests.test_from[:10]}: {counts['requests']:,} requests, {counts['candidates']:,} candidates"


def _sigmoid(logits: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-logits.astype(np.float64)))
