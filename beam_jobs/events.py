"""Job `events`: raw rows → events by user, user and item profiles, dead letters with their reasons."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from functools import partial

import numpy as np
import pyarrow as pa

from beam_jobs.partition import Key, Piece, sort_by_key_and_time, split_by_key, to_ipc
from beam_jobs.runs import BuildTables, Built, Job, RunPlan, Unit
from feature_repo import datasets
from feature_repo.arrow import micros
from feature_repo.history import run_starts
from feature_repo.tables import parquet_bytes

ROWS_READ = b"rows_read"


def parse_unit(plan: RunPlan, unit: Unit) -> Iterator[tuple[Key, Piece]]:
    """One raw unit as keyed pieces; events at or after `as_of` become dead letters."""
    dataset, contract = datasets.load(plan.dataset), plan.contract
    parsed = dataset.parse(unit.source)
    events, dead = parsed.events, parsed.dead_letters
    if plan.as_of is not None:
        late = micros(events["event_timestamp"]) >= plan.as_of
        dead = pa.concat_tables([dead, _late_letters(events.filter(pa.array(late)), unit, dead.schema)])
        events = events.filter(pa.array(~late))
    partitions = plan.options["num_partitions"]
    for table, rows, key in (
        ("events", events, contract.user.join_key),
        ("user_profile", _known(parsed.users, plan.as_of), contract.user.join_key),
        ("item_profile", _known(parsed.items, plan.as_of), contract.item.join_key),
    ):
        for partition, piece in split_by_key(rows, key, partitions):
            yield (table, partition), (unit.number, to_ipc(piece))
    dead = dead.replace_schema_metadata({ROWS_READ: str(parsed.rows_read).encode()})
    yield ("dead_letters", unit.number), (unit.number, to_ipc(dead))


def build(plan: RunPlan, key: Key, rows: pa.Table) -> Iterator[Built]:
    """One partition of one table, sorted; profiles keep only rows that change something."""
    table, partition = key
    counts: dict[str, int] = {}
    if table == "dead_letters":
        counts = {"rows_read": int((rows.schema.metadata or {}).get(ROWS_READ, b"0")), "rows_dead": rows.num_rows}
        counts |= {f"dead: {reason}": n for reason, n in Counter(rows["reason"].to_pylist()).items()}
    elif table == "events":
        rows = sort_by_key_and_time(rows, plan.contract.user.join_key)
        counts = {"max_event_micros": int(micros(rows["event_timestamp"]).max())}
    else:
        entity = plan.contract.table(table).entity
        assert entity is not None
        rows = changes_only(sort_by_key_and_time(rows, entity.join_key), entity.join_key)
    yield Built(
        table, f"part-{partition:05d}.parquet", parquet_bytes(rows.replace_schema_metadata(None)), rows.num_rows, counts
    )


def changes_only(rows: pa.Table, key: str) -> pa.Table:
    """Of rows sorted by key and time: the last of each instant, and of those the ones that differ from the one before."""
    if not rows.num_rows:
        return rows
    ends_instant = np.r_[_differs(rows, [key, "event_timestamp"]), True]
    rows = rows.filter(pa.array(ends_instant))
    values = [name for name in rows.column_names if name not in ("event_timestamp", "created_timestamp")]
    return rows.filter(pa.array(np.r_[True, _differs(rows, values)]))


def _differs(rows: pa.Table, columns: list[str]) -> np.ndarray:
    """For each row but the last: whether the next one differs in any of these columns."""
    differs = np.zeros(max(rows.num_rows - 1, 0), bool)
    for name in columns:
        values = rows[name].combine_chunks()
        if pa.types.is_list(values.type):
            values = pa.array(
                [None if value is None else "\x1f".join(value) for value in values.to_pylist()], pa.string()
            )
        codes = values.dictionary_encode(null_encoding="encode").indices
        starts = np.zeros(rows.num_rows, bool)
        starts[run_starts(codes)] = True
        differs |= starts[1:]
    return differs


def _known(rows: pa.Table, as_of: int | None) -> pa.Table:
    return rows if as_of is None else rows.filter(pa.array(micros(rows["event_timestamp"]) <= as_of))


def _late_letters(events: pa.Table, unit: Unit, schema: pa.Schema) -> pa.Table:
    rows = events.num_rows
    raw = [json.dumps(row, default=str) for row in events.to_pylist()]
    file = unit.source.file.rsplit("/", 1)[-1]
    return pa.table(
        [[file] * rows, events["source_position"], ["time is at or after --as_of"] * rows, raw], schema=schema
    )


def by_user(plan: RunPlan, unit: Unit) -> Iterator[tuple[Key, Piece]]:
    """One built part of `events` as pieces by user; events at or after `as_of` are left out."""
    return _read_events(plan, unit, plan.contract.user.join_key)


def by_item(plan: RunPlan, unit: Unit) -> Iterator[tuple[Key, Piece]]:
    """One built part of `events` as pieces by item; events at or after `as_of` are left out."""
    return _read_events(plan, unit, plan.contract.item.join_key)


def _read_events(plan: RunPlan, unit: Unit, key: str) -> Iterator[tuple[Key, Piece]]:
    events = plan.folder.read_path(unit.source)
    if plan.as_of is not None:
        events = events.filter(pa.array(micros(events["event_timestamp"]) < plan.as_of))
    for partition, piece in split_by_key(events, key, plan.options["num_partitions"]):
        yield ("events", partition), (unit.number, to_ipc(piece))


JOB = Job(
    name="events",
    doc="raw rows → events by user, profiles, dead letters",
    reads={"raw": ()},
    options={"num_partitions": 8},
    steps=partial(BuildTables, read=parse_unit, build=build),
    num_parts=lambda plan, units: 3 * plan.options["num_partitions"] + units,
)
