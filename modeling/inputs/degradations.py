"""Requests of a period as they would be if the server had to do without something, under the names that
answers give as reasons (`serving/api/degraded.py`): what degraded answers are worth is measured on these.

Two reasons need no measuring: without scores (`no_scores`, `deadline`) the order is the caller's own, and
of `unknown_items` the report says where they stand. Features that are merely old are not measured here.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from feature_repo.history.history import Histories
from feature_repo.history.transforms import (
    EMPTY_SKETCH,
    LIFT,
    OF_USER_VALUE,
    SINCE,
    USER_FEATURES,
    WITHOUT_EVENTS,
)
from modeling.inputs.encoder import Encoded, Encoder, GatherHistories, GatherTokens
from modeling.inputs.relations import RELATION_FEATURES
from modeling.inputs.shards import DerivedRows


@dataclass(frozen=True)
class Lost:
    """What is not known of the users of a period's requests.

    Args:
        events: their histories are empty.
        statistics: their statistics are not known.
        profile: nor any other column of users.
        sketch: "empty" counts no event; "absent" says nothing.
        tokens: they have no stored summary tokens.

    Example:
        >>> Lost(sketch="absent")
        Lost(events=False, statistics=False, profile=False, sketch='', tokens=False)
    """

    events: bool = False
    statistics: bool = False
    profile: bool = False
    sketch: Literal["", "empty", "absent"] = ""
    tokens: bool = False


NOTHING_KNOWN = Lost(events=True, statistics=True, profile=True, sketch="empty", tokens=True)
REASONS = {
    "no_sketch": Lost(sketch="absent"),
    "no_history": Lost(events=True, sketch="empty"),
    "unknown_user": NOTHING_KNOWN,
    "store_unavailable": replace(NOTHING_KNOWN, sketch="absent"),
}


def degraded(encoder: Encoder, encoded: Encoded) -> dict[str, Encoded]:
    """By the name of a reason: the same requests without what it lacks.

    `no_tokens` is there only where requests carry tokens of a store.
    """
    reasons = dict(REASONS)
    if encoded.gather_tokens is not None:
        reasons["no_tokens"] = Lost(tokens=True)
    return {name: without(encoder, encoded, lost) for name, lost in reasons.items()}


def without(encoder: Encoder, encoded: Encoded, lost: Lost) -> Encoded:
    """Return the same requests without what is lost; rows are changed when a batch takes them, so that a
    period on disk stays there.
    """
    made = encoded
    if lost.events:
        made = replace(
            made,
            gather=_no_events(encoded),
            history_lengths=np.zeros(len(encoded), np.int64),
        )
    if lost.tokens and encoded.gather_tokens is not None:
        made = replace(made, gather_tokens=_no_tokens(encoded.gather_tokens))
    return replace(
        made,
        field_BU=DerivedRows(encoded.field_BU, lambda rows: _fields(encoder, lost, rows)),
        dense_BG=DerivedRows(encoded.dense_BG, lambda rows: _of_request(encoder, lost, rows)),
        candidate_dense=DerivedRows(
            encoded.candidate_dense, lambda rows: _of_candidate(encoder, lost, rows)
        ),
    )


def _fields(encoder: Encoder, lost: Lost, rows: np.ndarray) -> np.ndarray:
    if lost.profile:
        slots = [
            c.name in _user_names(encoder)
            for c in encoder.request.categorical
            for _ in range(c.slots)
        ]
        rows[:, np.flatnonzero(slots)] = 0
    return rows


def _of_request(encoder: Encoder, lost: Lost, rows: np.ndarray) -> np.ndarray:
    """Numbers of requests: of their users and their context."""
    names = encoder.user_dense_names
    gone = set(USER_FEATURES) if lost.statistics else {"days_ago"} if lost.events else set()
    if lost.profile:
        gone |= _user_names(encoder)
    rows[:, [name.split("[")[0] in gone for name in names]] = np.nan
    return rows


def _of_candidate(encoder: Encoder, lost: Lost, rows: np.ndarray) -> np.ndarray:
    """Numbers of candidates: what is between them and the user's history."""
    names = encoder.dense_names
    if lost.events:
        for name, value in WITHOUT_EVENTS.items():
            rows[:, names.index(name)] = value
        rows[:, [name in RELATION_FEATURES for name in names]] = np.nan
    if lost.statistics:
        rows[:, [name in OF_USER_VALUE for name in names]] = np.nan
    sketch = np.array([name in encoder.between.sketch_names for name in names])
    if lost.sketch == "absent":
        rows[:, sketch] = np.nan
    elif lost.sketch == "empty":
        # NaN says that a candidate has no value in a counted column, which it has not now either; of what never was
        # there is no time since.
        rows[:, sketch] = np.where(np.isnan(rows[:, sketch]), np.nan, EMPTY_SKETCH)
        rows[:, sketch & [name.endswith(SINCE) for name in names]] = np.nan
        # Nothing was expected, and nothing came.
        lifts = sketch & [LIFT in name for name in names]
        rows[:, lifts] = np.where(np.isnan(rows[:, lifts]), np.nan, 0)
    return rows


def _user_names(encoder: Encoder) -> set[str]:
    return {column.name for column in encoder.contract.user_columns}


def _no_events(encoded: Encoded) -> GatherHistories:
    def gather(chosen: np.ndarray, length: int) -> Histories:
        histories = encoded.gather(chosen, 1)
        nothing = np.zeros(len(chosen), np.int64)
        return histories.take(nothing, nothing)

    return gather


def _no_tokens(stored: GatherTokens) -> GatherTokens:
    """Absent tokens in the shape of the stored ones."""

    def gather(chosen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        tokens, has = stored(chosen)
        return np.zeros_like(tokens), np.zeros_like(has)

    return gather
