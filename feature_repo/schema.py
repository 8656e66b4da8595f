"""The contract: every table, column, entity and their fingerprint. Standard library only.

Feast fields, Arrow schemas, embedding tables and request decoding are all derived from here, each where its library
lives. A dataset adds its own columns by declaring a `DatasetSpec`; nothing else in the project names a column twice.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field, replace
from enum import StrEnum


class DType(StrEnum):
    """Logical column types; `feature_repo.arrow` maps them to Arrow, `feature_definitions` to Feast."""

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
NUM_HISTORY_ONLINE = 512  # events of a user kept online; rankers may read fewer
STAT_WINDOWS_DAYS = (7, 14, 28)


@dataclass(frozen=True)
class Column:
    """One column: its type, meaning and limits. Limits become expectations; `None` means unlimited."""

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
        return Column(self.join_key, self.dtype, self.doc)


@dataclass(frozen=True)
class Table:
    """A declared table. `job` names the Beam job that writes it; `view` says whether Feast serves it."""

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
            raise ValueError(f"table {self.name!r}: column names must differ, these appear twice: {twice}")

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
        raise KeyError(f"table {self.name!r} has no column {name!r}; it has {[c.name for c in self.all_columns]}")


TIMESTAMPS = (
    Column(EVENT_TIMESTAMP, DType.TIMESTAMP, "when the row became knowable: just after the events it counts"),
    Column(CREATED_TIMESTAMP, DType.TIMESTAMP, "when the row was first available; joins never look past it"),
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
    """What one dataset adds to the contract. The module that declares it also turns raw rows into these columns."""

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


@dataclass(frozen=True)
class Contract:
    """All tables of one dataset, and the fingerprint that travels in every bundle and stored history."""

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

    @property
    def fingerprint(self) -> str:
        """16 hex digits over every name, type, unit and limit; documentation strings do not count."""

        def plain(column: Column) -> dict[str, object]:
            return asdict(replace(column, doc=""))

        content = {
            "dataset": self.spec.name,
            "actions": self.spec.actions,
            "stat_value": self.spec.stat_value,
            "ranking": [self.spec.ranking_user_features, self.spec.ranking_item_features],
            "requests": asdict(replace(self.spec.requests, label_doc="")),
            "tables": {t.name: [plain(c) for c in t.all_columns] for t in self.tables},
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def contract(spec: DatasetSpec) -> Contract:
    """Derive every table from what a dataset declares."""
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
        _view("summary_tokens", user, "summary_tokens", NEWEST_TOKENS_DOC, (TOKENS, STATE), TOKEN_VERSION),
        _view("token_rows", user, "summary_tokens", WHICH_ROW_DOC, (TOKEN_ROW, TOKEN_EVENTS), TOKEN_VERSION),
        _token_dead_letters(user),
        _training_examples(spec, user, item),
    )
    return Contract(spec, user, item, tables)


PROFILE_DOC = "What is known of {} besides events; a row for each change."
HISTORY_DOC = f"A user's newest {NUM_HISTORY_ONLINE} events, packed (feature_repo/history.py), oldest first."
HISTORY = Column("history", DType.BYTES, "packed events", max_length=NUM_HISTORY_ONLINE)
USER_STATS_DOC = "What a user's events came to by an instant: a row for each distinct event time."
HISTORY_END = Column("history_end", DType.INT64, "events of this user known by now", unit="events", minimum=1)
ITEM_STATS_DOC = "Windowed counts of an item by whole UTC day, stamped at the midnight that closes the day."
TOKEN_VERSION = Entity(
    "token_version", "token_version", DType.STRING, "fingerprint of the stage 1 that made the tokens"
)
NEWEST_TOKENS_DOC = "A user's newest summary tokens of each token version, in an envelope (feature_repo/envelope.py)."
TOKENS = Column("tokens", DType.BYTES, "summary tokens with their identity")
STATE = Column("state", DType.BYTES, "what stage 1 keeps to take new events; none where it cannot", nullable=True)
WHICH_ROW_DOC = "Which row of the token log holds a user's tokens as they were at an instant."
TOKEN_ROW = Column("token_row", DType.INT64, "place in the token log (feature_repo/token_log.py)", minimum=0)
TOKEN_EVENTS = Column("token_events", DType.INT64, "events behind the tokens", unit="events", minimum=0)
DEAD_LETTERS = Table(
    "dead_letters",
    "Raw rows that are no event, each with its reason and where it stood.",
    (
        Column("source_file", DType.STRING, "file of the raw row"),
        Column("source_row", DType.INT64, "row in that file, from 0", minimum=0),
        Column("reason", DType.STRING, "why it was set aside"),
        Column("raw", DType.STRING, "the raw row as JSON"),
    ),
    job="events",
)


def _view(
    name: str, entity: Entity, job: str, doc: str, columns: tuple[Column, ...], version: Entity | None = None
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
            Column("action", DType.INT8, f"index into {spec.actions}", values=tuple(range(len(spec.actions)))),
            Column(EVENT_TIMESTAMP, DType.TIMESTAMP, "when it happened, UTC"),
            *spec.event_features,
            Column("source_position", DType.INT64, "row in the raw source; breaks ties in time", minimum=0),
        ),
        job="events",
    )


def _user_stat_columns(spec: DatasetSpec) -> tuple[Column, ...]:
    primary = spec.actions[0]
    mean_doc = f"mean {spec.stat_value} of the user's events '{primary}' to date"
    return (
        HISTORY_END,
        Column("first_event_s", DType.INT64, "time of the user's first event", unit="s since 1970"),
        Column("other_events", DType.INT64, "events of any other action than the first", unit="events", minimum=0),
        Column(f"user_mean_{spec.stat_value}", DType.FLOAT32, mean_doc, nullable=True),
    )


def _item_stat_columns(spec: DatasetSpec) -> tuple[Column, ...]:
    def count(name: str, doc: str) -> Column:
        return Column(name, DType.INT64, doc, unit="events", minimum=0)

    primary = spec.actions[0]
    mean_doc = f"mean {spec.stat_value} of '{primary}' to date"
    return (
        count("count_total", f"events '{primary}' to date"),
        *(count(f"count_{days}d", f"events '{primary}' in {days} days") for days in STAT_WINDOWS_DAYS),
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
            Column(EVENT_TIMESTAMP, DType.TIMESTAMP, "request time; features are those known by then"),
            Column(spec.requests.label, DType.INT8, spec.requests.label_doc, values=(0, 1)),
            Column("split", DType.STRING, "by request time", values=("train", "validation", "test")),
        ),
        job="training_examples",
        unique=("request_id", item.join_key),
    )
