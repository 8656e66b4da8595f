"""Users out of the online store: their rows in every view, of every token version.

Of Redis and SQLite the keys themselves are deleted. Feast has no way to delete from another store: there
the rows become nulls, and the keys stay.
"""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from feature_repo.arrow import arrow_schema
from feature_repo.contract import TOKEN_VERSION, Contract
from feature_repo.online_rows import write_rows
from feature_repo.schema import CREATED_TIMESTAMP, EVENT_TIMESTAMP, Table

if TYPE_CHECKING:
    from datetime import datetime

    from feast import FeatureStore

PIECE = 1000  # keys of one round trip


class OnlineEraser:
    """See the module docstring.

    Args:
        versions: of summary tokens that may be stored.
    """

    def __init__(self, store: FeatureStore, contract: Contract, versions: Sequence[str]) -> None:
        self._store, self._contract, self._versions = store, contract, versions
        self.kind: str = store.config.online_store.type
        user = contract.user.join_key
        theirs = (
            view.name
            for view in store.list_feature_views()
            if view.online and user in {column.name for column in view.entity_columns}
        )
        self._views: list[Table] = [contract.table(name) for name in sorted(theirs)]

    def erase(self, users: Sequence[Any], at: datetime) -> int:
        """Remove users; returns how many stored rows or keys there were, where the store can say it.

        Args:
            at: time of the rows of nulls, where keys cannot be deleted.
        """
        if self.kind.startswith("redis"):
            return self._from_redis(users)
        if self.kind == "sqlite":
            return self._from_sqlite(users)
        for view in self._views:
            rows = list(self._rows_of(view, users))
            nulls = [row | {EVENT_TIMESTAMP: at, CREATED_TIMESTAMP: at} for row in rows]
            write_rows(
                self._store, view.name, pa.Table.from_pylist(nulls, schema=arrow_schema(view))
            )
        return 0

    def find(self, users: Sequence[Any]) -> int:
        """How many keys of these users the store still holds, of whatever view and version: all keys are
        looked through. Where that cannot be, how many of the known ones have a value.
        """
        if self.kind.startswith("redis") or self.kind == "sqlite":
            marks = [self._mark(user) for user in users]
            if not marks:
                return 0
            pattern = re.compile(b"|".join(map(re.escape, marks)), re.DOTALL)
            return sum(pattern.search(key) is not None for key in self._all_keys())
        found = 0
        for view in self._views:
            rows = list(self._rows_of(view, users))
            names = [f"{view.name}:{column.name}" for column in view.columns]
            if rows and names:
                values = self._store.get_online_features(names, rows).to_dict()
                stored = zip(*(values[column.name] for column in view.columns), strict=True)
                found += sum(any(value is not None for value in row) for row in stored)
        return found

    def _rows_of(self, view: Table, users: Sequence[Any]) -> Iterator[dict[str, Any]]:
        """Keys of a view, of each user and, where the view has them, each token version."""
        user, version = self._contract.user.join_key, TOKEN_VERSION.join_key
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

    def _mark(self, user: Any) -> bytes:
        """The bytes of a user's id in any key: its type, its length and itself."""
        by_user_alone = next(view for view in self._views if len(view.join_keys) == 1)
        key = self._keys(by_user_alone, [user])[0]
        value = str(user).encode() if isinstance(user, str) else bytes(8)
        return key[-(8 + len(value)) :]

    def _from_redis(self, users: Sequence[Any]) -> int:
        client, project = self._redis(), self._store.config.project.encode()
        keys = {key + project for view in self._views for key in self._keys(view, users)}
        ordered = sorted(keys)
        return sum(
            client.unlink(*ordered[start : start + PIECE])
            for start in range(0, len(ordered), PIECE)
        )

    def _redis(self) -> Any:
        from feast.infra.online_stores.redis import RedisOnlineStore

        return RedisOnlineStore()._get_client(self._store.config.online_store)

    def _sqlite(self) -> sqlite3.Connection:
        config = self._store.config
        made = sqlite3.connect(Path(config.repo_path or ".", config.online_store.path))
        made.execute("PRAGMA secure_delete = ON")  # the bytes go too, not only what names them
        return made

    def _from_sqlite(self, users: Sequence[Any]) -> int:
        gone = 0
        with closing(self._sqlite()) as connection, connection:
            for view in self._views:
                table = f'"{self._store.config.project}_{view.name}"'
                for key in self._keys(view, users):
                    gone += connection.execute(
                        f"DELETE FROM {table} WHERE entity_key = ?", (key,)
                    ).rowcount
        return gone

    def _all_keys(self) -> Iterator[bytes]:
        if self.kind.startswith("redis"):
            yield from self._redis().scan_iter(count=10 * PIECE)
            return
        with closing(self._sqlite()) as connection:
            query = "SELECT name FROM sqlite_master WHERE type = 'table'"
            for (table,) in connection.execute(query).fetchall():
                columns = {row[1] for row in connection.execute(f'PRAGMA table_info("{table}")')}
                if "entity_key" in columns:
                    query = f'SELECT DISTINCT entity_key FROM "{table}"'
                    yield from (key for (key,) in connection.execute(query))
