"""Feast's Redis store with clients of Memoir's settings (`redis_client.py`): an address may be a URL, a password is what
it is, and Sentinels have users of their own. Layout and every answer are Feast's.
"""

from __future__ import annotations

from typing import Any

from feast.infra.online_stores.redis import RedisOnlineStore

from feature_repo.store.redis_client import async_client_of, client_of


class RedisStore(RedisOnlineStore):  # type: ignore[misc]  # Feast has no types
    """See the module docstring."""

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
