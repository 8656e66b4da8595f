"""Training steps with a request's candidates together, beside one row for each; pyramid and low
rank beside their whole.

Each measurement runs in a process of its own, so that peak memory is that of one run. Loss and
gradient (along a random direction) of both forms are compared. The floor is the FLOP ratio.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from typing import Any

import numpy as np

from feature_repo.benchmarks import parser, report
from modeling.comparison.processes import ask, peak_mb

ONETRANS = {"width": 64, "num_layers": 4, "num_heads": 2, "expansion": 4}


def main() -> None:
    """Run."""
    flags = parser("modeling.benchmarks.grouped_training", __doc__)
    flags.add_argument("--threads", type=int, default=1)
    flags.add_argument("--child", help=argparse.SUPPRESS)
    arguments = flags.parse_args()
    if arguments.child:
        print(json.dumps(_step(json.loads(sys.stdin.read()))))
        return
    quick = arguments.quick
    length, requests, candidates = (128, 2, 16) if quick else (512, 4, 16)
    rows = _grouped(length, requests, candidates, arguments)
    rows += _pyramid(128 if quick else 1190, arguments)
    rows += _hiformer(64 if quick else 1024, arguments)
    report("grouped_training", {"threads": arguments.threads}, rows, arguments.json)


def _grouped(
    length: int, requests: int, candidates: int, arguments: argparse.Namespace
) -> list[dict[str, Any]]:
    """OneTrans and the amortised DLRM, K candidates of a request together, or each with its own
    history.
    """
    rows = []
    for model, config in (
        ("onetrans", ONETRANS),
        ("amortised_dlrm", {"width": 64, "num_layers": 4, "num_heads": 2}),
    ):
        shape = {
            "model": model,
            "config": {**config, "dropout": 0.0},
            "length": length,
            "requests": requests,
            "candidates": candidates,
        }
        together, alone = _both(shape | {"grouped": True}, shape | {"grouped": False}, arguments)
        rows.append(
            {
                "what": "K candidates together / one row each",
                "model": model,
                "L": length,
                "K": candidates,
                "samples_per_cpu_s": together["samples_per_cpu_s"],
                "ratio": together["samples_per_cpu_s"] / alone["samples_per_cpu_s"],
                "peak_mb": together["peak_mb"],
                "step_mb": together["step_mb"],
                "memory_ratio": together["step_mb"] / alone["step_mb"],
                "flop_ratio": alone["flop"] / together["flop"],
                "loss_difference": abs(together["loss"] - alone["loss"]),
                "gradient_difference": abs(together["gradient"] / alone["gradient"] - 1),
            }
        )
    return rows


def _pyramid(length: int, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """OneTrans-S's tokens, layers, width and schedule, against every row through every layer, which
    is its ablation.
    """
    config = {
        "width": 256,
        "num_layers": 6,
        "num_heads": 4,
        "request_tokens": 6,
        "candidate_tokens": 6,
        "dropout": 0.0,
    }
    shape = {
        "model": "onetrans",
        "config": config,
        "length": length,
        "requests": 4,
        "candidates": 1,
        "grouped": True,
    }
    with_it, without = _both(shape, {**shape, "plain": True}, arguments)
    return [
        {
            "what": "pyramid / every row in every layer",
            "model": "onetrans",
            "L": length,
            "K": 1,
            "samples_per_cpu_s": with_it["samples_per_cpu_s"],
            "ratio": with_it["samples_per_cpu_s"] / without["samples_per_cpu_s"],
            "peak_mb": with_it["peak_mb"],
            "step_mb": with_it["step_mb"],
            "memory_ratio": with_it["step_mb"] / without["step_mb"],
            "flop_ratio": without["flop"] / with_it["flop"],
        }
    ]


def _hiformer(candidates: int, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """The paper's shape, 38 tokens of 128: low rank and pruned, against full rank and unpruned."""
    found = {}
    layers = {
        "low rank, pruned": ("low_rank", 1),
        "full rank, pruned": ("composite", 1),
        "full rank": ("composite", None),
    }
    for name, (kind, queries) in layers.items():
        shape = {"layer": kind, "queries": queries, "candidates": candidates}
        found[name] = ask(
            "modeling.benchmarks.grouped_training", "step", {**shape, "threads": arguments.threads}
        )
    best = found["low rank, pruned"]
    return [
        {
            "what": "Hiformer layer, L = 38, d = 128",
            "model": name,
            "K": candidates,
            "samples_per_cpu_s": row["samples_per_cpu_s"],
            "ratio": best["samples_per_cpu_s"] / row["samples_per_cpu_s"],
            "peak_mb": row["peak_mb"],
            "parameters": row["parameters"],
            "flop_ratio": row["flop"] / best["flop"],
        }
        for name, row in found.items()
    ]


def _both(
    first: dict[str, Any], second: dict[str, Any], arguments: argparse.Namespace
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Medians of interleaved runs of two cases."""
    runs: tuple[list[dict[str, Any]], list[dict[str, Any]]] = ([], [])
    for _ in range(1 if arguments.quick else arguments.repeats):
        for case, kept in zip((first, second), runs, strict=True):
            kept.append(
                ask(
                    "modeling.benchmarks.grouped_training",
                    "step",
                    {**case, "threads": arguments.threads},
                )
            )
    one, two = (
        {name: float(np.median([run[name] for run in kept])) for name in kept[0]} for kept in runs
    )
    return one, two


def _step(case: dict[str, Any]) -> dict[str, Any]:
    """Forward and backward of one batch, again and again."""
    import torch

    from modeling.layers.memory import keep_freed_memory

    torch.set_num_threads(case["threads"])
    keep_freed_memory()
    torch.manual_seed(0)
    loss_of, module, samples = _layer_case(case) if "layer" in case else _model_case(case)

    def step() -> float:
        module.zero_grad(set_to_none=True)
        loss = loss_of()
        loss.backward()
        return float(loss.detach())

    before = peak_mb()
    loss = step()
    weight = torch.Generator().manual_seed(
        1
    )  # a random direction: gradients that differ differ along it
    gradient = sum(
        float((p.grad * torch.randn(p.shape, generator=weight)).sum())
        for p in module.parameters()
        if p.grad is not None
    )
    rounds = 0
    started = time.process_time()
    while rounds < 2 or time.process_time() - started < 2:
        step()
        rounds += 1
    spent = time.process_time() - started
    from modeling.benchmarks.worlds import flops

    peak = peak_mb()
    return {
        "samples_per_cpu_s": rounds * samples / spent,
        "peak_mb": peak,
        "step_mb": peak - before,
        "loss": loss,
        "gradient": gradient,
        "flop": flops(step),
        "parameters": sum(p.numel() for p in module.parameters()),
    }


def _model_case(case: dict[str, Any]) -> tuple[Any, Any, int]:
    from modeling import models
    from modeling.benchmarks.worlds import one_candidate_per_row, sizes_of
    from modeling.inputs.made_up import requests
    from modeling.training.trainer import masked_bce

    sizes = sizes_of(case["length"])
    model = models.build(case["model"], case["config"], sizes).eval()
    if case.get("plain"):
        model.forward = model.forward_plain  # type: ignore[method-assign, assignment]
    batch = requests(sizes, case["requests"], case["length"], case["candidates"])
    if not case["grouped"]:
        batch = one_candidate_per_row(batch)
    samples = case["requests"] * case["candidates"]
    return (
        lambda: masked_bce(model(batch), batch.labels_BCT, batch.candidates.mask_BC),
        model,
        samples,
    )


def _layer_case(case: dict[str, Any]) -> tuple[Any, Any, int]:
    import torch

    from modeling.layers.heterogeneous import HeterogeneousLayer, LayerShape

    shape = LayerShape(38, 128, 4, 16, 64, 512, rank_key=128, rank_value=1024)
    layer = HeterogeneousLayer(shape, case["layer"], case["queries"])
    tokens = torch.randn(1, case["candidates"], shape.num_tokens, shape.width)
    return lambda: layer(None, tokens)[:, :, :1].square().mean(), layer, case["candidates"]


if __name__ == "__main__":
    main()
