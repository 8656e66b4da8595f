"""VISTA's stage 1: a user's events → summary tokens, by one of three kinds of layers.

Source and notation: `models/vista.py`. Every kind makes the same of whole histories and of chunks of any size; the
streaming one, which is ours, also takes new events into what it holds of a history.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from modeling.inputs.batch import UserInputs
from modeling.layers.attention import HistoryAttentionLayer
from modeling.layers.codes import ItemRows
from modeling.layers.features import EventInputs, FeatureTokens
from modeling.layers.host import maybe_any
from modeling.layers.quasi_linear import QuasiLinearLayer, Stream
from modeling.models.base import Stage1

# Buckets of the logarithm of an event's age, half a unit each
AGE_BUCKETS = 16
# One for each layer
Streams = tuple[Stream, ...]
NO_CHUNK = "summarise got no chunk; an empty history is one chunk without events"


@dataclass(frozen=True)
class Config:
    """Configuration of both stages. The paper's stage 1 by default; `causal` with target seeds makes states that can be
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
    # Events of a block in the streaming form
    block: int = 32
    # Divide by N inside the outer activation; False is the paper's literal formula
    divide: bool = True
    # Weight of the loss
    reconstruction: float = 1.0
    # Newest events that the decoder reads
    reconstructed: int = 128
    interaction: Literal["cross", "dot"] = "cross"
    cross_layers: int = 2
    cross_rank: int = 0
    # None: twice the width
    head_hidden: int | None = None
    dropout: float = 0.0
    # Keys and queries of unit length where candidates read tokens (`layers/matching.py`)
    matching: bool = True
    # Stage 2 alone: tokens come from a store, made by another model, and there is no stage 1
    stored: bool = False


class EventRows(nn.Module):
    """Embedded events: their item, action and features, and when they happened.

    Args:
        gaps: time is the gap before an event, which no later request changes, and not its age.
    """

    def __init__(
        self, item: ItemRows, inputs: EventInputs, num_actions: int, *, gaps: bool
    ) -> None:
        super().__init__()
        width = item.width
        self.gaps = gaps
        self.item = item
        self.inputs = inputs
        self.action = nn.Embedding(num_actions, width)
        # Event features and time
        self.numbers = nn.Linear(inputs.size + 1, width)
        self.age = nn.Embedding(AGE_BUCKETS, width)
        for table in (self.action, self.age):
            nn.init.normal_(table.weight, std=0.05)

    def forward(self, user: UserInputs) -> Tensor:
        """B × L × D."""
        time = user.gap_BL if self.gaps else user.age_BL
        numbers = torch.cat([self.inputs(user), time[..., None]], dim=-1)
        bucket = (2 * time).long().clamp(0, AGE_BUCKETS - 1)
        rows: Tensor = (
            self.item(user.item_BL)
            + self.action(user.action_BL)
            + self.numbers(numbers)
            + self.age(bucket)
        )
        return rows


class SeedStage1(Stage1):
    """What the kinds share: embedded events, seeds, and layers that both go through.

    Args:
        features: of the ranker; its item embeddings and event inputs are registered here.
    """

    def __init__(
        self, config: Config, features: FeatureTokens, layers: Iterable[nn.Module]
    ) -> None:
        super().__init__()
        self.config = config
        item = features.item
        inputs = features.events
        features.hand_over("item", "events")
        self.rows = EventRows(item, inputs, features.sizes.actions, gaps=config.causal)
        self.seeds = nn.Parameter(torch.randn(config.num_seeds, config.width) * 0.5)
        self.layers = nn.ModuleList(layers)
        self.norm = nn.LayerNorm(config.width, eps=1e-5)

    @property
    def token_shape(self) -> tuple[int, int]:
        """S, D."""
        return self.config.num_seeds, self.config.width

    @property
    def token_config(self) -> dict[str, Any]:
        """Return the config of the layers."""
        names = ("num_heads", "attention", "seed_role", "causal", "block", "divide")
        return {name: getattr(self.config, name) for name in names}

    def _seeds_for(self, batch: int) -> Tensor:
        """B × S × D."""
        return self.seeds.expand(batch, -1, -1)

    def _tokens(self, seeds_BSD: Tensor) -> Tensor:
        tokens: Tensor = self.norm(seeds_BSD)
        return tokens


class SoftmaxStage1(SeedStage1):
    """Softmax: sources read sources, targets read sources and themselves. It reads every pair of events, and has
    no summary in chunks.
    """

    def __init__(self, config: Config, features: FeatureTokens) -> None:
        layer = (config.width, config.num_heads, config.dropout)
        super().__init__(
            config, features, (HistoryAttentionLayer(*layer) for _ in range(config.summary_layers))
        )

    def forward(self, user: UserInputs) -> Tensor:
        """Tokens of whole histories, B × S × D."""
        rows = self.rows(user)
        seeds = self._seeds_for(len(rows))
        through = self._beside if self.config.seed_role == "target" else self._together
        layers = cast(list[HistoryAttentionLayer], list(self.layers))
        for number, layer in enumerate(layers):
            last = number + 1 == len(layers)
            rows, seeds = through(layer, rows, seeds, user.mask_BL, last)
        return self._tokens(seeds)

    def summarise(self, chunks: Callable[[], Iterable[UserInputs]]) -> Tensor:
        raise ValueError("softmax reads every pair of events and has no summary in parts")

    @staticmethod
    def _beside(
        layer: HistoryAttentionLayer, rows: Tensor, seeds: Tensor, mask: Tensor, last: bool
    ) -> tuple[Tensor, Tensor]:
        """Seeds read the events, and no event reads a seed."""
        keys, values = layer.keys_values(rows)
        seeds = layer.read_with_own(seeds, keys, values, mask)
        return (rows if last else layer(rows, keys, values, mask[:, None])), seeds

    @staticmethod
    def _together(
        layer: HistoryAttentionLayer, rows: Tensor, seeds: Tensor, mask: Tensor, last: bool
    ) -> tuple[Tensor, Tensor]:
        """Seeds and events read one another."""
        every = torch.cat([seeds, rows], dim=1)
        visible = torch.cat([torch.ones_like(seeds[..., 0], dtype=torch.bool), mask], dim=1)
        number = seeds.shape[1]
        keys, values = layer.keys_values(every)
        every = layer(every[:, :number] if last else every, keys, values, visible[:, None])
        return every[:, number:], every[:, :number]


class QuasiLinearStage1(SeedStage1):
    """Quasi-linear units: a layer is one matrix of all events, and rows go through it."""

    def __init__(self, config: Config, features: FeatureTokens) -> None:
        super().__init__(
            config,
            features,
            (
                QuasiLinearLayer(
                    config.width,
                    config.num_heads,
                    dropout=config.dropout,
                    divide=config.divide,
                    block=config.block,
                )
                for _ in range(config.summary_layers)
            ),
        )

    @property
    def _units(self) -> list[QuasiLinearLayer]:
        return cast(list[QuasiLinearLayer], list(self.layers))

    def forward(self, user: UserInputs) -> Tensor:
        """Tokens of whole histories, B × S × D."""
        rows = self.rows(user)
        seeds = self._seeds_for(len(rows))
        for number, layer in enumerate(self._units):
            seeds, matrix = self._through(layer, seeds, *layer.sums(rows, user.mask_BL))
            if number + 1 < len(self.layers):
                rows = layer(rows, matrix, target=False)
        return self._tokens(seeds)

    @torch.no_grad()
    def summarise(self, chunks: Callable[[], Iterable[UserInputs]]) -> Tensor:
        """Tokens of histories of any length, in the memory of one chunk: the same as of the whole at once.

        A layer's sums want every event, so layer l reads the chunks once more and takes them
        through the l layers before it, whose matrices are known by then.

        Args:
            chunks: an iteration over parts of the same users' events, oldest first; called once for
                each layer.

        Raises:
            ValueError: there is no chunk.
        """
        matrices: list[Tensor] = []
        seeds: Tensor | None = None
        for layer in self._units:
            sums = None
            for chunk in chunks():
                rows = self.rows(chunk)
                for before, matrix in zip(self._units, matrices, strict=False):
                    rows = before(rows, matrix, target=False)
                part = layer.sums(rows, chunk.mask_BL)
                sums = part if sums is None else (sums[0] + part[0], sums[1] + part[1])
            if sums is None:
                raise ValueError(NO_CHUNK)
            seeds = self._seeds_for(len(sums[1])) if seeds is None else seeds
            seeds, matrix = self._through(layer, seeds, *sums)
            matrices.append(matrix)
        assert seeds is not None
        return self._tokens(seeds)

    def _through(
        self, layer: QuasiLinearLayer, seeds: Tensor, total: Tensor, count: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Seeds after a layer, and the layer's matrix; as source rows they are in its sums as well."""
        target = self.config.seed_role == "target"
        if not target:
            more, number = layer.sums(seeds, torch.ones_like(seeds[..., 0], dtype=torch.bool))
            total = total + more
            count = count + number
        matrix = layer.matrix(total, count)
        return layer(seeds, matrix, target=target), matrix


class StreamingStage1(QuasiLinearStage1):
    """Quasi-linear units whose events read the blocks before their own: a layer's sums take new events."""

    @property
    def streams(self) -> bool:
        return True

    @property
    def piece(self) -> int:
        return self.config.block

    @property
    def stream_shape(self) -> tuple[int, int]:
        size = self.config.width // self.config.num_heads
        return self.config.summary_layers * 2 * self.config.num_heads * size, size

    def forward(self, user: UserInputs) -> Tensor:
        """Tokens of whole histories, B × S × D."""
        return self.advance(self.start(len(user.item_BL)), user, fresh=True)[0]

    def summarise(self, chunks: Callable[[], Iterable[UserInputs]]) -> Tensor:
        """Tokens of histories of any length; `chunks` is called once.

        Raises:
            ValueError: there is no chunk.
        """
        return self.stream(chunks())[0]

    @torch.no_grad()
    def stream(
        self, chunks: Iterable[UserInputs], streams: Streams | None = None
    ) -> tuple[Tensor, Streams]:
        """Tokens after chunks of any number of events, and the streams behind them.

        Args:
            chunks: parts of the same users' events, oldest first.
            streams: of the events before; default: there were none.

        Raises:
            ValueError: there is no chunk.
        """
        held: UserInputs | None = None
        for chunk in chunks:
            streams = self.start(len(chunk.item_BL)) if streams is None else streams
            if held is not None:
                streams = self._take(streams, held)
            held = chunk
        if streams is None or held is None:
            raise ValueError(NO_CHUNK)
        return self.advance(streams, held)

    def start(self, batch: int) -> Streams:
        """Return the streams of users without events."""
        return tuple(layer.start(batch, self.seeds) for layer in self._units)

    def advance(
        self, streams: Streams, user: UserInputs, *, fresh: bool = False
    ) -> tuple[Tensor, Streams]:
        """Tokens behind the user's events, and the streams: in one pass where the events fit into
        the current block.

        Args:
            fresh: the streams are those of `start`.
        """
        mask = user.mask_BL
        beyond = mask.shape[1] > self.config.block
        if beyond or (not fresh and maybe_any(streams[0].filled + mask.sum(1) > self.config.block)):
            streams = self._take(streams, user, fresh=fresh)
            return self._read(streams), streams
        rows = self.rows(user)
        seeds = self._seeds_for(len(mask))
        found = list(streams)
        for number, layer in enumerate(self._units):
            rows, seeds, found[number] = layer.advance_and_read(rows, mask, seeds, found[number])
        return self._tokens(seeds), tuple(found)

    def stored_streams(self, streams: Streams) -> Tensor:
        """Return the part of streams that has to be stored, B × rows × K: both sums of every layer; counts follow
        from the events' number.
        """
        sums = [total for stream in streams for total in (stream.total, stream.block_total)]
        return torch.stack(sums, dim=1).flatten(1, 3)

    def restored_streams(self, stored_BRK: Tensor, num_events_B: Tensor) -> Streams:
        """The streams behind `stored_streams`, after so many events.

        Raises:
            ValueError: the rows are not those of this configuration.
        """
        self._refuse_another_shape(stored_BRK)
        heads = self.config.num_heads
        filled = num_events_B % self.config.block
        parts = stored_BRK.unflatten(1, (len(self.layers), 2, heads, self.config.width // heads))
        return tuple(
            Stream(
                parts[:, layer, 0], num_events_B, parts[:, layer, 1], num_events_B - filled, filled
            )
            for layer in range(len(self.layers))
        )

    def _take(self, streams: Streams, user: UserInputs, *, fresh: bool = False) -> Streams:
        """Every layer's stream behind the user's events: all at once from the beginning of a block,
        else block by block.
        """
        found = list(streams)
        if fresh or not maybe_any(streams[0].filled):
            rows = self.rows(user)
            for number, layer in enumerate(self._units):
                rows, found[number] = layer.advance_blocks(rows, user.mask_BL, found[number])
            return tuple(found)
        for start in range(0, user.mask_BL.shape[1], self.config.block):
            part = user.events(start, start + self.config.block)
            rows = self.rows(part)
            for number, layer in enumerate(self._units):
                rows, found[number] = layer.advance(rows, part.mask_BL, found[number])
        return tuple(found)

    def _read(self, streams: Streams) -> Tensor:
        """Seeds read all events so far."""
        seeds = self._seeds_for(len(streams[0].number))
        for layer, stream in zip(self._units, streams, strict=True):
            seeds, _ = self._through(layer, seeds, stream.total, stream.number)
        return self._tokens(seeds)


def stage_1_of(config: Config, features: FeatureTokens) -> SeedStage1:
    """Make the stage 1 that a config asks for."""
    if config.attention == "softmax":
        return SoftmaxStage1(config, features)
    return (StreamingStage1 if config.causal else QuasiLinearStage1)(config, features)
