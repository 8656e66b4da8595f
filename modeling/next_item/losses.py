"""Next-item losses over a catalogue; they never hold rows × catalogue numbers at once.

Each takes packed rows_ND, the catalogue's output rows_VD and targets_N, and gives the mean over
rows.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, softplus

# Bytes of logits at a time: they stay in a core's second-level cache
CHUNK_BYTES = 1_500_000
# A GPU wants few large products
CHUNK_BYTES_CUDA = 500_000_000


def softmax_plain(rows_ND: Tensor, catalogue_VD: Tensor, targets_N: Tensor) -> Tensor:
    """Cross-entropy over the whole catalogue, with its N × V logits. The twin of `softmax`."""
    return cross_entropy(rows_ND @ catalogue_VD.T, targets_N)


def softmax(rows_ND: Tensor, catalogue_VD: Tensor, targets_N: Tensor) -> Tensor:
    """Cross-entropy over the whole catalogue, chunk by chunk; gradients are made on the way and
    kept instead of logits.

    Memory: N × D + V × D beside one chunk.
    """
    loss: Tensor = _ChunkedSoftmax.apply(rows_ND, catalogue_VD, targets_N)  # type: ignore[no-untyped-call]
    return loss


class _ChunkedSoftmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, catalogue: Tensor, targets: Tensor) -> Tensor:
        number = len(rows)
        needs = any(ctx.needs_input_grad[:2])
        # 1. Buffers: logits of one chunk, which all chunks share, and the gradients.
        chunk_bytes = CHUNK_BYTES_CUDA if rows.is_cuda else CHUNK_BYTES
        size = max(16, chunk_bytes // (4 * len(catalogue)))
        buffer = catalogue.new_empty(min(size, number), len(catalogue))
        grad_rows = torch.empty_like(rows) if needs else None
        grad_catalogue = torch.zeros_like(catalogue) if needs else None
        # 2. The loss is log Σ_v e^{s_v} - s_target; the second term needs no logits.
        target_rows = catalogue[targets]
        total = -(rows * target_rows).sum(dtype=torch.float64)
        for start in range(0, number, size):
            chunk = rows[start : start + size]
            logits = torch.mm(chunk, catalogue.T, out=buffer[: len(chunk)])
            highest = logits.amax(1, keepdim=True)
            weights = logits.sub_(highest).exp_()
            mass = weights.sum(1, keepdim=True)
            total += (mass.log() + highest).sum(dtype=torch.float64)
            if grad_rows is not None and grad_catalogue is not None:
                # Softmax / N is the gradient of the first term with respect to the logits.
                share = 1 / (mass * number)
                torch.mm(weights, catalogue, out=grad_rows[start : start + size]).mul_(share)
                grad_catalogue.addmm_(weights.T, chunk * share)
        # 3. The gradient of the second term: -1 / N at each row's target.
        if grad_rows is not None and grad_catalogue is not None:
            grad_rows.sub_(target_rows, alpha=1 / number)
            grad_catalogue.index_add_(0, targets, rows, alpha=-1 / number)
            ctx.save_for_backward(grad_rows, grad_catalogue)
        return (total / number).to(rows.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        grad_rows, grad_catalogue = ctx.saved_tensors
        return grad_rows * grad, grad_catalogue * grad, None


def sampled_softmax(
    rows_ND: Tensor,
    catalogue_VD: Tensor,
    targets_N: Tensor,
    negatives_K: Tensor,
    log_expected_K: Tensor,
) -> Tensor:
    """Softmax over the target and K shared negatives, corrected for how they were drawn.

    The partition sum is e^{s+} + Σ_k e^{s_k} / E[count of k], over negatives that are not the
    target: an unbiased estimate of the whole catalogue's, whatever the negatives' distribution
    (logQ correction; Bengio and Senécal 2008, Yi et al. 2019, with the target left uncorrected).

    Args:
        negatives_K: catalogue rows, drawn with replacement.
        log_expected_K: log of the expected number of draws of each: log(K · q).
    """
    positive = (rows_ND * catalogue_VD[targets_N]).sum(-1)
    logits = rows_ND @ catalogue_VD[negatives_K].T - log_expected_K
    logits = logits.masked_fill(negatives_K == targets_N[:, None], -torch.inf)
    return (torch.logsumexp(torch.cat([positive[:, None], logits], 1), 1) - positive).mean()


def gbce(
    rows_ND: Tensor,
    catalogue_VD: Tensor,
    targets_N: Tensor,
    negatives_K: Tensor,
    calibration: float = 0.75,
) -> Tensor:
    """Generalised BCE of gSASRec (Petrov and Macdonald, arXiv 2308.07192), mean over rows and K + 1
    logits.

    σ(s+)^β with β = α (t (1 - 1/α) + 1/α) and α = K / (V - 1); t = `calibration`. t = 0 with K = 1
    is SASRec's own loss; t = 1 gives calibrated probabilities. Since log σ(s)^β = β log σ(s), no
    transform of the logit is needed.

    Differs: the negatives are shared by the rows, so that they cost one matrix product; a row's own
    target among them is left out.
    """
    beta = gbce_beta(len(negatives_K), len(catalogue_VD), calibration)
    positive = (rows_ND * catalogue_VD[targets_N]).sum(-1)
    negative = softplus(rows_ND @ catalogue_VD[negatives_K].T)
    negative = negative.masked_fill(negatives_K == targets_N[:, None], 0.0)
    return (beta * softplus(-positive) + negative.sum(1)).mean() / (len(negatives_K) + 1)


def gbce_beta(num_negatives: int, num_items: int, calibration: float) -> float:
    """The exponent of the positive's probability."""
    alpha = num_negatives / (num_items - 1)
    return alpha * (calibration * (1 - 1 / alpha) + 1 / alpha)


def uniform_negatives(
    number: int, num_items: int, device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor]:
    """Catalogue rows drawn uniformly, and their log expected counts, for `sampled_softmax`."""
    drawn = torch.randint(num_items, (number,), device=device)
    return drawn, torch.full((number,), math.log(number / num_items), device=device)
