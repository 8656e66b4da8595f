"""Linear attention with H heads: LinRec, and kernels with or without a denominator.

    O_t = φ(Q)_t · Σ_s φ(K)_s^T V_s            over s ≤ t in the causal form, over all s otherwise

Sources: Katharopoulos, Vyas, Pappas, Fleuret, "Transformers are RNNs", arXiv 2006.16236 (φ = elu +
1, with denominator); Liu, Cai, Zhang et al., "LinRec: Linear Attention Mechanism for Long-term
Sequential Recommender Systems", arXiv 2411.01537 (φ = ELU, then L2 over the head's width; divided
by the root of that width).

Differs: LinRec as published masks neither the future nor padding, and trains the last position
only; here padding adds nothing and the causal form is exact, so every position can be trained. The
causal form works in chunks: within a chunk by a CHUNK × CHUNK product, before it by the state, K ×
K for each head.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import elu, normalize, pad

from modeling.layers.operator import Operator, State

CHUNK = 64
EPSILON = 1e-6


def linear_attention_plain(
    query: Tensor, key: Tensor, value: Tensor, *, causal: bool, denominator: bool = False
) -> Tensor:
    """The formula with its T × T matrix of similarities; B × H × T × K without padding, φ already
    applied.
    """
    similarity = query @ key.transpose(-1, -2)
    if causal:
        similarity = similarity.tril()
    if denominator:
        similarity = similarity / (similarity.sum(-1, keepdim=True) + EPSILON)
    return similarity @ value


def linear_attention(
    query: Tensor, key: Tensor, value: Tensor, *, causal: bool, denominator: bool = False
) -> Tensor:
    """The same in time and memory linear in T. φ is already applied; padding must have a zero
    key.
    """
    if not causal:
        return _read(query, key.transpose(-1, -2) @ value, key.sum(2) if denominator else None)
    state = key.new_zeros(*key.shape[:2], key.shape[-1], value.shape[-1])
    norm = key.new_zeros(*key.shape[:2], key.shape[-1])
    return _causal(query, key, value, (state, norm), denominator)


def _causal(query: Tensor, key: Tensor, value: Tensor, state: State, denominator: bool) -> Tensor:
    """Chunk by chunk, all chunks at once; `state` is what came before the first row."""
    batch, heads, length, _ = query.shape
    chunk = min(CHUNK, length)
    tail = -length % chunk

    def chunks(rows: Tensor) -> Tensor:
        return (pad(rows, (0, 0, 0, tail)) if tail else rows).reshape(
            batch, heads, -1, chunk, rows.shape[-1]
        )

    query_c = chunks(query)
    key_c = chunks(key)
    value_c = chunks(value)
    similarity = (query_c @ key_c.transpose(-1, -2)).tril()
    before = _exclusive(key_c.transpose(-1, -2) @ value_c) + state[0][:, :, None]
    out = similarity @ value_c + query_c @ before
    if denominator:
        norm = _exclusive(key_c.sum(3)) + state[1][:, :, None]
        total = similarity.sum(-1) + (query_c * norm[:, :, :, None]).sum(-1)
        out = out / (total[..., None] + EPSILON)
    return out.reshape(batch, heads, -1, value.shape[-1])[:, :, :length]


def _exclusive(rows: Tensor) -> Tensor:
    """Sums of the chunks before each chunk."""
    sums = rows.cumsum(2)
    return torch.cat([torch.zeros_like(sums[:, :, :1]), sums[:, :, :-1]], dim=2)


def _read(query: Tensor, state: Tensor, norm: Tensor | None) -> Tensor:
    out = query @ state
    return (
        out if norm is None else out / ((query * norm[:, :, None]).sum(-1, keepdim=True) + EPSILON)
    )


class LinearAttention(Operator):
    """H heads over one kernel; subclasses choose φ. The causal form streams with K × K (+ K)
    numbers a head.

    Args:
        num_heads: H; the width must be a multiple of it.
        denominator: divide by the sum of similarities.
    """

    def __init__(self, num_heads: int, *, causal: bool, denominator: bool = False) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.denominator = denominator
        self.causal = self.can_extend = causal

    def kernel(self, rows_BHTK: Tensor) -> Tensor:
        """φ of the kernel: elu + 1."""
        return elu(rows_BHTK) + 1

    def scale(self, head_width: int) -> float:
        return 1.0

    def forward(self, query: Tensor, key: Tensor, value: Tensor, mask_BT: Tensor | None) -> Tensor:
        """Mix rows; T × T appears nowhere."""
        query, key, value = self._project(query, key, value, None if self.causal else mask_BT)
        out = linear_attention(query, key, value, causal=self.causal, denominator=self.denominator)
        return out.transpose(1, 2).flatten(2) * self.scale(query.shape[-1])

    def initial_state(self, like_BD: Tensor) -> State:
        """Zeros: B × H × K × K, and B × H × K for the denominator."""
        batch, width = like_BD.shape
        head = width // self.num_heads
        return like_BD.new_zeros(batch, self.num_heads, head, head), like_BD.new_zeros(
            batch, self.num_heads, head
        )

    def extend(
        self, state: State, query: Tensor, key: Tensor, value: Tensor, mask_BT: Tensor
    ) -> tuple[Tensor, State]:
        """Continue the sums: O(K) for each feature of a row, whatever came before."""
        query, key, value = self._project(query, key, value, mask_BT)
        out = _causal(query, key, value, state, self.denominator)
        after = state[0] + key.transpose(-1, -2) @ value, state[1] + key.sum(2)
        return out.transpose(1, 2).flatten(2) * self.scale(query.shape[-1]), after

    def _project(
        self, query: Tensor, key: Tensor, value: Tensor, mask_BT: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        query = self.kernel(self._heads(query))
        key = self.kernel(self._heads(key))
        if mask_BT is not None:
            key = key * mask_BT[:, None, :, None]
        return query, key, self._heads(value)

    def _heads(self, rows: Tensor) -> Tensor:
        return rows.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)


class LinRecAttention(LinearAttention):
    """LinRec's kernel: ELU, L2-normalised within the head; output over the root of the head's
    width.
    """

    def kernel(self, rows_BHTK: Tensor) -> Tensor:
        return normalize(elu(rows_BHTK), dim=-1, eps=EPSILON)

    def scale(self, head_width: int) -> float:
        return float(head_width**-0.5)
