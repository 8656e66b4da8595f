"""Our server beside a plain one with the same weights: FastAPI, Feast's SDK, and every candidate appended to
a copy of the history of its own.

The plain twin is what most people write first (`plain_app`): it reads user and candidates through the SDK
for each request, encodes them with the same encoder, repeats the user once for each candidate and scores all
in one forward, with torch's own number of threads. Its scores are ours, which is shown. Both rank the same
requests of synthetic users with L events, 128 candidates out of 3,000 items, over one Redis that is started
here; client, store and server share the machine. Floor: our model's `encode_user` and `score` alone.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from feature_repo.arrow import arrow_schema, arrow_type, history_schema
from feature_repo.benchmarks import parser, report
from feature_repo.contract import Contract
from feature_repo.datasets import load_contract
from feature_repo.history import pack
from feature_repo.online_rows import write_rows
from feature_repo.schema import CREATED_TIMESTAMP, EVENT_TIMESTAMP
from feature_repo.settings import CHECKOUT, Settings
from feature_repo.store import note_epoch, open_store
from modeling import bundle as bundles
from modeling import models, recipes
from modeling.columns import Index, Vocabulary
from modeling.encoder import Encoder
from serving.benchmarks.faults import Redis
from serving.benchmarks.load import server, wait_until_ready
from serving.benchmarks.openloop import Target, closed_loop
from serving.command import listenable

LENGTHS, CANDIDATES, ITEMS, USERS = (512, 1024), 128, 3_000, 20
RANKERS = {"small": (64, 2), "base": (128, 4)}  # width and layers
NOW = datetime(2011, 12, 9, tzinfo=UTC)
BUNDLE = "PLAIN_TWIN_BUNDLE"  # environment of the twin: folder of the bundle
WORDS = pa.array(["word"])


def main() -> None:
    """Run."""
    arguments = parser("serving.benchmarks.naive", __doc__).parse_args()
    rows = []
    with store() as settings:
        for ranker in list(RANKERS)[: 1 if arguments.quick else None]:
            for length in LENGTHS[: 1 if arguments.quick else None]:
                rows.append(_measure(settings, ranker, length, 3 if arguments.quick else 10))
    config = {"candidates": CANDIDATES, "items": ITEMS, "width and layers": RANKERS}
    report("naive", config, rows, arguments.json)


@contextmanager
def store() -> Iterator[Settings]:
    """A home of its own over a Redis of its own, registered."""
    if not shutil.which("redis-server"):
        raise SystemExit("redis-server is not installed")
    before = dict(os.environ)
    with tempfile.TemporaryDirectory() as folder, socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        redis = Redis(port, Path(folder))
        redis.start()
        os.environ |= {
            "MEMOIR_HOME": folder,
            "MEMOIR_DATASET": "online_retail",
            "MEMOIR_PROFILE": "production",
            "MEMOIR_REDIS": f"127.0.0.1:{port}",
            "MEMOIR_REGISTRY_URL": f"sqlite:///{folder}/registry.db",
            "MEMOIR_SERVE_DEADLINE_MS": "10000",
            "MEMOIR_SERVE_STATE_MIB": "0",  # every request encodes its user
        }
        try:
            settings = Settings.from_env()
            command = [sys.executable, "-m", "feature_repo", "apply"]
            subprocess.run(command, cwd=CHECKOUT, check=True, stdout=subprocess.DEVNULL)
            yield settings
        finally:
            os.environ.clear()
            os.environ |= before
            assert redis.process is not None
            redis.process.kill()
            redis.process.wait(timeout=10)


def _measure(settings: Settings, ranker: str, length: int, rounds: int) -> dict[str, Any]:
    contract = load_contract(settings.dataset)
    items = [f"item-{number}" for number in range(ITEMS)]
    _fill(settings, contract, items, length)
    folder = _bundle(settings, contract, items, ranker, length)
    requests = Requests(items)
    with server(1, MEMOIR_SERVE_BUNDLE=str(folder)) as (port, _), plain(folder) as other:
        ours, twin = Target("127.0.0.1", port, requests), Target("127.0.0.1", other, requests)
        mine, theirs = _scores(port, requests(0)), _scores(other, requests(0))
        different = max(abs(mine[item] - theirs[item]) for item in mine)
        asyncio.run(closed_loop(ours, 1.0))
        fast, slow = [], []
        # In turns, so that a busy neighbour slows both.
        for _ in range(rounds):
            fast.append(asyncio.run(closed_loop(ours, 0.5)).ms(50))
            slow.append(asyncio.run(closed_loop(twin, 0.1)).ms(50))
    floor = _floor(folder, contract, length)
    return {
        "ranker": ranker,
        "L": length,
        "ours_p50_ms": float(np.median(fast)),
        "plain_p50_ms": float(np.median(slow)),
        "times": float(np.median(np.array(slow) / np.array(fast))),
        "floor_ms (encode_user + score)": floor,
        "largest difference of a score": different,
    }


@dataclass(frozen=True)
class Requests:
    """Users in turn, each with other candidates."""

    items: list[str]

    def __call__(self, number: int) -> bytes:
        """The body of a request."""
        chosen = np.random.default_rng(number).choice(ITEMS, CANDIDATES, replace=False)
        at = (NOW + timedelta(days=1)).isoformat()
        asked = {
            "user_id": 1 + number % USERS,
            "candidates": [self.items[i] for i in chosen],
            "context": {"request_timestamp": at},
        }
        return json.dumps(asked).encode()


def _scores(port: int, body: bytes) -> dict[str, float]:
    """Of one request, by item."""
    asked = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/rank", body, {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(asked, timeout=60) as found:  # noqa: S310  # an address of ours
        answer = json.loads(found.read())
    return dict(zip(answer["item_ids"], answer["scores"], strict=True))


def _fill(settings: Settings, contract: Contract, items: list[str], length: int) -> None:
    """Users with so many events, and items, into the store."""
    feast, rng = open_store(settings), np.random.default_rng(0)
    users = list(range(1, USERS + 1))
    histories = []
    for user in users:
        micros = int(NOW.timestamp() * 1e6) - np.sort(rng.integers(10**9, 10**13, length))[::-1]
        columns = {
            "item_id": pa.array([items[i] for i in rng.integers(0, ITEMS, length)]),
            "action": pa.array(np.zeros(length, np.int8)),
            "event_timestamp": pa.array(micros).cast(pa.timestamp("us", "UTC")),
            "quantity": pa.array(np.ones(length, np.float32)),
            "unit_price": pa.array(np.ones(length, np.float32)),
        }
        schema = history_schema(contract)
        events = pa.table([columns[name] for name in schema.names], schema=schema)
        histories.append(pack(contract, user, events))
    known: dict[str, Any] = {"country": "France", "history_end": length}
    known |= {"sketch": None, "other_events": 0, "description": "x", "description_tokens": ["word"]}
    views = dict.fromkeys(("user_profile", "user_history", "user_stats"), users)
    keys_of: dict[str, list[Any]] = {**views, "item_profile": items, "item_stats": items}
    for view, keys in keys_of.items():
        table = contract.table(view)
        stamps = dict.fromkeys((EVENT_TIMESTAMP, CREATED_TIMESTAMP), [NOW] * len(keys))
        given: dict[str, list[Any]] = {**stamps, table.join_keys[0]: keys, "history": histories}
        columns = {
            f.name: pa.array(given.get(f.name, [known.get(f.name, 1)] * len(keys)), f.type)
            for f in arrow_schema(table)
        }
        write_rows(feast, view, pa.table(columns))
    note_epoch(settings, "materialize", "synthetic")


def _encoder(contract: Contract, items: list[str], length: int) -> Encoder:
    vocabularies: dict[str, Index] = {
        "item_id": Vocabulary(pa.array(items, arrow_type(contract.item.dtype)).sort()),
        "country": Vocabulary(pa.array(["France"])),
        "description_tokens": Vocabulary(WORDS),
    }
    return Encoder(contract, vocabularies, length)


def _bundle(
    settings: Settings, contract: Contract, items: list[str], ranker: str, length: int
) -> Path:
    """An amortised DLRM with random weights."""
    import torch

    torch.manual_seed(0)
    encoder, recipe = _encoder(contract, items, length), recipes.load("amortised_dlrm")
    assert isinstance(recipe, recipes.Recipe)
    width, layers = RANKERS[ranker]
    config = {"width": width, "num_layers": layers, "num_heads": 4}
    made = replace(recipe, config=config, history_length=length)
    folder, _ = bundles.export(
        settings.path("bundles"),
        model=models.build(recipe.model, config, encoder.sizes).eval(),
        encoder=encoder,
        recipe=made,
        metrics={},
        trained_on="nothing",
        data_as_of=NOW.isoformat(),
    )
    return folder


def _floor(folder: Path, contract: Contract, length: int) -> float:
    """Milliseconds of the model alone, of one request."""
    import torch

    from modeling.benchmarks.worlds import requests

    torch.set_num_threads(1)
    bundle = bundles.load(folder, contract)
    batch = requests(bundle.encoder.sizes, 1, length, CANDIDATES)
    times = []
    with torch.inference_mode():
        for _ in range(30):
            began = time.perf_counter()
            bundle.model.score(bundle.model.encode_user(batch.user), batch.candidates)
            times.append(1000 * (time.perf_counter() - began))
    return float(np.median(times))


@contextmanager
def plain(folder: Path) -> Iterator[int]:
    """The plain twin on a free port."""
    port = listenable("127.0.0.1", 0)
    command = [sys.executable, "-m", "uvicorn", "--factory", "serving.benchmarks.naive:plain_app"]
    command += ["--port", str(port), "--log-level", "error"]
    process = subprocess.Popen(command, env={**os.environ, BUNDLE: str(folder)})
    try:
        wait_until_ready(port, process)
        yield port
    finally:
        process.terminate()
        process.wait(timeout=30)


def plain_app() -> Any:
    """The plain server."""
    import torch
    from fastapi import Body, FastAPI

    from modeling.tasks import ranking_logits, sigmoid
    from serving.features import FeastReader
    from serving.items import ItemTable, Loaded
    from serving.ranker import RankService

    settings = Settings.from_env()
    contract = load_contract(settings.dataset)
    bundle = bundles.load(Path(os.environ[BUNDLE]), contract)
    reader = FeastReader(open_store(settings), contract, bundle.manifest["online_service"])
    app = FastAPI()

    @app.get("/readyz")
    def ready() -> dict[str, str]:
        return {"status": "ready"}

    @app.post("/v1/rank")
    def rank(asked: dict[str, Any] = Body()) -> dict[str, Any]:  # noqa: B008  # FastAPI's way
        # 1. Features of the user and of each candidate, through the SDK.
        user, candidates = reader.read_user(asked["user_id"]), asked["candidates"]
        rows = reader.read_items(candidates)
        table = ItemTable(bundle.encoder, reader.read_items, lambda: Loaded(rows))
        # 2. Numbers, as in training.
        at = datetime.fromisoformat(asked["context"]["request_timestamp"])
        encoded = RankService(bundle, reader, table).encoded(user, candidates, at)
        table.close()
        batch = bundle.encoder.collate(encoded, np.array([0]))
        # 3. One copy of the history for each candidate, all in one forward.
        number = len(candidates)
        users = batch.user._map(lambda tensor: tensor.expand(number, *tensor.shape[1:]))
        alone = batch.candidates._map(lambda tensor: tensor.transpose(0, 1))
        with torch.inference_mode():
            logits = bundle.model(replace(batch, user=users, candidates=alone))[:, 0].numpy()
        scores = sigmoid(ranking_logits(contract.spec, logits))
        order = np.argsort(-scores, kind="stable")
        return {
            "item_ids": [candidates[i] for i in order],
            "scores": scores[order].tolist(),
        }

    return app


if __name__ == "__main__":
    main()
