"""The ASOF offline store beside Feast's DuckDB store: the same call, the same rows, seconds and
ratio.

The floor is DuckDB's own time to read the features once. Below it histories as lists (`histories.py`).
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pandas as pd
import pyarrow as pa

from feature_repo.benchmarks import interleaved, parser, report

START = datetime(2024, 1, 1, tzinfo=UTC)
NUM_FEATURES = 6


def main() -> None:
    """Run."""
    arguments = parser("feature_repo.benchmarks.point_in_time", __doc__).parse_args()
    warnings.simplefilter("ignore")
    rows, keys, versions = (20_000, 5_000, 10) if arguments.quick else (500_000, 50_000, 20)
    with tempfile.TemporaryDirectory() as folder:
        views = [
            _features(Path(folder), name, keys, versions, seed)
            for seed, name in enumerate(("user_id", "item_id"))
        ]
        rng = np.random.default_rng(9)
        entity_df = pd.DataFrame({
            "row": np.arange(rows),
            "user_id": rng.integers(0, keys, rows),
            "item_id": rng.integers(0, keys, rows),
            "event_timestamp": _stamps(rng, rows),
        })  # fmt: skip
        files = [view.batch_source.path for view in views]
        calls: dict[str, Callable[[], Any]] = {
            "asof": lambda: join("asof", views, entity_df, filter_by_created_timestamp=True),
            "feast duckdb": lambda: join(
                "duckdb", views, entity_df, filter_by_created_timestamp=True
            ),
            "floor: read once": lambda: [
                duckdb.sql(f"select * from read_parquet('{file}')").to_arrow_table()
                for file in files
            ],
        }
        ours = calls["asof"]()
        theirs = calls["feast duckdb"]().sort_by("row")
        identical = all(
            ours[c].cast(pa.float64()).equals(theirs[c].cast(pa.float64()))
            for c in ours.column_names
            if c.startswith("f")
        )
        seconds = interleaved(calls, arguments.repeats, warm_up=0)
    table = [
        {
            "store": name,
            **times,
            "times slower than asof": times["wall_s"] / seconds["asof"]["wall_s"],
        }
        for name, times in seconds.items()
    ]
    from feature_repo.benchmarks import histories

    sizes = (
        histories.Sizes(200, 150, 2_000)
        if arguments.quick
        else histories.Sizes(2_000, 150, 200_000)
    )
    with tempfile.TemporaryDirectory() as folder:
        more, facts = histories.measured(Path(folder), sizes, arguments.repeats)
    table += more
    config = {
        "entity rows": rows,
        "features": 2 * NUM_FEATURES,
        "feature rows": 2 * keys * versions,
        "rows identical": identical,
        **facts,
    }
    report("point_in_time", config, table, arguments.json)


def _stamps(rng: np.random.Generator, rows: int) -> pd.Series:
    return pd.Series(
        pd.to_datetime(START) + pd.to_timedelta(rng.integers(0, 86_400 * 365, rows), unit="s")
    ).astype("datetime64[us, UTC]")


def _features(folder: Path, key: str, keys: int, versions: int, seed: int) -> Any:
    from feast.types import Float32

    rng = np.random.default_rng(seed)
    rows = keys * versions
    names = [f"f{seed}_{i}" for i in range(NUM_FEATURES)]
    frame = pd.DataFrame(
        {key: np.repeat(np.arange(keys), versions), "event_timestamp": _stamps(rng, rows)}
    )
    frame["created_timestamp"] = frame["event_timestamp"]
    for column in names:
        frame[column] = rng.random(rows).astype(np.float32)
    path = folder / f"{key}.parquet"
    frame.drop_duplicates([key, "event_timestamp"]).to_parquet(path, index=False)
    return feature_view(f"{key}_view", path, key, dict.fromkeys(names, Float32), timedelta(days=90))


def feature_view(name: str, path: Path, key: str, features: dict[str, Any], ttl: timedelta) -> Any:
    """A feature view over a Parquet file, complete without a registry."""
    from feast import Entity, FeatureView, Field, FileSource, ValueType
    from feast.data_format import ParquetFormat
    from feast.types import Int64

    source = FileSource(
        name=f"{name}_source",
        path=str(path),
        file_format=ParquetFormat(),
        timestamp_field="event_timestamp",
        created_timestamp_column="created_timestamp",
    )
    key_field = Field(name=key, dtype=Int64)
    fields = [Field(name=f, dtype=kind) for f, kind in features.items()]
    entity = Entity(name=key, join_keys=[key], value_type=ValueType.INT64)
    view = FeatureView(
        name=name, entities=[entity], ttl=ttl, schema=[key_field, *fields], source=source
    )
    view.entity_columns = [key_field]
    view.features = fields
    return view


def join(store: str, views: list[Any], entity_df: pd.DataFrame, **flags: Any) -> pa.Table:
    """All features of some views from one store: "asof" is ours, "duckdb" is Feast's."""
    refs = [f"{view.name}:{feature.name}" for view in views for feature in view.features]
    return retrieval(store, views, refs, entity_df.copy(), **flags).to_arrow()


def retrieval(
    store: str,
    views: list[Any],
    refs: list[str],
    entity_df: Any,
    settings: dict[str, Any] | None = None,
    **flags: Any,
) -> Any:
    """`get_historical_features` of one store, straight and without a registry: its job.

    Args:
        settings: of the offline store, such as its memory limit.
    """
    from feast.infra.offline_stores.duckdb import DuckDBOfflineStore
    from feast.repo_config import RepoConfig

    from feature_repo.store.offline_store import TYPE, AsofDuckDBOfflineStore

    kind, store_class = (
        (TYPE, AsofDuckDBOfflineStore) if store == "asof" else ("duckdb", DuckDBOfflineStore)
    )
    config = RepoConfig(
        project="straight",
        provider="local",
        registry="unused.db",
        offline_store={"type": kind, **(settings or {})},
        online_store=None,
        entity_key_serialization_version=3,
    )
    config.repo_path = None
    return store_class.get_historical_features(
        config, views, refs, entity_df, _NoOnDemandViews(), "straight", **flags
    )


class _NoOnDemandViews:
    def list_on_demand_feature_views(self, *_: Any, **__: Any) -> list[Any]:
        return []


if __name__ == "__main__":
    main()
