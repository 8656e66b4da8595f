"""The contract: every table, column, entity and their fingerprint, derived from what a dataset
declares (`schema.py`). Standard library only.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property

from feature_repo.contract.schema import (
    CREATED_TIMESTAMP,
    EVENT_TIMESTAMP,
    STAT_WINDOWS_DAYS,
    Column,
    DatasetSpec,
    DType,
    Entity,
    Table,
)
from feature_repo.errors import DeclarationError


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
            KeyError: no such table; the message lists all tables.
        """
        for table in self.tables:
            if table.name == name:
                return table
        raise KeyError(f"no table {name!r} in the contract; it has {[t.name for t in self.tables]}")

    @property
    def views(self) -> tuple[Table, ...]:
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
        """Return the columns that a request reads of its user beside the history."""
        return self.columns_of(("user_profile", "user_stats", *self.views_of("user")))

    @property
    def item_columns(self) -> tuple[Column, ...]:
        """Return the columns that a request reads of its candidates."""
        return self.columns_of(("item_profile", "item_stats", *self.views_of("item")))

    def columns_of(self, tables: Iterable[str]) -> tuple[Column, ...]:
        """Columns of several tables, without keys and timestamps."""
        return tuple(c for name in tables for c in self.table(name).columns)

    def views_of(self, entity: str) -> tuple[str, ...]:
        """Names of a person's own views of users or items."""
        return tuple(view.name for view in self.spec.views if view.entity == entity)

    @property
    def labels(self) -> tuple[str, ...]:
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
    # Refuse before a table is built: neither Feast nor DuckDB tells two such columns apart.
    if shared := shared_names(spec):
        raise DeclarationError(f"SPEC of {spec.name!r}: {'; '.join(shared)}. Rename one of them")
    # In the order in which they are built: raw tables, views, training examples, custom views.
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
        # The view has no job: every job that writes to the online store notes its run here.
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
HISTORY_DOC = "A user's newest events, packed (feature_repo/history/history.py), and a sketch of all (feature_repo/history/sketch.py)."
HISTORY = Column(
    "history", DType.BYTES, "packed events, as many as the dataset declares, oldest first"
)
SKETCH = Column("sketch", DType.BYTES, "counts of the whole history, with their identity")
USER_STATS_DOC = "What a user's events came to by an instant: a row for each at which that changed."
HISTORY_END = Column(
    "history_end", DType.INT64, "events of this user known by now", unit="events", minimum=0
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
NEWEST_TOKENS_DOC = "A user's newest summary tokens of each token version, in an envelope (feature_repo/history/envelope.py)."
TOKENS = Column("tokens", DType.BYTES, "summary tokens with their identity")
STATE = Column(
    "state",
    DType.BYTES,
    "what stage 1 keeps to take new events; none where it cannot",
    nullable=True,
)
WHICH_ROW_DOC = "Which row of the token log holds a user's tokens as they were at an instant."
TOKEN_ROW = Column(
    "token_row",
    DType.INT64,
    "place in the token log (feature_repo/history/token_log.py)",
    minimum=0,
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
            # Only declared ids have a column: in other logs it would always be null.
            *([REQUEST_ID] if spec.requests.has_request_id else []),
            # A file must say it; an event by HTTP may not.
            *([replace(EVENT_ID, nullable=True)] if EVENT_ID.name in spec.event_identity else []),
            *spec.event_features,
            # All are nullable here: not every event belongs to a request that says them.
            *(replace(c, nullable=True) for c in (*spec.context_features, *spec.shown_features)),
            Column(
                "source_position",
                DType.INT64,
                "row in the raw source; breaks ties in time",
                minimum=0,
            ),
            ARRIVAL,
            REPLACED,
        ),
        job="events",
    )


ARRIVAL = Column(
    "arrival_timestamp",
    DType.TIMESTAMP,
    "when it arrived, where that was later than it happened",
    nullable=True,
)
REPLACED = Column(
    "replaced_timestamp",
    DType.TIMESTAMP,
    "when a later line of the same event arrived, and this one ceased to hold",
    nullable=True,
)
REQUEST_ID = Column("request_id", DType.STRING, "what was asked or shown together", nullable=True)
EVENT_ID = Column("event_id", DType.STRING, "the source's name of the event")


def _known(columns: tuple[Column, ...], entity: str) -> tuple[Column, ...]:
    """A profile's features, and that the entity is known: Feast has no view without a feature, and
    features that are declared later must take nothing from a bundle that has none.
    """
    return (*columns, Column(f"{entity}_known", DType.INT8, "1: the log has it", values=(1,)))


def user_stat_columns(spec: DatasetSpec) -> tuple[Column, ...]:
    """Statistics of a user; the mean of a number, how many events have it, and their exact sum, where one is
    declared.
    """
    primary = spec.actions[0]
    value = spec.stat_value
    mean_doc = f"mean {value} of the user's events '{primary}' to date"
    number_doc = f"events '{primary}' with a {value}"
    mean = (
        Column(f"user_mean_{value}", DType.FLOAT32, mean_doc, nullable=True),
        Column(f"user_num_{value}", DType.INT64, number_doc, unit="events", minimum=0),
        # From these a mean goes on exactly, whichever event comes next (history/sums.py).
        Column(
            f"user_sum_{value}_high",
            DType.INT64,
            f"sum of {value}, upper half",
            unit="2^32 millionths",
        ),
        Column(
            f"user_sum_{value}_low", DType.INT64, f"sum of {value}, lower half", unit="millionths"
        ),
    )
    return (
        HISTORY_END,
        HISTORY_DIGEST,
        Column(
            "first_event_s",
            DType.INT64,
            "time of the user's first event; none where all were struck",
            unit="s since 1970",
            nullable=True,
        ),
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
        count("users_total", f"users with '{primary}' to date"),
        *(
            count(f"users_{days}d", f"users whose first '{primary}' was in {days} days")
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
        ARRIVAL.name,
        REPLACED.name,
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
    # 1. List the columns that meet in a training set, and in the table of events.
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
    # 2. Compare each with Memoir's names, the labels and the columns before, without case.
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
    # Context and shown features stand in both lists, so a clash among them is found twice.
    return list(dict.fromkeys(found))
