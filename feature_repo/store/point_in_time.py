"""The point-in-time join as one statement: an ASOF join for each feature view, over files of Parquet.

For every entity row, in its order, a view gives its newest row at or before the entity row's time; of equal times
the one created last, and a null is the oldest. With `filter_by_created_timestamp` a row that was created later
than the entity row's time, or does not say when, is not there. A row older than the view's ttl gives nulls.

Times are compared to the nanosecond. Keys are equal where their values are: a whole number and a text where the
text is the number as it is spelt. Names are compared as they are written, case included: inside the statement
every column has a number for a name, so that neither a feature's name nor a key's can mean another column.

Source: DuckDB 1.x `ASOF LEFT JOIN`; the statement is built as a tree by sqlglot.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from feast import ValueType
from feast.feature_view import DUMMY_ENTITY_ID, FeatureView
from sqlglot import exp

from feature_repo.raw.raw import whole_numbers
from feature_repo.store.entity_rows import (
    NANOS,
    ONE,
    ROW,
    TIME,
    EntityFrameError,
    EntityRows,
    entity_rows,
)
from feature_repo.store.source_files import SourceError, SourceFiles, files_of

ENTITIES = "entity_rows"
# Inner names of a view's rows: its time, the nanoseconds beyond, when it was created, since when it is known, and its
# place among the rows of its key
CREATED = "c"
CREATED_NANOS = "cn"
KNOWN = "k"
KNOWN_NANOS = "kn"
RANK = "rank"
WHOLE = (
    "TINYINT",
    "SMALLINT",
    "INTEGER",
    "BIGINT",
    "HUGEINT",
    "UTINYINT",
    "USMALLINT",
    "UINTEGER",
    "UBIGINT",
)
TIMES = (
    "TIMESTAMP",
    "TIMESTAMP_S",
    "TIMESTAMP_MS",
    "TIMESTAMP_NS",
    "TIMESTAMP WITH TIME ZONE",
    "DATE",
    "VARCHAR",
)


@dataclass(frozen=True)
class Statement:
    """A join that is ready to run.

    Args:
        sql: over a table `ENTITIES`.
        names: of its columns, in order.
    """

    sql: str
    names: list[str]
    entities: pa.Table


@dataclass(frozen=True)
class ViewSource:
    """A view's rows: their files, and the types and names of their columns as DuckDB has them.

    Args:
        inner: DuckDB's name of each column by its own; of two that differ in case alone it renames one.
        types: by DuckDB's name.
    """

    view: str
    files: SourceFiles
    inner: Mapping[str, str]
    types: Mapping[str, str]
    mapping: Mapping[str, str]

    @staticmethod
    def of(
        view: FeatureView, repo: str | Path | None, connection: duckdb.DuckDBPyConnection
    ) -> ViewSource:
        files = files_of(view.batch_source, repo, view.name)
        described = connection.execute(
            exp.Describe(this=exp.select("*").from_(_read(files))).sql("duckdb")
        ).fetchall()
        names = [str(row[0]) for row in described]
        # DuckDB's names stand in the order of the file's, folders' behind them.
        path = files.paths[0]
        own = list(names)
        if "://" not in path and not any(sign in path for sign in "*?["):
            held = pq.read_schema(path).names
            own[: len(held)] = held
        source = view.batch_source
        mapping = {} if source is None else {new: old for old, new in source.field_mapping.items()}
        return ViewSource(
            view.name,
            files,
            dict(zip(own, names, strict=True)),
            {str(row[0]): str(row[1]) for row in described},
            mapping,
        )

    def column(self, name: str) -> exp.Column:
        """A column by its name in Feast.

        Raises:
            SourceError: the files have no such column.
        """
        return _column(self.inner[self._held(name)])

    def type_of(self, name: str) -> str:
        return self.types[self.inner[self._held(name)]]

    def has(self, name: str) -> bool:
        return name in self.inner or self.mapping.get(name) in self.inner

    def refuse_cut_times(self, name: str) -> None:
        """Refuse a column of nanoseconds with a zone that DuckDB (1.5) would cut to microseconds: a row would be seen
        before its time.

        Raises:
            SourceError: a value lies between two microseconds.
        """
        held = self._held(name)
        for path in self.files.paths:
            if "://" in path or any(sign in path for sign in "*?["):
                continue
            file = pq.ParquetFile(path)
            kind = file.schema_arrow.field(held).type if held in file.schema_arrow.names else None
            if (
                kind is None
                or not pa.types.is_timestamp(kind)
                or kind.unit != "ns"
                or kind.tz is None
            ):
                continue
            for batch in file.iter_batches(columns=[held]):
                nanos = pc.fill_null(batch.column(0).cast(pa.int64()), 0).to_numpy()
                if (nanos % 1000).any():
                    raise SourceError(
                        f"column {name!r} of feature view {self.view!r} holds nanoseconds with a zone, and some lie between two "
                        f"microseconds ({path}): DuckDB reads them cut, and a row would be seen before its time. Write the "
                        "column in microseconds, or without a zone"
                    )

    def _held(self, name: str) -> str:
        # A mapped name stands for the file's; where the file has both, the mapped one is meant.
        for held in (self.mapping.get(name, name), name):
            if held in self.inner:
                return held
        raise SourceError(
            f"the files of feature view {self.view!r} have no column {self.mapping.get(name, name)!r}; they have "
            f"{sorted(self.inner)}"
        )


def statement(
    views: Sequence[FeatureView],
    feature_refs: Sequence[str],
    entities: EntityRows,
    repo: str | Path | None,
    connection: duckdb.DuckDBPyConnection,
    *,
    full_feature_names: bool,
    filter_by_created: bool,
) -> Statement:
    """The join of all views.

    Raises:
        EntityFrameError: the frame lacks a key, or holds one that a view cannot be keyed by.
        SourceError: a view's rows cannot be read.
    """
    # 1. A join for each view, with the columns of the frame that its keys are compared to.
    table = entities.table
    names = list(entities.inner)
    outputs: list[exp.Expression] = [_column(inner, "e") for inner in entities.inner.values()]
    joins = []
    for number, view in enumerate(views):
        source = ViewSource.of(view, repo, connection)
        keys = join_keys(view, source)
        made = _keyed(table, entities, view, source, keys)
        table = made.entities
        # A table that is cut by this key is read only where the frame's keys may be.
        if len(made.entity_keys) == 1:
            source = replace(source, files=source.files.of_keys(table[made.entity_keys[0]]))
        rows = f"v{number}"
        prefix = view.projection.name_to_use()
        features = [ref.split(":", 1)[1] for ref in feature_refs if ref.split(":", 1)[0] == prefix]
        known = {feature.name for feature in view.features}
        if unknown := [name for name in features if name not in known]:
            raise KeyError(
                f"feature view {view.name!r} has no feature {unknown[0]!r}; it has {sorted(known)}"
            )
        join = _View(view, source, keys, features, rows, filter_by_created, entities.has_nanos)
        joins.append(join.joined(made.entity_keys, connection))
        alias = view.projection.name_alias or view.name
        for place, feature in enumerate(features):
            names.append(f"{alias}__{feature}" if full_feature_names else feature)
            outputs.append(join.output(place))
    # 2. All of them in one statement, in the order of the frame.
    query = exp.select(
        *(exp.alias_(value, f"o{n}", quoted=True) for n, value in enumerate(outputs))
    ).from_(exp.alias_(exp.to_table(ENTITIES), "e"))
    query.set("joins", joins)
    query = query.order_by(_column(ROW, "e"))
    return Statement(query.sql("duckdb"), names, table)


def rows_between(
    views: Sequence[FeatureView],
    start: datetime,
    end: datetime,
    repo: str | Path | None,
    connection: duckdb.DuckDBPyConnection,
) -> EntityRows:
    """The entity rows of a retrieval without a frame: every key and time at which some view has a row.

    Raises:
        EntityFrameError: the views have different keys.
    """
    asked: list[str] | None = None
    parts = []
    for view in views:
        source = ViewSource.of(view, repo, connection)
        keys = join_keys(view, source)
        names = sorted(keys.values())
        if asked is not None and names != asked:
            raise EntityFrameError(
                f"without entity_df all views must have the same keys: {asked} and {names}; give an entity_df"
            )
        asked = names
        by_name = {entity: key for key, entity in keys.items()}
        assert view.batch_source is not None
        time = _time(source, view.batch_source.timestamp_field)
        columns = [exp.alias_(source.column(by_name[name]), name, quoted=True) for name in names]
        stamp = exp.alias_(_rounded_up(time), "event_timestamp", quoted=True)
        bounds = [
            exp.cast(exp.Literal.string(at.isoformat()), "timestamptz") for at in (start, end)
        ]
        within = exp.Between(this=time.micros.copy(), low=bounds[0], high=bounds[1])
        parts.append(exp.select(stamp, *columns).from_(_read(source.files)).where(within))
    query: exp.Expression = parts[0].distinct()
    for part in parts[1:]:
        query = exp.union(query, part, distinct=True)
    order = ", ".join(str(n + 1) for n in range(1 + len(asked or [])))
    sql = f"SELECT * FROM ({query.sql('duckdb')}) ORDER BY {order}"
    return entity_rows(connection.execute(sql).to_arrow_table())


def join_keys(view: FeatureView, source: ViewSource) -> dict[str, str]:
    """Join keys of a view, each with the entity column that it is joined to; `with_join_key_map` may rename some of
    them. A view of no entity has none, whatever stands in for one.
    """
    renamed = view.projection.join_key_map or {}
    names = [column.name for column in view.entity_columns]
    return {
        name: renamed.get(name, name)
        for name in names
        if name != DUMMY_ENTITY_ID or source.has(name)
    }


@dataclass(frozen=True)
class _Keyed:
    """Entity rows with the columns that a view's keys are compared to, and their names."""

    entities: pa.Table
    entity_keys: list[str]


def _keyed(
    table: pa.Table,
    entities: EntityRows,
    view: FeatureView,
    source: ViewSource,
    keys: Mapping[str, str],
) -> _Keyed:
    """Key columns of entity rows as a view's rows have theirs.

    Raises:
        EntityFrameError: a column is missing, or holds what no key of the view is.
    """
    if missing := [entity for entity in keys.values() if entity not in entities.inner]:
        raise EntityFrameError(
            f"feature view {view.name!r} needs entity columns {missing}; entity_df has {list(entities.inner)}"
        )
    names = []
    declared = {column.name: column.dtype.to_value_type() for column in view.entity_columns}
    for key, entity in keys.items():
        column = table[entities.inner[entity]]
        is_text = declared[key] is ValueType.STRING
        made = _as_key(column, entity, view, source.type_of(key), is_text=is_text)
        if made is None:
            names.append(entities.inner[entity])
            continue
        name = f"key{table.num_columns}"
        table = table.append_column(name, made)
        names.append(name)
    return _Keyed(table, names)


def _as_key(
    column: pa.ChunkedArray, entity: str, view: FeatureView, held: str, *, is_text: bool
) -> pa.ChunkedArray | None:
    """An entity column as the source's key is held; None where it is already.

    Args:
        entity: name of the column, for messages.
        held: DuckDB's type of the key in the files.
        is_text: whether the view declares the key as text.

    Raises:
        EntityFrameError: a value that no key of the view can be.
    """
    plain = column.cast(column.type.value_type) if pa.types.is_dictionary(column.type) else column
    kind = plain.type
    gives_text = pa.types.is_string(kind) or pa.types.is_large_string(kind)
    if pa.types.is_null(kind):
        return pa.chunked_array(
            [pa.nulls(len(plain), pa.int64() if held in WHOLE else pa.string())]
        )
    if held in WHOLE:
        if pa.types.is_integer(kind):
            return None if plain is column else plain
        exact = whole_numbers(plain)
        lost = plain.is_valid().combine_chunks().to_numpy(False) & exact.is_null().to_numpy(False)
        if pa.types.is_floating(kind):
            lost &= ~np.isnan(plain.to_numpy())
        if gives_text:
            # Text keys are numbers only where they are spelt as one: 001 and ' 1' are other ids than 1.
            spelt = pc.equal(exact.cast(pa.string()), plain.combine_chunks().cast(pa.string()))
            lost |= ~pc.fill_null(spelt, True).to_numpy(False)
            # Where keys are declared as text, another spelling is another key, which the view does not have.
            if is_text:
                return pa.chunked_array(
                    [pc.if_else(pa.array(~lost), exact, pa.scalar(None, exact.type))]
                )
        if lost.any():
            shown = plain[int(np.flatnonzero(lost)[0])].as_py()
            raise EntityFrameError(
                f"entity_df column {entity!r} holds {shown!r}; feature view {view.name!r} is keyed by whole numbers"
            )
        return pa.chunked_array([exact])
    if held == "VARCHAR":
        if gives_text:
            return None if plain is column else plain
        if pa.types.is_integer(kind):
            return plain.cast(pa.string())
        raise EntityFrameError(
            f"entity_df column {entity!r} holds {kind}; feature view {view.name!r} is keyed by text: give the ids as text"
        )
    return None if plain is column else plain


@dataclass(frozen=True)
class _Time:
    """A column of times: whole microseconds as TIMESTAMPTZ, and the nanoseconds beyond, or None for none."""

    micros: exp.Expression
    nanos: exp.Expression | None


def _time(source: ViewSource, name: str) -> _Time:
    column = source.column(name)
    kind = source.type_of(name)
    if kind not in TIMES:
        raise SourceError(
            f"column {name!r} of feature view {source.view!r} holds {kind}, which is no time: write timestamps there"
        )
    if kind != "TIMESTAMP_NS":
        source.refuse_cut_times(name)
        return _Time(exp.cast(column, "timestamptz"), None)
    # Cut towards the past, before 1970 as well.
    since = exp.func("epoch_ns", column)
    beyond = f"((({since.sql('duckdb')}) % 1000) + 1000) % 1000"
    whole = f"CAST(make_timestamp(CAST((({since.sql('duckdb')}) - ({beyond})) / 1000 AS BIGINT)) AS TIMESTAMPTZ)"
    return _Time(_parsed(whole), _parsed(f"CAST({beyond} AS BIGINT)"))


def _rounded_up(time: _Time) -> exp.Expression:
    """The first whole microsecond at which a row is there."""
    if time.nanos is None:
        return time.micros.copy()
    beyond = f"CASE WHEN {time.nanos.sql('duckdb')} > 0 THEN 1 ELSE 0 END"
    return _parsed(f"{time.micros.sql('duckdb')} + to_microseconds({beyond})")


@dataclass(frozen=True)
class _View:
    """One view's part of the statement."""

    view: FeatureView
    source: ViewSource
    keys: Mapping[str, str]
    features: Sequence[str]
    rows: str
    filter_by_created: bool
    entity_nanos: bool

    def output(self, place: int) -> exp.Expression:
        """A feature's value for an entity row."""
        value = _column(f"f{place}", self.rows)
        if not self.view.ttl:
            return value
        micros = round(self.view.ttl.total_seconds() * 1_000_000)
        oldest = _parsed(f'"e"."{TIME}" - to_microseconds({micros})')
        young: exp.Expression = exp.GTE(this=_column(TIME, self.rows), expression=oldest)
        if self.has_nanos:
            young = _order(
                [_column(TIME, self.rows), _column(NANOS, self.rows)],
                [oldest, _column(NANOS, "e")],
            )
        return exp.Case().when(young, value)

    @property
    def has_nanos(self) -> bool:
        batch = self.view.batch_source
        assert batch is not None
        fields = [batch.timestamp_field, *self._created_field]
        return self.entity_nanos or any(
            self.source.type_of(name) == "TIMESTAMP_NS" for name in fields
        )

    @property
    def _created_field(self) -> list[str]:
        batch = self.view.batch_source
        assert batch is not None
        return [batch.created_timestamp_column] if batch.created_timestamp_column else []

    def joined(self, entity_keys: Sequence[str], connection: duckdb.DuckDBPyConnection) -> exp.Join:
        """The view's ASOF join."""
        rows = self._rows()
        forever = exp.cast(exp.Literal.string("infinity"), "timestamptz")
        names: tuple[str, ...] = (TIME, NANOS, CREATED, CREATED_NANOS)
        asked: list[exp.Expression] = [_column(TIME, "e"), _column(NANOS, "e"), forever, _last()]
        if self.filter_by_created and self._created_field and _any_late(rows, connection):
            rows = self._when_known(rows)
            names = (KNOWN, KNOWN_NANOS, RANK)
            asked = [_column(TIME, "e"), _column(NANOS, "e"), _last()]
        compared = [
            (name, value)
            for name, value in zip(names, asked, strict=True)
            if self.has_nanos or name not in (NANOS, KNOWN_NANOS, CREATED_NANOS)
        ]
        equal: list[exp.Expression] = [
            exp.EQ(this=_column(entity, "e"), expression=_column(f"k{n}", self.rows))
            for n, entity in enumerate(entity_keys)
        ]
        if not equal:
            equal = [exp.EQ(this=_column(ONE, "e"), expression=_column(ONE, self.rows))]
        # Both sides of an ASOF comparison are one value: rows of DuckDB's are compared from their first field on.
        ordered = exp.alias_(_struct([_column(name) for name, _ in compared]), "o", quoted=True)
        rows = exp.select("*", ordered).from_(rows.subquery(self.rows))
        last = _struct([value for _, value in compared])
        newest = exp.GTE(this=last, expression=_column("o", self.rows))
        return exp.Join(
            this=rows.subquery(self.rows), method="ASOF", side="LEFT", on=exp.and_(*equal, newest)
        )

    def _rows(self) -> exp.Select:
        """Keys, features and times of the view's rows, under inner names."""
        batch = self.view.batch_source
        assert batch is not None
        time = _time(self.source, batch.timestamp_field)
        none = exp.cast(exp.Literal.number(0), "bigint")
        columns: dict[str, Any] = {
            f"k{n}": self.source.column(key) for n, key in enumerate(self.keys)
        }
        columns |= {f"f{n}": self.source.column(name) for n, name in enumerate(self.features)}
        columns |= {TIME: time.micros, NANOS: time.nanos or none, ONE: exp.Literal.number(1)}
        conditions: list[exp.Expression] = [time.micros.copy().is_(exp.null()).not_()]
        columns[CREATED] = time.micros.copy()
        columns[CREATED_NANOS] = none.copy()
        for name in self._created_field:
            created = _time(self.source, name)
            # Who does not say when is the oldest of all that do.
            oldest = exp.cast(exp.Literal.string("-infinity"), "timestamptz")
            columns[CREATED] = exp.func("coalesce", created.micros, oldest)
            columns[CREATED_NANOS] = (
                exp.func("coalesce", created.nanos, none) if created.nanos else none.copy()
            )
            if self.filter_by_created:
                conditions.append(created.micros.copy().is_(exp.null()).not_())
        named = [exp.alias_(value, name, quoted=True) for name, value in columns.items()]
        return exp.select(*named).from_(_read(self.source.files)).where(*conditions)

    def _when_known(self, rows: exp.Select) -> exp.Select:
        """The rows that are the newest known one at some time, and since when.

        A row is known once it has happened and was created. No time finds it if a newer one was known
        before it; so what is left is ordered by both, and the plain join finds the newest.
        """
        keys = ", ".join(f'"k{n}"' for n in range(len(self.keys))) or f'"{ONE}"'
        later = f'row("{CREATED}", "{CREATED_NANOS}") > row("{TIME}", "{NANOS}")'
        known = (
            f'SELECT *, CASE WHEN {later} THEN "{CREATED}" ELSE "{TIME}" END AS "{KNOWN}", '
            f'CASE WHEN {later} THEN "{CREATED_NANOS}" ELSE "{NANOS}" END AS "{KNOWN_NANOS}", '
            f'row_number() OVER (PARTITION BY {keys} ORDER BY "{TIME}", "{NANOS}", "{CREATED}", "{CREATED_NANOS}") AS "{RANK}" '
            f"FROM ({rows.sql('duckdb')})"
        )
        before = (
            f'max("{RANK}") OVER (PARTITION BY {keys} ORDER BY "{KNOWN}", "{KNOWN_NANOS}", "{RANK}" '
            "ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING)"
        )
        found = _parsed(f'SELECT * FROM ({known}) QUALIFY "{RANK}" > coalesce({before}, 0)')
        assert isinstance(found, exp.Select)
        return found


def _any_late(rows: exp.Select, connection: duckdb.DuckDBPyConnection) -> bool:
    """Return whether any row was created after its time: then it is invisible to some entity rows. Without any,
    which is what most tables hold, the plain ASOF join is right.
    """
    later = f'row("{CREATED}", "{CREATED_NANOS}") > row("{TIME}", "{NANOS}")'
    query = f"SELECT count(*) FROM (SELECT 1 FROM ({rows.sql('duckdb')}) WHERE {later} LIMIT 1)"
    found = connection.execute(query).fetchone()
    return bool(found and found[0])


def _read(files: SourceFiles) -> exp.Expression:
    paths = exp.Array(expressions=[exp.Literal.string(path) for path in files.paths])
    options = [exp.EQ(this=exp.to_identifier("hive_partitioning"), expression=exp.false())]
    if files.hive:
        options = [exp.EQ(this=exp.to_identifier("hive_partitioning"), expression=exp.true())]
    return exp.Anonymous(this="read_parquet", expressions=[paths, *options])


def _column(name: str, table: str | None = None) -> exp.Column:
    return exp.column(
        exp.to_identifier(name, quoted=True),
        exp.to_identifier(table, quoted=True) if table else None,
    )


def _last() -> exp.Expression:
    """A number that none exceeds."""
    return exp.Literal.number(2**63 - 1)


def _struct(values: Sequence[exp.Expression]) -> exp.Expression:
    return exp.Anonymous(this="row", expressions=[value.copy() for value in values])


def _order(left: Sequence[exp.Expression], right: Sequence[exp.Expression]) -> exp.Expression:
    return exp.GTE(this=_struct(left), expression=_struct(right))


def _parsed(sql: str) -> exp.Expression:
    return exp.maybe_parse(sql, dialect="duckdb")
