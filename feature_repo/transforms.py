"""Features between a history and its candidates: pure functions, run by the same code in training and at request time.

Exact matches ("bought this before") are hard to learn from embeddings and a few thousand requests, and cheap to say.
All functions take flat arrays of any number of requests, so one request is served by the code that trained on many.
"""

from __future__ import annotations

import numpy as np

from feature_repo.history import Histories

MICROS_PER_DAY = 86_400_000_000
VERSION = 1  # raised when a feature of this file changes its meaning: bundles of another version are refused
MATCH_FEATURES = (
    "match_times",  # log1p: events of the first action with this item
    "match_share",  # the same as a share of the history
    "match_other_times",  # log1p: events of other actions with this item
    "match_days_ago",  # log1p days since the newest such event; 0 without one
    "match_events_ago",  # log1p events since the newest such event; 0 without one
    "history_length",  # log1p events
    "history_days_ago",  # log1p days since the newest event of all; 0 without one
)


def match_features(
    histories: Histories, candidate_offsets: np.ndarray, candidate_keys: np.ndarray, request_times: np.ndarray
) -> np.ndarray:
    """Match features of every candidate, float32, N × len(MATCH_FEATURES).

    Args:
        histories: of B requests, events strictly before each request.
        candidate_offsets: request b's candidates are `[offsets[b], offsets[b + 1])`.
        candidate_keys: item keys of all N candidates, comparable with `histories.item_keys`.
        request_times: B times, microseconds.
    """
    num_requests = len(request_times)
    owner = np.repeat(np.arange(num_requests), np.diff(candidate_offsets))
    length = histories.lengths.astype(np.int64)
    event_owner = np.repeat(np.arange(num_requests), length)
    primary = histories.columns["action"] == 0

    span = int(max(histories.item_keys.max(initial=0), candidate_keys.max(initial=0))) + 1
    wanted = owner * span + candidate_keys
    event_pair = event_owner * span + histories.item_keys

    def matches(events: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """How often each candidate occurs among these events, and the index of its newest, -1 without one."""
        order = events[np.argsort(event_pair[events], kind="stable")]
        pairs = event_pair[order]
        right = np.searchsorted(pairs, wanted, side="right")
        count = right - np.searchsorted(pairs, wanted, side="left")
        newest = np.full(len(wanted), -1)
        newest[count > 0] = order[right[count > 0] - 1]
        return count, newest

    times, newest = matches(np.flatnonzero(primary))
    other_times, _ = matches(np.flatnonzero(~primary))
    seen = newest >= 0
    days_ago, events_ago = np.zeros(len(wanted)), np.zeros(len(wanted))
    days_ago[seen] = (request_times[owner[seen]] - histories.times[newest[seen]]) / MICROS_PER_DAY
    events_ago[seen] = histories.offsets[owner[seen] + 1] - newest[seen]

    last_days = np.zeros(num_requests)
    some = length > 0
    last_days[some] = (request_times[some] - histories.times[histories.offsets[1:][some] - 1]) / MICROS_PER_DAY
    features = [
        np.log1p(times),
        times / np.maximum(length[owner], 1),
        np.log1p(other_times),
        np.log1p(np.maximum(days_ago, 0)),
        np.log1p(events_ago),
        np.log1p(length[owner]),
        np.log1p(np.maximum(last_days, 0))[owner],
    ]
    return np.stack(features, axis=1).astype(np.float32)


def event_ages(histories: Histories, request_times: np.ndarray) -> np.ndarray:
    """log1p days between each event and its request, float32."""
    owner = np.repeat(np.arange(len(request_times)), histories.lengths)
    days = (request_times[owner] - histories.times) / MICROS_PER_DAY
    return np.log1p(np.maximum(days, 0)).astype(np.float32)


def squash(values: np.ndarray) -> np.ndarray:
    """A heavy-tailed number made gentle: sign(x) · log1p(|x|), float32; missing (NaN) becomes 0."""
    finite = np.nan_to_num(np.asarray(values, np.float64), nan=0.0, posinf=0.0, neginf=0.0)
    return (np.sign(finite) * np.log1p(np.abs(finite))).astype(np.float32)
