"""What watching a request costs: its id, its place in the histograms, its line in a JSON log; beside the same
application without, which is the floor.

One process, no sockets: CPU of calls of the application itself, taken in turns. The log goes to memory.
"""

from __future__ import annotations

import asyncio
import io
from collections.abc import Callable
from contextlib import redirect_stderr
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from feature_repo.benchmarks import interleaved, parser, report
from serving.api.degraded import Degraded
from serving.api.logs import configure
from serving.api.settings import ServeSettings
from serving.live.live import Live
from serving.routes.middleware import Observed, RefusesFirst
from serving.routes.server import Server

PATH = "/v1/rank"
CALLS = 5_000
HEADERS = [(b"host", b"127.0.0.1:8000"), (b"x-request-id", b"0f8fad5bd9cb469fa165708d0f2a1f3c")]


def main() -> None:
    """Run."""
    arguments = parser("serving.benchmarks.observing", __doc__).parse_args()
    # The handler keeps the stream that it finds.
    with redirect_stderr(io.StringIO()):
        configure("json")
    calls = 200 if arguments.quick else CALLS
    apps = {
        "no watching": _answers,
        "id and histograms": _watched(access_log=False),
        "and a line of JSON": _watched(access_log=True),
    }
    times = interleaved({name: _many(app, calls) for name, app in apps.items()}, arguments.repeats)
    floor = times["no watching"]["cpu_s"]
    rows = [
        {
            "what": name,
            "cpu_ms": 1000 * found["cpu_s"] / calls,
            "more_ms": 1000 * (found["cpu_s"] - floor) / calls,
        }
        for name, found in times.items()
    ]
    report("observing", {"calls": calls}, rows, arguments.json)


def _watched(*, access_log: bool) -> ASGIApp:
    """The application within what the server puts around its routes."""

    def nothing(digest: str | None) -> Any:
        raise LookupError("no bundle ranks here")

    server = Server(Live(nothing), ServeSettings(access_log=access_log, log_format="json"))
    paths = frozenset({PATH})
    server.metrics.prepare(paths, Degraded)
    return RefusesFirst(Observed(_answers, server, paths), server, paths, paths)


async def _answers(scope: Scope, receive: Receive, send: Send) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"{}"})


def _many(app: ASGIApp, calls: int) -> Callable[[], None]:
    async def nothing_comes() -> Message:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def nobody_reads(message: Message) -> None:
        return None

    async def call() -> None:
        for _ in range(calls):
            scope = {
                "type": "http",
                "http_version": "1.1",
                "method": "POST",
                "path": PATH,
                "headers": HEADERS,
                "state": {"timings": {"user_read": 0.5, "score": 4.2, "sort": 0.1}},
            }
            await app(scope, nothing_comes, nobody_reads)

    return lambda: asyncio.run(call())


if __name__ == "__main__":
    main()
