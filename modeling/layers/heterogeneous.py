"""Attention over a fixed list of feature tokens: vanilla, heterogeneous, composite (Hiformer, arXiv
2311.05884).

A layer takes its tokens in two halves: the request's, once per request, and each
candidate's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from modeling.layers.per_token import PerTokenFeedForward, PerTokenLayerNorm, PerTokenLinear

Kind = Literal["vanilla", "hetero", "composite", "low_rank"]


@dataclass(frozen=True)
class LayerShape:
    """Sizes of a layer: L tokens of width D, H heads with keys and values of their own widths,
    ranks if low-rank.
    """

    num_tokens: int
    width: int
    num_heads: int
    # d_k, of one head
    key_width: int
    value_width: int  # d_v
    hidden: int  # d_f
    rank_key: int = 0
    rank_value: int = 0


@dataclass(frozen=True)
class Known:
    """A request's half of a layer, B × 1 × …."""

    rows: Tensor
    query: Tensor
    key: Tensor
    value: Tensor


class Composite(nn.Module):
    """All tokens → one projection for every token: x_1 … x_L concatenated, times a matrix of LD ×
    LE.

    With a rank, the matrix is a product of LD × r and r × LE, joint over heads.
    """

    def __init__(self, num_tokens: int, width: int, out: int, rank: int = 0) -> None:
        super().__init__()
        self.width = width
        self.out = out
        inputs = num_tokens * width
        outputs = num_tokens * out
        self.down = nn.Parameter(torch.randn(inputs, rank or outputs) * inputs**-0.5)
        self.up = nn.Parameter(torch.randn(rank, outputs) * rank**-0.5) if rank else None

    def part(self, tokens: Tensor, first: int) -> Tensor:
        """Return what the tokens `[first, first + t)` add: … × t × D → … × (r or LE). Parts of all tokens
        sum to the whole.
        """
        start = first * self.width
        return tokens.flatten(-2) @ self.down[start : start + tokens.shape[-2] * self.width]

    def join(self, known: Tensor | None, rest: Tensor) -> Tensor:
        """The projections of all tokens, … × L × E."""
        total = rest if known is None else known + rest
        total = total if self.up is None else total @ self.up
        return total.unflatten(-1, (-1, self.out))


class ByToken(nn.Module):
    """A projection of each token's own, or one for all."""

    def __init__(self, num_tokens: int, width: int, out: int, *, shared: bool) -> None:
        super().__init__()
        self.map = (
            nn.Linear(width, out, bias=False) if shared else PerTokenLinear(num_tokens, width, out)
        )
        self.shared = shared

    def part(self, tokens: Tensor, first: int) -> Tensor:
        """Projections of the tokens `[first, first + t)`."""
        mapped: Tensor = self.map(tokens) if self.shared else self.map(tokens, first)
        return mapped

    def join(self, known: Tensor | None, rest: Tensor) -> Tensor:
        """The projections of all tokens, … × L × E."""
        return (
            rest
            if known is None
            else torch.cat([known.expand(-1, rest.shape[1], -1, -1), rest], dim=2)
        )


class HeterogeneousLayer(nn.Module):
    """One pre-norm layer over the list.

    Args:
        kind: "vanilla": one projection for all tokens; "hetero": one for each token; "composite":
            keys and values of every token from all tokens; "low_rank": the same by two factors.
        num_queries: only the first so many tokens ask and come out; None for all (unpruned).
        composite_query: queries of an unpruned composite layer from all tokens too; a pruned layer
            asks by token.
        shared_output: one output projection for all tokens.
    """

    def __init__(
        self,
        shape: LayerShape,
        kind: Kind,
        num_queries: int | None = None,
        *,
        composite_query: bool = True,
        shared_output: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        tokens = shape.num_tokens
        width = shape.width
        heads = shape.num_heads
        vanilla = kind == "vanilla"
        mixed = kind in ("composite", "low_rank")
        # A pruned layer needs queries, outputs and feed-forward networks of its first tokens alone.
        asking = tokens if num_queries is None else num_queries
        self.shape = shape
        self.num_heads = heads
        self.num_queries = asking
        rank_key, rank_value = (shape.rank_key, shape.rank_value) if kind == "low_rank" else (0, 0)
        self.norm: nn.Module = (
            nn.LayerNorm(width, eps=1e-5) if vanilla else PerTokenLayerNorm(tokens, width)
        )
        self.norm_out: nn.Module = (
            nn.LayerNorm(width, eps=1e-5) if vanilla else PerTokenLayerNorm(asking, width)
        )
        self.vanilla = vanilla

        # Queries, keys and values: the same map for all tokens, one for each, or one for the whole list.
        def projection(out: int, rank: int, composite: bool, number: int) -> Composite | ByToken:
            if composite:
                return Composite(tokens, width, out, rank)
            return ByToken(number, width, out, shared=vanilla)

        # A composite map gives queries of all tokens, so a pruned layer asks by token.
        ask_all = mixed and composite_query and num_queries is None
        self.query = projection(heads * shape.key_width, rank_key, ask_all, asking)
        self.key = projection(heads * shape.key_width, rank_key, mixed, tokens)
        self.value = projection(heads * shape.value_width, rank_value, mixed, tokens)
        self.output = ByToken(
            asking, heads * shape.value_width, width, shared=vanilla or shared_output
        )
        self.feed_forward: nn.Module
        if vanilla:
            self.feed_forward = nn.Sequential(
                nn.Linear(width, shape.hidden), nn.GELU(), nn.Linear(shape.hidden, width)
            )
        else:
            self.feed_forward = PerTokenFeedForward(asking, width, shape.hidden)
        self.dropout = nn.Dropout(dropout)

    def prepare(self, known_BPD: Tensor) -> Known:
        """Compute what the first P tokens of the list contribute, once per request."""
        rows = known_BPD[:, None]
        normed = self._norm(rows, 0)
        return Known(
            rows, self._ask(normed, 0), self.key.part(normed, 0), self.value.part(normed, 0)
        )

    def forward(self, known: Known | None, rest_BCMD: Tensor) -> Tensor:
        """Tokens that ask, B × C × Q × D.

        Args:
            known: the first P tokens of the list, prepared.
            rest_BCMD: the other L - P tokens of each candidate; all L where nothing is known.
        """
        # 1. Keys and values of all L tokens: the known half joined by that of each candidate.
        first = 0 if known is None else known.rows.shape[2]
        normed = self._norm(rest_BCMD, first)
        key = self.key.join(None if known is None else known.key, self.key.part(normed, first))
        value = self.value.join(
            None if known is None else known.value, self.value.part(normed, first)
        )
        # 2. Residual rows and queries of the Q tokens that ask, which stand first in the list.
        rows = rest_BCMD
        if known is not None and first < self.num_queries:
            rows = torch.cat([known.rows.expand(-1, rest_BCMD.shape[1], -1, -1), rest_BCMD], dim=2)
        elif known is not None:
            rows = known.rows.expand(-1, rest_BCMD.shape[1], -1, -1)
        rows = rows[:, :, : self.num_queries]
        # Composite queries mix both halves; queries by token may all be known already.
        if isinstance(self.query, Composite) or first < self.num_queries:
            query = self.query.join(
                None if known is None else known.query, self._ask(normed, first)
            )
        else:
            assert known is not None
            query = known.query.expand(-1, rest_BCMD.shape[1], -1, -1)
        # 3. Attend, with B × C as one batch dimension; then back to B × C × Q × HE.
        read = scaled_dot_product_attention(
            self._heads(query), self._heads(key), self._heads(value)
        )
        read = read.transpose(1, 2).flatten(2).unflatten(0, rest_BCMD.shape[:2])
        rows = rows + self.dropout(self.output.part(read, 0))
        normed = self.norm_out(rows)
        return rows + self.dropout(self.feed_forward(normed))

    def _norm(self, tokens: Tensor, first: int) -> Tensor:
        normed: Tensor = self.norm(tokens) if self.vanilla else self.norm(tokens, first)
        return normed

    def _ask(self, normed: Tensor, first: int) -> Tensor:
        """Queries of those of the tokens that ask, or their part of composite ones."""
        if isinstance(self.query, Composite):
            return self.query.part(normed, first)
        return self.query.part(normed[:, :, : max(self.num_queries - first, 0)], first)

    def _heads(self, rows: Tensor) -> Tensor:
        """B × C × T × HE → BC × H × T × E."""
        return rows.flatten(0, 1).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
