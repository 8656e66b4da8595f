"""Users read straight from Redis, in Feast's own layout: one round trip, within its time, and never
twice.

Feast's SDK resolves the feature service anew for each request and waits as long as Redis takes: tens
of seconds where it stands still. Here the service is compiled once into a plan: which keys, which
fields, in which order. `FeastReader` is the oracle; on random data both agree, value for value.

Layout (Feast 0.67): a hash for each entity, its key the serialised entity key and the project; field
mmh3("view:feature") holds a Value.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from feature_repo.contract.contract import (
    TOKEN_VERSION,
    Contract,
)
from feature_repo.contract.schema import DType
from feature_repo.store.online_users import plain_value
from serving.stores.features import UserDecoder, UserRow
from serving.stores.items import Id
from serving.stores.redis_hashes import StoreReadError, WrongStoreError, hashes_of

if TYPE_CHECKING:
    from feast import FeatureStore


# The kind of a stored time, which is no value of Feast's
TIME = "time"


class DamagedValueError(StoreReadError):
    """A stored value of one user is damaged; the store itself is well."""


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


class RedisReader:
    """See the module docstring.

    Args:
        store: whose online store is Redis.
        online_service: a feature service of users.
        token_version: the only version of summary tokens that is ever returned.

    Raises:
        WrongStoreError: the online store is another one.
    """

    def __init__(
        self,
        store: FeatureStore,
        contract: Contract,
        online_service: str,
        token_version: str | None = None,
    ) -> None:
        self.hashes = hashes_of(store)
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
        return await self.hashes.read(self.keys_of(user_id), self._plan.fields, timeout_s)

    def keys_of(self, user_id: Id) -> list[bytes]:
        """The keys of a user's hashes, in the order of the plan."""
        return self._key(user_id, self._token_version)


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
