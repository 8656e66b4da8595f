"""HSTU: hierarchical sequential transduction units, with one normaliser for every kind of pass.

Source: Zhai et al., "Actions Speak Louder than Words: Trillion-Parameter Sequential Transducers for
Generative Recommendations", arXiv 2402.17152, section 3.2.

    U, V, Q, K = split(SiLU(W LN(X)))
    A = SiLU(Q K^T + rab) / N, causal; Y = W_o(Drop(LN(A V) ⊙ U)) + X

| paper | here |
|---|---|
| rab^p, rab^t | learned scalars by distance in rows, and by bucketed time between rows (`time_bias`) |
| N, the padded maximum length in the reference code | `sizes.history_length`, a constant: full, cached and micro-batched passes divide alike |

Differs: scores are divided by √K, norms have weights and projections biases, as in the production
code (the research code has none of them). rab^t compares the times of two rows that the model has;
the reference compares a key's time with the *next* event's, which tells the model when its target
happened. Distances beyond the longest trained one share its bias. Memory is quadratic in the
history, as in the paper's unfused form.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from modeling.layers.block import Place
from modeling.layers.operator import State
from modeling.layers.packing import Packing
from modeling.models.sequence import (
    GAP_BUCKETS,
    OperatorName,
    SequenceConfig,
    SequenceRanker,
    seconds_bucket,
)


@dataclass(frozen=True)
class Config(SequenceConfig):
    """Two layers of one head; see `SequenceConfig`. Causal only.

    A layer has no feed-forward part: `activation`, `expansion`, `gated` and `mixed_scale` say
    nothing here.
    """

    operators: tuple[OperatorName, ...] = ("hstu", "hstu")


class HSTULayer(nn.Module):
    """See the module docstring.

    Args:
        normaliser: N.
        num_distances: distances in rows that have a bias of their own.
    """

    can_extend = True

    def __init__(
        self,
        width: int,
        num_heads: int,
        *,
        dropout: float,
        normaliser: int,
        num_distances: int,
        time_bias: bool,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.normaliser = normaliser
        self.norm = nn.LayerNorm(width)
        self.mixed_norm = nn.LayerNorm(width)
        self.gate_value_query_key = nn.Linear(width, 4 * width)
        self.out = nn.Linear(width, width)
        self.distance = nn.Parameter(torch.zeros(num_distances))
        self.duration = nn.Parameter(torch.zeros(GAP_BUCKETS)) if time_bias else None
        self.dropout = nn.Dropout(dropout)

    def forward(self, rows_ND: Tensor, packing: Packing, place: Place) -> Tensor:
        projected = silu(self.gate_value_query_key(self.norm(rows_ND)))
        gate, rest = projected.split([rows_ND.shape[1], 3 * rows_ND.shape[1]], dim=-1)

        def mix(_: Tensor | None, padded: Tensor, *seconds: Tensor) -> Tensor:
            value, query, key = padded.chunk(3, dim=-1)
            index = torch.arange(padded.shape[1], device=padded.device)
            bias = self._bias(
                index[:, None] - index, *(s[:, :, None] - s[:, None] for s in seconds)
            )
            return self._read(
                query, self._heads(key), self._heads(value), bias, index[:, None] >= index
            )

        seconds = () if place.seconds is None else (place.seconds,)
        return self._after(rows_ND, gate, packing.apply(mix, rest, *seconds))

    def initial_state(self, like_BD: Tensor) -> State:
        """An empty KV cache: keys, values, which rows are real, their place and their seconds."""
        batch, width = like_BD.shape
        empty = like_BD.new_zeros(batch, self.num_heads, 0, width // self.num_heads)
        none = torch.zeros(batch, 0, dtype=torch.long, device=like_BD.device)
        return empty, empty, none.bool(), none, none.double()

    def extend(
        self, rows_BTD: Tensor, state: State, mask_BT: Tensor, place: Place
    ) -> tuple[Tensor, State]:
        """`forward` for padded rows that follow those in the cache, with the same N."""
        gate, value, query, key = silu(self.gate_value_query_key(self.norm(rows_BTD))).chunk(
            4, dim=-1
        )
        seconds = (
            torch.zeros_like(place.count, dtype=torch.float64)
            if place.seconds is None
            else place.seconds
        )
        new = self._heads(key), self._heads(value), mask_BT, place.count, seconds
        keys, values, real, index, times = (
            torch.cat([old, added], dim=2 if old.ndim == 4 else 1)
            for old, added in zip(state, new, strict=True)
        )
        bias = self._bias(
            place.count[:, :, None] - index[:, None], seconds[:, :, None] - times[:, None]
        )
        readable = (place.count[:, :, None] >= index[:, None]) & real[:, None]
        mixed = self._read(query, keys, values, bias, readable)
        return self._after(rows_BTD, gate, mixed), (keys, values, real, index, times)

    def _bias(self, distance: Tensor, *seconds: Tensor) -> Tensor:
        """The bias of row pairs, … × T × S, by their distance and, where the layer has a time bias,
        their seconds.
        """
        bias = self.distance[distance.clamp(0, len(self.distance) - 1)]
        return bias if self.duration is None else bias + self.duration[seconds_bucket(seconds[0])]

    def _read(
        self, query: Tensor, keys: Tensor, values: Tensor, bias: Tensor, readable: Tensor
    ) -> Tensor:
        bias, readable = (t if t.ndim == 2 else t[:, None] for t in (bias, readable))
        scores = self._heads(query) @ keys.transpose(-1, -2) * keys.shape[-1] ** -0.5 + bias
        weights = silu(scores).masked_fill(~readable, 0.0) / self.normaliser
        return (weights @ values).transpose(1, 2).flatten(2)

    def _after(self, rows: Tensor, gate: Tensor, mixed: Tensor) -> Tensor:
        out: Tensor = self.out(self.dropout(self.mixed_norm(mixed) * gate))
        return rows + out

    def _heads(self, rows: Tensor) -> Tensor:
        return rows.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)


class HSTU(SequenceRanker):
    """See the module docstring."""

    def block(self, name: OperatorName) -> nn.Module:
        """One HSTU layer.

        Raises:
            ValueError: another operator, or a bidirectional model.
        """
        config = self.config
        if name != "hstu" or not config.causal:
            raise ValueError(
                f"HSTU has causal 'hstu' layers only, not {name!r} with causal={config.causal}"
            )
        return HSTULayer(
            config.width,
            config.num_heads,
            dropout=config.dropout,
            normaliser=self.sizes.history_length,
            num_distances=self.sizes.history_length,
            time_bias=config.time_bias,
        )
