"""Routes for a person who looks into the ranker: an explanation, a history, an overview, the page.

What they cost keeps nobody from ranking: their places and their threads are their own.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from serving.admission import Admission
from serving.bodies import answered_with, media_of
from serving.errors import NotReadyError
from serving.messages import JSON, RankRequest, decode_explain, decode_history
from serving.overview import Overview
from serving.page import PAGE
from serving.pretended import as_asked

if TYPE_CHECKING:
    from serving.app import Server

# Requests at a time. Explanations are few, since each ranks as often as it names events, and as there
# are stored tokens.
MOST_EXPLAINED, MOST_LOOKING = 2, 8
T = TypeVar("T")


class Looks:
    """The routes of a server; who may call them has the scope `explain`."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._explain_admission = Admission(MOST_EXPLAINED)
        self._explaining = ThreadPoolExecutor(max_workers=1, thread_name_prefix="explain")
        self._overview = Overview(server.home)
        # Tables and catalogue may be slow, and keep nobody from an explanation.
        self._look_admission = Admission(MOST_LOOKING)
        self._looking = ThreadPoolExecutor(max_workers=1, thread_name_prefix="looking")

    async def explain(self, request: Request) -> Response:
        """`POST /v1/explain`."""
        server = self._server
        serving, body = await server.received(request, "explain", self._explain_admission)
        asked, number = decode_explain(body, serving.ranker.contract, media_of(request))
        serving = server.of_bundle(asked, serving)
        server.refuse_the_future(asked)
        with self._explain_admission.admitted():
            user = await server.read_user(serving, asked, self._deadline())
            user = as_asked(serving.ranker.contract, user, asked)
            # Beside the model's thread, which ranks; event by event it waits its turn there.
            explained = await asyncio.get_running_loop().run_in_executor(
                self._explaining, serving.ranker.explain, asked, user, number
            )
        return answered_with(request, explained)

    async def history(self, request: Request) -> Response:
        """`POST /v1/history`: what the store holds of a user."""
        server = self._server
        serving, body = await server.received(request, "explain", self._explain_admission)
        asked = decode_history(body, serving.ranker.contract, media_of(request))
        with self._explain_admission.admitted():
            user = await server.read_user(serving, RankRequest(asked.user_id, []), self._deadline())
            known = serving.ranker.known_of(user)
            items = list(dict.fromkeys([*(event.item_id for event in known.events), *asked.items]))
            titles = await self._looked_up(self._overview.titles_of, serving, items)
        return answered_with(request, msgspec.structs.replace(known, titles=titles))

    async def overview(self, request: Request) -> Response:
        """`GET /v1/overview`: what there is to look at."""
        server = self._server
        server.check(request, "explain")
        loaded = list(server.loaded())
        found = await self._looked_up(self._overview.of, server.serving(), loaded)
        return Response(msgspec.json.encode(found), media_type=JSON)

    async def page(self, request: Request) -> Response:
        """`GET /`: the page, which asks for everything else; open to all, for it says nothing."""
        return Response(PAGE.body, media_type="text/html", headers=PAGE.headers)

    def _deadline(self) -> float:
        """By when the store must have answered, as `time.perf_counter` has it."""
        return time.perf_counter() + self._server.settings.deadline_ms / 1000

    async def _looked_up(self, look: Callable[..., T], *about: Any) -> T:
        """What tables and catalogue say, on a thread of their own.

        Raises:
            OverloadedError: too many wait for it.
            NotReadyError: it takes too long.
        """
        most_s = self._server.settings.events_s
        with self._look_admission.admitted():
            looking = asyncio.get_running_loop().run_in_executor(self._looking, look, *about)
            try:
                async with asyncio.timeout(most_s):
                    return await looking
            except TimeoutError as error:
                raise NotReadyError(
                    f"tables and catalogue did not answer within {most_s:g} s"
                ) from error
