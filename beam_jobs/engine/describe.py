"""What a run would do, without doing it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from beam_jobs.engine.job import Job
from beam_jobs.engine.pipeline import pipeline_of
from beam_jobs.engine.plan import RunPlan, Unit


def describe(job: Job, plan: RunPlan, units: list[Unit], beam_args: Sequence[str]) -> str:
    """Describe what a run would do: graph, inputs, estimated rows. Writes nothing."""
    from apache_beam.pipeline import PipelineVisitor

    steps: list[str] = []

    class Visitor(PipelineVisitor):
        def enter_composite_transform(self, node: Any) -> None:
            if node.full_label:
                steps.append(_indented(node.full_label))

        def visit_transform(self, node: Any) -> None:
            steps.append(_indented(node.full_label))

    pipeline_of(job, plan, units, beam_args).visit(Visitor())
    rows_of: Counter[str] = Counter()
    for unit in units:
        rows_of[unit.table] += unit.rows
    inputs = [
        f"  {table}: {sum(u.table == table for u in units)} pieces, about {rows:,} rows"
        for table, rows in rows_of.items()
    ]
    current = plan.folder.manifest()
    state = "up to date" if current and current.run_id == plan.run_id else "would be built"
    head = [f"{job.name}: {job.doc}", f"run {plan.run_id}: {state}"]
    return "\n".join([*head, "inputs:", *inputs, "graph:", *steps])


def _indented(label: str) -> str:
    return f"  {'  ' * label.count('/')}{label.rsplit('/', 1)[-1]}"
