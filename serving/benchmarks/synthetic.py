"""A home that is made up: users with so many events and items in a Redis of its own, and an untrained ranker
of a given size. What benchmarks serve where the size of things is what matters, and not whose they are.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from feature_repo.contract.arrow import arrow_schema, arrow_type, history_schema
from feature_repo.contract.contract import Contract
from feature_repo.contract.schema import CREATED_TIMESTAMP, EVENT_TIMESTAMP
from feature_repo.datasets import load_contract
from feature_repo.history.history import pack
from feature_repo.settings import CHECKOUT, Settings
from feature_repo.store.online_rows import write_rows
from feature_repo.store.store import note_epoch, open_store
from modeling import models, recipes
from modeling.bundle import bundle as bundles
from modeling.inputs.columns import Index, Vocabulary
from modeling.inputs.encoder import Encoder
from serving.benchmarks.redises import Redis
from serving.command import listenable

ITEMS = tuple(f"item-{number}" for number in range(3_000))
USERS = 200
NOW = datetime(2011, 12, 9, tzinfo=UTC)


@dataclass(frozen=True)
class Size:
    """Of a ranker, an amortised DLRM."""

    width: int
    layers: int
    length: int  # events that it reads


SIZES = {"small": Size(64, 2, 128), "base": Size(128, 4, 256)}


@contextmanager
def store() -> Iterator[Settings]:
    """A home of its own over a Redis of its own, registered."""
    if not shutil.which("redis-server"):
        raise SystemExit("redis-server is not installed")
    before = dict(os.environ)
    with tempfile.TemporaryDirectory(prefix="memoir-synthetic-") as folder:
        redis = Redis(listenable("127.0.0.1", 0), Path(folder))
        redis.start()
        os.environ |= {
            "MEMOIR_HOME": folder,
            "MEMOIR_DATASET": "online_retail",
            "MEMOIR_PROFILE": "production",
            "MEMOIR_REDIS": f"127.0.0.1:{redis.port}",
            "MEMOIR_REGISTRY_URL": f"sqlite:///{folder}/registry.db",
        }
        try:
            settings = Settings.from_env()
            command = [sys.executable, "-m", "feature_repo", "apply"]
            subprocess.run(command, cwd=CHECKOUT, check=True, stdout=subprocess.DEVNULL)
            yield settings
        finally:
            os.environ.clear()
            os.environ |= before
            if redis.process is not None:
                redis.process.kill()
                redis.process.wait(timeout=10)


@dataclass(frozen=True)
class Requests:
    """Users in turn, each with other candidates."""

    candidates: int

    def __call__(self, number: int) -> bytes:
        chosen = np.random.default_rng(number).choice(len(ITEMS), self.candidates, replace=False)
        at = (NOW + timedelta(days=1)).isoformat()
        asked = {
            "user_id": 1 + number % USERS,
            "candidates": [ITEMS[i] for i in chosen],
            "context": {"request_timestamp": at},
            "k": 20 if self.candidates > 200 else None,
        }
        return json.dumps(asked).encode()


def fill(settings: Settings, length: int) -> None:
    """Users with so many events, and items, into the store."""
    contract = load_contract(settings.dataset)
    feast = open_store(settings)
    rng = np.random.default_rng(0)
    users = list(range(1, USERS + 1))
    histories = []
    for user in users:
        micros = int(NOW.timestamp() * 1e6) - np.sort(rng.integers(10**9, 10**13, length))[::-1]
        columns = {
            "item_id": pa.array([ITEMS[i] for i in rng.integers(0, len(ITEMS), length)]),
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
    keys_of: dict[str, list[Any]] = {
        **views,
        "item_profile": list(ITEMS),
        "item_stats": list(ITEMS),
    }
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


def _encoder(contract: Contract, length: int) -> Encoder:
    vocabularies: dict[str, Index] = {
        "item_id": Vocabulary(pa.array(ITEMS, arrow_type(contract.item.dtype)).sort()),
        "country": Vocabulary(pa.array(["France"])),
        "description_tokens": Vocabulary(pa.array(["word"])),
    }
    return Encoder(contract, vocabularies, length)


def bundle_of(settings: Settings, size: Size, **changes: Any) -> Path:
    """A bundle of that size with random weights.

    Args:
        changes: of the model's config.
    """
    import torch

    torch.manual_seed(0)
    contract = load_contract(settings.dataset)
    encoder = _encoder(contract, size.length)
    recipe = recipes.load("amortised_dlrm")
    assert isinstance(recipe, recipes.Recipe)
    config = {"width": size.width, "num_layers": size.layers, "num_heads": 4, **changes}
    folder, _ = bundles.export(
        settings.path("bundles"),
        model=models.build(recipe.model, config, encoder.sizes).eval(),
        encoder=encoder,
        recipe=replace(recipe, config=config, history_length=size.length),
        metrics={},
        trained_on="nothing",
        data_as_of=NOW.isoformat(),
    )
    return folder


def model_ms(settings: Settings, folder: Path, candidates: int) -> float:
    """Milliseconds of the model alone for one request: a floor."""
    import torch

    from modeling.inputs.made_up import requests

    torch.set_num_threads(1)
    bundle = bundles.load(folder, load_contract(settings.dataset))
    batch = requests(bundle.encoder.sizes, 1, bundle.encoder.history_length, candidates)
    times = []
    with torch.inference_mode():
        for _ in range(30):
            began = time.perf_counter()
            bundle.model.score(bundle.model.encode_user(batch.user), batch.candidates)
            times.append(1000 * (time.perf_counter() - began))
    return float(np.median(times))
