"""What the server does while its store fails and while callers mean no good: every answer counted.

Of the dataset in force, whose bundle is live: its tables are sent to a Redis that is started here, with a
registry of its own, and served from there. Under a light open-loop load Redis is stopped for two seconds,
and killed and started empty; then a hundred connections at a time do what no caller should. Client, Redis
and server share this machine's cores.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from feature_repo.benchmarks import parser, report
from feature_repo.datasets import load_contract
from feature_repo.home.tables import JobFolder
from feature_repo.settings import CHECKOUT, Settings
from serving.benchmarks.openloop import Outcome, Target, open_loop, poisson
from serving.benchmarks.redises import Redis, connects, wait_for
from serving.command import listenable

DEADLINE_MS = 400.0
HEADER_S = 2
RATE = 25.0  # requests a second
CANDIDATES = 20
FAULTS = ("stands still", "is killed and comes back empty")
ABUSES = (
    "sends nothing",
    "half a head",
    "endless head",
    "slow body",
    "huge body",
    "never reads",
)
SERVE = {
    "MEMOIR_SERVE_DEADLINE_MS": str(DEADLINE_MS),
    "MEMOIR_SERVE_STORE_MS": "50",
    "MEMOIR_SERVE_HEADER_S": str(HEADER_S),
    "MEMOIR_SERVE_WATCH_S": "0.2",
    "MEMOIR_SERVE_BODY_S": "2",
}


@dataclass
class Site:
    """A server process, its store, and how to refill that."""

    port: int
    process: subprocess.Popen[bytes]
    redis: Redis
    fill: Callable[[], None]
    users: list[Any]
    items: list[Any]

    @property
    def target(self) -> Target:
        """Requests of all customers in turn."""
        return Target("127.0.0.1", self.port, self.body)

    def body(self, number: int) -> bytes:
        """A request of a few candidates."""
        start = number % (len(self.items) - CANDIDATES)
        asked = {
            "user_id": self.users[number % len(self.users)],
            "candidates": self.items[start : start + CANDIDATES],
        }
        return json.dumps(asked).encode()

    def get(self, path: str) -> tuple[int, Any]:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=10) as found:
                return found.status, json.loads(found.read())
        except urllib.error.HTTPError as error:
            return error.code, json.loads(error.read())

    def ready(self) -> bool:
        return self.get("/readyz")[0] == 200

    def load(self, seconds: float) -> Outcome:
        return asyncio.run(open_loop(self.target, poisson(RATE, seconds, seed=1), keep=True))


@dataclass(frozen=True)
class Weathered:
    """What came of a store that failed for two seconds of six.

    Args:
        unready_s: from the fault until the server said so.
        ready_s: from the store's being well again, and filled, until the server said so.
        said: what answers had to do without, by time: before, during, after.
        empty: what `/readyz` said of a store that came back empty.
    """

    outcome: Outcome
    unready_s: float
    ready_s: float
    said: tuple[set[str], set[str], set[str]]
    empty: str = ""


def weather(site: Site, fault: str) -> Weathered:
    """The store fails under load, and comes back."""
    unready: list[float] = []

    def fail() -> None:
        site.redis.send(signal.SIGSTOP if fault == FAULTS[0] else signal.SIGKILL)
        unready.append(wait_for(lambda: not site.ready(), 10))

    def come_back() -> None:
        if fault == FAULTS[0]:
            site.redis.send(signal.SIGCONT)
        else:
            site.redis.start()

    timers = [threading.Timer(1.0, fail), threading.Timer(3.0, come_back)]
    for timer in timers:
        timer.start()
    outcome = site.load(6.0)
    for timer in timers:
        timer.join()
    said = (
        degraded_of(outcome, 0.0, 0.9),
        degraded_of(outcome, 1.3, 2.9),
        degraded_of(outcome, 4.2, 6.0),
    )
    empty = ""
    if fault != FAULTS[0]:
        empty = str(site.get("/readyz")[1].get("message", ""))
        site.fill()
    return Weathered(outcome, unready[0], wait_for(site.ready, 30), said, empty)


def degraded_of(outcome: Outcome, since: float, until: float) -> set[str]:
    """What answers to requests of this time had to do without."""
    found: set[str] = set()
    for due, status, body in outcome.bodies:
        if since <= due < until and status == 200:
            found |= set(json.loads(body)["degraded"])
    return found


@dataclass(frozen=True)
class Withstood:
    """What came of connections that did what no caller should.

    Args:
        kept: of them, after ten seconds.
        grown_mib: memory of the server.
    """

    outcome: Outcome
    connections: int
    kept: int
    grown_mib: float


def withstand(site: Site, abuse: str, most: int = 100) -> Withstood:
    """Many connections do it at once, while others are served.

    Args:
        most: connections; of those that send as fast as they can a few.
    """
    before = memory_mib(site.process.pid)
    number = {"endless head": 4, "huge body": 4, "never reads": 2}.get(abuse, most)
    sockets = [socket.create_connection(("127.0.0.1", site.port)) for _ in range(number)]
    head = b"POST /v1/rank HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    asked = site.body(0)
    whole = head + f"Content-Length: {len(asked)}\r\n\r\n".encode() + asked
    stop = threading.Event()

    def send(sock: socket.socket) -> None:
        try:
            if abuse == "half a head":
                sock.sendall(head)
            elif abuse == "endless head":
                sock.sendall(head)
                while not stop.is_set():
                    sock.sendall(b"X-Padding: " + b"x" * 4_000 + b"\r\n")
            elif abuse == "slow body":
                sock.sendall(head + b"Content-Length: 1000\r\n\r\n")
                while not stop.wait(0.2):
                    sock.sendall(b" ")
            elif abuse == "huge body":
                sock.sendall(head + b"Transfer-Encoding: chunked\r\n\r\n")
                while not stop.is_set():
                    sock.sendall(b"10000\r\n" + b" " * 65_536 + b"\r\n")
            elif abuse == "never reads":
                while not stop.is_set():
                    sock.sendall(whole)
        except OSError:
            return  # they were cut

    for sock in sockets:
        threading.Thread(target=send, args=(sock,), daemon=True).start()
    outcome = site.load(HEADER_S + 2.0)
    grown = memory_mib(site.process.pid) - before
    stop.set()
    kept = 0
    if abuse != "never reads":  # one that is never read from stands still by itself
        for sock in sockets:
            sock.settimeout(10)
            kept += not ended(sock)
    for sock in sockets:
        sock.close()
    return Withstood(outcome, number, kept, grown)


def memory_mib(pid: int) -> float:
    """Of a process and its children."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    total = 0.0
    for one in [pid, *map(int, children)]:
        for line in Path(f"/proc/{one}/status").read_text().splitlines():
            if line.startswith("VmRSS"):
                total += int(line.split()[1]) / 1024
    return total


def ended(sock: socket.socket) -> bool:
    """Whether the server has closed a connection, or refused what came over it."""
    try:
        while data := sock.recv(65_536):
            if any(status in data for status in (b" 408 ", b" 413 ", b" 431 ", b" 400 ")):
                return True
    except TimeoutError:
        return False
    except OSError:
        return True
    return True


@contextmanager
def site_of(settings: Settings) -> Iterator[Site]:
    """The live bundle of a dataset over a Redis and a registry of its own."""
    contract = load_contract(settings.dataset)
    users = JobFolder(settings.home, "user_history").read("user_history")
    items = JobFolder(settings.home, "item_stats").read("item_stats")
    with tempfile.TemporaryDirectory(prefix="memoir-faults-") as folder:
        redis = Redis(listenable("127.0.0.1", 0), Path(folder))
        redis.start()
        environment = {
            **os.environ,
            **SERVE,
            "MEMOIR_PROFILE": "production",
            "MEMOIR_DATASET": settings.dataset,
            "MEMOIR_HOME": settings.root,
            "MEMOIR_CATALOGUE": settings.catalogue_url,
            "MEMOIR_REDIS": f"127.0.0.1:{redis.port}",
            "MEMOIR_REGISTRY_URL": f"sqlite:///{folder}/registry.db",
        }

        def run(*words: str) -> None:
            subprocess.run(
                [sys.executable, "-m", *words],
                env=environment,
                cwd=CHECKOUT,
                check=True,
                stdout=subprocess.DEVNULL,
            )

        def fill() -> None:
            run("beam_jobs", "materialize", "--runner=FnApiRunner", "--force")

        port = listenable("127.0.0.1", 0)
        try:
            run("feature_repo", "apply")
            fill()
            process = subprocess.Popen(
                [sys.executable, "-m", "serving", "--port", str(port), "--replay"],
                env=environment,
                cwd=CHECKOUT,
                stdout=subprocess.DEVNULL,
            )
            made = Site(
                port,
                process,
                redis,
                fill,
                users[contract.user.join_key].unique().to_pylist()[:500],
                items[contract.item.join_key].unique().to_pylist()[:500],
            )
            try:
                wait_for(lambda: connects(port) and made.ready(), 120)
                made.load(2.0)  # warm
                yield made
            finally:
                process.terminate()
                process.wait(timeout=30)
        finally:
            if redis.process is not None:
                redis.process.kill()
                redis.process.wait(timeout=10)


def main() -> None:
    """Run."""
    flags = parser("serving.benchmarks.faults", __doc__)
    flags.add_argument("--rounds", type=int, default=3, help="of each failure of the store")
    arguments = flags.parse_args()
    if not shutil.which("redis-server"):
        raise SystemExit("redis-server is not installed")
    rows: list[dict[str, Any]] = []
    with site_of(Settings.from_env()) as site:
        for fault in FAULTS:
            for _ in range(1 if arguments.quick else arguments.rounds):
                found = weather(site, fault)
                rows.append(
                    _row(f"Redis {fault}", found.outcome)
                    | {
                        "unready_s": found.unready_s,
                        "ready_s": found.ready_s,
                        "said during": ", ".join(sorted(found.said[1])),
                    }
                )
        for abuse in ABUSES[1:2] if arguments.quick else ABUSES:
            stood = withstand(site, abuse)
            rows.append(
                _row(f"{stood.connections} connections: {abuse}", stood.outcome)
                | {"kept": stood.kept, "grown_mib": stood.grown_mib}
            )
    config = {"deadline_ms": DEADLINE_MS, "rate": RATE, "candidates": CANDIDATES}
    report("faults", config, rows, arguments.json)


def _row(what: str, outcome: Outcome) -> dict[str, Any]:
    answers = sum(outcome.statuses.values())
    return {
        "what": what,
        "requests": answers,
        "not 200": answers - outcome.answered,
        "p99_ms": outcome.ms(99),
        "max_ms": outcome.ms(100),
    }


if __name__ == "__main__":
    main()
