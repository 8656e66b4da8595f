"""Rows to the online store, in whole batches."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import apache_beam as beam

from beam_jobs.engine.partition import from_ipc
from beam_jobs.engine.plan import RunPlan


class WriteView(beam.DoFn):
    """Write rows of one view online: `(view, Arrow IPC)` in, `(view, rows written)` out.

    The timestamp of a row is the one it has offline, so a repeated write changes nothing on any
    store. A row whose features are all null is a tombstone: a reader of the key finds nothing.
    """

    def __init__(self, plan: RunPlan) -> None:
        self.plan = plan
        self._store: Any = None

    def setup(self) -> None:
        """Open the store once for each worker process."""
        from feature_repo.store.store import open_store

        self._store = open_store(self.plan.settings)

    def process(self, element: tuple[str, bytes]) -> Iterator[tuple[str, int]]:
        from feature_repo.store.online_rows import write_rows

        view, data = element
        rows = from_ipc(data)
        write_rows(self._store, view, rows)
        beam.metrics.Metrics.counter("materialize", f"{view}_rows").inc(rows.num_rows)
        yield view, rows.num_rows
