"""The plan of a run: all that workers need to know of it, small enough to ship with every step."""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from threading import Lock
from typing import Any, Generic, TypeVar

import pyarrow as pa

from beam_jobs.engine.options import RunOptions
from beam_jobs.engine.surroundings import Surroundings, refuse_own_hashes
from beam_jobs.errors import OtherCodeError, OtherPlaceError
from feature_repo import datasets
from feature_repo.contract.contract import Contract
from feature_repo.home.code import code_digest
from feature_repo.home.tables import JobFolder, Manifest, Part
from feature_repo.settings import CHECKOUT, DEFAULT_DATASET, Settings

CORES = os.cpu_count() or 1
Found = TypeVar("Found")


@dataclass(frozen=True)
class InputPart:
    """A part of a table that another job built."""

    job: str
    part: Part


@dataclass(frozen=True)
class Unit:
    """A piece of input for one worker: a raw unit of the dataset (`RawUnit`), or an `InputPart`."""

    number: int
    table: str
    source: Any
    rows: int


@dataclass(frozen=True)
class RunPlan:
    """All that workers need to know; small and plain, so that it ships with every step.

    Args:
        as_of: microseconds; events at or after it are unknown to the run.
        pinned: manifests of the jobs that it reads, as they were when it was planned.
        code_of, code: the job's module, and the digest of it and all that it imports, of the machine that planned
            the run.
        max_bad_fraction: share of bad rows; None is the dataset's for raw rows, 0 for built tables.
        num_threads: threads of one worker that work on elements side by side.
        surroundings: of the machine that planned the run.
        online_file: the online store where that is a file.
    """

    job: str
    dataset: str
    home: str
    run_id: str
    as_of: int | None
    options: RunOptions
    profile: str
    catalogue_url: str
    pinned: dict[str, Manifest] = field(default_factory=dict, repr=False)
    max_bad_fraction: float | None = None
    num_threads: int = 1
    code_of: str = ""
    code: str = ""
    surroundings: Surroundings | None = field(default=None, repr=False)
    online_file: str = ""

    @property
    def contract(self) -> Contract:
        return datasets.load_contract(self.dataset)

    @property
    def settings(self) -> Settings:
        """The settings under which the run was planned, on any worker."""
        default = self.dataset == DEFAULT_DATASET and self.home == str(
            CHECKOUT / ".memoir" / self.dataset
        )
        return Settings(self.dataset, None, self.home, self.profile, self.catalogue_url, default)

    @property
    def folder(self) -> JobFolder:
        """The folder that the run writes."""
        return JobFolder(self.home, self.job)

    def input_folder(self, job: str) -> JobFolder:
        """Return the folder of an input job."""
        return JobFolder(self.home, job)

    def input_paths(self, job: str, table: str) -> list[str]:
        """List the parts of an input job's table in the very run that this one names as its input,
        republished since or not; each verified.
        """
        folder = self.input_folder(job)
        return [folder.verified(part) for part in self.pinned[job].tables[table]]

    def unit_path(self, unit: Unit) -> str:
        """Return the path of a unit that is a part of a built table, verified."""
        return self.input_folder(unit.source.job).verified(unit.source.part)

    def read_unit(self, unit: Unit, columns: list[str] | None = None) -> pa.Table:
        """Read a unit that is a part of a built table."""
        return self.input_folder(unit.source.job).read_path(self.unit_path(unit), columns)

    def refuse_other_code(self) -> None:
        """Refuse to work for a run that other code planned: parts of two programs would stand under one name.

        Raises:
            OtherCodeError: this machine's code is not the launcher's.
        """
        # Digests, not versions: two checkouts of one version may differ, and so may a dataset's module.
        here = job_code(self.code_of, self.dataset)
        if here != self.code:
            raise OtherCodeError(
                f"a worker of job {self.job!r} has other code ({here}) than the machine that started it ({self.code}): "
                "nothing was published. Install one version of Memoir and of the dataset's module on both"
            )

    def begin(self) -> None:
        """Make this process one that can work for the run.

        Raises:
            OtherCodeError: see `refuse_other_code`.
            OtherPlaceError: see `refuse_own_hashes`.
        """
        if self.surroundings is not None:
            self.surroundings.take_place()
        refuse_own_hashes()
        # Finds the module where it lies elsewhere
        datasets.load(self.dataset)
        self.refuse_other_code()

    def open_store(self) -> Any:
        """The Feast store of the run.

        Raises:
            OtherPlaceError: it is a file, and on this machine another one.
        """
        from feature_repo.store.store import ONLINE, local_file, open_store

        settings = self.settings
        if self.online_file and str(local_file(settings, ONLINE)) != self.online_file:
            raise OtherPlaceError(
                f"the online store of the local profile is the file {self.online_file} of the machine that started the run; a worker "
                f"in another place would write {local_file(settings, ONLINE)}. Set MEMOIR_PROFILE=production, or MEMOIR_HOME to a folder "
                "that both share"
            )
        return open_store(settings)

    def read_input(self, job: str, table: str) -> pa.Table:
        """Read that table, parts in order."""
        folder = self.input_folder(job)
        return pa.concat_tables([folder.read_path(path) for path in self.input_paths(job, table)])


def job_code(module: str, dataset: str) -> str:
    """Digest of the code that makes a job's rows: its module, the dataset's, the life of a run, and all of ours
    that they import.
    """
    return code_digest(module, "beam_jobs.engine.run", f"feature_repo.datasets.{dataset}")


class ReadOnce(Generic[Found]):
    """A value that a process reads once for each run, however many threads ask.

    Args:
        state: of what is read, where that may change while the run is under way; another state is read anew.

    Example:
        >>> item_profiles = ReadOnce(lambda plan: plan.read_input("events", "item_profile"))
        >>> item_profiles(plan) is item_profiles(plan)
        True
    """

    def __init__(
        self,
        read: Callable[[RunPlan], Found],
        state: Callable[[RunPlan], Hashable] = lambda plan: None,
    ) -> None:
        self._read = read
        self._state = state
        self._lock = Lock()
        self._found: dict[Hashable, Found] = {}

    def __call__(self, plan: RunPlan) -> Found:
        """Return what the run reads, from memory if it was read before."""
        key = (plan.run_id, self._state(plan))
        with self._lock:
            if key not in self._found:
                self._found = {key: self._read(plan)}
            return self._found[key]
