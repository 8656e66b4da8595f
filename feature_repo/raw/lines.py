"""Several lines of one event: the one that arrived last holds.

An event is its identity (`SPEC.event_identity`) and nothing else. A line that names an identity
again corrects the event, whatever row, file, user, item, action or time it gives; a line that is
marked as deleted strikes it. Where lines say when they arrived, an event that was corrected stays
in the table with the time at which it ceased to hold, so that a request in between sees what was
known then. Where they do not, the last line alone stays: the order of files and rows stands for the
order of arrival.

A line may tell of several events, such as an impression and a click; they are corrected and struck
together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from feature_repo.contract.arrow import TIMESTAMP
from feature_repo.contract.contract import ARRIVAL, REPLACED
from feature_repo.history.known import NEVER, known_from

# Columns that lines have beside those of the table of events: a number that grows with files and
# rows, when the line arrived (null where nothing says), and whether it strikes the event.
LINE = "__line"
ARRIVED = "__arrived"
DELETED = "__deleted"
INNER = {LINE: pa.int64(), ARRIVED: TIMESTAMP, DELETED: pa.bool_()}
# Columns that say where and when a line came from, and nothing of the event
NO_CONTENT = ("source_position", ARRIVAL.name, REPLACED.name)
# Rows of a unit, at most
_ROWS = 1 << 40

REPEATED = "repeated: the same event stands earlier"
CORRECTED = "corrected: a line of the same event that arrived later holds in its place"
STRICKEN = "struck: a line that arrived later deletes the event"


@dataclass(frozen=True)
class Resolved:
    """Lines of events, resolved.

    Args:
        events: columns of the table; of events that a later line replaced the ones that a request
            may have known.
        dropped: the others, and why, one reason for each.
    """

    events: pa.Table
    dropped: pa.Table
    reasons: list[str]


def numbered(lines: pa.Table, unit: int) -> pa.Table:
    """Lines of a unit under numbers that no other unit's have, larger for a later unit."""
    place = lines.schema.get_field_index(LINE)
    numbers = pc.add(lines[LINE], pa.scalar(unit * _ROWS, pa.int64()))
    return lines.set_column(place, LINE, numbers)


def is_identified(rows: pa.Table) -> bool:
    """Return whether rows are lines whose events have an identity."""
    return LINE in rows.column_names


def as_strikes(lines: pa.Table, user: str) -> pa.Table:
    """Lines that only say of which event they are, and strike it; whose they were is left out."""
    nobody = pa.nulls(lines.num_rows, lines.schema.field(user).type)
    struck = pa.array(np.ones(lines.num_rows, bool))
    for name, values in ((user, nobody), (DELETED, struck)):
        lines = lines.set_column(lines.schema.get_field_index(name), name, values)
    return lines


def identity_hashes(lines: pa.Table, identity: Sequence[str]) -> np.ndarray:
    """A uint64 for each line, the same for lines of one event."""
    mixed = np.zeros(lines.num_rows, np.uint64)
    with np.errstate(over="ignore"):
        for name in identity:
            mixed = (mixed ^ _bits(lines[name].combine_chunks())) * np.uint64(0xFF51AFD7ED558CCD)
            mixed ^= mixed >> np.uint64(33)
    return mixed


def resolve(lines: pa.Table, identity: Sequence[str]) -> Resolved:
    """The events that lines come to.

    Args:
        lines: all lines of each event that any of them names, by `LINE`; events' columns and `INNER`.
        identity: columns that say "the same event". A line that lacks one of them is an event by itself.
    """
    columns = [name for name in lines.column_names if name not in INNER]
    events = lines.select(columns)
    # 1. Most events have one line, and most tables nothing else: a hash tells, and only ever finds
    #    too many.
    several = _may_have_several_lines(lines, identity)
    if not several.any():
        return Resolved(events, events.slice(0, 0), [])
    if not several.all():
        found = resolve(lines.filter(pa.array(several)), identity)
        alone = events.filter(pa.array(~several))
        return Resolved(pa.concat_tables([alone, found.events]), found.dropped, found.reasons)
    number = lines[LINE].to_numpy()
    event = _event_of(lines, identity, number)
    deleted = lines[DELETED].to_numpy()

    # 2. The lines of each event in the order in which they arrived. One that does not say when came
    #    before all that do, in the order of files and rows.
    arrived = pc.fill_null(pc.cast(lines[ARRIVED], pa.int64()), 0).to_numpy()
    order = np.lexsort((number, arrived, event))
    begins = np.r_[True, (np.diff(event[order]) != 0) | (np.diff(number[order]) != 0)]
    rank = np.empty(len(order), np.int64)
    rank[order] = np.cumsum(begins) - 1
    first_row = order[begins]
    followed = np.r_[np.diff(event[first_row]) == 0, False]
    until = np.where(followed, np.r_[arrived[first_row][1:], 0], NEVER)
    by_strike = followed & np.r_[deleted[first_row][1:], False]

    # 3. A row that says what a row of the line before it said changes nothing: the first one goes on
    #    to hold.
    rows = np.flatnonzero(~deleted)
    content = codes_of(events, [name for name in columns if name not in NO_CONTENT], rows)
    order = np.lexsort((rank[rows], content, event[rows]))
    rows = rows[order]
    same = (np.diff(content[order]) == 0) & (np.diff(event[rows]) == 0) & (np.diff(rank[rows]) == 1)
    starts = np.flatnonzero(np.r_[True, ~same][: len(rows)])
    last = rank[rows[np.r_[starts[1:], len(rows)].astype(np.int64)[: len(starts)] - 1]]
    held = rows[starts]

    # 4. What nobody can have known is no event; of the rest the table says until when they held.
    replaced = until[last]
    seen = replaced > known_from(events.take(pa.array(held)))
    reason = np.full(len(number), REPEATED, object)
    reason[held] = np.where(by_strike[last], STRICKEN, CORRECTED)
    ends = np.full(len(number), NEVER)
    ends[held] = replaced
    kept = np.sort(held[seen])
    dropped = np.setdiff1d(np.flatnonzero(~deleted), kept)
    stamps = pa.array(ends[kept], pa.int64(), mask=ends[kept] == NEVER).cast(TIMESTAMP)
    place = events.schema.get_field_index(REPLACED.name)
    return Resolved(
        events.take(pa.array(kept)).set_column(place, REPLACED.name, stamps),
        events.take(pa.array(dropped)),
        reason[dropped].tolist(),
    )


def _may_have_several_lines(lines: pa.Table, identity: Sequence[str]) -> np.ndarray:
    """Rows whose event several lines may name, and lines that strike one."""
    hashed = identity_hashes(lines, identity)
    number = lines[LINE].to_numpy()
    order = np.argsort(hashed, kind="stable")
    same = np.diff(hashed[order]) == 0
    # Rows of one line name one event as well.
    other = same & (np.diff(number[order]) != 0)
    run = np.r_[0, np.cumsum(~same)]
    found = np.zeros(lines.num_rows, bool)
    found[order] = np.isin(run, run[1:][other])
    return found | lines[DELETED].to_numpy()


def _event_of(lines: pa.Table, identity: Sequence[str], number: np.ndarray) -> np.ndarray:
    """A number for each row that its event's rows share."""
    event = codes_of(lines, identity, np.arange(lines.num_rows))
    unknown = np.zeros(lines.num_rows, bool)
    for name in identity:
        unknown |= pc.is_null(lines[name]).to_numpy()
    if unknown.any():
        # Rows of one such line still belong together.
        own = np.unique(number, return_inverse=True)[1]
        event = np.where(unknown, event.max() + 1 + own, event)
    return event


def codes_of(table: pa.Table, names: Sequence[str], rows: np.ndarray) -> np.ndarray:
    """A number for each of some rows; rows that are equal in all of these columns share it."""
    found = np.zeros(len(rows), np.int64)
    chosen = table.select(list(names)).take(pa.array(rows))
    for name in names:
        column = chosen[name].combine_chunks()
        if pa.types.is_nested(column.type):
            column = pa.array(
                [None if value is None else repr(value) for value in column.to_pylist()]
            )
        encoded = column.dictionary_encode()
        codes = pc.fill_null(encoded.indices, -1).to_numpy().astype(np.int64) + 1
        # Both factors are below 2^31, since each is numbered anew.
        mixed = pa.array(found * (len(encoded.dictionary) + 1) + codes)
        found = mixed.dictionary_encode().indices.to_numpy().astype(np.int64)
    return found


def _bits(column: pa.Array) -> np.ndarray:
    """A uint64 for each value, the same for equal ones: numbers are their own, and texts their length
    with their first and last eight bytes, which spreads them and costs no loop.
    """
    if not (pa.types.is_string(column.type) or pa.types.is_large_string(column.type)):
        if pa.types.is_floating(column.type):
            column = pc.cast(column, pa.float64())
            return pc.fill_null(column, 0).to_numpy().view(np.uint64)
        return pc.fill_null(pc.cast(column, pa.int64()), 0).to_numpy().view(np.uint64)
    texts = pc.cast(pc.fill_null(column, ""), pa.large_string())
    held = texts.buffers()[2]
    data = np.frombuffer(held, np.uint8) if held is not None else np.zeros(0, np.uint8)
    offsets = np.frombuffer(texts.buffers()[1], np.int64)
    offsets = offsets[texts.offset : texts.offset + len(texts) + 1]
    # Eight bytes from every place on, the last ones with zeros behind them
    eight = np.lib.stride_tricks.sliding_window_view(np.r_[data, np.zeros(8, np.uint8)], 8)
    length = np.diff(offsets)
    short = np.minimum(length, 8).astype(np.uint64) * np.uint64(8)
    kept = np.where(
        length >= 8, ~np.uint64(0), (np.uint64(1) << (short % np.uint64(64))) - np.uint64(1)
    )
    found = length.astype(np.uint64)
    with np.errstate(over="ignore"):
        for begin in (offsets[:-1], np.maximum(offsets[1:] - 8, offsets[:-1])):
            first = np.ascontiguousarray(eight[begin]).view("<u8")[:, 0]
            found = (found ^ (first & kept)) * np.uint64(0xC4CEB9FE1A85EC53)
            found ^= found >> np.uint64(29)
    return found
