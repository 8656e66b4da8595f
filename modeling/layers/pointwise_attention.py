"""HSTU's attention over a history whose keys and values outlive the queries (Zhai et al., arXiv
2402.17152, section 3.2).

    U, V, Q, K = split(SiLU(W LN(X)));  A = SiLU(Q K^T / √K) / N;  Y = W_o(LN(A V) ⊙ U) + X

The same interface as `HistoryAttentionLayer`, so that a ranker can have either. Differs: no
relative bias, since rows carry their positions and times here; N is a constant, so that full and
cached passes divide alike.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.functional import silu


class PointwiseAttentionLayer(nn.Module):
    """See the module docstring.

    Args:
        normaliser: N.
    """

    def __init__(self, width: int, num_heads: int, dropout: float, normaliser: int) -> None:
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

    def keys_values(self, history_BLD: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of history rows, each B × H × L × (D / H)."""
        key, value = silu(self.key_value(self.norm(history_BLD))).chunk(2, dim=-1)
        return self._heads(key), self._heads(value)

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
        return silu(scores) / self.normaliser

    def _gate_query(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        gate, query = silu(self.gate_query(self.norm(rows))).chunk(2, dim=-1)
        return gate, self._heads(query) * (rows.shape[-1] // self.num_heads) ** -0.5

    def _finish(self, rows: Tensor, gate: Tensor, read: Tensor) -> Tensor:
        mixed: Tensor = self.out(
            self.dropout(self.mixed_norm(read.transpose(1, 2).flatten(2)) * gate)
        )
        return rows + mixed

    def _heads(self, rows: Tensor) -> Tensor:
        return rows.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
