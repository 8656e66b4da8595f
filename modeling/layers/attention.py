"""Attention over a history whose keys and values outlive the queries: the building block of
amortised encoders.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention


class HistoryAttentionLayer(nn.Module):
    """One pre-norm Transformer layer whose queries may be other rows than its keys and values.

    `keys_values` projects history rows once; `forward` lets any rows (history or candidates) read
    them. Both kinds of rows share every weight, which is what "append the candidate" means.

    Args:
        width: D.
        num_heads: H; D must be a multiple of it.
        dropout: on attention output and feed-forward output, in training.
        expansion: width of the feed-forward layer over D.
    """

    def __init__(self, width: int, num_heads: int, dropout: float, expansion: int = 2) -> None:
        super().__init__()
        if width % num_heads:
            raise ValueError(f"width {width} is no multiple of num_heads {num_heads}")
        self.num_heads = num_heads
        self.norm = nn.LayerNorm(width, eps=1e-5)
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, width)
        self.feed_forward = nn.Sequential(
            nn.LayerNorm(width, eps=1e-5),
            nn.Linear(width, expansion * width),
            nn.GELU(),
            nn.Linear(expansion * width, width),
        )
        self.dropout = nn.Dropout(dropout)

    def keys_values(self, history_BLD: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of history rows, each B × H × L × (D / H)."""
        key, value = self.key_value(self.norm(history_BLD)).chunk(2, dim=-1)
        return self._heads(key), self._heads(value)

    def forward(
        self, rows_BND: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None
    ) -> Tensor:
        """Let rows read the history.

        Args:
            mask: bool, B × 1 × L (all rows alike) or B × N × L; True where a row may read a key. A
                row that may read none reads zeros. None where every row may read all.
        """
        query = self._heads(self.query(self.norm(rows_BND)))
        if mask is None:
            return self._finish(rows_BND, scaled_dot_product_attention(query, keys, values))
        some = mask.any(dim=-1, keepdim=True)
        read = scaled_dot_product_attention(query, keys, values, attn_mask=(mask | ~some)[:, None])
        return self._finish(rows_BND, read, some)

    def read_with_own(
        self, rows_BCD: Tensor, keys: Tensor, values: Tensor, mask_BL: Tensor | None
    ) -> Tensor:
        """Let each row read the history and itself, and none of the other rows."""
        normed = self.norm(rows_BCD)
        own_keys, own_values = (
            self._heads(half)[:, :, :, None] for half in self.key_value(normed).chunk(2, dim=-1)
        )
        query = self._heads(self.query(normed))[:, :, :, None]
        return self._finish(
            rows_BCD,
            attend_shared_and_own(query, keys, values, mask_BL, own_keys, own_values)[:, :, :, 0],
        )

    def _finish(self, rows: Tensor, read: Tensor, some: Tensor | None = None) -> Tensor:
        read = self.out(read.transpose(1, 2).flatten(2))
        rows = rows + self.dropout(read if some is None else read * some)
        return rows + self.dropout(self.feed_forward(rows))

    def _heads(self, rows: Tensor) -> Tensor:
        return rows.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)


def causal_mask(mask_BL: Tensor, num_new: int) -> Tensor:
    """Which keys the newest `num_new` rows may read when each reads itself and what came before, B
    × num_new × L.
    """
    length = mask_BL.shape[1]
    row = torch.arange(length - num_new, length, device=mask_BL.device)
    earlier = torch.arange(length, device=mask_BL.device) <= row[:, None]
    return earlier[None] & mask_BL[:, None]


def attend_shared_and_own(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    mask_BL: Tensor | None,
    own_keys: Tensor,
    own_values: Tensor,
) -> Tensor:
    """Groups of rows that all read the same keys, and each its own group's up to itself; softmax
    runs over both.

    Candidates read one cached history and themselves, and nothing of one another; no key is copied
    for a candidate.

    Args:
        query: B × H × C × N × K, N rows in each of C groups.
        keys: B × H × L × K, read by every row; `values` alike.
        mask_BL: bool, True where a shared key may be read; None where all may.
        own_keys: B × H × C × N × K; row n reads its group's rows 0 … n. `own_values` alike.

    Returns:
        B × H × C × N × K.
    """
    number = query.shape[3]
    length = keys.shape[2]
    query = query * query.shape[-1] ** -0.5
    asking = query.flatten(2, 3)
    # The mask is one more dimension of the product, which costs less than another pass over the scores.
    if mask_BL is not None:
        hidden = torch.zeros_like(mask_BL, dtype=keys.dtype).masked_fill(
            ~mask_BL, torch.finfo(keys.dtype).min / 2
        )
        keys = torch.cat([keys, hidden[:, None, :, None].expand(-1, keys.shape[1], -1, -1)], dim=-1)
        asking = torch.cat([asking, torch.ones_like(asking[..., :1])], dim=-1)
    shared = (asking @ keys.transpose(-1, -2)).unflatten(2, query.shape[2:4])
    own = (
        (query * own_keys).sum(-1, keepdim=True)
        if number == 1
        else query @ own_keys.transpose(-1, -2)
    )
    if number > 1:
        later = torch.ones(number, number, dtype=torch.bool, device=own.device).triu(1)
        own = own.masked_fill(later, -torch.inf)
    # One softmax over both: a row's weights on shared and own keys add up to 1.
    weights = torch.cat([shared, own], dim=-1).softmax(-1)
    to_shared, to_own = weights.split([length, number], dim=-1)
    read = (to_shared.flatten(2, 3) @ values).unflatten(2, query.shape[2:4])
    return torch.addcmul(read, to_own, own_values) if number == 1 else read + to_own @ own_values
