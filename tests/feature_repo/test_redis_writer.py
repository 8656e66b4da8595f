"""Compare-and-set into Feast's Redis layout, against a real Redis, read back with Feast's SDK."""

from __future__ import annotations

import random
import struct
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from feature_repo.store.redis_writer import RedisWriter, split_key

NOW = 1_700_000_000_000_123


@pytest.fixture
def store(tmp_path: Path, redis_address: str) -> Any:
    from feast import Entity, FeatureStore, FeatureView, Field, FileSource, RepoConfig, ValueType
    from feast.infra.online_stores.redis import RedisOnlineStoreConfig
    from feast.types import Bytes, Int64

    config = RepoConfig(
        project=f"p{random.getrandbits(48):x}",
        provider="local",
        registry=str(tmp_path / "registry.db"),
        online_store=RedisOnlineStoreConfig(connection_string=redis_address),
        entity_key_serialization_version=3,
    )
    made = FeatureStore(config=config)
    user = Entity(name="user", join_keys=["user_id"], value_type=ValueType.STRING)
    source = FileSource(path=str(tmp_path / "none.parquet"), timestamp_field="event_timestamp")
    fields = [Field(name="tokens", dtype=Bytes), Field(name="events", dtype=Int64)]
    made.apply(
        [
            user,
            FeatureView(
                name="summary", entities=[user], schema=fields, source=source, ttl=timedelta(0)
            ),
        ]
    )
    return made


def read(store: Any, keys: list[str]) -> dict[str, list[Any]]:
    found = store.get_online_features(
        ["summary:tokens", "summary:events"], [{"user_id": key} for key in keys]
    )
    result: dict[str, list[Any]] = found.to_dict()
    return result


def test_what_is_written_is_what_feast_reads_and_what_feast_would_have_written(store: Any) -> None:
    keys, tokens = ["u1", "u2", "ü"], [b"\x00\xff" * 9, b"", b"x" * 70_000]
    writer = RedisWriter(store, "summary")
    assert writer.write({"user_id": keys}, {"tokens": tokens, "events": [1, 2, 3]}, [NOW] * 3) == 3
    found = read(store, [*keys, "nobody"])
    assert found["tokens"] == [*tokens, None]
    assert found["events"] == [1, 2, 3, None]
    ours = {key: writer._client.hgetall(key) for key in writer._client.keys(f"*{store.project}")}
    writer._client.delete(*ours)
    stamp = datetime.fromtimestamp(0, UTC) + timedelta(microseconds=NOW)
    rows = pd.DataFrame(
        {"user_id": keys, "tokens": tokens, "events": [1, 2, 3], "event_timestamp": [stamp] * 3}
    )
    store.write_to_online_store("summary", df=rows)
    assert {
        key: writer._client.hgetall(key) for key in writer._client.keys(f"*{store.project}")
    } == ours


def test_only_a_newer_value_replaces_an_older_one(store: Any) -> None:
    writer = RedisWriter(store, "summary")

    def write(events: int, time: int) -> int:
        return writer.write({"user_id": ["u"]}, {"tokens": [b"t"], "events": [events]}, [time])

    assert write(1, NOW) == 1
    assert [write(2, NOW), write(3, NOW - 1), write(4, NOW - 1_000_000), write(5, 0)] == [
        0,
        0,
        0,
        0,
    ]
    assert read(store, ["u"])["events"] == [1]
    for step, time in enumerate((NOW + 1, NOW + 1_000_000, NOW + 2**40)):
        assert write(10 + step, time) == 1
        assert read(store, ["u"])["events"] == [10 + step]


def test_racing_writers_leave_no_older_value(store: Any) -> None:
    keys, rounds = [f"u{number}" for number in range(40)], 60

    def race(seed: int) -> None:
        writer, rng = RedisWriter(store, "summary"), random.Random(seed)
        for _ in range(rounds):
            times = [NOW + rng.randrange(10**9) for _ in keys]
            with lock:
                for key, time in zip(keys, times, strict=True):
                    newest[key] = max(newest.get(key, 0), time)
            writer.write({"user_id": keys}, {"tokens": [b"t"] * len(keys), "events": times}, times)

    lock, newest = threading.Lock(), dict[str, int]()
    threads = [threading.Thread(target=race, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert read(store, keys)["events"] == [newest[key] for key in keys]


def test_what_cannot_be_written_is_refused(store: Any, tmp_path: Path) -> None:
    writer = RedisWriter(store, "summary")
    for values, times, what in (
        ({"tokens": [b""]}, [NOW], "expected the features"),
        ({"tokens": [b"", b""], "events": [1]}, [NOW], "a value for each"),
        ({"tokens": [b""], "events": [1]}, [-1], "not negative"),
    ):
        with pytest.raises(ValueError, match=what):
            writer.write({"user_id": ["u"]}, values, times)
    assert writer.write({"user_id": []}, {"tokens": [], "events": []}, []) == 0
    from feast.infra.online_stores.sqlite import SqliteOnlineStoreConfig

    store.config.online_config = {"type": "sqlite"}
    store.config._online_store = SqliteOnlineStoreConfig(path=str(tmp_path / "online.db"))
    with pytest.raises(ValueError, match="write through Feast there"):
        RedisWriter(store, "summary")


def test_a_project_whose_name_is_the_end_of_another_leaves_the_other_alone(
    store: Any, tmp_path: Path
) -> None:
    """Keys are read to their last byte: `p1` is the end of `shop-p1`, and of no key of it."""
    shared = store.config.model_copy(update={"project": f"other{store.project}"})
    from feast import FeatureStore

    longer = FeatureStore(config=shared)
    longer.apply([*store.list_entities(), *store.list_feature_views()])
    for one in (store, longer):
        RedisWriter(one, "summary").write(
            {"user_id": ["u1"]}, {"tokens": [b"x"], "events": [1]}, [NOW]
        )
    writer = RedisWriter(store, "summary")
    prefix = struct.pack("<III7s", 1, 2, 7, b"user_id")
    assert writer.remove(prefix) == 1
    assert read(store, ["u1"])["events"] == [None]
    assert read(longer, ["u1"])["events"] == [1]


@given(
    st.lists(st.one_of(st.integers(-(2**63), 2**63 - 1), st.text()), min_size=1, max_size=3),
    st.text(max_size=20),
)
def test_a_key_is_split_where_its_project_begins(values: list[Any], project: str) -> None:
    from feast.infra.online_stores.helpers import _redis_key
    from feast.protos.feast.types.EntityKey_pb2 import EntityKey
    from feast.protos.feast.types.Value_pb2 import Value

    made = [Value(string_val=v) if isinstance(v, str) else Value(int64_val=v) for v in values]
    names = [f"key{n}" for n in range(len(values))]
    key = _redis_key(project, EntityKey(join_keys=names, entity_values=made), 3)
    stored = split_key(key)
    assert stored is not None
    assert stored.project == project.encode()
    assert stored.entity + stored.project == key
    assert all(split_key(stored.entity[:cut]) is None for cut in range(len(stored.entity)))


@given(st.binary(max_size=64))
def test_what_is_no_entity_key_is_none(data: bytes) -> None:
    stored = split_key(data)
    assert stored is None or stored.entity + stored.project == data


def test_keys_expire_as_the_store_is_configured(store: Any, redis_address: str) -> None:
    from feast import FeatureStore, RepoConfig
    from feast.infra.online_stores.redis import RedisOnlineStoreConfig

    config = RepoConfig(
        project=store.project,
        provider="local",
        registry=store.config.registry.path,
        online_store=RedisOnlineStoreConfig(connection_string=redis_address, key_ttl_seconds=100),
        entity_key_serialization_version=3,
    )
    rows = {"tokens": [b"x"], "events": [1]}
    writer = RedisWriter(FeatureStore(config=config), "summary")
    writer.write({"user_id": ["u1"]}, rows, [NOW])
    RedisWriter(store, "summary").write({"user_id": ["u2"]}, rows, [NOW])
    found = {key: writer._client.ttl(key) for key in writer._client.keys(f"*{store.project}")}
    assert {b"u1" in key: time > 0 for key, time in found.items()} == {True: True, False: False}
