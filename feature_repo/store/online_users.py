"""A user's record in the online store: read at one moment, and replaced as a whole
only if nothing of it has changed since.

A process that adds an event reads the record, computes what follows, and swaps. Where somebody else was
first the swap says so, and the reader begins again from what is there now; so any number of processes
may take events of one user, none is lost, and no reader sees a history beside statistics
of a different moment. The comparison is by content: a writer that keeps no version (`feast materialize`) is
noticed as well. The events themselves enter the log of what is acknowledged (`event_log.py`) in the same
transaction.

A job, which knows many users as of some time, replaces their records together. It says up to which entry of the log
each of its rows knows; where another entry has come meanwhile the record stays, and the job adds that one first.

Layout (Feast 0.67): on Redis a user's views share one hash, and summary tokens have one of their own
for each version; on SQLite each view is a table of (entity key, feature) rows.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import numpy as np
import pyarrow as pa

from feature_repo.contract.arrow import EPOCH, NO_VALUE, arrow_schema, from_micros
from feature_repo.contract.contract import TOKEN_VERSION, Contract
from feature_repo.home.redis_client import client_of, is_cluster, slot_of
from feature_repo.store.event_log import (
    LAST,
    Entry,
    LogKeys,
    SqliteEventLog,
    UserId,
    append_sqlite,
    entries_of,
    has_log,
    last_of_sqlite,
)
from feature_repo.store.online_rows import write_rows
from feature_repo.store.redis_writer import expire, key_of_user, queue_script

if TYPE_CHECKING:
    from feast import FeatureStore, FeatureView

HISTORY = "user_history"
STATS = "user_stats"
TOKENS = "summary_tokens"
# Kinds of Feast's values that Python has as they are, and lists of these
PLAIN_KINDS = frozenset(
    f"{kind}_val" for kind in ("int32", "int64", "double", "float", "bool", "string", "bytes")
)
PLAIN_LISTS = frozenset(kind.replace("_val", "_list_val") for kind in PLAIN_KINDS)
# (view, feature) → the value as it is stored
Raw = dict[tuple[str, str], bytes | None]

# KEYS: hashes, the user's own first; with new events also the stream and the set of users of the log. ARGV: how
# many hashes, how many events, the user, number and text of each event; then for each hash: how many fields are
# compared, each with the SHA-1 of what it held ("" of nothing); how many parts are set, field and value in turn. All
# or nothing.
SWAP = """
local hashes, events = tonumber(ARGV[1]), tonumber(ARGV[2])
local at, sets = 4 + 2 * events, {}
for k = 1, hashes do
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
-- The log first: it refuses a number that is not larger than its last, and then nothing has changed.
if events > 0 then
  for n = 4, 2 + 2 * events, 2 do
    redis.call('XADD', KEYS[hashes + 1], ARGV[n] .. '-0', 'event', ARGV[n + 1])
  end
  redis.call('SADD', KEYS[hashes + 2], ARGV[3])
  redis.call('HSET', KEYS[1], '_logged', ARGV[2 + 2 * events])
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
class ManyRows:
    """Rows of many users that replace the stored ones.

    Args:
        users: their ids.
        views: a row for each user by view, all features of the view.
        known: since when, microseconds.
    """

    users: Sequence[UserId]
    views: Mapping[str, pa.Table]
    known: np.ndarray


@dataclass(frozen=True)
class Logged:
    """What the log holds of a user.

    Args:
        last: the number of the last entry there was, as the record has it; 0 of a user without any.
        entries: that are still there, in order.
    """

    last: int
    entries: tuple[Entry, ...] = ()


@dataclass(frozen=True)
class UserRecord:
    """A user's stored features as they were at one moment.

    Args:
        views: each view's features, None where there is no value.
        raw: the same as it is stored; empty where the store cannot compare.
        last: the number of the last entry of the log; 0 where there was none.
        held: the same as Redis holds it in the user's hash, from where it may be gone.
    """

    user_id: int | str
    views: Mapping[str, Mapping[str, Any]]
    raw: Raw
    last: int = 0
    held: bytes | None = None

    def __getitem__(self, view: str) -> Mapping[str, Any]:
        return self.views[view]


class UserRecords(Protocol):
    """Records of users in an online store.

    Attributes:
        has_log: whether entries outlive the next batch.

    Example:
        >>> records = user_records(store, contract, token_version=None)
        >>> seen = records.read(12680)
        >>> records.swap(seen, {"user_stats": NewRow({**seen["user_stats"], "history_end": 7}, now)})
        True
    """

    has_log: ClassVar[bool]

    def read(self, user_id: int | str) -> UserRecord:
        """All that is stored of a user, of one moment."""

    def swap(
        self, seen: UserRecord, rows: Mapping[str, NewRow], entries: Sequence[Entry] = ()
    ) -> bool:
        """Replace rows of a user by view, all or none. False: what is stored is no longer `seen`.

        Args:
            entries: enter the log at the same moment; their numbers are larger than `seen.last`.
        """

    def logged(self, users: Sequence[UserId]) -> list[Logged]:
        """What the log holds of users, and where it ends for each."""

    def replace(self, rows: ManyRows, logged: Sequence[Logged]) -> np.ndarray:
        """Replace rows of many users in one round trip or transaction, each user's at once, by rows that know what
        `logged` says; bool for each: False where another event has come since, and the stored rows stay.
        """

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
        (found,) = self.many_protos(view, {name: [value] for name, value in row.values.items()})
        return found

    def many_protos(self, view: str, columns: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
        """Rows' values as Feast stores them."""
        from feast.type_map import python_values_to_proto_values

        wanted = self.features(view)
        if set(columns) != set(wanted):
            raise ValueError(f"expected the features {wanted} of {view}, got {sorted(columns)}")
        converted = [
            python_values_to_proto_values(list(columns[name]), self.kinds[view, name])
            for name in wanted
        ]
        return [dict(zip(wanted, row, strict=True)) for row in zip(*converted, strict=True)]

    def many_rows(self, rows: ManyRows) -> list[dict[str, dict[str, Any]]]:
        """For each user the values by view, as Feast stores them."""
        by_view = {
            view: self.many_protos(view, {n: table[n].to_pylist() for n in self.features(view)})
            for view, table in rows.views.items()
        }
        return [
            {view: protos[place] for view, protos in by_view.items()}
            for place in range(len(rows.users))
        ]

    def record(
        self, user_id: int | str, raw: Raw, last: int, held: bytes | None = None
    ) -> UserRecord:
        from feast.protos.feast.types.Value_pb2 import Value

        views: dict[str, dict[str, Any]] = {view: {} for view in self.views}
        for (view, name), data in raw.items():
            views[view][name] = plain_value(Value.FromString(data)) if data else None
        return UserRecord(user_id, views, raw, last, held)


class _RedisRecords:
    """Records on Redis: one script compares and sets, on the server."""

    has_log: ClassVar[bool] = True

    def __init__(self, store: FeatureStore, definitions: _Definitions) -> None:
        from feast.infra.online_stores.helpers import _mmh3

        config = store.config
        self._definitions = definitions
        self._project = config.project
        self._version = config.entity_key_serialization_version
        self._fields = {pair: _mmh3(f"{pair[0]}:{pair[1]}") for pair in definitions.kinds}
        self._config = config
        self._online = config.online_store
        self._client = client_of(config.online_store)
        self._script = self._client.register_script(SWAP)
        # One transaction of a cluster has one slot: there each hash is compared and set alone.
        self._apart = is_cluster(config.online_store)

    def read(self, user_id: int | str) -> UserRecord:
        hashes = self._hashes(user_id)
        with self._client.pipeline(transaction=not self._apart) as pipe:
            for key, views in hashes.items():
                pipe.hmget(key, [LAST, *(self._fields[pair] for pair in self._pairs(views))])
            # The hash may have expired, or been thrown out, while the log stayed.
            pipe.xrevrange(self._log_keys(user_id, next(iter(hashes))).stream, count=1)
            *found, newest = pipe.execute()
        raw: Raw = {}
        for views, (_, *values) in zip(hashes.values(), found, strict=True):
            raw |= dict(zip(self._pairs(views), values, strict=True))
        held = found[0][0]
        numbers = [int(held or 0), *(entry.number for entry in entries_of(user_id, newest))]
        return self._definitions.record(user_id, raw, max(numbers), held)

    def swap(
        self, seen: UserRecord, rows: Mapping[str, NewRow], entries: Sequence[Entry] = ()
    ) -> bool:
        # 1. Collect for each hash what it must still hold, and what is to be set.
        hashes = self._hashes(seen.user_id)
        calls: list[list[Any]] = []
        for number, views in enumerate(hashes.values()):
            compared: list[Any] = [] if number else [LAST, _digest(seen.held)]
            for pair in self._pairs(views):
                compared += [self._fields[pair], _digest(seen.raw[pair])]
            parts: list[Any] = []
            for view in views:
                if view in rows:
                    values = self._definitions.protos(view, rows[view])
                    parts += self._parts(view, values, rows[view].known)
            calls.append([len(compared) // 2, *compared, len(parts), *parts])
        # 2. Compare and set, in one script wherever one server has all hashes.
        keys = list(hashes)
        if not self._apart:
            swapped = self._call(keys, calls, entries)
        else:
            # The history first: tokens that lag are named by answers, and go on from their state.
            swapped = self._call(keys[:1], calls[:1], entries)
            for key, call in zip(keys[1:], calls[1:], strict=True):
                swapped = swapped and self._call([key], [call], ())
        if swapped:
            expire(self._client, self._online, keys)
        return swapped

    def logged(self, users: Sequence[UserId]) -> list[Logged]:
        keys = [self._own_hash(user) for user in users]
        with self._client.pipeline(transaction=False) as pipe:
            for user, key in zip(users, keys, strict=True):
                pipe.hget(key, LAST)
                pipe.xrange(self._log_keys(user, key).stream)
            found = pipe.execute()
        return [
            Logged(int(last or 0), tuple(entries_of(user, entries)))
            for user, last, entries in zip(users, found[::2], found[1::2], strict=True)
        ]

    def replace(self, rows: ManyRows, logged: Sequence[Logged]) -> np.ndarray:
        converted = self._definitions.many_rows(rows)
        keys = [self._own_hash(user) for user in rows.users]
        with self._client.pipeline(transaction=False) as pipe:
            for place, key in enumerate(keys):
                parts: list[Any] = []
                for view, values in converted[place].items():
                    parts += self._parts(view, values, int(rows.known[place]))
                last = _digest_of_last(logged[place].last)
                queue_script(pipe, SWAP, [key], [1, 0, "", 1, LAST, last, len(parts), *parts])
            swapped = pipe.execute()
            expire(pipe, self._online, keys)
            pipe.execute()
        return np.array(swapped, bool)

    def close(self) -> None:
        self._client.close()

    def _call(self, keys: list[bytes], calls: list[list[Any]], entries: Sequence[Entry]) -> bool:
        """Run the script on hashes of a user."""
        named = list(keys)
        user = ""
        if entries:
            log = self._log_keys(entries[0].user_id, keys[0])
            named += [log.stream, log.users]
            user = json.dumps(entries[0].user_id)
        head: list[Any] = [len(keys), len(entries), user]
        head += [part for entry in entries for part in (entry.number, entry.event)]
        parts = [part for call in calls for part in call]
        return bool(self._script(keys=named, args=[*head, *parts]))

    def _parts(self, view: str, values: Mapping[str, Any], known: int) -> list[Any]:
        """Fields and values of a row, in turn."""
        from google.protobuf.timestamp_pb2 import Timestamp

        parts: list[Any] = []
        for name, value in values.items():
            parts += [self._fields[view, name], value.SerializeToString()]
        seconds, micros = divmod(known, 1_000_000)
        stamp = Timestamp(seconds=seconds, nanos=1000 * micros).SerializeToString()
        return [*parts, f"_ts:{view}", stamp]

    def _own_hash(self, user_id: UserId) -> bytes:
        """The hash of the views that a user alone keys."""
        return key_of_user(self._config, user_id)

    def _log_keys(self, user_id: UserId, own_hash: bytes) -> LogKeys:
        return LogKeys.of(self._project, user_id, slot_of(own_hash) if self._apart else None)

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
    has_log: ClassVar[bool] = True

    def __init__(self, store: FeatureStore, definitions: _Definitions) -> None:
        from feast.infra.online_stores.helpers import compute_table_id

        config = store.config
        self._definitions = definitions
        self._version = config.entity_key_serialization_version
        self._tables = {
            view: compute_table_id(config.project, definition).replace('"', '""')
            for view, definition in definitions.views.items()
        }
        path = Path(config.repo_path or ".", config.online_store.path)
        self._connection = sqlite3.connect(
            path, timeout=self.BUSY_S, isolation_level=None, check_same_thread=False
        )
        self._log = SqliteEventLog(path)
        # It is made in one thread and used in another, by one at a time.
        self._lock = threading.Lock()

    def read(self, user_id: int | str) -> UserRecord:
        with self._lock:
            self._connection.execute("BEGIN")
            try:
                raw = self._raw(user_id)
                last = last_of_sqlite(self._connection, user_id)
            finally:
                self._connection.execute("COMMIT")
        return self._definitions.record(user_id, raw, last)

    def swap(
        self, seen: UserRecord, rows: Mapping[str, NewRow], entries: Sequence[Entry] = ()
    ) -> bool:
        with self._transaction():
            last = last_of_sqlite(self._connection, seen.user_id)
            if last != seen.last or self._raw(seen.user_id) != seen.raw:
                return False
            for view, row in rows.items():
                values = self._definitions.protos(view, row)
                self._write(seen.user_id, view, values, row.known)
            if entries:
                append_sqlite(self._connection, entries)
        return True

    def logged(self, users: Sequence[UserId]) -> list[Logged]:
        with self._lock:
            # Most homes have never taken an event by HTTP.
            if not has_log(self._connection):
                return [Logged(0)] * len(users)
            return [
                Logged(last_of_sqlite(self._connection, user), tuple(self._log.entries([user])))
                for user in users
            ]

    def replace(self, rows: ManyRows, logged: Sequence[Logged]) -> np.ndarray:
        converted = self._definitions.many_rows(rows)
        swapped = np.zeros(len(rows.users), bool)
        with self._transaction():
            for place, user in enumerate(rows.users):
                if last_of_sqlite(self._connection, user) != logged[place].last:
                    continue
                for view, values in converted[place].items():
                    self._write(user, view, values, int(rows.known[place]))
                swapped[place] = True
        return swapped

    def close(self) -> None:
        self._log.close()
        self._connection.close()

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        with self._lock:
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._connection.execute("COMMIT")
            except BaseException:
                self._connection.execute("ROLLBACK")
                raise

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

    def _write(self, user_id: UserId, view: str, values: Mapping[str, Any], known: int) -> None:
        """A row as Feast writes it, its time in whole seconds."""
        key = self._key(view, user_id)
        for name, value in values.items():
            _upsert(self._connection, self._tables[view], key, name, value, known // 1_000_000)

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
    let one process take events there. It has no log either: the next batch knows no event that is in no file.
    """

    has_log: ClassVar[bool] = False

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

    def swap(
        self, seen: UserRecord, rows: Mapping[str, NewRow], entries: Sequence[Entry] = ()
    ) -> bool:
        contract = self._definitions.contract
        for view, row in rows.items():
            schema = arrow_schema(contract.table(view))
            values = {n: pa.array([v], schema.field(n).type) for n, v in row.values.items()}
            self._write([seen.user_id], view, pa.table(values), np.array([row.known]))
        return True

    def logged(self, users: Sequence[UserId]) -> list[Logged]:
        return [Logged(0)] * len(users)

    def replace(self, rows: ManyRows, logged: Sequence[Logged]) -> np.ndarray:
        for view, table in rows.views.items():
            self._write(rows.users, view, table, rows.known)
        return np.ones(len(rows.users), bool)

    def close(self) -> None:
        """Its connections are the store's."""

    def _write(
        self, users: Sequence[UserId], view: str, values: pa.Table, known: np.ndarray
    ) -> None:
        definitions = self._definitions
        schema = arrow_schema(definitions.contract.table(view))
        stamps = from_micros(known)
        columns = {name: values[name] for name in definitions.features(view)}
        columns[definitions.contract.user.join_key] = pa.array(users)
        if view == TOKENS:
            columns[TOKEN_VERSION.join_key] = pa.array([definitions.token_version] * len(users))
        table = pa.table([columns.get(name, stamps) for name in schema.names], schema=schema)
        write_rows(self._store, view, table, definitions.views[view])


def _digest(held: bytes | None) -> str:
    """Stands for a stored value, which may have many kilobytes."""
    return "" if held is None else hashlib.sha1(held, usedforsecurity=False).hexdigest()


def _digest_of_last(last: int) -> str:
    """Stands for the number of the last entry, as a hash holds it."""
    return _digest(str(last).encode() if last else None)


def plain_value(value: Any) -> Any:
    """A Value of Feast's as Python has it, as Feast's own answers do; None where it holds none."""
    kind = value.WhichOneof("val")
    if kind is None or kind == "null_val":
        return None
    # What requests read by the thousand needs no walk through all of Feast's types.
    if kind in PLAIN_KINDS:
        return getattr(value, kind)
    if kind in PLAIN_LISTS:
        return list(getattr(value, kind).val)
    if kind == "unix_timestamp_val":
        # Feast writes a time that is missing as NumPy's NaT.
        seconds = value.unix_timestamp_val
        return None if seconds == NO_VALUE else EPOCH + timedelta(seconds=seconds)
    from feast.type_map import feast_value_type_to_python_type

    return feast_value_type_to_python_type(value)
