"""A user's features from the online store, read by key; and rows of items for the table in the process
(`items.py`).
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, Protocol

import pyarrow as pa

from feature_repo.contract.arrow import EPOCH, arrow_type
from feature_repo.contract.contract import TOKEN_VERSION, Contract
from feature_repo.contract.schema import EVENT_TIMESTAMP, OwnView
from feature_repo.history.counts import UserCounts
from feature_repo.history.counts import from_bytes as counts_of
from feature_repo.history.envelope import Envelope, EnvelopeError, from_bytes
from feature_repo.history.history import HistoryError, unpack
from feature_repo.history.record import past_was_lost
from feature_repo.history.sketch import Layout, SketchError
from serving.api.degraded import Degraded
from serving.stores.items import Id, item_columns

if TYPE_CHECKING:
    from feast import FeatureStore

# Items in one read from the store
READ_ITEMS = 500
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class StoredSketch:
    """A sketch of a user's whole history.

    Args:
        as_of: time of the newest event in it, microseconds.
        num_events: how many events it knows, and `digest` which ones.
    """

    sketch: UserCounts
    as_of: int
    num_events: int = 0
    digest: int = 0


@dataclass(frozen=True)
class UserRow:
    """A user as the store knows them. `history` and `tokens` are None if there are none that can
    be used.

    `problems` says what could not be read.
    """

    columns: dict[str, Any]
    history: pa.RecordBatch | None
    problems: tuple[Degraded, ...] = ()
    # Tokens of the one version that the bundle accepts
    tokens: Envelope | None = None
    # None where there is none that can be used
    sketch: StoredSketch | None = None
    # Custom view → time of its row, µs
    known_at: Mapping[str, int] = field(default_factory=dict)

    @property
    def events_behind(self) -> int:
        """Known events that the tokens have not seen."""
        return (
            max((self.columns["history_end"] or 0) - self.tokens.num_events, 0)
            if self.tokens
            else 0
        )

    @property
    def tokens_know_another_history(self) -> bool:
        """True if the events behind the tokens are not the stored history: a past event was
        corrected since.

        As many events with a different digest are; so are more events than there are, if none is
        newer than the newest that is known. Fewer are stale in any case, and more with a newer one
        are ahead of statistics that lag.
        """
        end = self.columns["history_end"]
        digest = self.columns["history_digest"]
        if self.tokens is None or end is None:
            return False
        if self.tokens.num_events == end:
            return bool(self.tokens.digest != digest)
        if self.history is None or not self.history.num_rows:
            return False
        newest = self.history[EVENT_TIMESTAMP][-1].cast(pa.int64()).as_py()
        return bool(self.tokens.num_events > end and self.tokens.as_of <= newest)


def as_known(contract: Contract, user: UserRow, at: int) -> UserRow:
    """A user as training joins them at a moment, microseconds: nothing of a custom view's row that is yet
    to come, or that is older than the view keeps values. (Online is one row; where training would find
    an older one, nothing is found.)
    """
    lacking = [
        column.name
        for view in contract.spec.views
        if view.entity == "user" and not _holds(view, user.known_at.get(view.name), at)
        for column in view.columns
    ]
    if all(user.columns.get(name) is None for name in lacking):
        return user
    return replace(user, columns={**user.columns, **dict.fromkeys(lacking)})


def _holds(view: OwnView, known: int | None, at: int) -> bool:
    """Return whether a row of a custom view is known at a moment, and not too old."""
    if known is None:
        # Nothing says when it was written
        return True
    oldest = at - int(view.ttl_days * 86_400_000_000) if view.ttl_days else known
    return oldest <= known <= at


class Reader(Protocol):
    """Reads the online store."""

    def read_user(self, user_id: Id) -> UserRow:
        """One user's features and history."""

    def read_items(self, item_ids: Sequence[Id]) -> pa.Table:
        """Item features, a row for each id; nulls where the store has none."""


class UserDecoder:
    """Stored values of a user, however they were read, as a `UserRow`.

    Args:
        token_version: the only version of summary tokens that ever comes out.
    """

    def __init__(self, contract: Contract, token_version: str | None) -> None:
        self.contract = contract
        self.token_version = token_version
        self._layout = Layout.of(contract)

    def row(self, user_id: Id, values: Mapping[str, Any]) -> UserRow:
        """Decode the stored values of a user.

        Args:
            values: by feature name; None where the store has no value.
        """
        row = self._row(user_id, values)
        known = {
            view: values[time_of(view)]
            for view in self.contract.views_of("user")
            if values.get(time_of(view)) is not None
        }
        return replace(row, known_at=known) if known else row

    def _row(self, user_id: Id, values: Mapping[str, Any]) -> UserRow:
        tokens, problems = self._tokens(user_id, values.get("tokens"))
        columns = {c.name: values[c.name] for c in self.contract.user_columns}
        packed = values["history"]
        if packed is None:
            # No event is stored: a past that is known to be empty.
            nothing = StoredSketch(UserCounts(self._layout), -1)
            if tokens is None and all(value is None for value in columns.values()):
                # An unknown user has no tokens either, which need not be said twice.
                return UserRow(
                    columns,
                    None,
                    (Degraded.UNKNOWN_USER, *(p for p in problems if p is not Degraded.NO_TOKENS)),
                    sketch=nothing,
                )
            return UserRow(columns, None, (Degraded.NO_HISTORY, *problems), tokens, nothing)
        sketch, unread = self._sketch(user_id, values["sketch"])
        if past_was_lost(packed, values["sketch"], columns["history_end"]):
            unread = (Degraded.HISTORY_INCOMPLETE,)
        problems = (*problems, *unread)
        if sketch is not None and _is_mixed(columns, sketch):
            problems = (*problems, Degraded.MIXED_HISTORY)
        try:
            history = unpack(self.contract, user_id, packed)
        except HistoryError:
            problems = (Degraded.HISTORY_UNREADABLE, *problems)
            return UserRow(columns, None, problems, tokens, sketch)
        return UserRow(columns, history, problems, tokens, sketch)

    def _sketch(
        self, user_id: Id, stored: bytes | None
    ) -> tuple[StoredSketch | None, tuple[Degraded, ...]]:
        """The sketch of the user's whole history, if it is whole and as the contract declares."""
        if stored is None:
            return None, (Degraded.NO_SKETCH,)
        try:
            sketch, identity = counts_of(self._layout, stored, user_id)
        except SketchError as error:
            logger.warning("a sketch could not be read; the ranker does without: %s", error)
            return None, (Degraded.SKETCH_UNREADABLE,)
        return StoredSketch(sketch, identity.as_of, identity.num_events, identity.digest), ()

    def _tokens(
        self, user_id: Id, stored: bytes | None
    ) -> tuple[Envelope | None, tuple[Degraded, ...]]:
        """The user's tokens, if they are whole and of the version that is accepted; or why there
        are none.
        """
        if self.token_version is None:
            return None, ()
        if stored is None:
            return None, (Degraded.NO_TOKENS,)
        try:
            found = from_bytes(stored, user_id)
        except EnvelopeError as error:
            logger.warning("summary tokens could not be read; the ranker does without: %s", error)
            return None, (Degraded.TOKENS_UNREADABLE,)
        if found.fingerprint != self.token_version:
            return None, (Degraded.TOKENS_MISMATCHED,)
        return (None, (Degraded.NO_TOKENS,)) if found.tombstone else (found, ())


def time_of(view: str) -> str:
    """Under which name the time of a custom view's row stands among a user's values."""
    return f"_ts:{view}"


def _micros_of(seconds: int | None) -> int | None:
    """Return a time of Feast's answers in microseconds; None without a time."""
    return seconds * 1_000_000 if seconds else None


def _without_expired(view: OwnView, values: dict[str, list[Any]], now: datetime) -> None:
    """Take out, in place, what items' rows of a custom view say that is too old or yet to come."""
    at = (now - EPOCH) // timedelta(microseconds=1)
    times = values[f"{view.columns[0].name}__ts"]
    for row, seconds in enumerate(times):
        if not _holds(view, _micros_of(seconds), at):
            for column in view.columns:
                values[column.name][row] = None


def _is_mixed(columns: Mapping[str, Any], sketch: StoredSketch) -> bool:
    """Return whether the sketch, which is written with the history, knows other events than the statistics."""
    end = columns["history_end"]
    digest = columns["history_digest"]
    return end is not None and (end, digest) != (sketch.num_events, sketch.digest)


class FeastReader:
    """Reads through Feast's SDK: any online store that Feast has.

    Args:
        token_version: the only version of summary tokens that is ever returned.
        now: as of when items' rows of custom views are known and not too old.
    """

    def __init__(
        self,
        store: FeatureStore,
        contract: Contract,
        online_service: str,
        token_version: str | None = None,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self.contract = contract
        self.token_version = token_version
        self._now = now
        self._decoder = UserDecoder(contract, token_version)
        self._store = store
        self._service = store.get_feature_service(online_service)
        self._item_refs = [f"{view}:{column.name}" for view, column in item_columns(contract)]
        # One connection of an embedded store is not for several threads.
        self._lock = threading.Lock()

    def read_user(self, user_id: Id) -> UserRow:
        key = self.contract.user.join_key
        version = {} if self.token_version is None else {TOKEN_VERSION.join_key: self.token_version}
        values = self._read(self._service, [{key: user_id, **version}])
        row = {name: found[0] for name, found in values.items()}
        for view in self.contract.spec.views:
            if view.entity == "user":
                row[time_of(view.name)] = _micros_of(row[f"{view.columns[0].name}__ts"])
        return self._decoder.row(user_id, row)

    def read_items(self, item_ids: Sequence[Id]) -> pa.Table:
        """Item features, a row for each id; nulls where the store has none."""
        entity = self.contract.item
        columns = item_columns(self.contract)
        found: dict[str, list[Any]] = {column.name: [] for _, column in columns}
        for start in range(0, len(item_ids), READ_ITEMS):
            rows = [{entity.join_key: item_id} for item_id in item_ids[start : start + READ_ITEMS]]
            values = self._read(self._item_refs, rows)
            for view in self.contract.spec.views:
                if view.entity == "item":
                    _without_expired(view, values, self._now())
            for name, column in found.items():
                column += values[name]
        arrays = [pa.array(list(item_ids), arrow_type(entity.dtype))]
        arrays += [pa.array(found[column.name], arrow_type(column.dtype)) for _, column in columns]
        return pa.table(arrays, names=[entity.join_key, *found])

    def _read(self, features: Any, rows: list[dict[str, Id]]) -> dict[str, list[Any]]:
        with self._lock, self._of_one_moment():
            found = self._store.get_online_features(features=features, entity_rows=rows)
            # Times cost, and only custom views are read by them.
            return found.to_dict(True) if self.contract.spec.views else found.to_dict()

    @contextmanager
    def _of_one_moment(self) -> Iterator[None]:
        """On SQLite one transaction for all views: each is a table, and somebody may write between."""
        online = getattr(getattr(self._store, "config", None), "online_store", None)
        if getattr(online, "type", "") != "sqlite":
            yield
            return
        connection = self._store._get_provider().online_store._get_conn(self._store.config)
        connection.execute("BEGIN")
        try:
            yield
        finally:
            connection.execute("ROLLBACK")
