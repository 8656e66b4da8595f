"""The life of a run: plan, build parts, pass the gate, publish the manifest. Every job goes through here.

A run is named by a digest of its inputs and options, so a rerun writes the same files, and a job that is up to date is
known before anything is read. Nothing that a run writes is visible before its manifest, which is written last.
"""

from __future__ import annotations

import importlib
import json
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import apache_beam as beam
import pyarrow as pa
import pyarrow.fs as pafs

from beam_jobs.inputs import WRITES_ONLINE, current_inputs, output_is_there
from beam_jobs.partition import Key, Piece, join_pieces
from feature_repo import datasets
from feature_repo.arrow import arrow_schema, iso_micros, micros, micros_iso
from feature_repo.schema import Contract
from feature_repo.settings import CHECKOUT, DEFAULT_DATASET, Settings
from feature_repo.tables import JobFolder, Manifest, Part, digest_of, parquet_bytes

logger = logging.getLogger(__name__)
PARTS = "_parts"  # a small JSON beside each part: what it holds and what its maker counted


@dataclass(frozen=True)
class Unit:
    """A piece of input for one worker: a raw unit of the dataset, or a part of a built table."""

    number: int
    table: str
    source: Any
    rows: int


@dataclass(frozen=True)
class RunPlan:
    """All that workers need to know; small and plain, so that it ships with every step."""

    job: str
    dataset: str
    home: str
    run_id: str
    as_of: int | None  # microseconds; events at or after it are unknown to the run
    options: dict[str, Any]
    profile: str
    catalogue_url: str

    @property
    def contract(self) -> Contract:
        """The dataset's contract."""
        return datasets.load_contract(self.dataset)

    @property
    def folder(self) -> JobFolder:
        """Where the run writes."""
        return JobFolder(self.home, self.job)

    def folder_of(self, job: str) -> JobFolder:
        """Where another job has written."""
        return JobFolder(self.home, job)


@dataclass(frozen=True)
class Built:
    """One finished part: file content, rows, and counts to be summed over all parts (`max_…` takes the maximum)."""

    table: str
    name: str
    data: bytes | pa.Buffer
    rows: int
    counts: dict[str, int] = field(default_factory=dict)


Builder = Callable[[RunPlan, Key, pa.Table], Iterable[Built]]


@dataclass(frozen=True)
class Job:
    """What a job module declares.

    `reads` maps jobs to those of their tables that are this job's input ("raw" is the dataset's raw source); `steps`
    turns units of them into named parts. `resolve` makes options definite before the run is named; `prepare` may add to
    the plan once the run holds its folder; `carried` names parts of the published run that stay; `finish` is called when
    the manifest is there, with the run's counts, or without where it was up to date, and returns lines to tell.
    """

    name: str
    doc: str
    reads: dict[str, tuple[str, ...]]
    options: dict[str, Any]
    steps: Callable[[RunPlan], beam.PTransform]
    num_parts: Callable[[RunPlan, int], int]  # of the plan and the number of its units; at most
    also_depends_on: tuple[str, ...] = ()
    resolve: Callable[[Settings, dict[str, Any]], dict[str, Any]] = lambda settings, options: options
    prepare: Callable[[RunPlan, Manifest | None], RunPlan] = lambda plan, published: plan
    carried: Callable[[RunPlan, Manifest | None], dict[str, list[Part]]] = lambda plan, published: {}
    finish: Callable[[RunPlan, dict[str, int] | None, Settings], list[str]] = lambda plan, counts, settings: []


@dataclass(frozen=True)
class Outcome:
    """How a run ended: `built`, or `up to date` with nothing done."""

    manifest: Manifest
    built: bool
    docs: str | None = None
    said: tuple[str, ...] = ()


def settings_of(plan: RunPlan) -> Settings:
    """The settings under which a run was planned, on any worker."""
    default = plan.dataset == DEFAULT_DATASET and plan.home == str(CHECKOUT / ".memoir" / plan.dataset)
    return Settings(plan.dataset, None, plan.home, plan.profile, plan.catalogue_url, default)


class OptionsError(ValueError):
    """Options that do not go together, or name what is not there."""


class LostRowsError(RuntimeError):
    """Rows that went into a run did not come out of it."""


class BuildPart(beam.DoFn):
    """Join the pieces of one partition, build its parts and write them with their counts."""

    def __init__(self, plan: RunPlan, builder: Builder) -> None:
        self.plan, self.builder = plan, builder

    def process(self, element: tuple[Key, Iterable[Piece]]) -> Iterator[str]:
        """Write every part that the partition gives; yields their paths."""
        key, pieces = element
        for built in self.builder(self.plan, key, join_pieces(pieces)):
            yield write_built(self.plan, built)


@dataclass
class BuildTables(beam.PTransform):
    """Units → pieces by partition → parts: the shape of every job that writes tables.

    `read` turns one unit into keyed pieces, `build` one whole partition into parts; both are plain functions.
    """

    plan: RunPlan
    read: Callable[[RunPlan, Unit], Iterator[tuple[Key, Piece]]]
    build: Builder

    def expand(self, units: beam.PCollection) -> beam.PCollection:
        """The steps."""
        return (
            units
            | "Spread units" >> beam.Reshuffle()
            | "Read and partition" >> beam.ParDo(ReadUnit(self.plan, self.read)).with_output_types(tuple[Key, Piece])
            | "Gather partitions" >> beam.GroupByKey()
            | "Write parts" >> beam.ParDo(BuildPart(self.plan, self.build)).with_output_types(str)
        )


class ReadUnit(beam.DoFn):
    """One unit as keyed pieces."""

    def __init__(self, plan: RunPlan, read: Callable[[RunPlan, Unit], Iterator[tuple[Key, Piece]]]) -> None:
        self.plan, self.read = plan, read

    def process(self, unit: Unit) -> Iterator[tuple[Key, Piece]]:
        """Yields pieces."""
        beam.metrics.Metrics.counter(self.plan.job, "units_read").inc()
        yield from self.read(self.plan, unit)


def write_built(plan: RunPlan, built: Built) -> str:
    """Write a part, then the JSON that says it is whole."""
    part = plan.folder.write_part(plan.run_id, built.table, built.name, built.data, built.rows)
    beam.metrics.Metrics.counter(plan.job, f"{built.table}_rows").inc(built.rows)
    note = json.dumps({"table": built.table, "part": asdict(part), "counts": built.counts}, sort_keys=True).encode()
    plan.folder.write_part(plan.run_id, PARTS, f"{built.table}-{built.name}.json", note, 0)
    return part.path


def load_job(name: str) -> Job:
    """The job of that name."""
    job: Job = importlib.import_module(f"beam_jobs.{name}").JOB
    return job


def plan_run(
    job: Job, settings: Settings, options: dict[str, Any], as_of: str | None
) -> tuple[RunPlan, list[Unit], dict[str, str]]:
    """Resolve inputs and name the run. Returns the plan, its units and the digests of its inputs.

    Raises:
        TableNotBuiltError: an input job has not run.
        RawDataError: the raw data is missing or of another shape.
    """
    dataset = datasets.load(settings.dataset)
    names = ["code", *job.reads, *job.also_depends_on, *(["store"] if job.name in WRITES_ONLINE else [])]
    for source in (*job.reads, *job.also_depends_on):
        if source != "raw":
            JobFolder(settings.home, source).require()
    inputs = current_inputs(job.name, names, settings)
    units: list[Unit] = []
    as_of_micros = None
    for source, tables in job.reads.items():
        if source == "raw":
            raw = dataset.raw_units(settings.data)
            units += [Unit(number, "raw", unit, unit.rows) for number, unit in enumerate(raw)]
            continue
        folder = JobFolder(settings.home, source)
        manifest = folder.require()
        as_of_micros = max(as_of_micros or 0, manifest.as_of_micros)
        for table in tables:
            parts = manifest.tables[table]
            units += [
                Unit(len(units) + i, table, f"{folder.root}/{part.path}", part.rows) for i, part in enumerate(parts)
            ]
    if as_of:
        as_of_micros = iso_micros(as_of)
    fingerprint = datasets.load_contract(settings.dataset).fingerprint
    run_id = digest_of([job.name, settings.dataset, fingerprint, options, as_of, inputs])
    plan = RunPlan(
        job.name,
        settings.dataset,
        settings.home,
        run_id,
        as_of_micros,
        options,
        settings.profile,
        settings.catalogue_url,
    )
    return plan, units, inputs


def run(
    job: Job,
    settings: Settings,
    options: dict[str, Any],
    beam_args: Sequence[str],
    *,
    as_of: str | None,
    max_bad_fraction: float | None,
    tell: Callable[[str], None] = lambda phase: None,
) -> Outcome:
    """Run a job unless it is up to date; `tell` hears of each phase as it begins.

    Raises:
        GateError: too many rows of an input or of a built table are bad.
        LostRowsError: rows that went in did not come out.
        RawDataError: no raw row is an event, or the newest is yet to come and no `as_of` was given.
        JobRunningError: another run of this job is under way.
        In every case nothing was published.
    """
    plan, units, inputs = plan_run(job, settings, options, as_of)
    with plan.folder.lock():
        published = plan.folder.manifest()
        done = published is not None and plan.run_id in published.runs and not options.get("refill")
        if published and done and output_is_there(job.name, settings):
            return Outcome(published, built=False, said=tuple(job.finish(plan, None, settings)))
        if not published or plan.run_id not in published.runs:
            plan.folder.discard(plan.run_id)  # what a killed run of the same name left
        plan = job.prepare(plan, published)
        docs = None
        if "raw" in job.reads:
            tell("checking raw rows")
            docs = _raw_gate(plan, settings, units, max_bad_fraction)
        tell("building")
        pipeline(job, plan, units, beam_args).run().wait_until_finish()
        _add_empty_tables(plan)
        tables, counts = collect(plan)
        _account(job, plan, units, counts)
        tell("checking built tables")
        built_docs = _built_gate(plan, settings, tables, 0.0 if "raw" in job.reads else max_bad_fraction or 0.0)
        carried = job.carried(plan, published)
        newest = counts.pop("max_event_micros", 0)
        manifest = Manifest(
            job=job.name,
            run_id=plan.run_id,
            dataset=plan.dataset,
            fingerprint=plan.contract.fingerprint,
            as_of=micros_iso(newest + 1 if plan.as_of is None else plan.as_of),
            options=plan.options,
            inputs=inputs,
            counts=dict(sorted(counts.items())),
            tables={**tables, **{name: [*kept, *tables.get(name, [])] for name, kept in carried.items()}},
        )
        plan.folder.publish(manifest)
        said = job.finish(plan, manifest.counts, settings)
    return Outcome(manifest, built=True, docs=docs or built_docs, said=tuple(said))


def _add_empty_tables(plan: RunPlan) -> None:
    """A declared table without a row is an empty table, not a missing one."""
    written = collect(plan)[0]
    for table in plan.contract.tables:
        if table.job == plan.job and table.name not in written:
            write_built(
                plan, Built(table.name, "part-00000.parquet", parquet_bytes(arrow_schema(table).empty_table()), 0)
            )


def _account(job: Job, plan: RunPlan, units: list[Unit], counts: dict[str, int]) -> None:
    """Every row that went in came out: as an event, a dead letter or a counted input.

    Raises:
        LostRowsError: it did not.
        RawDataError: not one raw row is an event.
    """
    if "raw" in job.reads:
        given = sum(unit.rows for unit in units if unit.source.kind == "events")
        kept, dead = counts.get("rows_events", 0), counts.get("rows_dead", 0)
        if not given == counts.get("rows_read", 0) == kept + dead:
            raise LostRowsError(
                f"{given:,} raw rows, {counts.get('rows_read', 0):,} read, {kept:,} kept + {dead:,} dead: the run was not published"
            )
        if not kept:
            raise datasets.RawDataError(
                f"all {dead:,} raw rows are dead letters: is this {plan.dataset!r}, and --as_of right? Nothing was published"
            )
        if plan.as_of is None and counts["max_event_micros"] > time.time() * 1e6:
            raise datasets.RawDataError(
                f"the newest event is of {micros_iso(counts['max_event_micros'])}, which is yet to come: pass --as_of, and later rows "
                "become dead letters. Nothing was published"
            )
    elif "users_in_log" in counts and counts["users_in_log"] != (given := sum(unit.rows for unit in units)):
        raise LostRowsError(
            f"{given:,} users went in, {counts['users_in_log']:,} were counted: the run was not published"
        )
    elif "events" in counts and plan.as_of is not None:
        given = sum(_rows_before(plan, unit) for unit in units)
        if given != counts["events"]:
            raise LostRowsError(
                f"{given:,} events before {micros_iso(plan.as_of)} went in, {counts['events']:,} were counted: the run was not published"
            )


def _rows_before(plan: RunPlan, unit: Unit) -> int:
    """Events of a part that the run may know, from its timestamps alone."""
    assert plan.as_of is not None
    times = micros(plan.folder.read_path(unit.source, ["event_timestamp"])["event_timestamp"])
    return int((times < plan.as_of).sum())


def pipeline(job: Job, plan: RunPlan, units: list[Unit], beam_args: Sequence[str]) -> beam.Pipeline:
    """The job's pipeline, not yet run."""
    from apache_beam.options.pipeline_options import PipelineOptions

    made = beam.Pipeline(options=PipelineOptions(list(beam_args)))
    _ = made | "List inputs" >> beam.Create(units) | job.name >> job.steps(plan)
    return made


def collect(plan: RunPlan) -> tuple[dict[str, list[Part]], dict[str, int]]:
    """Parts and summed counts of a run whose pipeline has finished."""
    folder = plan.folder
    root = f"{folder.root}/{plan.run_id}/{PARTS}"
    fs = folder.filesystem
    tables: dict[str, list[Part]] = {}
    counts: Counter[str] = Counter()
    if fs.get_file_info(root).type == pafs.FileType.NotFound:
        return tables, {}
    for info in sorted(fs.get_file_info(pafs.FileSelector(root)), key=lambda i: i.base_name):
        if info.base_name.startswith("."):
            continue
        with fs.open_input_stream(info.path) as stream:
            note = json.loads(stream.read())
        part = Part(**note["part"])
        tables.setdefault(note["table"], []).append(part)
        counts[f"rows_{note['table']}"] += part.rows
        for name, value in note["counts"].items():
            counts[name] = max(counts[name], value) if name.startswith("max_") else counts[name] + value
    return tables, dict(counts)


def describe(job: Job, plan: RunPlan, units: list[Unit], beam_args: Sequence[str]) -> str:
    """What a run would do: graph, inputs, estimated rows. Writes nothing."""
    from apache_beam.pipeline import PipelineVisitor

    steps: list[str] = []

    class Visitor(PipelineVisitor):
        def enter_composite_transform(self, node: Any) -> None:
            if node.full_label:
                steps.append(f"  {'  ' * node.full_label.count('/')}{node.full_label.rsplit('/', 1)[-1]}")

        def visit_transform(self, node: Any) -> None:
            steps.append(f"  {'  ' * node.full_label.count('/')}{node.full_label.rsplit('/', 1)[-1]}")

    pipeline(job, plan, units, beam_args).visit(Visitor())
    by_table: Counter[str] = Counter()
    for unit in units:
        by_table[unit.table] += unit.rows
    inputs = [
        f"  {table}: {sum(u.table == table for u in units)} pieces, about {rows:,} rows"
        for table, rows in by_table.items()
    ]
    current = plan.folder.manifest()
    state = "up to date" if current and current.run_id == plan.run_id else "would be built"
    return "\n".join([f"{job.name}: {job.doc}", f"run {plan.run_id}: {state}", "inputs:", *inputs, "graph:", *steps])


def _raw_gate(plan: RunPlan, settings: Settings, units: list[Unit], max_bad_fraction: float | None) -> str:
    from feature_repo import expectations

    dataset = datasets.load(plan.dataset)
    limit = dataset.SPEC.max_bad_fraction if max_bad_fraction is None else max_bad_fraction
    raw = (dataset.read_raw(unit.source) for unit in units if unit.source.kind == "events")
    return expectations.gate(dataset.SPEC.raw, expectations.rebatch(raw), settings.path("expectations"), limit).docs


def _built_gate(plan: RunPlan, settings: Settings, tables: dict[str, list[Part]], limit: float) -> str | None:
    from feature_repo import expectations

    folder, docs = plan.folder, None
    for table in plan.contract.tables:
        parts = tables.get(table.name)
        if parts and table.name != "dead_letters":
            batches = (folder.read_path(f"{folder.root}/{part.path}") for part in parts)
            docs = expectations.gate(table, expectations.rebatch(batches), settings.path("expectations"), limit).docs
    return docs
