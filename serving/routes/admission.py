"""How many requests a process takes on: bounded, and told at once, before a body is read.

A body that is still arriving takes no place: a client that sends a thousand of them slowly would otherwise
take all. How much of them is held is bounded by bytes; where that is reached, the body that has been
arriving for the longest is given up.

Nor is a request taken on that could not be answered in time behind the waiting ones: a slow model
would otherwise spend itself on answers that come too late. A place is for 500 candidates: a request for
more takes more of them, and all such requests together half of the places at most.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from serving.api.errors import OverloadedError

# Weight of the newest in the moving mean
STEP = 0.1
OF_A_PLACE = 500  # candidates
# Candidates that cost as much as all of a ranking that does not depend on how many there are
FIXED = 100


@dataclass(frozen=True)
class Weight:
    """The share of the admitted work that a request takes.

    Args:
        places: how many of all.
        rankings: of 500 candidates that it costs as much as.
    """

    places: int = 1
    rankings: float = 1.0

    @staticmethod
    def of(candidates: Sequence[int]) -> Weight:
        """Weigh one ranking for each number of candidates, one after the other."""
        places = max(math.ceil(max(candidates) / OF_A_PLACE), 1)
        cost = sum(FIXED + number for number in candidates) / (FIXED + OF_A_PLACE)
        return Weight(places, cost)


USUAL = Weight()


class Arriving:
    """A body on its way."""

    def __init__(self, timeout: asyncio.Timeout) -> None:
        self._timeout = timeout
        self.bytes = 0

    def give_up(self) -> None:
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
        self.most = most
        self.most_bytes = most_bytes
        self._patience_s = patience_s
        # Seconds that a ranking takes of what all share; moves with the last ones
        self._each_s = 0.0
        # Weights of the requests under way
        self._weights: list[Weight] = []
        # Requests in the order of their arrival
        self._arriving: dict[Arriving, None] = {}
        self._bytes = 0

    @property
    def under_way(self) -> int:
        return len(self._weights)

    @property
    def full(self) -> bool:
        """True if there is no place for a usual request."""
        return self._refuses(USUAL)

    def _refuses(self, weight: Weight) -> bool:
        if not self._weights:
            return False
        taken = sum(other.places for other in self._weights)
        if weight.places > 1:
            large = sum(other.places for other in self._weights if other.places > 1)
            if large and large + weight.places > self.most // 2:
                return True
        # Between pieces of a large request a small one comes to the model: it waits for its like.
        waiting = sum(min(other.rankings, weight.rankings) for other in self._weights)
        return taken >= self.most or waiting * self._each_s >= self._patience_s

    def took(self, seconds: float, rankings: float = 1.0) -> None:
        """So many rankings of 500 candidates kept the others waiting for so long."""
        self._each_s += STEP * (seconds / rankings - self._each_s)

    def error(self) -> OverloadedError:
        """The error for a request that finds no place."""
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
    def admitted(self, weight: Weight = USUAL) -> Iterator[None]:
        """Places for a request, for as long as the block runs.

        Raises:
            OverloadedError: there are none left.
        """
        if self._refuses(weight):
            raise self.error()
        self._weights.append(weight)
        try:
            yield
        finally:
            self._weights.remove(weight)

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
        # Given up, and on its way to its end
        if body not in self._arriving:
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
