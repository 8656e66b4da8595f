"""HTTP application: its routes with the scope that each needs, what stands around them, and the start and end
of a process.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import AsyncIterator, Callable
from typing import NamedTuple

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.routing import Route

from serving.api.degraded import Degraded
from serving.api.logs import LIFECYCLE
from serving.api.settings import Scope, ServeSettings
from serving.live.live import Live, Serving
from serving.ranking.ranker import RankService
from serving.routes import event_routes, explain_routes, operation_routes, rank_routes
from serving.routes.auth import Handler, requires
from serving.routes.middleware import EXCEPTION_HANDLERS, Compressed, Observed, RefusesFirst
from serving.routes.server import Server
from serving.stores.guarded import GuardedReader, ThreadedReader

# Seconds left before the process would be killed
LEAVE_S = 1.0
logger = logging.getLogger(__name__)
lifecycle = logging.getLogger(LIFECYCLE)


class Endpoint(NamedTuple):
    """A route; without a scope it is open to all."""

    method: str
    path: str
    handler: Handler
    scope: Scope | None


RANKINGS = (
    Endpoint("POST", "/v1/rank", rank_routes.rank, "rank"),
    Endpoint("POST", "/v1/rank:batch", rank_routes.rank_batch, "rank"),
    Endpoint("POST", "/v1/prepare", rank_routes.prepare, "rank"),
)
ENDPOINTS = (
    *RANKINGS,
    Endpoint("POST", "/v1/events", event_routes.take_events, "events"),
    Endpoint("POST", "/v1/explain", explain_routes.explain, "explain"),
    Endpoint("POST", "/v1/history", explain_routes.history, "explain"),
    Endpoint("GET", "/v1/overview", explain_routes.overview, "explain"),
    Endpoint("GET", "/v1/models", operation_routes.models, "models"),
    Endpoint("GET", "/v1/slow", operation_routes.slow, "metrics"),
    Endpoint("GET", "/metrics", operation_routes.metrics, "metrics"),
    Endpoint("GET", "/readyz", operation_routes.readyz, None),
    Endpoint("GET", "/openapi.json", operation_routes.openapi, "rank"),
    Endpoint("GET", "/livez", operation_routes.livez, None),
    Endpoint("GET", "/", explain_routes.page, None),
)


def app_of(
    server: Server, *, keep_up: bool = False, shadow: Callable[[], Serving] | None = None
) -> Starlette:
    """The application of a server.

    Args:
        shadow: loads the bundle that is asked beside.
        keep_up: whether bundles are loaded and followed, and the store is watched, in the background.
    """

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        settings = server.settings
        tasks = []
        # Behind the start
        if shadow is not None:
            tasks.append(asyncio.create_task(asyncio.to_thread(server.load_shadow, shadow)))
        if keep_up:
            tasks += [
                asyncio.create_task(server.live.follow(settings.follow_s)),
                asyncio.create_task(server.live.watch(settings.watch_s)),
                asyncio.create_task(server.observe_for_ever()),
            ]
        if keep_up and server.stopping is not None:
            tasks.append(asyncio.create_task(_leave_in_time(server)))
        lifecycle.info("process %d answers", os.getpid())
        yield
        lifecycle.info("process %d stops", os.getpid())
        # Tasks end before the pools and stores that they use are closed.
        for task in tasks:
            task.cancel()
        await server.close()

    # Refusing comes before everything else, because a full server must refuse cheaply.
    paths = frozenset(endpoint.path for endpoint in ENDPOINTS)
    rankings = frozenset(endpoint.path for endpoint in RANKINGS)
    server.metrics.prepare(paths, Degraded)
    app = Starlette(
        routes=[_route(endpoint) for endpoint in ENDPOINTS],
        middleware=[
            Middleware(RefusesFirst, server=server, paths=paths, rankings=rankings),
            Middleware(Observed, server=server, paths=paths),
            Middleware(Compressed, smallest=server.settings.compress_bytes),
        ],
        exception_handlers=EXCEPTION_HANDLERS,
        lifespan=lifespan,
    )
    # A redirect would go to an address that the caller's Host names.
    app.router.redirect_slashes = False
    app.state.server = server
    return app


def _route(endpoint: Endpoint) -> Route:
    handler = endpoint.handler
    if endpoint.scope is not None:
        handler = requires(endpoint.scope, handler)
    return Route(endpoint.path, handler, methods=[endpoint.method])


async def _leave_in_time(server: Server) -> None:
    """End this process by itself before the one above it kills it: a connection that a client holds open
    would otherwise cost the rows of the served log that are not written yet.
    """
    assert server.stopping is not None
    settings = server.settings
    while not server.stopping.exists():
        await asyncio.sleep(0.1)
    await asyncio.sleep(max(settings.unready_s + settings.stop_s - LEAVE_S, 0.1))
    logger.warning("connections are still open after %d s: the server ends", settings.stop_s)
    try:
        async with asyncio.timeout(LEAVE_S / 2):
            await server.close()
    finally:
        os._exit(0)


def create_app(ranker: RankService | None, settings: ServeSettings | None = None) -> Starlette:
    """The application around a ranker that never changes; without one it answers that it is not ready."""
    live = Live(load=lambda digest: serving_of(ranker))
    live.not_loaded = "no bundle is loaded"
    if ranker is not None:
        live.current = serving_of(ranker)
    return app_of(Server(live, settings or ServeSettings()))


def serving_of(ranker: RankService | None) -> Serving:
    """A serving state around a ranker."""
    if ranker is None:
        raise LookupError("no bundle is loaded")
    return Serving(ranker, GuardedReader(ThreadedReader(ranker.reader)))
