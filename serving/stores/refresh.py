"""New events of one user into everything that the online store holds of them: history, sketch,
statistics, summary tokens.

The record is read, what follows from the events is computed, and the record is replaced as a whole if
it is still unchanged; else all begins again from what is there now (`online_users.py`). Tokens
go from stored state to stored state, without reading the old events. History and statistics are what
the jobs would build (`feature_repo/history/record.py`), but for the last digits of a mean and of counts that fade.
"""

from __future__ import annotations

import logging
import random
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from feature_repo.contract.arrow import arrow_type, history_schema, micros
from feature_repo.contract.contract import Contract
from feature_repo.contract.schema import EVENT_TIMESTAMP
from feature_repo.errors import ExpectedError
from feature_repo.history import user_stats
from feature_repo.history.envelope import Envelope, EnvelopeError, Kind, from_bytes
from feature_repo.history.history import as_numbers, extended_digest, from_batches
from feature_repo.history.record import ARRIVED, Record, extended, with_arrival
from feature_repo.home.known_users import KnownUsers
from feature_repo.home.tables import DamagedPartError, StaleTableError
from feature_repo.raw.acknowledged import history_events
from feature_repo.store.event_log import Entry, to_text
from feature_repo.store.online_tokens import OnlineTokens
from feature_repo.store.online_users import (
    HISTORY,
    STATS,
    TOKENS,
    NewRow,
    UserRecord,
    user_records,
)
from modeling.bundle.summary import envelopes, stored_summary
from modeling.summaries.summariser import Summariser
from serving.stores.items import item_columns

if TYPE_CHECKING:
    from feast import FeatureStore


logger = logging.getLogger(__name__)
# Why tokens do not know an event
WITHOUT_TOKENS = ("no_state", "damaged", "late")
# How long a call goes on where others change the same user
ADD_S = 2.0
# Longest pause before it begins again, seconds
PAUSE_S = 0.002


class NoStateError(ExpectedError, LookupError):
    """A user has no stored state of this token version to go on from."""


class RefusedError(ExpectedError, RuntimeError):
    """The store holds newer tokens by now."""


class CannotTellError(ExpectedError, RuntimeError):
    """Whether a user without a record is new, or the store lost them, cannot be read: nothing was added."""


class BusyUserError(ExpectedError, RuntimeError):
    """Others changed the user all the time: nothing was added."""


@dataclass(frozen=True)
class NewTokens:
    """A user's tokens and state as they are stored, and since when, microseconds."""

    tokens: bytes
    state: bytes | None
    computed_at: int

    @property
    def row(self) -> NewRow:
        """The same as a row of the online store."""
        return NewRow({"tokens": self.tokens, "state": self.state}, self.computed_at)


class Refresher:
    """Takes new events into stored tokens.

    Args:
        summariser: of the bundle whose tokens they are; its stage 1 must stream.
        online: where tokens are stored.
        kind: how tokens are stored.

    Raises:
        ValueError: stage 1 does not stream.
    """

    def __init__(
        self, summariser: Summariser, online: OnlineTokens, contract: Contract, kind: Kind = "fp16"
    ) -> None:
        if not summariser.streams:
            raise ValueError(
                "only a streaming stage 1 (causal=True) takes new events: run the summary_tokens job instead"
            )
        self._summariser = summariser
        self._online = online
        self._contract = contract
        self._kind = kind

    @property
    def version(self) -> str:
        """The token version that it makes."""
        return self._summariser.fingerprint

    def refresh(
        self, user_id: int | str, new_events: list[dict[str, Any]], computed_at: int | None = None
    ) -> Envelope:
        """Add a user's new events, oldest first, and store what comes of it.

        Args:
            new_events: columns of `contract.history_columns`, none earlier than those in the tokens.
            computed_at: microseconds; the clock unless given.

        Raises:
            NoStateError: nothing is stored for the user.
            EnvelopeError: the stored tokens are damaged, or of a different version.
            RefusedError: newer tokens were written meanwhile; nothing was stored.
            ValueError: no new event, one that is not later than the last, or a value of the wrong
                type.
        """
        ((tokens, state),) = self._online.read(self.version, [user_id])
        made = self.extended(user_id, tokens, state, new_events, computed_at)
        stored = ([made.tokens], [made.state], made.computed_at)
        if not self._online.write(self.version, [user_id], *stored):
            raise RefusedError(
                f"tokens of user {user_id!r} were replaced by newer ones meanwhile: refresh again from those"
            )
        return from_bytes(made.tokens, user_id)

    def extended(
        self,
        user_id: int | str,
        tokens: bytes | None,
        state: bytes | None,
        new_events: list[dict[str, Any]],
        computed_at: int | None = None,
    ) -> NewTokens:
        """Stored tokens and state with new events; nothing is read or written.

        Raises:
            NoStateError, EnvelopeError, ValueError: see `refresh`.
        """
        version = self.version
        if tokens is None or state is None:
            raise NoStateError(
                f"user {user_id!r} has no stored state of token version {version}: run the summary_tokens job"
            )
        # 1. Tokens and state must be of one moment and of this version.
        before = from_bytes(tokens, user_id)
        kept = from_bytes(state, user_id)
        if before.tombstone or kept.tombstone:
            raise NoStateError(f"user {user_id!r} has no tokens of version {version} any more")
        if (
            not before.fingerprint == kept.fingerprint == version
            or before.num_events != kept.num_events
        ):
            raise EnvelopeError(
                f"user {user_id!r}: tokens are of version {before.fingerprint} with {before.num_events} events, their state of "
                f"{kept.fingerprint} with {kept.num_events}; expected both of {version}: run the summary_tokens job"
            )
        # 2. New events must follow on the ones in the tokens.
        batch = pa.RecordBatch.from_pylist(new_events, schema=history_schema(self._contract))
        histories, _ = from_batches(
            self._contract, [batch], pa.array([], batch.schema.field(0).type)
        )
        times = histories.times
        shown = set(histories.columns["action"].tolist()) - set(self._contract.history_actions)
        if shown:
            raise ValueError(
                f"new events of user {user_id!r} hold impressions, which are in no history"
            )
        if not len(times) or times[0] < kept.as_of or (np.diff(times) < 0).any():
            raise ValueError(
                f"new events of user {user_id!r} must not be earlier than {kept.as_of} µs, and in the order of time, got {times.tolist()}"
            )
        # 3. From state to state, without reading the old events.
        summary = self._summariser.extended(
            stored_summary(before, kept), histories, self._codes(batch)
        )
        digest = extended_digest(self._contract, before.digest, batch)
        at = time.time_ns() // 1000 if computed_at is None else computed_at
        at = max(at, before.computed_at + 1)
        return NewTokens(
            *envelopes(summary, 0, user_id, version, at, self._kind, digest), computed_at=at
        )

    def begun(self, user_id: int | str, events: pa.Table, not_before: int = 0) -> NewTokens:
        """Tokens and state of a user's whole history, of whom there are none yet.

        Args:
            events: all of them, oldest first.
            not_before: microseconds; the tokens are computed later than this.
        """
        batch = events.combine_chunks().to_batches()[0]
        histories, _ = from_batches(
            self._contract, [batch], pa.array([], batch.schema.field(0).type)
        )
        # A stream's tokens depend on no moment but those of the events.
        summary = self._summariser.whole(histories, self._codes(batch), np.array([0]))
        digest = extended_digest(self._contract, 0, batch)
        at = max(time.time_ns() // 1000, not_before + 1)
        return NewTokens(
            *envelopes(summary, 0, user_id, self.version, at, self._kind, digest), computed_at=at
        )

    def _codes(self, batch: pa.RecordBatch) -> np.ndarray:
        """Indices of a batch's items, in the order of the item keys: of first occurrence."""
        item = self._contract.item.join_key
        return self._summariser.encoder.items.indices_of(batch[item].unique())


class UserMemory:
    """Updates of all that the online store remembers of users, by new events.

    Example:
        >>> memory = UserMemory(store, contract)
        >>> memory.add(12680, [{"item_id": "22726", "action": 0, "event_timestamp": now, "quantity": 1.0, "unit_price": 3.5}])

    Args:
        refresher: of the summary tokens; without one these are left as they are, and are stale.
        known: says whether a user without a record ought to have one; default: each is taken for new.
    """

    def __init__(
        self,
        store: FeatureStore,
        contract: Contract,
        refresher: Refresher | None = None,
        known: KnownUsers | None = None,
    ) -> None:
        self._known = known
        self._said_unknown = False
        self._store = store
        self._contract = contract
        self._refresher = refresher
        self._records = user_records(store, contract, refresher.version if refresher else None)
        # Why tokens of a user do not know the newest events, and how often.
        self.without_tokens: Counter[str] = Counter()

    @property
    def has_log(self) -> bool:
        """Whether the next batch knows what is added."""
        return self._records.has_log

    def read(self, user_id: int | str) -> UserRecord:
        """Read a user's record at one moment."""
        return self._records.read(user_id)

    def close(self) -> None:
        self._records.close()

    def add(
        self,
        user_id: int | str,
        new_events: list[dict[str, Any]],
        refuse: Callable[[], None] = lambda: None,
    ) -> Added:
        """Add a user's new events, in any order, to history, sketch, statistics and tokens at once, and to the log
        of what is acknowledged; what an interrupted writer left behind is made whole on the way. One that is
        there already, the same item, action and time, is not added. Of a user whose record the store has lost, the
        history begins anew, and says that it is incomplete.

        Args:
            new_events: columns of `contract.history_columns`, and what else the log is to hold; impressions among
                them are left out.
            refuse: raises where this user's events are not to be added; asked before each attempt.

        Raises:
            HistoryError: the stored history is damaged.
            BusyUserError: others changed the user for `ADD_S` seconds; nothing was added.
            CannotTellError: whether a user without a record is new cannot be read; nothing was added.
        """
        until = time.monotonic() + ADD_S
        while True:
            refuse()
            record = self._records.read(user_id)
            after = self._after(record, new_events)
            if not after.rows and not after.entries:
                return after.taken
            if self._records.swap(record, after.rows, after.entries):
                return after.taken
            if time.monotonic() > until:
                raise BusyUserError(
                    f"user {user_id!r} was changed by others for {ADD_S:g} s; nothing was added"
                )
            time.sleep(random.uniform(0, PAUSE_S))  # noqa: S311  # so that two do not meet again

    def _after(self, record: UserRecord, new_events: list[dict[str, Any]]) -> _After:
        """Return a user's record with new events."""
        first = max(time.time_ns() // 1000, record.last + 1)
        stats = record[STATS]
        before = Record(record[HISTORY]["history"], record[HISTORY]["sketch"], stats)
        numbers = range(first, first + len(new_events))
        events = with_arrival(self._contract, new_events, numbers)
        is_lost = before.is_absent and self._ought_to_exist(record.user_id)
        if before.is_absent and not is_lost and record.last:
            # A new user, all of whose events are in the log: the record is gone, and is made of these.
            events = pa.concat_tables([self._logged_events(record.user_id), events])
        found = extended(
            self._contract, record.user_id, before, events, self._remembered, is_lost=is_lost
        )
        rows: dict[str, NewRow] = {}
        if found.added.num_rows:
            values = {"history": found.record.history, "sketch": found.record.sketch}
            rows[HISTORY] = NewRow(values, found.known)
        if found.record.stats is not stats:
            last = int(micros(found.packed[EVENT_TIMESTAMP])[-1]) + 1
            rows[STATS] = NewRow(found.record.stats, max(found.known, last))
        digest = found.record.stats[user_stats.DIGEST]
        if not found.record.is_incomplete:
            made = self._tokens_after(record, found.packed, found.counted, digest)
            if made is not None:
                rows[TOKENS] = made.row
        # Of these events alone: others may have come out of the log.
        added = [n for n in found.added[ARRIVED].to_pylist() if n >= first]
        waiting = [n for n in found.waiting[ARRIVED].to_pylist() if n >= first]
        entries = [
            Entry(record.user_id, number, to_text(new_events[number - first]))
            for number in sorted([*added, *waiting])
        ]
        return _After(rows, entries, Added(len(added), len(waiting)))

    def _ought_to_exist(self, user_id: int | str) -> bool:
        """Return whether the jobs sent a record of a user of whom there is none, or nothing says that they did not."""
        if self._known is None:
            return False
        try:
            known = self._known.has(user_id)
        except (OSError, DamagedPartError, StaleTableError) as error:
            raise CannotTellError(
                f"whether a user without a record is new cannot be read ({error}); nothing was added"
            ) from error
        if known is None and not self._said_unknown:
            self._said_unknown = True
            logger.warning(
                "no tables here say which users there are: histories of users without a record begin with history_incomplete until "
                "`python -m beam_jobs materialize` has run in a home that this server reads"
            )
        return known is not False

    def _logged_events(self, user_id: int | str) -> pa.Table:
        """A user's events that no batch knows yet, as `extended` takes them."""
        (logged,) = self._records.logged([user_id])
        numbers = [entry.number for entry in logged.entries]
        texts = [entry.event for entry in logged.entries]
        return history_events(self._contract, user_id, numbers, texts)

    def _tokens_after(
        self, record: UserRecord, packed: pa.Table, counted: int, digest: int | None
    ) -> NewTokens | None:
        """Tokens that know the history; None where they do so already, and where only the job can make
        them: the answer names it.

        Args:
            digest: of the whole history.
        """
        if self._refresher is None or not counted:
            return None
        tokens = record[TOKENS]["tokens"]
        state = record[TOKENS]["state"]
        try:
            stored = None if tokens is None else from_bytes(tokens, record.user_id)
            # 1. Without tokens, begin only where the whole history is at hand.
            if stored is None or stored.tombstone:
                if not self._is_whole(packed, counted, digest):
                    self.without_tokens["no_state"] += 1
                    return None
                return self._refresher.begun(
                    record.user_id, packed, stored.computed_at if stored else 0
                )
            # 2. With tokens, add the events that they lack.
            behind = counted - stored.num_events
            # Either nothing is lacking, or more than is packed, which only the job can add.
            if not 0 < behind <= packed.num_rows:
                return None
            lacking = packed.slice(packed.num_rows - behind).combine_chunks()
            if extended_digest(self._contract, stored.digest, lacking) == digest:
                return self._refresher.extended(record.user_id, tokens, state, lacking.to_pylist())
            # 3. A late event stands before some that they know: begin anew, or leave them to the job.
            if self._is_whole(packed, counted, digest):
                return self._refresher.begun(record.user_id, packed, stored.computed_at)
            self.without_tokens["late"] += 1
        except NoStateError:
            self.without_tokens["no_state"] += 1
        except EnvelopeError:
            self.without_tokens["damaged"] += 1
        return None

    def _is_whole(self, packed: pa.Table, counted: int, digest: int | None) -> bool:
        """Return whether the packed events are the whole history."""
        # The digest also tells a history that has the right length but other events.
        return counted == packed.num_rows and digest == extended_digest(self._contract, 0, packed)

    def _remembered(self, events: pa.Table) -> list[np.ndarray]:
        """Codes of each event's item in the columns that sketches count, as the store has them."""
        columns = self._contract.remembered
        item = self._contract.item.join_key
        if not columns:
            return []
        view_of = {column.name: view for view, column in item_columns(self._contract)}
        refs = [f"{view_of[column.name]}:{column.name}" for column in columns]
        asked = [{item: key} for key in events[item].to_pylist()]
        found = self._store.get_online_features(refs, asked).to_dict()
        return [
            as_numbers(column, pa.array(found[column.name], arrow_type(column.dtype)))
            for column in columns
        ]


@dataclass(frozen=True)
class Added:
    """What became of events.

    Args:
        added: to all that is stored of the user.
        waiting: for the next batch: they are older than all that the store holds of a longer past.
    """

    added: int
    waiting: int


@dataclass(frozen=True)
class _After:
    """Rows of a user by view that replace the stored ones, and entries of the log."""

    rows: dict[str, NewRow]
    entries: list[Entry]
    taken: Added
