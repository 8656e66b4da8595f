"""Job `summary_tokens`: histories → summary tokens, offline as they were at each snapshot and
online as they are now.

    history log ─► pieces of a part ─► stage 1 of a bundle ─► token log, row numbers, newest envelopes
    newest envelopes ─► online store

A user whose past is the one that the stored tokens know, and who has no new events, is skipped.
Where stage 1 streams, a user with new events goes on from the state stored beside the tokens;
otherwise the whole history is read. A user whose past was corrected has another digest, and is read
from the start; one who is gone gets a tombstone. The parts of earlier runs stand beside the new
ones, other versions' too.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import apache_beam as beam
import pyarrow.compute as pc

from beam_jobs.engine.bundles import bundle_at, bundle_folder, keep_bundle
from beam_jobs.engine.inputs import output_is_there
from beam_jobs.engine.job import Job
from beam_jobs.engine.options import RunOptions, TokenOptions
from beam_jobs.engine.parts import Built, write_built
from beam_jobs.engine.plan import RunPlan, Unit, job_code
from beam_jobs.engine.steps import Each, PlanDoFn
from beam_jobs.errors import LostRowsError, OptionsError
from beam_jobs.jobs.user_records import users_beyond
from beam_jobs.summary_tokens.summarise import Piece, parts_of, summarise_part, tombstones
from beam_jobs.summary_tokens.token_options import PreparedOptions, ResolvedOptions, prepared
from feature_repo.contract.arrow import iso_micros
from feature_repo.contract.counts import Counts
from feature_repo.history import token_log
from feature_repo.history.envelope import from_bytes
from feature_repo.history.token_log import PartName
from feature_repo.home.catalogue import COVERAGE_TO_GO_LIVE, Catalogue
from feature_repo.home.tables import JobFolder, Manifest, Part, digest_of
from feature_repo.settings import Settings
from feature_repo.store.store import note_epoch, store_digest

if TYPE_CHECKING:
    from modeling.summaries.summariser import Summariser

CARRIED = ("token_log", "token_rows", "summary_tokens")


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
            | "Users who are gone" >> beam.ParDo(Each(plan, tombstones)).with_output_types(Piece)
        )
        return (
            (pieces, gone)
            | "All pieces" >> beam.Flatten()
            | "Write offline" >> beam.ParDo(WriteOffline(plan)).with_output_types(Piece)
            | "Write online" >> beam.ParDo(WriteTokens(plan)).with_output_types(str)
        )


class Summarise(PlanDoFn):
    """One log part → its pieces. The model is loaded once for each process."""

    def process(self, unit: Unit) -> Iterator[Piece]:
        """Yields pieces; a part has at least one, which carries the part's counts."""
        yield from summarise_part(self.plan, unit, summariser_of(self.plan))


class WriteOffline(PlanDoFn):
    """The parts of a piece."""

    def process(self, piece: Piece) -> Iterator[Piece]:
        """Writes, then passes the piece on: what is online is offline already."""
        for built in parts_of(self.plan, piece):
            write_built(self.plan, built)
        yield piece


class WriteTokens(PlanDoFn):
    """The newest envelopes of a piece."""

    def __init__(self, plan: RunPlan) -> None:
        super().__init__(plan)
        self._tokens: Any = None

    def setup(self) -> None:
        """Open the store once for each worker process."""
        super().setup()
        from feature_repo.store.online_tokens import OnlineTokens

        self._tokens = OnlineTokens(self.plan.open_store(), self.plan.contract)

    def process(self, piece: Piece) -> Iterator[str]:
        """Writes, each value at the time at which it was computed, and notes how many were newer
        than what was stored.
        """
        every = {**piece.refilled, **piece.newest}
        version = prepared(self.plan).version
        envelopes = {user: from_bytes(tokens, user) for user, (tokens, _) in every.items()}
        # What a server made of events that came since stays.
        came = users_beyond(self.plan)
        digests = {u: one.digest for u, one in envelopes.items() if u in came}
        ahead = self._tokens.ahead(version, digests)
        by_time: dict[int, list[Any]] = {}
        for user, envelope in envelopes.items():
            if user not in ahead:
                by_time.setdefault(envelope.computed_at, []).append(user)
        stored = 0
        for computed_at, users in by_time.items():
            tokens, states = zip(*(every[user] for user in users), strict=True)
            stored += self._tokens.write(version, users, tokens, states, computed_at)
        numbers = {"online_stored": stored, "online_kept_newer": len(every) - stored}
        data = json.dumps(numbers).encode()
        name = piece.name.file("json")
        built = Built("online_writes", name, data, len(every), Counts(numbers))
        yield write_built(self.plan, built)


def summariser_of(plan: RunPlan) -> Summariser:
    """The bundle's stage 1, on one thread: the same sums on any machine."""
    import torch

    from modeling.bundle.summary import load_summariser

    torch.set_num_threads(1)
    options = prepared(plan)
    assert options.bundle is not None
    folder = bundle_folder(plan.home, Path(options.path), options.kept)
    return load_summariser(str(folder), plan.contract, options.bundle, options.device)


def prepare(plan: RunPlan, published: Manifest | None) -> RunPlan:
    """Give the run its number and its time; a version keeps the kind and snapshots that it was
    begun with.

    A run that was killed finds the time that it had claimed. A run of other code than the one that
    began a version builds it anew; where the online store is another one, or was emptied, what is
    stored offline goes online again.

    Raises:
        OptionsError: snapshots or a kind that this version's earlier rows do not have.
    """
    assert isinstance(plan.options, ResolvedOptions)
    asked = plan.options
    version = plan.options.version
    before: dict[str, Any] = published.options if published else {}
    code = job_code(__name__, plan.dataset)
    begun = before.get("versions", {}).get(version)
    # 1. A version keeps the kind and the snapshots that it was begun with.
    full = asked.full or (begun is not None and begun["code"] != code)
    wanted = {n: value for n in ("every_days", "kind") if (value := getattr(asked, n)) is not None}
    as_begun = (
        {n: begun[n] for n in ("every_days", "kind")}
        if begun
        else {"every_days": 0.0, "kind": "fp16"}
    )
    if (
        begun is not None
        and not full
        and (other := {n: v for n, v in wanted.items() if v != as_begun[n]})
    ):
        raise OptionsError(
            f"tokens of version {version} were built with {as_begun}, asked for are {other}: pass --full to build them anew"
        )
    chosen = {**as_begun, **wanted}
    # 2. Tokens go online again where the store is new or was emptied.
    settings = plan.settings
    lost = published is not None and (
        published.inputs.get("store") != store_digest(settings)
        or not output_is_there(plan.job, settings)
    )
    # The same work again, so its files must have other names
    if published and plan.run_id in published.runs:
        plan = replace(plan, run_id=digest_of([plan.run_id, published.digest]))
    # 3. Numbers and times that follow on earlier runs'.
    parts = published.tables.get(token_log.TABLE, []) if published else []
    runs = [name.run for part in parts if (name := PartName.of(part.path))]
    ended = () if begun is None or full else tuple(begun.get("as_of", ()))
    ends = sorted({*ended, plan.as_of})
    kept = Catalogue(plan.catalogue_url).bundle(plan.dataset, str(asked.bundle)).path
    keep_bundle(plan.home, settings.path(kept), kept)
    options = PreparedOptions(
        **{**asdict(asked), **chosen, "full": full, "refill": asked.refill or lost},
        path=str(settings.path(kept)),
        kept=kept,
        versions={**before.get("versions", {}), version: {**chosen, "code": code, "as_of": ends}},
        run_number=max(runs, default=0) + 1,
        computed_at_micros=_claim(plan, asked, before.get("computed_at_micros", 0)),
        log_parts=len(plan.pinned["user_history"].tables["history_log"]),
        first_event_micros=first_event(plan) if chosen["every_days"] else 0,
        earlier_as_of=tuple(at for at in ended if at != plan.as_of),
    )
    return replace(plan, options=options)


def _claim(plan: RunPlan, asked: ResolvedOptions, before: int) -> int:
    """The run's time: as asked for, as claimed by a run of this name that was killed, or now; time
    never runs back.
    """
    if asked.computed_at:
        return iso_micros(asked.computed_at)
    folder = plan.folder
    claim = f"{plan.folder.root}/claims/{plan.run_id}.json"
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
    """Parts of earlier runs that stay: all of them, but those of this version where everything was
    built anew.
    """
    if published is None:
        return {}
    versions = (
        token_log.versions_of(plan.contract, plan.folder, published) if prepared(plan).full else {}
    )

    def of_this_version(part: Part) -> bool:
        name = PartName.of(part.path)
        return name is not None and versions.get(name) == prepared(plan).version

    return {
        table: [
            part
            for part in published.tables.get(table, [])
            if part.rows and not of_this_version(part)
        ]
        for table in CARRIED
    }


def note_coverage(plan: RunPlan, counts: Counts | None, settings: Settings) -> list[str]:
    """Note the coverage; the bundle goes live where enough users have tokens. Returns lines for the person who
    ran the job.
    """
    catalogue = Catalogue(settings.catalogue_url)
    assert isinstance(plan.options, ResolvedOptions)
    options = plan.options
    # 1. Note what was built.
    lines = []
    if counts is not None:
        note_epoch(plan.settings, plan.job, plan.run_id)
        catalogue.record_tokens(
            fingerprint=options.version,
            dataset=plan.dataset,
            recipe=options.recipe,
            users=counts["users"],
            covered=counts["covered"],
            shape=options.shape,
        )
        if counts["tombstones"] or counts["corrected"]:
            lines.append(
                f"{counts['corrected']:,} users' past was corrected: summarised anew; "
                f"{counts['tombstones']:,} users are gone: tombstones"
            )
    built = {row.fingerprint: row for row in catalogue.token_versions(plan.dataset)}.get(
        options.version
    )
    if built is None:
        return []
    lines.append(
        f"tokens {options.version[:12]}: {built.covered:,} of {built.users:,} users covered ({built.coverage:.1%})"
    )
    if counts and counts["online_kept_newer"]:
        lines.append(f"{counts['online_kept_newer']:,} users had newer tokens online, which stay")
    # 2. The bundle goes live unless something speaks against it.
    if options.not_live:
        return lines
    digest = str(options.bundle)
    name = f"{options.recipe}@{digest[:12]}"
    if built.coverage < COVERAGE_TO_GO_LIVE:
        return [*lines, f"fewer than {COVERAGE_TO_GO_LIVE:.0%}, so {name} does not go live"]
    if reason := catalogue.held_back(plan.dataset, digest):
        return [
            *lines,
            f"{name} does not go live: {reason}. `python -m modeling bundles --promote {name}` does it all the same",
        ]
    catalogue.set_live(plan.dataset, digest)
    return [*lines, f"{name} is live"]


def resolve(settings: Settings, options: RunOptions) -> RunOptions:
    """Which bundle is meant, and which tokens it makes.

    Raises:
        OptionsError: there is no such bundle, or it makes no tokens.
    """
    from modeling.bundle.bundle import read_manifest

    assert isinstance(options, TokenOptions)
    catalogue = Catalogue(settings.catalogue_url)
    # 1. Find the bundle that is named, or the live one.
    name = options.bundle
    try:
        row = (
            catalogue.bundle(settings.dataset, name)
            if name
            else catalogue.live_bundle(settings.dataset)
        )
    except LookupError as error:
        raise OptionsError(str(error)) from error
    # 2. Refuse a bundle without tokens, and one that reads tokens made elsewhere.
    tokens = read_manifest(settings.path(row.path))["tokens"]
    if tokens is None or not tokens["made_here"]:
        raise OptionsError(
            f"bundle {row.recipe}@{row.digest[:12]} makes no summary tokens: name one of a VISTA recipe with a stage 1 by --bundle"
        )
    # The digest takes the name's place: another bundle may go live during the run.
    return ResolvedOptions(
        **{**asdict(options), "bundle": row.digest},
        recipe=row.recipe,
        version=tokens["version"],
        shape=tuple(tokens["shape"]),
    )


class SummaryTokensJob(Job):
    """Histories → summary tokens; every user of the log is counted."""

    name = "summary_tokens"
    doc = "histories → summary tokens, offline and online"
    reads: ClassVar = {"user_history": ("history_log",)}
    options = TokenOptions
    writes_online = True
    set_aside = ("token_dead_letters",)

    def resolve(self, settings: Settings, options: RunOptions) -> RunOptions:
        """Name the bundle, and the tokens that it makes."""
        return resolve(settings, options)

    def prepare(self, plan: RunPlan, published: Manifest | None) -> RunPlan:
        """Give the run its number and its time."""
        return prepare(plan, published)

    def gate(self, plan: RunPlan, units: Sequence[Unit], settings: Settings) -> str | None:
        """Refuse to summarise events that mean something else than what stage 1 learned from."""
        options = prepared(plan)
        name = f"{options.recipe}@{str(options.bundle)[:12]}"
        maker = bundle_at(Path(options.path), name)
        if maker is not None:
            columns = JobFolder(plan.home, "events").require().columns
            maker.refuse_other_meaning(columns, "Train and export it again")
        return None

    def steps(self, plan: RunPlan) -> beam.PTransform:
        """Log parts → tokens, offline, then online."""
        return SummariseHistories(plan)

    def num_parts(self, plan: RunPlan, units: int) -> int:
        """Two of each log part, where it is one piece."""
        return 2 * units

    def account(self, plan: RunPlan, units: Sequence[Unit], counts: Counts) -> None:
        """Check that every user of the log was counted."""
        given = sum(unit.rows for unit in units)
        if counts["users_in_log"] != given:
            raise LostRowsError(
                f"{given:,} users went in, {counts['users_in_log']:,} were counted: the run was not published"
            )

    def carried(self, plan: RunPlan, published: Manifest | None) -> dict[str, list[Part]]:
        """Name the parts of earlier runs that stay."""
        return carried(plan, published)

    def finish(self, plan: RunPlan, counts: Counts | None, settings: Settings) -> list[str]:
        """Note the coverage, and let the bundle go live."""
        return note_coverage(plan, counts, settings)


JOB = SummaryTokensJob()
