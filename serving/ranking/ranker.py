"""One ranking call as named steps, without HTTP: look up → encode_user → score → sort."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
import torch
from msgspec import UNSET, UnsetType

from feature_repo.contract.arrow import EPOCH, micros
from feature_repo.contract.contract import Contract
from feature_repo.contract.meaning import Meanings, Moved, moved
from feature_repo.contract.schema import EVENT_TIMESTAMP, DType
from feature_repo.errors import ExpectedError
from feature_repo.history.transforms import MICROS_PER_DAY
from modeling.bundle.bundle import Bundle
from modeling.bundle.compiled import Compiled
from modeling.inputs.batch import UserInputs
from modeling.inputs.encoder import Encoded
from modeling.inputs.tasks import probabilities, ranking_logits, sigmoid
from modeling.layers.host import device_of
from serving.api.degraded import Degraded
from serving.api.messages import (
    RankRequest,
    RankResponse,
    Timings,
)
from serving.ranking.request import RequestEncoder, context_columns, why_unfit
from serving.ranking.states import Outcome, UserStates
from serving.stores.features import Reader, UserRow, as_known
from serving.stores.items import Id, ItemTable

LOGIT_DIGITS = 5
# Candidates in a micro-batch: more are scored piece by piece, and between pieces others come to the model
PIECE = 512
# Candidates of the ranking by which a bundle is timed
TIMED = 500
STALE_DAYS = 7.0
logger = logging.getLogger(__name__)


class NotFiniteError(ExpectedError, ValueError):
    """A model gives NaN or infinity."""


class TooSlowError(ExpectedError, ValueError):
    """A model takes longer for a ranking than a request may take."""


class OutOfTimeError(Exception):
    """The rest of a request cannot be done in its time."""


@dataclass(frozen=True)
class Ranked:
    """An answer, and what it was made of.

    Args:
        at: the request's time.
        encoded: the numbers that the model was given.
    """

    response: RankResponse
    at: datetime
    encoded: Encoded


@dataclass(frozen=True)
class KnownNow:
    """What is known of a user at a request's time, `at`."""

    at: datetime
    user: UserRow
    degraded: list[Degraded]


class RankService:
    """Ranks with one bundle. Calls may come from several threads; the model runs for one at a time.

    Args:
        bundle: the loaded bundle.
        reader: the online store.
        items: item features.
        replay_from: requests that carry no time are as of the end of the data, for sample data of the
            past: at this time, or just behind the newest that items or the user know of. Default: as
            of the clock.
        stale_days: item features that are older than so many days at a request are said to be stale.
        state_bytes: of encoded users that are kept between requests; 0 for none.
        compiled: ranks in place of the bundle's model; default: that model does.
    """

    def __init__(
        self,
        bundle: Bundle,
        reader: Reader,
        items: ItemTable,
        replay_from: datetime | None = None,
        stale_days: float = STALE_DAYS,
        state_bytes: int = 0,
        compiled: Compiled | None = None,
    ) -> None:
        self.compiled = compiled or Compiled(bundle.model)
        self.model = self.compiled.model
        self.states = UserStates(self.model, state_bytes) if state_bytes else None
        self.bundle = bundle
        self.device = device_of(bundle.model)
        self.reader = reader
        self.items = items
        self.replay_from = replay_from
        # A stage 1 of the bundle's own that reads the newest events makes the job's tokens of the history at hand.
        maker = bundle.model.token_maker
        self._encodes_as_well = (
            maker is not None and maker.stage_1 is not None and not maker.stage_1.streams
        )
        # What became of the columns that the bundle learned from, in the store: see `compare_columns`
        self.moved: list[Moved] = []
        # Whether the store holds an older run of the jobs than was sent last
        self.store_is_older = False
        # See `time_a_ranking`
        self.ms_of_500: float | None = None
        self.contract: Contract = bundle.encoder.contract
        self.stale_micros = stale_days * MICROS_PER_DAY
        self.requests = RequestEncoder(bundle, items)
        self._model_lock = threading.Lock()

    def nobody(self, *problems: Degraded) -> UserRow:
        """A user of whom nothing is known, and why."""
        return UserRow({c.name: None for c in self.contract.user_columns}, None, problems)

    def answer(
        self,
        request: RankRequest,
        user: UserRow,
        clock: Clock,
        *,
        keep: bool = False,
        go_on: Callable[[int], None] = lambda left: None,
    ) -> Ranked:
        """Rank for a user who has been read, best first; equal scores keep the request's order. Equal are
        logits that round to the same at `LOGIT_DIGITS`: the last bits of a sum depend on where in the
        batch its candidate stands.

        Args:
            clock: which goes on from there.
            keep: the encoded user for further requests, and use what was kept.
            go_on: called before each further piece of the candidates with how many pieces are left;
                raises OutOfTimeError where they cannot be scored in time.
        """
        # 1. What is known at the request's time, and what is not fit to be ranked with.
        items = self.items.take(request.candidates)
        clock.lap("item_read")
        known_now = self.known_now(request, user)
        at = known_now.at
        user = known_now.user
        degraded = list(known_now.degraded)
        # 2. Numbers, then logits.
        context = context_columns(self.contract, request.context)
        encoded = self.requests.encoded(user, request.candidates, at, items, context)
        known = keep and user.history is not None
        logits = self.score(encoded, clock, request.user_id if known else None, go_on)
        if items.unknown:
            degraded.append(Degraded.UNKNOWN_ITEMS)
        # An order by NaN would be arbitrary, so the candidates keep the request's order.
        if not np.isfinite(logits).all():
            logger.error("the model of %s gave NaN or infinity", self.bundle.name)
            unscored = [*degraded, Degraded.NO_SCORES]
            return Ranked(self.in_order(request, unscored, clock, items.unknown), at, encoded)
        # 3. The order, and the answer.
        ranked = ranking_logits(self.contract.spec, logits)
        order = np.argsort(-np.round(ranked, LOGIT_DIGITS), kind="stable")[: request.k]
        each: dict[str, list[float]] | UnsetType = UNSET
        if request.task_scores:
            by_task = probabilities(self.contract.spec, logits)[order]
            named = zip(self.contract.labels, by_task.T, strict=True)
            each = {name: values.tolist() for name, values in named}
        clock.lap("sort")
        response = RankResponse(
            item_ids=[request.candidates[i] for i in order],
            scores=sigmoid(ranked)[order].tolist(),
            bundle=self.bundle.name,
            tokens=None if user.tokens is None else user.tokens.fingerprint,
            degraded=degraded,
            unknown_items=items.unknown,
            timings_ms=Timings(**clock.laps),
            task_scores=each,
        )
        return Ranked(response, at, encoded)

    def known_now(self, request: RankRequest, user: UserRow) -> KnownNow:
        """What is known of a user at a request's time, and fit to be ranked with."""
        degraded = list(user.problems)
        at = self.time_of(request, user)
        moment = (at - EPOCH) // timedelta(microseconds=1)
        user = as_known(self.contract, user, moment)
        if (
            user.history is not None
            and user.history.num_rows
            and user.history["event_timestamp"][-1].as_py() >= at
        ):
            degraded.append(Degraded.NEWER_FEATURES)
        user, stale = self.with_fit_tokens(user, moment)
        degraded += stale
        if self._items_are_stale(request, at):
            degraded.append(Degraded.STALE_FEATURES)
        if self.store_is_older:
            degraded.append(Degraded.OLDER_STORE)
        if any(column.means_otherwise for column in self.moved):
            degraded.append(Degraded.CHANGED_FEATURES)
        return KnownNow(at, user, degraded)

    def keep(self, user_id: Id, user: UserInputs) -> Outcome | None:
        """Encode a user, unless the encoding is known, and keep it. Returns how it came about; None where the server keeps
        no encoded users.
        """
        if self.states is None:
            return None
        with self._model_lock, torch.inference_mode():
            return self.states.take_in(user_id, user)

    def with_fit_tokens(self, user: UserRow, at: int) -> tuple[UserRow, list[Degraded]]:
        """The user with the stored tokens that may be ranked with at a time, microseconds; and what is to be said of it."""
        if (unfit := why_unfit(user, at)) is not None:
            return replace(user, tokens=None), [unfit]
        if not user.events_behind:
            return user, []
        if self._encodes_as_well and self._holds_what_is_read(user, at):
            return replace(user, tokens=None), []
        return user, [Degraded.STALE_TOKENS]

    def _holds_what_is_read(self, user: UserRow, at: int) -> bool:
        """Return whether the stored history has all events that the model reads before a time."""
        if user.history is None:
            return False
        before = int(np.searchsorted(micros(user.history[EVENT_TIMESTAMP]), at, side="left"))
        known = (user.columns["history_end"] or 0) - (user.history.num_rows - before)
        return before >= int(self.bundle.encoder.window(np.array([known]))[0])

    def end_of_data(self) -> datetime | None:
        """As of when requests without a time are ranked, but for what is newer of their user; None: of
        the clock. It moves with each refresh of the items.
        """
        if self.replay_from is None:
            return None
        return max(self.replay_from, EPOCH + timedelta(microseconds=self.items.as_of or 0))

    def time_of(self, request: RankRequest, user: UserRow) -> datetime:
        """Return the time as of which a request is ranked: its own, the end of replayed data, or now."""
        given = request.context.request_timestamp if request.context else None
        end = self.end_of_data()
        if given is not None or end is None:
            return given or datetime.now(UTC)
        return max(end, EPOCH + timedelta(microseconds=_newest_of(user) + 1))

    def _items_are_stale(self, request: RankRequest, at: datetime) -> bool:
        """Return whether the items' features are older than the settings call fresh. For a request that replays the
        data they are as old as the data is.
        """
        if self.items.as_of is None:
            return False
        replayed = request.context is None or request.context.request_timestamp is None
        end = self.end_of_data() if replayed else None
        moment = ((end or at) - EPOCH) // timedelta(microseconds=1)
        return moment - self.items.as_of > self.stale_micros

    def in_order(
        self,
        request: RankRequest,
        degraded: Sequence[Degraded],
        clock: Clock,
        unknown: Sequence[Id] = (),
    ) -> RankResponse:
        """Answer with the candidates in the request's order, without scores."""
        return RankResponse(
            item_ids=request.candidates[: request.k],
            scores=[],
            bundle=self.bundle.name,
            tokens=None,
            degraded=list(degraded),
            unknown_items=list(unknown),
            timings_ms=Timings(**clock.laps),
        )

    def compare_columns(self, held: Meanings) -> None:
        """Find out whether the store's columns mean what they meant when the bundle learned from them.

        Args:
            held: as the store says it; empty where it does not.
        """
        self.moved = moved(self.bundle.learned, held)
        for column in self.moved:
            if column.means_otherwise:
                logger.error("%s ranks from what it did not learn: %s", self.bundle.name, column)

    def forget_old_users(self) -> None:
        """Let go of encoded users that were kept for too long."""
        if self.states is not None:
            with self._model_lock:
                self.states.forget_old()

    def warm_up(self) -> None:
        """Rank once without a user, so that the first request does not pay for what is set up on
        first use.

        Raises:
            NotFiniteError: the model gives NaN or infinity; it must not be served.
        """
        ids = list(self.bundle.encoder.items.values[:16].to_pylist()) or [_no_item(self.contract)]
        context = context_columns(self.contract, None)
        now = datetime.now(UTC)
        encoded = self.requests.encoded(self.nobody(), ids, now, self.items.take(ids), context)
        logits = self.score(encoded, Clock())
        if not np.isfinite(logits).all():
            raise NotFiniteError(
                f"bundle {self.bundle.name} gives scores that are no numbers ({logits.ravel()[:3]} …): its weights are not "
                "fit to be served. Train and export it again"
            )

    def time_a_ranking(self) -> float:
        """Milliseconds that the model takes for a ranking of 500 with a whole history, and with stored
        tokens where it reads any, the best of three; kept as `ms_of_500`.
        """
        known = self.bundle.encoder.items.values[:TIMED].to_pylist() or [_no_item(self.contract)]
        ids = (known * (TIMED // len(known) + 1))[:TIMED]
        context = context_columns(self.contract, None)
        encoded = self.requests.encoded(
            self.nobody(), ids, datetime.now(UTC), self.items.take(ids), context
        )
        times = []
        for _ in range(3):
            began = time.perf_counter()
            batch = self.bundle.encoder.collate(encoded, np.array([0]))
            user = batch.user.with_events(self.bundle.encoder.history_length)
            if self.bundle.tokens is not None:
                stored = torch.zeros(1, *self.bundle.token_shape)
                user = replace(user, tokens_BSX=stored, has_tokens_B=None)
            with self._model_lock, torch.inference_mode():
                state = self.model.encode_user(user.to(self.device))
                self.model.score(state, batch.candidates.to(self.device)).cpu()
            times.append(1000 * (time.perf_counter() - began))
        self.ms_of_500 = round(min(times), 2)
        return self.ms_of_500

    def score(
        self,
        encoded: Encoded,
        clock: Clock,
        user_id: Id | None = None,
        go_on: Callable[[int], None] = lambda left: None,
    ) -> np.ndarray:
        """Logits, candidates × tasks: piece by piece against one encoded user, the same bits as at once.

        Args:
            user_id: key under which the encoded user is cached; default: it is not cached.
            go_on: see `answer`.
        """
        encoder = self.bundle.encoder
        model = self.model
        batch = encoder.collate(encoded, np.array([0]))
        clock.lap("features")
        with self._model_lock, torch.inference_mode():
            if user_id is None or self.states is None:
                state = model.encode_user(batch.user.to(self.device))
            else:
                state = self.states.of(user_id, batch.user)
            clock.lap("encode_user")
        pieces = list(batch.candidates.to(self.device).micro_batches(PIECE))
        scored = []
        # The lock is free between pieces, so that a short request need not wait for a long one.
        for number, piece in enumerate(pieces):
            if number:
                go_on(len(pieces) - number)
            with self._model_lock, torch.inference_mode():
                scored.append(model.score(state, piece)[0])
        logits: np.ndarray[Any, Any] = torch.cat(scored).cpu().numpy()
        clock.lap("score")
        return logits


def _no_item(contract: Contract) -> Id:
    return "" if contract.item.dtype is DType.STRING else 0


def _newest_of(user: UserRow) -> int:
    """Time of the newest event in any stored feature of a user, microseconds; -1 for an unknown user."""
    known = [-1]
    if user.history is not None and user.history.num_rows:
        newest = user.history["event_timestamp"][-1].as_py()
        known.append((newest - EPOCH) // timedelta(microseconds=1))
    if user.sketch is not None:
        known.append(user.sketch.as_of)
    if user.tokens is not None:
        known.append(user.tokens.as_of)
    return max(known)


class Clock:
    """Milliseconds by stage, each from the end of the one before.

    Args:
        arrived: `time.perf_counter()` at the beginning; default: now.
    """

    def __init__(self, arrived: float | None = None) -> None:
        self._last = time.perf_counter() if arrived is None else arrived
        self.laps: dict[str, float] = {}

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.laps[name] = round((now - self._last) * 1000, 3)
        self._last = now
