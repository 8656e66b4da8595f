"""HTTP servers beside one another, each with the same bare ASGI app: how fast, and what connections that mean no
good cost them.

Half a head: a hundred connections send one and wait; how many are open ten seconds later. Never reads: one
connection sends requests and reads no answer; by how much memory has grown six seconds later. Of servers that
are not installed here nothing is said; ours has granian alone.
"""

from __future__ import annotations

import asyncio
import importlib.util
import socket
import threading
import time
from typing import Any

from feature_repo.benchmarks import parser, report
from serving.benchmarks.faults import memory_mib
from serving.benchmarks.load import started
from serving.benchmarks.openloop import Target, closed_loop

APP = "serving.benchmarks.load:echo"
HEADER_S = 5  # for a head to arrive, where a server can be told
CONNECTIONS = 100
QUIET = ["--log-level", "error"]
HEADERS = ["--http1-header-read-timeout", str(1000 * HEADER_S)]
SERVERS = {
    "granian": [*QUIET, *HEADERS, "--interface", "asgi", "--no-ws", APP],
    "uvicorn": [*QUIET, "--timeout-keep-alive", str(HEADER_S), APP],
    "hypercorn": [*QUIET, "--keep-alive", str(HEADER_S), APP],
}
HEAD = b"POST /v1/rank HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


def main() -> None:
    """Run."""
    arguments = parser("serving.benchmarks.http_servers", __doc__).parse_args()
    seconds = 2.0 if arguments.quick else 8.0
    rows = []
    for name in SERVERS:
        if importlib.util.find_spec(name) is None:
            continue
        where = ["--bind", "127.0.0.1:{port}"] if name == "hypercorn" else ["--port", "{port}"]
        with started(name, *where, *SERVERS[name]) as running:
            rows.append({"server": name} | _measure(running.port, running.process.pid, seconds))
    report("http_servers", {"seconds": seconds, "header_s": HEADER_S}, rows, arguments.json)


def _measure(port: int, pid: int, seconds: float) -> dict[str, Any]:
    target = Target("127.0.0.1", port, lambda number: b"x" * 5_000)
    asyncio.run(closed_loop(target, 1.0, connections=8))
    one = asyncio.run(closed_loop(target, seconds))
    eight = asyncio.run(closed_loop(target, seconds, connections=8))
    return {
        "one caller /s": one.per_second,
        "p50_ms": one.ms(50),
        "eight callers /s": eight.per_second,
        "p99_ms": eight.ms(99),
        "half heads open after 10 s": half_heads(port),
        "never reads, MiB": never_reads(port, pid),
    }


def half_heads(port: int) -> int:
    """How many of a hundred connections are still open."""
    sockets = [socket.create_connection(("127.0.0.1", port)) for _ in range(CONNECTIONS)]
    for sock in sockets:
        sock.sendall(HEAD)
    time.sleep(2.0 * HEADER_S)
    kept = 0
    for sock in sockets:
        sock.setblocking(False)
        try:
            sock.recv(1)  # an answer, or the end
        except BlockingIOError:
            kept += 1  # nothing came, and nobody closed it
        except OSError:
            pass  # cut
        sock.close()
    return kept


def never_reads(port: int, pid: int) -> float:
    """By how many MiB a server has grown that answers one who does not read."""
    before = memory_mib(pid)
    body = b"x" * 5_000
    whole = HEAD + f"Content-Length: {len(body)}\r\n\r\n".encode() + body
    sock = socket.create_connection(("127.0.0.1", port))

    def send() -> None:
        try:
            while True:
                sock.sendall(whole)
        except OSError:
            return  # it was cut, or closed below

    threading.Thread(target=send, daemon=True).start()
    time.sleep(6.0)
    grown = memory_mib(pid) - before
    sock.close()
    return grown


if __name__ == "__main__":
    main()
