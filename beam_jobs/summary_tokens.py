"""Job `summary_tokens`: histories → summary tokens, offline as they were at each snapshot and online as they are now.

    history log ─► pieces of a part ─► stage 1 of a bundle ─► token log, row numbers, newest envelopes ─► online store

A user whose past is the one that the stored tokens know, and who has no new events, is skipped. Where stage 1 streams, a
user with new events goes on from the state stored beside the tokens; otherwise the whole history is read. A user whose
past was corrected has another digest, and is read from the start; one who is gone gets a tombstone. The parts of earlier
runs stand beside the new ones, other versions' too.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import apache_beam as beam
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from beam_jobs.inputs import job_code, output_is_there
from beam_jobs.options import Options, TokenOptions
from beam_jobs.runs import Built, Counts, Job, LostRowsError, OptionsError, RunPlan, Unit, settings_of, write_built
from feature_repo import token_log
from feature_repo.arrow import arrow_schema, from_micros, iso_micros
from feature_repo.catalogue import COVERAGE_TO_GO_LIVE, Catalogue
from feature_repo.envelope import Envelope, EnvelopeError, from_bytes, to_bytes
from feature_repo.history import Histories, HistoryLog, newest_rows
from feature_repo.key_index import KeyIndex
from feature_repo.schema import EVENT_TIMESTAMP, TOKEN_VERSION
from feature_repo.settings import Settings
from feature_repo.store import note_epoch, store_digest
from feature_repo.tables import Manifest, Part, digest_of, parquet_bytes
from feature_repo.token_log import PartName
from feature_repo.transforms import MICROS_PER_DAY

if TYPE_CHECKING:
    from modeling.summary import Summariser, Summary

PIECE_BYTES = 64 << 20  # of tokens and states that a piece of a part may hold
PIECE_EVENTS = 1 << 21  # of all its users; one user with more is a piece of his own
PIECE_USERS = 4096
CARRIED = ("token_log", "token_rows", "summary_tokens")
Stored = tuple[bytes, bytes | None]  # envelopes of a user's tokens and of their state


@dataclass(frozen=True)
class ResolvedOptions(TokenOptions):
    """Options, and the bundle and tokens that they mean."""

    recipe: str = ""
    version: str = ""
    shape: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class PreparedOptions(ResolvedOptions):
    """All that a worker must know; made once the run holds its folder.

    Args:
        path: of the bundle.
        versions: how each version in the manifest was begun: kind, snapshots, code, and the runs' `as_of` so far.
        run_number: of the run, in the names of its parts.
        log_parts: parts of the history log.
        earlier_as_of: instants at which earlier runs of this version ended, microseconds.
    """

    path: str = ""
    versions: dict[str, Any] = field(default_factory=dict)
    run_number: int = 0
    computed_at_micros: int = 0
    log_parts: int = 0
    first_event_micros: int = 0
    earlier_as_of: tuple[int, ...] = ()


def prepared(plan: RunPlan) -> PreparedOptions:
    """The options of a run that is under way."""
    assert isinstance(plan.options, PreparedOptions)
    return plan.options


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
    """Some users of one log part, summarised; `refilled` are stored envelopes of earlier runs to be sent online again."""

    name: PartName
    rows: list[TokenRow] = field(default_factory=list)
    refilled: dict[Any, Stored] = field(default_factory=dict)
    dead: list[DeadUser] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)

    @property
    def newest(self) -> dict[Any, Stored]:
        """Each user's newest envelopes; rows stand in the order of their snapshots."""
        return {row.user: row.stored for row in self.rows}


@dataclass
class SummariseHistories(beam.PTransform):
    """Log parts → pieces with tokens, and a piece of tombstones → offline parts → online rows."""

    plan: RunPlan

    def expand(self, units: beam.PCollection) -> beam.PCollection:
        """The steps; they run fused, so that pieces never leave their process."""
        plan = self.plan
        pieces = (
            units
            | "Spread parts" >> beam.Reshuffle()
            | "Summarise" >> beam.ParDo(Summarise(plan)).with_output_types(Piece)
        )
        gone = (
            units.pipeline
            | "Once" >> beam.Create([None])
            | "Users who are gone" >> beam.FlatMap(lambda _: tombstones(plan)).with_output_types(Piece)
        )
        return (
            (pieces, gone)
            | "All pieces" >> beam.Flatten()
            | "Write offline" >> beam.ParDo(WriteOffline(plan)).with_output_types(Piece)
            | "Write online" >> beam.ParDo(WriteTokens(plan)).with_output_types(str)
        )


class Summarise(beam.DoFn):
    """One log part → its pieces. The model is loaded once for each process."""

    def __init__(self, plan: RunPlan) -> None:
        self.plan = plan

    def process(self, unit: Unit) -> Iterator[Piece]:
        """Yields pieces; a part has at least one, which carries the part's counts."""
        yield from summarise_part(self.plan, unit, summariser_of(self.plan))


class WriteOffline(beam.DoFn):
    """The parts of a piece."""

    def __init__(self, plan: RunPlan) -> None:
        self.plan = plan

    def process(self, piece: Piece) -> Iterator[Piece]:
        """Writes, then passes the piece on: what is online is offline already."""
        for built in parts_of(self.plan, piece):
            write_built(self.plan, built)
        yield piece


class WriteTokens(beam.DoFn):
    """The newest envelopes of a piece."""

    def __init__(self, plan: RunPlan) -> None:
        self.plan = plan
        self._tokens: Any = None

    def setup(self) -> None:
        """Open the store once for each worker process."""
        from feature_repo.online_tokens import OnlineTokens
        from feature_repo.store import open_store

        self._tokens = OnlineTokens(open_store(settings_of(self.plan)), self.plan.contract)

    def process(self, piece: Piece) -> Iterator[str]:
        """Writes, each value at the time at which it was computed, and notes how many were newer than what was stored."""
        by_time: dict[int, list[Any]] = {}
        every = {**piece.refilled, **piece.newest}
        for user, (envelope, _) in every.items():
            by_time.setdefault(from_bytes(envelope, user).computed_at, []).append(user)
        stored = 0
        for computed_at, users in by_time.items():
            tokens, states = zip(*(every[user] for user in users), strict=True)
            stored += self._tokens.write(prepared(self.plan).version, users, tokens, states, computed_at)
        counts = {"online_stored": stored, "online_kept_newer": len(every) - stored}
        name = piece.name.file("json")
        yield write_built(self.plan, Built("online_writes", name, json.dumps(counts).encode(), len(every), counts))


def summariser_of(plan: RunPlan) -> Summariser:
    """The bundle's stage 1, on one thread: the same sums on any machine."""
    import torch

    from modeling.summary import load_summariser

    torch.set_num_threads(1)
    assert prepared(plan).bundle is not None
    return load_summariser(prepared(plan).path, plan.contract, str(prepared(plan).bundle))


def summarise_part(plan: RunPlan, unit: Unit, summariser: Summariser) -> Iterator[Piece]:
    """Every user of a log part, a bounded piece at a time."""
    options = prepared(plan)
    log = HistoryLog(plan.contract, plan.input_folder("user_history"), [unit.source])
    earlier = Earlier(plan, unit.number)
    item_of_key = summariser.encoder.vocabularies[summariser.encoder.item_key].indices_of(log.items)
    ranges = piece_ends(log.lengths, summariser.bytes_of_user(len(snapshots_of(plan))))
    for number, (start, stop) in enumerate(ranges):
        name = PartName(options.run_number, unit.number, options.log_parts, number)
        made = summarise_piece(plan, log, np.arange(start, stop), item_of_key, summariser, earlier)
        counts = {**made.counts, **({"users_in_log": len(log.users)} if number == 0 else {})}
        yield replace(made, name=name, counts=Counter(counts))


def piece_ends(lengths: np.ndarray, bytes_of_user: int) -> list[tuple[int, int]]:
    """Ranges of log rows, each within the bounds of a piece or one user long; one empty range for an empty part."""
    most, ranges, start, events = min(PIECE_USERS, max(PIECE_BYTES // bytes_of_user, 1)), [], 0, 0
    for row, length in enumerate(lengths.tolist()):
        if row > start and (row - start >= most or events + length > PIECE_EVENTS):
            ranges.append((start, row))
            start, events = row, 0
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
        known: events behind each one's newest tokens; 0 where the stored ones are of another past.
        corrected: whose past is no longer the one that their stored tokens know.
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


def users_of_piece(plan: RunPlan, log: HistoryLog, rows: np.ndarray, summariser: Summariser, earlier: Earlier) -> Users:
    """Histories of some log rows beside what earlier runs stored of them."""
    histories = log.gather(rows, log.lengths[rows])
    digests = histories.digests(log.item_hashes)
    users = log.users.take(pa.array(rows))
    ids = users.to_pylist()
    before = earlier.newest_of(users)
    stored = before.num_events
    there = (stored > 0) & (stored <= histories.lengths)
    same = np.zeros(len(rows), bool)
    same[there] = digests[histories.offsets[:-1][there] + stored[there] - 1] == before.digests[there]
    known = np.where(same, stored, 0)
    if prepared(plan).full:
        known = np.zeros_like(known)
    going_on = np.flatnonzero((known > 0) & (histories.lengths > known)).tolist() if summariser.streams else []
    streams = earlier.streams(ids, known, histories, going_on)
    return Users(ids, histories, digests, known, (stored > 0) & ~same, streams, unordered(histories))


def summarise_piece(
    plan: RunPlan,
    log: HistoryLog,
    rows: np.ndarray,
    item_of_key: np.ndarray,
    summariser: Summariser,
    earlier: Earlier,
) -> Piece:
    """Tokens of some log rows at every snapshot; what is due is computed, everything else is skipped."""
    options, name = prepared(plan), PartName(0, 0, 0, 0)
    if not len(rows):
        return Piece(name)
    users = users_of_piece(plan, log, rows, summariser, earlier)
    last = events_before(users.histories, snapshots_of(plan)[-1])
    counts: Counter[str] = Counter(users=int((last > 0).sum()), corrected=int(users.corrected.sum()))
    made: list[TokenRow] = []
    ordinary = set(snapshots_of(plan))
    for at in sorted(ordinary | set(options.earlier_as_of)):
        ends = events_before(users.histories, at)
        due = [row for row in np.flatnonzero(ends > users.known).tolist() if row not in users.dead]
        if at not in ordinary:
            # Tokens that an earlier run left at its own end are of the old past: they too get new ones.
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
    missing = [users.ids[row] for row in np.flatnonzero(users.known > 0).tolist() if users.ids[row] not in written]
    refilled = earlier.stored(missing) if options.refill else {}
    dead = [DeadUser(users.ids[row], int(last[row]), reason) for row, reason in sorted(users.dead.items())]
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
    """One user's summary, at `place` of one that holds several; or the reason why there is none."""

    row: int
    extended: bool
    summary: Summary | None = None
    place: int = 0
    reason: str = ""


def summarised(
    summariser: Summariser, users: Users, item_of_key: np.ndarray, due: list[int], ends: np.ndarray, at: int
) -> Iterator[Result]:
    """Summaries of the users that are due: from the start, or, where a state is stored, from there."""
    fresh = [row for row in due if row not in users.streams]
    going_on = [row for row in due if row in users.streams]
    for rows, extended in ((fresh, False), (going_on, True)):
        if not rows:
            continue
        make = extended_summary if extended else whole_summary
        try:
            summary = make(summariser, users, item_of_key, rows, ends, at)
        except (ValueError, RuntimeError, IndexError):
            # One by one, so that one bad history costs no other.
            for row in rows:
                try:
                    yield Result(row, extended, make(summariser, users, item_of_key, [row], ends, at))
                except (ValueError, RuntimeError, IndexError) as error:
                    yield Result(row, extended, reason=f"{type(error).__name__}: {error}")
            continue
        for place, row in enumerate(rows):
            yield Result(row, extended, summary, place)


def whole_summary(
    summariser: Summariser, users: Users, item_of_key: np.ndarray, rows: list[int], ends: np.ndarray, at: int
) -> Summary:
    """Of all events before the instant."""
    which = np.array(rows)
    starts = users.histories.offsets[which]
    return summariser.whole(users.histories.take(starts, starts + ends[which]), item_of_key, np.full(len(which), at))


def extended_summary(
    summariser: Summariser, users: Users, item_of_key: np.ndarray, rows: list[int], ends: np.ndarray, at: int
) -> Summary:
    """Of stored states and the events since."""
    from modeling.summary import Summary

    which = np.array(rows)
    starts, known = users.histories.offsets[which], users.known[which]
    states = np.stack([users.streams[row][0] for row in rows])
    last = np.array([users.streams[row][1] for row in rows])
    before = Summary(np.empty(len(which)), states, known, last)
    return summariser.extended(before, users.histories.take(starts + known, starts + ends[which]), item_of_key)


def stored_row(plan: RunPlan, summariser: Summariser, users: Users, result: Result, at: int) -> TokenRow | str:
    """One user's tokens as they are stored; or why they cannot be."""
    from modeling.summary import envelopes

    assert result.summary is not None
    options, user = prepared(plan), users.ids[result.row]
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
    log = HistoryLog(plan.contract, plan.input_folder("user_history"), plan.input_paths("user_history", "history_log"))
    before = Earlier(plan, None)
    gone = before.users.filter(pa.array((log.rows_of(before.users) < 0) & (before.all_events > 0)))
    rows = []
    assert plan.as_of is not None
    for user in gone.to_pylist():
        nothing = Envelope(options.version, plan.as_of, options.computed_at_micros, 0, None)
        rows.append(TokenRow(user, (to_bytes(nothing, user), None), 0, 0, plan.as_of + options.run_number))
    if rows:
        name = PartName(options.run_number, options.log_parts, options.log_parts, 0)
        yield Piece(name, rows, counts=Counter(tombstones=len(rows)))


def parts_of(plan: RunPlan, piece: Piece) -> Iterator[Built]:
    """A piece as parts of its tables; dead letters always, since they carry the counts."""
    contract, name, version = plan.contract, piece.name, prepared(plan).version
    user = contract.user.join_key
    if piece.rows:
        users = pa.array([row.user for row in piece.rows], arrow_schema(contract.table("token_rows")).field(user).type)
        number, known = len(piece.rows), from_micros(np.array([row.snapshot for row in piece.rows]))
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
        [{user: one.user, "num_events": one.num_events, "reason": one.reason} for one in piece.dead], schema=schema
    )
    counts = {**piece.counts, "tokens": len(piece.rows), "users_written": len(piece.newest), "dead_letters": len(dead)}
    yield Built("token_dead_letters", name.file("parquet"), parquet_bytes(dead), dead.num_rows, counts)


@dataclass(frozen=True)
class KnownTokens:
    """What is behind each of some users' newest tokens; zeros without any."""

    num_events: np.ndarray
    digests: np.ndarray


class Earlier:
    """What earlier runs stored of one version for the users of one log part, or, with no part named, for all users."""

    def __init__(self, plan: RunPlan, part: int | None) -> None:
        self._plan, self._user = plan, plan.contract.user.join_key
        manifest = plan.folder.manifest()
        self._tables = manifest.tables if manifest else {}
        self._part = part

    @property
    def users(self) -> pa.Array:
        """Everybody of whom there are tokens, or a tombstone."""
        return self._rows[self._user].combine_chunks()

    @property
    def all_events(self) -> np.ndarray:
        """Events behind the newest tokens of `users`; 0 for a tombstone."""
        return self._rows["token_events"].to_numpy()

    def newest_of(self, users: pa.Array) -> KnownTokens:
        """What is behind these users' newest tokens."""
        place = self._index.places(users)
        found = {}
        for name in ("token_events", "token_digest"):
            values = np.r_[self._rows[name].to_numpy(), 0]  # at place -1 stands the zero of whoever has none
            found[name] = values[place].astype(np.int64)
        return KnownTokens(found["token_events"], found["token_digest"])

    def streams(
        self, ids: list[Any], known: np.ndarray, histories: Histories, rows: list[int]
    ) -> dict[int, tuple[np.ndarray, int]]:
        """Stored streams of these rows, with the time of their last event.

        The digest says that the events behind them are still the first of the history. Events that came since with the
        time of the last one, or before it, cannot be added to what a stream has seen: then the history is read anew.
        """
        found: dict[int, tuple[np.ndarray, int]] = {}
        stored = self.stored([ids[row] for row in rows]) if rows else {}
        for row in rows:
            _, kept = stored.get(ids[row], (b"", None))
            if kept is None:
                continue
            try:
                state = from_bytes(kept, ids[row])
            except EnvelopeError:
                continue  # damaged: the whole history is read instead
            following = int(histories.offsets[row] + known[row])
            followed = following < histories.offsets[row + 1] and histories.times[following] <= state.as_of
            ours = state.fingerprint == prepared(self._plan).version and state.num_events == known[row]
            if ours and not followed and state.tokens_SD is not None:
                found[row] = (state.tokens_SD, state.as_of)
        return found

    def stored(self, ids: list[Any]) -> dict[Any, Stored]:
        """Newest envelopes of users."""
        everybody = self._stored[self._user].combine_chunks()
        places = KeyIndex(everybody).places(pa.array(ids, everybody.type))
        rows = self._stored.take(pa.array(places[places >= 0])).select([self._user, "tokens", "state"]).to_pylist()
        return {row[self._user]: (row["tokens"], row["state"]) for row in rows}

    @cached_property
    def _index(self) -> KeyIndex:
        return KeyIndex(self.users)

    @cached_property
    def _rows(self) -> pa.Table:
        """The newest pointer of each user: of the newest run, and of that the newest snapshot."""
        rows = self._read("token_rows", ["token_row", "token_events", "token_digest"])
        run = pc.shift_right(rows["token_row"], sum(token_log.BITS[1:]))
        rows = rows.append_column("__run", run).sort_by(
            [(self._user, "ascending"), ("__run", "ascending"), (EVENT_TIMESTAMP, "ascending")]
        )
        stamps = from_micros(np.arange(rows.num_rows))  # the order that was just made, as `newest_rows` reads it
        at = rows.column_names.index(EVENT_TIMESTAMP)
        return newest_rows(rows.set_column(at, EVENT_TIMESTAMP, stamps), self._user) if rows.num_rows else rows

    @cached_property
    def _stored(self) -> pa.Table:
        rows = self._read("summary_tokens", ["tokens", "state"])
        return newest_rows(rows, self._user) if rows.num_rows else rows

    def _read(self, table: str, columns: list[str]) -> pa.Table:
        keys = [self._user, TOKEN_VERSION.join_key, EVENT_TIMESTAMP]
        folder, rows = self._plan.folder, [arrow_schema(self._plan.contract.table(table)).empty_table()]
        for part in self._tables.get(table, []):
            name = PartName.of(part.path)
            if name is None or not self._may_hold(name):
                continue
            read = folder.read_path(f"{folder.root}/{part.path}", [*keys, *columns])
            rows.append(read.filter(pc.equal(read[TOKEN_VERSION.join_key], prepared(self._plan).version)))
        return pa.concat_tables([row.select([*keys, *columns]) for row in rows]).combine_chunks()

    def _may_hold(self, name: PartName) -> bool:
        """Whether a part may hold users of ours: they keep their log part as long as the number of parts stays.

        Tombstones stand in a part behind the last one, for users of all.
        """
        if self._part is None or name.parts != prepared(self._plan).log_parts:
            return True
        return name.part in (self._part, name.parts)


def prepare(plan: RunPlan, published: Manifest | None) -> RunPlan:
    """Give the run its number and its time; a version keeps the kind and snapshots that it was begun with.

    A run that was killed finds the time that it had claimed. A run of other code than the one that began a version builds
    it anew; where the online store is another one, or was emptied, what is stored offline goes online again.

    Raises:
        OptionsError: snapshots or a kind that this version's earlier rows do not have.
    """
    assert isinstance(plan.options, ResolvedOptions)
    asked, version = plan.options, plan.options.version
    before: dict[str, Any] = published.options if published else {}
    code = job_code(plan.job, plan.dataset)
    begun = before.get("versions", {}).get(version)
    full = asked.full or (begun is not None and begun["code"] != code)
    wanted = {n: value for n in ("every_days", "kind") if (value := getattr(asked, n)) is not None}
    kept = {n: begun[n] for n in ("every_days", "kind")} if begun else {"every_days": 0.0, "kind": "fp16"}
    if begun is not None and not full and (other := {n: v for n, v in wanted.items() if v != kept[n]}):
        raise OptionsError(
            f"tokens of version {version} were built with {kept}, asked for are {other}: pass --full to build them anew"
        )
    chosen = {**kept, **wanted}
    settings = settings_of(plan)
    lost = published is not None and (
        published.inputs.get("store") != store_digest(settings) or not output_is_there(plan.job, settings)
    )
    if published and plan.run_id in published.runs:  # the same work again, so its files must have other names
        plan = replace(plan, run_id=digest_of([plan.run_id, published.digest]))
    parts = published.tables.get(token_log.TABLE, []) if published else []
    runs = [name.run for part in parts if (name := PartName.of(part.path))]
    ended = () if begun is None or full else tuple(begun.get("as_of", ()))
    ends = sorted({*ended, plan.as_of})
    options = PreparedOptions(
        **{**asdict(asked), **chosen, "full": full, "refill": asked.refill or lost},
        path=str(settings.path(Catalogue(plan.catalogue_url).bundle(plan.dataset, str(asked.bundle)).path)),
        versions={**before.get("versions", {}), version: {**chosen, "code": code, "as_of": ends}},
        run_number=max(runs, default=0) + 1,
        computed_at_micros=_claim(plan, asked, before.get("computed_at_micros", 0)),
        log_parts=len(plan.input_paths("user_history", "history_log")),
        first_event_micros=first_event(plan) if chosen["every_days"] else 0,
        earlier_as_of=tuple(at for at in ended if at != plan.as_of),
    )
    return replace(plan, options=options)


def _claim(plan: RunPlan, asked: ResolvedOptions, before: int) -> int:
    """The run's time: as asked for, as claimed by a run of this name that was killed, or now; time never runs back."""
    if asked.computed_at:
        return iso_micros(asked.computed_at)
    folder, claim = plan.folder, f"{plan.folder.root}/claims/{plan.run_id}.json"
    if (stored := folder.read_bytes(claim)) is not None:
        claimed: int = json.loads(stored)["computed_at"]
        return max(claimed, before + 1)
    computed_at = max(time.time_ns() // 1000, before + 1)
    folder.write_bytes(claim, json.dumps({"computed_at": computed_at}).encode())
    return computed_at


def first_event(plan: RunPlan) -> int:
    """Time of the oldest event of all, microseconds."""
    folder = plan.input_folder("user_history")
    paths = plan.input_paths("user_history", "user_stats")
    firsts = [folder.read_path(path, ["first_event_s"])["first_event_s"] for path in paths]
    return min((pc.min(column).as_py() for column in firsts if len(column)), default=0) * 1_000_000


def carried(plan: RunPlan, published: Manifest | None) -> dict[str, list[Part]]:
    """Parts of earlier runs that stay: all of them, but those of this version where everything was built anew."""
    if published is None:
        return {}
    versions = token_log.versions_of(plan.contract, plan.folder, published) if prepared(plan).full else {}

    def of_this_version(part: Part) -> bool:
        name = PartName.of(part.path)
        return name is not None and versions.get(name) == prepared(plan).version

    return {
        table: [part for part in published.tables.get(table, []) if part.rows and not of_this_version(part)]
        for table in CARRIED
    }


def account(plan: RunPlan, units: Sequence[Unit], counts: Counts) -> int | None:
    """Every user of the log was counted.

    Raises:
        LostRowsError: somebody was not.
    """
    given = sum(unit.rows for unit in units)
    if counts.get("users_in_log", 0) != given:
        raise LostRowsError(
            f"{given:,} users went in, {counts.get('users_in_log', 0):,} were counted: the run was not published"
        )
    return plan.as_of


def finish(plan: RunPlan, counts: Counts | None, settings: Settings) -> list[str]:
    """Note the coverage; the bundle goes live where enough users have tokens. Returns what to tell."""
    catalogue = Catalogue(settings.catalogue_url)
    assert isinstance(plan.options, ResolvedOptions)
    options, said = plan.options, []
    if counts is not None:
        note_epoch(settings_of(plan), plan.job, plan.run_id)
        catalogue.record_tokens(
            fingerprint=options.version,
            dataset=plan.dataset,
            recipe=options.recipe,
            users=counts["users"],
            covered=counts["covered"],
            shape=options.shape,
        )
        if counts.get("tombstones") or counts.get("corrected"):
            said.append(
                f"{counts.get('corrected', 0):,} users' past was corrected: summarised anew; "
                f"{counts.get('tombstones', 0):,} users are gone: tombstones"
            )
    built = {row.fingerprint: row for row in catalogue.token_versions(plan.dataset)}.get(options.version)
    if built is None:
        return []
    said.append(
        f"tokens {options.version[:12]}: {built.covered:,} of {built.users:,} users covered ({built.coverage:.1%})"
    )
    if counts and counts.get("online_kept_newer"):
        said.append(f"{counts['online_kept_newer']:,} users had newer tokens online, which stay")
    if options.not_live:
        return said
    digest = str(options.bundle)
    name = f"{options.recipe}@{digest[:12]}"
    if built.coverage < COVERAGE_TO_GO_LIVE:
        return [*said, f"fewer than {COVERAGE_TO_GO_LIVE:.0%}, so {name} does not go live"]
    if reason := catalogue.held_back(plan.dataset, digest):
        return [
            *said,
            f"{name} does not go live: {reason}. `python -m modeling bundles --promote {name}` does it all the same",
        ]
    catalogue.set_live(plan.dataset, digest)
    return [*said, f"{name} is live"]


def resolve(settings: Settings, options: Options) -> Options:
    """Which bundle is meant, and which tokens it makes.

    Raises:
        OptionsError: there is no such bundle, or it makes no tokens.
    """
    from modeling.bundle import read_manifest

    assert isinstance(options, TokenOptions)
    catalogue, name = Catalogue(settings.catalogue_url), options.bundle
    try:
        row = catalogue.bundle(settings.dataset, name) if name else catalogue.live_bundle(settings.dataset)
    except LookupError as error:
        raise OptionsError(str(error)) from error
    tokens = read_manifest(settings.path(row.path))["tokens"]
    if tokens is None or not tokens["made_here"]:
        raise OptionsError(
            f"bundle {row.recipe}@{row.digest[:12]} makes no summary tokens: name one of a VISTA recipe with a stage 1 by --bundle"
        )
    return ResolvedOptions(
        **{**asdict(options), "bundle": row.digest},
        recipe=row.recipe,
        version=tokens["version"],
        shape=tuple(tokens["shape"]),
    )


JOB = Job(
    name="summary_tokens",
    doc="histories → summary tokens, offline and online",
    reads={"user_history": ("history_log",)},
    options=TokenOptions,
    steps=SummariseHistories,
    num_parts=lambda plan, units: 2 * units,
    account=account,
    resolve=resolve,
    prepare=prepare,
    carried=carried,
    finish=finish,
)
