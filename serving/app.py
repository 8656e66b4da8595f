"""The HTTP surface: routes, limits, errors to statuses, metrics. The hot route reads the raw body
itself.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import msgspec
from fastapi import FastAPI, Request, Response
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from feature_repo.contract import Contract
from serving.errors import BodyTooLargeError, NotReadyError, ServingError, UnsupportedMediaError
from serving.messages import MAX_BODY_BYTES, ErrorBody, decode_request, schemas
from serving.ranker import RankService

JSON = "application/json"
STAGES = ("queue", "user_read", "item_read", "encode_user", "score", "sort")


class Metrics:
    """Counters and histograms of one app; labels never carry ids."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "memoir_requests", "ranking requests by status", ["status"], registry=self.registry
        )
        self.degraded = Counter(
            "memoir_degraded",
            "answers by what they had to do without",
            ["reason"],
            registry=self.registry,
        )
        self.unknown_items = Counter(
            "memoir_unknown_items",
            "candidates that the store does not know",
            registry=self.registry,
        )
        self.candidates = Counter("memoir_candidates", "candidates scored", registry=self.registry)
        buckets = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5)
        self.seconds = Histogram(
            "memoir_stage_seconds",
            "time by stage",
            ["stage"],
            buckets=buckets,
            registry=self.registry,
        )
        self.bundle = Gauge(
            "memoir_bundle_info", "the bundle in use", ["bundle"], registry=self.registry
        )


def create_app(ranker: RankService | None, *, max_body_bytes: int = MAX_BODY_BYTES) -> FastAPI:
    """The app around a ranker; without one it answers that it is not ready."""
    app = FastAPI(title="Memoir", version="0.1.0", docs_url=None, redoc_url=None, openapi_url=None)
    metrics, executor = Metrics(), ThreadPoolExecutor(max_workers=2, thread_name_prefix="rank")
    encode = msgspec.json.encode
    if ranker:
        metrics.bundle.labels(ranker.bundle.name).set(1)

    def ready() -> RankService:
        if ranker is None:
            raise NotReadyError("no bundle is loaded")
        return ranker

    async def rank(request: Request) -> Response:
        arrived = time.perf_counter()
        active = ready()
        body = await read_body(request, max_body_bytes)
        asked = decode_request(body, active.contract)
        answer = await asyncio.get_running_loop().run_in_executor(
            executor, active.rank, asked, arrived
        )
        for reason in answer.degraded:
            metrics.degraded.labels(reason).inc()
        metrics.unknown_items.inc(len(answer.unknown_items))
        metrics.candidates.inc(len(asked.candidates))
        timings = msgspec.structs.asdict(answer.timings_ms)
        for stage in STAGES:
            metrics.seconds.labels(stage).observe(timings[stage] / 1000)
        header = ", ".join(f"{stage};dur={timings[stage]}" for stage in STAGES)
        return Response(encode(answer), media_type=JSON, headers={"Server-Timing": header})

    @app.post("/v1/rank", include_in_schema=False)
    async def rank_route(request: Request) -> Response:
        response = await answered(rank, request)
        metrics.requests.labels(str(response.status_code)).inc()
        return response

    @app.get("/livez", include_in_schema=False)
    async def livez() -> Response:
        return Response(b'{"status":"ok"}', media_type=JSON)

    @app.get("/readyz", include_in_schema=False)
    async def readyz(request: Request) -> Response:
        async def check(_: Request) -> Response:
            active = ready()
            return Response(
                encode(
                    {"status": "ready", "bundle": active.bundle.name, "items": len(active.items)}
                ),
                media_type=JSON,
            )

        return await answered(check, request)

    @app.get("/metrics", include_in_schema=False)
    async def show_metrics() -> Response:
        return Response(generate_latest(metrics.registry), media_type="text/plain; version=0.0.4")

    @app.get("/openapi.json", include_in_schema=False)
    async def openapi() -> Response:
        contract = None if ranker is None else ranker.contract
        return Response(encode(openapi_document(contract)), media_type=JSON)

    return app


async def answered(handler: Callable[[Request], Any], request: Request) -> Response:
    """The handler's answer, or its error as a readable body."""
    try:
        return await handler(request)
    except ServingError as error:
        headers = {"Retry-After": "1"} if error.status == 503 else None
        body = msgspec.json.encode(ErrorBody(error.kind, str(error)))
        return Response(body, status_code=error.status, media_type=JSON, headers=headers)


async def read_body(request: Request, limit: int) -> bytes:
    """The body, read no further than the limit.

    Raises:
        UnsupportedMediaError: declared as something other than JSON, or compressed.
        BodyTooLargeError: longer than the limit.
    """
    declared = request.headers.get("content-type", JSON).split(";")[0].strip().lower()
    if declared != JSON:
        raise UnsupportedMediaError(f"Content-Type must be {JSON}, not {declared!r}")
    if encoding := request.headers.get("content-encoding"):
        raise UnsupportedMediaError(
            f"Content-Encoding {encoding!r} is not accepted: send plain JSON"
        )
    too_large = BodyTooLargeError(f"the body may have {limit:,} bytes at most")
    length = request.headers.get("content-length", "")
    if length.isdigit() and int(length) > limit:
        raise too_large
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > limit:
            raise too_large
    return bytes(body)


def openapi_document(contract: Contract | None) -> dict[str, Any]:
    """OpenAPI 3.1, derived from the messages and the dataset's context features."""

    def reply(description: str, schema: str) -> dict[str, Any]:
        return {
            "description": description,
            "content": {JSON: {"schema": {"$ref": f"#/components/schemas/{schema}"}}},
        }

    errors = {
        "400": "no JSON",
        "413": "body too large",
        "415": "not JSON",
        "422": "wrong shape, type or size",
        "503": "not ready",
    }
    post = {
        "operationId": "rank",
        "summary": "Rank candidates for a user",
        "requestBody": {
            "required": True,
            "content": {JSON: {"schema": {"$ref": "#/components/schemas/RankRequest"}}},
        },
        "responses": {
            "200": reply("best first", "RankResponse"),
            **{code: reply(text, "ErrorBody") for code, text in errors.items()},
        },
    }
    plain = {
        path: {"get": {"summary": text, "responses": {"200": {"description": "ok"}, **extra}}}
        for path, text, extra in (
            ("/livez", "the process runs", {}),
            ("/readyz", "a bundle is loaded and warm", {"503": reply("not ready", "ErrorBody")}),
            ("/metrics", "Prometheus metrics", {}),
        )
    }
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Memoir",
            "version": "0.1.0",
            "description": "Ranks candidates with a user's whole history in view.",
        },
        "paths": {"/v1/rank": {"post": post}, **plain},
        "components": {"schemas": schemas(contract)},
    }
