"""Hydra attention: as many heads as features, so time and memory are linear in rows and in width.

Source: Bolya, Fu, Dai, Zhang, Hoffman, "Hydra Attention: Efficient Attention with Many Heads",
arXiv 2209.07484; used for sequential recommendation in Mushtaque, "HydraRec", arXiv 2501.01242.

| paper | here |
|---|---|
| φ(x) = x / ‖x‖₂, over all D features of a row | `feature_map="unit"` |
| O_t = φ(Q)_t ⊙ Σ_s φ(K)_s ⊙ V_s | `Hydra(causal=False)` |
| the same, s ≤ t | `Hydra(causal=True)`: a prefix sum; the state is one D-vector |
| – | `DecayedHydra`: Σ_s λ^|t - s| ⊙ φ(K)_s ⊙ V_s with learned λ in (0, 1)^D; causally, a recurrence |

Differs: the causal and the decayed form are ours (the body of HydraRec is not public), and so are feature maps that
make no number negative before they scale a row. Sums are taken in float32, whatever the rows' dtype.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import elu, normalize, pad, relu

from modeling.layers.operator import Operator, State

# A row of zeros stays zero
EPSILON = 1e-6
# Rows that one small triangular product sums; fastest of 16, 32, 64 at 8,192 rows of 64
CHUNK = 32
# Rows of a chunk of the decayed scan
STEP = 16


def unit_rows(rows: Tensor) -> Tensor:
    """φ: rows divided by their norm over all features."""
    return normalize(rows, dim=-1, eps=EPSILON)


FeatureMap = Literal["unit", "elu", "relu"]
MAPS: dict[FeatureMap, Callable[[Tensor], Tensor]] = {
    "unit": unit_rows,
    "elu": lambda rows: unit_rows(elu(rows) + 1),
    "relu": lambda rows: unit_rows(relu(rows)),
}


def hydra_plain(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    causal: bool,
    decay_D: Tensor | None = None,
    feature_map: FeatureMap = "unit",
) -> Tensor:
    """The formula written down: one T × T matrix for each of the D heads. The twin that fast paths
    are held to.

    Args:
        query, key, value: B × T × D without padding.
        decay_D: λ of the decayed form.
    """
    mapped = MAPS[feature_map]
    weight = torch.einsum("btd,bsd->btsd", mapped(query), mapped(key))
    rows = torch.arange(query.shape[1], device=query.device)
    age = (rows[:, None] - rows)[..., None]
    if decay_D is not None:
        weight = weight * decay_D ** age.abs()
    if causal:
        weight = weight * (age >= 0)
    return torch.einsum("btsd,bsd->btd", weight, value)


def prefix_sum(rows_BTD: Tensor) -> Tensor:
    """Inclusive sums along time, by triangular products within chunks and a sum over chunks.

    Ten times `torch.cumsum` along a middle dimension at 8,192 × 64 on one core; same order of
    error.
    """
    batch, length, width = rows_BTD.shape
    tail = -length % CHUNK
    chunks = (pad(rows_BTD, (0, 0, 0, tail)) if tail else rows_BTD).reshape(batch, -1, CHUNK, width)
    within = torch.matmul(rows_BTD.new_ones(CHUNK, CHUNK).tril(), chunks)
    if chunks.shape[1] > 1:
        before = within[:, :-1, -1].cumsum(1)
        within = within + pad(before, (0, 0, 1, 0))[:, :, None]
    return within.reshape(batch, -1, width)[:, :length]


def decayed_prefix_sum(rows_BTD: Tensor, decay_D: Tensor) -> Tensor:
    """G_t = λ ⊙ G_{t-1} + rows_t, for any λ in [0, 1]^D, linear in T and without division by powers
    of λ.
    """
    sums: Tensor = _DecayedPrefixSum.apply(rows_BTD, decay_D)  # type: ignore[no-untyped-call]
    return sums


def decayed_prefix_sum_plain(rows_BTD: Tensor, decay_D: Tensor) -> Tensor:
    """The same by its definition, row after row."""
    sums = []
    running = torch.zeros_like(rows_BTD[:, 0])
    for row in rows_BTD.unbind(1):
        running = decay_D * running + row
        sums.append(running)
    return torch.stack(sums, dim=1)


def _scan(rows: Tensor, decay: Tensor) -> Tensor:
    """Decayed sums: step through all chunks at once, then carry their ends, which is the same
    problem STEP times smaller.
    """
    batch, length, width = rows.shape
    if length <= STEP:
        out = rows.clone()
        for t in range(1, length):
            out[:, t].addcmul_(out[:, t - 1], decay)
        return out
    tail = -length % STEP
    out = (pad(rows, (0, 0, 0, tail)) if tail else rows.clone()).view(batch, -1, STEP, width)
    for t in range(1, STEP):
        out[:, :, t].addcmul_(out[:, :, t - 1], decay)
    before = _scan(out[:, :-1, -1], decay**STEP)
    powers = decay ** torch.arange(1, STEP + 1, device=rows.device)[:, None]
    out[:, 1:].addcmul_(before[:, :, None], powers)
    return out.view(batch, -1, width)[:, :length]


class _DecayedPrefixSum(torch.autograd.Function):
    """The gradient of a decayed sum is a decayed sum from the other end."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, decay: Tensor) -> Tensor:
        sums = _scan(rows, decay)
        ctx.save_for_backward(sums, decay)
        return sums

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        sums, decay = ctx.saved_tensors
        grad_rows = _scan(grad.flip(1), decay).flip(1)
        return grad_rows, (grad_rows[:, 1:] * sums[:, :-1]).sum((0, 1))


class Hydra(Operator):
    """Plain Hydra; the causal form streams with one D-vector."""

    def __init__(self, *, causal: bool, feature_map: FeatureMap = "unit") -> None:
        super().__init__()
        self.causal = self.can_extend = causal
        self.feature_map = feature_map
        self.mapped = MAPS[feature_map]

    def forward(self, query: Tensor, key: Tensor, value: Tensor, mask_BT: Tensor | None) -> Tensor:
        """Mix rows; T × T appears nowhere."""
        update = _update(self.mapped(key), value, mask_BT if not self.causal else None)
        sums = prefix_sum(update) if self.causal else update.sum(1, keepdim=True)
        return (self.mapped(query) * sums).to(query.dtype)

    def initial_state(self, like_BD: Tensor) -> State:
        """Zeros, B × D."""
        return (torch.zeros_like(like_BD, dtype=torch.float32),)

    def extend(
        self, state: State, query: Tensor, key: Tensor, value: Tensor, mask_BT: Tensor
    ) -> tuple[Tensor, State]:
        """Continue the prefix sum: O(D) a row, whatever came before."""
        sums = state[0][:, None] + prefix_sum(_update(self.mapped(key), value, mask_BT))
        return (self.mapped(query) * sums).to(query.dtype), (sums[:, -1],)

    def read(self, state: State, query: Tensor) -> Tensor:
        """φ(Q) ⊙ G: O(D) a row."""
        return (self.mapped(query) * state[0][:, None]).to(query.dtype)


class DecayedHydra(Operator):
    """Hydra whose sums forget with distance: temporal context inside the operator (HydraRec; the
    mechanism is ours).

    Args:
        width: D.
        causal: sum what came before, or both directions.
        initial_decay: λ at the start, of every feature.
        feature_map: φ.
    """

    def __init__(
        self,
        width: int,
        *,
        causal: bool = True,
        initial_decay: float = 0.99,
        feature_map: FeatureMap = "unit",
    ) -> None:
        super().__init__()
        self.causal = self.can_extend = causal
        self.feature_map = feature_map
        self.mapped = MAPS[feature_map]
        self.decay_logit = nn.Parameter(
            torch.full((width,), math.log(initial_decay / (1 - initial_decay)))
        )

    @property
    def decay_D(self) -> Tensor:
        return torch.sigmoid(self.decay_logit.float())

    def forward(self, query: Tensor, key: Tensor, value: Tensor, mask_BT: Tensor | None) -> Tensor:
        update = _update(self.mapped(key), value, None if self.causal else mask_BT)
        sums = decayed_prefix_sum(update, self.decay_D)
        # The same from the other end; a row's own part would count twice
        if not self.causal:
            sums = sums + decayed_prefix_sum(update.flip(1), self.decay_D).flip(1) - update
        return (self.mapped(query) * sums).to(query.dtype)

    def initial_state(self, like_BD: Tensor) -> State:
        """Zeros, B × D."""
        return (torch.zeros_like(like_BD, dtype=torch.float32),)

    def extend(
        self, state: State, query: Tensor, key: Tensor, value: Tensor, mask_BT: Tensor
    ) -> tuple[Tensor, State]:
        """Continue the decayed sum; rows of padding neither add nor let time pass."""
        update = torch.cat([state[0][:, None], _update(self.mapped(key), value, mask_BT)], dim=1)
        sums = decayed_prefix_sum(update, self.decay_D)
        last = sums[torch.arange(len(sums), device=sums.device), mask_BT.sum(1)]
        return (self.mapped(query) * sums[:, 1:]).to(query.dtype), (last,)

    def read(self, state: State, query: Tensor) -> Tensor:
        """φ(Q) ⊙ G: O(D) a row. To stand behind the newest row fades nothing."""
        return (self.mapped(query) * state[0][:, None]).to(query.dtype)


def _update(mapped_key: Tensor, value: Tensor, mask_BT: Tensor | None) -> Tensor:
    """φ(K) ⊙ V in float32, zero for padding."""
    update = mapped_key.float() * value.float()
    return update if mask_BT is None else update * mask_BT[..., None]
