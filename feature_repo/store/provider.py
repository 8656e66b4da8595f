"""Feast's local provider, with one rule more: a key's newest row stays, whatever writes it and in
whatever order rows come. Feast's own stores let the last write win, so that a row that is pushed
late, or a file that is older than a push, would replace what is newer.

The rule holds for custom feature views on every way (`feast push`, `FeatureStore.push`,
`write_to_online_store`, `feast materialize`, our `materialize`), and for every view in `feast
materialize` and `materialize-incremental`, which would otherwise set back what events by HTTP have
made newer. At an equal time the row that comes later wins; of the rows that events by HTTP change,
whose times SQLite keeps in whole seconds, the stored one stays. Our own `materialize` alone may set
a view of ours back: after a correction the right row may be an older one.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from feast.infra.passthrough_provider import PassthroughProvider

from feature_repo.store.online_users import HISTORY, STATS, TOKENS, upsert_sqlite
from feature_repo.store.redis_writer import write_newest

# The tag of a custom feature view
OWN = "own"
Rows = list[tuple[Any, dict[str, Any], datetime, datetime | None]]


class MemoirProvider(PassthroughProvider):
    """See the module docstring. `offline_store.py`, which `feature_store.yaml` names, makes it the local
    provider: under a different name Feast would plan no change of tables, and forget which there are.
    """

    def online_write_batch(
        self, config: Any, table: Any, data: Rows, progress: Callable[[int], Any] | None
    ) -> None:
        """Write rows; of a custom view only the ones that are not older than what is stored."""
        if table.tags.get(OWN) == "true":
            write_if_newest(self.online_store, config, table, data, progress)
        else:
            super().online_write_batch(config, table, data, progress)

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
    if kind.startswith("redis"):
        write_newest(config, table.name, rows)
    elif kind == "sqlite":
        by_events = table.name in (HISTORY, STATS, TOKENS)
        upsert_sqlite(store._get_conn(config), config, table, rows, later=by_events)
    else:
        store.online_write_batch(config, table, rows, None)
    if progress:
        progress(len(rows))


def _utc(time: datetime) -> datetime:
    """A time as Feast hands it on, in UTC where it says nothing else."""
    return time if time.tzinfo else time.replace(tzinfo=UTC)
