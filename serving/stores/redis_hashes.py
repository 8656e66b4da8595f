"""Fields of hashes on Redis in one round trip, within its time; nothing is tried twice. Of one server, of the master that
Sentinels name, or of a cluster.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from feature_repo.errors import ExpectedError, said_by_redis
from feature_repo.home.redis_client import (
    CLUSTER,
    RedisAddress,
    async_client_of,
    kind_of,
    slot_of,
)

if TYPE_CHECKING:
    from feast import FeatureStore
    from redis.asyncio import Redis

Node = tuple[str, int]
Fields = Sequence[Sequence[bytes]]
Hash = list[bytes | None]
CONNECT_S = 0.05
logger = logging.getLogger(__name__)


class StoreReadError(Exception):
    """The online store did not answer in its time, or not as a store does."""


class ShardReadError(StoreReadError):
    """One node of a cluster did not; the others are well."""


class WrongStoreError(ExpectedError, ValueError):
    """The online store is not Redis."""


class Hashes(Protocol):
    """Reads hashes."""

    async def read(self, keys: Sequence[bytes], fields: Fields, timeout_s: float) -> list[Hash]:
        """One HMGET for each key.

        Raises:
            StoreReadError: there was no answer within `timeout_s` seconds, or none of a Redis that
                holds hashes there.
        """

    async def close(self) -> None:
        """Let go of connections."""


def hashes_of(store: FeatureStore, connect_s: float = CONNECT_S) -> RedisHashes | ClusterHashes:
    """Hashes of a store's Redis, whichever kind it is.

    Args:
        connect_s: how long a new connection may take.

    Raises:
        WrongStoreError: the online store is not Redis.
    """
    from feast.infra.online_stores.redis import RedisOnlineStoreConfig

    online = store.config.online_store
    if not isinstance(online, RedisOnlineStoreConfig):
        raise WrongStoreError(
            f"expected Redis, the online store is {online.type!r}: read it through Feast (FeastReader)"
        )
    if kind_of(online) == CLUSTER:
        return ClusterHashes(RedisAddress.parse(online.connection_string), connect_s)
    return RedisHashes(online, connect_s)


class RedisHashes:
    """Hashes of one server, all read of one moment. Belongs to the event loop that first reads with it.

    Args:
        online: the configuration of the online store.
        connect_s: how long a new connection may take.
    """

    def __init__(self, online: Any, connect_s: float = CONNECT_S) -> None:
        self._online = online.model_copy()
        self.options = _once(connect_s)
        self._client: Redis | None = None
        self._shared_tls: type | None = None
        if "ssl" in RedisAddress.parse(online.connection_string).options:
            self._shared_tls = _sharing_tls(self._made())

    async def read(self, keys: Sequence[bytes], fields: Fields, timeout_s: float) -> list[Hash]:
        return await _within(timeout_s, self._read(keys, fields))

    async def _read(self, keys: Sequence[bytes], fields: Fields) -> list[Hash]:
        return await _hmget(self._connected(), keys, fields, at_once=len(keys) > 1)

    async def close(self) -> None:
        if self._client is not None:
            await self._client.aclose()
            self._client = None

    def _connected(self) -> Redis:
        if self._client is None:
            self._client = self._made()
            if self._shared_tls is not None:
                self._client.connection_pool.connection_class = self._shared_tls
        return self._client

    def _made(self) -> Redis:
        client: Redis = async_client_of(self._online, **self.options)
        return client


class ClusterHashes:
    """Hashes of a Redis Cluster: each node is asked for those that it holds, all at once. Hashes of two nodes are not of
    one moment.

    Which slots a node holds is asked of the cluster at first, and again whenever a node says that a slot has moved or
    does not answer. A node that did not answer is left alone for a moment, and the others are read as ever.

    Args:
        address: nodes to begin with.
        connect_s: how long a new connection may take.
    """

    # Failures in a row after which a node is left alone for a while
    FAILURES = 3
    PAUSE_S = 0.25
    # For one node to say which slots are where
    LEARN_S = 1.0

    def __init__(self, address: RedisAddress, connect_s: float = CONNECT_S) -> None:
        self._given = address.nodes
        self._options = {**address.of_data, **_once(connect_s)}
        self._clients: dict[Node, Redis] = {}
        self._shared_tls: type | None = None
        if "ssl" in self._options:
            self._shared_tls = _sharing_tls(self._new(self._given[0]))
        self._node_of: dict[int, Node] = {}
        self._learning: asyncio.Task[None] | None = None
        self._learned_at = 0.0
        self._failures: dict[Node, int] = {}
        self._silent_until: dict[Node, float] = {}

    async def read(self, keys: Sequence[bytes], fields: Fields, timeout_s: float) -> list[Hash]:
        return await _within(timeout_s, self._read(keys, fields))

    async def close(self) -> None:
        if self._learning is not None:
            self._learning.cancel()
        for client in self._clients.values():
            await client.aclose()
        self._clients.clear()

    async def _read(self, keys: Sequence[bytes], fields: Fields) -> list[Hash]:
        if not self._node_of:
            await self._learn()
        places: dict[Node, list[int]] = {}
        for place, key in enumerate(keys):
            places.setdefault(self._holder(slot_of(key)), []).append(place)
        asked = [self._ask(node, keys, fields, own) for node, own in places.items()]
        found = await asyncio.gather(*asked)
        by_place = {place: one for part in found for place, one in part.items()}
        return [by_place[place] for place in range(len(keys))]

    def _holder(self, slot: int) -> Node:
        node = self._node_of.get(slot)
        if node is None:
            self._learn_soon()
            raise ShardReadError(f"no node of the cluster holds slot {slot}")
        return node

    async def _ask(
        self, node: Node, keys: Sequence[bytes], fields: Fields, places: Sequence[int]
    ) -> dict[int, Hash]:
        """Hashes of one node by their place; those of slots that have moved, from where they are now."""
        import redis.exceptions

        if time.monotonic() < self._silent_until.get(node, 0.0):
            self._learn_soon()
            raise ShardReadError(f"the cluster's node {node[0]}:{node[1]} is away")
        own_keys = [keys[place] for place in places]
        own_fields = [fields[place] for place in places]
        try:
            found = await _hmget(self._client_of(node), own_keys, own_fields)
        except redis.exceptions.AskError:  # or MovedError, which is one
            self._learn_soon()
            found = [
                await self._follow(node, key, names)
                for key, names in zip(own_keys, own_fields, strict=True)
            ]
        except asyncio.CancelledError:
            # Its time is over.
            self._failed(node)
            raise
        except (OSError, redis.exceptions.ConnectionError, redis.exceptions.TimeoutError) as error:
            self._failed(node)
            raise ShardReadError(
                f"the cluster's node {node[0]}:{node[1]} did not answer: {type(error).__name__}: {error}"
            ) from error
        self._failures.pop(node, None)
        return dict(zip(places, found, strict=True))

    def _failed(self, node: Node) -> None:
        """Count a failure of a node, whose slots may be elsewhere by now."""
        self._failures[node] = self._failures.get(node, 0) + 1
        if self._failures[node] >= self.FAILURES:
            self._silent_until[node] = time.monotonic() + self.PAUSE_S
        self._learn_soon()

    async def _follow(self, node: Node, key: bytes, names: Sequence[bytes]) -> Hash:
        """One hash of a slot that is, or is being, moved: where the node says, and there once."""
        import redis.exceptions

        try:
            (found,) = await _hmget(self._client_of(node), [key], [names])
            return found
        except redis.exceptions.MovedError as error:
            (found,) = await _hmget(self._client_of((error.host, error.port)), [key], [names])
            return found
        except redis.exceptions.AskError as error:
            there = self._client_of((error.host, error.port))
            async with there.pipeline(transaction=False) as pipe:
                pipe.execute_command("ASKING")
                pipe.hmget(key, list(names))  # type: ignore[arg-type]  # keys are bytes
                answers: Any = await pipe.execute()
            return _as_hashes(answers[1:], [names])[0]

    # --- which node holds what

    async def _learn(self) -> None:
        """Ask the cluster, once for all who wait."""
        if self._learning is None or self._learning.done():
            self._learning = asyncio.create_task(self._ask_for_slots())
        await asyncio.shield(self._learning)

    def _learn_soon(self) -> None:
        """Ask behind this request, which does not wait."""
        late = time.monotonic() > self._learned_at + self.PAUSE_S
        if late and (self._learning is None or self._learning.done()):
            self._learning = asyncio.create_task(self._ask_for_slots())
            self._learning.add_done_callback(_heard)

    async def _ask_for_slots(self) -> None:
        import redis.exceptions

        self._learned_at = time.monotonic()
        said = []
        for node in dict.fromkeys([*self._clients, *self._given]):
            try:
                async with asyncio.timeout(self.LEARN_S):
                    client: Any = self._client_of(node)
                    ranges = await client.execute_command("CLUSTER", "SLOTS")
            except (TimeoutError, OSError, redis.exceptions.RedisError) as error:
                said.append(f"{node[0]}:{node[1]}: {type(error).__name__}: {error}")
                continue
            # A node that does not know its own name leaves it out.
            self._node_of = {
                slot: (host.decode() if host else node[0], port)
                for first, last, (host, port, *_), *_ in ranges
                for slot in range(first, last + 1)
            }
            await self._close_all_but({*self._node_of.values(), *self._given})
            return
        raise StoreReadError(f"no node of the cluster says which holds what: {'; '.join(said)}")

    async def _close_all_but(self, nodes: set[Node]) -> None:
        """Let go of nodes that have left the cluster."""
        for node in set(self._clients) - nodes:
            await self._clients.pop(node).aclose()

    def _client_of(self, node: Node) -> Redis:
        if node not in self._clients:
            self._clients[node] = self._new(node)
            if self._shared_tls is not None:
                self._clients[node].connection_pool.connection_class = self._shared_tls
        return self._clients[node]

    def _new(self, node: Node) -> Redis:
        from redis.asyncio import Redis

        return Redis(host=node[0], port=node[1], **self._options)


def _heard(learning: asyncio.Task[None]) -> None:
    """Say what nobody waits for."""
    if not learning.cancelled() and (error := learning.exception()):
        logger.info("%s", error)


def _once(connect_s: float) -> dict[str, Any]:
    """Options of connections by which nothing is tried twice."""
    return {"socket_connect_timeout": connect_s, "retry": None, "retry_on_error": []}


async def _within(timeout_s: float, reading: Awaitable[list[Hash]]) -> list[Hash]:
    """Read within a time; what a client raises becomes one error."""
    import redis.exceptions

    try:
        async with asyncio.timeout(timeout_s):
            return await reading
    except (redis.exceptions.ResponseError, redis.exceptions.AuthenticationError) as error:
        raise StoreReadError(f"Redis refused to answer: {said_by_redis(error)}") from error
    except (TimeoutError, OSError, redis.exceptions.RedisError) as error:
        raise StoreReadError(
            f"Redis did not answer within {1000 * timeout_s:.0f} ms: {type(error).__name__}: {error}"
        ) from error


async def _hmget(
    client: Redis, keys: Sequence[bytes], fields: Fields, *, at_once: bool = False
) -> list[Hash]:
    """HMGET of one server.

    Args:
        at_once: all of one moment, which a cluster's node cannot give.

    Raises:
        StoreReadError: what answers is no Redis.
    """
    try:
        async with client.pipeline(at_once) as pipe:
            for key, names in zip(keys, fields, strict=True):
                pipe.hmget(key, list(names))  # type: ignore[arg-type]  # keys are bytes
            found: Any = await pipe.execute()
    except (TypeError, ValueError, AttributeError, IndexError, KeyError) as error:
        # The client's own parsers meet a shape that no Redis sends.
        found = error
    try:
        return _as_hashes(found, fields)
    except StoreReadError:
        # What follows on these connections may be the rest of such an answer.
        await client.connection_pool.disconnect(inuse_connections=False)
        raise


def _as_hashes(found: Any, fields: Fields) -> list[Hash]:
    """An answer that holds a value or nothing for each requested field."""
    if (
        isinstance(found, list)
        and len(found) == len(fields)
        and all(
            isinstance(values, list)
            and len(values) == len(names)
            and all(value is None or isinstance(value, bytes) for value in values)
            for values, names in zip(found, fields, strict=True)
        )
    ):
        return found
    raise StoreReadError(
        f"what answers is no Redis: to HMGET of {len(fields)} hashes came {type(found).__name__}"
    )


def _sharing_tls(client: Any) -> type:
    """Connections that share one TLS context, made here: to make one takes longer than a connection
    may take to be made.
    """
    pool = client.connection_pool
    context = pool.make_connection().ssl_context
    context.get()
    kind: Any = pool.connection_class

    class Shared(kind):  # type: ignore[misc]  # known when it runs
        def __init__(self, **given: Any) -> None:
            super().__init__(**given)
            self.ssl_context = context

    return Shared
