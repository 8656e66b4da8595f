"""What benchmarks that measure speed and need no data share: sizes, floors, counts of FLOPs."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from modeling.inputs.batch import Batch, FeatureSizes
from modeling.inputs.columns import GroupSizes


def sizes_of(history_length: int) -> FeatureSizes:
    """Features like Online Retail's."""
    return FeatureSizes(
        items=10_000,
        actions=2,
        history_length=history_length,
        request=GroupSizes((50, 24, 7), (1, 1, 1), numbers=5),
        candidate=GroupSizes((2_000,), (8,), numbers=13),
        event=GroupSizes(numbers=2),
    )


def one_candidate_per_row(batch: Batch) -> Batch:
    """The same samples, each a request of its own with the whole history: what grouping saves."""
    number = batch.candidates.item_BC.shape[1]
    user = batch.user._map(lambda tensor: tensor.repeat_interleave(number, 0))
    candidates = batch.candidates._map(lambda tensor: tensor.flatten(0, 1)[:, None])
    return Batch(user, candidates, batch.labels_BCT.flatten(0, 1)[:, None])


def flops(call: Callable[[], Any]) -> int:
    """FLOPs of a call's matrix products, attention on a CPU included, which torch does not count by
    itself.
    """
    aten = torch.ops.aten
    mapping = {
        aten._scaled_dot_product_flash_attention_for_cpu: _attention,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
    }
    with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        call()
    return int(counter.get_total_flops())


def _attention(query: Any, key: Any, value: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    return sdpa_flop_count(query, key, value)


def _attention_backward(
    gradient: Any, query: Any, key: Any, value: Any, *_: Any, out_shape: Any = None, **__: Any
) -> int:
    return sdpa_backward_flop_count(gradient, query, key, value)


def gemm_rate() -> float:
    """FLOPs a CPU second of a large matrix product on this thread: the floor that benchmarks
    print.
    """
    square = torch.randn(1024, 1024)
    taken = []
    for _ in range(20):
        started = time.process_time()
        torch.mm(square, square)
        taken.append(time.process_time() - started)
    return 2 * 1024**3 / statistics.median(taken)


def synchronised(call: Callable[[], Any], device: str) -> Callable[[], Any]:
    """The call, which returns when its device has finished."""

    def run() -> Any:
        result = call()
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        return result

    return run
