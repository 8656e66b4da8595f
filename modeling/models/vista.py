"""VISTA: a user's whole history in a few summary tokens; candidates attend to the tokens.

Source: Chen, Wang, Guan et al., "Massive Memorization with Hundreds of Trillions of Parameters for
Sequential Transducer Generative Recommenders", arXiv 2510.22049.

| paper | here |
|---|---|
| UIH, n events | `UserInputs`, n ≤ L; or chunks of any number of events (`summarise`) |
| seeds, k of them | `seeds`, S |
| stage 1: QLU, SGLU | `layers/quasi_linear.py` |
| personalised seed embeddings | `tokens_BSD`, the summary tokens |
| generative reconstruction loss | `reconstruction_loss`, in training only |
| stage 2: target-aware attention | candidates read tokens and themselves |

Differs, where the paper is silent: seeds are source rows, or target rows (`seed_role`); an event
knows when it happened (age, or in the streaming form the gap before it); targets of the
reconstruction carry no gradient, and its mean is taken over events and width, so that a weight of 1
means the same at any size; tokens attend to tokens, never to candidates; what a candidate read goes
to the same cross layers and heads as the amortised DLRM's. SGLU is twice the width, and stage 1's
RMSNorms have gains (TransNormerLLM, which the gate is from, has none); stage 2 is of pre-norm layers
with LayerNorm and a GELU feed-forward of twice the width.

Ours: `causal=True` streams. Events read the blocks before their own; each layer's state has a fixed
size; `extend_user` is exact at a cost that does not depend on the history.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from modeling.inputs.batch import Batch, Candidates, FeatureSizes, UserInputs
from modeling.layers.attention import HistoryAttentionLayer, causal_mask
from modeling.layers.features import FeatureTokens
from modeling.layers.interaction import CrossNetwork, Interaction, ReadDotInteraction, TaskHeads
from modeling.layers.quasi_linear import QuasiLinearLayer, Stream
from modeling.layers.stored_tokens import StoredTokens
from modeling.models.base import CannotExtendError, TokenMaker

AGE_BUCKETS = 16  # of the logarithm of an event's age, half a unit each


@dataclass(frozen=True)
class Config:
    """The paper's stage 1 by default; `causal` with target seeds makes states that can be
    extended.
    """

    width: int = 64
    num_heads: int = 4
    num_seeds: int = 128
    summary_layers: int = 3  # stage 1
    ranking_layers: int = 3  # stage 2
    attention: Literal["quasi_linear", "softmax"] = "quasi_linear"  # of stage 1
    seed_role: Literal["source", "target"] = "source"
    causal: bool = False
    block: int = 32  # events of a block in the streaming form
    divide: bool = True  # by N inside the outer activation; False is the paper's literal formula
    reconstruction: float = 1.0  # weight of the loss
    reconstructed: int = 128  # newest events that the decoder reads
    interaction: Literal["cross", "dot"] = "cross"
    cross_layers: int = 2
    cross_rank: int = 0
    head_hidden: int | None = None  # None: twice the width
    dropout: float = 0.0
    stored: bool = False  # stage 2 alone: tokens come from a store, made by another model, and there is no stage 1


STAGE_1 = (
    "features.item.",
    "features.events.",
    "action.",
    "event.",
    "age.",
    "seeds",
    "summary.",
    "token_norm.",
)


@dataclass(frozen=True)
class UserState:
    """Summary tokens, what stage 2 reads of them, the request's fields; and the streams, where they
    can be extended.
    """

    tokens_BSD: Tensor
    keys: tuple[Tensor, ...]  # ranking_layers × (B × H × S × K)
    values: tuple[Tensor, ...]
    request_BRD: Tensor
    streams: tuple[Stream, ...] = ()


class VISTA(TokenMaker):
    """See the module docstring.

    ```
    events ─┐
    seeds ──┴► stage 1 ──► summary tokens ──► stage 2's keys, values ─┐ once per request, or from a store
    candidate ─► item embedding ──────────────► stage 2, reading ─────┴► read_BCD ─┐
    item, categories, dense, user, context ────────────────────────────────────────┴► cross layers ─► heads ─► logits
    ```
    """

    def __init__(self, config: Config, sizes: FeatureSizes) -> None:
        super().__init__()
        if config.causal and (config.seed_role == "source" or config.attention == "softmax"):
            raise ValueError(
                "causal=True wants seed_role='target' and attention='quasi_linear': a seed that events read changes them "
                "with every new event, and softmax keeps no state of a fixed size"
            )
        self.config = config
        self.sizes = sizes
        width = config.width
        heads = config.num_heads
        self.features = FeatureTokens(sizes, width, bags=False)
        self.action = nn.Embedding(
            sizes.actions + 1, width
        )  # the last one: unknown, for candidates
        self.event = nn.Linear(self.features.events.size + 1, width)  # event features and time
        self.age = nn.Embedding(AGE_BUCKETS, width)
        self.seeds = nn.Parameter(torch.randn(config.num_seeds, width) * 0.5)
        if config.stored and (config.causal or config.reconstruction):
            raise ValueError(
                "stored=True has no stage 1: it wants causal=False and reconstruction=0"
            )
        if config.stored != bool(sizes.tokens[0]):
            raise ValueError(
                f"stored={config.stored} does not go with stored tokens of shape {sizes.tokens}"
            )
        self.stored = StoredTokens(sizes, width) if config.stored else None
        # Stage 1: events and seeds through layers, to tokens.
        self.summary = nn.ModuleList(
            HistoryAttentionLayer(width, heads, config.dropout)
            if config.attention == "softmax"
            else QuasiLinearLayer(
                width, heads, dropout=config.dropout, divide=config.divide, block=config.block
            )
            for _ in range(0 if config.stored else config.summary_layers)
        )
        self.token_norm, self.read_norm = (nn.LayerNorm(width, eps=1e-5) for _ in range(2))
        self.decoder = (
            None if config.stored else HistoryAttentionLayer(width, heads, config.dropout)
        )
        # Stage 2: candidates read tokens, then meet all other features.
        self.ranking = nn.ModuleList(
            HistoryAttentionLayer(width, heads, config.dropout)
            for _ in range(config.ranking_layers)
        )
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
        for table in (self.action, self.age):
            nn.init.normal_(table.weight, std=0.05)

    @property
    def can_extend(self) -> bool:
        """Streams can."""
        return self.config.causal

    @property
    def token_shape(self) -> tuple[int, int] | None:
        """S, D; None where there is no stage 1."""
        return None if self.config.stored else (self.config.num_seeds, self.config.width)

    @staticmethod
    def streams_with(config: Config) -> bool:
        """True if events read only earlier ones."""
        return config.causal

    @property
    def piece(self) -> int:
        """Chunks begin where blocks do."""
        return self.config.block if self.streams else 1

    @property
    def stream_shape(self) -> tuple[int, int]:
        """Both sums of every layer."""
        size = self.config.width // self.config.num_heads
        rows = self.config.summary_layers * 2 * self.config.num_heads * size
        return (rows, size) if self.streams else (0, 0)

    @property
    def token_config(self) -> dict[str, Any]:
        """Return the config of stage 1's layers."""
        names = ("num_heads", "attention", "seed_role", "causal", "block", "divide")
        return {name: getattr(self.config, name) for name in names}

    def stage_1(self) -> dict[str, Tensor]:
        """All weights that summary tokens depend on, by name."""
        return {
            name: value for name, value in self.state_dict().items() if name.startswith(STAGE_1)
        }

    def encode_user(self, user: UserInputs) -> UserState:
        """Stage 1, and what stage 2 reads of its tokens. A user's tokens from a store, where given,
        stand for stage 1.
        """
        if self.stored is not None:
            return self.state_of(self.stored(user), user)
        if user.tokens_BSX is not None and user.has_tokens_B is not None:
            has = user.has_tokens_B
            tokens = user.tokens_BSX
            if not bool(has.all()):
                fresh = self.encode_user(
                    replace(user, tokens_BSX=None, has_tokens_B=None)
                ).tokens_BSD
                tokens = torch.where(has[:, None, None], tokens, fresh)
            return self.state_of(tokens, user)
        if self.config.causal:
            return self._advance(self._started(len(user.item_BL)), user)
        return self.state_of(self.tokens_of(user), user)

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
                "from the stored streams (modeling/bundle/summary.py)"
            )
        return self._advance(user_state.streams, new_events)

    def stored_streams(self, streams: tuple[Stream, ...]) -> Tensor:
        """Return the part of streams that has to be kept, B × rows × K: both sums of every layer; counts follow
        from the events' number.
        """
        sums = [total for stream in streams for total in (stream.total, stream.block_total)]
        return torch.stack(sums, dim=1).flatten(1, 3)

    def restored_streams(self, stored_BRK: Tensor, num_events_B: Tensor) -> tuple[Stream, ...]:
        """The streams behind `stored_streams`, after so many events.

        Raises:
            ValueError: the rows are not those of this configuration.
        """
        layers = len(self.summary)
        heads = self.config.num_heads
        size = self.config.width // heads
        if stored_BRK.shape[1:] != self.stream_shape:
            raise ValueError(
                f"stored streams have shape {tuple(stored_BRK.shape[1:])}, expected {self.stream_shape}"
            )
        filled = num_events_B % self.config.block
        parts = stored_BRK.unflatten(1, (layers, 2, heads, size))
        return tuple(
            Stream(
                parts[:, layer, 0], num_events_B, parts[:, layer, 1], num_events_B - filled, filled
            )
            for layer in range(layers)
        )

    def state_of(
        self, tokens_BSD: Tensor, user: UserInputs, streams: tuple[Stream, ...] = ()
    ) -> UserState:
        """The state of summary tokens, fresh or from a store; no event of `user` is read, only its
        fields.
        """
        rows = tokens_BSD
        keys = []
        values = []
        for number, layer in enumerate(self.ranking):
            key, value = layer.keys_values(rows)  # type: ignore[operator]
            keys.append(key)
            values.append(value)
            if number + 1 < len(self.ranking):
                rows = layer(rows, key, value, None)
        return UserState(
            tokens_BSD, tuple(keys), tuple(values), self.features.request(user), streams
        )

    def score(self, user_state: UserState, candidates: Candidates) -> Tensor:
        """Stage 2: each candidate reads the tokens and itself. logits_BCT."""
        tokens = self.features.candidates(candidates)
        rows = tokens[:, :, 0] + self.action.weight[-1]
        for layer, keys, values in zip(
            self.ranking, user_state.keys, user_state.values, strict=True
        ):
            rows = layer.read_with_own(rows, keys, values, None)  # type: ignore[operator]
        own = torch.cat([self.read_norm(rows)[:, :, None], tokens], dim=2)
        logits: Tensor = self.heads(*self.interaction(user_state.request_BRD, own))
        return logits

    def training_forward(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """Logits, and the reconstruction loss with its weight."""
        state = self.encode_user(batch.user)
        logits = self.score(state, batch.candidates)
        if not self.config.reconstruction:
            return logits, None
        return logits, self.config.reconstruction * self.reconstruction_loss(
            state.tokens_BSD, batch.user
        )

    def reconstruction_loss(self, tokens_BSD: Tensor, user: UserInputs) -> Tensor:
        """Mean squared error of each event's item embedding from the tokens and the events before
        it (section 4).
        """
        predicted, items, real = self.reconstruct(tokens_BSD, user)
        pairs = (real[:, 1:] & real[:, :-1])[..., None]
        error = (predicted[:, :-1] - items[:, 1:].detach()).square() * pairs
        return error.sum() / (pairs.sum().clamp(min=1) * items.shape[-1])

    def reconstruct(self, tokens_BSD: Tensor, user: UserInputs) -> tuple[Tensor, Tensor, Tensor]:
        """Predict the item after each event; with the item embeddings, and a mask of real events.

        All B × M (× D), M newest events; row i has read the tokens and the events up to i.
        """
        number = min(self.config.reconstructed, user.mask_BL.shape[1])
        length = user.mask_BL.sum(1, keepdim=True)
        index = (length - number).clamp(min=0) + torch.arange(number, device=length.device)
        real = index < length
        chosen = (
            user.item_BL.gather(1, index.clamp(max=user.mask_BL.shape[1] - 1))
            if number
            else user.item_BL
        )
        assert self.decoder is not None
        items = self.features.item(chosen)
        rows = torch.cat([tokens_BSD, items], dim=1)
        mask = torch.cat([torch.ones_like(tokens_BSD[..., 0], dtype=torch.bool), real], dim=1)
        predicted = self.decoder(
            rows, *self.decoder.keys_values(rows), causal_mask(mask, rows.shape[1])
        )
        return predicted[:, tokens_BSD.shape[1] :], items, real

    @torch.inference_mode()
    def summarise(self, chunks: Callable[[], Iterable[UserInputs]]) -> Tensor:
        """Summary tokens of histories of any length, in the memory of one chunk: the same as of the
        whole at once.

        A layer's sums want every event, so layer l reads the chunks once more and takes them
        through the l layers before it, whose matrices are known by then.

        Args:
            chunks: an iteration over parts of the same users' events, oldest first; called once for
                each layer, or once where `causal`.

        Returns:
            tokens_BSD.

        Raises:
            ValueError: stage 1 is softmax, or there is no chunk.
        """
        if self.config.attention == "softmax":
            raise ValueError("softmax reads every pair of events and has no summary in parts")
        if self.config.causal:
            return self.stream(chunks())[0]
        # Each round over the chunks gives one more layer its matrix.
        matrices: list[Tensor] = []
        seeds: Tensor | None = None
        for layer in self.summary:
            sums = None
            for chunk in chunks():
                rows = self._events(chunk)
                for before, matrix in zip(self.summary, matrices, strict=False):
                    rows = before(rows, matrix, target=False)
                part = layer.sums(rows, chunk.mask_BL)  # type: ignore[operator]
                sums = part if sums is None else (sums[0] + part[0], sums[1] + part[1])
            if sums is None:
                raise ValueError(
                    "summarise got no chunk; an empty history is one chunk without events"
                )
            seeds = self.seeds.expand(len(sums[1]), -1, -1) if seeds is None else seeds
            seeds, matrix = self._seeds_through(layer, seeds, *sums)
            matrices.append(matrix)
        assert seeds is not None
        tokens: Tensor = self.token_norm(seeds)
        return tokens

    @torch.inference_mode()
    def stream(
        self, chunks: Iterable[UserInputs], streams: tuple[Stream, ...] | None = None
    ) -> tuple[Tensor, tuple[Stream, ...]]:
        """Tokens after chunks of any number of events, and the streams behind them.

        Args:
            chunks: parts of the same users' events, oldest first.
            streams: of the events before; default: there were none.

        Raises:
            ValueError: there is no chunk.
        """
        held: UserInputs | None = None
        for chunk in chunks:
            streams = self._started(len(chunk.item_BL)) if streams is None else streams
            if held is not None:
                streams = self._through_streams(streams, held)
            held = chunk
        if streams is None or held is None:
            raise ValueError("summarise got no chunk; an empty history is one chunk without events")
        return self._through_and_read(streams, held)

    def _started(self, batch: int) -> tuple[Stream, ...]:
        """Streams of users without events."""
        return tuple(layer.start(batch, self.seeds) for layer in self.summary)  # type: ignore[operator]

    def tokens_of(self, user: UserInputs) -> Tensor:
        """Stage 1 alone, over whole histories: tokens_BSD. Reads events and nothing of the
        request.
        """
        if self.config.causal:
            return self._through_and_read(self._started(len(user.item_BL)), user)[0]
        rows = self._events(user)
        mask = user.mask_BL
        seeds = self.seeds.expand(len(rows), -1, -1)
        for index, layer in enumerate(self.summary):
            last = index + 1 == len(self.summary)
            if self.config.attention == "softmax":
                rows, seeds = self._softmax_layer(layer, rows, seeds, mask, last)
                continue
            seeds, matrix = self._seeds_through(layer, seeds, *layer.sums(rows, mask))  # type: ignore[operator]
            if not last:
                rows = layer(rows, matrix, target=False)
        tokens: Tensor = self.token_norm(seeds)
        return tokens

    def _seeds_through(
        self, layer: nn.Module, seeds: Tensor, total: Tensor, count: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Seeds after a layer, and the layer's matrix; as source rows they are in its sums as
        well.
        """
        target = self.config.seed_role == "target"
        if not target:
            more, number = layer.sums(seeds, torch.ones_like(seeds[..., 0], dtype=torch.bool))  # type: ignore[operator]
            total = total + more
            count = count + number
        matrix = layer.matrix(total, count)  # type: ignore[operator]
        return layer(seeds, matrix, target=target), matrix

    def _softmax_layer(
        self, layer: nn.Module, rows: Tensor, seeds: Tensor, mask: Tensor, last: bool
    ) -> tuple[Tensor, Tensor]:
        """The same roles with softmax: sources read sources, targets read sources and
        themselves.
        """
        if self.config.seed_role == "target":
            keys, values = layer.keys_values(rows)  # type: ignore[operator]
            seeds = layer.read_with_own(seeds, keys, values, mask)  # type: ignore[operator]
            return (rows if last else layer(rows, keys, values, mask[:, None])), seeds
        every = torch.cat([seeds, rows], dim=1)
        visible = torch.cat([torch.ones_like(seeds[..., 0], dtype=torch.bool), mask], dim=1)[
            :, None
        ]
        number = seeds.shape[1]
        keys, values = layer.keys_values(every)  # type: ignore[operator]
        every = layer(every[:, :number] if last else every, keys, values, visible)
        return every[:, number:], every[:, :number]

    def _advance(self, streams: tuple[Stream, ...], user: UserInputs) -> UserState:
        tokens, streams = self._through_and_read(streams, user)
        return self.state_of(tokens, user, streams)

    def _through_and_read(
        self, streams: tuple[Stream, ...], user: UserInputs
    ) -> tuple[Tensor, tuple[Stream, ...]]:
        """Tokens behind the user's events, and the streams: in one pass where the events fit into
        the current block.
        """
        mask = user.mask_BL
        if mask.shape[1] > self.config.block or bool(
            (streams[0].filled + mask.sum(1) > self.config.block).any()
        ):
            streams = self._through_streams(streams, user)
            return self._read_streams(streams), streams
        rows = self._events(user)
        seeds = self.seeds.expand(len(mask), -1, -1)
        found = list(streams)
        for number, layer in enumerate(self.summary):
            rows, seeds, found[number] = layer.advance_and_read(rows, mask, seeds, found[number])  # type: ignore[operator]
        tokens: Tensor = self.token_norm(seeds)
        return tokens, tuple(found)

    def _through_streams(self, streams: tuple[Stream, ...], user: UserInputs) -> tuple[Stream, ...]:
        """Every layer's stream behind the user's events: all at once from the beginning of a block,
        else block by block.
        """
        found = list(streams)
        if not bool(streams[0].filled.any()):
            rows = self._events(user)
            for number, layer in enumerate(self.summary):
                rows, found[number] = layer.advance_blocks(rows, user.mask_BL, found[number])  # type: ignore[operator]
            return tuple(found)
        for start in range(0, user.mask_BL.shape[1], self.config.block):
            part = user.events(start, start + self.config.block)
            rows = self._events(part)
            for number, layer in enumerate(self.summary):
                rows, found[number] = layer.advance(rows, part.mask_BL, found[number])  # type: ignore[operator]
        return tuple(found)

    def _read_streams(self, streams: tuple[Stream, ...]) -> Tensor:
        """Seeds read all events so far."""
        seeds = self.seeds.expand(len(streams[0].number), -1, -1)
        for layer, stream in zip(self.summary, streams, strict=True):
            seeds, _ = self._seeds_through(layer, seeds, stream.total, stream.number)
        tokens: Tensor = self.token_norm(seeds)
        return tokens

    def _events(self, user: UserInputs) -> Tensor:
        """Embedded events, B × L × D. Streams know the gap before an event, which no later request
        changes.
        """
        time = user.gap_BL if self.config.causal else user.age_BL
        numbers = torch.cat([self.features.events(user), time[..., None]], dim=-1)
        bucket = (2 * time).long().clamp(0, AGE_BUCKETS - 1)
        return (
            self.features.item(user.item_BL)
            + self.action(user.action_BL)
            + self.event(numbers)
            + self.age(bucket)
        )
