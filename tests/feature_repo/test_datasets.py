"""Raw rows become events or dead letters; nothing is lost, ties keep their order."""

from __future__ import annotations

import json
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from feature_repo import datasets
from feature_repo.contract.arrow import micros
from feature_repo.datasets import Parsed, RawDataError, RawUnit, online_retail
from feature_repo.raw.examples import requests_of
from feature_repo.raw.parse import parse
from feature_repo.raw.sources import RawBlock

RETAIL, FILMS = datasets.load("online_retail"), datasets.load("movielens_1m")

CODES = st.sampled_from(
    [
        "85123A",
        "71053",
        "84029ga",
        "POST",
        "M",
        "BANK CHARGES",
        "gift_0001_20",
        "8512",
        "851234",
        "DCGS0003",
        "85123ABC",
        None,
    ]
)
INVOICES = st.sampled_from(["536365", "C536365", "A563185", "53636", None])
NUMBERS = st.one_of(
    st.integers(-5, 5).map(float), st.sampled_from([float("nan"), float("inf"), 0.5])
)
LINES = st.lists(
    st.tuples(
        INVOICES,
        CODES,
        st.sampled_from(["LAMP", None]),
        NUMBERS,
        st.one_of(st.none(), st.datetimes(datetime(2010, 12, 1), datetime(2011, 12, 9))),
        NUMBERS,
        st.sampled_from([17850.0, 13047.0, float("nan"), -1.0, 12.5]),
        st.sampled_from(["France", "United Kingdom"]),
    ),
    max_size=30,
)
NAMES = [
    "InvoiceNo",
    "StockCode",
    "Description",
    "Quantity",
    "InvoiceDate",
    "UnitPrice",
    "CustomerID",
    "Country",
]


def parsed_of(rows: list[tuple[Any, ...]], start: int = 0) -> Parsed:
    """Invoice lines as events and dead letters."""
    unit = RawUnit("shop.parquet", start, len(rows))
    block = RawBlock(raw_table(rows), start + np.arange(len(rows)))
    return parse(RETAIL.contract, unit, block, RETAIL.derive)


def raw_table(rows: list[tuple[Any, ...]]) -> pa.Table:
    types = [
        pa.string(),
        pa.string(),
        pa.string(),
        pa.float64(),
        pa.timestamp("us"),
        pa.float64(),
        pa.float64(),
        pa.string(),
    ]
    columns = list(zip(*rows, strict=True)) if rows else [[] for _ in NAMES]
    return pa.table(
        [pa.array(list(column), kind) for column, kind in zip(columns, types, strict=True)],
        names=NAMES,
    )


def is_event(row: tuple[Any, ...]) -> bool:
    """The rule in plain Python."""
    invoice, code, _, quantity, at, price, customer, _ = row
    if invoice not in ("536365", "C536365") or code is None or at is None:
        return False
    if (
        not np.isfinite([quantity, price, customer]).all()
        or quantity == 0
        or customer < 1
        or customer != int(customer)
    ):
        return False
    cancelled = invoice.startswith("C")
    if cancelled != (quantity < 0) or price < 0 or (not cancelled and price <= 0):
        return False
    return (
        len(code) >= 5
        and code[:5].isdigit()
        and len(code) <= 7
        and (code[5:] == "" or (code[5:].isascii() and code[5:].isalpha()))
    )


@settings(max_examples=150, deadline=None)
@given(LINES)
def test_every_line_is_an_event_or_a_dead_letter_and_never_both(
    rows: list[tuple[Any, ...]],
) -> None:
    parsed = parsed_of(rows, 100)
    kept = parsed.events["source_position"].to_pylist()
    dead = parsed.dead_letters["source_row"].to_pylist()
    assert parsed.counts["rows_read"] == len(rows) == len(kept) + len(dead)
    assert parsed.counts["rows_used"] == parsed.counts["events_made"] == len(kept)
    assert sorted(kept + dead) == list(range(100, 100 + len(rows)))
    assert kept == [100 + i for i, row in enumerate(rows) if is_event(row)]
    assert all(parsed.dead_letters["reason"].to_pylist())
    for position, user, item, action, quantity in zip(
        kept,
        *(parsed.events[name].to_pylist() for name in ("user_id", "item_id", "action", "quantity")),
        strict=True,
    ):
        row = rows[position - 100]
        assert (user, item, action, quantity) == (
            int(row[6]),
            row[1].upper(),
            int(row[0].startswith("C")),
            abs(row[3]),
        )


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.datetimes(datetime(2010, 1, 1), datetime(2012, 1, 1)).map(
            lambda t: t.replace(second=0, microsecond=0)
        ),
        min_size=1,
    )
)
def test_local_time_becomes_utc(times: list[datetime]) -> None:
    rows = [("536365", "71053", "LAMP", 1.0, at, 1.0, 17850.0, "France") for at in times]
    events = parsed_of(rows).events
    expected = [
        at.replace(tzinfo=ZoneInfo("Europe/London")).astimezone(ZoneInfo("UTC")) for at in times
    ]
    assert events["event_timestamp"].to_pylist() == expected


def test_summer_and_winter_differ_by_an_hour() -> None:
    rows = [
        ("536365", "71053", "x", 1.0, datetime(2011, month, 15, 12), 1.0, 1.0, "France")
        for month in (1, 7)
    ]
    times = parsed_of(rows).events["event_timestamp"].to_pylist()
    assert [t.hour for t in times] == [12, 11]


def test_a_retail_request_is_one_customer_at_one_time() -> None:
    at = datetime(2011, 5, 1, 10)
    lines = [("71053", at), ("71053", at), ("85123A", at), ("71053", at + timedelta(minutes=1))]
    rows = [("536365", code, "x", 1.0, time, 1.0, 7.0, "France") for code, time in lines]
    rows.insert(2, ("C536365", "22222", "x", -1.0, at, 1.0, 7.0, "France"))
    found = requests_of(RETAIL.contract, parsed_of(rows).events)
    assert found.request.tolist() == [0, 0, 1]
    assert found.event.tolist() == [0, 3, 4]  # 71053 once, though it was bought twice at a time
    assert found.labels.tolist() == [[1], [1], [1]]
    assert found.first_event.tolist() == [0, 4]
    assert found.repeats == 1


def test_a_movielens_request_is_up_to_sixteen_ratings_at_the_time_of_the_first(
    tmp_path: Path,
) -> None:
    events = pa.table(
        {
            "user_id": [1] * 20 + [2] * 3,
            "item_id": list(range(23)),
            "action": pa.array([0, 1] * 10 + [0, 0, 1], pa.int8()),
            "event_timestamp": pa.array([*range(20), 5, 6, 7], pa.timestamp("us", "UTC")),
        }
    )
    found = requests_of(FILMS.contract, events)
    assert found.request.tolist() == [0] * 16 + [1] * 4 + [2] * 3
    assert micros(events["event_timestamp"])[found.first_event].tolist() == [0, 16, 5]
    assert found.labels[:, 0].tolist() == [1, 0] * 10 + [1, 1, 0]


def test_movielens_sets_unreadable_ratings_aside(tmp_path: Path, helpers: Any) -> None:
    helpers.write_film_club(tmp_path)
    units = FILMS.raw_units(str(tmp_path))
    by_kind = {unit.kind: next(FILMS.parse(unit)) for unit in units}
    parsed = list(by_kind.values())
    dead = pa.concat_tables([p.dead_letters for p in parsed]).to_pylist()
    assert [(row["source_file"], row["source_row"]) for row in dead] == [("ratings.dat", 7)]
    assert json.loads(dead[0]["raw"]) == {
        "user_id": "1",
        "movie_id": "oops",
        "rating": "3",
        "timestamp": "974000001",
    }
    counts = by_kind["events"].counts
    assert counts["rows_read"] == counts["events_made"] + 1 == 40 * 24 + 1
    items = by_kind["items"].items
    assert by_kind["users"].users.num_rows == 40
    assert items["genres"].to_pylist()[0] == ["Comedy", "Drama"]
    title, year = (items[name][0].as_py() for name in ("title", "year"))
    assert title.endswith(f"({year})")
    assert 1900 < year < 2001


def test_descriptions_become_words() -> None:
    texts = pa.array(
        [
            "WHITE HANGING HEART T-LIGHT HOLDER",
            None,
            "  3 DOG'S 12cm ",
            "WHITE HANGING HEART T-LIGHT HOLDER",
        ]
    )
    words = online_retail._words(pa.chunked_array([texts])).to_pylist()
    assert words == [
        ["white", "hanging", "heart", "light", "holder"],
        None,
        ["dog", "cm"],
        words[0],
    ]


def test_missing_data_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(RawDataError, match=r"expected online_retail\.parquet"):
        RETAIL.raw_units(str(tmp_path))
    pd.DataFrame({"InvoiceNo": ["1"]}).to_parquet(tmp_path / "online_retail.parquet")
    with pytest.raises(RawDataError, match="StockCode"):
        RETAIL.raw_units(str(tmp_path))
    with pytest.raises(RawDataError, match="MEMOIR_DATA"):
        FILMS.raw_units(None)
    with pytest.raises(RawDataError, match=r"ratings\.dat"):
        FILMS.raw_units(str(tmp_path))
    with pytest.raises(ValueError, match="there are"):
        datasets.load("netflix")


def test_the_shipped_sample_is_whole() -> None:
    parsed = [p for unit in RETAIL.raw_units(None) for p in RETAIL.parse(unit)]
    assert sum(p.counts["rows_read"] for p in parsed) == 541_909
    assert sum(p.events.num_rows for p in parsed) == 404_876
    assert sum(p.dead_letters.num_rows for p in parsed) == 137_033
    assert all((np.diff(micros(p.events["event_timestamp"])) >= 0).all() for p in parsed)


@pytest.mark.parametrize("name", datasets.names())
def test_contracts_have_their_own_fingerprints(name: str) -> None:
    contract = datasets.load_contract(name)
    others = {
        datasets.load_contract(other).fingerprint for other in datasets.names() if other != name
    }
    assert len(contract.fingerprint) == 16
    assert contract.fingerprint not in others
