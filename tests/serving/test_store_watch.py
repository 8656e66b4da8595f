"""A store that came back from an older copy, that lost users, or that throws keys away."""

import asyncio
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import redis

from feature_repo.home.catalogue import Catalogue
from feature_repo.home.sent import sent_run
from feature_repo.settings import Settings
from feature_repo.store.store import open_store, store_digest
from serving.api.messages import RankRequest
from serving.live.live import BundleSource, Live, Serving
from serving.live.store_watch import StoreState, look_of, why_it_may_lose_keys
from serving.ranking.ranker import Clock
from tests.conftest import Redis


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Redis]:
    """A Redis that leaves its dump where the test finds it."""
    made = Redis(tmp_path_factory.mktemp("watched"), "--dbfilename", "dump.rdb")
    made.start()
    yield made
    made.stop()


@pytest.fixture(scope="module")
def watched(
    trained_shop: Any,
    server: Redis,
    postgres_url: str,
    tmp_path_factory: pytest.TempPathFactory,
    helpers: Any,
) -> Iterator[tuple[Settings, Serving]]:
    """The trained shop on that Redis, and a serving state."""
    road = helpers.copied(trained_shop, tmp_path_factory.mktemp("home"))
    helpers.train_road(road)
    serving = BundleSource(road.settings, replay=True).load()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MEMOIR_REGISTRY_URL", postgres_url)
        patch.setenv("MEMOIR_REDIS", f"127.0.0.1:{server.port}")
        patch.setenv("MEMOIR_DATASET", road.settings.dataset)
        production = replace(road.settings, profile="production")
        helpers.apply_in_process(production)
        helpers.run_jobs(production, "materialize")
        yield production, serving
    serving.ranker.items.close()


def looked(settings: Settings) -> StoreState:
    return asyncio.run(look_of(settings)())


def degraded_of(serving: Serving) -> list[str]:
    ranker = serving.ranker
    request = RankRequest(user_id=0, candidates=ranker.bundle.encoder.items.values[:3].to_pylist())
    return [str(one) for one in ranker.answer(request, ranker.nobody(), Clock()).response.degraded]


def test_a_store_as_it_was_sent(watched: tuple[Settings, Serving]) -> None:
    settings, _ = watched
    catalogue = Catalogue(settings.catalogue_url)
    sent = sent_run(catalogue, settings.dataset, store_digest(settings), "materialize")
    assert sent is not None
    assert len(set(sent.users)) == len(sent.users) >= 50
    state = looked(settings)
    assert state.held == state.sent == sent.run_id
    assert (state.looked_for, state.missing) == (16, 0)
    assert why_it_may_lose_keys(open_store(settings)) is None


def test_an_older_dump_is_named(
    watched: tuple[Settings, Serving], server: Redis, helpers: Any, tmp_path: Path
) -> None:
    settings, serving = watched
    client = redis.Redis(port=server.port)
    client.save()
    dump = Path(client.config_get("dir")["dir"], "dump.rdb")
    shutil.copy(dump, tmp_path)
    before = looked(settings)
    helpers.run_jobs(settings, "materialize", as_of="2011-11-20T00:00:00+00:00")
    live = Live(lambda digest: pytest.fail("no"), look=look_of(settings))
    live.current = serving
    asyncio.run(look_twice(live))
    assert not live.store_is_older
    # The machine fails, and comes back from the copy.
    server.kill_with(tmp_path / "dump.rdb", dump)
    live = Live(lambda digest: pytest.fail("no"), look=look_of(settings))
    live.current = serving
    asyncio.run(look_twice(live))
    state = looked(settings)
    assert state.is_older
    assert state.held == before.held
    assert live.why_not_ready is None
    assert live.store_is_older
    assert "older_store" in degraded_of(serving)
    # The command that is named mends it.
    helpers.run_jobs(settings, "materialize", force=True)
    live = Live(lambda digest: pytest.fail("no"), look=look_of(settings))
    live.current = serving
    asyncio.run(look_twice(live))
    assert not live.store_is_older
    assert "older_store" not in degraded_of(serving)


async def look_twice(live: Live) -> None:
    """What a server sees: the job notes its run in two places, and one look may fall between."""
    await live.look_at_store()
    await live.look_at_store()


def test_a_store_that_throws_users_away_is_not_ready(
    watched: tuple[Settings, Serving], server: Redis, helpers: Any
) -> None:
    settings, serving = watched
    helpers.run_jobs(settings, "materialize", force=True)
    client = redis.Redis(port=server.port)
    epoch = [key for key in client.scan_iter() if b"store_part" in key]
    assert epoch
    keys = client.dbsize()
    held = {key: client.dump(key) for key in epoch}
    client.config_set("maxmemory-policy", "allkeys-random")
    client.config_set("maxmemory", int(client.info("memory")["used_memory"] * 0.97))
    assert "allkeys-random" in (why_it_may_lose_keys(open_store(settings)) or "")
    try:
        # The next write makes room, by whatever keys chance names. The epoch is spared here, as it was by chance.
        while client.dbsize() > 0.7 * keys:
            client.set("written", "x" * 100_000)
            client.delete("written")
            client.config_set("maxmemory", int(client.info("memory")["used_memory"] * 0.97))
    finally:
        client.config_set("maxmemory", 0)
        client.config_set("maxmemory-policy", "noeviction")
    for key, dump in held.items():
        client.restore(key, 0, dump, replace=True)
    repaired: list[bool] = []
    live = Live(lambda digest: pytest.fail("no"), look=look_of(settings), repair=repaired.append)
    live.current = serving
    asyncio.run(live.look_at_store())
    assert "users who were sent are not in the online store" in (live.why_not_ready or "")
    assert repaired == [True]
    # What the repair runs fills the store.
    helpers.run_jobs(settings, "materialize", force=True)
    assert looked(settings).missing == 0
    live = Live(lambda digest: pytest.fail("no"), look=look_of(settings))
    live.current = serving
    asyncio.run(live.look_at_store())
    assert live.why_not_ready is None


def test_a_store_between_two_notes_is_not_said_to_be_older(
    watched: tuple[Settings, Serving],
) -> None:
    _, serving = watched
    states = [StoreState("a", "a"), StoreState("a", "b"), StoreState("b", "b")]

    async def look() -> StoreState:
        return states.pop(0)

    live = Live(lambda digest: pytest.fail("no"), look=look)
    live.current = serving
    for _ in range(3):
        asyncio.run(live.look_at_store())
        assert not live.store_is_older
