"""Every Feast object, derived from the contract of `MEMOIR_DATASET`: entities, sources, views,
services, in that order.

Feast imports this file by its bare name; nothing in the project imports it. Other rooms ask the
registry by name.
"""

from __future__ import annotations

from datetime import timedelta

import pyarrow as pa
from feast import Entity, FeatureService, FeatureView, Field, FileSource, PushSource, ValueType
from feast.data_format import ParquetFormat
from feast.types import (
    Array,
    Bytes,
    Float32,
    Float64,
    Int32,
    Int64,
    String,
    UnixTimestamp,
    from_value_type,
)

from feature_repo import datasets
from feature_repo.contract import schema
from feature_repo.contract.arrow import TIMESTAMP
from feature_repo.contract.contract import STORE_PART, TOKEN_VERSION
from feature_repo.contract.schema import DType
from feature_repo.history import lists
from feature_repo.settings import Settings

FIELD_TYPES = {
    DType.INT8: Int32,
    DType.INT32: Int32,
    DType.INT64: Int64,
    DType.FLOAT32: Float32,
    DType.STRING: String,
    DType.STRING_LIST: Array(String),
    DType.FLOAT32_LIST: Array(Float32),
    DType.TIMESTAMP: UnixTimestamp,
    DType.BYTES: Bytes,
}
KEY_TYPES = {DType.INT64: ValueType.INT64, DType.STRING: ValueType.STRING}
# Feast does not enforce a ttl online; a reader that needs one checks the timestamp itself
NO_EXPIRY = timedelta(0)

settings = Settings.from_env()
dataset = datasets.load(settings.dataset)
contract = dataset.contract
tags = {"dataset": settings.dataset, "fingerprint": contract.fingerprint}


def _entity(declared: schema.Entity) -> Entity:
    return Entity(
        name=declared.name,
        join_keys=[declared.join_key],
        value_type=KEY_TYPES[declared.dtype],
        description=declared.doc,
    )


def _source(name: str) -> FileSource:
    table = contract.table(name)
    # Nothing to materialize until some bundle has tokens; and an epoch comes from whoever writes
    # online, not from a table.
    optional = {"optional": "true"} if table.version or not table.job else {}
    return FileSource(
        name=f"{name}_source",
        # Resolved through the job's manifest by our offline store
        path=f"{settings.home}/{table.job or 'online'}/{name}",
        file_format=ParquetFormat(),
        timestamp_field=schema.EVENT_TIMESTAMP,
        created_timestamp_column=schema.CREATED_TIMESTAMP,
        tags=tags
        | optional
        # Materialized from its beginning: offline_store.py
        | {"whole": "true"},
        description=f"written by `python -m beam_jobs {table.job}`"
        if table.job
        else "written by every job that writes online",
    )


def _view(entities: list[Entity], source: FileSource, *, online: bool = True) -> FeatureView:
    table = contract.table(source.name.removesuffix("_source"))
    assert [declared.name for declared in table.entities] == [entity.name for entity in entities]
    return FeatureView(
        name=table.name,
        entities=entities,
        ttl=NO_EXPIRY,
        schema=[
            Field(name=c.name, dtype=FIELD_TYPES[c.dtype], description=c.doc)
            for c in (*(declared.column for declared in table.entities), *table.columns)
        ],
        source=source,
        online=online,
        description=table.doc,
        tags=tags,
        owner="memoir",
    )


def _own_source(declared: schema.OwnView) -> FileSource | PushSource:
    """Return the source of a custom feature view: a file that no job of ours writes."""
    batch = FileSource(
        name=f"{declared.name}_source",
        path=dataset.path_of(declared, settings.data),
        file_format=ParquetFormat(),
        timestamp_field=declared.timestamp,
        created_timestamp_column=declared.created,
        tags=tags | {"optional": "true"},
    )
    return PushSource(name=f"{declared.name}_push", batch_source=batch) if declared.push else batch


def _own_view(declared: schema.OwnView) -> FeatureView:
    entity = user if declared.entity == "user" else item
    table = contract.table(declared.name)
    return FeatureView(
        name=declared.name,
        entities=[entity],
        ttl=timedelta(days=declared.ttl_days),
        schema=[
            Field(name=c.name, dtype=FIELD_TYPES[c.dtype], description=c.doc)
            for c in (*(key.column for key in table.entities), *declared.columns)
        ],
        source=_own_source(declared),
        online=True,
        # The newest row of each key stays: provider.py
        tags=tags | {"own": "true"},
    )


user = _entity(contract.user)
item = _entity(contract.item)
token_version = _entity(TOKEN_VERSION)
store_part = _entity(STORE_PART)

user_profile_source = _source("user_profile")
user_history_source = _source("user_history")
user_stats_source = _source("user_stats")
item_profile_source = _source("item_profile")
item_stats_source = _source("item_stats")
summary_tokens_source = _source("summary_tokens")
token_rows_source = _source("token_rows")
store_epoch_source = _source("store_epoch")

user_profile = _view([user], user_profile_source)
user_history = _view([user], user_history_source)
user_stats = _view([user], user_stats_source)
item_profile = _view([item], item_profile_source)
item_stats = _view([item], item_stats_source)
summary_tokens = _view([user, token_version], summary_tokens_source)
token_rows = _view([user, token_version], token_rows_source, online=False)
store_epoch = _view([store_part], store_epoch_source)


def _list_view(
    name: str, made_of: str, entities: list[Entity], fields: list[Field], doc: str
) -> FeatureView:
    """A view whose values are made when they are read: offline by our offline store, online by our provider."""
    more = {**tags, lists.MADE_OF: made_of}
    source = FileSource(
        name=f"{name}_source",
        # No table: nothing is materialized from it.
        path=f"{settings.home}/online/{name}",
        file_format=ParquetFormat(),
        timestamp_field=schema.EVENT_TIMESTAMP,
        tags={
            **more,
            "optional": "true",
            "home": settings.home,
            "length": str(contract.spec.num_history_online),
        },
        description=doc,
    )
    keys = [Field(name=e.join_key, dtype=from_value_type(e.value_type)) for e in entities]
    return FeatureView(
        name=name,
        entities=entities,
        ttl=NO_EXPIRY,
        schema=[*keys, *fields],
        source=source,
        description=doc,
        tags=more,
        owner="memoir",
    )


LIST_TYPES = {
    pa.int32(): Int32,
    pa.int64(): Int64,
    pa.float32(): Float32,
    pa.float64(): Float64,
    pa.string(): String,
    TIMESTAMP: UnixTimestamp,
}
user_sequence = _list_view(
    lists.HISTORY_VIEW,
    lists.HISTORY,
    [user],
    [
        Field(name=column.name, dtype=Array(LIST_TYPES[column.kind]), description=column.column.doc)
        for column in lists.list_columns(contract)
    ],
    f"A user's newest {contract.spec.num_history_online} events, oldest first, a list for each column.",
)
summary_token_values = _list_view(
    lists.TOKENS_VIEW,
    lists.TOKENS,
    [user, token_version],
    [
        Field(name=lists.VALUES, dtype=Array(Float32), description="all tokens, one after another"),
        Field(name=lists.NUMBER, dtype=Int32, description="how many tokens these are"),
    ],
    "A user's summary tokens of a version, as numbers.",
)

own_views = {declared.name: _own_view(declared) for declared in contract.spec.views}
user_views = [own_views[name] for name in contract.views_of("user")]
item_views = [own_views[name] for name in contract.views_of("item")]
# Feast registers what it finds by name in this module.
globals().update({f"own_view_{name}": view for name, view in own_views.items()})
globals().update(
    {
        f"own_source_{name}": view.stream_source or view.batch_source
        for name, view in own_views.items()
    }
)

# A service names what a kind of ranker reads; all of ours read the same. Training joins user
# statistics, which say how much of the history was known, and gathers late from the history log; a
# request reads the packed history as well.
ranking_v1 = FeatureService(
    name="ranking_v1",
    features=[user_profile, user_stats, *user_views, item_profile, item_stats, *item_views],
    description="what rankers train on",
    tags=tags,
)
ranking_v1_online = FeatureService(
    name="ranking_v1_online",
    features=[user_profile, user_stats, *user_views, user_history],
    description="what one request reads of its user",
    tags=tags,
)
# The same with summary tokens of the one version that a bundle names: by row number in training, as
# bytes online.
ranking_v1_tokens = FeatureService(
    name="ranking_v1_tokens",
    features=[
        user_profile,
        user_stats,
        *user_views,
        item_profile,
        item_stats,
        *item_views,
        token_rows,
    ],
    description="what rankers with summary tokens train on",
    tags=tags,
)
ranking_v1_tokens_online = FeatureService(
    name="ranking_v1_tokens_online",
    features=[user_profile, user_stats, *user_views, user_history, summary_tokens[["tokens"]]],
    description="what one request of a ranker with summary tokens reads of its user",
    tags=tags,
)
