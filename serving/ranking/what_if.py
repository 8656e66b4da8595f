"""A user as a request asks to see them: with events that never were, without ones that were, or as if the
store had failed.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa

from feature_repo.contract.arrow import history_schema, micros
from feature_repo.contract.contract import Contract
from feature_repo.history import user_stats
from feature_repo.history.counts import UserCounts
from feature_repo.history.sketch import Layout
from serving.api.degraded import Degraded, reason_named
from serving.api.errors import InvalidRequestError
from serving.api.messages import RankRequest, events_in_order
from serving.stores.features import StoredSketch, UserRow

# Reasons for which no user is read for
NO_SCORES = frozenset({Degraded.NO_SCORES, Degraded.DEADLINE})


def as_asked(contract: Contract, user: UserRow, asked: RankRequest) -> UserRow:
    """The user under the request's what-if history and simulated degradation.

    Raises:
        InvalidRequestError: an event that is not there is to be left out, or one cannot be.
    """
    if asked.what_if is not None:
        user = _with_history(contract, user, asked.what_if)
    if asked.simulate is not None:
        user = _degraded(contract, user, reason_named(asked.simulate))
    return user


def _with_history(contract: Contract, user: UserRow, what_if: Any) -> UserRow:
    schema = history_schema(contract)
    history = pa.RecordBatch.from_pylist([], schema) if user.history is None else user.history
    if (last := max(what_if.without, default=-1)) >= history.num_rows:
        raise InvalidRequestError(
            f"what_if.without names event {last}, of a user of whom the store has {history.num_rows}, counted from 0"
        )
    added = events_in_order(what_if.events, contract, "what_if.")
    # A request counts events from the newest, and a history is stored from the oldest.
    gone = history.num_rows - 1 - np.array(what_if.without, np.int64)
    kept = history.take(pa.array(np.delete(np.arange(history.num_rows), gone)))
    # Statistics take in added events but keep those left out; the sketch stays as stored.
    columns = user.columns
    sketch = user.sketch
    if added:
        new = pa.Table.from_pylist(added, schema=schema)
        columns = columns | user_stats.add(contract, columns, new)
        both = pa.concat_tables([pa.Table.from_batches([kept], schema), new])
        # In the order of time; of one moment, as they were.
        order = np.argsort(micros(both["event_timestamp"]), kind="stable")
        newest = order[-contract.spec.num_history_online :]
        kept = both.take(pa.array(newest)).combine_chunks().to_batches()[0]
    # The problems must be those of the new history, and not of the stored one.
    problems = user.problems
    if kept.num_rows:
        unknown = (Degraded.UNKNOWN_USER, Degraded.NO_HISTORY)
        problems = tuple(problem for problem in problems if problem not in unknown)
    elif user.history is not None:
        problems = (*problems, Degraded.NO_HISTORY)
    # Stored tokens summarise the real history, out of which no event can be taken.
    return replace(
        user, columns=columns, history=kept, tokens=None, sketch=sketch, problems=problems
    )


def _degraded(contract: Contract, user: UserRow, reason: Degraded) -> UserRow:
    if reason in user.problems:
        return user
    if reason is Degraded.STORE_UNAVAILABLE:
        return UserRow({c.name: None for c in contract.user_columns}, None, (reason,))
    problems = (*user.problems, reason)
    if reason is Degraded.NO_HISTORY:
        nothing = StoredSketch(UserCounts(Layout.of(contract)), -1)
        return replace(user, history=None, sketch=nothing, problems=problems)
    if reason is Degraded.NO_SKETCH:
        return replace(user, sketch=None, problems=problems)
    return replace(user, tokens=None, problems=problems)
