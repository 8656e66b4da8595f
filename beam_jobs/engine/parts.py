"""Parts of a run: written by workers, each with a note that says it is whole and what its maker counted."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field

import apache_beam as beam
import pyarrow as pa
import pyarrow.fs as pafs

from beam_jobs.engine.plan import RunPlan
from feature_repo.contract.arrow import arrow_schema
from feature_repo.contract.counts import Counts
from feature_repo.home.tables import Part, parquet_bytes

# The folder of notes, a small JSON for each part
NOTES = "_parts"


@dataclass(frozen=True)
class Built:
    """One finished part: file content, rows, and what its maker counted."""

    table: str
    name: str
    data: bytes | pa.Buffer
    rows: int
    counts: Counts = field(default_factory=Counts)


@dataclass(frozen=True)
class Collected:
    """The parts of a run, by table, and the sum of their counts."""

    tables: dict[str, list[Part]]
    counts: Counts


def write_built(plan: RunPlan, built: Built) -> str:
    """Write a part and count its rows for Beam."""
    beam.metrics.Metrics.counter(plan.job, f"{built.table}_rows").inc(built.rows)
    return write_part(plan, built)


def write_part(plan: RunPlan, built: Built) -> str:
    """Write a part, then the note that says it is whole. Returns its path."""
    part = plan.folder.write_part(plan.run_id, built.table, built.name, built.data, built.rows)
    note = {"table": built.table, "part": asdict(part), "counts": asdict(built.counts)}
    data = json.dumps(note, sort_keys=True).encode()
    plan.folder.write_part(plan.run_id, NOTES, f"{built.table}-{built.name}.json", data, 0)
    return part.path


def collect(plan: RunPlan) -> Collected:
    """Read the notes of a run whose pipeline has finished."""
    folder = plan.folder
    root = f"{folder.root}/{plan.run_id}/{NOTES}"
    files = folder.filesystem
    tables: dict[str, list[Part]] = {}
    counts = Counts()
    if files.get_file_info(root).type == pafs.FileType.NotFound:
        return Collected(tables, counts)
    for info in sorted(files.get_file_info(pafs.FileSelector(root)), key=lambda i: i.base_name):
        if info.base_name.startswith("."):
            continue
        with files.open_input_stream(info.path) as stream:
            note = json.loads(stream.read())
        part = Part(**note["part"])
        tables.setdefault(note["table"], []).append(part)
        counts += Counts(**note["counts"]) + Counts({f"rows_{note['table']}": part.rows})
    return Collected(tables, counts)


def add_empty_tables(plan: RunPlan) -> None:
    """Write an empty part of each declared table that has none: a table without a row is not missing."""
    written = collect(plan).tables
    for table in plan.contract.tables:
        if table.job == plan.job and table.name not in written:
            empty = parquet_bytes(arrow_schema(table).empty_table())
            write_built(plan, Built(table.name, "part-00000.parquet", empty, 0))
