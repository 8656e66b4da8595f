"""A store that came back from an older copy, that lost users, or that throws keys away."""

import asyncio
import shutil
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import redis

from feature_repo.home.catalogue import Catalogue
from feature_repo.home.sent import sent_run
from feature_repo.home.tables import JobFolder
from feature_repo.settings import Settings
from feature_repo.store.store import id_of_store, open_store
from serving.api.messages import RankRequest
from serving.live.live import BundleSource, Live, Serving
from serving.live.notes import Notes
from serving.live.store_watch import (
    FILLS_ONLINE,
    LookAtStore,
    StoreState,
    look_of,
    why_it_may_lose_keys,
)
from serving.ranking.ranker import Clock
from tests.conftest import Redis
from tests.promises import Promises
from tests.silent import lists_of, note_silent


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
    """A look once the catalogue was heard."""
    return asyncio.run(looked_for_long(look_of(settings, Notes(settings, FILLS_ONLINE))))


async def looked_for_long(look: LookAtStore) -> StoreState:
    until = time.monotonic() + 20
    while not (state := await look()).heard_at and time.monotonic() < until:
        await asyncio.sleep(0.02)
    return state


def live_on(settings: Settings, serving: Serving, **given: Any) -> Live:
    """A server's eye on that store."""
    notes = Notes(settings, FILLS_ONLINE)
    live = Live(lambda digest: pytest.fail("no"), look=look_of(settings, notes), **given)
    live.current = serving
    return live


async def watched_for(live: Live, seconds: float) -> list[bool]:
    """What each of many looks says: whether the store is older."""
    said = []
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        await live.look_at_store()
        said.append(live.store_is_older)
        await asyncio.sleep(0.02)
    return said


def degraded_of(serving: Serving) -> list[str]:
    ranker = serving.ranker
    request = RankRequest(user_id=0, candidates=ranker.bundle.encoder.items.values[:3].to_pylist())
    return [str(one) for one in ranker.answer(request, ranker.nobody(), Clock()).response.degraded]


def test_a_store_as_it_was_sent(watched: tuple[Settings, Serving]) -> None:
    settings, _ = watched
    catalogue = Catalogue(settings.catalogue_url)
    sent = sent_run(catalogue, settings.dataset, id_of_store(settings), "materialize")
    assert sent is not None
    state = looked(settings)
    assert state.held == state.sent == sent.run_id
    assert state.looked_for >= 50
    assert state.missing == 0
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
    live = live_on(settings, serving)
    assert not any(asyncio.run(watched_for(live, 0.5)))
    # The machine fails, and comes back from the copy.
    server.kill_with(tmp_path / "dump.rdb", dump)
    live = live_on(settings, serving)
    assert asyncio.run(watched_for(live, 0.5))[-1]
    state = looked(settings)
    assert state.differs
    assert state.held == before.held
    assert live.why_not_ready is None
    assert live.store_is_older
    assert "older_store" in degraded_of(serving)
    # The command that is named mends it.
    helpers.run_jobs(settings, "materialize", force=True)
    live = live_on(settings, serving)
    assert not any(asyncio.run(watched_for(live, 0.5)))
    assert "older_store" not in degraded_of(serving)


def test_a_job_that_sends_other_tables_is_no_older_copy(
    watched: tuple[Settings, Serving], helpers: Any
) -> None:
    """The catalogue is asked now and then, and the store at each look."""
    settings, serving = watched
    live = live_on(settings, serving)

    async def while_the_job_runs() -> list[bool]:
        job = asyncio.create_task(
            asyncio.to_thread(
                helpers.run_jobs, settings, "materialize", as_of="2011-11-10T00:00:00+00:00"
            )
        )
        said = []
        while not job.done():
            said += await watched_for(live, 0.2)
        await job
        return said + await watched_for(live, 1.0)

    assert not any(asyncio.run(while_the_job_runs()))
    helpers.run_jobs(settings, "materialize", force=True)


def throw_users_away(settings: Settings, client: redis.Redis) -> None:
    """Let Redis evict a third of its keys, whichever chance names, but for the epoch."""
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


def test_a_store_that_throws_users_away_is_not_ready(
    watched: tuple[Settings, Serving], server: Redis, helpers: Any
) -> None:
    settings, serving = watched
    helpers.run_jobs(settings, "materialize", force=True)
    throw_users_away(settings, redis.Redis(port=server.port))
    repaired: list[bool] = []
    live = live_on(settings, serving, repair=repaired.append)
    asyncio.run(live.look_at_store())
    assert "users who were sent are not in the online store" in (live.why_not_ready or "")
    assert repaired == [True]
    # What the repair runs fills the store.
    helpers.run_jobs(settings, "materialize", force=True)
    assert looked(settings).missing == 0
    live = live_on(settings, serving)
    asyncio.run(live.look_at_store())
    assert live.why_not_ready is None


def test_a_store_that_differs_is_older_once_the_catalogue_was_asked_again(
    watched: tuple[Settings, Serving],
) -> None:
    _, serving = watched
    now = time.monotonic()
    states = [
        # Heard before the two differed
        *[StoreState("a", "b", heard_at=now - 1)] * 5,
        StoreState("a", "b", heard_at=now + 60),
        StoreState("b", "b", heard_at=now + 60),
    ]

    async def look() -> StoreState:
        return states.pop(0)

    live = Live(lambda digest: pytest.fail("no"), look=look)
    live.current = serving
    said = []
    for _ in range(7):
        asyncio.run(live.look_at_store())
        said.append(live.store_is_older)
    assert said == [False] * 5 + [True, False]


def test_a_catalogue_that_hangs_holds_up_no_look(
    watched: tuple[Settings, Serving], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, serving = watched
    monkeypatch.setattr("serving.live.notes.Catalogue", lambda url: time.sleep(3))
    live = live_on(settings, serving)
    began = time.monotonic()
    asyncio.run(live.look_at_store())
    assert time.monotonic() - began < 2
    assert live.why_not_ready is None


def users_of(settings: Settings) -> list[Any]:
    stats = JobFolder(settings.home, "user_history").read("user_stats")
    found: list[Any] = stats["user_id"].unique().to_pylist()
    return found


@pytest.mark.whole
@pytest.mark.parametrize("what", ["an old RDB under newer tables", "eviction, the epoch spared"])
def test_no_list_differs_without_a_word(
    what: str,
    watched: tuple[Settings, Serving],
    server: Redis,
    helpers: Any,
    tmp_path: Path,
    promises: Promises,
) -> None:
    settings, _ = watched
    client = redis.Redis(port=server.port)
    users = users_of(settings)
    if what.startswith("an old"):
        helpers.run_jobs(settings, "materialize", as_of="2011-11-10T00:00:00+00:00")
        client.save()
        dump = Path(client.config_get("dir")["dir"], "dump.rdb")
        shutil.copy(dump, tmp_path)
    helpers.run_jobs(settings, "materialize", force=True)
    serving = BundleSource(settings, replay=True).load()
    before = lists_of(serving, users)
    if what.startswith("an old"):
        server.kill_with(tmp_path / "dump.rdb", dump)
    else:
        throw_users_away(settings, client)
    live = live_on(settings, serving)
    asyncio.run(watched_for(live, 0.5))
    after = lists_of(serving, users)
    note_silent(promises, what, before, after, said=live.why_not_ready is not None)
    helpers.run_jobs(settings, "materialize", force=True)
    serving.ranker.items.close()
