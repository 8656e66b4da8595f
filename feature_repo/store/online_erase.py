"""Users out of the online store: their rows in every view, of every token version, and their acknowledged events.

Of Redis and SQLite the keys themselves are deleted. Feast has no way to delete from another store: there
the rows become nulls, and the keys stay.
"""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from feature_repo.contract.arrow import arrow_schema
from feature_repo.contract.contract import TOKEN_VERSION, Contract
from feature_repo.contract.schema import CREATED_TIMESTAMP, EVENT_TIMESTAMP, Table
from feature_repo.history.lists import MADE_OF
from feature_repo.home.redis_client import client_of
from feature_repo.store.event_log import EventLog, log_of
from feature_repo.store.online_rows import write_rows
from feature_repo.store.redis_writer import split_key

if TYPE_CHECKING:
    from datetime import datetime

    from feast import FeatureStore

# Keys of one round trip
PIECE = 1000


class OnlineEraser:
    """See the module docstring.

    Args:
        versions: of summary tokens that may be stored.
    """

    def __init__(self, store: FeatureStore, contract: Contract, versions: Sequence[str]) -> None:
        self._store = store
        self._contract = contract
        self._versions = versions
        self.kind: str = store.config.online_store.type
        user = contract.user.join_key
        theirs = (
            view.name
            for view in store.list_feature_views()
            if view.online
            and MADE_OF not in view.tags
            and user in {column.name for column in view.entity_columns}
        )
        self._views: list[Table] = [contract.table(name) for name in sorted(theirs)]

    @property
    def deletes(self) -> bool:
        """Return whether keys can be looked through and deleted."""
        return self.kind.startswith("redis") or self.kind == "sqlite"

    def erase(self, users: Sequence[Any], at: datetime) -> int | None:
        """Remove users by the keys that they must have, which is quick; returns how many there were, None
        where the store cannot say it.

        Args:
            at: time of the rows of nulls, where keys cannot be deleted.
        """
        if self.deletes:
            self._erase_log(users)
            return self._delete({key for view in self._views for key in self._keys(view, users)})
        for view in self._views:
            rows = list(self._rows_of(view, users))
            nulls = [row | {EVENT_TIMESTAMP: at, CREATED_TIMESTAMP: at} for row in rows]
            write_rows(
                self._store, view.name, pa.Table.from_pylist(nulls, schema=arrow_schema(view))
            )
        return None

    def sweep(self, users: Sequence[Any], at: datetime) -> int | None:
        """Remove whatever a search of all keys finds of users, of unlisted versions too; where keys
        cannot be looked through, as `erase`.
        """
        if not self.deletes:
            return self.erase(users, at)
        self._erase_log(users)
        return self._delete(set(self._found(users)))

    def find(self, users: Sequence[Any]) -> int:
        """How many keys of these users the store still holds, of whatever view and version: all keys are
        looked through; and how many of their acknowledged events. Where that cannot be, how many of the known keys
        have a value.
        """
        if self.deletes:
            with self._log() as log:
                return len(self._found(users)) + len(log.entries(users))
        found = 0
        for view in self._views:
            rows = list(self._rows_of(view, users))
            names = [f"{view.name}:{column.name}" for column in view.columns]
            if rows and names:
                values = self._store.get_online_features(names, rows).to_dict()
                stored = zip(*(values[column.name] for column in view.columns), strict=True)
                found += sum(any(value is not None for value in row) for row in stored)
        return found

    def _erase_log(self, users: Sequence[Any]) -> None:
        with self._log() as log:
            log.erase(users)

    @contextmanager
    def _log(self) -> Iterator[EventLog]:
        log = log_of(self._store.config)
        assert log is not None, "a store whose keys can be deleted has a log"
        with closing(log):
            yield log

    def _rows_of(self, view: Table, users: Sequence[Any]) -> Iterator[dict[str, Any]]:
        """Keys of a view, of each user and, where the view has them, each token version."""
        user = self._contract.user.join_key
        version = TOKEN_VERSION.join_key
        for one in users:
            if version in view.join_keys:
                yield from ({user: one, version: each} for each in self._versions)
            else:
                yield {user: one}

    def _keys(self, view: Table, users: Sequence[Any]) -> list[bytes]:
        from feast.infra.key_encoding_utils import serialize_entity_key
        from feast.protos.feast.types.EntityKey_pb2 import EntityKey
        from feast.type_map import python_values_to_proto_values

        definition = self._store.get_feature_view(view.name)
        kinds = {c.name: c.dtype.to_value_type() for c in definition.entity_columns}
        version = self._store.config.entity_key_serialization_version
        return [
            serialize_entity_key(
                EntityKey(
                    join_keys=list(row),
                    entity_values=[
                        python_values_to_proto_values([value], kinds[name])[0]
                        for name, value in row.items()
                    ],
                ),
                version,
            )
            for row in self._rows_of(view, users)
        ]

    def _found(self, users: Sequence[Any]) -> list[bytes]:
        """Keys whose user is one of these."""
        if not users:
            return []
        # The bytes of a value may stand in an item's key as well: they choose, the key itself decides.
        marks = re.compile(b"|".join(re.escape(self._mark(user)) for user in users), re.DOTALL)
        wanted = set(users)
        return [
            key for key in self._all_keys() if marks.search(key) and self._user_of(key) in wanted
        ]

    def _user_of(self, key: bytes) -> Any:
        """Whose a key is; None of a key that names no user."""
        from feast.infra.key_encoding_utils import deserialize_entity_key

        version = self._store.config.entity_key_serialization_version
        read = deserialize_entity_key(key, version)
        for name, value in zip(read.join_keys, read.entity_values, strict=True):
            if name == self._contract.user.join_key:
                return getattr(value, value.WhichOneof("val"))
        return None

    def _mark(self, user: Any) -> bytes:
        """The bytes of a user's id in any key: its type, its length and itself."""
        by_user_alone = next(view for view in self._views if len(view.join_keys) == 1)
        key = self._keys(by_user_alone, [user])[0]
        value = str(user).encode() if isinstance(user, str) else bytes(8)
        return key[-(8 + len(value)) :]

    def _redis(self) -> Any:
        return client_of(self._store.config.online_store)

    def _sqlite(self) -> sqlite3.Connection:
        config = self._store.config
        made = sqlite3.connect(Path(config.repo_path or ".", config.online_store.path))
        # The bytes go too, not only what names them
        made.execute("PRAGMA secure_delete = ON")
        return made

    def _delete(self, keys: set[bytes]) -> int:
        """Remove keys from everywhere in the store; returns how many there were."""
        ordered = sorted(keys)
        if self.kind.startswith("redis"):
            client = self._redis()
            project = self._store.config.project.encode()
            full = [key + project for key in ordered]
            return sum(
                client.unlink(*full[start : start + PIECE]) for start in range(0, len(full), PIECE)
            )
        gone = 0
        with closing(self._sqlite()) as connection:
            gone = self._delete_rows(connection, ordered)
            # Pages that values were overwritten on by others' connections are written anew.
            connection.execute("VACUUM")
        return gone

    def _delete_rows(self, connection: sqlite3.Connection, ordered: list[bytes]) -> int:
        gone = 0
        with connection:
            for table in self._tables(connection):
                query = f'DELETE FROM "{table}" WHERE entity_key = ? RETURNING entity_key'
                gone += sum(
                    len(set(connection.execute(query, (key,)).fetchall())) for key in ordered
                )
        return gone

    @staticmethod
    def _tables(connection: sqlite3.Connection) -> list[str]:
        """Tables of the store that have keys."""
        named = connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall()
        columns = {
            table: {row[1] for row in connection.execute(f'PRAGMA table_info("{table}")')}
            for (table,) in named
        }
        return [table for table, names in columns.items() if "entity_key" in names]

    def _all_keys(self) -> Iterator[bytes]:
        """Every key of this project's, as Feast serialises it."""
        if self.kind.startswith("redis"):
            project = self._store.config.project.encode()
            for key in self._redis().scan_iter(count=10 * PIECE):
                stored = split_key(key)
                if stored is not None and stored.project == project:
                    yield stored.entity
            return
        with closing(self._sqlite()) as connection:
            for table in self._tables(connection):
                query = f'SELECT DISTINCT entity_key FROM "{table}"'
                yield from (key for (key,) in connection.execute(query))
