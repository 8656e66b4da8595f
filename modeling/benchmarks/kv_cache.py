"""The same user again with a few new events: cached keys and values extended, beside encoding
everything anew.

Scores of both are compared. `refresh` says whether one of OneTrans's tails has moved, as it does once in a block of events, and asks
for a new encoding; `cache_kb` is the state at fp32. The floor is the FLOP ratio of the two.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from torch import Tensor

from feature_repo.benchmarks import interleaved, parser, report
from modeling import models
from modeling.benchmarks.worlds import flops, sizes_of, synchronised
from modeling.inputs.made_up import requests
from modeling.layers.memory import keep_freed_memory
from modeling.models.onetrans import OneTrans


def main() -> None:
    """Run."""
    flags = parser("modeling.benchmarks.kv_cache", __doc__)
    flags.add_argument("--device", default="cpu")
    flags.add_argument("--threads", type=int, default=1)
    flags.add_argument("--new", type=int, default=8, help="new events (default 8)")
    arguments = flags.parse_args()
    torch.set_num_threads(arguments.threads)
    keep_freed_memory()
    # One short of where a tail's start moves, which is at a multiple of its block: a state is extended up to there.
    shapes = [(511, 64)] if arguments.quick else [(1023, 256), (4095, 256)]
    width = {"width": 128, "num_layers": 4, "num_heads": 4, "dropout": 0.0}
    amortised = {**width, "causal": True, "positions": "from_oldest"}
    rows = [
        _measure(name, config, length, number, arguments)
        for length, number in shapes
        for name, config in (
            ("amortised_dlrm", amortised),
            ("onetrans", {**width, "pyramid": False}),
            ("onetrans", width),
        )
    ]
    config = {
        "width": 128,
        "layers": 4,
        "threads": arguments.threads,
        "device": arguments.device,
        "new": arguments.new,
    }
    report("kv_cache", config, rows, arguments.json)


@torch.inference_mode()
def _measure(
    name: str, config: dict[str, Any], length: int, number: int, arguments: argparse.Namespace
) -> dict[str, Any]:
    torch.manual_seed(0)
    sizes = sizes_of(length)
    new = arguments.new
    model = models.build(name, config, sizes).eval().to(arguments.device)
    batch = requests(sizes, 1, length, number).to(arguments.device)
    cached = model.encode_user(batch.user.events(0, length - new))
    late = batch.user.events(length - new)

    def again() -> Tensor:
        return model.score(model.extend_user(cached, late), batch.candidates)

    def anew() -> Tensor:
        return model(batch)

    extended = model.extend_user(cached, late)
    sliding = isinstance(model, OneTrans) and model.config.pyramid
    difference = (again() - anew()).abs().max()
    calls = {
        "again": synchronised(again, arguments.device),
        "anew": synchronised(anew, arguments.device),
    }
    seconds = interleaved(calls, arguments.repeats)
    return {
        "model": name + (" pyramid" if sliding else ""),
        "L": length,
        "C": number,
        "again_ms": 1000 * seconds["again"]["wall_s"],
        "again_cpu_ms": 1000 * seconds["again"]["cpu_s"],
        "anew_ms": 1000 * seconds["anew"]["wall_s"],
        "ratio": seconds["anew"]["wall_s"] / seconds["again"]["wall_s"],
        "flop_ratio": flops(anew) / flops(again),
        "gflop": flops(again) / 1e9,
        "cache_kb": sum(tensor.numel() * 4 for tensor in (*extended.keys, *extended.values)) / 1024,
        "refresh": bool(model.must_refresh(extended)) if isinstance(model, OneTrans) else None,
        "max_difference": float(difference),
    }


if __name__ == "__main__":
    main()
