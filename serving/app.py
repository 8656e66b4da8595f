"""The HTTP surface: who may come in, how much is taken on, how long it may take, and what a client
that left still costs.

Order of a ranking request: token → place (`admission.py`) → body → user by key (`guarded.py`) →
everything that computes, on the one model thread → answer. Each wait ends with the request's deadline.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import logging
import os
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Send
from starlette.types import Scope as ASGIScope

from feature_repo.history import HistoryError
from feature_repo.settings import Settings
from modeling.encoder import Encoded
from serving.admission import Admission, Weight
from serving.bodies import answered_with, error_response, media_of, read_body, unless_left
from serving.callers import why_refused
from serving.degraded import Degraded, reason_named
from serving.errors import (
    ForbiddenError,
    InvalidRequestError,
    NotReadyError,
    ServingError,
    StoreAwayError,
    UnauthorizedError,
)
from serving.features import UserRow
from serving.guarded import GuardedReader, ThreadedReader
from serving.live import Live, Serving
from serving.look import Looks
from serving.messages import (
    JSON,
    RankBatchResponse,
    RankRequest,
    RankResponse,
    decode_batch,
    decode_events,
    decode_request,
)
from serving.metrics import STAGES, Metrics
from serving.openapi import openapi_document
from serving.pretended import NO_SCORES, as_asked
from serving.ranker import PIECE, Clock, OutOfTimeError, RankService
from serving.redis_reader import DamagedValueError, StoreReadError
from serving.refresh import WITHOUT_TOKENS
from serving.served_log import Served, ServedLog
from serving.settings import Scope, ServeSettings
from serving.shadow import Shadow
from serving.states import OUTCOMES
from serving.tracing import Tracing

LEAVE_S = 1.0  # before the process would be killed
LEAST_S = 0.002  # with less left, the store is not asked
PATIENCE = 0.7  # of the deadline, spent waiting for the model; the rest is for the answer itself
MARGIN_S = 0.002  # of the deadline, kept for writing the answer
YIELD_S = 0.0005  # that a large request leaves the model to others, between its pieces
logger = logging.getLogger(__name__)
access = logging.getLogger("serving.access")


class Server:
    """What the routes share: settings, the serving state, the model's thread, counters.

    Args:
        stopping: whose existence says that the server is about to stop; default: nothing says it.
        home: where the tables are, and who was erased; default: nowhere, and nobody.
        tracing: makes spans of requests; default: nobody traces.
    """

    def __init__(
        self,
        live: Live,
        settings: ServeSettings,
        stopping: Path | None = None,
        home: Settings | None = None,
        tracing: Tracing | None = None,
    ) -> None:
        self.home, self.tracing = home, tracing
        self.live, self.settings, self.stopping = live, settings, stopping
        self.metrics = Metrics()
        patience_s = PATIENCE * settings.deadline_ms / 1000
        self.admission = Admission(settings.max_in_flight, patience_s=patience_s)
        self.event_admission = Admission(settings.max_events_in_flight)
        # One model thread a process: two share one interpreter and are slower than one.
        self.model = ThreadPoolExecutor(max_workers=1, thread_name_prefix="model")
        self.large = ThreadPoolExecutor(max_workers=1, thread_name_prefix="large")
        self.events = ThreadPoolExecutor(max_workers=1, thread_name_prefix="events")
        self.shadow: Shadow | None = None
        self.beside: Serving | None = None  # the state of the shadow's bundle
        self._logs: dict[str, ServedLog] = {}
        self._closed_logs = [0, 0]  # rows written and dropped by logs that are closed
        self._shown_bundles: set[str] = set()  # of which a gauge tells
        self._encode = msgspec.json.Encoder().encode

    @property
    def logs(self) -> list[ServedLog]:
        """All that were opened."""
        return list(self._logs.values())

    def log_of(self, serving: Serving) -> ServedLog | None:
        """The log of a bundle's answers, whose files name its features; None where nothing is logged."""
        folder, bundle = self.settings.log_folder, serving.ranker.bundle
        if folder is None:
            return None
        if bundle.digest not in self._logs:
            home = None if self.home is None else self.home.home
            made = ServedLog(
                folder / bundle.name, bundle.encoder, self.settings.log_share, home=home
            )
            self._logs[bundle.digest] = made
        return self._logs[bundle.digest]

    async def close_unused_logs(self) -> None:
        """Close logs of bundles that are loaded no longer; what they counted stays counted."""
        states = [*self.loaded().values(), *self.live.retired]
        used = {one.ranker.bundle.digest for one in states}
        for digest in [digest for digest in self._logs if digest not in used]:
            log = self._logs.pop(digest)
            await asyncio.to_thread(log.close)
            self._closed_logs[0] += log.written
            self._closed_logs[1] += log.dropped

    async def close(self) -> None:
        """Write what is to be written, and let go of threads and connections."""
        if self.shadow is not None:
            await asyncio.to_thread(self.shadow.close)
        for log in self.logs:
            await asyncio.to_thread(log.close)
        if self.tracing is not None:
            await asyncio.to_thread(self.tracing.close)
        await self.live.close()
        if self.beside is not None:
            await self.beside.close()
        for thread in (self.model, self.large, self.events):
            thread.shutdown(wait=False, cancel_futures=True)

    def load_shadow(self, load: Callable[[], Serving]) -> None:
        """Ask another bundle beside, from now on; one that cannot be loaded is said and left."""
        try:
            self.beside = load()
        except Exception:
            logger.exception("the shadow bundle could not be loaded")
            return
        self.shadow = Shadow(self.beside.ranker, self.metrics, self.settings.shadow_share)

    def loaded(self) -> dict[str, Serving]:
        """Every bundle that can be asked for, by name, the live one first."""
        every = (self.live.current, self.live.previous, self.beside)
        found: dict[str, Serving] = {}
        for one in every:
            if one is not None:
                found.setdefault(one.name, one)
        return found

    def of_bundle(self, asked: RankRequest, live: Serving) -> Serving:
        """What a request is ranked with.

        Raises:
            InvalidRequestError: the bundle that it names is not loaded.
        """
        if asked.bundle is None:
            return live
        loaded = self.loaded()
        if asked.bundle not in loaded:
            raise InvalidRequestError(
                f"bundle {asked.bundle!r} is not loaded here; these are: {', '.join(loaded)}"
            )
        return loaded[asked.bundle]

    def check_special(self, request: Request, asked: RankRequest) -> None:
        """Refuse a caller who may rank but not look into the ranker.

        Raises:
            ForbiddenError: see there.
        """
        if asked.bundle is not None or special(asked):
            self.check(request, "explain")

    def serving(self) -> Serving:
        """The serving state.

        Raises:
            NotReadyError: there is none yet.
        """
        if self.live.current is None:
            raise NotReadyError(self.live.not_loaded)
        return self.live.current

    def why_not_ready(self) -> str | None:
        """Why no request should come here; None where they may."""
        if self.stopping is not None and self.stopping.exists():
            return "the server is about to stop"
        return self.live.why_not_ready

    def check(self, request: Request, scope: Scope) -> None:
        """Refuse a caller who may not do this; with no token configured, everybody may.

        Raises:
            UnauthorizedError, ForbiddenError: see there.
        """
        if not self.settings.auth:
            return
        kind, _, given = request.headers.get("authorization", "").partition(" ")
        found: tuple[Scope, ...] | None = None
        for token, scopes in self.settings.auth.items():  # all of them, in the same time
            if hmac.compare_digest(token.encode(), given.encode()) and kind.lower() == "bearer":
                found = scopes
        if found is None:
            raise UnauthorizedError(
                "expected `Authorization: Bearer` with a token that is known here"
            )
        if scope not in found:
            raise ForbiddenError(f"this token may do {', '.join(found) or 'nothing'}, not {scope}")

    async def rank(self, request: Request) -> Response:
        """`POST /v1/rank`."""
        clock = Clock()
        arrived = time.perf_counter()
        serving, body = await self.received(request, "rank", self.admission)
        asked = decode_request(body, serving.ranker.contract, media_of(request))
        self.check_special(request, asked)
        serving = self.of_bundle(asked, serving)
        self.refuse_the_future(asked)
        with self.admission.admitted(Weight.of([len(asked.candidates)])):
            deadline = self._deadline(asked, arrived)
            clock.lap("queue")
            answer = await unless_left(request, self._answer(serving, asked, clock, deadline))
        if not special(asked):
            self._count(asked, answer)
        timings = msgspec.structs.asdict(answer.timings_ms)
        header = ", ".join(f"{stage};dur={timings[stage]}" for stage in STAGES)
        return answered_with(request, answer, {"Server-Timing": header})

    async def rank_batch(self, request: Request) -> Response:
        """`POST /v1/rank:batch`: one after the other, all within the time of one; it takes one place."""
        arrived = time.perf_counter()
        serving, body = await self.received(request, "rank", self.admission)
        batch = decode_batch(body, serving.ranker.contract, media_of(request))
        for asked in batch:
            self.check_special(request, asked)
            self.refuse_the_future(asked)
        chosen = [self.of_bundle(asked, serving) for asked in batch]

        async def each() -> list[RankResponse]:
            return [
                await self._answer(one, asked, Clock(), self._deadline(asked, arrived))
                for one, asked in zip(chosen, batch, strict=True)
            ]

        with self.admission.admitted(Weight.of([len(asked.candidates) for asked in batch])):
            answers = await unless_left(request, each())
        for asked, answer in zip(batch, answers, strict=True):
            if not special(asked):
                self._count(asked, answer)
        return answered_with(request, RankBatchResponse(answers))

    async def received(
        self, request: Request, scope: Scope, admission: Admission
    ) -> tuple[Serving, bytes]:
        """The serving state and the body, of a caller who may do this and for whom there is a place.

        Raises:
            ServingError: see `read_body`; or there is no token, no place, no bundle.
        """
        self.check(request, scope)
        admission.refuse_if_full()
        serving, settings = self.serving(), self.settings
        body = await read_body(request, settings.max_body_bytes, settings.body_s, self.admission)
        return serving, body

    def _deadline(self, asked: RankRequest, arrived: float) -> float:
        """By when a request must be answered, as `time.perf_counter` has it."""
        allowed = min(asked.deadline_ms or self.settings.deadline_ms, self.settings.deadline_ms)
        return arrived + allowed / 1000 - MARGIN_S

    async def _answer(
        self, serving: Serving, asked: RankRequest, clock: Clock, deadline: float
    ) -> RankResponse:
        """The best answer that its time allows."""
        ranker = serving.ranker
        user = await self.read_user(serving, asked, deadline)
        clock.lap("user_read")
        if asked.force in NO_SCORES:
            return ranker.in_order(asked, [*user.problems, reason_named(asked.force)], clock)
        user = as_asked(ranker.contract, user, asked)
        cancelled = False
        weight = Weight.of([len(asked.candidates)])

        def compute() -> RankResponse | None:
            clock.lap("model_wait")
            # Whoever asked may be gone, or the time up, by when the thread comes to it.
            if cancelled or time.perf_counter() > deadline:
                return None
            began = piece_began = time.perf_counter()

            def go_on(left: int) -> None:
                nonlocal piece_began
                now = time.perf_counter()
                if cancelled or now + left * (now - piece_began) > deadline:
                    raise OutOfTimeError
                time.sleep(YIELD_S)  # a lock is not fair: who waits for the model comes first
                piece_began = time.perf_counter()

            try:
                answer = self._ranked(serving, asked, user, clock, go_on)
            except OutOfTimeError:
                return None
            self.admission.took(time.perf_counter() - began, weight.rankings)
            return answer

        # A large request comes to the model piece by piece, and small ones between its pieces.
        thread = self.large if len(asked.candidates) > PIECE else self.model
        computing = asyncio.get_running_loop().run_in_executor(thread, compute)
        try:
            async with asyncio.timeout(max(deadline - time.perf_counter(), 0)):
                answer = await asyncio.shield(computing)
        except (TimeoutError, asyncio.CancelledError) as ended:
            cancelled = True
            computing.cancel()  # where it runs already, its end is nobody's any more
            if isinstance(ended, asyncio.CancelledError):
                raise
            answer = None
        plain = asked.bundle is None and not special(asked)
        if answer is not None and self.shadow is not None and plain:
            self.shadow.consider(asked, user, answer)
        if answer is None:
            late = [*user.problems, Degraded.DEADLINE]
            return ranker.in_order(asked, late, clock)
        return answer

    def _ranked(
        self,
        serving: Serving,
        asked: RankRequest,
        user: UserRow,
        clock: Clock,
        go_on: Callable[[int], None],
    ) -> RankResponse:
        """The answer, on the model's thread, logged where its user is among those who are."""
        ranker, log = serving.ranker, self.log_of(serving)
        if log is None or special(asked) or not log.samples(asked.user_id):
            return ranker.answer(asked, user, clock, keep=not special(asked), go_on=go_on)
        numbers: list[tuple[datetime, Encoded]] = []
        answer = ranker.answer(
            asked, user, clock, lambda at, made: numbers.append((at, made)), keep=True, go_on=go_on
        )
        answer.request_id = uuid.uuid4().hex
        log.add(Served(asked, answer, *numbers[0]))
        return answer

    async def read_user(self, serving: Serving, asked: RankRequest, deadline: float) -> UserRow:
        """The user from the store, or nobody and why."""
        full = self.settings.store_ms / 1000
        left = min(full, deadline - time.perf_counter())
        try:
            if left < LEAST_S:
                raise StoreReadError("no time is left to ask the store")
            return await serving.reader.read_user(asked.user_id, left, counts=left >= full)
        except DamagedValueError as error:
            logger.warning("what is stored of a user could not be read: %s", error)
            return serving.ranker.nobody(Degraded.HISTORY_UNREADABLE)
        except StoreReadError as error:
            if not serving.reader.open:
                logger.warning("ranking without a user: %s", error)
            return serving.ranker.nobody(Degraded.STORE_UNAVAILABLE)

    def refuse_the_future(self, asked: RankRequest) -> None:
        """Refuse a request that is said to be made later than the clock can be wrong.

        Raises:
            InvalidRequestError: see there.
        """
        at = asked.context.request_timestamp if asked.context else None
        if at is not None and at > self._latest():
            raise InvalidRequestError(
                f"context.request_timestamp lies in the future: {at.isoformat()}. The server's clock says "
                f"{datetime.now(UTC).isoformat(timespec='seconds')}, and takes {self.settings.max_future_s:g} s more"
            )

    def _count(self, asked: RankRequest, answer: RankResponse) -> None:
        metrics = self.metrics
        for reason in answer.degraded:
            metrics.degraded.labels(reason).inc()
        metrics.unknown_items.inc(len(answer.unknown_items))
        metrics.candidates.inc(len(asked.candidates))
        timings = msgspec.structs.asdict(answer.timings_ms)
        for stage in STAGES:
            metrics.seconds.labels(stage).observe(timings[stage] / 1000)

    async def take_events(self, request: Request) -> Response:
        """`POST /v1/events`: places of its own, so that a slow store keeps nobody from ranking."""
        serving, body = await self.received(request, "events", self.event_admission)
        settings = self.settings
        if serving.events is None:
            raise NotReadyError("this server takes no events: it has no online store of its own")
        user_id, events = decode_events(body, serving.ranker.contract, media_of(request))
        latest = self._latest()
        for event in events:
            if event["event_timestamp"] > latest:
                raise InvalidRequestError(
                    f"an event lies in the future: {event['event_timestamp'].isoformat()}; nothing was added"
                )
        with self.event_admission.admitted():
            taking = asyncio.get_running_loop().run_in_executor(
                self.events, serving.events.take, user_id, events
            )
            try:
                async with asyncio.timeout(settings.events_s):
                    taken = await taking
            except ServingError:
                raise
            except HistoryError as error:
                raise InvalidRequestError(
                    f"what is stored of this user is damaged, and takes no events until the jobs ran: {error}"
                ) from error
            except Exception as error:  # whatever a store's client raises
                logger.warning("events could not be taken: %s: %s", type(error).__name__, error)
                raise StoreAwayError(
                    f"the online store did not take the events within {settings.events_s:g} s "
                    f"({type(error).__name__}); some may be there: send them again, which adds none twice"
                ) from error
        return answered_with(request, taken)

    def _latest(self) -> datetime:
        """How late a time may be."""
        return datetime.now(UTC) + timedelta(seconds=self.settings.max_future_s)

    async def livez(self, request: Request) -> Response:
        """`GET /livez`: open to all."""
        return Response(b'{"status":"ok"}', media_type=JSON)

    async def readyz(self, request: Request) -> Response:
        """`GET /readyz`."""
        self.check(request, "metrics")
        if reason := self.why_not_ready():
            raise NotReadyError(reason)
        serving = self.serving()
        items = len(serving.ranker.items)
        return Response(
            self._encode({"status": "ready", "bundle": serving.name, "items": items}),
            media_type=JSON,
        )

    async def show_metrics(self, request: Request) -> Response:
        """`GET /metrics`."""
        self.check(request, "metrics")
        self.observe()
        kind = "text/plain; version=0.0.4"
        return Response(self.metrics.text(), media_type=kind)

    def observe(self) -> None:
        """Set what is not counted as it happens."""
        metrics, live = self.metrics, self.live
        names = {one.name: one is live.current for one in (live.previous, live.current) if one}
        for name in self._shown_bundles - set(names):
            metrics.forget_bundle(name)
        self._shown_bundles = set(names)
        for name, ranks in names.items():
            metrics.bundle.labels(name).set(ranks)
        metrics.ready.set(self.why_not_ready() is None)
        metrics.under_way.set(self.admission.under_way)
        metrics.swaps.set(live.swaps)
        metrics.refused.set(len(live.refused))
        kept = None if live.current is None else live.current.ranker.states
        for outcome in OUTCOMES:
            metrics.states.labels(outcome).set(0 if kept is None else kept.counts[outcome])
        metrics.state_bytes.set(0 if kept is None else kept.bytes)
        written, dropped = self._closed_logs
        metrics.logged.set(written + sum(log.written for log in self.logs))
        metrics.log_dropped.set(dropped + sum(log.dropped for log in self.logs))
        current = None if live.current is None else live.current.events
        for reason in WITHOUT_TOKENS:
            number = 0 if current is None else current.without_tokens.get(reason, 0)
            metrics.events_without_tokens.labels(reason).set(number)

    async def observe_for_ever(self) -> None:
        """Each process, since a scrape of all meets one of them."""
        while True:
            self.observe()
            for serving in self.loaded().values():
                await asyncio.to_thread(serving.ranker.forget_old_users)
            await self.close_unused_logs()
            await asyncio.sleep(1.0)

    async def models(self, request: Request) -> Response:
        """`GET /v1/models`: what ranks, what ranked before, what was refused and why."""
        self.check(request, "models")
        live = self.live
        described = {
            "live": None if live.current is None else described_bundle(live.current),
            "previous": None if live.previous is None else described_bundle(live.previous),
            "refused": live.refused,
            "not_ready": self.why_not_ready(),
        }
        return Response(self._encode(described), media_type=JSON)

    async def openapi(self, request: Request) -> Response:
        """`GET /openapi.json`."""
        self.check(request, "rank")
        current = self.live.current
        contract = None if current is None else current.ranker.contract
        return Response(self._encode(openapi_document(contract)), media_type=JSON)

    def counted(self, handler: Handler) -> Handler:
        """The handler's answer or its error as a readable body; each of them counted and logged."""

        async def answered(request: Request) -> Response:
            began = time.perf_counter()
            if self.tracing is None:
                response = await self._answered(handler, request)
            else:
                response = await self.tracing.around(
                    request, lambda: self._answered(handler, request)
                )
            if request.method == "POST":
                self.metrics.requests.labels(request.url.path, str(response.status_code)).inc()
            if self.settings.access_log:
                line = {
                    "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
                    "method": request.method,
                    "path": request.url.path,
                    "status": response.status_code,
                    "ms": round(1000 * (time.perf_counter() - began), 2),
                    "timings": response.headers.get("server-timing", ""),
                }
                access.info(self._encode(line).decode())
            return response

        return answered

    async def _answered(self, handler: Handler, request: Request) -> Response:
        try:
            return await handler(request)
        except ServingError as error:
            return error_response(error.status, error.kind, str(error))
        except ClientDisconnect:
            self.metrics.left.inc()
            return Response(status_code=499)  # nobody reads it
        except Exception:
            logger.exception("a request could not be answered")
            return error_response(
                500, "internal", "this is a fault of the server; its log says more"
            )


Handler = Callable[[Request], Awaitable[Response]]


def special(asked: RankRequest) -> bool:
    """Whether a request looks into the ranker: its answer says nothing of how things are."""
    return asked.force is not None or asked.pretended is not None


def described_bundle(serving: Serving) -> dict[str, Any]:
    """What is told of a bundle."""
    bundle = serving.ranker.bundle
    return {
        "bundle": bundle.name,
        "digest": bundle.digest,
        "model": bundle.manifest.get("model"),
        "tokens": bundle.tokens,
        "items": len(serving.ranker.items),
        "ms_of_500": serving.ranker.ms_of_500,
    }


def create_app(ranker: RankService | None, settings: ServeSettings | None = None) -> RefusesFirst:
    """The app around a ranker that never changes; without one it answers that it is not ready."""
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


def app_of(
    server: Server, *, keep_up: bool = False, shadow: Callable[[], Serving] | None = None
) -> RefusesFirst:
    """The routes of a server.

    Args:
        shadow: loads the bundle that is asked beside.
        keep_up: whether bundles are loaded and followed, and the store is watched, in the background.
    """

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        settings, tasks = server.settings, []
        if shadow is not None:  # behind the start
            tasks.append(asyncio.create_task(asyncio.to_thread(server.load_shadow, shadow)))
        if keep_up:
            tasks += [
                asyncio.create_task(server.live.follow(settings.follow_s)),
                asyncio.create_task(server.live.watch(settings.watch_s)),
                asyncio.create_task(server.observe_for_ever()),
            ]
        if keep_up and server.stopping is not None:
            tasks.append(asyncio.create_task(leave_in_time(server)))
        yield
        for task in tasks:
            task.cancel()
        await server.close()

    async def refused(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        kind = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "refused")
        response = error_response(
            error.status_code, kind, f"{error.detail}: {request.method} {request.url.path}"
        )
        response.headers.update(error.headers or {})
        return response

    looks = Looks(server)
    gets = {
        "/livez": server.livez,
        "/readyz": server.readyz,
        "/": looks.page,
        "/v1/overview": looks.overview,
        "/metrics": server.show_metrics,
        "/v1/models": server.models,
        "/openapi.json": server.openapi,
    }
    routes = [
        Route(path, server.counted(handler), methods=["GET"]) for path, handler in gets.items()
    ]
    posts = {
        "/v1/rank": server.rank,
        "/v1/rank:batch": server.rank_batch,
        "/v1/explain": looks.explain,
        "/v1/history": looks.history,
        "/v1/events": server.take_events,
    }
    routes += [
        Route(path, server.counted(handler), methods=["POST"]) for path, handler in posts.items()
    ]
    app = Starlette(routes=routes, lifespan=lifespan, exception_handlers={HTTPException: refused})
    app.router.redirect_slashes = False  # to an address that the caller's Host would name
    return RefusesFirst(app, server, frozenset({"/v1/rank", "/v1/rank:batch"}))


async def leave_in_time(server: Server) -> None:
    """End this process by itself before the one above it kills it: a connection that somebody holds open
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


class RefusesFirst:
    """The app, before which foreign callers and, by a full server, rankings are refused: with a tenth of
    what the way through the routes costs, so that refusing three times the load leaves time to answer
    what was taken on.

    Args:
        paths: of rankings.
    """

    def __init__(self, app: Starlette, server: Server, paths: frozenset[str]) -> None:
        self._app, self._server, self._paths = app, server, paths
        self._known = {route.path for route in app.routes if isinstance(route, Route)}

    async def __call__(self, scope: ASGIScope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        error = why_refused(scope, self._server.settings)
        if error is None and self._server.admission.full and scope["path"] in self._paths:
            error = self._server.admission.error()
        if error is not None:
            response = error_response(error.status, error.kind, str(error))
            path = scope["path"] if scope["path"] in self._known else "other"
            self._server.metrics.requests.labels(path, str(error.status)).inc()
            await response(scope, receive, send)
            return
        await self._app(scope, receive, send)
