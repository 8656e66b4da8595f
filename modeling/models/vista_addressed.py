"""VISTA whose summary tokens are slots that items address: a whole history in a few tokens that keep
*which* items it held, how often and how lately.

Source: VISTA (arXiv 2510.22049) for the two stages: seeds shared by all users condense a history
into tokens that a store keeps, and candidates read the tokens alone. Stage 1 is ours
(`layers/addressed.py`).

| paper | here |
|---|---|
| seeds, shared by all users | `stage_1.memory.keys`, A slots; each is kept for H half-lives; `stage_1.pairs.keys`, F more |
| personalised seed embeddings | S = A · H + F tokens: a slot's mean code, and the logarithm of its mass |
| stage 2: attention of a candidate to the tokens | attention over slots, by the candidate's address |

Differs: in the paper nothing binds a seed to which item it keeps, and its sums weigh an event of
yesterday as one of five years ago. On The Complete Journey, without match features, that is worth
0.018 NDCG@10 over a mean pool, and slots 0.216; a hashed count sketch of the same bytes is worth 0.273
(`benchmarks/memory_epyc2_2026-11-28.md`). There is no reconstruction loss: a slot's products with codes
are what is read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, normalize

from modeling.inputs.batch import Candidates, FeatureSizes, TrainingSample, UserInputs
from modeling.layers.addressed import PairMemory, PairStream, SlotMemory, SlotStream
from modeling.layers.codes import ItemCodes
from modeling.layers.features import FeatureTokens
from modeling.layers.interaction import CrossNetwork, TaskHeads
from modeling.models.base import CannotExtendError, Stage1, TokenMaker

FOREVER = 1e6  # days
# More of the same says nothing new; shares do
MOST_COUNTED = 32.0


@dataclass(frozen=True)
class Config:
    """Sixteen slots, kept for four half-lives: 64 tokens."""

    width: int = 32
    code_width: int = 32  # W
    num_slots: int = 16  # A
    half_lives_days: tuple[float, ...] = (FOREVER, 180.0, 30.0, 7.0)
    sharpness: float = 4.0
    # F, slots for what followed what; 0: the order of events is not kept
    num_pairs: int = 0
    # After so long, an event follows the one before by half
    session_days: float = 0.05
    cross_layers: int = 2
    cross_rank: int = 64
    # None: twice the width
    head_hidden: int | None = None
    dropout: float = 0.0


class Streams(NamedTuple):
    """All that is kept of a history."""

    slots: SlotStream
    pairs: PairStream | None


@dataclass(frozen=True)
class UserState:
    """Summary tokens, and what candidates read of them.

    Args:
        pair_total_BFW, pair_mass_BF: of what followed what; without slots where that is not kept.
        streams: what new events are added to; None where the state was made of stored tokens.
    """

    tokens_BSD: Tensor
    total_BAHW: Tensor
    mass_BAH: Tensor
    pair_total_BFW: Tensor
    pair_mass_BF: Tensor
    request_BRD: Tensor
    streams: Streams | None = None


class AddressedStage1(Stage1):
    """Events → codes and addresses → sums by slot and half-life: the summary tokens.

    Args:
        features: of the ranker; its event inputs are registered here.
    """

    def __init__(self, config: Config, features: FeatureTokens) -> None:
        super().__init__()
        self.config = config
        code = config.code_width
        self.events = features.events
        features.hand_over("events")
        self.codes = ItemCodes(features.sizes, code)
        self.memory = SlotMemory(
            code,
            config.num_slots,
            tuple(config.half_lives_days),
            features.sizes.actions,
            self.events.size,
            config.sharpness,
        )
        self.pairs = (
            PairMemory(code, config.num_pairs, config.session_days, config.sharpness)
            if config.num_pairs
            else None
        )

    @property
    def streams(self) -> bool:
        return True

    @property
    def token_shape(self) -> tuple[int, int]:
        """S, W + 1."""
        slots = self.config.num_slots * len(self.config.half_lives_days)
        return slots + self.config.num_pairs, self.config.code_width + 1

    @property
    def stream_shape(self) -> tuple[int, int]:
        """As many numbers as the tokens have, before they are made means; and the newest event."""
        rows, width = self.token_shape
        return rows + (self.pairs is not None), width

    @property
    def token_config(self) -> dict[str, Any]:
        """Return the config of the sums."""
        return {
            "sharpness": self.config.sharpness,
            "half_lives_days": list(self.config.half_lives_days),
            "session_days": self.config.session_days if self.config.num_pairs else None,
        }

    def forward(self, user: UserInputs) -> Tensor:
        """Tokens of whole histories, B × S × (W + 1)."""
        return self.tokens(self.advance(self.start(len(user.item_BL)), user))

    def summarise(self, chunks: Callable[[], Iterable[UserInputs]]) -> Tensor:
        return self.stream(chunks())[0]

    @torch.no_grad()
    def stream(
        self, chunks: Iterable[UserInputs], streams: Streams | None = None
    ) -> tuple[Tensor, Streams]:
        """Tokens after chunks of any number of events, and the sums behind them.

        Raises:
            ValueError: there is no chunk.
        """
        for chunk in chunks:
            before = self.start(len(chunk.item_BL)) if streams is None else streams
            streams = self.advance(before, chunk)
        if streams is None:
            raise ValueError("summarise got no chunk; an empty history is one chunk without events")
        return self.tokens(streams), streams

    def stored_streams(self, streams: Streams) -> Tensor:
        """The sums, and their masses beside them; then the newest event's code."""
        rows = [_beside(streams.slots.total_BAHW, streams.slots.mass_BAH).flatten(1, 2)]
        if streams.pairs is not None:
            pairs = streams.pairs
            rows.append(_beside(pairs.total_BFW, pairs.mass_BF))
            rows.append(_beside(pairs.last_BW, pairs.some_B)[:, None])
        return torch.cat(rows, dim=1)

    def restored_streams(self, stored_BRK: Tensor, num_events_B: Tensor) -> Streams:
        """The sums behind `stored_streams`.

        Raises:
            ValueError: the rows are not those of this configuration.
        """
        self._refuse_another_shape(stored_BRK)
        slots, pairs = self.parted(stored_BRK)
        kept = None
        if self.pairs is not None:
            last = pairs[:, -1]
            kept = PairStream(pairs[:, :-1, :-1], pairs[:, :-1, -1], last[:, :-1], last[:, -1])
        return Streams(SlotStream(slots[..., :-1], slots[..., -1]), kept)

    def start(self, batch: int) -> Streams:
        """Return the streams of users without events."""
        pairs = None if self.pairs is None else self.pairs.start(batch)
        return Streams(self.memory.start(batch), pairs)

    def advance(self, streams: Streams, user: UserInputs) -> Streams:
        """The streams behind the user's events."""
        # Another request, no new event
        if not user.item_BL.shape[1]:
            return streams
        items = self.codes.of_events(user.item_BL)
        gaps = torch.expm1(user.gap_BL)
        events = self.events(user)
        slots = self.memory.advance(
            streams.slots, items, user.action_BL, events, gaps, user.mask_BL
        )
        if self.pairs is None or streams.pairs is None:
            return Streams(slots, None)
        return Streams(slots, self.pairs.advance(streams.pairs, items, gaps, user.mask_BL))

    def tokens(self, streams: Streams) -> Tensor:
        """Means and masses of slots: what a store keeps in a few bytes, however long the history."""
        rows = [_means(streams.slots.total_BAHW, streams.slots.mass_BAH).flatten(1, 2)]
        if streams.pairs is not None:
            rows.append(_means(streams.pairs.total_BFW, streams.pairs.mass_BF))
        return torch.cat(rows, dim=1)

    def parted(self, rows_BSD: Tensor) -> tuple[Tensor, Tensor]:
        """Rows of slots, B × A × H × D, and those behind them."""
        slots, kept = self.memory.shape
        return rows_BSD[:, : slots * kept].unflatten(1, (slots, kept)), rows_BSD[:, slots * kept :]


class AddressedVISTA(TokenMaker):
    """See the module docstring.

    ```
    events ─► codes, addresses ─► sums by slot and half-life = summary tokens, from a store or fresh ─┐
    candidate ─► code, address ─► reads its slots: their mean, products with its own codes ──────────┴► cross layers ─► heads
    ```
    """

    stage_1: AddressedStage1

    def __init__(self, config: Config, sizes: FeatureSizes) -> None:
        super().__init__()
        self.config = config
        self.sizes = sizes
        width = config.width
        code = config.code_width
        # 1. Features, and stage 1, which takes over the event inputs.
        self.features = FeatureTokens(sizes, width, bags=False)
        self.stage_1 = AddressedStage1(config, self.features)
        if config.num_pairs:
            self.where, self.what = (nn.Linear(code, code, bias=False) for _ in range(2))
            self.followed = nn.Linear(code + 1, width)
        # 2. What a candidate reads of its slots, at every half-life.
        kept = len(config.half_lives_days)
        self.read = nn.Linear(kept * code, width)
        self.products = nn.Linear(kept * (self.stage_1.codes.num_parts + 1), width)
        self.mixed = nn.Linear(width, width)
        self.own = nn.Linear(code, width)
        self.whole = nn.Linear(kept * code, width)
        # 3. + 1: the mean of all slots; + 3: the mean read, the products and the item's code.
        self.interaction = CrossNetwork(
            self.features.num_request + 1,
            self.features.num_candidate + 3 + (config.num_pairs > 0),
            width,
            config.cross_layers,
            config.cross_rank,
        )
        hidden = config.head_hidden or 2 * width
        self.heads = TaskHeads(*self.interaction.out, hidden, sizes.tasks, config.dropout)

    def fit_statistics(self, sample: TrainingSample) -> None:
        """Scales of dense features, and the categories of items."""
        super().fit_statistics(sample)
        if sample.item_IK is not None:
            self.stage_1.codes.item_IK.copy_(sample.item_IK)

    @property
    def can_extend(self) -> bool:
        return True

    @staticmethod
    def streams_with(config: Config) -> bool:
        return True

    def encode_user(self, user: UserInputs) -> UserState:
        """Sums of the user's events, or the tokens of a store, where given."""
        if user.tokens_BSX is None:
            started = self.stage_1.start(len(user.item_BL))
            return self._state(self.stage_1.advance(started, user), user)
        stored = user.tokens_BSX
        if (has := user.has_tokens_B) is not None:
            fresh = self.encode_user(replace(user, tokens_BSX=None, has_tokens_B=None)).tokens_BSD
            stored = torch.where(has[:, None, None], stored, fresh)
        return self._of_tokens(stored, user)

    def extend_user(self, user_state: UserState, new_events: UserInputs) -> UserState:
        """The sums take the new events."""
        if user_state.streams is None:
            raise CannotExtendError(
                "this state was made of stored tokens, which are rounded. Encode the user again, or go on from the stored "
                "streams (modeling/summaries/summariser.py)"
            )
        return self._state(self.stage_1.advance(user_state.streams, new_events), new_events)

    def score(self, user_state: UserState, candidates: Candidates) -> Tensor:
        """Each candidate reads its slots. logits_BCT."""
        codes = self.stage_1.codes
        parts = codes.parts(candidates.item_BC, candidates.category_BCK)
        own = codes(parts)
        address = self.stage_1.memory.address(own)
        total = torch.einsum("bca,bahw->bchw", address, user_state.total_BAHW)
        mass = torch.einsum("bca,bah->bch", address, user_state.mass_BAH)
        products = torch.einsum("bchw,bcpw->bchp", total, parts)
        counts = torch.cat([products, mass[..., None]], dim=-1).flatten(2)
        counts = _bounded(counts)
        # + 1 keeps the mean of an empty slot finite, and shrinks one of little mass.
        mean = (total / (mass[..., None] + 1)).flatten(2)
        read = [self.read(mean), self.mixed(gelu(self.products(counts))), self.own(own)]
        if self.stage_1.pairs is not None:
            read.append(self._followed(self.stage_1.pairs, user_state, own))
        tokens = torch.cat([self.features.candidates(candidates), torch.stack(read, dim=2)], dim=2)
        logits: Tensor = self.heads(*self.interaction(user_state.request_BRD, tokens))
        return logits

    def _followed(self, pairs: PairMemory, user_state: UserState, own_BCW: Tensor) -> Tensor:
        """Read the pairs of consecutive events for each candidate, with learned queries: B × C × D."""
        address = pairs.address(normalize(self.where(own_BCW), dim=-1))
        sought = normalize(self.what(own_BCW), dim=-1)
        total = address @ user_state.pair_total_BFW
        mass = address @ user_state.pair_mass_BF[..., None]
        mean = total / (mass + 1)
        # Not a count: the same for any length
        share = (mean * sought).sum(-1, keepdim=True)
        numbers = torch.cat([share, mean], dim=-1)
        followed: Tensor = self.followed(numbers)
        return followed

    def _state(self, streams: Streams, user: UserInputs) -> UserState:
        total, mass = streams.slots
        pairs = streams.pairs
        nothing = total.new_zeros(len(total), 0, total.shape[-1])
        return UserState(
            self.stage_1.tokens(streams),
            total,
            mass,
            nothing if pairs is None else pairs.total_BFW,
            nothing[..., 0] if pairs is None else pairs.mass_BF,
            self._request(total, mass, user),
            streams,
        )

    def _of_tokens(self, tokens_BSD: Tensor, user: UserInputs) -> UserState:
        slots, pairs = self.stage_1.parted(tokens_BSD.float())
        mass = slots[..., -1].expm1()
        pair_mass = pairs[..., -1].expm1()
        total = slots[..., :-1] * (mass[..., None] + 1)
        pair_total = pairs[..., :-1] * (pair_mass[..., None] + 1)
        request = self._request(total, mass, user)
        return UserState(tokens_BSD, total, mass, pair_total, pair_mass, request)

    def _request(self, total_BAHW: Tensor, mass_BAH: Tensor, user: UserInputs) -> Tensor:
        """The request's fields, and beside them the mean of all slots."""
        total = total_BAHW.sum(1)
        mass = mass_BAH.sum(1)
        mean = self.whole((total / (mass[..., None] + 1)).flatten(1))
        return torch.cat([self.features.request(user), mean[:, None]], dim=1)


def _bounded(counts: Tensor) -> Tensor:
    """Counts that grow with a history, so that one of any length looks like those of training."""
    return counts.sign() * counts.abs().clamp(max=MOST_COUNTED).log1p()


def _beside(total: Tensor, mass: Tensor) -> Tensor:
    return torch.cat([total, mass[..., None]], dim=-1)


def _means(total: Tensor, mass: Tensor) -> Tensor:
    return _beside(total / (mass[..., None] + 1), mass.log1p())
