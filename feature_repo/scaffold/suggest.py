"""A stranger's files → a declaration to correct: what each column was taken for, why, and what is not
sure of it.

What a column is called (`names.py`) and what is in it (`shapes.py`) decide together, by both ends of
every file. Nothing is kept of the files but the text of a dataset module (`suggest_text.py`);
`python -m feature_repo check` says what comes of it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from feature_repo.contract.arrow import micros, micros_iso
from feature_repo.contract.contract import RESERVED
from feature_repo.contract.schema import TIME_UNITS, DType, Kind, Source
from feature_repo.errors import RawDataError, UsageError, nearest
from feature_repo.raw import raw, sources
from feature_repo.scaffold import sniff
from feature_repo.scaffold.names import (
    ACTION_WORDS,
    as_well_named,
    best_named,
    may_be_key,
    means,
    named_as,
    parts_of,
    singular,
    takes_back,
)
from feature_repo.scaffold.shapes import (
    FEW,
    UNIX_TIMES,
    ColumnShape,
    shape_of,
    unlike_numbers,
    unsure_sign,
)

SAMPLE_ROWS = 50_000
# So many files of a log are sampled, the first and the last among them
SAMPLE_FILES = 50
# Distinct texts from where on a category is hashed
MANY = 10_000
# Times from which the periods are cut
SAMPLE_TIMES = 1_000_000
# Stands in the draft for a column that nobody knows
UNKNOWN = "?"
LABEL_WORDS = frozenset(["label", "target", "clk", "conversion", "converted", "y"])
CLOCK = r"^\s*\d{1,2}:\d{2}(:\d{2}(\.\d+)?)?\s*$"


@dataclass(frozen=True)
class Guess:
    """The role that a column was taken for.

    Args:
        role: "user", "item", "time", "request", "event id", "action", "rating", "flag", "zone",
            "feature" or "left out".
        group: for a feature, its field of the declaration.
        doubt: why it may be otherwise; "" where it is sure.
    """

    column: str
    role: str
    why: str
    # Its name in the declaration
    ours: str = ""
    dtype: DType = DType.STRING
    kind: Kind | None = None
    group: str = ""
    nullable: bool = False
    length: int | None = None
    hashed: int | None = None
    separator: str = ""
    # Its sign, where one is seen
    decimal: str = ""
    unit: str = ""
    doubt: str = ""

    @property
    def line(self) -> str:
        kind = self.kind.value if self.kind else "not read by rankers"
        text = {
            "feature": f"{self.group}, {kind}: {self.why}",
            "left out": f"left out, for {self.why}",
        }.get(self.role, f"{self.role}: {self.why}")
        return f"{text}  # ? {self.doubt}" if self.doubt else text


@dataclass(frozen=True)
class Sampled:
    """A source as it was found: how it is read, some of its rows as text, and what each column is.

    Args:
        shapes: of its columns.
        doubts: field of the source → why it may be otherwise.
    """

    source: Source
    rows: pa.Table
    shapes: Mapping[str, ColumnShape] = field(default_factory=dict)
    guesses: dict[str, Guess] = field(default_factory=dict)
    doubts: dict[str, str] = field(default_factory=dict)

    def column(self, role: str) -> str | None:
        """The column that has a role."""
        return next((g.column for g in self.guesses.values() if g.role == role), None)


def sample_of(path: str, data: str, kind: str = "events") -> Sampled:
    """How files are written, and rows from both ends of each.

    Args:
        path: of a file, folder or glob, below `data`.
        kind: "events", "users" or "items"; columns of a file without a header are called after it.

    Raises:
        RawDataError: nothing is there, or it is no table.
    """
    # 1. Find how the files are written.
    source = Source(path)
    doubts = {}
    files = sources.files_of(source, data)
    if sources.is_csv(source, files[0]):
        sniffed = sniff.sniff(path, _first_filled(files), kind.removesuffix("s"))
        source = sniffed.source
        doubts = dict(sniffed.doubts)
    elif sources.format_of(source, files[0]) == "json":
        sniff.refuse_other_json(_first_filled(files))
    # 2. Collect columns that any file has, and rows from both ends of each.
    held = {
        file: sources.columns_in(source, file) for file in _some(files) if sources.size_of(file)
    }
    names = list(dict.fromkeys(name for found in held.values() for name in found))
    if not names:
        raise RawDataError(f"{path} has no row")
    units = sources.units_of(source, data, kind, names, optional=names)
    rows = _sample(source, units, names)
    # 3. Look at each column; one that some files lack is in doubt.
    for name in names:
        having = sum(name in found for found in held.values())
        if having < len(held):
            doubts[f"column {name}"] = f"in {having:,} of {len(held):,} files"
    shapes = {name: shape_of(rows[name]) for name in names}
    # The source has one sign; a column with the other one is named in `Source.decimals`.
    commas = [shape for shape in shapes.values() if shape.decimal == ","]
    if commas:
        source = replace(source, decimal=",")
    return Sampled(source, rows, shapes, doubts=doubts)


def _first_filled(files: list[str]) -> str:
    return next((file for file in files if sources.size_of(file)), files[0])


def _some(files: list[str]) -> list[str]:
    chosen = np.linspace(0, len(files) - 1, min(len(files), SAMPLE_FILES)).astype(int)
    return [files[at] for at in np.unique(chosen)]


def _sample(source: Source, units: list[sources.RawUnit], names: list[str]) -> pa.Table:
    """Rows from both ends of the files, of one type a column."""
    chosen = set(_some(list(dict.fromkeys(unit.file for unit in units))))
    ends = sources.ends_of(source, [unit for unit in units if unit.file in chosen])
    share = max(SAMPLE_ROWS // max(len(ends), 1), 100)
    firsts = [next(iter(sources.blocks_of(source, end, names)), None) for end in ends]
    tables = [first.rows.slice(0, share) for first in firsts if first is not None]
    tables = [table for table in tables if len(table)]
    if not tables:
        raise RawDataError(
            f"{source.path} has no row below its header: what columns hold is told from rows"
        )
    return _together(tables, names)


def _together(tables: list[pa.Table], names: list[str]) -> pa.Table:
    """Tables below one another; columns whose types differ become text."""
    columns = []
    for name in names:
        parts = [table[name] for table in tables]
        kinds = {part.type for part in parts if not pa.types.is_null(part.type)}
        if len(kinds) > 1 and all(raw.is_readable(kind) for kind in kinds):
            parts = [pa.chunked_array([raw.texts(part)]) for part in parts]
            kinds = {pa.string()}
        kind = next(iter(kinds), pa.string())
        chunks = [c for part in parts for c in part.cast(kind).chunks] if len(kinds) < 2 else []
        columns.append(pa.chunked_array(chunks or parts[0].chunks, kind))
    return pa.table(columns, names=names)


# --- roles


def guess_events(sampled: Sampled, given: Mapping[str, str] | None = None) -> Sampled:
    """Roles of the columns of an event log.

    Args:
        said: role → column, by a person who knows.
    """
    given = dict(given or {})
    names = sampled.rows.column_names
    shapes = sampled.shapes
    for role, column in given.items():
        if column not in names:
            raise UsageError(
                f"--{role} names {column!r}; there are {names}{nearest(column, names)}"
            )
    found: dict[str, Guess] = {}
    nameless = "header" in sampled.doubts and bool(sampled.source.header)
    nameless = nameless and not any(parts_of(name)[:1] != ["event"] for name in names)

    def take(
        role: str, column: str | None, why: str, dtype: DType = DType.STRING, doubt: str = ""
    ) -> None:
        if column is not None and column not in found:
            found[column] = Guess(column, role, why, dtype=dtype, doubt=doubt)

    def free(test: str = "") -> list[str]:
        left = [
            n for n in names if n not in found and n not in given.values() and shapes[n].readable
        ]
        return [n for n in left if named_as(n, test) and not nameless] if test else left

    for role, column in given.items():
        dtype = _key_type(shapes[column]) if role in ("user", "item") else DType.STRING
        is_rating = role == "action" and shapes[column].number and not shapes[column].flag
        take("rating" if is_rating else role, column, "as you say", dtype)

    # 1. When: what can be read as a time, the better named the sooner.
    if "time" not in given:
        times = [n for n in free() if shapes[n].time and _may_be_time(n, shapes[n], nameless)]
        written = [n for n in times if named_as(n, "time") or not shapes[n].number]
        # In a nameless file the finest of several: ids that look like times come again and again.
        times = sorted(times, key=lambda n: -shapes[n].distinct) if nameless else times
        chosen = best_named(written or times, "time")
        doubt = ""
        if chosen is not None and written:
            doubt = _or(as_well_named(chosen, written, "time"))
        elif chosen is not None:
            doubt = f"its numbers may be times in {shapes[chosen].time_unit}"
        if chosen is not None:
            doubt = doubt or odd_times(shapes[chosen])
        take("time", chosen, "its values are times", DType.TIMESTAMP, doubt)
    sampled = _with_time(sampled, found)
    # 2. What happened: flags of 0 and 1, a rating, or a column of few words.
    for name in free():
        if shapes[name].flag and singular(name) in ACTION_WORDS and "action" not in given:
            doubt = f"{shapes[name].blank:.0%} of the rows are blank, and count as 0"
            doubt = doubt if shapes[name].blank else ""
            take("flag", name, "0 or 1, and named as an action", DType.INT8, doubt)
    if not any(g.role == "flag" for g in found.values()) and "action" not in given:
        _take_action(sampled, found, free, take, nameless)
    # 3. Who and what: by name, and in a nameless file by the order that all such files have.
    for role in ("user", "item"):
        keys = [n for n in free() if shapes[n].key and not shapes[n].flag and may_be_key(n)]
        named = [name for name in keys if named_as(name, role)]
        # One who comes once has no history: what is new in each row names the row.
        repeated = [n for n in keys if shapes[n].distinct < 0.9 * len(sampled.rows)]
        chosen = best_named(named, role) or (repeated[0] if nameless and repeated else None)
        if chosen is not None and role not in given:
            why = "by its name" if named else "in the place where such files have it"
            doubt = _or(as_well_named(chosen, named, role)) if named else "no name says so"
            take(role, chosen, why, _key_type(shapes[chosen]), doubt)
    # 4. What was asked together, and the source's name of an event.
    rows = len(sampled.rows)
    user = next((name for name, guess in found.items() if guess.role == "user"), None)
    ids = [
        name
        for name in free("request")
        if shapes[name].key and shapes[name].distinct < rows and user is not None
        # A request is one user's
        if _depends(sampled.rows, user, name)
    ]
    take("request", best_named(ids, "request"), "by its name; several rows share one")
    unique = [n for n in free("event") if shapes[n].key and shapes[n].distinct > 0.9 * rows > 1]
    take("event id", best_named(unique, "event"), "by its name; hardly any two rows share one")
    for name in names:
        if name not in found:
            group = _group(sampled, found, name) if shapes[name].readable else ""
            found[name] = _feature(sampled, name, group)
    return replace(sampled, guesses={name: found[name] for name in names})


def _take_action(sampled: Sampled, found: dict[str, Guess], free, take, nameless: bool) -> None:  # type: ignore[no-untyped-def]
    """A rating, a column of few words for actions, or one of codes that is named so."""
    shapes = sampled.shapes
    ratings = [
        n for n in free() if shapes[n].number and shapes[n].distinct <= 21 and shapes[n].high <= 10
    ]
    rated = [n for n in ratings if named_as(n, "rating")]
    if nameless and not rated:
        rated = [n for n in ratings if shapes[n].distinct > 2][:1]
    if rated:
        doubt = "" if named_as(rated[0], "rating") else "no name says so"
        take("rating", rated[0], "a small number for each event", DType.FLOAT32, doubt)
        return
    texts = [n for n in free() if shapes[n].text and shapes[n].distinct <= FEW]
    spoken = [n for n in texts if words_of_actions(sampled.rows[n])]
    if spoken:
        take("action", best_named(spoken, "action"), "its few values are actions")
        return
    coded = [n for n in free("action") if shapes[n].distinct <= FEW and shapes[n].distinct > 1]
    coded = [n for n in coded if "id" not in parts_of(n) and not shapes[n].time]
    if flags := [n for n in coded if shapes[n].flag and not shapes[n].number]:
        doubt = "it says true or false: name what happened where it is true"
        take("flag", flags[0], "true or false, by its name", DType.INT8, doubt)
        return
    take("action", best_named(coded, "action"), "by its name", doubt="say what its values mean")


def _may_be_time(name: str, shape: ColumnShape, nameless: bool) -> bool:
    """An id is no time, however likely its size."""
    if not shape.number or nameless:
        return True
    named = named_as(name, "time")
    if shape.time_format:  # 20250304
        return named
    if "id" in parts_of(name) and not named:
        return False
    return named or (not any(named_as(name, role) for role in ("user", "item", "request", "event")))


def _with_time(sampled: Sampled, found: dict[str, Guess]) -> Sampled:
    """The source with how its times are written, and a column that says each row's zone."""
    column = next((name for name, guess in found.items() if guess.role == "time"), None)
    if column is None:
        return sampled
    shape = sampled.shapes[column]
    doubts = dict(sampled.doubts)
    source = replace(sampled.source, time_unit=shape.time_unit, time_format=shape.time_format)
    if shape.or_format:
        doubts["time_format"] = f"or {shape.or_format}: day and month cannot be told apart"
    for name, other in sampled.shapes.items():
        if named_as(name, "zone") and other.text and name not in found:
            values = pc.unique(raw.texts(sampled.rows[name]).drop_null()).to_pylist()
            if values and all(raw.zone_of(value) for value in values):
                found[name] = Guess(name, "zone", "its values are zones")
                source = replace(source, zone_column=name)
    return replace(sampled, source=source, doubts=doubts)


def odd_times(shape: ColumnShape) -> str:
    """Return what may be wrong with times that are numbers; "" if nothing is seen."""
    if not shape.time_unit:
        return ""
    if shape.rounded:
        return "1.70407E+12 is how a spreadsheet shows a number: its last digits are lost"
    last = shape.high * TIME_UNITS[shape.time_unit]
    if last >= UNIX_TIMES:
        return ""
    return (
        f"as {shape.time_unit} since 1970 the last is of {micros_iso(int(last))[:10]}; ticks of .NET and seconds "
        "since 2001 look so: write them as times since 1970"
    )


def guess_profile(sampled: Sampled, kind: str, keys: pa.Array) -> Sampled:
    """Roles of the columns of a table of users or items: its key is what shares most values with the
    events' ids.
    """
    role = kind.removesuffix("s")
    shapes = {n: s for n, s in sampled.shapes.items() if s.readable}

    # 1. The key: what shares most values with the events' ids, and is named like an id.
    def shared(name: str) -> float:
        texts = texts_of(sampled.rows[name])
        known = pc.mean(pc.is_in(texts, keys).cast(pa.float64())).as_py() or 0.0
        named = 0.5 * named_as(name, role) + 0.25 * ("id" in parts_of(name))
        return float(known + named * may_be_key(name))

    candidates = [name for name in shapes if shapes[name].distinct == len(sampled.rows)]
    key = max(candidates or list(shapes), key=shared)
    if not candidates or shared(key) < 0.5:
        key = max(shapes, key=shared)
    if not shared(key):
        raise RawDataError(
            f"{sampled.source.path}: no column shares a value with the {role} ids of the events; is it another table?"
        )
    alike = [name for name in candidates if name != key and shared(name) == shared(key)]
    found = {
        key: Guess(
            key,
            role,
            "its values are the events' ids",
            dtype=_key_type(shapes[key]),
            doubt=_or(alike),
        )
    }
    # 2. Of several rows a key, a time may say since when each is known.
    rows = len(sampled.rows)
    distinct = shapes[key].distinct
    if distinct < rows:
        doubt = f"{rows:,} rows of {distinct:,} {kind}: of several the last of the file is taken"
        found[key] = replace(found[key], doubt=doubt)
        times = [n for n, shape in shapes.items() if shape.time and _may_be_time(n, shape, False)]
        if time := best_named([n for n in times if n != key], "time"):
            found[time] = Guess(time, "time", "since when a row is known", dtype=DType.TIMESTAMP)
            found[key] = replace(
                found[key], doubt=f"{rows:,} rows of {distinct:,} {kind}: each from its {time} on"
            )
            sampled = _with_time(sampled, {time: found[time]})
    # 3. All else is a feature.
    for name in sampled.shapes:
        if name not in found:
            found[name] = _feature(sampled, name, f"{role}_features")
    return replace(sampled, guesses={name: found[name] for name in sampled.shapes})


def _group(sampled: Sampled, found: dict[str, Guess], name: str) -> str:
    """Whose feature a column of an event log is: what it depends on alone."""
    of = {g.role: g.column for g in found.values()}
    if named_as(name, "position"):
        return "shown_features"
    if "item" in of and named_as(name, "title"):
        return "item_features"
    for role, group in (
        ("user", "user_features"),
        ("item", "item_features"),
        ("request", "context_features"),
    ):
        if role in of and _depends(sampled.rows, name, of[role]):
            return group
    return "event_features"


def _depends(rows: pa.Table, name: str, key: str) -> bool:
    """Return whether a key with repeated values decides a column."""
    keys = texts_of(rows[key])
    values = pc.fill_null(texts_of(rows[name]), "\x00")
    pairs = pa.table({"k": keys, "v": values}).group_by(["k", "v"]).aggregate([]).num_rows
    distinct = len(pc.unique(keys))
    return pairs <= 1.01 * distinct < 0.8 * len(rows)


def _feature(sampled: Sampled, name: str, group: str) -> Guess:
    """How a ranker should read a column."""
    shape = sampled.shapes[name]
    rows = sampled.rows
    if not shape.readable:
        return Guess(name, "left out", f"it holds {rows[name].type}, which no ranker reads")
    # 1. What holds for every kind: gaps, doubts, constants.
    doubt = sampled.doubts.get(f"column {name}", "")
    if shape.lost:
        doubt = f"{shape.lost:,} of {shape.rows:,} values are none such"
    absent = shape.blank > 0 or shape.lost > 0 or bool(doubt)
    if group == "event_features":
        doubt = doubt or _overlooked(name, rows[name])
    made = Guess(name, "feature", "", group=group, nullable=absent, doubt=doubt)
    if shape.distinct <= 1:
        named = singular(name) in ACTION_WORDS or bool(LABEL_WORDS & set(parts_of(name)))
        asked = (
            f"{shape.blank:.0%} of the rows say nothing: is it an action, written as 1 or nothing?"
        )
        doubt = asked if named and shape.distinct and shape.blank else ""
        return Guess(name, "left out", "it never changes", doubt=doubt)
    # 2. Lists.
    if shape.length:
        why = f"{shape.length} numbers in each"
        return replace(
            made,
            why=why,
            dtype=DType.FLOAT32_LIST,
            kind=Kind.VECTOR,
            length=shape.length,
            decimal=shape.decimal,
        )
    if shape.separator == " ":
        why = "it holds several ids; of items that were shown together write a row for each"
        return Guess(name, "left out", why)
    if shape.separator:
        why = f"several values, with {shape.separator!r} between them"
        return replace(
            made,
            why=why,
            dtype=DType.STRING_LIST,
            kind=Kind.BAG,
            length=shape.most,
            separator=shape.separator,
        )
    # 3. Times, flags and numbers.
    time_format = sampled.source.time_format
    if shape.time and not shape.number:
        if shape.time_format != time_format:
            return replace(made, why=f"times of another format, {shape.time_format or 'ISO 8601'}")
        return replace(made, why="its values are times", dtype=DType.TIMESTAMP, kind=Kind.AGE)
    if shape.flag:
        return replace(made, why="0 or 1", dtype=DType.INT8, kind=Kind.CATEGORY)
    if shape.number:
        names_things = bool({"id", "code", "key"} & set(parts_of(name)))
        if shape.whole and shape.spelt_id and (shape.distinct <= FEW or names_things):
            hashed = 1 << 14 if shape.distinct > MANY else None
            why = f"{shape.distinct:,} whole numbers" + " that name something" * names_things
            category = replace(made, why=why, dtype=DType.INT64, kind=Kind.CATEGORY)
            return replace(category, hashed=hashed)
        if shape.spelt_id or not shape.whole or not names_things:
            unsure = unsure_sign(texts_of(rows[name]))
            between = f"its {'comma' if unsure == ',' else 'point'} may stand " + (
                "before a fraction" if unsure != shape.decimal else "between thousands"
            )
            doubt = between if unsure else made.doubt
            if shape.rounded:
                doubt = "1.70407E+12 is how a spreadsheet shows a number: its last digits are lost"
            return replace(
                made,
                why="numbers",
                dtype=DType.FLOAT32,
                kind=Kind.NUMBER,
                decimal=shape.decimal if shape.signed else "",
                unit=shape.unit,
                doubt=doubt,
            )
    # 4. Text: for people, or a category.
    if not {"id", "code", "key"} & set(parts_of(name)) and (
        odd := unlike_numbers(texts_of(rows[name].drop_null()))
    ):
        made = replace(
            made, doubt=f"numbers that are written in several ways, such as {odd!r}, are text"
        )
    if named_as(name, "title") and shape.distinct > FEW:
        return replace(made, why="text for people, by its name")
    if shape.distinct <= max(FEW, len(rows) // 4):
        hashed = 1 << 14 if shape.distinct > MANY else None
        return replace(
            made, why=f"text, {shape.distinct:,} values", kind=Kind.CATEGORY, hashed=hashed
        )
    return replace(made, why="text, nearly all different: for people")


def texts_of(column: pa.Array | pa.ChunkedArray) -> pa.Array:
    """A column as text, lists as Python writes them."""
    if pa.types.is_nested(column.type):
        return pa.array([str(value) for value in column.to_pylist()], pa.string())
    return raw.texts(column)


def _overlooked(name: str, values: pa.ChunkedArray) -> str:
    """Return the role that a feature's name suggests and that it was not given; "" if none."""
    if named_as(name, "rating"):
        return (
            "its name says rating: if it is one, say from where on a row is liked (Source.at_least)"
        )
    if LABEL_WORDS & set(parts_of(name)):
        return "its name says label: if it is one, say what happened (Source.flags, Source.action)"
    texts = texts_of(values).drop_null()
    clocks = pc.mean(pc.match_substring_regex(texts, CLOCK).cast(pa.float64())).as_py() or 0.0
    if clocks > 0.9:
        return "its values are times of day: a time has day and hour in one column"
    return ""


def _or(others: Sequence[str]) -> str:
    return f"it may be {' or '.join(map(repr, others))}" if others else ""


def _key_type(shape: ColumnShape) -> DType:
    """Ids that are spelt as their numbers are numbers; 007 and 7 stay two texts."""
    return DType.INT64 if shape.spelt_id else DType.STRING


def words_of_actions(column: pa.ChunkedArray) -> bool:
    """Return whether most values of a column are words for actions."""
    values = [str(value) for value in pc.unique(texts_of(column)).to_pylist() if value]
    hits = [means(value, ACTION_WORDS) is not None or takes_back(value) for value in values]
    return bool(values) and sum(hits) >= len(hits) / 2


# --- names


@dataclass(frozen=True)
class Log:
    """All files of a log, with names of our own for what is declared."""

    events: Sampled
    users: Sampled | None = None
    items: Sampled | None = None

    @property
    def guesses(self) -> list[Guess]:
        files = (self.events, self.users, self.items)
        return [guess for sampled in files if sampled for guess in sampled.guesses.values()]

    @property
    def missing(self) -> list[str]:
        """Roles that no column was taken for, and without which there is no event."""
        return [role for role in ("user", "item", "time") if self.events.column(role) is None]

    def doubts(self) -> Iterator[str]:
        """Yield every doubt about the files, a line for each."""
        for sampled in (self.events, self.users, self.items):
            if sampled:
                yield from (f"{name}: {why}" for name, why in sampled.doubts.items())


def log_of(
    data: str,
    events: str,
    users: str | None = None,
    items: str | None = None,
    given: Mapping[str, str] | None = None,
) -> Log:
    """Guess the roles of every column of a log's files.

    Args:
        said: role ("user", "item", "time", "action") → column of the events, by who knows better.

    Raises:
        RawDataError: a file is missing or no table.
        UsageError: a column that is said is not there.
    """
    log = guess_events(sample_of(events, data), given)
    profiles: dict[str, Sampled | None] = {"users": None, "items": None}
    for kind, path in (("users", users), ("items", items)):
        if path is not None:
            key = log.column(kind.removesuffix("s"))
            keys = pc.unique(texts_of(log.rows[key])) if key else pa.array([], pa.string())
            profiles[kind] = guess_profile(sample_of(path, data, kind), kind, keys)
    log = _without_doubles(log, profiles)
    used: set[str] = set(RESERVED)
    named = [sampled and _with_names(sampled, used) for sampled in profiles.values()]
    return Log(_with_names(log, used), *named)


def _without_doubles(log: Sampled, profiles: dict[str, Sampled | None]) -> Sampled:
    """Leave out event columns that a table of users or items describes."""
    described = {kind for kind, sampled in profiles.items() if sampled is not None}
    guesses = {}
    for name, guess in log.guesses.items():
        kind = guess.group.replace("_features", "s")
        if kind in described:
            guess = Guess(name, "left out", f"the table of {kind} says what is theirs")
        guesses[name] = guess
    return replace(log, guesses=guesses)


def _with_names(sampled: Sampled, used: set[str]) -> Sampled:
    """Names of our own for features: words with underscores, each once. `used` takes them in."""
    guesses = {}
    for place, (name, guess) in enumerate(sampled.guesses.items(), 1):
        if guess.role not in ("feature", "rating"):
            guesses[name] = guess
            continue
        words = re.sub(r"([a-z0-9])([A-Z])", r"\1_\2", name)
        base = re.sub(r"[^A-Za-z0-9]+", "_", words).strip("_").lower()
        base = base if base[:1].isalpha() else f"column_{base or place}"
        owner = guess.group.removesuffix("_features") or "event"
        tried = (f"{owner}_{base}", *(f"{owner}_{base}_{n}" for n in range(2, 1000)))
        ours = next(n for n in (base, *tried) if n not in used)
        used.add(ours)
        guesses[name] = replace(guess, ours=ours)
    return replace(sampled, guesses=guesses)


def periods(events: Sampled, data: str) -> tuple[str, str]:
    """From when on validation and test run: by where the events are, so that the last tenth of them
    tests and the tenth before validates, however far off a few others lie.
    """
    column = events.column("time")
    assert column is not None
    # 1. Read the times of the whole log; where they are too many, every second is dropped.
    written = raw.Format.of(events.source)
    seen: list[np.ndarray] = []
    for unit in sources.units_of(events.source, data, "events", [column]):
        columns = [column, *([written.zone_column] if written.zone_column else [])]
        for block in sources.blocks_of(events.source, unit, columns):
            found = raw.times_of(block.rows, column, written)
            seen.append(micros(found.drop_null()))
            if sum(map(len, seen)) > 2 * SAMPLE_TIMES:
                seen = [np.concatenate(seen)[::2]]
    # 2. Refuse a log that cannot be cut by time.
    at = np.sort(np.concatenate(seen)) if seen else np.array([], np.int64)
    if not len(at):
        raise RawDataError(
            f"{events.source.path}: no value of column {column!r} can be read as a time"
        )
    if at[0] == at[-1]:
        held = (
            "only one row has a" if len(at) == 1 else f"all {len(at):,} rows have one and the same"
        )
        raise RawDataError(
            f"{events.source.path}: {held} time in column {column!r}; training, validation and test need rows of "
            "different times"
        )
    # 3. Cut at eight and at nine tenths of the events, on whole minutes.
    minute = 60_000_000
    cuts = [int(at[len(at) * tenths // 10]) // minute * minute for tenths in (8, 9)]
    # All at a few moments: by the time itself
    if cuts[0] == cuts[1] or not at[0] < cuts[0]:
        low = int(at[0])
        high = int(at[-1])
        cuts = [(low + (high - low) * tenths // 10) // minute * minute for tenths in (8, 9)]
    first, second = (micros_iso(cut) for cut in cuts)
    return first, second
