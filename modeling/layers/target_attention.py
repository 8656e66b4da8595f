"""Target attention: a candidate weighs each event of the history by a small network (DIN, arXiv 1706.06978)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import prelu


class Read(NamedTuple):
    """What target attention needs of a history, once per request."""

    rows_BLD: Tensor
    with_one_BLD: Tensor  # the rows with a 1 behind each, which carries the biases
    mask_BL: Tensor


class TargetAttention(nn.Module):
    """Σ_j a(e_j, c) e_j with a = MLP([e_j, c, e_j - c, e_j ⊙ c]) and no softmax.

    The first layer is linear in [e, c, e - c, e ⊙ c]: e (W_1 + W_3 + diag(c) W_4) + c (W_2 - W_3), a matrix of each
    candidate's times the event. Those of all candidates stand side by side in one product with the request's history,
    and no tensor of a pair but its hidden units is ever made. PReLU with slope s is s x + (1 - s) max(x, 0), whose linear
    half needs no hidden units at all.

    Differs: PReLU, not Dice, whose batch statistics would make a candidate's score depend on its batch.
    """

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.event, self.candidate = nn.Linear(width, hidden), nn.Linear(width, hidden, bias=False)
        self.pair = nn.Parameter(torch.empty(width, hidden))
        nn.init.xavier_normal_(self.pair)
        self.slope = nn.Parameter(torch.full((hidden,), 0.25))
        self.out = nn.Linear(hidden, 1)

    def prepare(self, rows_BLD: Tensor, mask_BL: Tensor) -> Read:
        """The history's half."""
        return Read(rows_BLD, torch.cat([rows_BLD, torch.ones_like(rows_BLD[..., :1])], dim=-1), mask_BL)

    def forward(self, read: Read, candidate_BCD: Tensor) -> Tensor:
        """What each candidate reads, B × C × D; zeros of an empty history."""
        of_event = self.event.weight.T[:, None] + candidate_BCD.transpose(1, 2)[..., None] * self.pair[:, None]
        of_one = (self.candidate(candidate_BCD) + self.event.bias)[:, None]
        matrix = torch.cat([of_event, of_one], dim=1)  # B × (D + 1) × C × hidden
        hidden = (read.with_one_BLD @ matrix.flatten(2)).unflatten(-1, matrix.shape[2:]).relu_()
        out = self.out.weight[0]
        weight = hidden @ (out * (1 - self.slope)) + read.with_one_BLD @ (matrix @ (out * self.slope)) + self.out.bias
        return (weight * read.mask_BL[..., None]).transpose(1, 2) @ read.rows_BLD

    def plain(self, rows_BLD: Tensor, mask_BL: Tensor, candidate_BCD: Tensor) -> Tensor:
        """The plain twin: the first layer over [e, c, e - c, e ⊙ c], with W_3 = 0, for every pair."""
        event = rows_BLD[:, None].expand(-1, candidate_BCD.shape[1], -1, -1)
        candidate = candidate_BCD[:, :, None].expand_as(event)
        joined = torch.cat([event, candidate, event - candidate, event * candidate], dim=-1)
        nothing = torch.zeros_like(self.pair)
        first = torch.cat([self.event.weight.T, self.candidate.weight.T, nothing, self.pair])
        hidden = prelu((joined @ first + self.event.bias).flatten(0, -2), self.slope)
        weight = self.out(hidden).view(joined.shape[:-1])
        return ((weight * mask_BL[:, None])[..., None] * event).sum(2)
