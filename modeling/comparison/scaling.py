"""The cost of a sequence model's encoder against the length of the history, measured in a separate
process.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import numpy as np

from modeling.comparison.processes import ask, peak_mb


def encoder_cost(
    model: str, config: dict[str, Any], length: int, threads: int = 1, seconds: float = 2.0
) -> dict[str, Any]:
    """Forward and backward of one history through a sequence model's encoder.

    Returns:
        `length`, `tokens_per_cpu_s`, and `peak_mb`, the process's peak memory.
    """
    question = {
        "model": model,
        "config": config,
        "length": length,
        "threads": threads,
        "seconds": seconds,
    }
    return ask("modeling.comparison.scaling", "encoder", question)


def measure(question: dict[str, Any]) -> dict[str, Any]:
    """The measurement itself, in this process."""
    import torch

    from modeling import models
    from modeling.inputs.batch import FeatureSizes
    from modeling.layers.memory import keep_freed_memory
    from modeling.layers.packing import Packing
    from modeling.models.sequence import PackedEvents, SequenceRanker

    torch.set_num_threads(question["threads"])
    keep_freed_memory()
    # 1. A model with few items, so that the encoder outweighs the embedding table.
    length = question["length"]
    model = models.build(
        question["model"], question["config"], FeatureSizes(1000, 1, length)
    ).train()
    assert isinstance(model, SequenceRanker)
    # 2. One history of random items, packed.
    items = torch.randint(1, 1000, (length,))
    events = PackedEvents(
        items, torch.zeros_like(items), torch.zeros(length), Packing(np.array([length]))
    )

    def step() -> None:
        model.zero_grad(set_to_none=True)
        model.encode(events).square().mean().backward()

    # 3. The first step is not counted: memory is allocated in it.
    step()
    rounds = 0
    started = time.process_time()
    # At least three rounds, so that a slow encoder is not measured by one alone.
    while rounds < 3 or time.process_time() - started < question["seconds"]:
        step()
        rounds += 1
    spent = time.process_time() - started
    return {"length": length, "tokens_per_cpu_s": rounds * length / spent, "peak_mb": peak_mb()}


if __name__ == "__main__":
    print(json.dumps(measure(json.loads(sys.stdin.read()))))
