"""Routes of a person who inspects the ranker: an explanation, a history, an overview, the page.

They do not slow ranking: their places and their threads are separate.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any, TypeVar

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from serving.api.errors import NotReadyError
from serving.api.messages import JSON, RankRequest, decode_explain, decode_history
from serving.api.pools import run_in
from serving.ranking.explain import explain as explained_by
from serving.ranking.explain import history_of
from serving.ranking.what_if import as_asked
from serving.routes.bodies import answered_with, media_of
from serving.routes.page import PAGE
from serving.routes.server import Server, server_of

T = TypeVar("T")


async def explain(request: Request) -> Response:
    """`POST /v1/explain`."""
    server = server_of(request)
    serving, body = await server.received(request, server.explain_admission)
    asked, number = decode_explain(body, serving.ranker.contract, media_of(request))
    serving = server.of_bundle(asked, serving)
    server.refuse_the_future(asked)
    with server.explain_admission.admitted():
        user = await server.read_user(serving, asked, server.deadline(time.perf_counter()))
        user = as_asked(serving.ranker.contract, user, asked)
        # Beside the model's thread, which ranks; event by event it waits its turn there.
        explained = await run_in(
            server.pools.explain, explained_by, serving.ranker, asked, user, number
        )
    return answered_with(request, explained)


async def history(request: Request) -> Response:
    """`POST /v1/history`: what the store holds of a user."""
    server = server_of(request)
    serving, body = await server.received(request, server.explain_admission)
    asked = decode_history(body, serving.ranker.contract, media_of(request))
    with server.explain_admission.admitted():
        deadline = server.deadline(time.perf_counter())
        user = await server.read_user(serving, RankRequest(asked.user_id, []), deadline)
        known = history_of(serving.ranker.contract, user)
        items = list(dict.fromkeys([*(event.item_id for event in known.events), *asked.items]))
        titles = await _in_thread(server, server.overview.titles_of, serving, items)
    return answered_with(request, msgspec.structs.replace(known, titles=titles))


async def overview(request: Request) -> Response:
    """`GET /v1/overview`: some users and items, how fresh the tables are, the last report."""
    server = server_of(request)
    loaded = list(server.loaded())
    found = await _in_thread(server, server.overview.of, server.serving(), loaded)
    return Response(msgspec.json.encode(found), media_type=JSON)


async def page(request: Request) -> Response:
    """`GET /`: the page, which asks for everything else; open to all, for it holds no data."""
    return Response(PAGE.body, media_type="text/html", headers=PAGE.headers)


async def _in_thread(server: Server, read: Callable[..., T], *about: Any) -> T:
    """Read tables and catalogue on their thread.

    Raises:
        OverloadedError: too many wait for it.
        NotReadyError: it takes too long.
    """
    most_s = server.settings.events_s
    with server.look_admission.admitted():
        looking = run_in(server.pools.tables, read, *about)
        try:
            async with asyncio.timeout(most_s):
                return await looking
        except TimeoutError as error:
            raise NotReadyError(
                f"tables and catalogue did not answer within {most_s:g} s"
            ) from error
