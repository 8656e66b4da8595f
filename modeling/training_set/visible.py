"""Statistics of users as if only their newest events were known."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from feature_repo.contract.arrow import MICROS, arrow_type
from feature_repo.contract.schema import EVENT_TIMESTAMP
from feature_repo.history import user_stats
from feature_repo.history.history import HistoryLog

# Requests whose histories are in memory at a time
CHUNK = 4_096


def visible_stats(
    log: HistoryLog, rows: np.ndarray, ends: np.ndarray, times: np.ndarray, visible: int
) -> dict[str, pa.Array]:
    """The statistics that rankers read of users (`user_stats.read_names`), of the newest events before each request alone;
    null of a user that the log lacks, and where no event says anything.

    Args:
        rows: of each request's user in the log, -1 for none.
        ends: events known at each request.
        times: of the requests, microseconds.
        visible: events that are known at most.
    """
    # 1. First event, events, other events, mean value of each request; NaN where nothing is known.
    contract = log.contract
    first, events, others, mean = user_stats.read_names(contract)
    value = contract.spec.stat_value
    found = np.full((4, len(rows)), np.nan)
    for start in range(0, len(rows), CHUNK):
        some = slice(start, start + CHUNK)
        columns = ["action", EVENT_TIMESTAMP, *([value] if value else [])]
        histories = log.gather(rows[some], ends[some], visible, columns, times[some])
        lengths = histories.lengths
        owner = np.repeat(np.arange(len(lengths)), lengths)
        primary = histories.columns["action"] == 0
        there = lengths > 0
        found[0, some][there] = histories.times[histories.offsets[:-1][there]] // MICROS
        found[1, some] = lengths
        found[2, some] = np.bincount(owner, ~primary, len(lengths))
        if value:
            numbers = histories.columns[value].astype(np.float64)
            valued = primary & ~np.isnan(numbers)
            number = np.bincount(owner[valued], minlength=len(lengths))
            total = np.bincount(owner[valued], numbers[valued], len(lengths))
            found[3, some] = np.divide(
                total, number, out=np.full(len(lengths), np.nan), where=number > 0
            )
    found[:, rows < 0] = np.nan
    # 2. As the columns that they stand for.
    types = {c.name: arrow_type(c.dtype) for c in contract.table("user_stats").columns}
    return {
        name: pa.array(values, from_pandas=True).cast(types[name])
        for name, values in zip((first, events, others, mean), found, strict=True)
        if name
    }
