"""A job: what it reads, how it builds, and what it refuses."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

import apache_beam as beam

from beam_jobs.engine.options import RunOptions, TableOptions
from beam_jobs.engine.plan import RunPlan, Unit
from beam_jobs.errors import LostRowsError
from feature_repo.contract.arrow import micros_iso
from feature_repo.contract.contract import ARRIVAL
from feature_repo.contract.counts import Counts
from feature_repo.contract.schema import EVENT_TIMESTAMP
from feature_repo.history.known import known_from
from feature_repo.home.tables import Manifest, Part
from feature_repo.settings import Settings


class Job(ABC):
    """A job. A module of this room declares one; `beam_jobs/engine/run.py` calls its methods in the order in
    which they stand here.

    Attributes:
        reads: jobs, and those of their tables that are this job's input; "raw" is the dataset's raw source.
        options: the class of its options.
        also_depends_on: what else makes a run stale: a job, "raw", "views", "erased".
        writes_online: whether a run leaves rows in the online store, and is stale once they are gone.
        set_aside: tables of rows that broke a limit, which no gate checks.

    Example:
        >>> load_job("item_stats").options().num_partitions
        8
    """

    name: ClassVar[str]
    doc: ClassVar[str]
    reads: ClassVar[Mapping[str, tuple[str, ...]]]
    options: ClassVar[type[RunOptions]] = TableOptions
    also_depends_on: ClassVar[tuple[str, ...]] = ()
    writes_online: ClassVar[bool] = False
    set_aside: ClassVar[tuple[str, ...]] = ()

    def resolve(self, settings: Settings, options: RunOptions) -> RunOptions:
        """Make the options definite before the run is named."""
        return options

    def prepare(self, plan: RunPlan, published: Manifest | None) -> RunPlan:
        """Complete the plan, once the run holds its folder."""
        return plan

    def gate(self, plan: RunPlan, units: Sequence[Unit], settings: Settings) -> str | None:
        """Check the inputs before anything is built. Returns where the Data Docs are."""
        return None

    def held(self, plan: RunPlan) -> AbstractContextManager[None]:
        """Keep hold of something while the run builds."""
        return nullcontext()

    @abstractmethod
    def steps(self, plan: RunPlan) -> beam.PTransform:
        """Turn units into parts."""

    @abstractmethod
    def num_parts(self, plan: RunPlan, units: int) -> int:
        """Return how many parts there will be, at most."""

    @abstractmethod
    def account(self, plan: RunPlan, units: Sequence[Unit], counts: Counts) -> None:
        """Refuse a run into which more went than came out of it.

        Raises:
            LostRowsError: it did.
        """

    def as_of(self, plan: RunPlan, counts: Counts) -> int:
        """Return the instant, microseconds, before which the run knows all events."""
        assert plan.as_of is not None, f"job {self.name} does not say up to when it knows events"
        return plan.as_of

    def built_limit(self, plan: RunPlan) -> float:
        """Return which share of the rows of built tables may be bad: none, unless a person allows some."""
        return plan.max_bad_fraction or 0.0

    def carried(self, plan: RunPlan, published: Manifest | None) -> dict[str, list[Part]]:
        """Name the parts of the published run that stay, by table."""
        return {}

    def columns(self, plan: RunPlan, tables: Mapping[str, Sequence[Part]]) -> dict[str, Any]:
        """Say what the columns of the built tables mean, as the manifest holds it (`contract/meaning.py`)."""
        return {}

    def finish(self, plan: RunPlan, counts: Counts | None, settings: Settings) -> list[str]:
        """Do what follows on a published manifest. Returns lines for the person who ran it.

        Args:
            counts: of the run; None where it was up to date.
        """
        return []

    def headline(self, counts: Counts) -> str:
        """Say in a line what was counted."""
        return ", ".join(f"{name} {number:,}" for name, number in counts.numbers.items())


def refuse_lost_events(plan: RunPlan, units: Sequence[Unit], counts: Counts) -> None:
    """Refuse a run that did not count every event before its `as_of` in some part.

    Raises:
        LostRowsError: it did not.
    """
    assert plan.as_of is not None
    given = sum(_rows_before(plan, unit, plan.as_of) for unit in units)
    if given != counts["events"]:
        raise LostRowsError(
            f"{given:,} events before {micros_iso(plan.as_of)} went in, {counts['events']:,} were counted: the run was "
            "not published"
        )


def _rows_before(plan: RunPlan, unit: Unit, as_of: int) -> int:
    """Count the events of a part that the run may know, from its timestamps alone."""
    events = plan.read_unit(unit, [EVENT_TIMESTAMP, ARRIVAL.name])
    return int((known_from(events) < as_of).sum())
