"""New events of one user into everything that the online store holds of them: history, sketch,
statistics, summary tokens.

The record is read, what follows from the events is computed, and the record is replaced as a whole if
it is still unchanged; else all begins again from what is there now (`online_users.py`). Tokens
go from stored state to stored state, without reading the old events. History and statistics are what
the jobs would build, but for the last digits of a mean; the next run of the jobs replaces them.
"""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from feature_repo.contract.arrow import (
    TIMESTAMP,
    arrow_type,
    history_schema,
    micros,
    value_codes,
)
from feature_repo.contract.contract import Contract
from feature_repo.contract.schema import EVENT_TIMESTAMP
from feature_repo.errors import ExpectedError
from feature_repo.history import user_stats
from feature_repo.history.envelope import Envelope, EnvelopeError, Identity, Kind, from_bytes
from feature_repo.history.history import (
    as_numbers,
    extended_digest,
    from_batches,
    pack,
    unpack,
)
from feature_repo.history.sketch import Layout, Sketch, SketchError
from feature_repo.history.sketch import from_bytes as sketch_of
from feature_repo.store.online_tokens import OnlineTokens
from feature_repo.store.online_users import (
    HISTORY,
    STATS,
    TOKENS,
    NewRow,
    UserRecord,
    user_records,
)
from modeling.bundle.summary import Summariser, envelopes, stored_summary
from serving.stores.items import item_columns

if TYPE_CHECKING:
    from feast import FeatureStore


# Why tokens do not know an event
WITHOUT_TOKENS = ("no_state", "damaged")
# How long a call goes on where others change the same user
ADD_S = 2.0
# Longest pause before it begins again, seconds
PAUSE_S = 0.002


class NoStateError(ExpectedError, LookupError):
    """A user has no stored state of this token version to go on from."""


class RefusedError(ExpectedError, RuntimeError):
    """The store holds newer tokens by now."""


class LateError(ExpectedError, ValueError):
    """An event is earlier than what is known of its user."""


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
    """

    def __init__(
        self, store: FeatureStore, contract: Contract, refresher: Refresher | None = None
    ) -> None:
        self._store = store
        self._contract = contract
        self._refresher = refresher
        self._records = user_records(store, contract, refresher.version if refresher else None)
        # Why tokens of a user do not know the newest events, and how often.
        self.without_tokens: Counter[str] = Counter()

    def read(self, user_id: int | str) -> UserRecord:
        """Read a user's record at one moment; to be put back by `put_back`."""
        return self._records.read(user_id)

    def close(self) -> None:
        self._records.close()

    def put_back(self, record: UserRecord, known: int) -> None:
        """Store a record as it once was read, whatever is there now.

        Args:
            known: since when, microseconds.
        """
        rows = {view: NewRow(values, known) for view, values in record.views.items()}
        while not self._records.swap(self._records.read(record.user_id), rows):
            pass

    def add(
        self,
        user_id: int | str,
        new_events: list[dict[str, Any]],
        refuse: Callable[[], None] = lambda: None,
    ) -> int:
        """Add a user's new events, oldest first, to history, sketch, statistics and tokens at once; what
        an interrupted writer left behind is made whole on the way. Returns how many were added: one
        that is there already, the same item, action and time, is not.

        Args:
            new_events: columns of `contract.history_columns`, none earlier than what is stored;
                impressions among them are left out.
            refuse: raises where this user's events are not to be added; asked before each attempt.

        Raises:
            HistoryError: the stored history is damaged.
            LateError: an event is earlier than one that is stored.
            BusyUserError: others changed the user for `ADD_S` seconds; nothing was added.
        """
        until = time.monotonic() + ADD_S
        while True:
            refuse()
            record = self._records.read(user_id)
            after = self._after(record, new_events)
            if not after.rows or self._records.swap(record, after.rows):
                return after.added
            if time.monotonic() > until:
                raise BusyUserError(
                    f"user {user_id!r} was changed by others for {ADD_S:g} s; nothing was added"
                )
            time.sleep(random.uniform(0, PAUSE_S))  # noqa: S311  # so that two do not meet again

    def _after(self, record: UserRecord, new_events: list[dict[str, Any]]) -> _After:
        """Return a user's record with new events."""
        acted = self._contract.history_actions
        before = self._events(record)
        # Of all that is packed, only what happened at the same moments can be the same.
        stamps = pa.array([event[EVENT_TIMESTAMP] for event in new_events], TIMESTAMP)
        same_moment = before.filter(pc.is_in(before[EVENT_TIMESTAMP], stamps))
        seen = {self._identity(event) for event in same_moment.to_pylist()}
        # What a user was shown is in no history.
        unseen = {self._identity(event): event for event in new_events if event["action"] in acted}
        new_events = [event for key, event in unseen.items() if key not in seen]
        # A history without a sketch does not say how many events it stands for; the statistics do.
        counted = self._counted(record)
        rows: dict[str, NewRow] = {}
        if new_events:
            new = pa.Table.from_pylist(new_events, schema=history_schema(self._contract))
            times = micros(new[EVENT_TIMESTAMP])
            last = micros(before[EVENT_TIMESTAMP])[-1] if before.num_rows else -1
            if times[0] < last or (np.diff(times) < 0).any():
                raise LateError(
                    f"new events of user {record.user_id!r} must not be earlier than {last} µs, and in order, got {times.tolist()}"
                )
            before = self._kept(pa.concat_tables([before, new]))
            rows[HISTORY] = self._history_row(record, before, new, counted)
            counted += new.num_rows
        return _After(rows | self._caught_up(record, before, counted), len(new_events))

    def _identity(self, event: dict[str, Any]) -> tuple[Any, ...]:
        return event[self._contract.item.join_key], event["action"], event[EVENT_TIMESTAMP]

    def _events(self, record: UserRecord) -> pa.Table:
        packed = record[HISTORY]["history"]
        batches = [] if packed is None else [unpack(self._contract, record.user_id, packed)]
        return pa.Table.from_batches(batches, history_schema(self._contract))

    def _counted(self, record: UserRecord) -> int:
        """Count the events that the stored history stands for, with those that are no longer packed."""
        try:
            _, identity = sketch_of(
                Layout.of(self._contract), record[HISTORY]["sketch"] or b"", record.user_id
            )
        except SketchError:
            return record[STATS]["history_end"] or 0
        return identity.num_events

    def _kept(self, events: pa.Table) -> pa.Table:
        """As many of the newest as are packed."""
        number = self._contract.spec.num_history_online
        return events.slice(max(events.num_rows - number, 0)).combine_chunks()

    def _history_row(
        self, record: UserRecord, kept: pa.Table, new: pa.Table, counted: int
    ) -> NewRow:
        """The packed history and its sketch.

        Args:
            kept: the events that are packed, the new ones among them.
            counted: events before the new ones.
        """
        sketch = sketch_after(
            self._contract,
            record.user_id,
            record[HISTORY]["sketch"],
            counted,
            record[STATS]["history_digest"] or 0,
            new,
            self._remembered(new),
        )
        values = {"history": pack(self._contract, record.user_id, kept), "sketch": sketch}
        return NewRow(values, int(micros(new[EVENT_TIMESTAMP])[-1]) + 1)

    def _caught_up(self, record: UserRecord, packed: pa.Table, counted: int) -> dict[str, NewRow]:
        """Return statistics and tokens that know the history; if they lag further than it reaches, they are the
        jobs' to mend.
        """
        rows: dict[str, NewRow] = {}
        behind = counted - (record[STATS]["history_end"] or 0)
        if 0 < behind <= packed.num_rows:
            lacking = packed.slice(packed.num_rows - behind).combine_chunks()
            known = int(micros(lacking[EVENT_TIMESTAMP])[-1]) + 1
            rows[STATS] = NewRow(user_stats.add(self._contract, record[STATS], lacking), known)
        digest = (rows[STATS].values if STATS in rows else record[STATS])["history_digest"]
        made = self._tokens_after(record, packed, counted, digest)
        return rows if made is None else {**rows, TOKENS: made.row}

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
                whole = counted == packed.num_rows
                # The digest also tells a history that has the right length but other events.
                if not whole or digest != extended_digest(self._contract, 0, packed):
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
            lacking = packed.slice(packed.num_rows - behind).to_pylist()
            return self._refresher.extended(record.user_id, tokens, state, lacking)
        except NoStateError:
            self.without_tokens["no_state"] += 1
        except EnvelopeError:
            self.without_tokens["damaged"] += 1
        return None

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
class _After:
    """Rows of a user by view that replace the stored ones, and how many events are new in them."""

    rows: dict[str, NewRow]
    added: int


def sketch_after(
    contract: Contract,
    user_id: int | str,
    stored: bytes | None,
    counted: int,
    digest: int,
    events: pa.Table,
    remembered: Sequence[np.ndarray],
) -> bytes | None:
    """A user's sketch with new events; None where earlier ones were in none that could be read, since
    a sketch of a part would count too little.

    Args:
        counted: events before the new ones.
        digest: of those, where the sketch does not say it.
        remembered: codes of the events' items in the columns that sketches count.
    """
    # An empty sketch is right only where nothing was counted before.
    layout = Layout.of(contract)
    times = micros(events[EVENT_TIMESTAMP])
    if stored is not None:
        try:
            sketch, identity = sketch_of(layout, stored, user_id)
            digest = identity.digest
        except SketchError:
            return None
    elif counted:
        return None
    else:
        sketch = Sketch(layout)
    # A sketch counts the primary action alone.
    chosen = np.flatnonzero(events["action"].to_numpy() == 0)
    codes = [value_codes(events[contract.item.join_key]), *remembered]
    sketch.add(layout.positions([c[chosen] for c in codes]), times[chosen])
    newest = int(times[-1])
    identity = Identity(
        layout.fingerprint,
        newest,
        newest + 1,
        counted + events.num_rows,
        extended_digest(contract, digest, events),
    )
    return sketch.to_bytes(user_id, identity)
