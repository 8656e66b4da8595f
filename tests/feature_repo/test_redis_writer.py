"""Compare-and-set into Feast's Redis layout, against a real Redis, read back with Feast's SDK."""

from __future__ import annotations

import random
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from feature_repo.store.redis_writer import RedisWriter

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
