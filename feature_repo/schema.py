"""The contract: every table, column, entity and their fingerprint. Standard library only.

Feast fields, Arrow schemas, embedding tables and request decoding are all derived from here, each
where its library lives. A dataset adds its own columns by declaring a `DatasetSpec`; nothing else
in the project names a column twice.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from enum import StrEnum
from functools import cached_property
from typing import Literal

from feature_repo.errors import DeclarationError


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
    FLOAT32_LIST = "float32_list"
    BYTES = "bytes"
    TIMESTAMP = "timestamp"  # microseconds, UTC


class Kind(StrEnum):
    """How a ranker reads a column. Columns without a kind are for people, and no ranker sees them.

    Missing is a state of every kind: a row or a flag of its own, never a zero.
    """

    CATEGORY = "category"  # one value of a vocabulary, or of `hashed` rows
    NUMBER = "number"  # scaled by the training period's statistics, or one of `buckets` quantiles
    BAG = "bag"  # several categories; `max_length` of them are read, what is cut off is counted
    VECTOR = "vector"  # `max_length` numbers that belong together, such as a content embedding
    AGE = "age"  # of a time: log1p days between it and the request, or the event that carries it


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
MAX_BAG = 8  # values read of a bag that declares no `max_length`
CATEGORY, NUMBER, BAG, VECTOR, AGE = Kind
WHOLE_TYPES = (DType.INT8, DType.INT32, DType.INT64)
NUMBER_TYPES = (*WHOLE_TYPES, DType.FLOAT32)
TYPES_OF_KIND = {
    Kind.CATEGORY: (*WHOLE_TYPES, DType.STRING),
    Kind.NUMBER: NUMBER_TYPES,
    Kind.BAG: (DType.STRING_LIST,),
    Kind.VECTOR: (DType.FLOAT32_LIST,),
    Kind.AGE: (DType.TIMESTAMP,),
}


@dataclass(frozen=True)
class Column:
    """One column: its type, meaning, limits, and how a ranker reads it. Limits become expectations;
    `None` means unlimited.

    Example:
        >>> Column("price", DType.FLOAT32, "of one piece", kind=NUMBER, nullable=True, minimum=0)
        >>> Column("genres", DType.STRING_LIST, "at most five are read", kind=BAG, max_length=5)
        >>> Column("cover", DType.FLOAT32_LIST, "embedding", kind=VECTOR, max_length=16, nullable=True)
        >>> Column("city", DType.STRING, "too many for a vocabulary", kind=CATEGORY, hashed=4096)
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
    max_length: int | None = None  # of a vector its length; of a bag how many values are read
    is_key: bool = False
    kind: Kind | None = None
    hashed: int | None = None  # rows of a category or bag that has no vocabulary
    buckets: int | None = None  # quantiles of a number that is read as one of them

    @property
    def bounds(self) -> tuple[float | None, float | None]:
        """Smallest and largest number allowed: as declared, and for a float at most
        `LARGEST_NUMBER` in size.
        """
        if self.dtype is not DType.FLOAT32:
            return self.minimum, self.maximum
        low = -LARGEST_NUMBER if self.minimum is None else self.minimum
        return low, LARGEST_NUMBER if self.maximum is None else self.maximum

    @property
    def slots(self) -> int:
        """Values that a ranker reads of a category or bag."""
        return (self.max_length or MAX_BAG) if self.kind is Kind.BAG else 1

    @property
    def is_categorical(self) -> bool:
        """Whether a ranker looks it up in a table: categories, bags, and numbers in buckets."""
        return self.kind in (Kind.CATEGORY, Kind.BAG) or (
            self.kind is Kind.NUMBER and self.buckets is not None
        )


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


class Examples(StrEnum):
    """Where training examples come from."""

    IMPRESSIONS = "impressions"  # the log says what was shown together
    ACTIONS = "actions"  # what a user acted on at one time, and drawn negatives
    RATINGS = "ratings"  # consecutive events of a user; nothing is drawn


@dataclass(frozen=True)
class Requests:
    """How a dataset's training examples come about, and its periods.

    Args:
        examples: IMPRESSIONS: the items of events that belong together (`by`) are one request, at
            the time of the first. ACTIONS: the same of items that a task's action was about; others
            are drawn as negatives. RATINGS: up to `most` consecutive events of a user in one period
            are one request, at the time of the first.
        validation_from: ISO time with a zone; requests from then on validate.
        test_from: the same for the test period.
        train_negatives_per_positive: drawn in training, of ACTIONS.
        eval_negatives: drawn for each request that is evaluated, of ACTIONS.
        most: events of one request, of RATINGS.
        by: what a user's events share that belong together.

    Example:
        >>> Requests(Examples.IMPRESSIONS, "2025-03-01T00:00Z", "2025-03-08T00:00Z", by="request_id")
    """

    examples: Examples
    validation_from: str
    test_from: str
    train_negatives_per_positive: int = 0
    eval_negatives: int = 0
    most: int = 16
    by: Literal["time", "request_id"] = "time"

    @property
    def has_request_id(self) -> bool:
        """Whether events carry a request id."""
        return self.by == "request_id"


@dataclass(frozen=True)
class Task:
    """One label: whether an item of a request saw an action.

    Args:
        name: of the label's column.
        action: that makes it 1.
        given: name of another task; the label is defined only where that one is 1.
        weight: of its loss.

    Example:
        >>> Task("label_click", "clicked", action="click")
        >>> Task("label_purchase", "bought once clicked", action="purchase", given="label_click")
    """

    name: str
    doc: str
    action: str
    given: str = ""
    weight: float = 1.0


@dataclass(frozen=True)
class Source:
    """Where a raw table lies and how its files are read.

    Args:
        path: below MEMOIR_DATA: a file, a folder, or a glob; of several the first that exists.
        columns: our column → theirs; a column that is not named has the same name there.
        format: "csv", "json" (a JSON object in a line) or "parquet"; by the file's name unless given.
        delimiter: of a CSV file; one or more characters.
        header: names of its columns, where the file has no header.
        quoted_newlines: whether values in quotes may hold line ends; such a file is read whole.
        encodings: of a text file; the first in which it can be read.
        decimal: "." or ",".
        list_separator: between the values of a bag that is written as text.
        time_unit: of times that are whole numbers, a key of `TIME_UNITS`; without one they are refused.
        zone: of times that carry none.
        action: their column that says what happened; none: every row is the first action.
        actions: their value → our action; none: values are our names.
        at_least: their action column is a number: the first action from here on, else the second.
        flags: our action → their column that is 1 where it happened as well: a row is an event of
            `SPEC.shown` and one for each such action.
        derived: our columns that the module's `derive` makes, and no file has.
        raw: their columns that `derive` reads beside ours.
    """

    path: str | tuple[str, ...]
    columns: dict[str, str] = field(default_factory=dict)
    format: Literal["", "csv", "json", "parquet"] = ""
    delimiter: str = ","
    header: tuple[str, ...] = ()
    quoted_newlines: bool = False
    encodings: tuple[str, ...] = ("utf-8",)
    decimal: Literal[".", ","] = "."
    list_separator: str = "|"
    time_unit: str | None = None
    zone: str = "UTC"
    action: str = ""
    actions: dict[str, str] = field(default_factory=dict)
    at_least: float | None = None
    flags: dict[str, str] = field(default_factory=dict)
    derived: tuple[str, ...] = ()
    raw: tuple[Column, ...] = ()


@dataclass(frozen=True)
class OwnView:
    """A feature view of a person's own: a source that no job of ours writes.

    Args:
        name: of the view.
        entity: "user" or "item".
        columns: its features; those with a kind are read by rankers.
        path: a Parquet file or folder with the entity's key, the columns and both timestamps; below
            MEMOIR_DATA unless absolute.
        timestamp: its column that says since when a row is known.
        created: its column that says when a row was made; none: rows are never late.
        push: rows come online by `store.push(f"{name}_push", …)` as well.
        ttl_days: a row older than this is missing; 0: rows never expire.

    Example:
        >>> OwnView("loyalty", "user", (Column("points", DType.INT64, "", kind=NUMBER),), "loyalty.parquet")
    """

    name: str
    entity: Literal["user", "item"]
    columns: tuple[Column, ...]
    path: str
    timestamp: str = EVENT_TIMESTAMP
    created: str = ""
    push: bool = False
    ttl_days: float = 0.0


@dataclass(frozen=True)
class Memory:
    """What is kept of a user's whole history at a fixed size: how often, ever and lately, with each
    item, and with each value of some item columns (`feature_repo/sketch.py`).

    Args:
        by: item features, categories or bags.
        half_lives_days: of the counts that fade; a ranker sees each beside the count of all time.
        kibibytes: of one user's sketch; more of them make its readings more exact.

    Example:
        >>> Memory(by=("brand", "genres"), half_lives_days=(7.0, 90.0), kibibytes=32)
    """

    by: tuple[str, ...] = ()
    half_lives_days: tuple[float, ...] = (7.0, 30.0, 180.0)
    kibibytes: int = 16


@dataclass(frozen=True)
class DatasetSpec:
    """What one dataset adds to the contract, and where its raw tables are.

    Args:
        actions: the first is the one that statistics and match features are about.
        shown: the action of an impression, which is in no history and in no statistic.
        event_features: of one event; they stand in histories.
        context_features: of a request, known only when somebody asks: they come with the log's
            events in training and with the request's body in serving.
        shown_features: of an impression, such as its position. Rankers read them in training and in
            no request: there they are missing.
        stat_value: the number among the event features whose mean items and users keep; may be "".
        rank_by: tasks whose probabilities, weighted, are the score; default: the first task's.
        events, users, items: raw sources. Features that have no source of their own are read from
            the rows of events.
        event_identity: columns of `events` that say "the same event", `event_id` among them where
            the source gives one; without any, none is repeated.
    """

    name: str
    title: str
    user_id: DType
    item_id: DType
    actions: tuple[str, ...]
    tasks: tuple[Task, ...]
    requests: Requests
    events: Source
    users: Source | None = None
    items: Source | None = None
    event_features: tuple[Column, ...] = ()
    user_features: tuple[Column, ...] = ()
    item_features: tuple[Column, ...] = ()
    context_features: tuple[Column, ...] = ()
    shown_features: tuple[Column, ...] = ()
    views: tuple[OwnView, ...] = ()
    shown: str = ""
    rank_by: tuple[tuple[str, float], ...] = ()
    item_title: str = ""  # the item feature that a person reads
    stat_value: str = ""
    max_bad_fraction: float = 0.01
    event_identity: tuple[str, ...] = ()
    # A ranker that reads more events than are kept online cannot be exported.
    num_history_online: int = NUM_HISTORY_ONLINE
    # Whether an item that a user has acted on is worth ranking for them again.
    items_repeat: bool = True
    memory: Memory = Memory()

    @property
    def weights(self) -> dict[str, float]:
        """What the server ranks by: the weight of each task's probability."""
        return dict(self.rank_by or ((self.tasks[0].name, 1.0),))


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
    def remembered(self) -> tuple[Column, ...]:
        """Item columns whose values a user's sketch counts."""
        columns = {c.name: c for c in self.spec.item_features}
        return tuple(columns[name] for name in self.spec.memory.by)

    @property
    def history_actions(self) -> tuple[int, ...]:
        """Actions that stand in histories and statistics: all but an impression's."""
        return tuple(n for n, name in enumerate(self.spec.actions) if name != self.spec.shown)

    @property
    def user_columns(self) -> tuple[Column, ...]:
        """What a request reads of its user beside the history."""
        return self.columns_of(("user_profile", "user_stats", *self.views_of("user")))

    @property
    def item_columns(self) -> tuple[Column, ...]:
        """What a request reads of its candidates."""
        return self.columns_of(("item_profile", "item_stats", *self.views_of("item")))

    def columns_of(self, tables: Iterable[str]) -> tuple[Column, ...]:
        """Columns of several tables, without keys and timestamps."""
        return tuple(c for name in tables for c in self.table(name).columns)

    def views_of(self, entity: str) -> tuple[str, ...]:
        """Names of a person's own views of users or items."""
        return tuple(view.name for view in self.spec.views if view.entity == entity)

    @property
    def labels(self) -> tuple[str, ...]:
        """Label columns, a task each."""
        return tuple(task.name for task in self.spec.tasks)

    @property
    def request_features(self) -> tuple[Column, ...]:
        """Columns of user and context that a ranker reads."""
        columns = (*self.user_columns, *self.spec.context_features)
        return tuple(c for c in columns if c.kind)

    @property
    def candidate_features(self) -> tuple[Column, ...]:
        """Columns of items, and of impressions in training, that a ranker reads."""
        return tuple(c for c in (*self.item_columns, *self.spec.shown_features) if c.kind)

    @property
    def event_features(self) -> tuple[Column, ...]:
        """Columns of events that a ranker reads."""
        return tuple(c for c in self.spec.event_features if c.kind)

    @cached_property
    def fingerprint(self) -> str:
        """16 hex digits over every name, type, unit and limit; documentation strings do not
        count.
        """

        def plain(column: Column) -> dict[str, object]:
            return asdict(replace(column, doc=""))

        spec = self.spec
        content = {
            "dataset": spec.name,
            "actions": [spec.actions, spec.shown],
            "stat_value": spec.stat_value,
            "events": [spec.event_identity, spec.num_history_online],
            "memory": asdict(spec.memory),
            "requests": asdict(spec.requests),
            "tasks": [asdict(replace(task, doc="")) for task in spec.tasks],
            "rank_by": spec.weights,
            "context": [c.name for c in spec.context_features],
            "tables": {t.name: [plain(c) for c in t.all_columns] for t in self.tables},
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def contract(spec: DatasetSpec) -> Contract:
    """Derive every table from what a dataset declares.

    Raises:
        DeclarationError: two columns of one table, or two features that Feast would serve together,
            share a name.
    """
    if shared := shared_names(spec):
        raise DeclarationError(f"SPEC of {spec.name!r}: {'; '.join(shared)}. Rename one of them")
    user = Entity("user", "user_id", spec.user_id, "who acted")
    item = Entity("item", "item_id", spec.item_id, "what was acted on")
    tables = (
        _events(spec, user, item),
        DEAD_LETTERS,
        _view(
            "user_profile",
            user,
            "events",
            PROFILE_DOC.format("a user"),
            _known(spec.user_features, "user"),
        ),
        _view(
            "item_profile",
            item,
            "events",
            PROFILE_DOC.format("an item"),
            _known(spec.item_features, "item"),
        ),
        _view("user_history", user, "user_history", HISTORY_DOC, (HISTORY, SKETCH)),
        _view("user_stats", user, "user_history", USER_STATS_DOC, user_stat_columns(spec)),
        _view("item_stats", item, "item_stats", ITEM_STATS_DOC, item_stat_columns(spec)),
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
        *(
            _view(v.name, user if v.entity == "user" else item, "", OWN_VIEW_DOC, v.columns)
            for v in spec.views
        ),
    )
    return Contract(spec, user, item, tables)


OWN_VIEW_DOC = "A view of your own, as the dataset declares it."
PROFILE_DOC = "What is known of {} besides events; a row for each change."
HISTORY_DOC = "A user's newest events, packed (feature_repo/history.py), and a sketch of all (feature_repo/sketch.py)."
HISTORY = Column(
    "history", DType.BYTES, "packed events, as many as the dataset declares, oldest first"
)
SKETCH = Column("sketch", DType.BYTES, "counts of the whole history, with their identity")
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
            *([REQUEST_ID] if spec.requests.has_request_id else []),
            *([EVENT_ID] if EVENT_ID.name in spec.event_identity else []),
            *spec.event_features,
            *(replace(c, nullable=True) for c in (*spec.context_features, *spec.shown_features)),
            Column(
                "source_position",
                DType.INT64,
                "row in the raw source; breaks ties in time",
                minimum=0,
            ),
        ),
        job="events",
    )


REQUEST_ID = Column("request_id", DType.STRING, "what was asked or shown together", nullable=True)
EVENT_ID = Column("event_id", DType.STRING, "the source's name of the event")


def _known(columns: tuple[Column, ...], entity: str) -> tuple[Column, ...]:
    """A profile's features, and that the entity is known: Feast has no view without a feature, and
    features that are declared later must take nothing from a bundle that has none.
    """
    return (*columns, Column(f"{entity}_known", DType.INT8, "1: the log has it", values=(1,)))


def user_stat_columns(spec: DatasetSpec) -> tuple[Column, ...]:
    """Statistics of a user; the mean of a number, and how many events have it, where one is
    declared.
    """
    primary, value = spec.actions[0], spec.stat_value
    mean_doc = f"mean {value} of the user's events '{primary}' to date"
    number_doc = f"events '{primary}' with a {value}"
    mean = (
        Column(f"user_mean_{value}", DType.FLOAT32, mean_doc, nullable=True),
        Column(f"user_num_{value}", DType.INT64, number_doc, unit="events", minimum=0),
    )
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
        *(mean if value else ()),
    )


def item_stat_columns(spec: DatasetSpec) -> tuple[Column, ...]:
    """Statistics of an item; the mean of a number where one is declared."""

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
        *(
            [Column(f"mean_{spec.stat_value}", DType.FLOAT32, mean_doc, nullable=True)]
            if spec.stat_value
            else []
        ),
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
            *(
                Column(task.name, DType.INT8, task.doc, values=(0, 1), nullable=bool(task.given))
                for task in spec.tasks
            ),
            *(replace(c, nullable=True) for c in (*spec.context_features, *spec.shown_features)),
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
        "event_id",
        "request_timestamp",
        "user_known",
        "item_known",
        "split",
        "user_id",
        "item_id",
    }
    | {
        HISTORY.name,
        SKETCH.name,
        TOKENS.name,
        STATE.name,
        TOKEN_ROW.name,
        TOKEN_EVENTS.name,
        TOKEN_DIGEST.name,
    }
    | {TOKEN_VERSION.join_key, STORE_PART.join_key, EPOCH_RUN.name}
)


def shared_names(spec: DatasetSpec) -> list[str]:
    """Names that would meet in one training set or in one table of events, told apart by neither
    Feast nor DuckDB, which ignores case.
    """
    training: list[tuple[str, tuple[Column, ...]]] = [
        ("user_features", spec.user_features),
        ("item_features", spec.item_features),
        *((f"views {view.name!r}", view.columns) for view in spec.views),
        ("context_features", spec.context_features),
        ("shown_features", spec.shown_features),
        ("a statistic of users", user_stat_columns(spec)),
        ("a statistic of items", item_stat_columns(spec)),
    ]
    events = [
        ("event_features", spec.event_features),
        ("context_features", spec.context_features),
        ("shown_features", spec.shown_features),
    ]
    labels = {task.name.casefold(): f"task {task.name!r}" for task in spec.tasks}
    ours = {name.casefold(): f"a name of Memoir's ({name})" for name in RESERVED}
    found = [f"{labels[key]} and {ours[key]} have one name" for key in labels if key in ours]
    for groups in (training, events):
        owners = ours | labels
        for group, columns in groups:
            for column in columns:
                key = column.name.casefold()
                if key in owners:
                    found.append(f"{group} {column.name!r} and {owners[key]} have one name")
                owners[key] = f"{group} {column.name!r}"
    return list(dict.fromkeys(found))
