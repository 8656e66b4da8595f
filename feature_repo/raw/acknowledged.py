"""Events that a server acknowledged, as the `events` job reads them beside the raw files: each is a line that
arrived when the server took it, or, where lines of files do not say when they arrived, before all of theirs.

A caller may send an event that also comes in a file; then it counts once, and the line of the file stays, which says
more. It is known from whichever came first. Two lines tell of the same event

    that both name by its identity    if they agree in all that an event by HTTP can say. If not, one corrects the
                                      other, as lines do (`lines.py`).
    where one has no identity         if user, item, action and time are the same
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from feature_repo.contract import limits
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
    rows = rows.sort_by(NUMBER)
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
        # Files that do not say when their lines arrived have the last word on what an event was.
        says = bool(contract.spec.events.arrival)
        arrived = from_micros(number) if says else pa.nulls(len(said), TIMESTAMP)
        inner = {LINE: pa.array(np.arange(len(said))), ARRIVED: arrived}
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


@dataclass(frozen=True)
class Joined:
    """Lines of events, each told once.

    Args:
        rows: without the repeated ones, and known from whichever came first.
        repeated: acknowledged lines that a file has as well, or that were acknowledged before.
    """

    rows: pa.Table
    repeated: pa.Table


def joined_by_identity(contract: Contract, lines: pa.Table) -> Joined:
    """Join acknowledged lines to the lines of files that say the same of the same event.

    Args:
        lines: all of each event's, before they are resolved.
    """
    identity = contract.spec.event_identity
    said = [column.name for column in contract.history_columns]
    columns = list(dict.fromkeys([*identity, contract.user.join_key, *said]))
    return _joined(lines, columns, _acknowledged(lines) & ~lacks_identity(contract, lines))


def history_events(
    contract: Contract, user_id: int | str, numbers: Sequence[int], texts: Sequence[str]
) -> pa.Table:
    """Acknowledged events of a user as columns of a history and the moment at which each arrived (`ARRIVED`),
    without those that the next run of `events` will set aside.

    Args:
        numbers: microseconds at which they arrived.
        texts: as the log holds them.
    """
    rows = pa.table(
        {
            contract.user.join_key: pa.array([user_id] * len(numbers)),
            NUMBER: pa.array(numbers, pa.int64()),
            EVENT: pa.array(texts, pa.string()),
        }
    )
    parsed = parse_acknowledged(contract, rows, "log").events
    kept = limits.check(contract.table("events"), parsed).kept
    events = kept.select([column.name for column in contract.history_columns])
    arrived = kept["source_position"].to_numpy() - POSITIONS
    return events.append_column(ARRIVED, pa.array(arrived))


def joined_by_content(contract: Contract, events: pa.Table) -> Joined:
    """Join acknowledged events that have no identity to events of the same user, item, action and time.

    Args:
        events: all of each user of whom there are any.
    """
    columns = [contract.user.join_key, contract.item.join_key, "action", EVENT_TIMESTAMP]
    return _joined(events, columns, _acknowledged(events) & lacks_identity(contract, events))


def lacks_identity(contract: Contract, rows: pa.Table) -> np.ndarray:
    """Which rows name no event, bool; all where events have no identity."""
    found = np.full(rows.num_rows, not contract.spec.event_identity)
    for name in contract.spec.event_identity:
        found |= pc.is_null(rows[name]).to_numpy()
    return found


def _acknowledged(rows: pa.Table) -> np.ndarray:
    return np.asarray(rows["source_position"].to_numpy() >= POSITIONS)


def _joined(rows: pa.Table, columns: list[str], candidates: np.ndarray) -> Joined:
    """Join candidates to other rows that are equal in some columns."""
    if not candidates.any():
        return Joined(rows, rows.slice(0, 0))
    # 1. Only users of whom there is a candidate can have one that repeats.
    users = rows[columns[0]].combine_chunks().dictionary_encode().indices
    users = pc.fill_null(users, -1).to_numpy()
    places = np.flatnonzero(np.isin(users, np.unique(users[candidates])))
    code = codes_of(rows, columns, places)
    # 2. Of equal rows the first one stays: files have smaller positions.
    position = rows["source_position"].to_numpy()
    order = np.lexsort((position[places], candidates[places], code))
    places = places[order]
    starts = np.r_[True, np.diff(code[order]) != 0]
    first = places[np.maximum.accumulate(np.where(starts, np.arange(len(places)), 0))]
    repeats = candidates[places] & ~starts
    dropped = places[repeats]
    stays = first[repeats]
    # 3. It is known from whichever came first.
    for name in (ARRIVAL.name, ARRIVED):
        if name in rows.column_names:
            rows = _no_later(rows, name, stays, dropped)
    kept = np.ones(rows.num_rows, bool)
    kept[dropped] = False
    return Joined(rows.filter(pa.array(kept)), rows.filter(pa.array(~kept)))


def _no_later(rows: pa.Table, name: str, stays: np.ndarray, dropped: np.ndarray) -> pa.Table:
    """Rows whose times are no later than those of rows that are dropped for them; null is the earliest."""
    earliest = -1
    times = pc.fill_null(pc.cast(rows[name], pa.int64()), earliest).to_numpy().copy()
    np.minimum.at(times, stays, times[dropped])
    stamps = pa.array(times, pa.int64(), mask=times == earliest).cast(TIMESTAMP)
    return rows.set_column(rows.schema.get_field_index(name), name, stamps)


def _typed(values: list[Any], field: pa.Field, reasons: list[str | None]) -> pa.Array:
    """A column of events; a value of the wrong type is null, and its row has a reason."""
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
