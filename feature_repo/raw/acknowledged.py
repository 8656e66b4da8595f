"""Events that a server acknowledged, as the `events` job reads them beside the raw files: each is a line that
arrived when the server took it.

A caller may send an event that also comes in a file. Where events have an identity that both lines give, they are
lines of one event like any others (`lines.py`). Where not, an acknowledged event is another's with the same user,
item, action and time: the line of the file stays.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from feature_repo.contract.arrow import TIMESTAMP, arrow_schema, from_micros
from feature_repo.contract.contract import ARRIVAL, Contract
from feature_repo.contract.counts import Counts
from feature_repo.contract.limits import as_json
from feature_repo.contract.schema import EVENT_TIMESTAMP
from feature_repo.raw.lines import ARRIVED, DELETED, LINE, codes_of
from feature_repo.raw.parse import Parsed

# Columns of a file of acknowledged events, beside the user: when each arrived, since when it is known, and the
# event as text
NUMBER = "number"
KNOWN = "known_from"
EVENT = "event"
# Positions of acknowledged events begin here: at one moment they stand behind those of every file.
POSITIONS = 1 << 62


def parse_acknowledged(contract: Contract, rows: pa.Table, file: str) -> Parsed:
    """Rows of a file of acknowledged events as events, under the contract in force; what it cannot hold is a dead
    letter.

    Args:
        file: the name that dead letters give.
    """
    schema = arrow_schema(contract.table("events"))
    user = contract.user.join_key
    said = [json.loads(text) for text in rows[EVENT].to_pylist()]
    number = rows[NUMBER].to_numpy()
    # 1. Values as the contract types them; what an event does not say is null.
    reasons: list[str | None] = [None] * len(said)
    columns: dict[str, pa.Array] = {
        field.name: _typed([event.get(field.name) for event in said], field, reasons)
        for field in schema
    }
    columns[user] = _typed(rows[user].to_pylist(), schema.field(user), reasons)
    # 2. When it arrived, and where it stands.
    later = number > pc.fill_null(pc.cast(columns[EVENT_TIMESTAMP], pa.int64()), 0).to_numpy()
    columns[ARRIVAL.name] = pa.array(number, pa.int64(), mask=~later).cast(TIMESTAMP)
    columns["source_position"] = pa.array(POSITIONS + number)
    events = pa.table([columns[name] for name in schema.names], schema=schema)
    if contract.spec.event_identity:
        inner = {LINE: pa.array(np.arange(len(said))), ARRIVED: from_micros(number)}
        inner[DELETED] = pa.array(np.zeros(len(said), bool))
        for name, values in inner.items():
            events = events.append_column(name, values)
    # 3. What could not be read.
    dead = [place for place, reason in enumerate(reasons) if reason]
    letters = pa.table(
        [
            pa.array([file] * len(dead), pa.string()),
            pa.array(POSITIONS + number[dead]),
            pa.array([reasons[place] for place in dead], pa.string()),
            pa.array(
                [as_json({user: rows[user][n].as_py(), **said[n]}) for n in dead], pa.string()
            ),
        ],
        schema=arrow_schema(contract.table("dead_letters")),
    )
    kept = events.filter(pa.array([reason is None for reason in reasons], pa.bool_()))
    counts = {
        "rows_read": len(said),
        "rows_acknowledged": len(said),
        "rows_used": kept.num_rows,
        "rows_dead": len(dead),
        "events_made": kept.num_rows,
    }
    users = arrow_schema(contract.table("user_profile")).empty_table()
    items = arrow_schema(contract.table("item_profile")).empty_table()
    return Parsed(kept, events.slice(0, 0), users, items, letters, Counts(counts))


def repeated(contract: Contract, events: pa.Table) -> np.ndarray:
    """Which acknowledged events repeat another one of the same user, item, action and time, bool: of a file, or one
    that was acknowledged earlier.

    Args:
        events: all of each user of whom there are any.
    """
    position = events["source_position"].to_numpy()
    found = np.zeros(len(position), bool)
    acknowledged = position >= POSITIONS
    if not acknowledged.any():
        return found
    # Only users of whom there is one can have one that repeats.
    users = events[contract.user.join_key].combine_chunks().dictionary_encode().indices.to_numpy()
    rows = np.flatnonzero(np.isin(users, np.unique(users[acknowledged])))
    identity = (contract.user.join_key, contract.item.join_key, "action", EVENT_TIMESTAMP)
    code = codes_of(events, identity, rows)
    order = np.lexsort((position[rows], code))
    follows = np.r_[False, np.diff(code[order]) == 0]
    found[rows[order]] = follows
    return found & acknowledged


def _typed(values: list[Any], field: pa.Field, reasons: list[str | None]) -> pa.Array:
    """A column of events; a value of another type is null, and its row has a reason."""
    try:
        return _column(values, field.type)
    except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError):
        typed = []
        for place, value in enumerate(values):
            try:
                typed.append(_column([value], field.type)[0])
            except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError):
                typed.append(pa.scalar(None, field.type))
                reasons[place] = f"{field.name}: {value!r} cannot be read as {field.type}"
        return pa.array([value.as_py() for value in typed], field.type)


def _column(values: list[Any], kind: pa.DataType) -> pa.Array:
    # Times are text's whole numbers.
    if pa.types.is_timestamp(kind):
        return pa.array(values, pa.int64()).cast(kind)
    return pa.array(values, kind)
