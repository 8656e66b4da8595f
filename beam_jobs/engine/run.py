"""The life of a run: plan, build parts, pass the gates, publish the manifest. Every job goes through here.

A run is named by a digest of its inputs and options, so a rerun writes the same files, and a job that is up to
date is known before anything is read. Nothing that a run writes is visible before its manifest, which is
written last.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace

from beam_jobs.engine.inputs import current_inputs, output_is_there
from beam_jobs.engine.job import Job
from beam_jobs.engine.options import RunOptions, naming
from beam_jobs.engine.parts import add_empty_tables, collect
from beam_jobs.engine.pipeline import pipeline_of, run_pipeline, threads_of
from beam_jobs.engine.plan import InputPart, RunPlan, Unit
from beam_jobs.engine.surroundings import Surroundings
from feature_repo import datasets
from feature_repo.contract.arrow import iso_micros, micros_iso
from feature_repo.history.known import NEVER
from feature_repo.home.erased import erased_of
from feature_repo.home.tables import JobFolder, Manifest, Part, StaleTableError, digest_of
from feature_repo.settings import Settings
from feature_repo.store.received import Received
from feature_repo.store.store import ONLINE, local_file

# Inputs that no job builds
SOURCES = ("raw", "received", "views", "erased")


@dataclass(frozen=True)
class Planned:
    """A run that is named: its plan, the pieces of its input, and their digests."""

    plan: RunPlan
    units: list[Unit]
    inputs: dict[str, str]


@dataclass(frozen=True)
class Outcome:
    """How a run ended: `built`, or up to date with nothing done; and lines for the person who ran it."""

    manifest: Manifest
    built: bool
    docs: str | None = None
    lines: tuple[str, ...] = ()


def plan_run(job: Job, settings: Settings, options: RunOptions, as_of: str | None) -> Planned:
    """Resolve inputs and name the run.

    Raises:
        TableNotBuiltError: an input job has not run.
        StaleTableError: an input was built under a contract that is not the one in force.
        RawDataError: the raw data is missing or not of the declared shape.
    """
    dataset = datasets.load(settings.dataset)
    contract = datasets.load_contract(settings.dataset)
    # 1. Pin the runs of the input jobs, and whatever else makes this run stale.
    sources = (*job.reads, *job.also_depends_on)
    pinned = {
        source: JobFolder(settings.home, source).require(contract)
        for source in sources
        if source not in SOURCES
    }
    names = ["code", *sources, *(["store"] if job.writes_online else [])]
    unpinned = [name for name in names if name not in pinned]
    inputs = current_inputs(type(job).__module__, unpinned, settings)
    inputs |= {source: manifest.digest for source, manifest in pinned.items()}
    # 2. One unit of work for each part of an input.
    units: list[Unit] = []
    as_of_micros = None
    for source, tables in job.reads.items():
        if source == "raw":
            raw = dataset.raw_units(settings.data)
            first = len(units)
            units += [Unit(first + n, "raw", unit, unit.rows) for n, unit in enumerate(raw)]
            continue
        if source == "received":
            received = Received(settings.home, contract)
            for file in received.files():
                units.append(Unit(len(units), source, file, received.num_rows(file)))
            continue
        manifest = pinned[source]
        as_of_micros = max(as_of_micros or 0, manifest.as_of_micros)
        for table in tables:
            parts = manifest.tables[table]
            units += [
                Unit(len(units) + i, table, InputPart(source, part), part.rows)
                for i, part in enumerate(parts)
            ]
    # 3. The run's name is a digest of all that decides its rows.
    if as_of:
        as_of_micros = iso_micros(as_of)
    run_id = digest_of(
        [job.name, settings.dataset, contract.fingerprint, naming(asdict(options)), as_of, inputs]
    )
    plan = RunPlan(
        job=job.name,
        dataset=settings.dataset,
        home=settings.home,
        run_id=run_id,
        as_of=as_of_micros,
        options=options,
        profile=settings.profile,
        catalogue_url=settings.catalogue_url,
        pinned=pinned,
        code_of=type(job).__module__,
        code=inputs["code"],
        surroundings=Surroundings.here(settings.dataset),
        online_file=str(local_file(settings, ONLINE)) if settings.profile == "local" else "",
    )
    return Planned(plan, units, inputs)


def run(
    job: Job,
    settings: Settings,
    options: RunOptions,
    beam_args: Sequence[str],
    *,
    as_of: str | None,
    max_bad_fraction: float | None,
    force: bool = False,
    tell: Callable[[str], None] = lambda phase: None,
) -> Outcome:
    """Run a job unless it is up to date, or all the same with `force`; `tell` hears of each phase as it begins.

    Raises:
        GateError: too many rows of an input or of a built table are bad.
        LostRowsError: rows that went in did not come out.
        RawDataError: no raw row is an event, or the newest is yet to come and no `as_of` was given.
        JobRunningError: another run of this job is under way.
        In every case nothing was published.
    """
    planned = plan_run(job, settings, options, as_of)
    # Not part of the name: neither how strict a gate is nor how many threads work changes a row.
    plan = replace(
        planned.plan, max_bad_fraction=max_bad_fraction, num_threads=threads_of(beam_args)
    )
    units = planned.units
    with plan.folder.lock():
        published = plan.folder.manifest()
        built_before = published is not None and plan.run_id in published.runs
        # 1. Up to date?
        skips = built_before and not force and not options.repeats
        if published and skips and output_is_there(job.name, settings):
            lines = job.finish(plan, None, settings)
            return Outcome(published, built=False, lines=tuple(lines))
        if not built_before:
            # What a killed run of the same name left
            plan.folder.discard(plan.run_id)
        plan = job.prepare(plan, published)
        # 2. Check, build, check.
        tell("checking inputs")
        docs = job.gate(plan, units, settings)
        tell("building")
        with job.held(plan):
            run_pipeline(pipeline_of(job, plan, units, beam_args), beam_args)
        _refuse_if_erased_meanwhile(plan, planned.inputs)
        add_empty_tables(plan)
        collected = collect(plan)
        job.account(plan, units, collected.counts)
        tell("checking built tables")
        built_docs = _built_gate(job, plan, settings, collected.tables)
        # 3. Publish: from here on the run is visible; everything above may be repeated.
        tables = dict(collected.tables)
        for name, parts in job.carried(plan, published).items():
            tables[name] = [*parts, *tables.get(name, [])]
        manifest = Manifest(
            job=job.name,
            run_id=plan.run_id,
            dataset=plan.dataset,
            fingerprint=plan.contract.fingerprint,
            as_of=micros_iso(job.as_of(plan, collected.counts)),
            options=asdict(plan.options),
            inputs=planned.inputs,
            counts=collected.counts,
            tables=tables,
            received=_received(plan, units),
            received_before=_received_before(plan, as_of),
            columns=job.columns(plan, tables),
        )
        plan.folder.publish(manifest)
        lines = job.finish(plan, manifest.counts, settings)
    return Outcome(manifest, built=True, docs=docs or built_docs, lines=tuple(lines))


def _received(plan: RunPlan, units: Sequence[Unit]) -> int:
    """Count the files of acknowledged events that a run knows, itself or through the runs that it reads."""
    if not plan.pinned:
        return sum(unit.table == "received" for unit in units)
    return min(manifest.received for manifest in plan.pinned.values())


def _received_before(plan: RunPlan, as_of: str | None) -> int:
    """Microseconds at or after which a run knows no acknowledged event of the files that it has read; `NEVER` where
    no time was asked for.
    """
    asked = iso_micros(as_of) if as_of else NEVER
    return min([asked, *(manifest.received_before for manifest in plan.pinned.values())])


def _refuse_if_erased_meanwhile(plan: RunPlan, inputs: dict[str, str]) -> None:
    """Refuse a run whose workers may have read two lists of erased users: it holds half of somebody.

    Raises:
        StaleTableError: the list changed while the run was under way; nothing was published.
    """
    if inputs.get("erased", "") not in ("", erased_of(plan.home).digest):
        raise StaleTableError(
            f"users were erased or allowed while {plan.job} was under way: nothing was published; run it again"
        )


def _built_gate(
    job: Job, plan: RunPlan, settings: Settings, tables: dict[str, list[Part]]
) -> str | None:
    """Check built tables against the contract. Returns where the Data Docs are.

    Rows that broke a limit are dead letters by now, so whatever is found here is a fault of a job,
    and a sample of the parts shows it.
    """
    from feature_repo.contract import expectations

    folder = plan.folder
    docs = None
    for table in plan.contract.tables:
        parts = tables.get(table.name)
        if parts and table.name not in job.set_aside:
            sampled = expectations.spread(parts, [part.rows for part in parts])
            batches = (folder.read_path(folder.verified(part)) for part in sampled)
            docs = expectations.gate(
                table,
                expectations.rebatch(batches),
                settings.path("expectations"),
                job.built_limit(plan),
            ).docs
    return docs
