"""Attention over a history whose keys and values outlive the queries: the building block of
amortised encoders.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from modeling.layers.matching import Matching


class HistoryAttentionLayer(nn.Module):
    """One pre-norm Transformer layer whose queries may be other rows than its keys and values.

    `keys_values` projects history rows once; `forward` lets any rows (history or candidates) read
    them. Both kinds of rows share every weight, which is what "append the candidate" means.

    Args:
        width: D.
        num_heads: H; D must be a multiple of it.
        dropout: on attention output and feed-forward output, in training.
        expansion: width of the feed-forward layer over D.
        matching: attention that finds like rows (`matching.py`); else scaled dot products.
    """

    def __init__(
        self,
        width: int,
        num_heads: int,
        dropout: float,
        expansion: int = 2,
        *,
        matching: bool = True,
    ) -> None:
        super().__init__()
        if width % num_heads:
            raise ValueError(f"width {width} is no multiple of num_heads {num_heads}")
        self.num_heads = num_heads
        self.norm = nn.LayerNorm(width, eps=1e-5)
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, width)
        self.matching = Matching(num_heads, width // num_heads, plain=not matching)
        self.matching.begin(self.query, self.key_value)
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
        return self.matching.keys(self._heads(key)), self._heads(value)

    def forward(
        self, rows_BND: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None
    ) -> Tensor:
        """Let the history's rows read one another.

        Args:
            mask: bool, B × 1 × L (all rows alike) or B × N × L; True where a row may read a key. A
                row that may read none reads zeros. None where every row may read all.
        """
        query = self.matching.queries(self._heads(self.query(self.norm(rows_BND))))
        if mask is None:
            read = scaled_dot_product_attention(query, keys, values, scale=1.0)
            return self._finish(rows_BND, read)
        some = mask.any(dim=-1, keepdim=True)
        seen = (mask | ~some)[:, None]
        read = scaled_dot_product_attention(query, keys, values, attn_mask=seen, scale=1.0)
        return self._finish(rows_BND, read, some)

    def read(
        self, rows_BCD: Tensor, keys: Tensor, values: Tensor, mask_BL: Tensor | None
    ) -> Tensor:
        """Let each row, of a candidate, read the history, and none of the other rows."""
        query = self.matching.queries(self._heads(self.query(self.norm(rows_BCD))))
        read = self.matching.read(query[:, :, :, None], keys, values, mask_BL)
        return self._finish(rows_BCD, read[:, :, :, 0])

    def read_with_own(
        self, rows_BCD: Tensor, keys: Tensor, values: Tensor, mask_BL: Tensor | None
    ) -> Tensor:
        """Let each row read the history and itself, and none of the other rows."""
        own_keys, own_values = (half[:, :, :, None] for half in self.keys_values(rows_BCD))
        query = self.matching.queries(self._heads(self.query(self.norm(rows_BCD))))
        read = self.matching.read(query[:, :, :, None], keys, values, mask_BL, own_keys, own_values)
        return self._finish(rows_BCD, read[:, :, :, 0])

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
