"""What ranking costs once a model is trained: CPU of a request and of a new event, bytes of a user."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from feature_repo.settings import Settings
from modeling.inputs.batch import Batch
from modeling.models.base import Ranker
from modeling.recipes import Recipe
from modeling.training.training_run import (
    build_model,
    load_trained,
    open_run,
    refuse_untrained,
)
from modeling.training_set.encodings import Encodings

REQUESTS = 20  # of the longest histories
CANDIDATES = 100


@dataclass(frozen=True)
class Cost:
    """CPU milliseconds of a request and of one more event, and bytes of what is stored for a user.

    Args:
        request_ms: of one that arrives: from stored summary tokens where the model makes some, else the
            user is encoded from events.
        score_ms: of its candidates alone, against a user state that a cache still has.
        one_event_ms: of taking it into stored streams; None where the events themselves are stored.
        bytes_a_user: of tokens in fp16 and the streams behind them in fp32, or of the events that the
            model reads, as they are encoded.
        events: that the model reads of these users, in the mean.
    """

    request_ms: float
    score_ms: float
    one_event_ms: float | None
    bytes_a_user: float
    events: float


def cost_of(settings: Settings, encodings: Encodings, recipe: Recipe) -> Cost:
    """Of requests with long histories and a hundred candidates. A network's weights do not matter and are those that
    training begins with; trees are the trained run's.

    Raises:
        NotTrainedError: a recipe with trees has no trained run.
    """
    encoder = encodings.encoder_of(recipe)
    test = encodings.period(recipe, "test").encoded
    # How long trees take follows their number and depth, which only training decides.
    if recipe.model == "trees" or recipe.trees is not None:
        run = open_run(settings, recipe, encodings.sample)
        model, _ = load_trained(refuse_untrained(run))
    else:
        model = build_model(recipe, encoder, encodings.period(recipe, "train").encoded).eval()
    known = test.history_lengths
    assert known is not None
    longest = np.argsort(known, kind="stable")[-10 * REQUESTS :][::10]
    batches = [_of_size(encoder.collate(test, np.array([one]))) for one in longest]
    stored = test.gather(longest, encoder.history_length)
    arrays = (stored.item_keys, *stored.columns.values())
    of_events = sum(array.nbytes for array in arrays) / len(longest)
    found = [_measured(model, batch) for batch in batches]
    one_event = [cost.one_event_ms for cost in found if cost.one_event_ms is not None]
    return Cost(
        statistics.median(cost.request_ms for cost in found),
        statistics.median(cost.score_ms for cost in found),
        statistics.median(one_event) if one_event else None,
        found[0].state_bytes or of_events,
        float(np.minimum(known[longest], encoder.history_length).mean()),
    )


@dataclass(frozen=True)
class _Measured:
    request_ms: float
    score_ms: float
    one_event_ms: float | None
    state_bytes: int | None


@torch.inference_mode()
def _measured(model: Ranker, batch: Batch) -> _Measured:
    """Of one request: from stored tokens where the model makes some, else from the events."""
    user = batch.user
    some = batch.candidates
    given = user
    one_event_ms = None
    state_bytes = None
    stage_1 = None if model.token_maker is None else model.token_maker.stage_1
    if stage_1 is not None and stage_1.streams:
        tokens, streams = stage_1.stream([user])
        given = replace(user.events(-1), tokens_BSX=tokens)
        one_event_ms = _ms(lambda: stage_1.stream([user.events(-1)], streams))
        state_bytes = 2 * tokens[0].numel() + 4 * stage_1.stored_streams(streams)[0].numel()
    state = model.encode_user(given)
    return _Measured(
        _ms(lambda: model.score(model.encode_user(given), some)),
        _ms(lambda: model.score(state, some)),
        one_event_ms,
        state_bytes,
    )


def _of_size(batch: Batch) -> Batch:
    """The request with a hundred candidates: its own, over and over."""
    index = torch.arange(CANDIDATES) % batch.candidates.item_BC.shape[1]
    return replace(
        batch, candidates=batch.candidates.select(index), labels_BCT=batch.labels_BCT[:, index]
    )


def _ms(call: Callable[[], Any], repeats: int = 5) -> float:
    """Median CPU milliseconds of a call, after one that warms up."""
    spent = []
    for _ in range(repeats + 1):
        started = time.process_time()
        call()
        spent.append(1000 * (time.process_time() - started))
    return statistics.median(spent[1:])
