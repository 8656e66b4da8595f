"""How many requests a process takes on: bounded, and told at once, before a body is read.

A body that is still arriving takes no place: whoever sends a thousand of them slowly would otherwise
take all. How much of them is held is bounded by bytes; where that is reached, the body that has been
arriving for the longest is given up.

Nor is a request taken on that could not be answered in time behind those that wait already: a slow model
would otherwise spend itself on answers that come too late.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterator
from contextlib import contextmanager

from serving.errors import OverloadedError

STEP = 0.1  # of the moving mean


class Arriving:
    """A body on its way."""

    def __init__(self, timeout: asyncio.Timeout) -> None:
        self._timeout = timeout
        self.bytes = 0

    def give_up(self) -> None:
        """Its time is over now."""
        self._timeout.reschedule(asyncio.get_running_loop().time())


class Admission:
    """Counts requests under way.

    >>> with Admission(1).admitted():
    ...     pass

    Args:
        most: requests at a time; each beyond is refused.
        most_bytes: of bodies that are arriving.
        patience_s: for how long a request may wait for those before it.
    """

    def __init__(self, most: int, most_bytes: int = 64 << 20, patience_s: float = math.inf) -> None:
        self.most, self.most_bytes, self._patience_s = most, most_bytes, patience_s
        self._each_s = 0.0  # that a ranking takes of what all share; moves with the last ones
        self._waiting = 0  # rankings of the requests under way
        self.under_way = 0
        self._arriving: dict[Arriving, None] = {}  # in the order of their arrival
        self._bytes = 0

    @property
    def full(self) -> bool:
        """Whether there is no place."""
        return self.under_way >= self.most or (
            self.under_way > 0 and self._waiting * self._each_s >= self._patience_s
        )

    def took(self, seconds: float) -> None:
        """A ranking kept the others waiting for so long."""
        self._each_s += STEP * (seconds - self._each_s)

    def error(self) -> OverloadedError:
        """What is told whoever finds none."""
        return OverloadedError(
            f"{self.under_way} requests are under way, as many as this process answers in time: try again in a second, "
            "or elsewhere"
        )

    def refuse_if_full(self) -> None:
        """For a request whose body is not read yet.

        Raises:
            OverloadedError: there is no place.
        """
        if self.full:
            raise self.error()

    @contextmanager
    def admitted(self, rankings: int = 1) -> Iterator[None]:
        """A place, for as long as the block runs.

        Args:
            rankings: that the request comes to.

        Raises:
            OverloadedError: there is none left.
        """
        self.refuse_if_full()
        self.under_way += 1
        self._waiting += rankings
        try:
            yield
        finally:
            self.under_way -= 1
            self._waiting -= rankings

    @contextmanager
    def arriving(self, timeout: asyncio.Timeout) -> Iterator[Arriving]:
        """A body on its way, for as long as the block runs.

        Args:
            timeout: within which it is read.
        """
        body = Arriving(timeout)
        self._arriving[body] = None
        try:
            yield body
        finally:
            self._leave(body)

    def came(self, body: Arriving, number: int) -> None:
        """So many bytes of a body came."""
        if body not in self._arriving:  # given up, and on its way to its end
            return
        body.bytes += number
        self._bytes += number
        while self._bytes > self.most_bytes:
            self._leave(oldest := next(iter(self._arriving)))
            oldest.give_up()

    def _leave(self, body: Arriving) -> None:
        if body in self._arriving:
            del self._arriving[body]
            self._bytes -= body.bytes
