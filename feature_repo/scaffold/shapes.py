"""The shape of a raw column's values: numbers and their signs, times and their format, lists,
texts. Nothing here looks at a column's name.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from feature_repo.contract.arrow import iso_micros, micros
from feature_repo.contract.schema import TIME_UNITS
from feature_repo.raw import raw

# Distinct values that are read as categories
FEW = 20
# Share of a column's values that decides what it is; the others are counted
NEARLY_ALL = 0.98
# Distinct texts on which formats of times are tried
TRIED = 2000
# Numbers before it are taken for ids rather than times
FIRST_TIME = iso_micros("1990-01-01")
YEAR = 366 * 86_400 * 1e6  # microseconds
# A log of numbers before it may count from another year
UNIX_TIMES = iso_micros("1997-01-01")
_DATES = (
    "%Y/%m/%d", "%Y.%m.%d", "%d.%m.%Y", "%d.%m.%y", "%m/%d/%Y", "%d/%m/%Y", "%m/%d/%y", "%d/%m/%y",
    "%d-%m-%Y", "%m-%d-%Y", "%d-%b-%Y", "%d-%b-%y", "%d %b %Y", "%d %B %Y", "%b %d %Y", "%b %d, %Y",
    "%B %d, %Y", "%m %d, %Y", "%Y-%m-%d", "%y/%m/%d", "%y.%m.%d", "%y-%m-%d",
)  # fmt: skip
_CLOCKS = ("", "%H:%M:%S", "%H:%M", "%I:%M:%S %p", "%I:%M %p", "%H:%M:%S.%f")
FORMATS = (
    *(f"{date} {clock}".strip() for date, clock in itertools.product(_DATES, _CLOCKS)),
    *(f"{date}, {clock}" for date, clock in itertools.product(_DATES, _CLOCKS[1:])),
    "%a %b %d %H:%M:%S %z %Y", "%a %b %d %H:%M:%S %Y", "%a, %d %b %Y %H:%M:%S %z",
    "%a, %d %b %Y %H:%M:%S", "%d/%b/%Y:%H:%M:%S %z", "%Y%m%dT%H%M%S", "%Y%m%d%H%M%S", "%Y%m%d %H%M%S",
    "%Y%m%d %H:%M:%S", "%Y%m%d",
)  # fmt: skip


# How a spreadsheet shows a long number: 1.70407E+12 was 1704067200123.
_ROUNDED = r"^\s*[+-]?[0-9](\.[0-9]{1,7})?[eE]\+[0-9]+\s*$"
# Numbers in all ways in which prices are written: (12.50), 12.50-, -$12.50, 12,50 EUR.
_LIKE_A_NUMBER = (
    r"^[\s(+-]*([A-Z]{3}|[€$£¥₽₹])?[\s+-]*"
    r"([0-9]{1,3}([.,' \x{a0}][0-9]{3})+|[0-9]+)([.,][0-9]+)?"
    r"\s*([A-Z]{3}|[€$£¥₽₹%]|zł|kr)?[\s)+-]*$"
)
# Ids with spaces between them, as of the items that were shown: N512 N17, or N512-0 N17-1.
_IDS_IN_A_ROW = r"^[A-Za-z]{0,3}[0-9]+(-[01])?( [A-Za-z]{0,3}[0-9]+(-[01])?){2,}$"


@dataclass(frozen=True)
class ColumnShape:
    """The shape of a column's values.

    Args:
        distinct: different values; `rows` how many there are, and `blank` the share that is nothing.
        number: whether they are numbers, with `decimal` as their sign (`signed`: it is seen) and
            `unit` beside each;
            `whole` whether all are whole, `low` and `high` the least and the largest.
        flag: whether they are 0 and 1, however spelt.
        time: whether they are times; in `time_unit` where they are numbers, of `time_format` where
            they are text and not ISO 8601. `or_format` reads them all as well.
        separator: between the parts of a list that is text; `most` of them are read. `length` is
            that of a vector.
        spelt_id: whether each is spelt as its number, so that it can be an id that is one.
        rounded: whether numbers are written as 1.70407E+12, without their last digits.
        lost: values that are not what nearly all others are.
        readable: whether a column of ours can hold it.
    """

    distinct: int
    rows: int
    blank: float
    number: bool = False
    decimal: Literal[".", ","] = "."
    signed: bool = False
    unit: str = ""
    whole: bool = False
    low: float = 0.0
    high: float = 0.0
    flag: bool = False
    time: bool = False
    time_unit: str | None = None
    time_format: str = ""
    or_format: str = ""
    separator: str = ""
    most: int = 0
    length: int = 0
    spelt_id: bool = False
    rounded: bool = False
    lost: int = 0
    readable: bool = True

    @property
    def text(self) -> bool:
        """True if the column is neither number, nor list, nor time."""
        return self.readable and not (self.number or self.separator or self.length or self.time)

    @property
    def key(self) -> bool:
        """True if the column may name something."""
        fraction = self.number and not self.whole
        is_list = bool(self.separator or self.length)
        written_time = self.time and not self.number
        return self.readable and not (is_list or fraction or written_time) and self.distinct > 1


def shape_of(column: pa.ChunkedArray) -> ColumnShape:
    """Look at a column's values."""
    # 1. Set apart what cannot be read, lists, and columns without a value.
    if not raw.is_readable(column.type):
        return ColumnShape(0, len(column), 0.0, readable=False)
    whole = column.combine_chunks()
    blank = raw.is_blank(whole)
    values = whole.filter(pa.array(~blank))
    share = float(blank.mean()) if len(blank) else 0.0
    if raw.is_list(values.type):
        return _list_shape(values, share)
    if not len(values):
        return ColumnShape(0, len(column), share)
    texts = raw.texts(values)
    if texts.null_count == len(texts):
        return ColumnShape(0, len(column), share, readable=False)
    # Bytes that are no text, or too many of them
    if texts.null_count:
        values = values.filter(pc.is_valid(texts))
        texts = texts.drop_null()
    # 2. Try the strictest kind first: nearly every number or time is a text as well.
    made = ColumnShape(len(pc.unique(texts)), len(column), share)
    if pa.types.is_timestamp(values.type) or pa.types.is_date(values.type):
        return replace(made, time=True)
    # A flag may be a number too: it is noted, and the search goes on.
    if made.distinct == 2 and raw.truths(texts).null_count == 0:
        made = replace(made, flag=True)
    numeric = _number_shape(values, texts, made)
    if numeric is not None or made.flag:
        return numeric or made
    # 3. Try text: times in ISO 8601, times in a format, lists, or none of these.
    lost = raw.times(values).null_count
    if lost <= (1 - NEARLY_ALL) * len(values):
        return replace(made, time=True, lost=lost)
    formats = formats_of(texts)
    if formats:
        return replace(made, time=True, time_format=formats[0], or_format="".join(formats[1:2]))
    return _text_list_shape(texts, made)


def _number_shape(values: pa.Array, texts: pa.Array, made: ColumnShape) -> ColumnShape | None:
    """Return the shape of a column of numbers; None if it holds something else."""
    # 1. Read with both signs of a fraction: the right one loses fewer values.
    unit = raw.unit_of(texts)
    signs: tuple[Literal[".", ","], ...] = (".", ",")
    read = {sign: raw.numbers(values, sign, unit) for sign in signs}
    lost = {sign: amounts.null_count for sign, amounts in read.items()}
    if min(lost.values()) > (1 - NEARLY_ALL) * len(values):
        return None
    decimal = decimal_of(texts) if lost["."] == lost[","] else min(signs, key=lost.__getitem__)
    amounts = read[decimal]
    # 2. Ask whether all are whole.
    wholes = raw.whole_numbers(values, decimal)
    if pc.any(pc.match_substring_regex(texts.filter(pc.is_null(wholes)), r"^[0-9]{19,}$")).as_py():
        # Ids beyond 2^63, which are text
        return None
    is_whole = wholes.null_count == lost[decimal] and not unit
    floats = amounts.drop_null().to_numpy()
    spelt = pc.all(pc.match_substring_regex(pc.utf8_trim_whitespace(texts), raw.SPELT_ID)).as_py()
    # 3. Ask whether they are times: counts since 1970, or dates such as 20250304.
    time_unit = _time_unit(floats) if not unit else None
    dates = made.distinct > 1 and is_whole and 8 <= len(texts[0].as_py().strip()) <= 14
    found = formats_of(texts, ("%Y%m%d", "%Y%m%d%H%M", "%Y%m%d%H%M%S")) if dates else []
    return replace(
        made,
        number=True,
        decimal=decimal,
        signed=bool(pc.any(pc.match_substring_regex(texts, "[.,]")).as_py()),
        unit=unit,
        whole=is_whole,
        low=float(floats.min()),
        high=float(floats.max()),
        time=time_unit is not None or bool(found),
        time_unit=None if found else time_unit,
        time_format=found[0] if found else "",
        spelt_id=bool(spelt) and is_whole,
        rounded=bool(pc.any(pc.match_substring_regex(texts, _ROUNDED)).as_py()),
        lost=lost[decimal],
    )


def decimal_of(texts: pa.Array) -> Literal[".", ","]:
    """The sign before a fraction, of numbers that both signs would read.

    A comma stands before one where only two groups are ever seen and the first is a zero, or where
    numbers without it are never above 999 while some have fewer than three digits; else it stands
    between thousands, as in 12,034.
    """
    comma = pc.fill_null(pc.match_substring(texts, ","), False)
    point = pc.fill_null(pc.match_substring(texts, "."), False)
    if not pc.any(comma).as_py():
        several = pc.any(pc.match_substring_regex(texts, r"\..*\.")).as_py()
        return "," if several else "."
    if pc.any(point).as_py():
        return "."
    zero = pc.any(pc.match_substring_regex(texts, r"^\s*[+-]?0,")).as_py()
    return "," if zero else "."


def unsure_sign(texts: pa.Array) -> str:
    """A comma or point that may stand before a fraction or between thousands, for all that tells is that it
    has three digits behind it each time; "" if there is no such sign.
    """
    plain = pc.utf8_trim_whitespace(texts)
    for sign, other in ((",", "."), (".", ",")):
        signed = pc.fill_null(pc.match_substring(plain, sign), False)
        sure = rf"\{other}|\{sign}\d*\{sign}|^[+-]?0\{sign}"
        if not pc.any(signed).as_py() or pc.any(pc.match_substring_regex(plain, sure)).as_py():
            continue
        three = pc.match_substring_regex(plain, rf"^\D*\d{{1,3}}\{sign}\d{{3}}\D*$")
        short = pc.match_substring_regex(plain, r"^\D*\d{1,3}\D*$")
        if pc.all(pc.if_else(signed, three, short)).as_py():
            return sign
    return ""


def unlike_numbers(texts: pa.Array) -> str:
    """Return a text that looks like a number but is not written as most of them are; "" if there is no such
    text, or few look like numbers.
    """
    like = pc.match_substring_regex(texts, _LIKE_A_NUMBER)
    if (pc.mean(like.cast(pa.float64())).as_py() or 0.0) < NEARLY_ALL:
        return ""
    read = min(
        (raw.numbers(texts, sign) for sign in (".", ",")), key=lambda found: found.null_count
    )
    odd = texts.filter(pc.is_null(read))
    return str(odd[0]) if len(odd) else ""


def _time_unit(values: np.ndarray) -> str | None:
    """The unit in which nearly all of these numbers are times from 1990 to a year from now."""
    last = micros_of_now() + 366 * 86_400 * 1e6
    for unit, size in TIME_UNITS.items():
        scaled = values * size
        if ((scaled >= FIRST_TIME) & (scaled < last)).mean() >= 0.9:
            return unit
    return None


def micros_of_now() -> float:
    """Now, microseconds since 1970."""
    return datetime.now(UTC).timestamp() * 1e6


def formats_of(texts: pa.Array, formats: tuple[str, ...] = FORMATS) -> list[str]:
    """Formats in which nearly all of these texts are times from 1970 to a year from now. A format by which
    they lie decades apart, as 24.01.15 and 24.01.16 where the year is read last, is left out if a different one
    reads them together. If both do, the one with the month first comes before the one with the day.
    """
    distinct = pc.unique(texts.drop_null())
    tried = distinct.take(
        pa.array(np.linspace(0, len(distinct) - 1, min(len(distinct), TRIED)).astype(np.int64))
    )
    few = tried.slice(0, 20)
    last = micros_of_now() + 366 * 86_400 * 1e6
    found = []
    for written in formats:
        if raw.times(few, time_format=written).null_count > 1:
            continue
        read = raw.times(tried, time_format=written)
        if (
            read.null_count <= (1 - NEARLY_ALL) * len(tried)
            and np.median(micros(read.drop_null())) < last
        ):
            found.append((read.null_count, float(np.std(micros(read.drop_null()))), written))
    least = min((lost for lost, _, _ in found), default=0)
    fitting = [(spread, written) for lost, spread, written in found if lost == least]
    closest = min((spread for spread, _ in fitting), default=0.0)
    # A day taken for a year spreads a log over decades; day and month exchanged, over a year.
    return [written for spread, written in fitting if spread <= 4 * closest + YEAR]


def _text_list_shape(texts: pa.Array, made: ColumnShape) -> ColumnShape:
    """Lists that are written as text: of numbers, or of few words with a sign between them."""
    points, commas = (_vector_length(texts, decimal) for decimal in (".", ","))
    if points or commas:
        # `0,5 1,25` is two numbers, and four to who takes each comma for an end.
        by_comma = bool(commas) and points in (0, 2 * commas)
        return replace(
            made, length=commas if by_comma else points, decimal="," if by_comma else "."
        )
    spaced = pc.match_substring_regex(pc.utf8_trim_whitespace(texts), _IDS_IN_A_ROW)
    if pc.mean(spaced.cast(pa.float64())).as_py() > 0.9:
        lengths = pc.list_value_length(pc.utf8_split_whitespace(texts)).to_numpy()
        return replace(made, separator=" ", most=_most(lengths))
    # 12,50 beside 12.50 is no list
    if unlike_numbers(texts):
        return made
    for separator in ("|", ";", ","):
        parts = pc.split_pattern(pc.utf8_trim(texts, "[] "), separator)
        lengths = pc.list_value_length(parts).to_numpy()
        distinct = len(pc.unique(pc.utf8_trim_whitespace(pc.list_flatten(parts))))
        if (lengths > 1).mean() > 0.2 and distinct <= max(FEW, made.distinct // 2):
            return replace(made, separator=separator, most=_most(lengths))
    return made


def _vector_length(texts: pa.Array, decimal: str) -> int:
    """How many numbers each text holds; 0 where they differ, or are fewer than four."""
    lengths = pc.fill_null(pc.list_value_length(raw.number_lists(texts, decimal)), 0).to_numpy()
    return int(lengths[0]) if lengths.min() == lengths.max() >= 4 else 0


def _list_shape(values: pa.Array, blank: float) -> ColumnShape:
    lengths = pc.list_value_length(values).to_numpy(zero_copy_only=False)
    numeric = pa.types.is_floating(pc.list_flatten(values).type)
    if numeric and len(lengths) and lengths.min() == lengths.max():
        return ColumnShape(len(values), len(values), blank, length=int(lengths[0]))
    return ColumnShape(len(values), len(values), blank, separator="|", most=_most(lengths))


def _most(lengths: np.ndarray) -> int:
    """Values that cover nearly all bags."""
    return int(np.clip(np.quantile(lengths, 0.99), 1, 16)) if len(lengths) else 1
