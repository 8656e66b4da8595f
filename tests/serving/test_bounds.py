"""Foul weather: what is asked of the server is bounded, ends in time, and is answered by a named rung."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import gc
import json
import math
import os
import threading
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
import msgspec
import numpy as np
import pytest
import torch

from feature_repo.contract.arrow import EPOCH
from feature_repo.errors import ExpectedError, SettingsError
from feature_repo.home.tables import JobFolder
from modeling.bundle.bundle import BundleError
from serving.api.degraded import Degraded
from serving.api.errors import OverloadedError, SlowBodyError
from serving.api.messages import RankContext, RankRequest, RankResponse
from serving.api.settings import ServeSettings, settings_from
from serving.benchmarks.faults import memory_mib
from serving.command import environment_of, open_ranker
from serving.live.live import BundleSource, Live, Repair, Serving
from serving.live.store_watch import StoreState
from serving.ranking.ranker import Clock, NotFiniteError, OutOfTimeError, RankService
from serving.routes.admission import Admission, Weight
from serving.routes.app import app_of
from serving.routes.bodies import read_body
from serving.routes.server import Server
from serving.stores.features import UserRow
from serving.stores.guarded import GuardedReader, ThreadedReader
from serving.stores.items import ItemTable, Loaded
from serving.stores.redis_hashes import StoreReadError
from serving.stores.redis_reader import DamagedValueError
from tests.promises import Promises
from tests.ranking import ranked


@pytest.fixture(scope="module")
def ranker(trained_shop: Any) -> RankService:
    return open_ranker(trained_shop.settings, replay=True)


@pytest.fixture(scope="module")
def items(ranker: RankService) -> list[Any]:
    found: list[Any] = ranker.bundle.encoder.items.values.to_pylist()[:20]
    return found


class StillReader:
    """A store that stands still for so many seconds."""

    def __init__(self, ranker: RankService, seconds: float) -> None:
        self.ranker, self.seconds, self.asked = ranker, seconds, 0

    async def read_user(self, user_id: Any, timeout_s: float) -> UserRow:
        self.asked += 1
        await asyncio.sleep(min(self.seconds, timeout_s))
        if self.seconds > timeout_s:
            raise StoreReadError("too slow")
        return self.ranker.nobody()


def server_of(ranker: RankService, reader: Any = None, **settings: Any) -> Server:
    """A server around a ranker."""
    live = Live(load=lambda digest: pytest.fail("nothing is loaded here"))
    users = GuardedReader(ThreadedReader(ranker.reader) if reader is None else reader)
    live.current = Serving(ranker, users)
    return Server(live, ServeSettings(**settings))


def talk(server: Server, call: Callable[[httpx.AsyncClient], Awaitable[Any]]) -> Any:
    """Something done with a client of the server."""

    async def run() -> Any:
        transport = httpx.ASGITransport(app_of(server), raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            return await call(client)

    return asyncio.run(run())


def rank(server: Server, body: dict[str, Any], **options: Any) -> httpx.Response:
    """One ranking request."""
    found: httpx.Response = talk(
        server, lambda client: client.post("/v1/rank", json=body, **options)
    )
    return found


def test_a_store_that_stands_still_costs_its_share_of_the_time_and_the_user(
    ranker: RankService, items: list[Any]
) -> None:
    server = server_of(ranker, StillReader(ranker, 60), store_ms=30, deadline_ms=2_000)
    began = time.perf_counter()
    answer = rank(server, {"user_id": 1, "candidates": items}).json()
    assert time.perf_counter() - began < 1.5
    assert answer["degraded"] == ["store_unavailable"]
    assert len(answer["scores"]) == len(items)


def test_a_store_that_is_away_is_tried_now_and_then_and_found_again(
    ranker: RankService, items: list[Any]
) -> None:
    reader = StillReader(ranker, 60)
    server = server_of(ranker, reader, store_ms=10, deadline_ms=2_000)
    body = {"user_id": 1, "candidates": items[:2]}

    async def many(client: httpx.AsyncClient) -> None:
        for _ in range(3):
            await client.post("/v1/rank", json=body)
        assert reader.asked == 3
        for _ in range(5):  # nobody waits any more
            answer = (await client.post("/v1/rank", json=body)).json()
            assert answer["degraded"] == ["store_unavailable"]
        assert reader.asked <= 4
        reader.seconds = 0
        await asyncio.sleep(0.3)
        answer = (await client.post("/v1/rank", json=body)).json()
        assert answer["degraded"] == []

    talk(server, many)


@pytest.mark.parametrize("asked_ms", [None, 60])
def test_when_time_is_up_candidates_come_in_the_requests_order(
    ranker: RankService, items: list[Any], monkeypatch: pytest.MonkeyPatch, asked_ms: float | None
) -> None:
    answer_of = RankService.answer

    def slow(self: RankService, *given: Any, **options: Any) -> RankResponse:
        time.sleep(0.5)
        return answer_of(self, *given, **options)

    monkeypatch.setattr(RankService, "answer", slow)
    server = server_of(ranker, deadline_ms=60 if asked_ms is None else 5_000)
    body = {"user_id": 1, "candidates": items, "k": 3}
    if asked_ms:
        body["deadline_ms"] = asked_ms
    began = time.perf_counter()
    answer = rank(server, body).json()
    assert time.perf_counter() - began < 0.4
    assert answer["item_ids"] == items[:3]
    assert answer["scores"] == []
    assert answer["degraded"][-1] == "deadline"


def test_more_requests_than_are_taken_on_are_refused_at_once(
    ranker: RankService, items: list[Any]
) -> None:
    server = server_of(
        ranker, StillReader(ranker, 0.2), store_ms=1_000, deadline_ms=5_000, max_in_flight=2
    )
    read = 0

    async def body() -> Any:
        nonlocal read
        read += 1
        yield b'{"user_id": 1, "candidates": ["%b"]}' % items[0].encode()

    async def many(client: httpx.AsyncClient) -> list[httpx.Response]:
        headers = {"Content-Type": "application/json"}
        asked = [client.post("/v1/rank", content=body(), headers=headers) for _ in range(10)]
        return await asyncio.gather(*asked)

    responses = talk(server, many)
    refused = [r for r in responses if r.status_code == 503]
    assert sorted(r.status_code for r in responses) == [200, 200, *[503] * 8]
    assert {r.json()["error"] for r in refused} == {"overloaded"}
    assert {r.headers["retry-after"] for r in refused} == {"1"}
    assert read < 10  # a full server reads no body
    assert server.admission.under_way == 0
    assert rank(server, {"user_id": 1, "candidates": items[:1]}).status_code == 200


def test_a_client_that_left_costs_no_scoring(
    ranker: RankService, items: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their place is free at once, and the model is not asked."""
    scored: list[int] = []
    answer_of = RankService.answer

    def counted(self: RankService, asked: RankRequest, *given: Any, **options: Any) -> RankResponse:
        scored.append(len(asked.candidates))
        return answer_of(self, asked, *given, **options)

    monkeypatch.setattr(RankService, "answer", counted)
    server = server_of(ranker, StillReader(ranker, 0.3), store_ms=1_000, deadline_ms=5_000)
    app = app_of(server)
    body = b'{"user_id": 1, "candidates": ["%b"]}' % items[0].encode()

    async def leave() -> list[Any]:
        sent: list[Any] = []
        messages = [
            {"type": "http.request", "body": body, "more_body": False},
            {"type": "http.disconnect"},
        ]

        async def receive() -> Any:
            if messages:
                return messages.pop(0)
            await asyncio.sleep(60)
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            sent.append(message)

        scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": "POST",
            "path": "/v1/rank",
            "raw_path": b"/v1/rank",
            "query_string": b"",
            "root_path": "",
            "scheme": "http",
            "headers": [(b"host", b"localhost"), (b"content-type", b"application/json")],
            "client": ("127.0.0.1", 1),
            "server": ("server", 80),
        }
        began = time.perf_counter()
        await app(scope, receive, send)
        assert time.perf_counter() - began < 0.2
        return sent

    sent = asyncio.run(leave())
    assert sent[0]["status"] == 499
    assert scored == []
    assert server.admission.under_way == 0
    assert server.metrics.left._value.get() == 1


def test_a_body_that_trickles_in_is_given_up(ranker: RankService) -> None:
    async def trickle() -> Any:
        yield b'{"user_id"'
        await asyncio.sleep(5)
        yield b": 1}"

    async def send(client: httpx.AsyncClient) -> httpx.Response:
        return await client.post(
            "/v1/rank", content=trickle(), headers={"Content-Type": "application/json"}
        )

    server = server_of(ranker, body_s=0.1)
    response = talk(server, send)
    assert response.status_code == 408
    assert response.json()["error"] == "slow_body"
    assert response.headers["connection"] == "close"


def test_numbers_that_are_none_become_no_scores_and_no_null(
    ranker: RankService, items: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = ranker.bundle.model
    score = type(model).score

    def broken(self: Any, *given: Any) -> Any:
        return score(self, *given) * torch.nan

    monkeypatch.setattr(type(model), "score", broken)
    answer = rank(server_of(ranker, deadline_ms=5_000), {"user_id": 1, "candidates": items}).json()
    assert answer["degraded"][-1] == "no_scores"
    assert answer["item_ids"] == items
    assert answer["scores"] == []
    with pytest.raises(NotFiniteError, match="no numbers"):
        ranker.warm_up()


def test_a_time_of_the_future_is_refused(ranker: RankService, items: list[Any]) -> None:
    server = server_of(ranker)
    for ahead, status in ((timedelta(hours=1), 422), (timedelta(seconds=60), 200)):
        at = (datetime.now(UTC) + ahead).isoformat()
        body = {"user_id": 1, "candidates": items, "context": {"request_timestamp": at}}
        assert rank(server, body).status_code == status


def test_features_of_years_ago_are_said_to_be_stale(
    trained_shop: Any, ranker: RankService, items: list[Any]
) -> None:
    today = open_ranker(trained_shop.settings)
    assert "stale_features" in ranked(today, RankRequest(1, items)).degraded
    assert "stale_features" not in ranked(ranker, RankRequest(1, items)).degraded


@pytest.mark.parametrize(
    ("header", "path", "status"),
    [
        (None, "/livez", 200),
        (None, "/readyz", 200),
        (None, "/v1/rank", 401),
        ("Bearer wrong", "/v1/rank", 401),
        ("Basic a-secret-of-this-test", "/v1/rank", 401),
        ("Bearer a-secret-of-this-test", "/v1/rank", 200),
        ("bearer a-secret-of-this-test", "/v1/rank", 200),
        ("Bearer a-secret-of-this-test", "/metrics", 403),
        ("Bearer another-one-for-metrics", "/metrics", 200),
        ("Bearer another-one-for-metrics", "/readyz", 200),
        ("Bearer another-one-for-metrics", "/v1/rank", 403),
        ("Bearer another-one-for-metrics", "/v1/models", 403),
        ("Bearer a-secret-of-this-tests", "/v1/rank", 401),
        ("Bearer ", "/v1/rank", 401),
    ],
)
def test_what_a_caller_may_do(
    ranker: RankService, items: list[Any], header: str | None, path: str, status: int
) -> None:
    auth = {"a-secret-of-this-test": ("rank",), "another-one-for-metrics": ("metrics",)}
    server = server_of(ranker, api_keys=auth, deadline_ms=5_000)
    headers = {} if header is None else {"Authorization": header}
    body = {"user_id": 1, "candidates": items} if path == "/v1/rank" else None

    async def ask(client: httpx.AsyncClient) -> httpx.Response:
        return await client.request("POST" if body else "GET", path, headers=headers, json=body)

    response = talk(server, ask)
    assert response.status_code == status
    assert "a-secret" not in response.text
    assert "another-one" not in response.text


def test_an_unknown_path_and_method_are_told_as_errors_are(ranker: RankService) -> None:
    server = server_of(ranker)

    async def ask(client: httpx.AsyncClient) -> list[httpx.Response]:
        return [
            await client.get("/nowhere"),
            await client.get("/v1/rank"),
            await client.head("/livez"),
            await client.head("/readyz"),
        ]

    missing, wrong, alive, ready = talk(server, ask)
    assert (missing.status_code, missing.json()["error"]) == (404, "not_found")
    assert (wrong.status_code, wrong.json()["error"]) == (405, "method_not_allowed")
    assert (alive.status_code, ready.status_code) == (200, 200)


def test_every_fault_of_ours_is_counted_and_tells_nothing(
    ranker: RankService, items: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*given: Any, **options: Any) -> None:
        raise RuntimeError("a secret of the inside")

    monkeypatch.setattr(RankService, "answer", fails)
    server = server_of(ranker, deadline_ms=5_000)
    response = rank(server, {"user_id": 1, "candidates": items})
    assert response.status_code == 500
    assert "inside" not in response.text
    assert server.metrics.requests.labels("/v1/rank", "500")._value.get() == 1


class Bundles:
    """What a catalogue would say, and what loading it would give."""

    def __init__(self, ranker: RankService) -> None:
        self.ranker, self.live, self.broken = ranker, "a" * 64, set[str]()
        self.loaded: list[str] = []

    def load(self, digest: str | None) -> Serving:
        assert digest is not None
        self.loaded.append(digest)
        if digest in self.broken:
            raise BundleError(f"{digest[:4]} is broken")
        from dataclasses import replace

        made = RankService(
            replace(self.ranker.bundle, digest=digest), self.ranker.reader, self.ranker.items
        )
        return Serving(made, GuardedReader(ThreadedReader(self.ranker.reader)))


def test_a_live_bundle_is_followed_and_a_broken_one_never_ranks(ranker: RankService) -> None:
    bundles = Bundles(ranker)
    live = Live(bundles.load, lambda: bundles.live)
    assert live.why_not_ready == "no bundle is loaded yet"
    live.load_now()
    first = live.current
    assert first is not None
    assert live.why_not_ready is None
    live.load_now()
    assert bundles.loaded == ["a" * 64]  # as long as nothing changes, nothing is loaded
    bundles.live = "b" * 64
    bundles.broken.add("b" * 64)
    live.load_now()
    live.load_now()
    assert live.current is first
    assert live.refused == {"b" * 64: "bbbb is broken"}
    assert bundles.loaded == ["a" * 64, "b" * 64]  # tried once
    bundles.live = "c" * 64
    live.load_now()
    assert live.current is not None
    assert live.current.ranker.bundle.digest == "c" * 64
    assert live.previous is first
    bundles.live = "a" * 64  # somebody rolled back: it is warm, and not loaded again
    live.load_now()
    assert live.current is first
    assert len(bundles.loaded) == 3
    assert live.swaps == 3


def test_a_server_without_a_bundle_says_why_and_tries_again(ranker: RankService) -> None:
    found: list[Serving] = []

    def load(digest: str | None) -> Serving:
        if not found:
            raise ExpectedError("no item has any features: run materialize")
        return found[0]

    live = Live(load)
    live.load_now()
    server = Server(live, ServeSettings())

    async def ask(client: httpx.AsyncClient) -> httpx.Response:
        return await client.get("/readyz")

    response = talk(server, ask)
    assert response.status_code == 503
    assert response.json()["message"] == "no item has any features: run materialize"
    found.append(Serving(ranker, GuardedReader(ThreadedReader(ranker.reader))))
    live.load_now()
    assert talk(server, ask).status_code == 200


def test_an_emptied_store_is_not_ready_and_is_repaired(ranker: RankService) -> None:
    held: list[str | None] = ["run-1"]
    repaired: list[bool] = []

    async def look() -> StoreState:
        if held[0] == "away":
            raise StoreReadError("away")
        return StoreState(held[0])

    live = Live(lambda digest: pytest.fail("no"), look=look, repair=repaired.append)
    live.current = Serving(ranker, GuardedReader(ThreadedReader(ranker.reader)))
    for store, problem in (
        ("run-1", None),
        (None, "holds nothing"),
        ("away", "cannot be read"),
        ("run-2", None),
    ):
        held[0] = store
        asyncio.run(live.look_at_store())
        assert (live.why_not_ready is None) == (problem is None)
        assert problem is None or problem in (live.why_not_ready or "")
    assert repaired == [False]


def test_settings_reach_worker_processes_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = ServeSettings(
        port=1234,
        api_keys={"a-token-of-sixteen": ("rank", "metrics")},
        deadline_ms=77.5,
        replay=True,
        bundle="some/where",
    )
    for name, value in environment_of(settings).items():
        monkeypatch.setenv(name, value)
    assert ServeSettings() == settings


def test_a_clock_tells_stages() -> None:
    clock = Clock()
    time.sleep(0.01)
    clock.lap("queue")
    assert 10 <= clock.laps["queue"] < 500


def test_a_batch_is_answered_as_its_requests_are(ranker: RankService, items: list[Any]) -> None:
    server = server_of(ranker, deadline_ms=5_000, store_ms=2_000)
    bodies = [{"user_id": user, "candidates": items[user:]} for user in range(1, 4)]
    single = [rank(server, body).json() for body in bodies]

    async def ask(client: httpx.AsyncClient) -> httpx.Response:
        return await client.post("/v1/rank:batch", json={"requests": bodies})

    batch = talk(server, ask).json()["answers"]
    for one, other in zip(single, batch, strict=True):
        assert one.pop("timings_ms")
        assert other.pop("timings_ms")
        assert one == other
    bodies[1]["candidates"] = [5]
    refused = talk(server, ask)
    assert refused.status_code == 422
    assert "requests[1].candidates[0]" in refused.json()["message"]


@pytest.mark.parametrize(
    ("accept", "expected"),
    [
        (None, "application/msgpack"),
        ("*/*", "application/msgpack"),
        ("application/json", "application/json"),
        ("application/msgpack", "application/msgpack"),
    ],
)
def test_msgpack_says_what_json_says(
    ranker: RankService, items: list[Any], accept: str | None, expected: str
) -> None:
    server = server_of(ranker, deadline_ms=5_000, store_ms=2_000)
    body = {
        "user_id": 1,
        "candidates": items,
        "context": {"request_timestamp": datetime(2011, 12, 1, tzinfo=UTC)},
    }
    headers = {"Content-Type": "application/msgpack"} | (
        {} if accept is None else {"Accept": accept}
    )

    async def ask(client: httpx.AsyncClient) -> httpx.Response:
        content = msgspec.msgpack.encode(body)
        return await client.post("/v1/rank", content=content, headers=headers)

    response = talk(server, ask)
    assert response.status_code == 200
    assert response.headers["content-type"] == expected
    decode = msgspec.json.decode if expected.endswith("json") else msgspec.msgpack.decode
    answer = decode(response.content)
    plain = rank(server, body | {"context": {"request_timestamp": "2011-12-01T00:00:00Z"}}).json()
    assert answer["item_ids"] == plain["item_ids"]
    assert answer["scores"] == plain["scores"]


@dataclass(frozen=True)
class Swapped:
    """What came of swaps under load: bundles that answers named, p99 of answers before and meanwhile."""

    named: set[str]
    steady_ms: float
    swapping_ms: float


def swap_under_load(ranker: RankService, items: list[Any], swaps: int) -> Swapped:
    """Two bundles that rank differently take turns while requests are under way; every answer is that of
    the bundle it names.
    """
    from dataclasses import replace

    flipped = copy.deepcopy(ranker.bundle.model)
    with torch.no_grad():
        for parameter in flipped.parameters():
            parameter.mul_(-0.9)
    other = replace(ranker.bundle, digest="f" * 64, model=flipped)
    rankers = [ranker, RankService(other, ranker.reader, ranker.items, ranker.replay_from)]
    assert rankers[0].bundle.name != rankers[1].bundle.name
    server = server_of(ranker, StillReader(ranker, 0.0), deadline_ms=30_000, max_in_flight=64)
    live = server.live
    live.previous = Serving(rankers[1], GuardedReader(StillReader(ranker, 0.0)))
    asked = [{"user_id": 1, "candidates": items[at : at + 10]} for at in range(10)]
    oracle = {
        (one.bundle.name, at): one.answer(
            RankRequest(1, body["candidates"]), one.nobody(), Clock()
        ).response.scores
        for one in rankers
        for at, body in enumerate(asked)
    }
    named: set[str] = set()
    spent_ms: dict[bool, list[float]] = {False: [], True: []}  # by whether bundles were swapped

    async def load(client: httpx.AsyncClient) -> None:
        async def keep_asking() -> None:
            number = 0
            while live.swaps < swaps:
                at, began, swapping = number % len(asked), time.perf_counter(), live.swaps > 0
                answer = (await client.post("/v1/rank", json=asked[at])).json()
                spent_ms[swapping].append(1000 * (time.perf_counter() - began))
                assert answer["scores"] == oracle[answer["bundle"], at]
                assert answer["degraded"] == []
                named.add(answer["bundle"])
                number += 1

        async def keep_swapping() -> None:
            await asyncio.sleep(swaps / 500)  # steady until then
            while live.swaps < swaps:
                live.roll_back()
                await asyncio.sleep(0.005)

        await asyncio.gather(keep_swapping(), *(keep_asking() for _ in range(4)))

    talk(server, load)
    steady, swapping = (float(np.quantile(spent_ms[one], 0.99)) for one in (False, True))
    return Swapped(named, steady, swapping)


def test_swaps_under_load_mix_no_answer(ranker: RankService, items: list[Any]) -> None:
    assert len(swap_under_load(ranker, items, 100).named) == 2


@pytest.mark.whole
def test_a_thousand_swaps_under_load_mix_no_answer(
    ranker: RankService, items: list[Any], promises: Any
) -> None:
    found = swap_under_load(ranker, items, 1_000)
    assert len(found.named) == 2
    promises.note(
        "1,000 hot swaps under load",
        "no error, no mixed answer, p99 ≤ 2 × steady",
        f"none; p99 {found.swapping_ms:.1f} ms, steady {found.steady_ms:.1f} ms",
        held=found.swapping_ms <= 2 * found.steady_ms,
    )


def test_an_explanation_says_what_each_event_is_worth(
    trained_shop: Any, ranker: RankService, items: list[Any]
) -> None:
    """Its score is the ranker's, and an event's effect is what ranking without it changes."""
    index = JobFolder(trained_shop.settings.home, "user_history").read("user_stats")
    user_id = index["user_id"][0].as_py()
    server = server_of(ranker, deadline_ms=5_000, store_ms=2_000)

    async def ask(client: httpx.AsyncClient) -> httpx.Response:
        body = {"user_id": user_id, "candidate": items[0], "num_events": 3}
        return await client.post("/v1/explain", json=body)

    found = talk(server, ask).json()
    ranked = rank(server, {"user_id": user_id, "candidates": items[:1]}).json()
    assert found["score"] == pytest.approx(ranked["scores"][0], abs=1e-6)
    assert set(found["features"]) == set(ranker.bundle.encoder.dense_names)
    user = ranker.reader.read_user(user_id)
    assert user.history is not None
    newest = user.history.to_pylist()[::-1][:3]
    assert [event["item_id"] for event in found["events"]] == [e["item_id"] for e in newest]
    assert all(event["action"] in ranker.contract.spec.actions for event in found["events"])
    from dataclasses import replace

    without = replace(user, history=user.history.slice(0, len(user.history) - 1))
    answer = ranker.answer(RankRequest(user_id, items[:1]), without, Clock()).response
    logits = [math.log(s / (1 - s)) for s in (found["score"], answer.scores[0])]
    assert found["events"][0]["effect"] == pytest.approx(logits[0] - logits[1], abs=1e-4)


@pytest.mark.parametrize("asked_ms", [0.5, 3.0])
def test_callers_in_a_hurry_shut_the_store_off_for_nobody(
    ranker: RankService, items: list[Any], asked_ms: float
) -> None:
    """A store that answers in five milliseconds is well, whatever time a caller has."""
    server = server_of(ranker, StillReader(ranker, 0.005), store_ms=1_000, deadline_ms=5_000)
    body = {"user_id": 1, "candidates": items[:2]}

    async def many(client: httpx.AsyncClient) -> Any:
        for _ in range(5):
            await client.post("/v1/rank", json={**body, "deadline_ms": asked_ms})
        return (await client.post("/v1/rank", json=body)).json()

    assert talk(server, many)["degraded"] == []


def test_one_damaged_user_shuts_the_store_off_for_nobody(
    ranker: RankService, items: list[Any]
) -> None:
    class Damaged(StillReader):
        async def read_user(self, user_id: Any, timeout_s: float) -> UserRow:
            if user_id == 13:
                raise DamagedValueError("history is stored as no value")
            return await super().read_user(user_id, timeout_s)

    server = server_of(ranker, Damaged(ranker, 0), deadline_ms=5_000)
    for _ in range(4):
        answer = rank(server, {"user_id": 13, "candidates": items[:2]}).json()
        assert answer["degraded"] == ["history_unreadable"]
    assert rank(server, {"user_id": 1, "candidates": items[:2]}).json()["degraded"] == []


def test_the_wait_for_the_model_is_told_as_one(
    ranker: RankService, items: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also by an answer whose time was up."""
    answer_of = RankService.answer

    def slow(self: RankService, *given: Any, **options: Any) -> RankResponse:
        time.sleep(0.1)
        return answer_of(self, *given, **options)

    monkeypatch.setattr(RankService, "answer", slow)
    server = server_of(ranker, StillReader(ranker, 0), deadline_ms=250)
    body = {"user_id": 1, "candidates": items[:2]}

    async def many(client: httpx.AsyncClient) -> list[Any]:
        asked = [client.post("/v1/rank", json=body) for _ in range(4)]
        return [response.json() for response in await asyncio.gather(*asked)]

    answers = talk(server, many)
    waits = sorted(a["timings_ms"]["model_wait"] for a in answers if a["scores"])
    assert waits[-1] > 80
    assert all(a["timings_ms"]["item_read"] < 150 for a in answers)
    late = [a for a in answers if a["degraded"]]
    assert late
    assert all(sum(a["timings_ms"].values()) > 0 for a in late)


def test_too_much_of_slow_bodies_gives_up_the_longest_held() -> None:
    """Whoever sends most of a megabyte and waits keeps nobody else out."""

    async def run() -> tuple[list[BaseException | bytes], bytes]:
        admission = Admission(4, most_bytes=3_000)

        async def body(parts: list[bytes], pause: float) -> Any:
            for part in parts:
                yield part
                await asyncio.sleep(pause)

        async def read(parts: list[bytes], pause: float) -> bytes:
            request: Any = FakeRequest(body(parts, pause))
            return await read_body(request, 10_000, 5.0, admission)

        slow = [asyncio.create_task(read([b"x" * 1_000, b"y"], 2.0)) for _ in range(3)]
        await asyncio.sleep(0.05)
        quick = await read([b"z" * 500, b"z" * 500], 0.01)
        ended = await asyncio.wait_for(asyncio.gather(slow[0], return_exceptions=True), 1.0)
        for task in slow[1:]:
            task.cancel()
        await asyncio.gather(*slow[1:], return_exceptions=True)
        assert admission._bytes == 0
        assert not admission._arriving
        return ended, quick

    ended, quick = asyncio.run(run())
    assert len(quick) == 1_000
    assert isinstance(ended[0], SlowBodyError)


def test_no_more_bodies_are_given_up_than_make_room() -> None:
    """Also where one that was given up gets more bytes before it ends."""

    async def run() -> list[int]:
        admission = Admission(4, most_bytes=100)
        async with asyncio.timeout(5), asyncio.timeout(5) as one, asyncio.timeout(5) as two:
            with admission.arriving(one) as first, admission.arriving(two) as second:
                admission.came(first, 80)
                admission.came(second, 30)
                ends = [one.when(), two.when()]
                now = asyncio.get_running_loop().time()
                assert (ends[0] or 0) <= now < (ends[1] or 0)
                admission.came(first, 200)  # which costs the second nothing
                assert (two.when() or 0) > now
                left = [len(admission._arriving), admission._bytes]
                one.reschedule(None)
                two.reschedule(None)
        return [*left, admission._bytes]

    assert asyncio.run(run()) == [1, 30, 0]


class FakeRequest:
    """What `read_body` needs of a request."""

    def __init__(self, stream: Any) -> None:
        self.headers = {"content-type": "application/json"}
        self._stream = stream

    def stream(self) -> Any:
        return self._stream


def test_a_catalogue_that_fails_once_is_asked_again(ranker: RankService) -> None:
    bundles = Bundles(ranker)
    fails = [True, True]

    def digest() -> str:
        if fails:
            fails.pop()
            raise OSError("the catalogue is away")
        return bundles.live

    live = Live(bundles.load, digest)
    live.load_now()
    assert live.current is None
    assert "the catalogue is away" in (live.why_not_ready or "")
    live.load_now()
    live.load_now()
    assert live.current is not None


def test_a_repair_that_fails_waits_longer_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[int] = []

    class Failed:
        def poll(self) -> int:
            return 1

    def start(self: Repair, force: bool) -> Any:
        started.append(1)
        return Failed()

    monkeypatch.setattr(Repair, "_start", start)
    settings: Any = None
    repair = Repair(settings, pause_s=0.2)
    for _ in range(5):
        repair()
    assert len(started) == 1
    time.sleep(0.25)
    for _ in range(5):
        repair()
    assert len(started) == 2


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ('{"supersecret-supersecret": ["everything"]}', "16 visible ASCII"),
        ('["supersecret-supersecret"]', "16 visible ASCII"),
        ('{"": ["rank"]}', "16 visible ASCII"),
        ("{supersecret", "expected JSON"),
    ],
)
def test_wrong_tokens_are_refused_without_being_told(
    monkeypatch: pytest.MonkeyPatch, value: str, said: str
) -> None:
    monkeypatch.setenv("MEMOIR_SERVE_API_KEYS", value)
    with pytest.raises(SettingsError, match=said) as refused:
        settings_from()
    assert "supersecret" not in str(refused.value)


def test_an_unknown_setting_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEMOIR_SERVE_DEADLIN_MS", "5")
    with pytest.raises(SettingsError, match="MEMOIR_SERVE_DEADLINE_MS"):
        settings_from()


@pytest.mark.parametrize("same", [True, False])
def test_a_shadow_says_how_far_its_lists_part_and_touches_no_answer(
    ranker: RankService, items: list[Any], same: bool
) -> None:
    from dataclasses import replace

    flipped: Any = copy.deepcopy(ranker.bundle.model)
    if not same:
        flipped.score = lambda *given: -type(flipped).score(flipped, *given)
    other = replace(ranker.bundle, digest="f" * 64, model=flipped)
    beside = RankService(other, ranker.reader, ranker.items, ranker.replay_from)
    server = server_of(ranker, StillReader(ranker, 0.0), deadline_ms=60_000, shadow_share=1.0)
    body = {"user_id": 1, "candidates": items}
    alone = rank(server, body).json()
    server.load_shadow(lambda: Serving(beside, GuardedReader(StillReader(ranker, 0.0))))
    assert server.shadow is not None
    with_shadow = rank(server, body).json()
    server.shadow.close()
    # A late answer has no second opinion.
    assert alone["degraded"] == with_shadow["degraded"]
    assert "deadline" not in with_shadow["degraded"]
    assert with_shadow["scores"] == alone["scores"]
    assert with_shadow["bundle"] == ranker.bundle.name
    text = server.metrics.text().decode()
    shadows = [line for line in text.splitlines() if line.startswith("memoir_shadow_total")]
    assert 'memoir_shadow_total{outcome="compared"} 1.0' in shadows, (shadows, alone)
    assert ('memoir_shadow_total{outcome="same_first"} 1.0' in text) == same
    below = 'memoir_shadow_rank_correlation_bucket{le="-0.5"} '
    assert below + ("0.0" if same else "1.0") in text


def test_a_shadow_that_cannot_be_loaded_keeps_nobody_from_ranking(
    ranker: RankService, items: list[Any]
) -> None:
    server = server_of(ranker, StillReader(ranker, 0.0), deadline_ms=5_000)

    def broken() -> Serving:
        raise BundleError("it is broken")

    server.load_shadow(broken)
    assert rank(server, {"user_id": 1, "candidates": items}).status_code == 200


def test_no_more_are_taken_on_than_are_answered_in_time() -> None:
    """However many places there are: behind a slow model a queue would only grow old."""
    admission = Admission(16, patience_s=0.17)
    for _ in range(100):
        admission.took(0.05)
    with contextlib.ExitStack() as places:
        taken = 0
        while not admission.full:
            places.enter_context(admission.admitted())
            taken += 1
        assert taken == 4  # 4 × 50 ms is more patience than there is; 3 is not
    batch = Weight(rankings=4.0)  # one request, which is as much to wait for
    with admission.admitted(batch):
        with pytest.raises(OverloadedError), admission.admitted(batch):
            pass
        assert not admission.full  # a small one comes to the model between its rankings
    # A model that got faster gets its places back.
    for _ in range(100):
        admission.took(0.001)
    with contextlib.ExitStack() as places:
        for _ in range(16):
            places.enter_context(admission.admitted())
        assert admission.full
    # One is always taken on, however slow the last were.
    admission.took(100.0)
    assert not admission.full


def test_a_request_for_many_candidates_takes_many_places() -> None:
    admission = Admission(16)
    large = Weight.of([5_000])
    assert large.places == 10
    with contextlib.ExitStack() as places:
        places.enter_context(admission.admitted(large))
        with pytest.raises(OverloadedError), admission.admitted(large):
            pass  # two of them would leave nobody else a place
        for _ in range(6):
            places.enter_context(admission.admitted(Weight.of([500])))
        assert admission.full
    assert not admission.full
    assert Weight.of([500]).rankings == pytest.approx(1.0)
    assert Weight.of([500, 500, 500]).places == 1  # one after the other


def test_a_small_ranking_waits_for_its_like_and_not_for_all_of_a_large_one() -> None:
    admission = Admission(16, patience_s=0.1)
    for _ in range(200):
        admission.took(0.3, Weight.of([5_000]).rankings)  # 35 ms for 500
    with admission.admitted(Weight.of([5_000])):
        assert not admission.full
        with admission.admitted(Weight.of([500])), admission.admitted(Weight.of([500])):
            assert admission.full


def test_candidates_are_scored_in_pieces_as_at_once(
    ranker: RankService, items: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    candidates = ranker.bundle.encoder.items.values.to_pylist()[:200]
    asked, user = RankRequest(-5, candidates), ranker.nobody(Degraded.UNKNOWN_USER)
    at_once = ranker.answer(asked, user, Clock()).response
    left: list[int] = []
    monkeypatch.setattr("serving.ranking.ranker.PIECE", 32)
    in_pieces = ranker.answer(asked, user, Clock(), go_on=left.append).response
    pieces = -(-len(candidates) // 32)
    assert left == list(range(pieces - 1, 0, -1))
    once, later = (
        dict(zip(answer.item_ids, answer.scores, strict=True)) for answer in (at_once, in_pieces)
    )
    assert later == pytest.approx(once, abs=1e-6)  # the last bits of a sum differ by its place

    def stop(pieces: int) -> None:
        raise OutOfTimeError

    with pytest.raises(OutOfTimeError):
        ranker.answer(asked, user, Clock(), go_on=stop)


def test_what_cannot_be_scored_in_time_is_given_up_between_pieces(
    ranker: RankService, items: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And others are served meanwhile."""
    monkeypatch.setattr("serving.ranking.ranker.PIECE", 16)
    score, scored = type(ranker.bundle.model).score, []

    def slow(self: Any, *given: Any) -> Any:
        scored.append(1)
        time.sleep(0.03)
        return score(self, *given)

    monkeypatch.setattr(type(ranker.bundle.model), "score", slow)
    server = server_of(ranker, StillReader(ranker, 0.0), deadline_ms=200, max_in_flight=64)
    many = {"user_id": 1, "candidates": (items * 50)[:1000]}

    async def ask(client: httpx.AsyncClient) -> tuple[Any, Any]:
        large = asyncio.create_task(client.post("/v1/rank", json=many))
        await asyncio.sleep(0.06)
        small = await client.post("/v1/rank", json={"user_id": 1, "candidates": items[:5]})
        return (await large).json(), small.json()

    large, small = talk(server, ask)
    assert large["degraded"] == ["deadline"]
    assert small["degraded"] == []
    assert len(scored) < 20  # of 63 pieces


def test_a_bundle_that_cannot_keep_the_deadline_never_ranks(
    trained_shop: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = BundleSource(trained_shop.settings)
    quick = source.load()
    assert 0 < (quick.ranker.ms_of_500 or 0) < 1_000
    digest = quick.ranker.bundle.digest
    live = Live(replace(source, deadline_ms=0.001).load, lambda: digest)
    live.load_now()
    assert live.current is None
    assert "ms to rank 500 candidates, and 0.001 ms are allowed" in live.refused[digest]
    asyncio.run(quick.close())


def test_bundles_that_were_loaded_and_left_leave_nothing(trained_shop: Any) -> None:
    grown = grown_by_loads(trained_shop, warm_up=3, loads=4)
    assert grown.descriptors <= 0
    assert grown.threads <= 0
    assert grown.frozen <= 0
    assert grown.objects < 2_000  # of the 4,500 that each load left behind


@pytest.mark.whole
def test_a_thousand_bundles_that_were_loaded_and_left_leave_nothing(
    trained_shop: Any, promises: Promises
) -> None:
    grown = grown_by_loads(trained_shop, warm_up=20, loads=1_000)
    held = grown.descriptors <= 0 and grown.threads <= 0 and grown.mib < 20
    promises.note(
        "a thousand swaps of different bundles",
        "descriptors, threads and memory flat",
        f"{grown.descriptors:+d} descriptors, {grown.threads:+d} threads, {grown.mib:+.1f} MiB",
        held=held,
    )
    assert grown.descriptors <= 0
    assert grown.threads <= 0


@dataclass(frozen=True)
class Grown:
    """What a process has more of than before."""

    descriptors: int
    threads: int
    objects: int
    frozen: int
    mib: float


def grown_by_loads(road: Any, warm_up: int, loads: int) -> Grown:
    """Loads of a bundle under ever new digests, each of which ranks and is closed after the next two."""
    source, number = BundleSource(road.settings), [0]

    def load(digest: str | None) -> Serving:
        made = source.load()
        bundle = replace(made.ranker.bundle, digest=digest or "")
        made.ranker.bundle = bundle
        return made

    live = Live(load, lambda: f"{number[0]:064x}")

    def threads() -> int:
        # The loop's own pool grows to its bound (cores + 4) by chance of timing, and belongs to no bundle.
        return sum(not thread.name.startswith("asyncio_") for thread in threading.enumerate())

    def held() -> tuple[int, int, int, int, float]:
        gc.collect()
        return (
            len(os.listdir("/proc/self/fd")),
            threads(),
            len(gc.get_objects()),
            gc.get_freeze_count(),
            memory_mib(os.getpid()),
        )

    async def swap(times: int) -> None:
        for _ in range(times):
            number[0] += 1
            await asyncio.to_thread(live.load_now)
            assert live.current is not None
            assert live.current.ranker.bundle.digest == f"{number[0]:064x}"
            await live.close_retired(0.0)

    async def run() -> Grown:
        await swap(warm_up)
        before = held()
        await swap(loads)
        for _ in range(50):  # threads of what was closed last end a moment later
            if threads() <= before[1]:
                break
            await asyncio.sleep(0.1)
        after = held()
        await live.close()
        return Grown(*(late - early for early, late in zip(before, after, strict=True)))  # type: ignore[arg-type]

    return asyncio.run(run())


def test_a_field_that_stands_twice_is_refused(ranker: RankService, items: list[Any]) -> None:
    body = f'{{"user_id": 1, "candidates": {json.dumps(items[:2])}, "user_id": 2}}'
    headers = {"Content-Type": "application/json"}
    server = server_of(ranker)
    response = talk(server, lambda c: c.post("/v1/rank", content=body, headers=headers))
    assert response.status_code == 422
    assert response.json()["message"] == "the body names 'user_id' twice in one object"


def test_what_declares_no_type_or_comes_to_another_path_is_refused(ranker: RankService) -> None:
    server = server_of(ranker)
    response = talk(server, lambda client: client.post("/v1/rank", content=b"{}"))
    assert (response.status_code, response.json()["error"]) == (415, "unsupported_media_type")
    assert "is required" in response.json()["message"]
    moved = talk(server, lambda client: client.post("/v1/rank/", json={}))
    assert moved.status_code == 404
    assert "location" not in moved.headers


def test_a_body_that_breaks_off_is_told_so(ranker: RankService) -> None:
    """A client whose chunks are broken is there and reads the answer."""

    async def call() -> list[Any]:
        sent: list[Any] = []

        async def send(message: Any) -> None:
            sent.append(message)

        async def receive() -> Any:
            return {"type": "http.disconnect"}

        headers = [(b"host", b"localhost"), (b"content-type", b"application/json")]
        scope = {
            "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST",
            "path": "/v1/rank", "raw_path": b"/v1/rank", "query_string": b"", "root_path": "",
            "scheme": "http", "headers": headers, "client": ("127.0.0.1", 1), "server": ("x", 80),
        }  # fmt: skip
        await app_of(server_of(ranker))(scope, receive, send)
        return sent

    begin, body = asyncio.run(call())
    assert begin["status"] == 400
    assert json.loads(body["body"])["error"] == "broken_body"
    assert (b"connection", b"close") in begin["headers"]


def test_a_gauge_tells_of_loaded_bundles_alone(ranker: RankService) -> None:
    bundles = Bundles(ranker)
    live = Live(bundles.load, lambda: bundles.live)
    server = Server(live, ServeSettings())
    for letter in "abcd":
        bundles.live = letter * 64
        live.load_now()
        assert live.current is not None
        server.observe()
    told = server.metrics.text().decode()
    named = {line.split('"')[1] for line in told.splitlines() if "memoir_bundle_info{" in line}
    assert len(named) == 2


def test_look_ups_of_made_up_ids_take_turns_with_everything_else(ranker: RankService) -> None:
    read: list[int] = []
    rows = ranker.items._read

    def counting(ids: Any) -> Any:
        read.append(len(ids))
        return rows(ids)

    def load() -> Loaded:
        return Loaded(rows(ranker.bundle.encoder.items.values.to_pylist()[:50]))

    table = ItemTable(ranker.bundle.encoder, counting, load)
    try:
        table.take([f"made up {n}" for n in range(1_200)])
        deadline = time.monotonic() + 60
        while sum(read) < 1_200 and time.monotonic() < deadline:
            time.sleep(0.02)
        assert read == [500, 500, 200]
    finally:
        table.close()


def test_a_store_that_was_filled_anew_is_followed_at_once(ranker: RankService) -> None:
    held, asked = ["run-1"], []

    async def look() -> StoreState:
        return StoreState(held[0])

    live = Live(lambda digest: pytest.fail("no"), look=look)
    live.current = Serving(ranker, GuardedReader(ThreadedReader(ranker.reader)))
    soon = ranker.items.refresh_soon
    try:
        ranker.items.refresh_soon = lambda: asked.append(held[0])  # type: ignore[method-assign]
        for run in ("run-1", "run-1", "run-2", "run-2"):
            held[0] = run
            asyncio.run(live.look_at_store())
    finally:
        ranker.items.refresh_soon = soon  # type: ignore[method-assign]
    assert asked == ["run-2"]


def test_a_replaying_server_follows_its_data(ranker: RankService, items: list[Any]) -> None:
    begun = ranker.end_of_data()
    assert begun is not None
    rows = ranker.reader.read_items(items)
    as_of = [begun]
    micros = timedelta(microseconds=1)
    table = ItemTable(
        ranker.bundle.encoder,
        ranker.reader.read_items,
        lambda: Loaded(rows, (as_of[0] - EPOCH) // micros),
    )
    replaying = RankService(ranker.bundle, ranker.reader, table, begun)
    assert replaying.end_of_data() == begun
    as_of[0] = begun + timedelta(days=2)  # as `refresh` leaves it
    table.refresh()
    assert replaying.end_of_data() == as_of[0]
    context = RankContext(begun + timedelta(days=1))
    answer = ranked(replaying, RankRequest(13001, items, context=context))
    assert answer.degraded == []
    table.close()
