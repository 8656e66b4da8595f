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
import urllib.request
from contextlib import AbstractContextManager
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

from feature_repo.benchmarks import parser, report
from feature_repo.datasets import load_contract
from feature_repo.settings import Settings
from feature_repo.store.store import open_store
from modeling.bundle import bundle as bundles
from serving.benchmarks.load import Running, server, started
from serving.benchmarks.openloop import Target, closed_loop
from serving.benchmarks.synthetic import SIZES, Requests, bundle_of, fill, model_ms, store

LENGTHS = (512, 1024)
CANDIDATES = 128
BUNDLE = "PLAIN_TWIN_BUNDLE"  # environment of the twin: folder of the bundle
# No answer of either is cut short, and every request of ours encodes its user.
SERVE = {"MEMOIR_SERVE_DEADLINE_MS": "10000", "MEMOIR_SERVE_STATE_MIB": "0"}


def main() -> None:
    """Run."""
    arguments = parser("serving.benchmarks.naive", __doc__).parse_args()
    rows = []
    with store() as settings:
        for ranker in list(SIZES)[: 1 if arguments.quick else None]:
            for length in LENGTHS[: 1 if arguments.quick else None]:
                rows.append(_measure(settings, ranker, length, 3 if arguments.quick else 10))
    config = {
        "candidates": CANDIDATES,
        "rankers": {n: [s.width, s.layers] for n, s in SIZES.items()},
    }
    report("naive", config, rows, arguments.json)


def _measure(settings: Settings, ranker: str, length: int, rounds: int) -> dict[str, Any]:
    fill(settings, length)
    folder = bundle_of(settings, replace(SIZES[ranker], length=length))
    requests = Requests(CANDIDATES)
    our_server = server(1, MEMOIR_SERVE_BUNDLE=str(folder), **SERVE)
    with our_server as running, plain(folder) as other:
        ours = Target("127.0.0.1", running.port, requests)
        twin = Target("127.0.0.1", other.port, requests)
        mine = _scores(running.port, requests(0))
        theirs = _scores(other.port, requests(0))
        different = max(abs(mine[item] - theirs[item]) for item in mine)
        asyncio.run(closed_loop(ours, 1.0))
        fast = []
        slow = []
        # In turns, so that a busy neighbour slows both.
        for _ in range(rounds):
            fast.append(asyncio.run(closed_loop(ours, 0.5)).ms(50))
            slow.append(asyncio.run(closed_loop(twin, 0.1)).ms(50))
    return {
        "ranker": ranker,
        "L": length,
        "ours_p50_ms": float(np.median(fast)),
        "plain_p50_ms": float(np.median(slow)),
        "times": float(np.median(np.array(slow) / np.array(fast))),
        "floor_ms (encode_user + score)": model_ms(settings, folder, CANDIDATES),
        "largest difference of a score": different,
    }


def _scores(port: int, body: bytes) -> dict[str, float]:
    asked = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/rank", body, {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(asked, timeout=60) as found:  # noqa: S310  # an address of ours
        answer = json.loads(found.read())
    return dict(zip(answer["item_ids"], answer["scores"], strict=True))


def plain(folder: Path) -> AbstractContextManager[Running]:
    """The plain twin."""
    words = ("--factory", "serving.benchmarks.naive:plain_app", "--log-level", "error")
    return started("uvicorn", *words, "--port", "{port}", **{BUNDLE: str(folder)})


def plain_app() -> Any:
    """The plain server."""
    import torch
    from fastapi import Body, FastAPI

    from modeling.inputs.tasks import ranking_logits, sigmoid
    from serving.ranking.request import RequestEncoder
    from serving.stores.features import FeastReader
    from serving.stores.items import ItemTable, Loaded

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
        user = reader.read_user(asked["user_id"])
        candidates = asked["candidates"]
        rows = reader.read_items(candidates)
        table = ItemTable(bundle.encoder, reader.read_items, lambda: Loaded(rows))
        # 2. Numbers, as in training.
        at = datetime.fromisoformat(asked["context"]["request_timestamp"])
        encoded = RequestEncoder(bundle, table).encoded(user, candidates, at)
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
