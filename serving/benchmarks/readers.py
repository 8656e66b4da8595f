"""What reading a user and 500 candidates costs: Feast's SDK, our readers, and the bare round trip.

Of the dataset in force, whose bundle is live and whose online store is a Redis (`MEMOIR_PROFILE=production`;
`MEMOIR_REGISTRY_URL` may be a file of SQLite). Values are compared first: all that the SDK gives, value
for value. Floor: the same HMGET, undecoded.
"""

from __future__ import annotations

import asyncio
import gc
import statistics
import time
from collections.abc import Awaitable, Callable
from typing import Any

import numpy as np

from feature_repo.benchmarks import parser, report
from feature_repo.home.tables import JobFolder
from feature_repo.settings import Settings
from feature_repo.store.store import open_store
from serving.live.live import BundleSource
from serving.stores.features import FeastReader
from serving.stores.items import item_columns
from serving.stores.redis_reader import RedisReader

CANDIDATES = 500
TURN = 25
Call = Callable[[int], Awaitable[Any]]


def main() -> None:
    """Run."""
    arguments = parser("serving.benchmarks.readers", __doc__).parse_args()
    settings = Settings.from_env()
    serving = BundleSource(settings).load()
    bundle = serving.ranker.bundle
    items = serving.ranker.items
    contract = bundle.encoder.contract
    service = bundle.manifest["online_service"]
    store = open_store(settings)
    slow = FeastReader(store, contract, service, bundle.tokens)
    fast = RedisReader(store, contract, service, bundle.tokens)
    log = JobFolder(settings.home, "user_history").read("user_history")
    users = log[contract.user.join_key].unique().to_pylist()
    known = bundle.encoder.items.values.to_pylist()
    rng = np.random.default_rng(0)
    asked = [
        (users[int(rng.integers(len(users)))], rng.choice(known, CANDIDATES).tolist())
        for _ in range(50 if arguments.quick else 300)
    ]
    item_refs = [f"{view}:{column.name}" for view, column in item_columns(contract)]
    key = contract.item.join_key

    async def through_feast(number: int) -> None:
        user, candidates = asked[number]
        slow.read_user(user)
        store.get_online_features(item_refs, [{key: item} for item in candidates])

    async def ours(number: int) -> None:
        user, candidates = asked[number]
        await fast.read_user(user, 1.0)
        items.take(candidates)

    async def user_alone(number: int) -> None:
        await fast.read_user(asked[number][0], 1.0)

    async def items_alone(number: int) -> None:
        items.take(asked[number][1])

    async def bare(number: int) -> None:
        await fast.read_raw(asked[number][0], 1.0)

    async def run() -> list[dict[str, Any]]:
        different = 0
        for user, _ in asked[:50]:
            one = await fast.read_user(user, 1.0)
            other = slow.read_user(user)
            different += (one.columns, one.history, one.problems) != (
                other.columns,
                other.history,
                other.problems,
            )
        calls: dict[str, Call] = {
            "Feast SDK: user and 500 items": through_feast,
            "ours: user and 500 items": ours,
            "of it: user from Redis, decoded": user_alone,
            "of it: 500 items": items_alone,
            "floor: the same HMGET, undecoded": bare,
        }
        spent = await interleaved_calls(calls, len(asked))
        await fast.hashes.close()
        ours_ms = spent["ours: user and 500 items"][0]
        return [
            {
                "what": name,
                "cpu_ms": cpu,
                "wall_ms": wall,
                "times ours": cpu / ours_ms,
                "users that differ": different if name.startswith("ours") else None,
            }
            for name, (cpu, wall) in spent.items()
        ]

    config = {
        "candidates": CANDIDATES,
        "users": len(users),
        "items": len(items),
        "rounds": len(asked),
    }
    report("readers", config, asyncio.run(run()), arguments.json)


async def interleaved_calls(calls: dict[str, Call], rounds: int) -> dict[str, tuple[float, float]]:
    """Median CPU and wall milliseconds of each call, in turns of `TURN` calls, so that load spares none
    and none pays for the garbage of another; after a round of all requests that warms up.
    """
    cpu: dict[str, list[float]] = {name: [] for name in calls}
    wall: dict[str, list[float]] = {name: [] for name in calls}
    for name, call in calls.items():
        for number in range(10 if name.startswith("Feast") else rounds):
            await call(number)
    for first in range(0, rounds, TURN):
        for name, call in calls.items():
            gc.collect()
            for number in range(first, min(first + TURN, rounds)):
                began = time.perf_counter()
                started = time.process_time()
                await call(number)
                cpu[name].append(1000 * (time.process_time() - started))
                wall[name].append(1000 * (time.perf_counter() - began))
    return {name: (statistics.median(cpu[name]), statistics.median(wall[name])) for name in calls}


if __name__ == "__main__":
    main()
