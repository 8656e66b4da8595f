"""Memory follows what is read: one user of a hundred thousand events costs a recipe that reads
sixteen next to nothing.
"""

from __future__ import annotations

import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from feature_repo.contract.arrow import arrow_schema, value_codes
from feature_repo.datasets import load_contract
from feature_repo.history import history
from feature_repo.history.history import HistoryLog
from feature_repo.history.recall import Recall
from feature_repo.history.sketch import Layout
from feature_repo.home.tables import JobFolder

CONTRACT = load_contract("online_retail")
ITEMS = Layout(("item_id",), (1,), (30.0,), width=1)


def log_of(folder: Path, lengths: list[int]) -> HistoryLog:
    """A log of users with so many events each, ten items in turn."""
    user = np.repeat(np.arange(len(lengths)), lengths)
    place = np.concatenate([np.arange(n) for n in lengths])
    events = pa.table(
        [
            pa.array(user),
            pa.array(place % 10).cast(pa.string()),
            pa.array(np.where(place % 7 == 0, 1, 0).astype(np.int8)),
            pa.array(place * 1_000_000).cast(pa.timestamp("us", "UTC")),
            pa.array(np.ones(len(user), np.float32)),
            pa.array(np.ones(len(user), np.float32)),
            pa.array(np.arange(len(user))),
            *[pa.nulls(len(user), pa.timestamp("us", "UTC"))] * 2,
        ],
        schema=arrow_schema(CONTRACT.table("events")),
    )
    part = history.log_part(CONTRACT, events)
    path = str(folder / "part.arrow")
    with pa.ipc.new_file(path, part.schema) as writer:
        writer.write_batch(part)
    return HistoryLog(CONTRACT, JobFolder(str(folder), "user_history"), [path])


def frequencies(log: HistoryLog, ends: list[tuple[int, int]]) -> tuple[np.ndarray, Any]:
    """Own frequency of all ten items at so many requests, (row, events known), and the peak of
    memory.
    """
    rows, known = (np.array(column) for column in zip(*ends, strict=True))
    offsets = np.arange(len(ends) + 1) * 10
    tracemalloc.start()
    codes = np.tile(value_codes(log.items), len(ends))
    times = np.full(len(ends), 10**12)
    read = Recall(log, ITEMS, exact=True).read(rows, known, times, offsets, [codes])
    found = read.counts_NCK[:, 0, 0]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return found.reshape(-1, 10), peak


def test_own_frequency_counts_what_came_before_each_request(tmp_path: Path) -> None:
    lengths = [0, 3, 50, 200]
    log = log_of(tmp_path, lengths)
    rng = np.random.default_rng(0)
    rows = {int(user): row for row, user in enumerate(log.users.to_pylist())}
    ends = [(rows[u], int(rng.integers(0, lengths[u] + 1))) for u in rng.integers(1, 4, 60)] + [
        (-1, 0)
    ]
    found, _ = frequencies(log, ends)
    for (row, end), counts in zip(ends, found, strict=True):
        places = np.arange(end if row >= 0 else 0)
        bought = places[places % 7 != 0] % 10
        items = [int(item.as_py()) for item in log.items]
        assert counts.tolist() == [int((bought == item).sum()) for item in items]


def test_one_user_of_a_hundred_thousand_events_costs_less_than_64_mb(tmp_path: Path) -> None:
    (tmp_path / "short").mkdir()
    (tmp_path / "long").mkdir()
    short = log_of(tmp_path / "short", [100] * 200)
    long = log_of(tmp_path / "long", [100] * 200 + [100_000])
    _, usual = frequencies(short, [(n % 200, 50) for n in range(2000)])
    _, peak = frequencies(
        long, [(n % 200, 50) for n in range(1000)] + [(200, 100 * n) for n in range(1000)]
    )
    assert peak - usual < 64 << 20
