"""The five systems on a device: a training step and a served request, by recipe-like shapes that grow with it.

`tokens_per_s` counts events and candidates; `mfu` is the share of the rate of one large matrix product in the same
precision, which is the floor printed with it; `peak_mb` is of a GPU's memory. A request has one user and 500 candidates: `cold` encodes the
user, `known` only scores, `event` extends the state by an event, where the model can.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from feature_repo.benchmarks import interleaved, parser, report
from modeling import models
from modeling.benchmarks.worlds import flops, sizes_of, synchronised
from modeling.inputs.batch import Batch
from modeling.inputs.made_up import requests
from modeling.layers.host import device_named
from modeling.layers.memory import keep_freed_memory
from modeling.models.base import Ranker
from modeling.recipes import Precision, Training
from modeling.training.accelerator import autocast, recompute_layers, use_products
from modeling.training.optimizers import clip_gradients, optimizer_of
from modeling.training.trainer import masked_bce

# Model → its config beside the width
SYSTEMS: dict[str, dict[str, Any]] = {
    "hiformer": {
        "num_heads": 4,
        "key_width": 16,
        "value_width": 64,
        "rank_key": 128,
        "rank_value": 1024,
    },
    "amortised_dlrm": {"num_layers": 4, "num_heads": 4, "causal": True, "positions": "from_oldest"},
    "vista": {"num_heads": 4, "num_seeds": 128},
    "hydrarec_ranker": {},
    "onetrans": {"num_layers": 6, "num_heads": 4},
}
WIDTHS = {"cpu": 64, "cuda": 256}
LENGTHS = {"cpu": 256, "cuda": 1024}
BATCHES = {"cpu": 4, "cuda": 64}
TRAINED = 16  # candidates of a request in training
RANKED = 500


def main() -> None:
    """Run."""
    flags = parser("modeling.benchmarks.systems", __doc__)
    flags.add_argument("--device", default="cpu")
    flags.add_argument("--threads", type=int, default=1)
    flags.add_argument("--precisions", nargs="+", choices=("fp32", "tf32", "bf16"))
    flags.add_argument("--recompute", action="store_true")
    arguments = flags.parse_args()
    torch.set_num_threads(arguments.threads)
    keep_freed_memory()
    device = device_named(arguments.device)
    precisions = arguments.precisions or (["fp32", "bf16"] if device.type == "cuda" else ["fp32"])
    kind = "cuda" if device.type == "cuda" else "cpu"
    length, batch = (32, 2) if arguments.quick else (LENGTHS[kind], BATCHES[kind])
    width = 32 if arguments.quick else WIDTHS[kind]
    rows = []
    for precision in precisions:
        rate = _product_rate(device, precision)
        for name, config in SYSTEMS.items():
            made = {"width": width, **config}
            row = {"system": name, "precision": precision}
            rows.append(
                row | _step(name, made, length, batch, device, precision, rate, arguments.recompute)
            )
            rows.append(row | _request(name, made, length, device, arguments.repeats))
    config = {
        "device": str(device),
        "width": width,
        "L": length,
        "B": batch,
        "threads": arguments.threads,
        "recompute": arguments.recompute,
    }
    report("systems", config, rows, arguments.json)


def _product_rate(device: torch.device, precision: Precision) -> float:
    """FLOPs a second of a large matrix product: the floor."""
    use_products(precision)
    size = 8192 if device.type == "cuda" else 1024
    kind = torch.bfloat16 if precision == "bf16" else torch.float32
    square = torch.randn(size, size, device=device, dtype=kind)
    call = synchronised(lambda: square @ square, device.type)
    seconds = interleaved({"product": call}, 10)["product"]["wall_s"]
    return float(2 * size**3 / seconds)


def _step(
    name: str,
    config: dict[str, Any],
    length: int,
    number: int,
    device: torch.device,
    precision: Precision,
    rate: float,
    recompute: bool,
) -> dict[str, Any]:
    """Steps of training, one batch again and again."""
    torch.manual_seed(0)
    sizes = sizes_of(length)
    model: Ranker = models.build(name, config, sizes).train().to(device)
    if recompute:
        recompute_layers(model)
    optimizer = optimizer_of(model, Training())
    batch = requests(sizes, number, length, TRAINED)

    def step() -> Tensor:
        optimizer.zero_grad()
        there = batch.to(device)
        with autocast(device, precision):
            logits, further = model.training_forward(there)
        loss = masked_bce(logits.float(), there.labels_BCT, there.candidates.mask_BC)
        loss = loss if further is None else loss + further.float()
        loss.backward()
        clip_gradients(model, 1.0)
        optimizer.step()
        return loss.detach()

    step()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    work = flops(step)
    seconds = _median(synchronised(step, device.type))
    peak = torch.cuda.max_memory_allocated(device) / 2**20 if device.type == "cuda" else None
    return {
        "case": "step",
        "ms": 1000 * seconds,
        "samples_per_s": number * TRAINED / seconds,
        "tokens_per_s": number * (length + TRAINED) / seconds,
        "mfu": work / seconds / rate,
        "floor_tflop_per_s": rate / 1e12,
        "peak_mb": peak,
    }


def _request(
    name: str, config: dict[str, Any], length: int, device: torch.device, repeats: int
) -> dict[str, Any]:
    """One user and 500 candidates, as the server's model thread runs them."""
    torch.manual_seed(0)
    # Room for the event that comes
    sizes = sizes_of(length + 1)
    model: Ranker = models.build(name, config, sizes).eval().to(device)
    batch = requests(sizes, 1, length, RANKED)
    after = requests(sizes, 1, length + 1, 1, seed=1).user.events(length)
    calls = _calls(model, batch, replace(after), device)
    seconds = interleaved(calls, 5 * repeats, 3)
    return {"case": "request"} | {
        f"{kind}_ms": 1000 * taken["wall_s"] for kind, taken in seconds.items()
    }


def _calls(
    model: Ranker, batch: Batch, event: Any, device: torch.device
) -> dict[str, Callable[[], Any]]:
    with torch.inference_mode():
        state = model.encode_user(batch.user.to(device))

    def score(kept: Any) -> Tensor:
        scores: Tensor = model.score(kept, batch.candidates.to(device)).cpu()
        return scores

    def cold() -> Tensor:
        with torch.inference_mode():
            return score(model.encode_user(batch.user.to(device)))

    def known() -> Tensor:
        with torch.inference_mode():
            return score(state)

    def extended() -> Tensor:
        with torch.inference_mode():
            return score(model.extend_user(state, event.to(device)))

    return {"cold": cold, "known": known, **({"event": extended} if model.can_extend else {})}


def _median(call: Callable[[], Any]) -> float:
    """Seconds of a call, the median of those that fit into two."""
    taken: list[float] = []
    until = time.perf_counter() + 2
    while len(taken) < 3 or time.perf_counter() < until:
        started = time.perf_counter()
        call()
        taken.append(time.perf_counter() - started)
    return statistics.median(taken)


if __name__ == "__main__":
    main()
