"""The five systems over HTTP: 500 candidates for a user who is asked about for the first time, once more in the very same
words, and after an event.

Of the dataset in force: the newest bundle of each recipe, on the store in force, which the events change. Users have histories of
middle length. Each system's server is started by itself; client, store and server share the machine. Nothing may be
degraded. The floor is the same request to a route that only reads the body.
"""

from __future__ import annotations

import time
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pyarrow.compute as pc

from feature_repo.benchmarks import parser, report
from feature_repo.contract.contract import Contract
from feature_repo.datasets import load_contract
from feature_repo.history.history import newest_rows
from feature_repo.home.catalogue import Catalogue
from feature_repo.home.tables import JobFolder
from feature_repo.settings import Settings
from serving.benchmarks.events import SERVE, event_of, post
from serving.benchmarks.load import served, server

RECIPES = ("hiformer", "amortised_dlrm", "vista", "vista_stream", "hydrarec", "onetrans")
CANDIDATES = 500
USERS = 40


def main() -> None:
    """Run."""
    flags = parser("serving.benchmarks.systems", __doc__)
    flags.add_argument("--recipes", nargs="+", default=list(RECIPES), help="that were exported")
    arguments = flags.parse_args()
    settings = Settings.from_env()
    contract = load_contract(settings.dataset)
    users = _users(settings, contract)[: 5 if arguments.quick else USERS]
    folder = JobFolder(settings.home, "item_stats")
    items = folder.read("item_stats")[contract.item.join_key].unique().to_pylist()[:CANDIDATES]
    rows: list[dict[str, Any]] = []
    with served("serving.benchmarks.load:echo") as echoes:
        rows.append({"recipe": "floor", "cold_ms": _floor(echoes.port, items)})
    catalogue = Catalogue(settings.catalogue_url)
    for recipe in arguments.recipes:
        bundle = settings.path(catalogue.bundle(settings.dataset, recipe).path)
        with server(1, MEMOIR_SERVE_BUNDLE=str(bundle), **SERVE) as running:
            rows.append({"recipe": recipe} | _measured(running.port, contract, users, items))
    report("systems", {"candidates": len(items), "users": len(users)}, rows, arguments.json)


def _users(settings: Settings, contract: Contract) -> list[Any]:
    """Those whose histories are nearest to the median in length."""
    key = contract.user.join_key
    stats = newest_rows(JobFolder(settings.home, "user_history").read("user_stats"), key)
    ends = stats["history_end"].to_numpy()
    order = np.argsort(np.abs(ends - np.median(ends)), kind="stable")[:USERS]
    found: list[Any] = pc.take(stats[key], order).to_pylist()
    return found


def _floor(port: int, items: list[Any]) -> float:
    spent = []
    for _ in range(50):
        sent = time.perf_counter()
        post(port, "/v1/rank", {"user_id": 1, "candidates": items, "k": 20}, answers=False)
        spent.append(1000 * (time.perf_counter() - sent))
    return float(np.median(spent))


def _measured(
    port: int, contract: Contract, users: list[Any], items: list[Any]
) -> dict[str, float]:
    """Medians over users of a first request, the same again, and one behind an event."""
    spent: dict[str, list[float]] = {"cold_ms": [], "known_ms": [], "event_ms": []}

    def ask(kind: str, user: Any, at: str) -> None:
        body = {
            "user_id": user,
            "candidates": items,
            "k": 20,
            "context": {"request_timestamp": at},
        }
        sent = time.perf_counter()
        answer = post(port, "/v1/rank", body)
        spent[kind].append(1000 * (time.perf_counter() - sent))
        if set(answer["degraded"]) - {"stale_features"}:
            raise SystemExit(f"{kind} of {user}: degraded by {answer['degraded']}")

    for number, user in enumerate(users):
        now = datetime.now(UTC).isoformat()
        ask("cold_ms", user, now)
        ask("known_ms", user, now)
        stamp = datetime.now(UTC).isoformat()
        event = event_of(contract, items[number % len(items)], stamp)
        post(port, "/v1/events", {"user_id": user, "events": [event]})
        ask("event_ms", user, datetime.now(UTC).isoformat())
    return {kind: float(np.median(times)) for kind, times in spent.items()}


if __name__ == "__main__":
    main()
