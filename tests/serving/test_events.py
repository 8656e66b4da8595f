"""New events over HTTP: the next answer knows them, a second delivery changes nothing, and what cannot
be is refused whole.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
import numpy as np
import pyarrow as pa
import pytest

from feature_repo.history.history import from_batches, pack, unpack
from feature_repo.home.tables import JobFolder
from feature_repo.store.online_tokens import OnlineTokens
from feature_repo.store.online_users import (
    HISTORY,
    STATS,
    TOKENS,
    NewRow,
    _SqliteRecords,
    user_records,
)
from modeling.summaries.summariser import Summariser
from serving.api.degraded import Degraded
from serving.api.settings import ServeSettings
from serving.live.live import BundleSource, Live
from serving.ranking.ranker import RankService
from serving.routes.app import app_of
from serving.routes.server import Server
from serving.stores.features import UserRow
from serving.stores.refresh import Refresher, UserMemory


@pytest.fixture(scope="module")
def road(shop: Any, helpers: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A shop of its own with tokens: events change its store."""
    return helpers.token_road(shop, tmp_path_factory.mktemp("events"))


@pytest.fixture(scope="module")
def server(road: Any) -> Server:
    """A server over it."""
    live = Live(BundleSource(road.settings).load)
    live.load_now()
    assert live.current is not None, live.not_loaded
    return Server(live, ServeSettings(deadline_ms=10_000, store_ms=5_000))


@pytest.fixture
def user(road: Any) -> Iterator[int]:
    """Customers in turn, each with a history."""
    users = JobFolder(road.settings.home, "user_history").read("user_history")["user_id"]
    found: int = users[next(TURN)].as_py()
    return found


TURN = iter(range(1_000))


def ranker_of(server: Server) -> RankService:
    assert server.live.current is not None
    return server.live.current.ranker


def call(server: Server, path: str, body: Any) -> httpx.Response:
    """One request."""

    async def run() -> httpx.Response:
        transport = httpx.ASGITransport(app_of(server), raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            return await client.post(path, json=body)

    return asyncio.run(run())


def event_of(server: Server, at: datetime, item: str | None = None, **more: Any) -> dict[str, Any]:
    """A purchase."""
    assert server.live.current is not None
    known = server.live.current.ranker.bundle.encoder.items.values
    return {
        "item_id": known[0].as_py() if item is None else item,
        "event_timestamp": at.isoformat(),
        "quantity": 2.0,
        "unit_price": 1.5,
        **more,
    }


def test_the_next_answer_knows_an_event_and_a_second_delivery_changes_nothing(
    server: Server, user: int
) -> None:
    assert server.live.current is not None
    ranker = server.live.current.ranker
    candidates = ranker.bundle.encoder.items.values.to_pylist()[:20]
    asked = {"user_id": user, "candidates": candidates}
    before = ranker.reader.read_user(user)
    now = datetime.now(UTC) - timedelta(seconds=30)
    events = [
        event_of(server, now),
        event_of(server, now - timedelta(minutes=5), candidates[3], action="purchase"),
    ]
    first = call(server, "/v1/rank", asked).json()
    taken = call(server, "/v1/events", {"user_id": user, "events": events})
    assert (taken.status_code, taken.json()) == (200, {"added": 2, "known": 0, "waiting": 0})
    after = ranker.reader.read_user(user)
    assert after.history is not None
    assert after.history["event_timestamp"][-1].as_py() == now
    assert after.history["item_id"].to_pylist()[-2:] == [candidates[3], candidates[0]]
    assert after.columns["history_end"] == before.columns["history_end"] + 2
    assert after.tokens is not None
    assert after.tokens.num_events == after.columns["history_end"]
    assert after.sketch is not None
    assert after.problems == ()
    answer = call(server, "/v1/rank", asked).json()
    assert answer["degraded"] == first["degraded"] == ["stale_features"]  # a log of 2011
    assert answer["scores"] != first["scores"]
    again = call(server, "/v1/events", {"user_id": user, "events": [*events, events[0]]})
    assert again.json() == {"added": 0, "known": 3, "waiting": 0}
    assert ranker.reader.read_user(user).columns == after.columns


def test_a_late_event_takes_its_place_by_time(server: Server, user: int) -> None:
    """All that is stored knows it, tokens too: the whole past is at hand, and they begin anew."""
    reader = ranker_of(server).reader
    before = reader.read_user(user)
    late = datetime(2000, 1, 1, tzinfo=UTC)
    events = [event_of(server, late), event_of(server, datetime.now(UTC))]
    answer = call(server, "/v1/events", {"user_id": user, "events": events})
    assert answer.json() == {"added": 2, "known": 0, "waiting": 0}
    after = reader.read_user(user)
    assert_of_one_moment(after)
    assert before.history is not None
    assert after.history is not None
    times = after.history["event_timestamp"].to_pylist()
    assert times[0] == late
    assert times[1:-1] == before.history["event_timestamp"].to_pylist()


def test_an_event_older_than_all_that_is_packed_waits_for_the_batch(
    server: Server, user: int, road: Any
) -> None:
    """Nobody can say here whether the longer past has it: it enters the log, and the record stays."""
    ranker = ranker_of(server)
    records = user_records(road.store, ranker.contract, None)
    seen = records.read(user)
    packed = pa.Table.from_batches([unpack(ranker.contract, user, seen[HISTORY]["history"])])
    newest = pack(ranker.contract, user, packed.slice(packed.num_rows - 2))
    shorter = {**seen[HISTORY], "history": newest}
    assert records.swap(seen, {HISTORY: NewRow(shorter, 1)})
    before = records.read(user)
    late = event_of(server, datetime(2000, 1, 1, tzinfo=UTC))
    answer = call(server, "/v1/events", {"user_id": user, "events": [late]})
    assert answer.json() == {"added": 0, "known": 0, "waiting": 1}
    assert records.read(user).views == before.views
    (logged,) = records.logged([user])
    assert '"event_timestamp": 946684800000000' in logged.entries[-1].event


def test_a_user_nobody_knew_is_known_by_their_first_event(
    server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    assert server.live.current is not None
    now = datetime.now(UTC) - timedelta(seconds=5)
    body = {"user_id": 987_654, "events": [event_of(server, now)]}
    assert call(server, "/v1/events", body).json() == {"added": 1, "known": 0, "waiting": 0}
    ranker = server.live.current.ranker
    row = ranker.reader.read_user(987_654)
    assert row.history is not None
    assert row.history.num_rows == row.columns["history_end"] == 1
    assert_of_one_moment(row)  # a stream begins from nothing
    later = [event_of(server, now + timedelta(seconds=1))]
    assert call(server, "/v1/events", {"user_id": 987_654, "events": later}).json()["added"] == 1
    row = ranker.reader.read_user(987_654)
    assert row.columns["history_end"] == 2
    assert_of_one_moment(row)
    assert row.tokens is not None
    histories, _ = from_batches(ranker.contract, [row.history], pa.array([], pa.string()))
    summariser = Summariser(ranker.bundle.model, ranker.bundle.encoder)
    codes = ranker.bundle.encoder.items.indices_of(row.history["item_id"].unique())
    whole = summariser.whole(histories, codes, np.array([0]))
    np.testing.assert_allclose(row.tokens.tokens_SD, whole.tokens_BSD[0], atol=2e-3)  # fp16
    assert not caplog.records


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"event_timestamp": "2200-01-01T00:00:00Z"}, "future"),
        ({"event_timestamp": "2020-01-01T00:00:00"}, "timezone"),
        ({"action": "dream"}, "dream"),
        ({"item_id": 5}, "must be a string"),
        ({"quantity": "two"}, "float"),
        ({"colour": "red"}, "colour"),
    ],
)
def test_what_cannot_be_is_refused_with_its_reason(
    server: Server, user: int, change: dict[str, Any], reason: str
) -> None:
    event = event_of(server, datetime.now(UTC)) | change
    response = call(server, "/v1/events", {"user_id": user, "events": [event]})
    assert response.status_code == 422
    assert reason in response.json()["message"]


def test_openapi_says_what_an_event_has(server: Server) -> None:
    async def run() -> Any:
        transport = httpx.ASGITransport(app_of(server))
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            return (await client.get("/openapi.json")).json()

    document = asyncio.run(run())
    schemas = document["components"]["schemas"]
    assert {"item_id", "event_timestamp", "action", "quantity"} <= set(
        schemas["Event"]["properties"]
    )
    assert schemas["RankRequest"]["properties"]["user_id"]["type"] == "integer"
    assert schemas["RankRequest"]["properties"]["candidates"]["items"]["type"] == "string"
    assert "409" in document["paths"]["/v1/events"]["post"]["responses"]


@pytest.mark.parametrize("took_effect", [False, True])
def test_a_call_whose_outcome_is_unknown_is_made_whole_by_the_same_call(
    server: Server, user: int, took_effect: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is lost, and nothing is counted twice."""
    ranker = ranker_of(server)
    before = ranker.reader.read_user(user)
    events = [event_of(server, datetime.now(UTC) - timedelta(seconds=20))]
    once = [True]
    swap = _SqliteRecords.swap

    def failing(self: Any, *given: Any) -> bool:
        if not once:
            return swap(self, *given)
        once.pop()
        if took_effect:
            assert swap(self, *given)
        raise ConnectionError("the store went away")

    monkeypatch.setattr(_SqliteRecords, "swap", failing)
    first = call(server, "/v1/events", {"user_id": user, "events": events})
    assert first.status_code == 503
    assert first.json()["error"] == "store_unavailable"
    again = call(server, "/v1/events", {"user_id": user, "events": events})
    assert again.json() == {"added": int(not took_effect), "known": int(took_effect), "waiting": 0}
    after = ranker.reader.read_user(user)
    assert after.columns["history_end"] == before.columns["history_end"] + 1
    assert_of_one_moment(after)


@pytest.mark.parametrize("lags", [(STATS,), (TOKENS,), (STATS, TOKENS)])
def test_what_an_older_writer_left_behind_is_made_whole(
    server: Server, user: int, road: Any, lags: tuple[str, ...]
) -> None:
    """Statistics and tokens that do not know the history yet are brought up to it by any call."""
    ranker = ranker_of(server)
    records = user_records(road.store, ranker.contract, ranker.bundle.tokens)
    before = records.read(user)
    events = [event_of(server, datetime.now(UTC) - timedelta(seconds=20))]
    assert call(server, "/v1/events", {"user_id": user, "events": events}).json()["added"] == 1
    now = records.read(user)
    assert records.swap(now, {view: NewRow(before[view], 1) for view in lags})
    if STATS in lags:
        assert Degraded.MIXED_HISTORY in ranker.reader.read_user(user).problems
    call(server, "/v1/events", {"user_id": user, "events": events})
    assert_of_one_moment(ranker.reader.read_user(user))


def assert_of_one_moment(row: UserRow) -> None:
    """History, sketch, statistics and tokens know the same events."""
    assert row.tokens is not None
    assert row.sketch is not None
    known = (row.columns["history_end"], row.columns["history_digest"])
    assert (row.tokens.num_events, row.tokens.digest) == known
    assert (row.sketch.num_events, row.sketch.digest) == known
    assert row.problems == ()


def test_a_basket_may_come_in_two_calls(server: Server, user: int) -> None:
    """Its events have one time."""
    assert server.live.current is not None
    items = server.live.current.ranker.bundle.encoder.items.values.to_pylist()
    at = datetime.now(UTC) - timedelta(seconds=10)
    first, second = (event_of(server, at, items[n]) for n in (1, 2))
    assert call(server, "/v1/events", {"user_id": user, "events": [first]}).json()["added"] == 1
    answer = call(server, "/v1/events", {"user_id": user, "events": [first, second]}).json()
    assert answer == {"added": 1, "known": 1, "waiting": 0}
    row = server.live.current.ranker.reader.read_user(user)
    assert row.history is not None
    assert row.history["item_id"].to_pylist()[-2:] == [items[1], items[2]]
    assert row.tokens is not None
    assert row.tokens.num_events == row.columns["history_end"]


def test_a_user_without_tokens_whose_past_is_longer_than_is_kept_is_counted(
    server: Server, user: int, road: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """Only the job can make them: no log line for each event."""
    ranker = ranker_of(server)
    records = user_records(road.store, ranker.contract, ranker.bundle.tokens)
    seen = records.read(user)
    assert records.swap(seen, {TOKENS: NewRow({"tokens": None, "state": None}, 1)})
    memory = UserMemory(road.store, ranker.contract, None)
    memory._refresher = Refresher(
        Summariser(ranker.bundle.model, ranker.bundle.encoder),
        OnlineTokens(road.store, ranker.contract),
        ranker.contract,
    )
    memory._records = records
    record = records.read(user)
    stats = {**record[STATS], "history_end": 9_999}
    longer = replace(record, views={**record.views, STATS: stats})
    packed = unpack(ranker.contract, user, record[HISTORY]["history"])
    history = pa.Table.from_batches([packed])
    assert memory._tokens_after(longer, history, 9_999, stats["history_digest"]) is None
    assert memory.without_tokens == {"no_state": 1}
    assert not caplog.records


def test_damaged_tokens_keep_no_event_out(server: Server, user: int, road: Any) -> None:
    """They are named by answers, and the job makes them anew."""
    assert server.live.current is not None
    ranker = server.live.current.ranker
    online = OnlineTokens(road.store, ranker.contract)
    version = ranker.bundle.tokens or ""
    ((tokens, state),) = online.read(version, [user])
    assert tokens is not None
    broken = tokens[:40] + bytes([tokens[40] ^ 1]) + tokens[41:]
    online.write(version, [user], [broken], [state], int(datetime.now(UTC).timestamp() * 1e6))
    events = [event_of(server, datetime.now(UTC) - timedelta(seconds=3))]
    taken = call(server, "/v1/events", {"user_id": user, "events": events})
    assert (taken.status_code, taken.json()["added"]) == (200, 1)
    assert ranker.reader.read_user(user).problems == (Degraded.TOKENS_UNREADABLE,)


def test_a_store_that_stands_still_keeps_nobody_from_ranking(
    server: Server, user: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stands_still(*given: Any) -> None:
        time.sleep(1.0)

    monkeypatch.setattr(UserMemory, "add", stands_still)
    slow = Server(server.live, ServeSettings(deadline_ms=10_000, store_ms=5_000, events_s=0.2))
    body = {"user_id": user, "events": [event_of(server, datetime.now(UTC))]}
    assert server.live.current is not None
    items = server.live.current.ranker.bundle.encoder.items.values.to_pylist()[:3]

    async def run() -> tuple[list[int], int]:
        transport = httpx.ASGITransport(app_of(slow), raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            asked = [client.post("/v1/events", json=body) for _ in range(30)]
            tasks = [asyncio.create_task(one) for one in asked]
            await asyncio.sleep(0.05)
            ranked = await client.post("/v1/rank", json={"user_id": user, "candidates": items})
            return [r.status_code for r in await asyncio.gather(*tasks)], ranked.status_code

    statuses, ranked = asyncio.run(run())
    assert ranked == 200
    assert set(statuses) == {503}
