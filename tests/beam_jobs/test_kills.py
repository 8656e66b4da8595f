"""A server, a job or the store itself, killed at any moment: an event that was acknowledged is there once, and one that
was not is there at most once.

Killed processes are forks of this one, which has everything imported: a kill costs no start.
"""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from beam_jobs.erase import erase
from feature_repo import datasets
from feature_repo.contract.arrow import EPOCH
from feature_repo.settings import Settings
from feature_repo.store.store import open_store
from serving.stores.refresh import UserMemory
from tests.conftest import Redis, apply_in_process, run_jobs
from tests.promises import Promises
from tests.small_shop import at, declared, read, shop

BATCH = ("events", "user_history", "item_stats", "materialize")
USERS = ("ann", "bob", "cid")
LOG = "user_id,item_id,event_timestamp,price,country\n" + "".join(
    f"{user},i{day},{at(day)},1,UK\n" for day in range(1, 4) for user in (*USERS, "gone")
)
MODES = {"server": 0.62, "job": 0.3, "store": 0.06, "erase": 0.02}


@dataclass
class Site:
    """A small shop on a store that may be killed.

    Args:
        kill_store: kills the store's process and starts it again; None of a store that is a file.
        sent, acked: files to which each event goes before it is sent, and after it was acknowledged.
    """

    settings: Settings
    kill_store: Callable[[], None] | None
    sent: Path
    acked: Path
    kills: dict[str, int] = field(default_factory=dict)


@pytest.fixture(params=["sqlite", "redis"])
def site(
    request: pytest.FixtureRequest,
    modules: Path,
    helpers: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Site]:
    name = f"kills_{request.param}"
    text = declared(name, '"log.csv"', num_history_online="4000")
    settings = shop(modules, helpers, name, text, {"log.csv": LOG})
    run_jobs(settings, *BATCH[:-1], num_partitions=2)
    files = tmp_path / "sent.txt", tmp_path / "acked.txt"
    for file in files:
        file.touch()
    if request.param == "sqlite":
        apply_in_process(settings)
        run_jobs(settings, "materialize")
        yield Site(settings, None, *files)
        return
    # What it has answered is on its disk.
    (tmp_path / "redis").mkdir()
    server = Redis(tmp_path / "redis", "--appendonly", "yes", "--appendfsync", "always")
    server.start()
    monkeypatch.setenv("MEMOIR_REDIS", f"127.0.0.1:{server.port}")
    monkeypatch.setenv("MEMOIR_REGISTRY_URL", request.getfixturevalue("postgres_url"))
    monkeypatch.setenv("MEMOIR_DATASET", name)
    remote = Settings(
        settings.dataset, settings.data, settings.home, "production", settings.catalogue_url, False
    )
    apply_in_process(remote)
    run_jobs(remote, "materialize")
    yield Site(remote, server.kill, *files)
    server.stop()


def forked(work: Callable[[], None]) -> int:
    """A child of this process that does something and ends without a trace; returns its number."""
    child = os.fork()
    if child:
        return child
    try:
        work()
    finally:
        os._exit(0)


def end(child: int) -> None:
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def serve(site: Site, seed: int) -> None:
    """Take events until the end; whatever the store's client raises, the event stays unacknowledged."""
    rng = random.Random(seed)
    memory = UserMemory(open_store(site.settings), datasets.load_contract(site.settings.dataset))
    with open(site.sent, "a") as sent, open(site.acked, "a") as acked:
        while True:
            user = rng.choice(USERS)
            # Late ones too, and none twice by itself
            when = datetime.now(UTC) - timedelta(microseconds=rng.randrange(10**9))
            line = json.dumps([user, (when - EPOCH) // timedelta(microseconds=1)]) + "\n"
            sent.write(line)
            sent.flush()
            event = {"item_id": "x", "action": 0, "event_timestamp": when, "price": 1.0}
            try:
                memory.add(user, [event])
            except Exception:
                time.sleep(0.01)
                continue
            acked.write(line)
            acked.flush()


def run_some(site: Site, rng: random.Random) -> None:
    first = rng.randrange(len(BATCH))
    run_jobs(site.settings, *BATCH[first:], *BATCH[:first])


def lines_of(file: Path) -> list[tuple[str, int]]:
    """Whole lines of what was sent or acknowledged."""
    text = file.read_text()
    whole = text[: text.rfind("\n") + 1].splitlines()
    return [(user, when) for user, when in map(json.loads, whole)]


def faults_of(site: Site) -> list[str]:
    """What is lost or there twice, in the tables and online."""
    acked = lines_of(site.acked)
    sent = lines_of(site.sent)
    events = read(site.settings, "events", "events").to_pylist()
    table = [
        (row["user_id"], (row["event_timestamp"] - EPOCH) // timedelta(microseconds=1))
        for row in events
        if row["item_id"] == "x"
    ]
    found = []
    if len(set(table)) < len(table):
        found.append(f"{len(table) - len(set(table))} are there twice")
    if lost := set(acked) - set(table):
        found.append(
            f"{len(lost)} of {len(acked)} acknowledged events are lost, such as {sorted(lost)[:3]}"
        )
    if made_up := set(table) - set(sent):
        found.append(f"{len(made_up)} were never sent")
    memory = UserMemory(open_store(site.settings), datasets.load_contract(site.settings.dataset))
    for user in USERS:
        online = memory.read(user)["user_stats"]["history_end"]
        expected = sum(row["user_id"] == user for row in events)
        if online != expected:
            found.append(f"{user}: {online} events online, {expected} in the table")
    memory.close()
    return found


def killed(site: Site, number: int, seed: int) -> None:
    """So many kills, of whatever is under way."""
    rng = random.Random(seed)
    jobs: int | None = None
    for turn in range(number):
        (mode,) = rng.choices(list(MODES), list(MODES.values()))
        if mode == "store" and site.kill_store is None:
            mode = "server"
        server = forked(lambda: serve(site, turn))  # noqa: B023
        if mode in ("job", "erase"):
            jobs = forked(lambda: run_some(site, rng))
        time.sleep(rng.uniform(0.02, 2.5 if mode == "job" else 0.15))
        if mode == "store" and site.kill_store is not None:
            site.kill_store()
            time.sleep(rng.uniform(0, 0.1))
        end(server)
        if jobs is not None:
            end(jobs)
            jobs = None
        if mode == "erase":
            erase(site.settings, ["gone"], [], lambda name: run_jobs(site.settings, name) and None)
        site.kills[mode] = site.kills.get(mode, 0) + 1
        # Now and then a whole batch, so that what is killed meets a log that was trimmed.
        if rng.random() < 0.02:
            run_jobs(site.settings, *BATCH)
    run_jobs(site.settings, *BATCH)


@pytest.mark.slow
def test_what_was_acknowledged_outlives_some_kills(site: Site) -> None:
    killed(site, 12, seed=0)
    assert len(lines_of(site.acked)) > 50
    assert faults_of(site) == []


@pytest.mark.whole
def test_what_was_acknowledged_outlives_a_thousand_kills(site: Site, promises: Promises) -> None:
    killed(site, 1000, seed=1)
    faults = faults_of(site)
    promises.note(
        f"1,000 kills of server, job or store, {site.settings.profile} store",
        "0 acknowledged events lost, 0 twice",
        f"{len(lines_of(site.acked)):,} acknowledged, {site.kills}, {len(faults)} faults",
        held=not faults,
        seed=1,
    )
    assert faults == []
