"""The embedded offline store: Feast's DuckDB store with the point-in-time join done by DuckDB's
ASOF join.

`get_historical_features` keeps Feast's meaning, which a differential test holds against Feast's own
DuckDB store: for every entity row, in its order, the newest feature row stamped at or before it; of
equal stamps the newest created; rows created after the entity row are invisible when
`filter_by_created_timestamp` is on; an expired row gives nulls, never a missing row. Sources are
our tables, resolved through their job's manifest, or any Parquet file or folder.

Source: Feast 0.67 `OfflineStore` interface; DuckDB 1.x `ASOF LEFT JOIN`. Differs from Feast's
DuckDB store: keeps integer types where a value is missing; no `*_y` column name is lost.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import duckdb
import ibis
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from feast import ValueType
from feast.data_source import DataSource
from feast.feature_view import FeatureView
from feast.infra.offline_stores import offline_utils
from feast.infra.offline_stores.duckdb import (
    DuckDBOfflineStore,
    DuckDBOfflineStoreConfig,
    _write_data_source,
)
from feast.infra.offline_stores.file_source import FileSource
from feast.infra.offline_stores.ibis import (
    pull_all_from_table_or_query_ibis,
    pull_latest_from_table_or_query_ibis,
)
from feast.infra.offline_stores.offline_store import RetrievalJob, RetrievalMetadata
from feast.infra.provider import PROVIDERS_CLASS_FOR_TYPE
from feast.infra.registry.base_registry import BaseRegistry
from feast.on_demand_feature_view import OnDemandFeatureView
from feast.repo_config import RepoConfig
from feast.saved_dataset import SavedDatasetStorage

from feature_repo import datasets
from feature_repo.contract.arrow import arrow_schema
from feature_repo.errors import ExpectedError
from feature_repo.home.tables import MANIFEST, JobFolder, TableNotBuiltError
from feature_repo.raw.raw import whole_numbers
from feature_repo.store.store import StoreError, foreign_tables

TYPE = "feature_repo.store.offline_store.AsofDuckDBOfflineStore"

# Custom feature views are written by a rule of ours, through whatever opens these stores: provider.py.
PROVIDERS_CLASS_FOR_TYPE["local"] = "feature_repo.store.provider.MemoirProvider"
# Tag of a source whose newest row of each key is materialized, of whatever age
WHOLE = "whole"


class AsofDuckDBOfflineStoreConfig(DuckDBOfflineStoreConfig):
    """`offline_store:` of `feature_store.yaml`.

    `dataset` guards the registry: `feast apply` refuses the definitions of any other dataset.
    """

    type: str = TYPE
    dataset: str | None = None
    # In DuckDB's spelling, e.g. "4GB"; joins beyond it spill to disk
    memory_limit: str | None = None
    threads: int | None = None


class EntityFrameError(ExpectedError, ValueError):
    """A frame of entity rows that cannot be joined: the message names the column."""


class WrongDatasetError(ExpectedError, ValueError):
    """`feature_store.yaml` belongs to another dataset than the definitions."""


class AsofDuckDBOfflineStore(DuckDBOfflineStore):
    """See the module docstring."""

    supports_filter_by_created_timestamp = True

    @staticmethod
    def get_historical_features(
        config: RepoConfig,
        feature_views: list[FeatureView],
        feature_refs: list[str],
        entity_df: pd.DataFrame | pa.Table | str,
        registry: BaseRegistry,
        project: str,
        full_feature_names: bool = False,
        filter_by_created_timestamp: bool = False,
    ) -> RetrievalJob:
        """The point-in-time join, as a job that runs when its result is asked for.

        Raises:
            ValueError: `entity_df` is neither a DataFrame nor an Arrow table, or lacks a join key.
        """
        if isinstance(entity_df, pa.Table):
            time = _time_of(entity_df)
        elif isinstance(entity_df, pd.DataFrame):
            time = offline_utils.infer_event_timestamp_from_entity_df(
                dict(zip(entity_df.columns, entity_df.dtypes, strict=True))
            )
        else:
            raise EntityFrameError(
                f"entity_df must be a pandas DataFrame or an Arrow table, not {type(entity_df).__name__}"
            )
        # 1. The asked rows, under names of DuckDB's that no feature can have.
        _refuse_shared_names(_names(entity_df), feature_refs, full_feature_names)
        entities = _entity_table(entity_df, time, feature_views)
        # 2. One ASOF join for each view, all in one query.
        joins: list[str] = []
        outputs: list[str] = []
        names: list[str] = []
        for number, view in enumerate(feature_views):
            made = _asof_join(
                view,
                feature_refs,
                entities,
                time,
                number,
                full_feature_names,
                filter_by_created_timestamp,
                config,
            )
            joins.append(made.sql)
            outputs += made.columns.values()
            names += made.columns
        outputs = [f"e.{inner}" for inner in entities.inner.values()] + outputs
        names = [*entities.inner, *names]
        sql = f"SELECT {', '.join(f'{value} AS __o{n}' for n, value in enumerate(outputs))} FROM entity_rows e {' '.join(joins)} ORDER BY e.__row"
        # 3. What Feast wants to know of the job before it runs.
        on_demand = OnDemandFeatureView.get_requested_odfvs(feature_refs, project, registry)
        span = pc.min_max(entities.table[entities.inner[time]])
        now = datetime.now(UTC)
        metadata = RetrievalMetadata(
            features=feature_refs,
            keys=[name for name in _names(entity_df) if name != time],
            min_event_timestamp=span["min"].as_py() or now,
            max_event_timestamp=span["max"].as_py() or now,
        )
        return AsofJob(config, sql, names, entities.table, on_demand, full_feature_names, metadata)

    @staticmethod
    def pull_latest_from_table_or_query(
        config: RepoConfig,
        data_source: DataSource,
        join_key_columns: list[str],
        feature_name_columns: list[str],
        timestamp_field: str,
        created_timestamp_column: str | None,
        start_date: datetime,
        end_date: datetime,
    ) -> RetrievalJob:
        """Newest row of each key; none of an optional source that is not built.

        Of views of our jobs, which never expire, from the beginning of time: online holds one row of a
        key, and what is right at the end of a window is the newest before it, wherever the window
        begins. `feast materialize-incremental` begins a year before now, and after that where it
        ended: it would write nothing of a log of the past, and never again.
        """
        if data_source.tags.get(WHOLE) == "true":
            start_date = datetime.fromtimestamp(0, UTC)
        return pull_latest_from_table_or_query_ibis(
            config=config,
            data_source=data_source,
            join_key_columns=join_key_columns,
            feature_name_columns=feature_name_columns,
            timestamp_field=timestamp_field,
            created_timestamp_column=created_timestamp_column,
            start_date=start_date,
            end_date=end_date,
            data_source_reader=_ibis_table_or_empty,
            data_source_writer=_write_data_source,
        )

    @staticmethod
    def pull_all_from_table_or_query(
        config: RepoConfig,
        data_source: DataSource,
        join_key_columns: list[str],
        feature_name_columns: list[str],
        timestamp_field: str,
        created_timestamp_column: str | None = None,
        start_date: datetime | None = None,
        end_date: datetime | None = None,
    ) -> RetrievalJob:
        """All rows of a period; none of an optional source that is not built."""
        return pull_all_from_table_or_query_ibis(
            config=config,
            data_source=data_source,
            join_key_columns=join_key_columns,
            feature_name_columns=feature_name_columns,
            timestamp_field=timestamp_field,
            created_timestamp_column=created_timestamp_column,
            start_date=start_date,
            end_date=end_date,
            data_source_reader=_ibis_table_or_empty,
            data_source_writer=_write_data_source,
        )

    def validate_data_source(self, config: RepoConfig, data_source: DataSource) -> None:
        """Refuse definitions of a dataset that the registry is not for, and a registry that was
        copied from elsewhere.

        Raises:
            WrongDatasetError: the two differ.
            StoreError: the registry's tables lie elsewhere: Feast would drop them there.
        """
        _refuse_foreign_registry(config)
        expected = config.offline_store.dataset
        found = (data_source.tags or {}).get("dataset")
        if expected and found and expected != found:
            raise WrongDatasetError(
                f"this feature_store.yaml is for dataset {expected!r}, but MEMOIR_DATASET makes definitions of {found!r}: use "
                f"`python -m feature_repo apply`, or `feast -c feature_repo -f <MEMOIR_HOME>/{found}/feature_store.yaml apply`"
            )


def _refuse_foreign_registry(config: RepoConfig) -> None:
    path = getattr(config.registry, "path", "")
    online = getattr(config.online_store, "path", None)
    if (
        getattr(config.registry, "registry_type", "file") != "file"
        or online is None
        or "://" in str(path)
    ):
        return
    root = Path(config.repo_path or ".")
    if elsewhere := foreign_tables(root / path, root / online):
        raise StoreError(
            f"the registry {root / path} says that its tables are in {elsewhere[0]}, and `feast apply` would drop them there: "
            "it was copied from another checkout or home. Remove it, or run `python -m feature_repo apply`, which does"
        )


class AsofJob(RetrievalJob):
    """A point-in-time join that is ready to run."""

    def __init__(
        self,
        config: RepoConfig,
        sql: str,
        names: list[str],
        entities: pa.Table,
        on_demand: list[OnDemandFeatureView],
        full_feature_names: bool,
        metadata: RetrievalMetadata,
    ) -> None:
        super().__init__()
        self._config = config
        self._sql = sql
        self._names = names
        self._entities = entities
        self._on_demand = on_demand
        self._full_feature_names = full_feature_names
        self._metadata = metadata

    def to_batches(self, rows: int = 65_536) -> pa.RecordBatchReader:
        """The result as a stream of Arrow batches, in entity order."""
        connection = _connect(self._config)
        connection.register("entity_rows", self._entities)
        reader = connection.execute(self._sql).to_arrow_reader(rows)
        schema = pa.schema(
            [field.with_name(name) for field, name in zip(reader.schema, self._names, strict=True)]
        )
        renamed = (pa.RecordBatch.from_arrays(batch.columns, schema=schema) for batch in reader)
        return pa.RecordBatchReader.from_batches(schema, renamed)

    def _to_arrow_internal(self, timeout: int | None = None) -> pa.Table:
        connection = _connect(self._config)
        connection.register("entity_rows", self._entities)
        try:
            return connection.execute(self._sql).to_arrow_table().rename_columns(self._names)
        finally:
            connection.close()

    def _to_df_internal(self, timeout: int | None = None) -> pd.DataFrame:
        return self._to_arrow_internal(timeout).to_pandas()

    @property
    def full_feature_names(self) -> bool:
        """True if feature columns carry their view's name."""
        return self._full_feature_names

    @property
    def on_demand_feature_views(self) -> list[OnDemandFeatureView]:
        return self._on_demand

    @property
    def metadata(self) -> RetrievalMetadata | None:
        """Keys, features and time range of the request."""
        return self._metadata

    def persist(
        self,
        storage: SavedDatasetStorage,
        allow_overwrite: bool = False,
        timeout: int | None = None,
    ) -> None:
        """Write the result to a saved dataset."""
        table = ibis.memtable(self.to_arrow())
        _write_data_source(
            table,
            storage.to_data_source(),
            str(self._config.repo_path),
            "overwrite",
            allow_overwrite,
        )


def resolve(path: str) -> list[str]:
    """Files behind a source path: a table of a job through its manifest, a folder's Parquet files,
    or the file itself.

    Raises:
        TableNotBuiltError: the path is a job's table that no finished run has written.
    """
    if "://" not in path and Path(path).is_file():
        return [path]
    if (
        "://" not in path
        and Path(path).is_dir()
        and not Path(path).parent.joinpath(MANIFEST).exists()
    ):
        return sorted(str(p) for p in Path(path).glob("*.parquet"))
    job_folder, table = path.rsplit("/", 1)
    home, job = job_folder.rsplit("/", 1)
    files = JobFolder(home, job).paths(table)
    if not files:
        raise TableNotBuiltError(
            f"table {table!r} of job {job!r} has no parts any more: run `python -m beam_jobs {job}`"
        )
    scheme = path.split("://")[0] + "://" if "://" in path else ""
    return [f"{scheme}{file}" if scheme else file for file in files]


def _source_path(source: DataSource, config_repo: str | Path | None) -> str:
    if not isinstance(source, FileSource):
        raise ValueError(
            f"source {source.name!r} is a {type(source).__name__}; this offline store reads FileSource only"
        )
    return FileSource.get_uri_for_file_path(config_repo, source.path)


def _ibis_table(source: DataSource, repo_path: str) -> Any:
    return ibis.read_parquet(resolve(_source_path(source, repo_path)))


def _ibis_table_or_empty(source: DataSource, repo_path: str) -> Any:
    """A source tagged as optional is empty until its job has run."""
    try:
        return _ibis_table(source, repo_path)
    except TableNotBuiltError:
        tags = source.tags or {}
        if tags.get("optional") != "true":
            raise
        table = datasets.load_contract(tags["dataset"]).table(source.name.removesuffix("_source"))
        return ibis.memtable(arrow_schema(table).empty_table())


def _connect(config: RepoConfig) -> duckdb.DuckDBPyConnection:
    connection = duckdb.connect()
    connection.execute("SET TimeZone='UTC'")
    # DuckDB cannot tell the size of an Arrow table, takes it for small, and joins by nested loops:
    # 60 s where 0.3 will do.
    connection.execute("SET asof_loop_join_threshold=0")
    store = config.offline_store
    if getattr(store, "memory_limit", None):
        connection.execute(f"SET memory_limit='{store.memory_limit}'")
    connection.execute(f"SET threads={getattr(store, 'threads', None) or os.cpu_count() or 1}")
    return connection


def _quote(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def _names(entity_df: pd.DataFrame | pa.Table) -> list[str]:
    columns = entity_df.column_names if isinstance(entity_df, pa.Table) else entity_df.columns
    return [str(name) for name in columns]


def _time_of(rows: pa.Table) -> str:
    """The column of an Arrow table that says when: `event_timestamp`, or the only column of times."""
    times = [field.name for field in rows.schema if pa.types.is_timestamp(field.type)]
    if offline_utils.DEFAULT_ENTITY_DF_EVENT_TIMESTAMP_COL in times:
        return str(offline_utils.DEFAULT_ENTITY_DF_EVENT_TIMESTAMP_COL)
    if len(times) != 1:
        raise EntityFrameError(
            f"entity_df has the columns of times {times}; expected event_timestamp, or one alone"
        )
    return times[0]


def _entity_table(
    entity_df: pd.DataFrame | pa.Table, time: str, views: list[FeatureView]
) -> EntityRows:
    """Entity rows as DuckDB joins them: columns under distinct names, times in UTC, keys of
    their views' types.

    Raises:
        EntityFrameError: a row without a time, or keys that are not of the view's type.
    """
    if isinstance(entity_df, pa.Table):
        at = entity_df.column_names.index(time)
        naive = entity_df[time].type.tz is None
        stamps = entity_df[time].cast(pa.timestamp("us")) if naive else entity_df[time]
        table = entity_df.set_column(at, time, stamps.cast(pa.timestamp("us", "UTC")))
    else:
        frame = entity_df.reset_index(drop=True)
        utc = pd.to_datetime(frame[time], utc=True).astype("datetime64[us, UTC]")
        table = pa.Table.from_pandas(frame.assign(**{time: utc}), preserve_index=False)
    if missing := table[time].null_count:
        row = int(np.flatnonzero(table[time].is_null().combine_chunks().to_numpy(False))[0])
        raise EntityFrameError(
            f"entity_df has no {time!r} in row {row} (and {missing - 1:,} more): a row without a time would see "
            "the newest values of all. Give each its request's time"
        )
    # DuckDB takes names that differ in case alone for one, so inside the join every column has a
    # number for a name.
    inner = {name: f"__e{number}" for number, name in enumerate(table.column_names)}
    columns = list(table.columns)
    for view in views:
        for key, entity in _join_keys(view).items():
            if entity not in inner:
                continue
            at = table.column_names.index(entity)
            columns[at] = _as_key(columns[at], entity, view, key)
    columns.append(pa.chunked_array([pa.array(np.arange(table.num_rows))]))
    return EntityRows(pa.table(columns, names=[*inner.values(), "__row"]), inner)


@dataclass(frozen=True)
class EntityRows:
    """Entity rows under inner names, and the inner name of each column of the frame."""

    table: pa.Table
    inner: dict[str, str]


def _as_key(column: pa.ChunkedArray, entity: str, view: FeatureView, key: str) -> pa.ChunkedArray:
    kind = next((c.dtype.to_value_type() for c in view.entity_columns if c.name == key), None)
    plain = column.cast(column.type.value_type) if pa.types.is_dictionary(column.type) else column
    is_text = pa.types.is_string(plain.type) or pa.types.is_large_string(plain.type)
    if kind in (ValueType.INT64, ValueType.INT32) and not pa.types.is_integer(plain.type):
        exact = whole_numbers(plain)
        # Text keys are read as numbers only where they are spelt as one: 001 and ' 1' are other ids
        # than 1.
        lost = plain.is_valid().combine_chunks().to_numpy(
            zero_copy_only=False
        ) & exact.is_null().to_numpy(zero_copy_only=False)
        if pa.types.is_floating(plain.type):
            lost &= ~np.isnan(plain.to_numpy())
        if is_text:
            spelt = pc.equal(exact.cast(pa.string()), plain.combine_chunks().cast(pa.string()))
            lost |= ~pc.fill_null(spelt, True).to_numpy(zero_copy_only=False)
        if lost.any():
            shown = plain[int(np.flatnonzero(lost)[0])].as_py()
            raise EntityFrameError(
                f"entity_df column {entity!r} holds {shown!r}; feature view {view.name!r} is keyed by whole numbers"
            )
        return pa.chunked_array([exact])
    if kind is ValueType.STRING and not is_text and not pa.types.is_null(plain.type):
        raise EntityFrameError(
            f"entity_df column {entity!r} holds {plain.type}; feature view {view.name!r} is keyed by text: give the ids as text"
        )
    return column


def _join_keys(view: FeatureView) -> dict[str, str]:
    """Join keys of a view, each with the entity column that it is joined to; `with_join_key_map`
    may rename some of them.
    """
    renamed = view.projection.join_key_map or {}
    return {column.name: renamed.get(column.name, column.name) for column in view.entity_columns}


def _refuse_shared_names(
    names: list[str], feature_refs: list[str], full_feature_names: bool
) -> None:
    if len(set(names)) < len(names):
        raise EntityFrameError(f"entity_df has two columns of one name: {names}")
    shared = sorted({ref.split(":", 1)[1] for ref in feature_refs} & set(names))
    if shared and not full_feature_names:
        raise EntityFrameError(
            f"entity_df and features share the names {shared}: pass full_feature_names=True, or rename them in entity_df"
        )


@dataclass(frozen=True)
class ViewJoin:
    """SQL of one view: its join, and an expression for each output column by the column's name."""

    sql: str
    columns: dict[str, str]


def _asof_join(
    view: FeatureView,
    feature_refs: list[str],
    entities: EntityRows,
    time: str,
    number: int,
    full_feature_names: bool,
    filter_by_created: bool,
    config: RepoConfig,
) -> ViewJoin:
    source = view.batch_source
    if source is None:
        raise ValueError(f"feature view {view.name!r} has no batch source and cannot be joined")
    mapping = {new: old for old, new in source.field_mapping.items()}
    keys = _join_keys(view)
    missing = [entity for entity in keys.values() if entity not in entities.inner]
    if missing:
        raise EntityFrameError(
            f"feature view {view.name!r} needs entity columns {missing}; entity_df has {list(entities.inner)}"
        )
    at = f"e.{entities.inner[time]}"
    prefix = view.projection.name_to_use()
    features = [ref.split(":", 1)[1] for ref in feature_refs if ref.split(":", 1)[0] == prefix]
    alias = view.projection.name_alias or view.name

    def column(name: str) -> str:
        return _quote(mapping.get(name, name))

    files = ", ".join(
        "'" + file.replace("'", "''") + "'"
        for file in resolve(_source_path(source, config.repo_path))
    )
    stamp = f"{_quote(source.timestamp_field)}::TIMESTAMPTZ"
    created = (
        f"{_quote(source.created_timestamp_column)}::TIMESTAMPTZ"
        if source.created_timestamp_column
        else stamp
    )
    selected = ", ".join(
        f"{column(name)} AS {_quote(name)}" for name in dict.fromkeys([*keys, *features])
    )
    rows = (
        f"SELECT {selected}, {stamp} AS __time, {created} AS __created FROM read_parquet([{files}])"
    )
    equal = " AND ".join(
        f"e.{entities.inner[entity]} = v.{_quote(key)}" for key, entity in keys.items()
    )
    name = f"v{number}"
    ttl = view.ttl.total_seconds() if view.ttl else 0
    live = (
        f"{name}.__time >= {at} - to_microseconds({int(ttl * 1_000_000)})"
        if ttl
        else f"{name}.__time IS NOT NULL"
    )
    outputs = {
        f"{alias}__{f}"
        if full_feature_names
        else f: f"CASE WHEN {live} THEN {name}.{_quote(f)} END"
        for f in features
    }
    if filter_by_created and source.created_timestamp_column and _has_late(rows, config):
        return ViewJoin(_late_join(rows, equal, at, features, name), outputs)
    # Of rows with equal stamps the newest created: both in one key, so that no window has to look
    # for repetitions first.
    keyed = f"SELECT *, row(__time, __created) AS __order FROM ({rows})"
    condition = equal.replace("v.", f"{name}.")
    join = f"ASOF LEFT JOIN ({keyed}) {name} ON {condition} AND row({at}, TIMESTAMPTZ 'infinity') >= {name}.__order"
    return ViewJoin(join, outputs)


def _has_late(rows: str, config: RepoConfig) -> bool:
    """Return whether any row was created after its stamp: then it is invisible to some entity rows, and "the
    newest" differs by entity row. Without any, which is what our tables hold, the plain ASOF join is
    right.
    """
    late = f"SELECT count(*) FROM (SELECT 1 FROM ({rows}) WHERE __created > __time LIMIT 1)"
    connection = _connect(config)
    try:
        return bool(connection.execute(late).fetchone()[0])
    finally:
        connection.close()


def _late_join(rows: str, equal: str, at: str, features: list[str], name: str) -> str:
    """The join where rows came late: the newest of each entity row among those it may see.

    Args:
        rows: SQL of the source's rows.
        equal: condition that keys are alike.
        at: SQL of the entity row's time.
        name: of the view in the statement.
    """
    picked = "".join(f", v.{_quote(feature)}" for feature in features)
    visible = f"{equal} AND v.__time <= {at} AND v.__created <= {at}"
    newest = "PARTITION BY e.__row ORDER BY v.__time DESC, v.__created DESC"
    return (
        f"LEFT JOIN (SELECT e.__row AS __of, v.__time{picked} "
        f"FROM entity_rows e JOIN ({rows}) v ON {visible} "
        f"QUALIFY row_number() OVER ({newest}) = 1) {name} ON {name}.__of = e.__row"
    )
