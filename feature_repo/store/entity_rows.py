"""Entity rows as the point-in-time join takes them: times in UTC to the nanosecond, columns under numbers for names."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from feast.infra.offline_stores import offline_utils

from feature_repo.errors import ExpectedError

# Columns of the table beside the frame's own: the row's number, its time in whole microseconds, the nanoseconds
# within the last of them, and a 1 that views without keys are joined by
ROW = "r"
TIME = "t"
NANOS = "n"
ONE = "one"


class EntityFrameError(ExpectedError, ValueError):
    """A frame of entity rows that cannot be joined: the message names the column."""


@dataclass(frozen=True)
class EntityRows:
    """Entity rows under inner names, which no feature can have.

    Args:
        table: columns of the frame as `e0`, `e1`, …, and `ROW`, `TIME`, `NANOS`, `ONE`.
        inner: the inner name of each column of the frame.
        time: the frame's column that says when.
    """

    table: pa.Table
    inner: dict[str, str]
    time: str

    @property
    def has_nanos(self) -> bool:
        """True if a row's time lies between two microseconds."""
        return bool(pc.any(pc.not_equal(self.table[NANOS], 0)).as_py())

    def type_of(self, name: str) -> pa.DataType:
        return self.table.schema.field(self.inner[name]).type


def entity_rows(frame: pd.DataFrame | pa.Table) -> EntityRows:
    """The rows of a frame.

    Raises:
        EntityFrameError: not a frame, two columns of one name, or a row without a time.
    """
    if isinstance(frame, pa.Table):
        time = _time_of(frame)
        table = frame
    elif isinstance(frame, pd.DataFrame):
        _refuse_shared([str(name) for name in frame.columns])
        kinds = dict(zip(frame.columns, frame.dtypes, strict=True))
        time = str(offline_utils.infer_event_timestamp_from_entity_df(kinds))
        frame = frame.reset_index(drop=True)
        # Times may be text, or datetimes of Python's.
        frame = frame.assign(**{time: pd.to_datetime(frame[time], utc=True)})
        table = pa.Table.from_pandas(frame, preserve_index=False)
    else:
        raise EntityFrameError(
            f"entity_df must be a pandas DataFrame or an Arrow table, not {type(frame).__name__}"
        )
    _refuse_shared(table.column_names)
    stamps = table[time]
    if missing := stamps.null_count:
        row = int(np.flatnonzero(stamps.is_null().combine_chunks().to_numpy(False))[0])
        raise EntityFrameError(
            f"entity_df has no {time!r} in row {row} (and {missing - 1:,} more): a row without a time would see "
            "the newest values of all. Give each its request's time"
        )
    micros, nanos = _split(stamps)
    # The frame's time comes back in UTC, to the microsecond where that is all it says.
    if not nanos.any():
        place = table.column_names.index(time)
        utc = pa.array(micros, pa.int64()).cast(pa.timestamp("us", "UTC"))
        table = table.set_column(place, time, utc)
    inner = {name: f"e{number}" for number, name in enumerate(table.column_names)}
    made = {
        ROW: pa.array(np.arange(table.num_rows)),
        TIME: pa.array(micros, pa.int64()).cast(pa.timestamp("us", "UTC")),
        NANOS: pa.array(nanos, pa.int64()),
        ONE: pa.array(np.ones(table.num_rows, np.int8)),
    }
    columns = [*table.columns, *made.values()]
    return EntityRows(pa.table(columns, names=[*inner.values(), *made]), inner, time)


def _split(stamps: pa.ChunkedArray) -> tuple[np.ndarray, np.ndarray]:
    """Whole microseconds since 1970, and the nanoseconds beyond."""
    whole = stamps.combine_chunks()
    if not pa.types.is_timestamp(whole.type):
        whole = whole.cast(pa.timestamp("us"))
    if whole.type.unit != "ns":
        micros = whole.cast(pa.timestamp("us", whole.type.tz)).cast(pa.int64()).to_numpy()
        return micros, np.zeros(len(micros), np.int64)
    nanos = whole.cast(pa.int64()).to_numpy()
    return nanos // 1000, nanos % 1000


def _time_of(rows: pa.Table) -> str:
    """The column of an Arrow table that says when: `event_timestamp`, or the only column of times."""
    times = [field.name for field in rows.schema if pa.types.is_timestamp(field.type)]
    if offline_utils.DEFAULT_ENTITY_DF_EVENT_TIMESTAMP_COL in times:
        return str(offline_utils.DEFAULT_ENTITY_DF_EVENT_TIMESTAMP_COL)
    if len(times) != 1:
        raise EntityFrameError(
            f"entity_df has the columns of times {times}; expected event_timestamp, or one alone"
        )
    return times[0]


def _refuse_shared(names: list[str]) -> None:
    if len(set(names)) < len(names):
        raise EntityFrameError(f"entity_df has two columns of one name: {names}")
