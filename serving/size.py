"""The memory and time that a bundle takes on this machine, over its own online store, and a plan for more users and more requests."""

from __future__ import annotations

import asyncio
import math
import os
import resource
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from feature_repo.errors import ExpectedError, UsageError
from feature_repo.home.redis_client import client_of
from feature_repo.home.tables import JobFolder
from feature_repo.settings import Settings
from feature_repo.store.store import ONLINE, local_file
from serving.api.messages import RankRequest
from serving.api.settings import ServeSettings
from serving.live.live import BundleSource, Serving
from serving.ranking.ranker import Clock
from serving.ranking.states import UserStates
from serving.stores.redis_hashes import StoreReadError, WrongStoreError
from serving.stores.redis_reader import RedisReader

# Of a process' time: above this requests queue for each other
BUSY = 0.6
# What Redis should be given beside what its keys take: it forks to write its file, and memory fragments.
HEADROOM = 1.5
MOST_BYTES = 1 << 40
TIMEOUT_S = 10.0
MIB = 1 << 20
# In memory at once, at most: live, previous, retired, next
BUNDLES = 4
STATES_BYTES = int(ServeSettings.model_fields["state_mib"].default) * MIB


class UnmeasuredError(ExpectedError, RuntimeError):
    """The online store was away while a bundle was measured."""


@dataclass(frozen=True)
class Size:
    """The measurements of a bundle.

    Args:
        bundle: name of the bundle.
        process_bytes: of a server process with the bundle and all items, nobody encoded.
        bundle_bytes: what a bundle takes beside another: weights, items, connections.
        items: how many items the bundle ranks.
        item_bytes: bytes of an item in the process.
        users: how many users the tables have.
        user_bytes: of a user in the online store, mean; None where the store is none whose keys can be weighed.
        state_bytes: of an encoded user that is kept between requests.
        first_ms: of a request of a user who is not kept, each of the sample.
        again_ms: of the same request once more.
    """

    bundle: str
    process_bytes: int
    bundle_bytes: int
    items: int
    item_bytes: float
    users: int
    user_bytes: float | None
    state_bytes: float
    first_ms: list[float]
    again_ms: list[float]

    @property
    def most_bytes(self) -> int:
        """Of a process that keeps the bundle before, and loads the next one while a retired one's last requests end."""
        return self.process_bytes + (BUNDLES - 1) * self.bundle_bytes + STATES_BYTES

    def processes(self, requests_per_s: float) -> int:
        """How many processes so many requests a second want, if no user's encoding is kept."""
        return max(1, math.ceil(requests_per_s * statistics.mean(self.first_ms) / 1000 / BUSY))


def run_size(
    bundle: str | None,
    candidates: int,
    sample: int,
    users: int | None,
    requests_per_s: float | None,
    *,
    replay: bool,
) -> None:
    """Measure and print.

    Raises:
        UsageError: a number that is none of a request, a sample or a plan.
        BundleError, NoLiveBundleError: see `BundleSource.load`.
        UnmeasuredError: the online store did not answer.
    """
    named = {"candidates": candidates, "sample": sample, "users": users}
    for name, value in (named | {"requests_per_s": requests_per_s}).items():
        if value is not None and value <= 0:
            raise UsageError(f"--{name} expects a number above 0, not {value}")
    settings = Settings.from_env()
    source = BundleSource(settings, Path(bundle) if bundle else None, replay)
    found = asyncio.run(_measured(source, candidates, sample))
    _show(found, candidates, users or found.users, requests_per_s)


async def _measured(source: BundleSource, candidates: int, sample: int) -> Size:
    serving = source.load()
    try:
        process_bytes = _resident()
        # Once more, as at a swap: what the first load imported is there by now.
        another = source.load()
        bundle_bytes = _resident() - process_bytes
        await another.close()
        return await _of_serving(
            source.settings, serving, candidates, sample, process_bytes, bundle_bytes
        )
    except StoreReadError as error:
        raise UnmeasuredError(
            f"the online store did not answer, nothing is measured: {error}"
        ) from error
    finally:
        await serving.close()


async def _of_serving(
    settings: Settings,
    serving: Serving,
    candidates: int,
    sample: int,
    process_bytes: int,
    bundle_bytes: int,
) -> Size:
    ranker = serving.ranker
    # 1. The same users and candidates at each call
    key = ranker.contract.user.join_key
    table = JobFolder(settings.home, "user_history").read("user_stats", [key])
    known = pc.unique(table[key].combine_chunks())
    items = ranker.bundle.encoder.items.values.to_pylist()
    if not len(known) or not items:
        raise UsageError(
            f"there are {len(known)} users in the tables and {len(items)} items in the bundle: nobody to rank for, or nothing to rank"
        )
    rng = np.random.default_rng(0)
    chosen = rng.choice(len(known), min(sample, len(known)), replace=False)
    ids = known.take(pa.array(chosen)).to_pylist()
    # 2. A request of each, twice; every state is kept, so that a second request finds its user's.
    states = ranker.states = UserStates(ranker.model, MOST_BYTES)
    first_ms: list[float] = []
    again_ms: list[float] = []
    # The first of all pays for connections.
    await serving.reader.read_user(ids[0], TIMEOUT_S)
    for user_id in ids:
        asked = [items[at] for at in rng.integers(0, len(items), candidates)]
        request = RankRequest(user_id=user_id, candidates=asked)
        for times in (first_ms, again_ms):
            began = time.perf_counter()
            user = await serving.reader.read_user(user_id, TIMEOUT_S)
            ranker.answer(request, user, Clock(), keep=True)
            times.append(1000 * (time.perf_counter() - began))
    return Size(
        serving.name,
        process_bytes,
        bundle_bytes,
        len(ranker.items),
        ranker.items.known.nbytes / len(ranker.items),
        len(known),
        _stored_bytes(settings, serving, ids, len(known)),
        states.bytes / len(ids),
        first_ms,
        again_ms,
    )


def _stored_bytes(
    settings: Settings, serving: Serving, ids: Sequence[Any], users: int
) -> float | None:
    """Bytes of a user in the online store: by Redis' own word, or a share of SQLite's file."""
    if settings.profile == "local":
        return local_file(settings, ONLINE).stat().st_size / users
    store = serving.stores[0]
    bundle = serving.ranker.bundle
    try:
        reader = RedisReader(
            store, serving.ranker.contract, bundle.manifest["online_service"], bundle.tokens
        )
    except WrongStoreError:
        return None
    client = client_of(store.config.online_store)
    try:
        # Of all fields: of a sample Redis takes the same few of each user.
        weights = [
            client.memory_usage(key, samples=0) or 0 for one in ids for key in reader.keys_of(one)
        ]
    finally:
        client.close()
    return sum(weights) / len(ids)


def _resident() -> int:
    """Bytes of memory that this process holds."""
    if not Path("/proc/self/statm").exists():
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return most if sys.platform == "darwin" else 1024 * most
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _show(found: Size, candidates: int, users: int, requests_per_s: float | None) -> None:
    first, again = statistics.median(found.first_ms), statistics.median(found.again_ms)
    table = Table("", "", box=SIMPLE_HEAD, show_header=False)
    rows = [
        (f"a server process with {found.items:,} items", f"{found.process_bytes / MIB:,.0f} MiB"),
        ("  while one bundle replaces another, at most", f"{found.most_bytes / MIB:,.0f} MiB"),
        ("  an item in it", f"{found.item_bytes:,.0f} bytes"),
        (f"a request of {candidates} candidates, without HTTP", f"{first:.2f} ms"),
        ("  its 95th percentile", f"{np.percentile(found.first_ms, 95):.2f} ms"),
        ("  where the user's encoding is kept", f"{again:.2f} ms"),
        ("an encoding that is kept", f"{found.state_bytes:,.0f} bytes"),
    ]
    if found.user_bytes is not None:
        total = found.user_bytes * users
        rows += [
            ("a user in the online store", f"{found.user_bytes:,.0f} bytes"),
            (f"  {users:,} users", f"{total / MIB:,.0f} MiB"),
            ("  memory to give a Redis for them", f"{HEADROOM * total / MIB:,.0f} MiB"),
        ]
    if requests_per_s is not None:
        processes = found.processes(requests_per_s)
        rows += [
            (f"{requests_per_s:g} requests a second", f"{processes:,} processes, a core each"),
            ("  their memory", f"{processes * found.most_bytes / MIB:,.0f} MiB"),
        ]
    for row in rows:
        table.add_row(*row)
    console = Console()
    console.print(
        f"bundle {found.bundle}, {len(found.first_ms)} users of {found.users:,}, one core",
        highlight=False,
    )
    console.print(table)
