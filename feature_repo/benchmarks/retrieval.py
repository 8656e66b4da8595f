"""Retrievals of one offline store, straight and without a registry: what benchmarks and tests compare."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa


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
