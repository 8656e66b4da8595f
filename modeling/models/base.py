"""The seam: every ranker encodes a user once, then scores any number of candidates against that
state.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from modeling.inputs.batch import Batch, Candidates, FeatureSizes, TrainingSample, UserInputs
from modeling.layers.features import FeatureTokens

# Each model's own dataclass of tensors
UserState = Any


class CannotExtendError(TypeError):
    """This model or configuration has no exact way to extend a user state."""


class Ranker(nn.Module, ABC):
    """A model behind the two-step interface.

    What must hold for each (tests/modeling/test_invariants.py): scores equal
    one-candidate-at-a-time forwards; no candidate changes another's score; padding is inert;
    `extend_user` equals encoding anew, in the sense that it says.
    """

    sizes: FeatureSizes
    features: FeatureTokens

    @abstractmethod
    def encode_user(self, user: UserInputs) -> UserState:
        """Everything about the user that does not depend on candidates; computed once per
        request.
        """

    @abstractmethod
    def score(self, user_state: UserState, candidates: Candidates) -> Tensor:
        """Score candidates against encoded users: logits_BCT, float32, before the sigmoid."""

    def extend_user(self, user_state: UserState, new_events: UserInputs) -> UserState:
        """The state after new events: its scores are those that encoding the longer history would
        give, up to the rounding of float32 sums in another order (tests: 1e-4), as long as
        `must_refresh` does not ask for encoding anew.

        The longer history is every event that the state has seen and the new ones, without a bound:
        `encode_user` on the newest L of them is the same only while there are no more than L.

        Args:
            new_events: only the new events, padded on the right; its features of user and context
                are the new request's, and its first gap counts from the last event that the state
                has seen.

        Raises:
            CannotExtendError: the configuration's states do not grow.
        """
        raise CannotExtendError(
            f"{type(self).__name__} has no exact extend_user. Encode the user again"
        )

    def must_refresh(self, user_state: UserState) -> Tensor:
        """Users, bool B, or one for all of them, whom a caller that extends states is to encode
        again before they are ranked.

        Users of a different model version must be encoded again too; a state does not know, the caller
        does.
        """
        return torch.zeros((), dtype=torch.bool)

    def fit_statistics(self, sample: TrainingSample) -> None:
        """Take what the model must know of the training period before the first step: the scales of
        dense features.
        """
        self.features.fit_statistics(sample)

    @property
    def text_names(self) -> tuple[str, ...]:
        """Files of text that the model is made of beside its tensors, such as trees."""
        return ()

    @property
    def texts(self) -> dict[str, str]:
        """Their contents by name."""
        return {}

    def take_texts(self, texts: Mapping[str, str]) -> None:
        """Take what `texts` gave.

        Raises:
            ValueError: a text is none that the model reads.
        """

    @property
    def token_maker(self) -> TokenMaker | None:
        """The ranker that makes summary tokens of histories, itself or a part of it; None without one."""
        return None

    @property
    def token_shape(self) -> tuple[int, int] | None:
        """S, D of the summary tokens that this model makes of a history, or None: see
        `models/vista.py`.
        """
        return None if self.token_maker is None else self.token_maker.token_shape

    @property
    def can_extend(self) -> bool:
        """True if `extend_user` is exact in this configuration."""
        return False

    def forward(self, batch: Batch) -> Tensor:
        """Both steps in a row, as training does: logits_BCT."""
        return self.score(self.encode_user(batch.user), batch.candidates)

    def training_forward(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """Run a training step: `forward`, and a further loss where the model has one,
        weighted.
        """
        return self(batch), None


class Stage1(nn.Module, ABC):
    """A user's events → a few summary tokens, which a job makes of whole histories and a store keeps. It reads
    nothing of the request. Its weights, all in its `state_dict`, are part of a token's identity.

    One that `streams` knows no "now": what it holds of a history takes new events, at a cost that does not
    depend on how many came before.
    """

    @property
    def streams(self) -> bool:
        """True if stored streams take new events: tokens are then of all events."""
        return False

    @property
    def piece(self) -> int:
        """The number of events that chunks must be a multiple of, so that every path adds the same numbers in
        the same order.
        """
        return 1

    @property
    @abstractmethod
    def token_shape(self) -> tuple[int, int]:
        """S, D."""

    @property
    def stream_shape(self) -> tuple[int, int]:
        """Rows and width of `stored_streams`, for one user; (0, 0) where nothing streams."""
        return 0, 0

    @property
    @abstractmethod
    def token_config(self) -> dict[str, Any]:
        """Return what tokens depend on beside the weights."""

    @abstractmethod
    def forward(self, user: UserInputs) -> Tensor:
        """Tokens of whole histories, B × S × D."""

    @abstractmethod
    def summarise(self, chunks: Callable[[], Iterable[UserInputs]]) -> Tensor:
        """Tokens of histories of any length, in the memory of one chunk.

        Args:
            chunks: an iteration over parts of the same users' events, oldest first; may be called
                several times.

        Raises:
            ValueError: there is no chunk, or this stage 1 wants the whole history at once.
        """

    def stream(self, chunks: Iterable[UserInputs], streams: Any = None) -> tuple[Tensor, Any]:
        """Tokens after chunks of any number of events, and the streams behind them.

        Args:
            streams: of the events before; default: there were none.

        Raises:
            ValueError: there is no chunk, or nothing streams.
        """
        raise ValueError(f"{type(self).__name__} does not stream: summarise whole histories")

    def stored_streams(self, streams: Any) -> Tensor:
        """Return the part of streams that has to be stored, B × rows × width."""
        raise ValueError(f"{type(self).__name__} does not stream")

    def restored_streams(self, stored_BRK: Tensor, num_events_B: Tensor) -> Any:
        """The streams behind `stored_streams`, after so many events.

        Raises:
            ValueError: the rows are not those of this configuration, or nothing streams.
        """
        raise ValueError(f"{type(self).__name__} does not stream")

    def _refuse_another_shape(self, stored_BRK: Tensor) -> None:
        if stored_BRK.shape[1:] != self.stream_shape:
            raise ValueError(
                f"stored streams have shape {tuple(stored_BRK.shape[1:])}, expected {self.stream_shape}"
            )


class TokenMaker(Ranker):
    """A ranker whose state is a few summary tokens.

    Attributes:
        stage_1: makes them; None where they come from a store, made by another model.
    """

    config: Any
    stage_1: Stage1 | None

    @staticmethod
    @abstractmethod
    def streams_with(config: Any) -> bool:
        """Return whether stored streams take new events under a config."""

    @property
    def token_maker(self) -> TokenMaker | None:
        return None if self.stage_1 is None else self

    @property
    def token_shape(self) -> tuple[int, int] | None:
        """S, D; None without a stage 1."""
        return None if self.stage_1 is None else self.stage_1.token_shape
