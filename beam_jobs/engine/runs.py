"""The life of a run: plan, build parts, pass the gate, publish the manifest. Every job goes through
here.

A run is named by a digest of its inputs and options, so a rerun writes the same files, and a job
that is up to date is known before anything is read. Nothing that a run writes is visible before its
manifest, which is written last.
"""

from __future__ import annotations

import importlib
import json
import logging
import os
import re
import sys
import tempfile
from abc import ABC, abstractmethod
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from threading import Lock
from typing import IO, Any, Generic, TypeVar

import apache_beam as beam
import pyarrow as pa
import pyarrow.fs as pafs
from apache_beam.transforms.window import GlobalWindow
from apache_beam.utils.timestamp import MIN_TIMESTAMP
from apache_beam.utils.windowed_value import WindowedValue

from beam_jobs.engine.inputs import WRITES_ONLINE, current_inputs, job_module, output_is_there
from beam_jobs.engine.options import RunOptions
from beam_jobs.engine.partition import Key, Piece, join_pieces
from beam_jobs.errors import LostRowsError, OptionsError, RunnerError
from feature_repo import datasets
from feature_repo.contract.arrow import arrow_schema, iso_micros, micros, micros_iso
from feature_repo.contract.contract import Contract
from feature_repo.errors import ExpectedError
from feature_repo.home.erased import erased_of
from feature_repo.home.tables import (
    JobFolder,
    Manifest,
    Part,
    StaleTableError,
    digest_of,
    parquet_bytes,
)
from feature_repo.settings import CHECKOUT, DEFAULT_DATASET, Settings

logger = logging.getLogger(__name__)
SET_ASIDE = ("dead_letters", "token_dead_letters")  # tables of what broke a limit
SOURCES = ("raw", "views", "erased")  # inputs that no job builds
CORES = os.cpu_count() or 1
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
    options: RunOptions
    profile: str
    catalogue_url: str
    pinned: dict[str, Manifest] = field(
        default_factory=dict, repr=False
    )  # of the jobs that it reads, as they were
    max_bad_fraction: float | None = None  # None: the dataset's for raw rows, 0 for built tables

    @property
    def contract(self) -> Contract:
        """The dataset's contract."""
        return datasets.load_contract(self.dataset)

    @property
    def folder(self) -> JobFolder:
        """The folder that the run writes."""
        return JobFolder(self.home, self.job)

    def input_folder(self, job: str) -> JobFolder:
        """Return the folder of an input job."""
        return JobFolder(self.home, job)

    def input_paths(self, job: str, table: str) -> list[str]:
        """List the parts of an input job's table in the very run that this one names as its input,
        republished since or not.
        """
        root = self.input_folder(job).root
        return [f"{root}/{part.path}" for part in self.pinned[job].tables[table]]

    def read_input(self, job: str, table: str) -> pa.Table:
        """That table, parts in order."""
        folder = self.input_folder(job)
        return pa.concat_tables([folder.read_path(path) for path in self.input_paths(job, table)])


@dataclass(frozen=True)
class Built:
    """One finished part: file content, rows, and counts.

    Counts are summed over all parts; of those named `max_…` and `min_…` the largest and the
    smallest is taken.
    """

    table: str
    name: str
    data: bytes | pa.Buffer
    rows: int
    counts: dict[str, int] = field(default_factory=dict)


Found = TypeVar("Found")
Builder = Callable[[RunPlan, Key, pa.Table], Iterable[Built]]
Counts = dict[str, int]


def nothing_to_account(plan: RunPlan, units: Sequence[Unit], counts: Counts) -> int | None:
    """The account of a job that leaves none."""
    return plan.as_of


def no_gate(plan: RunPlan, units: Sequence[Unit], settings: Settings) -> str | None:
    """The first gate of a job whose inputs have passed one already."""
    return None


@dataclass(frozen=True)
class Job:
    """The declaration of a job by its module.

    `reads` maps jobs to those of their tables that are this job's input ("raw" is the dataset's raw
    source); `steps` turns units of them into named parts. `gate` checks the inputs before anything
    is built and returns where its Data Docs are. `account` refuses a run into which more went than
    came out of it, and returns the instant (microseconds) before which it knows all events.
    `resolve` makes options definite before the run is named; `prepare` may add to the plan once the
    run holds its folder; `carried` names parts of the published run that stay; `finish` is called
    when the manifest is there, with the run's counts, or without where it was up to date, and
    returns lines to tell.
    """

    name: str
    doc: str
    reads: dict[str, tuple[str, ...]]
    options: type[RunOptions]
    steps: Callable[[RunPlan], beam.PTransform]
    num_parts: Callable[[RunPlan, int], int]  # of the plan and the number of its units; at most
    gate: Callable[[RunPlan, Sequence[Unit], Settings], str | None] = no_gate
    account: Callable[[RunPlan, Sequence[Unit], Counts], int | None] = nothing_to_account
    also_depends_on: tuple[str, ...] = ()
    resolve: Callable[[Settings, RunOptions], RunOptions] = lambda settings, options: options
    prepare: Callable[[RunPlan, Manifest | None], RunPlan] = lambda plan, published: plan
    carried: Callable[[RunPlan, Manifest | None], dict[str, list[Part]]] = lambda plan, published: {}
    finish: Callable[[RunPlan, Counts | None, Settings], list[str]] = (
        lambda plan, counts, settings: []
    )


@dataclass(frozen=True)
class Outcome:
    """How a run ended: `built`, or `up to date` with nothing done."""

    manifest: Manifest
    built: bool
    docs: str | None = None
    said: tuple[str, ...] = ()


def settings_of(plan: RunPlan) -> Settings:
    """The settings under which a run was planned, on any worker."""
    default = plan.dataset == DEFAULT_DATASET and plan.home == str(
        CHECKOUT / ".memoir" / plan.dataset
    )
    return Settings(plan.dataset, None, plan.home, plan.profile, plan.catalogue_url, default)


class ReadOnce(Generic[Found]):
    """A value that a process reads once for each run, however many threads ask.

    Example:
        >>> item_profiles = ReadOnce(lambda plan: plan.read_input("events", "item_profile"))
        >>> item_profiles(plan) is item_profiles(plan)
        True
    """

    def __init__(self, read: Callable[[RunPlan], Found]) -> None:
        self._read = read
        self._lock = Lock()
        self._found: dict[str, Found] = {}

    def __call__(self, plan: RunPlan) -> Found:
        """Return what the run reads, from memory if it was read before."""
        with self._lock:
            if plan.run_id not in self._found:
                self._found = {plan.run_id: self._read(plan)}
            return self._found[plan.run_id]


class SideBySide(beam.DoFn, ABC):
    """Elements of a bundle in as many threads as there are cores: Arrow's work leaves Python free.

    At most one element more than there are cores is in memory at a time; outputs keep the order of
    their elements.
    """

    @abstractmethod
    def work(self, element: Any) -> Iterable[Any]:
        """Work on one element; on a thread of the pool."""

    def emit(self, made: Any) -> Any:
        """Yield the outputs of a result; on the bundle's thread, where Beam counts."""
        return made

    def start_bundle(self) -> None:
        """Start the bundle's pool."""
        self._pool = ThreadPoolExecutor(CORES)
        self._waiting = deque[Future[list[Any]]]()

    def process(self, element: Any) -> Iterator[Any]:
        """Hand an element over; yields what is finished by then."""
        self._waiting.append(self._pool.submit(lambda: list(self.work(element))))
        while len(self._waiting) > CORES:
            yield from map(self.emit, self._next())

    def finish_bundle(self) -> Iterator[WindowedValue]:
        """Wait for the rest."""
        while self._waiting:
            for made in map(self.emit, self._next()):
                yield WindowedValue(made, MIN_TIMESTAMP, [GlobalWindow()])
        self._pool.shutdown()

    def _next(self) -> list[Any]:
        """The oldest element's results; where it failed, no other goes on writing behind the error."""
        try:
            return self._waiting.popleft().result()
        except BaseException:
            self._pool.shutdown(cancel_futures=True)
            raise


class BuildPart(SideBySide):
    """Join the pieces of one partition, build its parts and write them with their counts."""

    def __init__(self, plan: RunPlan, builder: Builder) -> None:
        self.plan = plan
        self.builder = builder

    def process(self, element: tuple[Key, Iterable[Piece]]) -> Iterator[str]:
        """The pieces are read here, for Beam hands them out on the bundle's own thread alone."""
        key, pieces = element
        yield from super().process((key, list(pieces)))

    def work(self, element: tuple[Key, Iterable[Piece]]) -> Iterator[tuple[str, str, int]]:
        """Write every part that the partition gives; yields path, table and rows of each."""
        key, pieces = element
        for built in self.builder(self.plan, key, join_pieces(pieces)):
            yield write_part(self.plan, built), built.table, built.rows

    def emit(self, made: tuple[str, str, int]) -> str:
        """The path, once its rows are counted."""
        path, table, rows = made
        beam.metrics.Metrics.counter(self.plan.job, f"{table}_rows").inc(rows)
        return path


@dataclass
class BuildTables(beam.PTransform):
    """Units → pieces by partition → parts: the shape of every job that writes tables.

    `read` turns one unit into keyed pieces, `build` one whole partition into parts; both are plain
    functions.
    """

    plan: RunPlan
    read: Callable[[RunPlan, Unit], Iterator[tuple[Key, Piece]]]
    build: Builder

    def expand(self, units: beam.PCollection) -> beam.PCollection:
        """The steps."""
        return (
            units
            | "Spread units" >> beam.Reshuffle()
            | "Read and partition"
            >> beam.ParDo(ReadUnit(self.plan, self.read)).with_output_types(tuple[Key, Piece])
            | "Gather partitions" >> beam.GroupByKey()
            | "Write parts" >> beam.ParDo(BuildPart(self.plan, self.build)).with_output_types(str)
        )


class ReadUnit(SideBySide):
    """One unit as keyed pieces."""

    def __init__(
        self, plan: RunPlan, read: Callable[[RunPlan, Unit], Iterator[tuple[Key, Piece]]]
    ) -> None:
        self.plan = plan
        self.read = read

    def work(self, element: Unit) -> Iterator[tuple[Key, Piece]]:
        """Yields pieces."""
        return self.read(self.plan, element)

    def process(self, element: Unit) -> Iterator[tuple[Key, Piece]]:
        """A unit of unknown size is a stream, and goes through piece by piece."""
        beam.metrics.Metrics.counter(self.plan.job, "units_read").inc()
        if element.rows < 0:
            yield from self.work(element)
        else:
            yield from super().process(element)


def write_built(plan: RunPlan, built: Built) -> str:
    """Write a part and count its rows."""
    beam.metrics.Metrics.counter(plan.job, f"{built.table}_rows").inc(built.rows)
    return write_part(plan, built)


def write_part(plan: RunPlan, built: Built) -> str:
    """Write a part, then the JSON that says it is whole."""
    part = plan.folder.write_part(plan.run_id, built.table, built.name, built.data, built.rows)
    note = json.dumps(
        {"table": built.table, "part": asdict(part), "counts": built.counts}, sort_keys=True
    ).encode()
    plan.folder.write_part(plan.run_id, PARTS, f"{built.table}-{built.name}.json", note, 0)
    return part.path


def load_job(name: str) -> Job:
    """The job of that name."""
    job: Job = importlib.import_module(job_module(name)).JOB
    return job


@dataclass(frozen=True)
class Planned:
    """A run that is named: its plan, the pieces of its input, and their digests."""

    plan: RunPlan
    units: list[Unit]
    inputs: dict[str, str]


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
    names = ["code", *sources, *(["store"] if job.name in WRITES_ONLINE else [])]
    inputs = current_inputs(job.name, [name for name in names if name not in pinned], settings)
    inputs |= {source: manifest.digest for source, manifest in pinned.items()}
    # 2. One unit of work for each part of an input.
    units: list[Unit] = []
    as_of_micros = None
    for source, tables in job.reads.items():
        if source == "raw":
            raw = dataset.raw_units(settings.data)
            units += [Unit(number, "raw", unit, unit.rows) for number, unit in enumerate(raw)]
            continue
        folder = JobFolder(settings.home, source)
        manifest = pinned[source]
        as_of_micros = max(as_of_micros or 0, manifest.as_of_micros)
        for table in tables:
            parts = manifest.tables[table]
            units += [
                Unit(len(units) + i, table, f"{folder.root}/{part.path}", part.rows)
                for i, part in enumerate(parts)
            ]
    # 3. The run's name is a digest of all that decides its rows.
    if as_of:
        as_of_micros = iso_micros(as_of)
    run_id = digest_of(
        [job.name, settings.dataset, contract.fingerprint, asdict(options), as_of, inputs]
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
    # Not part of the name: how strict a gate is changes whether there are rows, not which.
    plan = replace(planned.plan, max_bad_fraction=max_bad_fraction)
    units = planned.units
    with plan.folder.lock():
        published = plan.folder.manifest()
        done = (
            published is not None
            and plan.run_id in published.runs
            and not force
            and not getattr(options, "refill", False)
        )
        if published and done and output_is_there(job.name, settings):
            return Outcome(published, built=False, said=tuple(job.finish(plan, None, settings)))
        if not published or plan.run_id not in published.runs:
            plan.folder.discard(plan.run_id)  # what a killed run of the same name left
        plan = job.prepare(plan, published)
        tell("checking inputs")
        docs = job.gate(plan, units, settings)
        tell("building")
        run_pipeline(pipeline(job, plan, units, beam_args), beam_args)
        _refuse_if_erased_meanwhile(plan, planned.inputs)
        _add_empty_tables(plan)
        tables, counts = collect(plan)
        as_of_micros = job.account(plan, units, counts)
        assert as_of_micros is not None, f"job {job.name} does not say up to when it knows events"
        tell("checking built tables")
        built_docs = _built_gate(plan, settings, tables)
        carried = job.carried(plan, published)
        manifest = Manifest(
            job=job.name,
            run_id=plan.run_id,
            dataset=plan.dataset,
            fingerprint=plan.contract.fingerprint,
            as_of=micros_iso(as_of_micros),
            options=asdict(plan.options),
            inputs=planned.inputs,
            counts=dict(sorted(counts.items())),
            tables={
                **tables,
                **{name: [*kept, *tables.get(name, [])] for name, kept in carried.items()},
            },
        )
        plan.folder.publish(
            manifest
        )  # from here on the run is visible; everything above may be repeated
        said = job.finish(plan, manifest.counts, settings)
    return Outcome(manifest, built=True, docs=docs or built_docs, said=tuple(said))


def _refuse_if_erased_meanwhile(plan: RunPlan, inputs: dict[str, str]) -> None:
    """A run whose workers may have read two lists of erased users holds half of somebody.

    Raises:
        StaleTableError: the list changed while the run was under way; nothing was published.
    """
    if inputs.get("erased", "") not in ("", erased_of(plan.home).digest):
        raise StaleTableError(
            f"users were erased or allowed while {plan.job} was under way: nothing was published; run it again"
        )


def _add_empty_tables(plan: RunPlan) -> None:
    """A declared table without a row is an empty table, not a missing one."""
    written = collect(plan)[0]
    for table in plan.contract.tables:
        if table.job == plan.job and table.name not in written:
            write_built(
                plan,
                Built(
                    table.name,
                    "part-00000.parquet",
                    parquet_bytes(arrow_schema(table).empty_table()),
                    0,
                ),
            )


def account_of_events(plan: RunPlan, units: Sequence[Unit], counts: Counts) -> int | None:
    """Every event before `as_of` that went in was counted in some part.

    Raises:
        LostRowsError: it was not.
    """
    assert plan.as_of is not None
    given = sum(_rows_before(plan, unit) for unit in units)
    if given != counts.get("events", 0):
        raise LostRowsError(
            f"{given:,} events before {micros_iso(plan.as_of)} went in, {counts.get('events', 0):,} were counted: the run was "
            "not published"
        )
    return plan.as_of


def _rows_before(plan: RunPlan, unit: Unit) -> int:
    """Events of a part that the run may know, from its timestamps alone."""
    assert plan.as_of is not None
    times = micros(plan.folder.read_path(unit.source, ["event_timestamp"])["event_timestamp"])
    return int((times < plan.as_of).sum())


def pipeline(job: Job, plan: RunPlan, units: list[Unit], beam_args: Sequence[str]) -> beam.Pipeline:
    """The job's pipeline, not yet run."""
    from apache_beam.options.pipeline_options import PipelineOptions

    try:
        made = beam.Pipeline(options=PipelineOptions(list(beam_args)))
    except (ValueError, ImportError, AttributeError, NotImplementedError) as error:
        told = "; ".join(line.strip() for line in str(error).splitlines() if line.strip())
        raise OptionsError(f"Beam takes no such options ({' '.join(beam_args)}): {told}") from error
    _ = made | "List inputs" >> beam.Create(units) | job.name >> job.steps(plan)
    return made


HERE = ("fnapirunner", "directrunner", "")  # runners whose workers are this process or its children
# What a worker raised, at the end of the text that Beam makes of it.
OURS = re.compile(r"^((?:feature_repo|beam_jobs|modeling)(?:\.\w+)+): ", re.MULTILINE)


def run_pipeline(made: beam.Pipeline, beam_args: Sequence[str]) -> None:
    """Run a pipeline to its end. Workers of other processes hand a mistake on as the text of a traceback,
    and print it: a person is told the mistake alone.

    Raises:
        ExpectedError: a worker met something that a person can mend; or the runner cannot run here.
    """
    runner = next((a.partition("=")[2] for a in beam_args if a.startswith("--runner=")), "")
    embedded = runner.lower() in HERE
    with _held_back(embedded and any("multi" in argument for argument in beam_args)) as noise:
        try:
            made.run().wait_until_finish()
        except (RuntimeError, NotImplementedError, OSError) as error:
            if isinstance(error, ExpectedError):
                raise
            if (found := from_worker(str(error))) is not None:
                raise found from error
            traceback_told = "Traceback (most recent call last)" in str(error)
            if not embedded and not traceback_told:
                first = next(iter(str(error).strip().splitlines()), type(error).__name__)
                raise RunnerError(f"{runner} could not run: {first}") from error
            noise.show()
            raise


def from_worker(text: str) -> ExpectedError | None:
    """The mistake that the text of a worker's traceback ends with; None where it is a fault of ours."""
    named = list(OURS.finditer(text))
    if not named:
        return None
    last = named[-1]
    module, _, name = last[1].rpartition(".")
    try:
        kind = getattr(importlib.import_module(module), name, None)
    except ImportError:
        return None
    if not (isinstance(kind, type) and issubclass(kind, ExpectedError)):
        return None
    found = ExpectedError(text[last.end() :].strip())
    found.exit_code = kind.exit_code
    return found


class _Noise:
    """Output of workers on standard error while it was held back."""

    def __init__(self, file: IO[bytes] | None) -> None:
        self._file = file

    def show(self) -> None:
        """Write it out."""
        if self._file is not None:
            self._file.seek(0)
            sys.stderr.write(self._file.read().decode(errors="replace"))


@contextmanager
def _held_back(hold: bool) -> Iterator[_Noise]:
    """Keep standard error of this process and its children in a file."""
    if not hold:
        yield _Noise(None)
        return
    sys.stderr.flush()
    kept = os.dup(2)
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 2)
        try:
            yield _Noise(file)
        finally:
            os.dup2(kept, 2)
            os.close(kept)


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
            merge = (
                max if name.startswith("max_") else min if name.startswith("min_") else int.__add__
            )
            counts[name] = merge(counts[name], value) if name in counts else value
    return tables, dict(counts)


def describe(job: Job, plan: RunPlan, units: list[Unit], beam_args: Sequence[str]) -> str:
    """Describe what a run would do: graph, inputs, estimated rows. Writes nothing."""
    from apache_beam.pipeline import PipelineVisitor

    steps: list[str] = []

    class Visitor(PipelineVisitor):
        def enter_composite_transform(self, node: Any) -> None:
            if node.full_label:
                steps.append(
                    f"  {'  ' * node.full_label.count('/')}{node.full_label.rsplit('/', 1)[-1]}"
                )

        def visit_transform(self, node: Any) -> None:
            steps.append(
                f"  {'  ' * node.full_label.count('/')}{node.full_label.rsplit('/', 1)[-1]}"
            )

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
    return "\n".join(
        [
            f"{job.name}: {job.doc}",
            f"run {plan.run_id}: {state}",
            "inputs:",
            *inputs,
            "graph:",
            *steps,
        ]
    )


def _built_gate(plan: RunPlan, settings: Settings, tables: dict[str, list[Part]]) -> str | None:
    """Built tables against the contract: what our own jobs wrote has no bad row, unless a person
    allows some.

    Rows that broke a limit are dead letters by now, so whatever is found here is a fault of a job,
    and a sample of the parts shows it.
    """
    from feature_repo.contract import expectations

    folder = plan.folder
    docs = None
    limit = 0.0 if plan.job == "events" else plan.max_bad_fraction or 0.0
    for table in plan.contract.tables:
        parts = tables.get(table.name)
        if parts and table.name not in SET_ASIDE:
            sampled = expectations.spread(parts, [part.rows for part in parts])
            batches = (folder.read_path(f"{folder.root}/{part.path}") for part in sampled)
            docs = expectations.gate(
                table, expectations.rebatch(batches), settings.path("expectations"), limit
            ).docs
    return docs
