"""Spans of requests, where OpenTelemetry is configured: by its own variables, such as
`OTEL_EXPORTER_OTLP_ENDPOINT=http://collector:4318` and `OTEL_SERVICE_NAME`. Without them nothing of it is
imported.

A request is one span under the caller's own (W3C `traceparent`), with a child for each stage of its answer.
Neither carries an id of a user or an item.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

from starlette.requests import Request
from starlette.responses import Response

from feature_repo.errors import SettingsError

if TYPE_CHECKING:
    from opentelemetry.sdk.trace.export import SpanExporter

ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
STAGE = re.compile(r"(\w+);dur=([\d.]+)")


class Tracing:
    """Makes spans and sends them behind the answers.

    Args:
        exporter: where they go; default: over HTTP, as the environment says.
    """

    def __init__(self, exporter: SpanExporter | None = None) -> None:
        from opentelemetry import propagate, trace
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor

        if exporter is None:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

            exporter = OTLPSpanExporter()
        named = {} if "OTEL_SERVICE_NAME" in os.environ else {"service.name": "memoir"}
        self._provider = TracerProvider(resource=Resource.create(named))
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("memoir.serving")
        self._extract, self._in_span = propagate.extract, trace.set_span_in_context
        self._server, self._failed = trace.SpanKind.SERVER, trace.Status(trace.StatusCode.ERROR)

    async def around(self, request: Request, answer: Callable[[], Awaitable[Response]]) -> Response:
        """The answer, in a span."""
        began = time.time_ns()
        span = self._tracer.start_span(
            f"{request.method} {request.url.path}",
            self._extract(dict(request.headers)),
            self._server,
            {"http.request.method": request.method, "url.path": request.url.path},
            start_time=began,
        )
        try:
            response = await answer()
            span.set_attribute("http.response.status_code", response.status_code)
            if response.status_code >= 500:
                span.set_status(self._failed)
            self._stages(span, began, response.headers.get("server-timing", ""))
            return response
        finally:
            span.end()

    def _stages(self, span: Any, began: int, timing: str) -> None:
        """Children one after the other, as stages are."""
        parent, at = self._in_span(span), began
        for name, milliseconds in STAGE.findall(timing):
            ends = at + int(1e6 * float(milliseconds))
            self._tracer.start_span(name, parent, start_time=at).end(ends)
            at = ends

    def close(self) -> None:
        """Send what waits."""
        self._provider.shutdown()


def tracing_from_env() -> Tracing | None:
    """As the environment configures it; None where it does not.

    Raises:
        SettingsError: it does, and the libraries are not installed.
    """
    if not any(os.environ.get(name) for name in ENDPOINTS):
        return None
    try:
        return Tracing()
    except ImportError as error:
        raise SettingsError(
            f"{ENDPOINTS[0]} is set, but OpenTelemetry is not installed: pip install 'memoir-rec[tracing]'"
        ) from error
