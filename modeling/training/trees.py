"""Trees of a run: fitted on the shards that networks train on, calibrated, and blended with a network."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from modeling import models
from modeling.console import ProgressLines, say
from modeling.inputs.encoder import Encoded, Encoder
from modeling.inputs.tasks import sampling_shift
from modeling.metrics import defined
from modeling.models.base import Ranker
from modeling.recipes import Training
from modeling.summaries.as_served import as_served
from modeling.training.trainer import predict, quality, share_hidden
from modeling.trees.blend import Blend, best_share, deviations
from modeling.trees.fitting import calibrated, fit_forests, tree_rows
from modeling.trees.trees import Trees


@dataclass(frozen=True)
class FittedTrees:
    """Trees, and what is said of their training.

    Args:
        summary: for `run.json`.
        metrics: a line for each tree, for `metrics.jsonl`.
        logits_NT: of the validation period's candidates.
        out_of_fold_NT: the same, each half by the trees that the other half stopped
            (`FittedForest.out_of_fold_N`); NaN for a task whose halves have too few labels.
    """

    trees: Trees
    summary: dict[str, Any]
    metrics: list[dict[str, Any]]
    logits_NT: np.ndarray
    out_of_fold_NT: np.ndarray


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
    out_of_fold: bool = False,
) -> FittedTrees:
    """Fit a forest for each task, stop it by the validation period and calibrate it there.

    Args:
        training: its seed, and the share of candidates that it hides.
        out_of_fold: whether `FittedTrees.out_of_fold_NT` is asked for.

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
    held_out = tree_rows(encoder, validation)
    forests = fit_forests(trees.config, encoder, rows, held_out, training.seed, tell, out_of_fold)
    texts = [forest.text for forest in forests]
    trees.take_texts(dict(zip(trees.text_names, texts, strict=True)))
    # 2. Sums as logits, of the share of positives that training has, as a network's are.
    sums = predict(trees, encoder, validation)
    labels = np.asarray(validation.labels)
    shift_T = sampling_shift(encoder.contract.spec, np.asarray(train.labels), labels)
    for task, shift in enumerate(shift_T):
        scale, moved = calibrated(sums[:, task], labels[:, task])
        trees.scale_T[task] = scale
        trees.shift_T[task] = moved - shift
    logits_NT = _logits(trees, sums)
    unknown_N = np.full(len(sums), np.nan)
    parts = [unknown_N if one.out_of_fold_N is None else one.out_of_fold_N for one in forests]
    out_of_fold_NT = _logits(trees, np.stack(parts, axis=-1))
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
        out_of_fold_NT,
    )


def _logits(trees: Trees, sums_NT: np.ndarray) -> np.ndarray:
    logits_NT: np.ndarray = sums_NT * trees.scale_T.numpy() + trees.shift_T.numpy()
    return logits_NT


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

    The trees are the very ones that the same settings make alone, to the bit. Where they are weighed, each half of the
    validation requests is ranked by as many of them as rank the other half best: by the requests that stopped them
    they seem better than they are, and the network would hardly have a say. Where a half has too few labels for that,
    trees rank alone.

    Args:
        summary: of the network's training.
        config: of the trees.

    Raises:
        DataError: a task has not two labels of each kind.
    """
    spec = encoder.contract.spec
    fitted = fit_trees(config, encoder, training, train, validation, out_of_fold=True)
    blend = Blend(network, fitted.trees)
    labels = np.asarray(validation.labels)
    shift_T = sampling_shift(spec, np.asarray(train.labels), labels)
    # As it is served: where tokens are of all events, so are those that it is weighed by.
    of_network_NT = predict(network, encoder, as_served(network, encoder, validation))
    weighed = np.stack([of_network_NT, fitted.out_of_fold_NT], axis=-1).astype(np.float64)
    both = np.stack([of_network_NT, fitted.logits_NT], axis=-1).astype(np.float64)
    logits_NT = np.empty(both.shape[:2])
    for task, shift in enumerate(shift_T):
        scores = both[:, task]
        known = defined(labels[:, task], validation.candidate_offsets)
        # First the order within requests, then probabilities, which leave it as it is.
        share = 0.0
        if not np.isnan(weighed[:, task]).any():
            share = best_share(weighed[known.rows, task], known.labels, known.offsets)
        weights = np.array([share, 1 - share]) / deviations(scores[known.rows])
        if share == 0:
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
