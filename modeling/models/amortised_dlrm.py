"""Amortised DLRM: fuse the candidate early with the user's history, and still encode the history
once per request.

Source: Hertel, Daftary, Borisyuk, Gupta, Mazumder, "Efficient user history modeling with amortized
inference for deep learning recommendation models", arXiv 2412.06924. Micro-batches after M-FALCON
(arXiv 2402.17152, section 3).

| paper | here |
|---|---|
| history H_1 … H_n | `UserInputs`, n ≤ L |
| candidate C, m of them | `Candidates`, m ≤ C |
| CONCAT: X_j = [H_j; C] W_in, every row a candidate's | `fusion="concat"` |
| APPEND with self-attention: Q, K, V of [H, C] | `fusion="append_self_plain"` |
| the same where H does not read C, nor candidates one another | `fusion="append_self"` |
| APPEND with cross-attention: Q of [H, C]; K, V of H alone | `fusion="append_cross"`, the default |
| encoder output at C | `read_BCD`, one field of the interaction |

Only the last two are amortised; the first two are what they are measured against.

Differs: the body of the paper is not public; what it leaves open is chosen as follows. Pre-norm
layers, LayerNorm, a GELU feed-forward of twice the width; the history part of the last layer stops at its keys and values, since nothing reads
its output; positions count from the newest event (candidates stand at 0) or from the oldest; CONCAT
pools its ten newest rows and the maximum of all; the rest of the DLRM is a dot interaction (arXiv
1906.00091) or cross layers (DCNv2, arXiv 2008.13535) over all fields, and a head for each task. Attention finds events like the candidate (`layers/matching.py`);
`matching=False` is scaled dot products.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from modeling.inputs.batch import Candidates, FeatureSizes, UserInputs
from modeling.layers.attention import HistoryAttentionLayer, causal_mask
from modeling.layers.embedding import sinusoids
from modeling.layers.features import Bags, FeatureTokens
from modeling.layers.host import surely_all
from modeling.layers.interaction import CrossNetwork, Interaction, ReadDotInteraction, TaskHeads
from modeling.layers.pointwise_attention import PointwiseAttentionLayer
from modeling.layers.stored_tokens import StoredTokens
from modeling.models.base import CannotExtendError, Ranker

# Rows that CONCAT pools beside the maximum
NEWEST = 10

Fusion = Literal["concat", "append_self_plain", "append_self", "append_cross"]


@dataclass(frozen=True)
class Config:
    """`causal` with `positions="from_oldest"` makes states that can be extended; the default reads
    both ways.
    """

    width: int = 64
    num_layers: int = 2
    num_heads: int = 4
    # None: twice the width
    head_hidden: int | None = None
    dropout: float = 0.1
    fusion: Fusion = "append_cross"
    # Pointwise: HSTU's, for comparison
    attention: Literal["softmax", "pointwise"] = "softmax"
    interaction: Literal["dot", "cross"] = "dot"
    cross_layers: int = 2
    # 0 keeps the cross matrices whole
    cross_rank: int = 0
    # Pooled sequences among the request's fields
    bags: bool = False
    causal: bool = False
    # Keys and queries of unit length (`layers/matching.py`); False: the papers' products
    matching: bool = True
    positions: Literal["from_newest", "from_oldest"] = "from_newest"


@dataclass(frozen=True)
class UserState:
    """KV cache of the history, layer by layer, and the request's own fields. Without amortisation:
    the embedded rows.
    """

    # num_layers × (B × H × L × K)
    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    rows_BLD: Tensor | None
    mask_BL: Tensor
    # Surely no padding in any row
    full: bool
    # Events so far, padding not counted
    length_B: Tensor
    request_BRD: Tensor
    bags: Bags | None = None


class AmortisedDLRM(Ranker):
    """See the module docstring.

    ```
    history ─► event embedding ─► layers ──► keys, values ─┐ once per request
    candidate ─► item embedding ─► the same layers, reading ┴► read_BCD ─┐
    item, categories, dense, user, context ──────────────────────────────┴► interaction ─► heads ─► logits
    ```
    """

    def __init__(self, config: Config, sizes: FeatureSizes) -> None:
        super().__init__()
        self.config = config
        self.sizes = sizes
        width = config.width
        self.features = FeatureTokens(sizes, width, bags=config.bags)
        # The last one: unknown, for candidates
        self.action = nn.Embedding(sizes.actions + 1, width)
        # Event features and time
        self.event = nn.Linear(self.features.events.size + 1, width)
        self.stored = StoredTokens(sizes, width) if sizes.tokens[0] else None
        if self.stored is not None and not self.amortised:
            raise ValueError(
                f"fusion={config.fusion!r} reads no stored summary tokens: choose an amortised one"
            )
        # 0 is the candidates' own
        self.position = nn.Embedding(sizes.history_length + 1, width)
        # The history, once per request.
        self.layers = nn.ModuleList(
            HistoryAttentionLayer(width, config.num_heads, config.dropout, matching=config.matching)
            if config.attention == "softmax"
            else PointwiseAttentionLayer(
                width,
                config.num_heads,
                config.dropout,
                sizes.history_length + 1,
                matching=config.matching,
            )
            for _ in range(config.num_layers)
        )
        if config.fusion == "concat":
            # W_in, its half for H
            self.join_history = nn.Linear(width, width)
            # And its half for C
            self.join_candidate = nn.Linear(width, width, bias=False)
            self.pool = nn.Linear((NEWEST + 1) * width, width)
        # All other features, with what the candidate read of the history.
        self.norm = nn.LayerNorm(width, eps=1e-5)
        request = self.features.num_request
        candidate = self.features.num_candidate
        width_of = (request, 1 + candidate, width)
        self.interaction: Interaction = (
            CrossNetwork(*width_of, config.cross_layers, config.cross_rank)
            if config.interaction == "cross"
            else ReadDotInteraction(*width_of, self.features.candidate_dense.num_tokens)
        )
        hidden = config.head_hidden or 2 * width
        self.heads = TaskHeads(*self.interaction.out, hidden, sizes.tasks, config.dropout)
        for table in (self.action, self.position):
            nn.init.normal_(table.weight, std=0.05)

    @property
    def amortised(self) -> bool:
        """True if the history is encoded once, whatever the candidates."""
        return self.config.fusion in ("append_self", "append_cross")

    @property
    def can_extend(self) -> bool:
        """Causal states with positions that do not move when events are added."""
        return self.amortised and self.config.causal and self.config.positions == "from_oldest"

    def encode_user(self, user: UserInputs) -> UserState:
        """Keys and values of the history in every layer: L rows, whatever the number of
        candidates.
        """
        mask = user.mask_BL
        items = self.features.item(user.item_BL)
        bags = self.features.bag(user, items_BLD=items) if self.config.bags else None
        rows = self._events(user, items, mask.new_zeros(len(mask), dtype=torch.long))
        full = surely_all(mask)
        length = mask.sum(1)
        # Stored tokens stand before the events: more history, already summarised.
        if self.stored is not None:
            tokens = self.stored(user)
            rows = torch.cat([tokens, rows], dim=1)
            mask = torch.cat([torch.ones_like(tokens[..., 0], dtype=torch.bool), mask], dim=1)
        state = UserState((), (), rows, mask, full, length, self.features.request(user, bags), bags)
        if not self.amortised:
            return state
        keys, values = self._through_layers(rows, self._history_mask(mask, full), None)
        return replace(state, keys=keys, values=values, rows_BLD=None)

    def extend_user(self, user_state: UserState, new_events: UserInputs) -> UserState:
        """Add new events: only their rows are computed, against cached keys and values."""
        if not self.can_extend:
            raise CannotExtendError(
                "extend_user is exact only with an amortised fusion, causal=True and positions='from_oldest': a bidirectional history "
                "changes every old row, and positions from the newest event shift with each new one. Encode the user again"
            )
        mask = torch.cat([user_state.mask_BL, new_events.mask_BL], dim=1)
        items = self.features.item(new_events.item_BL)
        rows = self._events(new_events, items, user_state.length_B)
        keys, values = self._through_layers(rows, causal_mask(mask, rows.shape[1]), user_state)
        full = user_state.full and surely_all(new_events.mask_BL)
        bags = self.features.bag(new_events, user_state.bags, items) if self.config.bags else None
        request = self.features.request(new_events, bags)
        length = user_state.length_B + new_events.mask_BL.sum(1)
        return UserState(keys, values, None, mask, full, length, request, bags)

    def score(self, user_state: UserState, candidates: Candidates) -> Tensor:
        """Score candidates: each reads the history and nothing of the others. logits_BCT."""
        tokens = self.features.candidates(candidates)
        rows = tokens[:, :, 0] + self.action.weight[-1] + self.position.weight[0]
        mask = None if user_state.full else user_state.mask_BL
        if self.config.fusion == "concat":
            rows = self._concatenated(user_state, rows)
        elif self.config.fusion == "append_self_plain":
            rows = self._appended(user_state, rows)
        else:
            for layer, keys, values in zip(
                self.layers, user_state.keys, user_state.values, strict=True
            ):
                if self.config.fusion == "append_self":
                    rows = layer.read_with_own(rows, keys, values, mask)  # type: ignore[operator]
                else:
                    rows = layer.read(rows, keys, values, mask)  # type: ignore[operator]
        own = torch.cat([self.norm(rows)[:, :, None], tokens], dim=2)
        logits: Tensor = self.heads(*self.interaction(user_state.request_BRD, own))
        return logits

    def _concatenated(self, state: UserState, rows_BCD: Tensor) -> Tensor:
        """CONCAT: an encoder run for every candidate."""
        assert state.rows_BLD is not None
        number = rows_BCD.shape[1]
        length = state.rows_BLD.shape[1]
        joined = (
            self.join_history(state.rows_BLD)[:, None] + self.join_candidate(rows_BCD)[:, :, None]
        )
        mask = state.mask_BL.repeat_interleave(number, 0)
        rows = joined.flatten(0, 1)
        visible = self._history_mask(mask, state.full)
        for layer in self.layers:
            rows = layer(rows, *layer.keys_values(rows), visible)  # type: ignore[operator]
        back = (
            state.length_B.repeat_interleave(number)[:, None]
            - 1
            - torch.arange(NEWEST, device=rows.device)
        )
        newest = rows.gather(1, back.clamp(0, length - 1)[..., None].expand(-1, -1, rows.shape[-1]))
        newest = newest * (back >= 0)[..., None]
        highest = rows.masked_fill(~mask[..., None], -torch.inf).amax(1)
        highest = torch.where(mask.any(1, keepdim=True), highest, 0.0)
        pooled: Tensor = self.pool(torch.cat([newest.flatten(1), highest], dim=-1)).unflatten(
            0, (-1, number)
        )
        return pooled

    def _appended(self, state: UserState, rows_BCD: Tensor) -> Tensor:
        """APPEND with self-attention as it stands: [H, C] through every layer for every
        candidate.
        """
        assert state.rows_BLD is not None
        number = rows_BCD.shape[1]
        history = state.rows_BLD.repeat_interleave(number, 0)
        rows = torch.cat([history, rows_BCD.flatten(0, 1)[:, None]], dim=1)
        mask = state.mask_BL.repeat_interleave(number, 0)
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
        visible = self._history_mask(mask, state.full)
        full = None if state.full else mask
        for layer in self.layers:
            keys, values = layer.keys_values(rows)  # type: ignore[operator]
            candidate = layer.read(rows[:, -1:], keys, values, full)  # type: ignore[operator]
            seen = visible if visible is None or visible.shape[1] == 1 else visible[:, :-1]
            history = layer(rows[:, :-1], keys, values, seen)
            rows = torch.cat([history, candidate], dim=1)
        return rows[:, -1].unflatten(0, (-1, number))

    def _history_mask(self, mask_BL: Tensor, full: bool) -> Tensor | None:
        if self.config.causal:
            return causal_mask(mask_BL, mask_BL.shape[1])
        return None if full else mask_BL[:, None]

    def _through_layers(
        self, rows: Tensor, mask: Tensor | None, cached: UserState | None
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        all_keys = []
        all_values = []
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

    def _events(self, user: UserInputs, items_BLD: Tensor, before_B: Tensor) -> Tensor:
        """Embedded events. `before_B` events of each user came before these."""
        from_oldest = self.config.positions == "from_oldest"
        time = user.gap_BL if from_oldest else user.age_BL
        index = torch.arange(user.mask_BL.shape[1], device=user.mask_BL.device)
        if from_oldest:
            position = sinusoids(before_B[:, None] + index, self.config.width)
        else:
            recency = (user.mask_BL.sum(1, keepdim=True) - index).clamp(
                1, self.sizes.history_length
            )
            position = self.position(recency)
        numbers = torch.cat([self.features.events(user), time[..., None]], dim=-1)
        return items_BLD + self.action(user.action_BL) + self.event(numbers) + position
