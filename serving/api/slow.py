"""The slowest requests of the last hour, with their stages: what a histogram cannot say."""

from __future__ import annotations

import heapq
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

from msgspec import Struct

KEPT = 100
MINUTES = 60


class SlowRequest(Struct):
    """One request, without its user: its id stands in the caller's log."""

    arrived_at: datetime
    route: str
    status: int
    ms: float
    request_id: str
    # Milliseconds by stage; empty where it was refused before
    timings_ms: dict[str, float]


class SlowResponse(Struct):
    """The slowest requests of the last hour that one process answered, the slowest first."""

    requests: list[SlowRequest]


class Slowest:
    """Keeps the slowest requests of each minute for an hour.

    Example:
        >>> slowest = Slowest()
        >>> slowest.add("/v1/rank", 200, 0.25, "r-1", {"score": 240.0})
        >>> slowest.all()[0].ms
        250.0

    Args:
        kept: how many.
        minutes: for how many.
    """

    def __init__(self, kept: int = KEPT, minutes: int = MINUTES) -> None:
        self._kept = kept
        # The slowest of each minute, as a heap: an hour's are among them, whichever minutes it has.
        self._minutes: deque[tuple[int, list[_Timed]]] = deque(maxlen=minutes)
        self._span = minutes

    def add(
        self,
        route: str,
        status: int,
        seconds: float,
        request_id: str,
        timings_ms: Mapping[str, float],
    ) -> None:
        """Keep a request that was answered just now, if it is among the slowest."""
        minute = int(time.monotonic() // 60)
        if not self._minutes or self._minutes[-1][0] != minute:
            self._minutes.append((minute, []))
        heap = self._minutes[-1][1]
        if len(heap) == self._kept and seconds <= heap[0].seconds:
            return
        arrived = datetime.now(UTC) - timedelta(seconds=seconds)
        ms = round(1000 * seconds, 3)
        asked = SlowRequest(arrived, route, status, ms, request_id, dict(timings_ms))
        if len(heap) == self._kept:
            heapq.heapreplace(heap, _Timed(seconds, asked))
        else:
            heapq.heappush(heap, _Timed(seconds, asked))

    def all(self) -> list[SlowRequest]:
        """Those of the last hour, the slowest first."""
        oldest = int(time.monotonic() // 60) - self._span
        young = [one for minute, heap in self._minutes if minute > oldest for one in heap]
        slowest = sorted(young, key=lambda one: one.seconds, reverse=True)
        return [one.request for one in slowest[: self._kept]]


@dataclass(frozen=True, order=True)
class _Timed:
    """A request by its time alone."""

    seconds: float
    request: SlowRequest = field(compare=False)
