"""Block: one layer of a sequence model around any operator. Only the operator differs between the
models.

    x + Drop(W_o mix(Q, K, V)) with [Q, K, V] = W LN(x), then x + Drop(FFN(LN(x)))

`gated` multiplies each branch by a sigmoid gate of the branch's input x (LiGR layers, arXiv
2502.03417, as in eSASRec, arXiv 2508.06450). Row-wise parts run on packed rows; the operator sees
padded groups.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, relu_, silu

from modeling.layers.operator import Operator, State
from modeling.layers.packing import Packing

Activation = Literal["relu", "gelu", "swiglu"]
MixedScale = Literal["none", "norm", "count"]


@dataclass(frozen=True)
class Place:
    """Places of rows in their sequences; packed (N) or padded (B × T), like the rows."""

    # Rows that each row reads: itself and those before it, or all of its sequence
    count: Tensor
    # float64, since the oldest row; None where no layer reads it
    seconds: Tensor | None = None


class FeedForward(nn.Module):
    """D → expansion × D → D. With SwiGLU (arXiv 2002.05202) the hidden rows are silu(a) ⊙ b."""

    def __init__(self, width: int, expansion: int, activation: Activation) -> None:
        super().__init__()
        self.activation = activation
        self.up = nn.Linear(width, expansion * width * (2 if activation == "swiglu" else 1))
        self.down = nn.Linear(expansion * width, width)

    def forward(self, rows: Tensor) -> Tensor:
        hidden = self.up(rows)
        if self.activation == "swiglu":
            gate, hidden = hidden.chunk(2, dim=-1)
            hidden = silu(gate) * hidden
        else:
            hidden = relu_(hidden) if self.activation == "relu" else gelu(hidden)
        down: Tensor = self.down(hidden)
        return down


class Block(nn.Module):
    """See the module docstring.

    Args:
        mixed_scale: what happens to the operator's output before W_o: nothing, LayerNorm, or
            division by the rows read so far. Operators without a denominator grow with the history
            and want one of the latter.
    """

    def __init__(
        self,
        width: int,
        operator: Operator,
        *,
        dropout: float,
        activation: Activation,
        expansion: int,
        gated: bool = False,
        mixed_scale: MixedScale = "none",
    ) -> None:
        super().__init__()
        self.operator = operator
        self.mixed_scale = mixed_scale
        self.norm = nn.LayerNorm(width)
        self.feed_forward_norm = nn.LayerNorm(width)
        self.query_key_value = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.mixed_norm = nn.LayerNorm(width) if mixed_scale == "norm" else None
        self.feed_forward = FeedForward(width, expansion, activation)
        self.gates = nn.ModuleList(nn.Linear(width, width) for _ in range(2)) if gated else None
        self.dropout = nn.Dropout(dropout)

    @property
    def can_extend(self) -> bool:
        return self.operator.can_extend

    def initial_state(self, like_BD: Tensor) -> State:
        """The operator's state before the first row."""
        return self.operator.initial_state(like_BD)

    def forward(self, rows_ND: Tensor, packing: Packing, place: Place) -> Tensor:
        def mix(mask_BT: Tensor | None, projected: Tensor) -> Tensor:
            query, key, value = projected.chunk(3, dim=-1)
            mixed: Tensor = self.operator(query, key, value, mask_BT)
            return mixed

        mixed = packing.apply(mix, self.query_key_value(self.norm(rows_ND)))
        return self._after(rows_ND, mixed, place.count)

    def extend(
        self, rows_BTD: Tensor, state: State, mask_BT: Tensor, place: Place
    ) -> tuple[Tensor, State]:
        """`forward` for padded rows that follow those the state has seen."""
        query, key, value = self.query_key_value(self.norm(rows_BTD)).chunk(3, dim=-1)
        mixed, state = self.operator.extend(state, query, key, value, mask_BT)
        return self._after(rows_BTD, mixed, place.count), state

    def read(self, rows_BCD: Tensor, state: State) -> Tensor:
        """Rows that each read what the state has seen, and that no other row reads: candidates behind a history.

        Raises:
            TypeError: the operator's state is not read so.
            ValueError: the block divides by the number of rows read, which the state does not know.
        """
        if self.mixed_scale == "count":
            raise ValueError("a state does not know how many rows it has seen: scale by 'norm'")
        query = self.query_key_value(self.norm(rows_BCD)).chunk(3, dim=-1)[0]
        return self._after(rows_BCD, self.operator.read(state, query), None)

    def _after(self, rows: Tensor, mixed: Tensor, count: Tensor | None) -> Tensor:
        if self.mixed_norm is not None:
            mixed = self.mixed_norm(mixed)
        elif self.mixed_scale == "count":
            assert count is not None
            mixed = mixed / count[..., None]
        rows = rows + self._gated(0, rows, self.dropout(self.out(mixed)))
        return rows + self._gated(
            1, rows, self.dropout(self.feed_forward(self.feed_forward_norm(rows)))
        )

    def _gated(self, branch: int, rows: Tensor, out: Tensor) -> Tensor:
        return out if self.gates is None else out * torch.sigmoid(self.gates[branch](rows))
