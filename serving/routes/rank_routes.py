"""`POST /v1/rank`, `POST /v1/rank:batch` and `POST /v1/prepare`."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from starlette.requests import Request
from starlette.responses import Response

from serving.api.degraded import Degraded, reason_named
from serving.api.messages import (
    PrepareResponse,
    RankBatchResponse,
    RankRequest,
    RankResponse,
    decode_batch,
    decode_prepare,
    decode_request,
)
from serving.api.metrics import STAGES
from serving.api.pools import run_in
from serving.live.live import Serving
from serving.ranking.prepare import not_kept
from serving.ranking.prepare import prepare as prepared_by
from serving.ranking.ranker import PIECE, Clock, OutOfTimeError
from serving.ranking.what_if import NO_SCORES, as_asked
from serving.routes.admission import Weight
from serving.routes.auth import check
from serving.routes.bodies import answered_with, media_of, unless_left
from serving.routes.middleware import server_timing
from serving.routes.server import Server, server_of
from serving.served.served_log import Served
from serving.stores.features import UserRow

Result = TypeVar("Result")
# Seconds for which a large request leaves the model to others, between its pieces
YIELD_S = 0.0005


async def rank(request: Request) -> Response:
    """Rank the candidates of one request."""
    server = server_of(request)
    clock = Clock()
    arrived = time.perf_counter()
    serving, body = await server.received(request, server.admission)
    asked = decode_request(body, serving.ranker.contract, media_of(request))
    _check_inspection(request, server, asked)
    serving = server.of_bundle(asked, serving)
    server.refuse_the_future(asked)
    with server.admission.admitted(Weight.of([len(asked.candidates)])):
        deadline = server.deadline(arrived, asked.deadline_ms)
        clock.lap("queue")
        answer = await unless_left(request, _answer(server, serving, asked, clock, deadline))
    if not inspects(asked):
        server.metrics.count(asked, answer)
    timings = {stage: getattr(answer.timings_ms, stage) for stage in STAGES}
    request.state.timings = timings
    return answered_with(request, answer, {"Server-Timing": server_timing(timings)})


async def rank_batch(request: Request) -> Response:
    """Rank several requests one after the other, all within the time of one; they take one place."""
    server = server_of(request)
    arrived = time.perf_counter()
    serving, body = await server.received(request, server.admission)
    batch = decode_batch(body, serving.ranker.contract, media_of(request))
    # Check every request first: a batch is refused as a whole or not at all.
    for asked in batch:
        _check_inspection(request, server, asked)
        server.refuse_the_future(asked)
    chosen = [server.of_bundle(asked, serving) for asked in batch]

    async def each() -> list[RankResponse]:
        return [
            await _answer(server, one, asked, Clock(), server.deadline(arrived, asked.deadline_ms))
            for one, asked in zip(chosen, batch, strict=True)
        ]

    with server.admission.admitted(Weight.of([len(asked.candidates) for asked in batch])):
        answers = await unless_left(request, each())
    for asked, answer in zip(batch, answers, strict=True):
        if not inspects(asked):
            server.metrics.count(asked, answer)
    return answered_with(request, RankBatchResponse(answers))


async def prepare(request: Request) -> Response:
    """Encode a user while the candidates of a ranking are still being retrieved."""
    server = server_of(request)
    arrived = time.perf_counter()
    serving, body = await server.received(request, server.admission)
    asked = decode_prepare(body, serving.ranker.contract, media_of(request))
    _check_inspection(request, server, asked)
    serving = server.of_bundle(asked, serving)
    server.refuse_the_future(asked)
    with server.admission.admitted(Weight.of([0])):
        deadline = server.deadline(arrived, asked.deadline_ms)
        answer = await unless_left(request, _prepared(server, serving, asked, deadline))
    return answered_with(request, answer)


async def _prepared(
    server: Server, serving: Serving, asked: RankRequest, deadline: float
) -> PrepareResponse:
    user = await server.read_user(serving, asked, deadline)
    turn = _Turn(deadline)

    def compute() -> PrepareResponse | None:
        if turn.is_over():
            return None
        began = time.perf_counter()
        answer = prepared_by(serving.ranker, asked, user)
        server.admission.took(time.perf_counter() - began, Weight.of([0]).rankings)
        return answer

    answer = await _in_time(server.pools.model, compute, turn)
    late = [*user.problems, Degraded.DEADLINE]
    return answer or not_kept(serving.ranker, asked, user, late)


def inspects(asked: RankRequest) -> bool:
    """Return whether a request is an inspection: its answer says nothing about live traffic."""
    return asked.simulate is not None or asked.what_if is not None


def _check_inspection(request: Request, server: Server, asked: RankRequest) -> None:
    """Refuse a caller who may rank but not inspect the ranker.

    Raises:
        ForbiddenError: the API key lacks the scope `explain`.
    """
    if asked.bundle is not None or inspects(asked):
        check(request, server.settings, "explain")


async def _answer(
    server: Server, serving: Serving, asked: RankRequest, clock: Clock, deadline: float
) -> RankResponse:
    """Return the best answer that its time allows."""
    ranker = serving.ranker
    # 1. The user, by key.
    user = await server.read_user(serving, asked, deadline)
    clock.lap("user_read")
    if asked.simulate in NO_SCORES:
        return ranker.in_order(asked, [*user.problems, reason_named(asked.simulate)], clock)
    user = as_asked(ranker.contract, user, asked)
    weight = Weight.of([len(asked.candidates)])
    turn = _Turn(deadline)

    # 2. The model, on its thread: nothing is computed for a client that is gone, or too late.
    def compute() -> RankResponse | None:
        clock.lap("model_wait")
        if turn.is_over():
            return None
        began = piece_began = time.perf_counter()

        def go_on(left: int) -> None:
            nonlocal piece_began
            now = time.perf_counter()
            if turn.is_over(left * (now - piece_began)):
                raise OutOfTimeError
            # A lock is not fair: who waits for the model comes first
            time.sleep(YIELD_S)
            piece_began = time.perf_counter()

        try:
            answer = _ranked(server, serving, asked, user, clock, go_on)
        except OutOfTimeError:
            return None
        server.admission.took(time.perf_counter() - began, weight.rankings)
        return answer

    pool = server.pools.large if len(asked.candidates) > PIECE else server.pools.model
    answer = await _in_time(pool, compute, turn)
    # 3. Late: the candidates in the request's order. Else perhaps a second opinion, behind the answer.
    if answer is None:
        late = [*user.problems, Degraded.DEADLINE]
        return ranker.in_order(asked, late, clock)
    if server.shadow is not None and asked.bundle is None and not inspects(asked):
        server.shadow.consider(asked, user, answer)
    return answer


class _Turn:
    """A request's turn on the model's thread: over once its client is gone, or its time is up."""

    def __init__(self, deadline: float) -> None:
        self.deadline = deadline
        self.cancelled = False

    def is_over(self, needed_s: float = 0.0) -> bool:
        """Return whether so many seconds more are none that it has."""
        return self.cancelled or time.perf_counter() + needed_s > self.deadline


async def _in_time(
    pool: ThreadPoolExecutor, compute: Callable[[], Result | None], turn: _Turn
) -> Result | None:
    """Return the result of a computation on a pool's thread; None where its turn is over before."""
    computing = run_in(pool, compute)
    try:
        async with asyncio.timeout(max(turn.deadline - time.perf_counter(), 0)):
            return await asyncio.shield(computing)
    except (TimeoutError, asyncio.CancelledError) as ended:
        turn.cancelled = True
        # If it runs already, its result is dropped
        computing.cancel()
        if isinstance(ended, asyncio.CancelledError):
            raise
        return None


def _ranked(
    server: Server,
    serving: Serving,
    asked: RankRequest,
    user: UserRow,
    clock: Clock,
    go_on: Callable[[int], None],
) -> RankResponse:
    """Rank on the model's thread, and log the answer if its user is in the sample."""
    live = not inspects(asked)
    ranked = serving.ranker.answer(asked, user, clock, keep=live, go_on=go_on)
    answer = ranked.response
    log = server.log_of(serving)
    if live and log is not None and log.samples(asked.user_id):
        answer.request_id = uuid.uuid4().hex
        log.add(Served(asked, answer, ranked.at, ranked.encoded))
    return answer
