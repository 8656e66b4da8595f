"""A server that starts while the database of registry and catalogue is away."""

import asyncio
import json
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from feature_repo.home.catalogue import Catalogue, NoLiveBundleError
from feature_repo.settings import Settings
from serving.api.messages import RankRequest
from serving.command import app
from serving.live.live import BundleSource, Live
from serving.live.notes import Notes
from serving.live.seen_catalogue import SeenCatalogue
from serving.live.store_watch import FILLS_ONLINE, look_of
from serving.ranking.ranker import Clock
from serving.stores.last_seen import LiveBundle, NothingSeenError, keep_live, last_seen
from tests.conftest import Postgres


@dataclass
class Site:
    """A trained shop in production, its registry and its catalogue on one PostgreSQL."""

    settings: Settings
    database: Postgres


@pytest.fixture(scope="module")
def site(
    trained_shop: Any,
    postgres: Postgres,
    redis_address: str,
    tmp_path_factory: pytest.TempPathFactory,
    helpers: Any,
) -> Iterator[Site]:
    road = helpers.copied(trained_shop, tmp_path_factory.mktemp("home"))
    helpers.train_road(road)
    folder = Path(tempfile.mkdtemp(prefix="memoir-pg-"))
    database = Postgres(postgres.initdb, folder)
    live = Catalogue(road.settings.catalogue_url).live_bundle(road.settings.dataset)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MEMOIR_PROFILE", "production")
        patch.setenv("MEMOIR_REGISTRY_URL", database.url)
        patch.setenv("MEMOIR_CATALOGUE", database.url)
        patch.setenv("MEMOIR_REDIS", redis_address)
        patch.setenv("MEMOIR_DATASET", road.settings.dataset)
        patch.setenv("MEMOIR_HOME", road.settings.root)
        patch.setenv("MEMOIR_DATA", str(road.data))
        patch.setenv("MEMOIR_SERVE_REPLAY", "true")
        production = replace(road.settings, profile="production", catalogue_url=database.url)
        helpers.apply_in_process(production)
        helpers.run_jobs(production, "materialize")
        catalogue = Catalogue(database.url)
        catalogue.add_bundle(
            digest=live.digest,
            dataset=live.dataset,
            recipe=live.recipe,
            fingerprint=live.fingerprint,
            path=live.path,
            metrics=live.metrics,
        )
        catalogue.set_live(live.dataset, live.digest)
        catalogue.engine.dispose()
        yield Site(production, database)
    database.stop()
    shutil.rmtree(folder, ignore_errors=True)


def ranked(source: BundleSource) -> tuple[list[Any], str]:
    """What a server that starts now answers, and with which bundle."""

    async def answered() -> tuple[list[Any], str]:
        serving = source.load()
        ranker = serving.ranker
        items = ranker.bundle.encoder.items.values[:10].to_pylist()
        user = await serving.reader.read_user(12345, 5.0)
        answer = ranker.answer(RankRequest(user_id=12345, candidates=items), user, Clock())
        await serving.close()
        return answer.response.item_ids, serving.name

    return asyncio.run(answered())


def test_it_starts_from_what_was_seen_last(site: Site) -> None:
    before = ranked(BundleSource(site.settings, replay=True))
    site.database.stop()
    try:
        # 1. A worker that starts now ranks as before, and says what it ranks from.
        source = BundleSource(site.settings, replay=True)
        assert ranked(source) == before
        live = Live(source.load, source.live_digest, problem=lambda: source.catalogue.problem)
        (warning,) = live.warnings
        seen = last_seen(site.settings, "live").at
        assert warning == f"the catalogue's database is away: which bundle is live is as of {seen}"
        # 2. So does the app that each process makes; the store is looked at all the same.
        served = app().state.server
        assert served.live.current is not None
        assert served.live.current.name == before[1]
        state = asyncio.run(look_of(site.settings, Notes(site.settings, FILLS_ONLINE))())
        assert state.held is not None
        assert (state.sent, state.missing) == (None, 0)
        asyncio.run(served.close())
    finally:
        site.database.start()
    # 3. Once the database is back, nothing is to be said.
    assert ranked(source) == before
    assert live.warnings == []
    # 4. A process that has heard of the live bundle goes on with that one, whatever the copy says.
    keep_live(site.settings, LiveBundle("0" * 64, "bundles/other"))
    site.database.stop()
    try:
        assert source.live_digest() == source.catalogue.live_bundle().digest != "0" * 64
        assert live.warnings == ["the catalogue's database is away: what ranks ranks on"]
    finally:
        site.database.start()


def test_without_a_copy_it_says_what_is_away(site: Site, tmp_path: Path) -> None:
    ranked(BundleSource(site.settings, replay=True))
    file = Path(site.settings.home, "last_seen", "production-live.json")
    kept = file.read_text()
    site.database.stop()
    try:
        # A copy that somebody changed is none.
        changed = json.loads(kept)
        changed["content"]["path"] = "bundles/mine"
        file.write_text(json.dumps(changed))
        with pytest.raises(NothingSeenError, match="is not as a server of this home wrote it"):
            last_seen(site.settings, "live")
        file.unlink()
        live = Live(BundleSource(site.settings).load, BundleSource(site.settings).live_digest)
        live.load_now()
        assert "database is away, and no server of this home has kept a copy" in live.not_loaded
        # The process lives, and tries again.
        served = app().state.server
        assert served.why_not_ready() is not None
    finally:
        site.database.start()
        file.write_text(kept)
    served.live.load_now()
    assert served.why_not_ready() is None
    asyncio.run(served.close())


def test_no_live_bundle_is_none_from_the_copy(site: Site) -> None:
    with pytest.raises(NoLiveBundleError):
        replace(
            BundleSource(site.settings), settings=replace(site.settings, dataset="movielens_1m")
        ).live_digest()


def test_a_home_that_cannot_be_written_keeps_no_copy_and_serves(
    site: Site, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    home = replace(site.settings, home=str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "last_seen").write_text("no folder")
    with caplog.at_level("INFO"):
        keep_live(home, LiveBundle("0" * 64, "bundles/x"))
    assert "no copy of live is kept" in caplog.text
    with pytest.raises(NothingSeenError, match="cannot be read"):
        last_seen(home, "live")
    catalogue = SeenCatalogue(home)
    assert catalogue.live_bundle().digest == BundleSource(site.settings).live_digest()
