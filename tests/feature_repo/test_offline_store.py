"""The ASOF offline store against Feast's own DuckDB store, on random data: ties, ttl, late
corrections, missing keys.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from feature_repo.benchmarks.point_in_time import feature_view, join

START = datetime(2024, 1, 1, tzinfo=UTC)


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
    from feature_repo.store.offline_store import EntityFrameError

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
