"""Amortised scoring beside its plain twin, one full forward per candidate; scores are compared, FLOPs are printed.

The floor is the FLOP ratio: what amortisation could save if every FLOP cost the same.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from feature_repo.benchmarks import interleaved, parser, report
from modeling import models
from modeling.batch import Batch, Candidates, FeatureSizes, UserInputs

NAIVE_SAMPLE = 16  # candidates that the plain twin scores; its time for all is their mean times C


def main() -> None:
    """Run."""
    flags = parser("modeling.benchmarks.amortised", __doc__)
    flags.add_argument("--device", default="cpu")
    flags.add_argument("--threads", type=int, default=1)
    flags.add_argument("--width", type=int, default=128)
    flags.add_argument("--layers", type=int, default=4)
    arguments = flags.parse_args()
    torch.set_num_threads(arguments.threads)
    shapes = [(64, 64), (128, 128)] if arguments.quick else [(256, 100), (256, 500), (1024, 500)]
    rows = [_measure(length, number, arguments) for length, number in shapes]
    config = {
        "width": arguments.width,
        "layers": arguments.layers,
        "threads": arguments.threads,
        "device": arguments.device,
    }
    config["naive"] = f"mean of {NAIVE_SAMPLE} candidates times C"
    report("amortised", config, rows, arguments.json)


def _measure(length: int, number: int, arguments: argparse.Namespace) -> dict[str, Any]:
    sizes = FeatureSizes(10_000, 2, 2, (50,), (), (), 13, length)
    torch.manual_seed(0)
    config = {"width": arguments.width, "num_layers": arguments.layers, "num_heads": 4}
    model = models.build("amortised_dlrm", config, sizes).eval().to(arguments.device)
    user, candidates = _world(sizes, length, number)
    user, candidates = user.to(arguments.device), candidates.to(arguments.device)
    nothing = torch.zeros(1, device=arguments.device)

    def synchronise() -> None:
        if arguments.device.startswith("cuda"):
            torch.cuda.synchronize()

    def amortised() -> torch.Tensor:
        with torch.inference_mode():
            scored = model(Batch(user, candidates, nothing))
        synchronise()
        return scored

    def naive() -> torch.Tensor:
        with torch.inference_mode():
            scored = torch.cat(
                [model(Batch(user, candidates.select(slice(i, i + 1)), nothing)) for i in range(NAIVE_SAMPLE)], dim=1
            )
        synchronise()
        return scored

    difference = float((amortised()[:, :NAIVE_SAMPLE] - naive()).abs().max())
    seconds = interleaved({"amortised": amortised, "naive": naive}, arguments.repeats)
    scale = number / NAIVE_SAMPLE
    with FlopCounterMode(display=False) as once:
        amortised()
    with FlopCounterMode(display=False) as each:
        naive()
    return {
        "L": length,
        "C": number,
        "amortised_ms": 1000 * seconds["amortised"]["wall_s"],
        "amortised_cpu_ms": 1000 * seconds["amortised"]["cpu_s"],
        "naive_ms": 1000 * seconds["naive"]["wall_s"] * scale,
        "ratio": seconds["naive"]["wall_s"] * scale / seconds["amortised"]["wall_s"],
        "flop_ratio": each.get_total_flops() * scale / once.get_total_flops(),
        "gflop": once.get_total_flops() / 1e9,
        "max_difference": difference,
    }


def _world(sizes: FeatureSizes, length: int, number: int) -> tuple[UserInputs, Candidates]:
    user = UserInputs(
        item_BL=torch.randint(1, sizes.items, (1, length)),
        action_BL=torch.randint(0, sizes.actions, (1, length)),
        age_BL=torch.rand(1, length),
        gap_BL=torch.rand(1, length),
        event_BLE=torch.rand(1, length, sizes.event_features),
        mask_BL=torch.ones(1, length, dtype=torch.bool),
        field_BU=torch.ones(1, 1, dtype=torch.long),
        dense_BG=torch.zeros(1, 0),
    )
    mask = torch.ones(1, number, dtype=torch.bool)
    items = torch.randint(1, sizes.items, (1, number))
    return user, Candidates(items, torch.zeros(1, number, 0).long(), torch.rand(1, number, sizes.dense), mask)


if __name__ == "__main__":
    main()
