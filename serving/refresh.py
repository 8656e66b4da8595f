"""New events of one user into everything that the online store holds of them: history, statistics,
summary tokens.

What a stream of events would call for each user. Tokens go from stored state to stored state,
without reading the old events, and are written at a newer time, so that on Redis two that refresh
the same user at once cannot leave the older ones. History and statistics are what the jobs would
build, but for the last digits of a mean; the next run of the jobs replaces them.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from feature_repo.arrow import (
    EPOCH,
    MICROS,
    TIMESTAMP,
    arrow_schema,
    arrow_type,
    history_schema,
    micros,
    value_codes,
)
from feature_repo.contract import Contract
from feature_repo.envelope import Envelope, EnvelopeError, Identity, Kind, from_bytes
from feature_repo.errors import ExpectedError
from feature_repo.history import (
    as_numbers,
    extended_digest,
    from_batches,
    mean_names,
    pack,
    primary_values,
    unpack,
)
from feature_repo.online_rows import write_rows
from feature_repo.online_tokens import OnlineTokens
from feature_repo.schema import CREATED_TIMESTAMP, EVENT_TIMESTAMP
from feature_repo.sketch import Layout, Sketch, SketchError
from feature_repo.sketch import from_bytes as sketch_of
from modeling.summary import Summariser, envelopes, stored_summary
from serving.items import item_columns

if TYPE_CHECKING:
    from feast import FeatureStore


logger = logging.getLogger(__name__)

VIEWS = ("user_history", "user_stats")  # what events change


class NoStateError(ExpectedError, LookupError):
    """A user has no stored state of this token version to go on from."""


class RefusedError(ExpectedError, RuntimeError):
    """The store holds newer tokens by now."""


class LateError(ExpectedError, ValueError):
    """An event is earlier than what is known of its user."""


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
        self._summariser, self._online, self._contract, self._kind = (
            summariser,
            online,
            contract,
            kind,
        )

    def known(self, user_id: int | str) -> int:
        """How many events the stored tokens stand for.

        Raises:
            NoStateError: there are none.
            EnvelopeError: they are damaged.
        """
        version = self._summariser.fingerprint
        ((tokens, _),) = self._online.read(version, [user_id])
        if tokens is None:
            raise NoStateError(
                f"user {user_id!r} has no stored state of token version {version}: run the summary_tokens job"
            )
        return from_bytes(tokens, user_id).num_events

    def refresh(
        self, user_id: int | str, new_events: list[dict[str, Any]], computed_at: int | None = None
    ) -> Envelope:
        """Add a user's new events, oldest first, and store what comes of it.

        Args:
            new_events: columns of `contract.history_columns`, none earlier than those in the tokens.
            computed_at: microseconds; the clock unless given.

        Raises:
            NoStateError: nothing is stored for the user.
            EnvelopeError: what is stored is damaged, or of another token version.
            RefusedError: somebody wrote newer tokens meanwhile; nothing was stored.
            ValueError: no new event, one that is not later than the last, or a value of the wrong
                type.
        """
        version = self._summariser.fingerprint
        ((tokens, state),) = self._online.read(version, [user_id])
        if tokens is None or state is None:
            raise NoStateError(
                f"user {user_id!r} has no stored state of token version {version}: run the summary_tokens job"
            )
        before, kept = from_bytes(tokens, user_id), from_bytes(state, user_id)
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
        item = self._contract.item.join_key
        codes = self._summariser.encoder.items.indices_of(
            batch[item].unique()
        )  # in the order of the item keys: of first occurrence
        summary = self._summariser.extended(stored_summary(before, kept), histories, codes)
        digest = extended_digest(self._contract, before.digest, before.num_events, batch)
        at = time.time_ns() // 1000 if computed_at is None else computed_at
        at = max(at, before.computed_at + 1)
        stored, streams = envelopes(summary, 0, user_id, version, at, self._kind, digest)
        if not self._online.write(version, [user_id], [stored], [streams], at):
            raise RefusedError(
                f"tokens of user {user_id!r} were replaced by newer ones meanwhile: refresh again from those"
            )
        return from_bytes(stored, user_id)


class UserMemory:
    """What the online store remembers of users, taken further by new events.

    Example:
        >>> memory = UserMemory(store, contract)
        >>> memory.add(12680, [{"item_id": "22726", "action": 0, "event_timestamp": now, "quantity": 1.0, "unit_price": 3.5}])

    Args:
        refresher: of the summary tokens; without one these are left as they are, and are stale.
    """

    def __init__(
        self, store: FeatureStore, contract: Contract, refresher: Refresher | None = None
    ) -> None:
        self._store, self._contract, self._refresher = store, contract, refresher
        # Read once: no event waits for the registry.
        self._views = {view: store.get_feature_view(view) for view in VIEWS}

    def read(self, user_id: int | str) -> dict[str, dict[str, Any]]:
        """What is stored of a user, by view; to be put back by `write`."""
        views = {view: [c.name for c in self._contract.table(view).columns] for view in VIEWS}
        refs = [f"{view}:{name}" for view, names in views.items() for name in names]
        asked = [{self._contract.user.join_key: user_id}]
        rows = self._store.get_online_features(refs, asked).to_dict()
        return {view: {name: rows[name][0] for name in names} for view, names in views.items()}

    def write(self, user_id: int | str, rows: dict[str, dict[str, Any]], known: int) -> None:
        """Store rows of a user, by view.

        Args:
            known: since when, microseconds.
        """
        for view, values in rows.items():
            table = self._contract.table(view)
            stamp = EPOCH + timedelta(microseconds=known)
            row = {
                self._contract.user.join_key: user_id,
                **values,
                EVENT_TIMESTAMP: stamp,
                CREATED_TIMESTAMP: stamp,
            }
            rows_of_view = pa.Table.from_pylist([row], schema=arrow_schema(table))
            write_rows(self._store, view, rows_of_view, self._views[view])

    def add(self, user_id: int | str, new_events: list[dict[str, Any]]) -> int:
        """Add a user's new events, oldest first: to the history, with the sketch that counts it; then
        statistics and tokens are brought up to it, which makes whole what an earlier call left half
        done. Returns how many were added: one that is there already, the same item, action and time,
        is not.

        Args:
            new_events: columns of `contract.history_columns`, none earlier than what is stored;
                impressions among them are left out.

        Raises:
            HistoryError: the stored history is damaged.
            LateError: an event is earlier than one that is stored.
        """
        acted = self._contract.history_actions
        stored = self.read(user_id)
        before = self._events(user_id, stored)
        # Of all that is packed, only what happened at the same moments can be the same.
        stamps = pa.array([event[EVENT_TIMESTAMP] for event in new_events], TIMESTAMP)
        same_moment = before.filter(pc.is_in(before[EVENT_TIMESTAMP], stamps))
        seen = {self._identity(event) for event in same_moment.to_pylist()}
        # What a user was shown is in no history.
        unseen = {self._identity(event): event for event in new_events if event["action"] in acted}
        new_events = [event for key, event in unseen.items() if key not in seen]
        # A history without a sketch does not say how many events it stands for; the statistics do.
        counted = self._counted(user_id, stored)
        if new_events:
            new = pa.Table.from_pylist(new_events, schema=history_schema(self._contract))
            times = micros(new[EVENT_TIMESTAMP])
            last = micros(before[EVENT_TIMESTAMP])[-1] if before.num_rows else -1
            if times[0] < last or (np.diff(times) < 0).any():
                raise LateError(
                    f"new events of user {user_id!r} must not be earlier than {last} µs, and in order, got {times.tolist()}"
                )
            whole = pa.concat_tables([before, new])
            self._write_history(user_id, stored, whole, new, counted)
            counted += new.num_rows
            before = self._kept(whole)
        self._catch_up(user_id, stored["user_stats"], before, counted)
        return len(new_events)

    def _identity(self, event: dict[str, Any]) -> tuple[Any, ...]:
        return event[self._contract.item.join_key], event["action"], event[EVENT_TIMESTAMP]

    def _events(self, user_id: int | str, stored: dict[str, dict[str, Any]]) -> pa.Table:
        """The packed events."""
        packed = stored["user_history"]["history"]
        batches = [] if packed is None else [unpack(self._contract, user_id, packed)]
        return pa.Table.from_batches(batches, history_schema(self._contract))

    def _counted(self, user_id: int | str, stored: dict[str, dict[str, Any]]) -> int:
        """How many events the stored history stands for, those that are no longer packed included."""
        try:
            _, identity = sketch_of(
                Layout.of(self._contract), stored["user_history"]["sketch"] or b"", user_id
            )
        except SketchError:
            return stored["user_stats"]["history_end"] or 0
        return identity.num_events

    def _kept(self, events: pa.Table) -> pa.Table:
        """As many of the newest as are packed."""
        number = self._contract.spec.num_history_online
        return events.slice(max(events.num_rows - number, 0)).combine_chunks()

    def _write_history(
        self,
        user_id: int | str,
        stored: dict[str, dict[str, Any]],
        whole: pa.Table,
        new: pa.Table,
        counted: int,
    ) -> None:
        """The packed history and its sketch, in one write.

        Args:
            counted: events before the new ones.
        """
        sketch = sketch_after(
            self._contract,
            user_id,
            stored["user_history"]["sketch"],
            counted,
            stored["user_stats"]["history_digest"] or 0,
            new,
            self._remembered(new),
        )
        row = {"history": pack(self._contract, user_id, self._kept(whole)), "sketch": sketch}
        self.write(user_id, {"user_history": row}, int(micros(new[EVENT_TIMESTAMP])[-1]) + 1)

    def _catch_up(
        self, user_id: int | str, stats: dict[str, Any], packed: pa.Table, counted: int
    ) -> None:
        """Bring statistics, then tokens, up to the history; those that lag further than it reaches are
        the jobs' to mend.
        """
        behind = counted - (stats["history_end"] or 0)
        if 0 < behind <= packed.num_rows:
            lacking = packed.slice(packed.num_rows - behind).combine_chunks()
            after = stats_after(self._contract, stats, lacking)
            self.write(
                user_id, {"user_stats": after}, int(micros(lacking[EVENT_TIMESTAMP])[-1]) + 1
            )
        if self._refresher is None:
            return
        try:
            behind = counted - self._refresher.known(user_id)
            if 0 < behind <= packed.num_rows:
                self._refresher.refresh(user_id, packed.slice(packed.num_rows - behind).to_pylist())
        except (NoStateError, RefusedError, EnvelopeError):
            # No tokens yet, newer ones, or damaged ones: the answer names it, and the job makes them.
            logger.exception("summary tokens do not know the newest events")

    def _remembered(self, events: pa.Table) -> list[np.ndarray]:
        """Codes of each event's item in the columns that sketches count, as the store has them."""
        columns, item = self._contract.remembered, self._contract.item.join_key
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
    layout, times = Layout.of(contract), micros(events[EVENT_TIMESTAMP])
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
    chosen = np.flatnonzero(events["action"].to_numpy() == 0)
    codes = [value_codes(events[contract.item.join_key]), *remembered]
    sketch.add(layout.positions([c[chosen] for c in codes]), times[chosen])
    newest = int(times[-1])
    identity = Identity(
        layout.fingerprint,
        newest,
        newest + 1,
        counted + events.num_rows,
        extended_digest(contract, digest, counted, events),
    )
    return sketch.to_bytes(user_id, identity)


def stats_after(contract: Contract, before: dict[str, Any], events: pa.Table) -> dict[str, Any]:
    """A user's statistics with new events; `before` holds nulls of whoever had none."""
    end, others = before["history_end"] or 0, before["other_events"] or 0
    primary = events["action"].to_numpy() == 0
    first = before["first_event_s"]
    after = {
        "history_end": end + events.num_rows,
        "history_digest": extended_digest(contract, before["history_digest"] or 0, end, events),
        "first_event_s": int(micros(events[EVENT_TIMESTAMP])[0] // MICROS)
        if first is None
        else first,
        "other_events": others + int((~primary).sum()),
    }
    if not contract.spec.stat_value:
        return after
    mean, number = mean_names(contract)
    values, valued = primary_values(contract, events), before[number] or 0
    total = (before[mean] or 0.0) * valued + float(values.sum())
    valued += len(values)
    return after | {number: valued, mean: total / valued if valued else None}
