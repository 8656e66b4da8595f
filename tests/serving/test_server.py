"""The server: training's scores, readable refusals, honest answers about what is unknown."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from collections.abc import Callable
from dataclasses import fields, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, ClassVar

import httpx
import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from feature_repo import datasets
from feature_repo.contract.arrow import arrow_type
from feature_repo.contract.schema import MAX_ID_BYTES
from feature_repo.errors import SettingsError
from feature_repo.history.history import from_batches
from feature_repo.home.tables import JobFolder
from modeling.inputs.encoder import RequestColumns
from modeling.training.trainer import predict
from modeling.training_set.dataset import Warehouse, point_in_time_join
from serving.api.errors import BadRequestError, BodyTooLargeError, InvalidRequestError
from serving.api.messages import (
    MAX_BODY_BYTES,
    MAX_CANDIDATES,
    RankContext,
    RankRequest,
    decode_request,
)
from serving.api.settings import ServeSettings
from serving.command import open_ranker, serve
from serving.ranking.ranker import RankService
from serving.routes.app import create_app
from serving.routes.bodies import read_body
from serving.routes.page import PAGE
from serving.stores.features import UserRow
from serving.stores.items import ItemTable, Loaded, published_rows
from tests.ranking import ranked

CONTRACT = datasets.load_contract("online_retail")


@pytest.fixture(scope="module")
def ranker(trained_shop: Any) -> RankService:
    return open_ranker(trained_shop.settings, replay=True)


class Client:
    """Calls the app in this process."""

    def __init__(self, app: Any) -> None:
        self.app = app

    def request(self, method: str, path: str, **options: Any) -> httpx.Response:
        async def call() -> httpx.Response:
            transport = httpx.ASGITransport(self.app, raise_app_exceptions=False)
            async with httpx.AsyncClient(
                transport=transport, base_url="http://localhost"
            ) as client:
                return await client.request(method, path, **options)

        return asyncio.run(call())

    def rank(self, body: Any, **options: Any) -> httpx.Response:
        return self.request("POST", "/v1/rank", json=body, **options)


@pytest.fixture(scope="module")
def client(ranker: RankService) -> Client:
    return Client(create_app(ranker))


@pytest.fixture(scope="module")
def world(trained_shop: Any) -> dict[str, Any]:
    index = JobFolder(trained_shop.settings.home, "user_history").read("user_stats")
    stats = JobFolder(trained_shop.settings.home, "item_stats").read("item_stats")
    return {
        "users": sorted(set(index["user_id"].to_pylist())),
        "items": sorted(set(stats["item_id"].to_pylist())),
    }


def test_training_score_equals_server_score(
    trained_shop: Any, ranker: RankService, world: dict[str, Any]
) -> None:
    """The same request: once through the offline store and the log, once through the online store
    and the packed history.
    """
    manifest = JobFolder(trained_shop.settings.home, "user_history").require()
    rng, at = np.random.default_rng(0), datetime.fromisoformat(manifest.as_of) + timedelta(hours=3)
    users = [*rng.choice(world["users"], 20, replace=False).tolist(), 99]
    asked = {
        user: rng.choice(world["items"], int(rng.integers(1, 40)), replace=False).tolist()
        for user in users
    }
    rows = [(user, item) for user, items in asked.items() for item in items]
    entity_rows = pa.table(
        {
            "user_id": pa.array([user for user, _ in rows], pa.int64()),
            "item_id": [item for _, item in rows],
            "event_timestamp": pa.array([at] * len(rows), pa.timestamp("us", "UTC")),
        }
    )
    joined = point_in_time_join(trained_shop.store, ranker.bundle.manifest["service"], entity_rows)
    joined = joined.append_column("label_purchase", pa.array([0] * len(rows), pa.int8()))
    split = Warehouse(trained_shop.settings).assemble(
        joined, pa.array([str(user) for user, _ in rows])
    )
    encoder = ranker.bundle.encoder
    offline = predict(ranker.bundle.model, encoder, encoder.featurise(split.requests))[:, 0]
    expected = dict(zip(rows, 1 / (1 + np.exp(-offline.astype(np.float64))), strict=True))
    for user, items in asked.items():
        answer = ranked(ranker, RankRequest(user, items, context=RankContext(at)))
        assert sorted(answer.item_ids) == sorted(items)
        for item, score in zip(answer.item_ids, answer.scores, strict=True):
            assert score == pytest.approx(expected[user, item], abs=1e-6)
        assert answer.scores == sorted(answer.scores, reverse=True)
        assert answer.degraded == (["unknown_user"] if user == 99 else [])
    assert np.std(list(expected.values())) > 0.01


def test_a_request_in_the_past_sees_nothing_later(
    ranker: RankService, world: dict[str, Any], trained_shop: Any
) -> None:
    """An event at or after the request's time is not in its history, online either."""
    user = world["users"][3]
    history = ranker.reader.read_user(user).history
    cut = history["event_timestamp"][len(history) // 2].as_py()
    row = ranker.reader.read_user(user)
    requests = ranker.requests.prepared(row, world["items"][:3], cut).requests
    times = requests.gather(np.array([0]), 512).times
    assert len(times) == sum(t.as_py() < cut for t in history["event_timestamp"]) < len(history)
    stats = JobFolder(trained_shop.settings.home, "user_history").read("user_stats").to_pylist()
    then = max(
        (row for row in stats if row["user_id"] == user and row["event_timestamp"] <= cut),
        key=lambda row: row["event_timestamp"],
    )
    for name in ("history_end", "first_event_s", "other_events"):
        assert requests.user_columns[name].to_pylist() == [then[name]]
    mean = requests.user_columns["user_mean_unit_price"][0].as_py()
    assert mean == pytest.approx(then["user_mean_unit_price"], rel=1e-5)
    early = history["event_timestamp"][0].as_py()
    nothing = ranker.requests.prepared(row, world["items"][:3], early).requests
    assert nothing.user_columns["history_end"].to_pylist() == [None]
    older = UserRow(
        row.columns | {"history_end": row.columns["history_end"] + 300}, history
    )  # of which 300 are not packed
    unknown = ranker.requests.prepared(older, world["items"][:3], early).requests
    assert unknown.user_columns["history_end"].to_pylist() == [None]
    assert ranked(
        ranker, RankRequest(user, world["items"][:3], context=RankContext(cut))
    ).degraded == ["newer_features"]


def test_an_answer_has_what_it_promises(
    client: Client, world: dict[str, Any], ranker: RankService
) -> None:
    body = {"user_id": world["users"][0], "candidates": world["items"][:30], "k": 5}
    response = client.rank(body)
    assert response.status_code == 200
    answer = response.json()
    assert set(answer) == {
        "item_ids",
        "scores",
        "bundle",
        "tokens",
        "degraded",
        "unknown_items",
        "timings_ms",
    }
    assert len(answer["item_ids"]) == len(answer["scores"]) == 5
    assert set(answer["item_ids"]) <= set(body["candidates"])
    assert all(0 < score < 1 for score in answer["scores"])
    assert answer["bundle"] == ranker.bundle.name
    assert set(answer["timings_ms"]) == {
        "queue",
        "user_read",
        "item_read",
        "features",
        "model_wait",
        "encode_user",
        "score",
        "sort",
    }
    assert "encode_user;dur=" in response.headers["server-timing"]
    assert answer["item_ids"] == client.rank({**body, "k": None}).json()["item_ids"][:5]


def test_unknown_users_and_items_are_served_and_named(
    client: Client, world: dict[str, Any]
) -> None:
    answer = client.rank(
        {"user_id": 424242, "candidates": [world["items"][0], "NOPE", world["items"][1], "NADA"]}
    ).json()
    assert len(answer["item_ids"]) == 4
    assert answer["degraded"] == ["unknown_user", "unknown_items"]
    assert answer["unknown_items"] == ["NOPE", "NADA"]
    assert all(np.isfinite(answer["scores"]))


def test_order_laws_at_the_door(client: Client, world: dict[str, Any]) -> None:
    """Permuted candidates give permuted scores; another candidate changes no score; equal ones keep
    their order.
    """
    user, items = world["users"][1], world["items"][:40]

    def scores(candidates: list[str]) -> dict[str, float]:
        answer = client.rank({"user_id": user, "candidates": candidates}).json()
        return dict(zip(answer["item_ids"], answer["scores"], strict=True))

    base = scores(items)
    for other in (scores(items[::-1]), scores(items[:20]), scores([*items, "NEW"])):
        for item in set(other) & set(base):
            assert other[item] == pytest.approx(base[item], abs=1e-6)
    unknown = client.rank({"user_id": user, "candidates": ["U3", "U1", "U2"]}).json()
    assert unknown["item_ids"] == ["U3", "U1", "U2"]
    assert (
        client.rank({"user_id": user, "candidates": [items[0], items[0]]}).json()["item_ids"]
        == [items[0]] * 2
    )


GOOD = {"user_id": 13000, "candidates": ["20000A"]}


@pytest.mark.parametrize(
    ("body", "status", "says"),
    [
        ({**GOOD, "colour": "red"}, 422, "colour"),
        ({"candidates": ["20000A"]}, 422, "user_id"),
        ({**GOOD, "user_id": "13000"}, 422, "must be an integer"),
        ({**GOOD, "user_id": 1.5}, 422, "user_id"),
        ({**GOOD, "user_id": True}, 422, "user_id"),
        ({**GOOD, "user_id": None}, 422, "user_id"),
        ({**GOOD, "user_id": 2**63}, 422, "64 bits"),
        ({**GOOD, "candidates": []}, 422, "candidates"),
        ({**GOOD, "candidates": "20000A"}, 422, "candidates"),
        ({**GOOD, "candidates": [5]}, 422, r"candidates[0] must be a string"),
        ({**GOOD, "candidates": [""]}, 422, "candidates"),
        ({**GOOD, "candidates": ["x" * (MAX_ID_BYTES + 1)]}, 422, "candidates"),
        ({**GOOD, "candidates": ["20000A"] * (MAX_CANDIDATES + 1)}, 422, "candidates"),
        ({**GOOD, "k": 0}, 422, "k"),
        ({**GOOD, "k": 2.5}, 422, "k"),
        ({**GOOD, "context": {"weather": "rain"}}, 422, "weather"),
        ({**GOOD, "context": {"request_timestamp": "yesterday"}}, 422, "request_timestamp"),
        ({**GOOD, "context": {"request_timestamp": "2011-12-09T10:00:00"}}, 422, "time zone"),
        ({**GOOD, "context": {"request_timestamp": "0001-01-01T00:00:00Z"}}, 422, "between"),
        ([], 422, "object"),
        ("text", 422, "object"),
    ],
)
def test_bad_requests_are_refused_with_a_readable_reason(
    client: Client, body: Any, status: int, says: str
) -> None:
    response = client.rank(body)
    assert response.status_code == status, response.text
    assert says in response.json()["message"]
    assert response.json()["error"]


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b'{"user_id": 1,}'])
def test_a_body_that_is_no_json_is_a_400(client: Client, content: bytes) -> None:
    response = client.request(
        "POST", "/v1/rank", content=content, headers={"content-type": "application/json"}
    )
    assert response.status_code == 400
    assert "no JSON" in response.json()["message"]


def test_huge_bodies_are_refused_by_their_declared_length(client: Client) -> None:
    headers = {"content-type": "application/json", "content-length": str(1 << 40)}
    assert client.request("POST", "/v1/rank", content=b"{}", headers=headers).status_code == 413
    response = client.request(
        "POST",
        "/v1/rank",
        content=b" " * (MAX_BODY_BYTES + 1),
        headers={"content-type": "application/json"},
    )
    assert response.status_code == 413
    assert "bytes at most" in response.json()["message"]


def test_an_endless_body_is_read_no_further_than_the_limit() -> None:
    class Endless:
        headers: ClassVar[dict[str, str]] = {"content-type": "application/json"}
        read = 0

        async def stream(self) -> Any:
            while True:
                self.read += 1000
                yield b" " * 1000

    endless = Endless()
    with pytest.raises(BodyTooLargeError):
        asyncio.run(read_body(endless, 50_000))  # type: ignore[arg-type]
    assert endless.read <= 51_000


def test_deep_nesting_is_refused(client: Client) -> None:
    response = client.request(
        "POST", "/v1/rank", content=b"[" * 100_000, headers={"content-type": "application/json"}
    )
    assert response.status_code in (400, 422)


def test_other_media_and_methods_are_refused(client: Client) -> None:
    assert (
        client.request(
            "POST", "/v1/rank", content=b"<x/>", headers={"content-type": "text/xml"}
        ).status_code
        == 415
    )
    compressed = client.request(
        "POST",
        "/v1/rank",
        content=b"x",
        headers={"content-type": "application/json", "content-encoding": "gzip"},
    )
    assert compressed.status_code == 415
    assert client.request("GET", "/v1/rank").status_code == 405
    assert client.request("GET", "/nowhere").status_code == 404


def test_health_readiness_metrics_and_openapi(client: Client, ranker: RankService) -> None:
    assert client.request("GET", "/livez").json() == {"status": "ok"}
    assert client.request("GET", "/readyz").json() == {
        "status": "ready",
        "bundle": ranker.bundle.name,
        "items": len(ranker.items),
        "warnings": [],
    }
    client.rank({"user_id": 5, "candidates": ["NOPE"]})
    metrics = client.request("GET", "/metrics").text
    for line in (
        'memoir_requests_total{route="/v1/rank",status="200"}',
        'memoir_degraded_total{reason="unknown_user"}',
        "memoir_stage_seconds_bucket",
        ranker.bundle.name,
    ):
        assert line in metrics
    document = client.request("GET", "/openapi.json").json()
    assert set(document["paths"]) == {
        "/v1/rank",
        "/v1/rank:batch",
        "/v1/prepare",
        "/v1/explain",
        "/v1/events",
        "/livez",
        "/readyz",
        "/metrics",
        "/v1/models",
        "/v1/slow",
        "/v1/overview",
        "/v1/history",
    }
    assert document["components"]["schemas"]["RankRequest"]["additionalProperties"] is False
    assert (
        document["components"]["schemas"]["RankRequest"]["properties"]["candidates"]["maxItems"]
        == MAX_CANDIDATES
    )


def test_without_a_bundle_the_server_lives_but_is_not_ready() -> None:
    client = Client(create_app(None))
    assert client.request("GET", "/livez").status_code == 200
    for response in (client.request("GET", "/readyz"), client.rank(GOOD)):
        assert response.status_code == 503
        assert response.headers["retry-after"] == "1"


class BrokenReader:
    """A store that fails, or holds damaged values."""

    def __init__(self, reader: Any, damage: str) -> None:
        self.reader, self.damage = reader, damage

    def read_user(self, user_id: Any) -> UserRow:
        if self.damage == "down":
            raise ConnectionError("store is down")
        return self.reader.read_user(user_id)

    def read_items(self, item_ids: Any) -> Any:
        raise ConnectionError("store is down")


def test_a_store_that_fails_costs_the_user_not_the_answer(
    ranker: RankService, world: dict[str, Any]
) -> None:
    reader = BrokenReader(ranker.reader, "down")
    first = world["items"][:5]
    items = ItemTable(
        ranker.bundle.encoder, reader.read_items, lambda: Loaded(ranker.reader.read_items(first))
    )
    broken = RankService(ranker.bundle, reader, items, ranker.replay_from)
    client = Client(create_app(broken))
    candidates = [*world["items"][:5], "UNSEEN"]
    answer = client.rank({"user_id": world["users"][0], "candidates": candidates}).json()
    assert answer["degraded"] == ["store_unavailable", "unknown_items"]
    assert answer["unknown_items"] == ["UNSEEN"]
    assert len(answer["item_ids"]) == 6
    assert client.rank({"user_id": 1, "candidates": ["ALSO UNSEEN"]}).status_code == 200


def test_a_damaged_history_is_noticed_and_named(
    ranker: RankService, trained_shop: Any, world: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    reader, original = ranker.reader, ranker.reader._read

    def damaged(features: Any, rows: Any) -> Any:
        values = original(features, rows)
        values["history"] = [values["history"][0][:-3] + b"xyz"]
        return values

    monkeypatch.setattr(reader, "_read", damaged)
    answer = ranked(ranker, RankRequest(world["users"][0], world["items"][:5]))
    assert answer.degraded == ["history_unreadable"]


def wait_for(true: Callable[[], bool], seconds: float = 5.0) -> None:
    """Wait until something holds."""
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.01)


def test_item_features_are_refreshed_from_the_store(ranker: RankService) -> None:
    class Counting:
        def __init__(self) -> None:
            self.value = 1

        def read_user(self, user_id: Any) -> UserRow:
            raise AssertionError("users are not read here")

        def read_items(self, item_ids: Any) -> pa.Table:
            known = [i != "gone" for i in item_ids]
            columns: dict[str, Any] = {
                "item_id": pa.array(list(item_ids), pa.string()),
                "description": pa.array([f"v{self.value}" if k else None for k in known]),
                "description_tokens": pa.array(
                    [["v"] if k else None for k in known], pa.list_(pa.string())
                ),
            }
            for column in CONTRACT.item_columns:
                if column.name not in columns:
                    values = [self.value if k else None for k in known]
                    columns[column.name] = pa.array(values, arrow_type(column.dtype))
            return pa.table(columns)

    reader = Counting()
    table = ItemTable(
        ranker.bundle.encoder,
        reader.read_items,
        lambda: Loaded(reader.read_items(["a", "b"])),
        refresh_s=0.05,
    )

    def counts(*items: str) -> list[float]:
        return table.take(items).numbers.stats[:, 0].tolist()

    assert table.take(["b", "gone", "a"]).unknown == ["gone"]
    table.take(["c"])
    wait_for(lambda: not table.take(["c"]).unknown)
    assert counts("c") == [1]
    reader.value = 2
    wait_for(lambda: counts("a", "c") == [2, 2])
    taken = table.take(["b", "gone", "c", "gone"])
    table.close()
    assert taken.unknown == ["gone"]
    np.testing.assert_array_equal(taken.numbers.stats[:, 0], [2, np.nan, 2, np.nan])
    np.testing.assert_array_equal(taken.numbers.known, [True, False, True, False])


@pytest.mark.parametrize("asked", ["all known", "one unknown", "one looked up"])
def test_numbers_of_the_table_are_those_that_training_makes(
    ranker: RankService, world: dict[str, Any], asked: str
) -> None:
    """Parity with the plain twin: columns of a request, encoded as training encodes them."""
    user, at = ranker.reader.read_user(world["users"][2]), datetime(2011, 12, 20, tzinfo=UTC)
    candidates = world["items"][:20] + (["NEVER SEEN"] if asked == "one unknown" else [])
    table, encoder = ranker.items, ranker.bundle.encoder
    if asked == "one looked up":
        kept = [item for item in world["items"] if item != candidates[3]]
        table = ItemTable(
            encoder, ranker.reader.read_items, lambda: Loaded(ranker.reader.read_items(kept))
        )
        table.take(candidates)
        wait_for(lambda: not table.take(candidates).unknown)
    fast = ranker.requests.encoded(user, candidates, at, table.take(candidates))
    columns = ranker.reader.read_items(candidates)
    prepared = ranker.requests.prepared(user, candidates, at)
    assert user.history is not None
    ids = pa.array(candidates, pa.string())
    histories, keys = from_batches(CONTRACT, [user.history], ids)
    every = pa.concat_arrays([user.history["item_id"], ids])
    all_keys = np.concatenate([histories.item_keys, keys])
    first = np.unique(all_keys, return_index=True)[1]
    given = {f.name: getattr(prepared.requests, f.name) for f in fields(prepared.requests)} | {
        "candidate_keys": keys,
        "gather": lambda chosen, length: histories.newest(length),
    }
    plain = encoder.featurise(
        RequestColumns(
            **given,
            items=every.take(pa.array(first)),
            candidate_columns={
                name: columns[name].combine_chunks() for name in columns.column_names
            },
            read_shares=table.known.shares,
        )
    )
    for name in ("field_BU", "dense_BG", "candidate_item", "candidate_category", "candidate_dense"):
        np.testing.assert_array_equal(getattr(fast, name), getattr(plain, name), err_msg=name)
    for one, other in zip(
        (encoder.collate(fast, np.array([0])).user,),
        (encoder.collate(plain, np.array([0])).user,),
        strict=True,
    ):
        for f in fields(one):
            mine, theirs = getattr(one, f.name), getattr(other, f.name)
            assert (mine is None) == (theirs is None)
            if mine is not None:
                torch.testing.assert_close(mine, theirs, equal_nan=True, rtol=0, atol=0)


def test_items_are_loaded_from_the_tables_as_the_store_has_them(
    trained_shop: Any, ranker: RankService
) -> None:
    """The columnar road and the store agree, value for value."""
    loaded = published_rows(trained_shop.settings, CONTRACT)
    assert loaded is not None
    rows = loaded.rows
    stored = ranker.reader.read_items(rows["item_id"].to_pylist())
    assert rows.num_rows > 100
    assert rows.select(stored.column_names).to_pylist() == stored.to_pylist()


def test_a_made_up_item_costs_one_read_and_a_lost_store_loses_no_features(
    ranker: RankService, world: dict[str, Any]
) -> None:
    reads: list[list[Any]] = []

    class Recording:
        lost = False

        def read_user(self, user_id: Any) -> UserRow:
            return ranker.reader.read_user(user_id)

        def read_items(self, item_ids: Any) -> pa.Table:
            reads.append(list(item_ids))
            return ranker.reader.read_items([f"x{i}" for i in item_ids] if self.lost else item_ids)

    reader = Recording()
    known = world["items"][:3]
    table = ItemTable(
        ranker.bundle.encoder, reader.read_items, lambda: Loaded(reader.read_items(known))
    )
    assert table.take([known[0], "MADE UP"]).unknown == ["MADE UP"]
    wait_for(lambda: "MADE UP" in table._absent)
    for _ in range(3):
        assert table.take([known[0], "MADE UP"]).unknown == ["MADE UP"]
    assert reads == [known, ["MADE UP"]]
    reader.lost = True
    with pytest.raises(LookupError, match="no item has any features"):
        table.refresh()
    assert table.take(known).unknown == []


JSON = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(),
        st.floats(allow_nan=False, allow_infinity=False),
        st.text(max_size=8),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(
            st.sampled_from(["user_id", "candidates", "k", "context", "request_timestamp", "x"]),
            inner,
            max_size=5,
        ),
    ),
    max_leaves=12,
)


BODIES = st.one_of(
    JSON,
    st.fixed_dictionaries(
        {"user_id": st.integers(), "candidates": st.lists(st.text(max_size=5), max_size=4)},
        optional={"k": st.integers(-2, 5)},
    ),
)


def check_body(body: Any) -> None:
    """Oracle in plain Python; whatever comes, only a declared error leaves the decoder."""

    def allowed() -> bool:
        if not isinstance(body, dict) or not set(body) <= {"user_id", "candidates", "k", "context"}:
            return False
        user, some, k, context = (body.get(n) for n in ("user_id", "candidates", "k", "context"))
        if (
            type(user) is not int
            or not -(2**63) <= user < 2**63
            or not isinstance(some, list)
            or not some
        ):
            return False
        if not all(isinstance(c, str) and c and len(c) <= MAX_ID_BYTES for c in some):
            return False
        if k is not None and (type(k) is not int or k < 1):
            return False
        return context is None or (
            isinstance(context, dict)
            and set(context) <= {"request_timestamp"}
            and context.get("request_timestamp") is None
        )

    try:
        accepted = (
            decode_request(json.dumps(body).encode(), CONTRACT).candidates == body["candidates"]
        )
    except InvalidRequestError:
        accepted = False
    assert accepted == allowed()


def check_bytes(data: bytes) -> None:
    """A request, or a declared error."""
    try:
        outcome: object = decode_request(data, CONTRACT)
    except Exception as error:
        outcome = error
    assert isinstance(outcome, (RankRequest, BadRequestError, InvalidRequestError)), repr(outcome)


def many(check: Any, drawn: Any, examples: int) -> None:
    """Check so many of what is drawn."""
    settings(max_examples=examples, deadline=None)(given(drawn)(check))()


def test_the_decoder_accepts_exactly_what_the_contract_allows() -> None:
    many(check_body, BODIES, 400)


def test_any_bytes_give_a_declared_error_or_a_request() -> None:
    many(check_bytes, st.binary(max_size=200), 300)


@pytest.mark.whole
def test_both_on_five_thousand(promises: Any) -> None:
    many(check_body, BODIES, 5_000)
    many(check_bytes, st.binary(max_size=200), 5_000)
    promises.note(
        "bodies and bytes drawn by hypothesis, against an oracle",
        "accepted exactly where the contract allows it",
        "2 × 5,000, all as the oracle says",
        held=True,
    )


@pytest.fixture
def damaged_home(trained_shop: Any, tmp_path: Path) -> Any:
    import shutil

    home = tmp_path / "online_retail"
    shutil.copytree(trained_shop.settings.home, home)
    return replace(
        trained_shop.settings, home=str(home), catalogue_url=f"sqlite:///{home}/catalogue.db"
    )


def test_a_bundle_that_does_not_fit_is_refused_at_start(damaged_home: Any) -> None:
    from feature_repo.home.catalogue import Catalogue
    from modeling.bundle.bundle import BundleError

    path = damaged_home.path(
        Catalogue(damaged_home.catalogue_url).live_bundle("online_retail").path
    )
    manifest = path / "bundle.json"
    original = manifest.read_text()
    try:
        manifest.write_text(original.replace('"layout": ', '"layout": 9'))
        with pytest.raises(BundleError, match="changed after export"):
            open_ranker(damaged_home)
        manifest.write_text(original.replace(CONTRACT.fingerprint, "0" * 16))
        with pytest.raises(BundleError, match="says that it is 0000"):
            open_ranker(damaged_home, str(path))
    finally:
        manifest.write_text(original)


def test_the_second_dataset_ranks_on_the_same_road(film_club: Any, helpers: Any) -> None:
    helpers.train_road(film_club)
    films = open_ranker(film_club.settings, replay=True)
    client = Client(create_app(films))
    answer = client.rank({"user_id": 3, "candidates": list(range(1, 41)), "k": 3})
    assert answer.status_code == 200, answer.text
    assert answer.json()["degraded"] == []
    assert client.rank({"user_id": 3, "candidates": ["1"]}).status_code == 422


@pytest.mark.parametrize(
    "item",
    [
        "x\u00a0y",
        "青\u3000茶",
        "\U0001f469\u200d\U0001f52c",
        "\u202eabc",
        "p/" * 70,
        " 7",
        "07",
        "x\x00y",
    ],
)
def test_any_id_that_the_contract_takes_is_let_in(item: str) -> None:
    asked = decode_request(json.dumps({"user_id": 1, "candidates": [item]}).encode(), CONTRACT)
    assert asked.candidates == [item]


def test_a_port_that_is_taken_is_said_in_a_line() -> None:
    from serving.command import PortTakenError, listenable

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(PortTakenError, match="Choose another --port"):
            listenable("127.0.0.1", taken.getsockname()[1])


def test_long_answers_are_compressed_for_who_reads_that(client: Client) -> None:
    def asked(path: str, encoding: str) -> Any:
        return client.request("GET", path, headers={"accept-encoding": encoding})

    for accepted in ("gzip", "br, gzip;q=0.5"):
        page = asked("/", accepted)
        assert page.headers["content-encoding"] == "gzip"
        assert page.headers["vary"] == "Accept-Encoding"
        assert int(page.headers["content-length"]) < len(page.content) / 2
        assert page.content == PAGE.body
    for refused in ("identity", "gzip;q=0", "gzip; q=0.0, br"):
        plain = asked("/", refused)
        assert "content-encoding" not in plain.headers
        assert plain.content == PAGE.body
    assert "content-encoding" not in asked("/livez", "gzip").headers


@pytest.mark.parametrize("name", ["tls_certificate", "tls_key", "tls_client_ca"])
def test_a_file_of_tls_that_is_not_there_ends_the_command(tmp_path: Path, name: str) -> None:
    settings = ServeSettings(port=0).model_copy(update={name: tmp_path / "none.pem"})
    with pytest.raises(SettingsError, match=f"MEMOIR_SERVE_{name.upper()}.* names .*none.pem"):
        serve(settings)


def test_a_bundle_that_is_not_there_ends_the_command(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("MEMOIR_HOME", str(tmp_path))
    with pytest.raises(SettingsError, match="which is no folder of a bundle"):
        serve(ServeSettings(bundle=tmp_path / "none", port=0))
