"""Softmax attention over padded sequences, as an operator on PyTorch's own kernel, which holds no T
× T at once.

Only `extend` behind earlier rows makes a mask, of new rows × all rows.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from modeling.layers.operator import Operator, State


def softmax_attention_plain(query: Tensor, key: Tensor, value: Tensor, *, causal: bool) -> Tensor:
    """softmax(Q K^T / √K) V with its T × T matrix; B × H × T × K without padding."""
    scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
    if causal:
        scores = scores.masked_fill(torch.ones_like(scores).triu(1).bool(), -torch.inf)
    return scores.softmax(-1) @ value


class Softmax(Operator):
    """Multi-head softmax attention. The causal form streams with a KV cache, which grows with the
    history.

    Args:
        num_heads: H; the width must be a multiple of it.
    """

    def __init__(self, num_heads: int, *, causal: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.causal = self.can_extend = causal

    def forward(self, query: Tensor, key: Tensor, value: Tensor, mask_BT: Tensor | None) -> Tensor:
        mask = None if self.causal or mask_BT is None else mask_BT[:, None, None]
        out = scaled_dot_product_attention(
            self._heads(query),
            self._heads(key),
            self._heads(value),
            attn_mask=mask,
            is_causal=self.causal,
        )
        return out.transpose(1, 2).flatten(2)

    def initial_state(self, like_BD: Tensor) -> State:
        """An empty KV cache: keys, values and which of their rows are real."""
        batch, width = like_BD.shape
        empty = like_BD.new_zeros(batch, self.num_heads, 0, width // self.num_heads)
        return empty, empty, torch.zeros(batch, 0, dtype=torch.bool, device=like_BD.device)

    def extend(
        self, state: State, query: Tensor, key: Tensor, value: Tensor, mask_BT: Tensor
    ) -> tuple[Tensor, State]:
        """New rows read the cached keys and values and those of new rows up to their own."""
        keys, values, real = state
        keys = torch.cat([keys, self._heads(key)], 2)
        values = torch.cat([values, self._heads(value)], 2)
        num_old = real.shape[1]
        num_new = query.shape[1]
        real = torch.cat([real, mask_BT], 1)
        # The first rows need no mask, and so no T × T of it
        if num_old == 0:
            return self.forward(query, key, value, mask_BT), (keys, values, real)
        rows = torch.arange(num_old + num_new, device=query.device)
        # Padding reads itself, so that no row reads nothing
        own = rows == rows[num_old:, None]
        readable = (rows <= rows[num_old:, None]) & real[:, None] | own
        out = scaled_dot_product_attention(
            self._heads(query), keys, values, attn_mask=readable[:, None]
        )
        return out.transpose(1, 2).flatten(2), (keys, values, real)

    def _heads(self, rows: Tensor) -> Tensor:
        return rows.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
