"""Feast stores as a server opens them: no request ever waits for a registry, no event for ever for Redis."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING

from sqlalchemy.exc import SQLAlchemyError

from feature_repo.home.redis_client import with_socket_timeout
from feature_repo.settings import Settings
from feature_repo.store.store import open_store
from serving.stores.last_seen import NothingSeenError, store_from_copy

if TYPE_CHECKING:
    from feast import FeatureStore

EVENT_STORE_S = 2.0


def open_pinned(settings: Settings) -> FeatureStore:
    """A store whose registry is read now and never again: Feast reads one that is older than its time to
    live anew in the middle of whatever request comes then, and waits for it.

    Where the registry's database is away, it is the one that a server of this home saw last.

    Raises:
        NothingSeenError: it is away, and none was seen.
    """
    try:
        store = open_store(settings)
        store.registry  # noqa: B018  # connects
    except SQLAlchemyError as error:
        try:
            return store_from_copy(settings)
        except NothingSeenError as nothing:
            raise NothingSeenError(
                f"the registry's database is away, and no server of this home has kept a copy ({nothing}): {error}"
            ) from error
    if hasattr(store.registry, "cached_registry_proto_ttl"):
        store.registry.cached_registry_proto_ttl = timedelta(0)  # for ever
    return store


def open_events_store(settings: Settings) -> FeatureStore:
    """Open a separate store for events, on Redis with a limit to each answer, so that one that stands
    still is an error and not a thread for ever.
    """
    store = open_pinned(settings)
    online = store.config.online_store
    if online.type.startswith("redis"):
        online.connection_string = with_socket_timeout(online.connection_string, EVENT_STORE_S)
    return store
