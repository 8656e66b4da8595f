"""Users of the history log → rows of tokens: who is due, their summaries, and what is written of
each. Plain functions.

a log part ─► pieces of users ─► due at each snapshot ─► summaries ─► token rows ─► all tables' parts
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from beam_jobs.engine.parts import Built
from beam_jobs.engine.plan import RunPlan, Unit
from beam_jobs.summary_tokens.earlier_tokens import Earlier, Stored, StoredStream
from beam_jobs.summary_tokens.token_options import prepared
from feature_repo.contract.arrow import arrow_schema, from_micros
from feature_repo.contract.counts import Counts
from feature_repo.history import token_log
from feature_repo.history.envelope import Envelope, EnvelopeError, to_bytes
from feature_repo.history.history import Histories, HistoryLog
from feature_repo.history.token_log import PartName
from feature_repo.history.transforms import MICROS_PER_DAY
from feature_repo.home.tables import parquet_bytes

if TYPE_CHECKING:
    from modeling.summaries.summariser import Summariser, Summary

# Bytes of tokens and states that a piece of a part may hold
PIECE_BYTES = 64 << 20
# Events of all users of a piece; one user with more is a piece alone
PIECE_EVENTS = 1 << 21
PIECE_USERS = 4096
# Errors that one bad history may cause
MODEL_ERRORS = (ValueError, RuntimeError, IndexError)


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
    counts: Counts = field(default_factory=Counts)

    @property
    def newest(self) -> dict[Any, Stored]:
        """Each user's newest envelopes; rows stand in the order of their snapshots."""
        return {row.user: row.stored for row in self.rows}


def summarise_part(plan: RunPlan, unit: Unit, summariser: Summariser) -> Iterator[Piece]:
    """Every user of a log part, a bounded piece at a time."""
    options = prepared(plan)
    log = HistoryLog(plan.contract, plan.input_folder("user_history"), [plan.unit_path(unit)])
    earlier = Earlier(plan, unit.number)
    item_of_key = summariser.encoder.items.indices_of(log.items)
    ranges = piece_ends(log.lengths, summariser.bytes_of_user(len(snapshots_of(plan))))
    for number, (start, stop) in enumerate(ranges):
        name = PartName(options.run_number, unit.number, options.log_parts, number)
        rows = np.arange(start, stop)
        piece = summarise_piece(plan, log, rows, item_of_key, summariser, earlier, name)
        of_part = Counts({"users_in_log": len(log.users)} if number == 0 else {})
        yield replace(piece, counts=piece.counts + of_part)


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


@dataclass(frozen=True)
class Users:
    """The users of a piece, their histories as they were known at one time, and whether stored tokens still are
    of these.

    Args:
        ids: by row of the piece.
        histories: of all of them.
        corrected: users whose history is no longer the one that their stored tokens know.
    """

    ids: list[Any]
    histories: Histories
    digests: np.ndarray
    corrected: np.ndarray

    def known_at(self, log: HistoryLog, rows: np.ndarray, at: int) -> Users:
        """The same users as they were known at an earlier time.

        Args:
            rows: of the users in the log.
        """
        histories = log.known_at(rows, at)
        return replace(self, histories=histories, digests=histories.digests(log.item_hashes))

    def digest_at(self, row: int, num_events: int) -> int:
        """Digest of a user's first events."""
        return int(self.digests[self.histories.offsets[row] + num_events - 1]) if num_events else 0


@dataclass(frozen=True)
class Progress:
    """How far the users of a piece are summarised.

    Args:
        known: events behind each one's newest tokens; 0 without, or if the stored ones are of another history.
        digests: of those events.
        streams: by row, where stage 1 can go on: its state, and the time of the last event in it.
        dead: by row, why there are no tokens.
    """

    known: np.ndarray
    digests: np.ndarray
    streams: Mapping[int, StoredStream]
    dead: Mapping[int, str]

    def among(self, users: Users) -> Progress:
        """The progress among histories of a different time. A user whose past a late event or a correction has
        changed begins anew.
        """
        # Tokens of a later time than this say nothing about it.
        later = self.known > users.histories.lengths
        number = np.where(later, 0, self.known)
        now = [users.digest_at(row, int(n)) for row, n in enumerate(number)]
        same = later | (np.array(now, np.int64) == self.digests)
        streams = {row: stream for row, stream in self.streams.items() if same[row]}
        return replace(self, known=np.where(same, self.known, 0), streams=streams)

    def due(self, ends: np.ndarray) -> list[int]:
        """Rows that have events before an instant which their tokens do not know.

        Args:
            ends: events of each user before it.
        """
        return [row for row in np.flatnonzero(ends > self.known).tolist() if row not in self.dead]

    def after(self, results: Sequence[Result], ends: np.ndarray, users: Users) -> Progress:
        """The progress once these results are there."""
        known = self.known.copy()
        digests = self.digests.copy()
        streams = dict(self.streams)
        dead = dict(self.dead)
        for result in results:
            if result.tokens is None:
                dead[result.row] = result.reason
                continue
            known[result.row] = ends[result.row]
            digests[result.row] = users.digest_at(result.row, int(ends[result.row]))
            if result.stream is not None:
                streams[result.row] = result.stream
        return Progress(known, digests, streams, dead)


def users_of_piece(
    plan: RunPlan, log: HistoryLog, rows: np.ndarray, summariser: Summariser, earlier: Earlier
) -> tuple[Users, Progress]:
    """Histories of some log rows, and how far earlier runs summarised them."""
    histories = log.gather(rows, log.lengths[rows])
    digests = histories.digests(log.item_hashes)
    keys = log.users.take(pa.array(rows))
    ids = keys.to_pylist()
    # 1. Stored tokens hold where the digest of as many first events is still the same.
    before = earlier.newest_of(keys)
    stored = before.num_events
    there = (stored > 0) & (stored <= histories.lengths)
    last = histories.offsets[:-1][there] + stored[there] - 1
    same = np.zeros(len(rows), bool)
    same[there] = digests[last] == before.digests[there]
    known = np.where(same & (not prepared(plan).full), stored, 0)
    # 2. Streams of those who have new events.
    grown = np.flatnonzero((known > 0) & (histories.lengths > known)).tolist()
    streams = earlier.streams(ids, known, histories, grown if summariser.streams else [])
    users = Users(ids, histories, digests, (stored > 0) & ~same)
    return users, Progress(known, before.digests, streams, unordered(histories))


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
    users, progress = users_of_piece(plan, log, rows, summariser, earlier)
    snapshots = snapshots_of(plan)
    # 1. One instant after the other, for each goes on from where the one before ended. Late events and corrections
    #    make a past of its own for each.
    late = log.any_late(rows)
    results: list[Result] = []
    for at in sorted({*snapshots, *options.earlier_as_of}):
        if late:
            users = users.known_at(log, rows, at)
            progress = progress.among(users)
        ends = events_before(users.histories, at)
        due = progress.due(ends)
        if at not in snapshots:
            # Tokens that an earlier run left at its own end are of the old past: they too get new ones.
            due = [row for row in due if users.corrected[row]]
        made = summarised(plan, summariser, users, progress, item_of_key, due, ends, at)
        progress = progress.after(made, ends, users)
        results += made
    # 2. What came of it.
    rows_made = [result.tokens for result in results if result.tokens is not None]
    written = {row.user for row in rows_made}
    last = events_before(users.histories, snapshots[-1])
    alive = np.flatnonzero(last > 0).tolist()
    untouched = [row for row in alive if users.ids[row] not in written]
    with_tokens = np.flatnonzero(progress.known > 0).tolist()
    missing = [users.ids[row] for row in with_tokens if users.ids[row] not in written]
    extended = sum(result.extended for result in results if result.tokens is not None)
    counts = Counts(
        {
            "users": len(alive),
            "corrected": int(users.corrected.sum()),
            "extended": extended,
            "from_start": len(rows_made) - extended,
            "skipped": sum(row not in progress.dead for row in untouched),
            "covered": int(((progress.known > 0) & (last > 0)).sum()),
        }
    )
    dead = [
        DeadUser(users.ids[row], int(last[row]), reason)
        for row, reason in sorted(progress.dead.items())
    ]
    refilled = earlier.stored(missing) if options.refill else {}
    return Piece(name, rows_made, refilled, dead, counts)


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
    """One user's tokens at one instant, and the state of the stream behind them; or the reason why there are
    none.

    Args:
        extended: whether they went on from a stored state.
    """

    row: int
    tokens: TokenRow | None = None
    stream: StoredStream | None = None
    extended: bool = False
    reason: str = ""


def summarised(
    plan: RunPlan,
    summariser: Summariser,
    users: Users,
    progress: Progress,
    item_of_key: np.ndarray,
    due: list[int],
    ends: np.ndarray,
    at: int,
) -> list[Result]:
    """Tokens of the users that are due: from the start, or, where a state is stored, from there."""
    fresh = [row for row in due if row not in progress.streams]
    going_on = [row for row in due if row in progress.streams]
    whole = partial(whole_summary, summariser, users, item_of_key, ends, at)
    extended = partial(extended_summary, summariser, users, progress, item_of_key, ends)
    store = partial(stored_result, plan, summariser, users, at)
    return [
        *together(whole, store, fresh),
        *(replace(result, extended=True) for result in together(extended, store, going_on)),
    ]


def together(
    make: Callable[[list[int]], Summary],
    store: Callable[[int, Summary, int], Result],
    rows: list[int],
) -> list[Result]:
    """Summaries of these rows at once; where that fails, one by one, so that one bad history costs
    no other.

    Args:
        make: makes a summary of rows.
        store: makes a result of a row, a summary, and the row's place in it.
    """
    if not rows:
        return []
    try:
        summary = make(rows)
    except MODEL_ERRORS as error:
        if len(rows) == 1:
            return [Result(rows[0], reason=f"{type(error).__name__}: {error}")]
        return [result for row in rows for result in together(make, store, [row])]
    return [store(row, summary, place) for place, row in enumerate(rows)]


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
    progress: Progress,
    item_of_key: np.ndarray,
    ends: np.ndarray,
    rows: list[int],
) -> Summary:
    """Extend stored states by the events since."""
    from modeling.summaries.summariser import Summary

    which = np.array(rows)
    starts = users.histories.offsets[which]
    known = progress.known[which]
    states = np.stack([progress.streams[row].state for row in rows])
    last = np.array([progress.streams[row].as_of for row in rows])
    before = Summary(np.empty(len(which)), states, known, last)
    return summariser.extended(
        before, users.histories.take(starts + known, starts + ends[which]), item_of_key
    )


def stored_result(
    plan: RunPlan,
    summariser: Summariser,
    users: Users,
    at: int,
    row: int,
    summary: Summary,
    place: int,
) -> Result:
    """One user's tokens as they are stored; or why they cannot be."""
    from modeling.bundle.summary import envelopes

    options = prepared(plan)
    user = users.ids[row]
    number = int(summary.num_events[place])
    digest = users.digest_at(row, number)
    assert options.kind is not None
    about = (summariser.fingerprint, options.computed_at_micros, options.kind, digest)
    try:
        stored = envelopes(summary, place, user, *about)
    except EnvelopeError as error:
        return Result(row, reason=str(error))
    # Just after the instant, so that the row of a later run at the same one stands after it.
    tokens = TokenRow(user, stored, number, digest, at + options.run_number)
    if summary.streams_BRK is None:
        return Result(row, tokens)
    return Result(row, tokens, StoredStream(summary.streams_BRK[place], int(summary.as_of[place])))


def tombstones(plan: RunPlan, _: object = None) -> Iterator[Piece]:
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
        yield Piece(name, rows, counts=Counts({"tombstones": len(rows)}))


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
    # 4. The users that got no tokens, and why.
    schema = arrow_schema(contract.table("token_dead_letters"))
    dead = pa.Table.from_pylist(
        [
            {user: one.user, "num_events": one.num_events, "reason": one.reason}
            for one in piece.dead
        ],
        schema=schema,
    )
    written = Counts(
        {
            "tokens": len(piece.rows),
            "users_written": len(piece.newest),
            "dead_letters": len(dead),
        }
    )
    data = parquet_bytes(dead)
    counts = piece.counts + written
    yield Built("token_dead_letters", name.file("parquet"), data, dead.num_rows, counts)
