"""Losses over a catalogue: the chunked softmax equals the plain one; the others keep what their
papers state.
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from modeling.next_item import losses


def world(
    number: int, items: int, width: int = 8, seed: int = 0, scale: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(number, width, generator=generator) * scale
    catalogue = torch.randn(items, width, generator=generator) * scale
    return rows, catalogue, torch.randint(items, (number,), generator=generator)


def gradients(loss: Tensor, *leaves: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, leaves))


@settings(max_examples=25, deadline=None)
@given(
    number=st.integers(1, 90),
    items=st.integers(2, 60),
    chunk=st.integers(16, 4000),
    seed=st.integers(0, 1000),
)
def test_chunked_softmax_equals_the_plain_one_gradients_included(
    number: int, items: int, chunk: int, seed: int
) -> None:
    """To 1e-5, for any size of chunk, behind other operations."""
    rows, catalogue, targets = world(number, items, seed=seed)
    found = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(losses, "CHUNK_BYTES", chunk)
        for form in (losses.softmax, losses.softmax_plain):
            leaves = rows.clone().requires_grad_(), catalogue.clone().requires_grad_()
            loss = form(leaves[0] * 2, leaves[1] + 1, targets) * 3
            found.append([loss.detach(), *gradients(loss, *leaves)])
    for fast, plain in zip(*found, strict=True):
        torch.testing.assert_close(fast, plain, atol=1e-5, rtol=1e-5)


def test_chunked_softmax_survives_large_logits() -> None:
    """Exp of the plain logits would overflow."""
    rows, catalogue, targets = world(20, 30, scale=20.0)
    rows.requires_grad_()
    loss = losses.softmax(rows, catalogue, targets)
    torch.testing.assert_close(
        loss, losses.softmax_plain(rows, catalogue, targets), rtol=1e-5, atol=1e-4
    )
    assert torch.isfinite(gradients(loss, rows)[0]).all()


def test_chunked_softmax_says_nan_when_there_is_nan() -> None:
    rows, catalogue, targets = world(20, 30)
    rows[3, 2] = torch.nan
    assert torch.isnan(losses.softmax(rows, catalogue, targets))


def partition(
    rows: Tensor, catalogue: Tensor, targets: Tensor, negatives: Tensor, log_expected: Tensor
) -> Tensor:
    """The partition sum that `sampled_softmax` uses for one row."""
    positive = (rows * catalogue[targets]).sum(-1)
    return torch.exp(
        losses.sampled_softmax(rows, catalogue, targets, negatives, log_expected) + positive
    )


@pytest.mark.parametrize("skewed", [False, True])
def test_sampled_softmax_estimates_the_partition_sum_without_bias(skewed: bool) -> None:
    """The mean over many draws is the sum over the whole catalogue, whatever the proposal."""
    rows, catalogue, targets = world(1, 40, seed=3)
    share = torch.softmax(torch.linspace(0, 3 if skewed else 0, 40), 0)
    generator = torch.Generator().manual_seed(1)
    draws = []
    for _ in range(4000):
        negatives = torch.multinomial(share, 16, replacement=True, generator=generator)
        draws.append(
            partition(rows, catalogue, targets, negatives, torch.log(16 * share[negatives]))
        )
    estimate = torch.stack(draws)
    exact = torch.exp(rows @ catalogue.T).sum()
    error = estimate.std() / math.sqrt(len(estimate))
    assert abs(estimate.mean() - exact) < 4 * error
    assert error < 0.02 * exact


def test_sampled_softmax_with_every_item_once_is_the_full_softmax() -> None:
    rows, catalogue, targets = world(12, 30)
    everything = losses.sampled_softmax(rows, catalogue, targets, torch.arange(30), torch.zeros(30))
    torch.testing.assert_close(everything, losses.softmax_plain(rows, catalogue, targets))


def test_sampled_losses_leave_the_target_out_of_its_negatives() -> None:
    rows, catalogue, _ = world(4, 30)
    targets = torch.tensor([5, 5, 5, 5])
    clean, hit = torch.tensor([1, 2, 3]), torch.tensor([1, 2, 3, 5])
    zeros = torch.zeros(4)
    torch.testing.assert_close(
        losses.sampled_softmax(rows, catalogue, targets, hit, zeros),
        losses.sampled_softmax(rows, catalogue, targets, clean, zeros[:3]),
    )
    # gBCE divides by K + 1 and weighs the positive by β(K): compare the negatives' part only.
    beta = [losses.gbce_beta(k, 30, 0.75) for k in (4, 3)]
    positive = torch.nn.functional.softplus(-(rows * catalogue[targets]).sum(-1)).mean()
    with_hit = losses.gbce(rows, catalogue, targets, hit) * 5 - beta[0] * positive
    without = losses.gbce(rows, catalogue, targets, clean) * 4 - beta[1] * positive
    torch.testing.assert_close(with_hit, without)


def test_gbce_with_one_negative_and_no_calibration_is_sasrecs_loss() -> None:
    """T = 0, K = 1: β = 1, plain binary cross-entropy."""
    rows, catalogue, targets = world(12, 30)
    targets = targets.clamp(min=1)
    negative = torch.tensor([0])
    logits = torch.stack([(rows * catalogue[targets]).sum(-1), rows @ catalogue[0]], 1)
    labels = torch.tensor([1.0, 0.0]).expand_as(logits)
    expected = torch.nn.functional.binary_cross_entropy_with_logits(logits, labels)
    torch.testing.assert_close(
        losses.gbce(rows, catalogue, targets, negative, calibration=0.0), expected
    )


@pytest.mark.parametrize(("calibration", "expected"), [(0.0, 1.0), (1.0, 0.1), (0.75, 0.325)])
def test_gbce_exponent_follows_the_paper(calibration: float, expected: float) -> None:
    """β = α (t (1 - 1/α) + 1/α): 1 at t = 0, α at t = 1."""
    assert losses.gbce_beta(10, 101, calibration) == pytest.approx(expected)


def test_gbce_equals_the_papers_transformed_logit() -> None:
    """GSASRec's code turns the positive logit into γ(s) with σ(γ) = σ(s)^β and takes plain BCE."""
    rows, catalogue, targets = world(12, 30, seed=4)
    negatives = torch.tensor([7, 11, 13])
    keep = ~torch.isin(targets, negatives)
    rows, targets = rows[keep], targets[keep]
    positive = (rows * catalogue[targets]).sum(-1).double()
    beta = losses.gbce_beta(3, 30, 0.75)
    gamma = torch.log(1 / (torch.sigmoid(positive) ** -beta - 1))
    logits = torch.cat([gamma[:, None], (rows @ catalogue[negatives].T).double()], 1)
    labels = torch.zeros_like(logits)
    labels[:, 0] = 1
    expected = torch.nn.functional.binary_cross_entropy_with_logits(logits, labels)
    torch.testing.assert_close(
        losses.gbce(rows, catalogue, targets, negatives).double(), expected, rtol=1e-5, atol=1e-6
    )
