"""HSTU's attention over a history whose keys and values outlive the queries (Zhai et al., arXiv
2402.17152, section 3.2).

    U, V, Q, K = split(SiLU(W LN(X)));  A = SiLU(τ (Q̂ K̂^T - β)) / N;  Y = W_o(LN(A V) ⊙ U) + X

The same interface as `HistoryAttentionLayer`, so that a ranker can have either. Differs: queries and keys have
unit length and begin as one map (`matching.py`), without SiLU, and a score counts from β, half of a match at first,
where the paper divides by √K: of a thousand events those unlike the candidate would add up to more than its own. No
relative bias, since rows carry their positions and times here; N is a constant, so that full and
cached passes divide alike.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize, silu

from modeling.layers.matching import begin_alike

# An equal event scores 10, an unrelated one -10 at first
SHARPNESS = 20.0


class PointwiseAttentionLayer(nn.Module):
    """See the module docstring.

    Args:
        normaliser: N.
        matching: unit length and a threshold; else the paper's products.
    """

    def __init__(
        self,
        width: int,
        num_heads: int,
        dropout: float,
        normaliser: int,
        *,
        matching: bool = True,
    ) -> None:
        super().__init__()
        if width % num_heads:
            raise ValueError(f"width {width} is no multiple of num_heads {num_heads}")
        self.num_heads = num_heads
        self.normaliser = normaliser
        self.norm, self.mixed_norm = (nn.LayerNorm(width, eps=1e-5) for _ in range(2))
        self.gate_query = nn.Linear(width, 2 * width)
        self.key_value = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, width)
        self.dropout = nn.Dropout(dropout)
        self.matching = matching
        if not matching:
            return
        self.sharpness_H = nn.Parameter(torch.full((num_heads,), SHARPNESS))
        self.threshold_H = nn.Parameter(torch.full((num_heads,), 0.5))
        begin_alike(self.gate_query.weight[width:], self.key_value.weight[:width])
        for linear in (self.gate_query, self.key_value):
            nn.init.zeros_(linear.bias)

    def keys_values(self, history_BLD: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of history rows, each B × H × L × (D / H)."""
        key, value = self.key_value(self.norm(history_BLD)).chunk(2, dim=-1)
        key = normalize(self._heads(key), dim=-1) if self.matching else self._heads(silu(key))
        return key, self._heads(silu(value))

    def forward(
        self, rows_BND: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None
    ) -> Tensor:
        """Let rows read the history.

        Args:
            mask: bool, B × 1 × L or B × N × L, True where a row may read a key; None where every
                row may read all.
        """
        gate, query = self._gate_query(rows_BND)
        weights = self._weights(query @ keys.transpose(-1, -2))
        if mask is not None:
            weights = weights * mask[:, None]
        return self._finish(rows_BND, gate, weights @ values)

    def read(
        self, rows_BCD: Tensor, keys: Tensor, values: Tensor, mask_BL: Tensor | None
    ) -> Tensor:
        """Let each row, of a candidate, read the history, and none of the other rows."""
        return self(rows_BCD, keys, values, None if mask_BL is None else mask_BL[:, None])

    def read_with_own(
        self, rows_BCD: Tensor, keys: Tensor, values: Tensor, mask_BL: Tensor | None
    ) -> Tensor:
        """Let each row read the history and itself, and none of the other rows."""
        gate, query = self._gate_query(rows_BCD)
        own_keys, own_values = self.keys_values(rows_BCD)
        weights = self._weights(query @ keys.transpose(-1, -2))
        if mask_BL is not None:
            weights = weights * mask_BL[:, None, None]
        own = self._weights((query * own_keys).sum(-1, keepdim=True))
        return self._finish(rows_BCD, gate, weights @ values + own * own_values)

    def _weights(self, scores: Tensor) -> Tensor:
        if not self.matching:
            return silu(scores) / self.normaliser
        sharpness, threshold = (h[:, None, None] for h in (self.sharpness_H, self.threshold_H))
        return silu(sharpness * (scores - threshold)) / self.normaliser

    def _gate_query(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        gate, query = self.gate_query(self.norm(rows)).chunk(2, dim=-1)
        if self.matching:
            return silu(gate), normalize(self._heads(query), dim=-1)
        return silu(gate), self._heads(silu(query)) * (rows.shape[-1] // self.num_heads) ** -0.5

    def _finish(self, rows: Tensor, gate: Tensor, read: Tensor) -> Tensor:
        mixed: Tensor = self.out(
            self.dropout(self.mixed_norm(read.transpose(1, 2).flatten(2)) * gate)
        )
        return rows + mixed

    def _heads(self, rows: Tensor) -> Tensor:
        return rows.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
