"""The state that the routes of a process share: settings, the serving state, admission, pools, counters,
logs.

Order of a ranking request: origin and places (`middleware.py`) → API key (`auth.py`) → body (`bodies.py`) →
user by key (`guarded.py`) → everything that computes, on the one model thread → answer. Each wait ends
with the request's deadline.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

from starlette.requests import Request

from feature_repo.settings import Settings
from modeling.bundle.compiled import STEPS
from serving.api.degraded import Degraded
from serving.api.errors import InvalidRequestError, NotReadyError
from serving.api.messages import RankRequest
from serving.api.metrics import Metrics
from serving.api.pools import Pools
from serving.api.settings import ServeSettings
from serving.api.slow import Slowest
from serving.api.tracing import Tracing
from serving.live import systemd
from serving.live.live import Live, Serving
from serving.ranking.shadow import Shadow
from serving.ranking.states import OUTCOMES
from serving.routes.admission import Admission
from serving.routes.bodies import read_body
from serving.routes.overview import Overview
from serving.served.served_log import ServedLog
from serving.stores.features import UserRow
from serving.stores.redis_hashes import StoreReadError
from serving.stores.redis_reader import DamagedValueError
from serving.stores.refresh import WITHOUT_TOKENS

# With fewer seconds left, the store is not asked
LEAST_S = 0.002
# Share of the deadline spent waiting for the model; the rest is for the answer itself
PATIENCE = 0.7
# Seconds of the deadline kept for writing the answer
MARGIN_S = 0.002
# Requests at a time of people who inspect the ranker. Explanations are few, since each ranks as often as
# it names events, and as there are stored tokens.
MOST_EXPLAINED = 2
MOST_LOOKED_UP = 8
# Kinds of faults of a store, in order, by the classes of their causes
STORE_FAULTS = {
    "timeout": {"TimeoutError"},
    "refused": {"ResponseError", "AuthenticationError"},
    "connection": {"ConnectionError"},
}
logger = logging.getLogger(__name__)


class Server:
    """See the module docstring.

    Args:
        stopping: a file that exists once the server is about to stop; default: no file.
        home: the folder of the tables and of the list of erased users; default: neither is read.
        tracing: makes spans of requests; default: no spans.

    Example:
        >>> server = Server(live, ServeSettings(deadline_ms=100))
        >>> app = app_of(server, keep_up=True)
    """

    def __init__(
        self,
        live: Live,
        settings: ServeSettings,
        stopping: Path | None = None,
        home: Settings | None = None,
        tracing: Tracing | None = None,
    ) -> None:
        self.home = home
        self.tracing = tracing
        self.live = live
        self.settings = settings
        self.stopping = stopping
        self.metrics = Metrics(settings.deadline_ms / 1000)
        self.slowest = Slowest()
        self.overview = Overview(home)
        patience_s = PATIENCE * settings.deadline_ms / 1000
        self.admission = Admission(settings.max_in_flight, patience_s=patience_s)
        self.event_admission = Admission(settings.max_events_in_flight)
        self.explain_admission = Admission(MOST_EXPLAINED)
        self.look_admission = Admission(MOST_LOOKED_UP)
        self.pools = Pools()
        self.shadow: Shadow | None = None
        # The state of the shadow's bundle
        self.beside: Serving | None = None
        self._logs: dict[str, ServedLog] = {}
        # Rows written and dropped by logs that are closed
        self._closed_logs = [0, 0]
        # Bundles of which a gauge tells
        self._shown_bundles: set[str] = set()
        # Columns of which a gauge tells
        self._shown_columns: set[str] = set()

    # --- bundles

    def loaded(self) -> dict[str, Serving]:
        """Every bundle that can be asked for, by name, the live one first."""
        every = (self.live.current, self.live.previous, self.beside)
        found: dict[str, Serving] = {}
        for one in every:
            if one is not None:
                found.setdefault(one.name, one)
        return found

    def serving(self) -> Serving:
        """Return the serving state of the live bundle.

        Raises:
            NotReadyError: no bundle is loaded yet.
        """
        if self.live.current is None:
            raise NotReadyError(self.live.not_loaded)
        return self.live.current

    def of_bundle(self, asked: RankRequest, live: Serving) -> Serving:
        """Return the serving state that ranks a request.

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

    def load_shadow(self, load: Callable[[], Serving]) -> None:
        """Ask a shadow bundle beside, from now on; one that cannot be loaded is logged and left."""
        try:
            self.beside = load()
        except Exception:
            logger.exception("the shadow bundle could not be loaded")
            return
        self.shadow = Shadow(self.beside.ranker, self.metrics, self.settings.shadow_share)

    def why_not_ready(self) -> str | None:
        """Why no request should come here; None where they may."""
        if self.stopping is not None and self.stopping.exists():
            return "the server is about to stop"
        return self.live.why_not_ready

    # --- requests

    async def received(self, request: Request, admission: Admission) -> tuple[Serving, bytes]:
        """Return the serving state and the body of a request for which there is a place.

        Raises:
            ServingError: see `read_body`; or there is no place, no bundle.
        """
        admission.refuse_if_full()
        serving = self.serving()
        settings = self.settings
        body = await read_body(request, settings.max_body_bytes, settings.body_s, self.admission)
        return serving, body

    def deadline(self, arrived: float, allowed_ms: float | None = None) -> float:
        """By when a request must be answered, as `time.perf_counter` has it."""
        most_ms = self.settings.deadline_ms
        return arrived + min(allowed_ms or most_ms, most_ms) / 1000 - MARGIN_S

    def latest(self) -> datetime:
        """Return the latest time that a request or an event may have."""
        return datetime.now(UTC) + timedelta(seconds=self.settings.max_future_s)

    def refuse_the_future(self, asked: RankRequest) -> None:
        """Refuse a request that is said to be made later than the clock can be wrong.

        Raises:
            InvalidRequestError: it is.
        """
        at = asked.context.request_timestamp if asked.context else None
        if at is not None and at > self.latest():
            raise InvalidRequestError(
                f"context.request_timestamp lies in the future: {at.isoformat()}. The server's clock says "
                f"{datetime.now(UTC).isoformat(timespec='seconds')}, and takes {self.settings.max_future_s:g} s more"
            )

    async def read_user(self, serving: Serving, asked: RankRequest, deadline: float) -> UserRow:
        """Read the user from the store, or return an empty one and the reason."""
        full = self.settings.store_ms / 1000
        left = min(full, deadline - time.perf_counter())
        try:
            if left < LEAST_S:
                raise NoTimeError("no time is left to ask the store")
            return await serving.reader.read_user(asked.user_id, left, counts=left >= full)
        except DamagedValueError as error:
            self.metrics.store_errors.labels("damaged").inc()
            logger.warning("what is stored of a user could not be read: %s", error)
            return serving.ranker.nobody(Degraded.HISTORY_UNREADABLE)
        except StoreReadError as error:
            self.metrics.store_errors.labels(kind_of(error)).inc()
            if not serving.reader.open:
                logger.warning("ranking without a user: %s", error)
            return serving.ranker.nobody(Degraded.STORE_UNAVAILABLE)

    # --- logs of what was served

    @property
    def logs(self) -> list[ServedLog]:
        return list(self._logs.values())

    def log_of(self, serving: Serving) -> ServedLog | None:
        """The log of a bundle's answers, whose files name its features; None where nothing is logged."""
        folder = self.settings.log_folder
        bundle = serving.ranker.bundle
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
            log = self._logs[digest]
            await asyncio.to_thread(log.close)
            # Between these lines nobody counts.
            self._closed_logs[0] += log.written
            self._closed_logs[1] += log.dropped
            del self._logs[digest]

    # --- gauges, and the end

    def observe(self) -> None:
        """Set the gauges: what is not counted as it happens."""
        metrics = self.metrics
        live = self.live
        names = {one.name: one is live.current for one in (live.previous, live.current) if one}
        # Without this, a bundle that is loaded no longer would stay in the metrics.
        for name in self._shown_bundles - set(names):
            metrics.forget_bundle(name)
        self._shown_bundles = set(names)
        for name, ranks in names.items():
            metrics.bundle.labels(name).set(ranks)
        metrics.ready.set(self.why_not_ready() is None)
        metrics.under_way.set(self.admission.under_way)
        metrics.most_under_way.set(self.settings.max_in_flight)
        metrics.events_under_way.set(self.event_admission.under_way)
        metrics.advance(metrics.swaps, live.swaps)
        ranking = "" if live.current is None else live.current.name
        metrics.refused.set(len(live.refused))
        kept = None if live.current is None else live.current.ranker.states
        for outcome in OUTCOMES:
            total = 0 if kept is None else kept.counts[outcome]
            metrics.advance(metrics.states.labels(outcome), total, ranking)
        taken = Counter() if live.current is None else live.current.ranker.compiled.taken
        for step in STEPS:
            for by in ("code", "model"):
                metrics.advance(metrics.steps.labels(step.name, by), taken[step.name, by], ranking)
        metrics.state_bytes.set(0 if kept is None else kept.bytes)
        moved = [] if live.current is None else live.current.ranker.moved
        distances = dict.fromkeys(self._shown_columns, 0.0)
        distances |= {column.column: column.distance for column in moved}
        self._shown_columns = set(distances)
        for column, distance in distances.items():
            metrics.moved.labels(column).set(distance)
        written, dropped = self._closed_logs
        metrics.advance(metrics.logged, written + sum(log.written for log in self.logs))
        metrics.advance(metrics.log_dropped, dropped + sum(log.dropped for log in self.logs))
        current = None if live.current is None else live.current.events
        for reason in WITHOUT_TOKENS:
            number = 0 if current is None else current.without_tokens.get(reason, 0)
            metrics.advance(metrics.events_without_tokens.labels(reason), number, ranking)
        if live.current is not None:
            metrics.items_as_of.set((live.current.ranker.items.as_of or 0) / 1e6)
            if live.notes is not None:
                version = live.current.ranker.bundle.tokens
                metrics.tokens_built.set(live.notes.tokens_built_at(version))
                metrics.materialized.set(live.notes.sent_at)
        metrics.observe_process()

    async def observe_for_ever(self) -> None:
        """Set the gauges of each process, since a scrape of all meets one of them."""
        said = False
        while True:
            self.observe()
            if not said and self.why_not_ready() is None:
                systemd.notify(systemd.READY)
                said = True
            for serving in self.loaded().values():
                await asyncio.to_thread(serving.ranker.forget_old_users)
            await self.close_unused_logs()
            await asyncio.sleep(1.0)

    async def close(self) -> None:
        """Write what is to be written, and let go of threads and connections."""
        systemd.notify(systemd.STOPPING)
        if self.shadow is not None:
            await asyncio.to_thread(self.shadow.close)
        for log in self.logs:
            await asyncio.to_thread(log.close)
        if self.tracing is not None:
            await asyncio.to_thread(self.tracing.close)
        await self.live.close()
        if self.beside is not None:
            await self.beside.close()
        self.pools.close()


class NoTimeError(StoreReadError):
    """A request had too little time left to ask the store."""


def kind_of(error: StoreReadError) -> str:
    """Why a store gave no user, as the metric says it."""
    if isinstance(error, NoTimeError):
        return "no_time"
    # Redis' client has classes of its own, of the same names as Python's.
    classes = {one.__name__ for one in type(error.__cause__).__mro__}
    return next((kind for kind, names in STORE_FAULTS.items() if classes & names), "other")


def server_of(request: Request) -> Server:
    """The server that a request came to."""
    server = request.app.state.server
    assert isinstance(server, Server)
    return server
