"""Columns as strangers have them: read as what they are, or null; a file that is another is refused
by name.
"""

from __future__ import annotations

import itertools
import math
from datetime import UTC, datetime, timedelta, timezone
from decimal import Decimal
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from feature_repo import datasets
from feature_repo.contract import limits
from feature_repo.contract.arrow import EPOCH
from feature_repo.contract.schema import (
    LARGEST_NUMBER,
    MAX_TEXT_BYTES,
    Column,
    DType,
    Entity,
    Source,
    Table,
)
from feature_repo.datasets import Parsed, RawDataError, RawUnit
from feature_repo.raw import raw, sources
from feature_repo.raw.parse import parse

RETAIL = datasets.load("online_retail")

LONDON = ZoneInfo("Europe/London")
WHEN = st.datetimes(datetime(1981, 1, 1), datetime(2099, 1, 1))


@given(st.lists(st.one_of(st.none(), st.integers(-(2**63), 2**63 - 1))))
def test_whole_numbers_keep_every_digit_as_numbers_and_as_text(values: list[int | None]) -> None:
    assert raw.whole_numbers(pa.array(values, pa.int64())).to_pylist() == values
    spelt = pa.array([None if v is None else f" {v} " for v in values], pa.string())
    assert raw.whole_numbers(spelt).to_pylist() == values
    assert raw.whole_numbers(spelt.dictionary_encode()).to_pylist() == values


@given(st.lists(st.floats()))
def test_a_float_is_a_whole_number_only_where_no_other_number_is_the_same_float(
    values: list[float],
) -> None:
    found = raw.whole_numbers(pa.array(values, pa.float64())).to_pylist()
    for value, whole in zip(values, found, strict=True):
        exact = math.isfinite(value) and abs(value) < 2**53 and value == math.floor(value)
        assert whole == (int(value) if exact else None)


@pytest.mark.parametrize(
    "text", ["0x10", "1_000", "1.5", "1e3", "²", "", " ", "nan", "9223372036854775808", "１"]
)
def test_what_is_spelt_otherwise_is_no_whole_number(text: str) -> None:
    assert raw.whole_numbers(pa.array([text])).to_pylist() == [None]


@pytest.mark.parametrize(
    ("text", "number"),
    [("1.50", 1.5), ("-3", -3.0), ("1e3", 1000.0), ("inf", None), ("x", None), ("1,5", None)],
)
def test_numbers_as_text(text: str, number: float | None) -> None:
    assert raw.numbers(pa.array([text])).to_pylist() == [number]


def test_decimals_are_numbers() -> None:
    column = pa.array([Decimal("2.55"), None], pa.decimal128(12, 2))
    assert raw.numbers(column).to_pylist() == [2.55, None]


def test_text_that_is_no_utf_8_or_too_long_is_null_and_costs_no_other() -> None:
    column = pa.array([b"caf\xc3\xa9", b"caf\xe9", b"x" * (MAX_TEXT_BYTES + 1), None], pa.binary())
    assert raw.texts(column).to_pylist() == ["café", None, None, None]


@settings(max_examples=200, deadline=None)
@given(
    st.lists(WHEN, min_size=1),
    st.sampled_from(["UTC", "Europe/London", "America/New_York", "Asia/Tokyo"]),
)
def test_an_instant_is_kept_whatever_its_zone(times: list[datetime], zone: str) -> None:
    aware = [time.replace(tzinfo=UTC) for time in times]
    column = pa.array(aware, pa.timestamp("us", tz=zone))
    assert raw.times(column, zone=LONDON).to_pylist() == aware
    spelt = pa.array([time.astimezone(timezone(timedelta(hours=-5))).isoformat() for time in aware])
    assert raw.times(spelt, zone=LONDON).to_pylist() == aware


@settings(max_examples=200, deadline=None)
@given(st.lists(WHEN, min_size=1))
def test_a_time_without_a_zone_is_local_in_every_unit(times: list[datetime]) -> None:
    for unit in ("s", "ms", "us", "ns"):
        step = {"s": 1_000_000, "ms": 1000, "us": 1, "ns": 1}[unit]
        whole = [time - timedelta(microseconds=time.microsecond % step) for time in times]
        expected = [time.replace(tzinfo=LONDON).astimezone(UTC) for time in whole]
        assert raw.times(pa.array(whole, pa.timestamp(unit)), zone=LONDON).to_pylist() == expected


@pytest.mark.parametrize(
    ("unit", "factor"),
    [("seconds", 1), ("milliseconds", 10**3), ("microseconds", 10**6), ("nanoseconds", 10**9)],
)
def test_whole_numbers_are_times_in_the_declared_unit_alone(unit: str, factor: int) -> None:
    seconds = 1_323_435_000
    column = pa.array([seconds * factor, None, seconds * factor // 1000, -1], pa.int64())
    right = EPOCH + timedelta(seconds=seconds)
    assert raw.times(column, unit=unit).to_pylist() == [right, None, None, None]
    assert raw.times(column).to_pylist() == [None] * 4


@pytest.mark.parametrize("year", [1900, 1979, 2100, 9999])
def test_years_that_no_log_is_of_are_no_times(year: int) -> None:
    assert raw.times(pa.array([datetime(year, 1, 1)], pa.timestamp("s"))).to_pylist() == [None]


RAW = [(Column("time", DType.TIMESTAMP, ""), "at"), (Column("n", DType.INT64, ""), "n")]


@pytest.mark.parametrize(
    ("column", "message"),
    [
        (pa.array([1_323_435_000_123] * 4), "look like milliseconds"),
        (pa.array([1_323_435_000] * 4), "look like seconds"),
        (pa.array([1_323_435_000_123_456_789] * 4), "look like nanoseconds"),
        (pa.array(["12/09/2011 12:50"] * 4), "day and month cannot be told apart"),
    ],
)
def test_a_whole_file_in_another_unit_is_refused_with_the_likely_one(
    column: pa.Array, message: str
) -> None:
    with pytest.raises(RawDataError, match=f"shop.parquet: column 'at'.*{message}"):
        raw.typed(RAW, pa.table({"at": column, "n": [1, 2, 3, 4]}), "shop.parquet")


def test_a_single_row_in_another_unit_is_null() -> None:
    times = pa.array([1_323_435_000, 1_323_435_000_000, 1_323_435_001, 1_323_435_002])
    written = raw.Format(time_unit="seconds")
    read = raw.typed(RAW, pa.table({"at": times, "n": [1, 2, 3, 4]}), "f", written)
    assert [time is None for time in read["time"].to_pylist()] == [False, True, False, False]


def test_a_row_range_is_read_a_few_rows_at_a_time_and_long_texts_are_cut(tmp_path: Path) -> None:
    rows = 5000
    table = pa.table(
        {
            "n": np.arange(rows),
            "text": ["x" * (100_000 if n % 1000 == 7 else 3) for n in range(rows)],
        }
    )
    pq.write_table(table, tmp_path / "f.parquet", row_group_size=700)
    unit = RawUnit(str(tmp_path / "f.parquet"), 650, 800)
    (block,) = sources.blocks_of(Source("f.parquet"), unit, ["text", "n"])
    read = block.rows
    assert block.positions.tolist() == list(range(650, 1450))
    assert read.column_names == ["text", "n"]
    assert read["n"].to_pylist() == list(range(650, 1450))
    assert read.nbytes < 1 << 20
    assert raw.texts(read["text"]).null_count == 1


def test_a_file_that_is_no_parquet_or_lacks_a_column_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_text("no")
    with pytest.raises(RawDataError, match=r"a\.parquet is no Parquet file"):
        sources.units_of(Source("a.parquet"), str(tmp_path), "events", ["n"])
    pq.write_table(pa.table({"m": [1]}), tmp_path / "b.parquet")
    with pytest.raises(RawDataError, match=r"b\.parquet: columns \['n'\] are missing"):
        sources.units_of(Source("b.parquet"), str(tmp_path), "events", ["n"])


LINE = {
    "InvoiceNo": "536365",
    "StockCode": "71053",
    "Description": "LAMP",
    "Quantity": "2",
    "InvoiceDate": datetime(2011, 5, 1, 10),
    "UnitPrice": "1.5",
    "CustomerID": "17850",
    "Country": "France",
}


def parsed_of(rows: list[dict[str, Any]], start: int = 0) -> Parsed:
    """Invoice lines as events and dead letters."""
    unit = RawUnit("f.parquet", start, len(rows))
    block = sources.RawBlock(pa.Table.from_pylist(rows), start + np.arange(len(rows)))
    return parse(RETAIL.contract, unit, block, RETAIL.derive)


@pytest.mark.parametrize(
    ("field", "value", "reason"),
    [
        ("Quantity", "many", "unreadable: quantity or its sign"),
        ("Quantity", "1e300", None),
        ("UnitPrice", "free", "unreadable: price"),
        ("InvoiceDate", None, "unreadable: time"),
        ("InvoiceDate", datetime(1900, 1, 1), "unreadable: time"),
        ("CustomerID", "", "no customer"),
        ("CustomerID", "NaN", "no customer"),
        ("CustomerID", "guest", "unreadable: customer number"),
        ("StockCode", None, "unreadable: product code"),
        ("InvoiceNo", "53636", "unreadable: invoice number"),
    ],
)
def test_one_bad_field_of_an_invoice_line_sets_that_line_aside_alone(
    field: str, value: Any, reason: str | None
) -> None:
    rows = [dict(LINE), {**LINE, field: value}, dict(LINE)]
    parsed = parsed_of(rows, 10)
    checked = limits.check(RETAIL.contract.table("events"), parsed.events)
    reasons = [*parsed.dead_letters["reason"].to_pylist(), *checked.reasons]
    assert len(reasons) == 1
    assert reason is None or reasons == [reason]
    assert checked.kept["source_position"].to_pylist() == [10, 12]


def test_customers_of_nineteen_digits_keep_them() -> None:
    rows = [{**LINE, "CustomerID": f"12345678901234560{n:02d}"} for n in range(3)]
    parsed = parsed_of(rows)
    assert parsed.events["user_id"].to_pylist() == [1234567890123456000 + n for n in range(3)]


def test_a_customer_number_that_is_a_float_beyond_exactness_is_no_customer_of_ours() -> None:
    rows = [{**LINE, "CustomerID": number} for number in (17850.0, 1e300, float(2**53), 12.5)]
    parsed = parsed_of(rows)
    assert parsed.events["user_id"].to_pylist() == [17850]
    assert parsed.dead_letters["reason"].to_pylist() == ["unreadable: customer number"] * 3


THINGS = Table(
    "things",
    "",
    (
        Column("price", DType.FLOAT32, "", minimum=0),
        Column("stars", DType.INT64, "", nullable=True, minimum=1, maximum=5),
        Column("kind", DType.STRING, "", values=("a", "b")),
        Column("words", DType.STRING_LIST, "", nullable=True),
    ),
    entity=Entity("thing", "thing_id", DType.STRING, ""),
)


def test_each_limit_sets_a_row_aside_with_its_reason() -> None:
    rows = [
        ("t1", 1.0, 3, "a", ["x"]),
        ("t2", -1.0, 3, "a", None),
        ("t3", 1e14, 3, "a", []),
        ("t4", float("inf"), 3, "a", None),
        ("t5", None, 3, "a", None),
        ("t6", 1.0, 6, "a", None),
        ("t7", 1.0, None, "c", None),
        ("", 1.0, None, "b", None),
        ("x" * 2000, 1.0, None, "b", None),
        ("t9", 1.0, None, "b", ["x", None, "y", None]),
    ]
    names = [c.name for c in THINGS.all_columns]
    table = pa.Table.from_pylist([dict(zip(names, row, strict=True)) for row in rows]).select(names)
    checked = limits.check(
        THINGS, table.set_column(1, "price", table["price"].cast(pa.float32(), safe=False))
    )
    assert dict(zip(checked.dead.tolist(), checked.reasons, strict=True)) == {
        1: "price: is below 0",
        2: f"price: is above {LARGEST_NUMBER:g}",
        3: "price: is no finite number",
        4: "price: is missing",
        5: "stars: is above 5",
        6: "kind: is none of ('a', 'b')",
        7: "thing_id: is empty",
        8: "thing_id: is longer than 1,024 bytes",
    }
    assert checked.kept["thing_id"].to_pylist() == ["t1", "t9"]
    assert checked.kept["words"].to_pylist() == [["x"], ["x", "y"]]
    assert checked.nulls_dropped == 2


@pytest.mark.parametrize(
    ("year", "dead"), [(1900, True), (1970, False), (2026, False), (38504, True)]
)
def test_a_row_of_no_year_that_there_is_is_set_aside_whoever_parsed_it(
    year: int, dead: bool
) -> None:
    table = Table("rows", "", (Column("at", DType.TIMESTAMP, ""),))
    at = pa.array([(year - 1970) * 31_556_952_000_000]).cast(pa.timestamp("us", "UTC"))
    assert (
        limits.check(table, pa.table({"at": at})).reasons
        == ["at: is of no year from 1970 to 2099"] * dead
    )


def test_a_dead_letter_is_short_whatever_the_row_holds() -> None:
    table = pa.table({"a": pa.array([b"\xff" * 10_000_000], pa.binary()), "b": ["é"]})
    (letter,) = limits.raw_rows(table, np.array([0]))
    assert len(letter) < 2000
    assert '"b": "é"' in letter


def test_times_that_are_read_at_once_are_the_ones_that_are_read_one_by_one() -> None:
    """Of every form that Arrow takes for a time, odd ones too."""
    dates = ["2024-01-02", "2024-1-2", "20240102", "0001-01-01", "9999-12-31", "2024-02-30"]
    clocks = [
        "",
        "00",
        "10:11",
        "10:11:12",
        "10:11:60",
        "24:00:00",
        "10:11:12.5",
        "10:11:12.1234567",
    ]
    zones = ["", "Z", "z", "+00:00", "+0100", "+01", "-05:30", "+24:00", "-00:00", " Z", "+1:00"]
    berlin = ZoneInfo("Europe/Berlin")
    taken = 0
    for date, between, clock, behind in itertools.product(
        dates, ["T", " ", "t", ""], clocks, zones
    ):
        text = date + between + clock + behind
        at_once = raw.times(pa.array([text]), zone=berlin)[0].as_py()
        # Beside a text of another form, Arrow does not read the column.
        (one_by_one, _) = raw.times(
            pa.array([text, "2024-01-02T10:11:12 CEST"]), zone=berlin
        ).to_pylist()
        assert at_once == one_by_one, text
        taken += at_once is not None
    assert taken > 150
