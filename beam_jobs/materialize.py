"""Job `materialize`: newest row of each key of every view → online store, through Feast's writer.

`feast materialize` does the same for small repos and is the oracle: a test compares the two, value for value.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import apache_beam as beam
import pyarrow as pa

from beam_jobs.partition import to_ipc
from beam_jobs.runs import Built, Job, RunPlan, Unit, write_built
from beam_jobs.sinks import WriteOnline
from feature_repo.arrow import micros
from feature_repo.history import newest_rows


def newest_of_part(plan: RunPlan, unit: Unit) -> Iterator[tuple[str, bytes]]:
    """Newest row of each key in one part; parts are partitioned by key, so these are the newest of all."""
    entity = plan.contract.table(unit.table).entity
    assert entity is not None
    rows = plan.folder.read_path(unit.source)
    if plan.as_of is not None:
        rows = rows.filter(pa.array(micros(rows["event_timestamp"]) <= plan.as_of))
    if rows.num_rows:
        yield unit.table, to_ipc(newest_rows(rows, entity.join_key))


@dataclass
class Materialize(beam.PTransform):
    """Parts of view tables → online store; the counts are the run's only output."""

    plan: RunPlan

    def expand(self, units: beam.PCollection) -> beam.PCollection:
        """The steps."""
        plan = self.plan
        return (
            units
            | "Spread parts" >> beam.Reshuffle()
            | "Newest of each key"
            >> beam.FlatMap(lambda unit: newest_of_part(plan, unit)).with_output_types(tuple[str, bytes])
            | "Write online" >> beam.ParDo(WriteOnline(plan)).with_output_types(tuple[str, int])
            | "Count by view" >> beam.CombinePerKey(sum)
            | "Note counts" >> beam.Map(lambda kv: note(plan, kv[0], kv[1])).with_output_types(str)
        )


def note(plan: RunPlan, view: str, rows: int) -> str:
    """Write down how many rows of a view went online."""
    return write_built(
        plan, Built("materialized", f"{view}.json", f'{{"rows": {rows}}}'.encode(), rows, {f"online_{view}": rows})
    )


JOB = Job(
    name="materialize",
    doc="newest row of each key → online store",
    reads={
        "events": ("user_profile", "item_profile"),
        "user_history": ("user_history", "user_stats"),
        "item_stats": ("item_stats",),
    },
    options={},
    steps=Materialize,
    num_parts=lambda plan, units: len(plan.contract.views),
)
