"""What several processes make of one user: no acknowledged event is lost, and whoever reads sees the
user as of one moment: the events that the log has up to there and none beyond, in the order of time.
"""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
import pytest

from feature_repo.contract.arrow import EPOCH
from feature_repo.datasets import load_contract
from feature_repo.home.tables import JobFolder
from feature_repo.settings import Settings
from feature_repo.store.event_log import log_of
from feature_repo.store.online_erase import OnlineEraser
from feature_repo.store.store import open_store
from serving.api.errors import StoreAwayError
from serving.live.live import BundleSource
from serving.stores.features import UserRow
from serving.stores.refresh import UserMemory
from tests.promises import Promises

RECIPE = "vista_tiny"
# Of each process
WRITERS = 2


@dataclass(frozen=True)
class Taken:
    """An event that was acknowledged: whose, what and when, and the clock before and after."""

    user: int
    item: str
    at: datetime
    sent: float
    acked: float


@dataclass(frozen=True)
class Read:
    """A user as somebody saw them, and the clock before and after."""

    user: int
    row: UserRow
    began: float
    ended: float


@pytest.fixture(scope="module", params=["sqlite", "redis"])
def site(
    request: pytest.FixtureRequest,
    shop: Any,
    helpers: Any,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Settings]:
    """A shop with a ranker and tokens that stream, on either store."""
    road = helpers.token_road(shop, tmp_path_factory.mktemp("prefix"))
    if request.param == "sqlite":
        yield road.settings
        return
    names = {
        "MEMOIR_REGISTRY_URL": request.getfixturevalue("postgres_url"),
        "MEMOIR_REDIS": request.getfixturevalue("redis_address"),
        "MEMOIR_DATASET": road.settings.dataset,
    }
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(names)
    production = replace(road.settings, profile="production")
    helpers.apply_in_process(production)
    helpers.run_jobs(production, "materialize")
    helpers.run_jobs(production, "summary_tokens", bundle=RECIPE)
    yield production
    for name, value in before.items():
        os.environ.pop(name) if value is None else os.environ.update({name: value})


def take_events(
    settings: Settings, users: list[int], number: int, seed: int, out: Any, go: Any
) -> None:
    """One process of a server: events of now, sent again where others were first."""
    import torch

    torch.set_num_threads(1)
    serving = asyncio.run(_loaded(settings))
    items = serving.ranker.bundle.encoder.items.values.to_pylist()

    def write(thread: int) -> list[Taken]:
        rng, taken = np.random.default_rng([seed, thread]), []
        for _ in range(number // WRITERS):
            # Of two writers no two events are the same: each has items of its own.
            user = int(rng.choice(users))
            item = items[10 * int(rng.integers(4)) + WRITERS * seed + thread]
            sent = time.monotonic()
            while True:
                event = {"item_id": item, "action": 0, "event_timestamp": datetime.now(UTC)}
                event |= {"quantity": 1.0, "unit_price": 2.5}
                try:
                    answer = serving.events.take(user, [event])
                except StoreAwayError:
                    continue
                assert answer.added == 1
                break
            taken.append(Taken(user, item, event["event_timestamp"], sent, time.monotonic()))
        return taken

    out.put("ready")
    go.wait()
    with ThreadPoolExecutor(WRITERS) as pool:
        out.put([one for taken in pool.map(write, range(WRITERS)) for one in taken])


async def _loaded(settings: Settings) -> Any:
    return BundleSource(settings).load()


def reader_of(settings: Settings) -> Callable[[int], Read]:
    """Reads users as a server does."""
    serving = BundleSource(settings).load()
    loop = asyncio.new_event_loop()

    def read(user: int) -> Read:
        began = time.monotonic()
        row = loop.run_until_complete(serving.reader.read_user(user, 10.0))
        return Read(user, row, began, time.monotonic())

    return read


def written_together(
    settings: Settings, processes: int, number: int, users: list[int]
) -> tuple[list[Taken], list[Read], dict[int, Read], dict[int, Read]]:
    """Events by several processes, and reads meanwhile: both, and the users before and after."""
    spawn = multiprocessing.get_context("spawn")
    queues, go = [spawn.Queue() for _ in range(processes)], spawn.Event()
    read = reader_of(settings)
    before = {user: read(user) for user in users}
    workers = [
        spawn.Process(target=take_events, args=(settings, users, number, n, queue, go))
        for n, queue in enumerate(queues)
    ]
    for worker in workers:
        worker.start()
    for queue in queues:
        assert queue.get(timeout=300) == "ready"
    go.set()
    reads: list[Read] = []
    rng = np.random.default_rng(0)
    while all(queue.empty() for queue in queues):
        reads.append(read(int(rng.choice(users))))
    taken = [one for queue in queues for one in queue.get(timeout=600)]
    for worker in workers:
        worker.join(timeout=60)
        assert worker.exitcode == 0
    return taken, reads, before, {user: read(user) for user in users}


def past_of(row: UserRow) -> list[tuple[str, datetime]]:
    """The events that are packed, oldest first."""
    assert row.history is not None
    times = row.history["event_timestamp"].to_pylist()
    return list(zip(row.history["item_id"].to_pylist(), times, strict=True))


def logged_order(settings: Settings, user: int) -> list[tuple[str, datetime]]:
    """The events that were acknowledged, in the order in which they were."""
    log = log_of(open_store(settings).config)
    assert log is not None
    events = [json.loads(entry.event) for entry in log.entries([user])]
    stamps = [EPOCH + timedelta(microseconds=event["event_timestamp"]) for event in events]
    return [(event["item_id"], at) for event, at in zip(events, stamps, strict=True)]


def faults_of(
    settings: Settings,
    taken: list[Taken],
    reads: list[Read],
    before: dict[int, Read],
    after: dict[int, Read],
) -> list[str]:
    """What does not hold of events and reads, a line for each."""
    found: list[str] = []
    for user, last in after.items():
        past = past_of(before[user].row)
        arrived = logged_order(settings, user)
        arrived = arrived[len(arrived) - sum(one.user == user for one in taken) :]
        acked = [one for one in taken if one.user == user]
        base = before[user].row.columns["history_end"]
        final = past_of(last.row)
        lost = {(one.item, one.at) for one in acked} - set(final)
        if lost or last.row.columns["history_end"] != base + len(acked):
            found.append(f"user {user}: {len(lost)} of {len(acked)} acknowledged events are lost")
        for read in [one for one in reads if one.user == user] + [last]:
            known = read.row.columns["history_end"]
            row = read.row
            if row.sketch is None or row.tokens is None or row.problems:
                found.append(f"user {user}: a read lacks {row.problems}")
                continue
            parts = {(known, row.columns["history_digest"])}
            parts |= {(row.sketch.num_events, row.sketch.digest)}
            parts |= {(row.tokens.num_events, row.tokens.digest)}
            if len(parts) > 1:
                found.append(f"user {user}: a read is of several moments: {parts}")
            # All of these histories are short enough to be packed whole.
            expected = [*past, *arrived[: known - base]]
            if sorted(past_of(row)) != sorted(expected) or not in_time(past_of(row)):
                found.append(f"user {user}: a read of {known} events is no prefix of the log")
            least = base + sum(one.acked < read.began for one in acked)
            most = base + sum(one.sent < read.ended for one in acked)
            if not least <= known <= most:
                found.append(f"user {user}: {known} events are read, {least} to {most} were taken")
    return found


def in_time(past: list[tuple[str, datetime]]) -> bool:
    times = [at for _, at in past]
    return times == sorted(times)


def some_users(settings: Settings, number: int, most: int) -> list[int]:
    """Users whose histories stay short enough that every event is packed."""
    rows = JobFolder(settings.home, "user_history").read("user_stats")
    ends: dict[int, int] = {}
    for user, end in zip(*(rows[n].to_pylist() for n in ("user_id", "history_end")), strict=True):
        ends[user] = max(ends.get(user, 0), end)
    return [user for user, end in ends.items() if end < most][:number]


@pytest.mark.slow
def test_no_acknowledged_event_is_lost_and_every_read_is_of_one_moment(site: Settings) -> None:
    taken, reads, before, after = written_together(site, 2, 40, some_users(site, 3, 300))
    assert len(taken) == 80
    assert len(reads) > 20
    assert faults_of(site, taken, reads, before, after) == []


@pytest.mark.whole
def test_ten_thousand_events_of_eight_writers_in_four_processes(
    site: Settings, promises: Promises
) -> None:
    users = some_users(site, 40, 150)
    taken, reads, before, after = written_together(site, 4, 2_500, users)
    faults = faults_of(site, taken, reads, before, after)
    promises.note(
        f"events of {len(users)} users by eight writers in four processes, {site.profile} store",
        "0 of 10,000 lost, every read of one moment",
        f"{len(taken):,} taken, {len(reads):,} reads, {len(faults)} faults",
        held=not faults,
        seed=0,
    )
    assert faults == []


def test_feasts_own_materialize_sets_back_nothing_that_events_made_newer(site: Settings) -> None:
    """And writes what is not there."""
    contract = load_contract(site.dataset)
    store = open_store(site)
    memory = UserMemory(store, contract)
    users = JobFolder(site.home, "user_history").read("user_history")["user_id"].to_pylist()
    changed, lost = users[-1], users[-2]
    event = {
        "item_id": "20001",
        "action": 0,
        "event_timestamp": datetime.now(UTC),
        "quantity": 2.0,
        "unit_price": 1.5,
    }
    before = memory.read(lost)
    assert memory.add(changed, [event]).added == 1
    after = memory.read(changed)
    OnlineEraser(store, contract, []).erase([lost], datetime.now(UTC))
    store.materialize(datetime(2000, 1, 1, tzinfo=UTC), datetime.now(UTC) + timedelta(days=1))
    assert memory.read(changed).views == after.views
    assert memory.read(lost).views == before.views
    memory.close()
