"""Users read straight from Redis: what Feast reads, in its time, or a declared error."""

from __future__ import annotations

import asyncio
import random
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from feature_repo import datasets
from serving.benchmarks.faultproxy import Fault, FaultProxy
from serving.stores.features import FeastReader
from serving.stores.redis_hashes import StoreReadError, WrongStoreError
from serving.stores.redis_reader import DamagedValueError, RedisReader, decoded

CONTRACT = datasets.load_contract("online_retail")
NOW = datetime(2026, 1, 1, tzinfo=UTC)
TEXTS = ["", "a", "ü", "x" * 300, "né\u0301", "\u202e rtl", "🛒", " spaces ", "new\nline"]
Draw = Callable[[random.Random], Any]


def some_kinds() -> dict[str, tuple[Any, Draw]]:
    """Types of Feast's, and random values of each."""
    from feast import types

    def integer(bits: int) -> Draw:
        return lambda rng: rng.choice([0, -1, 2 ** (bits - 1) - 1, -(2 ** (bits - 1)), 7])

    def listed(draw: Draw) -> Draw:
        return lambda rng: [draw(rng) for _ in range(rng.randrange(1, 4))]

    def text(rng: random.Random) -> str:
        return rng.choice(TEXTS)

    return {
        "whole": (types.Int64, integer(64)),
        "small": (types.Int32, integer(32)),
        "number": (types.Float64, lambda rng: rng.choice([0.0, -0.0, 1e300, 0.1, float("inf")])),
        "single": (types.Float32, lambda rng: rng.choice([0.0, 0.5, -2.25, 1e30])),
        "text": (types.String, text),
        "data": (types.Bytes, lambda rng: rng.randbytes(rng.randrange(0, 200))),
        "flag": (types.Bool, lambda rng: rng.random() < 0.5),
        "moment": (types.UnixTimestamp, lambda rng: NOW + timedelta(seconds=rng.randrange(10**6))),
        "wholes": (types.Array(types.Int64), listed(integer(64))),
        "singles": (types.Array(types.Float32), listed(lambda rng: rng.choice([0.5, -1.5]))),
        "texts": (types.Array(types.String), listed(text)),
    }


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, redis_address: str) -> Any:
    """A store on Redis with random views of users, by user and by user and token version."""
    from feast import (
        Entity,
        FeatureService,
        FeatureStore,
        FeatureView,
        Field,
        FileSource,
        RepoConfig,
        ValueType,
    )
    from feast.infra.online_stores.redis import RedisOnlineStoreConfig

    folder = tmp_path_factory.mktemp("views")
    config = RepoConfig(
        project=f"p{random.Random(1).getrandbits(48):x}",
        provider="local",
        registry=str(folder / "registry.db"),
        online_store=RedisOnlineStoreConfig(connection_string=redis_address),
        entity_key_serialization_version=3,
    )
    store = FeatureStore(config=config)
    user = Entity(name="user", join_keys=["user_id"], value_type=ValueType.INT64)
    version = Entity(name="version", join_keys=["token_version"], value_type=ValueType.STRING)
    source = FileSource(path=str(folder / "none.parquet"), timestamp_field="event_timestamp")
    kinds = some_kinds()

    def view(name: str, entities: list[Any], prefix: str) -> Any:
        fields = [Field(name=f"{prefix}{n}", dtype=kind) for n, (kind, _) in kinds.items()]
        return FeatureView(
            name=name, entities=entities, schema=fields, source=source, ttl=timedelta(0)
        )

    views = [
        view("one", [user], ""),
        view("two", [user], "also_"),
        view("tokens", [user, version], "token_"),
    ]
    service = FeatureService(name="users", features=[views[0], views[1][["also_text"]], views[2]])
    store.apply([user, version, *views, service])
    return store, views


def write_randomly(store: Any, views: list[Any], users: list[int], rng: random.Random) -> None:
    """Random rows, a third of all values missing; one user in five lacks a view altogether."""
    import pyarrow as pa

    from feature_repo.store.online_rows import write_rows

    draws = {name: draw for name, (_, draw) in some_kinds().items()}
    for view in views:
        for user in users:
            if rng.random() < 0.2:
                continue
            row: dict[str, Any] = {"user_id": [user]}
            if view.name == "tokens":
                row["token_version"] = [rng.choice(["v1", "v2"])]
            for field in view.features:
                value = draws[field.name.removeprefix("also_").removeprefix("token_")](rng)
                row[field.name] = [None if rng.random() < 1 / 3 else value]
            stamp = pa.array([NOW], pa.timestamp("us", "UTC"))
            table = pa.table({**row, "event_timestamp": stamp, "created_timestamp": stamp})
            write_rows(store, view.name, table)


def test_both_readers_agree_on_random_values(world: Any) -> None:
    """Eleven types, three views, missing values, missing rows, another token version, unknown
    users.
    """
    store, views = world
    rng = random.Random(7)
    users = [rng.choice([0, -1, 2**63 - 1, -(2**63)]) if n < 4 else n for n in range(400)]
    write_randomly(store, views, users, rng)
    reader = RedisReader(store, CONTRACT, "users", "v1")

    async def read_all() -> list[dict[str, Any]]:
        found = [await reader.read_values(user, 5.0) for user in [*users, 10**9]]
        await reader.hashes.close()
        return found

    ours = asyncio.run(read_all())
    service = store.get_feature_service("users")
    compared = 0
    for user, values in zip([*users, 10**9], ours, strict=True):
        row = {"user_id": user, "token_version": "v1"}
        theirs = store.get_online_features(service, [row]).to_dict()
        for name, value in values.items():
            assert [value] == theirs[name], (user, name)
            assert type(value) is type(theirs[name][0])
            compared += 1
    assert compared == 401 * 23
    assert sum(value is not None for values in ours for value in values.values()) > 3_000


@pytest.fixture(scope="module")
def on_redis(
    trained_shop: Any, redis_address: str, postgres_url: str, helpers: Any
) -> Iterator[Any]:
    """The shop's tables online on Redis, with the SQL registry."""
    import os

    names = {
        "MEMOIR_REGISTRY_URL": postgres_url,
        "MEMOIR_REDIS": redis_address,
        "MEMOIR_DATASET": trained_shop.settings.dataset,
    }
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(names)
    production = replace(trained_shop.settings, profile="production")
    store = helpers.apply_in_process(production)
    helpers.run_jobs(production, "materialize")
    yield store, production
    for name, value in before.items():
        if value is None:
            del os.environ[name]
        else:
            os.environ[name] = value


def test_a_users_row_is_what_feast_gives(on_redis: Any) -> None:
    """History, statistics, profile and sketch, decoded."""
    from feature_repo.home.tables import JobFolder

    store, settings = on_redis
    service = "ranking_v1_online"
    slow = FeastReader(store, CONTRACT, service)
    fast = RedisReader(store, CONTRACT, service)
    users = JobFolder(settings.home, "user_history").read("user_history")["user_id"].to_pylist()

    async def read_all() -> list[Any]:
        found = [await fast.read_user(user, 5.0) for user in [*users, 10**9]]
        await fast.hashes.close()
        return found

    for user, row in zip([*users, 10**9], asyncio.run(read_all()), strict=True):
        expected = slow.read_user(user)
        assert row.columns == expected.columns
        assert row.problems == expected.problems
        assert row.history == expected.history
        assert (row.sketch is None) == (expected.sketch is None)
        if row.sketch is not None and expected.sketch is not None:
            assert row.sketch.as_of == expected.sketch.as_of
            ours, theirs = (one.sketch.sketch for one in (row, expected))
            assert (ours._rows_RS == theirs._rows_RS).all()
            assert (ours._weights_RK == theirs._weights_RK).all()


@pytest.fixture
def fake_redis() -> Iterator[Callable[[bytes | None], str]]:
    """Starts a listener that speaks as Redis does until it is asked for values: these it answers with
    the same bytes each time, or with nothing at all.
    """
    listeners: list[socket.socket] = []

    def start(reply: bytes | None) -> str:
        listening = socket.create_server(("127.0.0.1", 0))
        listeners.append(listening)

        def answer(connection: socket.socket) -> None:
            stream = connection.makefile("rb")
            with connection:
                while line := stream.readline():
                    words = []
                    for _ in range(int(line[1:])):
                        size = int(stream.readline()[1:])
                        words.append(stream.read(size + 2)[:-2].upper())
                    if words[0] == b"CLIENT" or words[0] == b"MULTI":
                        connection.sendall(b"+OK\r\n")
                    elif words[0] == b"HMGET" and reply is not None:
                        connection.sendall(b"+QUEUED\r\n")
                    elif reply is not None:
                        connection.sendall(reply)

        def accept() -> None:
            while True:
                try:
                    connection, _ = listening.accept()
                except OSError:
                    return
                threading.Thread(target=answer, args=(connection,), daemon=True).start()

        threading.Thread(target=accept, daemon=True).start()
        return f"127.0.0.1:{listening.getsockname()[1]}"

    yield start
    for listening in listeners:
        listening.close()


def array(*parts: bytes) -> bytes:
    return b"*%d\r\n" % len(parts) + b"".join(parts)


NIL, TEXT = b"$-1\r\n", b"$1\r\na\r\n"
# The plan of `world` asks twelve fields of the user's hash and eleven of the tokens'.
WHOLE = array(array(*[NIL] * 12), array(*[NIL] * 11))
SHAPES = {
    "silence": None,
    "loading": b"-LOADING Redis is loading the dataset in memory\r\n",
    "read only": b"-READONLY You can't write against a read only replica.\r\n",
    "out of memory": b"-OOM command not allowed\r\n",
    "moved": b"-MOVED 3999 127.0.0.1:6381\r\n",
    "wrong type": b"-WRONGTYPE Operation against a key\r\n",
    "garbage": b"\x00\xff garbage that is no protocol",
    "cut text": b"$3\r\nab",
    "a number": b":5\r\n",
    "a word": b"+OK\r\n",
    "no array": b"*-1\r\n",
    "no text": NIL,
    "nothing": b"*0\r\n",
    "a text": TEXT,
    "a null": b"_\r\n",
    "a truth": b"#t\r\n",
    "a fraction": b",1.5\r\n",
    "a large number": b"(12345678901234567890\r\n",
    "a verbatim text": b"=7\r\ntxt:abc\r\n",
    "a map": b"%1\r\n+a\r\n+b\r\n",
    "a set": b"~1\r\n+a\r\n",
    "one hash": array(array(*[NIL] * 12)),
    "three hashes": array(*[array(*[NIL] * 12)] * 3),
    "one value fewer": array(array(*[NIL] * 11), array(*[NIL] * 11)),
    "one value more": array(array(*[NIL] * 13), array(*[NIL] * 11)),
    "nested": array(array(array(*[NIL] * 12)), array(*[NIL] * 11)),
    "values that are arrays": array(array(*[b"*0\r\n"] * 12), array(*[NIL] * 11)),
    "values that are numbers": array(array(*[b":1\r\n"] * 12), array(*[NIL] * 11)),
    "hashes that are texts": array(TEXT, TEXT),
    "hashes that are none": array(b"*-1\r\n", b"*-1\r\n"),
    "an error inside": array(b"-ERR no\r\n", array(*[NIL] * 11)),
    "a negative size": b"*-5\r\n",
}


@pytest.mark.parametrize("shape", SHAPES)
def test_a_store_that_does_not_answer_as_one_is_a_declared_error_in_its_time(
    world: Any, fake_redis: Callable[[bytes | None], str], shape: str
) -> None:
    """It is the store that is away, and no user's damage: the breaker counts it."""
    store, _ = world
    reader = RedisReader(store, CONTRACT, "users", "v1")
    host, _, port = fake_redis(SHAPES[shape]).partition(":")
    reader.hashes.options |= {"host": host, "port": int(port)}

    async def timed() -> float:
        started = time.perf_counter()
        for _ in range(2):  # what is left of one answer is not taken for the next
            with pytest.raises(StoreReadError) as raised:
                await reader.read_values(1, 0.2)
            assert not isinstance(raised.value, DamagedValueError)
        spent = time.perf_counter() - started
        await reader.hashes.close()
        return spent

    assert (
        asyncio.run(timed()) < 4
    )  # seconds, not the minutes of retries; the deadline is 0.2 twice


def test_the_fake_speaks_as_redis_does(
    world: Any, fake_redis: Callable[[bytes | None], str]
) -> None:
    store, _ = world
    reader = RedisReader(store, CONTRACT, "users", "v1")
    host, _, port = fake_redis(WHOLE).partition(":")
    reader.hashes.options |= {"host": host, "port": int(port)}

    async def read() -> dict[str, Any]:
        found = await reader.read_values(1, 1.0)
        await reader.hashes.close()
        return found

    assert set(asyncio.run(read()).values()) == {None}


def test_a_value_of_another_kind_is_damage_of_one_user(world: Any) -> None:
    from feast.protos.feast.types.Value_pb2 import Value

    number = Value(int64_val=5).SerializeToString()
    assert decoded("history", number) == 5
    with pytest.raises(DamagedValueError, match="stored as int64_val, expected bytes_val"):
        decoded("history", number, "bytes_val")
    assert decoded("history", Value().SerializeToString(), "bytes_val") is None


def test_over_tls_the_first_read_of_each_connection_is_in_its_time(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, helpers: Any, world: Any
) -> None:
    trustme = pytest.importorskip("trustme")
    program = shutil.which("redis-server")
    if program is None:
        pytest.skip("redis-server is not installed")
    authority, port = trustme.CA(), helpers.free_port()
    issued = authority.issue_cert("127.0.0.1")
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    issued.private_key_pem.write_to_path(str(tmp_path / "key.pem"))
    issued.cert_chain_pems[0].write_to_path(str(tmp_path / "cert.pem"))
    command = [program, "--port", "0", "--tls-port", str(port), "--save", "", "--bind", "127.0.0.1"]
    command += ["--tls-cert-file", str(tmp_path / "cert.pem"), "--tls-auth-clients", "no"]
    command += ["--tls-key-file", str(tmp_path / "key.pem"), "--tls-ca-cert-file"]
    running = subprocess.Popen([*command, str(tmp_path / "ca.pem")], stdout=subprocess.DEVNULL)
    try:
        helpers.wait_for_port(port, running)
        store, _ = world
        plain = store.config.online_store.connection_string
        store.config.online_store.connection_string = (
            f"127.0.0.1:{port},ssl=true,ssl_ca_certs={tmp_path / 'ca.pem'}"
        )
        reader = RedisReader(store, CONTRACT, "users", "v1")
        store.config.online_store.connection_string = plain

        async def read_at_once() -> int:
            found = await asyncio.gather(*(reader.read_values(n, 0.5) for n in range(4)))
            await reader.hashes.close()
            return len(found)

        assert asyncio.run(read_at_once()) == 4
        made = reader.hashes._shared_tls
        assert made is not None
        first, second = made(ssl_ca_certs=str(tmp_path / "ca.pem")), made()
        assert first.ssl_context is second.ssl_context  # made once, and not within a read's time
    finally:
        running.terminate()
        running.wait(timeout=10)


def test_a_refused_connection_is_a_declared_error(world: Any) -> None:
    store, _ = world
    reader = RedisReader(store, CONTRACT, "users", "v1")
    reader.hashes.options |= {"host": "127.0.0.1", "port": 1}
    with pytest.raises(StoreReadError, match="did not answer"):
        asyncio.run(reader.read_values(1, 0.2))


def test_another_store_is_refused(trained_shop: Any) -> None:
    with pytest.raises(WrongStoreError, match="sqlite"):
        RedisReader(trained_shop.store, CONTRACT, "ranking_v1_online")


@pytest.mark.parametrize(
    ("fault", "fails"),
    [
        (Fault(delay_s=0.02), False),
        (Fault(delay_s=0.5), True),
        (Fault(silent=True), True),
        (Fault(refuse=True), True),
        (Fault(cut_after=7), True),
        (Fault(bytes_per_s=20), True),
    ],
)
def test_a_faulty_way_to_redis_is_an_error_in_time_and_no_wrong_value(
    world: Any, redis_address: str, fault: Fault, fails: bool
) -> None:
    """And the next read, on a sound way, is right."""
    store, views = world
    write_randomly(store, views, [5_000], random.Random(3))
    reader = RedisReader(store, CONTRACT, "users", "v1")

    async def run() -> tuple[Any, Any, Any]:
        direct = await reader.read_values(5_000, 5.0)
        await reader.hashes.close()
        host, _, port = redis_address.partition(":")
        async with FaultProxy(host, int(port)) as proxy:
            reader.hashes.options |= {"host": "127.0.0.1", "port": proxy.port}
            await reader.read_values(5_000, 5.0)
            proxy.fault = fault
            began = time.perf_counter()
            try:
                during = await reader.read_values(5_000, 0.2)
            except StoreReadError:
                during = None
            assert time.perf_counter() - began < 1.0
            proxy.fault = Fault()
            after = await reader.read_values(5_000, 5.0)
        await reader.hashes.close()
        return direct, during, after

    direct, during, after = asyncio.run(run())
    assert during == (None if fails else direct)
    assert after == direct


def test_bytes_that_changed_on_the_way_are_never_another_users_history(
    on_redis: Any, redis_address: str
) -> None:
    """Checksums notice what the protocol does not."""
    from feature_repo.home.tables import JobFolder

    store, settings = on_redis
    reader = RedisReader(store, CONTRACT, "ranking_v1_online")
    users = JobFolder(settings.home, "user_history").read("user_history")["user_id"].to_pylist()

    async def run() -> int:
        right = {user: await reader.read_user(user, 5.0) for user in users[:20]}
        await reader.hashes.close()
        host, _, port = redis_address.partition(":")
        noticed = 0
        async with FaultProxy(host, int(port), seed=5) as proxy:
            reader.hashes.options |= {"host": "127.0.0.1", "port": proxy.port}
            proxy.fault = Fault(corrupt=1.0)
            for round in range(10):
                for user, expected in right.items():
                    try:
                        found = await reader.read_user(user, 0.2)
                    except StoreReadError:
                        noticed += 1
                        continue
                    if found.history is None or found.problems:
                        noticed += 1
                    else:
                        assert found.history == expected.history, round
            await reader.hashes.close()
        return noticed

    assert asyncio.run(run()) > 100
