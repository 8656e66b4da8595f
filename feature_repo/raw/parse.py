"""Raw rows → events, users, items and dead letters, as a dataset declares them.

A raw row gives one event; or, where its source has flags, an impression and an event for each
action that it says happened. Every raw row comes out as events or as one dead letter with its
reason. What breaks a limit of the contract is for the job to set aside (`limits.py`).
"""

from __future__ import annotations

import traceback
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from feature_repo.contract import limits
from feature_repo.contract.arrow import TIMESTAMP, arrow_schema, from_micros, micros
from feature_repo.contract.contract import ARRIVAL, EVENT_ID, REPLACED, REQUEST_ID, Contract
from feature_repo.contract.counts import Counts
from feature_repo.contract.schema import (
    CREATED_TIMESTAMP,
    EVENT_TIMESTAMP,
    FILE_TIME,
    Column,
    DatasetSpec,
    DType,
    Kind,
    Source,
)
from feature_repo.errors import DeclarationError
from feature_repo.raw import raw
from feature_repo.raw.lines import ARRIVED, CORRECTED, DELETED, INNER, LINE, REPEATED, STRICKEN
from feature_repo.raw.sources import RawBlock, RawUnit

# Time of profiles that have none: they are known from the start
KNOWN_SINCE = 0
# Column of the source's action, as it is read
ACTION = "__action"
UNSAID = "action: says nothing, as declared"
# Dead letters that say nothing against the data
NOT_BAD = (REPEATED, CORRECTED, STRICKEN, UNSAID)
IDS = ("user_id", "item_id", EVENT_ID.name)
TIMES = (EVENT_TIMESTAMP, CREATED_TIMESTAMP)
# Prefix of columns that say whether an action happened as well
FLAG = "__flag_"
STRUCK = Column(DELETED, DType.INT8, "strikes the event", values=(0, 1), nullable=True)
KINDS = ("events", "users", "items")
PROFILES = {"users": "user_profile", "items": "item_profile"}


@dataclass(frozen=True)
class Derived:
    """Columns and dead letters that a dataset's own code makes of raw rows.

    Args:
        columns: ours by name; they stand for what was read.
        reasons: masks of rows that are no event, each with the reason; a row's first one is given.
    """

    columns: dict[str, pa.Array] = field(default_factory=dict)
    reasons: tuple[tuple[np.ndarray, str], ...] = ()


# Of a kind ("events", "users" or "items"), rows as read, and rows as they stand. It is called for each
# block of rows of each source, in no order, in several processes. Rows as read hold the columns that
# the declaration names, of our names and types, null where a value cannot be read, and those of
# Source.raw; rows as they stand hold theirs, of a CSV file as bytes.
Derive = Callable[[str, pa.Table, pa.Table], Derived]


@dataclass(frozen=True)
class Parsed:
    """Rows of a raw source, split.

    Args:
        events: columns of the table; where events have an identity also those of `lines.py`.
        strikes: lines that strike an event, in the same columns; null but for identity and arrival.
        counts: `rows_read`, `rows_used` (that became events or strikes), `rows_dead`, `events_made`, `strikes`; of
            tables of users and items `read_…`, `dead_…` and `profile_rows_dead`.
    """

    events: pa.Table
    strikes: pa.Table
    users: pa.Table
    items: pa.Table
    dead_letters: pa.Table
    counts: Counts


def wanted(spec: DatasetSpec, kind: str) -> list[tuple[Column, str]]:
    """Columns that are read of a source, each with its name there.

    Args:
        kind: "events", "users" or "items".
    """
    source: Source = getattr(spec, kind)
    user = Column("user_id", spec.user_id, "user", is_key=True)
    item = Column("item_id", spec.item_id, "item", is_key=True)
    time = Column(EVENT_TIMESTAMP, DType.TIMESTAMP, "when it happened")
    # 1. List what SPEC wants of a source of this kind.
    if kind == "events":
        ours = [user, item, time]
        ours += [REQUEST_ID] if spec.requests.has_request_id else []
        ours += [EVENT_ID] if EVENT_ID.name in spec.event_identity else []
        ours += [*spec.event_features, *spec.context_features, *spec.shown_features]
        # Without a table of users or items their features stand in the log itself.
        ours += spec.user_features if spec.users is None else ()
        ours += spec.item_features if spec.items is None else ()
    else:
        ours = [user, *spec.user_features] if kind == "users" else [item, *spec.item_features]
        ours += [time] if EVENT_TIMESTAMP in source.columns else []
    # 2. Find the names there; what the dataset's code makes is read of no source.
    found = {
        c.name: (c, source.columns.get(c.name, c.name))
        for c in ours
        if c.name not in source.derived
    }
    if source.arrival and source.arrival != FILE_TIME:
        found[ARRIVED] = (Column(ARRIVED, DType.TIMESTAMP, "when it arrived"), source.arrival)
    if source.deleted:
        found[DELETED] = (STRUCK, source.deleted)
    found |= {column.name: (column, column.name) for column in source.raw}
    # 3. Add what says that an action happened, under internal names.
    if source.action:
        dtype = DType.STRING if source.at_least is None else DType.FLOAT32
        found[ACTION] = (Column(ACTION, dtype, "what happened"), source.action)
    for action, theirs in source.flags.items():
        found[_flag(action)] = (
            Column(_flag(action), DType.INT8, "happened", values=(0, 1)),
            theirs,
        )
    return list(found.values())


def theirs(spec: DatasetSpec, kind: str) -> list[str]:
    """Names of the raw columns that are read of a source."""
    source: Source = getattr(spec, kind)
    zone = [source.zone_column] if source.zone_column else []
    return list(dict.fromkeys([*(name for _, name in wanted(spec, kind)), *zone]))


def optional(spec: DatasetSpec, kind: str) -> list[str]:
    """Those of `theirs` that one file of several may lack: what is read of them may be null."""
    needed = {name for column, name in wanted(spec, kind) if not column.nullable}
    source: Source = getattr(spec, kind)
    return [name for name in theirs(spec, kind) if name not in needed | {source.zone_column}]


def user_columns(spec: DatasetSpec) -> set[str]:
    """Raw columns that hold users, in whatever source; none where code makes them."""
    found = set()
    for kind in ("events", "users"):
        if getattr(spec, kind) is not None:
            named = {name for column, name in wanted(spec, kind) if column.name == "user_id"}
            if not named:
                return set()
            found |= named
    return found


def typed(spec: DatasetSpec, unit: RawUnit, rows: pa.Table) -> pa.Table:
    """Raw rows as the declared columns; null where a value cannot be read."""
    source: Source = getattr(spec, unit.kind)
    return raw.typed(wanted(spec, unit.kind), rows, unit.file, raw.Format.of(source))


def parse(contract: Contract, unit: RawUnit, block: RawBlock, derive: Derive | None) -> Parsed:
    """One block of a source, split."""
    spec = contract.spec
    read = typed(spec, unit, block.rows)
    derived = Derived() if derive is None else _derived(derive, unit, block, read)
    source: Source = getattr(spec, unit.kind)
    if missing := set(source.derived) - set(derived.columns):
        raise DeclarationError(
            f"{unit.kind}.derived of {spec.name!r} names {sorted(missing)}, which `derive` does not make"
        )
    for name, values in derived.columns.items():
        at = read.schema.get_field_index(name)
        read = read.append_column(name, values) if at < 0 else read.set_column(at, name, values)
    nothing = _Nothing(contract)
    if unit.kind != "events":
        times = read[EVENT_TIMESTAMP] if EVENT_TIMESTAMP in read.column_names else None
        known = from_micros(np.full(len(read), KNOWN_SINCE, np.int64)) if times is None else times
        arrived = _arrivals(source, unit, read)
        made_at = (
            known if arrived is None else pc.max_element_wise(known, arrived, skip_nulls=False)
        )
        rows = profile(contract, PROFILES[unit.kind], read, known, made_at)
        made = {"users": nothing.users, "items": nothing.items, unit.kind: rows}
        lost = len(block.broken)
        table = PROFILES[unit.kind]
        counts = Counts(
            {f"read_{table}": lost, f"dead_{table}": lost, "profile_rows_dead": lost},
            cut=cut_values(spec, unit.kind, read),
            lost=lost_values(spec, unit.kind, block.rows, read),
        )
        return Parsed(
            nothing.events,
            nothing.events,
            dead_letters=_letters(contract, unit, block, np.full(len(read), -1), []),
            counts=counts,
            **made,
        )

    # 1. Each row's first reason to be no event. A line that strikes one names it, and need not say more.
    actions = _actions(spec, read)
    strikes = np.zeros(len(read), bool)
    if source.deleted:
        strikes = pc.fill_null(read[DELETED], 0).to_numpy() != 0
    verdict = np.full(len(read), -1)
    reasons: list[str] = []
    of_events = [*derived.reasons, *_unsaid(source, block.rows), *actions.reasons]
    reasons_found = [
        *((mask & ~strikes, reason) for mask, reason in of_events),
        *_unreadable(spec, block.rows, read, strikes),
    ]
    for mask, reason in reasons_found:
        verdict[(verdict < 0) & mask] = len(reasons)
        reasons.append(reason)
    kept = verdict < 0

    # 2. The others as events, each row's in the order of actions.
    arrived = _arrivals(source, unit, read)
    row, action = actions.of_rows(kept & ~strikes)
    lines = _Lines(read, block.positions, arrived, strikes)
    events = _events(contract, lines, row, action)
    struck = _events(contract, lines, np.flatnonzero(kept & strikes), None)
    # 3. What the rows say of users and items.
    used = np.flatnonzero(kept & ~strikes)
    users = nothing.users
    items = nothing.items
    if spec.users is None or spec.items is None:
        said = read.take(pa.array(used))
        # A microsecond is added: no request at the event's instant may see what the event says.
        known = micros(said[EVENT_TIMESTAMP]) + 1
        made_at = known
        if arrived is not None:
            made_at = np.maximum(known, micros(arrived.take(pa.array(used))) + 1)
        times = from_micros(known), from_micros(made_at)
        users = profile(contract, "user_profile", said, *times) if spec.users is None else users
        items = profile(contract, "item_profile", said, *times) if spec.items is None else items
    letters = _letters(contract, unit, block, verdict, reasons)
    counts = Counts(
        {
            "rows_read": block.num_read,
            "rows_used": int(kept.sum()),
            "rows_dead": len(letters),
            "events_made": len(events),
            "strikes": len(struck),
        },
        cut=cut_values(spec, "events", read.take(pa.array(used))),
        lost=lost_values(spec, "events", block.rows, read),
    )
    return Parsed(events, struck, users, items, letters, counts)


def _arrivals(source: Source, unit: RawUnit, read: pa.Table) -> pa.Array | None:
    """When each row arrived; None where nothing says."""
    if not source.arrival:
        return None
    if source.arrival == FILE_TIME:
        return from_micros(np.full(len(read), unit.written))
    return read[ARRIVED].combine_chunks()


def _derived(derive: Derive, unit: RawUnit, block: RawBlock, read: pa.Table) -> Derived:
    """Run a dataset's own code on rows.

    Raises:
        DeclarationError: it fails; the message names its line and the first row on which it does.
    """
    try:
        return derive(unit.kind, read, block.rows)
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        own = [f for f in frames if f.filename == derive.__code__.co_filename] or frames
        at = next(
            (n for n in range(len(read)) if _fails_on(derive, unit.kind, read, block, n)), None
        )
        row = "none of its rows alone" if at is None else f"row {block.positions[at]:,}"
        raise DeclarationError(
            f"{own[-1].filename}:{own[-1].lineno}, {own[-1].name}: {type(error).__name__}: {error}. It was given "
            f"{len(read):,} rows of {unit.kind} from {unit.file}, and fails on {row}"
        ) from error


def _fails_on(derive: Derive, kind: str, read: pa.Table, block: RawBlock, row: int) -> bool:
    try:
        derive(kind, read.slice(row, 1), block.rows.slice(row, 1))
    except Exception:
        return True
    return False


def profile(
    contract: Contract, table: str, read: pa.Table, known: pa.Array, made_at: pa.Array
) -> pa.Table:
    """Rows of a profile; a profile without features says since when its key is known.

    Args:
        known: since when each row holds.
        made_at: when that became known.
    """
    schema = arrow_schema(contract.table(table))
    key, *features, known_name = (name for name in schema.names if name not in TIMES)
    if not features:
        keys = {key: _cast(read[key], schema.field(key).type), "at": known, "made": made_at}
        first = pa.table(keys).group_by(key).aggregate([("at", "min"), ("made", "min")])
        read = first.select([key])
        known = first["at_min"]
        made_at = first["made_min"]
    columns = []
    for column in schema:
        if column.name in TIMES:
            columns.append(known if column.name == EVENT_TIMESTAMP else made_at)
        elif column.name == known_name:
            columns.append(pa.array(np.ones(len(read), np.int8)))
        else:
            columns.append(_cast(read[column.name], column.type))
    return pa.table(columns, schema=schema)


def cut_values(spec: DatasetSpec, kind: str, read: pa.Table) -> dict[str, int]:
    """How many values of bags no ranker reads, by column."""
    columns = {"users": spec.user_features, "items": spec.item_features}.get(kind) or (
        *spec.event_features,
        *spec.context_features,
        *spec.user_features,
        *spec.item_features,
    )
    found = {}
    for column in columns:
        if column.kind is Kind.BAG and column.name in read.column_names:
            lengths = pc.fill_null(pc.list_value_length(read[column.name]), 0).to_numpy()
            found[column.name] = int(np.maximum(lengths - column.slots, 0).sum())
    return found


def lost_values(spec: DatasetSpec, kind: str, given: pa.Table, read: pa.Table) -> dict[str, int]:
    """How many values there are that could not be read and are missing now, by column. Where something
    must be there the row is a dead letter, and says so itself.
    """
    source: Source = getattr(spec, kind)
    marks = tuple(mark.lower() for mark in source.missing)
    found = {}
    for column, name in wanted(spec, kind):
        if not column.nullable or read[column.name].null_count == 0:
            continue
        lost = pc.is_null(read[column.name]).to_numpy() & ~raw.is_blank(given[name], marks)
        if further := source.missing_in.get(name):
            lost &= ~raw.says_nothing(given[name], further)
        if lost.any():
            found[column.name] = int(lost.sum())
    return found


@dataclass(frozen=True)
class _Actions:
    """The actions of each row.

    Args:
        happened: rows × actions, in the order of `number`.
        number: index of each action.
        reasons: rows that name no declared action.
    """

    happened: np.ndarray
    number: np.ndarray
    reasons: tuple[tuple[np.ndarray, str], ...] = ()

    def of_rows(self, kept: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Row and action of every event of the kept rows."""
        row, at = np.nonzero(self.happened & kept[:, None])
        return row, self.number[at].astype(np.int8)


def _actions(spec: DatasetSpec, read: pa.Table) -> _Actions:
    source = spec.events
    number = len(read)
    # A dataset's own code has said
    if "action" in read.column_names:
        codes = pc.fill_null(read["action"], -1).to_numpy()
        happened = codes[:, None] == np.arange(len(spec.actions))
    elif source.flags:
        # Each row of such a source is an impression, whatever else the flags say.
        names = [spec.shown] if spec.shown else []
        columns = [np.ones(number, bool) for _ in names]
        for action in source.flags:
            names.append(action)
            columns.append(pc.fill_null(read[_flag(action)], 0).to_numpy() != 0)
        happened = np.stack(columns, axis=1)
        return _Actions(
            happened, np.array([spec.actions.index(n) for n in names]), _nothing_happened(happened)
        )
    elif source.at_least is not None:
        # NaN fails both comparisons: a row without a value names no action.
        value = pc.fill_null(read[ACTION], np.nan).to_numpy()
        happened = np.stack([value >= source.at_least, value < source.at_least], axis=1)
    elif source.action:
        named = source.actions or {name: name for name in spec.actions}
        code = pa.array([spec.actions.index(ours) for ours in named.values()], pa.int64())
        place = pc.index_in(read[ACTION].combine_chunks(), pa.array(list(named), pa.string()))
        codes = pc.fill_null(code.take(place), -1).to_numpy()
        happened = codes[:, None] == np.arange(len(spec.actions))
    else:
        # A log that says nothing of actions is a log of the first one.
        happened = np.zeros((number, len(spec.actions)), bool)
        happened[:, 0] = True
    return _Actions(happened, np.arange(len(spec.actions)), _nothing_happened(happened))


def _nothing_happened(happened: np.ndarray) -> tuple[tuple[np.ndarray, str], ...]:
    silent = np.asarray(~happened.any(axis=1))
    return ((silent, "action: none that is declared"),)


def _unsaid(source: Source, given: pa.Table) -> list[tuple[np.ndarray, str]]:
    """Rows whose action is declared to say nothing, such as a rating of 0 that was never given."""
    marks = source.missing_in.get(source.action, ())
    return [(raw.says_nothing(given[source.action], marks), UNSAID)] if marks else []


def _unreadable(
    spec: DatasetSpec, given: pa.Table, read: pa.Table, strikes: np.ndarray
) -> list[tuple[np.ndarray, str]]:
    """Rows that lack what every event has, and why.

    Args:
        strikes: rows that strike an event: they must say which one, and when they arrived.
    """
    required = {"user_id", "item_id", EVENT_TIMESTAMP, EVENT_ID.name, ARRIVED}
    required |= {c.name for c in spec.event_features if not c.nullable}
    of_strikes = {*spec.event_identity, ARRIVED, DELETED}
    found = []
    for name in required & set(spec.events.derived):
        missing = pc.is_null(read[name]).to_numpy()
        found.append((missing & ~(strikes & (name not in of_strikes)), f"{name}: is missing"))
    for column, name in wanted(spec, "events"):
        is_flag = column.name.startswith(FLAG) or column.name == DELETED
        if not (is_flag or column.name in required or column.name in spec.event_identity):
            continue
        missing = pc.is_null(read[column.name]).to_numpy()
        # Any other row that lacks a part of its identity is an event of its own.
        if column.name not in of_strikes:
            missing = missing & ~strikes
        elif not (is_flag or column.name in required):
            missing = missing & strikes
        is_id = column.name in IDS
        if not (missing.any() or is_id):
            continue
        blank = raw.is_blank(given[name], tuple(mark.lower() for mark in spec.events.missing))
        # A blank is nobody's id
        missing = (
            missing | (blank & ~(strikes & (column.name not in of_strikes))) if is_id else missing
        )
        found.append((missing & ~blank, f"{name}: unreadable"))
        # A blank flag says that nothing happened.
        if not is_flag:
            found.append((missing & blank, f"{name}: is missing"))
    return found


@dataclass(frozen=True)
class _Lines:
    """Rows as they were read, with their place in the file, their arrival and whether they strike an event."""

    read: pa.Table
    positions: np.ndarray
    arrived: pa.Array | None
    strikes: np.ndarray


def _events(
    contract: Contract, lines: _Lines, row: np.ndarray, action: np.ndarray | None
) -> pa.Table:
    """Some rows as the table of events, with the columns of `lines.py` where events have an identity.

    Args:
        row: of each event; a row may tell of several.
        action: of each; None of lines that strike an event.
    """
    number = len(row)
    chosen = lines.read.take(pa.array(row))
    schema = arrow_schema(contract.table("events"))
    # 1. What no row says itself.
    columns = {"source_position": pa.array(lines.positions[row])}
    columns["action"] = pa.nulls(number, pa.int8()) if action is None else pa.array(action)
    arrived = pa.nulls(number, TIMESTAMP)
    if lines.arrived is not None:
        arrived = lines.arrived.take(pa.array(row))
    late = pc.fill_null(pc.greater(arrived, chosen[EVENT_TIMESTAMP].cast(TIMESTAMP)), False)
    columns[ARRIVAL.name] = pc.if_else(late, arrived, pa.scalar(None, TIMESTAMP))
    columns[REPLACED.name] = pa.nulls(number, TIMESTAMP)
    events = pa.table(
        [columns[f.name] if f.name in columns else _cast(chosen[f.name], f.type) for f in schema],
        schema=schema,
    )
    # 2. What tells lines of one event apart.
    if contract.spec.event_identity:
        inner = {LINE: pa.array(lines.positions[row]), ARRIVED: arrived}
        inner[DELETED] = pa.array(lines.strikes[row])
        for name, values in inner.items():
            events = events.append_column(name, values)
    return events


def _cast(column: pa.ChunkedArray, kind: pa.DataType) -> pa.ChunkedArray:
    """A column as the table holds it; a whole number that does not fit is null, and so is an empty
    text.
    """
    if pa.types.is_string(kind):
        return pc.if_else(pc.equal(column, ""), pa.scalar(None, kind), column)
    if pa.types.is_integer(kind) and kind.bit_width < 64:
        limit = 2 ** (kind.bit_width - 1)
        fits = pc.and_(pc.greater_equal(column, -limit), pc.less(column, limit))
        column = pc.if_else(fits, column, pa.scalar(None, column.type))
    return pc.cast(column, kind, safe=False)


def _letters(
    contract: Contract, unit: RawUnit, block: RawBlock, verdict: np.ndarray, reasons: list[str]
) -> pa.Table:
    dead = np.flatnonzero(verdict >= 0)
    names = [unit.file.rsplit("/", 1)[-1]] * (len(dead) + len(block.broken))
    rows = block.positions[dead].tolist() + [at for at, _, _ in block.broken]
    why = [reasons[index] for index in verdict[dead]]
    why += [f"unreadable line: {reason}" for _, _, reason in block.broken]
    content = limits.raw_rows(block.rows, dead)
    content += [limits.as_json({"line": text}) for _, text, _ in block.broken]
    return pa.table(
        [names, rows, why, content], schema=arrow_schema(contract.table("dead_letters"))
    )


def _flag(action: str) -> str:
    return f"{FLAG}{action}"


class _Nothing:
    """Empty tables of a contract, as `Parsed` has them."""

    def __init__(self, contract: Contract) -> None:
        self.events, self.users, self.items, self.letters = (
            arrow_schema(contract.table(name)).empty_table()
            for name in ("events", "user_profile", "item_profile", "dead_letters")
        )
        if contract.spec.event_identity:
            for name, kind in INNER.items():
                self.events = self.events.append_column(name, pa.array([], kind))
