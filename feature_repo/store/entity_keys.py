"""Keys of the online store on Redis, read to their last byte: an entity key as Feast serialises it, and the project
behind it.

Two projects may share one Redis, and the name of one may be the end of the other's: only the length of each part
tells where the project begins.

Layout (Feast 0.67, serialisation version 3), numbers of 4 bytes, little endian:

    number of join keys | for each: type, length, name | for each: type, length, value | project
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

_NUMBER = struct.Struct("<I")
# An entity has a few join keys; a number beyond is no entity key's
MOST_JOIN_KEYS = 64


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
