"""UCI Online Retail (Chen, Sain and Guo 2012): invoices of a UK gift shop, 2010-12 to 2011-12; shipped with Memoir.

A raw row is one invoice line. Its time is local (Europe/London), to the minute; many lines share one time, and their
order in the file is kept. A request is one customer at one invoice time; its positives are the items bought then.
"""

from __future__ import annotations

import json
import math
import re
from datetime import UTC, datetime
from pathlib import Path
from zoneinfo import ZoneInfo

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from feature_repo.arrow import arrow_schema, from_micros, micros
from feature_repo.datasets import AssignedRequests, Parsed, RawDataError, RawUnit, empty
from feature_repo.schema import Column, DatasetSpec, DType, Requests, Table, contract

SHIPPED = Path(__file__).resolve().parent.parent / "data"
FILE = "online_retail.parquet"
LOCAL_TIME = ZoneInfo("Europe/London")
PRODUCT_CODE = (
    r"^[0-9]{5}[A-Za-z]{0,2}$"  # five digits and at most two letters; all else is postage, fees, samples, tests
)
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
        Column("quantity", DType.FLOAT32, "pieces; positive for returns too", unit="pieces", minimum=1),
        Column("unit_price", DType.FLOAT32, "price of one piece", unit="GBP", minimum=0),
    ),
    user_features=(Column("country", DType.STRING, "country on the invoice"),),
    item_features=(
        Column("description", DType.STRING, "what the invoice line says", nullable=True),
        Column("description_tokens", DType.STRING_LIST, "its words, letters only, in order", nullable=True),
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
            Column("InvoiceNo", DType.STRING, "six digits, C before them for a cancellation", pattern=INVOICE_NUMBER),
            Column("StockCode", DType.STRING, "product code", pattern=PRODUCT_CODE),
            Column("Description", DType.STRING, "product text", nullable=True),
            Column("Quantity", DType.FLOAT32, "pieces, negative on cancellations", unit="pieces"),
            Column("InvoiceDate", DType.TIMESTAMP, "local time, to the minute"),
            Column("UnitPrice", DType.FLOAT32, "price of one piece", unit="GBP", minimum=0.001),
            Column("CustomerID", DType.INT64, "customer number"),
            Column("Country", DType.STRING, "customer's country"),
        ),
    ),
    max_bad_fraction=0.4,
    ranking_user_features=("country",),
    ranking_item_features=("description_tokens",),
)
CONTRACT = contract(SPEC)


def raw_units(data: str | None) -> list[RawUnit]:
    """Row ranges of the invoice file.

    Raises:
        RawDataError: there is no such file, or a column is missing.
    """
    path = Path(data or SHIPPED) / FILE
    if not path.exists():
        raise RawDataError(f"expected {FILE} in {path.parent}; found none. Unset MEMOIR_DATA to use the shipped copy")
    file = pq.ParquetFile(path)
    missing = [c.name for c in SPEC.raw.columns if c.name not in file.schema_arrow.names]
    if missing:
        raise RawDataError(f"{path}: columns {missing} are missing; the file has {file.schema_arrow.names}")
    rows = file.metadata.num_rows
    return [RawUnit(str(path), start, min(UNIT_ROWS, rows - start)) for start in range(0, rows, UNIT_ROWS)]


def read_raw(unit: RawUnit) -> pa.Table:
    """One row range as it stands in the file."""
    columns = [c.name for c in SPEC.raw.columns]
    return pq.read_table(unit.file, columns=columns, memory_map=True).slice(unit.start, unit.rows)


def parse(unit: RawUnit) -> Parsed:
    """One row range as events, customers, items and dead letters."""
    return parse_lines(read_raw(unit), unit)


def parse_lines(raw: pa.Table, unit: RawUnit) -> Parsed:
    """Sort invoice lines into events and dead letters; the first reason that holds is the one given.

    Args:
        raw: columns of `SPEC.raw`, in file order.
        unit: where the lines stood.
    """
    raw = raw.combine_chunks()
    invoice, code = (pc.cast(raw[name], pa.string()) for name in ("InvoiceNo", "StockCode"))
    quantity, price, customer = (_floats(raw[name]) for name in ("Quantity", "UnitPrice", "CustomerID"))
    cancelled = _true(pc.starts_with(invoice, "C"))
    seconds = pc.cast(raw["InvoiceDate"], pa.timestamp("s"), safe=False)
    unreadable = (
        ~_true(pc.match_substring_regex(invoice, INVOICE_NUMBER))
        | _true(pc.is_null(code))
        | _true(pc.is_null(seconds))
        | ~np.isfinite(quantity)
        | ~np.isfinite(price)
        | (cancelled != (quantity < 0))
        | (quantity == 0)
    )
    reasons = (
        (unreadable, "unreadable: invoice number, code, time, quantity, price or its sign"),
        (~(np.isfinite(customer) & (customer >= 1) & (customer == np.floor(customer))), "no customer"),
        (~_true(pc.match_substring_regex(code, PRODUCT_CODE)), "code is no product"),
        (~cancelled & (price <= 0), "price of a purchase is not positive"),
        (price < 0, "price of a return is negative"),
    )
    verdict = np.full(raw.num_rows, -1)
    for index, (holds, _) in enumerate(reasons):
        verdict[(verdict < 0) & holds] = index
    kept = np.flatnonzero(verdict < 0)
    position = unit.start + np.arange(raw.num_rows)

    time = _to_utc(seconds.take(pa.array(kept)))
    events = pa.table(
        {
            "user_id": customer[kept].astype(np.int64),
            "item_id": pc.utf8_upper(code.take(pa.array(kept))),
            "action": cancelled[kept].astype(np.int8),
            "event_timestamp": time,
            "quantity": np.abs(quantity[kept]).astype(np.float32),
            "unit_price": price[kept].astype(np.float32),
            "source_position": position[kept],
        }
    ).cast(arrow_schema(CONTRACT.table("events")))
    known = from_micros(micros(time) + 1)
    users = pa.table(
        [events["user_id"], raw["Country"].take(pa.array(kept)), known, known], schema=_target("user_profile")
    )
    description = pc.utf8_trim_whitespace(pc.cast(raw["Description"], pa.string())).take(pa.array(kept))
    items = pa.table(
        [
            events["item_id"],
            description,
            _tokens(description),
            known,
            known,
        ],
        schema=_target("item_profile"),
    )
    return Parsed(events, users, items, _dead_letters(raw, unit, verdict, [text for _, text in reasons]), raw.num_rows)


def assign_requests(events: pa.Table) -> AssignedRequests:
    """One request for each customer and invoice time; candidates are the distinct items bought then."""
    user, time = events["user_id"].to_numpy(), micros(events["event_timestamp"])
    item = events["item_id"].combine_chunks().dictionary_encode().indices.to_numpy()
    bought = np.flatnonzero(events["action"].to_numpy() == 0)
    request = np.full(len(user), -1, np.int64)
    if not len(bought):
        return AssignedRequests(request, np.zeros(len(user), np.int8), np.zeros(0, np.int64))
    new = np.r_[True, (np.diff(user[bought]) != 0) | (np.diff(time[bought]) != 0)]
    number = np.cumsum(new) - 1
    _, first = np.unique(np.stack([number, item[bought]]), axis=1, return_index=True)
    first.sort()
    request[bought[first]] = number[first]
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
    return pc.fill_null(pc.cast(column, pa.float64()), math.nan).to_numpy(zero_copy_only=False)


def _true(mask: pa.ChunkedArray) -> np.ndarray:
    return pc.fill_null(mask, False).to_numpy(zero_copy_only=False)


def _to_utc(local: pa.ChunkedArray | pa.Array) -> pa.Array:
    """London wall-clock times to UTC. An hour that comes twice is read as its first; one that does not exist, as winter time."""
    local = local.combine_chunks() if isinstance(local, pa.ChunkedArray) else local
    encoded = pc.cast(local, pa.int64()).dictionary_encode()
    epoch = datetime(1970, 1, 1, tzinfo=UTC)
    unique = [
        int((datetime.fromtimestamp(value, UTC).replace(tzinfo=LOCAL_TIME) - epoch).total_seconds()) * 1_000_000
        for value in encoded.dictionary.to_pylist()
    ]
    return from_micros(np.array(unique, np.int64)[encoded.indices.to_numpy()])


def _dead_letters(raw: pa.Table, unit: RawUnit, verdict: np.ndarray, reasons: list[str]) -> pa.Table:
    dead = np.flatnonzero(verdict >= 0)
    if not len(dead):
        return empty(SPEC, "dead_letters")
    rows = [json.dumps(row, default=str) for row in raw.take(pa.array(dead)).to_pylist()]
    return pa.table(
        {
            "source_file": [Path(unit.file).name] * len(dead),
            "source_row": unit.start + dead,
            "reason": [reasons[index] for index in verdict[dead]],
            "raw": rows,
        }
    ).cast(_target("dead_letters"))
