"""Layers that interaction models share: maps and dot products over a request's half and a candidate's
half.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu


class SplitLinear(nn.Module):
    """A linear map of [request, candidate], whose request half is multiplied once per request."""

    def __init__(self, request: int, candidate: int, out: int) -> None:
        super().__init__()
        self.request = nn.Linear(request, out, bias=False) if request else None
        self.candidate = nn.Linear(candidate, out)

    def forward(self, request_BX: Tensor | None, candidate_BCX: Tensor) -> Tensor:
        """B × C × out."""
        mapped: Tensor = self.candidate(candidate_BCX)
        return mapped if self.request is None else mapped + self.request(request_BX)[:, None]


class TaskHeads(nn.Module):
    """A two-layer network for each task over [request, candidate]."""

    def __init__(
        self, request: int, candidate: int, hidden: int, tasks: int, dropout: float
    ) -> None:
        super().__init__()
        self.tasks = tasks
        self.hidden = SplitLinear(request, candidate, tasks * hidden)
        self.dropout = nn.Dropout(dropout)
        self.out = nn.Parameter(torch.empty(tasks, hidden))
        self.bias = nn.Parameter(torch.zeros(tasks))
        nn.init.normal_(self.out, std=0.1 * hidden**-0.5)

    def forward(self, request_BX: Tensor | None, candidate_BCX: Tensor) -> Tensor:
        hidden = self.dropout(gelu(self.hidden(request_BX, candidate_BCX))).unflatten(
            -1, (self.tasks, -1)
        )
        return ((hidden * self.out).sum(-1) + self.bias).float()


class Interaction(nn.Module, ABC):
    """Mixes R request tokens and N candidate tokens into what the heads read."""

    # Widths of what a request and a candidate give the heads
    out: tuple[int, int]

    @abstractmethod
    def forward(self, request_BRD: Tensor, candidate_BCND: Tensor) -> tuple[Tensor | None, Tensor]:
        """B × out[0], or None where that is 0, and B × C × out[1]."""


def all_tokens(request_BRD: Tensor, candidate_BCND: Tensor) -> Tensor:
    """Both kinds in one list for every candidate, B × C × (R + N) × D."""
    request = request_BRD[:, None].expand(-1, candidate_BCND.shape[1], -1, -1)
    return torch.cat([request, candidate_BCND], dim=2)


class CrossNetwork(Interaction):
    """Cross layers, x_{l+1} = x_0 ⊙ (W x_l + b) + x_l, over all tokens (DCNv2, arXiv 2008.13535,
    equation 1).

    The first layer multiplies the request's half once per request.

    Args:
        request: its tokens; `candidate` likewise.
        rank: of the matrices W; 0 keeps them whole.
    """

    def __init__(
        self, request: int, candidate: int, width: int, num_layers: int, rank: int
    ) -> None:
        super().__init__()
        total = (request + candidate) * width
        self.out = (0, total)
        self.first: nn.Module = SplitLinear(request * width, candidate * width, rank or total)
        self.first_up = nn.Linear(rank, total) if rank else None
        self.crosses = nn.ModuleList(
            nn.Sequential(nn.Linear(total, rank, bias=False), nn.Linear(rank, total))
            if rank
            else nn.Linear(total, total)
            for _ in range(num_layers - 1)
        )

    def forward(self, request_BRD: Tensor, candidate_BCND: Tensor) -> tuple[None, Tensor]:
        """Nothing of the request, all of the candidate."""
        start = all_tokens(request_BRD, candidate_BCND).flatten(2)
        crossed = self.first(request_BRD.flatten(1), candidate_BCND.flatten(2))
        crossed = start * (crossed if self.first_up is None else self.first_up(crossed)) + start
        for cross in self.crosses:
            crossed = torch.addcmul(crossed, start, cross(crossed))
        return None, crossed


class DotInteraction(nn.Module):
    """Dot products of all pairs of R request fields and N candidate fields (DLRM, arXiv
    1906.00091).

    Pairs within the request are taken once per request.
    """

    request_pairs: Tensor
    pairs: Tensor

    def __init__(self, request: int, candidate: int) -> None:
        super().__init__()
        both = torch.triu_indices(request + candidate, request + candidate, 1, device="cpu")
        within = both[1] < request
        self.register_buffer("request_pairs", both[:, within], persistent=False)
        self.register_buffer("pairs", both[:, ~within], persistent=False)

    def forward(self, request_BRD: Tensor, candidate_BCND: Tensor) -> tuple[Tensor, Tensor]:
        """Products within the request, B × P, and those with a candidate's field, B × C × Q."""
        number = request_BRD.shape[1]
        first, second = self.request_pairs
        alike = (request_BRD @ request_BRD.transpose(1, 2))[:, first, second]
        across = candidate_BCND @ request_BRD[:, None].transpose(2, 3)
        products = torch.cat([across, candidate_BCND @ candidate_BCND.transpose(2, 3)], dim=-1)
        # The second of a pair is never the request's
        first, second = self.pairs
        return alike, products[:, :, second - number, first]


class ReadDotInteraction(Interaction):
    """Products of all pairs of fields; what the history gave, the dense vector and the request go
    to the heads as well.
    """

    def __init__(self, request: int, candidate: int, width: int, dense: int) -> None:
        super().__init__()
        self.dense = dense
        self.pairs = DotInteraction(request, candidate)
        self.out = (
            self.pairs.request_pairs.shape[1] + request * width,
            self.pairs.pairs.shape[1] + 2 * width,
        )

    def forward(self, request_BRD: Tensor, candidate_BCND: Tensor) -> tuple[Tensor, Tensor]:
        """Return what a request and a candidate give the heads. The candidate's first token is what it
        read of the history.
        """
        within, across = self.pairs(request_BRD, candidate_BCND)
        # DLRM's one dense vector
        dense = candidate_BCND[:, :, candidate_BCND.shape[2] - self.dense :].sum(2)
        own = torch.cat([across, candidate_BCND[:, :, 0], dense], dim=-1)
        return torch.cat([within, request_BRD.flatten(1)], dim=-1), own
