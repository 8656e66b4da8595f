"""HydraRec as a ranker: a history in time linear in its length and in the width, beside all other features.

Source: as `models/hydrarec.py`, which ranks a whole catalogue by items alone; the candidate reads the history
as in the amortised DLRM (arXiv 2412.06924): appended to it, and read by no event.

| paper | here |
|---|---|
| Hydra attention, causal | `operators`, each layer's |
| G_t = Σ_{s ≤ t} φ(K)_s ⊙ V_s | `UserState.layers`: one D-vector a layer, whatever the history's length |
| O_c = φ(Q)_c ⊙ G of a candidate that stands behind the history | `Block.read` |
| temporal context | the gap before each event among its numbers; operator "decayed_hydra" |
| history vector · item | a pair of tokens that the interaction multiplies |

A new event costs O(num_layers × D²), exactly, however many came before.

Differs: only the abstract is public; beside the choices of `models/hydrarec.py`, which know items, actions and
times alone, events carry what the dataset declares, and all features of user, context and candidate are
interacted with what was read. Rows have no positions: an age would change with each new event.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from modeling.inputs.batch import Candidates, FeatureSizes, UserInputs
from modeling.layers.block import Activation, Block, Place
from modeling.layers.features import FeatureTokens
from modeling.layers.hydra import DecayedHydra, Hydra
from modeling.layers.interaction import CrossNetwork, Interaction, ReadDotInteraction, TaskHeads
from modeling.layers.operator import State
from modeling.models.base import Ranker

OperatorName = Literal["hydra", "decayed_hydra"]


@dataclass(frozen=True)
class Config:
    """`operators` names each layer's, first layer first."""

    width: int = 64
    operators: tuple[OperatorName, ...] = ("decayed_hydra", "decayed_hydra")
    activation: Activation = "gelu"
    expansion: int = 2
    # None: twice the width
    head_hidden: int | None = None
    dropout: float = 0.1
    interaction: Literal["dot", "cross"] = "dot"
    cross_layers: int = 2
    # 0 keeps the cross matrices whole
    cross_rank: int = 0

    def __post_init__(self) -> None:
        """Configs read from JSON bring lists."""
        object.__setattr__(self, "operators", tuple(self.operators))


@dataclass(frozen=True)
class UserState:
    """All that the future needs of the past, and the request's own tokens.

    Args:
        layers: each layer's state.
        history_BD: the newest event's row behind the last layer; zeros without one.
    """

    layers: tuple[State, ...]
    history_BD: Tensor
    request_BRD: Tensor


class HydraRecRanker(Ranker):
    """See the module docstring.

    ```
    history ─► event embedding ─► Hydra blocks ──► a sum a layer ─┬─► history vector ─┐ once per request
    candidate ─► item embedding ─► the same blocks, reading ──────┴─► read_BCD ───────┤
    item, categories, dense, user, context ───────────────────────────────────────────┴► interaction ─► heads ─► logits
    ```

    Example:
        >>> ranker = HydraRecRanker(Config(width=32), sizes)
        >>> state = ranker.encode_user(batch.user)
        >>> ranker.score(ranker.extend_user(state, one_more_event), batch.candidates).shape
        torch.Size([64, 105, 1])
    """

    def __init__(self, config: Config, sizes: FeatureSizes) -> None:
        super().__init__()
        self.config = config
        self.sizes = sizes
        width = config.width
        self.features = FeatureTokens(sizes, width, bags=False)
        # The last one: unknown, for candidates
        self.action = nn.Embedding(sizes.actions + 1, width)
        # Event features and the gap before
        self.event = nn.Linear(self.features.events.size + 1, width)
        self.blocks = nn.ModuleList(
            Block(
                width,
                Hydra(causal=True) if name == "hydra" else DecayedHydra(width),
                dropout=config.dropout,
                activation=config.activation,
                expansion=config.expansion,
                # Sums grow with the history
                mixed_scale="norm",
            )
            for name in config.operators
        )
        self.norm = nn.LayerNorm(width)
        request = self.features.num_request + 1
        candidate = self.features.num_candidate + 1
        self.interaction: Interaction = (
            CrossNetwork(request, candidate, width, config.cross_layers, config.cross_rank)
            if config.interaction == "cross"
            else ReadDotInteraction(
                request, candidate, width, self.features.candidate_dense.num_tokens
            )
        )
        hidden = config.head_hidden or 2 * width
        self.heads = TaskHeads(*self.interaction.out, hidden, sizes.tasks, config.dropout)
        nn.init.normal_(self.action.weight, std=0.05)

    @property
    def can_extend(self) -> bool:
        """Sums take new events, and nothing counts from the newest."""
        return True

    def encode_user(self, user: UserInputs) -> UserState:
        """A sum a layer, of any history."""
        like = self.event.weight.new_zeros(len(user.mask_BL), self.config.width)
        layers = tuple(block.initial_state(like) for block in self.blocks)  # type: ignore[operator]
        return self._extend(layers, like, user)

    def extend_user(self, user_state: UserState, new_events: UserInputs) -> UserState:
        """Add new events to the sums."""
        return self._extend(user_state.layers, user_state.history_BD, new_events)

    def score(self, user_state: UserState, candidates: Candidates) -> Tensor:
        """Score candidates: each reads the sums and nothing of the others. logits_BCT."""
        tokens = self.features.candidates(candidates)
        rows = tokens[:, :, 0] + self.action.weight[-1]
        for block, layer in zip(self.blocks, user_state.layers, strict=True):
            rows = block.read(rows, layer)  # type: ignore[operator]
        own = torch.cat([self.norm(rows)[:, :, None], tokens], dim=2)
        request = torch.cat([user_state.request_BRD, user_state.history_BD[:, None]], dim=1)
        logits: Tensor = self.heads(*self.interaction(request, own))
        return logits

    def _extend(self, layers: tuple[State, ...], history_BD: Tensor, user: UserInputs) -> UserState:
        request = self.features.request(user)
        mask = user.mask_BL
        if not mask.shape[1]:
            return UserState(layers, history_BD, request)
        numbers = torch.cat([self.features.events(user), user.gap_BL[..., None]], dim=-1)
        rows = self.features.item(user.item_BL) + self.action(user.action_BL) + self.event(numbers)
        # Nothing here divides by the number of rows read.
        place = Place(mask.cumsum(1))
        after = []
        for block, layer in zip(self.blocks, layers, strict=True):
            rows, state = block.extend(rows, layer, mask, place)  # type: ignore[operator]
            after.append(state)
        # Real rows stand first; a user without new events keeps the old vector.
        number = mask.sum(1)
        last = (number - 1).clamp(min=0)
        newest = self.norm(rows)[torch.arange(len(mask), device=mask.device), last]
        history = torch.where((number > 0)[:, None], newest, history_BD)
        return UserState(tuple(after), history, request)
