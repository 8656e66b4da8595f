"""Spans: one for each request under the caller's own, with its stages, and no id of anybody."""

from __future__ import annotations

import asyncio
import builtins
import itertools
import json
from typing import Any

import httpx
import pytest
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from feature_repo.errors import SettingsError
from serving.api.metrics import STAGES
from serving.api.settings import ServeSettings
from serving.api.tracing import Tracing, tracing_from_env
from serving.command import open_ranker
from serving.live.live import Live, Serving
from serving.routes.app import app_of
from serving.routes.server import Server
from serving.stores.guarded import GuardedReader, ThreadedReader

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


def test_a_request_is_a_span_with_a_child_for_each_stage(trained_shop: Any) -> None:
    ranker = open_ranker(trained_shop.settings, replay=True)
    live = Live(load=lambda digest: pytest.fail("nothing is loaded here"))
    live.current = Serving(ranker, GuardedReader(ThreadedReader(ranker.reader)))
    exporter = InMemorySpanExporter()
    tracing = Tracing(exporter)
    settings = ServeSettings(deadline_ms=10_000, store_ms=5_000)
    server = Server(live, settings, tracing=tracing)
    items = ranker.bundle.encoder.items.values.to_pylist()[:3]

    async def run() -> list[int]:
        transport = httpx.ASGITransport(app_of(server), raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            body = {"user_id": 987_654_321, "candidates": items}
            traced = {"traceparent": PARENT}
            first = await client.post("/v1/rank", json=body, headers=traced)
            wrong = await client.post("/v1/rank", json={"user_id": 1})
            return [first.status_code, wrong.status_code]

    assert asyncio.run(run()) == [200, 422]
    tracing.close()
    spans = exporter.get_finished_spans()
    first, wrong = (one for one in spans if one.name == "POST /v1/rank")
    assert first.parent is not None
    assert f"{first.parent.trace_id:032x}" == PARENT.split("-")[1]
    assert first.attributes is not None
    assert first.attributes["http.response.status_code"] == 200
    children = [one for one in spans if one.parent and one.parent.span_id == first.context.span_id]
    assert [one.name for one in children] == list(STAGES)
    assert all(one.end_time == other.start_time for one, other in itertools.pairwise(children))
    assert wrong.parent is None
    assert wrong.attributes is not None
    assert wrong.attributes["http.response.status_code"] == 422
    told = json.dumps([json.loads(one.to_json()) for one in spans])
    assert "987654321" not in told
    assert not any(item in told for item in items)


def test_it_is_there_only_where_it_is_configured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OTEL_EXPORTER_OTLP_ENDPOINT", raising=False)
    assert tracing_from_env() is None
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
    made = tracing_from_env()
    assert made is not None
    real = builtins.__import__

    def without(name: str, *rest: Any, **more: Any) -> Any:
        if name.startswith("opentelemetry"):
            raise ImportError(name)
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(SettingsError, match=r"memoir-rec\[tracing\]"):
        tracing_from_env()
