"""Users who are encoded ahead of their ranking: the ranking finds them, and its scores are those of encoding anew."""

from __future__ import annotations

import asyncio
from collections import Counter
from datetime import datetime
from typing import Any

import httpx
import pytest

from feature_repo.home.tables import JobFolder
from serving.api.settings import ServeSettings
from serving.command import open_ranker
from serving.ranking.ranker import RankService
from serving.routes.app import create_app

STRANGER = 987_654_321


@pytest.fixture(scope="module")
def ranker(trained_shop: Any) -> RankService:
    plain = open_ranker(trained_shop.settings, replay=True)
    return keeping(plain, 1 << 24)


def keeping(ranker: RankService, state_bytes: int) -> RankService:
    return RankService(
        ranker.bundle, ranker.reader, ranker.items, ranker.replay_from, state_bytes=state_bytes
    )


@pytest.fixture(scope="module")
def users(trained_shop: Any) -> list[Any]:
    log = JobFolder(trained_shop.settings.home, "user_history").read("user_history")
    found: list[Any] = log["user_id"].to_pylist()[:10]
    return found


def post(ranker: RankService, path: str, body: dict[str, Any], **settings: Any) -> httpx.Response:
    async def asked() -> httpx.Response:
        transport = httpx.ASGITransport(create_app(ranker, ServeSettings(**settings)))
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            return await client.post(path, json=body)

    return asyncio.run(asked())


def outcomes(ranker: RankService) -> Counter[Any]:
    assert ranker.states is not None
    return ranker.states.counts.copy()


def test_a_ranking_finds_who_was_prepared(ranker: RankService, users: list[Any]) -> None:
    items = ranker.bundle.encoder.items.values.to_pylist()[:15]
    fresh = keeping(ranker, 0)
    before = outcomes(ranker)
    for user in users:
        prepared = post(ranker, "/v1/prepare", {"user_id": user}).json()
        assert prepared["state"] == "encoded"
        assert prepared["bundle"] == ranker.bundle.name
        at = {"request_timestamp": prepared["request_timestamp"]}
        asked = {"user_id": user, "candidates": items, "context": at}
        ranked = post(ranker, "/v1/rank", asked).json()
        assert set(prepared["degraded"]) <= set(ranked["degraded"])
        anew = post(fresh, "/v1/rank", asked).json()
        assert ranked["item_ids"] == anew["item_ids"]
        assert ranked["scores"] == pytest.approx(anew["scores"], abs=1e-6)
    assert outcomes(ranker) - before == {"encoded": len(users), "known": len(users)}


def test_twice_prepared_is_known(ranker: RankService, users: list[Any]) -> None:
    first = post(ranker, "/v1/prepare", {"user_id": users[0]}).json()
    at = {"request_timestamp": first["request_timestamp"]}
    second = post(ranker, "/v1/prepare", {"user_id": users[0], "context": at}).json()
    assert second["state"] == "known"
    assert datetime.fromisoformat(second["request_timestamp"]) == datetime.fromisoformat(
        first["request_timestamp"]
    )


def test_of_nobody_and_by_a_server_that_keeps_none_nothing_is_kept(
    ranker: RankService, users: list[Any]
) -> None:
    stranger = post(ranker, "/v1/prepare", {"user_id": STRANGER}).json()
    assert (stranger["state"], stranger["degraded"]) == ("not_kept", ["unknown_user"])
    assert post(keeping(ranker, 0), "/v1/prepare", {"user_id": users[0]}).json()["state"] == (
        "not_kept"
    )


def test_who_has_no_time_is_told_so(ranker: RankService, users: list[Any]) -> None:
    body = {"user_id": users[0], "deadline_ms": 0.001}
    late = post(ranker, "/v1/prepare", body).json()
    assert late["state"] == "not_kept"
    assert "deadline" in late["degraded"]


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ({}, "user_id"),
        ({"user_id": "text"}, "user_id must be an integer"),
        ({"user_id": 1, "candidates": ["x"]}, "candidates"),
        ({"user_id": 1, "context": {"request_timestamp": "2199-01-01T00:00:00Z"}}, "future"),
        ({"user_id": 1, "bundle": "another"}, "not loaded"),
    ],
)
def test_a_wrong_request_is_refused(ranker: RankService, body: dict[str, Any], says: str) -> None:
    refused = post(ranker, "/v1/prepare", body)
    assert refused.status_code == 422
    assert says in refused.json()["message"]


def test_without_the_scope_to_rank_nobody_is_prepared(
    ranker: RankService, users: list[Any]
) -> None:
    keys = {"k" * 16: ["events"]}
    refused = post(ranker, "/v1/prepare", {"user_id": users[0]}, api_keys=keys)
    assert refused.status_code == 401
