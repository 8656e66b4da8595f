"""Why a candidate is where it is, and what the store holds of a user, for a person to read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta

import numpy as np
import pyarrow as pa

from feature_repo.contract.arrow import EPOCH
from feature_repo.contract.contract import Contract
from modeling.inputs.encoder import Encoded
from modeling.inputs.tasks import primary_number, ranking_logits, sigmoid
from modeling.trees.blend import tree_effects, trees_of
from modeling.trees.columns import column_names
from serving.api.messages import (
    ColumnEffect,
    EventEffect,
    ExplainResponse,
    HistoryResponse,
    PastEvent,
    RankRequest,
    ScoreParts,
)
from serving.ranking.ranker import Clock, RankService
from serving.ranking.request import as_of, context_columns
from serving.stores.features import UserRow, as_known


def explain(
    ranker: RankService, request: RankRequest, user: UserRow, num_events: int
) -> ExplainResponse:
    """Why the request's one candidate is where it is: its numbers, and what each of the newest events
    and each stored token is worth, by ranking without it. Statistics and the sketch keep an event. Tokens that stand for
    the events themselves are left out where an event is: none can be taken out of them.
    """
    at = ranker.time_of(request, user)
    moment = (at - EPOCH) // timedelta(microseconds=1)
    user = as_known(ranker.contract, user, moment)
    context = context_columns(ranker.contract, request.context)
    items = ranker.items.take(request.candidates)

    def logit_of(seen: UserRow) -> float:
        return _logit(ranker, ranker.requests.encoded(seen, request.candidates, at, items, context))

    # 1. As it is ranked: its numbers and parts, and with stored tokens what each token is worth.
    fit, reasons = ranker.with_fit_tokens(user, moment)
    ranked = as_of(ranker.contract, fit, moment)
    encoded = ranker.requests.encoded(ranked, request.candidates, at, items, context)
    whole = _logit(ranker, encoded)
    parts = _parts(ranker, ranked, logit_of, whole)
    of_tokens = _effects_of_tokens(ranked, logit_of, whole)
    numbers = np.asarray(encoded.candidate_dense)[0]
    names = ranker.bundle.encoder.dense_names
    # 2. What each event is worth.
    read = replace(ranked, tokens=None) if ranker.bundle.makes_tokens else ranked
    base = logit_of(read)
    effects = []
    events = [] if read.history is None else read.history.to_pylist()
    for row in range(len(events))[::-1][:num_events]:
        assert read.history is not None
        kept = pa.array(np.delete(np.arange(len(events)), row))
        lacking = logit_of(replace(read, history=read.history.take(kept)))
        effects.append(
            EventEffect(
                events[row][ranker.contract.item.join_key],
                events[row]["event_timestamp"],
                ranker.contract.spec.actions[events[row]["action"]],
                base - lacking,
            )
        )
    return ExplainResponse(
        score=float(sigmoid(np.array([whole]))[0]),
        features={
            name: None if np.isnan(value) else float(value)
            for name, value in zip(names, numbers, strict=True)
        },
        events=effects,
        tokens=of_tokens,
        columns=_effects_of_columns(ranker, encoded),
        parts=parts,
        bundle=ranker.bundle.name,
        degraded=[*user.problems, *reasons],
    )


def _parts(
    ranker: RankService, user: UserRow, logit_of: Callable[[UserRow], float], whole: float
) -> ScoreParts:
    """What the logit of a user rests on, by ranking without each part."""
    return ScoreParts(
        item=logit_of(ranker.nobody()),
        tokens=whole - logit_of(_with_tokens(user, np.zeros_like)),
        counts=whole - logit_of(replace(user, sketch=None)),
        events=whole - logit_of(replace(user, history=None)),
    )


def _effects_of_tokens(
    user: UserRow, logit_of: Callable[[UserRow], float], whole: float
) -> list[float]:
    """By how much the logit would be lower if a stored token were all zeros, token by token."""
    if user.tokens is None or user.tokens.tokens_SD is None:
        return []

    def without(token: int) -> UserRow:
        def lacking(tokens_SD: np.ndarray) -> np.ndarray:
            kept = tokens_SD.copy()
            kept[token] = 0.0
            return kept

        return _with_tokens(user, lacking)

    return [whole - logit_of(without(token)) for token in range(len(user.tokens.tokens_SD))]


def _with_tokens(user: UserRow, change: Callable[[np.ndarray], np.ndarray]) -> UserRow:
    """A user with other tokens, where they have some."""
    if user.tokens is None or user.tokens.tokens_SD is None:
        return user
    return replace(user, tokens=replace(user.tokens, tokens_SD=change(user.tokens.tokens_SD)))


def _effects_of_columns(ranker: RankService, encoded: Encoded) -> list[ColumnEffect]:
    """What each column adds to the candidate's logit by the bundle's trees, the largest first; nothing without
    trees. Of several tasks the one that weighs most.
    """
    model = ranker.bundle.model
    if trees_of(model) is None:
        return []
    encoder = ranker.bundle.encoder
    batch = encoder.collate(encoded, np.array([0]))
    found = tree_effects(model, batch, column_names(encoder), primary_number(encoder.contract.spec))
    return [
        ColumnEffect(one.name, None if np.isnan(one.value) else one.value, one.effect)
        for one in sorted(found, key=lambda one: -abs(one.effect))
    ]


def _logit(ranker: RankService, encoded: Encoded) -> float:
    """Return the logit of a request's only candidate."""
    return float(ranking_logits(ranker.contract.spec, ranker.score(encoded, Clock()))[0])


def history_of(contract: Contract, user: UserRow) -> HistoryResponse:
    """Describe what the store holds of a user, for a person to read."""
    events = []
    item = contract.item.join_key
    features = [c.name for c in contract.spec.event_features]
    rows = [] if user.history is None else user.history.to_pylist()
    for row in reversed(rows):
        action = contract.spec.actions[row["action"]]
        values = {name: row.get(name) for name in features}
        events.append(PastEvent(row[item], row["event_timestamp"], action, values))
    tokens = user.tokens
    return HistoryResponse(
        events=events,
        num_events=user.columns["history_end"] or len(events),
        tokens=None if tokens is None else tokens.fingerprint,
        num_tokens=0 if tokens is None or tokens.tokens_SD is None else len(tokens.tokens_SD),
        events_behind=user.events_behind,
        tokens_as_of=None if tokens is None else EPOCH + timedelta(microseconds=tokens.as_of),
        titles={},
        degraded=list(user.problems),
    )
