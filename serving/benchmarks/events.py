"""One new event over HTTP, into history, sketch, statistics and summary tokens, and the next answer, which
knows it.

Of the dataset in force, whose bundle is live, on the store in force, which the events change. Of users with
the longest packed histories and with the shortest: what an event costs depends on that alone, for sketch,
statistics and tokens have the same size whether a hundred events came before or a million. Floor: the same
request to a route that only reads the body.
"""

from __future__ import annotations

import json
import time
import urllib.request
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pyarrow.compute as pc

from feature_repo.benchmarks import parser, report
from feature_repo.contract.contract import Contract
from feature_repo.datasets import load_contract
from feature_repo.history.history import newest_rows
from feature_repo.home.tables import JobFolder
from feature_repo.settings import Settings
from serving.benchmarks.load import requests_of, served, server

SERVE = {"MEMOIR_SERVE_DEADLINE_MS": "5000", "MEMOIR_SERVE_STORE_MS": "1000"}


def main() -> None:
    """Run."""
    arguments = parser("serving.benchmarks.events", __doc__).parse_args()
    rounds = 20 if arguments.quick else 300
    settings = Settings.from_env()
    contract = load_contract(settings.dataset)
    user = contract.user.join_key
    stats = newest_rows(JobFolder(settings.home, "user_history").read("user_stats"), user)
    order = pc.sort_indices(stats, [("history_end", "descending")])
    ranked = stats.take(order)
    asked = json.loads(requests_of(settings, 1)(0))["candidates"]
    rows: list[dict[str, Any]] = []
    with served("serving.benchmarks.load:echo") as echoes:
        rows.append({"what": "floor: a body read, an answer sent"} | _floor(echoes.port, rounds))
    with server(1, **SERVE) as running:
        for name, chosen in (("longest", ranked[:40]), ("shortest", ranked[-40:])):
            users = chosen[user].to_pylist()
            rows.append(
                {
                    "what": f"the {len(users)} {name} histories",
                    "events before": int(pc.mean(chosen["history_end"]).as_py()),
                }
                | _measure(running.port, contract, users, asked, rounds)
            )
    report("events", {"rounds": rounds, "candidates": len(asked)}, rows, arguments.json)


def _measure(
    port: int, contract: Contract, users: list[Any], asked: list[Any], rounds: int
) -> dict[str, float]:
    event_ms = []
    shown_ms = []
    for number in range(-10, rounds):  # the first ten warm up
        user = users[number % len(users)]
        stamp = datetime.now(UTC).isoformat()
        event = event_of(contract, asked[number % len(asked)], stamp)
        body = {"user_id": user, "events": [event]}
        sent = time.perf_counter()
        taken = post(port, "/v1/events", body)
        stored = time.perf_counter()
        answer = post(port, "/v1/rank", {"user_id": user, "candidates": asked, "k": 20})
        done = time.perf_counter()
        newest = post(port, "/v1/history", {"user_id": user})["events"][0]
        if taken["added"] != 1 or not same_time(newest["event_timestamp"], stamp):
            raise SystemExit(f"an event was not added, or not shown: {taken}, {newest}")
        if {"stale_tokens", "no_tokens"} & set(answer["degraded"]):
            raise SystemExit(f"tokens do not know the event: {answer['degraded']}")
        if number >= 0:
            event_ms.append(1000 * (stored - sent))
            shown_ms.append(1000 * (done - sent))
    return {
        "event p50_ms": float(np.median(event_ms)),
        "event p99_ms": float(np.quantile(event_ms, 0.99)),
        "until shown p50_ms": float(np.median(shown_ms)),
        "until shown p99_ms": float(np.quantile(shown_ms, 0.99)),
    }


def _floor(port: int, rounds: int) -> dict[str, float]:
    spent = []
    for _ in range(rounds):
        sent = time.perf_counter()
        post(port, "/v1/events", {"user_id": 1, "events": []}, answers=False)
        spent.append(1000 * (time.perf_counter() - sent))
    return {
        "event p50_ms": float(np.median(spent)),
        "event p99_ms": float(np.quantile(spent, 0.99)),
    }


def event_of(contract: Contract, item: Any, stamp: str) -> dict[str, Any]:
    """An event with a one wherever a number must be."""
    needed = {c.name: 1 for c in contract.spec.event_features if not c.nullable}
    return {contract.item.join_key: item, "event_timestamp": stamp, **needed}


def same_time(one: str, other: str) -> bool:
    """Whether two texts name the same moment."""
    return datetime.fromisoformat(one) == datetime.fromisoformat(other)


def post(port: int, path: str, body: Any, *, answers: bool = True) -> Any:
    """One request on a connection of its own."""
    asked = urllib.request.Request(
        f"http://127.0.0.1:{port}{path}",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(asked, timeout=30) as found:  # noqa: S310  # an address of ours
        content = found.read()
    return json.loads(content) if answers else None


if __name__ == "__main__":
    main()
