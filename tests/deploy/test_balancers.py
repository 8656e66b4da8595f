"""Two servers behind haproxy and nginx, as `deploy/` configures them: one is killed, drained, asked to reload, and another
bundle goes live, and every request is answered once, rightly.
"""

from __future__ import annotations

import itertools
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

from feature_repo.home.catalogue import Catalogue
from feature_repo.home.tables import JobFolder
from feature_repo.settings import CHECKOUT
from tests.conftest import missing, server_environment

CALLERS = 6
# Requests of each balancer: a sample here, all with `make reliability`
SOME, ALL = 600, 10_000


@dataclass
class Instance:
    """A server that may be killed and started again on its port."""

    road: Any
    port: int
    log: Path
    process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        environment = server_environment(
            self.road,
            MEMOIR_SERVE_DEADLINE_MS="20000",
            MEMOIR_SERVE_WATCH_S="0.3",
            MEMOIR_SERVE_UNREADY_S="2",
            OMP_NUM_THREADS="1",
        )
        command = [sys.executable, "-m", "serving", "--port", str(self.port), "--replay"]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                command, env=environment, cwd=CHECKOUT, stdout=log, stderr=log
            )

    def get(self, path: str) -> httpx.Response:
        return httpx.get(f"http://127.0.0.1:{self.port}{path}", timeout=10)

    def send(self, number: signal.Signals) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    def end(self, number: signal.Signals) -> None:
        assert self.process is not None
        # Its own worker processes go with it.
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text()
        self.send(number)
        if number == signal.SIGKILL:
            for child in children.split():
                os.kill(int(child), number)
        self.process.wait(timeout=60)

    def wait(self) -> None:
        until = time.monotonic() + 120
        while time.monotonic() < until:
            try:
                if self.get("/readyz").status_code == 200:
                    return
            except httpx.HTTPError:
                pass
            time.sleep(0.1)
        raise AssertionError(self.log.read_text()[-2000:])


@pytest.fixture(scope="module")
def road(shop: Any, helpers: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The shop with two bundles, the first of them live."""
    made = helpers.copied(shop, tmp_path_factory.mktemp("home"))
    for recipe in ("hiformer_tiny", "amortised_dlrm_tiny"):
        helpers.train_road(made, recipe)
    return made


@pytest.fixture(scope="module")
def instances(
    road: Any, helpers: Any, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[list[Instance]]:
    """Two servers."""
    folder = tmp_path_factory.mktemp("servers")
    made = [Instance(road, helpers.free_port(), folder / f"{n}.log") for n in range(2)]
    for one in made:
        one.start()
    for one in made:
        one.wait()
    yield made
    for one in made:
        one.end(signal.SIGTERM)


@pytest.fixture(params=["haproxy", "nginx"])
def address(
    request: pytest.FixtureRequest, instances: list[Instance], helpers: Any, tmp_path: Path
) -> Iterator[str]:
    """A balancer before them."""
    name = request.param
    program = shutil.which(name) or shutil.which(name, path="/usr/sbin")
    if program is None:
        missing(name)
    port = helpers.free_port()
    (shipped,) = (CHECKOUT / "deploy" / name).iterdir()
    text = shipped.read_text()
    for number, one in enumerate(instances):
        text = text.replace(f"memoir-{number + 1}:8000", f"127.0.0.1:{one.port}")
    text = text.replace("bind :8080", f"bind 127.0.0.1:{port}")
    text = text.replace("listen 8080", f"listen 127.0.0.1:{port}")
    (config := tmp_path / shipped.name).write_text(text)
    if name == "haproxy":
        command = [program, "-f", str(config)]
    else:
        about = f"daemon off; pid {tmp_path}/pid; error_log {tmp_path}/error.log;"
        command = [program, "-c", str(config), "-p", str(tmp_path), "-g", about]
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    helpers.wait_for_port(port, process)
    # haproxy checks each server before it sends anything there.
    time.sleep(1.5)
    yield f"http://127.0.0.1:{port}"
    process.terminate()
    process.wait(timeout=20)


@dataclass
class Asked:
    """Requests of some users, and what came back."""

    users: list[int]
    items: list[str]
    answers: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)

    def body(self, number: int) -> dict[str, Any]:
        first = number % (len(self.items) - 8)
        return {
            "user_id": self.users[number % len(self.users)],
            "candidates": self.items[first : first + 8],
        }


def rank(client: httpx.Client, body: dict[str, Any]) -> httpx.Response:
    return client.post("/v1/rank", json=body, headers={"X-User-Id": str(body["user_id"])})


def asked_of(road: Any) -> Asked:
    items = JobFolder(road.settings.home, "item_stats").read("item_stats")["item_id"].unique()
    users = JobFolder(road.settings.home, "user_history").read("user_stats")["user_id"].unique()
    return Asked(users.to_pylist()[:40], sorted(items.to_pylist())[:60])


def through(address: str, road: Any, number: int, instances: list[Instance]) -> Asked:
    """Send requests while one server is killed, the other drained, one asked to reload, and another bundle goes live."""
    asked = asked_of(road)
    lists: dict[tuple[str, int], list[str]] = {}
    questions = math.lcm(len(asked.users), len(asked.items) - 8)
    done = threading.Event()
    lock = threading.Lock()
    places = itertools.count()

    def send() -> None:
        with httpx.Client(base_url=address, timeout=60) as client:
            while not done.is_set():
                with lock:
                    place = next(places)
                try:
                    response = rank(client, asked.body(place))
                except httpx.HTTPError as error:
                    asked.wrong.append(f"no answer: {type(error).__name__}: {error}")
                    continue
                said = response.json()
                if response.status_code != 200 or said["degraded"]:
                    asked.wrong.append(f"{response.status_code}: {said.get('degraded', said)}")
                    continue
                with lock:
                    asked.answers[said["bundle"]] += 1
                    # The same question to the same bundle has one answer, whoever gives it.
                    question = (said["bundle"], place % questions)
                    if lists.setdefault(question, said["item_ids"]) != said["item_ids"]:
                        asked.wrong.append(f"another list for {question}")

    def more() -> None:
        """Wait for the next sixth of the answers."""
        until = time.monotonic() + 300
        wanted = sum(asked.answers.values()) + number / 6
        while sum(asked.answers.values()) < wanted and len(asked.wrong) < 20:
            assert time.monotonic() < until, asked
            time.sleep(0.02)

    with ThreadPoolExecutor(CALLERS) as pool:
        sending = [pool.submit(send) for _ in range(CALLERS)]
        try:
            more()
            instances[0].end(signal.SIGKILL)
            more()
            instances[0].start()
            instances[0].wait()
            # The balancer sees it, too.
            time.sleep(2.5)
            instances[1].end(signal.SIGTERM)
            more()
            instances[1].start()
            instances[1].wait()
            time.sleep(2.5)
            instances[0].send(signal.SIGHUP)
            more()
            swap(road)
            while len(asked.answers) < 2 and len(asked.wrong) < 20:
                more()
            more()
        finally:
            done.set()
        for one in sending:
            one.result()
    return asked


def swap(road: Any) -> None:
    """Make the other bundle live."""
    catalogue = Catalogue(road.settings.catalogue_url)
    dataset = road.settings.dataset
    live = catalogue.live_bundle(dataset).digest
    (other,) = (one.digest for one in catalogue.bundles(dataset) if one.digest != live)
    catalogue.set_live(dataset, other)


@pytest.mark.slow
def test_no_answer_is_lost_or_wrong(address: str, road: Any, instances: list[Instance]) -> None:
    asked = through(address, road, SOME, instances)
    assert asked.wrong == []
    assert sum(asked.answers.values()) >= SOME
    assert len(asked.answers) == 2


@pytest.mark.whole
def test_no_answer_of_ten_thousand_is_lost_or_wrong(
    address: str, road: Any, instances: list[Instance], promises: Any, request: Any
) -> None:
    asked = through(address, road, ALL, instances)
    promises.note(
        f"two servers behind {request.node.callspec.params['address']}: kill −9, drain, SIGHUP, swap",
        f"0 of {ALL:,} answers lost or wrong",
        f"{len(asked.wrong)} of {sum(asked.answers.values()):,}",
        held=not asked.wrong,
    )
    assert asked.wrong == []


def test_a_users_requests_go_to_one_server(
    address: str, road: Any, instances: list[Instance], request: Any
) -> None:
    """By the header; behind haproxy by the body alone too."""
    asked = asked_of(road)
    named = request.node.callspec.params["address"] == "nginx"

    def encoded() -> float:
        lines = [line for one in instances for line in one.get("/metrics").text.splitlines()]
        return sum(
            float(line.split()[-1]) for line in lines if 'states_total{outcome="encoded"' in line
        )

    # Counts of what came before are shown within a second.
    time.sleep(1.5)
    with httpx.Client(base_url=address, timeout=30) as client:
        before = encoded()
        for _ in range(4):
            for user in asked.users[:20]:
                # Behind a list that is longer than a balancer reads at first
                body = {"candidates": asked.body(0)["candidates"] * 500, "user_id": user}
                headers = {"X-User-Id": str(user)} if named else {}
                assert client.post("/v1/rank", json=body, headers=headers).status_code == 200
        time.sleep(1.5)
        assert encoded() - before <= 20
