"""Amortised scoring beside its plain twin, one full forward per candidate; scores are compared,
FLOPs are printed.

The floor is the FLOP ratio: what amortisation could save if every FLOP cost the same.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch

from feature_repo.benchmarks import interleaved, parser, report
from modeling import models
from modeling.benchmarks.worlds import flops, sizes_of, synchronised
from modeling.inputs.made_up import requests
from modeling.layers.memory import keep_freed_memory

NAIVE_SAMPLE = 8  # candidates that the plain twin scores; its time for all is their mean times C


def main() -> None:
    """Run."""
    flags = parser("modeling.benchmarks.amortised", __doc__)
    flags.add_argument("--device", default="cpu")
    flags.add_argument("--threads", type=int, default=1)
    flags.add_argument("--width", type=int, default=128)
    flags.add_argument("--layers", type=int, default=4)
    arguments = flags.parse_args()
    torch.set_num_threads(arguments.threads)
    keep_freed_memory()
    shapes = (
        [(64, 64), (256, 500)]
        if arguments.quick
        else [(256, 100), (256, 500), (1024, 500), (4096, 256)]
    )
    config = {
        "width": arguments.width,
        "num_layers": arguments.layers,
        "num_heads": 4,
        "dropout": 0.0,
    }
    rows = []
    for length, number in shapes:
        rows.append(_measure("amortised_dlrm", config, length, number, arguments))
        if (length, number) == (256, 500):
            rows.append(
                _measure(
                    "amortised_dlrm", {**config, "fusion": "append_self"}, length, number, arguments
                )
            )
            rows.append(_measure("onetrans", config, length, number, arguments))
            rows.append(
                _measure(
                    "hiformer",
                    {"width": arguments.width, "num_layers": 1},
                    length,
                    number,
                    arguments,
                )
            )
    report(
        "amortised",
        {
            "width": arguments.width,
            "layers": arguments.layers,
            "threads": arguments.threads,
            "device": arguments.device,
            "naive": f"mean of {NAIVE_SAMPLE} candidates times C",
        },
        rows,
        arguments.json,
    )


def _measure(
    name: str, config: dict[str, Any], length: int, number: int, arguments: argparse.Namespace
) -> dict[str, Any]:
    torch.manual_seed(0)
    sizes = sizes_of(length)
    model = models.build(name, config, sizes).eval().to(arguments.device)
    batch = requests(sizes, 1, length, number).to(arguments.device)
    alone = [
        type(batch)(batch.user, batch.candidates.select(slice(i, i + 1)), batch.labels_BCT)
        for i in range(NAIVE_SAMPLE)
    ]

    @torch.inference_mode()
    def amortised() -> torch.Tensor:
        return model(batch)

    @torch.inference_mode()
    def naive() -> torch.Tensor:
        return torch.cat([model(one) for one in alone], dim=1)

    difference = float((amortised()[:, :NAIVE_SAMPLE] - naive()).abs().max())
    calls = {
        "amortised": synchronised(amortised, arguments.device),
        "naive": synchronised(naive, arguments.device),
    }
    seconds = interleaved(calls, arguments.repeats)
    scale = number / NAIVE_SAMPLE
    once = flops(amortised)
    return {
        "model": name + (f" {config['fusion']}" if "fusion" in config else ""),
        "L": length,
        "C": number,
        "amortised_ms": 1000 * seconds["amortised"]["wall_s"],
        "amortised_cpu_ms": 1000 * seconds["amortised"]["cpu_s"],
        "naive_ms": 1000 * seconds["naive"]["wall_s"] * scale,
        "ratio": seconds["naive"]["wall_s"] * scale / seconds["amortised"]["wall_s"],
        "flop_ratio": flops(naive) * scale / once,
        "gflop": once / 1e9,
        "max_difference": difference,
    }


if __name__ == "__main__":
    main()
