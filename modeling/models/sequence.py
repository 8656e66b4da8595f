"""The base of all sequence models: embeddings, a stack of blocks, the tied head, and both steps of
the interface.

HydraRec, SASRec, BERT4Rec, LinRec and HSTU are this model with another operator, mask and
objective; each has its file with its Config and its sources. Shape letters beside the usual: N
packed rows of a batch.

```
events ─► item (+ action, position, time gap) ─► blocks ─► norm ─► rows_ND ──► next-item losses, every row
                                                                    └ last ──► history_BD · item embedding ─► logit
```

Left to choice and chosen the same for all, so that only the operator is compared: pre-norm blocks,
item embeddings scaled by √D at the input and unscaled at the tied head, learned positions counted
from the newest event.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from modeling.inputs.batch import Candidates, FeatureSizes, TrainingSample, UserInputs
from modeling.layers.block import Activation, Block, MixedScale, Place
from modeling.layers.embedding import sinusoids
from modeling.layers.hydra import DecayedHydra, FeatureMap, Hydra
from modeling.layers.linear_attention import LinearAttention, LinRecAttention
from modeling.layers.operator import Operator, State
from modeling.layers.packing import Packing
from modeling.layers.softmax import Softmax
from modeling.models.base import CannotExtendError, Ranker

OperatorName = Literal["softmax", "hydra", "decayed_hydra", "linrec", "kernel_linear", "hstu"]
Positions = Literal["from_newest", "from_oldest", "none"]
# HSTU's bucketing of seconds, arXiv 2402.17152: floor(log(max(1, Δt)) / 0.301)
GAP_BUCKETS = 128
SECONDS_PER_DAY = 86_400


@dataclass(frozen=True)
class SequenceConfig:
    """One sequence model.

    `operators` names each layer's operator, first layer first, so hybrids are a matter of config.
    `positions` counted from the newest event shift when events are added; without them, or counted
    from the oldest, states can be extended.
    """

    operators: tuple[OperatorName, ...] = ("softmax", "softmax")
    width: int = 64
    num_heads: int = 1
    causal: bool = True
    dropout: float = 0.2
    activation: Activation = "relu"
    expansion: int = 1
    gated: bool = False
    positions: Positions = "from_newest"
    time_gaps: bool = False
    # For layers that have one (HSTU)
    time_bias: bool = False
    # For operators without a denominator
    mixed_scale: MixedScale = "norm"
    # Of Hydra's operators
    feature_map: FeatureMap = "unit"
    initial_decay: float = 0.99

    def __post_init__(self) -> None:
        """Configs read from JSON bring lists."""
        object.__setattr__(self, "operators", tuple(self.operators))


@dataclass(frozen=True)
class PackedEvents:
    """Events of B users laid end to end, oldest first; every user has at least one."""

    # int64 vocabulary index
    item_N: Tensor
    action_N: Tensor  # int64
    # float32, log1p days since the event before
    gap_N: Tensor
    packing: Packing

    def to(self, device: torch.device | str) -> PackedEvents:
        to = torch.device(device)
        if self.item_N.device.type == to.type and to.index in (None, self.item_N.device.index):
            return self
        item, action, gap = (
            tensor.to(device) for tensor in (self.item_N, self.action_N, self.gap_N)
        )
        return PackedEvents(item, action, gap, Packing(self.packing.lengths, device))


@dataclass(frozen=True)
class UserState:
    """The history vector and, where the model streams, each layer's state: all that the future
    needs of the past.
    """

    history_BD: Tensor
    layers: tuple[State, ...]
    length_B: Tensor
    seconds_B: (
        # float64, from the first event to the newest; kept for models with a time bias
        Tensor
    )


class SequenceRanker(Ranker):
    """See the module docstring."""

    def __init__(self, config: SequenceConfig, sizes: FeatureSizes) -> None:
        super().__init__()
        self.config = config
        self.sizes = sizes
        width = config.width
        if width % config.num_heads:
            raise ValueError(f"width {width} is no multiple of num_heads {config.num_heads}")
        if config.time_bias and "hstu" not in config.operators:
            raise ValueError(f"time_bias is of 'hstu' layers, this model has {config.operators}")
        if not config.causal and (config.time_gaps or config.time_bias):
            raise ValueError(
                "a bidirectional model cannot read times: those of a masked event would tell what was masked"
            )
        # The last: [MASK]
        self.item = nn.Embedding(sizes.items + (0 if config.causal else 1), width)
        self.action = nn.Embedding(sizes.actions, width) if sizes.actions > 1 else None
        # A row more than events: [MASK] makes a bidirectional history one longer.
        self.position = (
            nn.Embedding(sizes.history_length + 1, width)
            if config.positions == "from_newest"
            else None
        )
        self.gap = nn.Embedding(GAP_BUCKETS, width) if config.time_gaps else None
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(self.block(name) for name in config.operators)
        self.norm = nn.LayerNorm(width)
        # Last, so that the modules of all blocks are initialised alike.
        for module in self.modules():
            if isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
            elif isinstance(module, nn.Linear):
                nn.init.xavier_normal_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def fit_statistics(self, sample: TrainingSample) -> None:
        """Items, actions and times have no scales."""

    def block(self, name: OperatorName) -> nn.Module:
        """One layer; a model with another kind of layer overrides this."""
        config = self.config
        return Block(
            config.width,
            make_operator(name, config),
            dropout=config.dropout,
            activation=config.activation,
            expansion=config.expansion,
            gated=config.gated,
            mixed_scale="none" if name == "softmax" else config.mixed_scale,
        )

    @property
    def catalogue(self) -> Tensor:
        """Output rows of all items but the unknown one: item with vocabulary index i + 1 is row
        i.
        """
        return self.item.weight[1 : self.sizes.items]

    @property
    def mask_item(self) -> int:
        """Vocabulary index of [MASK].

        Raises:
            ValueError: a causal model has none.
        """
        if self.config.causal:
            raise ValueError("a causal model has no [MASK]: it is for bidirectional ones")
        return self.sizes.items

    @property
    def can_extend(self) -> bool:
        """True if all layers stream and positions do not move."""
        return (
            self.config.causal
            and self.config.positions != "from_newest"
            and all(bool(block.can_extend) for block in self.blocks)
        )

    def encode(self, events: PackedEvents) -> Tensor:
        """Every row of every sequence, N × D; a causal row knows nothing of later ones (but for
        their number, with positions from the newest). Training and evaluation.
        """
        packing = events.packing
        device = events.item_N.device
        index = (
            packing.from_newest if self.config.positions == "from_newest" else packing.from_oldest
        )
        rows = self._embed(
            events.item_N, events.action_N, events.gap_N, torch.as_tensor(index, device=device)
        )
        count = (
            packing.from_oldest + 1
            if self.config.causal
            else np.repeat(packing.lengths, packing.lengths)
        )
        place = Place(torch.as_tensor(count, device=device), self._seconds_packed(events))
        for block in self.blocks:
            rows = block(rows, packing, place)
        normed: Tensor = self.norm(rows)
        return normed

    def encode_histories(self, events: PackedEvents) -> Tensor:
        """History vectors, B × D: each sequence's last row, or [MASK]'s behind a bidirectional
        history.
        """
        events = events if self.config.causal else self._with_mask(events)
        return self.encode(events)[events.packing.last_rows]

    def encode_user(self, user: UserInputs) -> UserState:
        """The history vector, and every layer's state where the model streams. An empty history is
        a zero vector.
        """
        lengths = user.mask_BL.sum(1)
        if self.can_extend:
            like = self.item.weight.new_zeros(len(lengths), self.config.width)
            states = tuple(block.initial_state(like) for block in self.blocks)  # type: ignore[operator]
            nothing = UserState(
                like,
                states,
                torch.zeros_like(lengths),
                like.new_zeros(len(lengths), dtype=torch.float64),
            )
            return self._extend(nothing, user)
        history = self.item.weight.new_zeros(len(lengths), self.config.width)
        events, owners = self._pack(user, lengths)
        if len(owners):
            history = history.index_copy(0, owners, self.encode_histories(events))
        return UserState(history, (), lengths, history.new_zeros(len(lengths), dtype=torch.float64))

    def extend_user(self, user_state: UserState, new_events: UserInputs) -> UserState:
        """Continue every layer's state with the new events only."""
        if not self.can_extend:
            raise CannotExtendError(
                "extend_user is exact only for causal layers that stream, with positions 'from_oldest' or 'none': positions from the "
                "newest event shift with each new one, and a bidirectional history changes every old row. Encode the user again"
            )
        return self._extend(user_state, new_events)

    def score(self, user_state: UserState, candidates: Candidates) -> Tensor:
        """Score candidates: history vector times item embedding. logits_BCT with T = 1."""
        return (self.item(candidates.item_BC) @ user_state.history_BD[..., None]).float()

    def _extend(self, state: UserState, user: UserInputs) -> UserState:
        mask = user.mask_BL
        if not mask.shape[1]:
            return state
        index = state.length_B[:, None] + torch.arange(mask.shape[1], device=mask.device)
        rows = self._embed(user.item_BL, user.action_BL, user.gap_BL, index)
        seconds = None
        if self.config.time_bias:
            # The oldest event has no gap, whatever its input says.
            gap = torch.where(index == 0, 0.0, gap_seconds(user.gap_BL)).double() * mask
            seconds = state.seconds_B[:, None] + gap.cumsum(1)
        layers = []
        for block, layer in zip(self.blocks, state.layers, strict=True):
            rows, layer = block.extend(rows, layer, mask, Place(index + 1, seconds))  # type: ignore[operator]
            layers.append(layer)
        number = mask.sum(1)
        # Real rows stand first; a user without new events keeps the old vector.
        newest = self.norm(rows)[
            torch.arange(len(mask), device=mask.device), (number - 1).clamp(min=0)
        ]
        history = torch.where((number > 0)[:, None], newest, state.history_BD)
        seconds_B = state.seconds_B if seconds is None else seconds[:, -1]
        return UserState(history, tuple(layers), state.length_B + number, seconds_B)

    def _seconds_packed(self, events: PackedEvents) -> Tensor | None:
        """Seconds of each row since an instant of its sequence's, where the model reads them:
        differences count.
        """
        if not self.config.time_bias:
            return None
        packing = events.packing
        first = torch.as_tensor(packing.from_oldest == 0, device=events.gap_N.device)
        return torch.where(first, 0.0, gap_seconds(events.gap_N)).double().cumsum(0)

    def _pack(self, user: UserInputs, lengths: Tensor) -> tuple[PackedEvents, Tensor]:
        """Events of the users that have some, longest first, and which users those are."""
        owners = lengths.argsort(descending=True, stable=True)
        owners = owners[lengths[owners] > 0]
        real = user.mask_BL[owners]
        packing = Packing(lengths[owners].cpu().numpy(), real.device)
        item, action, gap = (t[owners][real] for t in (user.item_BL, user.action_BL, user.gap_BL))
        return PackedEvents(item, action, gap, packing), owners

    def _with_mask(self, events: PackedEvents) -> PackedEvents:
        """The same sequences, each with [MASK] at its end: the question that a bidirectional model
        answers.
        """
        old = events.packing
        new = Packing(old.lengths + 1, events.item_N.device)
        at = torch.as_tensor(
            np.arange(old.num_rows) + np.repeat(np.arange(len(old.lengths)), old.lengths)
        )

        def widened(rows: Tensor, fill: int) -> Tensor:
            return rows.new_full((new.num_rows,), fill).index_copy_(0, at.to(rows.device), rows)

        return PackedEvents(
            widened(events.item_N, self.mask_item),
            widened(events.action_N, 0),
            widened(events.gap_N, 0),
            new,
        )

    def _embed(self, item: Tensor, action: Tensor, gap: Tensor, index: Tensor) -> Tensor:
        """Rows of events; `index` counts from the newest or the oldest event, as the config
        says.
        """
        rows: Tensor = self.item(item) * math.sqrt(self.config.width)
        if self.action is not None:
            rows = rows + self.action(action)
        if self.position is not None:
            rows = rows + self.position(index.clamp(max=self.sizes.history_length))
        elif self.config.positions == "from_oldest":
            rows = rows + sinusoids(index, self.config.width).to(rows.dtype)
        if self.gap is not None:
            rows = rows + self.gap(gap_bucket(gap))
        dropped: Tensor = self.dropout(rows)
        return dropped


def gap_bucket(gap: Tensor) -> Tensor:
    """Bucket of a time gap given as log1p days: floor(log(max(1, seconds)) / 0.301), at most
    GAP_BUCKETS - 1.
    """
    return seconds_bucket(gap_seconds(gap))


def gap_seconds(gap: Tensor) -> Tensor:
    """Seconds of a time gap given as log1p days."""
    return torch.expm1(gap) * SECONDS_PER_DAY


def seconds_bucket(seconds: Tensor) -> Tensor:
    """Bucket of a duration."""
    return (seconds.clamp(min=1).log() / 0.301).long().clamp(max=GAP_BUCKETS - 1)


def make_operator(name: OperatorName, config: SequenceConfig) -> Operator:
    """An operator by name.

    Raises:
        ValueError: no such operator.
    """
    causal = config.causal
    if name == "softmax":
        return Softmax(config.num_heads, causal=causal)
    if name == "hydra":
        return Hydra(causal=causal, feature_map=config.feature_map)
    if name == "linrec":
        return LinRecAttention(config.num_heads, causal=causal)
    if name == "kernel_linear":
        return LinearAttention(config.num_heads, causal=causal, denominator=True)
    if name == "decayed_hydra":
        return DecayedHydra(
            config.width,
            causal=causal,
            initial_decay=config.initial_decay,
            feature_map=config.feature_map,
        )
    raise ValueError(
        f"no operator {name!r}; there are softmax, hydra, decayed_hydra, linrec, kernel_linear"
    )
