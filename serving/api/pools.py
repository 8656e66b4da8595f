"""The threads of a process that block, by what they are for: each is a pool of one, so that one kind of work
never waits for another.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from typing import Any, Literal, TypeVar

Result = TypeVar("Result")
Work = Literal["model", "large", "events", "explain", "tables", "store", "shadow"]


def one_thread(work: Work) -> ThreadPoolExecutor:
    """A pool of one thread, which profilers and logs show by the name of its work."""
    return ThreadPoolExecutor(max_workers=1, thread_name_prefix=work)


def run_in(
    pool: ThreadPoolExecutor, work: Callable[..., Result], *given: Any
) -> asyncio.Future[Result]:
    """Run something on a pool's thread, within the request that asks for it: lines that it logs name that request.

    Example:
        >>> await run_in(pools.model, sum, [1, 2])
        3
    """
    return asyncio.get_running_loop().run_in_executor(pool, copy_context().run, work, *given)


class Pools:
    """The pools that live as long as a server. A reader's `store` and a shadow's `shadow` live as long as
    theirs, and are closed with them.

    Example:
        >>> pools = Pools()
        >>> pools.model.submit(sum, [1, 2]).result()
        3
        >>> pools.close()
    """

    def __init__(self) -> None:
        # One model thread a process: two share one interpreter and are slower than one. A large request
        # comes to the model piece by piece, and small ones between its pieces.
        self.model = one_thread("model")
        self.large = one_thread("large")
        self.events = one_thread("events")
        self.explain = one_thread("explain")
        # Tables and catalogue may be slow, and must not delay an explanation.
        self.tables = one_thread("tables")

    def close(self) -> None:
        """End all threads once what they run is done; what waits is dropped."""
        for pool in (self.model, self.large, self.events, self.explain, self.tables):
            pool.shutdown(wait=False, cancel_futures=True)
