"""Histories of a hundred events as lists, point-in-time correct: gathered from the history log, beside Feast's DuckDB
store over lists that are stored row by row, as one would without a log. Called by `point_in_time`, which prints the
rows.
"""

from __future__ import annotations

import multiprocessing
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from feature_repo.benchmarks import interleaved
from feature_repo.benchmarks.retrieval import feature_view, retrieval
from feature_repo.contract.arrow import MICROS, from_micros
from feature_repo.contract.contract import Contract
from feature_repo.contract.counts import Counts
from feature_repo.datasets import load_contract
from feature_repo.history.history import log_part
from feature_repo.history.lists import HISTORY, HISTORY_VIEW, MADE_OF
from feature_repo.home.tables import JobFolder, Manifest

DATASET = "online_retail"
LENGTH = 100
FEATURES = (
    "history_item_ids",
    "history_event_timestamps",
    "history_quantity",
    "history_unit_price",
)
START = 1_700_000_000 * MICROS


@dataclass(frozen=True)
class Sizes:
    """Of a run: users, events of each, and entity rows."""

    users: int
    events: int
    rows: int


def measured(
    folder: Path, sizes: Sizes, repeats: int
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Rows of the table, and what was compared."""
    contract = load_contract(DATASET)
    events = _events(sizes)
    home = str(folder / "home")
    _write_log(contract, home, events)
    stored = folder / "lists.parquet"
    _write_lists(stored, events, sizes)
    frame = _entity_rows(sizes)
    calls = {
        "histories: gathered": lambda: _gathered(home, frame).to_arrow(),
        "histories: feast duckdb": lambda: _joined(stored, frame).to_arrow(),
        "floor: read once": lambda: duckdb.sql(
            f"select * from read_parquet('{stored}')"
        ).to_arrow_table(),
    }
    ours = calls["histories: gathered"]()
    theirs = calls["histories: feast duckdb"]().sort_by("row")
    identical = all(_same(ours[name], theirs[name]) for name in FEATURES)
    seconds = interleaved(calls, repeats, warm_up=0)
    fastest = seconds["histories: gathered"]["wall_s"]
    table = [
        {"store": name, **times, "times slower than asof": times["wall_s"] / fastest}
        for name, times in seconds.items()
    ]
    facts = {
        "history rows": sizes.rows,
        "events of a list": LENGTH,
        "histories identical": identical,
        "peak GiB of a process that gathers": round(_peak_gib(home, sizes), 2),
    }
    return table, facts


def _events(sizes: Sizes) -> pa.Table:
    rng = np.random.default_rng(0)
    number = sizes.users * sizes.events
    steps = rng.integers(1, 3600, (sizes.users, sizes.events)).cumsum(axis=1)
    items = np.array([f"{20_000 + n}" for n in range(5000)])
    return pa.table(
        {
            "user_id": pa.array(np.repeat(np.arange(sizes.users), sizes.events)),
            "item_id": pa.array(items[rng.integers(0, len(items), number)]),
            "action": pa.array(np.zeros(number, np.int8)),
            "event_timestamp": from_micros(START + steps.ravel() * MICROS),
            "quantity": pa.array(rng.integers(1, 9, number).astype(np.float32)),
            "unit_price": pa.array(rng.random(number).astype(np.float32)),
        }
    )


def _write_log(contract: Contract, home: str, events: pa.Table) -> None:
    """A history log as the job `user_history` writes it."""
    codes = [np.zeros(events.num_rows, np.int64) for _ in contract.remembered]
    log = log_part(contract, events, codes)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, log.schema) as writer:
        writer.write_batch(log)
    folder = JobFolder(home, "user_history")
    part = folder.write_part("run", "history_log", "part-00000.arrow", sink.getvalue(), 1)
    manifest = Manifest(
        "user_history",
        "run",
        DATASET,
        contract.fingerprint,
        "2030-01-01T00:00:00+00:00",
        {},
        {},
        Counts(),
        {"history_log": [part]},
    )
    folder.publish(manifest)


def _write_lists(file: Path, events: pa.Table, sizes: Sizes) -> None:
    """For each event a row with the newest events up to it, known just after."""
    place = np.arange(sizes.events)
    lengths = np.minimum(place + 1, LENGTH)
    within = np.concatenate(
        [np.arange(p + 1 - n, p + 1) for p, n in zip(place, lengths, strict=True)]
    )
    columns = dict(
        zip(FEATURES, ("item_id", "event_timestamp", "quantity", "unit_price"), strict=True)
    )
    writer = None
    for first in range(0, sizes.users, 100):
        users = range(first, min(first + 100, sizes.users))
        flat = np.concatenate([user * sizes.events + within for user in users])
        starts = np.r_[0, np.cumsum(np.tile(lengths, len(users)))]
        mine = events.slice(first * sizes.events, len(users) * sizes.events)
        made = {
            name: pa.ListArray.from_arrays(
                pa.array(starts, pa.int32()), events[column].combine_chunks().take(pa.array(flat))
            )
            for name, column in columns.items()
        }
        known = from_micros(mine["event_timestamp"].cast(pa.int64()).to_numpy() + 1)
        table = pa.table(
            {
                "user_id": mine["user_id"],
                "event_timestamp": known,
                "created_timestamp": known,
                **made,
            }
        )
        writer = writer or pq.ParquetWriter(file, table.schema)
        writer.write_table(table)
    assert writer is not None
    writer.close()


def _entity_rows(sizes: Sizes) -> pa.Table:
    rng = np.random.default_rng(1)
    times = START + rng.integers(0, sizes.events * 1800, sizes.rows) * MICROS
    return pa.table(
        {
            "row": pa.array(np.arange(sizes.rows)),
            "user_id": pa.array(rng.integers(0, sizes.users, sizes.rows)),
            "event_timestamp": from_micros(times),
        }
    )


def _kinds() -> dict[str, Any]:
    from feast.types import Array, Float32, String, UnixTimestamp

    kinds = (Array(String), Array(UnixTimestamp), Array(Float32), Array(Float32))
    return dict(zip(FEATURES, kinds, strict=True))


def _refs(view: str) -> list[str]:
    return [f"{view}:{name}" for name in FEATURES]


def _gathered(home: str, frame: pa.Table) -> Any:
    """The retrieval of ours, of lists as long as the baseline's."""
    view = feature_view(HISTORY_VIEW, Path("none"), "user_id", _kinds(), timedelta(0))
    view.tags = {MADE_OF: HISTORY}
    view.batch_source.tags = {"dataset": DATASET, "home": home, "length": str(LENGTH)}
    return retrieval("asof", [view], _refs(HISTORY_VIEW), frame)


def _joined(stored: Path, frame: pa.Table) -> Any:
    view = feature_view("stored", stored, "user_id", _kinds(), timedelta(days=10_000))
    return retrieval("duckdb", [view], _refs("stored"), frame.to_pandas())


def _same(ours: pa.ChunkedArray, theirs: pa.ChunkedArray) -> bool:
    one = ours.combine_chunks()
    other = theirs.combine_chunks().cast(one.type)
    return bool(one.equals(other))


def _peak_gib(home: str, sizes: Sizes) -> float:
    spawn = multiprocessing.get_context("spawn")
    with spawn.Pool(1) as pool:
        return float(pool.apply(_peak, (home, sizes)))


def _peak(home: str, sizes: Sizes) -> float:
    rows = sum(batch.num_rows for batch in _gathered(home, _entity_rows(sizes)).to_batches())
    assert rows == sizes.rows
    # `ru_maxrss` would be the parent's, which held the baseline's join.
    (peak,) = (
        line
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith("VmHWM")
    )
    return int(peak.split()[1]) / (1 << 20)
