"""An open-loop load generator: requests are sent when they are due, whether or not earlier ones were
answered, and latency counts from the moment a request was due.

A closed loop (one request after the other on each connection) sends less while a server stalls, and so
hides the stall: a server that stands still for one second in ten shows it a p99 of milliseconds.
`tests/reliability/test_openloop.py` shows both on such a server.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from hdrh.histogram import HdrHistogram

HIGHEST_US = 120_000_000  # of a latency that is told apart
GIVEN_UP_S = 30.0  # a request without an answer for so long counts as failed


@dataclass
class Outcome:
    """What came of the requests.

    Args:
        statuses: answers by status; 0 is no answer, -1 a connection that was refused.
        latency_us: of answers with status 200, from the moment each was due.
        refusal_us: of all other answers, from the moment each was sent.
    """

    statuses: Counter[int] = field(default_factory=Counter)
    latency_us: HdrHistogram = field(default_factory=lambda: HdrHistogram(1, HIGHEST_US, 3))
    refusal_us: HdrHistogram = field(default_factory=lambda: HdrHistogram(1, HIGHEST_US, 3))
    bodies: list[tuple[float, int, bytes]] = field(default_factory=list)  # due, status, body
    seconds: float = 0.0
    unscored: int = (
        0  # answers of the last fallback level, or without the user: not what was asked for
    )

    def ms(self, percentile: float) -> float:
        """A percentile of the latency of answers, milliseconds."""
        return float(self.latency_us.get_value_at_percentile(percentile)) / 1000

    @property
    def answered(self) -> int:
        return self.statuses[200]

    @property
    def per_second(self) -> float:
        return self.answered / self.seconds if self.seconds else 0.0


@dataclass(frozen=True)
class Target:
    """A server and what it is asked.

    Args:
        body: of a request by its number.
    """

    host: str
    port: int
    body: Callable[[int], bytes]
    path: str = "/v1/rank"

    def message(self, number: int) -> bytes:
        """The request as it goes over the wire."""
        body = self.body(number)
        head = (
            f"POST {self.path} HTTP/1.1\r\nHost: {self.host}\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\n\r\n"
        )
        return head.encode() + body


class Connections:
    """Connections to one server that are kept for the next request."""

    def __init__(self, target: Target) -> None:
        self._target = target
        self._free: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []

    async def ask(self, number: int) -> tuple[int, bytes]:
        """Status and body of the answer; status 0 for none, -1 where nobody listens."""
        message = self._target.message(number)
        for reused in (True, False):
            if reused and not self._free:
                continue
            try:
                found = (
                    self._free.pop()
                    if reused
                    else await asyncio.open_connection(self._target.host, self._target.port)
                )
            except OSError:
                return -1, b""
            reader, writer = found
            try:
                writer.write(message)
                status, body, stays = await _answer(reader)
            except (OSError, EOFError, ValueError):
                continue  # a kept connection may have been closed meanwhile: once more on a new one
            if stays:
                self._free.append(found)
            else:
                writer.close()
            return status, body
        return 0, b""

    def close(self) -> None:
        for _, writer in self._free:
            writer.close()
        self._free.clear()


async def _answer(reader: asyncio.StreamReader) -> tuple[int, bytes, bool]:
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower()
    status = int(head.split(" ", 2)[1])
    length = 0
    for line in head.split("\r\n")[1:]:
        name, _, value = line.partition(":")
        if name == "content-length":
            length = int(value)
    return status, await reader.readexactly(length), "connection: close" not in head


def poisson(per_second: float, seconds: float, seed: int = 0) -> list[float]:
    """Moments at which requests are due, from the beginning."""
    rng = random.Random(seed)  # noqa: S311  # load, no secret
    moments = []
    at = 0.0
    while (at := at + rng.expovariate(per_second)) < seconds:
        moments.append(at)
    return moments


async def open_loop(target: Target, moments: Sequence[float], *, keep: bool = False) -> Outcome:
    """Send each request when it is due.

    Args:
        keep: whether to keep the answers' bodies.
    """
    outcome = Outcome()
    connections = Connections(target)
    began = time.perf_counter()

    async def one(number: int, due: float) -> None:
        sent = time.perf_counter()
        try:
            async with asyncio.timeout(GIVEN_UP_S):
                status, body = await connections.ask(number)
        except TimeoutError:
            status = 0
            body = b""
        now = time.perf_counter()
        outcome.statuses[status] += 1
        if status == 200:
            outcome.unscored += b'"deadline"' in body or b'"store_unavailable"' in body
            outcome.latency_us.record_value(max(int(1e6 * (now - began - due)), 1))
        elif status > 0:
            outcome.refusal_us.record_value(max(int(1e6 * (now - sent)), 1))
        if keep:
            outcome.bodies.append((due, status, body))

    tasks = []
    for number, due in enumerate(moments):
        if (wait := began + due - time.perf_counter()) > 0:
            await asyncio.sleep(wait)
        tasks.append(asyncio.create_task(one(number, due)))
    await asyncio.gather(*tasks)
    connections.close()
    outcome.seconds = time.perf_counter() - began
    return outcome


async def closed_loop(target: Target, seconds: float, connections: int = 1) -> Outcome:
    """One request after the other on each connection, as fast as answers come: what a server can do at
    most, and the tool that hides a stall.
    """
    outcome = Outcome()
    began = time.perf_counter()

    async def one(first: int) -> None:
        kept = Connections(target)
        number = first
        while (sent := time.perf_counter()) < began + seconds:
            status, _ = await kept.ask(number)
            spent = max(int(1e6 * (time.perf_counter() - sent)), 1)
            outcome.statuses[status] += 1
            (outcome.latency_us if status == 200 else outcome.refusal_us).record_value(spent)
            number += connections
        kept.close()

    await asyncio.gather(*(one(first) for first in range(connections)))
    outcome.seconds = time.perf_counter() - began
    return outcome
