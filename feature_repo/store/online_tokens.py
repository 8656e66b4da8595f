"""Summary tokens in the online store: written, read and removed by user and token version.

On Redis a value is replaced only by one computed later, by any writer (`redis_writer.py`). Other
stores are written through Feast's own API, whose last write wins: there, let one job at a time
write tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from feature_repo.contract.arrow import from_micros
from feature_repo.contract.contract import Contract
from feature_repo.contract.schema import CREATED_TIMESTAMP, EVENT_TIMESTAMP
from feature_repo.errors import ExpectedError
from feature_repo.history.envelope import EnvelopeError, from_bytes
from feature_repo.history.user_stats import DIGEST
from feature_repo.store.online_rows import write_rows
from feature_repo.store.redis_writer import RedisWriter

if TYPE_CHECKING:
    from feast import FeatureStore

VIEW = "summary_tokens"
STATS = "user_stats"
# Users of one read
PIECE = 1000


class CannotRemoveError(ExpectedError, RuntimeError):
    """The online store has no way to delete keys that we know."""


class OnlineTokens:
    """See the module docstring."""

    def __init__(self, store: FeatureStore, contract: Contract) -> None:
        self._store = store
        self._contract = contract
        # Once: no write waits for the registry
        self._view = store.get_feature_view(VIEW)
        self._redis = (
            RedisWriter(store, VIEW) if store.config.online_store.type.startswith("redis") else None
        )

    def write(
        self,
        version: str,
        users: Sequence[Any],
        tokens: Sequence[bytes],
        states: Sequence[bytes | None],
        computed_at: int,
    ) -> int:
        """Write envelopes of one version; returns how many are now stored.

        Args:
            computed_at: microseconds since 1970, the time of the rows.
        """
        user, second = self._contract.table(VIEW).join_keys
        keys = {user: users, second: [version] * len(users)}
        values = {"tokens": tokens, "state": states}
        if self._redis is not None:
            return self._redis.write(keys, values, [computed_at] * len(users))
        stamp = from_micros(np.full(len(users), computed_at))
        rows = pa.table({**keys, **values, EVENT_TIMESTAMP: stamp, CREATED_TIMESTAMP: stamp})
        return write_rows(self._store, VIEW, rows, self._view)

    def read(self, version: str, users: Sequence[Any]) -> list[tuple[bytes | None, bytes | None]]:
        """Envelopes of tokens and state of each user, None where there are none."""
        if not users:
            return []
        user, second = self._contract.table(VIEW).join_keys
        rows = [{user: key, second: version} for key in users]
        found = self._store.get_online_features([f"{VIEW}:tokens", f"{VIEW}:state"], rows).to_dict()
        return list(zip(found["tokens"], found["state"], strict=True))

    def ahead(self, version: str, digests: Mapping[Any, int]) -> set[Any]:
        """Users whose stored tokens know all that their record does, while tokens of these histories do not.

        Args:
            digests: of the histories behind the tokens that are to be written, by user; of users of whom a server
                took events that the tables lack.
        """
        users = list(digests)
        found: set[Any] = set()
        for start in range(0, len(users), PIECE):
            piece = users[start : start + PIECE]
            rows = [{self._contract.user.join_key: user} for user in piece]
            known = self._store.get_online_features([f"{STATS}:{DIGEST}"], rows).to_dict()[DIGEST]
            differ = {
                user: digest
                for user, digest in zip(piece, known, strict=True)
                if digest is not None and digest != digests[user]
            }
            stored = self.read(version, list(differ))
            found |= {
                user
                for (user, digest), (tokens, _) in zip(differ.items(), stored, strict=True)
                if tokens is not None and _digest_of(tokens, user) == digest
            }
        return found

    def remove(self, version: str) -> int:
        """Remove every user's tokens of a version; returns how many there were.

        Raises:
            CannotRemoveError: the online store is neither Redis nor SQLite, and Feast has no way to
                delete keys.
        """
        prefix = self._prefix(version)
        if self._redis is not None:
            return self._redis.remove(prefix)
        config = self._store.config
        if config.online_store.type != "sqlite":
            raise CannotRemoveError(
                f"Feast cannot delete keys from an online store of type {config.online_store.type!r}: delete those of "
                f"token_version {version} with the store's own tools"
            )
        import sqlite3

        connection = sqlite3.connect(Path(config.repo_path or ".", config.online_store.path))
        with connection:
            query = f'DELETE FROM "{config.project}_{VIEW}" WHERE substr(entity_key, 1, ?) = ?'
            number = len(
                set(
                    connection.execute(
                        query + " RETURNING entity_key", (len(prefix), prefix)
                    ).fetchall()
                )
            )
        connection.close()
        return number

    def _prefix(self, version: str) -> bytes:
        """Return the common beginning of a version's keys: the version sorts before the user."""
        from feast.infra.key_encoding_utils import serialize_entity_key
        from feast.protos.feast.types.EntityKey_pb2 import EntityKey
        from feast.protos.feast.types.Value_pb2 import Value

        names = sorted(self._contract.table(VIEW).join_keys)
        key = EntityKey(
            join_keys=names, entity_values=[Value(string_val=version), Value(string_val="")]
        )
        return serialize_entity_key(key, self._store.config.entity_key_serialization_version)[:-8]


def _digest_of(tokens: bytes, user_id: Any) -> int | None:
    """Of the history behind tokens; None of what cannot be read, or says that there are none."""
    try:
        envelope = from_bytes(tokens, user_id)
    except EnvelopeError:
        return None
    return None if envelope.tombstone else envelope.digest
