"""Job `summary_tokens`: histories → summary tokens, offline as they were at each snapshot and online as they are now.

    history log ─► pieces of a part ─► stage 1 of a bundle ─► token log, row numbers, newest envelopes ─► online store

A user without new events is skipped. Where stage 1 streams, a user with some goes on from the state stored beside the
tokens; otherwise the whole history is read. The parts of earlier runs stand beside the new ones, other versions' too.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import apache_beam as beam
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from beam_jobs.inputs import VERSIONS, output_is_there
from beam_jobs.runs import Built, Job, OptionsError, RunPlan, Unit, settings_of, write_built
from feature_repo import token_log
from feature_repo.arrow import arrow_schema, from_micros, iso_micros
from feature_repo.catalogue import COVERAGE_TO_GO_LIVE, Catalogue
from feature_repo.envelope import EnvelopeError, decode
from feature_repo.history import Histories, HistoryLog, newest_rows
from feature_repo.schema import EVENT_TIMESTAMP, TOKEN_VERSION
from feature_repo.settings import Settings
from feature_repo.store import store_digest
from feature_repo.tables import Manifest, Part, digest_of, parquet_bytes
from feature_repo.token_log import PartName
from feature_repo.transforms import MICROS_PER_DAY

if TYPE_CHECKING:
    from modeling.summary import Summariser, Summary

PIECE_BYTES = 64 << 20  # of tokens and states that a piece of a part may hold
PIECE_EVENTS = 1 << 21  # of all its users; one user with more is a piece of his own
PIECE_USERS = 4096
CARRIED = ("token_log", "token_rows", "summary_tokens")


@dataclass
class Piece:
    """Some users of one log part, summarised: rows for every table, ready to be written."""

    name: PartName
    users: list[Any] = field(default_factory=list)  # of each token row
    envelopes: list[bytes] = field(default_factory=list)
    num_events: list[int] = field(default_factory=list)
    snapshots: list[int] = field(default_factory=list)
    newest: dict[Any, tuple[bytes, bytes | None]] = field(default_factory=dict)  # by user
    # Of earlier runs, to be sent online again:
    refilled: dict[Any, tuple[bytes, bytes | None]] = field(default_factory=dict)
    dead: list[tuple[Any, int, str]] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)


@dataclass
class SummariseHistories(beam.PTransform):
    """Log parts → pieces with tokens → offline parts → online rows."""

    plan: RunPlan

    def expand(self, units: beam.PCollection) -> beam.PCollection:
        """The steps; they run fused, so that pieces never leave their process."""
        return (
            units
            | "Spread parts" >> beam.Reshuffle()
            | "Summarise" >> beam.ParDo(Summarise(self.plan)).with_output_types(Piece)
            | "Write offline" >> beam.ParDo(WriteOffline(self.plan)).with_output_types(Piece)
            | "Write online" >> beam.ParDo(WriteOnline(self.plan)).with_output_types(str)
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


class WriteOnline(beam.DoFn):
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
            by_time.setdefault(decode(envelope, user).computed_at, []).append(user)
        stored = 0
        for computed_at, users in by_time.items():
            tokens, states = zip(*(every[user] for user in users), strict=True)
            stored += self._tokens.write(self.plan.options["version"], users, tokens, states, computed_at)
        counts = {"online_stored": stored, "online_kept_newer": len(every) - stored}
        name = piece.name.file("json")
        yield write_built(self.plan, Built("online_writes", name, json.dumps(counts).encode(), len(every), counts))


def summariser_of(plan: RunPlan) -> Summariser:
    """The bundle's stage 1, on one thread: the same sums on any machine."""
    import torch

    from modeling.summary import load_summariser

    torch.set_num_threads(1)
    return load_summariser(plan.options["path"], plan.contract, plan.options["bundle"])


def summarise_part(plan: RunPlan, unit: Unit, summariser: Summariser) -> Iterator[Piece]:
    """Every user of a log part, a bounded piece at a time."""
    log = HistoryLog(plan.contract, plan.folder_of("user_history"), [unit.source])
    earlier = Earlier(plan, unit.number)
    item_of_key = summariser.encoder.vocabularies[summariser.encoder.item_key].encode(log.items)
    snapshots = snapshots_of(plan)
    ranges = piece_ends(log.lengths, summariser.bytes_of_user(len(snapshots)))
    for number, (start, stop) in enumerate(ranges):
        piece = Piece(PartName(plan.options["run_number"], unit.number, plan.options["log_parts"], number))
        if number == 0:
            piece.counts["users_in_log"] = len(log.users)
        summarise_piece(plan, log, np.arange(start, stop), item_of_key, snapshots, summariser, earlier, piece)
        yield piece


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
    step = plan.options["every_days"]
    found = [plan.as_of]
    if step:
        first = plan.options["first_event_micros"]
        day = int(step * MICROS_PER_DAY)
        midnight = plan.as_of // MICROS_PER_DAY * MICROS_PER_DAY
        found += [at for at in range(midnight, first, -day) if at < plan.as_of]
    return sorted(found)


def summarise_piece(
    plan: RunPlan,
    log: HistoryLog,
    rows: np.ndarray,
    item_of_key: np.ndarray,
    snapshots: list[int],
    summariser: Summariser,
    earlier: Earlier,
    piece: Piece,
) -> None:
    """Tokens of some log rows at every snapshot; what is due is computed, everything else is skipped."""
    if not len(rows):
        return
    histories = log.gather(rows, log.lengths[rows])
    users, last = log.users.take(pa.array(rows)), events_before(histories, snapshots[-1])
    ids = users.to_pylist()
    known = np.zeros(len(rows), np.int64) if plan.options["full"] else earlier.num_events(users)
    known[known > log.lengths[rows]] = 0  # the log has lost events: the tokens know what it does not
    piece.counts["users"] += int((last > 0).sum())
    going_on = np.flatnonzero((known > 0) & (last > known)).tolist() if summariser.streams else []
    streams = earlier.streams(ids, known, histories, going_on)
    dead: dict[int, str] = unordered(histories)
    for at in snapshots:
        ends = events_before(histories, at)
        due = [row for row in np.flatnonzero(ends > known).tolist() if row not in dead]
        stored, fresh = ([row for row in due if (row in streams) == known_stream] for known_stream in (True, False))
        for chosen, extend in ((fresh, False), (stored, True)):
            for row, summary, place, reason in summarised(
                summariser, histories, item_of_key, chosen, known, ends, at, streams if extend else None
            ):
                if reason is None:
                    reason = take(plan, piece, summariser, ids[row], summary, place, at)
                if reason is not None:
                    dead[row] = reason
                    continue
                known[row] = ends[row]
                piece.counts["extended" if extend else "from_start"] += 1
                if summary is not None and summary.streams_BRK is not None:
                    streams[row] = (summary.streams_BRK[place], int(summary.as_of[place]))
    piece.counts["skipped"] += sum(
        ids[row] not in piece.newest and row not in dead for row in np.flatnonzero(last > 0).tolist()
    )
    piece.counts["covered"] += int(((known > 0) & (last > 0)).sum())
    if plan.options["refill"]:
        missing = [ids[row] for row in np.flatnonzero(known > 0).tolist() if ids[row] not in piece.newest]
        piece.refilled = earlier.stored(missing)
    piece.dead += [(ids[row], int(last[row]), reason) for row, reason in sorted(dead.items())]


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


def summarised(
    summariser: Summariser,
    histories: Histories,
    item_of_key: np.ndarray,
    rows: list[int],
    known: np.ndarray,
    ends: np.ndarray,
    at: int,
    streams: dict[int, tuple[np.ndarray, int]] | None,
) -> Iterator[tuple[int, Summary | None, int, str | None]]:
    """Summaries of these rows, together; where that fails, one by one, so that one bad history costs no other.

    Yields:
        Row, the summary that holds it, its place in there, or the reason why there is none.
    """
    from modeling.summary import Summary

    def of(chosen: list[int]) -> Summary:
        which = np.array(chosen)
        starts, stops = histories.offsets[which], histories.offsets[which] + ends[which]
        times = np.full(len(which), at)
        if streams is None:
            return summariser.whole(histories.take(starts, stops), item_of_key, times)
        stored = np.stack([streams[row][0] for row in chosen])
        last = np.array([streams[row][1] for row in chosen])
        before = Summary(np.empty(len(which)), stored, known[which], last)
        return summariser.extended(before, histories.take(starts + known[which], stops), item_of_key)

    if not rows:
        return
    try:
        summary = of(rows)
    except (ValueError, RuntimeError, IndexError):
        for row in rows:
            try:
                yield row, of([row]), 0, None
            except (ValueError, RuntimeError, IndexError) as error:
                yield row, None, 0, f"{type(error).__name__}: {error}"
        return
    for place, row in enumerate(rows):
        yield row, summary, place, None


def take(
    plan: RunPlan, piece: Piece, summariser: Summariser, user_id: Any, summary: Summary | None, place: int, at: int
) -> str | None:
    """Add one user's tokens to a piece; or say why they cannot be stored."""
    from modeling.summary import envelopes

    assert summary is not None
    try:
        stored = envelopes(
            summary, place, user_id, summariser.fingerprint, plan.options["computed_at_micros"], plan.options["kind"]
        )
    except EnvelopeError as error:
        return str(error)
    piece.users.append(user_id)
    piece.envelopes.append(stored[0])
    piece.num_events.append(int(summary.num_events[place]))
    # Just after the instant, so that the row of a later run at the same one stands after it.
    piece.snapshots.append(at + plan.options["run_number"])
    piece.newest[user_id] = stored
    return None


def parts_of(plan: RunPlan, piece: Piece) -> Iterator[Built]:
    """A piece as parts of its tables; dead letters always, since they carry the counts."""
    contract, name, version = plan.contract, piece.name, plan.options["version"]
    user = contract.user.join_key
    if piece.users:
        batch = token_log.log_part(contract, pa.array(piece.users), piece.envelopes)
        sink = pa.BufferOutputStream()
        with pa.ipc.new_file(sink, batch.schema) as writer:
            writer.write_batch(batch)
        yield Built(token_log.TABLE, name.file("arrow"), sink.getvalue(), batch.num_rows)
        number, known = len(piece.users), from_micros(np.array(piece.snapshots))
        pointers = pa.table(
            [
                pa.array(piece.users),
                pa.repeat(version, number),
                pa.array(name.rows(number)),
                pa.array(piece.num_events),
                known,
                known,
            ],
            names=[c.name for c in contract.table("token_rows").all_columns],
        ).cast(arrow_schema(contract.table("token_rows")))
        yield Built("token_rows", name.file("parquet"), parquet_bytes(pointers), number)
        tokens, states = zip(*piece.newest.values(), strict=True)
        computed = from_micros(np.full(len(piece.newest), plan.options["computed_at_micros"]))
        newest = pa.table(
            [
                pa.array(list(piece.newest)),
                pa.repeat(version, len(piece.newest)),
                pa.array(tokens, pa.binary()),
                pa.array(states, pa.binary()),
                computed,
                computed,
            ],
            names=[c.name for c in contract.table("summary_tokens").all_columns],
        ).cast(arrow_schema(contract.table("summary_tokens")))
        yield Built("summary_tokens", name.file("parquet"), parquet_bytes(newest), newest.num_rows)
    schema = arrow_schema(contract.table("token_dead_letters"))
    dead = pa.Table.from_pylist(
        [{user: who, "num_events": events, "reason": why} for who, events, why in piece.dead], schema=schema
    )
    counts = {**piece.counts, "tokens": len(piece.users), "users_written": len(piece.newest), "dead_letters": len(dead)}
    yield Built("token_dead_letters", name.file("parquet"), parquet_bytes(dead), dead.num_rows, counts)


class Earlier:
    """What earlier runs stored of one version for the users of one log part."""

    def __init__(self, plan: RunPlan, part: int) -> None:
        self._plan, self._user = plan, plan.contract.user.join_key
        manifest = plan.folder.manifest()
        self._tables = manifest.tables if manifest else {}
        self._part = part

    def num_events(self, users: pa.Array) -> np.ndarray:
        """Events behind each user's newest tokens; 0 without any."""
        place = pc.index_in(users, self._events[self._user].combine_chunks())
        return pc.fill_null(self._events["token_events"].take(place), 0).to_numpy().astype(np.int64)

    def streams(
        self, ids: list[Any], known: np.ndarray, histories: Histories, rows: list[int]
    ) -> dict[int, tuple[np.ndarray, int]]:
        """Stored streams of these rows, with the time of their last event, where their last event is still the last of its time that the log has there.

        An event that came late moves those after it: then the history is read from its start again.
        """
        found: dict[int, tuple[np.ndarray, int]] = {}
        stored = self.stored([ids[row] for row in rows]) if rows else {}
        for row in rows:
            _, kept = stored.get(ids[row], (b"", None))
            if kept is None:
                continue
            try:
                state = decode(kept, ids[row])
            except EnvelopeError:
                continue  # damaged: the whole history is read instead
            last = int(histories.offsets[row] + known[row] - 1)
            same = last < histories.offsets[row + 1] and histories.times[last] == state.as_of
            followed = last + 1 < histories.offsets[row + 1] and histories.times[last + 1] <= state.as_of
            ours = state.fingerprint == self._plan.options["version"] and state.num_events == known[row]
            if same and not followed and ours and state.tokens_SD is not None:
                found[row] = (state.tokens_SD, state.as_of)
        return found

    def stored(self, ids: list[Any]) -> dict[Any, tuple[bytes, bytes | None]]:
        """Newest envelopes of users."""
        places = pc.index_in(pa.array(ids, self._stored[self._user].type), self._stored[self._user].combine_chunks())
        rows = self._stored.take(places.drop_null()).select([self._user, "tokens", "state"]).to_pylist()
        return {row[self._user]: (row["tokens"], row["state"]) for row in rows}

    @cached_property
    def _events(self) -> pa.Table:
        return self._newest("token_rows", ["token_events"])

    @cached_property
    def _stored(self) -> pa.Table:
        return self._newest("summary_tokens", ["tokens", "state"])

    def _newest(self, table: str, columns: list[str]) -> pa.Table:
        keys = [self._user, TOKEN_VERSION.join_key, EVENT_TIMESTAMP]
        folder, rows = self._plan.folder, [arrow_schema(self._plan.contract.table(table)).empty_table()]
        for part in self._tables.get(table, []):
            name = PartName.of(part.path)
            if name is None or (name.parts == self._plan.options["log_parts"] and name.part != self._part):
                continue  # of other users: users keep their log part as long as the number of parts stays
            read = folder.read_path(f"{folder.root}/{part.path}", [*keys, *columns])
            rows.append(read.filter(pc.equal(read[TOKEN_VERSION.join_key], self._plan.options["version"])))
        merged = pa.concat_tables([row.select([*keys, *columns]) for row in rows]).combine_chunks()
        return newest_rows(merged, self._user) if merged.num_rows else merged


def prepare(plan: RunPlan, published: Manifest | None) -> RunPlan:
    """Give the run its number and its time; a version keeps the kind and snapshots that it was begun with.

    A run that was killed finds the time that it had claimed. A run of other code than the published one's builds its
    version anew; where the online store is another one, or gone, what is stored offline goes online again.

    Raises:
        OptionsError: snapshots or a kind that this version's earlier rows do not have.
    """
    before, version = (published.options if published else {}), plan.options["version"]
    begun = before.get("versions", {}).get(version)
    full = plan.options["full"] or (begun is not None and begun["code"] != VERSIONS[plan.job])
    asked = {name: plan.options[name] for name in ("every_days", "kind") if plan.options[name] is not None}
    kept = {name: begun[name] for name in ("every_days", "kind")} if begun else {"every_days": 0.0, "kind": "fp16"}
    if begun is not None and not full and (other := {n: v for n, v in asked.items() if v != kept[n]}):
        raise OptionsError(
            f"tokens of version {version} were built with {kept}, asked for are {other}: pass --full to build them anew"
        )
    chosen = {**kept, **asked}
    store = store_digest(settings_of(plan))
    lost = published is not None and (
        published.inputs.get("store") != store or not output_is_there(plan.job, settings_of(plan))
    )
    if published and plan.run_id in published.runs:  # the same work again, so its files must have other names
        plan = replace(plan, run_id=digest_of([plan.run_id, published.digest]))
    parts = published.tables.get(token_log.TABLE, []) if published else []
    runs = [name.run for part in parts if (name := PartName.of(part.path))]
    options = {
        **chosen,
        "full": full,
        "refill": plan.options["refill"] or lost,
        "versions": {**before.get("versions", {}), version: {**chosen, "code": VERSIONS[plan.job]}},
        "run_number": max(runs, default=0) + 1,
        "computed_at_micros": _claim(plan, before.get("computed_at_micros", 0)),
        "log_parts": len(plan.folder_of("user_history").require().tables["history_log"]),
        "first_event_micros": first_event(plan) if chosen["every_days"] else 0,
    }
    return replace(plan, options={**plan.options, **options})


def _claim(plan: RunPlan, before: int) -> int:
    """The run's time: as asked for, as claimed by a run of this name that was killed, or now; time never runs back."""
    if plan.options["computed_at"]:
        return iso_micros(plan.options["computed_at"])
    folder, claim = plan.folder, f"{plan.folder.root}/claims/{plan.run_id}.json"
    if (stored := folder.read_bytes(claim)) is not None:
        claimed: int = json.loads(stored)["computed_at"]
        return max(claimed, before + 1)
    computed_at = max(time.time_ns() // 1000, before + 1)
    folder.write_bytes(claim, json.dumps({"computed_at": computed_at}).encode())
    return computed_at


def first_event(plan: RunPlan) -> int:
    """Time of the oldest event of all, microseconds."""
    folder = plan.folder_of("user_history")
    firsts = [folder.read_path(path, ["first_event_s"])["first_event_s"] for path in folder.paths("user_stats")]
    return min((pc.min(column).as_py() for column in firsts if len(column)), default=0) * 1_000_000


def carried(plan: RunPlan, published: Manifest | None) -> dict[str, list[Part]]:
    """Parts of earlier runs that stay: all of them, but those of this version where everything was built anew."""
    if published is None:
        return {}
    versions = token_log.versions_of(plan.contract, plan.folder, published) if plan.options["full"] else {}

    def of_this_version(part: Part) -> bool:
        name = PartName.of(part.path)
        return name is not None and versions.get(name) == plan.options["version"]

    return {
        table: [part for part in published.tables.get(table, []) if part.rows and not of_this_version(part)]
        for table in CARRIED
    }


def finish(plan: RunPlan, counts: dict[str, int] | None, settings: Settings) -> list[str]:
    """Note the coverage; the bundle goes live where enough users have tokens. Returns what to tell."""
    catalogue, options = Catalogue(settings.catalogue_url), plan.options
    if counts is not None:
        catalogue.record_tokens(
            fingerprint=options["version"],
            dataset=plan.dataset,
            recipe=options["recipe"],
            users=counts["users"],
            covered=counts["covered"],
            shape=tuple(options["shape"]),
        )
    built = {row.fingerprint: row for row in catalogue.token_versions(plan.dataset)}.get(options["version"])
    if built is None:
        return []
    said = [
        f"tokens {options['version'][:12]}: {built.covered:,} of {built.users:,} users covered ({built.coverage:.1%})"
    ]
    if counts and counts.get("online_kept_newer"):
        said.append(f"{counts['online_kept_newer']:,} users had newer tokens online, which stay")
    if options["not_live"]:
        return said
    name = f"{options['recipe']}@{options['bundle'][:12]}"
    if built.coverage < COVERAGE_TO_GO_LIVE:
        return [*said, f"fewer than {COVERAGE_TO_GO_LIVE:.0%}, so {name} does not go live"]
    catalogue.set_live(plan.dataset, options["bundle"])
    return [*said, f"{name} is live"]


def resolve(settings: Settings, options: dict[str, Any]) -> dict[str, Any]:
    """Which bundle is meant, and which tokens it makes.

    Raises:
        OptionsError: there is no such bundle, or it makes no tokens.
    """
    from modeling.bundle import read_manifest

    catalogue, name = Catalogue(settings.catalogue_url), options["bundle"]
    try:
        row = catalogue.bundle(settings.dataset, name) if name else catalogue.live_bundle(settings.dataset)
    except LookupError as error:
        raise OptionsError(str(error)) from error
    tokens = read_manifest(row.path)["tokens"]
    if tokens is None or not tokens["made_here"]:
        raise OptionsError(
            f"bundle {row.recipe}@{row.digest[:12]} makes no summary tokens: name one of a VISTA recipe with a stage 1 by --bundle"
        )
    made = {"version": tokens["version"], "shape": tokens["shape"]}
    return {**options, "bundle": row.digest, "recipe": row.recipe, "path": row.path, **made}


JOB = Job(
    name="summary_tokens",
    doc="histories → summary tokens, offline and online",
    reads={"user_history": ("history_log",)},
    options={
        "bundle": None,
        "kind": None,
        "every_days": None,
        "full": False,
        "refill": False,
        "computed_at": None,
        "not_live": False,
    },
    steps=SummariseHistories,
    num_parts=lambda plan, units: 2 * units,
    resolve=resolve,
    prepare=prepare,
    carried=carried,
    finish=finish,
)
