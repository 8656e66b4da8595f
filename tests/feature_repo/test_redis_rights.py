"""What a user of Redis' ACL must be allowed, and how it is said that one is not."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import redis

from beam_jobs.__main__ import app
from feature_repo import cli
from feature_repo.datasets import load_contract
from feature_repo.home.tables import JobFolder
from feature_repo.settings import CHECKOUT, Settings
from feature_repo.store.online_erase import OnlineEraser
from feature_repo.store.store import open_store
from serving.live.notes import Notes
from serving.live.store_watch import FILLS_ONLINE, look_of
from serving.stores.events import EventTaker
from serving.stores.redis_hashes import StoreReadError
from serving.stores.redis_reader import RedisReader
from tests.conftest import Redis

CONTRACT = load_contract("online_retail")
EVENT: dict[str, Any] = {
    "item_id": "20001",
    "action": 0,
    "event_timestamp": datetime(2011, 12, 9, 12, tzinfo=UTC),
    "quantity": 1.0,
    "unit_price": 1.0,
}


def jobs(*words: str) -> int:
    """Run `python -m beam_jobs …` to its exit code."""
    return cli.run(lambda: app(list(words)))


def rights(of: str) -> list[str]:
    """The commands that the page names for a server that only ranks, for one that takes events, or for jobs."""
    page = (CHECKOUT / "docs" / "production.md").read_text()
    found = re.search(rf"^ACL SETUSER {of} on >… ~\* (.*)$", page, re.MULTILINE)
    assert found is not None, of
    return found[1].split()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Redis]:
    """With a user for each role."""
    made = Redis(tmp_path_factory.mktemp("rights"))
    made.start()
    client = redis.Redis(port=made.port)
    for of in ("ranks", "takes", "jobs"):
        client.execute_command("ACL", "SETUSER", of, "on", ">pw", "~*", *rights(of))
    yield made
    made.stop()


@pytest.fixture
def as_user(
    shop: Any, server: Redis, helpers: Any, postgres_url: str, tmp_path: Path, monkeypatch: Any
) -> Any:
    road = helpers.copied(shop, tmp_path)
    monkeypatch.setenv("MEMOIR_REGISTRY_URL", postgres_url)
    monkeypatch.setenv("MEMOIR_DATASET", road.settings.dataset)
    monkeypatch.setenv("MEMOIR_DATA", road.settings.data)
    monkeypatch.setenv("MEMOIR_HOME", road.settings.root)
    monkeypatch.setenv("MEMOIR_PROFILE", "production")

    def become(name: str, password: str = "pw") -> Settings:
        monkeypatch.setenv("MEMOIR_REDIS", f"redis://{name}:{password}@127.0.0.1:{server.port}")
        return replace(road.settings, profile="production")

    return become


def refused(server: Redis) -> list[str]:
    """What users were refused."""
    client = redis.Redis(port=server.port, decode_responses=True)
    return [entry["object"] for entry in client.acl_log()]


def test_the_rights_on_the_page_are_enough(as_user: Any, server: Redis, helpers: Any) -> None:
    settings = as_user("jobs")
    helpers.apply_in_process(settings)
    helpers.run_jobs(settings, "materialize")
    users = JobFolder(settings.home, "user_history").read("user_history")["user_id"].unique()
    user = users.to_pylist()[0]
    # 1. A server that takes events
    as_user("takes")
    taker = EventTaker(open_store(settings), CONTRACT, None, settings.home)
    assert taker.take(user, [EVENT]).added == 1
    # 2. One that only ranks
    as_user("ranks")
    reader = RedisReader(open_store(settings), CONTRACT, "ranking_v1_tokens_online", "none@0")
    assert asyncio.run(reader.read_user(user, 5.0)).history is not None
    state = asyncio.run(look_of(settings, Notes(settings, FILLS_ONLINE))())
    assert (state.held is not None, state.missing) == (True, 0)
    # 3. Jobs again: what the server took is added, and users are erased.
    as_user("jobs")
    helpers.run_jobs(settings, "events", "user_history")
    helpers.run_jobs(settings, "materialize", force=True)
    eraser = OnlineEraser(open_store(settings), CONTRACT, [])
    assert eraser.sweep([user], EVENT["event_timestamp"])
    assert eraser.find([user]) == 0
    assert refused(server) == []


def test_on_a_cluster_each_may_follow_its_slots(as_user: Any, server: Redis) -> None:
    page = (CHECKOUT / "docs" / "production.md").read_text()
    found = re.search(r"needs `([^`]+)` beside the commands below", page)
    assert found is not None
    client = redis.Redis(port=server.port, decode_responses=True)
    client.execute_command(
        "ACL", "SETUSER", "follows", "on", ">pw", "~*", *rights("ranks"), *found[1].split()
    )
    for command in (("ASKING",), ("CLUSTER", "SLOTS"), ("CLUSTER", "SHARDS"), ("READONLY",)):
        assert client.execute_command("ACL", "DRYRUN", "follows", *command) == "OK", command


def test_a_server_that_only_ranks_may_write_nothing(as_user: Any, server: Redis) -> None:
    settings = as_user("ranks")
    taker = EventTaker(open_store(settings), CONTRACT, None, settings.home)
    with pytest.raises(redis.exceptions.NoPermissionError):
        taker.take(990_000_001, [EVENT])


def test_a_read_that_is_refused_says_so_and_shows_no_key(as_user: Any, server: Redis) -> None:
    settings = as_user("blind")
    client = redis.Redis(port=server.port)
    client.execute_command("ACL", "SETUSER", "blind", "on", ">pw", "~*", "+multi", "+exec")
    reader = RedisReader(open_store(replace(settings)), CONTRACT, "ranking_v1_online")
    with pytest.raises(StoreReadError) as raised:
        asyncio.run(reader.read_user(12345, 5.0))
    assert str(raised.value) == (
        "Redis refused to answer: NoPermissionError: this user has no permissions to run the 'hmget' command"
    )


@pytest.mark.parametrize(
    ("user", "password", "said"),
    [
        ("ranks", "pw", "docs/production.md lists the commands"),
        ("jobs", "wrong", "look at user and password in MEMOIR_REDIS"),
    ],
)
def test_a_job_that_is_refused_ends_with_a_line(
    as_user: Any,
    helpers: Any,
    capsys: pytest.CaptureFixture[str],
    user: str,
    password: str,
    said: str,
) -> None:
    helpers.apply_in_process(as_user("jobs"))
    as_user(user, password)
    assert jobs("materialize", "--runner=FnApiRunner", "--force") == 1
    shown = capsys.readouterr().err
    assert said in shown
    assert "Traceback" not in shown
    assert "user_id" not in shown


def test_a_replica_and_a_node_of_a_cluster_are_named(
    as_user: Any, helpers: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    helpers.apply_in_process(as_user("jobs"))
    (tmp_path / "replica").mkdir()
    other = Redis(tmp_path / "replica")
    other.start()
    try:
        redis.Redis(port=other.port).replicaof("127.0.0.1", 1)
        monkeypatch.setenv("MEMOIR_REDIS", f"127.0.0.1:{other.port}")
        assert jobs("materialize", "--runner=FnApiRunner", "--force") == 1
        assert "MEMOIR_REDIS names a replica" in capsys.readouterr().err
    finally:
        other.stop()
    # And one that is away
    assert jobs("materialize", "--runner=FnApiRunner", "--force") == 1
    assert "it is away, or MEMOIR_REDIS names another place" in capsys.readouterr().err
