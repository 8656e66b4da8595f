"""Rows to the online store through Feast's own writer, in batches that it can take whole."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import apache_beam as beam
import pyarrow as pa

from beam_jobs.partition import from_ipc
from beam_jobs.runs import RunPlan, settings_of

MAX_ROWS = 10_000  # Feast drops all rows after the first Arrow chunk of a frame, silently; small frames have one chunk


class WriteOnline(beam.DoFn):
    """Write rows of one view online: `(view, Arrow IPC)` in, `(view, rows written)` out.

    The timestamp of a row is the one it has offline, so a repeated write changes nothing on any store.
    """

    def __init__(self, plan: RunPlan) -> None:
        self.plan = plan
        self._store: Any = None

    def setup(self) -> None:
        """Open the store once for each worker process."""
        from feature_repo.store import open_store

        self._store = open_store(settings_of(self.plan))

    def process(self, element: tuple[str, bytes]) -> Iterator[tuple[str, int]]:
        """Write one piece."""
        view, data = element
        rows = from_ipc(data)
        for start in range(0, rows.num_rows, MAX_ROWS):
            piece: pa.Table = rows.slice(start, MAX_ROWS).combine_chunks()
            self._store.write_to_online_store(view, df=piece.to_pandas())
            beam.metrics.Metrics.counter("materialize", f"{view}_rows").inc(piece.num_rows)
        yield view, rows.num_rows
