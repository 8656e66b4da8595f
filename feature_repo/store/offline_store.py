"""The embedded offline store: Feast's DuckDB store with the point-in-time join done by DuckDB's
ASOF join (`point_in_time.py`).

`get_historical_features` keeps Feast's meaning, which a differential test holds against Feast's own
DuckDB store and an oracle of plain Python. Sources are our tables, resolved through their job's manifest, or any
Parquet file, folder or pattern (`source_files.py`).

Source: Feast 0.67 `OfflineStore` interface. Differs from Feast's DuckDB store: rows come in the order of the frame;
integer types stay where a value is missing, and `to_df` keeps every digit of them; no `*_y` column name is lost;
a frame is not needed where `start_date` and `end_date` say which rows are asked for.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import duckdb
import ibis
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from feast.data_source import DataSource
from feast.feature_view import FeatureView
from feast.infra.offline_stores.duckdb import (
    DuckDBOfflineStore,
    DuckDBOfflineStoreConfig,
    _write_data_source,
)
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
from feast.utils import compute_non_entity_date_range

from feature_repo import datasets
from feature_repo.contract.arrow import TIMESTAMP, arrow_schema, arrow_type
from feature_repo.contract.contract import TOKEN_VERSION
from feature_repo.contract.schema import EVENT_TIMESTAMP
from feature_repo.errors import ExpectedError
from feature_repo.history.lists import HISTORY, MADE_OF, NUMBER, VALUES, list_columns
from feature_repo.home.tables import TableNotBuiltError
from feature_repo.store.entity_rows import TIME, EntityFrameError, entity_rows
from feature_repo.store.late_views import LateGather, LateViews
from feature_repo.store.point_in_time import ENTITIES, Statement, rows_between, statement
from feature_repo.store.source_files import files_of
from feature_repo.store.store import StoreError, foreign_tables

TYPE = "feature_repo.store.offline_store.AsofDuckDBOfflineStore"

# Custom feature views are written by a rule of ours, through whatever opens these stores: provider.py.
PROVIDERS_CLASS_FOR_TYPE["local"] = "feature_repo.store.provider.MemoirProvider"
# Views that hold the newest row of each key, and what says the same of the past
NEWEST_ONLY = {
    "user_history": "user_sequence",
    "summary_tokens": "summary_token_values, or token_rows for the log's row",
}
OWNER = "memoir"
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
    # Where they spill; default: the system's folder for temporary files
    spill: str | None = None
    threads: int | None = None


class NewestOnlyError(ExpectedError, ValueError):
    """A view that holds the newest value alone was asked for one of the past."""


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
        entity_df: pd.DataFrame | pa.Table | str | None,
        registry: BaseRegistry,
        project: str,
        full_feature_names: bool = False,
        filter_by_created_timestamp: bool = False,
        start_date: datetime | None = None,
        end_date: datetime | None = None,
    ) -> RetrievalJob:
        """The point-in-time join, as a job that runs when its result is asked for.

        Args:
            entity_df: keys and times; None: every key and time at which a view has a row between two dates.
            start_date, end_date: of a retrieval without a frame.

        Raises:
            EntityFrameError: entity_df is no frame, has a row without a time, or lacks a join key.
            SourceError: a view's rows cannot be read.
        """
        repo = config.repo_path
        _refuse_newest_only(feature_views)
        # Lists and tokens are gathered once the other views are joined.
        late = LateViews.of(feature_views, feature_refs, registry, project, full_feature_names)
        feature_views = late.joined
        with _connected(config) as connection:
            # 1. The asked rows.
            if entity_df is None:
                start, end = compute_non_entity_date_range(feature_views, start_date, end_date)
                entities = rows_between(feature_views, start, end, repo, connection)
            else:
                entities = entity_rows(entity_df)
                _refuse_shared_names(list(entities.inner), feature_refs, full_feature_names)
            # 2. One ASOF join for each view, all in one query.
            made = statement(
                feature_views,
                late.refs,
                entities,
                repo,
                connection,
                full_feature_names=full_feature_names,
                filter_by_created=filter_by_created_timestamp,
            )
        # 3. What Feast wants to know of the job before it runs.
        on_demand = OnDemandFeatureView.get_requested_odfvs(feature_refs, project, registry)
        span = pc.min_max(entities.table[TIME])
        now = datetime.now(UTC)
        metadata = RetrievalMetadata(
            features=feature_refs,
            keys=[name for name in entities.inner if name != entities.time],
            min_event_timestamp=span["min"].as_py() or now,
            max_event_timestamp=span["max"].as_py() or now,
        )
        return AsofJob(config, made, late.ready(entities), on_demand, full_feature_names, metadata)

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
    """A point-in-time join that is ready to run.

    Example:
        >>> job = store.get_historical_features(entity_df, ["user_stats:history_end"])
        >>> job.to_arrow().num_rows == len(entity_df)
        True
    """

    def __init__(
        self,
        config: RepoConfig,
        made: Statement,
        late: LateGather,
        on_demand: list[OnDemandFeatureView],
        full_feature_names: bool,
        metadata: RetrievalMetadata,
    ) -> None:
        super().__init__()
        self._config = config
        self._made = made
        self._late = late
        self._on_demand = on_demand
        self._full_feature_names = full_feature_names
        self._metadata = metadata

    def to_batches(self, rows: int = 65_536) -> Iterator[pa.RecordBatch]:
        """The result as a stream of Arrow batches, in entity order, without on-demand views."""
        rows = min(rows, self._late.most_rows)
        with _connected(self._config) as connection:
            connection.register(ENTITIES, self._made.entities)
            reader = connection.execute(self._made.sql).to_arrow_reader(rows)
            fields = zip(reader.schema, self._made.names, strict=True)
            schema = pa.schema([field.with_name(name) for field, name in fields])
            start = 0
            for batch in reader:
                joined = pa.RecordBatch.from_arrays(batch.columns, schema=schema)
                yield self._late.added(joined, start)
                start += batch.num_rows

    def to_df(self, *arguments: Any, **named: Any) -> pd.DataFrame:
        """The result as a data frame. Whole numbers with gaps keep their digits: as floats where these hold them, as
        pandas' Int64 where they do not.
        """
        table = self.to_arrow(*arguments, **named)
        frame = table.to_pandas().reset_index(drop=True)
        for name in table.column_names:
            column = table[name]
            if pa.types.is_integer(column.type) and column.null_count and _is_large(column):
                frame[name] = pd.array(column.to_pylist(), dtype="Int64")
        return frame

    def _to_arrow_internal(self, timeout: int | None = None) -> pa.Table:
        if self._late.views:
            return pa.Table.from_batches(self.to_batches(), self._schema())
        with _connected(self._config) as connection:
            connection.register(ENTITIES, self._made.entities)
            found = connection.execute(self._made.sql).to_arrow_table()
        return found.rename_columns(self._made.names)

    def _schema(self) -> pa.Schema:
        """The result's, which has no batch where there is no row."""
        with _connected(self._config) as connection:
            connection.register(ENTITIES, self._made.entities.slice(0, 0))
            empty = connection.execute(self._made.sql).to_arrow_table()
        empty = empty.rename_columns(self._made.names).combine_chunks()
        arrays = [column.combine_chunks() for column in empty.columns]
        return self._late.added(pa.RecordBatch.from_arrays(arrays, schema=empty.schema), 0).schema

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


def _ibis_table(source: DataSource, repo_path: str) -> Any:
    files = files_of(source, repo_path, source.name)
    return ibis.read_parquet(list(files.paths), hive_partitioning=files.hive)


def _ibis_table_or_empty(source: DataSource, repo_path: str) -> Any:
    """A source tagged as optional is empty until its job has run."""
    try:
        return _ibis_table(source, repo_path)
    except TableNotBuiltError:
        tags = source.tags or {}
        if tags.get("optional") != "true":
            raise
        # Of a view that is made when it is read nothing is ever materialized.
        if MADE_OF in tags:
            return ibis.memtable(_nothing_of(tags))
        table = datasets.load_contract(tags["dataset"]).table(source.name.removesuffix("_source"))
        return ibis.memtable(arrow_schema(table).empty_table())


def _nothing_of(tags: dict[str, str]) -> pa.Table:
    """No rows of a view that is made when it is read."""
    contract = datasets.load_contract(tags["dataset"])
    fields = [pa.field(contract.user.join_key, arrow_type(contract.user.dtype))]
    if tags[MADE_OF] == HISTORY:
        fields += [pa.field(column.name, column.type) for column in list_columns(contract)]
    else:
        fields += [pa.field(TOKEN_VERSION.join_key, pa.string())]
        fields += [pa.field(VALUES, pa.list_(pa.float32())), pa.field(NUMBER, pa.int32())]
    return pa.schema([*fields, pa.field(EVENT_TIMESTAMP, TIMESTAMP)]).empty_table()


@contextmanager
def _connected(config: RepoConfig) -> Iterator[duckdb.DuckDBPyConnection]:
    """DuckDB in memory, which spills where the configuration says."""
    store = config.offline_store
    connection = duckdb.connect()
    try:
        connection.execute("SET TimeZone='UTC'")
        # DuckDB cannot tell the size of an Arrow table, takes it for small, and joins by nested loops:
        # 60 s where 0.3 will do.
        connection.execute("SET asof_loop_join_threshold=0")
        # Relative to the definitions, like the paths beside it; a folder for each process, which DuckDB empties.
        spill = Path(
            config.repo_path or ".", getattr(store, "spill", None) or tempfile.gettempdir()
        )
        # Where it cannot be made, a join that must spill says so.
        with suppress(OSError):
            spill.mkdir(parents=True, exist_ok=True)
        connection.execute("SET temp_directory=?", [str(spill / f"duckdb-{os.getpid()}")])
        if getattr(store, "memory_limit", None):
            connection.execute("SET memory_limit=?", [store.memory_limit])
        threads = getattr(store, "threads", None) or os.cpu_count() or 1
        connection.execute("SET threads=?", [threads])
        yield connection
    finally:
        connection.close()


def _is_large(column: pa.ChunkedArray) -> bool:
    """Return whether a float cannot hold every number of a column."""
    span = pc.min_max(column)
    return any(value.as_py() is not None and abs(value.as_py()) > 2**53 for value in span.values())


def _refuse_newest_only(views: list[FeatureView]) -> None:
    """Refuse views that hold the newest value alone: any earlier time would give null, as if nothing had been known."""
    for view in views:
        if view.name in NEWEST_ONLY and view.owner == OWNER:
            raise NewestOnlyError(
                f"{view.name} holds one row of a key, of the newest time: of the past it knows nothing. "
                f"Ask for {NEWEST_ONLY[view.name]}, which is right at any time"
            )


def _refuse_shared_names(
    names: list[str], feature_refs: list[str], full_feature_names: bool
) -> None:
    shared = sorted({ref.split(":", 1)[1] for ref in feature_refs} & set(names))
    if shared and not full_feature_names:
        raise EntityFrameError(
            f"entity_df and features share the names {shared}: pass full_feature_names=True, or rename them in entity_df"
        )
