"""Spans of requests, where OpenTelemetry is configured: by its own variables, such as
`OTEL_EXPORTER_OTLP_ENDPOINT=http://collector:4318` and `OTEL_SERVICE_NAME`. Without them nothing of it is
imported.

A request is one span under the caller's own (W3C `traceparent`), with a child for each stage of its answer.
Neither carries an id of a user or an item.
"""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING, Any

from starlette.types import Scope

from feature_repo.errors import SettingsError

if TYPE_CHECKING:
    from opentelemetry.sdk.trace.export import SpanExporter

ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")


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
        self._extract = propagate.extract
        self._in_span = trace.set_span_in_context
        self._server = trace.SpanKind.SERVER
        self._failed = trace.Status(trace.StatusCode.ERROR)

    def begin(self, scope: Scope) -> Any:
        """Open the span of a request, under the caller's own."""
        headers = {
            name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]
        }
        span = self._tracer.start_span(
            f"{scope['method']} {scope['path']}",
            self._extract(headers),
            self._server,
            {"http.request.method": scope["method"], "url.path": scope["path"]},
            start_time=time.time_ns(),
        )
        return span

    def trace_id(self, span: Any) -> str:
        """The id of a span's trace, as W3C writes it."""
        return f"{span.get_span_context().trace_id:032x}"

    def end(self, span: Any, status: int, timings: dict[str, float]) -> None:
        """Close the span of a request.

        Args:
            timings: milliseconds of each stage; the stages are children, one after the other.
        """
        span.set_attribute("http.response.status_code", status)
        if status >= 500:
            span.set_status(self._failed)
        parent = self._in_span(span)
        at = span.start_time
        for stage, milliseconds in timings.items():
            ends = at + int(1e6 * milliseconds)
            self._tracer.start_span(stage, parent, start_time=at).end(ends)
            at = ends
        span.end()

    def close(self) -> None:
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
