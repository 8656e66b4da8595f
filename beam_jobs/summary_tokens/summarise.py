"""Users of the history log → rows of tokens: who is due, their summaries, and what is written of
each. Plain functions.

a log part ─► pieces of users ─► due at each snapshot ─► summaries ─► token rows ─► all tables' parts
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from beam_jobs.engine.runs import Built, RunPlan, Unit
from beam_jobs.summary_tokens.earlier_tokens import Earlier, Stored
from beam_jobs.summary_tokens.token_options import prepared
from feature_repo.contract.arrow import arrow_schema, from_micros
from feature_repo.history import token_log
from feature_repo.history.envelope import Envelope, EnvelopeError, to_bytes
from feature_repo.history.history import Histories, HistoryLog
from feature_repo.history.token_log import PartName
from feature_repo.history.transforms import MICROS_PER_DAY
from feature_repo.home.tables import parquet_bytes

if TYPE_CHECKING:
    from modeling.bundle.summary import Summariser, Summary

PIECE_BYTES = 64 << 20  # of tokens and states that a piece of a part may hold
PIECE_EVENTS = 1 << 21  # of all its users; one user with more is a piece of his own
PIECE_USERS = 4096
MODEL_ERRORS = (ValueError, RuntimeError, IndexError)  # that one bad history may cause


@dataclass(frozen=True)
class TokenRow:
    """One user's tokens at one snapshot, ready to be written."""

    user: Any
    stored: Stored
    num_events: int
    digest: int
    snapshot: int


@dataclass(frozen=True)
class DeadUser:
    """A user without tokens, and why."""

    user: Any
    num_events: int
    reason: str


@dataclass(frozen=True)
class Piece:
    """Some users of one log part, summarised; `refilled` are stored envelopes of earlier runs to be
    sent online again.
    """

    name: PartName
    rows: list[TokenRow] = field(default_factory=list)
    refilled: dict[Any, Stored] = field(default_factory=dict)
    dead: list[DeadUser] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)

    @property
    def newest(self) -> dict[Any, Stored]:
        """Each user's newest envelopes; rows stand in the order of their snapshots."""
        return {row.user: row.stored for row in self.rows}


def summarise_part(plan: RunPlan, unit: Unit, summariser: Summariser) -> Iterator[Piece]:
    """Every user of a log part, a bounded piece at a time."""
    options = prepared(plan)
    log = HistoryLog(plan.contract, plan.input_folder("user_history"), [unit.source])
    earlier = Earlier(plan, unit.number)
    item_of_key = summariser.encoder.items.indices_of(log.items)
    ranges = piece_ends(log.lengths, summariser.bytes_of_user(len(snapshots_of(plan))))
    for number, (start, stop) in enumerate(ranges):
        name = PartName(options.run_number, unit.number, options.log_parts, number)
        made = summarise_piece(
            plan, log, np.arange(start, stop), item_of_key, summariser, earlier, name
        )
        counts = {**made.counts, **({"users_in_log": len(log.users)} if number == 0 else {})}
        yield replace(made, counts=Counter(counts))


def piece_ends(lengths: np.ndarray, bytes_of_user: int) -> list[tuple[int, int]]:
    """Ranges of log rows, each within the bounds of a piece or one user long; one empty range for
    an empty part.
    """
    most = min(PIECE_USERS, max(PIECE_BYTES // bytes_of_user, 1))
    ranges = []
    start = 0
    events = 0
    for row, length in enumerate(lengths.tolist()):
        if row > start and (row - start >= most or events + length > PIECE_EVENTS):
            ranges.append((start, row))
            start = row
            events = 0
        events += length
    return [*ranges, (start, len(lengths))]


def snapshots_of(plan: RunPlan) -> list[int]:
    """Instants at which tokens are taken, oldest first: every so many days, and the run's end."""
    assert plan.as_of is not None
    options = prepared(plan)
    found = [plan.as_of]
    if options.every_days:
        day = int(options.every_days * MICROS_PER_DAY)
        midnight = plan.as_of // MICROS_PER_DAY * MICROS_PER_DAY
        found += [at for at in range(midnight, options.first_event_micros, -day) if at < plan.as_of]
    return sorted(found)


@dataclass
class Users:
    """Users of a piece while they are summarised: what is known of each so far.

    Args:
        ids: by row of the piece.
        histories: of all of them.
        known: events behind each one's newest tokens; 0 if the stored ones are of a different history.
        corrected: users whose history is no longer the one that their stored tokens know.
        streams: by row, where stage 1 can go on: its state, and the time of the last event in it.
        dead: by row, why there are no tokens.
    """

    ids: list[Any]
    histories: Histories
    digests: np.ndarray
    known: np.ndarray
    corrected: np.ndarray
    streams: dict[int, tuple[np.ndarray, int]]
    dead: dict[int, str]

    def digest_at(self, row: int, num_events: int) -> int:
        """Digest of a user's first events."""
        return int(self.digests[self.histories.offsets[row] + num_events - 1]) if num_events else 0


def users_of_piece(
    plan: RunPlan, log: HistoryLog, rows: np.ndarray, summariser: Summariser, earlier: Earlier
) -> Users:
    """Histories of some log rows beside what earlier runs stored of them."""
    histories = log.gather(rows, log.lengths[rows])
    digests = histories.digests(log.item_hashes)
    users = log.users.take(pa.array(rows))
    ids = users.to_pylist()
    before = earlier.newest_of(users)
    stored = before.num_events
    there = (stored > 0) & (stored <= histories.lengths)
    same = np.zeros(len(rows), bool)
    same[there] = (
        digests[histories.offsets[:-1][there] + stored[there] - 1] == before.digests[there]
    )
    known = np.where(same, stored, 0)
    if prepared(plan).full:
        known = np.zeros_like(known)
    going_on = (
        np.flatnonzero((known > 0) & (histories.lengths > known)).tolist()
        if summariser.streams
        else []
    )
    streams = earlier.streams(ids, known, histories, going_on)
    return Users(
        ids, histories, digests, known, (stored > 0) & ~same, streams, unordered(histories)
    )


def summarise_piece(
    plan: RunPlan,
    log: HistoryLog,
    rows: np.ndarray,
    item_of_key: np.ndarray,
    summariser: Summariser,
    earlier: Earlier,
    name: PartName,
) -> Piece:
    """Tokens of some log rows at every snapshot; what is due is computed, everything else is
    skipped.
    """
    options = prepared(plan)
    if not len(rows):
        return Piece(name)
    users = users_of_piece(plan, log, rows, summariser, earlier)
    last = events_before(users.histories, snapshots_of(plan)[-1])
    counts: Counter[str] = Counter(
        users=int((last > 0).sum()), corrected=int(users.corrected.sum())
    )
    made: list[TokenRow] = []
    ordinary = set(snapshots_of(plan))
    for at in sorted(ordinary | set(options.earlier_as_of)):
        ends = events_before(users.histories, at)
        due = [row for row in np.flatnonzero(ends > users.known).tolist() if row not in users.dead]
        if at not in ordinary:
            # Tokens that an earlier run left at its own end are of the old past: they too get new
            # ones.
            due = [row for row in due if users.corrected[row]]
        for result in summarised(summariser, users, item_of_key, due, ends, at):
            stored = result.reason or stored_row(plan, summariser, users, result, at)
            if isinstance(stored, str):
                users.dead[result.row] = stored
                continue
            made.append(stored)
            counts["extended" if result.extended else "from_start"] += 1
            users.known[result.row] = ends[result.row]
            if result.summary is not None and result.summary.streams_BRK is not None:
                state = result.summary.streams_BRK[result.place]
                users.streams[result.row] = (state, int(result.summary.as_of[result.place]))
    written = {row.user for row in made}
    still = [row for row in np.flatnonzero(last > 0).tolist() if users.ids[row] not in written]
    counts["skipped"] = sum(row not in users.dead for row in still)
    counts["covered"] = int(((users.known > 0) & (last > 0)).sum())
    missing = [
        users.ids[row]
        for row in np.flatnonzero(users.known > 0).tolist()
        if users.ids[row] not in written
    ]
    refilled = earlier.stored(missing) if options.refill else {}
    dead = [
        DeadUser(users.ids[row], int(last[row]), reason)
        for row, reason in sorted(users.dead.items())
    ]
    return Piece(name, made, refilled, dead, counts)


def unordered(histories: Histories) -> dict[int, str]:
    """Users whose events are not in the order of time, and why they are set aside."""
    back = np.flatnonzero(np.diff(histories.times) < 0) + 1
    owner = np.searchsorted(histories.offsets, back, side="right") - 1
    within = back > histories.offsets[owner]
    return {int(row): "events are not in the order of time" for row in np.unique(owner[within])}


def events_before(histories: Histories, at: int) -> np.ndarray:
    """How many events of each history lie before an instant."""
    earlier = np.r_[0, np.cumsum(histories.times < at)]
    return (earlier[histories.offsets[1:]] - earlier[histories.offsets[:-1]]).astype(np.int64)


@dataclass(frozen=True)
class Result:
    """One user's summary, at `place` of one that holds several; or the reason why there are no tokens."""

    row: int
    extended: bool = False  # whether it went on from a stored state
    summary: Summary | None = None
    place: int = 0
    reason: str = ""


def summarised(
    summariser: Summariser,
    users: Users,
    item_of_key: np.ndarray,
    due: list[int],
    ends: np.ndarray,
    at: int,
) -> Iterator[Result]:
    """Summaries of the users that are due: from the start, or, where a state is stored, from
    there.
    """
    # Both lists first: whoever takes the results adds to the streams.
    fresh = [row for row in due if row not in users.streams]
    going_on = [row for row in due if row in users.streams]
    about = (summariser, users, item_of_key, ends, at)
    for result in together(partial(whole_summary, *about), fresh):
        yield result
    for result in together(partial(extended_summary, *about), going_on):
        yield replace(result, extended=True)


def together(make: Callable[[list[int]], Summary], rows: list[int]) -> Iterator[Result]:
    """Summaries of these rows at once; where that fails, one by one, so that one bad history costs
    no other.
    """
    if not rows:
        return
    try:
        summary = make(rows)
    except MODEL_ERRORS:
        for row in rows:
            try:
                yield Result(row, summary=make([row]))
            except MODEL_ERRORS as error:
                yield Result(row, reason=f"{type(error).__name__}: {error}")
        return
    for place, row in enumerate(rows):
        yield Result(row, summary=summary, place=place)


def whole_summary(
    summariser: Summariser,
    users: Users,
    item_of_key: np.ndarray,
    ends: np.ndarray,
    at: int,
    rows: list[int],
) -> Summary:
    """Summarise all events before the instant."""
    which = np.array(rows)
    starts = users.histories.offsets[which]
    return summariser.whole(
        users.histories.take(starts, starts + ends[which]), item_of_key, np.full(len(which), at)
    )


def extended_summary(
    summariser: Summariser,
    users: Users,
    item_of_key: np.ndarray,
    ends: np.ndarray,
    at: int,
    rows: list[int],
) -> Summary:
    """Extend stored states by the events since."""
    from modeling.bundle.summary import Summary

    which = np.array(rows)
    starts = users.histories.offsets[which]
    known = users.known[which]
    states = np.stack([users.streams[row][0] for row in rows])
    last = np.array([users.streams[row][1] for row in rows])
    before = Summary(np.empty(len(which)), states, known, last)
    return summariser.extended(
        before, users.histories.take(starts + known, starts + ends[which]), item_of_key
    )


def stored_row(
    plan: RunPlan, summariser: Summariser, users: Users, result: Result, at: int
) -> TokenRow | str:
    """One user's tokens as they are stored; or why they cannot be."""
    from modeling.bundle.summary import envelopes

    assert result.summary is not None
    options = prepared(plan)
    user = users.ids[result.row]
    number = int(result.summary.num_events[result.place])
    digest = users.digest_at(result.row, number)
    assert options.kind is not None
    about = (summariser.fingerprint, options.computed_at_micros, options.kind, digest)
    try:
        stored = envelopes(result.summary, result.place, user, *about)
    except EnvelopeError as error:
        return str(error)
    # Just after the instant, so that the row of a later run at the same one stands after it.
    return TokenRow(user, stored, number, digest, at + options.run_number)


def tombstones(plan: RunPlan) -> Iterator[Piece]:
    """A piece for users of whom tokens are stored and whom the log no longer has."""
    options = prepared(plan)
    before = Earlier(plan, None)
    if not before.all_events.any():
        return
    log = HistoryLog(
        plan.contract,
        plan.input_folder("user_history"),
        plan.input_paths("user_history", "history_log"),
    )
    gone = before.users.filter(pa.array((log.rows_of(before.users) < 0) & (before.all_events > 0)))
    rows = []
    assert plan.as_of is not None
    for user in gone.to_pylist():
        nothing = Envelope(options.version, plan.as_of, options.computed_at_micros, 0, None)
        rows.append(
            TokenRow(user, (to_bytes(nothing, user), None), 0, 0, plan.as_of + options.run_number)
        )
    if rows:
        name = PartName(options.run_number, options.log_parts, options.log_parts, 0)
        yield Piece(name, rows, counts=Counter(tombstones=len(rows)))


def parts_of(plan: RunPlan, piece: Piece) -> Iterator[Built]:
    """A piece as parts of its tables; dead letters always, since they carry the counts."""
    contract = plan.contract
    name = piece.name
    version = prepared(plan).version
    user = contract.user.join_key
    if piece.rows:
        users = pa.array(
            [row.user for row in piece.rows],
            arrow_schema(contract.table("token_rows")).field(user).type,
        )
        number = len(piece.rows)
        known = from_micros(np.array([row.snapshot for row in piece.rows]))
        # 1. The envelopes themselves.
        batch = token_log.log_part(contract, users, [row.stored[0] for row in piece.rows])
        sink = pa.BufferOutputStream()
        with pa.ipc.new_file(sink, batch.schema) as writer:
            writer.write_batch(batch)
        yield Built(token_log.TABLE, name.file("arrow"), sink.getvalue(), batch.num_rows)
        # 2. Which row of them holds, from when on.
        pointers = pa.table(
            [
                users,
                pa.repeat(version, number),
                pa.array(name.rows(number)),
                pa.array([row.num_events for row in piece.rows]),
                pa.array([row.digest for row in piece.rows], pa.int64()),
                known,
                known,
            ],
            names=[c.name for c in contract.table("token_rows").all_columns],
        ).cast(arrow_schema(contract.table("token_rows")))
        yield Built("token_rows", name.file("parquet"), parquet_bytes(pointers), number)
        # 3. The newest of each user, as they go online.
        newest = piece.newest
        tokens, states = zip(*newest.values(), strict=True)
        computed = from_micros(np.full(len(newest), prepared(plan).computed_at_micros))
        rows = pa.table(
            [
                pa.array(list(newest), users.type),
                pa.repeat(version, len(newest)),
                pa.array(tokens, pa.binary()),
                pa.array(states, pa.binary()),
                computed,
                computed,
            ],
            names=[c.name for c in contract.table("summary_tokens").all_columns],
        ).cast(arrow_schema(contract.table("summary_tokens")))
        yield Built("summary_tokens", name.file("parquet"), parquet_bytes(rows), rows.num_rows)
    schema = arrow_schema(contract.table("token_dead_letters"))
    dead = pa.Table.from_pylist(
        [
            {user: one.user, "num_events": one.num_events, "reason": one.reason}
            for one in piece.dead
        ],
        schema=schema,
    )
    counts = {
        **piece.counts,
        "tokens": len(piece.rows),
        "users_written": len(piece.newest),
        "dead_letters": len(dead),
    }
    yield Built(
        "token_dead_letters", name.file("parquet"), parquet_bytes(dead), dead.num_rows, counts
    )
