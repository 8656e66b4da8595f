"""The cost of sequence operators against the history and against the width, alone: without projections and feed-forward, which
all of them have and whose cost is of second degree in the width.

A row says how a time grows: the slope of its logarithm, 1 where it is linear. The floor is reading and writing the same
rows once (`copy`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from feature_repo.benchmarks import interleaved, parser, report
from modeling.layers.hydra import DecayedHydra, Hydra
from modeling.layers.linear_attention import LinRecAttention
from modeling.layers.memory import keep_freed_memory
from modeling.layers.operator import Operator
from modeling.layers.softmax import Softmax

# Rows and width where the other grows
ROWS, WIDTH = 2048, 64
LENGTHS = (512, 1024, 2048, 4096, 8192)
WIDTHS = (64, 128, 256, 512, 1024)
HEADS = 2
# As its reference code has
LINREC_HEADS = 8


def main() -> None:
    """Run."""
    flags = parser("modeling.benchmarks.operators", __doc__)
    flags.add_argument("--threads", type=int, default=1)
    arguments = flags.parse_args()
    torch.set_num_threads(arguments.threads)
    keep_freed_memory()
    lengths, widths = (LENGTHS[:3], WIDTHS[:3]) if arguments.quick else (LENGTHS, WIDTHS)
    rows = _grown("rows", [(length, WIDTH) for length in lengths], arguments.repeats)
    rows += _grown("width", [(ROWS, width) for width in widths], arguments.repeats)
    report("operators", {"threads": arguments.threads}, rows, arguments.json)


def _made(width: int) -> dict[str, Operator]:
    """Causal ones, and Hydra's both ways."""
    return {
        "hydra": Hydra(causal=True),
        "hydra, both ways": Hydra(causal=False),
        "decayed hydra": DecayedHydra(width),
        "linrec": LinRecAttention(LINREC_HEADS, causal=True),
        "softmax": Softmax(HEADS, causal=True),
    }


def _grown(what: str, shapes: list[tuple[int, int]], repeats: int) -> list[dict[str, Any]]:
    """Forward and backward of one sequence at every shape, side by side, and how they grow."""
    calls: dict[str, Callable[[], Any]] = {}
    for length, width in shapes:
        torch.manual_seed(0)
        sides = torch.randn(3, 1, length, width)
        for name, operator in _made(width).items():
            calls[f"{name} {length} {width}"] = _step(operator, sides)
        calls[f"copy {length} {width}"] = _copy(sides)
    seconds = interleaved(calls, repeats)
    rows = []
    for name in (*_made(WIDTH), "copy"):
        times = [seconds[f"{name} {length} {width}"]["wall_s"] for length, width in shapes]
        sizes = [length if what == "rows" else width for length, width in shapes]
        slope = np.polyfit(np.log(sizes), np.log(times), 1)[0]
        rows.append(
            {
                "against": what,
                "operator": name,
                **{str(size): 1000 * time for size, time in zip(sizes, times, strict=True)},
                "slope": float(slope),
                "slope_of_last": math.log(times[-1] / times[-2]) / math.log(sizes[-1] / sizes[-2]),
            }
        )
    return rows


def _step(operator: Operator, sides: Tensor) -> Callable[[], None]:
    query, key, value = (side.clone().requires_grad_() for side in sides)

    def step() -> None:
        query.grad = key.grad = value.grad = None
        operator(query, key, value, None).sum().backward()

    return step


def _copy(sides: Tensor) -> Callable[[], Tensor]:
    def copy() -> Tensor:
        return sides.clone()

    return copy


if __name__ == "__main__":
    main()
