"""VISTA whose summary tokens are slots that items address: a whole history in a few tokens that keep
*which* items it held, how often and how lately.

Source: VISTA (arXiv 2510.22049) for the two stages: seeds shared by all users condense a history
into tokens that a store keeps, and candidates read the tokens alone. Stage 1 is ours
(`layers/addressed.py`).

| paper | here |
|---|---|
| seeds, shared by all users | `memory.keys`, A slots; each is kept for H half-lives |
| personalised seed embeddings | S = A · H tokens: a slot's mean code, and the logarithm of its mass |
| stage 2: attention of a candidate to the tokens | attention over slots, by the candidate's address |

Differs: in the paper nothing binds a seed to which item it keeps, and its sums weigh an event of
yesterday as one of five years ago. On The Complete Journey, without match features, that loses to a
mean pool (`benchmarks/memory_…md`). There is no reconstruction loss: a slot's products with codes
are what is read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu

from modeling.batch import Candidates, FeatureSizes, TrainingSample, UserInputs
from modeling.layers.addressed import ItemCodes, SlotMemory, SlotStream
from modeling.layers.features import FeatureTokens
from modeling.layers.interaction import CrossNetwork, TaskHeads
from modeling.models.base import CannotExtendError, TokenMaker

STAGE_1 = ("codes.", "memory.", "features.events.")
FOREVER = 1e6  # days


@dataclass(frozen=True)
class Config:
    """Sixteen slots, kept for four half-lives: 64 tokens."""

    width: int = 32
    code_width: int = 32  # W
    num_slots: int = 16  # A
    half_lives_days: tuple[float, ...] = (FOREVER, 180.0, 30.0, 7.0)
    sharpness: float = 4.0
    cross_layers: int = 2
    cross_rank: int = 64
    head_hidden: int | None = None  # None: twice the width
    dropout: float = 0.0


@dataclass(frozen=True)
class UserState:
    """Summary tokens, and what candidates read of them; the sums, where they can be extended."""

    tokens_BSD: Tensor
    total_BAHW: Tensor
    mass_BAH: Tensor
    request_BRD: Tensor
    stream: SlotStream | None = None


class AddressedVISTA(TokenMaker):
    """See the module docstring.

    ```
    events ─► codes, addresses ─► sums by slot and half-life = summary tokens, from a store or fresh ─┐
    candidate ─► code, address ─► reads its slots: their mean, products with its own codes ──────────┴► cross layers ─► heads
    ```
    """

    def __init__(self, config: Config, sizes: FeatureSizes) -> None:
        super().__init__()
        self.config, self.sizes = config, sizes
        width, code = config.width, config.code_width
        self.features = FeatureTokens(sizes, width, bags=False)
        self.codes = ItemCodes(sizes, code)
        self.memory = SlotMemory(
            code,
            config.num_slots,
            tuple(config.half_lives_days),
            sizes.actions,
            self.features.events.size,
            config.sharpness,
        )
        kept = len(config.half_lives_days)
        self.read = nn.Linear(kept * code, width)
        self.products = nn.Linear(kept * (self.codes.num_parts + 1), width)
        self.mixed = nn.Linear(width, width)
        self.own = nn.Linear(code, width)
        self.whole = nn.Linear(kept * code, width)
        self.interaction = CrossNetwork(
            self.features.num_request + 1,
            self.features.num_candidate + 3,
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
            self.codes.item_IK.copy_(sample.item_IK)

    @property
    def can_extend(self) -> bool:
        """Sums take new events."""
        return True

    @property
    def streams(self) -> bool:
        """Always."""
        return True

    @property
    def piece(self) -> int:
        """Sums may be cut anywhere."""
        return 1

    @property
    def token_shape(self) -> tuple[int, int]:
        """S, W + 1."""
        return self.config.num_slots * len(self.config.half_lives_days), self.config.code_width + 1

    @property
    def stream_shape(self) -> tuple[int, int]:
        """As many numbers as the tokens have, before they are made means."""
        return self.token_shape

    @property
    def token_config(self) -> dict[str, Any]:
        """Of the sums."""
        return {
            "sharpness": self.config.sharpness,
            "half_lives_days": [str(days) for days in self.config.half_lives_days],
        }

    def stage_1(self) -> dict[str, Tensor]:
        """All weights that summary tokens depend on, by name."""
        return {
            name: value for name, value in self.state_dict().items() if name.startswith(STAGE_1)
        }

    def encode_user(self, user: UserInputs) -> UserState:
        """Sums of the user's events, or the tokens of a store, where given."""
        if user.tokens_BSX is None or user.has_tokens_B is None:
            return self._state(self._advanced(self.memory.start(len(user.item_BL)), user), user)
        has, stored = user.has_tokens_B, user.tokens_BSX
        if not bool(has.all()):
            fresh = self.encode_user(replace(user, tokens_BSX=None, has_tokens_B=None)).tokens_BSD
            stored = torch.where(has[:, None, None], stored, fresh)
        return self._of_tokens(stored, user)

    def extend_user(self, user_state: UserState, new_events: UserInputs) -> UserState:
        """The sums take the new events."""
        if user_state.stream is None:
            raise CannotExtendError(
                "this state was made of stored tokens, which are rounded. Encode the user again, or go on from the stored "
                "streams (modeling/summary.py)"
            )
        return self._state(self._advanced(user_state.stream, new_events), new_events)

    def score(self, user_state: UserState, candidates: Candidates) -> Tensor:
        """Each candidate reads its slots. logits_BCT."""
        parts = self.codes.parts(candidates.item_BC, candidates.category_BCK)
        own = self.codes(parts)
        address = self.memory.address(own)
        total = torch.einsum("bca,bahw->bchw", address, user_state.total_BAHW)
        mass = torch.einsum("bca,bah->bch", address, user_state.mass_BAH)
        products = torch.einsum("bchw,bcpw->bchp", total, parts)
        counts = torch.cat([products, mass[..., None]], dim=-1).flatten(2)
        counts = counts.sign() * counts.abs().log1p()  # they grow with the history
        mean = (total / (mass[..., None] + 1)).flatten(2)
        read = [self.read(mean), self.mixed(gelu(self.products(counts))), self.own(own)]
        tokens = torch.cat([self.features.candidates(candidates), torch.stack(read, dim=2)], dim=2)
        logits: Tensor = self.heads(*self.interaction(user_state.request_BRD, tokens))
        return logits

    def tokens_of(self, user: UserInputs) -> Tensor:
        """Stage 1 alone."""
        return self._tokens(self._advanced(self.memory.start(len(user.item_BL)), user))

    def summarise(self, chunks: Callable[[], Iterable[UserInputs]]) -> Tensor:
        """The same of chunks."""
        return self.stream(chunks())[0]

    @torch.inference_mode()
    def stream(
        self, chunks: Iterable[UserInputs], streams: SlotStream | None = None
    ) -> tuple[Tensor, SlotStream]:
        """Tokens after chunks of any number of events, and the sums behind them.

        Raises:
            ValueError: there is no chunk.
        """
        for chunk in chunks:
            before = self.memory.start(len(chunk.item_BL)) if streams is None else streams
            streams = self._advanced(before, chunk)
        if streams is None:
            raise ValueError("summarise got no chunk; an empty history is one chunk without events")
        return self._tokens(streams), streams

    def stored_streams(self, streams: SlotStream) -> Tensor:
        """The sums, and their masses beside them."""
        return torch.cat([streams.total_BAHW, streams.mass_BAH[..., None]], dim=-1).flatten(1, 2)

    def restored_streams(self, stored_BRK: Tensor, num_events_B: Tensor) -> SlotStream:
        """The sums behind `stored_streams`.

        Raises:
            ValueError: the rows are not those of this configuration.
        """
        if stored_BRK.shape[1:] != self.stream_shape:
            raise ValueError(
                f"stored streams have shape {tuple(stored_BRK.shape[1:])}, expected {self.stream_shape}"
            )
        rows = stored_BRK.unflatten(1, self.memory.shape)
        return SlotStream(rows[..., :-1], rows[..., -1])

    def _advanced(self, stream: SlotStream, user: UserInputs) -> SlotStream:
        return self.memory.advance(
            stream,
            self.codes.of_events(user.item_BL),
            user.action_BL,
            self.features.events(user),
            torch.expm1(user.gap_BL),
            user.mask_BL,
        )

    def _tokens(self, stream: SlotStream) -> Tensor:
        """Means and masses of slots: what a store keeps in a few bytes, however long the history."""
        mass = stream.mass_BAH[..., None]
        return torch.cat([stream.total_BAHW / (mass + 1), mass.log1p()], dim=-1).flatten(1, 2)

    def _state(self, stream: SlotStream, user: UserInputs) -> UserState:
        return self._read_by(stream, self._tokens(stream), user, stream)

    def _of_tokens(self, tokens_BSD: Tensor, user: UserInputs) -> UserState:
        rows = tokens_BSD.float().unflatten(1, self.memory.shape)
        mass = rows[..., -1].expm1()
        return self._read_by(
            SlotStream(rows[..., :-1] * (mass[..., None] + 1), mass), tokens_BSD, user, None
        )

    def _read_by(
        self, sums: SlotStream, tokens_BSD: Tensor, user: UserInputs, stream: SlotStream | None
    ) -> UserState:
        """What candidates read; the request's fields, and beside them the mean of all slots."""
        total, mass = sums.total_BAHW.sum(1), sums.mass_BAH.sum(1)
        mean = self.whole((total / (mass[..., None] + 1)).flatten(1))
        request = torch.cat([self.features.request(user), mean[:, None]], dim=1)
        return UserState(tokens_BSD, sums.total_BAHW, sums.mass_BAH, request, stream)
