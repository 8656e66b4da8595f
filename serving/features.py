"""Features at request time: the user by key through Feast, items from a table in the process.

Feast's SDK takes tens of milliseconds for 500 candidates and a tenth of one for a table lookup, so item features are
loaded from the store at start, kept here, and refreshed in the background.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import pyarrow as pa

from feature_repo.arrow import arrow_type
from feature_repo.envelope import Envelope, EnvelopeError, decode
from feature_repo.history import HistoryError, unpack
from feature_repo.schema import TOKEN_VERSION, Column, Contract

if TYPE_CHECKING:
    from feast import FeatureStore

Id = int | str
READ_ITEMS = 500  # items in one read from the store
MAX_ABSENT = 100_000  # ids remembered as unknown to the store
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class UserRow:
    """What the store knows of a user. `history` and `tokens` are None where there are none that can be used.

    `problems` says what could not be read.
    """

    columns: dict[str, Any]
    history: pa.RecordBatch | None
    problems: tuple[str, ...] = ()
    tokens: Envelope | None = None  # of the one version that the bundle accepts

    @property
    def events_behind(self) -> int:
        """Known events that the tokens have not seen."""
        return max((self.columns["history_end"] or 0) - self.tokens.num_events, 0) if self.tokens else 0


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
        self, store: FeatureStore, contract: Contract, online_service: str, token_version: str | None = None
    ) -> None:
        self.contract, self.token_version = contract, token_version
        self._store, self._service = store, store.get_feature_service(online_service)
        self._item_refs = [f"{view}:{column.name}" for view, column in item_columns(contract)]
        self._lock = threading.Lock()  # one connection of an embedded store is not for several threads

    def read_user(self, user_id: Id) -> UserRow:
        """One user's features and history."""
        key = self.contract.user.join_key
        version = {} if self.token_version is None else {TOKEN_VERSION.join_key: self.token_version}
        values = self._read(self._service, [{key: user_id, **version}])
        tokens, problems = self._tokens(user_id, values.get("tokens", [None])[0])
        columns = {c.name: values[c.name][0] for c in self.contract.user_columns}
        packed = values["history"][0]
        if packed is None:
            if tokens is None and all(value is None for value in columns.values()):
                return UserRow(columns, None, ("unknown_user", *(p for p in problems if p != "no_tokens")))
            return UserRow(columns, None, ("no_history", *problems), tokens)
        try:
            return UserRow(columns, unpack(self.contract, user_id, packed), problems, tokens)
        except HistoryError:
            return UserRow(columns, None, ("history_unreadable", *problems), tokens)

    def _tokens(self, user_id: Id, stored: bytes | None) -> tuple[Envelope | None, tuple[str, ...]]:
        """The user's tokens, if they are whole and of the version that is accepted; or why there are none."""
        if self.token_version is None:
            return None, ()
        if stored is None:
            return None, ("no_tokens",)
        try:
            found = decode(stored, user_id)
        except EnvelopeError:
            logger.exception("summary tokens could not be read; the ranker does without")
            return None, ("tokens_unreadable",)
        if found.fingerprint != self.token_version:
            return None, ("tokens_mismatched",)
        return (None, ("no_tokens",)) if found.tombstone else (found, ())

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
    return [(view, column) for view in ("item_profile", "item_stats") for column in contract.table(view).columns]


class ItemTable:
    """Item features in the process. Lookups never wait for a refresh; an item that it lacks is looked up in the store.

    Args:
        reader: where rows come from.
        item_ids: what to load at start.
        refresh_s: seconds between refreshes; 0 for none.
    """

    def __init__(self, reader: Reader, contract: Contract, item_ids: Iterable[Id], refresh_s: float = 0.0) -> None:
        self._reader, self._contract = reader, contract
        self._names = [column.name for _, column in item_columns(contract)]
        self._lock, self._stop = threading.Lock(), threading.Event()
        self._absent: set[Id] = set()
        self._rows, self._index = self._load(list(item_ids))
        if refresh_s > 0:
            threading.Thread(target=self._refresh_for_ever, args=(refresh_s,), daemon=True, name="item-refresh").start()

    def __len__(self) -> int:
        return len(self._index)

    def take(self, item_ids: Sequence[Id]) -> tuple[dict[str, pa.Array], list[Id], bool]:
        """Columns for these items in order, nulls for unknown ones; the unknown ones; whether the store could be read.

        Items that the table lacks are looked up in the store; what the store lacks too is remembered until the next
        refresh, so that made-up ids cost one read.
        """
        wanted, reached = list(dict.fromkeys(item_ids)), True
        missing = [item_id for item_id in wanted if item_id not in self._index and item_id not in self._absent]
        if missing:
            try:
                self._add(missing)
            except Exception:
                logger.exception("the online store could not be read; unseen items are ranked without features")
                reached = False
        with self._lock:
            rows, index = self._rows, self._index
        places = pa.array([index.get(item_id) for item_id in item_ids], pa.int64())
        columns = {name: rows[name].take(places) for name in self._names}
        return columns, [item_id for item_id in wanted if item_id not in index], reached

    def refresh(self) -> None:
        """Read every known item again and swap the table."""
        known = list(self._index)
        rows, index = self._load(known)
        if known and not index:
            raise LookupError(
                f"the store has lost all of {len(known):,} items: materialize again; the last features stay in use"
            )
        with self._lock:
            self._rows, self._index, self._absent = rows, index, set()

    def close(self) -> None:
        """Stop refreshing."""
        self._stop.set()

    def _add(self, item_ids: list[Id]) -> None:
        rows, index = self._load(item_ids)
        with self._lock:
            if len(self._absent) < MAX_ABSENT:
                self._absent |= set(item_ids) - set(index)
            if index:
                start = len(self._rows[self._names[0]])
                self._rows = {name: pa.concat_arrays([self._rows[name], rows[name]]) for name in self._names}
                self._index = self._index | {item_id: start + place for item_id, place in index.items()}

    def _load(self, item_ids: list[Id]) -> tuple[dict[str, pa.Array], dict[Id, int]]:
        read = self._reader.read_items(item_ids)
        known = pa.array(
            [any(value is not None for value in row.values()) for row in read.select(self._names).to_pylist()],
            pa.bool_(),
        )
        read = read.filter(known).combine_chunks()
        ids = read[self._contract.item.join_key].to_pylist()
        return {name: read[name].combine_chunks() for name in self._names}, {
            item_id: place for place, item_id in enumerate(ids)
        }

    def _refresh_for_ever(self, seconds: float) -> None:
        while not self._stop.wait(seconds):
            try:
                self.refresh()
            except Exception:
                logger.exception("item features could not be refreshed; the last ones stay in use")
