"""Raw columns as strangers have them → columns of the contract's types. What cannot be read is
null, never a guess.

Each function takes a column of any Arrow type (text, dictionaries, decimals, floats, integers) and
returns one of one type, with a null wherever a value is not what it should be: not text in UTF-8,
no whole number, no finite number, no time. Dataset modules turn those nulls into dead letters.
Where most of a column cannot be read the file is another than the module was written for, and
`typed` refuses it by name.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from datetime import UTC, datetime, timedelta, tzinfo
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from feature_repo.arrow import EPOCH, LATEST, MICROS, TIMESTAMP, iso_micros
from feature_repo.datasets import RawDataError
from feature_repo.schema import (
    MAX_TEXT_BYTES,
    NUMBER_TYPES,
    TIME_UNITS,
    Column,
    DatasetSpec,
    DType,
    Table,
)

EARLIEST = iso_micros(
    "1980-01-01"
)  # raw times before it are seconds that were taken for less, or no times at all
EXACT_FLOAT = 2**53  # the first whole number that a float64 shares with another
BLANKS = ["", "nan", "null", "none"]  # text that says "nothing here"
BATCH_ROWS = 1024  # read at a time: bounds the memory of rows with long texts
_WHOLE = re.compile(r"[+-]?[0-9]{1,19}(\.0*)?")
_NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]{1,3})?")


def read_parquet(path: str | Path, columns: list[str], start: int, rows: int) -> pa.Table:
    """A range of rows of a Parquet file, read a few at a time, longer texts cut just beyond what is
    allowed.

    Raises:
        RawDataError: it is no Parquet file, or lacks a column.
    """
    file = _open(path, columns)
    groups, offset, before = [], None, 0
    for group in range(file.num_row_groups):
        number = file.metadata.row_group(group).num_rows
        if before < start + rows and before + number > start:
            groups.append(group)
            offset = before if offset is None else offset
        before += number
    found, at = [], offset or 0
    for batch in file.iter_batches(BATCH_ROWS, row_groups=groups, columns=columns):
        first, last = max(start - at, 0), min(start + rows - at, batch.num_rows)
        at += batch.num_rows
        if last > first:
            found.append(_shortened(pa.Table.from_batches([batch.slice(first, last - first)])))
    schema = pa.schema([file.schema_arrow.field(name) for name in columns])
    whole = pa.concat_tables(found, promote_options="permissive") if found else schema.empty_table()
    return whole.select(columns)


def parquet_rows(path: str | Path, columns: list[str]) -> int:
    """Rows of a Parquet file that has these columns.

    Raises:
        RawDataError: it is no Parquet file, or lacks a column.
    """
    rows: int = _open(path, columns).metadata.num_rows
    return rows


def _open(path: str | Path, columns: list[str]) -> pq.ParquetFile:
    try:
        file = pq.ParquetFile(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise RawDataError(f"{path} is no Parquet file that can be read: {error}") from error
    missing = [name for name in columns if name not in file.schema_arrow.names]
    if missing:
        raise RawDataError(
            f"{path}: columns {missing} are missing; the file has {file.schema_arrow.names}"
        )
    return file


def as_declared(spec: DatasetSpec, raw: pa.Table, file: str | Path) -> pa.Table:
    """`typed` for a dataset's raw table, with the zone and unit of times that it declares."""
    return typed(spec.raw, raw, file, zone=ZoneInfo(spec.raw_zone), time_unit=spec.raw_time_unit)


def typed(
    table: Table,
    raw: pa.Table,
    file: str | Path,
    *,
    zone: tzinfo = UTC,
    time_unit: str | None = None,
) -> pa.Table:
    """Raw rows as columns of the contract's types, null where a value cannot be read.

    Args:
        table: the raw table's declaration; only its columns are taken.
        file: where the rows stand, for messages.
        zone: of times that carry none.
        time_unit: of times that are whole numbers, a key of `TIME_UNITS`; without one such times
            are refused.

    Raises:
        RawDataError: most of a column cannot be read; the message names file and column and shows a
            value.
    """
    read: dict[DType, Callable[[pa.ChunkedArray | pa.Array], pa.Array]] = {
        DType.STRING: texts,
        DType.FLOAT32: numbers,
        DType.INT64: whole_numbers,
        DType.TIMESTAMP: lambda column: times(column, zone=zone, unit=time_unit),
    }
    columns = []
    for column in table.columns:
        given = raw[column.name]
        made = read[column.dtype](given)
        _refuse_unreadable(file, column, given, made, time_unit)
        columns.append(made)
    return pa.table(columns, names=[column.name for column in table.columns])


def texts(column: pa.ChunkedArray | pa.Array) -> pa.Array:
    """Text, null where it is no UTF-8 or longer than `MAX_TEXT_BYTES`. Numbers become their
    digits.
    """
    column = _plain(column)
    if pa.types.is_null(column.type):
        return pa.nulls(len(column), pa.string())
    if not _is_text(column.type):
        return pc.cast(column, pa.string())
    data = pc.cast(column, pa.large_binary())
    data = pc.if_else(
        pc.less_equal(pc.binary_length(data), MAX_TEXT_BYTES), data, pa.scalar(None, data.type)
    )
    try:
        return pc.cast(pc.cast(data, pa.large_string()), pa.string())
    except pa.ArrowInvalid:
        return pa.array([_decoded(value) for value in data.to_pylist()], pa.string())


def whole_numbers(column: pa.ChunkedArray | pa.Array) -> pa.Array:
    """int64, null where it is no whole number or does not fit. A float beyond 2^53 is null: it may
    have been another.
    """
    column = _plain(column)
    if pa.types.is_null(column.type):
        return pa.nulls(len(column), pa.int64())
    if pa.types.is_integer(column.type) or pa.types.is_boolean(column.type):
        if column.type == pa.uint64():
            column = pc.if_else(
                pc.less(column, pa.scalar(2**63, pa.uint64())), column, pa.scalar(None, column.type)
            )
        return pc.cast(column, pa.int64())
    if pa.types.is_floating(column.type):
        values = _floats(column)
        whole = np.isfinite(values) & (np.abs(values) < EXACT_FLOAT) & (values == np.floor(values))
        return pa.array(np.where(whole, values, 0).astype(np.int64), mask=~whole)
    return _by_value(texts(column), _whole_of, pa.int64())


def numbers(column: pa.ChunkedArray | pa.Array) -> pa.Array:
    """float64, null where it is no finite decimal number."""
    column = _plain(column)
    if pa.types.is_null(column.type):
        return pa.nulls(len(column), pa.float64())
    if pa.types.is_floating(column.type) or pa.types.is_integer(column.type):
        values = _floats(column)
        return pa.array(np.where(np.isfinite(values), values, 0), mask=~np.isfinite(values))
    return _by_value(texts(column), _number_of, pa.float64())


def times(
    column: pa.ChunkedArray | pa.Array, *, zone: tzinfo = UTC, unit: str | None = None
) -> pa.Array:
    """Instants (microseconds, UTC), null where there is none, or one outside of `EARLIEST` …
    `LATEST`.

    A time with a zone is its instant, whatever the zone. One without is local time in `zone`: of an
    hour that comes twice the first, and of one that does not exist winter time. Text is ISO 8601,
    or the digits of a number in `unit`.
    """
    column = _plain(column)
    kind = column.type
    if pa.types.is_timestamp(kind):
        micros = _micros_of(column)
        if kind.tz is None:
            micros = _local_to_utc(micros, zone)
    elif pa.types.is_date(kind):
        micros = _local_to_utc(_micros_of(pc.cast(column, pa.timestamp("s"))), zone)
    elif _is_text(kind) and unit is None:
        micros = _by_value(texts(column), lambda text: _iso_of(text, zone), pa.int64())
    elif unit is not None:
        micros = _scaled(whole_numbers(column), TIME_UNITS[unit])
    else:
        return pa.nulls(len(column), TIMESTAMP)
    values = pc.fill_null(micros, EARLIEST - 1).to_numpy(zero_copy_only=False)
    valid = (values >= EARLIEST) & (values < LATEST)
    return pa.array(np.where(valid, values, 0), pa.int64(), mask=~valid).cast(TIMESTAMP)


def _scaled(numbers: pa.Array, micros: float) -> pa.Array:
    """Whole numbers of a unit as microseconds, null where they do not fit."""
    if micros < 1:
        return pc.divide(numbers, round(1 / micros))
    values = pc.fill_null(numbers, 0).to_numpy(zero_copy_only=False)
    fits = np.abs(values) < 2**62 // int(micros)
    return pa.array(np.where(fits, values, 0) * int(micros), mask=_nulls(numbers) | ~fits)


def likely_unit(values: np.ndarray) -> str | None:
    """The unit in which most of these whole numbers are times of our years, if any is."""
    for unit, micros in TIME_UNITS.items():
        scaled = values.astype(np.float64) * micros
        if len(values) and ((scaled >= EARLIEST) & (scaled < LATEST)).mean() > 0.5:
            return unit
    return None


def _refuse_unreadable(
    file: str | Path, column: Column, given: pa.ChunkedArray, made: pa.Array, time_unit: str | None
) -> None:
    kind = given.type
    if column.dtype in NUMBER_TYPES and not _is_text(kind) and not pa.types.is_dictionary(kind):
        return  # numbers as numbers: those out of range are rows to set aside
    there = pc.is_valid(given).to_numpy()
    if _is_text(kind):
        spelt = pc.utf8_lower(pc.utf8_trim_whitespace(texts(given)))
        there &= ~pc.fill_null(pc.is_in(spelt, pa.array(BLANKS)), False).to_numpy(
            zero_copy_only=False
        )
    lost = there & pc.is_null(made).to_numpy(zero_copy_only=False)
    if 2 * lost.sum() <= there.sum():
        return
    shown = _shown(given, int(np.flatnonzero(lost)[0]))
    expected = {
        DType.TIMESTAMP: "a time: a timestamp, or text such as 2011-12-09T12:50:00Z",
        DType.INT64: "a whole number",
        DType.FLOAT32: "a number",
        DType.STRING: f"text in UTF-8, of at most {MAX_TEXT_BYTES:,} bytes",
    }[column.dtype]
    hint = ""
    if column.dtype is DType.TIMESTAMP:
        expected = f"times in {time_unit} since 1970" if time_unit else expected
        temporal = pa.types.is_timestamp(kind) or pa.types.is_date(kind)
        unit = (
            None
            if temporal
            else likely_unit(pc.fill_null(whole_numbers(given), 0).to_numpy(zero_copy_only=False))
        )
        hint = f"; they look like {unit} since 1970" if unit else ""
        hint = "; day and month cannot be told apart there" if "/" in shown else hint
    raise RawDataError(
        f"{file}: column {column.name!r}: expected {expected}; {int(lost.sum()):,} of {int(there.sum()):,} values are none, "
        f"such as {shown}{hint}. Convert the column, or correct the dataset module"
    )


def _shown(given: pa.ChunkedArray, row: int) -> str:
    value = given[row]
    raw = value.cast(pa.binary()).as_py() if _is_text(value.type) else value.as_py()
    return repr(raw.decode(errors="replace") if isinstance(raw, bytes) else raw)[:60]


def _plain(column: pa.ChunkedArray | pa.Array) -> pa.Array:
    """One chunk, without dictionaries."""
    whole = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    return whole.cast(whole.type.value_type) if pa.types.is_dictionary(whole.type) else whole


def _is_text(kind: pa.DataType) -> bool:
    tests = (
        pa.types.is_string,
        pa.types.is_large_string,
        pa.types.is_binary,
        pa.types.is_large_binary,
    )
    return any(test(kind) for test in tests)


def _shortened(rows: pa.Table) -> pa.Table:
    """Long texts cut, in bytes, to one more than what is allowed: they are refused later, and cost
    nothing until then.
    """
    for index, field in enumerate(rows.schema):
        if not (_is_text(field.type) or pa.types.is_dictionary(field.type)):
            continue
        column = _plain(rows[field.name])
        if (
            _is_text(column.type)
            and (pc.max(pc.binary_length(column)).as_py() or 0) > MAX_TEXT_BYTES
        ):
            cut = pc.binary_slice(pc.cast(column, pa.binary()), 0, MAX_TEXT_BYTES + 1)
            rows = rows.set_column(index, field.name, cut)
    return rows


def _floats(column: pa.Array) -> np.ndarray:
    values = pc.fill_null(pc.cast(column, pa.float64(), safe=False), np.nan)
    return values.to_numpy(zero_copy_only=False)


def _by_value(column: pa.Array, read: Callable[[str], Any], kind: pa.DataType) -> pa.Array:
    """Each distinct text read once."""
    encoded = column.dictionary_encode()
    values = pa.array(
        [
            None if value is None else read(value.strip())
            for value in encoded.dictionary.to_pylist()
        ],
        kind,
    )
    return values.take(encoded.indices)


def _whole_of(text: str) -> int | None:
    if not _WHOLE.fullmatch(text):
        return None
    value = int(text.split(".")[0])
    return value if -(2**63) <= value < 2**63 else None


def _number_of(text: str) -> float | None:
    if not _NUMBER.fullmatch(text):
        return None
    value = float(text)
    return value if np.isfinite(value) else None


def _iso_of(text: str, zone: tzinfo) -> int | None:
    try:
        time = datetime.fromisoformat(text)
    except ValueError:
        return None
    return ((time if time.tzinfo else time.replace(tzinfo=zone)) - EPOCH) // timedelta(
        microseconds=1
    )


def _micros_of(column: pa.Array) -> pa.Array:
    """A timestamp column as int64 microseconds; null where they do not fit."""
    return _scaled(
        pc.cast(column, pa.int64()), {"s": 1e6, "ms": 1e3, "us": 1.0, "ns": 1e-3}[column.type.unit]
    )


def _nulls(column: pa.Array) -> np.ndarray:
    return pc.is_null(column).to_numpy(zero_copy_only=False)


def _local_to_utc(local: pa.Array, zone: tzinfo) -> pa.Array:
    """Local microseconds as UTC ones, each distinct one converted once; null outside of our
    years.
    """
    if zone is UTC or getattr(zone, "key", None) == "UTC":
        return local
    encoded = local.dictionary_encode()
    utc: list[int | None] = []
    for value in encoded.dictionary.to_pylist():
        if value is None or not EARLIEST <= value < LATEST:
            utc.append(None)
            continue
        offset = datetime.fromtimestamp(value // MICROS, UTC).replace(tzinfo=zone).utcoffset()
        assert offset is not None
        utc.append(value - int(offset.total_seconds()) * MICROS)
    return pa.array(utc, pa.int64()).take(encoded.indices)


def _decoded(value: bytes | None) -> str | None:
    try:
        return None if value is None else value.decode()
    except UnicodeDecodeError:
        return None
