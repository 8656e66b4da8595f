"""The log of events that a server has acknowledged and no published run of `events` has yet.

An event enters the log in the same transaction that changes its user's record, so that record and log know the same
events. The `events` job reads the log as one more source (`received.py`), and trims it once it has published a run
with these events. A job that replaces a record adds the events that the log holds beyond the job's tables.

An entry is one event. Its number is the moment at which it arrived, microseconds, and larger than the number of
every earlier entry of its user.

Layout on Redis: a stream for each user, whose entries have the number as the first half of their id; the user's hash
holds the largest number so far in the field `_logged`; and a set names the users who have entries. On a cluster one
transaction has one slot: there stream and set have a tag of the slot of the user's hash, and each slot has a set.

Layout on SQLite: a table beside Feast's, in which a user's last number outlives its event.

Other stores of Feast's have no transaction that could hold record and log, and so they have no log.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, Protocol

from feature_repo.contract.arrow import EPOCH
from feature_repo.home.redis_client import SLOTS, client_of, is_cluster, slot_of, tag_of_slot
from feature_repo.store.redis_writer import key_of_user, queue_script

UserId = int | str
# Field of a user's hash
LAST = b"_logged"
# Field of a stream's entry
EVENT = b"event"
TABLE = "memoir_event_log"
CREATE = (
    f'CREATE TABLE IF NOT EXISTS "{TABLE}" (user_id TEXT NOT NULL, number INTEGER NOT NULL, event TEXT, '
    "PRIMARY KEY (user_id, number)) WITHOUT ROWID"
)
# Users of one round trip
PIECE = 500
# KEYS: a user's stream, the set of users. ARGV: the user, the last number that is to go.
TRIM = """
redis.call('XTRIM', KEYS[1], 'MINID', ARGV[2] .. '-1')
if redis.call('XLEN', KEYS[1]) == 0 then
  redis.call('DEL', KEYS[1])
  redis.call('SREM', KEYS[2], ARGV[1])
end
return 1
"""


@dataclass(frozen=True)
class Entry:
    """An event that was acknowledged.

    Args:
        number: when it arrived, microseconds; larger than the number of any earlier entry of its user.
        event: as text (`to_text`).
    """

    user_id: UserId
    number: int
    event: str


class EventLog(Protocol):
    """Reads and trims a log; `UserRecords.swap` appends to it.

    Example:
        >>> log = log_of(store.config)
        >>> [entry.number for entry in log.entries([12680])]
        [1764402060000000]
    """

    def users(self) -> Iterator[UserId]:
        """Users who have entries."""

    def entries(self, users: Sequence[UserId]) -> list[Entry]:
        """The entries of some users, each user's in order."""

    def trim(self, until: Mapping[UserId, int]) -> None:
        """Drop users' entries up to a number each."""

    def erase(self, users: Sequence[UserId]) -> None:
        """Drop all entries of users."""

    def close(self) -> None:
        """Let go of connections."""


def log_of(config: Any) -> EventLog | None:
    """The log of a store of Feast's, by its configuration; None of a store that can have none."""
    kind = config.online_store.type
    if kind.startswith("redis"):
        return RedisEventLog(config)
    if kind == "sqlite":
        return SqliteEventLog(Path(config.repo_path or ".", config.online_store.path))
    return None


class SqliteEventLog:
    """A log in a table of the local online store. Needs no Feast."""

    def __init__(self, path: Path) -> None:
        self._connection = sqlite3.connect(path, timeout=60.0, check_same_thread=False)

    def users(self) -> Iterator[UserId]:
        query = f'SELECT DISTINCT user_id FROM "{TABLE}" WHERE event IS NOT NULL'
        found = self._select(query, ())
        yield from (json.loads(text) for (text,) in found)

    def entries(self, users: Sequence[UserId]) -> list[Entry]:
        query = f'SELECT number, event FROM "{TABLE}" WHERE user_id = ? AND event IS NOT NULL ORDER BY number'
        return [
            Entry(user, number, event)
            for user in users
            for number, event in self._select(query, (json.dumps(user),))
        ]

    def trim(self, until: Mapping[UserId, int]) -> None:
        # The number of the last one stays, without its event, so that no later one is as small.
        rows = [(json.dumps(user), number) for user, number in until.items()]
        own = f'SELECT max(number) FROM "{TABLE}" AS own WHERE own.user_id = "{TABLE}".user_id'
        self._delete(
            f'DELETE FROM "{TABLE}" WHERE user_id = ? AND number <= ? AND number < ({own})', rows
        )
        self._delete(f'UPDATE "{TABLE}" SET event = NULL WHERE user_id = ? AND number <= ?', rows)

    def erase(self, users: Sequence[UserId]) -> None:
        # The bytes go too, not only what names them.
        self._connection.execute("PRAGMA secure_delete = ON")
        query = f'DELETE FROM "{TABLE}" WHERE user_id = ?'
        self._delete(query, ((json.dumps(user),) for user in users))

    def close(self) -> None:
        self._connection.close()

    def _select(self, query: str, values: tuple[Any, ...]) -> list[tuple[Any, ...]]:
        if not has_log(self._connection):
            return []
        return self._connection.execute(query, values).fetchall()

    def _delete(self, query: str, values: Iterable[tuple[Any, ...]]) -> None:
        if has_log(self._connection):
            with self._connection:
                self._connection.executemany(query, values)


def has_log(connection: sqlite3.Connection) -> bool:
    """Return whether a server has ever logged to this file."""
    query = "SELECT 1 FROM sqlite_master WHERE type = 'table' AND name = ?"
    return connection.execute(query, (TABLE,)).fetchone() is not None


def append_sqlite(connection: sqlite3.Connection, entries: Sequence[Entry]) -> None:
    """Append entries in the transaction that is under way."""
    connection.execute(CREATE)
    connection.executemany(
        f'INSERT INTO "{TABLE}" (user_id, number, event) VALUES (?, ?, ?)',
        ((json.dumps(entry.user_id), entry.number, entry.event) for entry in entries),
    )


def last_of_sqlite(connection: sqlite3.Connection, user_id: UserId) -> int:
    """The number of a user's last entry, which may have been trimmed; 0 of none."""
    if not has_log(connection):
        return 0
    query = f'SELECT max(number) FROM "{TABLE}" WHERE user_id = ?'
    return connection.execute(query, (json.dumps(user_id),)).fetchone()[0] or 0


@dataclass(frozen=True)
class LogKeys:
    """Names of a user's stream and of the set of users, which share the slot of the user's hash."""

    stream: bytes
    users: bytes

    @staticmethod
    def of(project: str, user_id: UserId, slot: int | None) -> LogKeys:
        """The names for a user.

        Args:
            slot: of the user's hash, on a cluster.
        """
        users = _set_of(project, slot)
        return LogKeys(users + b":" + json.dumps(user_id).encode(), users)


def _set_of(project: str, slot: int | None) -> bytes:
    """The name of the set of users: of a project, or of a slot of a cluster."""
    tag = "" if slot is None else f"{{{tag_of_slot(slot)}}}"
    return f"log:{tag}{project}".encode()


class RedisEventLog:
    """A log on Redis."""

    def __init__(self, config: Any) -> None:
        self._config = config
        self._project = config.project
        self._cluster = is_cluster(config.online_store)
        self._client = client_of(config.online_store)

    def users(self) -> Iterator[UserId]:
        slots = range(SLOTS) if self._cluster else [None]
        sets = [_set_of(self._project, slot) for slot in slots]
        for start in range(0, len(sets), PIECE):
            with self._client.pipeline(transaction=False) as pipe:
                for name in sets[start : start + PIECE]:
                    pipe.exists(name)
                there = pipe.execute()
            for name, exists in zip(sets[start : start + PIECE], there, strict=True):
                if exists:
                    yield from (json.loads(text) for text in self._client.sscan_iter(name))

    def entries(self, users: Sequence[UserId]) -> list[Entry]:
        found = []
        for start in range(0, len(users), PIECE):
            piece = users[start : start + PIECE]
            with self._client.pipeline(transaction=False) as pipe:
                for user in piece:
                    pipe.xrange(self._keys(user).stream)
                for user, entries in zip(piece, pipe.execute(), strict=True):
                    found += entries_of(user, entries)
        return found

    def trim(self, until: Mapping[UserId, int]) -> None:
        users = list(until)
        for start in range(0, len(users), PIECE):
            with self._client.pipeline(transaction=False) as pipe:
                for user in users[start : start + PIECE]:
                    keys = self._keys(user)
                    arguments = [json.dumps(user), until[user]]
                    queue_script(pipe, TRIM, [keys.stream, keys.users], arguments)
                pipe.execute()

    def erase(self, users: Sequence[UserId]) -> None:
        for user in users:
            keys = self._keys(user)
            self._client.unlink(keys.stream)
            self._client.srem(keys.users, json.dumps(user))

    def close(self) -> None:
        self._client.close()

    def _keys(self, user_id: UserId) -> LogKeys:
        slot = slot_of(key_of_user(self._config, user_id)) if self._cluster else None
        return LogKeys.of(self._project, user_id, slot)


def entries_of(
    user_id: UserId, stored: Iterable[tuple[bytes, Mapping[bytes, bytes]]]
) -> list[Entry]:
    """A user's entries as a stream of Redis gives them."""
    return [
        Entry(user_id, int(name.partition(b"-")[0]), fields[EVENT].decode())
        for name, fields in stored
    ]


def to_text(event: Mapping[str, Any]) -> str:
    """An event as the log holds it: JSON, its times in microseconds."""
    return json.dumps(dict(event), default=_micros, ensure_ascii=False, sort_keys=True)


def _micros(value: Any) -> int:
    if not isinstance(value, datetime):
        raise TypeError(f"expected a number, a text, a list of them or a time, got {value!r}")
    return (value - EPOCH) // timedelta(microseconds=1)
