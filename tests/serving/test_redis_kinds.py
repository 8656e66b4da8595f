"""A Redis Cluster and a Redis behind Sentinels, real ones: every way to the store goes on as with one Redis."""

from __future__ import annotations

import asyncio
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import redis

from feature_repo.datasets import load_contract
from feature_repo.home.redis_client import RedisAddress, slot_of
from feature_repo.home.tables import JobFolder
from feature_repo.settings import Settings
from feature_repo.store.event_log import log_of
from feature_repo.store.online_erase import OnlineEraser
from feature_repo.store.redis_writer import key_of_user
from feature_repo.store.store import close_store, open_store
from serving.benchmarks.redises import Cluster, Redis, Sentinels
from serving.command import listenable
from serving.live.live import BundleSource, Live, Serving
from serving.live.notes import Notes
from serving.live.store_watch import FILLS_ONLINE, StoreState, look_of, why_it_may_lose_keys
from serving.stores.events import EventTaker
from serving.stores.features import FeastReader
from serving.stores.guarded import GuardedReader
from serving.stores.opened import open_events_store
from serving.stores.redis_hashes import ClusterHashes, ShardReadError, StoreReadError
from serving.stores.redis_reader import RedisReader
from tests.conftest import missing
from tests.feature_repo.test_redis_rights import EVENT
from tests.promises import Promises
from tests.silent import lists_of, note_silent

CONTRACT = load_contract("online_retail")
SERVICE = "ranking_v1_tokens_online"


@dataclass
class World:
    """The shop with tokens, sent to a store."""

    settings: Settings
    version: str
    serving: Serving

    @property
    def users(self) -> list[int]:
        log = JobFolder(self.settings.home, "user_history").read("user_history")
        found: list[int] = log["user_id"].unique().to_pylist()
        return found

    def reader(self) -> RedisReader:
        return RedisReader(open_store(self.settings), CONTRACT, SERVICE, self.version)

    def look(self) -> StoreState:
        """A look once the catalogue was heard."""

        async def look() -> StoreState:
            look_at = look_of(self.settings, Notes(self.settings, FILLS_ONLINE))
            until = time.monotonic() + 20
            while not (state := await look_at()).heard_at and time.monotonic() < until:
                await asyncio.sleep(0.02)
            return state

        return asyncio.run(look())


@pytest.fixture(scope="module")
def trained(shop: Any, helpers: Any, tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """The shop, and a bundle whose stage 1 makes tokens."""
    road = helpers.copied(shop, tmp_path_factory.mktemp("home"))
    helpers.train_road(road, "vista_tiny")
    settings: Settings = road.settings
    return settings


@contextmanager
def sent(settings: Settings, helpers: Any, **environ: str) -> Iterator[World]:
    """The shop's tables and tokens on the store that the environment names."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"MEMOIR_DATASET": settings.dataset, **environ}.items():
            patch.setenv(name, value)
        production = replace(settings, profile="production")
        helpers.apply_in_process(production)
        helpers.run_jobs(production, "materialize")
        done = helpers.run_jobs(production, "summary_tokens", bundle="vista_tiny")
        version = done["summary_tokens"].manifest.options["version"]
        serving = BundleSource(production, replay=True).load()
        yield World(production, version, serving)
        serving.ranker.items.close()


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Three masters."""
    if not shutil.which("redis-server"):
        missing("redis-server")
    made = Cluster(tmp_path_factory.mktemp("cluster"))
    made.start()
    yield made
    made.stop()


@pytest.fixture(scope="module")
def on_cluster(
    trained: Settings, helpers: Any, cluster: Cluster, postgres_url: str
) -> Iterator[World]:
    """The shop on a cluster."""
    environ = {"MEMOIR_REDIS": cluster.address, "MEMOIR_REDIS_TYPE": "redis_cluster"}
    with sent(trained, helpers, MEMOIR_REGISTRY_URL=postgres_url, **environ) as world:
        yield world


def cluster_of(reader: RedisReader) -> ClusterHashes:
    assert isinstance(reader.hashes, ClusterHashes)
    return reader.hashes


async def read_all(reader: RedisReader, users: list[int], seconds: float = 5.0) -> dict[int, Any]:
    return {user: await reader.read_user(user, seconds) for user in users}


def test_every_shard_holds_a_part_of_the_users(on_cluster: World, cluster: Cluster) -> None:
    config = open_store(on_cluster.settings).config
    keys = {key_of_user(config, user) for user in on_cluster.users}
    held = [sum(key in keys for key in client.scan_iter()) for client in cluster.clients()]
    assert sum(held) == len(keys)
    assert min(held) > 5


def test_the_reader_gives_what_feast_gives(on_cluster: World) -> None:
    slow = FeastReader(open_store(on_cluster.settings), CONTRACT, SERVICE, on_cluster.version)
    reader = on_cluster.reader()
    assert isinstance(reader.hashes, ClusterHashes)
    users = [*on_cluster.users[:30], 99]
    found = asyncio.run(read_all(reader, users))
    for user in users:
        expected = slow.read_user(user)
        assert (found[user].columns, found[user].history) == (expected.columns, expected.history)
        assert found[user].problems == expected.problems
    assert sum(found[user].tokens is not None for user in users) == 30


def test_many_ask_at_once(on_cluster: World) -> None:
    reader = on_cluster.reader()

    async def ask() -> list[Any]:
        users = on_cluster.users
        found = await asyncio.gather(*(reader.read_user(user, 5.0) for user in users[:30]))
        await reader.close()
        return found

    assert all(row.history is not None for row in asyncio.run(ask()))


def test_users_are_read_while_their_slot_moves(on_cluster: World, cluster: Cluster) -> None:
    """To a node that imports it, key by key, and after: nobody asks twice, and no answer differs."""
    config = open_store(on_cluster.settings).config
    user = on_cluster.users[3]
    key = key_of_user(config, user)
    slot = slot_of(key)
    clients = cluster.clients()
    names = [client.execute_command("CLUSTER", "MYID").decode() for client in clients]
    source = next(n for n, client in enumerate(clients) if key in list(client.scan_iter()))
    target = (source + 1) % 3
    reader = on_cluster.reader()

    async def read() -> Any:
        return (await reader.read_user(user, 5.0)).history

    async def moves() -> list[Any]:
        found = [await read()]
        clients[target].execute_command("CLUSTER", "SETSLOT", slot, "IMPORTING", names[source])
        clients[source].execute_command("CLUSTER", "SETSLOT", slot, "MIGRATING", names[target])
        found.append(await read())
        # The key goes before the slot does: its node says where to ask.
        for one in clients[source].execute_command("CLUSTER", "GETKEYSINSLOT", slot, 100):
            clients[source].migrate("127.0.0.1", cluster.nodes[target].port, one, 0, 5000)
        found.append(await read())
        for client in (clients[target], clients[source], clients[3 - source - target]):
            client.execute_command("CLUSTER", "SETSLOT", slot, "NODE", names[target])
        found.append(await read())
        for _ in range(20):
            found.append(await read())
            await asyncio.sleep(0.05)
        assert cluster_of(reader)._node_of[slot][1] == cluster.nodes[target].port
        await reader.close()
        return found

    found = asyncio.run(moves())
    assert found[0] is not None
    assert all(one == found[0] for one in found)


def test_events_are_taken_logged_and_read_by_the_batch(on_cluster: World, helpers: Any) -> None:
    store = open_events_store(on_cluster.settings)
    summariser = BundleSource(on_cluster.settings).token_maker(on_cluster.serving.ranker.bundle)
    taker = EventTaker(store, CONTRACT, summariser, on_cluster.settings.home)
    users = on_cluster.users[:12]
    for user in users:
        assert taker.take(user, [EVENT]).added == 1
        assert taker.take(user, [EVENT]).known == 1
    log = log_of(store.config)
    assert log is not None
    assert sorted(log.users()) == sorted(users)
    assert len(log.entries(users)) == len(users)
    found = asyncio.run(read_all(on_cluster.reader(), users))
    assert all(row.columns["history_end"] is not None for row in found.values())
    taker.close()
    # The batch adds what the tables lack, and erases what it is told to.
    helpers.run_jobs(on_cluster.settings, "materialize", force=True)
    again = asyncio.run(read_all(on_cluster.reader(), users))
    assert {u: row.history for u, row in again.items()} == {
        u: row.history for u, row in found.items()
    }
    eraser = OnlineEraser(open_store(on_cluster.settings), CONTRACT, [on_cluster.version])
    gone = users[:2]
    assert eraser.find(gone) >= 4
    assert eraser.sweep(gone, EVENT["event_timestamp"])
    assert eraser.find(gone) == 0
    close_store(store)
    helpers.run_jobs(on_cluster.settings, "materialize", force=True)


def test_a_shard_that_comes_back_empty_is_not_ready(
    on_cluster: World, cluster: Cluster, helpers: Any
) -> None:
    state = on_cluster.look()
    assert (state.parts, state.empty_parts, state.missing) == (64, 0, 0)
    assert state.held == state.sent
    assert why_it_may_lose_keys(open_store(on_cluster.settings)) is None
    cluster.clients()[1].flushall()
    state = on_cluster.look()
    assert 15 <= state.empty_parts <= 25
    assert state.missing > 0
    repaired: list[bool] = []

    def looked() -> Live:
        look = look_of(on_cluster.settings, Notes(on_cluster.settings, FILLS_ONLINE))
        live = Live(lambda digest: pytest.fail("no"), look=look, repair=repaired.append)
        live.current = on_cluster.serving
        asyncio.run(live.look_at_store())
        return live

    assert "a shard of the cluster came back empty" in (looked().why_not_ready or "")
    assert repaired == [True]
    # Without being forced: the store does not hold the run as a whole.
    helpers.run_jobs(on_cluster.settings, "materialize")
    assert on_cluster.look().empty_parts == 0
    assert looked().why_not_ready is None


@pytest.mark.whole
def test_no_list_differs_without_a_word_when_a_shard_is_lost(
    on_cluster: World, cluster: Cluster, helpers: Any, promises: Promises
) -> None:
    helpers.run_jobs(on_cluster.settings, "materialize", force=True)
    helpers.run_jobs(on_cluster.settings, "summary_tokens", bundle="vista_tiny", force=True)
    serving = BundleSource(on_cluster.settings, replay=True).load()
    before = lists_of(serving, on_cluster.users)
    cluster.clients()[0].flushall()
    after = lists_of(serving, on_cluster.users)
    # By the answers alone, before any look
    note_silent(promises, "one of three shards comes back empty", before, after, said=False)
    helpers.run_jobs(on_cluster.settings, "materialize", force=True)
    helpers.run_jobs(on_cluster.settings, "summary_tokens", bundle="vista_tiny", force=True)
    serving.ranker.items.close()


def test_a_shard_that_throws_keys_away_is_named(on_cluster: World, cluster: Cluster) -> None:
    client = cluster.clients()[2]
    client.config_set("maxmemory-policy", "allkeys-lru")
    client.config_set("maxmemory", 10**9)
    try:
        assert "allkeys-lru" in (why_it_may_lose_keys(open_store(on_cluster.settings)) or "")
    finally:
        client.config_set("maxmemory", 0)
        client.config_set("maxmemory-policy", "noeviction")


@pytest.mark.parametrize("away", [signal.SIGSTOP, signal.SIGKILL])
def test_users_of_other_shards_are_read_while_one_is_away(
    on_cluster: World, cluster: Cluster, away: signal.Signals
) -> None:
    """In their time, however many of the lost shard are asked for in a row; and nobody is sent away."""
    config = open_store(on_cluster.settings).config
    lost = cluster.nodes[0]
    client = cluster.clients()[0]
    held = set(client.scan_iter())
    of_lost = [u for u in on_cluster.users if key_of_user(config, u) in held]
    others = [u for u in on_cluster.users if key_of_user(config, u) not in held]
    client.save()
    # Tokens lie on another node more often than not.
    reader = on_cluster.reader()
    guarded = GuardedReader(reader)

    async def while_away() -> None:
        await read_all(reader, on_cluster.users)
        lost.send(away)
        began = time.perf_counter()
        for user in (of_lost * 10)[:40]:
            with pytest.raises(ShardReadError):
                await guarded.read_user(user, 0.2)
        # A node that is known to be away takes nobody's time, but now and then one read's.
        assert time.perf_counter() - began < 40 * 0.2 / 2
        assert not guarded.open
        plain = RedisReader(open_store(on_cluster.settings), CONTRACT, "ranking_v1_online")
        found = await read_all(plain, others, 2.0)
        assert all(row.history is not None for row in found.values())
        await plain.close()
        # Nothing goes on behind the reads.
        await asyncio.sleep(0.3)
        running = [task for task in asyncio.all_tasks() if "_ask" in repr(task)]
        assert running == []

    async def looked() -> Live:
        look = look_of(on_cluster.settings, Notes(on_cluster.settings, FILLS_ONLINE))
        live = Live(lambda digest: pytest.fail("no"), look=look)
        live.current = on_cluster.serving
        for _ in range(5):
            await live.look_at_store()
        return live

    async def back() -> None:
        until = time.monotonic() + 20
        while time.monotonic() < until:
            try:
                found = await read_all(reader, on_cluster.users, 0.5)
                break
            except StoreReadError:
                await asyncio.sleep(0.05)
        assert all(row.history is not None for row in found.values())
        await reader.close()

    async def all_of_it() -> Live:
        await while_away()
        live = await looked()
        if away == signal.SIGSTOP:
            lost.send(signal.SIGCONT)
        else:
            lost.start()
        await back()
        return live

    live = asyncio.run(all_of_it())
    assert live.why_not_ready is None
    assert any("a node of the cluster is away" in one for one in live.warnings)


def test_a_node_that_was_reset_or_parted_misleads_nobody(on_cluster: World, tmp_path: Path) -> None:
    """Though it is the first to be asked."""
    alone = Redis(
        listenable("127.0.0.1", 0),
        tmp_path,
        ("--cluster-enabled", "yes", "--cluster-port", str(listenable("127.0.0.1", 0))),
    )
    alone.start()
    address = RedisAddress.parse(
        open_store(on_cluster.settings).config.online_store.connection_string
    )
    named = RedisAddress((("127.0.0.1", alone.port), *address.nodes), address.options)
    hashes = ClusterHashes(named)
    key = key_of_user(open_store(on_cluster.settings).config, on_cluster.users[0])

    async def read() -> Any:
        found = await hashes.read([key], [[b"_ts:user_stats"]], 5.0)
        await hashes.close()
        return found

    try:
        assert asyncio.run(read())[0][0] is not None
    finally:
        alone.send(signal.SIGKILL)


@pytest.fixture(scope="module")
def sentinels(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sentinels]:
    """A master and a replica."""
    if not shutil.which("redis-server"):
        missing("redis-server")
    made = Sentinels(tmp_path_factory.mktemp("sentinels"), "watch-word")
    made.start()
    yield made
    made.stop()


@pytest.fixture(scope="module")
def behind_sentinels(
    trained: Settings, helpers: Any, sentinels: Sentinels, postgres_url: str
) -> Iterator[World]:
    """The shop on a Redis that Sentinels watch."""
    environ = {
        "MEMOIR_REDIS": sentinels.address,
        "MEMOIR_REDIS_TYPE": "redis_sentinel",
        "MEMOIR_REDIS_MASTER": sentinels.NAME,
    }
    with sent(trained, helpers, MEMOIR_REGISTRY_URL=postgres_url, **environ) as world:
        yield world


def test_a_failover_loses_no_event_that_was_replicated_and_stops_no_reader(
    behind_sentinels: World, sentinels: Sentinels
) -> None:
    world = behind_sentinels
    state = world.look()
    assert (state.missing, state.held) == (0, state.sent)
    reader = world.reader()
    store = open_events_store(world.settings)
    taker = EventTaker(store, CONTRACT, None, world.settings.home)
    users = world.users
    for user in users[:5]:
        assert taker.take(user, [EVENT]).added == 1

    async def through_failover() -> None:
        before = await read_all(reader, users)
        # With the master goes the first Sentinel, which hangs.
        sentinels.processes[0].send_signal(signal.SIGSTOP)
        sentinels.stores[0].send(signal.SIGKILL)
        until = time.monotonic() + 30
        while True:
            try:
                after = await read_all(reader, users, 0.5)
                break
            except StoreReadError:
                await asyncio.sleep(0.05)
                assert time.monotonic() < until
        assert {u: row.history for u, row in after.items()} == {
            u: row.history for u, row in before.items()
        }
        await reader.close()

    asyncio.run(through_failover())
    deadline = time.monotonic() + 20
    while True:
        try:
            assert taker.take(users[6], [EVENT]).added == 1
            break
        except (redis.RedisError, OSError):
            assert time.monotonic() < deadline
            time.sleep(0.1)
    assert taker.take(users[0], [EVENT]).known == 1
    taker.close()
