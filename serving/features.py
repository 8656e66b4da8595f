"""Features at request time: the user by key through Feast, items from a table in the process.

Feast's SDK takes tens of milliseconds for 500 candidates and a tenth of one for a table lookup, so
item features are loaded from the store at start, kept here, and refreshed in the background.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from feature_repo.arrow import arrow_type
from feature_repo.contract import TOKEN_VERSION, Contract
from feature_repo.envelope import Envelope, EnvelopeError, from_bytes
from feature_repo.history import HistoryError, unpack
from feature_repo.key_index import KeyIndex
from feature_repo.schema import EVENT_TIMESTAMP, Column
from feature_repo.sketch import Layout, Sketch, SketchError
from feature_repo.sketch import from_bytes as sketch_of
from serving.degraded import Degraded

if TYPE_CHECKING:
    from feast import FeatureStore

Id = int | str
READ_ITEMS = 500  # items in one read from the store
MAX_ABSENT = 100_000  # ids remembered as unknown to the store
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class StoredSketch:
    """A sketch of a user's whole history, and the time of the newest event in it, microseconds."""

    sketch: Sketch
    as_of: int


@dataclass(frozen=True)
class UserRow:
    """What the store knows of a user. `history` and `tokens` are None where there are none that can
    be used.

    `problems` says what could not be read.
    """

    columns: dict[str, Any]
    history: pa.RecordBatch | None
    problems: tuple[Degraded, ...] = ()
    tokens: Envelope | None = None  # of the one version that the bundle accepts
    sketch: StoredSketch | None = None  # None where there is none that can be used

    @property
    def events_behind(self) -> int:
        """Known events that the tokens have not seen."""
        return (
            max((self.columns["history_end"] or 0) - self.tokens.num_events, 0)
            if self.tokens
            else 0
        )

    @property
    def tokens_know_another_past(self) -> bool:
        """Whether the events behind the tokens are not those that the store knows: a past event was
        corrected since.

        As many events with another digest are; so are more events than there are, none of which is
        newer than the newest that is known. Fewer are stale in any case, and more with a newer one
        are ahead of statistics that lag.
        """
        end, digest = self.columns["history_end"], self.columns["history_digest"]
        if self.tokens is None or end is None:
            return False
        if self.tokens.num_events == end:
            return bool(self.tokens.digest != digest)
        if self.history is None or not self.history.num_rows:
            return False
        newest = self.history[EVENT_TIMESTAMP][-1].cast(pa.int64()).as_py()
        return bool(self.tokens.num_events > end and self.tokens.as_of <= newest)


class Reader(Protocol):
    """Reads the online store."""

    def read_user(self, user_id: Id) -> UserRow:
        """One user's features and history."""

    def read_items(self, item_ids: Sequence[Id]) -> pa.Table:
        """Item features, a row for each id; nulls where the store has none."""


class FeastReader:
    """Reads through Feast's SDK: any online store that Feast has.

    Args:
        token_version: of the summary tokens to read; no tokens of another are ever returned.
    """

    def __init__(
        self,
        store: FeatureStore,
        contract: Contract,
        online_service: str,
        token_version: str | None = None,
    ) -> None:
        self.contract, self.token_version = contract, token_version
        self._layout = Layout.of(contract)
        self._store, self._service = store, store.get_feature_service(online_service)
        self._item_refs = [f"{view}:{column.name}" for view, column in item_columns(contract)]
        self._lock = (
            threading.Lock()
        )  # one connection of an embedded store is not for several threads

    def read_user(self, user_id: Id) -> UserRow:
        """One user's features and history."""
        key = self.contract.user.join_key
        version = {} if self.token_version is None else {TOKEN_VERSION.join_key: self.token_version}
        values = self._read(self._service, [{key: user_id, **version}])
        tokens, problems = self._tokens(user_id, values.get("tokens", [None])[0])
        columns = {c.name: values[c.name][0] for c in self.contract.user_columns}
        packed = values["history"][0]
        if packed is None:
            # No event is stored: a past that is known to be empty.
            nothing = StoredSketch(Sketch(self._layout), -1)
            if tokens is None and all(value is None for value in columns.values()):
                return UserRow(
                    columns,
                    None,
                    (Degraded.UNKNOWN_USER, *(p for p in problems if p is not Degraded.NO_TOKENS)),
                    sketch=nothing,
                )
            return UserRow(columns, None, (Degraded.NO_HISTORY, *problems), tokens, nothing)
        sketch, unread = self._sketch(user_id, values["sketch"][0])
        problems = (*problems, *unread)
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
            sketch, identity = sketch_of(self._layout, stored, user_id)
        except SketchError:
            logger.exception("a sketch could not be read; the ranker does without")
            return None, (Degraded.SKETCH_UNREADABLE,)
        return StoredSketch(sketch, identity.as_of), ()

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
        except EnvelopeError:
            logger.exception("summary tokens could not be read; the ranker does without")
            return None, (Degraded.TOKENS_UNREADABLE,)
        if found.fingerprint != self.token_version:
            return None, (Degraded.TOKENS_MISMATCHED,)
        return (None, (Degraded.NO_TOKENS,)) if found.tombstone else (found, ())

    def read_items(self, item_ids: Sequence[Id]) -> pa.Table:
        """Item features, a row for each id; nulls where the store has none."""
        entity, columns = self.contract.item, item_columns(self.contract)
        found: dict[str, list[Any]] = {column.name: [] for _, column in columns}
        for start in range(0, len(item_ids), READ_ITEMS):
            rows = [{entity.join_key: item_id} for item_id in item_ids[start : start + READ_ITEMS]]
            values = self._read(self._item_refs, rows)
            for name, column in found.items():
                column += values[name]
        arrays = [pa.array(list(item_ids), arrow_type(entity.dtype))]
        arrays += [pa.array(found[column.name], arrow_type(column.dtype)) for _, column in columns]
        return pa.table(arrays, names=[entity.join_key, *found])

    def _read(self, features: Any, rows: list[dict[str, Id]]) -> dict[str, list[Any]]:
        with self._lock:
            return self._store.get_online_features(features=features, entity_rows=rows).to_dict()


def item_columns(contract: Contract) -> list[tuple[str, Column]]:
    """Every item feature with its view."""
    return [
        (view, column)
        for view in ("item_profile", "item_stats", *contract.views_of("item"))
        for column in contract.table(view).columns
    ]


@dataclass(frozen=True)
class ItemRows:
    """Item features by place, and the place of each item."""

    index: KeyIndex
    columns: dict[str, pa.Array]


@dataclass(frozen=True)
class Taken:
    """Features of some items in order, nulls for unknown ones.

    Args:
        unknown: items that neither table nor store knows.
        reached: whether the store could be read where it had to be.
    """

    columns: dict[str, pa.Array]
    unknown: list[Id]
    reached: bool


def _either(base: pa.Array, places: np.ndarray, added: pa.Array, later: np.ndarray) -> pa.Array:
    """Values of the base where a place is known there, else of what was added, else null."""
    taken = base.take(pa.array(places, mask=places < 0))
    if not (later >= 0).any():
        return taken
    return pc.if_else(pa.array(places >= 0), taken, added.take(pa.array(later, mask=later < 0)))


class ItemTable:
    """Item features in the process. Lookups never wait for a refresh; an item that it lacks is
    looked up in the store.

    Args:
        reader: where rows come from.
        item_ids: what to load at start.
        refresh_s: seconds between refreshes; 0 for none.
    """

    def __init__(
        self, reader: Reader, contract: Contract, item_ids: Iterable[Id], refresh_s: float = 0.0
    ) -> None:
        self._reader, self._contract = reader, contract
        self._names = [column.name for _, column in item_columns(contract)]
        self._lock, self._stop = threading.Lock(), threading.Event()
        self._absent: set[Id] = set()
        self._base = self._load(list(item_ids))
        self._added = (
            self._nothing()
        )  # what was looked up since; small, so that a new id copies no more than that
        if refresh_s > 0:
            threading.Thread(
                target=self._refresh_for_ever, args=(refresh_s,), daemon=True, name="item-refresh"
            ).start()

    def __len__(self) -> int:
        return len(self._base.index) + len(self._added.index)

    def take(self, item_ids: Sequence[Id]) -> Taken:
        """Columns for these items in order, nulls for unknown ones; the unknown ones; whether the
        store could be read.

        Items that the table lacks are looked up in the store; what the store lacks too is
        remembered until the next refresh, so that made-up ids cost one read.
        """
        ids, reached = pa.array(list(item_ids), arrow_type(self._contract.item.dtype)), True
        with self._lock:
            base, added = self._base, self._added
        places, later = base.index.places(ids), added.index.places(ids)
        lacking = np.flatnonzero((places < 0) & (later < 0)).tolist()
        missing = list(
            dict.fromkeys(item_ids[at] for at in lacking if item_ids[at] not in self._absent)
        )
        if missing:
            try:
                added = self._add(missing)
                later = added.index.places(ids)
            except Exception:
                logger.exception(
                    "the online store could not be read; unseen items are ranked without features"
                )
                reached = False
        columns = {
            name: _either(base.columns[name], places, added.columns[name], later)
            for name in self._names
        }
        unknown = list(
            dict.fromkeys(
                item_ids[at] for at in np.flatnonzero((places < 0) & (later < 0)).tolist()
            )
        )
        return Taken(columns, unknown, reached)

    def refresh(self) -> None:
        """Read every known item again and swap the table."""
        with self._lock:
            known = self._base.index.keys.to_pylist() + self._added.index.keys.to_pylist()
        rows = self._load(known)
        if known and not len(rows.index):
            raise LookupError(
                f"the store has lost all of {len(known):,} items: materialize again; the last features stay in use"
            )
        with self._lock:
            self._base, self._added, self._absent = rows, self._nothing(), set()

    def close(self) -> None:
        """Stop refreshing."""
        self._stop.set()

    def _add(self, item_ids: list[Id]) -> ItemRows:
        """Look items up, and keep those that the store has. Returns all that were added so far."""
        rows = self._load(item_ids)
        with self._lock:
            if len(self._absent) < MAX_ABSENT:
                self._absent |= set(item_ids) - set(rows.index.keys.to_pylist())
            # Another thread may have looked up the same ids meanwhile.
            new = pa.array(np.flatnonzero(self._added.index.places(rows.index.keys) < 0))
            if len(new):
                keys = pa.concat_arrays([self._added.index.keys, rows.index.keys.take(new)])
                columns = {
                    name: pa.concat_arrays(
                        [self._added.columns[name], rows.columns[name].take(new)]
                    )
                    for name in self._names
                }
                self._added = ItemRows(KeyIndex(keys), columns)
            return self._added

    def _nothing(self) -> ItemRows:
        columns = {
            column.name: pa.array([], arrow_type(column.dtype))
            for _, column in item_columns(self._contract)
        }
        return ItemRows(KeyIndex(pa.array([], arrow_type(self._contract.item.dtype))), columns)

    def _load(self, item_ids: list[Id]) -> ItemRows:
        """Rows of those items of which the store has anything."""
        read = self._reader.read_items(item_ids)
        known = pa.array(np.zeros(read.num_rows, bool))
        for name in self._names:
            known = pc.or_(known, read[name].combine_chunks().is_valid())
        read = read.filter(known).combine_chunks()
        columns = {name: read[name].combine_chunks() for name in self._names}
        return ItemRows(KeyIndex(read[self._contract.item.join_key].combine_chunks()), columns)

    def _refresh_for_ever(self, seconds: float) -> None:
        while not self._stop.wait(seconds):
            try:
                self.refresh()
            except Exception:
                logger.exception("item features could not be refreshed; the last ones stay in use")
