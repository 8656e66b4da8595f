"""What bf16 or torch.compile would gain: scoring and a training step of the three systems, each
beside plain fp32.

`ratio` is fp32's time over the variant's; `difference` that of the scores, relative to their
largest. Compilation wants a C++ compiler and minutes for each shape (`compile_s`, not in the
times), so it is measured on request only.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from feature_repo.benchmarks import interleaved, parser, report
from modeling import models
from modeling.benchmarks.worlds import flops, sizes_of, synchronised
from modeling.inputs.made_up import requests
from modeling.layers.memory import keep_freed_memory
from modeling.training.trainer import masked_bce

MODELS: dict[str, dict[str, Any]] = {
    "onetrans": {"width": 128, "num_layers": 4, "num_heads": 4},
    "amortised_dlrm": {"width": 128, "num_layers": 4, "num_heads": 4, "dropout": 0.0},
    "hiformer": {"width": 128, "num_heads": 4, "key_width": 16, "value_width": 32},
}
Call = Callable[[], Tensor]


def main() -> None:
    """Run."""
    flags = parser("modeling.benchmarks.precision", __doc__)
    flags.add_argument("--device", default="cpu")
    flags.add_argument("--threads", type=int, default=1)
    flags.add_argument("--compile", action="store_true", help="torch.compile as well")
    arguments = flags.parse_args()
    torch.set_num_threads(arguments.threads)
    keep_freed_memory()
    length = 64 if arguments.quick else 512
    rows = []
    for name, config in MODELS.items():
        for work, number, candidates in (("score", 1, 256), ("train", 8, 16)):
            rows += _measure(name, config, work, length, number, candidates, arguments)
    config = {"width": 128, "L": length, "threads": arguments.threads, "device": arguments.device}
    report("precision", config, rows, arguments.json)


def _measure(
    name: str,
    config: dict[str, Any],
    work: str,
    length: int,
    number: int,
    candidates: int,
    arguments: Any,
) -> list[dict[str, Any]]:
    """A row for each variant of one piece of work."""
    torch.manual_seed(0)
    device = torch.device(arguments.device)
    sizes = sizes_of(length)
    model = models.build(name, config, sizes).eval().to(device)
    batch = requests(sizes, number, length, candidates).to(device)

    def score(network: Any, bf16: bool = False) -> Tensor:
        with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            scores: Tensor = network(batch)
            return scores

    def train(network: Any, bf16: bool = False) -> Tensor:
        model.zero_grad(set_to_none=True)
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            scores: Tensor = network(batch)
            loss = masked_bce(scores, batch.labels_BCT, batch.candidates.mask_BC)
        loss.backward()
        return scores.detach()

    one = score if work == "score" else train
    calls: dict[str, Call] = {"fp32": lambda: one(model), "bf16": lambda: one(model, bf16=True)}
    compile_s = None
    if arguments.compile:
        compiled = torch.compile(model)
        started = time.perf_counter()
        one(compiled)
        compile_s = time.perf_counter() - started
        calls["compiled"] = lambda: one(compiled)
    expected = calls["fp32"]()
    difference = {
        kind: float((call() - expected).abs().max() / expected.abs().max())
        for kind, call in calls.items()
    }
    seconds = interleaved(
        {k: synchronised(c, arguments.device) for k, c in calls.items()}, arguments.repeats
    )
    work_flops = flops(calls["fp32"])
    return [
        {
            "model": name,
            "work": work,
            "B": number,
            "C": candidates,
            "variant": kind,
            "wall_ms": 1000 * taken["wall_s"],
            "cpu_ms": 1000 * taken["cpu_s"],
            "gflop": work_flops / 1e9,
            "ratio": seconds["fp32"]["wall_s"] / taken["wall_s"],
            "difference": difference[kind],
            "compile_s": compile_s if kind == "compiled" else None,
        }
        for kind, taken in seconds.items()
    ]


if __name__ == "__main__":
    main()
