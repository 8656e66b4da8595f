"""A stranger's files → a declaration to correct: what each column was taken for, and why.

What a column is called and what is in it decide together. Nothing is kept of the files but the text
of a dataset module; `python -m feature_repo check` says what comes of it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from feature_repo import raw, sources
from feature_repo.arrow import micros, micros_iso
from feature_repo.contract import RESERVED
from feature_repo.errors import RawDataError
from feature_repo.schema import DType, Kind, Source

SAMPLE_ROWS = 50_000
DELIMITERS = ("::", "\t", ";", "|", ",")
ENCODINGS = ("utf-8", "cp1252", "latin-1")
FEW = 20  # distinct whole numbers that are read as categories
MANY = 10_000  # distinct texts from where on a category is hashed
WORDS = {
    "user": "user customer member household visitor account client uid person buyer reader viewer",
    "item": "item product sku article movie stock asin song track listing content ad video book good",
    "time": "time timestamp date datetime ts at when created day",
    "request": "request impression session basket order invoice query search visit",
    "event": "event transaction row log uuid",
    "action": "action event type behaviour behavior activity interaction",
    "rating": "rating stars score grade",
    "position": "position rank slot place",
    "title": "title name description",
}
KNOWN_WORDS = frozenset(" ".join(WORDS.values()).split())
SHOWN_WORDS = ("view", "impression", "shown", "show", "exposure", "display", "see")
ACTION_WORDS = (
    *SHOWN_WORDS, "click", "cart", "add_to_cart", "addtocart", "purchase", "buy", "bought", "order",
    "like", "share", "save", "favourite", "favorite", "play", "watch", "read", "open", "rate",
    "return", "remove", "remove_from_cart", "transaction", "checkout", "download", "follow",
)  # fmt: skip


@dataclass(frozen=True)
class Guess:
    """What a column was taken for.

    Args:
        role: "user", "item", "time", "request", "event id", "action", "rating", "flag", "feature"
            or "left out".
        group: of a feature: the field of the declaration.
    """

    column: str
    role: str
    why: str
    ours: str = ""  # its name in the declaration
    dtype: DType = DType.STRING
    kind: Kind | None = None
    group: str = ""
    nullable: bool = False
    length: int | None = None
    hashed: int | None = None
    separator: str = ""

    @property
    def told(self) -> str:
        """What it was taken for, in a line."""
        if self.role != "feature":
            return (
                f"{self.role}, for {self.why}"
                if self.role == "left out"
                else f"{self.role}: {self.why}"
            )
        kind = self.kind.value if self.kind else "not read by rankers"
        return f"{self.group}, {kind}: {self.why}"


@dataclass(frozen=True)
class Looked:
    """A file as it was found: how it is read, some of its rows as text, and what each column is."""

    source: Source
    rows: pa.Table
    guesses: dict[str, Guess] = field(default_factory=dict)

    def column(self, role: str) -> str | None:
        """The column that has a role."""
        return next((g.column for g in self.guesses.values() if g.role == role), None)


def look(path: str, data: str, kind: str = "events") -> Looked:
    """How a file is written, and its first rows.

    Args:
        path: of a file, folder or glob, below `data`.
        kind: "events", "users" or "items"; columns of a file without a header are called after it.

    Raises:
        RawDataError: nothing is there, or it is no table.
    """
    source = Source(path)
    file = sources.files_of(source, data)[0]
    if sources.format_of(replace(source, format=_format(file)), file) == "csv":
        source = _csv_source(path, file, kind.removesuffix("s"))
    names = sources.columns_in(source, file)
    units = sources.units_of(source, data, "events", names)
    if not units:
        raise RawDataError(f"{path} has no row")
    rows = next(iter(sources.blocks_of(source, units[0], names))).rows
    if sources.format_of(source, file) == "csv":
        source = replace(source, decimal=_decimal(rows))
    return Looked(source, rows.slice(0, SAMPLE_ROWS))


def _format(file: str) -> Literal["", "csv", "json", "parquet"]:
    """By the file's name; a file whose name says nothing is taken for text."""
    try:
        sources.format_of(Source(""), file)
    except RawDataError:
        return "csv"
    return ""


def _csv_source(path: str, file: str, prefix: str) -> Source:
    """Delimiter, encoding and header of a text file, from its first lines."""
    with sources.open_stream(file) as stream:
        data: bytes = stream.read(1 << 18).removeprefix(sources.BOM)
    encoding = next(code for code in ENCODINGS if _decodes(data, code))
    lines = [line for line in data.decode(encoding, "replace").splitlines()[:200] if line.strip()]
    lines = lines[:-1] if len(lines) > 2 else lines  # the last may be cut
    delimiter = max(DELIMITERS, key=lambda sign: _agreement(lines, sign))
    if _agreement(lines, delimiter) == 0:
        delimiter = ","
    first, *others = (sources.fields_of(line, delimiter) for line in lines)
    known = ENCODINGS[: ENCODINGS.index(encoding) + 1]
    source = Source(path, format="csv", delimiter=delimiter, encodings=known)
    if _is_header(first, others):
        return source
    return replace(source, header=tuple(f"{prefix}_{n}" for n in range(1, len(first) + 1)))


def _decimal(rows: pa.Table) -> Literal[".", ","]:
    """A comma, where some column is all numbers with it and not without."""
    for name in rows.column_names:
        values = rows[name].combine_chunks()
        values = values.filter(pa.array(~raw.is_blank(values)))
        commas = len(values) and raw.numbers(values, ",").null_count == 0
        if commas and raw.numbers(values).null_count:
            return ","
    return "."


def _decodes(data: bytes, encoding: str) -> bool:
    try:
        data[: data.rfind(b"\n") + 1].decode(encoding)
    except UnicodeDecodeError:
        return False
    return True


def _agreement(lines: list[str], delimiter: str) -> float:
    """How well lines agree on how many fields they have: share of the commonest number above one."""
    counts = [len(sources.fields_of(line, delimiter)) for line in lines]
    numbers, times = np.unique([c for c in counts if c > 1], return_counts=True)
    if not len(numbers):
        return 0.0
    share = times.max() / len(lines)
    # Among delimiters on which all agree, the one that cuts finer.
    return float(share + min(numbers[times.argmax()], 50) / 1000) if share > 0.8 else 0.0


def _is_header(first: list[str], others: list[list[str]]) -> bool:
    """Whether a line names columns: words all, once each, where a line below has a number or time."""
    if len(set(first)) < len(first) or any(not re.search("[A-Za-z]", name) for name in first):
        return False
    below = others[:50]
    looks = [any(_is_number(row[at]) for row in below if at < len(row)) for at in range(len(first))]
    return any(looks) or not below


def _is_number(text: str) -> bool:
    return bool(re.fullmatch(r"\s*[+-]?[0-9][0-9.,:T /-]*\s*", text))


# --- roles


def guess_events(looked: Looked) -> Looked:
    """Roles of the columns of an event log."""
    names = looked.rows.column_names
    found: dict[str, Guess] = {}
    shapes = {name: _shape(looked.rows[name], looked.source.decimal) for name in names}
    nameless = bool(looked.source.header)

    def take(role: str, column: str | None, why: str, dtype: DType = DType.STRING) -> None:
        if column is not None:
            found[column] = Guess(column, role, why, dtype=dtype)

    def free(test: str = "") -> list[str]:
        left = [name for name in names if name not in found]
        return [n for n in left if named_as(n, test)] if test else left

    # 1. When: what can be read as a time, the better named the sooner.
    times = [name for name in free() if shapes[name].time]
    take("time", _best(times, "time"), "its values are times", DType.TIMESTAMP)
    if looked_time := next((n for n, g in found.items() if g.role == "time"), None):
        unit = shapes[looked_time].unit
        looked = replace(looked, source=replace(looked.source, time_unit=unit))
    # 2. What happened: flags of 0 and 1, a rating, or a column of few words.
    for name in free():
        if shapes[name].flag and singular(name) in ACTION_WORDS:
            take("flag", name, "0 or 1, and named as an action", DType.INT8)
    ratings = [
        n for n in free() if shapes[n].number and shapes[n].distinct <= 11 and shapes[n].high <= 10
    ]
    rated = [n for n in ratings if named_as(n, "rating")]
    if nameless and not rated:
        rated = [n for n in ratings if shapes[n].distinct > 2][:1]
    if not any(g.role == "flag" for g in found.values()):
        take("rating", rated[0] if rated else None, "a small number for each event", DType.FLOAT32)
        if not rated:
            said = [n for n in free() if shapes[n].text and shapes[n].distinct <= FEW]
            spoken = [n for n in said if _words_of(looked.rows[n])]
            take("action", _best(spoken, "action"), "its few values are actions")
    # 3. Who and what: by name, and in a nameless file by the order that all such files have.
    for role in ("user", "item"):
        keys = [name for name in free() if shapes[name].key]
        named = [name for name in keys if named_as(name, role)]
        chosen = _best(named, role) or (keys[0] if nameless and keys else None)
        if chosen is not None:
            why = "by its name" if named else "in the place where such files have it"
            take(role, chosen, why, _key_type(looked.rows[chosen], shapes[chosen]))
    # 4. What was asked together, and the source's name of an event.
    rows = len(looked.rows)
    user = next((name for name, guess in found.items() if guess.role == "user"), None)
    ids = [
        name
        for name in free("request")
        if shapes[name].key and shapes[name].distinct < rows and user is not None
        if _depends(looked.rows, user, name)  # a request is one user's
    ]
    take("request", _best(ids, "request"), "by its name; several rows share one")
    unique = [n for n in free("event") if shapes[n].key and shapes[n].distinct > 0.9 * rows > 1]
    take("event id", _best(unique, "event"), "by its name; hardly any two rows share one")
    for name in free():
        found[name] = _feature(looked.rows, name, shapes[name], _group(looked, found, name))
    return replace(looked, guesses={name: found[name] for name in names})


def guess_profile(looked: Looked, kind: str, keys: pa.Array) -> Looked:
    """Roles of the columns of a table of users or items: its key is what shares most values with the
    events' ids.
    """
    role = kind.removesuffix("s")
    decimal = looked.source.decimal
    shapes = {name: _shape(looked.rows[name], decimal) for name in looked.rows.column_names}

    def shared(name: str) -> float:
        texts = texts_of(looked.rows[name])
        known = pc.mean(pc.is_in(texts, keys).cast(pa.float64())).as_py() or 0.0
        return float(known + 0.5 * named_as(name, role))

    candidates = [name for name in shapes if shapes[name].distinct == len(looked.rows)]
    key = max(candidates or list(shapes), key=shared)
    if not shared(key):
        raise RawDataError(
            f"{looked.source.path}: no column shares a value with the {role} ids of the events; is it another table?"
        )
    dtype = _key_type(looked.rows[key], shapes[key])
    found = {key: Guess(key, role, "its values are the events' ids", dtype=dtype)}
    for name, shape in shapes.items():
        if name != key:
            found[name] = _feature(looked.rows, name, shape, f"{role}_features")
    return replace(looked, guesses={name: found[name] for name in shapes})


def _group(looked: Looked, found: dict[str, Guess], name: str) -> str:
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
        if role in of and _depends(looked.rows, name, of[role]):
            return group
    return "event_features"


def _depends(rows: pa.Table, name: str, key: str) -> bool:
    """Whether a key, of which several rows share values, decides a column."""
    keys, values = texts_of(rows[key]), pc.fill_null(texts_of(rows[name]), "\x00")
    pairs = pa.table({"k": keys, "v": values}).group_by(["k", "v"]).aggregate([]).num_rows
    distinct = len(pc.unique(keys))
    return pairs <= 1.01 * distinct < 0.8 * len(rows)


def _feature(rows: pa.Table, name: str, shape: _Shape, group: str) -> Guess:
    """How a ranker should read a column."""
    made = Guess(name, "feature", "", group=group, nullable=shape.blank > 0)
    if shape.distinct <= 1:
        return Guess(name, "left out", "it never changes")
    if shape.length:
        why = f"{shape.length} numbers in each"
        return replace(
            made,
            why=why,
            dtype=DType.FLOAT32_LIST,
            kind=Kind.VECTOR,
            length=shape.length,
        )
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
    if shape.time and not shape.number:
        return replace(made, why="its values are times", dtype=DType.TIMESTAMP, kind=Kind.AGE)
    if shape.flag:
        return replace(made, why="0 or 1", dtype=DType.INT8, kind=Kind.CATEGORY)
    if shape.number:
        names_things = bool({"id", "code", "key"} & set(_parts(name)))
        if shape.whole and (shape.distinct <= FEW or names_things):
            hashed = 1 << 14 if shape.distinct > MANY else None
            why = f"{shape.distinct:,} whole numbers" + " that name something" * names_things
            category = replace(made, why=why, dtype=DType.INT64, kind=Kind.CATEGORY)
            return replace(category, hashed=hashed)
        return replace(made, why="numbers", dtype=DType.FLOAT32, kind=Kind.NUMBER)
    if named_as(name, "title") and shape.distinct > FEW:
        return replace(made, why="text for people, by its name")
    if shape.distinct <= max(FEW, len(rows) // 4):
        hashed = 1 << 14 if shape.distinct > MANY else None
        return replace(
            made, why=f"text, {shape.distinct:,} values", kind=Kind.CATEGORY, hashed=hashed
        )
    return replace(made, why="text, nearly all different: for people")


# --- shapes of columns


@dataclass(frozen=True)
class _Shape:
    """What the values of a column are like."""

    distinct: int
    blank: float
    number: bool = False
    whole: bool = False
    high: float = 0.0
    flag: bool = False
    time: bool = False
    unit: str | None = None
    separator: str = ""
    most: int = 0
    length: int = 0
    leading_zero: bool = False

    @property
    def text(self) -> bool:
        """Whether it is neither number, nor list, nor time."""
        return not (self.number or self.separator or self.length or self.time)

    @property
    def key(self) -> bool:
        """Whether it may name something."""
        is_list = bool(self.separator or self.length)
        return not is_list and not (self.number and not self.whole) and self.distinct > 1


def _shape(column: pa.ChunkedArray, decimal: str) -> _Shape:
    whole = column.combine_chunks()
    blank = raw.is_blank(whole)
    values = whole.filter(pa.array(~blank))
    share = float(blank.mean()) if len(blank) else 0.0
    if pa.types.is_list(values.type) or pa.types.is_fixed_size_list(values.type):
        return _list_shape(values, share)
    texts = texts_of(values)
    distinct = len(pc.unique(texts))
    if not len(values):
        return _Shape(0, share)
    made = _Shape(distinct, share)
    if pa.types.is_timestamp(values.type) or pa.types.is_date(values.type):
        return replace(made, time=True)
    numbers = raw.numbers(values, decimal)
    if numbers.null_count == 0:
        floats = numbers.to_numpy()
        wholes = raw.whole_numbers(values)
        is_whole = wholes.null_count == 0
        unit = raw.likely_unit(wholes.to_numpy()) if is_whole else None
        low, high = float(floats.min()), float(floats.max())
        flag = is_whole and distinct == 2 and low == 0 and high == 1
        zero = bool(pc.any(pc.match_substring_regex(texts, "^0[0-9]")).as_py())
        return replace(
            made, number=True, whole=is_whole, high=high, flag=flag, time=unit is not None,
            unit=unit, leading_zero=zero,
        )  # fmt: skip
    if distinct == 2 and raw.truths(texts).null_count == 0:
        return replace(made, flag=True)
    if raw.times(values).null_count <= 0.01 * len(values):
        return replace(made, time=True)
    return _text_list_shape(texts, made, decimal)


def _text_list_shape(texts: pa.Array, made: _Shape, decimal: str) -> _Shape:
    """Lists that are written as text: of numbers, or of few words with a sign between them."""
    vectors = raw.number_lists(texts, decimal)
    lengths = pc.fill_null(pc.list_value_length(vectors), 0).to_numpy()
    if lengths.min() == lengths.max() >= 4:
        return replace(made, length=int(lengths[0]))
    for separator in ("|", ";", ","):
        parts = pc.split_pattern(pc.utf8_trim(texts, "[] "), separator)
        lengths = pc.list_value_length(parts).to_numpy()
        distinct = len(pc.unique(pc.utf8_trim_whitespace(pc.list_flatten(parts))))
        if (lengths > 1).mean() > 0.2 and distinct <= max(FEW, made.distinct // 2):
            return replace(made, separator=separator, most=_most(lengths))
    return made


def _list_shape(values: pa.Array, blank: float) -> _Shape:
    lengths = pc.list_value_length(values).to_numpy(zero_copy_only=False)
    numeric = pa.types.is_floating(pc.list_flatten(values).type)
    if numeric and len(lengths) and lengths.min() == lengths.max():
        return _Shape(len(values), blank, length=int(lengths[0]))
    return _Shape(len(values), blank, separator="|", most=_most(lengths))


def _most(lengths: np.ndarray) -> int:
    """Values that cover nearly all bags."""
    return int(np.clip(np.quantile(lengths, 0.99), 1, 16)) if len(lengths) else 1


def texts_of(column: pa.Array | pa.ChunkedArray) -> pa.Array:
    """A column as text, lists as Python writes them."""
    kind = column.type
    if pa.types.is_list(kind) or pa.types.is_fixed_size_list(kind):
        return pa.array([str(value) for value in column.to_pylist()])
    return raw.texts(column)


def _key_type(column: pa.ChunkedArray, shape: _Shape) -> DType:
    """Whole numbers keep their spelling unless zeros stand before them."""
    return DType.INT64 if shape.whole and not shape.leading_zero else DType.STRING


def _parts(name: str) -> list[str]:
    spaced = re.sub(r"([a-z0-9])([A-Z])", r"\1 \2", name)
    found = []
    for part in re.split(r"[^A-Za-z]+", spaced):
        word = part.lower()
        if word.removesuffix("id") in KNOWN_WORDS:  # itemid is an item's id
            found += [word.removesuffix("id"), "id"] if word.endswith("id") else [word]
        elif word:
            found.append(word)
    return found


def named_as(name: str, role: str) -> bool:
    """Whether a word of a column's name is one of those for a role."""
    words = WORDS.get(role, "").split()
    return any(part.rstrip("s") in words or part in words for part in _parts(name))


def _best(names: Sequence[str], role: str) -> str | None:
    """The best named of some columns: those with the role's words first, of these the ids."""
    if not names:
        return None
    words = WORDS[role].split()

    def rank(name: str) -> tuple[bool, int, bool]:
        parts = _parts(name)
        place = min((words.index(p) for p in parts if p in words), default=len(words))
        return not named_as(name, role), place, "id" not in parts

    return min(names, key=rank)


def _words_of(column: pa.ChunkedArray) -> bool:
    """Whether most values of a column are words for actions."""
    values = [str(value).lower() for value in pc.unique(texts_of(column)).to_pylist() if value]
    hits = [any(word in value for word in ACTION_WORDS) for value in values]
    return bool(values) and sum(hits) >= len(hits) / 2


def singular(name: str) -> str:
    """Clicked → click, is_purchased → purchase, n_clicks → click."""
    text = re.sub(r"^(is|has|n|num|was)_", "", "_".join(_parts(name)))
    for end in ("ed", "d", "s"):
        if text.removesuffix(end) in ACTION_WORDS:
            return text.removesuffix(end)
    return text


# --- names


@dataclass(frozen=True)
class Log:
    """All files of a log, with names of our own for what is declared."""

    events: Looked
    users: Looked | None = None
    items: Looked | None = None

    @property
    def guesses(self) -> list[Guess]:
        """Every column of every file."""
        files = (self.events, self.users, self.items)
        return [guess for looked in files if looked for guess in looked.guesses.values()]


def log_of(data: str, events: str, users: str | None = None, items: str | None = None) -> Log:
    """What the files of a log were taken for.

    Raises:
        RawDataError: a file is missing or no table, or no column was taken for user, item or time.
    """
    log = guess_events(look(events, data))
    missing = [role for role in ("user", "item", "time") if log.column(role) is None]
    if missing:
        raise RawDataError(
            f"{events}: no column looks like {' or '.join(missing)}; there are {log.rows.column_names}. Write the "
            "declaration by hand, from feature_repo/datasets/complete_journey.py"
        )
    profiles: dict[str, Looked | None] = {"users": None, "items": None}
    for kind, path in (("users", users), ("items", items)):
        if path is not None:
            key = log.column(kind.removesuffix("s"))
            keys = pc.unique(texts_of(log.rows[key]))
            profiles[kind] = guess_profile(look(path, data, kind), kind, keys)
    log = _without_doubles(log, profiles)
    used: set[str] = set(RESERVED)
    named = [looked and _with_names(looked, used) for looked in profiles.values()]
    return Log(_with_names(log, used), *named)


def _without_doubles(log: Looked, profiles: dict[str, Looked | None]) -> Looked:
    """What a table of users or items says is not asked of the events."""
    told = {kind for kind, looked in profiles.items() if looked is not None}
    guesses = {}
    for name, guess in log.guesses.items():
        kind = guess.group.replace("_features", "s")
        if kind in told:
            guess = Guess(name, "left out", f"the table of {kind} says what is theirs")
        guesses[name] = guess
    return replace(log, guesses=guesses)


def _with_names(looked: Looked, used: set[str]) -> Looked:
    """Names of our own for features: words with underscores, each once. `used` takes them in."""
    guesses = {}
    for name, guess in looked.guesses.items():
        if guess.role not in ("feature", "rating"):
            guesses[name] = guess
            continue
        words = re.sub(r"([a-z0-9])([A-Z])", r"\1_\2", name)
        base = re.sub(r"[^A-Za-z0-9]+", "_", words).strip("_").lower()
        base = base if base[:1].isalpha() else f"column_{base}"
        owner = guess.group.removesuffix("_features") or "event"
        ours = base if base not in used else f"{owner}_{base}"
        used.add(ours)
        guesses[name] = replace(guess, ours=ours)
    return replace(looked, guesses=guesses)


def periods(events: Looked, data: str) -> tuple[str, str]:
    """From when on validation and test run: the last tenth of the time, and the tenth before."""
    column = events.column("time")
    assert column is not None
    low = high = None
    for unit in sources.units_of(events.source, data, "events", [column]):
        for block in sources.blocks_of(events.source, unit, [column]):
            found = raw.times(block.rows[column], unit=events.source.time_unit)
            at = micros(found.drop_null())
            if len(at):
                low = int(at.min()) if low is None else min(low, int(at.min()))
                high = int(at.max()) if high is None else max(high, int(at.max()))
    if low is None or high is None or low == high:
        raise RawDataError(f"column {column!r} holds no two different times")
    minute = 60_000_000
    cuts = ((low + (high - low) * tenths // 10) // minute * minute for tenths in (8, 9))
    first, second = (micros_iso(cut) for cut in cuts)
    return first, second
