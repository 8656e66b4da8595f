"""What happens around every route: foreign callers and, by a full server, rankings are refused; every answer
is counted, logged and traced; errors become readable bodies.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Collection
from datetime import UTC, datetime

import msgspec
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware.gzip import GZipMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving.api.errors import ServingError
from serving.api.logs import ACCESS, HEADER, request_id, request_id_of, trace_id
from serving.routes.bodies import error_response
from serving.routes.callers import why_refused
from serving.routes.server import Server, server_of

logger = logging.getLogger(__name__)
# Asked every few seconds by machines: no spans of theirs
PROBES = ("/livez", "/readyz", "/metrics")
access = logging.getLogger(ACCESS)


class RefusesFirst:
    """Gives each request its id, and refuses before any routing, with a tenth of what the way through the
    routes costs, so that refusing three times the load leaves time to answer what was taken on.

    Args:
        paths: of all routes.
        rankings: those of rankings, for which there must be a place.
    """

    def __init__(
        self, app: ASGIApp, server: Server, paths: Collection[str], rankings: Collection[str]
    ) -> None:
        self._app = app
        self._server = server
        self._paths = paths
        self._rankings = rankings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        named = request_id_of(scope["headers"])
        request_id.set(named)
        id_header = (HEADER, named.encode())

        async def sent(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], id_header]
            await send(message)

        error = why_refused(scope, self._server.settings)
        if error is None and self._server.admission.full and scope["path"] in self._rankings:
            error = self._server.admission.error()
        if error is not None:
            began = time.perf_counter()
            response = error_response(error.status, error.kind, str(error))
            path = scope["path"] if scope["path"] in self._paths else "other"
            await response(scope, receive, sent)
            self._server.metrics.answered(path, error.status, time.perf_counter() - began)
            return
        await self._app(scope, receive, sent)


class Observed:
    """Counts, logs and traces every answer of a known route; an unexpected error is a 500 whose cause the
    log says.

    Args:
        paths: of all routes; no other path is a label of a metric.
    """

    def __init__(self, app: ASGIApp, server: Server, paths: Collection[str]) -> None:
        self._app = app
        self._server = server
        self._paths = paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] not in self._paths:
            await self._app(scope, receive, send)
            return
        server = self._server
        began = time.perf_counter()
        status = 0

        async def sent(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        # Whatever happens inside, the request is counted, logged and traced.
        tracing = None if scope["path"] in PROBES else server.tracing
        span = None if tracing is None else tracing.begin(scope)
        if tracing is not None:
            trace_id.set(tracing.trace_id(span))
        try:
            await self._app(scope, receive, sent)
        except Exception:
            logger.exception("a request could not be answered")
            # Half an answer is out: only the connection's end can say that it is none
            if status:
                raise
            response = error_response(
                500, "internal", "this is a fault of the server; its log says more"
            )
            await response(scope, receive, sent)
        finally:
            timings = scope.get("state", {}).get("timings", {})
            if tracing is not None:
                tracing.end(span, status, timings)
            seconds = time.perf_counter() - began
            server.metrics.answered(scope["path"], status, seconds)
            if scope["path"] not in PROBES:
                server.slowest.add(scope["path"], status, seconds, request_id.get(), timings)
            if server.settings.access_log:
                self._log(scope, status, seconds, timings)

    def _log(self, scope: Scope, status: int, seconds: float, timings: dict[str, float]) -> None:
        """A line of the access log; in a log of text, a JSON object as well."""
        line = {
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "method": scope["method"],
            "path": scope["path"],
            "status": status,
            "ms": round(1000 * seconds, 2),
            "request_id": request_id.get(),
            "timings": server_timing(timings),
        }
        access.info(msgspec.json.encode(line).decode(), extra={"fields": line})


class Compressed:
    """Compresses answers for callers who say that they read gzip (`Accept-Encoding`).

    Args:
        smallest: bytes of an answer, from where on it is worth its time; 0: none is.
    """

    def __init__(self, app: ASGIApp, smallest: int) -> None:
        self._plain = app
        # The first level: the others take three times as long for a tenth fewer bytes.
        self._packs = GZipMiddleware(app, minimum_size=smallest, compresslevel=1)
        self._smallest = smallest

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        asked = Headers(scope=scope).get("accept-encoding", "") if scope["type"] == "http" else ""
        refuses = re.search(r"gzip\s*;\s*q=0(\.0*)?\s*(,|$)", asked) is not None
        app = self._packs if self._smallest and not refuses else self._plain
        await app(scope, receive, send)


def server_timing(timings: dict[str, float]) -> str:
    """Stages and their milliseconds as the header `Server-Timing` has them."""
    return ", ".join(f"{stage};dur={ms}" for stage, ms in timings.items())


async def refused(request: Request, error: Exception) -> Response:
    """The answer to a request that a route refuses."""
    assert isinstance(error, ServingError)
    return error_response(error.status, error.kind, str(error))


async def left(request: Request, error: Exception) -> Response:
    """The answer to a client that left; it is only counted."""
    server_of(request).metrics.left.inc()
    return Response(status_code=499)


async def not_routed(request: Request, error: Exception) -> Response:
    """The answer to a request for which there is no route."""
    assert isinstance(error, HTTPException)
    kind = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "refused")
    response = error_response(
        error.status_code, kind, f"{error.detail}: {request.method} {request.url.path}"
    )
    response.headers.update(error.headers or {})
    return response


EXCEPTION_HANDLERS = {ServingError: refused, ClientDisconnect: left, HTTPException: not_routed}
