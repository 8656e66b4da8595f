"""Yambda-50M (Ploshkin et al., arXiv 2505.22238): listens of a music service, read from a folder
that a person gives; it is never shipped, and was not run here.

The folder holds `listens.parquet` of the flat 50M version. Times are seconds from an undisclosed
beginning, in steps of five, and count from 2024-01-01 here, so that weekdays and hours mean
nothing: day 300 is the published test day. MLPerf's DLRMv4 trains on the days up to T and tests on
day T + 1; validation is the day before. A listen of at least half of a track is positive, as
published; a request is up to 16 consecutive listens of one user.
"""

from __future__ import annotations

import pyarrow as pa
import pyarrow.compute as pc

from feature_repo.contract.schema import (
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
from feature_repo.raw.parse import Derived

BEGINNING_S = 1_704_067_200

SPEC = DatasetSpec(
    name="yambda_50m",
    title="Yambda-50M",
    user_id=DType.INT64,
    item_id=DType.INT64,
    actions=("listen_plus", "listen"),
    tasks=(Task("label_listen_plus", "heard at least half of the track", action="listen_plus"),),
    requests=Requests(
        Examples.RATINGS,
        # Days 299 and 300
        validation_from="2024-10-26T00:00:00+00:00",
        test_from="2024-10-27T00:00:00+00:00",
    ),
    events=Source(
        ("flat/50m/listens.parquet", "listens.parquet"),
        columns={"user_id": "uid"},
        derived=("event_timestamp",),
        raw=(Column("timestamp", DType.INT64, "seconds since the beginning", minimum=0),),
        action="played_ratio_pct",
        at_least=50,
    ),
    event_features=(
        Column(
            "is_organic",
            DType.INT64,
            "1 where the listener chose, 0 where the service did",
            kind=CATEGORY,
            minimum=0,
            maximum=1,
        ),
        Column(
            "track_length_seconds", DType.FLOAT32, "length of the track", kind=NUMBER, minimum=0
        ),
    ),
)


def derive(kind: str, read: pa.Table, given: pa.Table) -> Derived:
    """Times of a calendar, from seconds since the beginning."""
    seconds = pc.add(read["timestamp"], BEGINNING_S)
    times = pc.multiply(seconds, 1_000_000).cast(pa.timestamp("us", "UTC"))
    return Derived({"event_timestamp": times.combine_chunks()})
