"""Degradation reasons, why an answer had to do without something: one enum, which documents itself and is all of the `degraded`
of answers and metrics.
"""

from __future__ import annotations

from enum import StrEnum


class Degraded(StrEnum):
    """A reason; `meaning` says what it is, for people and for the OpenAPI document."""

    meaning: str

    def __new__(cls, value: str, meaning: str) -> Degraded:
        made = str.__new__(cls, value)
        made._value_ = value
        made.meaning = meaning
        return made

    UNKNOWN_USER = (
        "unknown_user",
        "the store knows nothing of the user: ranked from the candidates alone",
    )
    NO_HISTORY = "no_history", "the store has no history of the user"
    HISTORY_UNREADABLE = (
        "history_unreadable",
        "the user's stored history is damaged, or lacks what the bundle reads",
    )
    HISTORY_INCOMPLETE = (
        "history_incomplete",
        "the store had lost what it knew of the user: only events since are known, until the jobs have run",
    )
    NO_SKETCH = "no_sketch", "the store has no sketch of the user's whole history"
    SKETCH_UNREADABLE = (
        "sketch_unreadable",
        "the sketch of the user's whole history is damaged, or of another layout",
    )
    MIXED_HISTORY = (
        "mixed_history",
        "the user's history and statistics are of different moments: a job is writing them",
    )
    STORE_UNAVAILABLE = "store_unavailable", "the online store could not be read"
    UNKNOWN_ITEMS = (
        "unknown_items",
        "some candidates have no features and were ranked by a prior; they are named",
    )
    NO_TOKENS = "no_tokens", "the user has no summary tokens of the bundle's version"
    TOKENS_UNREADABLE = "tokens_unreadable", "the user's summary tokens are damaged"
    TOKENS_MISMATCHED = "tokens_mismatched", "the stored summary tokens are of another version"
    TOKENS_OF_ANOTHER_HISTORY = (
        "tokens_of_another_history",
        "the user's past was corrected since the summary tokens were made",
    )
    STALE_TOKENS = "stale_tokens", "events came that the summary tokens have not seen"
    NEWER_TOKENS = (
        "newer_tokens",
        "the request lies before events in the summary tokens, which were not used",
    )
    NEWER_FEATURES = (
        "newer_features",
        "the request lies before the user's newest event: the history is cut there, the sketch is not used, profile and statistics are of now",
    )
    STALE_FEATURES = (
        "stale_features",
        "item features are older than the server is told to take for fresh",
    )
    OLDER_STORE = (
        "older_store",
        "the online store holds an older run of the jobs than was sent last, such as a copy that was restored",
    )
    CHANGED_FEATURES = (
        "changed_features",
        "stored features are declared otherwise, and their values moved, since the bundle learned from them: /v1/models names them",
    )
    NO_SCORES = (
        "no_scores",
        "the model gave numbers that are none: candidates are in the request's order, without scores",
    )
    DEADLINE = (
        "deadline",
        "the time was up before the model was done: candidates are in the request's order, without scores",
    )


def reason_named(value: str) -> Degraded:
    """The reason of a value, as answers write it.

    >>> reason_named("no_tokens").meaning
    "the user has no summary tokens of the bundle's version"
    """
    return Degraded[value.upper()]
