"""The inputs that a ranker's answers rest on: how much NDCG@10 is lost when one input is exchanged between
requests (permutation importance, Breiman 2001, section 10).

Inputs that belong together are exchanged together: a column, the history, the item's statistics, the
matches between history and candidate. Inputs that say the same hide one another: each alone is then
lost without loss.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from feature_repo.history.history import Histories
from feature_repo.history.transforms import CONTEXT_FIELDS, USER_FEATURES
from modeling.inputs.columns import ColumnGroup, within
from modeling.inputs.encoder import Encoded, Encoder
from modeling.inputs.tasks import ranking_logits
from modeling.metrics import defined, ndcg_at
from modeling.models.base import Ranker
from modeling.training.trainer import predict

# Requests of the test period, spread evenly
REQUESTS = 150


@dataclass(frozen=True)
class Importance:
    """NDCG@10 that is lost without an input, and its 95 % interval over requests."""

    name: str
    loss: float
    low: float
    high: float


def permutation_importance(
    model: Ranker, encoder: Encoder, encoded: Encoded, task: int, seed: int = 0
) -> list[Importance]:
    """Every input's importance for one task, the largest first; empty where no request has a
    positive.
    """
    chosen = np.unique(np.linspace(0, len(encoded) - 1, REQUESTS).astype(np.int64))
    sample = select(encoded, chosen)
    spec = encoder.contract.spec
    rng = np.random.default_rng(seed)
    known = defined(np.asarray(sample.labels)[:, task], sample.candidate_offsets)

    def quality(changed: Encoded) -> np.ndarray:
        scores = ranking_logits(spec, predict(model, encoder, changed))[known.rows]
        return ndcg_at(known.labels, scores, known.offsets)

    # The same requests before and after an exchange, so that the differences are paired.
    whole = quality(sample)
    found = []
    for name, exchange in inputs(encoder, sample).items():
        lost = whole - quality(exchange(rng))
        lost = lost[~np.isnan(lost)]
        if len(lost):
            half = 1.96 * lost.std() / np.sqrt(len(lost))
            mean = float(lost.mean())
            found.append(Importance(name, mean, mean - float(half), mean + float(half)))
    return sorted(found, key=lambda importance: -importance.loss)


def inputs(
    encoder: Encoder, sample: Encoded
) -> dict[str, Callable[[np.random.Generator], Encoded]]:
    """By name of each input: the same requests with that input of others."""
    # Dense numbers of a candidate, in order: statistics, matches, sketches, its columns.
    stats = len(encoder.stat_columns)
    columns = encoder.request.sizes.num_slots
    matches = stats + len(encoder.between.names)

    # Each function exchanges one input between requests, or between candidates of all requests.
    def of_requests(slots: list[int], dense: list[int]) -> Callable[..., Encoded]:
        def exchange(rng: np.random.Generator) -> Encoded:
            order = rng.permutation(len(sample))
            # np.array copies: every other input is exchanged in the same sample.
            fields = np.array(sample.field_BU)
            numbers = np.array(sample.dense_BG)
            fields[:, slots] = fields[order][:, slots]
            numbers[:, dense] = numbers[order][:, dense]
            return replace(sample, field_BU=fields, dense_BG=numbers)

        return exchange

    def of_candidates(slots: list[int], dense: list[int]) -> Callable[..., Encoded]:
        def exchange(rng: np.random.Generator) -> Encoded:
            order = rng.permutation(len(sample.candidate_item))
            category, numbers = (
                np.array(rows) for rows in (sample.candidate_category, sample.candidate_dense)
            )
            category[:, slots] = category[order][:, slots]
            numbers[:, dense] = numbers[order][:, dense]
            return replace(sample, candidate_category=category, candidate_dense=numbers)

        return exchange

    def items(rng: np.random.Generator) -> Encoded:
        return replace(sample, candidate_item=rng.permutation(sample.candidate_item))

    def history(rng: np.random.Generator) -> Encoded:
        order = rng.permutation(len(sample))

        def gather(requests: np.ndarray, length: int) -> Histories:
            return sample.gather(order[requests], length)

        gather_tokens = sample.gather_tokens
        tokens = gather_tokens and (lambda requests: gather_tokens(order[requests]))
        lengths = sample.history_lengths
        return replace(
            sample,
            gather=gather,
            gather_tokens=tokens,
            history_lengths=None if lengths is None else lengths[order],
        )

    # The hour and the weekday stand behind the slots of the request's columns.
    context = list(range(columns, columns + len(CONTEXT_FIELDS)))
    made: dict[str, Callable[[np.random.Generator], Encoded]] = {
        "history": history,
        "item": items,
        "matches of item and history": of_candidates([], list(range(stats, matches))),
        "statistics of the item": of_candidates([], list(range(stats))),
        "statistics of the user": of_requests([], list(range(len(USER_FEATURES)))),
        "hour and weekday": of_requests(context, []),
    }
    for name, slots, dense in _columns(encoder.request, len(USER_FEATURES)):
        made[name] = of_requests(slots, dense)
    for name, slots, dense in _columns(encoder.candidate, matches):
        made[name] = of_candidates(slots, dense)
    return made


def select(encoded: Encoded, chosen: np.ndarray) -> Encoded:
    """Some of the requests."""
    lengths = encoded.num_candidates[chosen]
    rows = np.repeat(encoded.candidate_offsets[chosen], lengths) + within(lengths)
    gather_tokens = encoded.gather_tokens

    return replace(
        encoded,
        times=encoded.times[chosen],
        field_BU=encoded.field_BU[chosen],
        dense_BG=encoded.dense_BG[chosen],
        candidate_offsets=np.r_[0, np.cumsum(lengths)],
        candidate_item=encoded.candidate_item[rows],
        candidate_category=encoded.candidate_category[rows],
        candidate_dense=encoded.candidate_dense[rows],
        labels=encoded.labels[rows],
        gather=lambda requests, length: encoded.gather(chosen[requests], length),
        gather_tokens=gather_tokens and (lambda requests: gather_tokens(chosen[requests])),
        history_lengths=None
        if encoded.history_lengths is None
        else encoded.history_lengths[chosen],
    )


def _columns(group: ColumnGroup, before: int) -> list[tuple[str, list[int], list[int]]]:
    """Each column's category slots and dense numbers; `before` numbers stand before the group's."""
    slots = [c.name for c in group.categorical for _ in range(c.slots)]
    dense = [name.split("[")[0] for name in group.dense_names]
    return [
        (
            column.name,
            [at for at, name in enumerate(slots) if name == column.name],
            [before + at for at, name in enumerate(dense) if name == column.name],
        )
        for column in group.columns
    ]
