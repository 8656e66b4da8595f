"""What a recipe asks of an accelerator changes how long a step takes and what it holds, and not what is learned."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from modeling.errors import RecipeError
from modeling.inputs.batch import Batch
from modeling.models.sequence import SequenceRanker
from modeling.recipes import Training
from modeling.training.accelerator import autocast, recompute_layers
from modeling.training.trainer import ahead
from tests.modeling import test_invariants as worlds

RANKERS = [name for name in worlds.CONFIGS if not name.startswith(("trees", "blend"))]
CPU = torch.device("cpu")


def batch_of(lengths: list[int]) -> Batch:
    some = worlds.candidates(len(lengths), 4, 1)
    return Batch(worlds.user_inputs(lengths, 1), some, torch.zeros(*some.item_BC.shape, 1))


def gradients(model: Any, batch: Batch) -> dict[str, torch.Tensor]:
    model.zero_grad()
    torch.manual_seed(5)
    logits, further = model.training_forward(batch)
    (logits.sum() + (0 if further is None else further)).backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", RANKERS)
def test_layers_that_are_computed_again_have_the_same_gradients(name: str) -> None:
    """Dropout among them: the same units are dropped again."""
    model = worlds.make(name).train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.2
    batch = batch_of([9, 5])
    kept = gradients(model, batch)
    recompute_layers(model)
    again = gradients(model, batch)
    assert set(again) == set(kept)
    for parameter, grad in kept.items():
        torch.testing.assert_close(again[parameter], grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", RANKERS)
def test_a_step_in_bfloat16_is_near_and_keeps_weights_and_gradients_in_float32(name: str) -> None:
    model = worlds.make(name)
    if isinstance(model, SequenceRanker):
        pytest.skip("its loss is over a catalogue: next-item runs")
    batch = batch_of([12, 12])
    with torch.no_grad():
        exact = model(batch)
    with autocast(CPU, "bf16"):
        logits, _ = model.training_forward(batch)
    logits.float().sum().backward()
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert {p.grad.dtype for p in model.parameters() if p.grad is not None} == {torch.float32}
    spread = float(exact.std().clamp(min=0.1))
    assert float((logits.float() - exact).abs().max()) < 0.2 * max(spread, 1.0)


def test_batches_come_in_order_however_many_make_them() -> None:
    plan = [np.array([number]) for number in range(40)]
    for loaders in (1, 3):
        assert [int(one[0]) for one in ahead(lambda chosen: chosen, plan, loaders)] == list(
            range(40)
        )


def test_what_no_accelerator_has_is_refused() -> None:
    with pytest.raises(RecipeError, match="fp32, tf32, bf16"):
        Training(precision="fp16")  # type: ignore[arg-type]
    with pytest.raises(RecipeError, match="at least 1"):
        Training(loaders=0)
