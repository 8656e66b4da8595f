"""Since when an event is known, and until when it holds.

An event happens at one time and becomes known at another: when its line arrives, and never before
it has happened. A line that arrives later may stand in an event's place, or strike it. Two columns
of the table `events` say so, and are null where there is nothing to say:

    arrival_timestamp    when the event arrived, if that was later than it happened
    replaced_timestamp   when a later line of the same event arrived, and this one ceased to hold

Events of a table without these columns are known as they happen.

A request at time t knows the events whose later one of both times, happened and arrived, lies
before t, and that no line which arrived before t has replaced. History, statistics, sketch, tokens
and training examples follow this one rule.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from feature_repo.contract.arrow import TIMESTAMP, micros
from feature_repo.contract.contract import ARRIVAL, REPLACED
from feature_repo.contract.schema import EVENT_TIMESTAMP

# Of events that no line replaces, microseconds
NEVER = int(np.iinfo(np.int64).max)


def known_from(events: pa.Table | pa.RecordBatch) -> np.ndarray:
    """Microseconds at which each event has both happened and arrived: it is known just after."""
    happened = micros(events[EVENT_TIMESTAMP])
    return np.maximum(happened, _or(events, ARRIVAL.name, 0))


def replaced_at(events: pa.Table | pa.RecordBatch) -> np.ndarray:
    """Microseconds at which a line that stands in each event's place arrived; `NEVER` of none."""
    return _or(events, REPLACED.name, NEVER)


def is_on_time(events: pa.Table) -> bool:
    """Return whether every event was known as soon as it happened, and holds."""
    return _is_null(events, ARRIVAL.name) and _is_null(events, REPLACED.name)


def known_before(events: pa.Table, at: int) -> pa.Table:
    """The events that were known just before a time, microseconds; replacements that had not arrived by
    then are left out.
    """
    rows = events.filter(pa.array(known_from(events) < at))
    if _is_null(rows, REPLACED.name):
        return rows
    replaced = replaced_at(rows)
    place = rows.schema.get_field_index(REPLACED.name)
    return rows.set_column(
        place, REPLACED.name, pa.array(replaced, pa.int64(), mask=replaced >= at).cast(TIMESTAMP)
    )


def that_hold(events: pa.Table) -> pa.Table:
    """The events that no line has replaced."""
    if _is_null(events, REPLACED.name):
        return events
    return events.filter(pc.is_null(events[REPLACED.name]))


def _is_null(events: pa.Table | pa.RecordBatch, name: str) -> bool:
    return name not in events.schema.names or events[name].null_count == events.num_rows


def _or(events: pa.Table | pa.RecordBatch, name: str, missing: int) -> np.ndarray:
    if _is_null(events, name):
        return np.full(events.num_rows, missing)
    return pc.fill_null(pc.cast(events[name], pa.int64()), missing).to_numpy(zero_copy_only=False)
