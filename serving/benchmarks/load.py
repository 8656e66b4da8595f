"""What a server does under load: one caller, capacity, open loop below it, three times of it, and what
comes after.

Of the dataset in force, whose bundle is live; or, with `--ranker`, of an untrained ranker of a given size
over made-up users and a Redis that is started here. Server processes are started here, on a free port;
client, store and server share this machine's cores, and all figures are of that. Latency counts from the
moment a request is due (`openloop.py`). Floor: a bare ASGI app on the same HTTP server, which reads the body
and answers as many ids.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from feature_repo.benchmarks import parser, report
from feature_repo.datasets import load_contract
from feature_repo.home.catalogue import Catalogue
from feature_repo.home.tables import JobFolder
from feature_repo.settings import Settings
from serving.benchmarks.openloop import Outcome, Target, closed_loop, open_loop, poisson
from serving.command import listenable
from serving.stores.items import published_rows

CANDIDATES = 500
START_S = 120.0


def main() -> None:
    """Run."""
    flags = parser("serving.benchmarks.load", __doc__)
    flags.add_argument("--seconds", type=float, default=20.0, help="of each part (default 20)")
    flags.add_argument("--processes", type=int, default=1, help="of the server (default 1)")
    flags.add_argument("--rate", type=float, help="requests a second; default: 0.6 of capacity")
    flags.add_argument("--ranker", choices=["live", "small", "base"], default="live")
    arguments = flags.parse_args()
    seconds = 4.0 if arguments.quick else arguments.seconds
    rows: list[dict[str, Any]] = []
    with _site(arguments.ranker) as site:
        with served("serving.benchmarks.load:echo", arguments.processes) as echoes:
            rows += asyncio.run(_floor(Target("127.0.0.1", echoes.port, site.bodies), seconds))
        with server(arguments.processes, **site.variables) as running:
            target = Target("127.0.0.1", running.port, site.bodies)
            rows.append({"part": "start to ready", "p50_ms": 1000 * running.started_s})
            rows += asyncio.run(_parts(target, seconds, arguments.rate))
    config = {
        "bundle": site.name,
        "candidates": CANDIDATES,
        "processes": arguments.processes,
        "seconds": seconds,
    }
    report("load", config, rows, arguments.json)


class Site(NamedTuple):
    """What is asked of which bundle."""

    name: str
    bodies: Callable[[int], bytes]
    variables: dict[str, str]  # of the server


@contextmanager
def _site(ranker: str) -> Iterator[Site]:
    """The live bundle, or a made-up one."""
    if ranker == "live":
        settings = Settings.from_env()
        live = Catalogue(settings.catalogue_url).live_bundle(settings.dataset)
        yield Site(f"{live.recipe}@{live.digest[:12]}", requests_of(settings), {})
        return
    with made_up(ranker) as site:
        yield site


@contextmanager
def made_up(ranker: str) -> Iterator[Site]:
    """An untrained ranker over made-up users."""
    from serving.benchmarks.synthetic import SIZES, Requests, bundle_of, fill, store

    size = SIZES[ranker]
    with store() as settings:
        fill(settings, size.length)
        folder = bundle_of(settings, size)
        name = f"{ranker}: width {size.width}, {size.layers} layers, {size.length} events"
        drawn = Requests(CANDIDATES)
        bodies = Bodies([drawn(number) for number in range(500)])
        yield Site(name, bodies, {"MEMOIR_SERVE_BUNDLE": str(folder)})


async def _floor(target: Target, seconds: float) -> list[dict[str, Any]]:
    await closed_loop(target, 1.0)
    one = await closed_loop(target, seconds / 2)
    many = await closed_loop(target, seconds / 2, connections=8)
    return [_row("floor: bare ASGI, one caller", one), _row("floor: bare ASGI, eight", many)]


async def _parts(target: Target, seconds: float, rate: float | None) -> list[dict[str, Any]]:
    """One after the other, on the same warm server."""
    await closed_loop(target, 3.0, connections=2)
    one = await closed_loop(target, seconds)
    # As many callers as are taken on at once: more would be refused.
    full = await closed_loop(target, seconds, connections=4)
    capacity = full.per_second
    below = rate or 0.6 * capacity
    rows = [_row("one caller", one), _row("four callers: capacity", full)]
    steady = await open_loop(target, poisson(below, seconds))
    rows.append(_row(f"open loop, {below:.0f}/s", steady, below))
    over = await open_loop(target, poisson(3 * capacity, seconds))
    rows.append(
        _row(f"open loop, three times capacity, {3 * capacity:.0f}/s", over, 3 * capacity)
        | {"of_capacity": over.per_second / capacity}
    )
    after = await open_loop(target, poisson(below, 4.0), keep=True)
    late = [due for due, status, _ in after.bodies if status != 200]
    rows.append(_row("straight after it", after, below) | {"recovered_s": max(late, default=0.0)})
    return rows


def _row(part: str, outcome: Outcome, offered: float | None = None) -> dict[str, Any]:
    refused = outcome.statuses[503]
    return {
        "part": part,
        "offered_s": offered,
        "answered_s": outcome.per_second,
        "p50_ms": outcome.ms(50),
        "p99_ms": outcome.ms(99),
        "max_ms": outcome.ms(100),
        "refused": refused,
        "refused_p99_ms": outcome.refusal_us.get_value_at_percentile(99) / 1000
        if refused
        else None,
        "failed": outcome.statuses[0] + outcome.statuses[-1],
        "unscored": outcome.unscored,
    }


class Bodies:
    """Requests of random users for random candidates, all drawn beforehand."""

    def __init__(self, made: list[bytes]) -> None:
        self._made = made

    def __call__(self, number: int) -> bytes:
        return self._made[number % len(self._made)]


def requests_of(settings: Settings, number: int = 500) -> Bodies:
    """Bodies of requests for users and items of the dataset in force."""
    contract = load_contract(settings.dataset)
    log = JobFolder(settings.home, "user_history").read("user_history")
    users = log[contract.user.join_key].unique().to_pylist()
    loaded = published_rows(settings, contract)
    if loaded is None:
        raise SystemExit(
            "no items were materialized from the tables here: run `python -m beam_jobs materialize`"
        )
    items = loaded.rows[contract.item.join_key].to_pylist()
    rng = np.random.default_rng(0)
    made = []
    for _ in range(number):
        candidates = rng.choice(len(items), min(CANDIDATES, len(items)), replace=False)
        asked = {
            "user_id": users[int(rng.integers(len(users)))],
            "candidates": [items[at] for at in candidates],
            "k": 20,
        }
        made.append(json.dumps(asked).encode())
    return Bodies(made)


@dataclass(frozen=True)
class Running:
    """A server process that is ready, and how many seconds that took."""

    port: int
    started_s: float
    process: subprocess.Popen[bytes]


@contextmanager
def started(module: str, *words: str, **variables: str) -> Iterator[Running]:
    """`python -m module … ` that serves HTTP, ready; `{port}` in its words stands for a free port."""
    port = listenable("127.0.0.1", 0)
    command = [sys.executable, "-m", module, *(word.format(port=port) for word in words)]
    began = time.perf_counter()
    process = subprocess.Popen(command, env={**os.environ, **variables}, stdout=subprocess.DEVNULL)
    try:
        wait_until_ready(port, process)
        yield Running(port, time.perf_counter() - began, process)
    finally:
        process.terminate()
        try:
            process.wait(timeout=30)
        except subprocess.TimeoutExpired:  # one that waits for connections to end
            process.kill()
            process.wait(timeout=30)


def server(processes: int = 1, **variables: str) -> AbstractContextManager[Running]:
    """Ours."""
    words = ("--port", "{port}", "--replay", "--processes", str(processes))
    return started("serving", *words, **variables)


def served(target: str, processes: int = 1) -> AbstractContextManager[Running]:
    """Another ASGI app on the same HTTP server."""
    words = ("--interface", "asgi", "--no-ws", "--log-level", "error", "--port", "{port}")
    return started("granian", target, *words, "--workers", str(processes))


def wait_until_ready(port: int, process: subprocess.Popen[bytes]) -> None:
    """Wait until `/readyz` says so.

    Raises:
        SystemExit: the server ended, or was not ready in time.
    """
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz", timeout=5) as found:
                if found.status == 200:
                    return
        except (urllib.error.URLError, OSError):
            time.sleep(0.05)
    raise SystemExit("the server ended, or was not ready in time")


async def echo(scope: Any, receive: Any, send: Any) -> None:
    """The floor: reads the body, answers as many bytes as a ranked list has."""
    if scope["type"] != "http":
        return
    while (await receive()).get("more_body"):
        pass
    headers = [(b"content-type", b"application/json"), (b"content-length", b"1024")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": b" " * 1024})


if __name__ == "__main__":
    main()
