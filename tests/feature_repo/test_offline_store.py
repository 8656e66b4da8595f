"""The ASOF offline store against Feast's own DuckDB store, on random data: ties, ttl, late
corrections, missing keys.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from feature_repo.benchmarks.retrieval import feature_view, join, retrieval
from feature_repo.store.entity_rows import EntityFrameError
from feature_repo.store.source_files import SourceError

START = datetime(2024, 1, 1, tzinfo=UTC)
START_NS = int(START.timestamp()) * 1_000_000_000


def stamps(rng: np.random.Generator, rows: int, hours: int) -> pd.Series:
    return pd.Series(
        pd.to_datetime(START) + pd.to_timedelta(rng.integers(0, hours, rows), unit="h")
    ).astype("datetime64[us, UTC]")


def feature_rows(rng: np.random.Generator, rows: int, keys: int, *, late: bool) -> pd.DataFrame:
    """Rows with repeated (key, time), each repetition created at its own time: the newest created
    wins.
    """
    frame = pd.DataFrame(
        {"user_id": rng.integers(0, keys, rows), "event_timestamp": stamps(rng, rows, 48)}
    )
    frame["number"] = rng.integers(0, 1000, rows).astype("int64")
    frame["text"] = pd.Series(rng.choice(["a", "b", "ß", None], rows))
    frame["created_timestamp"] = frame["event_timestamp"]
    repeat = frame.sample(frac=0.4, random_state=int(rng.integers(1 << 30)))
    repeat = repeat.assign(number=repeat["number"] + 5000)
    delay = pd.to_timedelta(np.arange(1, len(repeat) + 1), unit="s") + (
        pd.to_timedelta(rng.integers(0, 30, len(repeat)), unit="h") if late else pd.Timedelta(0)
    )
    repeat["created_timestamp"] = (repeat["created_timestamp"] + delay).astype(
        "datetime64[us, UTC]"
    )
    whole = pd.concat(
        [
            frame.drop_duplicates(["user_id", "event_timestamp"]),
            repeat.drop_duplicates(["user_id", "event_timestamp"]),
        ]
    )
    return whole.sample(frac=1, random_state=1).reset_index(drop=True)


def view(path: Path, ttl: timedelta, name: str = "profile") -> Any:
    from feast.types import Int64, String

    return feature_view(name, path, "user_id", {"number": Int64, "text": String}, ttl)


def both(
    views: list[Any], entity_df: pd.DataFrame, **flags: Any
) -> tuple[pd.DataFrame, pd.DataFrame]:
    ours, theirs = (join(store, views, entity_df, **flags) for store in ("asof", "duckdb"))
    assert ours.num_rows == len(entity_df)
    return ours.to_pandas(), theirs.to_pandas()


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("filter_by_created", [True, False])
def test_joins_equal_feasts_duckdb_store(
    tmp_path: Path, seed: int, filter_by_created: bool
) -> None:
    rng = np.random.default_rng(seed)
    ttl = timedelta(
        hours=int(rng.choice([0, 1, 5, 20, 24]))
    )  # Feast's store cannot take days and hours together
    feature_rows(rng, 60, 8, late=bool(seed % 2)).to_parquet(tmp_path / "rows.parquet", index=False)
    rows = 80
    entity_df = pd.DataFrame(
        {
            "row": np.arange(rows),
            "user_id": rng.integers(0, 11, rows),
            "event_timestamp": stamps(rng, rows, 60),
        }
    )
    ours, theirs = both(
        [view(tmp_path / "rows.parquet", ttl)],
        entity_df,
        filter_by_created_timestamp=filter_by_created,
    )
    assert ours["row"].tolist() == entity_df["row"].tolist()
    assert (ours["event_timestamp"] == entity_df["event_timestamp"]).all()
    theirs = theirs.sort_values("row").reset_index(drop=True)
    for name in ("number", "text"):
        same = (ours[name] == theirs[name]) | (ours[name].isna() & theirs[name].isna())
        assert same.all(), ours[~same].assign(theirs=theirs[name][~same])
    assert ours["number"].notna().any()


def test_several_views_and_full_names(tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    for name in ("one", "two"):
        feature_rows(rng, 50, 6, late=True).to_parquet(tmp_path / f"{name}.parquet", index=False)
    views = [view(tmp_path / f"{name}.parquet", timedelta(0), name) for name in ("one", "two")]
    entity_df = pd.DataFrame(
        {
            "row": np.arange(40),
            "user_id": rng.integers(0, 8, 40),
            "event_timestamp": stamps(rng, 40, 60),
        }
    )
    ours, theirs = both(views, entity_df, full_feature_names=True, filter_by_created_timestamp=True)
    assert (
        set(ours.columns)
        == set(theirs.columns)
        == {
            "row",
            "user_id",
            "event_timestamp",
            "one__number",
            "one__text",
            "two__number",
            "two__text",
        }
    )
    theirs = theirs.sort_values("row").reset_index(drop=True)
    for name in ("one__number", "two__text"):
        assert ((ours[name] == theirs[name]) | (ours[name].isna() & theirs[name].isna())).all()


def test_candidates_of_one_request_stay_separate_rows(tmp_path: Path) -> None:
    """Feast's default store collapses rows with equal keys and time; ours returns each, in order,
    integers whole.
    """
    frame = pd.DataFrame(
        {
            "user_id": [1],
            "event_timestamp": [START],
            "number": [2**60 + 1],
            "text": ["a"],
            "created_timestamp": [START],
        }
    )
    frame = frame.astype(
        {"event_timestamp": "datetime64[us, UTC]", "created_timestamp": "datetime64[us, UTC]"}
    )
    frame.to_parquet(tmp_path / "rows.parquet", index=False)
    at = [START + timedelta(days=1)] * 3 + [START - timedelta(days=1), START]
    entity_df = pd.DataFrame(
        {
            "user_id": [1, 1, 1, 1, 2],
            "item": list("cabde"),
            "event_timestamp": pd.Series(at).astype("datetime64[us, UTC]"),
        }
    )
    got = join(
        "asof",
        [view(tmp_path / "rows.parquet", timedelta(0))],
        entity_df,
        filter_by_created_timestamp=True,
    )
    assert got["item"].to_pylist() == list("cabde")
    assert got["number"].to_pylist() == [2**60 + 1] * 3 + [None, None]


def test_a_missing_join_key_is_named(tmp_path: Path) -> None:
    feature_rows(np.random.default_rng(0), 5, 2, late=False).to_parquet(
        tmp_path / "rows.parquet", index=False
    )
    entity_df = pd.DataFrame(
        {"customer": [1], "event_timestamp": stamps(np.random.default_rng(0), 1, 5)}
    )
    with pytest.raises(ValueError, match="needs entity columns"):
        join("asof", [view(tmp_path / "rows.parquet", timedelta(0))], entity_df)


def test_a_late_correction_is_invisible_until_it_was_made(tmp_path: Path) -> None:
    stamp, corrected = START, START + timedelta(days=3)
    frame = pd.DataFrame(
        {
            "user_id": [1, 1],
            "event_timestamp": [stamp, stamp],
            "number": [1, 2],
            "text": ["first", "corrected"],
            "created_timestamp": [stamp, corrected],
        }
    ).astype({"event_timestamp": "datetime64[us, UTC]", "created_timestamp": "datetime64[us, UTC]"})
    frame.to_parquet(tmp_path / "rows.parquet", index=False)
    entity_df = pd.DataFrame(
        {
            "user_id": [1, 1],
            "event_timestamp": [START + timedelta(days=1), START + timedelta(days=4)],
        }
    )
    entity_df["event_timestamp"] = entity_df["event_timestamp"].astype("datetime64[us, UTC]")
    got = join(
        "asof",
        [view(tmp_path / "rows.parquet", timedelta(0))],
        entity_df,
        filter_by_created_timestamp=True,
    )
    assert got["text"].to_pylist() == ["first", "corrected"]


def as_of(rows: pd.DataFrame, keys: dict[str, Any], at: Any, *, by_created: bool) -> Any:
    """The oracle, row by row: the newest row of these keys stamped at or before a time; of equal
    stamps the newest created.
    """
    found = rows
    for name, value in keys.items():
        found = found[found[name] == value]
    found = found[found["event_timestamp"] <= at]
    if by_created:
        found = found[found["created_timestamp"] <= at]
    if not len(found):
        return None
    return found.sort_values(["event_timestamp", "created_timestamp"]).iloc[-1]["number"]


@pytest.mark.parametrize("renamed", [(), ("shop_id",), ("user_id",), ("shop_id", "user_id")])
@pytest.mark.parametrize("by_created", [True, False])
def test_views_of_two_keys_join_on_both_however_many_of_them_are_renamed(
    renamed: tuple[str, ...], by_created: bool, tmp_path: Path
) -> None:
    """Feast's DuckDB store forgets the keys that are not renamed, so it cannot be the oracle
    here.
    """
    from feast import (
        Entity,
        FeatureService,
        FeatureStore,
        FeatureView,
        Field,
        FileSource,
        ValueType,
    )
    from feast.data_format import ParquetFormat
    from feast.repo_config import RepoConfig
    from feast.types import Int64

    rng = np.random.default_rng(3)
    rows = feature_rows(rng, 80, 4, late=True).drop(columns="text")
    rows["shop_id"] = rng.integers(0, 3, len(rows))
    rows.to_parquet(tmp_path / "rows.parquet", index=False)
    store = FeatureStore(
        config=RepoConfig(
            project="p",
            provider="local",
            registry=str(tmp_path / "r.db"),
            offline_store={"type": "feature_repo.store.offline_store.AsofDuckDBOfflineStore"},
            online_store={"type": "sqlite", "path": str(tmp_path / "o.db")},
            entity_key_serialization_version=3,
        )
    )
    keys = [
        Entity(name=name, join_keys=[f"{name}_id"], value_type=ValueType.INT64)
        for name in ("user", "shop")
    ]
    source = FileSource(
        name="rows",
        path=str(tmp_path / "rows.parquet"),
        file_format=ParquetFormat(),
        timestamp_field="event_timestamp",
        created_timestamp_column="created_timestamp",
    )
    made = FeatureView(
        name="v",
        entities=keys,
        ttl=timedelta(0),
        schema=[Field(name="number", dtype=Int64)],
        source=source,
    )
    mapping = {key: f"other_{key}" for key in renamed}
    service = FeatureService(
        name="s", features=[made.with_join_key_map(mapping) if mapping else made]
    )
    store.apply([*keys, made, service])
    names = {key: mapping.get(key, key) for key in ("user_id", "shop_id")}
    asked = pd.DataFrame(
        {
            names["user_id"]: rng.integers(0, 5, 60),
            names["shop_id"]: rng.integers(0, 4, 60),
            "event_timestamp": stamps(rng, 60, 60),
        }
    )
    job = store.get_historical_features(asked, service, filter_by_created_timestamp=by_created)
    got = job.to_arrow()["number"].to_pylist()
    expected = [
        as_of(
            rows,
            {k: row[n] for k, n in names.items()},
            row["event_timestamp"],
            by_created=by_created,
        )
        for _, row in asked.iterrows()
    ]
    assert got == expected
    assert len({value for value in got if value is not None}) > 5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"event_timestamp": [pd.NaT, pd.Timestamp("2024-01-02", tz="UTC")]},
            "no 'event_timestamp' in row 0",
        ),
        ({"user_id": ["001", "2"]}, "'user_id' holds '001'"),
        ({"user_id": [" 1", "2"]}, "'user_id' holds ' 1'"),
        ({"user_id": [1.5, 2.0]}, "'user_id' holds 1.5"),
        ({"number": [1, 2]}, "share the names"),
    ],
)
def test_entity_rows_that_cannot_be_joined_are_refused_by_column(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    feature_rows(np.random.default_rng(0), 20, 3, late=False).to_parquet(
        tmp_path / "rows.parquet", index=False
    )
    asked = pd.DataFrame(
        {"user_id": [1, 2], "event_timestamp": pd.to_datetime(["2024-01-02"] * 2, utc=True)}
    )
    with pytest.raises(EntityFrameError, match=message):
        join("asof", [view(tmp_path / "rows.parquet", timedelta(0))], asked.assign(**change))


def test_columns_that_differ_in_case_alone_stay_apart(tmp_path: Path) -> None:
    feature_rows(np.random.default_rng(0), 20, 3, late=False).to_parquet(
        tmp_path / "rows.parquet", index=False
    )
    asked = pd.DataFrame(
        {
            "user_id": [1, 2],
            "event_timestamp": pd.to_datetime(["2024-01-03"] * 2, utc=True),
            "label": [0, 1],
            "Label": [7, 8],
        }
    )
    found = join("asof", [view(tmp_path / "rows.parquet", timedelta(0))], asked)
    assert (found["label"].to_pylist(), found["Label"].to_pylist()) == ([0, 1], [7, 8])


def one_row(path: Path, **columns: Any) -> pd.DataFrame:
    """A file of one row of customer 1, with other columns in place of the usual ones."""
    values = {
        "user_id": [1],
        "number": [7],
        "text": ["a"],
        "event_timestamp": pd.to_datetime([START]),
        "created_timestamp": pd.to_datetime([START]),
    }
    frame = pd.DataFrame(values | columns)
    path.parent.mkdir(parents=True, exist_ok=True)
    frame.to_parquet(path, index=False)
    return frame


def asked(**columns: Any) -> pd.DataFrame:
    later = pd.to_datetime([START + timedelta(days=1)])
    return pd.DataFrame({"user_id": [1], "event_timestamp": later} | columns)


def keyed_view(path: Path, dtype: Any, kind: Any) -> Any:
    """The usual view with a key of some type."""
    from feast import Entity, FeatureView, Field, FileSource
    from feast.types import Int64

    source = FileSource(name="rows", path=str(path), timestamp_field="event_timestamp")
    entity = Entity(name="user_id", join_keys=["user_id"], value_type=kind)
    key, number = Field(name="user_id", dtype=dtype), Field(name="number", dtype=Int64)
    made = FeatureView(
        name="v", entities=[entity], ttl=timedelta(0), schema=[key, number], source=source
    )
    made.entity_columns = [key]
    made.features = [number]
    return made


@pytest.mark.parametrize(
    ("held", "declared", "given", "found"),
    [
        (1, "String", 1, 7),
        (1, "String", "1", 7),
        (1, "String", "01", None),
        ("1", "Int64", 1, 7),
        ("01", "Int64", 1, None),
        ("01", "String", "01", 7),
        ("01", "String", "1", None),
        (1, "Int64", 1.0, 7),
        (1, "Int64", np.nan, None),
        (1, "Int64", None, None),
    ],
)
def test_keys_are_equal_where_they_are_spelt_alike(
    tmp_path: Path, held: Any, declared: str, given: Any, found: Any
) -> None:
    from feast import ValueType
    from feast import types as feast_types

    one_row(tmp_path / "rows.parquet", user_id=[held])
    kind = ValueType.STRING if declared == "String" else ValueType.INT64
    made = keyed_view(tmp_path / "rows.parquet", getattr(feast_types, declared), kind)
    assert join("asof", [made], asked(user_id=[given]))["number"].to_pylist() == [found]


def test_a_feature_that_nothing_has_is_named(tmp_path: Path) -> None:
    one_row(tmp_path / "rows.parquet")
    made = view(tmp_path / "rows.parquet", timedelta(0))
    with pytest.raises(KeyError, match="'profile' has no feature 'rate'"):
        retrieval("asof", [made], ["profile:rate"], asked())
    # The view declares it, and the file lacks it.
    made.features = [
        *made.features,
        type(made.features[0])(name="rate", dtype=made.features[0].dtype),
    ]
    with pytest.raises(SourceError, match="no column 'rate'"):
        retrieval("asof", [made], ["profile:rate"], asked())


def test_sources_that_would_be_read_wrongly_are_refused_by_name(tmp_path: Path) -> None:
    from feast import BigQuerySource, FileSource
    from feast.data_format import DeltaFormat

    one_row(tmp_path / "delta" / "part-0.parquet")
    (tmp_path / "delta" / "_delta_log").mkdir()
    with pytest.raises(SourceError, match="is a Delta table"):
        join("asof", [view(tmp_path / "delta", timedelta(0))], asked())
    declared = view(tmp_path / "delta", timedelta(0))
    declared.batch_source = FileSource(
        name="d", path="d", file_format=DeltaFormat(), timestamp_field="event_timestamp"
    )
    with pytest.raises(SourceError, match="is of DeltaFormat"):
        join("asof", [declared], asked())
    elsewhere = view(tmp_path / "delta", timedelta(0))
    elsewhere.batch_source = BigQuerySource(name="b", table="t", timestamp_field="event_timestamp")
    with pytest.raises(SourceError, match="a BigQuerySource"):
        join("asof", [elsewhere], asked())
    (tmp_path / "empty").mkdir()
    with pytest.raises(SourceError, match="holds no Parquet file"):
        join("asof", [view(tmp_path / "empty", timedelta(0))], asked())
    one_row(tmp_path / "numbers.parquet", event_timestamp=[17])
    with pytest.raises(SourceError, match="which is no time"):
        join("asof", [view(tmp_path / "numbers.parquet", timedelta(0))], asked())


def test_whole_numbers_with_gaps_keep_every_digit_as_a_data_frame(tmp_path: Path) -> None:
    one_row(tmp_path / "rows.parquet", number=[2**60 + 1])
    made = view(tmp_path / "rows.parquet", timedelta(0))
    both_users = pd.concat([asked(), asked(user_id=[2])])
    job = retrieval("asof", [made], ["profile:number"], both_users)
    assert job.to_df()["number"].tolist() == [2**60 + 1, pd.NA]
    assert sum(batch.num_rows for batch in job.to_batches()) == 2


def test_without_a_frame_every_key_and_time_between_two_dates_is_a_row(tmp_path: Path) -> None:
    times = pd.to_datetime([START + timedelta(hours=n) for n in range(4)])
    frame = pd.DataFrame(
        {
            "user_id": [1, 1, 2, 1],
            "number": [1, 2, 3, 4],
            "text": list("abcd"),
            "event_timestamp": times,
            "created_timestamp": times,
        }
    )
    frame.to_parquet(tmp_path / "rows.parquet", index=False)

    def ask(start: int, end: int) -> list[tuple[Any, ...]]:
        dates = {
            "start_date": START + timedelta(hours=start),
            "end_date": START + timedelta(hours=end),
        }
        made = view(tmp_path / "rows.parquet", timedelta(0))
        table = retrieval("asof", [made], ["profile:number"], None, **dates).to_arrow()
        assert table.column_names == ["event_timestamp", "user_id", "number"]
        return list(zip(table["user_id"].to_pylist(), table["number"].to_pylist(), strict=True))

    assert ask(0, 24) == [(1, 1), (1, 2), (2, 3), (1, 4)]
    assert ask(1, 2) == [(1, 2), (2, 3)]
    other = keyed_view(tmp_path / "rows.parquet", *_key_of_numbers())
    other.entity_columns = []
    with pytest.raises(EntityFrameError, match="must have the same keys"):
        retrieval(
            "asof", [view(tmp_path / "rows.parquet", timedelta(0)), other], ["profile:number"], None
        )


def _key_of_numbers() -> tuple[Any, Any]:
    from feast import ValueType
    from feast.types import Int64

    return Int64, ValueType.INT64


def test_a_join_larger_than_its_memory_spills_into_its_folder(tmp_path: Path) -> None:
    """And gives the same rows."""
    rng = np.random.default_rng(0)
    number = 300_000
    # No two rows are equal in key and time: of such nobody says which is the newest.
    times = pd.to_datetime(START) + pd.to_timedelta(rng.permutation(number), unit="s")
    frame = pd.DataFrame({"user_id": rng.integers(0, 10**5, number), "event_timestamp": times})
    frame["number"] = np.arange(number)
    frame["text"] = pd.Series(np.arange(number)).astype(str) * 20
    frame["created_timestamp"] = frame["event_timestamp"]
    frame.to_parquet(tmp_path / "rows.parquet", index=False)
    rows = pd.DataFrame({"user_id": frame["user_id"], "event_timestamp": times})
    made = view(tmp_path / "rows.parquet", timedelta(0))
    refs = ["profile:number", "profile:text"]
    small = {"memory_limit": "100MB", "spill": str(tmp_path / "spill"), "threads": 2}
    found = retrieval("asof", [made], refs, rows, small).to_arrow()
    assert found.equals(retrieval("asof", [made], refs, rows).to_arrow())


def test_a_key_is_what_it_is_declared_as_and_not_what_its_neighbour_is(tmp_path: Path) -> None:
    """A text that is spelt as no number: of a key declared as text another key, of a number a mistake."""
    from feast import Field
    from feast.types import Int64, String

    one_row(tmp_path / "rows.parquet", shop_id=[2])
    made = view(tmp_path / "rows.parquet", timedelta(0))
    made.entity_columns = [Field(name="shop_id", dtype=String), Field(name="user_id", dtype=Int64)]
    refs = ["profile:number"]
    found = retrieval("asof", [made], refs, asked(shop_id=["02"])).to_arrow()
    assert found["number"].to_pylist() == [None]
    with pytest.raises(EntityFrameError, match="'user_id' holds '01'"):
        retrieval("asof", [made], refs, asked(shop_id=["2"], user_id=["01"]))


def test_without_a_frame_a_row_between_two_microseconds_finds_itself(tmp_path: Path) -> None:
    stamps = pa.array([START_NS, START_NS + 400, START_NS + 1700]).cast(pa.timestamp("ns"))
    columns = {"user_id": [1, 1, 1], "number": [1, 2, 3], "text": ["a", "b", "c"]}
    table = pa.table(columns | {"event_timestamp": stamps, "created_timestamp": stamps})
    pq.write_table(table, tmp_path / "rows.parquet")
    made = view(tmp_path / "rows.parquet", timedelta(0))
    dates = {"start_date": START, "end_date": START + timedelta(days=1)}
    found = retrieval("asof", [made], ["profile:number"], None, **dates).to_arrow()
    assert found["number"].to_pylist() == [1, 2, 3]
