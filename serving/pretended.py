"""A user as a request asks to see them: with events that never were, without ones that were, or as if the
store had failed.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa

from feature_repo.arrow import history_schema, micros
from feature_repo.contract import Contract
from feature_repo.sketch import Layout, Sketch
from serving.degraded import Degraded, reason_named
from serving.errors import InvalidRequestError
from serving.features import StoredSketch, UserRow
from serving.messages import RankRequest, events_in_order
from serving.refresh import stats_after

NO_SCORES = frozenset({Degraded.NO_SCORES, Degraded.DEADLINE})  # rungs that no user is read for


def as_asked(contract: Contract, user: UserRow, asked: RankRequest) -> UserRow:
    """The user under what the request pretends and forces.

    Raises:
        InvalidRequestError: an event that is not there is to be left out, or one cannot be.
    """
    if asked.pretended is not None:
        user = _with_past(contract, user, asked.pretended)
    if asked.force is not None:
        user = _forced(contract, user, reason_named(asked.force))
    return user


def _with_past(contract: Contract, user: UserRow, pretended: Any) -> UserRow:
    schema = history_schema(contract)
    history = pa.RecordBatch.from_pylist([], schema) if user.history is None else user.history
    if (last := max(pretended.without, default=-1)) >= history.num_rows:
        raise InvalidRequestError(
            f"pretended.without names event {last}, of a user of whom the store has {history.num_rows}, counted from 0"
        )
    added = events_in_order(pretended.events, contract, "pretended.")
    gone = history.num_rows - 1 - np.array(pretended.without, np.int64)
    kept = history.take(pa.array(np.delete(np.arange(history.num_rows), gone)))
    columns, sketch = user.columns, user.sketch
    if added:
        new = pa.Table.from_pylist(added, schema=schema)
        columns = columns | stats_after(contract, columns, new)
        both = pa.concat_tables([pa.Table.from_batches([kept], schema), new])
        # In the order of time; of one moment, as they were.
        order = np.argsort(micros(both["event_timestamp"]), kind="stable")
        newest = order[-contract.spec.num_history_online :]
        kept = both.take(pa.array(newest)).combine_chunks().to_batches()[0]
    problems = user.problems
    if kept.num_rows:
        unknown = (Degraded.UNKNOWN_USER, Degraded.NO_HISTORY)
        problems = tuple(problem for problem in problems if problem not in unknown)
    elif user.history is not None:
        problems = (*problems, Degraded.NO_HISTORY)
    return replace(
        user, columns=columns, history=kept, tokens=None, sketch=sketch, problems=problems
    )


def _forced(contract: Contract, user: UserRow, rung: Degraded) -> UserRow:
    if rung in user.problems:
        return user
    if rung is Degraded.STORE_UNAVAILABLE:
        return UserRow({c.name: None for c in contract.user_columns}, None, (rung,))
    problems = (*user.problems, rung)
    if rung is Degraded.NO_HISTORY:
        nothing = StoredSketch(Sketch(Layout.of(contract)), -1)
        return replace(user, history=None, sketch=nothing, problems=problems)
    if rung is Degraded.NO_SKETCH:
        return replace(user, sketch=None, problems=problems)
    return replace(user, tokens=None, problems=problems)
