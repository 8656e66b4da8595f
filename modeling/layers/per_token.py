"""Weights of a token's own: token t of a fixed list is multiplied by matrix t."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, rms_norm

from modeling.layers.host import on_host


class PerTokenLinear(nn.Module):
    """T linear maps, D → E, one for each token of a list.

    Args:
        bias: one for each token.
    """

    def __init__(self, num_tokens: int, width: int, out: int, *, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_tokens, width, out))
        self.bias = nn.Parameter(torch.zeros(num_tokens, out)) if bias else None
        # Xavier, each map by itself
        limit = (6 / (width + out)) ** 0.5
        nn.init.uniform_(self.weight, -limit, limit)

    def forward(self, tokens: Tensor, first: int = 0) -> Tensor:
        """… × t × D → … × t × E, for the tokens `[first, first + t)` of the list."""
        number = tokens.shape[-2]
        flat = tokens.reshape(-1, number, tokens.shape[-1]).transpose(0, 1)
        mapped = torch.bmm(flat, self.weight[first : first + number]).transpose(0, 1)
        if self.bias is not None:
            mapped = mapped + self.bias[first : first + number]
        return mapped.reshape(*tokens.shape[:-1], self.weight.shape[-1])

    def shrink(self, size: float) -> None:
        """Multiply every map by a number."""
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.mul_(size)

    def chosen(self, rows: Tensor, which: Tensor) -> Tensor:
        """… × D → … × E, each row through the one map that is its own.

        Args:
            which: the map of each row, int64, shaped as rows without their last axis.
        """
        if not on_host(which):
            return self._chosen_of_all(rows, which)
        flat = rows.reshape(-1, rows.shape[-1])
        which = which.reshape(-1)
        order = which.argsort(stable=True)
        numbers = torch.bincount(which, minlength=len(self.weight)).tolist()
        found = []
        for number, part in enumerate(flat[order].split(numbers)):
            mapped = part @ self.weight[number]
            found.append(mapped if self.bias is None else mapped + self.bias[number])
        back = torch.empty_like(order)
        back[order] = torch.arange(len(order), device=order.device)
        return torch.cat(found)[back].reshape(*rows.shape[:-1], self.weight.shape[-1])

    def _chosen_of_all(self, rows: Tensor, which: Tensor) -> Tensor:
        """The same by every map for every row, where how many rows a map has would have to be waited for."""
        found: Tensor | None = None
        for number, weight in enumerate(self.weight):
            mapped = rows @ weight
            if self.bias is not None:
                mapped = mapped + self.bias[number]
            found = (
                mapped
                if found is None
                else torch.where((which == number)[..., None], mapped, found)
            )
        assert found is not None
        return found


class PerTokenLayerNorm(nn.Module):
    """LayerNorm whose gain and bias are each token's own."""

    def __init__(self, num_tokens: int, width: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(num_tokens, width))
        self.bias = nn.Parameter(torch.zeros(num_tokens, width))

    def forward(self, tokens: Tensor, first: int = 0) -> Tensor:
        """… × t × D, for the tokens `[first, first + t)` of the list."""
        last = first + tokens.shape[-2]
        normed = torch.nn.functional.layer_norm(tokens, tokens.shape[-1:], eps=1e-5)
        return normed * self.gain[first:last] + self.bias[first:last]


class PerTokenFeedForward(nn.Module):
    """A feed-forward network for each token: GELU(x W1_t + b1_t) W2_t + b2_t."""

    def __init__(self, num_tokens: int, width: int, hidden: int) -> None:
        super().__init__()
        self.up = PerTokenLinear(num_tokens, width, hidden, bias=True)
        self.down = PerTokenLinear(num_tokens, hidden, width, bias=True)

    def forward(self, tokens: Tensor, first: int = 0) -> Tensor:
        """… × t × D, for the tokens `[first, first + t)` of the list."""
        out: Tensor = self.down(gelu(self.up(tokens, first)), first)
        return out


class MixedLinear(nn.Module):
    """One map for all sequence rows, and a separate one for each feature token (OneTrans, arXiv
    2510.26104, section 3.3).

    Args:
        own: tokens with a separate map; 0 makes them share the sequence's.
    """

    def __init__(self, width: int, out: int, own: int) -> None:
        super().__init__()
        self.shared = nn.Linear(width, out, bias=False)
        self.own = PerTokenLinear(own, width, out) if own else None

    def forward(self, rows: Tensor, first: int | None = None) -> Tensor:
        """Sequence rows, or, with `first`, the feature tokens from that one on along the axis
        before the last.
        """
        mapped: Tensor = (
            self.shared(rows) if first is None or self.own is None else self.own(rows, first)
        )
        return mapped


class MixedRMSNorm(nn.Module):
    """RMSNorm with a gain for sequence rows and one for each feature token."""

    def __init__(self, width: int, own: int) -> None:
        super().__init__()
        self.shared = nn.Parameter(torch.ones(width))
        self.own = nn.Parameter(torch.ones(own, width)) if own else None

    def forward(self, rows: Tensor, first: int | None = None) -> Tensor:
        normed = rms_norm(rows, rows.shape[-1:], eps=1e-6)
        if first is None or self.own is None:
            return normed * self.shared
        return normed * self.own[first : first + rows.shape[-2]]
