"""The bundle that a process ranks with: loaded, tried, swapped in at once, rolled back.

A serving state is one object (`Serving`): bundle, item table and readers, all built before it is
swapped in and none changed after. The catalogue says which bundle is live; it is read here, in the
background, and never by a request.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.compute as pc
from sqlalchemy.exc import SQLAlchemyError

from feature_repo import datasets
from feature_repo.contract.meaning import Meanings
from feature_repo.contract.schema import DType
from feature_repo.errors import ExpectedError
from feature_repo.home.catalogue import NoLiveBundleError
from feature_repo.settings import WORK, Settings
from feature_repo.store.store import close_store, held_columns
from modeling.bundle import bundle as bundles
from modeling.bundle.compiled import Compiled, recorded, with_compiled
from modeling.layers.host import device_named
from modeling.layers.memory import keep_freed_memory
from modeling.summaries.summariser import Summariser
from serving.api.logs import LIFECYCLE
from serving.api.messages import RankRequest
from serving.live.notes import Notes
from serving.live.seen_catalogue import SeenCatalogue
from serving.live.store_watch import FILLS_ONLINE, LookAtStore
from serving.ranking.ranker import STALE_DAYS, Clock, NotFiniteError, RankService, TooSlowError
from serving.served.served_log import newest_of
from serving.stores.events import EventTaker
from serving.stores.features import FeastReader
from serving.stores.guarded import AsyncReader, GuardedReader, ThreadedReader
from serving.stores.items import ItemTable, Loaded, NotYetError, published_rows
from serving.stores.last_seen import keep_registry
from serving.stores.opened import open_events_store, open_pinned
from serving.stores.redis_hashes import WrongStoreError
from serving.stores.redis_reader import RedisReader

if TYPE_CHECKING:
    from feast import FeatureStore

logger = logging.getLogger(__name__)
lifecycle = logging.getLogger(LIFECYCLE)
LONGEST_PAUSE_S = 600.0
# Logged requests that are ranked before a bundle is swapped in, and for how many seconds at most
WARM_UPS = 64
WARM_UP_S = 1.0
# Seconds until a bundle that was refused is tried again
REFUSED_AGAIN_S = 60.0
# For requests that are under way with a state that ranks no longer
RETIRED_S = 60.0


@dataclass(frozen=True)
class Serving:
    """Everything that answers are made from."""

    ranker: RankService
    reader: GuardedReader
    events: EventTaker | None = None
    stores: tuple[FeatureStore, ...] = ()  # that it opened

    @property
    def name(self) -> str:
        return self.ranker.bundle.name

    async def close(self) -> None:
        """Let go of threads, connections and files; no request may be under way with it."""
        await asyncio.to_thread(self.ranker.items.close)
        await self.reader.close()
        if self.events is not None:
            await asyncio.to_thread(self.events.close)
        for store in self.stores:
            await asyncio.to_thread(close_store, store)


@dataclass(frozen=True)
class BundleSource:
    """The source of a process's bundles, items and users.

    Args:
        bundle: a folder; default: the live one of the catalogue.
        replay: requests without a time are as of the end of the data.
        deadline_ms: a bundle that takes longer to rank 500 candidates is refused.
    """

    settings: Settings
    bundle: Path | None = None
    replay: bool = False
    item_refresh_s: float = 0.0
    stale_days: float = STALE_DAYS
    # Bytes of encoded users that are kept between requests
    state_bytes: int = 0
    deadline_ms: float = math.inf
    # Where the model runs
    device: str = "cpu"
    # Compiled steps are used, where some are recorded for this machine
    compiled: bool = True
    # Of what was served: its newest requests are ranked before the first caller's
    log_folder: Path | None = None

    @cached_property
    def catalogue(self) -> SeenCatalogue:
        """Says which bundle is live, also while its database is away."""
        return SeenCatalogue(self.settings)

    def live_digest(self) -> str | None:
        """Return the digest of the bundle that should rank now; None for one given by its folder.

        Raises:
            NoLiveBundleError: no bundle is live.
        """
        return None if self.bundle is not None else self.catalogue.live_bundle().digest

    def open_bundle(self, digest: str | None = None) -> bundles.Bundle:
        """The bundle alone, checked; arguments and errors as in `load`."""
        device = device_named(self.device)
        contract = datasets.load_contract(self.settings.dataset)
        if self.bundle is not None:
            return bundles.load(self.bundle, contract).on(device)
        live = self.catalogue.live_bundle()
        if digest is not None and live.digest != digest:
            raise NoLiveBundleError("another bundle became live meanwhile: it is loaded next")
        path = self.settings.path(live.path)
        return bundles.load(path, contract, live.digest).on(device)

    def token_maker(self, bundle: bundles.Bundle) -> Summariser | None:
        """Stage 1 of the tokens that a bundle reads: its own, or that of the newest bundle that made them; None where
        it reads none, or its maker cannot be loaded, which is logged.
        """
        if bundle.makes_tokens:
            return Summariser(bundle.model, bundle.encoder)
        if bundle.tokens is None:
            return None
        contract = datasets.load_contract(self.settings.dataset)
        try:
            row = self.catalogue.opened.maker_of(self.settings.dataset, bundle.tokens)
            if row is not None:
                maker = bundles.load(self.settings.path(row.path), contract, row.digest)
                maker = maker.on(device_named(self.device))
                return Summariser(maker.model, maker.encoder)
            why = "no bundle here makes them"
        except (bundles.BundleError, SQLAlchemyError, OSError) as error:
            # To rank, a server needs no catalogue but for this.
            why = str(error)
        logger.warning(
            "after an event the tokens that %s reads are stale until the job has run: %s",
            bundle.name,
            why,
        )
        return None

    def _compiled(self, bundle: bundles.Bundle) -> Compiled:
        """A bundle's model with the steps that were compiled for this machine."""
        if not self.compiled:
            return Compiled(bundle.model, why="compiled steps are switched off")
        if self.device != "cpu":
            return Compiled(bundle.model, why="on another device than a CPU nothing is compiled")
        try:
            packages = recorded(bundle, self.settings, self.catalogue.opened)
        except (SQLAlchemyError, OSError) as error:
            logger.warning("whether steps of %s are compiled is not known: %s", bundle.name, error)
            return Compiled(bundle.model, why="the catalogue's database is away")
        if not packages:
            return Compiled(
                bundle.model,
                why="none was compiled for this machine that is still as it was; the log may say more",
            )
        return with_compiled(bundle, packages)

    def _rank_as_logged(self, ranker: RankService) -> None:
        """Rank the newest logged requests, for a second at most: what callers ask for is then in memory. Their users are encoded,
        which a later request finds where the model's states take another request's circumstances.
        """
        if self.log_folder is None:
            return
        key = ranker.contract.user.join_key
        until = time.monotonic() + WARM_UP_S
        try:
            for row in newest_of(self.log_folder, WARM_UPS, key):
                if time.monotonic() > until:
                    return
                asked = RankRequest(row[key], row["candidates"])
                user = ranker.reader.read_user(asked.user_id)
                ranker.answer(asked, user, Clock(), keep=True)
        except Exception as error:
            # A store that is away, a log of another dataset: callers are told by their answers.
            logger.warning("warming up by logged requests ends here: %s", error)

    def held_columns(self) -> Meanings:
        """Read from the online store what its columns mean."""
        store = open_pinned(self.settings)
        try:
            return held_columns(store)
        finally:
            close_store(store)

    def load(self, digest: str | None = None) -> Serving:
        """The bundle over the online store, warm, its scores tried.

        Args:
            digest: of the live bundle, as it was asked for; default: whichever is live.

        Raises:
            BundleError: the bundle must not be served.
            NoLiveBundleError: no bundle was given and none is live, or another by now.
            NotFiniteError: its scores are no numbers.
            TooSlowError: it cannot keep the deadline.
            LookupError: no item has any features.
        """
        import torch

        torch.set_num_threads(1)
        keep_freed_memory()
        settings = self.settings
        bundle = self.open_bundle(digest)
        # The bundle's own: what it was trained under, the one in force has.
        contract = bundle.encoder.contract
        service = bundle.manifest["online_service"]
        # Items and events have stores of their own: no request waits while these are read or written.
        store = open_pinned(settings)
        store_of_items = open_pinned(settings)
        stores = (store, store_of_items, open_events_store(settings))
        reader = FeastReader(store, contract, service, bundle.tokens)
        end = datetime.fromisoformat(bundle.manifest["data_as_of"]) if self.replay else None
        items_of = FeastReader(
            store_of_items, contract, service, now=lambda: end or datetime.now(UTC)
        )
        # Without the tables, every item that training knew anything of: shares are of all of their events.
        ids = pa.concat_arrays([bundle.encoder.items.values, bundle.encoder.relations.ids])
        known = pc.unique(ids).to_pylist()

        from_tables = False

        def load_items() -> Loaded:
            nonlocal from_tables
            published = published_rows(settings, contract)
            if published is None and from_tables:
                raise NotYetError(
                    "the tables were rebuilt since they were sent online: run `python -m beam_jobs materialize`"
                )
            from_tables = published is not None
            return published or Loaded(items_of.read_items(known))

        items = ItemTable(bundle.encoder, items_of.read_items, load_items, self.item_refresh_s)
        try:
            ranker = RankService(
                bundle,
                reader,
                items,
                end,
                self.stale_days,
                self.state_bytes,
                self._compiled(bundle),
            )
            # Scores that are no numbers, or late, must not be found out by a client's request.
            ranker.compare_columns(held_columns(store))
            ranker.warm_up()
            self._rank_as_logged(ranker)
            took = ranker.time_a_ranking()
            if took > self.deadline_ms:
                raise TooSlowError(
                    f"bundle {bundle.name} takes {took:.0f} ms to rank 500 candidates, and {self.deadline_ms:g} ms are "
                    "allowed to answer a request: MEMOIR_SERVE_DEADLINE_MS allows more, or make a smaller one live"
                )
            users: AsyncReader
            try:
                users = RedisReader(store, contract, service, bundle.tokens)
            except WrongStoreError:
                # The first read sets up connections and Feast's caches: not within a request's time.
                reader.read_user("nobody" if contract.user.dtype is DType.STRING else 0)
                users = ThreadedReader(reader)
            events = EventTaker(stores[2], contract, self.token_maker(bundle), settings.home)
        except BaseException:
            items.close()
            for opened in stores:
                close_store(opened)
            raise
        if settings.profile == "production":
            keep_registry(settings, store)
        freeze_once()
        return Serving(ranker, GuardedReader(users), events, stores)


def freeze_once() -> None:
    """Leave what is loaded first out of garbage collections, which would stop requests for tenths of
    a second. What comes later is collected as usual: frozen, an old bundle's cycles would stay for ever.
    """
    if not gc.get_freeze_count():
        gc.collect()
        gc.freeze()


@dataclass(frozen=True)
class _Retired:
    """A state that ranks no longer, and since when, as `time.monotonic` has it."""

    serving: Serving
    since: float


class Live:
    """The serving state of a process, kept up with catalogue and store.

    Args:
        load: makes a serving state of the bundle of a digest; raises where it cannot.
        live_digest: returns the digest of the bundle that should rank; None if that never changes.
        look: looks at what the online store holds; default: no look.
        repair: called when the store holds nothing, or with True when it holds less than was sent; default: no repair.
        columns: returns what the store's columns mean, asked for after each run that fills it.
        problem: returns what else an operator wants to know.
        notes: of the catalogue, for the metrics.
    """

    def __init__(
        self,
        load: Callable[[str | None], Serving],
        live_digest: Callable[[], str | None] = lambda: None,
        look: LookAtStore | None = None,
        repair: Callable[[bool], None] | None = None,
        columns: Callable[[], Meanings] | None = None,
        problem: Callable[[], str | None] = lambda: None,
        notes: Notes | None = None,
    ) -> None:
        self.notes = notes
        self._problem = problem
        self._columns = columns
        self._load = load
        self._live_digest = live_digest
        self._look = look
        self._repair = repair
        self.current: Serving | None = None
        self.previous: Serving | None = None
        # Digests that were tried, and why they do not rank
        self.refused: dict[str, str] = {}
        # When each is tried again
        self._again: dict[str, float] = {}
        self.not_loaded = "no bundle is loaded yet"
        self.store_problem: str | None = None
        self.swaps = 0
        # Whether the store holds an older run than was sent last
        self.store_is_older = False
        self.store_warning: str | None = None
        # Since when store and catalogue name different runs, as `time.monotonic` has it
        self._differs_since: float | None = None
        # The run that the store was last seen to hold
        self._held: str | None = None
        self._comparing: asyncio.Task[None] | None = None
        self._retired: list[_Retired] = []

    @property
    def why_not_ready(self) -> str | None:
        """Why no request should come here; None where they may."""
        return self.not_loaded if self.current is None else self.store_problem

    @property
    def warnings(self) -> list[str]:
        """Faults that an operator should mend, although answers go on."""
        found = [self._problem(), self.store_warning]
        if self.store_is_older:
            found.append(
                f"the online store holds an older run than was sent last: run `python -m beam_jobs {FILLS_ONLINE} --force`"
            )
        return [one for one in found if one is not None]

    def load_now(self) -> None:
        """Load what should rank, try it, and swap it in; what ranked before is kept beside.

        A bundle that cannot be served is noted in `refused` and tried again in a while; the one before
        goes on ranking. Nothing is raised: this is called again.
        """
        # 1. Ask which bundle should rank.
        try:
            digest = self._live_digest()
        except Exception as error:
            self._not_loaded(error)
            return
        # 2. Leave a bundle alone that ranks already, or that was refused a moment ago.
        name = digest or "given"
        if self._ranks(digest) or time.monotonic() < self._again.get(name, 0.0):
            return
        if self.previous is not None and self.previous.ranker.bundle.digest == digest:
            self.roll_back()  # it is warm
            return
        # 3. Load and try it, while the bundle before goes on ranking.
        try:
            made = self._load(digest)
        except Exception as error:
            self._not_loaded(error)
            # Only a fault of the bundle is remembered; a store that is away is asked at the next call.
            if isinstance(error, bundles.BundleError | NotFiniteError | TooSlowError):
                self.refused[name] = str(error)
                self._again[name] = time.monotonic() + REFUSED_AGAIN_S
            return
        # 4. Swap; requests under way may still use a retired bundle, so it is closed later.
        if self.previous is not None:
            self._retired.append(_Retired(self.previous, time.monotonic()))
        self.previous = self.current
        self.current = made
        self.refused.pop(name, None)
        self.swaps += 1
        lifecycle.info("%s ranks now", made.name)

    def _ranks(self, digest: str | None) -> bool:
        """Return whether the bundle that should rank does."""
        return self.current is not None and digest in (None, self.current.ranker.bundle.digest)

    def _not_loaded(self, error: Exception) -> None:
        self.not_loaded = str(error)
        if isinstance(error, ExpectedError | LookupError):
            logger.error("a bundle cannot be served: %s", error)
        else:
            logger.error("a bundle could not be loaded", exc_info=error)

    def roll_back(self) -> None:
        """Rank with the bundle before this one, which is still warm.

        Raises:
            NoLiveBundleError: there is no such bundle.
        """
        if self.previous is None:
            raise NoLiveBundleError("no bundle ranked here before this one")
        self.current, self.previous = self.previous, self.current
        self.swaps += 1
        lifecycle.info("%s ranks again", self.current.name)

    async def look_at_store(self) -> None:
        """Look at what the store holds; where that is nothing, or less than was sent, have it repaired."""
        if self._look is None:
            return
        try:
            state = await self._look()
        except Exception as error:
            self.store_problem = f"the online store cannot be read: {type(error).__name__}: {error}"
            return
        self.store_warning = None
        if state.unread_parts:
            # Its users are ranked without their histories; all others as ever, so that nobody is sent away.
            self.store_warning = f"{state.unread_parts} of {state.parts} parts of the online store did not answer: a node of the cluster is away"
        # 1. A store that came back empty, or has lost users, is not ready.
        if state.held is None:
            self.store_problem = "the online store holds nothing that a job wrote: run `python -m beam_jobs materialize`"
            self._have_it_repaired(force=False)
            return
        if state.empty_parts:
            self.store_problem = (
                f"{state.empty_parts} of {state.parts} parts of the online store hold nothing that a job wrote: a shard of the cluster "
                "came back empty. Run `python -m beam_jobs materialize --force`, then `summary_tokens`"
            )
            self._have_it_repaired(force=True)
            return
        if state.missing:
            self.store_problem = (
                f"{state.missing} of {state.looked_for} users who were sent are not in the online store: it lost a shard, or evicts "
                "keys. Run `python -m beam_jobs materialize --force`, and let it evict nothing (maxmemory-policy noeviction)"
            )
            self._have_it_repaired(force=True)
            return
        self.store_problem = None
        # 2. An older copy ranks, and each answer says so: where the catalogue was asked after the two were first seen to
        #    differ, for the job notes its run in two places, one after the other.
        if not state.differs:
            self._differs_since = None
        elif self._differs_since is None:
            self._differs_since = time.monotonic()
        older = self._differs_since is not None and state.heard_at > self._differs_since
        if older and not self.store_is_older:
            logger.error(
                "the online store holds run %s of %s, sent last was %s: run `python -m beam_jobs %s --force`",
                *(state.held, FILLS_ONLINE, state.sent, FILLS_ONLINE),
            )
        self.store_is_older = older
        for one in self._loaded():
            one.ranker.store_is_older = older
        # 3. Somebody sent other tables online: items follow now, and not when they are next due.
        if self._held is not None and self._held != state.held:
            for one in self._loaded():
                one.ranker.items.refresh_soon()
            # Behind the look, which has a time in which it must end.
            self._comparing = asyncio.create_task(asyncio.to_thread(self._compare_columns))
        self._held = state.held

    def _loaded(self) -> list[Serving]:
        return [one for one in (self.current, self.previous) if one is not None]

    def _have_it_repaired(self, force: bool) -> None:
        if self._repair is None:
            return
        try:
            self._repair(force)
        except OSError:
            logger.exception("the store could not be repaired")

    def _compare_columns(self) -> None:
        """Let each bundle know what the store's columns mean by now; what cannot be read is asked for with the next run."""
        if self._columns is None:
            return
        try:
            held = self._columns()
        except Exception:
            logger.exception("what the store's columns mean could not be read")
            return
        for one in self._loaded():
            one.ranker.compare_columns(held)

    @property
    def retired(self) -> list[Serving]:
        """States that no longer rank, though requests may still be using them."""
        return [old.serving for old in self._retired]

    async def close_retired(self, after_s: float = RETIRED_S) -> None:
        """Close states that have not ranked for so long that no request can be under way with them."""
        now = time.monotonic()
        due = [old for old in self._retired if now - old.since >= after_s]
        self._retired = [old for old in self._retired if old not in due]
        for old in due:
            await old.serving.close()

    async def close(self) -> None:
        await self.close_retired(0.0)
        for one in self._loaded():
            await one.close()

    async def follow(self, every_s: float) -> None:
        """Load, and keep up with the catalogue, for ever; a failed load is tried again."""
        while True:
            await asyncio.to_thread(self.load_now)
            await self.close_retired()
            if not every_s and self.current is not None:
                return
            await asyncio.sleep(every_s or 1.0)

    async def watch(self, every_s: float) -> None:
        """Keep an eye on the store, for ever. A look that hangs counts as a failure after `every_s`."""
        while True:
            looking = asyncio.ensure_future(self.look_at_store())
            done, _ = await asyncio.wait([looking], timeout=every_s)
            if not done:
                self.store_problem = f"the online store did not answer within {every_s:g} s"
                await looking
            await asyncio.sleep(every_s)


class Repair:
    """Runs the job that fills an emptied online store from the tables: one at a time, and after one that
    failed only in a while, twice as long each time.

    Every process may have one: the job itself lets no second one run in a home.
    """

    def __init__(self, settings: Settings, pause_s: float = 5.0) -> None:
        self._settings = settings
        self._first_s = pause_s
        self._pause_s = pause_s
        self._next = 0.0
        self._running: subprocess.Popen[bytes] | None = None

    def __call__(self, force: bool = False) -> None:
        """Start it, unless it runs or ran just now; with `force` although the store says that it holds the run."""
        if self._running is not None:
            ended = self._running.poll()
            if ended is None:
                return
            if ended:
                logger.error("the job that fills the store ended with %d", ended)
            # After one that succeeded as well: a store that goes on losing keys would have it run for ever.
            self._next = time.monotonic() + self._pause_s
            self._pause_s = min(2 * self._pause_s, LONGEST_PAUSE_S)
            self._running = None
        if time.monotonic() < self._next:
            return
        if time.monotonic() > self._next + LONGEST_PAUSE_S:
            self._pause_s = self._first_s
        logger.warning("the online store lacks what was sent: it is filled again from the tables")
        self._running = self._start(force)

    def _start(self, force: bool) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "beam_jobs", FILLS_ONLINE, "--runner=FnApiRunner"]
        command += ["--force"] if force else []
        # The job is no process of the server's, whose folder of metrics Feast would look for.
        environment = {n: v for n, v in os.environ.items() if not n.startswith("PROMETHEUS_MULTI")}
        return subprocess.Popen(command, cwd=WORK, env=environment, stdout=subprocess.DEVNULL)
