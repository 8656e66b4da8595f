"""Steps that know their run: plain functions of a plan, and rows to the online store in whole batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import apache_beam as beam

from beam_jobs.engine.partition import from_ipc
from beam_jobs.engine.plan import RunPlan


class PlanDoFn(beam.DoFn):
    """A step of a planned run; a worker whose code is not the launcher's ends the run."""

    def __init__(self, plan: RunPlan) -> None:
        self.plan = plan

    def setup(self) -> None:
        """Take the run's surroundings, and refuse to work beside other code."""
        self.plan.begin()


class Each(PlanDoFn):
    """A plain function of the plan and an element, which yields outputs.

    Example:
        >>> units | "Newest of each key" >> beam.ParDo(Each(plan, newest_of_part))
    """

    def __init__(self, plan: RunPlan, function: Callable[[RunPlan, Any], Iterable[Any]]) -> None:
        super().__init__(plan)
        self.function = function

    def process(self, element: Any) -> Iterable[Any]:
        return self.function(self.plan, element)


class WriteView(PlanDoFn):
    """Write rows of one view online: `(view, Arrow IPC)` in, `(view, rows written)` out.

    The timestamp of a row is the one it has offline, so a repeated write changes nothing on any
    store. A row whose features are all null is a tombstone: a reader of the key finds nothing.
    """

    def __init__(self, plan: RunPlan) -> None:
        super().__init__(plan)
        self._store: Any = None

    def setup(self) -> None:
        """Open the store once for each worker process."""
        super().setup()
        self._store = self.plan.open_store()

    def process(self, element: tuple[str, bytes]) -> Iterator[tuple[str, int]]:
        from feature_repo.store.online_rows import write_rows

        view, data = element
        rows = from_ipc(data)
        write_rows(self._store, view, rows)
        beam.metrics.Metrics.counter("materialize", f"{view}_rows").inc(rows.num_rows)
        yield view, rows.num_rows
