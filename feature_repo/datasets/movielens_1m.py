"""MovieLens 1M (Harper and Konstan 2015), read from a folder that a person gives; it is never
shipped.

The folder holds `users.dat`, `movies.dat` and either `ratings.dat` or a Parquet table of the same
rows with columns user_id, movie_id, rating, timestamp. A request is up to 16 consecutive ratings of
one user; its time is the first rating's, so that none of the 16 is in the history.
"""

from __future__ import annotations

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

# Encodings in which the files are published, and in which people save them
TEXTS = ("utf-8", "cp1252", "latin-1")

SPEC = DatasetSpec(
    name="movielens_1m",
    title="MovieLens 1M",
    user_id=DType.INT64,
    item_id=DType.INT64,
    actions=("high_rating", "low_rating"),
    tasks=(Task("label_like", "rated with 4 stars or more", action="high_rating"),),
    requests=Requests(
        Examples.RATINGS,
        validation_from="2000-12-02T00:00:00+00:00",
        test_from="2000-12-29T00:00:00+00:00",
    ),
    events=Source(
        ("ratings.dat", "ratings.parquet", "ratings_reconstructed.parquet"),
        columns={"item_id": "movie_id", "event_timestamp": "timestamp"},
        delimiter="::",
        header=("user_id", "movie_id", "rating", "timestamp"),
        time_unit="seconds",
        action="rating",
        at_least=4,
    ),
    users=Source(
        "users.dat",
        delimiter="::",
        header=("user_id", "gender", "age", "occupation", "zip"),
        encodings=TEXTS,
    ),
    items=Source(
        "movies.dat",
        delimiter="::",
        header=("item_id", "title", "genres"),
        encodings=TEXTS,
        derived=("year",),
    ),
    event_features=(Column("rating", DType.FLOAT32, "stars", kind=NUMBER, minimum=1, maximum=5),),
    user_features=(
        Column("gender", DType.STRING, "as given", kind=CATEGORY, values=("F", "M")),
        Column("age", DType.INT64, "lower end of the age band", kind=CATEGORY, minimum=1),
        Column("occupation", DType.INT64, "its code", kind=CATEGORY, minimum=0, maximum=20),
    ),
    item_features=(
        Column("title", DType.STRING, "title and year"),
        Column("genres", DType.STRING_LIST, "genres", kind=BAG),
        Column("year", DType.INT64, "of release, from the title", kind=CATEGORY, nullable=True),
    ),
    item_title="title",
    stat_value="rating",
    event_identity=("user_id", "item_id", "event_timestamp"),
    items_repeat=False,
)


def derive(kind: str, read: pa.Table, given: pa.Table) -> Derived:
    """Years of release, which stand in titles."""
    if kind != "items":
        return Derived()
    year = pc.extract_regex(read["title"], r"\((?P<year>[0-9]{4})\)\s*$").combine_chunks()
    return Derived({"year": raw.whole_numbers(pc.struct_field(year, "year"))})
