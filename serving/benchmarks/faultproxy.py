"""A TCP proxy that does to a connection what networks and stores do: delay, throttle, cut, reset,
corrupt, answer nothing.

>>> async with FaultProxy("127.0.0.1", 6379) as proxy:
...     proxy.fault = Fault(delay_s=0.2)

What is random is seeded, so a failure replays.
"""

from __future__ import annotations

import asyncio
import random
import socket
import struct
from dataclasses import dataclass
from typing import Self

PIECE = 65_536


@dataclass(frozen=True)
class Fault:
    """What happens to bytes on their way back from the server.

    Args:
        delay_s: before each piece.
        bytes_per_s: at most; None for no limit.
        silent: nothing comes back, and the connection stays.
        refuse: new connections are reset, and those that are there.
        cut_after: bytes, after which a connection ends.
        corrupt: share of pieces in which one byte is another.
    """

    delay_s: float = 0.0
    bytes_per_s: float | None = None
    silent: bool = False
    refuse: bool = False
    cut_after: int | None = None
    corrupt: float = 0.0


NONE = Fault()


class FaultProxy:
    """See the module docstring.

    Args:
        host, port: of the server behind it.
        listen: its own port; 0 for any free one, which `port` then is.
    """

    def __init__(self, host: str, port: int, listen: int = 0, seed: int = 0) -> None:
        self._behind = (host, port)
        self._listen = listen
        self._rng = random.Random(seed)  # noqa: S311  # faults, no secret
        self._fault = NONE
        self._open: set[asyncio.StreamWriter] = set()

    @property
    def fault(self) -> Fault:
        return self._fault

    @fault.setter
    def fault(self, fault: Fault) -> None:
        self._fault = fault
        if fault.refuse:
            for writer in list(self._open):
                _reset(writer)

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self._listen)
        self.port: int = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *error: object) -> None:
        self._server.close()
        for writer in list(self._open):
            _reset(writer)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._fault.refuse:
            _reset(writer)
            return
        try:
            there, back = await asyncio.open_connection(*self._behind)
        except OSError:
            _reset(writer)
            return
        self._open |= {writer, back}
        ways = [
            asyncio.create_task(self._forth(reader, back)),
            asyncio.create_task(self._back(there, writer)),
        ]
        try:
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for way in ways:
                way.cancel()
            self._open -= {writer, back}
            for end in (writer, back):
                end.close()

    async def _forth(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(PIECE):
            writer.write(data)
            await writer.drain()

    async def _back(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        passed = 0
        while data := await reader.read(PIECE):
            fault = self._fault
            if fault.silent:
                continue
            if fault.delay_s:
                await asyncio.sleep(fault.delay_s)
            if fault.corrupt and self._rng.random() < fault.corrupt:
                at = self._rng.randrange(len(data))
                data = data[:at] + bytes([data[at] ^ self._rng.randrange(1, 256)]) + data[at + 1 :]
            if fault.cut_after is not None and passed + len(data) > fault.cut_after:
                writer.write(data[: max(fault.cut_after - passed, 0)])
                return
            passed += len(data)
            if fault.bytes_per_s is None:
                writer.write(data)
            else:
                for byte in data:
                    writer.write(bytes([byte]))
                    await asyncio.sleep(1 / fault.bytes_per_s)
            await writer.drain()


def _reset(writer: asyncio.StreamWriter) -> None:
    """End a connection as a crash does: a reset, not an orderly close."""
    connection = writer.get_extra_info("socket")
    if connection is not None and connection.fileno() >= 0:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.close()
