"""UCI Online Retail (Chen, Sain and Guo 2012): invoices of a UK gift shop, 2010-12 to 2011-12;
shipped with Memoir.

A raw row is one invoice line. Its time is local (Europe/London), to the minute, unless the file's
times carry a zone; many lines share one time, and their order in the file is kept. A request is one
customer at one invoice time; its positives are the items bought then.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from feature_repo import limits, raw
from feature_repo.arrow import arrow_schema, from_micros, micros
from feature_repo.datasets import AssignedRequests, Parsed, RawDataError, RawUnit, empty
from feature_repo.schema import Column, DatasetSpec, DType, Requests, Table, contract

SHIPPED = Path(__file__).resolve().parent.parent / "data"
FILE = "online_retail.parquet"
PRODUCT_CODE = r"^[0-9]{5}[A-Za-z]{0,2}$"  # five digits and at most two letters; all else is postage, fees, samples, tests
INVOICE_NUMBER = r"^C?[0-9]{6}$"
WORD = re.compile("[a-z]{2,}")
UNIT_ROWS = 100_000

SPEC = DatasetSpec(
    name="online_retail",
    title="UCI Online Retail",
    user_id=DType.INT64,
    item_id=DType.STRING,
    actions=("purchase", "return"),
    event_features=(
        Column(
            "quantity", DType.FLOAT32, "pieces; positive for returns too", unit="pieces", minimum=1
        ),
        Column("unit_price", DType.FLOAT32, "price of one piece", unit="GBP", minimum=0),
    ),
    user_features=(Column("country", DType.STRING, "country on the invoice"),),
    item_features=(
        Column("description", DType.STRING, "what the invoice line says", nullable=True),
        Column(
            "description_tokens",
            DType.STRING_LIST,
            "its words, letters only, in order",
            nullable=True,
        ),
    ),
    item_title="description",
    stat_value="unit_price",
    requests=Requests(
        label="label_purchase",
        label_doc="the customer bought the item at the request's time",
        validation_from="2011-10-25T00:00:00+00:00",
        test_from="2011-11-10T00:00:00+00:00",
        train_negatives_per_positive=4,
        eval_negatives=100,
    ),
    raw=Table(
        "raw_invoice_lines",
        "Invoice lines as the shop logged them.",
        (
            Column(
                "InvoiceNo",
                DType.STRING,
                "six digits, C before them for a cancellation",
                pattern=INVOICE_NUMBER,
            ),
            Column("StockCode", DType.STRING, "product code", pattern=PRODUCT_CODE),
            Column("Description", DType.STRING, "product text", nullable=True),
            Column("Quantity", DType.FLOAT32, "pieces, negative on cancellations", unit="pieces"),
            Column("InvoiceDate", DType.TIMESTAMP, "local time, to the minute"),
            Column("UnitPrice", DType.FLOAT32, "price of one piece", unit="GBP", minimum=0.001),
            Column("CustomerID", DType.INT64, "customer number"),
            Column("Country", DType.STRING, "customer's country"),
        ),
    ),
    raw_zone="Europe/London",
    max_bad_fraction=0.4,
    ranking_user_features=("country",),
    ranking_item_features=("description_tokens",),
)
CONTRACT = contract(SPEC)
RAW_COLUMNS = [column.name for column in SPEC.raw.columns]


def raw_units(data: str | None) -> list[RawUnit]:
    """Row ranges of the invoice file.

    Raises:
        RawDataError: there is no such file, or a column is missing.
    """
    path = Path(data or SHIPPED) / FILE
    if not path.exists():
        raise RawDataError(
            f"expected {FILE} in {path.parent}; found none. Unset MEMOIR_DATA to use the shipped copy"
        )
    rows = raw.parquet_rows(path, RAW_COLUMNS)
    return [
        RawUnit(str(path), start, min(UNIT_ROWS, rows - start))
        for start in range(0, rows, UNIT_ROWS)
    ]


def read_raw(unit: RawUnit) -> pa.Table:
    """One row range as it stands in the file."""
    return raw.read_parquet(unit.file, RAW_COLUMNS, unit.start, unit.rows)


def parse(unit: RawUnit) -> Parsed:
    """One row range as events, customers, items and dead letters."""
    return parse_lines(read_raw(unit), unit)


def parse_lines(lines: pa.Table, unit: RawUnit) -> Parsed:
    """Sort invoice lines into events and dead letters; the first reason that holds is the one
    given.

    Args:
        lines: columns of `SPEC.raw`, of any type, in file order.
        unit: where the lines stood.
    """
    read = raw.as_declared(SPEC, lines, unit.file)
    invoice, code = read["InvoiceNo"], pc.utf8_trim_whitespace(read["StockCode"])
    quantity, price = (_floats(read[name]) for name in ("Quantity", "UnitPrice"))
    customer = pc.fill_null(read["CustomerID"], 0).to_numpy()
    cancelled = _true(pc.starts_with(invoice, "C"))
    # 1. Each line's first reason to be no event.
    reasons = (
        (~_true(pc.match_substring_regex(invoice, INVOICE_NUMBER)), "unreadable: invoice number"),
        (_true(pc.is_null(code)), "unreadable: product code"),
        (_true(pc.is_null(read["InvoiceDate"])), "unreadable: time"),
        (
            ~np.isfinite(quantity) | (quantity == 0) | (cancelled != (quantity < 0)),
            "unreadable: quantity or its sign",
        ),
        (~np.isfinite(price), "unreadable: price"),
        (_is_blank(lines["CustomerID"], read["CustomerID"]), "no customer"),
        (customer < 1, "unreadable: customer number"),
        (~_true(pc.match_substring_regex(code, PRODUCT_CODE)), "code is no product"),
        (~cancelled & (price <= 0), "price of a purchase is not positive"),
        (price < 0, "price of a return is negative"),
    )
    verdict = np.full(lines.num_rows, -1)
    for index, (holds, _) in enumerate(reasons):
        verdict[(verdict < 0) & holds] = index
    kept = np.flatnonzero(verdict < 0)
    chosen = read.take(pa.array(kept))

    # 2. The others as events, and what they say of customer and item.
    time = chosen["InvoiceDate"].combine_chunks()
    events = pa.table(
        {
            "user_id": customer[kept],
            "item_id": pc.utf8_upper(code.take(pa.array(kept))),
            "action": cancelled[kept].astype(np.int8),
            "event_timestamp": time,
            "quantity": np.abs(quantity[kept]).astype(np.float32),
            "unit_price": price[kept].astype(np.float32),
            "source_position": unit.start + kept,
        }
    ).cast(_target("events"))
    known = from_micros(micros(time) + 1)
    users = pa.table(
        [events["user_id"], chosen["Country"], known, known], schema=_target("user_profile")
    )
    description = pc.utf8_trim_whitespace(chosen["Description"])
    items = pa.table(
        [events["item_id"], description, _tokens(description), known, known],
        schema=_target("item_profile"),
    )
    return Parsed(
        events,
        users,
        items,
        _dead_letters(lines, unit, verdict, [why for _, why in reasons]),
        lines.num_rows,
    )


def assign_requests(events: pa.Table) -> AssignedRequests:
    """One request for each customer and invoice time; candidates are the items bought then."""
    user, time = events["user_id"].to_numpy(), micros(events["event_timestamp"])
    bought = np.flatnonzero(events["action"].to_numpy() == 0)
    request = np.full(len(user), -1, np.int64)
    if not len(bought):
        return AssignedRequests(request, np.zeros(len(user), np.int8), np.zeros(0, np.int64))
    new = np.r_[True, (np.diff(user[bought]) != 0) | (np.diff(time[bought]) != 0)]
    request[bought] = np.cumsum(new) - 1
    return AssignedRequests(request, (request >= 0).astype(np.int8), time[bought[new]])


def _tokens(text: pa.ChunkedArray | pa.Array) -> pa.Array:
    """Words of two letters or more, each text's in order."""
    text = text.combine_chunks() if isinstance(text, pa.ChunkedArray) else text
    encoded = text.dictionary_encode()
    words = [WORD.findall(value.lower()) for value in encoded.dictionary.to_pylist()]
    return pa.array(words, pa.list_(pa.string())).take(encoded.indices)


def _target(table: str) -> pa.Schema:
    return arrow_schema(CONTRACT.table(table))


def _floats(column: pa.ChunkedArray) -> np.ndarray:
    return pc.fill_null(column, np.nan).to_numpy(zero_copy_only=False)


def _true(mask: pa.ChunkedArray) -> np.ndarray:
    return pc.fill_null(mask, False).to_numpy(zero_copy_only=False)


def _is_blank(given: pa.ChunkedArray, read: pa.ChunkedArray) -> np.ndarray:
    """Where nothing, blanks or NaN stand instead of a number: a guest."""
    nothing = _true(pc.is_null(given, nan_is_null=pa.types.is_floating(given.type)))
    spelt = (
        raw.texts(given)
        if pa.types.is_string(given.type) or pa.types.is_large_string(given.type)
        else None
    )
    blank = spelt is not None and _true(
        pc.is_in(pc.utf8_lower(pc.utf8_trim_whitespace(spelt)), pa.array(raw.BLANKS))
    )
    return (nothing | blank) & _true(pc.is_null(read))


def _dead_letters(
    lines: pa.Table, unit: RawUnit, verdict: np.ndarray, reasons: list[str]
) -> pa.Table:
    dead = np.flatnonzero(verdict >= 0)
    if not len(dead):
        return empty(SPEC, "dead_letters")
    return pa.table(
        {
            "source_file": [Path(unit.file).name] * len(dead),
            "source_row": unit.start + dead,
            "reason": [reasons[index] for index in verdict[dead]],
            "raw": limits.raw_rows(lines, dead),
        }
    ).cast(_target("dead_letters"))
