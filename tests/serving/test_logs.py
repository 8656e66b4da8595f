"""What a log line, an answer's headers and the metrics say of a request."""

from __future__ import annotations

import asyncio
import json
import logging
import re
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import redis.exceptions

from serving.api.logs import ACCESS, JsonFormatter, LogFormat, configure, formatter_of, request_id
from serving.api.metrics import outcome_of
from serving.api.settings import ServeSettings
from serving.command import open_ranker
from serving.ranking.ranker import RankService
from serving.routes.app import create_app
from serving.routes.server import NoTimeError, kind_of
from serving.stores.redis_hashes import StoreReadError


@pytest.fixture(scope="module")
def ranker(trained_shop: Any) -> RankService:
    return open_ranker(trained_shop.settings, replay=True)


@pytest.fixture
def body(ranker: RankService) -> dict[str, Any]:
    return {"user_id": 12345, "candidates": ranker.bundle.encoder.items.values[:3].to_pylist()}


def ask(app: Any, method: str, path: str, **given: Any) -> httpx.Response:
    async def asked() -> httpx.Response:
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            return await client.request(method, path, **given)

    return asyncio.run(asked())


@pytest.fixture
def lines() -> Iterator[list[str]]:
    """Lines of the whole process as JSON."""
    made: list[str] = []

    class Kept(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            made.append(self.format(record))

    handler = Kept()
    handler.setFormatter(formatter_of("json"))
    logging.getLogger().addHandler(handler)
    logging.getLogger(ACCESS).setLevel(logging.INFO)
    yield made
    logging.getLogger().removeHandler(handler)


def test_a_request_keeps_the_id_that_its_caller_gave(
    ranker: RankService, body: dict[str, Any], lines: list[str]
) -> None:
    app = create_app(ranker, ServeSettings(access_log=True))
    answer = ask(app, "POST", "/v1/rank", json=body, headers={"X-Request-Id": "shop-7:a/b"})
    assert answer.headers["x-request-id"] == "shop-7:a/b"
    (line,) = [json.loads(one) for one in lines if ACCESS in one]
    assert line["request_id"] == "shop-7:a/b"
    assert line["path"] == "/v1/rank"
    assert line["status"] == 200
    assert "score;dur=" in line["timings"]
    assert not [one for one in lines if "12345" in one]
    assert request_id.get() == ""


@pytest.mark.parametrize("given", [None, "", "two words", 'quote"', "x" * 129, "ümlaut"])
def test_a_request_without_an_id_that_can_be_logged_gets_one(
    ranker: RankService, body: dict[str, Any], given: str | None
) -> None:
    app = create_app(ranker)
    headers = {} if given is None else {"X-Request-Id": given.encode()}
    answers = [ask(app, "POST", "/v1/rank", json=body, headers=headers) for _ in range(2)]
    ids = {answer.headers["x-request-id"] for answer in answers}
    assert len(ids) == 2
    assert all(re.fullmatch("[0-9a-f]{16}", one) for one in ids)


def test_a_fault_is_logged_with_its_request(
    ranker: RankService,
    body: dict[str, Any],
    lines: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ranker, "answer", lambda *args, **given: 1 / 0)
    answer = ask(create_app(ranker), "POST", "/v1/rank", json=body, headers={"X-Request-Id": "r"})
    assert answer.status_code == 500
    assert answer.headers["x-request-id"] == "r"
    (line,) = [one for one in map(json.loads, lines) if "exception" in one]
    assert line["request_id"] == "r"
    assert "ZeroDivisionError" in line["exception"]
    assert line["level"] == "ERROR"


def test_every_request_is_in_the_histogram(ranker: RankService, body: dict[str, Any]) -> None:
    app = create_app(ranker, ServeSettings(deadline_ms=100))
    began = ask(app, "GET", "/metrics").text
    # 1. All series are there before anything happened.
    for route in ("/v1/rank", "/v1/events"):
        for outcome in ("answered", "rejected", "refused", "failed"):
            series = f'memoir_request_seconds_count{{outcome="{outcome}",route="{route}"}} 0.0'
            assert series in began
    for line in (
        'memoir_degraded_total{reason="older_store"} 0.0',
        'memoir_store_errors_total{kind="timeout"} 0.0',
        'memoir_events_total{outcome="added"} 0.0',
        "memoir_bundle_swaps_total 0.0",
        "process_resident_memory_bytes",
        "process_cpu_seconds_total",
    ):
        assert line in began
    # 2. Around the deadline the buckets are near one another.
    buckets = re.findall(r'seconds_bucket{le="([^"]+)",outcome="answered",route="/v1/rank"}', began)
    assert {"0.08", "0.09", "0.1", "0.11"} <= set(buckets)
    # 3. What is answered, rejected and refused is told apart; a caller from elsewhere is refused before any route.
    ask(app, "POST", "/v1/rank", json=body)
    ask(app, "POST", "/v1/rank", json={"user_id": 1})
    ask(app, "POST", "/v1/rank", json=body, headers={"Host": "elsewhere"})
    refused = ask(create_app(None), "POST", "/v1/rank", json=body)
    assert refused.status_code == 503
    told = ask(app, "GET", "/metrics").text
    assert 'memoir_request_seconds_count{outcome="answered",route="/v1/rank"} 1.0' in told
    assert 'memoir_request_seconds_count{outcome="rejected",route="/v1/rank"} 2.0' in told


@pytest.mark.parametrize(
    ("status", "outcome"),
    [
        (200, "answered"),
        (404, "rejected"),
        (422, "rejected"),
        (499, "rejected"),
        (503, "refused"),
        (500, "failed"),
        (504, "failed"),
        (0, "failed"),
    ],
)
def test_outcomes(status: int, outcome: str) -> None:
    assert outcome_of(status) == outcome


@pytest.mark.parametrize("kind", ["text", "json"])
def test_lines_of_both_formats(kind: LogFormat) -> None:
    record = logging.LogRecord("serving.x", logging.WARNING, "f", 1, "a %s\nline", ("long",), None)
    line = formatter_of(kind).format(record)
    if kind == "json":
        assert json.loads(line) | {"time": ""} == {
            "time": "",
            "level": "WARNING",
            "logger": "serving.x",
            "process": record.process,
            "message": "a long\nline",
        }
        assert "\n" not in line
    else:
        assert re.fullmatch(
            r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ WARNING serving.x: a long\nline", line
        )


def test_configured_once_for_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    root = logging.getLogger()
    before = root.handlers[:]
    try:
        configure("json")
        (handler,) = root.handlers
        assert isinstance(handler.formatter, JsonFormatter)
    finally:
        root.handlers[:] = before


@pytest.mark.parametrize(
    ("cause", "kind"),
    [
        (TimeoutError(), "timeout"),
        (redis.exceptions.TimeoutError(), "timeout"),
        (redis.exceptions.BusyLoadingError(), "connection"),
        (ConnectionResetError(), "connection"),
        (redis.exceptions.NoPermissionError(), "refused"),
        (redis.exceptions.ReadOnlyError(), "refused"),
        (redis.exceptions.AuthenticationError(), "refused"),
        (ValueError(), "other"),
        (None, "other"),
    ],
)
def test_kinds_of_store_errors(cause: Exception | None, kind: str) -> None:
    error = StoreReadError("away")
    error.__cause__ = cause
    assert kind_of(error) == kind
    assert kind_of(NoTimeError("late")) == "no_time"
