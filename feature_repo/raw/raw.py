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
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta, tzinfo
from functools import cache
from typing import Any
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from feature_repo.contract.arrow import EPOCH, LATEST, MICROS, TIMESTAMP, is_text, iso_micros
from feature_repo.contract.schema import (
    MAX_TEXT_BYTES,
    MISSING,
    NUMBER_TYPES,
    TIME_UNITS,
    WHOLE_TYPES,
    Column,
    DType,
    Source,
)
from feature_repo.errors import RawDataError
from feature_repo.raw.lines import ARRIVED

# Raw times before it are seconds that were taken for less, or no times at all
EARLIEST = iso_micros("1980-01-01")
# The first whole number that a float64 shares with another
EXACT_FLOAT = 2**53
TRUTHS = {"1": 1, "0": 0, "true": 1, "false": 0, "yes": 1, "no": 0, "t": 1, "f": 0}
TRUTHS |= {"1.0": 1, "0.0": 0, "y": 1, "n": 0}
FEW_VALUES = 4
QUARTER = 15 * 60 * MICROS
NAIVE_TIME = r"^[0-9]{4}-[0-9]{2}-[0-9]{2}[T ][0-9]{2}:[0-9]{2}(:[0-9]{2}(\.[0-9]{1,6})?)?$"
ZONED_TIME = r"^[0-9]{4}-[0-9]{2}-[0-9]{2}[T ][0-9]{2}:[0-9]{2}(:[0-9]{2}(\.[0-9]{1,6})?)?(Z|[+-][0-9]{2}:?[0-9]{2})$"
# Zones that stand behind a time as letters. RFC 2822 names the American ones; letters that several
# zones share (IST, BST) are none, and a source declares its zone.
ZONE_LETTERS = {
    "UTC": "Z", "GMT": "Z", "Z": "Z", "WET": "Z", "WEST": "+01:00", "CET": "+01:00",
    "CEST": "+02:00", "EET": "+02:00", "EEST": "+03:00", "MSK": "+03:00", "JST": "+09:00",
    "KST": "+09:00", "EST": "-05:00", "EDT": "-04:00", "CST": "-06:00", "CDT": "-05:00",
    "MST": "-07:00", "MDT": "-06:00", "PST": "-08:00", "PDT": "-07:00",
}  # fmt: skip
# An id is spelt as its number: 007 and +7 are other texts. 7.0 is how pandas writes 7 beside a gap.
SPELT_ID = r"^(0|-?[1-9][0-9]*)(\.0+)?$"
_GROUPED = {".": r"^[+-]?[0-9]{1,3}(,[0-9]{3})+(\.[0-9]*)?$"}
_GROUPED[","] = (
    _GROUPED["."].replace(",[0-9]{3}", r"\.[0-9]{3}").replace(r"(\.[0-9]*)?", "(,[0-9]*)?")
)
# What may stand between thousands
_SPACED = r"([0-9])[\x{a0}\x{202f}\x{2009}' ]([0-9]{3})"
_SIGNS = {"€": "EUR", "$": "USD", "£": "GBP", "¥": "JPY", "₽": "RUB", "₹": "INR", "zł": "PLN"}
_WHOLE = re.compile(r"[+-]?[0-9]{1,19}(\.0*)?")
_NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]{1,3})?")


@dataclass(frozen=True)
class Format:
    """How values are written in a raw table.

    Args:
        zone: of times that carry none.
        time_unit: of times that are numbers, a key of `TIME_UNITS`; without one they are refused.
        decimal: "." or ",".
        list_separator: between values of a list that is written as text.
        time_format: of times that are text and not ISO 8601.
        missing: texts that say "nothing here", in small letters.
        missing_in: their column → further values that say nothing there.
        decimals: our column → its own sign.
        zone_column: their column that names each row's zone.
    """

    zone: tzinfo = UTC
    time_unit: str | None = None
    decimal: str = "."
    list_separator: str = "|"
    time_format: str = ""
    missing: tuple[str, ...] = MISSING
    missing_in: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    decimals: Mapping[str, str] = field(default_factory=dict)
    zone_column: str = ""

    @staticmethod
    def of(source: Source) -> Format:
        return Format(
            zone=ZoneInfo(source.zone),
            time_unit=source.time_unit,
            decimal=source.decimal,
            list_separator=source.list_separator,
            time_format=source.time_format,
            missing=tuple(mark.lower() for mark in source.missing),
            missing_in=source.missing_in,
            decimals=source.decimals,
            zone_column=source.zone_column,
        )


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
    zones = texts(raw[written.zone_column]) if written.zone_column else None
    for column, theirs in columns:
        # 1. Refuse what no column of the contract can hold.
        if not is_readable(raw[theirs].type):
            raise RawDataError(
                f"{file}: column {theirs!r} holds {raw[theirs].type}, which no column of ours can be; name a field "
                "inside of it, such as 'user.id', or write a row for each of its elements"
            )
        if is_list(raw[theirs].type) and column.dtype not in (
            DType.STRING_LIST,
            DType.FLOAT32_LIST,
        ):
            raise RawDataError(
                f"{file}: column {theirs!r} holds lists ({raw[theirs].type}), and {column.name!r} is one value a row"
            )
        # 2. Replace marks of nothing by nulls first: no reader of numbers or times knows them.
        given = without_missing(raw[theirs], written.missing) if _may_miss(column) else raw[theirs]
        if marks := written.missing_in.get(theirs, ()):
            meant = pa.array(~says_nothing(given, marks))
            given = pc.if_else(meant, _plain(given), pa.scalar(None, _plain(given).type))
        # 3. Read, and stop where most of a column is lost: the file is another one.
        made = _read(column, given, written, zones)
        _refuse_unreadable(file, column, theirs, given, made, written)
        found[column.name] = made
    return pa.table(found)


def _may_miss(column: Column) -> bool:
    """Return whether a mark such as "NA" means that nothing is there. Where something must be there, and where
    text is for people alone, it is a text like any other.
    """
    if column.dtype is DType.STRING and not column.is_key:
        return column.nullable and column.kind is not None
    return True


def _read(
    column: Column, given: pa.Array | pa.ChunkedArray, written: Format, zones: pa.Array | None
) -> pa.Array:
    """A column as the contract's type; whole numbers and floats at full width, for `limits` to
    check.
    """
    dtype = column.dtype
    decimal = written.decimals.get(column.name, written.decimal)
    if column.values == (0, 1):
        return truths(given)
    if dtype in WHOLE_TYPES:
        return id_numbers(given) if column.is_key else whole_numbers(given, decimal)
    if dtype is DType.FLOAT32:
        return numbers(given, decimal, column.unit)
    if dtype is DType.TIMESTAMP:
        if zones is not None:
            return _times_of_zones(given, zones, written)
        made = times(
            given, zone=written.zone, unit=written.time_unit, time_format=written.time_format
        )
        # A part of a path is written by whoever delivered the file, and not as the times inside of it.
        if column.name == ARRIVED and is_text(_plain(given).type):
            made = pc.coalesce(made, times(given, zone=written.zone))
        return made
    if dtype is DType.STRING:
        return texts(given)
    if dtype is DType.STRING_LIST:
        return text_lists(given, written.list_separator)
    assert dtype is DType.FLOAT32_LIST, dtype
    return number_lists(given, decimal)


def without_missing(
    column: pa.ChunkedArray | pa.Array, marks: Sequence[str] = MISSING
) -> pa.ChunkedArray | pa.Array:
    """A column of text with null for every mark of nothing; any other column as it is."""
    plain = _plain(column)
    if not is_text(plain.type):
        return column
    blank = is_blank(plain, marks)
    return (
        pc.if_else(pa.array(~blank), plain, pa.scalar(None, plain.type)) if blank.any() else plain
    )


def truths(column: pa.ChunkedArray | pa.Array) -> pa.Array:
    """1 and 0 as int64, also where they are spelt true and false or yes and no; null for all else."""
    column = _plain(column)
    if not is_text(column.type):
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


def says_nothing(given: pa.ChunkedArray | pa.Array, marks: Sequence[str]) -> np.ndarray:
    """Mark the rows with one of these values, by its spelling or as a number of the same size."""
    plain = _plain(given)
    spelt = pc.utf8_trim_whitespace(texts(plain))
    found = pc.fill_null(pc.is_in(spelt, pa.array(marks, pa.string())), False)
    amounts = numbers(pa.array(marks, pa.string())).drop_null()
    same = pc.fill_null(pc.is_in(numbers(plain), amounts), False)
    return pc.or_(found, same).to_numpy(zero_copy_only=False)


def is_blank(given: pa.ChunkedArray | pa.Array, marks: Sequence[str] = MISSING) -> np.ndarray:
    """Mark the rows that hold nothing: null, NaN, or a text that says so.

    Args:
        marks: such texts, in small letters.
    """
    plain = _plain(given)
    floating = pa.types.is_floating(plain.type)
    nothing = pc.is_null(plain, nan_is_null=floating).to_numpy(zero_copy_only=False)
    if not is_text(plain.type):
        return nothing
    # Marks are short, and few texts are: only these are looked at.
    length = pc.fill_null(pc.binary_length(plain), 0)
    short = np.flatnonzero(
        pc.less_equal(length, max(map(len, marks), default=0) + 8).to_numpy(zero_copy_only=False)
    )
    spelt = pc.utf8_lower(pc.utf8_trim_whitespace(texts(plain.take(pa.array(short)))))
    found = pc.fill_null(pc.is_in(spelt, pa.array(marks, pa.string())), False)
    nothing = nothing.copy()
    nothing[short] |= found.to_numpy(zero_copy_only=False)
    return nothing


def texts(column: pa.ChunkedArray | pa.Array) -> pa.Array:
    """Text, null where it is no UTF-8 or longer than `MAX_TEXT_BYTES`. Numbers become their
    digits.
    """
    column = _plain(column)
    if pa.types.is_null(column.type):
        return pa.nulls(len(column), pa.string())
    if not is_text(column.type):
        return pc.cast(column, pa.string())
    data = pc.cast(column, pa.large_binary())
    data = pc.if_else(
        pc.less_equal(pc.binary_length(data), MAX_TEXT_BYTES), data, pa.scalar(None, data.type)
    )
    try:
        return pc.cast(pc.cast(data, pa.large_string()), pa.string())
    except pa.ArrowInvalid:
        return pa.array([_decoded(value) for value in data.to_pylist()], pa.string())


def id_numbers(column: pa.ChunkedArray | pa.Array) -> pa.Array:
    """int64 of ids, null where one is not spelt as its number: 007 would come together with 7."""
    column = _plain(column)
    if not is_text(column.type):
        return whole_numbers(column)
    spelt = texts(column)
    fits = pc.fill_null(pc.match_substring_regex(pc.utf8_trim_whitespace(spelt), SPELT_ID), False)
    return whole_numbers(pc.if_else(fits, spelt, pa.scalar(None, spelt.type)))


def whole_numbers(column: pa.ChunkedArray | pa.Array, decimal: str = ".") -> pa.Array:
    """int64, null where it is no whole number or does not fit. A float beyond 2^53 is null: it may
    have been another.

    Args:
        decimal: sign before a fraction; the other one may stand between thousands.
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
    return _parsed(_with_point(texts(column), decimal), _whole_of, pa.int64())


def numbers(column: pa.ChunkedArray | pa.Array, decimal: str = ".", unit: str = "") -> pa.Array:
    """float64, null where it is no finite decimal number.

    Args:
        decimal: "," reads 1.234,5 as a thousand and more, and "." reads 1,234.5 so. The other sign
            stands between thousands or the text is no number: 3.50 is no number where "," is declared.
        unit: a currency or sign that may stand before or behind a number, such as "EUR".
    """
    column = _plain(column)
    if pa.types.is_null(column.type):
        return pa.nulls(len(column), pa.float64())
    if pa.types.is_floating(column.type) or pa.types.is_integer(column.type):
        values = _floats(column)
        return pa.array(np.where(np.isfinite(values), values, 0), mask=~np.isfinite(values))
    text = _with_point(_without_unit(texts(column), unit), decimal)
    values = _parsed(text, _number_of, pa.float64())
    finite = pc.fill_null(pc.is_finite(values), False)
    return pc.if_else(finite, values, pa.scalar(None, pa.float64()))


def _without_unit(column: pa.Array, unit: str) -> pa.Array:
    """Numbers without the unit that stands before or behind them; its sign does as well."""
    spelt = [unit, *(sign for sign, name in _SIGNS.items() if name == unit)]
    ways = "|".join(re.escape(text) for text in spelt if text)
    return (
        pc.replace_substring_regex(column, f"^\\s*(?:{ways})\\s*|\\s*(?:{ways})\\s*$", "")
        if ways
        else column
    )


def unit_of(column: pa.Array) -> str:
    """The currency or sign that nearly every value carries, such as "EUR" of `12,99 EUR` and `12 €`;
    "" where most have none or several differ.
    """
    found = pc.extract_regex(
        pc.utf8_trim_whitespace(column),
        r"^(?P<before>[A-Z]{3}|[€$£¥₽₹])?[\s\x{a0}]*[+-]?[0-9][0-9.,'\x{a0}\x{202f} ]*?[\s\x{a0}]*(?P<behind>[A-Z]{3}|[€$£¥₽₹%]|zł|kr)?$",
    )
    texts_there = len(column) - column.null_count
    spelt = set()
    number = 0
    for side in ("before", "behind"):
        signs = pc.fill_null(pc.struct_field(found, side), "")
        there = pc.not_equal(signs, "")
        number += pc.sum(there).as_py() or 0
        spelt |= {_SIGNS.get(text, text) for text in pc.unique(signs.filter(there)).to_pylist()}
    return spelt.pop() if len(spelt) == 1 and number >= 0.9 * texts_there > 0 else ""


def _with_point(column: pa.Array, decimal: str) -> pa.Array:
    """Numbers that are text with a point before their fraction and nothing between thousands; null
    where the signs stand as no such number has them.
    """
    other = "," if decimal == "." else "."
    spaced = pc.any(pc.match_substring_regex(column, _SPACED)).as_py()
    # Twice, for neighbours share a digit
    if spaced:
        column = pc.replace_substring_regex(column, _SPACED, r"\1\2")
        column = pc.replace_substring_regex(column, _SPACED, r"\1\2")
    if pc.any(pc.match_substring(column, other)).as_py():
        odd = pc.match_substring(column, other)
        grouped = pc.match_substring_regex(pc.utf8_trim_whitespace(column), _GROUPED[decimal])
        plain = pc.replace_substring(column, other, "")
        nothing = pa.scalar(None, column.type)
        column = pc.if_else(odd, pc.if_else(grouped, plain, nothing), column)
    return pc.replace_substring(column, ",", ".") if decimal == "," else column


def times(
    column: pa.ChunkedArray | pa.Array,
    *,
    zone: tzinfo = UTC,
    unit: str | None = None,
    time_format: str = "",
) -> pa.Array:
    """Instants (microseconds, UTC), null without a time, or for one outside of `EARLIEST` …
    `LATEST`.

    A time with a zone is its instant, whatever the zone: an offset, `UTC`, the letters of
    `ZONE_LETTERS`, or an offset with `[Europe/Berlin]` behind it. One without is local time in
    `zone`: of an hour that comes twice the first, and of one that does not exist winter time. Text
    is ISO 8601, of `time_format`, or a number in `unit`.
    """
    column = _plain(column)
    kind = column.type
    if pa.types.is_timestamp(kind):
        micros = _micros_of(column)
        if kind.tz is None:
            micros = _local_to_utc(micros, zone)
    elif pa.types.is_date(kind):
        micros = _local_to_utc(_micros_of(pc.cast(column, pa.timestamp("s"))), zone)
    elif is_text(kind) and unit is None:
        text = texts(column)
        micros = (
            _formatted_times(text, zone, time_format) if time_format else _iso_times(text, zone)
        )
    elif time_format and pa.types.is_integer(kind):  # 20250304
        micros = _formatted_times(pc.cast(column, pa.string()), zone, time_format)
    elif unit is not None:
        micros = _number_times(column, TIME_UNITS[unit])
    else:
        return pa.nulls(len(column), TIMESTAMP)
    values = pc.fill_null(micros, EARLIEST - 1).to_numpy(zero_copy_only=False)
    valid = (values >= EARLIEST) & (values < LATEST)
    return pa.array(np.where(valid, values, 0), pa.int64(), mask=~valid).cast(TIMESTAMP)


def times_of(rows: pa.Table, column: str, written: Format) -> pa.Array:
    """A raw column as instants, as its source is written."""
    given = without_missing(rows[column], written.missing)
    zones = texts(rows[written.zone_column]) if written.zone_column else None
    return _read(Column(column, DType.TIMESTAMP, ""), given, written, zones)


def _times_of_zones(given: pa.ChunkedArray, zones: pa.Array, written: Format) -> pa.Array:
    """Times whose rows name their zones. Rows that name none that there is are null."""
    given = _plain(given)
    made = pa.nulls(len(given), TIMESTAMP)
    for name in pc.unique(zones.drop_null()).to_pylist():
        zone = zone_of(name)
        if zone is None:
            continue
        of_zone = pc.fill_null(pc.equal(zones, name), False)
        found = times(given, zone=zone, unit=written.time_unit, time_format=written.time_format)
        made = pc.if_else(of_zone, found, made)
    return made


@cache
def zone_of(name: str) -> tzinfo | None:
    """A zone by its name, letters or offset."""
    spelt = ZONE_LETTERS.get(name.strip().upper(), name.strip())
    try:
        if re.fullmatch(r"Z|[+-][0-9]{2}:?[0-9]{2}", spelt):
            return datetime.fromisoformat(f"2000-01-01T00:00:00{spelt}").tzinfo
        return ZoneInfo(spelt)
    except (ZoneInfoNotFoundError, ValueError):
        return None


def _number_times(column: pa.Array, micros: float) -> pa.Array:
    """Numbers of a unit as microseconds: whole ones exactly, a fraction to the microsecond, behind
    whichever sign it stands.
    """
    whole = whole_numbers(column)
    found = _scaled(whole, micros)
    if found.null_count == column.null_count:
        return found
    amounts = pc.coalesce(numbers(column), numbers(column, ","))
    values = pc.fill_null(amounts, np.nan).to_numpy(zero_copy_only=False) * micros
    fits = np.isfinite(values) & (np.abs(values) < 2**62)
    rounded = pa.array(np.where(fits, np.rint(values), 0).astype(np.int64), mask=~fits)
    return pc.coalesce(found, rounded)


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
    written: Format,
) -> None:
    kind = given.type
    if column.dtype in NUMBER_TYPES and not is_text(kind) and not pa.types.is_dictionary(kind):
        # Numbers as numbers: those out of range are rows to set aside
        return
    # 1. Ask whether most of the values that are there were lost.
    lost = pc.is_null(made).to_numpy(zero_copy_only=False)
    if not lost.any():
        return
    there = ~is_blank(given, written.missing)
    lost &= there
    # Of a handful of values nothing follows: each row is judged by itself.
    if there.sum() < FEW_VALUES or 2 * lost.sum() <= there.sum():
        return
    shown = _shown(given, int(np.flatnonzero(lost)[0]))
    # 2. Say what was expected, and what the values look like.
    expected = {
        DType.TIMESTAMP: "a time: a timestamp, or text such as 2011-12-09T12:50:00Z",
        DType.FLOAT32: "a number",
        DType.STRING: f"text in UTF-8, of at most {MAX_TEXT_BYTES:,} bytes",
        DType.STRING_LIST: "a list of texts",
        DType.FLOAT32_LIST: "a list of numbers",
    }.get(column.dtype, "a whole number")
    hint = ""
    if column.is_key and column.dtype is DType.INT64:
        hint = (
            f"; an id that is not spelt as its number is text: declare {column.name}=DType.STRING"
        )
    if column.dtype is DType.TIMESTAMP:
        time_unit = written.time_unit
        expected = f"times in {time_unit} since 1970" if time_unit else expected
        expected = f"times as {written.time_format!r} has them" if written.time_format else expected
        temporal = pa.types.is_timestamp(kind) or pa.types.is_date(kind)
        unit = (
            None
            if temporal
            else likely_unit(pc.fill_null(whole_numbers(given), 0).to_numpy(zero_copy_only=False))
        )
        hint = f"; they look like {unit} since 1970" if unit else ""
        if not (unit or temporal or written.time_format):
            hint = "; say how they are written by Source.time_format"
            hint = f"; day and month cannot be told apart there{hint}" if "/" in shown else hint
    raise RawDataError(
        f"{file}: column {theirs!r}: expected {expected}; {int(lost.sum()):,} of {int(there.sum()):,} values are none, "
        f"such as {shown}{hint}. Convert the column, or correct the dataset module"
    )


def _shown(given: pa.ChunkedArray, row: int) -> str:
    value = given[row]
    raw = value.cast(pa.binary()).as_py() if is_text(value.type) else value.as_py()
    return repr(raw.decode(errors="replace") if isinstance(raw, bytes) else raw)[:60]


def _plain(column: pa.ChunkedArray | pa.Array) -> pa.Array:
    """One chunk of a plain type: no dictionaries, views or large lists; UUIDs and other bytes of a
    fixed size as text, durations and times of day as whole numbers of their unit.
    """
    whole = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    if isinstance(whole.type, pa.BaseExtensionType):
        whole = whole.storage
    kind = whole.type
    if pa.types.is_dictionary(kind):
        return _plain(whole.cast(kind.value_type))
    if pa.types.is_string_view(kind):
        return whole.cast(pa.string())
    if pa.types.is_binary_view(kind):
        return whole.cast(pa.binary())
    if pa.types.is_fixed_size_binary(kind):
        shown = _as_uuid if kind.byte_width == 16 else bytes.hex
        values = [None if value is None else shown(value) for value in whole.to_pylist()]
        return pa.array(values, pa.string())
    if pa.types.is_duration(kind) or pa.types.is_time64(kind):
        return whole.cast(pa.int64())
    if pa.types.is_time32(kind):
        return whole.cast(pa.int32())
    return whole


def _as_uuid(value: bytes) -> str:
    return str(uuid.UUID(bytes=value))


def is_readable(kind: pa.DataType) -> bool:
    """Return whether a raw column of this type can be read: structs, maps and lists of them cannot."""
    if isinstance(kind, pa.BaseExtensionType):
        return is_readable(kind.storage_type)
    if pa.types.is_dictionary(kind):
        return is_readable(kind.value_type)
    if is_list(kind):
        inner = kind.value_type
        return is_readable(inner) and not is_list(inner)
    return not pa.types.is_nested(kind)


def is_list(kind: pa.DataType) -> bool:
    """Return whether a type is any kind of list."""
    tests = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
    return any(test(kind) for test in tests)


def _floats(column: pa.Array) -> np.ndarray:
    values = pc.fill_null(pc.cast(column, pa.float64(), safe=False), np.nan)
    return values.to_numpy(zero_copy_only=False)


def _by_value(column: pa.Array, read: Callable[[str], Any], kind: pa.DataType) -> pa.Array:
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
            # Such as 3.0 where a whole number is wanted
            pass
    return _by_value(column, read, kind)


def _iso_times(column: pa.Array, zone: tzinfo) -> pa.Array:
    """Microseconds of ISO texts. Those of the common forms are read all at once, each with its own
    offset; the others value by value.
    """
    column = pc.utf8_trim_whitespace(column)
    # 1. Most logs write all their times in forms that Arrow reads, which costs a tenth of the rest.
    for kind in (pa.timestamp("us", "UTC"), pa.timestamp("us")):
        try:
            read = pc.cast(pc.cast(column, kind), pa.int64())
        except pa.ArrowInvalid:
            continue
        return read if kind.tz else _local_to_utc(read, zone)
    # 2. Replace zones in letters or brackets by offsets.
    if pc.any(pc.match_substring_regex(column, _ZONE_BEHIND)).as_py():
        column = _with_offsets(column)
    # 3. Read the common forms among others, all at once.
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
            # A thirteenth month somewhere: value by value
            continue
        if kind.tz is None:
            read = _local_to_utc(read, zone)
        there = read.is_valid().to_numpy(zero_copy_only=False)
        micros[at[there]] = pc.drop_null(read).to_numpy(zero_copy_only=False)
        known[at] = there
    # 4. Read all that is left, value by value.
    rest = np.flatnonzero(~known)
    if len(rest):
        read = _by_value(column.take(pa.array(rest)), lambda text: _iso_of(text, zone), pa.int64())
        there = read.is_valid().to_numpy(zero_copy_only=False)
        micros[rest[there]] = pc.drop_null(read).to_numpy(zero_copy_only=False)
        known[rest] = there
    return pa.array(micros, mask=~known)


# A zone in letters behind a time, or its name in brackets behind an offset.
_ZONE_BEHIND = r"[0-9 ][A-Z]{2,4}$|[0-9]Z? ?\[[A-Za-z_/+-]+\]$| Z$"


def _with_offsets(column: pa.Array) -> pa.Array:
    """Times with an offset in place of a zone's letters; a name in brackets goes, for the offset
    before it is the instant.
    """
    column = pc.replace_substring_regex(column, r" ?\[[A-Za-z_/+-]+\]$", "")
    for letters, offset in ZONE_LETTERS.items():
        column = pc.replace_substring_regex(column, rf"([0-9]) ?{letters}$", rf"\1{offset}")
    return column


# Directives of two or four digits, from which ISO 8601 can be made without reading value by value.
_DIGITS = {"%Y": "[0-9]{4}", "%z": "Z|[+-][0-9]{2}:?[0-9]{2}"}
_DIGITS |= {f"%{letter}": "[0-9]{2}" for letter in "mdHMS"}


def _formatted_times(column: pa.Array, zone: tzinfo, time_format: str) -> pa.Array:
    """Microseconds of texts in a format: where it is plain digits, texts that are written in full are
    put in ISO order and read all at once, the others value by value.
    """
    column = _with_offsets(pc.utf8_trim_whitespace(column))
    made = pa.nulls(len(column), pa.int64())
    parts = re.split("(%[a-zA-Z])", time_format)
    used = [part for part in parts if part.startswith("%")]
    if set(used) <= set(_DIGITS) and {"%Y", "%m", "%d"} <= set(used):
        pattern = "".join(f"({_DIGITS[p]})" if p in _DIGITS else re.escape(p) for p in parts)
        behind = "" if "%z" in used else "(Z|[+-][0-9]{2}:?[0-9]{2})?"
        place = {part: f"\\{number + 1}" for number, part in enumerate(used)}
        clock = ":".join(place.get(part, "00") for part in ("%H", "%M", "%S"))
        offset = place.get("%z", f"\\{len(used) + 1}")
        fits = pc.match_substring_regex(column, f"^{pattern}{behind}$")
        iso = pc.replace_substring_regex(
            pc.if_else(fits, column, pa.scalar(None, column.type)),
            f"^{pattern}{behind}$",
            f"{place['%Y']}-{place['%m']}-{place['%d']}T{clock}{offset}",
        )
        made = _iso_times(iso, zone)
    rest = pc.and_(pc.is_null(made), pc.is_valid(column))
    if pc.any(rest).as_py():
        left = pc.if_else(rest, column, pa.scalar(None, column.type))
        read = _by_value(left, lambda text: _formatted_of(text, zone, time_format), pa.int64())
        made = pc.coalesce(made, read)
    return made


DIGITS_ONLY = {"%Y%m%d": 8, "%Y%m%d%H%M": 12, "%Y%m%d%H%M%S": 14}


def _formatted_of(text: str, zone: tzinfo, time_format: str) -> int | None:
    # `strptime` would take 202401151030 for a time of one-digit minutes and seconds.
    if time_format in DIGITS_ONLY and len(text) != DIGITS_ONLY[time_format]:
        return None
    zoned = () if "%z" in time_format else (f"{time_format}%z", f"{time_format} %z")
    for given in (time_format, *zoned):
        try:
            time = datetime.strptime(text, given)
        except ValueError:
            continue
        return _since_epoch(time, zone)
    return None


def _since_epoch(time: datetime, zone: tzinfo) -> int:
    return ((time if time.tzinfo else time.replace(tzinfo=zone)) - EPOCH) // timedelta(
        microseconds=1
    )


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
    return _since_epoch(time, zone)


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
