"""The log of acknowledged events, and records that change with it, on each store: one file, one Redis, a cluster."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import redis

from feature_repo.contract.arrow import EPOCH
from feature_repo.datasets import load_contract
from feature_repo.home.redis_client import slot_of
from feature_repo.store.event_log import Entry, log_of, to_text
from feature_repo.store.online_users import HISTORY, STATS, ManyRows, NewRow, user_records
from feature_repo.store.redis_writer import RedisWriter, key_of_user
from feature_repo.store.store import open_store
from tests.conftest import Redis, free_port

CONTRACT = load_contract("online_retail")
USERS = [11, 12, 13, 2_000_000_007]


@pytest.fixture(params=["sqlite", "redis", "cluster"])
def store(request: pytest.FixtureRequest, shop: Any, helpers: Any, tmp_path: Path) -> Iterator[Any]:
    """A store of Feast's with a registry of the shop's."""
    from feast.infra.online_stores.redis import RedisOnlineStoreConfig

    road = helpers.copied(shop, tmp_path / "home")
    opened = open_store(road.settings)
    if request.param == "sqlite":
        yield opened
        return
    options = []
    if request.param == "cluster":
        options = ["--cluster-enabled", "yes", "--cluster-port", str(free_port())]
    server = Redis(tmp_path, *options)
    server.start()
    kind = "redis"
    if options:
        client = redis.Redis(port=server.port)
        client.execute_command("CLUSTER", "ADDSLOTSRANGE", 0, 16383)
        while b"cluster_state:ok" not in client.execute_command("CLUSTER", "INFO"):
            pass
        client.close()
        kind = "redis_cluster"
    opened.config._online_store = RedisOnlineStoreConfig(
        type="redis", redis_type=kind, connection_string=f"127.0.0.1:{server.port}"
    )
    yield opened
    server.stop()


def stats_of(number: int) -> dict[str, Any]:
    columns = CONTRACT.table(STATS).columns
    return {c.name: (float(number) if "mean" in c.name else number) for c in columns}


def rows_of(number: int) -> dict[str, NewRow]:
    history = {"history": f"h{number}".encode(), "sketch": None}
    return {HISTORY: NewRow(history, 5), STATS: NewRow(stats_of(number), 5)}


def test_an_event_is_in_record_and_log_or_in_neither(store: Any) -> None:
    records = user_records(store, CONTRACT, None)
    log = log_of(store.config)
    assert log is not None
    assert list(log.users()) == []
    for user in USERS:
        seen = records.read(user)
        assert (seen.last, seen[STATS]["history_end"]) == (0, None)
        entries = [Entry(user, 100, "one"), Entry(user, 103, "two")]
        assert records.swap(seen, rows_of(1), entries)
        # Of what was seen then nothing is left to swap.
        assert not records.swap(seen, rows_of(2), [Entry(user, 200, "three")])
        now = records.read(user)
        assert (now.last, now[STATS]["history_end"]) == (103, 1)
    assert sorted(log.users()) == sorted(USERS)  # type: ignore[type-var]
    assert log.entries(USERS[:1]) == [Entry(11, 100, "one"), Entry(11, 103, "two")]
    # A trimmed log goes on where it was.
    log.trim({11: 100, 12: 103, 13: 500})
    assert log.entries(USERS[:3]) == [Entry(11, 103, "two")]
    assert sorted(log.users()) == [11, 2_000_000_007]  # type: ignore[type-var]
    assert [records.read(user).last for user in USERS] == [103, 103, 103, 103]
    log.erase([11, 12])
    assert list(log.users()) == [2_000_000_007]
    records.close()
    log.close()


def test_many_records_are_replaced_where_the_log_is_as_it_was_seen(store: Any) -> None:
    records = user_records(store, CONTRACT, None)
    assert records.swap(records.read(12), rows_of(1), [Entry(12, 100, "one")])
    logged = records.logged(USERS)
    assert [one.last for one in logged] == [0, 100, 0, 0]
    assert [len(one.entries) for one in logged] == [0, 1, 0, 0]
    assert records.swap(records.read(13), rows_of(1), [Entry(13, 100, "one")])
    histories = pa.table({"history": [b"new"] * 4, "sketch": pa.nulls(4, pa.binary())})
    stats = pa.table({name: [value] * 4 for name, value in stats_of(9).items()})
    many = ManyRows(USERS, {HISTORY: histories, STATS: stats}, np.full(4, 7))
    assert records.replace(many, logged).tolist() == [True, True, False, True]
    assert [records.read(user)[STATS]["history_end"] for user in USERS] == [9, 9, 1, 9]
    assert records.replace(many, records.logged(USERS)).all()
    records.close()


def test_a_log_outlives_its_record(store: Any) -> None:
    """A hash may expire or be thrown out; the next event has a larger number all the same."""
    if store.config.online_store.type == "sqlite":
        pytest.skip("rows of SQLite do not expire")
    records = user_records(store, CONTRACT, None)
    assert records.swap(records.read(11), rows_of(1), [Entry(11, 1000, "one")])
    client = records._client  # type: ignore[attr-defined]
    client.delete(key_of_user(store.config, 11))
    seen = records.read(11)
    assert (seen.last, seen[STATS]["history_end"]) == (1000, None)
    with pytest.raises(redis.ResponseError, match="equal or smaller"):
        records.swap(seen, rows_of(2), [Entry(11, 999, "behind")])
    # What the log refused has changed nothing.
    assert records.read(11)[STATS]["history_end"] is None
    assert records.swap(seen, rows_of(2), [Entry(11, 1001, "two")])
    assert [len(one.entries) for one in records.logged([11])] == [2]
    records.close()


def test_newest_values_are_written_on_a_cluster_too(store: Any) -> None:
    if store.config.online_store.type == "sqlite":
        pytest.skip("of Redis alone")
    writer = RedisWriter(store, "user_profile")
    columns = {f.name: [None] * 2 for f in store.get_feature_view("user_profile").features}
    assert writer.write({"user_id": [11, 12]}, columns, [5, 5]) == 2
    assert writer.write({"user_id": [11, 12]}, columns, [5, 6]) == 1


def test_names_of_a_users_log_share_the_slot_of_the_users_hash() -> None:
    from feature_repo.store.event_log import LogKeys

    for number in range(200):
        slot = slot_of(f"hash{number}".encode())
        keys = LogKeys.of("memoir", f"user {{{number}}}", slot)
        assert (slot_of(keys.stream), slot_of(keys.users)) == (slot, slot)


def test_an_event_is_written_with_its_time_in_microseconds() -> None:
    event = {
        "item_id": "ü",
        "action": 0,
        "event_timestamp": EPOCH,
        "tags": ["a", "b"],
        "price": 0.1,
    }
    assert json.loads(to_text(event)) == event | {"event_timestamp": 0}
    with pytest.raises(TypeError, match="expected a number"):
        to_text({"price": object()})
