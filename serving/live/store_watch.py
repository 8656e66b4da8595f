"""Looks at what the online store holds: the run that filled it, whether that is the one that was sent last, and
whether users who were sent are still there.

A store that was emptied says nothing; one that came back from an older copy, that lost a shard or evicts keys
answers as ever, and only what was noted elsewhere shows it.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import UTC
from typing import TYPE_CHECKING

from sqlalchemy.exc import SQLAlchemyError

from feature_repo.contract.contract import EPOCH_RUN, STORE_EPOCH, STORE_PART
from feature_repo.home.catalogue import Catalogue, SentRun
from feature_repo.home.sent import sent_run
from feature_repo.settings import Settings
from feature_repo.store.online_users import STATS
from feature_repo.store.redis_writer import key_of_user
from feature_repo.store.store import held_epoch, store_digest
from serving.stores.opened import open_pinned
from serving.stores.redis_reader import RedisHashes, WrongStoreError, decoded

if TYPE_CHECKING:
    from feast import FeatureStore

# The job whose run says that the store holds anything
FILLS_ONLINE = "materialize"
# How many users are looked for at a time, of those that the catalogue names
LOOKED_FOR = 16
# Seconds for which what the catalogue says is taken as it is
CATALOGUE_S = 5.0
TIMEOUT_S = 0.2
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class StoreState:
    """The result of a look at the store.

    Args:
        held: the run that the store says it holds; None where it holds none.
        sent: the run that was sent last, as the catalogue says; None where it says nothing.
        sent_at: when, seconds since 1970.
        looked_for, missing: users who were sent, and how many of them are not there.
    """

    held: str | None
    sent: str | None = None
    looked_for: int = 0
    missing: int = 0
    sent_at: float | None = None

    @property
    def is_older(self) -> bool:
        """True if the store holds another run than the one that was sent last."""
        return None not in (self.held, self.sent) and self.held != self.sent


LookAtStore = Callable[[], Awaitable[StoreState]]


class SentRuns:
    """The run that a job sent last, asked of the catalogue now and then; a catalogue that is away is asked again.

    Example:
        >>> SentRuns(Settings.from_env()).newest()
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._catalogue: Catalogue | None = None
        self._newest: SentRun | None = None
        self._ask_at = 0.0

    def newest(self) -> SentRun | None:
        """The run, and some users that it sent; None where the catalogue has none."""
        if time.monotonic() >= self._ask_at:
            try:
                if self._catalogue is None:
                    self._catalogue = Catalogue(self._settings.catalogue_url)
                store = store_digest(self._settings)
                self._newest = sent_run(
                    self._catalogue, self._settings.dataset, store, FILLS_ONLINE
                )
            except (SQLAlchemyError, OSError) as error:
                logger.info("the catalogue could not be asked what was sent last: %s", error)
            self._ask_at = time.monotonic() + CATALOGUE_S
        return self._newest


class RedisLook:
    """A look at one Redis, in one round trip.

    Args:
        sent: says what was sent last.

    Raises:
        WrongStoreError: the store is not one Redis.
    """

    def __init__(self, store: FeatureStore, sent: Callable[[], SentRun | None]) -> None:
        from feast.infra.online_stores.helpers import _mmh3, _redis_key
        from feast.protos.feast.types.EntityKey_pb2 import EntityKey
        from feast.protos.feast.types.Value_pb2 import Value

        self.hashes = RedisHashes(store)
        self._sent = sent
        version = store.config.entity_key_serialization_version
        part = EntityKey(
            join_keys=[STORE_PART.join_key], entity_values=[Value(string_val=FILLS_ONLINE)]
        )
        self._epoch_key = _redis_key(
            store.config.project, part, entity_key_serialization_version=version
        )
        self._epoch_field = _mmh3(f"{STORE_EPOCH}:{EPOCH_RUN.name}")
        self._config = store.config

    async def __call__(self) -> StoreState:
        """Look.

        Raises:
            StoreReadError: the store did not answer in its time.
        """
        sent = await asyncio.to_thread(self._sent)
        named = [] if sent is None else sent.users
        users = random.sample(named, min(LOOKED_FOR, len(named)))
        keys = [self._epoch_key, *(key_of_user(self._config, user) for user in users)]
        fields = [[self._epoch_field], *([f"_ts:{STATS}".encode()] for _ in users)]
        (epoch, *found) = await self.hashes.read(keys, fields, TIMEOUT_S)
        held: str | None = decoded(EPOCH_RUN.name, epoch[0])
        missing = sum(stamp is None for (stamp,) in found)
        return StoreState(held, _run_of(sent), len(users), missing, _time_of(sent))


def why_it_may_lose_keys(store: FeatureStore) -> str | None:
    """Why a Redis may throw keys away; None of one that does not, that does not say, and of any other store."""
    import redis

    online = store._get_provider().online_store
    if not hasattr(online, "_get_client"):
        return None
    try:
        memory = online._get_client(store.config.online_store).info("memory")
    except redis.RedisError as error:
        logger.info("Redis does not say what it does when its memory is full: %s", error)
        return None
    policy = memory.get("maxmemory_policy", "noeviction")
    if policy == "noeviction" or not memory.get("maxmemory"):
        return None
    return (
        f"Redis has maxmemory {memory['maxmemory']:,} bytes and maxmemory-policy {policy}: once they are full it throws users and "
        "items away, and nobody is told. Set maxmemory-policy noeviction, under which writers are refused instead"
    )


def look_of(settings: Settings) -> LookAtStore:
    """Looks at the store of these settings: at one Redis by its own reader, at any other through Feast, which tells
    its run alone. It is opened at the first look, and again where that fails.
    """
    made: list[LookAtStore] = []

    async def look() -> StoreState:
        if not made:
            made.append(await asyncio.to_thread(_opened, settings))
        return await made[0]()

    return look


def _opened(settings: Settings) -> LookAtStore:
    sent = SentRuns(settings)

    def ask() -> StoreState:
        newest = sent.newest()
        held = held_epoch(settings, FILLS_ONLINE)
        return StoreState(held, _run_of(newest), sent_at=_time_of(newest))

    async def through_feast() -> StoreState:
        return await asyncio.to_thread(ask)

    if settings.profile != "production":
        return through_feast
    store = open_pinned(settings)
    if why := why_it_may_lose_keys(store):
        logger.warning(why)
    try:
        return RedisLook(store, sent.newest)
    except WrongStoreError:
        return through_feast


def _run_of(sent: SentRun | None) -> str | None:
    return None if sent is None else sent.run_id


def _time_of(sent: SentRun | None) -> float | None:
    # SQLite gives times without their zone, which is UTC.
    return None if sent is None else sent.sent_at.replace(tzinfo=UTC).timestamp()
