"""The ASOF offline store against Feast's own DuckDB store, on random data: ties, ttl, late corrections, missing keys."""

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
    return pd.Series(pd.to_datetime(START) + pd.to_timedelta(rng.integers(0, hours, rows), unit="h")).astype(
        "datetime64[us, UTC]"
    )


def feature_rows(rng: np.random.Generator, rows: int, keys: int, *, late: bool) -> pd.DataFrame:
    """Rows with repeated (key, time), each repetition created at its own time: the newest created wins."""
    frame = pd.DataFrame({"user_id": rng.integers(0, keys, rows), "event_timestamp": stamps(rng, rows, 48)})
    frame["number"] = rng.integers(0, 1000, rows).astype("int64")
    frame["text"] = pd.Series(rng.choice(["a", "b", "ß", None], rows))
    frame["created_timestamp"] = frame["event_timestamp"]
    repeat = frame.sample(frac=0.4, random_state=int(rng.integers(1 << 30)))
    repeat = repeat.assign(number=repeat["number"] + 5000)
    delay = pd.to_timedelta(np.arange(1, len(repeat) + 1), unit="s") + (
        pd.to_timedelta(rng.integers(0, 30, len(repeat)), unit="h") if late else pd.Timedelta(0)
    )
    repeat["created_timestamp"] = (repeat["created_timestamp"] + delay).astype("datetime64[us, UTC]")
    whole = pd.concat(
        [frame.drop_duplicates(["user_id", "event_timestamp"]), repeat.drop_duplicates(["user_id", "event_timestamp"])]
    )
    return whole.sample(frac=1, random_state=1).reset_index(drop=True)


def view(path: Path, ttl: timedelta, name: str = "profile") -> Any:
    from feast.types import Int64, String

    return feature_view(name, path, "user_id", {"number": Int64, "text": String}, ttl)


def both(views: list[Any], entity_df: pd.DataFrame, **flags: Any) -> tuple[pd.DataFrame, pd.DataFrame]:
    ours, theirs = (join(store, views, entity_df, **flags) for store in ("asof", "duckdb"))
    assert ours.num_rows == len(entity_df)
    return ours.to_pandas(), theirs.to_pandas()


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("filter_by_created", [True, False])
def test_joins_equal_feasts_duckdb_store(tmp_path: Path, seed: int, filter_by_created: bool) -> None:
    rng = np.random.default_rng(seed)
    ttl = timedelta(hours=int(rng.choice([0, 1, 5, 20, 24])))  # Feast's store cannot take days and hours together
    feature_rows(rng, 60, 8, late=bool(seed % 2)).to_parquet(tmp_path / "rows.parquet", index=False)
    rows = 80
    entity_df = pd.DataFrame(
        {"row": np.arange(rows), "user_id": rng.integers(0, 11, rows), "event_timestamp": stamps(rng, rows, 60)}
    )
    ours, theirs = both(
        [view(tmp_path / "rows.parquet", ttl)], entity_df, filter_by_created_timestamp=filter_by_created
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
        {"row": np.arange(40), "user_id": rng.integers(0, 8, 40), "event_timestamp": stamps(rng, 40, 60)}
    )
    ours, theirs = both(views, entity_df, full_feature_names=True, filter_by_created_timestamp=True)
    assert (
        set(ours.columns)
        == set(theirs.columns)
        == {"row", "user_id", "event_timestamp", "one__number", "one__text", "two__number", "two__text"}
    )
    theirs = theirs.sort_values("row").reset_index(drop=True)
    for name in ("one__number", "two__text"):
        assert ((ours[name] == theirs[name]) | (ours[name].isna() & theirs[name].isna())).all()


def test_candidates_of_one_request_stay_separate_rows(tmp_path: Path) -> None:
    """Feast's default store collapses rows with equal keys and time; ours returns each, in order, integers whole."""
    frame = pd.DataFrame(
        {"user_id": [1], "event_timestamp": [START], "number": [2**60 + 1], "text": ["a"], "created_timestamp": [START]}
    )
    frame = frame.astype({"event_timestamp": "datetime64[us, UTC]", "created_timestamp": "datetime64[us, UTC]"})
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
    feature_rows(np.random.default_rng(0), 5, 2, late=False).to_parquet(tmp_path / "rows.parquet", index=False)
    entity_df = pd.DataFrame({"customer": [1], "event_timestamp": stamps(np.random.default_rng(0), 1, 5)})
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
        {"user_id": [1, 1], "event_timestamp": [START + timedelta(days=1), START + timedelta(days=4)]}
    )
    entity_df["event_timestamp"] = entity_df["event_timestamp"].astype("datetime64[us, UTC]")
    got = join(
        "asof",
        [view(tmp_path / "rows.parquet", timedelta(0))],
        entity_df,
        filter_by_created_timestamp=True,
    )
    assert got["text"].to_pylist() == ["first", "corrected"]
