"""A user's record with further events: the packed history, its sketch, and the statistics that the online store
holds of them, as the jobs would have built them had they known these events.

The server adds an event this way at the moment it is taken, `materialize` the ones that came after the tables were
built. Events may come in any order: one that is late takes its place by time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from feature_repo.contract.arrow import history_schema, micros, value_codes
from feature_repo.contract.contract import Contract
from feature_repo.contract.schema import EVENT_TIMESTAMP
from feature_repo.history import user_stats
from feature_repo.history.counts import UserCounts, from_bytes
from feature_repo.history.envelope import Identity
from feature_repo.history.history import extended_digest, pack, unpack
from feature_repo.history.sketch import Layout, SketchError

# Column of events: the moment at which each arrived, microseconds
ARRIVED = "__arrived"
# Codes of events' items in the columns that sketches count
Remembered = Callable[[pa.Table], Sequence[np.ndarray]]


@dataclass(frozen=True)
class Record:
    """What the online store holds of a user's events.

    Args:
        history: packed; None of a user without events.
        sketch: None where the store has no sketch that a new event could continue.
        stats: `user_stats` by name.
    """

    history: bytes | None
    sketch: bytes | None
    stats: Mapping[str, Any]

    @property
    def is_absent(self) -> bool:
        """True where nothing is stored of the user's events."""
        return self.history is None and self.stats[user_stats.END] is None

    @property
    def is_incomplete(self) -> bool:
        """True where the history holds only what came since the record was lost: it has no statistics and no sketch,
        which would say that this is all.
        """
        return past_was_lost(self.history, self.sketch, self.stats[user_stats.END])


def past_was_lost(history: bytes | None, sketch: bytes | None, end: int | None) -> bool:
    """Return whether a stored history begins after a past that the store has lost.

    Args:
        end: how many events the statistics know.
    """
    return history is not None and sketch is None and end is None


@dataclass(frozen=True)
class Extended:
    """A record with further events.

    Args:
        record: the record now.
        packed: its history, unpacked.
        counted: how many events the history stands for, packed or not.
        added: the events that the history did not have before, as they were given.
        waiting: events older than the oldest packed one of a longer past. Only the jobs can say whether that past
            has them already.
        known: microseconds from which the added events are known; 0 where none was added.
    """

    record: Record
    packed: pa.Table
    counted: int
    added: pa.Table
    waiting: pa.Table
    known: int


def extended(
    contract: Contract,
    user_id: int | str,
    record: Record,
    events: pa.Table,
    remembered: Remembered,
    *,
    is_lost: bool = False,
) -> Extended:
    """A user's record with events that came since. Of a user whose past is not there (`is_incomplete`) the history
    alone is extended: statistics and sketch of a part would say too little.

    Args:
        is_lost: there ought to be a record, and there is none.
        events: columns of a history and the moment at which each arrived (`with_arrival`), in that order;
            impressions among them are left out, and so is what the history has already: the same item, action
            and time.
        remembered: gives the codes of events' items.

    Raises:
        HistoryError: the stored history is damaged.
    """
    schema = history_schema(contract)
    batches = [] if record.history is None else [unpack(contract, user_id, record.history)]
    packed = pa.Table.from_batches(batches, schema)
    is_lost = is_lost or record.is_incomplete
    nothing = _Past(None, packed.num_rows, 0, 0)
    past = nothing if is_lost else _Past.of(contract, user_id, record)
    counted = past.counted
    # 1. Statistics that an interrupted writer left behind; if they lag further, they are the jobs' to mend.
    stats = record.stats
    behind = counted - (stats[user_stats.END] or 0)
    if not is_lost and 0 < behind <= packed.num_rows:
        stats = user_stats.add(contract, stats, packed.slice(packed.num_rows - behind))
    # 2. What is not in the history yet, without what may have left it at its older end.
    fresh = _fresh(contract, packed, events)
    waits = np.zeros(fresh.num_rows, bool)
    if counted > packed.num_rows and packed.num_rows:
        waits = micros(fresh[EVENT_TIMESTAMP]) <= micros(packed[EVENT_TIMESTAMP])[0]
    waiting = fresh.filter(pa.array(waits))
    added = fresh.filter(pa.array(~waits))
    if not added.num_rows:
        same = Record(record.history, record.sketch, stats)
        return Extended(same, packed, counted, added, waiting, 0)
    # 3. History, sketch and statistics with them.
    known = int(np.maximum(micros(added[EVENT_TIMESTAMP]), added[ARRIVED]).max()) + 1
    sketch = past.with_events(contract, user_id, added, known, remembered)
    both = pa.concat_tables([packed, added.select(schema.names)])
    order = np.argsort(micros(both[EVENT_TIMESTAMP]), kind="stable")
    newest = order[-contract.spec.num_history_online :]
    packed = both.take(pa.array(newest)).combine_chunks()
    if not is_lost and (stats[user_stats.END] or 0) == counted:
        stats = user_stats.add(contract, stats, added)
    after = Record(pack(contract, user_id, packed), sketch, stats)
    return Extended(after, packed, counted + added.num_rows, added, waiting, known)


def _fresh(contract: Contract, packed: pa.Table, events: pa.Table) -> pa.Table:
    """The events that are not packed, each once."""
    acted = pc.is_in(events["action"], pa.array(contract.history_actions, pa.int8()))
    # Of all that is packed, only what happened at the same moments can be the same.
    same_moment = packed.filter(
        pc.is_in(packed[EVENT_TIMESTAMP], events[EVENT_TIMESTAMP].combine_chunks())
    )
    seen = set(_identities(contract, same_moment))
    chosen = []
    for place, (identity, is_act) in enumerate(
        zip(_identities(contract, events), acted.to_pylist(), strict=True)
    ):
        if is_act and identity not in seen:
            seen.add(identity)
            chosen.append(place)
    return events.take(pa.array(chosen, pa.int64()))


def _identities(contract: Contract, events: pa.Table) -> list[tuple[Any, ...]]:
    """What says, of one user's events, that two are the same."""
    columns = (
        events[contract.item.join_key].to_pylist(),
        events["action"].to_pylist(),
        micros(events[EVENT_TIMESTAMP]).tolist(),
    )
    return list(zip(*columns, strict=True))


@dataclass(frozen=True)
class _Past:
    """What the stored sketch, or without one the statistics, say of all events before.

    Args:
        sketch: None where earlier events are in no sketch that can be read: one of a part would count too little.
        newest: microseconds, of the newest event; 0 where nothing says it.
    """

    sketch: UserCounts | None
    counted: int
    digest: int
    newest: int

    @staticmethod
    def of(contract: Contract, user_id: int | str, record: Record) -> _Past:
        layout = Layout.of(contract)
        if record.sketch is not None:
            with suppress(SketchError):
                sketch, identity = from_bytes(layout, record.sketch, user_id)
                return _Past(sketch, identity.num_events, identity.digest, identity.as_of)
        counted = record.stats[user_stats.END] or 0
        # An empty sketch is right only where nothing was counted before.
        begins = record.sketch is None and not counted
        digest = record.stats[user_stats.DIGEST] or 0
        return _Past(UserCounts(layout) if begins else None, counted, digest, 0)

    def with_events(
        self,
        contract: Contract,
        user_id: int | str,
        events: pa.Table,
        known: int,
        remembered: Remembered,
    ) -> bytes | None:
        """The sketch with new events, as it is stored; None where there is none to go on from.

        Args:
            known: microseconds from which the new ones are known.
        """
        if self.sketch is None:
            return None
        layout = self.sketch.layout
        times = micros(events[EVENT_TIMESTAMP])
        # A sketch counts the primary action alone.
        chosen = np.flatnonzero(events["action"].to_numpy() == 0)
        codes = [value_codes(events[contract.item.join_key]), *remembered(events)]
        self.sketch.add([c[chosen] for c in codes], times[chosen])
        identity = Identity(
            layout.fingerprint,
            max(self.newest, int(times.max())),
            known,
            self.counted + events.num_rows,
            extended_digest(contract, self.digest, events),
        )
        return self.sketch.to_bytes(user_id, identity)


def with_arrival(
    contract: Contract, events: Sequence[Mapping[str, Any]], arrived: Sequence[int]
) -> pa.Table:
    """Events as `extended` takes them.

    Args:
        events: history columns by name.
        arrived: microseconds, for each event.
    """
    table = pa.Table.from_pylist(list(events), schema=history_schema(contract))
    return table.append_column(ARRIVED, pa.array(arrived, pa.int64()))
