"""Features of a request and between a history and its candidates: pure functions, run by the same
code in training and at request time.

Exact matches ("bought this before") are hard to learn from embeddings and a few thousand requests,
and cheap to say. All functions take flat arrays of any number of requests, so one request is served
by the code that trained on many.

What is not known is NaN, never a zero: a model is told of each number whether it is there
(`modeling/layers/features.py`).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from feature_repo.contract.contract import Contract
from feature_repo.history.counts import Readings
from feature_repo.history.history import Histories
from feature_repo.history.sketch import Layout

MICROS_PER_DAY = 86_400_000_000
# Raised when a feature of this file changes its meaning: bundles of another version are refused
VERSION = 7
MATCH_FEATURES = (
    # log1p: events of the first action with this item
    "match_times",
    # The same as a share of the history
    "match_share",
    # log1p: events of other actions with this item
    "match_other_times",
    # log1p days since the newest such event; NaN without one
    "match_days_ago",
    # log1p events since the newest such event; NaN without one
    "match_events_ago",
    # Log: the item's mean value over the user's; NaN where one is unknown
    "value_ratio",
    # Other actions among the item's events, such as its return rate; NaN without statistics
    "item_other_share",
)
USER_FEATURES = (
    # log1p days since the first event; NaN without one
    "tenure_days",
    # log1p events to date; NaN where the user has no statistics, which a new user has not
    "events",
    # Other actions among them, such as the return rate
    "other_share",
    # Squashed mean value of the user's events of the first action; NaN without one
    "mean_value",
    # log1p days since the newest event of all; NaN without one
    "days_ago",
)
# Match features without any event of the user: the counts are 0, the times since are not known.
WITHOUT_EVENTS = {
    "match_times": 0.0,
    "match_share": 0.0,
    "match_other_times": 0.0,
    "match_days_ago": np.nan,
    "match_events_ago": np.nan,
}
# Match features that are NaN without the item's statistics, and without the user's.
OF_ITEM_STATS = ("value_ratio", "item_other_share")
OF_USER_VALUE = ("value_ratio",)
# Fields of the request's time, UTC, and how many values each has; Monday is 0
CONTEXT_FIELDS = {"hour": 24, "weekday": 7}


# The smallest count that has faded and still says something
FAINTEST = 0.01
# Behind the names of days since the last event
SINCE = "_days_ago"
# Before the age in names of what a count is beside the expected one
LIFT = "_lift"
# Added to a count and to what was expected of it, which may both be 0
HALF = 0.5
# What counts without events give for a candidate, where they give a number
EMPTY_SKETCH = np.float32(np.log(FAINTEST))


def sketch_names(contract: Contract) -> tuple[str, ...]:
    """List the numbers that counts give for a candidate: for the item, for each remembered column and pair of them the
    events of all time, the counts that fade by each half-life, the days since the last, and each count's lift: by how
    much it is above the expected one.
    """
    ages = ("", *(f"_{days:g}d" for days in contract.spec.memory.half_lives_days))
    of_each = (*ages, SINCE, *(f"{LIFT}{age}" for age in ages))
    names = ("item", *Layout.of(contract).names[1:])
    return tuple(f"life_{name}{number}" for name in names for number in of_each)


def sketch_features(readings: Readings, shares_NC: np.ndarray) -> np.ndarray:
    """Dense features of readings, float32, N × `sketch_names`.

    A lift is log((count + ½) / (expected + ½)), with as many events expected as the user had of all, times the share
    that the value has of everybody's.

    Args:
        shares_NC: of everybody's events (`shares.py`); NaN where it is not known.
    """
    # As training keeps them, so that a server, which has more digits, comes to the same.
    counts_NCK, days_NC, totals_NK = (
        numbers.astype(np.float32)
        for numbers in (readings.counts_NCK, readings.days_NC, readings.totals_NK)
    )
    # Logarithms: between one purchase and two lies as much as between ten and twenty, and a count that
    # fades becomes a time since.
    with np.errstate(invalid="ignore"):
        counts = np.log(counts_NCK + FAINTEST)
        days = np.log1p(np.maximum(days_NC, 0))
        expected = totals_NK[:, None] * shares_NC[..., None]
        lifts = np.log((counts_NCK + HALF) / (expected + HALF))
    each = np.concatenate([counts, days[..., None], lifts], axis=-1)
    return each.reshape(len(each), each.shape[1] * each.shape[2]).astype(np.float32)


def context_fields(request_times: np.ndarray) -> np.ndarray:
    """Categories of each request's time, int64, B × len(CONTEXT_FIELDS)."""
    hours = request_times // (MICROS_PER_DAY // 24)
    # 1970 began on a Thursday
    return np.stack([hours % 24, (hours // 24 + 3) % 7], axis=1)


def user_features(
    histories: Histories,
    request_times: np.ndarray,
    first_event_s: np.ndarray,
    events: np.ndarray,
    other_events: np.ndarray,
    mean_value: np.ndarray,
) -> np.ndarray:
    """Dense features of each request's user, float32, B × len(USER_FEATURES).

    Args:
        histories: of B requests, events strictly before each request.
        request_times: B times, microseconds.
        first_event_s: seconds since 1970; with `events` and `other_events` the user's statistics,
            NaN without statistics.
        mean_value: of the user's events, NaN if they have no value.
    """
    tenure = request_times / MICROS_PER_DAY - first_event_s / 86_400
    some = histories.lengths > 0
    newest = np.full(len(request_times), np.nan)
    newest[some] = (
        request_times[some] - histories.times[histories.offsets[1:][some] - 1]
    ) / MICROS_PER_DAY
    features = [
        np.log1p(np.maximum(tenure, 0)),
        np.log1p(events),
        other_events / np.maximum(events, 1),
        squash(mean_value),
        np.log1p(np.maximum(newest, 0)),
    ]
    return np.stack(features, axis=1).astype(np.float32)


def match_features(
    histories: Histories,
    candidate_offsets: np.ndarray,
    candidate_keys: np.ndarray,
    request_times: np.ndarray,
    item_stats: Sequence[np.ndarray],
    user_mean: np.ndarray,
) -> np.ndarray:
    """Match features of every candidate, float32, N × len(MATCH_FEATURES).

    Args:
        histories: of B requests, events strictly before each request.
        candidate_offsets: request b's candidates are `[offsets[b], offsets[b + 1])`.
        candidate_keys: item keys of all N candidates, comparable with `histories.item_keys`.
        request_times: B times, microseconds.
        item_stats: three of N: events of the first action, of all others, and mean value of each
            candidate's item; NaN: unknown.
        user_mean: mean value of each request's user, NaN if unknown.
    """
    num_requests = len(request_times)
    owner = np.repeat(np.arange(num_requests), np.diff(candidate_offsets))
    length = histories.lengths.astype(np.int64)
    event_owner = np.repeat(np.arange(num_requests), length)
    primary = histories.columns["action"] == 0

    # A number for each pair of request and item, so that one sort matches all requests at once.
    span = int(max(histories.item_keys.max(initial=0), candidate_keys.max(initial=0))) + 1
    wanted = owner * span + candidate_keys
    event_pair = event_owner * span + histories.item_keys

    def matches(events: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """How often each candidate occurs among these events, and the index of its newest, -1
        without one.
        """
        order = events[np.argsort(event_pair[events], kind="stable")]
        pairs = event_pair[order]
        right = np.searchsorted(pairs, wanted, side="right")
        count = right - np.searchsorted(pairs, wanted, side="left")
        newest = np.full(len(wanted), -1)
        newest[count > 0] = order[right[count > 0] - 1]
        return count, newest

    # How often, how long ago, and how many events ago.
    times, newest = matches(np.flatnonzero(primary))
    other_times, _ = matches(np.flatnonzero(~primary))
    seen = newest >= 0
    days_ago = np.full(len(wanted), np.nan)
    events_ago = np.full(len(wanted), np.nan)
    days_ago[seen] = (request_times[owner[seen]] - histories.times[newest[seen]]) / MICROS_PER_DAY
    events_ago[seen] = histories.offsets[owner[seen] + 1] - newest[seen]

    # Ratios of the item's and the user's means; unknown is NaN, never 0.
    item_events, item_others, item_mean = item_stats
    both = item_events + item_others
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.log(item_mean) - np.log(user_mean[owner])
    features = [
        np.log1p(times),
        times / np.maximum(length[owner], 1),
        np.log1p(other_times),
        np.log1p(np.maximum(days_ago, 0)),
        np.log1p(events_ago),
        np.where(np.isfinite(ratio), ratio, np.nan),
        item_others / np.maximum(both, 1),
    ]
    return np.stack(features, axis=1).astype(np.float32)


def event_ages(histories: Histories, request_times: np.ndarray) -> np.ndarray:
    """log1p days between each event and its request, float32."""
    owner = np.repeat(np.arange(len(request_times)), histories.lengths)
    days = (request_times[owner] - histories.times) / MICROS_PER_DAY
    return np.log1p(np.maximum(days, 0)).astype(np.float32)


def squash(values: np.ndarray) -> np.ndarray:
    """A heavy-tailed number made gentle: sign(x) · log1p(|x|), float32; missing (NaN) stays so."""
    numbers = np.asarray(values, np.float64)
    return (np.sign(numbers) * np.log1p(np.abs(numbers))).astype(np.float32)
