"""The Beam pipeline of a run, and what a worker's mistake is to a person."""

from __future__ import annotations

import contextlib
import importlib
import os
import queue
import re
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import IO

import apache_beam as beam

from beam_jobs.engine.job import Job
from beam_jobs.engine.plan import CORES, RunPlan, Unit
from beam_jobs.errors import OptionsError, RunnerError
from feature_repo.errors import ExpectedError

# Runners whose workers are this process or its children
HERE = ("fnapirunner", "directrunner", "")
# Beam (2.77) does not know its own runner on Dask by a short name, registers none of its options, and puts 128 elements
# of a source into one task.
DASK = ("dask", "daskrunner")
FULL_NAME = "apache_beam.runners.dask.dask_runner.DaskRunner"
# A unit of work is a task
PARTITIONS = ("--dask_npartitions", "--dask_partition_size")
# Beam's name of a thread that waits for a worker, and the module that such a worker runs
WORKER_THREAD = "run_worker"
WORKER_MODULE = b"apache_beam.runners.worker.sdk_worker_main"
# What a worker raised, at the end of the text that Beam makes of it.
OURS = re.compile(r"^((?:feature_repo|beam_jobs|modeling)(?:\.\w+)+): ", re.MULTILINE)


def pipeline_of(
    job: Job, plan: RunPlan, units: list[Unit], beam_args: Sequence[str]
) -> beam.Pipeline:
    """Make the job's pipeline, without running it.

    Raises:
        OptionsError: Beam takes no such options.
    """
    from apache_beam.options.pipeline_options import PipelineOptions

    try:
        made = beam.Pipeline(options=PipelineOptions(with_dask(beam_args)))
    except (ValueError, ImportError, AttributeError, NotImplementedError) as error:
        message = "; ".join(line.strip() for line in str(error).splitlines() if line.strip())
        raise OptionsError(
            f"Beam takes no such options ({' '.join(beam_args)}): {message}"
        ) from error
    # Workers do not ask the catalogue, whose address may hold a password.
    steps = job.steps(replace(plan, catalogue_url=""))
    _ = made | "List inputs" >> beam.Create(units) | job.name >> steps
    return made


def is_dask(runner: str) -> bool:
    """Return whether a name of a runner means Beam's on Dask."""
    return runner.lower() in (*DASK, FULL_NAME.lower())


def with_dask(beam_args: Sequence[str]) -> list[str]:
    """Arguments as Beam takes them; others than Dask's stay as they are.

    Raises:
        OptionsError: Dask's scheduler is not installed.
    """
    named = [a for a in beam_args if a.startswith("--runner=") and is_dask(a.partition("=")[2])]
    if not named:
        return list(beam_args)
    try:
        import distributed  # noqa: F401
        from apache_beam.runners.dask import dask_runner  # noqa: F401  # registers its options
    except ImportError as error:
        raise OptionsError(
            f"--runner=dask needs the extra `dask`, pip install 'memoir-rec[dask]': {error}"
        ) from error
    found = [a for a in beam_args if a not in named]
    if not any(a.startswith(PARTITIONS) for a in found):
        found.append("--dask_partition_size=1")
    return [f"--runner={FULL_NAME}", *found]


def run_pipeline(made: beam.Pipeline, beam_args: Sequence[str]) -> None:
    """Run a pipeline to its end. Workers of other processes hand a mistake on as the text of a traceback,
    and print it: a person is told the mistake alone.

    Raises:
        ExpectedError: a worker met something that a person can mend; or the runner cannot run here.
    """
    runner = _runner(beam_args)
    embedded = runner.lower() in HERE
    in_processes = embedded and _workers_are_processes(beam_args)
    with _held_back(in_processes) as noise:
        try:
            if in_processes:
                _run_watched(made)
            else:
                made.run().wait_until_finish()
        except (RuntimeError, NotImplementedError, OSError) as error:
            if isinstance(error, ExpectedError):
                raise
            if (found := from_worker(str(error))) is not None:
                raise found from error
            has_traceback = "Traceback (most recent call last)" in str(error)
            if not embedded and not has_traceback:
                first = next(iter(str(error).strip().splitlines()), type(error).__name__)
                raise RunnerError(f"{runner} could not run: {first}") from error
            noise.show()
            raise


def _run_watched(made: beam.Pipeline) -> None:
    """Run a pipeline whose workers are children of this process. Beam (2.77) waits for ever for one that could
    not start, or was killed.

    Raises:
        RunnerError: a worker is gone.
    """
    ended: queue.Queue[BaseException | None] = queue.Queue()

    def run_to_the_end() -> None:
        try:
            made.run().wait_until_finish()
        except BaseException as error:
            ended.put(error)
        else:
            ended.put(None)

    def of_thread(arguments: threading.ExceptHookArgs) -> None:
        # The thread that waits for a worker raises what the worker's process ended with.
        if arguments.thread is not None and arguments.thread.name == WORKER_THREAD:
            ended.put(RunnerError(f"{arguments.exc_value}: nothing was published; run it again"))
        else:
            before(arguments)

    before = threading.excepthook
    threading.excepthook = of_thread
    try:
        threading.Thread(target=run_to_the_end, name="pipeline", daemon=True).start()
        if (error := ended.get()) is not None:
            raise error
    except RunnerError:
        _end_workers()
        raise
    finally:
        threading.excepthook = before


def _end_workers() -> None:
    """End the workers that are left, which would keep this process from its end."""
    parents: dict[int, int] = {}
    workers = []
    for folder in Path("/proc").glob("[0-9]*"):
        # A process may be gone before it is read.
        with contextlib.suppress(OSError, ValueError):
            # After the name, which may hold anything: state, parent
            parents[int(folder.name)] = int(
                folder.joinpath("stat").read_text().rpartition(")")[2].split()[1]
            )
            if WORKER_MODULE in folder.joinpath("cmdline").read_bytes():
                workers.append(int(folder.name))
    for worker in workers:
        if os.getpid() in _ancestors(worker, parents):
            with contextlib.suppress(ProcessLookupError):
                os.kill(worker, signal.SIGKILL)


def _ancestors(process: int, parents: Mapping[int, int]) -> Iterator[int]:
    while process := parents.get(process, 0):
        yield process


def threads_of(beam_args: Sequence[str]) -> int:
    """Return how many threads a worker may work in: all cores on the local runner, where it is one worker; one
    wherever the runner spreads the work itself.
    """
    local = _runner(beam_args).lower() in HERE
    alone = not any(a.startswith("--direct_num_workers") for a in beam_args)
    return CORES if local and alone and not _workers_are_processes(beam_args) else 1


def _runner(beam_args: Sequence[str]) -> str:
    return next((a.partition("=")[2] for a in beam_args if a.startswith("--runner=")), "")


def _workers_are_processes(beam_args: Sequence[str]) -> bool:
    return any("multi" in argument for argument in beam_args)


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
