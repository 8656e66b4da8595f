"""VISTA: a user's whole history in a few summary tokens; candidates attend to the tokens.

Source: Chen, Wang, Guan et al., "Massive Memorization with Hundreds of Trillions of Parameters for
Sequential Transducer Generative Recommenders", arXiv 2510.22049.

| paper | here |
|---|---|
| UIH, n events | `UserInputs`, n ≤ L; or chunks of any number of events (`Stage1.summarise`) |
| seeds, k of them | `seeds`, S |
| stage 1: QLU, SGLU | `vista_stage_1.py`, `layers/quasi_linear.py` |
| personalised seed embeddings | `tokens_BSD`, the summary tokens |
| generative reconstruction loss | `reconstruction_loss`, in training only |
| stage 2: target-aware attention | candidates read tokens and themselves |

Differs, where the paper is silent: seeds are source rows, or target rows (`seed_role`); an event
knows when it happened (age, or in the streaming form the gap before it); targets of the
reconstruction carry no gradient, and its error is a share of their own square, so that a weight of 1
means the same at any size; items are codes and stage 2 finds like rows (`layers/codes.py`,
`layers/matching.py`); tokens attend to tokens, never to candidates; what a candidate read goes
to the same cross layers and heads as the amortised DLRM's. SGLU is twice the width, and stage 1's
RMSNorms have gains (TransNormerLLM, which the gate is from, has none); stage 2 is of pre-norm layers
with LayerNorm and a GELU feed-forward of twice the width.

Ours: `causal=True` streams. Events read the blocks before their own; each layer's state has a fixed
size; `extend_user` is exact at a cost that does not depend on the history. It is trained on the newest events, and served
as tokens of all, which `evaluate` reads too.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor, nn

from modeling.inputs.batch import Batch, Candidates, FeatureSizes, UserInputs
from modeling.layers.attention import HistoryAttentionLayer, causal_mask
from modeling.layers.codes import ItemRows
from modeling.layers.features import FeatureTokens
from modeling.layers.interaction import CrossNetwork, Interaction, ReadDotInteraction, TaskHeads
from modeling.layers.stored_tokens import StoredTokens
from modeling.models.base import CannotExtendError, TokenMaker
from modeling.models.vista_stage_1 import (
    Config,
    SeedStage1,
    StreamingStage1,
    Streams,
    stage_1_of,
)


@dataclass(frozen=True)
class UserState:
    """Summary tokens, what stage 2 reads of them, the request's fields; and the streams, where they
    can be extended.
    """

    tokens_BSD: Tensor
    # ranking_layers × (B × H × S × K)
    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    request_BRD: Tensor
    streams: Streams = ()


class VISTA(TokenMaker):
    """See the module docstring.

    ```
    events ─┐
    seeds ──┴► stage 1 ──► summary tokens ──► stage 2's keys, values ─┐ once per request, or from a store
    candidate ─► item embedding ──────────────► stage 2, reading ─────┴► read_BCD ─┐
    item, categories, dense, user, context ────────────────────────────────────────┴► cross layers ─► heads ─► logits
    ```
    """

    stage_1: SeedStage1 | None

    def __init__(self, config: Config, sizes: FeatureSizes) -> None:
        super().__init__()
        # 1. Refuse configurations that contradict one another.
        if config.causal and (config.seed_role == "source" or config.attention == "softmax"):
            raise ValueError(
                "causal=True wants seed_role='target' and attention='quasi_linear': a seed that events read changes them "
                "with every new event, and softmax keeps no state of a fixed size"
            )
        if config.stored and (config.causal or config.reconstruction):
            raise ValueError(
                "stored=True has no stage 1: it wants causal=False and reconstruction=0"
            )
        if config.stored != bool(sizes.tokens[0]):
            raise ValueError(
                f"stored={config.stored} does not go with stored tokens of shape {sizes.tokens}"
            )
        # 2. Stage 1 and its decoder, unless tokens come from a store.
        self.config = config
        self.sizes = sizes
        width = config.width
        self.features = FeatureTokens(sizes, width, bags=False)
        self.stored = StoredTokens(sizes, width) if config.stored else None
        self.stage_1 = None if config.stored else stage_1_of(config, self.features)
        self.decoder = None if config.stored else Decoder(config)
        # 3. Stage 2, the interaction and the heads.
        self.stage_2 = Stage2(config)
        # What candidates read meets all other features.
        num_candidate = 1 + self.features.num_candidate
        width_of = (self.features.num_request, num_candidate, width)
        self.interaction: Interaction = (
            CrossNetwork(*width_of, config.cross_layers, config.cross_rank)
            if config.interaction == "cross"
            else ReadDotInteraction(*width_of, self.features.candidate_dense.num_tokens)
        )
        hidden = config.head_hidden or 2 * width
        self.heads = TaskHeads(*self.interaction.out, hidden, sizes.tasks, config.dropout)

    @property
    def can_extend(self) -> bool:
        return self.config.causal

    @staticmethod
    def streams_with(config: Config) -> bool:
        """True if events read only earlier ones."""
        return config.causal

    def encode_user(self, user: UserInputs) -> UserState:
        """Stage 1, and what stage 2 reads of its tokens. A user's tokens from a store, where given,
        stand for stage 1.
        """
        if self.stored is not None:
            return self.state_of(self.stored(user), user)
        if (tokens := user.tokens_BSX) is not None:
            if (has := user.has_tokens_B) is not None:
                unstored = replace(user, tokens_BSX=None, has_tokens_B=None)
                tokens = torch.where(
                    has[:, None, None], tokens, self.encode_user(unstored).tokens_BSD
                )
            return self.state_of(tokens, user)
        if isinstance(self.stage_1, StreamingStage1):
            return self._advance(self.stage_1.start(len(user.item_BL)), user, fresh=True)
        assert self.stage_1 is not None
        return self.state_of(self.stage_1(user), user)

    def extend_user(self, user_state: UserState, new_events: UserInputs) -> UserState:
        """The streams take the new events; seeds read them anew."""
        if not self.can_extend:
            raise CannotExtendError(
                "every event reads every other in this configuration. Encode the user again, or train with causal=True and "
                "seed_role='target'"
            )
        if not user_state.streams:
            raise CannotExtendError(
                "this state was made of stored tokens, which do not say what the streams hold. Encode the user again, or go on "
                "from the stored streams (modeling/summaries/summariser.py)"
            )
        return self._advance(user_state.streams, new_events)

    def _advance(self, streams: Streams, user: UserInputs, *, fresh: bool = False) -> UserState:
        assert isinstance(self.stage_1, StreamingStage1)
        tokens, streams = self.stage_1.advance(streams, user, fresh=fresh)
        return self.state_of(tokens, user, streams)

    def state_of(self, tokens_BSD: Tensor, user: UserInputs, streams: Streams = ()) -> UserState:
        """The state of summary tokens, fresh or from a store; no event of `user` is read, only its
        fields.
        """
        keys, values = self.stage_2.keys_values(tokens_BSD)
        return UserState(tokens_BSD, keys, values, self.features.request(user), streams)

    def score(self, user_state: UserState, candidates: Candidates) -> Tensor:
        """Stage 2: each candidate reads the tokens and itself. logits_BCT."""
        tokens = self.features.candidates(candidates)
        read = self.stage_2(tokens[:, :, 0], user_state.keys, user_state.values)
        own = torch.cat([read[:, :, None], tokens], dim=2)
        logits: Tensor = self.heads(*self.interaction(user_state.request_BRD, own))
        return logits

    def training_forward(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """Logits, and the reconstruction loss with its weight."""
        state = self.encode_user(batch.user)
        logits = self.score(state, batch.candidates)
        if not self.config.reconstruction:
            return logits, None
        loss = self.reconstruction_loss(state.tokens_BSD, batch.user)
        return logits, self.config.reconstruction * loss

    def reconstruction_loss(self, tokens_BSD: Tensor, user: UserInputs) -> Tensor:
        """Squared error of each event's item embedding from the tokens and the events before it (section 4), as a
        share of the embedding's own square.
        """
        assert self.decoder is not None
        found = self.decoder(tokens_BSD, user, self.features.item)
        pairs = (found.real_BM[:, 1:] & found.real_BM[:, :-1])[..., None]
        error = (found.predicted_BMD[:, :-1] - found.items_BMD[:, 1:].detach()).square() * pairs
        # Of the size of a row, which is learned
        whole = found.items_BMD[:, 1:].detach().square() * pairs
        return error.sum() / whole.sum().clamp(min=1)


class Stage2(nn.Module):
    """Candidates read summary tokens: what tokens are to each layer is computed once for all candidates."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            HistoryAttentionLayer(
                config.width, config.num_heads, config.dropout, matching=config.matching
            )
            for _ in range(config.ranking_layers)
        )
        # Nothing was done yet
        self.action = nn.Parameter(torch.randn(config.width) * 0.05)
        self.norm = nn.LayerNorm(config.width, eps=1e-5)

    @property
    def _attention(self) -> list[HistoryAttentionLayer]:
        return cast(list[HistoryAttentionLayer], list(self.layers))

    def keys_values(self, tokens_BSD: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Keys and values of the tokens in every layer, each B × H × S × K."""
        rows = tokens_BSD
        keys = []
        values = []
        for number, layer in enumerate(self._attention):
            key, value = layer.keys_values(rows)
            keys.append(key)
            values.append(value)
            if number + 1 < len(self.layers):
                rows = layer(rows, key, value, None)
        return tuple(keys), tuple(values)

    def forward(
        self, items_BCD: Tensor, keys: tuple[Tensor, ...], values: tuple[Tensor, ...]
    ) -> Tensor:
        """What candidates have read, B × C × D."""
        rows = items_BCD + self.action
        for layer, key, value in zip(self._attention, keys, values, strict=True):
            rows = layer.read_with_own(rows, key, value, None)
        read: Tensor = self.norm(rows)
        return read


@dataclass(frozen=True)
class Reconstructed:
    """The newest M events, read back from tokens.

    Args:
        predicted_BMD: row i is the item after event i, from the tokens and the events up to i.
        items_BMD: embeddings of the events' items.
        real_BM: which are events, and not padding.
    """

    predicted_BMD: Tensor
    items_BMD: Tensor
    real_BM: Tensor


class Decoder(nn.Module):
    """Predicts each event's item from the tokens and the events before it, in training."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.most = config.reconstructed
        self.layer = HistoryAttentionLayer(
            config.width, config.num_heads, config.dropout, matching=config.matching
        )

    def forward(self, tokens_BSD: Tensor, user: UserInputs, item: ItemRows) -> Reconstructed:
        number = min(self.most, user.mask_BL.shape[1])
        length = user.mask_BL.sum(1, keepdim=True)
        index = (length - number).clamp(min=0) + torch.arange(number, device=length.device)
        real = index < length
        chosen = (
            user.item_BL.gather(1, index.clamp(max=user.mask_BL.shape[1] - 1))
            if number
            else user.item_BL
        )
        items = item(chosen)
        rows = torch.cat([tokens_BSD, items], dim=1)
        mask = torch.cat([torch.ones_like(tokens_BSD[..., 0], dtype=torch.bool), real], dim=1)
        causal = causal_mask(mask, rows.shape[1])
        predicted = self.layer(rows, *self.layer.keys_values(rows), causal)
        return Reconstructed(predicted[:, tokens_BSD.shape[1] :], items, real)
