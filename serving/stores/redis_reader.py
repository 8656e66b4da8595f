"""Users read straight from Redis, in Feast's own layout: one round trip, within its time, and never
twice.

Feast's SDK resolves the feature service anew for each request and waits as long as Redis takes: tens
of seconds where it stands still. Here the service is compiled once into a plan: which keys, which
fields, in which order. `FeastReader` is the oracle; on random data both agree, value for value.

Layout (Feast 0.67): a hash for each entity, its key the serialised entity key and the project; field
mmh3("view:feature") holds a Value.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from feature_repo.contract.contract import (
    TOKEN_VERSION,
    Contract,
)
from feature_repo.contract.schema import DType
from feature_repo.errors import ExpectedError
from feature_repo.store.online_users import plain_value
from serving.stores.features import UserDecoder, UserRow
from serving.stores.items import Id

if TYPE_CHECKING:
    from feast import FeatureStore
    from redis.asyncio import Redis


# The kind of a stored time, which is no value of Feast's
TIME = "time"


class StoreReadError(Exception):
    """The online store did not answer in its time, or not as a store does."""


class DamagedValueError(StoreReadError):
    """A stored value of one user is damaged; the store itself is well."""


class WrongStoreError(ExpectedError, ValueError):
    """The online store is not one Redis."""


@dataclass(frozen=True)
class Plan:
    """The Redis commands that read a user.

    Args:
        join_keys: of each hash, in the order of the serialised key.
        fields: of each hash, as Redis knows them.
        names: features behind the fields.
        kinds: which value of Feast's each feature is stored as, such as `bytes_val`.
    """

    join_keys: tuple[tuple[str, ...], ...]
    fields: tuple[tuple[bytes, ...], ...]
    names: tuple[tuple[str, ...], ...]
    kinds: tuple[tuple[str, ...], ...]


def plan_of(store: FeatureStore, online_service: str) -> Plan:
    """The plan of a feature service of users: views of the same entities share a hash.

    Args:
        store: its registry is read here, and by no request.
    """
    from feast.infra.online_stores.helpers import _mmh3

    # Feast keeps the views of the same join keys in one hash, so one HMGET reads them all.
    by_keys: dict[tuple[str, ...], list[tuple[bytes, str, str]]] = {}
    for projection in store.get_feature_service(online_service).feature_view_projections:
        definition = store.get_feature_view(projection.name)
        keys = tuple(sorted(column.name for column in definition.entity_columns))
        # Feast names a field by a hash, and the value is a protobuf with one member for each type.
        by_keys.setdefault(keys, []).extend(
            (
                _mmh3(f"{projection.name}:{feature.name}"),
                feature.name,
                f"{feature.dtype.to_value_type().name.lower()}_val",
            )
            for feature in projection.features
        )
        # The row of a custom view may be newer than the request, which only its time tells.
        if definition.tags.get("own") == "true":
            by_keys[keys].append(
                (f"_ts:{projection.name}".encode(), f"_ts:{projection.name}", TIME)
            )
    return Plan(
        tuple(by_keys),
        tuple(tuple(field for field, _, _ in found) for found in by_keys.values()),
        tuple(tuple(name for _, name, _ in found) for found in by_keys.values()),
        tuple(tuple(kind for _, _, kind in found) for found in by_keys.values()),
    )


class RedisHashes:
    """Fields of hashes, in one round trip within its time; nothing is tried twice. Belongs to the event
    loop that first reads with it.

    Args:
        store: whose online store is one Redis.
        connect_s: how long a new connection may take.

    Raises:
        WrongStoreError: the online store is not Redis, or a Redis Cluster.
    """

    def __init__(self, store: FeatureStore, connect_s: float = 0.05) -> None:
        from feast.infra.online_stores.redis import RedisOnlineStore, RedisOnlineStoreConfig

        online = store.config.online_store
        if not isinstance(online, RedisOnlineStoreConfig) or online.redis_type.value != "redis":
            raise WrongStoreError(
                f"expected one Redis, the online store is {online.type!r}: read it through Feast (FeastReader)"
            )
        nodes, given = RedisOnlineStore._parse_connection_string(online.connection_string)
        self.options: dict[str, Any] = {
            **nodes[0],
            **given,
            "socket_connect_timeout": connect_s,
            "retry": None,
            "retry_on_error": [],
        }
        self._client: Redis | None = None
        self._connection_class = _sharing_tls(self.options) if self.options.get("ssl") else None

    async def read(
        self, keys: Sequence[bytes], fields: Sequence[Sequence[bytes]], timeout_s: float
    ) -> list[list[bytes | None]]:
        """One HMGET for each key, all of one moment.

        Raises:
            StoreReadError: there was no answer within `timeout_s` seconds, or none of a Redis that
                holds hashes there.
        """
        import redis.exceptions

        try:
            async with (
                asyncio.timeout(timeout_s),
                self._connected().pipeline(len(keys) > 1) as pipe,
            ):
                for key, names in zip(keys, fields, strict=True):
                    pipe.hmget(key, list(names))  # type: ignore[arg-type]  # keys are bytes
                found: Any = await pipe.execute()
        except (TimeoutError, OSError, redis.exceptions.RedisError) as error:
            raise StoreReadError(
                f"Redis did not answer within {1000 * timeout_s:.0f} ms: {type(error).__name__}: {error}"
            ) from error
        except (TypeError, ValueError, AttributeError, IndexError, KeyError) as error:
            # The client's own parsers meet a shape that no Redis sends.
            found = error
        if not _are_hashes(found, fields):
            # What follows on these connections may be the rest of such an answer.
            await self._connected().connection_pool.disconnect(inuse_connections=False)
            raise StoreReadError(
                f"what answers is no Redis: to HMGET of {len(keys)} hashes came {type(found).__name__}"
            )
        hashes: list[list[bytes | None]] = found
        return hashes

    async def close(self) -> None:
        if self._client is not None:
            await self._client.aclose()
            self._client = None

    def _connected(self) -> Redis:
        if self._client is None:
            from redis.asyncio import Redis

            self._client = Redis(**self.options)
            if self._connection_class is not None:
                self._client.connection_pool.connection_class = self._connection_class
        return self._client


def _are_hashes(found: Any, fields: Sequence[Sequence[bytes]]) -> bool:
    """Return whether an answer holds a value or nothing for each requested field."""
    return (
        isinstance(found, list)
        and len(found) == len(fields)
        and all(
            isinstance(values, list)
            and len(values) == len(names)
            and all(value is None or isinstance(value, bytes) for value in values)
            for values, names in zip(found, fields, strict=True)
        )
    )


def _sharing_tls(options: Mapping[str, Any]) -> type:
    """Connections that share one TLS context, made here: to make one takes longer than a connection
    may take to be made.
    """
    from redis.asyncio import Redis, SSLConnection

    pool: Any = Redis(**options).connection_pool
    context = pool.make_connection().ssl_context
    context.get()

    class Shared(SSLConnection):
        def __init__(self, **given: Any) -> None:
            super().__init__(**given)
            self.ssl_context = context

    return Shared


class RedisReader:
    """See the module docstring.

    Args:
        store: whose online store is one Redis.
        online_service: a feature service of users.
        token_version: the only version of summary tokens that is ever returned.

    Raises:
        WrongStoreError: the online store is another one, or a Redis Cluster.
    """

    def __init__(
        self,
        store: FeatureStore,
        contract: Contract,
        online_service: str,
        token_version: str | None = None,
    ) -> None:
        self.hashes = RedisHashes(store)
        self._decoder = UserDecoder(contract, token_version)
        self._plan = plan_of(store, online_service)
        self._key = _key_maker(
            store.config.project,
            store.config.entity_key_serialization_version,
            contract,
            self._plan,
        )
        self._token_version = token_version

    async def read_user(self, user_id: Id, timeout_s: float) -> UserRow:
        """One user's features, history and tokens.

        Raises:
            StoreReadError: there was no answer within `timeout_s` seconds, or none of a Redis that
                holds Feast's hashes.
        """
        values = await self.read_values(user_id, timeout_s)
        return self._decoder.row(user_id, values)

    async def close(self) -> None:
        await self.hashes.close()

    async def read_values(self, user_id: Id, timeout_s: float) -> dict[str, Any]:
        """Every feature of the service for a user, None where there is no value.

        Raises:
            StoreReadError: see `read_user`.
        """
        found = await self.read_raw(user_id, timeout_s)
        return {
            name: decoded(name, data, kind)
            for names, kinds, stored in zip(self._plan.names, self._plan.kinds, found, strict=True)
            for name, kind, data in zip(names, kinds, stored, strict=True)
        }

    async def read_raw(self, user_id: Id, timeout_s: float) -> list[list[bytes | None]]:
        """The same as stored, hash by hash in the order of the plan.

        Raises:
            StoreReadError: see `read_user`.
        """
        keys = self._key(user_id, self._token_version)
        return await self.hashes.read(keys, self._plan.fields, timeout_s)


def decoded(name: str, data: bytes | None, kind: str = "") -> Any:
    """Decode a stored Value; None without one.

    Args:
        kind: of value that it must be, such as `bytes_val`; "" for any.

    Raises:
        DamagedValueError: the bytes are no Value, or one of the wrong kind.
    """
    from feast.protos.feast.types.Value_pb2 import Value
    from google.protobuf.message import DecodeError

    if not data:
        return None
    if kind == TIME:
        return _time_of(name, data)
    try:
        value = Value.FromString(data)
    except DecodeError as error:
        raise DamagedValueError(f"{name} is stored as no value of Feast's: {error}") from error
    if kind and value.WhichOneof("val") not in (None, "null_val", kind):
        raise DamagedValueError(f"{name} is stored as {value.WhichOneof('val')}, expected {kind}")
    return plain_value(value)


def _time_of(name: str, data: bytes) -> int:
    """A stored time, microseconds since 1970."""
    from google.protobuf.message import DecodeError
    from google.protobuf.timestamp_pb2 import Timestamp

    try:
        read = Timestamp.FromString(data)
    except DecodeError as error:
        raise DamagedValueError(f"{name} is stored as no time: {error}") from error
    return int(read.seconds) * 1_000_000 + int(read.nanos) // 1000


def _key_maker(
    project: str, version: int, contract: Contract, plan: Plan
) -> Callable[[Id, str | None], list[bytes]]:
    """Redis keys of a user's hashes, by Feast's own encoder."""
    from feast.infra.online_stores.helpers import _redis_key
    from feast.protos.feast.types.EntityKey_pb2 import EntityKey
    from feast.protos.feast.types.Value_pb2 import Value

    user_key = contract.user.join_key
    text = contract.user.dtype is DType.STRING
    known = {user_key, TOKEN_VERSION.join_key}
    # A request names a user; no other entity of a key is known here.
    if unknown := {key for keys in plan.join_keys for key in keys} - known:
        raise WrongStoreError(f"a user's features are read by user alone, not by {sorted(unknown)}")

    def keys_of(user_id: Id, token_version: str | None) -> list[bytes]:
        # The value's type is part of the key: a number written as text would find nothing.
        user = Value(string_val=str(user_id)) if text else Value(int64_val=int(user_id))
        tokens = Value(string_val=token_version or "")
        return [
            _redis_key(
                project,
                EntityKey(
                    join_keys=keys, entity_values=[user if k == user_key else tokens for k in keys]
                ),
                entity_key_serialization_version=version,
            )
            for keys in plan.join_keys
        ]

    return keys_of
