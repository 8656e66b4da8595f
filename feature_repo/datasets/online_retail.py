"""UCI Online Retail (Chen, Sain and Guo 2012): invoices of a UK gift shop, 2010-12 to 2011-12;
shipped with Memoir.

A raw row is one invoice line. Its time is local (Europe/London), to the minute, unless the file's
times carry a zone; many lines share one time, and their order in the file is kept. A request is one
customer at one invoice time; its positives are the items bought then.
"""

from __future__ import annotations

import re

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from feature_repo.contract.schema import (
    BAG,
    CATEGORY,
    NUMBER,
    Column,
    DatasetSpec,
    DType,
    Examples,
    Requests,
    Source,
    Task,
)
from feature_repo.raw import raw
from feature_repo.raw.parse import Derived

SHIPPED = True
# All else is postage, fees, samples, tests
PRODUCT_CODE = r"^[0-9]{5}[A-Za-z]{0,2}$"
INVOICE_NUMBER = r"^C?[0-9]{6}$"  # C: cancelled
WORD = re.compile("[a-z]{2,}")

SPEC = DatasetSpec(
    name="online_retail",
    title="UCI Online Retail",
    user_id=DType.INT64,
    item_id=DType.STRING,
    actions=("purchase", "return"),
    tasks=(Task("label_purchase", "bought at the request's time", action="purchase"),),
    requests=Requests(
        Examples.ACTIONS,
        validation_from="2011-10-25T00:00:00+00:00",
        test_from="2011-11-10T00:00:00+00:00",
        train_negatives_per_positive=4,
        eval_negatives=100,
    ),
    events=Source(
        "online_retail.parquet",
        columns={
            "user_id": "CustomerID",
            "item_id": "StockCode",
            "event_timestamp": "InvoiceDate",
            "quantity": "Quantity",
            "unit_price": "UnitPrice",
            "country": "Country",
            "description": "Description",
        },
        zone="Europe/London",
        derived=("description_tokens",),
        raw=(Column("InvoiceNo", DType.STRING, "six digits, C before them for a cancellation"),),
    ),
    event_features=(
        Column("quantity", DType.FLOAT32, "pieces, also of returns", kind=NUMBER, minimum=1),
        Column("unit_price", DType.FLOAT32, "of one piece, GBP", kind=NUMBER, minimum=0),
    ),
    user_features=(Column("country", DType.STRING, "country on the invoice", kind=CATEGORY),),
    item_features=(
        Column("description", DType.STRING, "what the invoice line says", nullable=True),
        Column("description_tokens", DType.STRING_LIST, "its words", kind=BAG, nullable=True),
    ),
    item_title="description",
    stat_value="unit_price",
    max_bad_fraction=0.4,
    # An invoice may name a product twice
    accept=("repeats",),
)


def derive(kind: str, read: pa.Table, given: pa.Table) -> Derived:
    """Which lines are purchases or returns of a product, and what is written differently there."""
    # 1. Read what decides about a line.
    code = pc.utf8_trim_whitespace(read["item_id"])
    quantity, price = (_floats(read[name]) for name in ("quantity", "unit_price"))
    cancelled = _true(pc.starts_with(read["InvoiceNo"], "C"))
    customer = pc.fill_null(read["user_id"], 0).to_numpy()
    wrong_sign = (quantity == 0) | (cancelled != (quantity < 0))
    is_product = _true(pc.match_substring_regex(code, PRODUCT_CODE))
    is_invoice = _true(pc.match_substring_regex(read["InvoiceNo"], INVOICE_NUMBER))
    # 2. List the reasons to refuse a line, in order: the first that holds is given.
    reasons = (
        (~is_invoice, "unreadable: invoice number"),
        (_true(pc.is_null(code)), "unreadable: product code"),
        (_true(pc.is_null(read["event_timestamp"])), "unreadable: time"),
        (~np.isfinite(quantity) | wrong_sign, "unreadable: quantity or its sign"),
        (~np.isfinite(price), "unreadable: price"),
        (raw.is_blank(given["CustomerID"]), "no customer"),
        (customer < 1, "unreadable: customer number"),
        (~is_product, "code is no product"),
        (~cancelled & (price <= 0), "price of a purchase is not positive"),
        (price < 0, "price of a return is negative"),
    )
    # 3. Spell each item in one way, and give returns a quantity without a sign.
    description = pc.utf8_trim_whitespace(read["description"])
    columns = {
        "item_id": pc.utf8_upper(code),
        "action": pa.array(cancelled.astype(np.int8)),
        "quantity": pc.abs(read["quantity"]),
        "description": description,
        "description_tokens": _words(description),
    }
    return Derived(columns, reasons)


def _words(text: pa.ChunkedArray) -> pa.Array:
    """Words of two letters or more, each text's in order."""
    encoded = text.combine_chunks().dictionary_encode()
    words = [WORD.findall(value.lower()) for value in encoded.dictionary.to_pylist()]
    return pa.array(words, pa.list_(pa.string())).take(encoded.indices)


def _floats(column: pa.ChunkedArray) -> np.ndarray:
    return pc.fill_null(column, np.nan).to_numpy()


def _true(mask: pa.ChunkedArray) -> np.ndarray:
    return pc.fill_null(mask, False).to_numpy()
