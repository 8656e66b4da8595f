"""Requests of several users scored in one forward, beside one after the other: what a server could win by
waiting for company, on one thread. Ours scores each alone (README, decisions).

Rankers of the two sizes of `synthetic.py`, with random weights. Scores are compared. Floor: a perfect batch
would cost what one request does.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from feature_repo.benchmarks import interleaved, parser, report
from modeling import models
from modeling.batch import Batch
from modeling.benchmarks.worlds import requests, sizes_of
from modeling.memory import keep_freed_memory
from modeling.models.base import Ranker
from serving.benchmarks.synthetic import SIZES

CANDIDATES, TOGETHER = (50, 200, 500), (2, 4, 8)


def main() -> None:
    """Run."""
    flags = parser("serving.benchmarks.micro_batching", __doc__)
    flags.add_argument("--device", default="cpu")
    arguments = flags.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    rows = []
    for name, size in list(SIZES.items())[: 1 if arguments.quick else None]:
        torch.manual_seed(0)
        config: dict[str, Any] = {"width": size.width, "num_layers": size.layers, "num_heads": 4}
        sizes = sizes_of(size.length)
        model = models.build("amortised_dlrm", config, sizes).eval().to(arguments.device)
        for candidates in CANDIDATES:
            made = requests(sizes, max(TOGETHER), size.length, candidates).to(arguments.device)
            rows.append(
                {"ranker": name, "candidates": candidates}
                | _measure(model, made, arguments.repeats, arguments.device)
            )
    about = {"threads": 1, "device": arguments.device, "rankers": list(SIZES)}
    report("micro_batching", about, rows, arguments.json)


def _measure(model: Ranker, made: Batch, repeats: int, device: str) -> dict[str, Any]:
    @torch.inference_mode()
    def scored(users: slice) -> torch.Tensor:
        user = made.user._map(lambda tensor: tensor[users])
        candidates = made.candidates._map(lambda tensor: tensor[users])
        logits: torch.Tensor = model.score(model.encode_user(user), candidates)
        if device != "cpu":
            torch.cuda.synchronize()
        return logits

    def alone() -> torch.Tensor:
        return torch.cat([scored(slice(one, one + 1)) for one in range(max(TOGETHER))])

    calls: dict[str, Callable[[], Any]] = {"alone": alone}
    calls |= {str(number): partial(scored, slice(0, number)) for number in TOGETHER}
    spent = interleaved(calls, 4 * repeats, 3)
    each = 1000 * spent["alone"]["wall_s"] / max(TOGETHER)
    whole = scored(slice(0, max(TOGETHER)))
    return {
        "alone_ms": each,
        **{
            f"of {number} together_ms": 1000 * spent[str(number)]["wall_s"] / number
            for number in TOGETHER
        },
        "best": each / min(1000 * spent[str(n)]["wall_s"] / n for n in TOGETHER),
        "largest difference": float((whole - alone()).abs().max()),
    }


if __name__ == "__main__":
    main()
