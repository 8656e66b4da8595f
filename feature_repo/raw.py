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
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta, tzinfo
from typing import Any
from zoneinfo import ZoneInfo

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from feature_repo.arrow import EPOCH, LATEST, MICROS, TIMESTAMP, iso_micros
from feature_repo.errors import RawDataError
from feature_repo.schema import (
    MAX_TEXT_BYTES,
    NUMBER_TYPES,
    TIME_UNITS,
    WHOLE_TYPES,
    Column,
    DType,
    Source,
)

EARLIEST = iso_micros(
    "1980-01-01"
)  # raw times before it are seconds that were taken for less, or no times at all
EXACT_FLOAT = 2**53  # the first whole number that a float64 shares with another
BLANKS = ["", "nan", "null", "none"]  # text that says "nothing here"
TRUTHS = {"1": 1, "0": 0, "true": 1, "false": 0, "yes": 1, "no": 0, "t": 1, "f": 0}
TRUTHS |= {"1.0": 1, "0.0": 0, "y": 1, "n": 0}
FEW_VALUES = 4
QUARTER = 15 * 60 * MICROS
NAIVE_TIME = r"^[0-9]{4}-[0-9]{2}-[0-9]{2}[T ][0-9]{2}:[0-9]{2}(:[0-9]{2}(\.[0-9]{1,6})?)?$"
ZONED_TIME = r"^[0-9]{4}-[0-9]{2}-[0-9]{2}[T ][0-9]{2}:[0-9]{2}(:[0-9]{2}(\.[0-9]{1,6})?)?(Z|[+-][0-9]{2}:?[0-9]{2})$"
_WHOLE = re.compile(r"[+-]?[0-9]{1,19}(\.0*)?")
_NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]{1,3})?")


@dataclass(frozen=True)
class Format:
    """How values are written in a raw table.

    Args:
        zone: of times that carry none.
        time_unit: of times that are whole numbers, a key of `TIME_UNITS`; without one they are refused.
        decimal: "." or ",".
        list_separator: between values of a list that is written as text.
    """

    zone: tzinfo = UTC
    time_unit: str | None = None
    decimal: str = "."
    list_separator: str = "|"

    @staticmethod
    def of(source: Source) -> Format:
        """As a source declares."""
        zone = ZoneInfo(source.zone)
        return Format(zone, source.time_unit, source.decimal, source.list_separator)


def typed(
    columns: Iterable[tuple[Column, str]], raw: pa.Table, file: str, written: Format | None = None
) -> pa.Table:
    """Raw rows as columns of the contract's types, null where a value cannot be read.

    Args:
        columns: ours, each with the name of theirs.
        raw: their table.
        file: where the rows stand, for messages.

    Raises:
        RawDataError: most of a column cannot be read; the message names file and column and shows a
            value.
    """
    written = written or Format()
    found: dict[str, pa.Array] = {}
    for column, theirs in columns:
        given = raw[theirs]
        made = truths(given) if column.values == (0, 1) else _read(column.dtype, given, written)
        _refuse_unreadable(file, column, theirs, given, made, written.time_unit)
        found[column.name] = made
    return pa.table(found)


def _read(dtype: DType, given: pa.ChunkedArray, written: Format) -> pa.Array:
    """A column as the contract's type; whole numbers and floats at full width, for `limits` to
    check.
    """
    if dtype in WHOLE_TYPES:
        return whole_numbers(given)
    if dtype is DType.FLOAT32:
        return numbers(given, written.decimal)
    if dtype is DType.TIMESTAMP:
        return times(given, zone=written.zone, unit=written.time_unit)
    if dtype is DType.STRING:
        return texts(given)
    if dtype is DType.STRING_LIST:
        return text_lists(given, written.list_separator)
    assert dtype is DType.FLOAT32_LIST, dtype
    return number_lists(given, written.decimal)


def truths(column: pa.ChunkedArray | pa.Array) -> pa.Array:
    """1 and 0 as int64, also where they are spelt true and false or yes and no; null for all else."""
    column = _plain(column)
    if not _is_text(column.type):
        return whole_numbers(column)
    spelt = pc.utf8_lower(pc.utf8_trim_whitespace(texts(column)))
    place = pc.index_in(spelt, pa.array(list(TRUTHS)))
    return pa.array(list(TRUTHS.values()), pa.int64()).take(place)


def text_lists(column: pa.ChunkedArray | pa.Array, separator: str) -> pa.Array:
    """Lists of texts; of a text its parts, blank ones left out. A blank text is an empty list."""
    column = _plain(column)
    if pa.types.is_list(column.type) or pa.types.is_large_list(column.type):
        values = texts(pc.list_flatten(column))
        return _relisted(column, values)
    if pa.types.is_null(column.type):
        return pa.nulls(len(column), pa.list_(pa.string()))
    encoded = texts(column).dictionary_encode()
    parts = [
        None
        if text is None
        else [part for p in _unbracketed(text).split(separator) if (part := p.strip())]
        for text in encoded.dictionary.to_pylist()
    ]
    return pa.array(parts, pa.list_(pa.string())).take(encoded.indices)


def number_lists(column: pa.ChunkedArray | pa.Array, decimal: str = ".") -> pa.Array:
    """Lists of float32; of a text its parts, with whatever stands between them. A list with a value
    that is no number is null, and so is a blank text.
    """
    column = _plain(column)
    if pa.types.is_null(column.type):
        return pa.nulls(len(column), pa.list_(pa.float32()))
    if pa.types.is_fixed_size_list(column.type):
        column = column.cast(pa.list_(column.type.value_type))
    if not (pa.types.is_list(column.type) or pa.types.is_large_list(column.type)):
        text = pc.utf8_trim(texts(column), "[]() \t")
        parts = pc.split_pattern_regex(text, r"[|;\s]+" if decimal == "," else r"[|;,\s]+")
        column = pc.if_else(pc.equal(text, ""), pa.scalar(None, parts.type), parts)
    values = numbers(pc.list_flatten(column), decimal).cast(pa.float32(), safe=False)
    made = _relisted(column, values)
    if not values.null_count:
        return made
    broken = np.zeros(len(made), bool)
    broken[pc.list_parent_indices(made).to_numpy()[_nulls(values)]] = True
    return pc.if_else(pa.array(broken), pa.scalar(None, made.type), made)


def _relisted(lists: pa.Array, values: pa.Array) -> pa.Array:
    """The same lists with other values; null where they were."""
    lengths = pc.fill_null(pc.list_value_length(lists), 0).to_numpy(zero_copy_only=False)
    offsets = pa.array(np.r_[0, np.cumsum(lengths)], pa.int32())
    mask = pc.is_null(lists)
    return pa.ListArray.from_arrays(offsets, values, mask=mask)


def _unbracketed(text: str) -> str:
    return text.strip().removeprefix("[").removesuffix("]")


def is_blank(given: pa.ChunkedArray | pa.Array) -> np.ndarray:
    """Where nothing stands: null, NaN, or text that says so."""
    plain = _plain(given)
    floating = pa.types.is_floating(plain.type)
    nothing = pc.is_null(plain, nan_is_null=floating).to_numpy(zero_copy_only=False)
    if _is_text(plain.type):
        spelt = pc.utf8_lower(pc.utf8_trim_whitespace(texts(plain)))
        nothing |= pc.fill_null(pc.is_in(spelt, pa.array(BLANKS)), False).to_numpy(
            zero_copy_only=False
        )
    return nothing


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
    return _parsed(texts(column), _whole_of, pa.int64())


def numbers(column: pa.ChunkedArray | pa.Array, decimal: str = ".") -> pa.Array:
    """float64, null where it is no finite decimal number.

    Args:
        decimal: "," reads 1.234,5 as a thousand and more.
    """
    column = _plain(column)
    if pa.types.is_null(column.type):
        return pa.nulls(len(column), pa.float64())
    if pa.types.is_floating(column.type) or pa.types.is_integer(column.type):
        values = _floats(column)
        return pa.array(np.where(np.isfinite(values), values, 0), mask=~np.isfinite(values))
    text = texts(column)
    if decimal == ",":
        whole = pc.replace_substring(text, ".", "")
        text = pc.replace_substring(whole, ",", ".")
    values = _parsed(text, _number_of, pa.float64())
    finite = pc.fill_null(pc.is_finite(values), False)
    return pc.if_else(finite, values, pa.scalar(None, pa.float64()))


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
        micros = _iso_times(texts(column), zone)
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
    file: str,
    column: Column,
    theirs: str,
    given: pa.ChunkedArray,
    made: pa.Array,
    time_unit: str | None,
) -> None:
    kind = given.type
    if column.dtype in NUMBER_TYPES and not _is_text(kind) and not pa.types.is_dictionary(kind):
        return  # numbers as numbers: those out of range are rows to set aside
    lost = pc.is_null(made).to_numpy(zero_copy_only=False)
    if not lost.any():
        return
    there = ~is_blank(given)
    lost &= there
    # Of a handful of values nothing follows: each row is judged by itself.
    if there.sum() < FEW_VALUES or 2 * lost.sum() <= there.sum():
        return
    shown = _shown(given, int(np.flatnonzero(lost)[0]))
    expected = {
        DType.TIMESTAMP: "a time: a timestamp, or text such as 2011-12-09T12:50:00Z",
        DType.FLOAT32: "a number",
        DType.STRING: f"text in UTF-8, of at most {MAX_TEXT_BYTES:,} bytes",
        DType.STRING_LIST: "a list of texts",
        DType.FLOAT32_LIST: "a list of numbers",
    }.get(column.dtype, "a whole number")
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
        f"{file}: column {theirs!r}: expected {expected}; {int(lost.sum()):,} of {int(there.sum()):,} values are none, "
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


def _parsed(column: pa.Array, read: Callable[[str], Any], kind: pa.DataType) -> pa.Array:
    """Numbers of texts: all at once where each is plain digits or blank, value by value otherwise."""
    blank = pc.equal(pc.binary_length(column), 0)
    filled = pc.if_else(blank, pa.scalar(None, column.type), column)
    plain = pc.match_substring_regex(filled, "^[+-]?[0-9]{1,15}(\\.[0-9]{1,17})?$")
    if pc.all(plain, skip_nulls=True).as_py() is not False:
        try:
            return pc.cast(filled, kind)
        except pa.ArrowInvalid:
            pass  # such as 3.0 where a whole number is wanted
    return _by_value(column, read, kind)


def _iso_times(column: pa.Array, zone: tzinfo) -> pa.Array:
    """Microseconds of ISO texts. Those of the common forms are read all at once, each with its own
    offset; the others value by value.
    """
    column = pc.utf8_trim_whitespace(column)
    micros = np.zeros(len(column), np.int64)
    known = np.zeros(len(column), bool)
    for pattern, kind in (
        (NAIVE_TIME, pa.timestamp("us")),
        (ZONED_TIME, pa.timestamp("us", "UTC")),
    ):
        fits = pc.fill_null(pc.match_substring_regex(column, pattern), False)
        at = np.flatnonzero(fits.to_numpy(zero_copy_only=False))
        if not len(at):
            continue
        try:
            read = pc.cast(pc.cast(column.take(pa.array(at)), kind), pa.int64())
        except pa.ArrowInvalid:
            continue  # a thirteenth month somewhere: value by value
        if kind.tz is None:
            read = _local_to_utc(read, zone)
        there = read.is_valid().to_numpy(zero_copy_only=False)
        micros[at[there]] = pc.drop_null(read).to_numpy(zero_copy_only=False)
        known[at] = there
    rest = np.flatnonzero(~known)
    if len(rest):
        read = _by_value(column.take(pa.array(rest)), lambda text: _iso_of(text, zone), pa.int64())
        there = read.is_valid().to_numpy(zero_copy_only=False)
        micros[rest[there]] = pc.drop_null(read).to_numpy(zero_copy_only=False)
        known[rest] = there
    return pa.array(micros, mask=~known)


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
    values = pc.fill_null(local, EARLIEST - 1).to_numpy(zero_copy_only=False)
    known = (values >= EARLIEST) & (values < LATEST)
    # Offsets change at whole quarters of an hour, so a quarter's first instant stands for all of it.
    quarters, place = np.unique(np.where(known, values, EARLIEST) // QUARTER, return_inverse=True)
    offsets = np.array([_offset(int(quarter) * QUARTER, zone) for quarter in quarters], np.int64)
    return pa.array(values - offsets[place], mask=~known)


def _offset(local: int, zone: tzinfo) -> int:
    """Microseconds by which local time is ahead of UTC then."""
    offset = datetime.fromtimestamp(local // MICROS, UTC).replace(tzinfo=zone).utcoffset()
    assert offset is not None
    return int(offset.total_seconds()) * MICROS


def _decoded(value: bytes | None) -> str | None:
    try:
        return None if value is None else value.decode()
    except UnicodeDecodeError:
        return None
