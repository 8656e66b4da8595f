"""One server, one DLRM, and how its candidates meet the history: CONCAT, which encodes the history once for each candidate,
beside the amortised fusions, which encode it once for each request (arXiv 2412.06924, whose production saw 30 % less).

Over HTTP, one caller, synthetic users with L events from a Redis of its own; every request encodes its user. In turns, so that a
busy neighbour slows all. Floor: the model's `encode_user` and `score` alone.
"""

from __future__ import annotations

import asyncio
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import numpy as np

from feature_repo.benchmarks import parser, report
from feature_repo.settings import Settings
from serving.benchmarks.load import server
from serving.benchmarks.openloop import Target, closed_loop
from serving.benchmarks.synthetic import SIZES, Requests, bundle_of, fill, model_ms, store

LENGTHS = (64, 256, 1024)
CANDIDATES = 128
FUSIONS = ("concat", "append_self", "append_cross")
# No answer is cut short, none is refused for its time, and every request encodes its user.
SERVE = {"MEMOIR_SERVE_DEADLINE_MS": "120000", "MEMOIR_SERVE_STATE_MIB": "0"}


def main() -> None:
    """Run."""
    arguments = parser("serving.benchmarks.fusion", __doc__).parse_args()
    lengths = LENGTHS[:1] if arguments.quick else LENGTHS
    rows = []
    with store() as settings:
        for length in lengths:
            rows += _measured(settings, length, 2 if arguments.quick else 8)
    size = SIZES["small"]
    config = {"candidates": CANDIDATES, "width": size.width, "layers": size.layers}
    report("fusion", config, rows, arguments.json)


def _measured(settings: Settings, length: int, rounds: int) -> list[dict[str, Any]]:
    fill(settings, length)
    size = replace(SIZES["small"], length=length)
    folders = {fusion: bundle_of(settings, size, fusion=fusion) for fusion in FUSIONS}
    times: dict[str, list[float]] = {fusion: [] for fusion in FUSIONS}
    with ExitStack() as running:
        targets = {}
        for fusion, folder in folders.items():
            one = running.enter_context(server(1, MEMOIR_SERVE_BUNDLE=str(folder), **SERVE))
            targets[fusion] = Target("127.0.0.1", one.port, Requests(CANDIDATES))
            asyncio.run(closed_loop(targets[fusion], 0.5))
        for _ in range(rounds):
            for fusion, target in targets.items():
                times[fusion].append(asyncio.run(closed_loop(target, 0.3)).ms(50))
    medians = {fusion: float(np.median(of)) for fusion, of in times.items()}
    return [
        {
            "L": length,
            "fusion": fusion,
            "p50_ms": medians[fusion],
            "of_concat": medians[fusion] / medians["concat"],
            "floor_ms (encode_user + score)": model_ms(settings, folders[fusion], CANDIDATES),
        }
        for fusion in FUSIONS
    ]


if __name__ == "__main__":
    main()
