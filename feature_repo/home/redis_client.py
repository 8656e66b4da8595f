"""The address of the online store's Redis, and clients: of one server, of a cluster, or of the master that Sentinels
name.

`MEMOIR_REDIS` is an address as Feast writes it or a URL, in which every character of a password can be said:

    redis:6379,username=memoir,password=…,ssl=true
    rediss://memoir:p%2Cw@redis-1:6379,redis-2:6379/0?ssl_ca_certs=/etc/ca.pem

Several hosts are the nodes of a cluster (`MEMOIR_REDIS_TYPE=redis_cluster`) or the Sentinels
(`redis_sentinel`), whose own `sentinel_username` and `sentinel_password` are options too.
"""

from __future__ import annotations

import json
from binascii import crc_hqx
from dataclasses import dataclass, field
from functools import cache
from typing import Any
from urllib.parse import parse_qsl, unquote

from feature_repo.errors import SettingsError

CLUSTER = "redis_cluster"
SENTINEL = "redis_sentinel"
KINDS = ("redis", CLUSTER, SENTINEL)
SLOTS = 16_384  # of a cluster
SCHEMES = {"redis": False, "rediss": True}
PORT = 6379
# Options that are what they are, also where they read as a number or as true
TEXTS = frozenset({"username", "password", "sentinel_username", "sentinel_password"})


@dataclass(frozen=True)
class RedisAddress:
    """The address of a Redis.

    Args:
        nodes: host and port of the server, of nodes of the cluster, or of Sentinels.
        options: of redis-py's clients, by name.

    Example:
        >>> RedisAddress.parse("redis://:a%2Cb@store:6380").options
        {'password': 'a,b'}
    """

    nodes: tuple[tuple[str, int], ...]
    options: dict[str, Any] = field(default_factory=dict)

    @staticmethod
    def parse(text: str) -> RedisAddress:
        """Read an address; what it holds is shown by no error.

        Raises:
            SettingsError: it is neither form.
        """
        return _of_url(text) if "://" in text else _of_list(text)

    @property
    def of_sentinels(self) -> dict[str, Any]:
        """Options of connections to Sentinels, which have users of their own."""
        shared = {name: value for name, value in self.options.items() if name.startswith("ssl")}
        own = {
            name.removeprefix("sentinel_"): value
            for name, value in self.options.items()
            if name.startswith("sentinel_")
        }
        times = {name: value for name, value in self.options.items() if name.startswith("socket_")}
        return {**shared, **times, **own}

    @property
    def of_data(self) -> dict[str, Any]:
        """Options of connections to the servers that hold the data."""
        return {k: value for k, value in self.options.items() if not k.startswith("sentinel_")}


def kind_of(online: Any) -> str:
    """Which of `KINDS` an online store's configuration names."""
    kind: str = online.redis_type.value
    return kind


def is_cluster(online: Any) -> bool:
    """Return whether an online store is a Redis Cluster."""
    return online.type == "redis" and kind_of(online) == CLUSTER


def client_of(online: Any) -> Any:
    """A new `Redis` or `RedisCluster` for an online store's configuration, which is of Feast's type `redis`; their types
    say text where bytes go as well.

    Raises:
        SettingsError: its address cannot be read, or has an option that redis-py does not know.
    """
    import redis.cluster
    import redis.sentinel

    return _made(redis, online)


def async_client_of(online: Any) -> Any:
    """The same for an event loop, to which the client belongs from its first command on.

    Raises:
        SettingsError: see `client_of`.
    """
    import redis.asyncio.cluster
    import redis.asyncio.sentinel

    return _made(redis.asyncio, online)


def node_client(node: tuple[str, int], options: dict[str, Any]) -> Any:
    """A client of one server for an event loop.

    Raises:
        SettingsError: an option that redis-py does not know.
    """
    import redis.asyncio

    try:
        made: Any = redis.asyncio.Redis(**{**options, "host": node[0], "port": node[1]})
        # Options are looked at by a connection alone, and the first is made within a read's time.
        made.connection_pool.make_connection()
        return made
    except TypeError as error:
        raise _unknown_option(error) from error


def _made(package: Any, online: Any) -> Any:
    """A client of a package of redis-py's, which has the same names twice."""
    address = RedisAddress.parse(online.connection_string)
    options = address.of_data
    try:
        if kind_of(online) == CLUSTER:
            if options.pop("db", 0):
                raise SettingsError("MEMOIR_REDIS names a database, and a cluster has none but 0")
            nodes = [package.cluster.ClusterNode(host, port) for host, port in address.nodes]
            return package.cluster.RedisCluster(startup_nodes=nodes, **options)
        if kind_of(online) == SENTINEL:
            watchers = package.sentinel.Sentinel(
                list(address.nodes), sentinel_kwargs=address.of_sentinels, **options
            )
            return watchers.master_for(online.sentinel_master)
        host, port = address.nodes[0]
        return package.Redis(host=host, port=port, **options)
    except TypeError as error:
        raise _unknown_option(error) from error


def _unknown_option(error: TypeError) -> SettingsError:
    return SettingsError(f"MEMOIR_REDIS has an option that redis-py does not know: {error}")


def slot_of(key: bytes) -> int:
    """The slot of a cluster that holds a key."""
    from redis.crc import key_slot

    return int(key_slot(key))


def tag_of_slot(slot: int) -> str:
    """A short text that, in braces, puts a key into a slot of a cluster."""
    return _tags()[slot]


@cache
def _tags() -> list[str]:
    found: dict[int, str] = {}
    number = 0
    while len(found) < SLOTS:
        tag = f"{number:x}"
        # As `slot_of`, of a text without braces
        found.setdefault(crc_hqx(tag.encode(), 0) % SLOTS, tag)
        number += 1
    return [found[slot] for slot in range(SLOTS)]


def with_socket_timeout(text: str, seconds: float) -> str:
    """The same address with a limit to each answer, where it has none."""
    if "socket_timeout" in RedisAddress.parse(text).options:
        return text
    option = f"socket_timeout={seconds:g}"
    if "://" not in text:
        return f"{text},{option}"
    return f"{text}{'&' if '?' in text else '?'}{option}"


def _of_url(text: str) -> RedisAddress:
    scheme, _, rest = text.partition("://")
    if scheme not in SCHEMES:
        raise SettingsError(
            f"MEMOIR_REDIS begins with {scheme}://, expected redis:// or, with TLS, rediss://"
        )
    place, _, query = rest.partition("?")
    place, _, database = place.partition("/")
    who, _, hosts = place.rpartition("@")
    options: dict[str, Any] = {"ssl": True} if SCHEMES[scheme] else {}
    user, _, password = who.partition(":")
    options |= {"username": unquote(user)} if user else {}
    options |= {"password": unquote(password)} if password else {}
    if database:
        if not database.isdigit():
            raise SettingsError(
                "MEMOIR_REDIS names a database that is no number: expected redis://host:6379/0; a / or ? in a password "
                "is written %2F or %3F"
            )
        options["db"] = int(database)
    options |= {name: _value(name, value) for name, value in parse_qsl(query)}
    return RedisAddress(tuple(_node(host) for host in hosts.split(",")), options)


def _of_list(text: str) -> RedisAddress:
    nodes = []
    options = {}
    for part in text.split(","):
        name, equals, value = part.partition("=")
        if equals:
            options[name] = _value(name, value)
        elif options and ":" not in part:
            raise _no_node()
        else:
            nodes.append(_node(part))
    if not nodes:
        raise SettingsError("MEMOIR_REDIS names no host: expected host:6379,password=…")
    return RedisAddress(tuple(nodes), options)


def _node(text: str) -> tuple[str, int]:
    """Host and port; an IPv6 address stands in brackets."""
    host, colon, port = text.rpartition(":")
    if not colon or text.endswith("]"):
        host, port = text, str(PORT)
    host = host.removeprefix("[").removesuffix("]")
    if not host or not port.isdigit():
        raise _no_node()
    return host, int(port)


def _no_node() -> SettingsError:
    """The error for a part of an address; it may be the rest of a password, so it is not shown."""
    return SettingsError(
        "MEMOIR_REDIS has a part that is neither host:port nor option=value. A password that holds a comma is said in a "
        "URL: redis://user:first%2Csecond@host:6379"
    )


def _value(name: str, text: str) -> Any:
    """An option as redis-py takes it: numbers and true as such."""
    if name in TEXTS:
        return text
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text
