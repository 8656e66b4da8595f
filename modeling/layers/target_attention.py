"""Target attention: a candidate weighs each event of the history by a small network (DIN, arXiv
1706.06978), and by how like it the event's item is.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import normalize, prelu

from modeling.layers.host import on_host

# Two items that share four of five categories are 2/3 alike: a thousand such events weigh about as much as one equal one
SHARPNESS = 20.0
# Hidden units of pairs made at a time on a CPU: a megabyte, which its cache keeps
BLOCK = 1 << 18


class TargetAttention(nn.Module):
    """Σ_j a(e_j, c) e_j with a = MLP([e_j, c, e_j - c, e_j ⊙ c]) and no softmax.

    The first layer is linear in [e, c, e - c, e ⊙ c]: e (W_1 + W_3 + diag(c) W_4) + c (W_2 - W_3),
    a matrix of each candidate's times the event. Those of all candidates stand side by side in one
    product with the request's history, and no tensor of a pair but its hidden units is ever made:
    on a CPU block by block, and again in the backward pass. PReLU with slope s is s x + (1 - s)
    max(x, 0), whose linear half needs no hidden units at all.

    With `matching` a candidate reads three things: the mean of a(e_j, c) e_j; the mean of the events like it, where
    m_j = exp(τ (î_j · ĉ - 1)) of its item's code i_j weighs an event; and log(1 + Σ_j m_j), how many these are. A
    network of pairs alone has not found after a quarter of an epoch that equal items are equal, where their
    codes say so from the first step on (`codes.py`). The paper's sum over a thousand events would drown them.

    Differs: PReLU, not Dice, whose batch statistics would make a candidate's score depend on its
    batch; matching, which the paper has not.

    Args:
        matching: False: the paper's weights alone.
    """

    def __init__(self, width: int, hidden: int, *, matching: bool = True) -> None:
        super().__init__()
        self.event = nn.Linear(width, hidden)
        self.candidate = nn.Linear(width, hidden, bias=False)
        self.pair = nn.Parameter(torch.empty(width, hidden))
        nn.init.xavier_normal_(self.pair)
        self.slope = nn.Parameter(torch.full((hidden,), 0.25))
        self.out = nn.Linear(hidden, 1)
        self.matching = matching
        if matching:
            self.sharpness = nn.Parameter(torch.tensor(SHARPNESS))
            self.sum = nn.Parameter(torch.randn(width) * 0.1)
            # The network begins with no say.
            nn.init.zeros_(self.out.weight)
            nn.init.zeros_(self.out.bias)

    def forward(
        self, rows_BLD: Tensor, items_BLD: Tensor, mask_BL: Tensor, candidate_BCD: Tensor
    ) -> Tensor:
        """Read the history for each candidate, B × C × D; zeros of an empty history. In the weights'
        precision, under autocast too.

        Args:
            rows_BLD: events.
            items_BLD: their items, as candidates are embedded.
        """
        kind = self.pair.dtype
        with torch.autocast(candidate_BCD.device.type, enabled=False):
            candidate = candidate_BCD.to(kind)
            rows = rows_BLD.to(kind)
            weight = self._weights(rows, candidate)
            return self._read(rows, items_BLD.to(kind), mask_BL, candidate, weight)

    def _likeness(self, items_BLD: Tensor, candidate_BCD: Tensor) -> Tensor:
        """exp(τ (î · ĉ - 1)), B × L × C."""
        alike = normalize(items_BLD, dim=-1) @ normalize(candidate_BCD, dim=-1).transpose(1, 2)
        return (self.sharpness * (alike - 1)).exp()

    def _read(
        self,
        rows: Tensor,
        items: Tensor,
        mask_BL: Tensor,
        candidate_BCD: Tensor,
        weight_BLC: Tensor,
    ) -> Tensor:
        """What candidates read of the rows by the network's weights, and by likeness."""
        mask = mask_BL[..., None].to(rows.dtype)
        weight = weight_BLC * mask
        if not self.matching:
            return weight.transpose(1, 2) @ rows
        like = self._likeness(items, candidate_BCD) * mask
        total = like.sum(1, keepdim=True)
        # Both means in one product
        weight = weight / mask.sum(1, keepdim=True).clamp(min=1) + like / (1 + total)
        return torch.addcmul(
            weight.transpose(1, 2) @ rows, torch.log1p(total).transpose(1, 2), self.sum
        )

    def _weights(self, rows: Tensor, candidate_BCD: Tensor) -> Tensor:
        event = self.event.weight.T
        out = self.out.weight[0]
        shift = self.candidate(candidate_BCD) + self.event.bias  # B × C × H
        weight: Tensor = _RectifiedPairs.apply(  # type: ignore[no-untyped-call]
            rows,
            candidate_BCD,
            torch.stack([self.pair, event], dim=1),
            shift,
            out * (1 - self.slope),
        )
        linear = out * self.slope
        of_event = (event @ linear)[:, None] + candidate_BCD.transpose(1, 2) * (self.pair @ linear)[
            :, None
        ]
        return weight + torch.baddbmm((shift @ linear + self.out.bias)[:, None], rows, of_event)

    def plain(
        self, rows_BLD: Tensor, items_BLD: Tensor, mask_BL: Tensor, candidate_BCD: Tensor
    ) -> Tensor:
        """The plain twin: the first layer over [e, c, e - c, e ⊙ c], with W_3 = 0, for every
        pair.
        """
        event = rows_BLD[:, None].expand(-1, candidate_BCD.shape[1], -1, -1)
        candidate = candidate_BCD[:, :, None].expand_as(event)
        joined = torch.cat([event, candidate, event - candidate, event * candidate], dim=-1)
        nothing = torch.zeros_like(self.pair)
        first = torch.cat([self.event.weight.T, self.candidate.weight.T, nothing, self.pair])
        hidden = prelu((joined @ first + self.event.bias).flatten(0, -2), self.slope)
        weight = self.out(hidden).view(joined.shape[:-1]).transpose(1, 2)
        return self._read(rows_BLD, items_BLD, mask_BL, candidate_BCD, weight)


class _RectifiedPairs(torch.autograd.Function):
    """max(e (W + diag(c) P) + shift_c, 0) @ out for every event e and candidate c, B × L × C.

    Rows carry a 1 behind them, so that a product adds the shift; so do candidates, whose W and P
    are one matrix.
    """

    @staticmethod
    def forward(
        ctx: Any,
        rows_BLD: Tensor,
        candidate_BCD: Tensor,
        both_D2H: Tensor,
        shift_BCH: Tensor,
        out_H: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(rows_BLD, candidate_BCD, both_D2H, shift_BCH, out_H)
        weight = rows_BLD.new_empty(*rows_BLD.shape[:2], candidate_BCD.shape[1])
        for some, chosen in _blocks(rows_BLD, shift_BCH):
            matrix = _matrix(
                _by_width(candidate_BCD[some, chosen]), both_D2H, shift_BCH[some, chosen]
            )
            weight[some, :, chosen] = _hidden(_with_one(rows_BLD[some]), matrix) @ out_H
        return weight

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_BLC: Tensor) -> tuple[Tensor, ...]:
        with torch.autocast(gradient_BLC.device.type, enabled=False):
            return _gradients(gradient_BLC, *ctx.saved_tensors)


def _gradients(
    gradient_BLC: Tensor, rows: Tensor, candidate: Tensor, both: Tensor, shift: Tensor, out: Tensor
) -> tuple[Tensor, ...]:
    to_rows = torch.zeros_like(rows)
    to_candidate = torch.empty_like(candidate)
    to_shift = torch.empty_like(shift)
    to_both = torch.zeros_like(both)
    to_out = torch.zeros_like(out)
    for some, chosen in _blocks(rows, shift):
        events = _with_one(rows[some])
        chosen_by_width = _by_width(candidate[some, chosen])
        matrix = _matrix(chosen_by_width, both, shift[some, chosen])
        into = gradient_BLC[some, :, chosen]
        hidden = _hidden(events, matrix)
        to_out += hidden.flatten(0, -2).T @ into.flatten()
        hidden = hidden.sign_().mul_(into[..., None]).flatten(2)
        to_rows[some] += hidden @ (matrix[:, :-1] * out).flatten(2).transpose(1, 2)
        to_matrix = (events.transpose(1, 2) @ hidden).view_as(matrix).mul_(out)
        to_shift[some, chosen] = to_matrix[:, -1]
        # D × pairs of request and candidate × H
        by_width = to_matrix[:, :-1].transpose(0, 1).flatten(1, 2)
        to_both += chosen_by_width.transpose(1, 2) @ by_width
        to_candidate[some, chosen] = (by_width @ both[:, 0, :, None])[..., 0].T.view_as(
            candidate[some, chosen]
        )
    return to_rows, to_candidate, to_both, to_shift, to_out


def _with_one(rows: Tensor) -> Tensor:
    return torch.cat([rows, torch.ones_like(rows[..., :1])], dim=-1)


def _by_width(candidate: Tensor) -> Tensor:
    """Candidates and a 1 for each of their numbers, D × (n × C) × 2."""
    return _with_one(candidate.flatten(0, 1).T[..., None])


def _matrix(candidate_by_width: Tensor, both: Tensor, shift: Tensor) -> Tensor:
    """Return the matrix that multiplies an event and its 1, for each candidate: n × (D + 1) × C × H."""
    of_event = (candidate_by_width @ both).unflatten(1, shift.shape[:2]).transpose(0, 1)
    return torch.cat([of_event, shift[:, None]], dim=1)


def _hidden(events: Tensor, matrix: Tensor) -> Tensor:
    """Hidden units of some pairs, n × L × C × H."""
    return (events @ matrix.flatten(2)).unflatten(-1, matrix.shape[2:]).relu_()


def _blocks(rows: Tensor, shift: Tensor) -> Iterator[tuple[slice, slice]]:
    """Requests and candidates of each block; on an accelerator all in one."""
    number, candidates, hidden = shift.shape
    if not on_host(rows):
        yield slice(None), slice(None)
        return
    # Hidden units, or the candidate's matrix
    a_pair = max(rows.shape[1], rows.shape[2] + 1) * hidden
    wide = max(min(BLOCK // a_pair, candidates), 1)
    deep = max(BLOCK // (a_pair * wide), 1) if wide == candidates else 1
    for start in range(0, number, deep):
        for first in range(0, candidates, wide):
            yield slice(start, start + deep), slice(first, first + wide)
