"""Trees of a run: fitted on the shards that networks train on, calibrated, and blended with a network."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from modeling import models
from modeling.console import ProgressLines, say
from modeling.inputs.encoder import Encoded, Encoder
from modeling.inputs.tasks import sampling_shift
from modeling.metrics import defined
from modeling.models.base import Ranker
from modeling.recipes import Training
from modeling.training.trainer import predict, quality, share_hidden
from modeling.trees.blend import Blend, order_weights
from modeling.trees.fitting import calibrated, fit_forests, tree_rows
from modeling.trees.trees import Trees


@dataclass(frozen=True)
class FittedTrees:
    """Trees, and what is said of their training.

    Args:
        summary: for `run.json`.
        metrics: a line for each tree, for `metrics.jsonl`.
        logits_NT: of the validation period's candidates.
    """

    trees: Trees
    summary: dict[str, Any]
    metrics: list[dict[str, Any]]
    logits_NT: np.ndarray


@dataclass(frozen=True)
class FittedBlend:
    """A blend, and what is said of its training.

    Args:
        summary: for `run.json`: what the blend reaches, and what both cost.
        metrics: a line for each tree, for `metrics.jsonl`.
    """

    blend: Blend
    summary: dict[str, Any]
    metrics: list[dict[str, Any]]


def fit_trees(
    config: dict[str, Any],
    encoder: Encoder,
    training: Training,
    train: Encoded,
    validation: Encoded,
    stopping: Encoded | None = None,
) -> FittedTrees:
    """Fit a forest for each task and calibrate it on the validation period.

    Args:
        training: its seed, and the share of candidates that it hides.
        stopping: requests on which trees stop to grow; default: the validation period.

    Raises:
        DataError: a task has not two labels of each kind.
    """
    trees = models.build("trees", config, encoder.sizes)
    assert isinstance(trees, Trees)
    progress = ProgressLines()

    metric = "log loss" if trees.config.objective == "binary" else "NDCG@10"
    metrics: list[dict[str, Any]] = []

    def tell(tree: int, figure: float) -> None:
        metrics.append({"kind": "tree", "step": tree, "metric": metric, "validation": figure})
        progress(f"trees: {tree} of {trees.config.num_trees}, validation {metric} {figure:.4f}")

    # 1. The forests.
    started = time.process_time()
    hidden = share_hidden(training, train)
    rows = tree_rows(encoder, train, hidden, training.seed)
    held_out = tree_rows(encoder, validation if stopping is None else stopping)
    texts = fit_forests(trees.config, encoder, rows, held_out, training.seed, tell)
    trees.take_texts(dict(zip(trees.text_names, texts, strict=True)))
    # 2. Sums as logits, of the share of positives that training has, as a network's are.
    sums = predict(trees, encoder, validation)
    labels = np.asarray(validation.labels)
    shift_T = sampling_shift(encoder.contract.spec, np.asarray(train.labels), labels)
    for task, shift in enumerate(shift_T):
        scale, moved = calibrated(sums[:, task], labels[:, task])
        trees.scale_T[task] = scale
        trees.shift_T[task] = moved - shift
    logits_NT = sums * trees.scale_T.numpy() + trees.shift_T.numpy()
    found = quality(encoder.contract.spec, validation, logits_NT)
    spent = time.process_time() - started
    number = sum(forest.num_trees for forest in trees.forests)
    return FittedTrees(
        trees,
        {
            "steps": number,
            "epochs": 1,
            "trees": number,
            "best_validation_ndcg@10": found["ndcg@10"],
            "cpu_seconds": spent,
            "curve": [[spent, found["ndcg@10"]]],
            "training": asdict(training),
        },
        metrics,
        logits_NT,
    )


def fit_blend(
    network: Ranker,
    summary: dict[str, Any],
    config: dict[str, Any],
    encoder: Encoder,
    training: Training,
    train: Encoded,
    validation: Encoded,
) -> FittedBlend:
    """Fit trees beside a trained network, and weigh both, for each task.

    Trees stop to grow on one half of the validation requests, and the other half weighs them: by the requests that
    stopped them they seem better than they are, and the network would hardly have a say.

    Args:
        summary: of the network's training.
        config: of the trees.

    Raises:
        DataError: a task has not two labels of each kind, in training or in the half that stops the trees.
    """
    spec = encoder.contract.spec
    first, second = _halves(validation)
    fitted = fit_trees(config, encoder, training, train, validation, stopping=first)
    blend = Blend(network, fitted.trees)
    labels = np.asarray(validation.labels)
    shift_T = sampling_shift(spec, np.asarray(train.labels), labels)
    both = np.stack([predict(network, encoder, validation), fitted.logits_NT], axis=-1)
    logits_NT = np.empty(both.shape[:2])
    for task, shift in enumerate(shift_T):
        scores = both[:, task].astype(np.float64)
        known = defined(np.asarray(second.labels)[:, task], validation.candidate_offsets)
        # First the order within requests, then probabilities, which leave it as it is.
        weights = order_weights(scores[known.rows], known.labels, known.offsets)
        if weights[0] == 0:
            say(
                f"{spec.tasks[task].name}: the network has no weight, trees alone rank as well: the recipe `trees` serves the same without it",
                style="yellow",
            )
        scale, moved = calibrated(scores @ weights, labels[:, task])
        blend.weight_T2[task] = blend.weight_T2.new_tensor(scale * weights)
        blend.shift_T[task] = moved - shift
        logits_NT[:, task] = scale * (scores @ weights) + moved - shift
    found = quality(spec, validation, logits_NT)
    return FittedBlend(
        blend,
        summary
        | {
            "best_validation_ndcg@10": found["ndcg@10"],
            "of_the_network": summary["best_validation_ndcg@10"],
            "of_the_trees": fitted.summary["best_validation_ndcg@10"],
            "trees": fitted.summary["trees"],
            "weights": blend.weight_T2.tolist(),
            "cpu_seconds": summary["cpu_seconds"] + fitted.summary["cpu_seconds"],
        },
        fitted.metrics,
    )


def _halves(validation: Encoded) -> tuple[Encoded, Encoded]:
    """The period twice, each time with the labels of one half of its requests alone."""
    labels = np.asarray(validation.labels)
    middle = validation.candidate_offsets[len(validation) // 2]
    first = np.arange(len(labels))[:, None] < middle
    return (
        replace(validation, labels=np.where(first, labels, np.float32(np.nan))),
        replace(validation, labels=np.where(first, np.float32(np.nan), labels)),
    )
