"""A user read from one Redis, from a cluster of three masters, and from a master that Sentinels name: CPU and wall time of
this process, side by side.

Synthetic users on Redis servers of its own. `ranking_v1` reads one hash; with summary tokens it is two, which on a cluster lie
on two nodes more often than not. Values are compared first. Floor: the same read of one Redis, undecoded.
"""

from __future__ import annotations

import asyncio
import os
import tempfile
from pathlib import Path
from typing import Any

from feature_repo.benchmarks import parser, report
from feature_repo.datasets import load_contract
from feature_repo.home.redis_client import CLUSTER, KINDS, SENTINEL
from feature_repo.settings import Settings
from feature_repo.store.store import open_store
from serving.benchmarks.readers import interleaved_calls
from serving.benchmarks.redises import Cluster, Sentinels
from serving.benchmarks.synthetic import USERS, fill, store
from serving.stores.redis_reader import RedisReader

LENGTH = 128
SERVICES = ("ranking_v1_online", "ranking_v1_tokens_online")
# Of no bundle: there are no tokens under it, and the read asks for them all the same.
VERSION = "none@0"


def main() -> None:
    """Run."""
    arguments = parser("serving.benchmarks.redis_kinds", __doc__).parse_args()
    rounds = 200 if arguments.quick else 2000
    with tempfile.TemporaryDirectory(prefix="memoir-kinds-") as folder, store() as settings:
        cluster = Cluster(Path(folder, "cluster"))
        sentinels = Sentinels(Path(folder, "sentinels"), "word")
        try:
            cluster.start()
            sentinels.start()
            addresses = {
                KINDS[0]: os.environ["MEMOIR_REDIS"],
                CLUSTER: cluster.address,
                SENTINEL: sentinels.address,
            }
            rows = asyncio.run(_measured(_readers(settings, addresses), rounds))
        finally:
            cluster.stop()
            sentinels.stop()
    report("redis_kinds", {"events": LENGTH, "users": USERS, "reads": rounds}, rows, arguments.json)


def _readers(settings: Settings, addresses: dict[str, str]) -> dict[tuple[str, str], RedisReader]:
    """A reader by kind of Redis and feature service, each of a store that holds the users."""
    contract = load_contract(settings.dataset)
    found = {}
    for kind, address in addresses.items():
        named = {"MEMOIR_REDIS": address, "MEMOIR_REDIS_TYPE": kind}
        os.environ |= {**named, "MEMOIR_REDIS_MASTER": Sentinels.NAME}
        fill(settings, LENGTH)
        for service in SERVICES:
            found[kind, service] = RedisReader(open_store(settings), contract, service, VERSION)
    return found


async def _measured(
    readers: dict[tuple[str, str], RedisReader], rounds: int
) -> list[dict[str, Any]]:
    rows = []
    for service in SERVICES:
        of = {kind: readers[kind, service] for kind in KINDS}
        for user in (1, USERS // 2, USERS):
            one, *others = [await reader.read_user(user, 5.0) for reader in of.values()]
            assert one.history is not None
            assert all(other.history == one.history for other in others)

        def call(reader: RedisReader) -> Any:
            return lambda number: reader.read_user(1 + number % USERS, 5.0)

        calls = {kind: call(reader) for kind, reader in of.items()}
        calls["floor"] = lambda number: of[KINDS[0]].read_raw(1 + number % USERS, 5.0)  # noqa: B023  # called here
        spent = await interleaved_calls(calls, rounds)
        single = spent[KINDS[0]][0]
        rows += [
            {
                "service": service,
                "redis": kind,
                "cpu_ms": cpu,
                "wall_ms": wall,
                "times one": cpu / single,
            }
            for kind, (cpu, wall) in spent.items()
        ]
    for reader in readers.values():
        await reader.close()
    return rows


if __name__ == "__main__":
    main()
