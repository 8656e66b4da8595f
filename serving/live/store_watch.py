"""Looks at what the online store holds: the run that filled it, whether that is the one that was sent last, and
whether users who were sent are still there.

A store that was emptied says nothing; one that came back from an older copy, that lost a shard or evicts keys
answers as ever, and only what was noted elsewhere shows it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from feature_repo.contract.contract import EPOCH_RUN, STORE_EPOCH, STORE_PART
from feature_repo.datasets import load_contract
from feature_repo.home.known_users import SentUsers
from feature_repo.home.redis_client import client_of, with_socket_timeout
from feature_repo.settings import Settings
from feature_repo.store.online_users import STATS
from feature_repo.store.redis_writer import key_of_user
from feature_repo.store.store import STORE_ID, held_epoch, names_of_note, noted
from serving.live.notes import Notes
from serving.stores.opened import open_pinned
from serving.stores.redis_hashes import WrongStoreError, hashes_of
from serving.stores.redis_reader import decoded

if TYPE_CHECKING:
    from feast import FeatureStore

# The job whose run says that the store holds anything
FILLS_ONLINE = "materialize"
TIMEOUT_S = 0.2
INFO_S = 1.0
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class StoreState:
    """The result of a look at the store.

    Args:
        held: the run that the store says it holds; None where it holds none.
        sent: the run that was sent last, as the catalogue says; None where it says nothing.
        heard_at: when the catalogue was asked that, as `time.monotonic` has it.
        looked_for, missing: users who were sent, and how many of them are not there.
        parts, empty_parts: where a note of the run must stand, and how many of these have none: one, or many of a cluster.
        unread_parts: how many lie on a node that is away.
    """

    held: str | None
    sent: str | None = None
    heard_at: float = 0.0
    looked_for: int = 0
    missing: int = 0
    parts: int = 1
    empty_parts: int = 0
    unread_parts: int = 0

    @property
    def differs(self) -> bool:
        """True if the store holds another run than the one that was sent last, as far as is known."""
        return None not in (self.held, self.sent) and self.held != self.sent


LookAtStore = Callable[[], Awaitable[StoreState]]


class RedisLook:
    """A look at a Redis, in one round trip of each of its nodes.

    Args:
        notes: of the catalogue.
        users: those who were sent.

    Raises:
        WrongStoreError: the store is not Redis.
    """

    def __init__(self, store: FeatureStore, notes: Notes, users: SentUsers) -> None:
        from feast.infra.online_stores.helpers import _mmh3

        self.hashes = hashes_of(store)
        self._notes = notes
        self._users = users
        self._config = store.config
        online = store.config.online_store
        names = [names_of_note(online, note) for note in (FILLS_ONLINE, STORE_ID)]
        self._runs, self._ids = ([self._key_of_part(name) for name in of] for of in names)
        self._field = _mmh3(f"{STORE_EPOCH}:{EPOCH_RUN.name}")

    async def __call__(self) -> StoreState:
        """Look.

        Raises:
            StoreReadError: the store did not answer in its time.
        """
        users = await asyncio.to_thread(self._users.some)
        notes = [*self._runs, *self._ids]
        keys = [*notes, *(key_of_user(self._config, user) for user in users)]
        fields = [[self._field]] * len(notes) + [[f"_ts:{STATS}".encode()]] * len(users)
        found = await self.hashes.read_what_answers(keys, fields, TIMEOUT_S)
        said = found[: len(self._runs)]
        runs = [run for (run,) in _decoded(said) if run is not None]
        ids = _decoded(found[len(self._runs) : len(notes)])
        store_id = next((one for (one,) in ids if one is not None), None)
        sent = self._notes.sent(store_id, runs[0] if runs else None)
        # A cluster is as old as its oldest part.
        held = next((run for run in runs if run != sent.run), runs[0] if runs else None)
        # Of another run nobody knows who must be there.
        looked_for = [one for one in found[len(notes) :] if one is not None]
        if self._users.run != held:
            looked_for = []
        unread = sum(one is None for one in said)
        return StoreState(
            held,
            sent.run,
            sent.heard_at,
            len(looked_for),
            sum(stamp is None for (stamp,) in looked_for),
            len(said),
            len(said) - len(runs) - unread,
            unread,
        )

    def _key_of_part(self, name: str) -> bytes:
        from feast.infra.online_stores.helpers import _redis_key
        from feast.protos.feast.types.EntityKey_pb2 import EntityKey
        from feast.protos.feast.types.Value_pb2 import Value

        part = EntityKey(join_keys=[STORE_PART.join_key], entity_values=[Value(string_val=name)])
        version = self._config.entity_key_serialization_version
        key: bytes = _redis_key(
            self._config.project, part, entity_key_serialization_version=version
        )
        return key


def _decoded(found: Sequence[Sequence[bytes | None] | None]) -> list[list[str | None]]:
    """Notes of the parts that could be read."""
    return [[decoded(EPOCH_RUN.name, one) for one in of] for of in found if of is not None]


def why_it_may_lose_keys(store: FeatureStore) -> str | None:
    """Why a Redis may throw keys away; None of one that does not, that does not say, and of any other store."""
    import redis

    online = store.config.online_store
    if online.type != "redis":
        return None
    try:
        # A node that hangs holds up no look.
        limited = with_socket_timeout(online.connection_string, INFO_S)
        online = online.model_copy(update={"connection_string": limited})
        with closing(client_of(online)) as client:
            if isinstance(client, redis.RedisCluster):
                by_node: Any = client.info("memory", target_nodes=client.PRIMARIES)
                nodes = list(by_node.values())
            else:
                nodes = [client.info("memory")]
    except (redis.RedisError, redis.exceptions.RedisClusterException) as error:
        logger.info("Redis does not say what it does when its memory is full: %s", error)
        return None
    memory = next((one for one in nodes if _throws_away(one)), None)
    if memory is None:
        return None
    policy = memory["maxmemory_policy"]
    return (
        f"Redis has maxmemory {memory['maxmemory']:,} bytes and maxmemory-policy {policy}: once they are full it throws users and "
        "items away, and nobody is told. Set maxmemory-policy noeviction, under which writers are refused instead"
    )


def _throws_away(memory: dict[str, Any]) -> bool:
    """Return whether a server whose memory is full throws keys away, by what it says of itself."""
    policy = memory.get("maxmemory_policy", "noeviction")
    return policy != "noeviction" and bool(memory.get("maxmemory"))


def look_of(settings: Settings, notes: Notes) -> LookAtStore:
    """Looks at the store of these settings: at Redis by our own reader, at any other through Feast, which tells
    its run alone. It is opened at the first look, and again where that fails.
    """
    made: list[LookAtStore] = []

    async def look() -> StoreState:
        if not made:
            made.append(await asyncio.to_thread(_opened, settings, notes))
        return await made[0]()

    return look


def _opened(settings: Settings, notes: Notes) -> LookAtStore:
    if settings.profile != "production":

        async def at_the_file() -> StoreState:
            held = await asyncio.to_thread(held_epoch, settings, FILLS_ONLINE)
            sent = notes.sent(await asyncio.to_thread(held_epoch, settings, STORE_ID), held)
            return StoreState(held, sent.run, sent.heard_at)

        return at_the_file
    store = open_pinned(settings)
    if why := why_it_may_lose_keys(store):
        logger.warning(why)
    try:
        users = SentUsers(settings.home, load_contract(settings.dataset).user)
        return RedisLook(store, notes, users)
    except WrongStoreError:
        pass

    async def through_feast() -> StoreState:
        held = await asyncio.to_thread(noted, store, FILLS_ONLINE)
        sent = notes.sent(await asyncio.to_thread(noted, store, STORE_ID), held)
        return StoreState(held, sent.run, sent.heard_at)

    return through_feast
