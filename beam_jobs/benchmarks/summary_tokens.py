"""The job summary_tokens beside stage 1 alone in a loop; memory with one huge history; later runs;
racing writers.

`loop` reads the same histories from the same log and calls the same stage 1, one piece after
another, and writes nothing: the floor. `job` is the whole job on the local runner, writing offline
and online (SQLite), import of Feast and Beam included; `again` is the next run after one user in a
hundred has new events. `race` has four processes write the same keys in Redis at random times, and
counts keys whose stored time is not the newest written.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from feature_repo import datasets
from feature_repo.benchmarks import parser, report
from feature_repo.contract.arrow import arrow_type, from_micros, micros_iso
from feature_repo.contract.counts import Counts
from feature_repo.history import history
from feature_repo.home.catalogue import Catalogue
from feature_repo.home.tables import JobFolder, Manifest
from feature_repo.settings import CHECKOUT, Settings

CONTRACT = datasets.load_contract("online_retail")
START = 1_600_000_000_000_000
PARTS = 4
ITEMS = 2000
CONFIG = {
    "width": 64,
    "num_heads": 2,
    "num_seeds": 64,
    "summary_layers": 3,
    "causal": True,
    "seed_role": "target",
    "block": 64,
}
MODULE = "beam_jobs.benchmarks.summary_tokens"


def main() -> None:
    """Run."""
    flags = parser(MODULE, __doc__)
    flags.add_argument("--users", type=int, help="default 10,000; 300 with --quick")
    flags.add_argument("--events", type=int, help="of each user; default 1,000; 200 with --quick")
    flags.add_argument(
        "--huge",
        type=int,
        help="events of the huge history; default a million; 30,000 with --quick",
    )
    flags.add_argument(
        "--writes", type=int, help="of all racing writers; default a million; 4,000 with --quick"
    )
    flags.add_argument("--child", choices=("loop", "job", "race"), help="internal")
    arguments = flags.parse_args()
    if arguments.child:
        question = json.loads(sys.stdin.read())
        children: dict[str, Callable[..., dict[str, Any]]] = {
            "loop": _loop,
            "job": _job,
            "race": _race_child,
        }
        print(json.dumps(children[arguments.child](**question)))
        return
    quick = arguments.quick
    users = arguments.users or (300 if quick else 10_000)
    events = arguments.events or (200 if quick else 1000)
    huge = arguments.huge or (30_000 if quick else 1_000_000)
    writes = arguments.writes or (4000 if quick else 1_000_000)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        settings = make_home(Path(folder), users, events)
        rows += _throughput(settings, users * events, quick)
        rows += _memory(settings, rows, users, events, huge)
    rows += _race(writes)
    config = {"users": users, "events": events, "huge": huge, "writes": writes, **CONFIG}
    report("summary_tokens", config, rows, arguments.json)


def make_home(root: Path, users: int, events: int) -> Settings:
    """A home with a history log, a bundle of a VISTA with random weights, and an online store;
    nothing is trained.
    """
    from feature_repo.store.store import feast_apply

    home = root / "online_retail"
    home.mkdir(parents=True)
    settings = Settings(
        "online_retail", None, str(home), "local", f"sqlite:///{home}/catalogue.db", False
    )
    write_log(settings, users, events, 0)
    export_bundle(settings)
    feast_apply(settings)
    return settings


def write_log(settings: Settings, users: int, events: int, huge: int, more_for: int = 0) -> None:
    """Publish a history log: so many users with so many random events, one with `huge`; some with a
    few more.
    """
    folder = JobFolder(settings.home, "user_history")
    run_id = f"{users}-{events}-{huge}-{more_for}"
    lengths = np.full(users, events)
    lengths[: more_for or 0] += 3
    lengths = np.r_[lengths, [huge] if huge else []].astype(np.int64)
    parts = []
    for number, chosen in enumerate(np.array_split(np.arange(len(lengths)), PARTS)):
        rows = events_of(chosen, lengths[chosen])
        batch = history.log_part(CONTRACT, rows)
        sink = pa.BufferOutputStream()
        with pa.ipc.new_file(sink, batch.schema) as writer:
            writer.write_batch(batch)
        name = f"part-{number:05d}.arrow"
        parts.append(
            folder.write_part(run_id, "history_log", name, sink.getvalue(), batch.num_rows)
        )
    end = micros_iso(START + int(lengths.max()) * 1_000_000 + 1)
    manifest = Manifest(
        "user_history",
        run_id,
        "online_retail",
        CONTRACT.fingerprint,
        end,
        {},
        {},
        Counts(),
        {"history_log": parts},
    )
    folder.publish(manifest)


def events_of(users: np.ndarray, lengths: np.ndarray) -> pa.Table:
    """Random events, grouped by user, oldest first; a user's first events are the same however many
    follow.
    """
    columns: dict[str, list[np.ndarray]] = {}
    ids = np.array([f"{20000 + item}" for item in range(ITEMS)])
    for user, length in zip(users.tolist(), lengths.tolist(), strict=True):
        rng = np.random.default_rng(user)
        drawn = rng.random((length, 4))
        values = {
            CONTRACT.user.join_key: np.full(length, user),
            CONTRACT.item.join_key: (drawn[:, 0] * ITEMS).astype(np.int64),
            "action": (drawn[:, 1] < 0.1).astype(np.int8),
            "event_timestamp": START + np.arange(length) * 1_000_000,
        }
        for place, column in enumerate(CONTRACT.spec.event_features):
            values[column.name] = 1 + 9 * drawn[:, 2 + place % 2]
        for name, value in values.items():
            columns.setdefault(name, []).append(value)
    whole = {name: np.concatenate(parts) for name, parts in columns.items()}
    arrays: dict[str, pa.Array] = {}
    for name, value in whole.items():
        if name == CONTRACT.item.join_key:
            arrays[name] = pa.DictionaryArray.from_arrays(
                pa.array(value.astype(np.int32)), pa.array(ids)
            ).cast(pa.string())
        elif name == "event_timestamp":
            arrays[name] = from_micros(value)
        else:
            arrays[name] = pa.array(value).cast(
                arrow_type(CONTRACT.table("events").column(name).dtype), safe=False
            )
    return pa.table(arrays)


def export_bundle(settings: Settings) -> None:
    """A bundle with random weights, recorded in the catalogue."""
    import torch

    from modeling import models
    from modeling.bundle import bundle
    from modeling.inputs.columns import Vocabulary, nothing_known
    from modeling.inputs.encoder import Encoder
    from modeling.recipes import SERVICE, Recipe

    items = pa.array([f"{20000 + item}" for item in range(ITEMS)])
    vocabularies = nothing_known(CONTRACT) | {CONTRACT.item.join_key: Vocabulary(items)}
    encoder = Encoder(CONTRACT, vocabularies, 256)
    torch.manual_seed(0)
    model = models.build("vista", CONFIG, encoder.sizes)
    recipe = Recipe("random", "vista", SERVICE, CONFIG, 256)
    path, digest = bundle.export(
        settings.path("bundles"),
        model=model,
        encoder=encoder,
        recipe=recipe,
        metrics={},
        trained_on="",
        data_as_of="2020-01-01T00:00:00+00:00",
    )
    tokens = bundle.load(path, CONTRACT, digest).tokens
    Catalogue(settings.catalogue_url).add_bundle(
        digest=digest,
        dataset="online_retail",
        recipe="random",
        fingerprint=CONTRACT.fingerprint,
        path=str(path),
        metrics={},
        tokens=tokens,
    )


def _throughput(settings: Settings, events: int, quick: bool) -> list[dict[str, Any]]:
    loop = _ask("loop", {"home": settings.home})
    rows = [{"case": "loop", "workers": 1, **loop, "events_per_s": events / loop["wall_s"]}]
    for workers in (1,) if quick else (1, 2):
        shutil.rmtree(Path(settings.home, "summary_tokens"), ignore_errors=True)
        job = _ask("job", {"home": settings.home, "workers": workers})
        rows.append(
            {
                "case": "job",
                "workers": workers,
                **job,
                "events_per_s": events / job["wall_s"],
                "of_loop": job["wall_s"] / loop["wall_s"],
            }
        )
    if quick:
        return rows
    users = JobFolder(settings.home, "summary_tokens").require().counts["users"]
    write_log(settings, users, events // users, 0, more_for=max(users // 100, 1))
    again = _ask("job", {"home": settings.home, "workers": 1})
    rows.append(
        {
            "case": "again, 1 % with new events",
            "workers": 1,
            **again,
            "of_loop": again["wall_s"] / loop["wall_s"],
        }
    )
    return rows


def _memory(
    settings: Settings, rows: list[dict[str, Any]], users: int, events: int, huge: int
) -> list[dict[str, Any]]:
    alone = next(row["peak_mb"] for row in rows if row["case"] == "job" and row["workers"] == 1)
    write_log(settings, users, events, huge)
    shutil.rmtree(Path(settings.home, "summary_tokens"), ignore_errors=True)
    found = _ask("job", {"home": settings.home, "workers": 1})
    return [
        {
            "case": f"job, one user of {huge:,} events more",
            "workers": 1,
            **found,
            "of_peak": found["peak_mb"] / alone,
        }
    ]


def _settings(home: str) -> Settings:
    return Settings("online_retail", None, home, "local", f"sqlite:///{home}/catalogue.db", False)


def _loop(home: str) -> dict[str, Any]:
    """Stage 1 over every piece of the log, as the job takes them, and nothing else."""
    import torch

    from beam_jobs.summary_tokens.summarise import piece_ends
    from modeling.bundle.summary import load_summariser

    torch.set_num_threads(1)
    row = Catalogue(_settings(home).catalogue_url).bundle("online_retail", "random")
    summariser = load_summariser(str(_settings(home).path(row.path)), CONTRACT, row.digest)
    folder = JobFolder(home, "user_history")
    started = time.perf_counter()
    cpu = time.process_time()
    for path in folder.paths("history_log"):
        log = history.HistoryLog(CONTRACT, folder, [path])
        item_of_key = summariser.encoder.vocabularies[CONTRACT.item.join_key].indices_of(log.items)
        for start, stop in piece_ends(log.lengths, summariser.bytes_of_user()):
            rows = np.arange(start, stop)
            histories = log.gather(rows, log.lengths[rows])
            summariser.whole(histories, item_of_key, np.zeros(len(rows), np.int64))
    return {
        "wall_s": time.perf_counter() - started,
        "cpu_s": time.process_time() - cpu,
        "peak_mb": _peak_mb(),
    }


def _job(home: str, workers: int) -> dict[str, Any]:
    """The whole job, from the command's beginning to its manifest."""
    started = time.perf_counter()
    cpu = time.process_time()
    from beam_jobs.engine.options import TokenOptions
    from beam_jobs.engine.run import run
    from beam_jobs.registry import load_job

    job = load_job("summary_tokens")
    settings = _settings(home)
    flags = ["--runner=FnApiRunner"]
    if workers > 1:
        flags += [f"--direct_num_workers={workers}", "--direct_running_mode=multi_processing"]
    options = job.resolve(settings, TokenOptions(bundle="random"))
    outcome = run(job, settings, options, flags, as_of=None, max_bad_fraction=None)
    counts = outcome.manifest.counts
    found = {
        "wall_s": time.perf_counter() - started,
        "cpu_s": time.process_time() - cpu,
        "peak_mb": _peak_mb(),
    }
    return {**found, "written": counts["users_written"], "dead": counts["dead_letters"]}


def _peak_mb() -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 1024


def _race(writes: int) -> list[dict[str, Any]]:
    """Four writers of one view; each remembers the newest time that it wrote to each key."""
    if not shutil.which("redis-server"):
        return [{"case": "race", "skipped": "redis-server is not installed"}]
    with socket.socket() as free, tempfile.TemporaryDirectory() as folder:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        command = [
            "redis-server",
            "--port",
            str(port),
            "--bind",
            "127.0.0.1",
            "--save",
            "",
            "--appendonly",
            "no",
            "--dir",
            folder,
        ]
        redis = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        try:
            _wait(port)
            keys = max(writes // 100, 10)
            question = {
                "address": f"127.0.0.1:{port}",
                "folder": folder,
                "keys": keys,
                "writes": writes // 4,
            }
            _ask("race", {**question, "seed": -1})  # registers the view
            started = time.perf_counter()
            racing = [_start("race", {**question, "seed": seed}) for seed in range(4)]
            newest: dict[str, int] = {}
            for process in racing:
                for key, at in _answer(process)["newest"].items():
                    newest[key] = max(newest.get(key, 0), at)
            wall = time.perf_counter() - started
            stored = _ask("race", {**question, "seed": -2})["stored"]
        finally:
            redis.terminate()
            redis.wait(timeout=10)
    older = sum(stored[key] != at for key, at in newest.items())
    return [
        {
            "case": "race",
            "workers": 4,
            "wall_s": wall,
            "written": writes,
            "keys": len(newest),
            "older_left": older,
        }
    ]


def _race_child(address: str, folder: str, keys: int, writes: int, seed: int) -> dict[str, Any]:
    from feast import Entity, FeatureStore, FeatureView, Field, FileSource, RepoConfig, ValueType
    from feast.infra.online_stores.redis import RedisOnlineStoreConfig
    from feast.types import Bytes, Int64

    from feature_repo.store.redis_writer import RedisWriter

    config = RepoConfig(
        project="race",
        provider="local",
        registry=f"{folder}/registry.db",
        online_store=RedisOnlineStoreConfig(connection_string=address),
        entity_key_serialization_version=3,
    )
    store = FeatureStore(config=config)
    if seed == -1:
        user = Entity(name="user", join_keys=["user_id"], value_type=ValueType.INT64)
        fields = [Field(name="tokens", dtype=Bytes), Field(name="at", dtype=Int64)]
        source = FileSource(path=f"{folder}/none.parquet", timestamp_field="event_timestamp")
        store.apply(
            [user, FeatureView(name="summary", entities=[user], schema=fields, source=source)]
        )
        return {}
    if seed == -2:
        read = store.get_online_features(
            ["summary:at"], [{"user_id": key} for key in range(keys)]
        ).to_dict()
        return {"stored": {str(key): at for key, at in enumerate(read["at"])}}
    rng = np.random.default_rng(seed)
    writer = RedisWriter(store, "summary")
    newest = dict[str, int]()
    for start in range(0, writes, 1000):
        chosen = rng.integers(keys, size=min(1000, writes - start)).tolist()
        times = (START + rng.integers(10**12, size=len(chosen))).tolist()
        writer.write({"user_id": chosen}, {"tokens": [b"t" * 64] * len(chosen), "at": times}, times)
        for key, at in zip(chosen, times, strict=True):
            newest[str(key)] = max(newest.get(str(key), 0), at)
    return {"newest": newest}


def _start(case: str, question: dict[str, Any]) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", MODULE, "--child", case],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=CHECKOUT,
        env=environment,
    )
    assert process.stdin is not None
    process.stdin.write(json.dumps(question))
    process.stdin.close()
    process.stdin = None
    return process


def _answer(process: subprocess.Popen[str]) -> dict[str, Any]:
    said, errors = process.communicate()
    if process.returncode:
        raise RuntimeError(f"a measurement failed: {errors[-2000:]}")
    answer: dict[str, Any] = json.loads(said.strip().splitlines()[-1])
    return answer


def _ask(case: str, question: dict[str, Any]) -> dict[str, Any]:
    return _answer(_start(case, question))


def _wait(port: int) -> None:
    for _ in range(200):
        with socket.socket() as sock:
            if sock.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.05)
    raise RuntimeError("redis-server did not start within ten seconds")


if __name__ == "__main__":
    main()
