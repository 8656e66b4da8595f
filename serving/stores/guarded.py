"""The way from a request to the online store: within a time, and not at all while the store is known
to be away.
"""

from __future__ import annotations

import asyncio
import time
from typing import Protocol

from serving.api.pools import one_thread, run_in
from serving.stores.features import Reader, UserRow
from serving.stores.items import Id
from serving.stores.redis_hashes import ShardReadError, StoreReadError
from serving.stores.redis_reader import DamagedValueError


class AsyncReader(Protocol):
    """Reads users within a time."""

    async def read_user(self, user_id: Id, timeout_s: float) -> UserRow:
        """One user's features and history.

        Raises:
            StoreReadError: the store did not answer in time, or not as a store does.
        """


class ThreadedReader:
    """A reader that blocks, run on a separate thread: an embedded store, or any other through Feast.

    A read that hangs holds the thread until it ends; those behind it run into their time.
    """

    def __init__(self, reader: Reader) -> None:
        self._reader = reader
        self._thread = one_thread("store")

    async def read_user(self, user_id: Id, timeout_s: float) -> UserRow:
        try:
            reading = run_in(self._thread, self._reader.read_user, user_id)
            async with asyncio.timeout(timeout_s):
                return await reading
        except Exception as error:
            # Whatever a store's client raises
            raise StoreReadError(
                f"the online store did not answer within {1000 * timeout_s:.0f} ms: {type(error).__name__}: {error}"
            ) from error

    async def close(self) -> None:
        """End the thread, once what it reads is read."""
        self._thread.shutdown(wait=False, cancel_futures=True)


class GuardedReader:
    """A circuit breaker: after a few failures in a row the store is not asked, but for one request now
    and then, until one of those succeeds.

    Args:
        failures: in a row, until it opens.
        pause_s: between two requests that try whether the store is back.
    """

    def __init__(self, reader: AsyncReader, failures: int = 3, pause_s: float = 0.25) -> None:
        self._reader = reader
        self._failures = failures
        self._pause_s = pause_s
        self._failed = 0
        self._next_try = 0.0

    @property
    def open(self) -> bool:
        """True if the store is taken to be away."""
        return self._failed >= self._failures

    async def read_user(self, user_id: Id, timeout_s: float, *, counts: bool = True) -> UserRow:
        """See `AsyncReader`; while open, the error comes at once.

        Args:
            counts: whether a failure says anything of the store: not where the caller had less time left
                than a store is given, or any caller could shut it off for all.
        """
        if self.open:
            now = time.monotonic()
            if now < self._next_try:
                raise StoreReadError("the online store is away; it is tried again in a moment")
            # This request tries; others do not wait with it
            self._next_try = now + self._pause_s
        try:
            row = await self._reader.read_user(user_id, timeout_s)
        except (DamagedValueError, ShardReadError):
            # The store is well: of one user something is damaged, or one shard of many is away.
            raise
        except StoreReadError:
            if counts:
                self._failed += 1
                if self._failed == self._failures:
                    self._next_try = time.monotonic() + self._pause_s
            raise
        self._failed = 0
        return row

    async def close(self) -> None:
        close = getattr(self._reader, "close", None)
        if close is not None:
            await close()
