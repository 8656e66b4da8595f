"""Fields of hashes on Redis in one round trip, within its time; nothing is tried twice. Of one server, of the master that
Sentinels name, or of a cluster.

Which server holds what is learned behind the reads: a Sentinel or a node that hangs takes no read's time.
"""

from __future__ import annotations

import asyncio
import logging
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Coroutine, Iterable, Sequence
from contextlib import aclosing
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from feature_repo.errors import ExpectedError, said_by_redis
from feature_repo.home.redis_client import (
    CLUSTER,
    SENTINEL,
    SLOTS,
    RedisAddress,
    kind_of,
    node_client,
    slot_of,
)

if TYPE_CHECKING:
    from feast import FeatureStore
    from redis.asyncio import Redis

Node = tuple[str, int]
Fields = Sequence[Sequence[bytes]]
Hash = list[bytes | None]
Answer = TypeVar("Answer")
CONNECT_S = 0.05
logger = logging.getLogger(__name__)


class StoreReadError(Exception):
    """The online store did not answer in its time, or not as a store does."""


class ShardReadError(StoreReadError):
    """One node of a cluster did not; the others are well."""


class WrongStoreError(ExpectedError, ValueError):
    """The online store is not Redis."""


class Hashes(Protocol):
    """Reads hashes. Belongs to the event loop that first reads with it.

    Example:
        >>> hashes = hashes_of(store)
        >>> await hashes.read([key], [[b"_ts:user_stats"]], timeout_s=0.05)
        [[None]]
    """

    async def read(self, keys: Sequence[bytes], fields: Fields, timeout_s: float) -> list[Hash]:
        """One HMGET for each key.

        Raises:
            StoreReadError: there was no answer within `timeout_s` seconds, or none of a Redis that
                holds hashes there.
        """

    async def read_what_answers(
        self, keys: Sequence[bytes], fields: Fields, timeout_s: float
    ) -> list[Hash | None]:
        """The same, with None for hashes of a node that is away while others answer.

        Raises:
            StoreReadError: no node answered.
        """

    async def close(self) -> None:
        """Let go of connections."""


def hashes_of(store: FeatureStore, connect_s: float = CONNECT_S) -> Hashes:
    """Hashes of a store's Redis, whichever kind it is.

    Args:
        connect_s: how long a new connection may take.

    Raises:
        WrongStoreError: the online store is not Redis.
        SettingsError: its address cannot be read, or has an option that redis-py does not know.
    """
    from feast.infra.online_stores.redis import RedisOnlineStoreConfig

    online = store.config.online_store
    if not isinstance(online, RedisOnlineStoreConfig):
        raise WrongStoreError(
            f"expected Redis, the online store is {online.type!r}: read it through Feast (FeastReader)"
        )
    address = RedisAddress.parse(online.connection_string)
    if kind_of(online) == CLUSTER:
        return ClusterHashes(address, connect_s)
    if kind_of(online) == SENTINEL:
        return SentinelHashes(address, online.sentinel_master, connect_s)
    return RedisHashes(address, connect_s)


class RedisHashes:
    """Hashes of one server, all read of one moment.

    Args:
        address: of the server.
        connect_s: how long a new connection may take.
    """

    def __init__(self, address: RedisAddress, connect_s: float = CONNECT_S) -> None:
        host, port = address.nodes[0]
        self.options: dict[str, Any] = {"host": host, "port": port, **_once(address, connect_s)}
        self._client: Redis | None = None
        self._shared_tls = _shared_tls(self.options)

    async def read(self, keys: Sequence[bytes], fields: Fields, timeout_s: float) -> list[Hash]:
        if self._client is None:
            self._client = _client(self.options, self._shared_tls)
        reading = _hmget(self._client, keys, fields, at_once=len(keys) > 1)
        return await _within(timeout_s, reading)

    async def read_what_answers(
        self, keys: Sequence[bytes], fields: Fields, timeout_s: float
    ) -> list[Hash | None]:
        return list(await self.read(keys, fields, timeout_s))

    async def close(self) -> None:
        if self._client is not None:
            await self._client.aclose()
            self._client = None


class _Learning(ABC):
    """Clients of nodes, and what is learned of them behind the reads.

    Args:
        address: nodes to ask.
        connect_s: how long a new connection may take.
    """

    # For one node to say what it knows
    LEARN_S = 1.0
    # Between two questions
    PAUSE_S = 0.25
    # After so long a client that nobody used is closed
    UNUSED_S = 30.0

    def __init__(self, address: RedisAddress, connect_s: float) -> None:
        self._given = address.nodes
        self._options = _once(address, connect_s)
        host, port = self._given[0]
        self._shared_tls = _shared_tls({**self._options, "host": host, "port": port})
        self._clients: dict[Node, Redis] = {}
        self._used: dict[Node, float] = {}
        self._learning: asyncio.Task[None] | None = None
        self._learned_at = -self.PAUSE_S

    @abstractmethod
    async def _learn(self) -> None:
        """Ask who holds what.

        Raises:
            StoreReadError: no node says it.
        """

    async def close(self) -> None:
        if self._learning is not None:
            self._learning.cancel()
        for client in self._clients.values():
            await client.aclose()
        self._clients.clear()

    async def _learned(self, deadline: float) -> None:
        """Wait for what is being learned, within a time; it goes on behind."""
        learning = self._learn_now()
        try:
            async with asyncio.timeout_at(deadline):
                await asyncio.shield(learning)
        except TimeoutError as error:
            raise StoreReadError("nobody has said in time which Redis holds what") from error

    def _learn_soon(self, after_s: float = 0.0) -> None:
        """Learn behind the reads, where that was not just done."""
        if time.monotonic() > self._learned_at + max(after_s, self.PAUSE_S):
            self._learn_now().add_done_callback(_heard)

    def _learn_now(self) -> asyncio.Task[None]:
        if self._learning is None or self._learning.done():
            self._learned_at = time.monotonic()
            self._learning = asyncio.create_task(self._learn())
        return self._learning

    def _client_of(self, node: Node) -> Redis:
        self._used[node] = time.monotonic()
        if node not in self._clients:
            options = {**self._options, "host": node[0], "port": node[1]}
            self._clients[node] = _client(options, self._shared_tls)
        return self._clients[node]

    async def _close_unused(self, kept: set[Node]) -> None:
        """Let go of nodes that hold nothing and were not asked for long."""
        late = time.monotonic() - self.UNUSED_S
        for node in [
            node for node in self._clients if node not in kept and self._used[node] < late
        ]:
            await self._clients.pop(node).aclose()


class SentinelHashes(_Learning):
    """Hashes of the master that Sentinels name, all read of one moment. Sentinels are asked all at once, at first, after a
    failure, and every second in which something is read: a master that was demoted answers on.

    Args:
        master: what Sentinels call it.
    """

    AGAIN_S = 1.0

    def __init__(self, address: RedisAddress, master: str, connect_s: float = CONNECT_S) -> None:
        super().__init__(address, connect_s)
        self._name = master
        self._of_sentinels = {**address.of_sentinels, "socket_timeout": self.LEARN_S}
        self._master: Node | None = None

    async def read(self, keys: Sequence[bytes], fields: Fields, timeout_s: float) -> list[Hash]:
        deadline = asyncio.get_running_loop().time() + timeout_s
        if self._master is None:
            await self._learned(deadline)
        self._learn_soon(self.AGAIN_S)
        assert self._master is not None
        left = deadline - asyncio.get_running_loop().time()
        try:
            reading = _hmget(self._client_of(self._master), keys, fields, at_once=len(keys) > 1)
            return await _within(left, reading)
        except StoreReadError:
            self._learn_soon()
            raise

    async def read_what_answers(
        self, keys: Sequence[bytes], fields: Fields, timeout_s: float
    ) -> list[Hash | None]:
        return list(await self.read(keys, fields, timeout_s))

    async def _learn(self) -> None:
        async with aclosing(_first_answers(self._said_by(node) for node in self._given)) as answers:
            self._master = await anext(answers)
        await self._close_unused({self._master})

    async def _said_by(self, node: Node) -> Node:
        """The master's address by one Sentinel.

        Raises:
            StoreReadError: it knows none that is up, or does not answer.
        """
        import redis.exceptions

        sentinel = node_client(node, self._of_sentinels)
        try:
            async with asyncio.timeout(self.LEARN_S):
                masters = await sentinel.sentinel_masters()
        except (OSError, redis.exceptions.RedisError) as error:
            raise StoreReadError(f"{node[0]}:{node[1]}: {said_by_redis(error)}") from error
        finally:
            await sentinel.aclose()
        state = masters.get(self._name)
        if not state or state["is_sdown"] or state["is_odown"]:
            raise StoreReadError(f"{node[0]}:{node[1]} knows of none that is up")
        return str(state["ip"]), int(state["port"])


class ClusterHashes(_Learning):
    """Hashes of a Redis Cluster: each node is asked for its own, all at once. Hashes of two nodes are not of
    one moment.

    Which slots a node holds is asked of the cluster at first, and again whenever a node says that a slot has moved or
    does not answer. A node that did not answer is left alone for a moment, and the others are read as ever.

    Args:
        address: nodes to begin with.
        connect_s: how long a new connection may take.
    """

    # Failures in a row after which a node is left alone for a while
    FAILURES = 3

    def __init__(self, address: RedisAddress, connect_s: float = CONNECT_S) -> None:
        super().__init__(address, connect_s)
        self._node_of: dict[int, Node] = {}
        self._failures: dict[Node, int] = {}
        self._silent_until: dict[Node, float] = {}

    async def read(self, keys: Sequence[bytes], fields: Fields, timeout_s: float) -> list[Hash]:
        found = await self._read(keys, fields, timeout_s)
        for one in found:
            if isinstance(one, StoreReadError):
                raise one
        return [one for one in found if not isinstance(one, StoreReadError)]

    async def read_what_answers(
        self, keys: Sequence[bytes], fields: Fields, timeout_s: float
    ) -> list[Hash | None]:
        found = await self._read(keys, fields, timeout_s)
        answers = [None if isinstance(one, StoreReadError) else one for one in found]
        if not any(one is not None for one in answers):
            raise next(one for one in found if isinstance(one, StoreReadError))
        return answers

    async def _read(
        self, keys: Sequence[bytes], fields: Fields, timeout_s: float
    ) -> list[Hash | StoreReadError]:
        """Each hash, or the error in its place."""
        deadline = asyncio.get_running_loop().time() + timeout_s
        if not self._node_of:
            await self._learned(deadline)
        # 1. Find who holds what.
        places: dict[Node, list[int]] = {}
        by_place: dict[int, Hash | StoreReadError] = {}
        for place, key in enumerate(keys):
            slot = slot_of(key)
            if (node := self._node_of.get(slot)) is None:
                self._learn_soon()
                by_place[place] = ShardReadError(f"no node of the cluster holds slot {slot}")
            else:
                places.setdefault(node, []).append(place)
        # 2. Ask all of them; each ends by the deadline.
        asked = [
            self._ask(node, [keys[n] for n in own], [fields[n] for n in own], deadline)
            for node, own in places.items()
        ]
        for own, found in zip(places.values(), await asyncio.gather(*asked), strict=True):
            for number, place in enumerate(own):
                by_place[place] = found if isinstance(found, StoreReadError) else found[number]
        return [by_place[place] for place in range(len(keys))]

    async def _ask(
        self, node: Node, keys: Sequence[bytes], fields: Fields, deadline: float
    ) -> list[Hash] | StoreReadError:
        """Hashes of one node, or why there are none."""
        import redis.exceptions

        named = f"the cluster's node {node[0]}:{node[1]}"
        if self._failures.get(node, 0) >= self.FAILURES:
            now = time.monotonic()
            if now < self._silent_until[node]:
                return ShardReadError(f"{named} is away; it is tried again in a moment")
            # This read tries; others do not wait with it.
            self._silent_until[node] = now + self.PAUSE_S
        try:
            async with asyncio.timeout_at(deadline):
                found = await self._followed(node, keys, fields)
        except (
            OSError,
            redis.exceptions.ConnectionError,
            redis.exceptions.TimeoutError,
            redis.exceptions.ClusterDownError,
            redis.exceptions.MasterDownError,
            redis.exceptions.TryAgainError,
        ) as error:
            self._failures[node] = self._failures.get(node, 0) + 1
            self._silent_until[node] = time.monotonic() + self.PAUSE_S
            # Its slots may be elsewhere by now.
            self._learn_soon()
            failed = ShardReadError(f"{named} did not answer: {said_by_redis(error)}")
            failed.__cause__ = error
            return failed
        except (redis.exceptions.ResponseError, StoreReadError) as error:
            refused = StoreReadError(f"{named} refused to answer: {said_by_redis(error)}")
            refused.__cause__ = error
            return refused
        self._failures.pop(node, None)
        return found

    async def _followed(self, node: Node, keys: Sequence[bytes], fields: Fields) -> list[Hash]:
        """Hashes of one node; those of slots that have moved, or are being moved, from where it says that they are."""
        import redis.exceptions

        try:
            return await _hmget(self._client_of(node), keys, fields)
        except redis.exceptions.AskError:  # or MovedError, which is one
            self._learn_soon()
        return [
            await self._follow(node, key, names) for key, names in zip(keys, fields, strict=True)
        ]

    async def _follow(self, node: Node, key: bytes, names: Sequence[bytes]) -> Hash:
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

    async def _learn(self) -> None:
        nodes = dict.fromkeys([*self._clients, *self._given])
        fullest: dict[int, Node] = {}
        # A node that was parted from the others knows less than these.
        async with aclosing(_first_answers(self._slots_by(node) for node in nodes)) as answers:
            async for found in answers:
                fullest = max(fullest, found, key=len)
                if len(fullest) == SLOTS:
                    break
        self._node_of = fullest
        await self._close_unused({*fullest.values(), *self._given})

    async def _slots_by(self, node: Node) -> dict[int, Node]:
        """The slots and who holds them, by one node.

        Raises:
            StoreReadError: it does not answer, or knows of none.
        """
        import redis.exceptions

        try:
            async with asyncio.timeout(self.LEARN_S):
                client: Any = self._client_of(node)
                ranges = await client.execute_command("CLUSTER", "SLOTS")
        except (OSError, redis.exceptions.RedisError) as error:
            raise StoreReadError(f"{node[0]}:{node[1]}: {said_by_redis(error)}") from error
        if not ranges:
            raise StoreReadError(f"{node[0]}:{node[1]} knows of no slot")
        # A node that does not know its own name leaves it out.
        return {
            slot: (host.decode() if host else node[0], int(port))
            for first, last, (host, port, *_), *_ in ranges
            for slot in range(first, last + 1)
        }


async def _first_answers(
    asked: Iterable[Coroutine[Any, Any, Answer]],
) -> AsyncGenerator[Answer, None]:
    """Answers of nodes that are asked all at once, as they come; those behind the last that is wanted are not waited for.

    Raises:
        StoreReadError: none answered.
    """
    tasks = [asyncio.create_task(one) for one in asked]
    said: list[str] = []
    try:
        for task in asyncio.as_completed(tasks):
            try:
                yield await task
            except StoreReadError as error:
                said.append(str(error))
        if len(said) == len(tasks):
            raise StoreReadError(f"nobody says which Redis holds what: {'; '.join(said)}")
    finally:
        for one in tasks:
            one.cancel()


def _heard(learning: asyncio.Task[None]) -> None:
    """Say an error that no read waits for."""
    if not learning.cancelled() and (error := learning.exception()):
        logger.info("%s", error)


def _once(address: RedisAddress, connect_s: float) -> dict[str, Any]:
    """Options of connections by which nothing is tried twice."""
    once: dict[str, Any] = {
        "socket_connect_timeout": connect_s,
        "retry": None,
        "retry_on_error": [],
    }
    return {**address.of_data, **once}


def _client(options: dict[str, Any], shared_tls: type | None) -> Redis:
    """A client of one server."""
    client: Redis = node_client((options["host"], options["port"]), options)
    if shared_tls is not None:
        client.connection_pool.connection_class = shared_tls
    return client


async def _within(timeout_s: float, reading: Coroutine[Any, Any, list[Hash]]) -> list[Hash]:
    """Read within a time; what a client raises becomes one error."""
    import redis.exceptions

    try:
        async with asyncio.timeout(timeout_s):
            return await reading
    except (redis.exceptions.ResponseError, redis.exceptions.AuthenticationError) as error:
        raise StoreReadError(f"Redis refused to answer: {said_by_redis(error)}") from error
    except (TimeoutError, OSError, redis.exceptions.RedisError) as error:
        raise StoreReadError(
            f"Redis did not answer within {1000 * timeout_s:.0f} ms: {said_by_redis(error)}"
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


def _shared_tls(options: dict[str, Any]) -> type | None:
    """Connections that share one TLS context, made here: to make one takes longer than a connection
    may take to be made. None without TLS.

    Raises:
        SettingsError: an option that redis-py does not know.
    """
    pool = node_client((options["host"], options["port"]), options).connection_pool
    if not options.get("ssl"):
        return None
    context = pool.make_connection().ssl_context
    context.get()
    kind: Any = pool.connection_class

    class Shared(kind):  # type: ignore[misc]  # known when it runs
        def __init__(self, **given: Any) -> None:
            super().__init__(**given)
            self.ssl_context = context

    return Shared
