"""The slowest requests of an hour, and what a bundle does before its first caller."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from unittest import mock

import httpx
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from feature_repo.home.tables import JobFolder
from serving.api.messages import RankRequest
from serving.api.settings import ServeSettings
from serving.api.slow import Slowest
from serving.command import open_ranker
from serving.live.live import BundleSource
from serving.ranking.ranker import Clock, RankService
from serving.routes.app import create_app
from serving.served.served_log import Served, ServedLog, newest_of


@given(st.lists(st.tuples(st.floats(0, 10), st.floats(0, 150)), max_size=60), st.integers(1, 8))
def test_the_slowest_of_the_last_minutes_are_kept(
    asked: list[tuple[float, float]], kept: int
) -> None:
    """However requests come: (seconds that one took, seconds until the next)."""
    now = 0.0
    slowest = Slowest(kept, minutes=3)
    answered: list[tuple[int, float]] = []
    with mock.patch.object(time, "monotonic", side_effect=lambda: now):
        for number, (took, pause) in enumerate(asked):
            slowest.add("/v1/rank", 200, took, str(number), {})
            answered.append((int(now // 60), took))
            young = [t for minute, t in answered if minute > int(now // 60) - 3]
            expected = sorted(young, reverse=True)[:kept]
            assert [one.ms / 1000 for one in slowest.all()] == pytest.approx(expected, abs=1e-6)
            now += pause


def test_a_slow_request_is_told_with_its_stages(trained_shop: Any) -> None:
    app = create_app(open_ranker(trained_shop.settings, replay=True))
    answer_of = RankService.answer

    def slow(self: RankService, *given: Any, **options: Any) -> Any:
        time.sleep(0.05)
        return answer_of(self, *given, **options)

    async def talk() -> list[dict[str, Any]]:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            body = {"user_id": 1, "candidates": ["A"]}
            await client.post("/v1/rank", json=body, headers={"X-Request-Id": "quick"})
            with mock.patch.object(RankService, "answer", slow):
                await client.post("/v1/rank", json=body, headers={"X-Request-Id": "slow"})
            await client.post("/v1/rank", json={}, headers={"X-Request-Id": "wrong"})
            await client.get("/livez")
            found: list[dict[str, Any]] = (await client.get("/v1/slow")).json()["requests"]
            return found

    before = datetime.now(UTC)
    told = asyncio.run(talk())
    by_id = {one["request_id"]: one for one in told}
    assert set(by_id) == {"quick", "slow", "wrong"}  # no probe
    assert [one["ms"] for one in told] == sorted((one["ms"] for one in told), reverse=True)
    assert by_id["slow"]["ms"] > 50
    assert by_id["slow"]["timings_ms"]["model_wait"] + by_id["slow"]["timings_ms"]["score"] > 0
    assert by_id["wrong"]["status"] == 422
    assert by_id["wrong"]["timings_ms"] == {}
    assert datetime.fromisoformat(by_id["slow"]["arrived_at"]) >= before


def test_who_may_not_see_metrics_sees_no_slow_request(trained_shop: Any) -> None:
    keys: Any = {"k" * 16: ("rank",)}
    app = create_app(open_ranker(trained_shop.settings), ServeSettings(api_keys=keys))

    async def ask() -> int:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            headers = {"Authorization": f"Bearer {'k' * 16}"}
            return (await client.get("/v1/slow", headers=headers)).status_code

    assert asyncio.run(ask()) == 403


def logged(ranker: RankService, folder: Path, users: list[Any]) -> None:
    """Serve these users and log it."""
    log = ServedLog(folder / ranker.bundle.name, ranker.bundle.encoder, share=1.0)
    items = ranker.bundle.encoder.items.values.to_pylist()[:7]
    for user in users:
        asked = RankRequest(user, items)
        ranked = ranker.answer(asked, ranker.reader.read_user(user), Clock())
        log.add(Served(asked, ranked.response, ranked.at, ranked.encoded))
    log.close()


def test_a_bundle_ranks_what_was_logged_before_its_first_caller(
    trained_shop: Any, tmp_path: Path
) -> None:
    log = JobFolder(trained_shop.settings.home, "user_history").read("user_history")
    users = log["user_id"].to_pylist()[:5]
    logged(open_ranker(trained_shop.settings, replay=True), tmp_path, users)
    assert [row["user_id"] for row in newest_of(tmp_path, 3, "user_id")] == users[-3:]
    source = BundleSource(trained_shop.settings, replay=True, state_bytes=1 << 24)
    with mock.patch.object(RankService, "answer", autospec=True) as answered:
        source.load().ranker.items.close()
        assert answered.call_count == 0
        replace(source, log_folder=tmp_path).load().ranker.items.close()
    assert [call.args[1].user_id for call in answered.call_args_list] == users
    warm = replace(source, log_folder=tmp_path).load().ranker
    assert warm.states is not None
    assert len(warm.states) == len(users)
    warm.items.close()


def test_a_log_that_is_damaged_or_a_store_that_is_away_holds_no_bundle_up(
    trained_shop: Any, tmp_path: Path
) -> None:
    source = BundleSource(trained_shop.settings, replay=True, log_folder=tmp_path)
    day = tmp_path / "of_a_bundle" / "2026-12-01"
    day.mkdir(parents=True)
    (day / "part-1.parquet").write_bytes(b"no Parquet")
    assert newest_of(tmp_path, 3, "user_id") == []
    source.load().ranker.items.close()
    # A log of another dataset, whose users stand in a column of theirs
    pq.write_table(pa.table({"customer": [1], "candidates": [["x"]]}), day / "part-1.parquet")
    source.load().ranker.items.close()
    (day / "part-1.parquet").unlink()
    logged(open_ranker(trained_shop.settings, replay=True), tmp_path, [1, 2])
    ranker = source.load().ranker
    with (
        mock.patch.object(ranker.reader, "read_user", side_effect=OSError("away")),
        mock.patch.object(RankService, "answer") as answered,
    ):
        source._rank_as_logged(ranker)
    answered.assert_not_called()
    ranker.items.close()
