"""A view's values into Redis in Feast's own layout, where only a newer value replaces an older one.

Feast's writer reads the stored times, compares, then writes, so two that race can leave the older
value; with `skip_dedup` the last write wins, however old. Here one script on the server compares
and writes, key by key.

Layout (Feast 0.67): a hash for each entity, its key the serialised entity key and the project;
field mmh3("view:feature") holds a Value, field "_ts:view" the time of the row. A serialised entity key, version 3,
has numbers of 4 bytes, little endian:

    number of join keys | for each: type, length, name | for each: type, length, value | project

Two projects may share one Redis, and the name of one may be the end of the other's: only the length of each part
tells where the project begins.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any

from feature_repo.home.redis_client import client_of

if TYPE_CHECKING:
    from feast import FeatureStore

_NUMBER = struct.Struct("<I")
# An entity has a few join keys; a number beyond is no entity key's
MOST_JOIN_KEYS = 64
# The join key of users, whatever a dataset calls them (contract.py)
USER = "user_id"


# Keys of one round trip
PIECE = 1000
# KEYS: a hash. ARGV: the field of its time, the new time, "later" or "not earlier" (what replaces it),
# then fields and values.
COMPARE_AND_SET = """
local function time_of(bytes)
  local found, place = {0, 0}, 1
  while place <= #bytes do
    local field = math.floor(bytes:byte(place) / 8)
    local value, scale, byte = 0, 1, 128
    while byte >= 128 do
      place = place + 1
      byte = bytes:byte(place)
      value, scale = value + byte % 128 * scale, scale * 128
    end
    found[field], place = value, place + 1
  end
  return found[1], found[2]
end
local stored = redis.call('HGET', KEYS[1], ARGV[1])
if stored then
  local seconds, nanos = time_of(stored)
  local new_seconds, new_nanos = time_of(ARGV[2])
  local older = new_seconds < seconds or new_seconds == seconds and new_nanos < nanos
  if older or (ARGV[3] == 'later' and new_seconds == seconds and new_nanos == nanos) then
    return 0
  end
end
redis.call('HSET', KEYS[1], ARGV[1], ARGV[2], unpack(ARGV, 4))
return 1
"""


def write_newest(
    config: Any, view: str, rows: Sequence[tuple[Any, Mapping[str, Any], datetime, Any]]
) -> None:
    """Write rows of a view as Feast hands them on: entity key, values by feature, time, when it was made.
    One that is older than what is stored changes nothing.
    """
    from feast.infra.online_stores.helpers import _mmh3, _redis_key
    from google.protobuf.timestamp_pb2 import Timestamp

    client = client_of(config.online_store)
    version = config.entity_key_serialization_version
    for start in range(0, len(rows), PIECE):
        with client.pipeline(transaction=False) as pipe:
            for entity, values, at, _ in rows[start : start + PIECE]:
                stamp = Timestamp()
                stamp.FromDatetime(at)
                pairs = [
                    part
                    for name, value in values.items()
                    for part in (_mmh3(f"{view}:{name}"), value.SerializeToString())
                ]
                key = _redis_key(config.project, entity, entity_key_serialization_version=version)
                time = [f"_ts:{view}", stamp.SerializeToString(), "not earlier"]
                queue_script(pipe, COMPARE_AND_SET, [key], [*time, *pairs])
                expire(pipe, config.online_store, [key])
            pipe.execute()
    client.close()


def expire(client: Any, online: Any, keys: Sequence[bytes]) -> None:
    """Let keys that were just written expire as the online store's configuration says (`key_ttl_seconds`), as Feast's
    own writer does.
    """
    if not online.key_ttl_seconds:
        return
    for key in keys:
        client.expire(name=key, time=online.key_ttl_seconds)


def queue_script(pipe: Any, script: str, keys: Sequence[Any], arguments: Sequence[Any]) -> None:
    """Queue a script in a pipeline: by its text, since a cluster's pipeline takes no other."""
    pipe.execute_command("EVAL", script, len(keys), *keys, *arguments)


class RedisWriter:
    """Writes one view. Any number of writers may write the same keys at once.

    Args:
        store: whose online store is Redis.
        view: the feature view.

    Raises:
        ValueError: another online store.
    """

    def __init__(self, store: FeatureStore, view: str) -> None:
        from feast.infra.online_stores.helpers import _mmh3
        from feast.infra.online_stores.redis import RedisOnlineStoreConfig

        config = store.config
        if not isinstance(config.online_store, RedisOnlineStoreConfig):
            raise ValueError(
                f"compare-and-set wants Redis, the online store is {config.online_store.type!r}: write through Feast there"
            )
        definition = store.get_feature_view(view)
        self._keys = {
            column.name: column.dtype.to_value_type() for column in definition.entity_columns
        }
        self._fields = {
            f.name: (_mmh3(f"{view}:{f.name}"), f.dtype.to_value_type())
            for f in definition.features
        }
        self._time_field = f"_ts:{view}"
        self._online = config.online_store
        self._project = config.project
        self._version = config.entity_key_serialization_version
        self._client = client_of(config.online_store)

    def write(
        self,
        keys: Mapping[str, Sequence[Any]],
        values: Mapping[str, Sequence[Any]],
        times: Sequence[int],
    ) -> int:
        """Write rows; one that is not newer than what is stored changes nothing.

        Args:
            keys: of every join key of the view, a value for each row.
            values: for every feature of the view, a value for each row; None where there is no value.
            times: microseconds since 1970, not negative.

        Returns:
            Rows that were newer and are now stored.

        Raises:
            ValueError: keys or features that are not the view's, lengths that differ, or a negative
                time.
        """
        from feast.infra.online_stores.helpers import _redis_key
        from feast.protos.feast.types.EntityKey_pb2 import EntityKey
        from feast.type_map import python_values_to_proto_values
        from google.protobuf.timestamp_pb2 import Timestamp

        # 1. Refuse before anything is written.
        for what, expected, given in (
            ("join keys", self._keys, keys),
            ("features", self._fields, values),
        ):
            if set(given) != set(expected):
                raise ValueError(f"expected the {what} {sorted(expected)}, got {sorted(given)}")
        number = len(times)
        if lengths := {
            name: len(column)
            for name, column in {**keys, **values}.items()
            if len(column) != number
        }:
            raise ValueError(f"expected a value for each of {number} times, got {lengths}")
        if min(times, default=0) < 0:
            raise ValueError(f"expected times that are not negative, got {min(times)}")
        # 2. Values as Feast serialises them, a column at a time.
        names = sorted(keys)
        columns = [
            python_values_to_proto_values(list(keys[name]), self._keys[name]) for name in names
        ]
        features = [
            (field, python_values_to_proto_values(list(values[name]), kind))
            for name, (field, kind) in self._fields.items()
        ]
        # 3. A script for each row compares and writes in one step; pipelined, for a round trip costs more.
        written = 0
        for start in range(0, number, PIECE):
            keys_of_piece = []
            with self._client.pipeline(transaction=False) as pipe:
                for row in range(start, min(start + PIECE, number)):
                    entity = EntityKey(
                        join_keys=names, entity_values=[column[row] for column in columns]
                    )
                    seconds, micros = divmod(int(times[row]), 1_000_000)
                    time = Timestamp(seconds=seconds, nanos=1000 * micros).SerializeToString()
                    pairs = [
                        part
                        for field, column in features
                        for part in (field, column[row].SerializeToString())
                    ]
                    key = _redis_key(
                        self._project, entity, entity_key_serialization_version=self._version
                    )
                    keys_of_piece.append(key)
                    arguments = [self._time_field, time, "later", *pairs]
                    queue_script(pipe, COMPARE_AND_SET, [key], arguments)
                written += sum(pipe.execute())
                expire(pipe, self._online, keys_of_piece)
                pipe.execute()
        return written

    def remove(self, prefix: bytes) -> int:
        """Remove the rows of this view from all keys that begin so; returns how many there were.

        Args:
            prefix: of the serialised entity key.
        """
        special = b"\\*?[]^-"
        pattern = (
            b"".join(b"\\" + bytes([c]) if c in special else bytes([c]) for c in prefix) + b"*"
        )
        fields = [self._time_field, *(field for field, _ in self._fields.values())]
        removed = 0
        with self._client.pipeline(transaction=False) as pipe:
            for key in self._client.scan_iter(match=pattern, count=PIECE):
                stored = split_key(key)
                if stored is not None and stored.project == self._project.encode():
                    pipe.hdel(key, *fields)
                if len(pipe) >= PIECE:
                    removed += sum(gone > 0 for gone in pipe.execute())
            return removed + sum(gone > 0 for gone in pipe.execute())


@dataclass(frozen=True)
class StoredKey:
    """A key of Redis, split.

    Args:
        entity: the serialised entity key.
        project: whose it is.

    Example:
        >>> from feast.infra.online_stores.helpers import _redis_key
        >>> key = _redis_key("shop", EntityKey(join_keys=["user_id"], entity_values=[Value(int64_val=7)]))
        >>> split_key(key).project
        b'shop'
    """

    entity: bytes
    project: bytes


def split_key(key: bytes) -> StoredKey | None:
    """A key's parts; None of a key that is no entity's."""
    place = 4
    if len(key) < place:
        return None
    (number,) = _NUMBER.unpack_from(key)
    if not 0 < number <= MOST_JOIN_KEYS:
        return None
    # As many values as names, each behind its type and length
    for _ in range(2 * number):
        if len(key) < place + 8:
            return None
        (length,) = _NUMBER.unpack_from(key, place + 4)
        place += 8 + length
        if place > len(key):
            return None
    return StoredKey(key[:place], key[place:])


def key_of_user(config: Any, user_id: int | str) -> bytes:
    """The key of a user's hash on Redis.

    Args:
        config: of the Feast store.
    """
    from feast.infra.online_stores.helpers import _redis_key
    from feast.protos.feast.types.EntityKey_pb2 import EntityKey
    from feast.protos.feast.types.Value_pb2 import Value

    value = Value(string_val=user_id) if isinstance(user_id, str) else Value(int64_val=user_id)
    entity = EntityKey(join_keys=[USER], entity_values=[value])
    version = config.entity_key_serialization_version
    key: bytes = _redis_key(config.project, entity, entity_key_serialization_version=version)
    return key
