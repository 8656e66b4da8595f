"""A user's record in the online store: read at one moment, and replaced as a whole
only if nothing of it has changed since.

A process that adds an event reads the record, computes what follows, and swaps. Where somebody else was
first the swap says so, and the reader begins again from what is there now; so any number of processes
may take events of one user, none is lost, and no reader sees a history beside statistics
of a different moment. The comparison is by content: a writer that keeps no version (a job, `feast
materialize`) is noticed as well.

Layout (Feast 0.67): on Redis a user's views share one hash, and summary tokens have one of their own
for each version; on SQLite each view is a table of (entity key, feature) rows.
"""

from __future__ import annotations

import hashlib
import sqlite3
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import pyarrow as pa

from feature_repo.contract.arrow import EPOCH, NO_VALUE, arrow_schema
from feature_repo.contract.contract import TOKEN_VERSION, Contract
from feature_repo.contract.schema import CREATED_TIMESTAMP, EVENT_TIMESTAMP
from feature_repo.store.online_rows import write_rows
from feature_repo.store.redis_writer import expire

if TYPE_CHECKING:
    from feast import FeatureStore, FeatureView

HISTORY = "user_history"
STATS = "user_stats"
TOKENS = "summary_tokens"
# (view, feature) → the value as it is stored
Raw = dict[tuple[str, str], bytes | None]

# KEYS: hashes. ARGV for each: how many fields are compared, each with the SHA-1 of what it held ("" of
# nothing); how many parts are set, field and value in turn. All or nothing.
SWAP = """
local at, sets = 1, {}
for k = 1, #KEYS do
  local compared = tonumber(ARGV[at])
  at = at + 1
  for _ = 1, compared do
    local stored = redis.call('HGET', KEYS[k], ARGV[at])
    if (stored and redis.sha1hex(stored) or '') ~= ARGV[at + 1] then return 0 end
    at = at + 2
  end
  local number = tonumber(ARGV[at])
  sets[k] = {at + 1, at + number}
  at = at + 1 + number
end
for k, range in ipairs(sets) do
  if range[2] >= range[1] then redis.call('HSET', KEYS[k], unpack(ARGV, range[1], range[2])) end
end
return 1
"""


@dataclass(frozen=True)
class NewRow:
    """A user's row of one view that replaces the stored one.

    Args:
        values: of every feature of the view.
        known: since when, microseconds since 1970.
    """

    values: Mapping[str, Any]
    known: int


@dataclass(frozen=True)
class UserRecord:
    """A user's stored features as they were at one moment.

    Args:
        views: each view's features, None where there is no value.
        raw: the same as it is stored; empty where the store cannot compare.
    """

    user_id: int | str
    views: Mapping[str, Mapping[str, Any]]
    raw: Raw

    def __getitem__(self, view: str) -> Mapping[str, Any]:
        return self.views[view]


class UserRecords(Protocol):
    """Records of users in an online store.

    Example:
        >>> records = user_records(store, contract, token_version=None)
        >>> seen = records.read(12680)
        >>> records.swap(seen, {"user_stats": NewRow({**seen["user_stats"], "history_end": 7}, now)})
        True
    """

    def read(self, user_id: int | str) -> UserRecord:
        """All that is stored of a user, of one moment."""

    def swap(self, seen: UserRecord, rows: Mapping[str, NewRow]) -> bool:
        """Replace rows of a user by view, all or none. False: what is stored is no longer `seen`."""

    def close(self) -> None:
        """Let go of connections."""


def user_records(store: FeatureStore, contract: Contract, token_version: str | None) -> UserRecords:
    """Records of users in a store of Feast's.

    Args:
        token_version: of the summary tokens that belong to the record; None: none do.
    """
    definitions = _Definitions(store, contract, token_version)
    kind = store.config.online_store.type
    if kind.startswith("redis"):
        return _RedisRecords(store, definitions)
    if kind == "sqlite":
        return _SqliteRecords(store, definitions)
    return _FeastRecords(store, definitions)


class _Definitions:
    """Views of a user and their keys, read once: no event waits for the registry."""

    def __init__(self, store: FeatureStore, contract: Contract, token_version: str | None) -> None:
        self.contract = contract
        self.token_version = token_version
        names = [HISTORY, STATS] if token_version is None else [HISTORY, STATS, TOKENS]
        self.views: dict[str, FeatureView] = {name: store.get_feature_view(name) for name in names}
        self.kinds = {
            (view, feature.name): feature.dtype.to_value_type()
            for view, definition in self.views.items()
            for feature in definition.features
        }

    def features(self, view: str) -> list[str]:
        return [feature.name for feature in self.views[view].features]

    def key(self, view: str, user_id: int | str) -> Any:
        """A user's entity key in a view."""
        from feast.protos.feast.types.EntityKey_pb2 import EntityKey
        from feast.type_map import python_values_to_proto_values

        columns = {c.name: c.dtype.to_value_type() for c in self.views[view].entity_columns}
        given = {self.contract.user.join_key: user_id, TOKEN_VERSION.join_key: self.token_version}
        names = sorted(columns)
        values = [python_values_to_proto_values([given[n]], columns[n])[0] for n in names]
        return EntityKey(join_keys=names, entity_values=values)

    def protos(self, view: str, row: NewRow) -> dict[str, Any]:
        """A row's values as Feast stores them."""
        from feast.type_map import python_values_to_proto_values

        wanted = self.features(view)
        if set(row.values) != set(wanted):
            raise ValueError(f"expected the features {wanted} of {view}, got {sorted(row.values)}")
        return {
            name: python_values_to_proto_values([row.values[name]], self.kinds[view, name])[0]
            for name in wanted
        }

    def record(self, user_id: int | str, raw: Raw) -> UserRecord:
        from feast.protos.feast.types.Value_pb2 import Value

        views: dict[str, dict[str, Any]] = {view: {} for view in self.views}
        for (view, name), data in raw.items():
            views[view][name] = plain_value(Value.FromString(data)) if data else None
        return UserRecord(user_id, views, raw)


class _RedisRecords:
    """Records on Redis: one script compares and sets, on the server."""

    def __init__(self, store: FeatureStore, definitions: _Definitions) -> None:
        from feast.infra.online_stores.helpers import _mmh3
        from feast.infra.online_stores.redis import RedisOnlineStore

        config = store.config
        self._definitions = definitions
        self._project = config.project
        self._version = config.entity_key_serialization_version
        self._fields = {pair: _mmh3(f"{pair[0]}:{pair[1]}") for pair in definitions.kinds}
        self._online = config.online_store
        self._client = RedisOnlineStore()._get_client(config.online_store)
        self._script = self._client.register_script(SWAP)
        # One transaction of a cluster has one slot: there each hash is compared and set alone.
        self._apart = config.online_store.redis_type.value == "redis_cluster"

    def read(self, user_id: int | str) -> UserRecord:
        hashes = self._hashes(user_id)
        with self._client.pipeline(transaction=not self._apart) as pipe:
            for key, views in hashes.items():
                pipe.hmget(key, [self._fields[pair] for pair in self._pairs(views)])
            found = pipe.execute()
        raw: Raw = {}
        for views, values in zip(hashes.values(), found, strict=True):
            raw |= dict(zip(self._pairs(views), values, strict=True))
        return self._definitions.record(user_id, raw)

    def swap(self, seen: UserRecord, rows: Mapping[str, NewRow]) -> bool:
        from google.protobuf.timestamp_pb2 import Timestamp

        # 1. Collect for each hash what it must still hold, and what is to be set.
        keys: list[bytes] = []
        calls: list[list[Any]] = []
        for key, views in self._hashes(seen.user_id).items():
            compared: list[Any] = []
            for pair in self._pairs(views):
                held = seen.raw[pair]
                # A digest stands for the value: a history has many kilobytes.
                digest = (
                    "" if held is None else hashlib.sha1(held, usedforsecurity=False).hexdigest()
                )
                compared += [self._fields[pair], digest]
            parts: list[Any] = []
            for view in views:
                if view not in rows:
                    continue
                for name, value in self._definitions.protos(view, rows[view]).items():
                    parts += [self._fields[view, name], value.SerializeToString()]
                seconds, micros = divmod(rows[view].known, 1_000_000)
                stamp = Timestamp(seconds=seconds, nanos=1000 * micros).SerializeToString()
                parts += [f"_ts:{view}", stamp]
            keys.append(key)
            calls.append([len(compared) // 2, *compared, len(parts), *parts])
        # 2. Compare and set, in one script wherever one server has all hashes.
        if self._apart:
            # The history first: tokens that lag are named by answers, and go on from their state.
            each = zip(keys, calls, strict=True)
            swapped = all(self._script(keys=[key], args=call) for key, call in each)
        else:
            parts = [part for call in calls for part in call]
            swapped = bool(self._script(keys=keys, args=parts))
        if swapped:
            expire(self._client, self._online, keys)
        return swapped

    def close(self) -> None:
        self._client.close()

    def _pairs(self, views: list[str]) -> list[tuple[str, str]]:
        return [(view, name) for view in views for name in self._definitions.features(view)]

    def _hashes(self, user_id: int | str) -> dict[bytes, list[str]]:
        """Keys of the user's hashes, each with the views that share it."""
        from feast.infra.online_stores.helpers import _redis_key

        found: dict[bytes, list[str]] = {}
        for view in self._definitions.views:
            entity = self._definitions.key(view, user_id)
            key = _redis_key(self._project, entity, entity_key_serialization_version=self._version)
            found.setdefault(key, []).append(view)
        return found


class _SqliteRecords:
    """Records on SQLite: one transaction reads again, compares, and writes every view."""

    # How long a writer waits for another
    BUSY_S = 5.0

    def __init__(self, store: FeatureStore, definitions: _Definitions) -> None:
        from feast.infra.online_stores.helpers import compute_table_id

        config = store.config
        self._definitions = definitions
        self._version = config.entity_key_serialization_version
        self._tables = {
            view: compute_table_id(config.project, definition).replace('"', '""')
            for view, definition in definitions.views.items()
        }
        self._connection = sqlite3.connect(
            Path(config.repo_path or ".", config.online_store.path),
            timeout=self.BUSY_S,
            isolation_level=None,
            check_same_thread=False,
        )
        # It is made in one thread and used in another, by one at a time.
        self._lock = threading.Lock()

    def read(self, user_id: int | str) -> UserRecord:
        with self._lock:
            self._connection.execute("BEGIN")
            try:
                raw = self._raw(user_id)
            finally:
                self._connection.execute("COMMIT")
        return self._definitions.record(user_id, raw)

    def swap(self, seen: UserRecord, rows: Mapping[str, NewRow]) -> bool:
        with self._lock:
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                same = self._raw(seen.user_id) == seen.raw
                if same:
                    self._write(seen.user_id, rows)
                self._connection.execute("COMMIT")
            except BaseException:
                self._connection.execute("ROLLBACK")
                raise
        return same

    def close(self) -> None:
        self._connection.close()

    def _raw(self, user_id: int | str) -> Raw:
        found: Raw = {}
        for view, table in self._tables.items():
            stored = dict(
                self._connection.execute(
                    f'SELECT feature_name, value FROM "{table}" WHERE entity_key = ?',
                    (self._key(view, user_id),),
                )
            )
            found |= {(view, n): stored.get(n) for n in self._definitions.features(view)}
        return found

    def _write(self, user_id: int | str, rows: Mapping[str, NewRow]) -> None:
        """Rows as Feast writes them, its times in whole seconds."""
        for view, row in rows.items():
            key = self._key(view, user_id)
            seconds = row.known // 1_000_000
            for name, value in self._definitions.protos(view, row).items():
                _upsert(self._connection, self._tables[view], key, name, value, seconds)

    def _key(self, view: str, user_id: int | str) -> bytes:
        from feast.infra.key_encoding_utils import serialize_entity_key

        entity = self._definitions.key(view, user_id)
        key: bytes = serialize_entity_key(entity, entity_key_serialization_version=self._version)
        return key


def upsert_sqlite(
    connection: sqlite3.Connection,
    config: Any,
    view: FeatureView,
    rows: Any,
    *,
    later: bool = False,
) -> None:
    """Write rows of a view as Feast hands them on, in one transaction; one that is older than what is
    stored, by whole seconds, changes nothing.

    Args:
        later: nor does one of the same second.
    """
    from feast.infra.key_encoding_utils import serialize_entity_key
    from feast.infra.online_stores.helpers import compute_table_id

    table = compute_table_id(config.project, view).replace('"', '""')
    version = config.entity_key_serialization_version
    with connection:
        for entity, values, at, _ in rows:
            key = serialize_entity_key(entity, entity_key_serialization_version=version)
            seconds = int((at if at.tzinfo else at.replace(tzinfo=UTC)).timestamp())
            for name, value in values.items():
                _upsert(
                    connection, table, key, name, value, seconds, replaces=">" if later else ">="
                )


def _upsert(
    connection: sqlite3.Connection,
    table: str,
    key: bytes,
    name: str,
    value: Any,
    seconds: int,
    *,
    replaces: str = "",
) -> None:
    """A feature's value as Feast writes it, its time in whole seconds.

    Args:
        replaces: how the new time must compare to the stored one; "": whatever it is.
    """
    from feast.infra.online_stores.helpers import extract_text_and_num

    text, _ = extract_text_and_num(value, False)
    condition = f' WHERE excluded.event_ts {replaces} "{table}".event_ts' if replaces else ""
    connection.execute(
        f'INSERT INTO "{table}" (entity_key, feature_name, value, value_text, event_ts, created_ts) '
        "VALUES (?, ?, ?, ?, ?, ?) ON CONFLICT (entity_key, feature_name) DO UPDATE SET "
        "value = excluded.value, value_text = excluded.value_text, "
        f"event_ts = excluded.event_ts, created_ts = excluded.created_ts{condition}",
        (key, name, value.SerializeToString(), text, seconds, seconds),
    )


class _FeastRecords:
    """Records of any other store of Feast's, which can neither compare nor write several views at once:
    let one process take events there.
    """

    def __init__(self, store: FeatureStore, definitions: _Definitions) -> None:
        self._store = store
        self._definitions = definitions

    def read(self, user_id: int | str) -> UserRecord:
        definitions = self._definitions
        asked = {definitions.contract.user.join_key: user_id}
        if definitions.token_version is not None:
            asked[TOKEN_VERSION.join_key] = definitions.token_version
        refs = [f"{view}:{name}" for view, name in definitions.kinds]
        found = self._store.get_online_features(refs, [asked]).to_dict()
        views = {
            view: {name: found[name][0] for name in definitions.features(view)}
            for view in definitions.views
        }
        return UserRecord(user_id, views, {})

    def swap(self, seen: UserRecord, rows: Mapping[str, NewRow]) -> bool:
        definitions = self._definitions
        for view, row in rows.items():
            stamp = EPOCH + timedelta(microseconds=row.known)
            stamps = {EVENT_TIMESTAMP: stamp, CREATED_TIMESTAMP: stamp}
            keys = {definitions.contract.user.join_key: seen.user_id}
            if view == TOKENS:
                keys[TOKEN_VERSION.join_key] = definitions.token_version or ""
            schema = arrow_schema(definitions.contract.table(view))
            table = pa.Table.from_pylist([{**keys, **row.values, **stamps}], schema=schema)
            write_rows(self._store, view, table, definitions.views[view])
        return True

    def close(self) -> None:
        """Its connections are the store's."""


def plain_value(value: Any) -> Any:
    """A Value of Feast's as Python has it, as Feast's own answers do; None where it holds none."""
    kind = value.WhichOneof("val")
    if kind is None or kind == "null_val":
        return None
    found = getattr(value, kind)
    if kind.endswith("_list_val"):
        return list(found.val)
    if kind == "unix_timestamp_val":
        # Feast writes a time that is missing as NumPy's NaT.
        return None if found == NO_VALUE else EPOCH + timedelta(seconds=found)
    return found
