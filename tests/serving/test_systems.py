"""Each of the five systems over HTTP: whole answers, explained, and right again after an event."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Any

import httpx
import pyarrow.compute as pc
import pytest

from feature_repo.home.tables import JobFolder
from feature_repo.settings import Settings
from modeling.inputs.encoder import Window
from serving.api.messages import RankRequest
from serving.api.settings import ServeSettings
from serving.live.live import BundleSource, Live
from serving.ranking.ranker import Clock
from serving.routes.app import app_of
from serving.routes.server import Server
from tests.elsewhere import ELSEWHERE, elsewhere

MOST_CANDIDATES = 500
# Recipe → how an encoded user is had after one more event
SYSTEMS = {
    "hiformer_tiny": "encoded",
    "amortised_dlrm_tiny": "encoded",
    "vista_tiny": "encoded",
    "hydrarec_tiny": "extended",
    "onetrans_tiny": "encoded",
    # The paper's stage 1, which reads every event anew, and a reader of the tokens of one that streams
    "vista_bidirectional_tiny": "encoded",
    "amortised_tokens_tiny": "encoded",
}


@dataclass(frozen=True)
class World:
    """A server of one system, and whom and what it is asked about."""

    settings: Settings
    recipe: str
    server: Server
    user: int
    candidates: list[Any]
    end: datetime

    def call(self, path: str, body: Any) -> Any:
        async def run() -> httpx.Response:
            transport = httpx.ASGITransport(app_of(self.server), raise_app_exceptions=False)
            async with httpx.AsyncClient(
                transport=transport, base_url="http://localhost"
            ) as client:
                return await client.post(path, json=body)

        answer = asyncio.run(run())
        assert answer.status_code == 200, answer.text
        return answer.json()

    def outcomes(self) -> dict[str, int]:
        assert self.server.live.current is not None
        states = self.server.live.current.ranker.states
        assert states is not None
        return dict(states.counts)


@pytest.fixture(scope="module")
def road(shop: Any, helpers: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A shop of its own: events change its store."""
    return helpers.copied(shop, tmp_path_factory.mktemp("systems"))


@pytest.fixture(scope="module", params=sorted(SYSTEMS))
def world(request: pytest.FixtureRequest, road: Any, helpers: Any) -> World:
    if request.param == "amortised_tokens_tiny":
        helpers.train_road(road, "vista_tiny")
        helpers.run_jobs(road.settings, "summary_tokens", bundle="vista_tiny", every_days=7.0)
    helpers.train_road(road, request.param)
    if request.param.startswith("vista"):
        helpers.run_jobs(road.settings, "summary_tokens", bundle=request.param)
    live = Live(BundleSource(road.settings, replay=True, state_bytes=1 << 24).load)
    live.load_now()
    assert live.current is not None, live.not_loaded
    server = Server(live, ServeSettings(deadline_ms=10_000, store_ms=5_000))
    folder = JobFolder(road.settings.home, "user_history")
    # A customer of its own for each system; those of the shortest histories, which the window has room for
    ranker = live.current.ranker
    rows = folder.read("user_history")
    short = rows["user_id"].take(pc.sort_indices(pc.binary_length(rows["history"]))).to_pylist()
    number = sorted(SYSTEMS).index(request.param)
    end = ranker.end_of_data()
    assert end is not None
    candidates = ranker.bundle.encoder.items.values.to_pylist()[:MOST_CANDIDATES]
    return World(road.settings, request.param, server, short[number], candidates, end)


def test_answers_are_whole_explained_and_know_the_next_event(world: World) -> None:
    asked = {"user_id": world.user, "candidates": world.candidates, "k": len(world.candidates)}
    first = world.call("/v1/rank", asked)
    assert first["bundle"].startswith(world.recipe)
    assert first["degraded"] == []
    assert sorted(first["item_ids"]) == sorted(world.candidates)
    # Best first, but for scores that differ by rounding alone
    assert first["scores"] == pytest.approx(sorted(first["scores"], reverse=True), abs=1e-5)
    assert world.call("/v1/rank", asked)["scores"] == pytest.approx(first["scores"], abs=1e-5)
    assert world.outcomes() == {"encoded": 1, "known": 1}
    # What is explained is what was served.
    explained = world.call(
        "/v1/explain", {"user_id": world.user, "candidate": first["item_ids"][0]}
    )
    assert explained["score"] == pytest.approx(first["scores"][0], abs=1e-5)
    # After an event the answer is another one, and lacks nothing.
    event = {
        "item_id": world.candidates[0],
        "event_timestamp": (world.end + timedelta(seconds=60)).isoformat(),
        "quantity": 2.0,
        "unit_price": 1.5,
    }
    taken = world.call("/v1/events", {"user_id": world.user, "events": [event]})
    assert taken == {"added": 1, "known": 0, "waiting": 0}
    then = world.call("/v1/rank", asked)
    assert then["degraded"] == []
    assert then["scores"] != first["scores"]
    before = {"encoded": 1, "known": 1}
    after = world.outcomes()
    assert {
        name: after[name] - before.get(name, 0)
        for name in after
        if after[name] != before.get(name, 0)
    } == {SYSTEMS[world.recipe]: 1}


def test_a_kept_state_takes_events_behind_a_full_window(road: Any, helpers: Any) -> None:
    """Until the window moves by a block; then as before, from its new first event."""
    helpers.train_road(road, "hydrarec_tiny")
    source = BundleSource(road.settings, replay=True, state_bytes=1 << 24)
    serving = source.load()
    ranker = serving.ranker
    encoder = ranker.bundle.encoder
    assert encoder.window == Window(16, 8)
    stats = JobFolder(road.settings.home, "user_history").read("user_stats")
    # So many events that the second one more moves the window.
    user = next(
        user
        for user in sorted(set(stats["user_id"].to_pylist()))
        if (beyond := ranker.reader.read_user(user).columns["history_end"] - 16) > 8
        and beyond % 8 == 7
    )
    items = encoder.items.values.to_pylist()[:20]
    request = RankRequest(user_id=user, candidates=items, k=len(items))
    assert ranker.states is not None
    assert serving.events is not None
    end = ranker.end_of_data()
    assert end is not None
    for number, outcome in enumerate(("encoded", "extended", "encoded")):
        if number:
            event = {
                "item_id": items[number],
                "action": 0,
                "event_timestamp": end + timedelta(seconds=60 * number),
                "quantity": 2.0,
                "unit_price": 1.5,
            }
            assert serving.events.take(user, [event]).added == 1
        before = ranker.states.counts.copy()
        kept = ranker.answer(request, ranker.reader.read_user(user), Clock(), keep=True).response
        assert ranker.states.counts - before == {outcome: 1}
        anew = ranker.answer(request, ranker.reader.read_user(user), Clock()).response
        assert kept.scores == pytest.approx(anew.scores, abs=1e-5)
        assert kept.degraded == []


def test_a_model_on_another_device_ranks_the_same(world: World) -> None:
    """Also from a kept state, and for a user who has tokens."""
    request = RankRequest(user_id=world.user, candidates=world.candidates, k=len(world.candidates))
    answers = []
    with elsewhere():
        for device in ("cpu", ELSEWHERE):
            ranker = (
                BundleSource(world.settings, replay=True, state_bytes=1 << 24, device=device)
                .load()
                .ranker
            )
            assert ranker.device.type == device
            user = ranker.reader.read_user(world.user)
            for _ in range(2):
                response = ranker.answer(request, user, Clock(), keep=True).response
                assert response.degraded == []
                by_item = dict(zip(response.item_ids, response.scores, strict=True))
                answers.append([by_item[item] for item in world.candidates])
    for answer in answers[1:]:
        assert answer == pytest.approx(answers[0], abs=1e-5)


def test_lagging_tokens_serve_where_the_history_is_not_at_hand(road: Any, helpers: Any) -> None:
    """Of a stage 1 that would read the newest events, if they were there."""
    recipe = "vista_bidirectional_tiny"
    helpers.train_road(road, recipe)
    helpers.run_jobs(road.settings, "summary_tokens", bundle=recipe)
    ranker = BundleSource(road.settings, replay=True).load().ranker
    stats = JobFolder(road.settings.home, "user_history").read("user_stats").to_pylist()
    user = ranker.reader.read_user(stats[-1]["user_id"])
    assert user.tokens is not None
    lagging = replace(user, tokens=replace(user.tokens, num_events=user.tokens.num_events - 1))
    items = ranker.bundle.encoder.items.values.to_pylist()[:20]
    request = RankRequest(user_id=stats[-1]["user_id"], candidates=items, k=len(items))
    whole = ranker.answer(request, lagging, Clock()).response
    assert (whole.degraded, whole.tokens) == ([], None)
    without = ranker.answer(request, replace(lagging, history=None), Clock()).response
    assert (without.degraded, without.tokens) == (["stale_tokens"], ranker.bundle.tokens)
