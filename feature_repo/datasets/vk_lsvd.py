"""VK-LSVD (deepvk, 2025): short videos shown in a social network, read from a folder that a person gives; it is never
shipped, and was not run here.

The published files, one a week, hold rows in the order of time and no times. `python -m feature_repo.datasets.vk_lsvd
FROM TO` writes a copy in which a row of week w lies within that week by its place in the file: order is exact, gaps
within a week are not, and nothing that depends on them may be claimed. The copy's folder holds `interactions/`,
`users_metadata.parquet` and `items_metadata.parquet`. Each row is one video shown; no video is shown to a user twice.
A request is up to 16 consecutive ones; liked is positive. Validation is week 25 and test week 26, as published.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from feature_repo.atomic import atomic_write
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

WEEK_US = 7 * 86_400_000_000
# The beginning of week 0; the real one is not published
BEGINNING = "2025-01-06T00:00:00+00:00"
BEGINNING_US = 1_736_121_600_000_000
# Rows that are copied at a time
BATCH = 1 << 20


def category(name: str, doc: str) -> Column:
    """A whole number that stands for something, which rankers read."""
    return Column(name, DType.INT64, doc, kind=CATEGORY, nullable=True)


SPEC = DatasetSpec(
    name="vk_lsvd",
    title="VK-LSVD",
    user_id=DType.INT64,
    item_id=DType.INT64,
    actions=("like", "view"),
    tasks=(Task("label_like", "liked", action="like"),),
    requests=Requests(
        Examples.RATINGS,
        # Weeks 25 and 26
        validation_from="2025-06-30T00:00:00+00:00",
        test_from="2025-07-07T00:00:00+00:00",
    ),
    events=Source(
        "interactions/*.parquet",
        columns={"event_timestamp": "timestamp"},
        action="like",
        actions={"true": "like", "false": "view"},
    ),
    users=Source("users_metadata.parquet"),
    items=Source("items_metadata.parquet"),
    event_features=(
        Column("timespent", DType.FLOAT32, "watched, seconds", kind=NUMBER, minimum=0),
        category("place", "feed, search, group and so on"),
    ),
    user_features=(
        Column("age", DType.FLOAT32, "years", kind=NUMBER, nullable=True),
        category("gender", "its code"),
        category("geo", "its code"),
    ),
    item_features=(
        category("author_id", "who made the video"),
        Column("duration", DType.FLOAT32, "seconds", kind=NUMBER, minimum=0, nullable=True),
    ),
    items_repeat=False,
)


def with_times(source: Path, target: Path) -> int:
    """Write the week files of a folder with a time for each row; returns their number.

    Raises:
        ValueError: the folder holds no file `week_NN.parquet`.
    """
    weeks = sorted(source.rglob("week_*.parquet"))
    if not weeks:
        raise ValueError(f"{source} holds no file week_NN.parquet: give the folder of interactions")
    target.mkdir(parents=True, exist_ok=True)
    for path in weeks:
        found = re.search(r"week_(\d+)", path.stem)
        assert found is not None
        first = BEGINNING_US + int(found[1]) * WEEK_US
        _copy(path, target / path.name, first)
    return len(weeks)


def _copy(path: Path, target: Path, first_us: int) -> None:
    """Copy a week, its rows spread evenly over it."""
    with pq.ParquetFile(path) as rows:
        number = rows.metadata.num_rows
        kind = pa.timestamp("us", "UTC")
        schema = rows.schema_arrow.append(pa.field("timestamp", kind))
        done = 0
        with atomic_write(target) as draft, pq.ParquetWriter(draft, schema) as writer:
            for batch in rows.iter_batches(BATCH):
                places = range(done, done + len(batch))
                times = [first_us + place * WEEK_US // number for place in places]
                writer.write_batch(
                    pa.RecordBatch.from_arrays(
                        [*batch.columns, pa.array(times, pa.int64()).cast(kind)], schema=schema
                    )
                )
                done += len(batch)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("expected two folders: python -m feature_repo.datasets.vk_lsvd FROM TO")
    print(f"{with_times(Path(sys.argv[1]), Path(sys.argv[2]))} weeks written to {sys.argv[2]}")
