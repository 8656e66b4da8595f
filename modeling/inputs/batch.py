"""Batch: the typed tensors that every model takes. How stored columns become them: `encoder.py`.

Shape letters: B requests, L history, C candidates, E dense event features, J event category slots, U
category slots of user and context, G their dense features, K category slots of candidates, F their
dense features, T tasks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from typing import Self

import torch
from torch import Tensor

from modeling.inputs.columns import NO_COLUMNS, GroupSizes

# Fields of UserInputs that have no history axis
NOT_EVENTS = (
    "field_BU",
    "dense_BG",
    "tokens_BSX",
    "has_tokens_B",
)


class _Tensors:
    """Dataclasses of tensors: move and slice all at once."""

    def to(self, device: torch.device | str) -> Self:
        """The same on a device. To a GPU they go from pinned memory, and the copy is not waited for."""
        if torch.device(device).type == "cuda":
            return self._map(
                lambda tensor: (
                    tensor if tensor.is_cuda else tensor.pin_memory().to(device, non_blocking=True)
                )
            )
        return self._map(lambda tensor: tensor.to(device))

    def _map(self, change: Callable[[Tensor], Tensor]) -> Self:
        values = {f.name: getattr(self, f.name) for f in fields(self)}  # type: ignore[arg-type]
        changed = {name: change(value) for name, value in values.items() if value is not None}
        return replace(self, **changed)  # type: ignore[type-var]


@dataclass(frozen=True)
class UserInputs(_Tensors):
    """A model's inputs about user and request: history, oldest first and padded on the
    right, and features.
    """

    # int64 vocabulary index; 0 is unknown
    item_BL: Tensor
    action_BL: Tensor  # int64
    # float32, log1p days before the request
    age_BL: Tensor
    # float32, log1p days since the event before; 0 for the first
    gap_BL: Tensor
    # float32 event features; NaN where one is missing
    event_BLE: Tensor
    # Bool, True where there is an event
    mask_BL: Tensor
    # int64 category slots of user and context, 0 where empty
    field_BU: Tensor
    # float32 features of user and context; NaN where one is not known
    dense_BG: Tensor
    # int64 category slots of events, where they have any
    event_category_BLJ: Tensor | None = None
    # float32 summary tokens from a store, zeros where a user has none
    tokens_BSX: Tensor | None = None
    # Bool; None: every user has some, or the batch has none
    has_tokens_B: Tensor | None = None

    def events(self, start: int, stop: int | None = None) -> UserInputs:
        """The same users with only the events `[start, stop)` of the padded history."""
        cut = {
            f.name: getattr(self, f.name)[:, start:stop]
            for f in fields(self)
            if f.name not in NOT_EVENTS and getattr(self, f.name) is not None
        }
        return replace(self, **cut)

    def with_events(self, length: int) -> UserInputs:
        """Return the same users with so many unknown events, by which a model is timed."""
        made = {
            f.name: value.new_zeros((value.shape[0], length, *value.shape[2:]))
            for f in fields(self)
            if f.name not in NOT_EVENTS and (value := getattr(self, f.name)) is not None
        }
        return replace(self, **made | {"mask_BL": torch.ones_like(made["mask_BL"])})


@dataclass(frozen=True)
class Candidates(_Tensors):
    """Items to be ranked, padded on the right."""

    # int64 vocabulary index
    item_BC: Tensor
    # int64 category slots, 0 where empty
    category_BCK: Tensor
    # float32 item statistics and match features; NaN where one is not known
    dense_BCF: Tensor
    # Bool, True where there is a candidate
    mask_BC: Tensor

    def select(self, index: Tensor | slice) -> Candidates:
        """Some candidates of every request, in the given order."""
        return self._map(lambda tensor: tensor[:, index])

    def micro_batches(self, size: int) -> Iterator[Candidates]:
        """At most so many candidates at a time, to be scored against the same encoded users: M-FALCON, arXiv 2402.17152."""
        for start in range(0, self.item_BC.shape[1], size):
            yield self.select(slice(start, start + size))


@dataclass(frozen=True)
class Batch(_Tensors):
    """One batch of requests with their candidates, and labels where they are known."""

    user: UserInputs
    candidates: Candidates
    # float32; NaN where a task is undefined; zeros at request time
    labels_BCT: Tensor


@dataclass(frozen=True)
class FeatureSizes:
    """Sizes that a model is built for; they follow from contract and vocabularies."""

    items: int
    actions: int
    history_length: int
    # Columns of user and context
    request: GroupSizes = NO_COLUMNS
    candidate: GroupSizes = NO_COLUMNS
    event: GroupSizes = NO_COLUMNS
    # Categories of items alone, which stand first among those of candidates.
    item: GroupSizes = NO_COLUMNS
    tasks: int = 1
    # Number and width of stored summary tokens that a user may have.
    tokens: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class TrainingSample:
    """Statistics that a model takes from the training period before its first step.

    Args:
        candidate_NF, request_BG, event_ME: dense numbers, from which their scales come.
        item_IK: int64 category slots of every item of the vocabulary, for events, which carry an
            item and not its columns.
    """

    candidate_NF: Tensor
    request_BG: Tensor
    event_ME: Tensor
    item_IK: Tensor | None = None
