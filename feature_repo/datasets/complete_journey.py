"""The Complete Journey (84.51°/dunnhumby): one year of grocery baskets of 2,469 households, read from
a folder that a person gives; it is never shipped.

The folder holds `events.parquet` (a line for each product of a basket), `items.parquet` and
`users.parquet`. A request is one household and basket; its positives are the products bought then.
All lines of a basket have one time. The calendar is shifted, so weekdays and holidays mean nothing.
"""

from __future__ import annotations

from feature_repo.contract.schema import (
    CATEGORY,
    NUMBER,
    Column,
    DatasetSpec,
    DType,
    Examples,
    Memory,
    Requests,
    Source,
    Task,
)


def category(name: str, doc: str) -> Column:
    """A text column that rankers read and some rows lack."""
    return Column(name, DType.STRING, doc, kind=CATEGORY, nullable=True)


SPEC = DatasetSpec(
    name="complete_journey",
    title="The Complete Journey",
    user_id=DType.INT64,
    item_id=DType.INT64,
    actions=("purchase",),
    tasks=(Task("label_purchase", "bought in the basket", action="purchase"),),
    requests=Requests(
        Examples.ACTIONS,
        validation_from="2017-10-20T05:35:45+00:00",
        test_from="2017-11-25T16:48:32+00:00",
        train_negatives_per_positive=4,
        eval_negatives=100,
        by="request_id",
    ),
    events=Source(
        "events.parquet",
        columns={"event_timestamp": "timestamp", "request_id": "basket_id"},
        action="action",
    ),
    users=Source("users.parquet"),
    items=Source("items.parquet"),
    event_features=(
        Column("quantity", DType.FLOAT32, "pieces", kind=NUMBER, minimum=1),
        Column("sales_value", DType.FLOAT32, "paid for the line, USD", kind=NUMBER, minimum=0),
        Column("retail_disc", DType.FLOAT32, "discount of the loyalty card, USD", kind=NUMBER),
        Column("coupon_disc", DType.FLOAT32, "discount by coupon, USD", kind=NUMBER),
    ),
    user_features=(
        category("age", "band of years"),
        category("income", "band"),
        category("home_ownership", "owner or renter"),
        category("marital_status", "as given"),
        category("household_size", "persons"),
        category("household_comp", "adults and kids"),
        category("kids_count", "kids"),
    ),
    item_features=(
        category("department", "the widest level"),
        category("product_category", "the middle level"),
        category("product_type", "the narrowest level"),
        category("brand", "national or private"),
        Column("manufacturer_id", DType.INT64, "who makes it", kind=CATEGORY, nullable=True),
        Column("package_size", DType.STRING, "as printed", nullable=True),
    ),
    item_title="product_type",
    stat_value="sales_value",
    memory=Memory(
        by=("department", "product_category", "product_type", "brand", "manufacturer_id"),
        pairs=(("product_type", "brand"), ("product_type", "manufacturer_id")),
        kibibytes=64,
    ),
)
