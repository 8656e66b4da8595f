"""Say here what the log is, and what a request is. Copy this file; `schema.py` says what fields may be."""

from feature_repo.contract.schema import (
    AGE,
    BAG,
    CATEGORY,
    NUMBER,
    VECTOR,
    Column,
    DatasetSpec,
    DType,
    Examples,
    Memory,
    Requests,
    Source,
    Task,
)

SPEC = DatasetSpec(
    name="_template",
    title="what people call it",
    user_id=DType.STRING,
    item_id=DType.STRING,
    # The first is the one that statistics are about; impressions stand in no history.
    actions=("purchase", "click", "impression"),
    shown="impression",
    # What is predicted. A purchase is asked about only where there was a click.
    tasks=(
        Task("label_click", "clicked", action="click"),
        Task("label_purchase", "bought once clicked", action="purchase", given="label_click"),
    ),
    rank_by=(("label_click", 1.0), ("label_purchase", 4.0)),
    # IMPRESSIONS: the log says what was shown. ACTIONS: negatives are drawn. RATINGS: nothing is.
    requests=Requests(
        Examples.IMPRESSIONS,
        validation_from="2025-03-01T00:00:00+00:00",
        test_from="2025-03-08T00:00:00+00:00",
        by="request_id",
    ),
    # Below MEMOIR_DATA: a file, a folder or a glob. Ours → theirs, where names differ.
    events=Source(
        "log/*.csv.gz",
        columns={"user_id": "customer", "event_timestamp": "at", "request_id": "session"},
        zone="Europe/London",
        flags={"click": "clicked", "purchase": "bought"},
    ),
    items=Source("items.parquet"),
    event_identity=("event_id",),
    event_features=(
        Column("price", DType.FLOAT32, "as paid", kind=NUMBER, nullable=True, minimum=0),
    ),
    item_features=(
        Column("tags", DType.STRING_LIST, "at most five are read", kind=BAG, max_length=5),
        Column("cover", DType.FLOAT32_LIST, "embedding", kind=VECTOR, max_length=16),
        Column("published", DType.TIMESTAMP, "when it came out", kind=AGE, nullable=True),
    ),
    context_features=(Column("device", DType.STRING, "of the request", kind=CATEGORY),),
    stat_value="price",
    memory=Memory(by=("tags",), half_lives_days=(7.0, 90.0), kibibytes=32),
)
