"""The declaration of a dataset: columns, labels, requests, sources, memory. Standard library only.

`contract.py` derives every table from it; Feast fields, Arrow schemas, embedding tables and request
decoding follow from there, each where its library lives. Nothing else in the project names a column
twice.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Literal

from feature_repo.errors import DeclarationError


class DType(StrEnum):
    """Logical column types; `feature_repo.contract.arrow` maps them to Arrow, `feature_definitions` to
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
    # Microseconds, UTC
    TIMESTAMP = "timestamp"


class Kind(StrEnum):
    """How a ranker reads a column. Columns without a kind are for people, and no ranker sees them.

    Missing is a state of every kind: a separate row or flag, never a zero.
    """

    # One value of a vocabulary, or of `hashed` rows
    CATEGORY = "category"
    # Scaled by the training period's statistics, or one of `buckets` quantiles
    NUMBER = "number"
    # Several categories; `max_length` of them are read, what is cut off is counted
    BAG = "bag"
    # `max_length` numbers that belong together, such as a content embedding
    VECTOR = "vector"
    # A time: log1p days between it and the request, or the event that carries it
    AGE = "age"


EVENT_TIMESTAMP = "event_timestamp"
CREATED_TIMESTAMP = "created_timestamp"
# As the arrival of a source: a row arrived when its file was last written
FILE_TIME = "<file time>"
# Events of a user kept online unless a dataset declares another number
NUM_HISTORY_ONLINE = 512
STAT_WINDOWS_DAYS = (7, 14, 28)
# A number without limits of its own stays within this. Sums and means of so large values are still
# exact in what they are computed with (`feature_repo/history/sums.py`), and float32 holds them.
LARGEST_NUMBER = 1e12
# Bytes of a text id, in UTF-8; longer ones are dead letters, and the server refuses them alike
MAX_ID_BYTES = 1024
# Bytes of any other text
MAX_TEXT_BYTES = 1 << 15
TIME_UNITS = {
    "seconds": 1_000_000.0,
    "milliseconds": 1_000.0,
    "microseconds": 1.0,
    "nanoseconds": 1e-3,
}  # in microseconds
KEY_TYPES = (DType.INT64, DType.STRING)
# Texts that say "nothing here", in any letter case: exports of databases, pandas, Hive and web
# analytics write these. A source whose values they are declares others.
MISSING = (
    "", "nan", "null", "none", "nil", "na", "<na>", "n/a", "#n/a", "(null)", "<null>", "(none)",
    "(not set)", "undefined", "\\n", "-", "--", "?",
)  # fmt: skip
# Values read of a bag that declares no `max_length`
MAX_BAG = 8
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
    `None` means unlimited. A number that is text may carry its `unit`: with unit="EUR" a raw
    `12,99 EUR` is a number, and `12,99 USD` is not.

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
    # The length of a vector; how many values of a bag are read
    max_length: int | None = None
    is_key: bool = False
    kind: Kind | None = None
    # Rows of a category or bag that has no vocabulary
    hashed: int | None = None
    # Quantiles of a number that is read as one of them
    buckets: int | None = None

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
        """True if a ranker looks the column up in a table: categories, bags, and numbers in buckets."""
        return self.kind in (Kind.CATEGORY, Kind.BAG) or (
            self.kind is Kind.NUMBER and self.buckets is not None
        )


@dataclass(frozen=True)
class Entity:
    """The thing that a row is about, and the join key that names it."""

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
    # A second key: rows of several versions stand side by side
    version: Entity | None = None

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
        """The entities that a row is about."""
        return tuple(entity for entity in (self.entity, self.version) if entity)

    @property
    def join_keys(self) -> tuple[str, ...]:
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
    """The origin of training examples."""

    # The log says what was shown together
    IMPRESSIONS = "impressions"
    # What a user acted on at one time, and drawn negatives
    ACTIONS = "actions"
    # Consecutive events of a user; nothing is drawn
    RATINGS = "ratings"


@dataclass(frozen=True)
class Requests:
    """How a dataset's training examples come about, and its periods.

    Args:
        examples: IMPRESSIONS: the items of events that belong together (`by`) are one request, at
            the time of the first. ACTIONS: the same of items that a task's action was about; others
            are drawn as negatives. RATINGS: up to `most` consecutive events of a user in one period
            are one request, at the time of the first. No request lies in two periods: what comes
            after a period's end belongs to a new request.
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
        """True if events carry a request id."""
        return self.by == "request_id"


@dataclass(frozen=True)
class Task:
    """One label: 1 if an item of a request saw an action, else 0.

    Args:
        name: of the label's column.
        action: that makes it 1.
        given: name of a different task; the label is defined only where that one is 1.
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
    """A raw table: the place of its files and how they are read.

    Args:
        path: below MEMOIR_DATA: a file, a folder, or a glob; of several the first that exists.
        columns: our column → theirs; a column that is not named has the same name there. Theirs may
            be a part of the path (`event` of `event=view/part-0.csv`) or a field inside an object
            (`user.id`).
        format: "csv", "json" (a JSON object in a line) or "parquet"; by the file's name unless given.
        delimiter: of a CSV file; one or more characters.
        quote: of a CSV file, around values; "" where quotes are text like any other.
        escape: of a CSV file, before a quote inside of quotes; "" where it is doubled.
        skip: lines of a CSV file before its header, or before its first row if it has none.
        header: names of its columns, where the file has no header, or in place of the file's own
            (which then counts to `skip`). A name that a file leaves blank is `column_3`, by its
            place; one that it has twice is `name` and `name_2`.
        quoted_newlines: whether values in quotes may hold line ends; such a file is read whole.
        encodings: of a text file; the first in which it can be read. A byte order mark overrules
            them.
        missing: texts that say "nothing here", in any letter case; they are no id, no number
            and no time, and a nullable text or category is null there.
        missing_in: their column → further values that say nothing there, numbers included, such as
            {"rating": ("0",)} where a row of 0 stars was never rated.
        decimal: "." or ","; the other one may stand between thousands.
        decimals: our column → its own sign, where columns differ.
        list_separator: between the values of a bag that is written as text.
        time_unit: of times that are numbers, a key of `TIME_UNITS`; without one they are refused.
        time_format: of times that are text and not ISO 8601, as `datetime.strptime` has it; a name
            or offset of a zone may stand behind it.
        zone: of times that carry none.
        zone_column: their column that names each row's zone, such as "Europe/London" or "+02:00".
        action: their column that says what happened; none: every row is the first action.
        actions: their value → our action; none: values are our names.
        at_least: their action column is a number: the first action from here on, else the second.
        flags: our action → their column that is 1 where it happened as well: a row is an event of
            `SPEC.shown` and one for each such action.
        arrival: their column, or the part of a path (`dt` of `dt=2024-03-05/part-0.csv`), that says when a row
            arrived, as a time of the source or in ISO 8601; `FILE_TIME`: when its file was last written. No row is
            known before. Without one a row is known from its own time on.
        deleted: their column of events that is true on a line which strikes the event of its identity; such a
            line needs no other column.
        derived: our columns that the module's `derive` makes, and no file has.
        raw: their columns that `derive` reads beside ours.
    """

    path: str | tuple[str, ...]
    columns: dict[str, str] = field(default_factory=dict)
    format: Literal["", "csv", "json", "parquet"] = ""
    delimiter: str = ","
    quote: Literal['"', "'", ""] = '"'
    escape: str = ""
    skip: int = 0
    header: tuple[str, ...] = ()
    quoted_newlines: bool = False
    encodings: tuple[str, ...] = ("utf-8",)
    missing: tuple[str, ...] = MISSING
    missing_in: dict[str, tuple[str, ...]] = field(default_factory=dict)
    decimal: Literal[".", ","] = "."
    decimals: dict[str, Literal[".", ","]] = field(default_factory=dict)
    list_separator: str = "|"
    time_unit: str | None = None
    time_format: str = ""
    zone: str = "UTC"
    zone_column: str = ""
    action: str = ""
    actions: dict[str, str] = field(default_factory=dict)
    at_least: float | None = None
    flags: dict[str, str] = field(default_factory=dict)
    arrival: str = ""
    deleted: str = ""
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
    """Counts of a user's whole history: how often, ever and lately, and when last, with each item, and with each
    value of some item columns, and of pairs of them (`feature_repo/history/counts.py`).

    Args:
        by: item features, categories or bags.
        pairs: of categories among `by`: each two values that one item has are counted as one, such as a brand's
            milk. They cost nothing while counts are exact.
        half_lives_days: of the counts that fade; a ranker sees each beside the count of all time.
        kibibytes: of one user's counts at most: they are exact up to 32 different items for each, and a sketch
            beyond.

    Example:
        >>> Memory(by=("brand", "genres"), half_lives_days=(7.0, 90.0), kibibytes=32)
        >>> Memory(by=("type", "brand"), pairs=(("type", "brand"),))
    """

    by: tuple[str, ...] = ()
    half_lives_days: tuple[float, ...] = (7.0, 30.0, 180.0)
    kibibytes: int = 16
    pairs: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class DatasetSpec:
    """One dataset's part of the contract, and its raw tables.

    Args:
        actions: the first is the one that statistics and match features are about.
        shown: the action of an impression, which is in no history and in no statistic.
        event_features: of one event; they stand in histories.
        context_features: of a request, known only when somebody asks: they come with the log's
            events in training and with the request's body in serving.
        shown_features: of an impression, such as its position. Rankers read them in training and in
            no request: there they are missing.
        stat_value: the number among the event features whose mean items and users keep; may be "".
        rank_by: tasks whose scores, weighted, are the score; default: the first task's.
        events, users, items: raw sources. Features that have no source of their own are read from
            the rows of events.
        event_identity: columns of `events` that say "the same event", `event_id` among them where
            the source gives one. Of several lines of one event the one that arrived last holds, whatever
            user, time or action it names; without `Source.arrival` the one that stands last. An id that is
            one user's own wants `user_id` beside it. Without an identity every line is an event.
        accept: names of findings of `python -m feature_repo check` that are right as they are, such
            as "large_share" where one customer is a wholesaler.
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
    # The item feature that a person reads
    item_title: str = ""
    stat_value: str = ""
    max_bad_fraction: float = 0.01
    event_identity: tuple[str, ...] = ()
    # A ranker that reads more events than are kept online cannot be exported.
    num_history_online: int = NUM_HISTORY_ONLINE
    # Whether an item that a user has acted on is worth ranking for them again.
    items_repeat: bool = True
    memory: Memory = Memory()
    accept: tuple[str, ...] = ()

    @property
    def weights(self) -> dict[str, float]:
        """The weight of each task's score in the sum that the server ranks by."""
        return dict(self.rank_by or ((self.tasks[0].name, 1.0),))
