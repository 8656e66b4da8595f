"""Requests that look into the ranker: a past that never was, a simulated degradation, a bundle by name."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from datetime import timedelta
from typing import Any, get_args

import httpx
import numpy as np
import pyarrow as pa
import pytest

from feature_repo.history.counts import UserCounts
from feature_repo.history.sketch import Layout
from feature_repo.home.tables import JobFolder
from serving.api.degraded import Degraded, reason_named
from serving.api.messages import RankRequest, Simulated, decode_request, encoded
from serving.api.settings import ServeSettings
from serving.command import open_ranker
from serving.live.live import Live, Serving
from serving.ranking.explain import explain
from serving.ranking.ranker import Clock, RankService
from serving.ranking.what_if import as_asked
from serving.routes.app import app_of
from serving.routes.server import Server
from serving.stores.features import StoredSketch, UserRow
from serving.stores.guarded import GuardedReader, ThreadedReader

TOKENS = {"a-caller-who-ranks": ("rank",), "a-caller-who-looks": ("rank", "explain")}


@pytest.fixture(scope="module")
def ranker(token_shop: Any) -> RankService:
    return open_ranker(token_shop.settings, replay=True)


@pytest.fixture(scope="module")
def user(token_shop: Any, ranker: RankService) -> Any:
    """A customer with a history and tokens."""
    users = JobFolder(token_shop.settings.home, "user_history").read("user_history")["user_id"]
    return users[3].as_py()


@pytest.fixture(scope="module")
def server(ranker: RankService) -> Server:
    live = Live(load=lambda digest: pytest.fail("nothing is loaded here"))
    live.current = Serving(ranker, GuardedReader(ThreadedReader(ranker.reader)))
    return Server(live, ServeSettings(deadline_ms=10_000, store_ms=5_000, api_keys=TOKENS))


def call(server: Server, path: str, body: Any, token: str = "a-caller-who-looks") -> Any:
    async def run() -> httpx.Response:
        transport = httpx.ASGITransport(app_of(server), raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            headers = {"Authorization": f"Bearer {token}"}
            return await client.post(path, json=body, headers=headers)

    return asyncio.run(run())


def candidates_of(ranker: RankService) -> list[Any]:
    return ranker.bundle.encoder.items.values.to_pylist()[:20]


def asked_by(ranker: RankService, **fields: Any) -> RankRequest:
    body = encoded({"candidates": candidates_of(ranker), **fields}, "application/json")
    return decode_request(body, ranker.contract)


def test_an_event_left_out_is_worth_what_explain_says(ranker: RankService, user: Any) -> None:
    row = ranker.reader.read_user(user)
    candidate = candidates_of(ranker)[:1]
    explained = explain(ranker, RankRequest(user, candidate), row, 5)
    untouched = replace(row, tokens=None)

    def logit(seen: UserRow) -> float:
        score = ranker.answer(RankRequest(user, candidate), seen, Clock()).response.scores[0]
        return float(np.log(score / (1 - score)))

    for place, event in enumerate(explained.events):
        asked = asked_by(ranker, user_id=user, what_if={"without": [place]})
        seen = as_asked(ranker.contract, row, asked)
        assert seen.history is not None
        assert row.history is not None
        assert seen.history.num_rows == row.history.num_rows - 1
        assert logit(untouched) - logit(seen) == pytest.approx(event.effect, abs=1e-4)


def test_the_parts_of_a_score_are_what_it_loses_without_them(
    ranker: RankService, user: Any
) -> None:
    row = ranker.reader.read_user(user)
    candidate = candidates_of(ranker)[:1]
    parts = explain(ranker, RankRequest(user, candidate), row, 0).parts

    def logit(seen: UserRow) -> float:
        score = ranker.answer(RankRequest(user, candidate), seen, Clock()).response.scores[0]
        return float(np.log(score / (1 - score)))

    whole = logit(row)
    assert row.tokens is not None
    assert row.tokens.tokens_SD is not None
    zeros = replace(row.tokens, tokens_SD=np.zeros_like(row.tokens.tokens_SD))
    expected = {
        "tokens": whole - logit(replace(row, tokens=zeros)),
        "counts": whole - logit(replace(row, sketch=None)),
        "events": whole - logit(replace(row, history=None)),
        "item": logit(ranker.nobody()),
    }
    for name, value in expected.items():
        assert getattr(parts, name) == pytest.approx(value, abs=1e-4), name
    assert parts.tokens
    # Of tokens that are not fit nothing is said, and nothing rests on them.
    late = replace(row, tokens=replace(row.tokens, digest=row.tokens.digest + 1))
    assert explain(ranker, RankRequest(user, candidate), late, 0).parts.tokens == 0


def test_an_event_added_is_the_newest_and_counted(ranker: RankService, user: Any) -> None:
    row = ranker.reader.read_user(user)
    assert row.history is not None
    newest = row.history["event_timestamp"][-1].as_py()
    item = candidates_of(ranker)[7]
    event = {"item_id": item, "quantity": 2.0, "unit_price": 3.0}
    stamp = (newest + timedelta(seconds=1)).isoformat()
    asked = asked_by(ranker, user_id=user, what_if={"events": [event | {"event_timestamp": stamp}]})
    seen = as_asked(ranker.contract, row, asked)
    assert seen.history is not None
    assert seen.history["item_id"][-1].as_py() == item
    assert seen.columns["history_end"] == row.columns["history_end"] + 1
    assert seen.tokens is None
    # One in the middle stands where its time puts it.
    early = row.history["event_timestamp"][0].as_py() + timedelta(microseconds=1)
    asked = asked_by(
        ranker,
        user_id=user,
        what_if={"events": [event | {"event_timestamp": early.isoformat()}]},
    )
    seen = as_asked(ranker.contract, row, asked)
    assert seen.history is not None
    times = seen.history["event_timestamp"].cast(pa.int64()).to_numpy()
    assert (np.diff(times) >= 0).all()
    assert seen.history.num_rows == row.history.num_rows + 1


def test_nothing_pretended_reaches_the_store(server: Server, user: Any) -> None:
    assert server.live.current is not None
    ranker = server.live.current.ranker
    body = {"user_id": user, "candidates": candidates_of(ranker)}
    first = call(server, "/v1/rank", body).json()
    other = call(server, "/v1/rank", body | {"what_if": {"without": [0, 1, 2]}}).json()
    again = call(server, "/v1/rank", body).json()
    assert other["scores"] != first["scores"] == again["scores"]
    assert other["tokens"] is None
    none = {"what_if": {"without": list(range(len(first_events(server, user))))}}
    assert call(server, "/v1/rank", body | none).json()["degraded"] == ["no_history"]
    nobody = call(server, "/v1/rank", body | {"user_id": 987_654_321, "what_if": {}}).json()
    assert nobody["degraded"] == ["unknown_user"]
    far = call(server, "/v1/rank", body | {"what_if": {"without": [100_000]}})
    assert far.status_code == 422
    assert "100000" in far.json()["message"]


def first_events(server: Server, user: Any) -> list[Any]:
    events: list[Any] = call(server, "/v1/history", {"user_id": user}).json()["events"]
    return events


def test_looking_into_the_ranker_counts_as_no_trouble(server: Server, user: Any) -> None:
    assert server.live.current is not None
    body = {"user_id": user, "candidates": candidates_of(server.live.current.ranker)}
    before = server.metrics.text()
    call(server, "/v1/rank", body | {"simulate": "store_unavailable"})
    call(server, "/v1/rank", body | {"what_if": {"without": [0]}})
    assert b'memoir_degraded_total{reason="store_unavailable"} 0.0' in server.metrics.text()
    assert seconds_of(server.metrics.text()) == seconds_of(before)


def seconds_of(text: bytes) -> list[bytes]:
    """Lines of the stages' histogram."""
    return [line for line in text.splitlines() if line.startswith(b"memoir_stage_seconds")]


@pytest.mark.parametrize("name", get_args(Simulated))
def test_a_simulated_degradation_is_what_the_fault_itself_would_give(
    server: Server, user: Any, name: str
) -> None:
    assert server.live.current is not None
    ranker = server.live.current.ranker
    asked = RankRequest(user, candidates_of(ranker))
    body = {"user_id": user, "candidates": asked.candidates, "simulate": name}
    answer = call(server, "/v1/rank", body).json()
    reason = reason_named(name)
    assert answer["degraded"] == [name]
    if reason in (Degraded.NO_SCORES, Degraded.DEADLINE):
        assert answer["scores"] == []
        assert answer["item_ids"] == asked.candidates
        return
    row = ranker.reader.read_user(user)
    fault = {
        Degraded.STORE_UNAVAILABLE: ranker.nobody(reason),
        Degraded.NO_TOKENS: replace(row, tokens=None, problems=(reason,)),
        Degraded.NO_SKETCH: replace(row, sketch=None, problems=(reason,)),
        Degraded.NO_HISTORY: replace(
            row,
            history=None,
            sketch=StoredSketch(UserCounts(Layout.of(ranker.contract)), -1),
            problems=(reason,),
        ),
    }
    expected = ranker.answer(asked, fault[reason], Clock()).response
    assert answer["item_ids"] == expected.item_ids
    assert answer["scores"] == pytest.approx(expected.scores, abs=1e-6)


def test_only_who_may_look_into_the_ranker_does(server: Server, user: Any) -> None:
    assert server.live.current is not None
    body = {"user_id": user, "candidates": candidates_of(server.live.current.ranker)}
    plain = "a-caller-who-ranks"
    assert call(server, "/v1/rank", body, plain).status_code == 200
    for special in ({"simulate": "no_tokens"}, {"what_if": {}}, {"bundle": "x"}):
        assert call(server, "/v1/rank", body | special, plain).status_code == 403
        batch = {"requests": [body, body | special]}
        assert call(server, "/v1/rank:batch", batch, plain).status_code == 403
    assert call(server, "/v1/history", {"user_id": user}, plain).status_code == 403


def test_a_bundle_is_asked_for_by_name(server: Server, user: Any) -> None:
    live = server.live
    assert live.current is not None
    ranker = live.current.ranker
    body = {"user_id": user, "candidates": candidates_of(ranker)}
    other = replace(ranker.bundle, digest="f" * 64)
    live.previous = Serving(
        RankService(other, ranker.reader, ranker.items, ranker.replay_from),
        live.current.reader,
    )
    try:
        assert list(server.loaded()) == [ranker.bundle.name, other.name]
        answer = call(server, "/v1/rank", body | {"bundle": other.name}).json()
        assert answer["bundle"] == other.name
        wrong = call(server, "/v1/rank", body | {"bundle": "nobody"})
        assert wrong.status_code == 422
        assert other.name in wrong.json()["message"]
    finally:
        live.previous = None


def test_the_history_is_told_newest_first(server: Server, user: Any) -> None:
    assert server.live.current is not None
    row = server.live.current.ranker.reader.read_user(user)
    assert row.history is not None
    told = call(server, "/v1/history", {"user_id": user}).json()
    assert [event["item_id"] for event in told["events"]] == row.history["item_id"].to_pylist()[
        ::-1
    ]
    assert told["num_events"] == row.columns["history_end"]
    assert told["events_behind"] == 0
    assert told["num_tokens"] > 0
    assert told["degraded"] == []
    nobody = call(server, "/v1/history", {"user_id": 987_654_321}).json()
    assert nobody["events"] == []
    assert nobody["degraded"] == ["unknown_user"]
