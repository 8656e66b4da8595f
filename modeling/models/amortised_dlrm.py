"""Amortised DLRM: append the candidate, cross-attend, encode the history once per request.

Source: Hertel, Daftary, Borisyuk, Gupta, Mazumder, "Efficient user history modeling with amortized inference for deep
learning recommendation models", arXiv 2412.06924: appended candidate with cross-attention, Q from history and
candidate rows, K and V from history rows only. Micro-batches after M-FALCON (arXiv 2402.17152, section 3).

| paper | here |
|---|---|
| history H_1 … H_n | `UserInputs`, n ≤ L |
| candidate C, m of them | `Candidates`, m ≤ C |
| Q = W_q [H, C]; K, V = W_k H, W_v H | `HistoryAttentionLayer.query`, `.key_value` |
| encoder output at C | `read_BCD`, one field of the dot interaction |

Differs: the body of the paper is not public; what it leaves open is chosen as follows. Pre-norm layers, GELU; the
history part of the last layer stops at its keys and values, since nothing reads its output; positions count from the
newest event (candidates stand at 0) or from the oldest; the rest of the DLRM is a dot interaction (arXiv 1906.00091)
and a two-layer head; one task.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from modeling.batch import Candidates, FeatureSizes, UserInputs
from modeling.layers.attention import HistoryAttentionLayer, causal_mask
from modeling.layers.embedding import CategorySlots, Standardise, sinusoids
from modeling.models.base import CannotExtendError, Ranker


@dataclass(frozen=True)
class Config:
    """`causal` with `positions="from_oldest"` makes states that can be extended; the default reads both ways."""

    width: int = 64
    num_layers: int = 2
    num_heads: int = 4
    dropout: float = 0.1
    causal: bool = False
    positions: Literal["from_newest", "from_oldest"] = "from_newest"


@dataclass(frozen=True)
class UserState:
    """KV cache of the history, layer by layer, and the user's own fields."""

    keys: tuple[Tensor, ...]  # num_layers × (B × H × L × K)
    values: tuple[Tensor, ...]
    mask_BL: Tensor
    length_B: Tensor  # events so far, padding not counted
    user_BD: Tensor


class AmortisedDLRM(Ranker):
    """See the module docstring.

    ```
    history ─► event embedding ─► layers ──► keys, values ─┐ once per request
    candidate ─► item embedding ─► the same layers, reading ┴► read_BCD ─┐
    item, categories, dense, user ───────────────────────────────────────┴► dot interaction ─► head ─► logit
    ```
    """

    _pairs: Tensor

    def __init__(self, config: Config, sizes: FeatureSizes) -> None:
        super().__init__()
        self.config, self.sizes = config, sizes
        width = config.width
        self.item = nn.Embedding(sizes.items, width)
        self.action = nn.Embedding(sizes.actions + 1, width)  # the last one: unknown, for candidates
        self.event = nn.Linear(sizes.event_features + 1, width)  # event features and time
        self.position = nn.Embedding(sizes.history_length + 1, width)  # 0 is the candidates' own
        self.layers = nn.ModuleList(
            HistoryAttentionLayer(width, config.num_heads, config.dropout) for _ in range(config.num_layers)
        )
        self.norm = nn.LayerNorm(width, eps=1e-5)
        self.fields = nn.ModuleList(nn.Embedding(size, width) for size in sizes.user_fields)
        self.categories = CategorySlots(sizes, width)
        self.standardise = Standardise(sizes.dense)
        self.dense = nn.Sequential(nn.Linear(sizes.dense, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        num_fields = 4 + len(sizes.categories)  # read, item, user, dense, categories
        pairs = num_fields * (num_fields - 1) // 2
        self.head = nn.Sequential(
            nn.Linear(pairs + 2 * width, 2 * width),
            nn.GELU(),
            nn.Dropout(config.dropout),
            nn.Linear(2 * width, width),
            nn.GELU(),
            nn.Linear(width, 1),
        )
        self.register_buffer("_pairs", torch.triu_indices(num_fields, num_fields, 1), persistent=False)
        for module in self.modules():
            if isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.05)
        self.categories.zero_empty_slots()

    @property
    def can_extend(self) -> bool:
        """Causal states with positions that do not move when events are added."""
        return self.config.causal and self.config.positions == "from_oldest"

    def fit_statistics(self, dense_NF: Tensor) -> None:
        """Standardise dense features by the training set's mean and deviation."""
        self.standardise.fit(dense_NF)

    def encode_user(self, user: UserInputs) -> UserState:
        """Keys and values of the history in every layer: L rows, whatever the number of candidates."""
        mask = user.mask_BL
        read_mask = causal_mask(mask, mask.shape[1]) if self.config.causal else mask[:, None]
        rows = self._events(user, torch.zeros_like(mask[:, 0], dtype=torch.long))
        keys, values = self._through_layers(rows, read_mask, None)
        return UserState(keys, values, mask, mask.sum(1), self._user(user.field_BU))

    def extend_user(self, user_state: UserState, new_events: UserInputs) -> UserState:
        """Add new events: only their rows are computed, against cached keys and values."""
        if not self.can_extend:
            raise CannotExtendError(
                "extend_user is exact only with causal=True and positions='from_oldest': a bidirectional history changes every old "
                "row, and positions from the newest event shift with each new one. Encode the user again"
            )
        mask = torch.cat([user_state.mask_BL, new_events.mask_BL], dim=1)
        rows = self._events(new_events, user_state.length_B)
        keys, values = self._through_layers(rows, causal_mask(mask, rows.shape[1]), user_state)
        return UserState(keys, values, mask, mask.sum(1), user_state.user_BD)

    def score(self, user_state: UserState, candidates: Candidates) -> Tensor:
        """Score candidates: each reads the cached history and nothing of the others. logits_BCT with T = 1."""
        item = self.item(candidates.item_BC)
        unknown = self.action.weight[-1] + self.position.weight[0]
        rows = item + unknown
        mask = user_state.mask_BL[:, None]
        for layer, keys, values in zip(self.layers, user_state.keys, user_state.values, strict=True):
            rows = layer(rows, keys, values, mask)
        dense = self.dense(self.standardise(candidates.dense_BCF))
        user = user_state.user_BD[:, None].expand_as(item)
        fields = torch.stack([self.norm(rows), item, user, dense, *self.categories(candidates.category_BCK)], dim=2)
        products = fields @ fields.transpose(2, 3)
        first, second = self._pairs
        logits: Tensor = self.head(torch.cat([products[:, :, first, second], dense, fields[:, :, 0]], dim=-1))
        return logits.float()

    def _through_layers(
        self, rows: Tensor, mask: Tensor, cached: UserState | None
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        all_keys, all_values = [], []
        for number, layer in enumerate(self.layers):
            keys, values = layer.keys_values(rows)  # type: ignore[operator]
            if cached is not None:
                keys = torch.cat([cached.keys[number], keys], dim=2)
                values = torch.cat([cached.values[number], values], dim=2)
            all_keys.append(keys)
            all_values.append(values)
            if number + 1 < len(self.layers):
                rows = layer(rows, keys, values, mask)
        return tuple(all_keys), tuple(all_values)

    def _events(self, user: UserInputs, before_B: Tensor) -> Tensor:
        """Embedded events. `before_B` events of each user came before these."""
        from_oldest = self.config.positions == "from_oldest"
        time = user.gap_BL if from_oldest else user.age_BL
        index = torch.arange(user.mask_BL.shape[1], device=user.mask_BL.device)
        if from_oldest:
            position = sinusoids(before_B[:, None] + index, self.config.width)
        else:
            recency = (user.mask_BL.sum(1, keepdim=True) - index).clamp(1, self.sizes.history_length)
            position = self.position(recency)
        numbers = torch.cat([user.event_BLE, time[..., None]], dim=-1)
        return self.item(user.item_BL) + self.action(user.action_BL) + self.event(numbers) + position

    def _user(self, field_BU: Tensor) -> Tensor:
        if not self.fields:
            return self.item.weight.new_zeros(len(field_BU), self.config.width)
        return torch.stack([table(field_BU[:, i]) for i, table in enumerate(self.fields)]).sum(0)
