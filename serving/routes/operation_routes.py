"""Routes of those who run a server: whether it lives and is ready, metrics, bundles, the OpenAPI document."""

from __future__ import annotations

from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from modeling.layers.memory import keep_freed_memory
from serving.api.errors import NotReadyError
from serving.api.messages import JSON
from serving.api.openapi import openapi_document
from serving.api.slow import SlowResponse
from serving.live.live import Serving
from serving.routes.auth import may
from serving.routes.server import server_of


async def livez(request: Request) -> Response:
    """`GET /livez`: open to all."""
    return Response(b'{"status":"ok"}', media_type=JSON)


async def readyz(request: Request) -> Response:
    """`GET /readyz`."""
    server = server_of(request)
    reason = server.why_not_ready()
    if not may(request, server.settings, "metrics"):
        # A probe has no key: it learns whether requests should come here, and nothing else.
        if reason:
            raise NotReadyError("not ready; an API key with the scope metrics is told why")
        return Response(msgspec.json.encode({"status": "ready"}), media_type=JSON)
    if reason:
        raise NotReadyError(reason)
    serving = server.serving()
    items = len(serving.ranker.items)
    ready = {
        "status": "ready",
        "bundle": serving.name,
        "items": items,
        "warnings": server.live.warnings,
    }
    return Response(msgspec.json.encode(ready), media_type=JSON)


async def metrics(request: Request) -> Response:
    """`GET /metrics`, as Prometheus reads them."""
    server = server_of(request)
    server.observe()
    return Response(server.metrics.text(), media_type="text/plain; version=0.0.4")


async def models(request: Request) -> Response:
    """`GET /v1/models`: what ranks, what ranked before, what was refused and why."""
    server = server_of(request)
    live = server.live
    described = {
        "live": None if live.current is None else _described(live.current),
        "previous": None if live.previous is None else _described(live.previous),
        "refused": live.refused,
        "not_ready": server.why_not_ready(),
        "warnings": live.warnings,
        # Whether freed memory stays with the process, which spares a request a thousand page faults
        "keeps_freed_memory": keep_freed_memory(),
    }
    return Response(msgspec.json.encode(described), media_type=JSON)


async def slow(request: Request) -> Response:
    """`GET /v1/slow`: the slowest requests of the last hour, with their stages, of this process."""
    slowest = SlowResponse(server_of(request).slowest.all())
    return Response(msgspec.json.encode(slowest), media_type=JSON)


async def openapi(request: Request) -> Response:
    """`GET /openapi.json`."""
    current = server_of(request).live.current
    contract = None if current is None else current.ranker.contract
    return Response(msgspec.json.encode(openapi_document(contract)), media_type=JSON)


def _described(serving: Serving) -> dict[str, Any]:
    bundle = serving.ranker.bundle
    return {
        "bundle": bundle.name,
        "digest": bundle.digest,
        "model": bundle.manifest.get("model"),
        "tokens": bundle.tokens,
        "items": len(serving.ranker.items),
        "ms_of_500": serving.ranker.ms_of_500,
        "compiled": {
            "steps": serving.ranker.compiled.steps,
            "why_not": serving.ranker.compiled.why,
        },
        "moved": [
            {
                "column": one.column,
                "distance": round(one.distance, 3),
                "redeclared": one.redeclared,
                "means_otherwise": one.means_otherwise,
            }
            for one in serving.ranker.moved
        ],
    }
