"""One ranking call as named steps, without HTTP: look up → encode_user → score → sort."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from msgspec import UNSET, UnsetType

from feature_repo.arrow import EPOCH, arrow_type, history_schema
from feature_repo.contract import Contract
from feature_repo.errors import ExpectedError
from feature_repo.history import (
    Histories,
    event_columns,
    from_batches,
    mean_names,
    primary_values,
)
from feature_repo.schema import DType
from feature_repo.transforms import MICROS_PER_DAY
from modeling.bundle import Bundle
from modeling.encoder import Encoded, GatherTokens, ItemNumbers, ReadSketch, Requests
from modeling.tasks import probabilities, ranking_logits, sigmoid
from serving.degraded import Degraded
from serving.features import Reader, UserRow, as_known
from serving.items import Id, ItemTable, Taken
from serving.messages import (
    EventEffect,
    ExplainResponse,
    HistoryResponse,
    PastEvent,
    RankContext,
    RankRequest,
    RankResponse,
    Timings,
)
from serving.states import UserStates

LOGIT_DIGITS = 5
PIECE = 512  # candidates that are scored at a time; between pieces others come to the model
TIMED = 500  # candidates of the ranking by which a bundle is timed
STALE_DAYS = 7.0
logger = logging.getLogger(__name__)


class NotFiniteError(ExpectedError, ValueError):
    """A model gives numbers that are none."""


class TooSlowError(ExpectedError, ValueError):
    """A model takes longer for a ranking than a request may take."""


class OutOfTimeError(Exception):
    """What is left of a request cannot be done in its time."""


@dataclass(frozen=True)
class Prepared:
    """One request in the shape that training encodes: its numbers, but for what is between history
    and candidates.

    Args:
        numbers: of the candidates.
        item_of_key: row of the vocabulary of each item key.
    """

    requests: Requests
    numbers: ItemNumbers
    item_of_key: np.ndarray


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
    """

    def __init__(
        self,
        bundle: Bundle,
        reader: Reader,
        items: ItemTable,
        replay_from: datetime | None = None,
        stale_days: float = STALE_DAYS,
        state_bytes: int = 0,
    ) -> None:
        self.states = UserStates(bundle.model, state_bytes) if state_bytes else None
        self.bundle, self.reader, self.items, self.replay_from = (
            bundle,
            reader,
            items,
            replay_from,
        )
        self.ms_of_500: float | None = None  # see `time_a_ranking`
        self.contract: Contract = bundle.encoder.contract
        self.stale_micros = stale_days * MICROS_PER_DAY
        self._model_lock = threading.Lock()

    def rank(self, request: RankRequest, arrived: float | None = None) -> RankResponse:
        """Rank a request's candidates, best first; equal scores keep the request's order.

        Equal are logits that round to the same at `LOGIT_DIGITS`: the last bits of a sum depend on
        where in the batch its candidate stands.

        Args:
            arrived: `time.perf_counter()` when the request came, for the queue's timing.
        """
        clock = Clock(arrived)
        clock.lap("queue")
        try:
            user = self.reader.read_user(request.user_id)
        except Exception:
            logger.exception("the online store could not be read; ranking without a user")
            user = self.nobody(Degraded.STORE_UNAVAILABLE)
        clock.lap("user_read")
        return self.answer(request, user, clock)

    def nobody(self, *problems: Degraded) -> UserRow:
        """A user of whom nothing is known, and why."""
        return UserRow({c.name: None for c in self.contract.user_columns}, None, problems)

    def answer(
        self,
        request: RankRequest,
        user: UserRow,
        clock: Clock,
        seen: Callable[[datetime, Encoded], None] | None = None,
        *,
        keep: bool = False,
        go_on: Callable[[int], None] = lambda left: None,
    ) -> RankResponse:
        """Rank for a user who has been read: all that follows the store.

        Args:
            clock: which goes on from there.
            seen: called with the request's time and the numbers that the model is given.
            keep: the encoded user for further requests, and use what was kept.
            go_on: called before each further piece of the candidates with how many pieces are left;
                raises OutOfTimeError where they cannot be scored in time.
        """
        degraded = list(user.problems)
        items = self.items.take(request.candidates)
        clock.lap("item_read")
        at = self._time_of(request, user)
        micros = (at - EPOCH) // timedelta(microseconds=1)
        user = as_known(self.contract, user, micros)
        if (
            user.history is not None
            and user.history.num_rows
            and user.history["event_timestamp"][-1].as_py() >= at
        ):
            degraded.append(Degraded.NEWER_FEATURES)
        if (unfit := why_unfit(user, micros)) is not None:
            degraded.append(unfit)
            user = replace(user, tokens=None)
        elif user.events_behind:
            degraded.append(Degraded.STALE_TOKENS)
        if self._items_are_stale(request, at):
            degraded.append(Degraded.STALE_FEATURES)
        context = context_columns(self.contract, request.context)
        encoded = self.encoded(user, request.candidates, at, items, context)
        if seen is not None:
            seen(at, encoded)
        known = keep and user.history is not None
        logits = self._score(encoded, clock, request.user_id if known else None, go_on)
        if items.unknown:
            degraded.append(Degraded.UNKNOWN_ITEMS)
        if not np.isfinite(logits).all():
            logger.error("the model of %s gave numbers that are none", self.bundle.name)
            return self.in_order(request, [*degraded, Degraded.NO_SCORES], clock, items.unknown)
        ranked = ranking_logits(self.contract.spec, logits)
        order = np.argsort(-np.round(ranked, LOGIT_DIGITS), kind="stable")[: request.k]
        each: dict[str, list[float]] | UnsetType = UNSET
        if request.task_scores:
            by_task = probabilities(self.contract.spec, logits)[order]
            named = zip(self.contract.labels, by_task.T, strict=True)
            each = {name: values.tolist() for name, values in named}
        clock.lap("sort")
        return RankResponse(
            item_ids=[request.candidates[i] for i in order],
            scores=sigmoid(ranked)[order].tolist(),
            bundle=self.bundle.name,
            tokens=None if user.tokens is None else user.tokens.fingerprint,
            degraded=degraded,
            unknown_items=items.unknown,
            timings_ms=Timings(**clock.laps),
            task_scores=each,
        )

    def explain(self, request: RankRequest, user: UserRow, num_events: int) -> ExplainResponse:
        """Why the request's one candidate is where it is: its numbers, and what each of the newest events
        and each stored token is worth, by ranking without it. Statistics and the sketch keep an event.
        """
        at = self._time_of(request, user)
        user = as_known(self.contract, user, (at - EPOCH) // timedelta(microseconds=1))
        context = context_columns(self.contract, request.context)
        items = self.items.take(request.candidates)
        of_tokens = self._effects_of_tokens(request, user, at, items, context)
        user = replace(user, tokens=None)
        encoded = self.encoded(user, request.candidates, at, items, context)
        base = self._logit(encoded)
        numbers = np.asarray(encoded.candidate_dense)[0]
        names = self.bundle.encoder.dense_names
        effects = []
        events = [] if user.history is None else user.history.to_pylist()
        known = [row for row, event in enumerate(events) if event["event_timestamp"] < at]
        for row in known[::-1][:num_events]:
            assert user.history is not None
            kept = pa.array(np.delete(np.arange(len(events)), row))
            without = replace(user, history=user.history.take(kept))
            lacking = self._logit(self.encoded(without, request.candidates, at, items, context))
            effects.append(
                EventEffect(
                    events[row][self.contract.item.join_key],
                    events[row]["event_timestamp"],
                    self.contract.spec.actions[events[row]["action"]],
                    base - lacking,
                )
            )
        return ExplainResponse(
            score=float(sigmoid(np.array([base]))[0]),
            features={
                name: None if np.isnan(value) else float(value)
                for name, value in zip(names, numbers, strict=True)
            },
            events=effects,
            tokens=of_tokens,
            bundle=self.bundle.name,
            degraded=list(user.problems),
        )

    def _effects_of_tokens(
        self,
        request: RankRequest,
        user: UserRow,
        at: datetime,
        items: Taken,
        context: dict[str, pa.Array],
    ) -> list[float]:
        """By how much the logit would be lower if a stored token were all zeros, token by token."""
        stored = user.tokens
        if (
            stored is None
            or stored.tokens_SD is None
            or why_unfit(user, (at - EPOCH) // timedelta(microseconds=1)) is not None
        ):
            return []

        def logit_with(tokens_SD: np.ndarray) -> float:
            seen = replace(user, tokens=replace(stored, tokens_SD=tokens_SD))
            return self._logit(self.encoded(seen, request.candidates, at, items, context))

        base, effects = logit_with(stored.tokens_SD), []
        for token in range(len(stored.tokens_SD)):
            lacking_SD = stored.tokens_SD.copy()
            lacking_SD[token] = 0.0
            effects.append(base - logit_with(lacking_SD))
        return effects

    def known_of(self, user: UserRow) -> HistoryResponse:
        """What the store holds of a user, for a person to read."""
        contract, events = self.contract, []
        item, features = contract.item.join_key, [c.name for c in contract.spec.event_features]
        rows = [] if user.history is None else user.history.to_pylist()
        for row in reversed(rows):
            action = contract.spec.actions[row["action"]]
            values = {name: row.get(name) for name in features}
            events.append(PastEvent(row[item], row["event_timestamp"], action, values))
        tokens = user.tokens
        return HistoryResponse(
            events=events,
            num_events=user.columns["history_end"] or len(events),
            tokens=None if tokens is None else tokens.fingerprint,
            num_tokens=0 if tokens is None or tokens.tokens_SD is None else len(tokens.tokens_SD),
            events_behind=user.events_behind,
            tokens_as_of=None if tokens is None else EPOCH + timedelta(microseconds=tokens.as_of),
            titles={},
            degraded=list(user.problems),
        )

    def _logit(self, encoded: Encoded) -> float:
        """What the one candidate of a request is ranked by."""
        return float(ranking_logits(self.contract.spec, self._score(encoded, Clock()))[0])

    def end_of_data(self) -> datetime | None:
        """As of when requests without a time are ranked, but for what is newer of their user; None: of
        the clock. It moves with each refresh of the items.
        """
        if self.replay_from is None:
            return None
        return max(self.replay_from, EPOCH + timedelta(microseconds=self.items.as_of or 0))

    def _time_of(self, request: RankRequest, user: UserRow) -> datetime:
        given = request.context.request_timestamp if request.context else None
        end = self.end_of_data()
        if given is not None or end is None:
            return given or datetime.now(UTC)
        return max(end, EPOCH + timedelta(microseconds=_newest_of(user) + 1))

    def _items_are_stale(self, request: RankRequest, at: datetime) -> bool:
        """Whether the items' features are older than is told to be fresh. Of a request that replays the
        data they are as old as the data is.
        """
        if self.items.as_of is None:
            return False
        replayed = request.context is None or request.context.request_timestamp is None
        end = self.end_of_data() if replayed else None
        micros = ((end or at) - EPOCH) // timedelta(microseconds=1)
        return micros - self.items.as_of > self.stale_micros

    def in_order(
        self,
        request: RankRequest,
        degraded: Sequence[Degraded],
        clock: Clock,
        unknown: Sequence[Id] = (),
    ) -> RankResponse:
        """The last rung: candidates in the request's order, without scores."""
        return RankResponse(
            item_ids=request.candidates[: request.k],
            scores=[],
            bundle=self.bundle.name,
            tokens=None,
            degraded=list(degraded),
            unknown_items=list(unknown),
            timings_ms=Timings(**clock.laps),
        )

    def forget_old_users(self) -> None:
        """Let go of encoded users that were kept for too long."""
        if self.states is not None:
            with self._model_lock:
                self.states.forget_old()

    def warm_up(self) -> None:
        """Rank once without a user, so that the first request does not pay for what is set up on
        first use.

        Raises:
            NotFiniteError: the model gives numbers that are none; it must not be served.
        """
        ids = list(self.bundle.encoder.items.values[:16].to_pylist()) or [self._no_item()]
        context = context_columns(self.contract, None)
        now = datetime.now(UTC)
        encoded = self.encoded(self.nobody(), ids, now, self.items.take(ids), context)
        logits = self._score(encoded, Clock())
        if not np.isfinite(logits).all():
            raise NotFiniteError(
                f"bundle {self.bundle.name} gives scores that are no numbers ({logits.ravel()[:3]} …): its weights are not "
                "fit to be served. Train and export it again"
            )

    def time_a_ranking(self) -> float:
        """Milliseconds that the model takes for a ranking of 500 with a whole history, and with stored
        tokens where it reads any, the best of three; kept as `ms_of_500`.
        """
        known = self.bundle.encoder.items.values[:TIMED].to_pylist() or [self._no_item()]
        ids = (known * (TIMED // len(known) + 1))[:TIMED]
        context = context_columns(self.contract, None)
        encoded = self.encoded(self.nobody(), ids, datetime.now(UTC), self.items.take(ids), context)
        times = []
        for _ in range(3):
            began = time.perf_counter()
            batch = self.bundle.encoder.collate(encoded, np.array([0]))
            user = batch.user.with_events(self.bundle.encoder.history_length)
            if self.bundle.tokens is not None:
                stored = torch.zeros(1, *self.bundle.token_shape)
                user = replace(user, tokens_BSX=stored, has_tokens_B=torch.tensor([True]))
            with self._model_lock, torch.inference_mode():
                state = self.bundle.model.encode_user(user)
                self.bundle.model.score(state, batch.candidates)
            times.append(1000 * (time.perf_counter() - began))
        self.ms_of_500 = round(min(times), 2)
        return self.ms_of_500

    def _no_item(self) -> Id:
        return "" if self.contract.item.dtype is DType.STRING else 0

    def encoded(
        self,
        user: UserRow,
        candidates: Sequence[Id],
        at: datetime,
        items: Taken | None = None,
        context: dict[str, pa.Array] | None = None,
    ) -> Encoded:
        """This one request as training encodes it; see `prepared`."""
        made = self.prepared(user, candidates, at, items, context)
        return self.bundle.encoder.encode(made.requests, made.numbers, made.item_of_key)

    def prepared(
        self,
        user: UserRow,
        candidates: Sequence[Id],
        at: datetime,
        items: Taken | None = None,
        context: dict[str, pa.Array] | None = None,
    ) -> Prepared:
        """What is known of the request at its time, without events at or after it.

        Args:
            items: the candidates' features; default: as the table has them.
            context: what the caller says of the circumstances; default: nothing.
        """
        items = self.items.take(candidates) if items is None else items
        keyed = self._keyed(user.history, candidates, items)
        micros = (at - EPOCH) // timedelta(microseconds=1)
        histories, known = keyed.histories, user.columns
        kept = int(np.searchsorted(histories.times, micros, side="left"))
        if user.history is not None:
            known = known | _stats_before(self.contract, known, user.history, kept)
        if kept < len(histories.times):
            histories = histories.take(np.array([0]), np.array([kept]))

        def gather(chosen: np.ndarray, length: int) -> Histories:
            return histories.newest(length)

        user_columns = {
            c.name: pa.array([known[c.name]], arrow_type(c.dtype))
            for c in self.contract.user_columns
        }
        user_columns |= context_columns(self.contract, None) if context is None else context
        requests = Requests(
            times=np.array([micros]),
            user_columns=user_columns,
            candidate_offsets=np.array([0, len(candidates)]),
            candidate_keys=keyed.candidate_keys,
            gather=gather,
            gather_tokens=self._tokens_of(user),
            read_sketch=self._sketch_of(user, micros),
        )
        return Prepared(requests, items.numbers, keyed.item_of_key)

    def _keyed(
        self, history: pa.RecordBatch | None, candidates: Sequence[Id], items: Taken
    ) -> _Keyed:
        """Keys under which equal items of the history and the candidates are equal: their places in
        the item table, where all of them are there.
        """
        contract, vocabulary = self.contract, self.bundle.encoder.items
        if history is None:
            nothing = pa.Table.from_batches([], history_schema(contract))
            empty = Histories(
                np.zeros(2, np.int64), np.zeros(0, np.int64), event_columns(contract, nothing)
            )
            keys = np.arange(len(candidates))
            return _Keyed(empty, keys, items.numbers.vocabulary_row)
        events = history[contract.item.join_key]
        places = items.known.places(events.to_pylist())
        if items.unknown or places.min(initial=0) < 0:
            ids = pa.array(candidates, arrow_type(contract.item.dtype))
            histories, keys = from_batches(contract, [history], ids)
            item_of_key = np.zeros(
                max(histories.item_keys.max(initial=-1), keys.max()) + 1, np.int64
            )
            item_of_key[histories.item_keys] = vocabulary.indices_of(events)
            item_of_key[keys] = items.numbers.vocabulary_row
            return _Keyed(histories, keys, item_of_key)
        columns = event_columns(contract, pa.Table.from_batches([history]))
        histories = Histories(np.array([0, len(places)]), places, columns)
        return _Keyed(histories, items.places, items.known.vocabulary_row)

    def _sketch_of(self, user: UserRow, micros: int) -> ReadSketch | None:
        """What the user's sketch says of candidates at the request's time; nothing where it counts
        events that came later, which cannot be taken out.
        """
        if user.sketch is None or user.sketch.as_of >= micros:
            return None
        sketch, layout = user.sketch.sketch, user.sketch.sketch.layout
        return lambda chosen, offsets, codes: sketch.read(layout.positions(codes), micros)

    def _tokens_of(self, user: UserRow) -> GatherTokens | None:
        """The user's stored tokens for the model; without any, a model with a stage 1 reads the
        short history.

        Raises:
            ValueError: tokens of another version or shape; the reader lets none through, so this is
                a fault of ours.
        """
        bundle = self.bundle
        if bundle.tokens is None or (user.tokens is None and bundle.makes_tokens):
            return None
        if user.tokens is None or user.tokens.tokens_SD is None:
            nothing = np.zeros((1, *bundle.token_shape), np.float32)
            return lambda chosen: (nothing, np.array([False]))
        found = user.tokens.tokens_SD
        if (user.tokens.fingerprint, found.shape) != (bundle.tokens, bundle.token_shape):
            raise ValueError(
                f"tokens of version {user.tokens.fingerprint} and shape {found.shape} came to bundle {bundle.name}, which "
                f"accepts {bundle.tokens} of shape {bundle.token_shape}"
            )
        return lambda chosen: (found[None], np.array([True]))

    def _score(
        self,
        encoded: Encoded,
        clock: Clock,
        user_id: Id | None = None,
        go_on: Callable[[int], None] = lambda left: None,
    ) -> np.ndarray:
        """Logits, candidates × tasks: piece by piece against one encoded user, the same bits as at once.

        Args:
            user_id: whose encoding is kept; default: nobody's.
            go_on: see `answer`.
        """
        encoder, model = self.bundle.encoder, self.bundle.model
        batch = encoder.collate(encoded, np.array([0]))
        clock.lap("features")
        with self._model_lock, torch.inference_mode():
            if user_id is None or self.states is None:
                state = model.encode_user(batch.user)
            else:
                state = self.states.of(user_id, batch.user)
            clock.lap("encode_user")
        total = batch.candidates.item_BC.shape[1]
        pieces = []
        for start in range(0, total, PIECE):
            if start:
                go_on(-(-(total - start) // PIECE))
            chosen = batch.candidates.select(slice(start, start + PIECE))
            with self._model_lock, torch.inference_mode():
                pieces.append(model.score(state, chosen)[0])
        logits: np.ndarray[Any, Any] = torch.cat(pieces).numpy()
        clock.lap("score")
        return logits


def _newest_of(user: UserRow) -> int:
    """Time of the newest event that anything of a user knows, microseconds; -1 of nobody."""
    known = [-1]
    if user.history is not None and user.history.num_rows:
        newest = user.history["event_timestamp"][-1].as_py()
        known.append((newest - EPOCH) // timedelta(microseconds=1))
    if user.sketch is not None:
        known.append(user.sketch.as_of)
    if user.tokens is not None:
        known.append(user.tokens.as_of)
    return max(known)


def why_unfit(user: UserRow, at: int) -> Degraded | None:
    """Why a user's stored tokens must not be ranked with at this time, microseconds; None where they may,
    or where there are none.
    """
    if user.tokens is not None and user.tokens.as_of >= at:
        return Degraded.NEWER_TOKENS  # they know what comes after the request
    return Degraded.TOKENS_OF_ANOTHER_PAST if user.tokens_know_another_past else None


class _Keyed(NamedTuple):
    """A request's history and candidates by item key, and each key's row of the vocabulary."""

    histories: Histories
    candidate_keys: np.ndarray
    item_of_key: np.ndarray


class Clock:
    """Milliseconds by stage, each from the end of the one before.

    Args:
        arrived: `time.perf_counter()` at the beginning; default: now.
    """

    def __init__(self, arrived: float | None = None) -> None:
        self._last = time.perf_counter() if arrived is None else arrived
        self.laps: dict[str, float] = {}

    def lap(self, name: str) -> None:
        """A stage ends here."""
        now = time.perf_counter()
        self.laps[name] = round((now - self._last) * 1000, 3)
        self._last = now


def _stats_before(
    contract: Contract, stats: dict[str, Any], history: pa.RecordBatch, kept: int
) -> dict[str, Any]:
    """A user's statistics without the events at or after the request, as they were before those
    came.

    Where no packed event is earlier than the request, nothing is known: older ones are not packed,
    and may be later too.
    """
    later = history.slice(kept)
    if not later.num_rows or stats["history_end"] is None:
        return {}
    if not kept:
        names = ("history_end", "history_digest", "first_event_s", "other_events")
        return dict.fromkeys((*names, *mean_names(contract)))
    primary = later["action"].to_numpy() == 0
    left = {
        "history_end": stats["history_end"] - later.num_rows,
        "other_events": stats["other_events"] - int((~primary).sum()),
    }
    if not contract.spec.stat_value:
        return left
    mean, number = mean_names(contract)
    values = primary_values(contract, later)
    valued = (stats[number] or 0) - len(values)
    total = (stats[mean] or 0.0) * (stats[number] or 0) - float(values.sum())
    return left | {number: valued, mean: total / valued if valued else None}


def context_columns(contract: Contract, context: RankContext | None) -> dict[str, pa.Array]:
    """What a request says of its circumstances, as columns of one row; what it leaves out is
    missing.
    """
    return {
        c.name: pa.array([getattr(context, c.name, None)], arrow_type(c.dtype))
        for c in contract.spec.context_features
    }
