"""The load generator tells the truth about a server that stalls, and a closed loop does not."""

from __future__ import annotations

import asyncio

from serving.benchmarks.openloop import Target, closed_loop, open_loop, poisson

STALL_S, EVERY_S = 0.3, 3.0


async def stalling() -> asyncio.Server:
    """Answers at once, but stands still for a tenth of the time."""
    loop = asyncio.get_running_loop()
    began = loop.time()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                await reader.readuntil(b"\r\n\r\n")
                into = (loop.time() - began) % EVERY_S
                if into < STALL_S:
                    await asyncio.sleep(STALL_S - into)
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()

    return await asyncio.start_server(serve, "127.0.0.1", 0)


def test_the_stall_that_a_closed_loop_hides_is_seen() -> None:
    async def both() -> tuple[float, float]:
        async with await stalling() as server:
            target = Target("127.0.0.1", server.sockets[0].getsockname()[1], lambda number: b"")
            closed = await closed_loop(target, EVERY_S)
            opened = await open_loop(target, poisson(200, EVERY_S))
        assert set(opened.statuses) == set(closed.statuses) == {200}
        return closed.ms(99), opened.ms(99)

    hidden, seen = asyncio.run(both())
    # A tenth of all moments wait for up to the whole stall, evenly: a percentile of 99 is nine tenths of it.
    assert seen > 0.6 * 1000 * STALL_S
    assert hidden < 0.2 * 1000 * STALL_S


def test_a_request_without_an_answer_is_counted() -> None:
    async def ask() -> dict[int, int]:
        target = Target("127.0.0.1", 1, lambda number: b"")
        return dict((await open_loop(target, [0.0, 0.01])).statuses)

    assert asyncio.run(ask()) == {-1: 2}
