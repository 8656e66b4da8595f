"""The contract: every table, column, entity and their fingerprint. Standard library only.

Feast fields, Arrow schemas, embedding tables and request decoding are all derived from here, each
where its library lives. A dataset adds its own columns by declaring a `DatasetSpec`; nothing else
in the project names a column twice.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import datetime
from enum import StrEnum
from functools import cached_property
from typing import Any
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from feature_repo.errors import DeclarationError, nearest


class DType(StrEnum):
    """Logical column types; `feature_repo.arrow` maps them to Arrow, `feature_definitions` to
    Feast.
    """

    INT8 = "int8"
    INT32 = "int32"
    INT64 = "int64"
    FLOAT32 = "float32"
    STRING = "string"
    STRING_LIST = "string_list"
    BYTES = "bytes"
    TIMESTAMP = "timestamp"  # microseconds, UTC


EVENT_TIMESTAMP = "event_timestamp"
CREATED_TIMESTAMP = "created_timestamp"
NUM_HISTORY_ONLINE = 512  # events of a user kept online unless a dataset declares another number
STAT_WINDOWS_DAYS = (7, 14, 28)
# A number without limits of its own stays within this. Sums and means of so large values are still
# exact in what they are computed with (`feature_repo/sums.py`), and float32 holds them.
LARGEST_NUMBER = 1e12
MAX_ID_BYTES = (
    1024  # of a text id, in UTF-8; longer ones are dead letters, and the server refuses them alike
)
MAX_TEXT_BYTES = 1 << 15  # of any other text
TIME_UNITS = {
    "seconds": 1_000_000.0,
    "milliseconds": 1_000.0,
    "microseconds": 1.0,
    "nanoseconds": 1e-3,
}  # in microseconds
KEY_TYPES = (DType.INT64, DType.STRING)
WHOLE_TYPES = (DType.INT8, DType.INT32, DType.INT64)
NUMBER_TYPES = (*WHOLE_TYPES, DType.FLOAT32)


@dataclass(frozen=True)
class Column:
    """One column: its type, meaning and limits. Limits become expectations; `None` means
    unlimited.
    """

    name: str
    dtype: DType
    doc: str
    unit: str = ""
    nullable: bool = False
    minimum: float | None = None
    maximum: float | None = None
    values: tuple[str | int, ...] | None = None
    pattern: str | None = None
    max_length: int | None = None
    is_key: bool = False

    @property
    def bounds(self) -> tuple[float | None, float | None]:
        """Smallest and largest number allowed: as declared, and for a float at most
        `LARGEST_NUMBER` in size.
        """
        if self.dtype is not DType.FLOAT32:
            return self.minimum, self.maximum
        low = -LARGEST_NUMBER if self.minimum is None else self.minimum
        return low, LARGEST_NUMBER if self.maximum is None else self.maximum


@dataclass(frozen=True)
class Entity:
    """What a row is about, and the join key that names it."""

    name: str
    join_key: str
    dtype: DType
    doc: str

    @property
    def column(self) -> Column:
        """The join key as a column."""
        return Column(self.join_key, self.dtype, self.doc, is_key=True)


@dataclass(frozen=True)
class Table:
    """A declared table. `job` names the Beam job that writes it; `view` says whether Feast serves
    it.
    """

    name: str
    doc: str
    columns: tuple[Column, ...]
    entity: Entity | None = None
    job: str = ""
    view: bool = False
    unique: tuple[str, ...] = ()
    version: Entity | None = None  # a second key: rows of several versions stand side by side

    def __post_init__(self) -> None:
        names = [column.name for column in self.all_columns]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise DeclarationError(
                f"table {self.name!r}: column names must differ, these appear twice: {twice}"
            )

    @property
    def all_columns(self) -> tuple[Column, ...]:
        """Entity keys first, then features, then the two timestamps of a view."""
        key = tuple(entity.column for entity in self.entities)
        return key + self.columns + (TIMESTAMPS if self.view else ())

    @property
    def entities(self) -> tuple[Entity, ...]:
        """What a row is about."""
        return tuple(entity for entity in (self.entity, self.version) if entity)

    @property
    def join_keys(self) -> tuple[str, ...]:
        """Names of the key columns."""
        return tuple(entity.join_key for entity in self.entities)

    def column(self, name: str) -> Column:
        """The column of that name.

        Raises:
            KeyError: no such column; the message lists those that exist.
        """
        for column in self.all_columns:
            if column.name == name:
                return column
        raise KeyError(
            f"table {self.name!r} has no column {name!r}; it has {[c.name for c in self.all_columns]}"
        )


TIMESTAMPS = (
    Column(
        EVENT_TIMESTAMP,
        DType.TIMESTAMP,
        "when the row became knowable: just after the events it counts",
    ),
    Column(
        CREATED_TIMESTAMP,
        DType.TIMESTAMP,
        "when the row was first available; joins never look past it",
    ),
)


@dataclass(frozen=True)
class Requests:
    """How a dataset's examples are drawn: periods, and negatives for each request."""

    label: str
    label_doc: str
    validation_from: str  # ISO time, UTC
    test_from: str
    train_negatives_per_positive: int
    eval_negatives: int


@dataclass(frozen=True)
class DatasetSpec:
    """What one dataset adds to the contract. The module that declares it also turns raw rows into
    these columns.
    """

    name: str
    title: str
    user_id: DType
    item_id: DType
    actions: tuple[str, ...]  # the first is the one that labels and counts are about
    event_features: tuple[Column, ...]
    user_features: tuple[Column, ...]
    item_features: tuple[Column, ...]
    item_title: str  # the item feature that a person reads
    stat_value: str  # the event feature whose mean `item_stats` and `user_stats` keep
    requests: Requests
    raw: Table
    max_bad_fraction: float
    ranking_user_features: tuple[str, ...] = ()  # those a ranker reads; the rest is for people
    ranking_item_features: tuple[str, ...] = ()
    event_identity: tuple[
        str, ...
    ] = ()  # columns of `events` that say "the same event"; without any, none is repeated
    num_history_online: int = (
        NUM_HISTORY_ONLINE  # a ranker that reads more events cannot be exported
    )
    raw_zone: str = "UTC"  # of raw times that carry none
    raw_time_unit: str | None = (
        None  # of raw times that are whole numbers, such as "seconds"; none: they are refused
    )
    items_repeat: bool = (
        True  # whether an item that a user has acted on is worth ranking for them again
    )


@dataclass(frozen=True)
class Contract:
    """All tables of one dataset, and the fingerprint that travels in every bundle and stored
    history.
    """

    spec: DatasetSpec
    user: Entity
    item: Entity
    tables: tuple[Table, ...] = field(repr=False)

    def table(self, name: str) -> Table:
        """The table of that name.

        Raises:
            KeyError: no such table; the message lists those that exist.
        """
        for table in self.tables:
            if table.name == name:
                return table
        raise KeyError(f"no table {name!r} in the contract; it has {[t.name for t in self.tables]}")

    @property
    def views(self) -> tuple[Table, ...]:
        """Tables that Feast serves."""
        return tuple(table for table in self.tables if table.view)

    @property
    def history_columns(self) -> tuple[Column, ...]:
        """Columns of one event inside a history, oldest event first."""
        return (
            self.item.column,
            *(c for c in self.table("events").columns if c.name in {"action", EVENT_TIMESTAMP}),
            *self.spec.event_features,
        )

    @property
    def user_columns(self) -> tuple[Column, ...]:
        """What a request reads of its user beside the history."""
        return self.table("user_profile").columns + self.table("user_stats").columns

    @cached_property
    def fingerprint(self) -> str:
        """16 hex digits over every name, type, unit and limit; documentation strings do not
        count.
        """

        def plain(column: Column) -> dict[str, object]:
            return asdict(replace(column, doc=""))

        content = {
            "dataset": self.spec.name,
            "actions": self.spec.actions,
            "stat_value": self.spec.stat_value,
            "ranking": [self.spec.ranking_user_features, self.spec.ranking_item_features],
            "events": [self.spec.event_identity, self.spec.num_history_online],
            "requests": asdict(replace(self.spec.requests, label_doc="")),
            "tables": {t.name: [plain(c) for c in t.all_columns] for t in self.tables},
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def contract(spec: DatasetSpec) -> Contract:
    """Derive every table from what a dataset declares.

    Raises:
        DeclarationError: two columns of one table, or two features that Feast would serve together,
            share a name.
    """
    if shared := _shared_names(spec):
        raise DeclarationError(f"SPEC of {spec.name!r}: {'; '.join(shared)}. Rename one of them")
    user = Entity("user", "user_id", spec.user_id, "who acted")
    item = Entity("item", "item_id", spec.item_id, "what was acted on")
    tables = (
        _events(spec, user, item),
        DEAD_LETTERS,
        _view("user_profile", user, "events", PROFILE_DOC.format("a user"), spec.user_features),
        _view("item_profile", item, "events", PROFILE_DOC.format("an item"), spec.item_features),
        _view("user_history", user, "user_history", HISTORY_DOC, (HISTORY,)),
        _view("user_stats", user, "user_history", USER_STATS_DOC, _user_stat_columns(spec)),
        _view("item_stats", item, "item_stats", ITEM_STATS_DOC, _item_stat_columns(spec)),
        _view(
            "summary_tokens",
            user,
            "summary_tokens",
            NEWEST_TOKENS_DOC,
            (TOKENS, STATE),
            TOKEN_VERSION,
        ),
        _view(
            "token_rows",
            user,
            "summary_tokens",
            WHICH_ROW_DOC,
            (TOKEN_ROW, TOKEN_EVENTS, TOKEN_DIGEST),
            TOKEN_VERSION,
        ),
        _view(STORE_EPOCH, STORE_PART, "", STORE_EPOCH_DOC, (EPOCH_RUN,)),
        _token_dead_letters(user),
        _training_examples(spec, user, item),
    )
    return Contract(spec, user, item, tables)


PROFILE_DOC = "What is known of {} besides events; a row for each change."
HISTORY_DOC = "A user's newest events, as many as the dataset declares, packed (feature_repo/history.py), oldest first."
HISTORY = Column("history", DType.BYTES, "packed events")
USER_STATS_DOC = "What a user's events came to by an instant: a row for each distinct event time."
HISTORY_END = Column(
    "history_end", DType.INT64, "events of this user known by now", unit="events", minimum=1
)
HISTORY_DIGEST = Column(
    "history_digest", DType.INT64, "of those events: a corrected past has another one"
)
ITEM_STATS_DOC = (
    "Windowed counts of an item by whole UTC day, stamped at the midnight that closes the day."
)
TOKEN_VERSION = Entity(
    "token_version",
    "token_version",
    DType.STRING,
    "fingerprint of the stage 1 that made the tokens",
)
NEWEST_TOKENS_DOC = "A user's newest summary tokens of each token version, in an envelope (feature_repo/envelope.py)."
TOKENS = Column("tokens", DType.BYTES, "summary tokens with their identity")
STATE = Column(
    "state",
    DType.BYTES,
    "what stage 1 keeps to take new events; none where it cannot",
    nullable=True,
)
WHICH_ROW_DOC = "Which row of the token log holds a user's tokens as they were at an instant."
TOKEN_ROW = Column(
    "token_row", DType.INT64, "place in the token log (feature_repo/token_log.py)", minimum=0
)
TOKEN_EVENTS = Column(
    "token_events", DType.INT64, "events behind the tokens", unit="events", minimum=0
)
TOKEN_DIGEST = Column(
    "token_digest", DType.INT64, "of the events behind the tokens, as history_digest"
)
STORE_PART = Entity(
    "store_part", "store_part", DType.STRING, "a job that writes to the online store"
)
STORE_EPOCH = "store_epoch"
STORE_EPOCH_DOC = (
    "What the online store holds: the newest finished run of each job that writes there."
)
EPOCH_RUN = Column("epoch", DType.STRING, "id of the run")
DEAD_LETTERS = Table(
    "dead_letters",
    "Raw rows that are no event, each with its reason and where it stood.",
    (
        Column("source_file", DType.STRING, "file of the raw row"),
        Column(
            "source_row",
            DType.INT64,
            "row in that file, from 0; none of a profile row",
            nullable=True,
            minimum=0,
        ),
        Column("reason", DType.STRING, "why it was set aside"),
        Column("raw", DType.STRING, "the raw row as JSON"),
    ),
    job="events",
)


def _view(
    name: str,
    entity: Entity,
    job: str,
    doc: str,
    columns: tuple[Column, ...],
    version: Entity | None = None,
) -> Table:
    """A table that Feast serves: one row of an entity (and version) for each instant."""
    keys = (entity.join_key, *([version.join_key] if version else []), EVENT_TIMESTAMP)
    return Table(name, doc, columns, entity, job=job, view=True, unique=keys, version=version)


def _token_dead_letters(user: Entity) -> Table:
    return Table(
        "token_dead_letters",
        "Users without tokens in a run of summary_tokens, each with the reason.",
        (
            user.column,
            Column("num_events", DType.INT64, "events of the user", minimum=0),
            Column("reason", DType.STRING, "why there are no tokens"),
        ),
        job="summary_tokens",
    )


def _events(spec: DatasetSpec, user: Entity, item: Entity) -> Table:
    return Table(
        "events",
        "Every readable action, grouped by user, oldest first; equal times keep their order in the source.",
        (
            user.column,
            item.column,
            Column(
                "action",
                DType.INT8,
                f"index into {spec.actions}",
                values=tuple(range(len(spec.actions))),
            ),
            Column(EVENT_TIMESTAMP, DType.TIMESTAMP, "when it happened, UTC"),
            *spec.event_features,
            Column(
                "source_position",
                DType.INT64,
                "row in the raw source; breaks ties in time",
                minimum=0,
            ),
        ),
        job="events",
    )


def _user_stat_columns(spec: DatasetSpec) -> tuple[Column, ...]:
    primary = spec.actions[0]
    mean_doc = f"mean {spec.stat_value} of the user's events '{primary}' to date"
    return (
        HISTORY_END,
        HISTORY_DIGEST,
        Column("first_event_s", DType.INT64, "time of the user's first event", unit="s since 1970"),
        Column(
            "other_events",
            DType.INT64,
            "events of any other action than the first",
            unit="events",
            minimum=0,
        ),
        Column(f"user_mean_{spec.stat_value}", DType.FLOAT32, mean_doc, nullable=True),
    )


def _item_stat_columns(spec: DatasetSpec) -> tuple[Column, ...]:
    def count(name: str, doc: str) -> Column:
        return Column(name, DType.INT64, doc, unit="events", minimum=0)

    primary = spec.actions[0]
    mean_doc = f"mean {spec.stat_value} of '{primary}' to date"
    return (
        count("count_total", f"events '{primary}' to date"),
        *(
            count(f"count_{days}d", f"events '{primary}' in {days} days")
            for days in STAT_WINDOWS_DAYS
        ),
        count("other_total", "events of any other action to date"),
        Column(f"mean_{spec.stat_value}", DType.FLOAT32, mean_doc, nullable=True),
    )


def _training_examples(spec: DatasetSpec, user: Entity, item: Entity) -> Table:
    return Table(
        "training_examples",
        "One row for each request and candidate, with its label; candidates of a request stand together.",
        (
            Column("request_id", DType.STRING, "user and running number of the request"),
            user.column,
            item.column,
            Column(
                EVENT_TIMESTAMP, DType.TIMESTAMP, "request time; features are those known by then"
            ),
            Column(spec.requests.label, DType.INT8, spec.requests.label_doc, values=(0, 1)),
            Column(
                "split", DType.STRING, "by request time", values=("train", "validation", "test")
            ),
        ),
        job="training_examples",
        unique=("request_id", item.join_key),
    )


RESERVED = frozenset(
    {
        "action",
        EVENT_TIMESTAMP,
        CREATED_TIMESTAMP,
        "source_position",
        "request_id",
        "split",
        "user_id",
        "item_id",
    }
    | {HISTORY.name, TOKENS.name, STATE.name, TOKEN_ROW.name, TOKEN_EVENTS.name, TOKEN_DIGEST.name}
    | {TOKEN_VERSION.join_key, STORE_PART.join_key, EPOCH_RUN.name}
)


def _shared_names(spec: DatasetSpec) -> list[str]:
    """Names that would meet in one training set, told apart by neither Feast nor DuckDB, which
    ignores case.
    """
    owners = {name.casefold(): f"a name of Memoir's ({name})" for name in RESERVED}
    owners[spec.requests.label.casefold()] = f"requests.label {spec.requests.label!r}"
    groups: list[tuple[str, tuple[Column, ...]]] = [
        ("user_features", spec.user_features),
        ("item_features", spec.item_features),
    ]
    if spec.stat_value:
        groups.append(("a statistic of users", _user_stat_columns(spec)))
        groups.append(("a statistic of items", _item_stat_columns(spec)))
    found = []
    for group, columns in groups:
        for column in columns:
            key = column.name.casefold()
            if key in owners:
                found.append(f"{group} {column.name!r} and {owners[key]} have one name")
            owners[key] = f"{group} {column.name!r}"
    reserved = {name.casefold() for name in RESERVED}
    found += [
        f"event_features {column.name!r} is a name of Memoir's"
        for column in spec.event_features
        if column.name.casefold() in reserved
    ]
    return found


def problems(spec: DatasetSpec) -> list[str]:
    """What a dataset declares and cannot be, a line for each field: its name, what it holds, and
    what is possible.
    """
    return [
        *_wrong_features(spec),
        *_wrong_names(spec),
        *_wrong_requests(spec.requests),
        *_wrong_limits(spec),
    ]


def _wrong_features(spec: DatasetSpec) -> Iterator[str]:
    for field_name, dtype in (("user_id", spec.user_id), ("item_id", spec.item_id)):
        if dtype not in KEY_TYPES:
            yield f"{field_name} is {dtype.value}; an id is one of {[t.value for t in KEY_TYPES]}"
    if not spec.actions or len(set(spec.actions)) < len(spec.actions):
        yield f"actions is {spec.actions}; name at least one, each once"
    for column in spec.event_features:
        if column.dtype not in NUMBER_TYPES:
            yield f"event_features {column.name!r} is {column.dtype.value}; events carry numbers, {[t.value for t in NUMBER_TYPES]}"
        if column.nullable:
            yield f"event_features {column.name!r} is nullable; an event's numbers must be there, so fill it in `parse`"
    for field_name, columns in (
        ("user_features", spec.user_features),
        ("item_features", spec.item_features),
    ):
        if not columns:
            yield f"{field_name} is (); declare at least one, for Feast has no view without a feature"
        for column in columns:
            if column.dtype in (DType.BYTES, DType.TIMESTAMP):
                yield f"{field_name} {column.name!r} is {column.dtype.value}, which a profile cannot hold yet"
    for column in spec.user_features:
        if column.dtype is DType.STRING_LIST and column.name in spec.ranking_user_features:
            yield f"ranking_user_features {column.name!r} is a list; rankers read one value of a user"


def _wrong_names(spec: DatasetSpec) -> Iterator[str]:
    users, items = [c.name for c in spec.user_features], [c.name for c in spec.item_features]
    numbers = [c.name for c in spec.event_features]
    for field_name, named, known in (
        ("ranking_user_features", spec.ranking_user_features, users),
        ("ranking_item_features", spec.ranking_item_features, items),
        ("item_title", (spec.item_title,), items),
        ("stat_value", (spec.stat_value,), numbers),
        (
            "event_identity",
            spec.event_identity,
            ["user_id", "item_id", "action", EVENT_TIMESTAMP, *numbers],
        ),
    ):
        for name in named:
            if name not in known:
                yield f"{field_name} names {name!r}; there are {known}{nearest(name, known)}"


def _wrong_requests(rules: Requests) -> Iterator[str]:
    times = {}
    for field_name in ("validation_from", "test_from"):
        text = getattr(rules, field_name)
        try:
            times[field_name] = datetime.fromisoformat(text)
        except (ValueError, TypeError):
            yield f"requests.{field_name} is {text!r}; expected an ISO time such as '2011-11-10T00:00:00+00:00'"
            continue
        if times[field_name].tzinfo is None:
            yield f"requests.{field_name} is {text!r}, without a zone; write +00:00 behind it"
    if (
        len(times) == len([t for t in times.values() if t.tzinfo]) == 2
        and times["validation_from"] >= times["test_from"]
    ):
        yield f"requests.validation_from {rules.validation_from} is not before test_from {rules.test_from}"
    for field_name in ("train_negatives_per_positive", "eval_negatives"):
        if getattr(rules, field_name) < 0:
            yield f"requests.{field_name} is {getattr(rules, field_name)}; 0 means that labels are explicit"
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", rules.label):
        yield f"requests.label is {rules.label!r}; expected a name of letters, digits and underscores"


def _wrong_limits(spec: DatasetSpec) -> Iterator[str]:
    if not 0 <= spec.max_bad_fraction <= 1:
        yield f"max_bad_fraction is {spec.max_bad_fraction}; it is a share, from 0 to 1"
    if spec.raw_time_unit not in (None, *TIME_UNITS):
        yield f"raw_time_unit is {spec.raw_time_unit!r}; expected one of {tuple(TIME_UNITS)}"
    try:
        ZoneInfo(spec.raw_zone)
    except (ZoneInfoNotFoundError, ValueError):
        yield f"raw_zone is {spec.raw_zone!r}; expected a zone such as 'UTC' or 'Europe/London'"
    if spec.num_history_online < 1:
        yield f"num_history_online is {spec.num_history_online}; keep at least one event"


def is_iso_time(text: str) -> bool:
    """Whether text is an ISO time, with or without a zone."""
    try:
        datetime.fromisoformat(text)
    except ValueError:
        return False
    return True


def plain(spec: DatasetSpec) -> dict[str, Any]:
    """A declaration as JSON holds it, to travel with what was made under it."""
    return json.loads(json.dumps(asdict(spec)))


def spec_of(stored: Mapping[str, Any]) -> DatasetSpec:
    """The declaration that `plain` stored.

    Raises:
        ValueError, TypeError, KeyError: it is none of this version's.
    """

    def columns(listed: list[dict[str, Any]]) -> tuple[Column, ...]:
        made = []
        for raw in listed:
            values = None if raw["values"] is None else tuple(raw["values"])
            made.append(Column(**{**raw, "dtype": DType(raw["dtype"]), "values": values}))
        return tuple(made)

    found: dict[str, Any] = dict(stored)
    for name in ("event_features", "user_features", "item_features"):
        found[name] = columns(found[name])
    for name in ("user_id", "item_id"):
        found[name] = DType(found[name])
    found["requests"] = Requests(**found["requests"])
    raw = found["raw"]
    found["raw"] = Table(raw["name"], raw["doc"], columns(raw["columns"]))
    for name in ("actions", "ranking_user_features", "ranking_item_features", "event_identity"):
        found[name] = tuple(found[name])
    if unknown := set(found) - {f.name for f in fields(DatasetSpec)}:
        raise ValueError(f"unknown fields {sorted(unknown)}")
    return DatasetSpec(**found)


def lacks(needed: Contract, found: Contract) -> list[str]:
    """What a model of the contract `needed` reads and tables of the contract `found` do not have.
    Empty: it can go on.

    More features, or more actions behind the known ones, take nothing from it.
    """
    missing = []
    if found.spec.actions[: len(needed.spec.actions)] != needed.spec.actions:
        missing.append(f"actions {needed.spec.actions} in this order")
    names = ("user_profile", "item_profile", "user_stats", "item_stats")
    groups = [
        (name, needed.table(name).all_columns, found.table(name).all_columns) for name in names
    ]
    groups.append(("a history", needed.history_columns, found.history_columns))
    for group, wanted, held in groups:
        types = {column.name: column.dtype for column in held}
        missing += [
            f"{c.name} ({c.dtype.value}) of {group}"
            for c in wanted
            if types.get(c.name) is not c.dtype
        ]
    return missing
