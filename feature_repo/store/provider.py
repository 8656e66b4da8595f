"""Feast's local provider, with one rule more for custom feature views: a key's newest row stays,
whatever writes it and in whatever order rows come. Feast's own stores let the last write win, so that a row that is pushed
late, or a file that is older than a push, would replace what is newer.

`feast push`, `FeatureStore.push`, `write_to_online_store` and our `materialize` go this way;
`feast materialize` goes past it. At an equal time the row that comes later wins.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from feast.infra.passthrough_provider import PassthroughProvider

from feature_repo.store.online_users import upsert_sqlite
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
        """Write rows; of a custom view only those that are not older than what is stored."""
        if table.tags.get(OWN) != "true":
            super().online_write_batch(config, table, data, progress)
            return
        rows = sorted(data, key=lambda row: (_utc(row[2]), _utc(row[3] or row[2])))
        kind = config.online_store.type
        if kind.startswith("redis"):
            write_newest(config, table.name, rows)
        elif kind == "sqlite":
            upsert_sqlite(self.online_store._get_conn(config), config, table, rows)
        else:
            super().online_write_batch(config, table, rows, None)
        if progress:
            progress(len(rows))

    async def online_write_batch_async(
        self, config: Any, table: Any, data: Rows, progress: Callable[[int], Any] | None
    ) -> None:
        if table.tags.get(OWN) == "true":
            self.online_write_batch(config, table, data, progress)
            return
        await super().online_write_batch_async(config, table, data, progress)


def _utc(time: datetime) -> datetime:
    """A time as Feast hands it on, in UTC where it says nothing else."""
    return time if time.tzinfo else time.replace(tzinfo=UTC)
