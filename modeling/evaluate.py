"""Evaluation of a run on the test period, beside baselines on the same candidates."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from feature_repo.contract import Contract
from feature_repo.schema import DatasetSpec, Task
from modeling.dataset import Split
from modeling.encoder import Encoded, Encoder, RequestColumns
from modeling.errors import NotTrainedError
from modeling.floors import FREQUENCY, POPULARITY, floor_scores, floors_of
from modeling.importance import permutation_importance
from modeling.metrics import PROBABILITY, RANKING, Estimate, defined, evaluate, ndcg_at
from modeling.models.base import Ranker
from modeling.rungs import empty_sketch, nulled, rungs, without_events
from modeling.tasks import ranking_logits, sigmoid
from modeling.trainer import predict

MODEL = "model"
EMPTY = "same network, empty history"
AS_RANKED = "model, as ranked"  # where several tasks make the score
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
    """Metrics of the model and the baselines for each task, the figures behind the report's
    pictures (of the primary task), what unknown items do, and what answers are worth that do without
    something (of the primary task, by the name of the reason).
    """

    tasks: dict[str, dict[str, dict[str, Estimate]]]
    primary: str
    figures: dict[str, Any]
    counts: dict[str, int]
    unknown: UnknownFirst
    rungs: dict[str, dict[str, Estimate]]

    @property
    def metrics(self) -> dict[str, dict[str, Estimate]]:
        """Of the primary task."""
        return self.tasks[self.primary]


def primary_task(spec: DatasetSpec) -> str:
    """The task that weighs most in what is ranked by; of like ones the first."""
    return max(spec.weights.items(), key=lambda named: named[1])[0]


def primary_number(spec: DatasetSpec) -> int:
    """Its number among the tasks."""
    return [task.name for task in spec.tasks].index(primary_task(spec))


def evaluate_run(model: Ranker, encoder: Encoder, test: Split) -> Evaluation:
    """Everything that is measured of a model on the test period, task by task.

    Each task's scores are its own logits, on the candidates of which it is defined; where there are
    several tasks, what requests are ranked by is measured beside them.

    Raises:
        ScoresError: the model gives NaN.
    """
    requests, spec = test.requests, encoder.contract.spec
    encoded = encoder.featurise(requests)
    logits = predict(model, encoder, encoded)
    ranked = ranking_logits(spec, logits)
    empty = predict(model, encoder, encoder.featurise(without_history(requests, encoder.contract)))
    users = test.users.dictionary_encode().indices.to_numpy()
    scored = floor_scores(test)
    assert requests.labels is not None
    found: dict[str, dict[str, dict[str, Estimate]]] = {}
    for number, task in enumerate(spec.tasks):
        rows = {
            MODEL: measure(encoded, users, logits[:, number], number),
            EMPTY: measure(encoded, users, empty[:, number], number),
        }
        if len(spec.tasks) > 1:
            rows[AS_RANKED] = measure(encoded, users, ranked, number, calibrated=False)
        floors = floors_of(scored, requests.labels[:, number], requests.candidate_offsets)
        for name, scores in floors.items():
            rows[name] = measure(encoded, users, scores, number, calibrated=False)
        found[task.name] = rows
    primary, number = primary_task(spec), primary_number(spec)
    figures = picture_figures(encoded, logits, spec.tasks, primary, test.history_lengths)
    importance = permutation_importance(model, encoder, encoded, number)
    figures["importance"] = [asdict(one) for one in importance]
    worth = {
        name: measure(
            encoded, users, predict(model, encoder, encoder.featurise(lacking))[:, number], number
        )
        for name, lacking in rungs(requests, encoder.contract).items()
    }
    counts = {"requests": len(requests), "candidates": len(requests.candidate_keys)}
    return Evaluation(
        found,
        primary,
        figures,
        counts,
        unknown_first(model, encoder, encoded, ranked),
        worth,
    )


def measure(
    encoded: Encoded, users: np.ndarray, scores: np.ndarray, task: int, *, calibrated: bool = True
) -> dict[str, Estimate]:
    """Metrics of one task on the candidates of which it is defined; all undefined where it is of
    none.

    Args:
        users: number of each request's user.
        scores: of all candidates; logits where `calibrated`.
    """
    known = defined(np.asarray(encoded.labels)[:, task], encoded.candidate_offsets)
    if not len(known.rows):
        names = (*RANKING, *(PROBABILITY if calibrated else ()))
        return {name: Estimate(math.nan, math.nan, math.nan) for name in names}
    own = scores[known.rows]
    _, numbered = np.unique(users[known.requests], return_inverse=True)
    probability = sigmoid(own) if calibrated else None
    return evaluate(known.labels, own, known.offsets, numbered, probability)


def unknown_first(
    model: Ranker, encoder: Encoder, encoded: Encoded, logits: np.ndarray
) -> UnknownFirst:
    """Score one unknown item for each request, and see where it would stand.

    Args:
        logits: of all candidates, as they are ranked.
    """
    sizes, offsets = encoded.num_candidates, encoded.candidate_offsets
    scored = predict(model, encoder, encoder.unknown_candidates(encoded))
    unknown = ranking_logits(encoder.contract.spec, scored)
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


def rungs_line(evaluation: dict[str, Any]) -> str:
    """What answers are worth that do without something, in a line."""
    found = {name: row["ndcg@10"] for name, row in evaluation["rungs"].items() if row["ndcg@10"]}
    told = ", ".join(f"{name} {value['value']:.3f}" for name, value in found.items())
    return f"NDCG@10 of answers that do without something: {told}"


def floors(metrics: dict[str, Any]) -> list[str]:
    """Scorings that a model must not fall below: those that need no training."""
    return [name for name in (FREQUENCY, POPULARITY) if name in metrics]


def without_history(requests: RequestColumns, contract: Contract) -> RequestColumns:
    """The same requests of users of whom nothing is known yet."""
    known = [column.name for column in contract.table("user_stats").columns]
    empty = nulled(without_events(requests), known)
    return replace(empty, read_sketch=empty_sketch(contract))


def picture_figures(
    encoded: Encoded,
    logits_NT: np.ndarray,
    tasks: tuple[Task, ...],
    primary: str,
    history_lengths: np.ndarray,
) -> dict[str, Any]:
    """Numbers for calibration, NDCG@10 by history length and the score histogram, of one task."""
    number = [task.name for task in tasks].index(primary)
    known = defined(np.asarray(encoded.labels)[:, number], encoded.candidate_offsets)
    logits, labels = logits_NT[known.rows, number], known.labels
    history_lengths, probability = history_lengths[known.requests], sigmoid(logits)
    order = np.array_split(np.argsort(probability, kind="stable"), 20)
    ndcg = ndcg_at(labels, logits, known.offsets)
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
    """Write `evaluation.json` in the run's folder; what is undefined is null there."""
    content = {
        "identity": identity,
        "metrics": {name: plain_metrics(row) for name, row in found.metrics.items()},
        "primary": found.primary,
        "tasks": {
            task: {name: plain_metrics(row) for name, row in rows.items()}
            for task, rows in found.tasks.items()
        },
        "figures": found.figures,
        "counts": found.counts,
        "unknown": asdict(found.unknown),
        "rungs": {name: plain_metrics(row) for name, row in found.rungs.items()},
    }
    draft = folder / ".evaluation.draft"
    draft.write_text(json.dumps(content, indent=1, allow_nan=False))
    draft.replace(folder / "evaluation.json")


def plain_metrics(row: dict[str, Estimate]) -> dict[str, dict[str, float] | None]:
    """Metrics as JSON holds them: null where one is undefined."""
    return {
        name: None if math.isnan(estimate.value) else asdict(estimate)
        for name, estimate in row.items()
    }


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


def undefined(metrics: dict[str, dict[str, Any]]) -> str:
    """Which metrics of the model are undefined, in a line; empty where all are numbers."""
    names = [name for name, value in metrics[MODEL].items() if value is None]
    if not names:
        return ""
    return f"{', '.join(names)}: undefined, for all labels of the period are alike"


def unbeaten(
    metrics: dict[str, dict[str, dict[str, float]]], names: tuple[str, ...] = ("ndcg@10", "gauc")
) -> list[str]:
    """Baselines whose interval overlaps the model's, or lies above it."""
    model = {name: Estimate(**metrics[MODEL][name]) for name in names if metrics[MODEL].get(name)}
    return [
        f"{scoring} on {name}"
        for scoring in metrics
        if scoring not in (MODEL, AS_RANKED)
        for name in model
        if metrics[scoring].get(name) and not model[name].beats(Estimate(**metrics[scoring][name]))
    ]


def contract_line(contract: Contract, counts: dict[str, int]) -> str:
    """What was evaluated, in a line."""
    return f"{contract.spec.title}, requests from {contract.spec.requests.test_from[:10]}: {counts['requests']:,} requests, {counts['candidates']:,} candidates"
