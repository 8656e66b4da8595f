"""Evaluation of a run on the test period, beside baselines on the same candidates."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from feature_repo.atomic import atomic_write
from feature_repo.contract.contract import Contract
from feature_repo.contract.schema import Task
from modeling.claims import Difference
from modeling.errors import NotTrainedError
from modeling.evaluation.importance import permutation_importance
from modeling.inputs.augment import unknown_candidates
from modeling.inputs.degradations import Lost, degraded, without
from modeling.inputs.encoder import Encoded, Encoder
from modeling.inputs.tasks import primary_number, primary_task, ranking_logits, sigmoid
from modeling.metrics import PROBABILITY, RANKING, Estimate, defined, evaluate, ndcg_at
from modeling.models.base import Ranker
from modeling.summaries.as_served import as_served
from modeling.training.trainer import predict
from modeling.training_set.simple_baselines import (
    FREQUENCY,
    POPULARITY,
    RANDOM,
    TREES,
    baselines_of,
)
from modeling.training_set.training_set import Period

MODEL = "model"
EMPTY = "same network, empty history"
# Name of the row of the score that several tasks make
AS_RANKED = "model, as ranked"
EMPTY_HISTORY = Lost(events=True, statistics=True, sketch="empty", tokens=True)
# NDCG@10 of a random order, from where on the figure tells nothing
RANDOM_TELLS = 0.9
HISTORY_BINS = (0, 1, 5, 20, 50, 100, 250, 1_000_000_000)


@dataclass(frozen=True)
class UnknownFirst:
    """The place of an unknown item among a request's candidates.

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
    degraded: dict[str, dict[str, Estimate]]
    # The model less trees on the same numbers, a difference for each metric; none of trees alone
    against_trees: Sequence[Difference] = ()
    # On the primary task's logits, before they are taken for probabilities
    shift: float = 0.0
    # Of all candidates, for the primary task; not written
    logits: np.ndarray = field(default_factory=lambda: np.zeros(0), repr=False)

    @property
    def metrics(self) -> dict[str, dict[str, Estimate]]:
        return self.tasks[self.primary]

    @property
    def nothing_to_rank(self) -> bool:
        """True if requests have so few candidates that their order tells nothing."""
        return math.isnan(self.metrics[RANDOM]["ndcg@10"].value)


def evaluate_run(
    model: Ranker,
    encoder: Encoder,
    test: Period,
    shift_T: np.ndarray | None = None,
    tell: Callable[[str], None] = lambda text: None,
) -> Evaluation:
    """Everything that is measured of a model on the test period, task by task, as a server would rank its requests
    (`as_served.py`).

    Each task's scores are its own logits, on the candidates with a defined label; where there are
    several tasks, what requests are ranked by is measured beside them.

    Args:
        shift_T: added to each task's logits before they are taken for probabilities: see
            `sampling_shift`.
        tell: takes a line for each stage.

    Raises:
        ScoresError: the model gives NaN.
    """
    encoded = as_served(model, encoder, test.encoded, tell)
    spec = encoder.contract.spec
    shift_T = np.zeros(len(spec.tasks)) if shift_T is None else shift_T
    labels = np.asarray(encoded.labels)
    # 1. Scores: of the model, and of the same network without a history.
    tell(f"evaluate: scoring {len(encoded.candidate_item):,} candidates")
    logits = predict(model, encoder, encoded)
    ranked = ranking_logits(spec, logits)
    tell("evaluate: the same with an empty history")
    empty = predict(model, encoder, without(encoder, encoded, EMPTY_HISTORY))
    found: dict[str, dict[str, dict[str, Estimate]]] = {}
    # 2. Each task, with baselines that need no training.
    # NDCG@10 of a random order, by task
    random: dict[str, float] = {}
    # Of one task that is given nothing the order is the task's own.
    mixes = len(spec.weights) > 1 or bool(spec.tasks[primary_number(spec)].given)
    for number, task in enumerate(spec.tasks):
        tell(f"evaluate: metrics of {task.name}, baselines")
        shift = float(shift_T[number])
        rows = {
            MODEL: measure(encoded, test.users, logits[:, number], number, shift=shift),
            EMPTY: measure(encoded, test.users, empty[:, number], number, shift=shift),
        }
        if mixes or task.name != primary_task(spec):
            rows[AS_RANKED] = measure(encoded, test.users, ranked, number, calibrated=False)
        baselines = baselines_of(test.baselines, labels[:, number], encoded.candidate_offsets)
        for name, scores in baselines.items():
            rows[name] = measure(encoded, test.users, scores, number, calibrated=False)
        random[task.name] = rows[RANDOM]["ndcg@10"].value
        found[task.name] = without_telling_nothing(rows, random[task.name])
    primary = primary_task(spec)
    number = primary_number(spec)
    # 3. Pictures, what the ranking rests on, and what degraded answers are worth.
    figures = picture_figures(encoded, logits + shift_T, spec.tasks, primary, test.history_lengths)
    tell("evaluate: what the ranking rests on")
    importance = permutation_importance(model, encoder, encoded, number)
    figures["importance"] = [asdict(one) for one in importance]
    worth = {}
    for name, lacking in degraded(encoder, encoded).items():
        tell(f"evaluate: answers by {name}")
        scores = predict(model, encoder, lacking)[:, number]
        worth[name] = measure(encoded, test.users, scores, number, shift=float(shift_T[number]))
    if encoded is not test.encoded:
        newest = {f"model, newest {encoder.history_length:,} events": worth["no_tokens"]}
        found[primary] |= without_telling_nothing(newest, random[primary])
    counts = {"requests": len(encoded), "candidates": len(encoded.candidate_item)}
    return Evaluation(
        found,
        primary,
        figures,
        counts,
        unknown_first(model, encoder, encoded, ranked),
        without_telling_nothing(worth, random[primary]),
        shift=float(shift_T[number]),
        logits=logits[:, number],
    )


def without_telling_nothing(
    rows: dict[str, dict[str, Estimate]], random: float
) -> dict[str, dict[str, Estimate]]:
    """The metrics of a task without those of an order where a random one is nearly perfect: requests
    have so few candidates that they are no ranking.

    Args:
        random: NDCG@10 of a random order.
    """
    if not random >= RANDOM_TELLS:
        return rows
    return {name: without_ranking(values) for name, values in rows.items()}


def without_ranking(row: dict[str, Estimate]) -> dict[str, Estimate]:
    """Metrics without those of an order within requests."""
    return row | dict.fromkeys(("ndcg@10", "mrr"), Estimate(math.nan, math.nan, math.nan))


def estimates(plain: dict[str, dict[str, float] | None]) -> dict[str, Estimate]:
    """Read the estimates that `plain_metrics` wrote."""
    nothing = Estimate(math.nan, math.nan, math.nan)
    return {name: Estimate(**value) if value else nothing for name, value in plain.items()}


def measure(
    encoded: Encoded,
    users: np.ndarray,
    scores: np.ndarray,
    task: int,
    *,
    calibrated: bool = True,
    shift: float = 0.0,
) -> dict[str, Estimate]:
    """Measure one task on the candidates with a defined label; all metrics are undefined if there are
    none.

    Args:
        users: number of each request's user.
        scores: of all candidates; logits where `calibrated`.
        shift: added to logits that are taken for probabilities.
    """
    known = defined(np.asarray(encoded.labels)[:, task], encoded.candidate_offsets)
    if not len(known.rows):
        names = (*RANKING, *(PROBABILITY if calibrated else ()))
        return {name: Estimate(math.nan, math.nan, math.nan) for name in names}
    own = scores[known.rows]
    _, numbered = np.unique(users[known.requests], return_inverse=True)
    probability = sigmoid(own + shift) if calibrated else None
    return evaluate(known.labels, own, known.offsets, numbered, probability)


def unknown_first(
    model: Ranker, encoder: Encoder, encoded: Encoded, logits: np.ndarray
) -> UnknownFirst:
    """Score one unknown item for each request, and see where it would stand.

    Args:
        logits: of all candidates, as they are ranked.
    """
    sizes = encoded.num_candidates
    offsets = encoded.candidate_offsets
    scored = predict(model, encoder, unknown_candidates(encoder, encoded))
    unknown = ranking_logits(encoder.contract.spec, scored)
    best = np.maximum.reduceat(logits, offsets[:-1])
    below = (
        np.add.reduceat((logits < np.repeat(unknown, sizes)).astype(np.float64), offsets[:-1])
        / sizes
    )
    chance = 1 / (sizes + 1)
    # Standard deviation of the share: each request is an independent Bernoulli draw.
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


def degraded_line(evaluation: dict[str, Any]) -> str:
    """Say in a line what degraded answers are worth."""
    found = {name: row["ndcg@10"] for name, row in evaluation["degraded"].items() if row["ndcg@10"]}
    line = ", ".join(f"{name} {value['value']:.3f}" for name, value in found.items())
    return f"NDCG@10 of answers that do without something: {line or 'undefined'}"


def untrained(metrics: dict[str, Any]) -> list[str]:
    """List the scorings that need no training, below which a model must not fall."""
    return [name for name in (FREQUENCY, POPULARITY) if name in metrics]


def best_baselines(metrics: dict[str, Any]) -> list[str]:
    """The best baseline by NDCG@10 that was fitted, and the best that needs no training."""
    found = []
    for names in ((TREES,), untrained(metrics)):
        known = [n for n in names if metrics.get(n, {}).get("ndcg@10")]
        found += sorted(known, key=lambda n: -metrics[n]["ndcg@10"]["value"])[:1]
    return found


def beside_trees(evaluation: dict[str, Any]) -> str:
    """How a model stands beside trees, in a sentence from `evaluation.json`; "" where there is nothing to compare."""
    found = evaluation["against_trees"].get("ndcg@10")
    if found is None:
        return ""
    line = f"{found['value']:+.4f} [{found['low']:+.4f}, {found['high']:+.4f}]"
    if found["low"] > 0:
        return f"the model ranks better than trees on the same numbers: NDCG@10 {line}"
    if found["high"] < 0:
        return f"trees on the same numbers rank better than the model: NDCG@10 {line}"
    return f"the model and trees on the same numbers cannot be told apart: NDCG@10 {line}"


def picture_figures(
    encoded: Encoded,
    logits_NT: np.ndarray,
    tasks: tuple[Task, ...],
    primary: str,
    history_lengths: np.ndarray,
) -> dict[str, Any]:
    """Numbers for calibration, NDCG@10 by history length and the score histogram, of one task."""
    # 1. The task's candidates with a defined label, and the requests that have some.
    number = [task.name for task in tasks].index(primary)
    known = defined(np.asarray(encoded.labels)[:, number], encoded.candidate_offsets)
    logits = logits_NT[known.rows, number]
    labels = known.labels
    history_lengths = history_lengths[known.requests]
    probability = sigmoid(logits)
    # 2. Calibration: twenty bins of equally many candidates.
    order = np.array_split(np.argsort(probability, kind="stable"), 20)
    # 3. NDCG@10 by history length, over requests with a positive.
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
    # 4. Histograms of positives and negatives over the same edges.
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
        "degraded": {name: plain_metrics(row) for name, row in found.degraded.items()},
        "shift": found.shift,
        "against_trees": {
            paired.metric: {"value": paired.value, "low": paired.low, "high": paired.high}
            for paired in found.against_trees
            if not math.isnan(paired.value)
        },
    }
    with atomic_write(folder / "evaluation.json") as draft:
        draft.write_text(json.dumps(content, indent=1, allow_nan=False))


def plain_metrics(row: dict[str, Estimate]) -> dict[str, dict[str, float] | None]:
    """Metrics as JSON holds them: null where one is undefined."""
    return {
        name: None if math.isnan(estimate.value + estimate.low) else asdict(estimate)
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
    if "auc" not in names and "ndcg@10" in names:
        return (
            f"{', '.join(names)}: undefined, for there is nothing to rank: a random order of so few candidates is nearly "
            "perfect. Say what belongs together by Requests.by, or by one time"
        )
    return (
        f"{', '.join(names)}: undefined, for all labels of the period are alike, or there is none"
    )


def calibration_line(evaluation: dict[str, Any]) -> str:
    """How far probabilities can be trusted, in a sentence."""
    ne = evaluation["metrics"][MODEL].get("ne")
    points = evaluation["figures"]["calibration"]
    predicted, happened = (sum(p[n] for p in points) / max(len(points), 1) for n in (0, 1))
    line = f"mean probability {predicted:.3f}, mean label {happened:.3f}"
    shift = evaluation.get("shift", 0.0)
    if shift:
        line += f", after {shift:+.2f} on each logit for the share of drawn negatives"
    if ne and ne["value"] >= 1:
        line += "; no better than the base rate: take them for scores, not for probabilities"
    return line


def contract_line(contract: Contract, counts: dict[str, int]) -> str:
    """Say in a line what was evaluated."""
    return f"{contract.spec.title}, requests from {contract.spec.requests.test_from[:10]}: {counts['requests']:,} requests, {counts['candidates']:,} candidates"
