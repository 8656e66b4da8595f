"""Feast's local provider, with one rule more: a key's newest row stays, whatever writes it and in
whatever order rows come. Feast's own stores let the last write win, so that a row that is pushed
late, or a file that is older than a push, would replace what is newer.

The rule holds for custom feature views on every way (`feast push`, `FeatureStore.push`,
`write_to_online_store`, `feast materialize`, our `materialize`), and for every view in `feast
materialize` and `materialize-incremental`, which would otherwise set back what events by HTTP have
made newer. At an equal time the row that comes later wins; of the rows that events by HTTP change,
whose times SQLite keeps in whole seconds, the stored one stays, and so does every row of a user of whom
the log holds an event: Feast's command cannot add it. Our own `materialize` alone may set a view of ours
back: after a correction the right row may be an older one.

And it reads views that have no row of their own: a history as lists, summary tokens as numbers
(`feature_repo/history/lists.py`), made of what `user_history` and `summary_tokens` hold.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from copy import copy
from datetime import UTC, datetime
from typing import Any

from feast.infra.online_stores.online_store import OnlineStore
from feast.infra.passthrough_provider import PassthroughProvider
from feast.online_response import OnlineResponse
from feast.protos.feast.types.Value_pb2 import Value
from feast.type_map import python_values_to_proto_values

from feature_repo import datasets
from feature_repo.history import lists
from feature_repo.history.envelope import from_bytes
from feature_repo.history.lists import MADE_OF
from feature_repo.home.redis_client import async_client_of, client_of
from feature_repo.store.event_log import log_of
from feature_repo.store.online_users import HISTORY as HISTORY_OF
from feature_repo.store.online_users import STATS, TOKENS, plain_value, upsert_sqlite
from feature_repo.store.redis_writer import write_newest

# The tag of a custom feature view
OWN = "own"
Rows = list[tuple[Any, dict[str, Any], datetime, datetime | None]]
# A key's time and values; none of a key that is not there
Read = tuple[datetime | None, dict[str, Any] | None]


class MemoirProvider(PassthroughProvider):
    """See the module docstring. `offline_store.py`, which `feature_store.yaml` names, makes it the local
    provider: under a different name Feast would plan no change of tables, and forget which there are.
    """

    def online_write_batch(
        self, config: Any, table: Any, data: Rows, progress: Callable[[int], Any] | None
    ) -> None:
        """Write rows; of a custom view, and of tokens, only the ones that are not older than what is stored."""
        if table.tags.get(OWN) == "true":
            write_if_newest(self.online_store, config, table, data, progress)
        elif table.name == TOKENS and config.online_store.type == "sqlite":
            upsert_sqlite(self.online_store._get_conn(config), config, table, data)
        else:
            super().online_write_batch(config, table, data, progress)

    _online_store: Any

    @property
    def online_store(self) -> Any:
        """Feast's own store; of Redis one whose clients are those of Memoir's settings."""
        if self._online_store is None and self.repo_config.online_store.type == "redis":
            self._online_store = _redis_store()
        return super().online_store

    @property
    def batch_engine(self) -> Any:
        """Feast's engine, by which `feast materialize` writes; what it writes replaces nothing newer."""
        engine = super().batch_engine
        if not isinstance(engine.online_store, NewestStays):
            engine.online_store = NewestStays(engine.online_store)
        return engine

    async def online_write_batch_async(
        self, config: Any, table: Any, data: Rows, progress: Callable[[int], Any] | None
    ) -> None:
        if table.tags.get(OWN) == "true":
            self.online_write_batch(config, table, data, progress)
            return
        await super().online_write_batch_async(config, table, data, progress)

    def get_online_features(self, *arguments: Any, **named: Any) -> OnlineResponse:
        return MadeWhenRead(self.online_store).get_online_features(*arguments, **named)

    async def get_online_features_async(self, *arguments: Any, **named: Any) -> OnlineResponse:
        store = MadeWhenRead(self.online_store)
        return await store.get_online_features_async(*arguments, **named)

    def online_read(
        self, config: Any, table: Any, entity_keys: list[Any], requested_features: Any = None
    ) -> list[Read]:
        store = MadeWhenRead(self.online_store)
        return store.online_read(config, table, entity_keys, requested_features)

    async def online_read_async(
        self, config: Any, table: Any, entity_keys: list[Any], requested_features: Any = None
    ) -> list[Read]:
        store = MadeWhenRead(self.online_store)
        return await store.online_read_async(config, table, entity_keys, requested_features)


def _redis_store() -> OnlineStore:
    """Feast's Redis store with clients of Memoir's settings (`home/redis_client.py`): an address may be a URL, a password is
    what it is, and Sentinels have users of their own. Layout and every answer are Feast's.
    """
    # An extra: not where another store is in use
    from feast.infra.online_stores.redis import RedisOnlineStore

    class RedisStore(RedisOnlineStore):
        _client: Any = None
        _client_async: Any = None

        def _get_client(self, online_store_config: Any) -> Any:
            if self._client is None:
                self._client = client_of(online_store_config)
            return self._client

        async def _get_client_async(self, online_store_config: Any) -> Any:
            if self._client_async is None:
                self._client_async = async_client_of(online_store_config)
            return self._client_async

    store: OnlineStore = RedisStore()
    return store


class MadeWhenRead(OnlineStore):
    """An online store of Feast's that also reads views which are made of other views' values.

    Args:
        store: that holds those values, and reads everything else as it does.
    """

    def __init__(self, store: Any) -> None:
        self._store = store

    @property
    def async_supported(self) -> Any:
        return self._store.async_supported

    def update(self, *arguments: Any, **named: Any) -> None:
        self._store.update(*arguments, **named)

    def teardown(self, *arguments: Any, **named: Any) -> None:
        self._store.teardown(*arguments, **named)

    def online_write_batch(self, *arguments: Any, **named: Any) -> None:
        self._store.online_write_batch(*arguments, **named)

    def online_read(
        self, config: Any, table: Any, entity_keys: list[Any], requested_features: Any = None
    ) -> list[Read]:
        if MADE_OF not in table.tags:
            rows: list[Read] = self._store.online_read(
                config, table, entity_keys, requested_features
            )
            return rows
        read = _underlying(table)
        rows = self._store.online_read(config, read, entity_keys, [_feature(table)])
        return _made(table, entity_keys, rows, requested_features)

    async def online_read_async(
        self, config: Any, table: Any, entity_keys: list[Any], requested_features: Any = None
    ) -> list[Read]:
        if MADE_OF not in table.tags:
            rows: list[Read] = await self._store.online_read_async(
                config, table, entity_keys, requested_features
            )
            return rows
        read = _underlying(table)
        rows = await self._store.online_read_async(config, read, entity_keys, [_feature(table)])
        return _made(table, entity_keys, rows, requested_features)

    def _is_versioned_read_supported(self) -> bool:
        return bool(self._store._is_versioned_read_supported())

    def _read_features_per_fv(self, config: Any, grouped_refs: Any, *more: Any) -> None:
        # A store may read all of its own views in one go.
        if stored := [ref for ref in grouped_refs if MADE_OF not in ref[0].tags]:
            self._store._read_features_per_fv(config, stored, *more)
        if made := [ref for ref in grouped_refs if MADE_OF in ref[0].tags]:
            super()._read_features_per_fv(config, made, *more)

    async def _read_features_per_fv_async(self, config: Any, grouped_refs: Any, *more: Any) -> None:
        if stored := [ref for ref in grouped_refs if MADE_OF not in ref[0].tags]:
            await self._store._read_features_per_fv_async(config, stored, *more)
        if made := [ref for ref in grouped_refs if MADE_OF in ref[0].tags]:
            await super()._read_features_per_fv_async(config, made, *more)


def _underlying(view: Any) -> Any:
    """The view that holds the stored values."""
    found = copy(view)
    found.name = HISTORY_OF if view.tags[MADE_OF] == lists.HISTORY else TOKENS
    found.projection = copy(view.projection)
    found.projection.name = found.name
    return found


def _feature(view: Any) -> str:
    """The feature of that view."""
    return "history" if view.tags[MADE_OF] == lists.HISTORY else "tokens"


def _made(
    view: Any, entity_keys: list[Any], rows: list[Read], requested: list[str] | None
) -> list[Read]:
    """Rows of a view of the values that were read.

    Args:
        requested: features; None: all.
    """
    contract = datasets.load_contract(view.tags["dataset"])
    kinds = {
        feature.name: feature.dtype.to_value_type()
        for feature in view.features
        if requested is None or feature.name in requested
    }
    found: list[Read] = []
    for key, (time, values) in zip(entity_keys, rows, strict=True):
        stored = plain_value((values or {}).get(_feature(view)) or Value())
        if stored is None:
            found.append((None, None))
            continue
        (user,) = (
            plain_value(value)
            for name, value in zip(key.join_keys, key.entity_values, strict=True)
            if name == contract.user.join_key
        )
        if view.tags[MADE_OF] == lists.HISTORY:
            made: dict[str, Any] = lists.packed_lists(contract, user, stored, kinds)
        else:
            made = lists.token_values(from_bytes(stored, user))
        protos = {
            name: python_values_to_proto_values([made[name]], kind)[0]
            for name, kind in kinds.items()
        }
        found.append((time, protos))
    return found


class NewestStays:
    """An online store of Feast's in which a write replaces nothing that is newer.

    Args:
        store: to which everything else goes as it is.
    """

    def __init__(self, store: Any) -> None:
        self._store = store

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def online_write_batch(
        self, config: Any, table: Any, data: Rows, progress: Callable[[int], Any] | None
    ) -> None:
        write_if_newest(self._store, config, table, data, progress)


def write_if_newest(
    store: Any, config: Any, table: Any, data: Rows, progress: Callable[[int], Any] | None
) -> None:
    """Write rows of a view that are not older than what is stored; on a store that can compare."""
    rows = sorted(data, key=lambda row: (_utc(row[2]), _utc(row[3] or row[2])))
    kind = config.online_store.type
    by_events = table.name in (HISTORY_OF, STATS, TOKENS)
    if by_events:
        rows = _without_logged(config, rows)
    if kind.startswith("redis"):
        write_newest(config, table.name, rows)
    elif kind == "sqlite":
        upsert_sqlite(store._get_conn(config), config, table, rows, later=by_events)
    else:
        store.online_write_batch(config, table, rows, None)
    if progress:
        progress(len(rows))


def _without_logged(config: Any, rows: Rows) -> Rows:
    """Rows of users of whom the log holds nothing."""
    log = log_of(config)
    if log is None:
        return rows
    with closing(log):
        logged = set(log.users())
    return [row for row in rows if not logged & set(map(plain_value, row[0].entity_values))]


def _utc(time: datetime) -> datetime:
    """A time as Feast hands it on, in UTC where it says nothing else."""
    return time if time.tzinfo else time.replace(tzinfo=UTC)
