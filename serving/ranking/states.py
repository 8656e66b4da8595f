"""Encoded users between requests: what `encode_user` gave, kept by user, and taken further where events
came.

A kept state is never believed: what the model would read of the user now is compared, event by event, with
what it was made from. Where a model's states grow (`can_extend`), the same events with another request's
features cost an extension by nothing, and new events are added unless that is no longer what encoding anew would
give (`must_refresh`); otherwise only a user who is the very same in every number is known again. All else is
encoded anew. As one thread runs the model, two requests of a user at the same moment are one encoding.
"""

from __future__ import annotations

import time
from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from modeling.inputs.batch import UserInputs
from modeling.layers.host import device_of
from modeling.models.base import CannotExtendError, Ranker, UserState

Outcome = Literal["encoded", "extended", "known"]
OUTCOMES = get_args(Outcome)
EVENTS = ("item_BL", "action_BL", "gap_BL", "event_BLE", "event_category_BLJ")
STATE_S = 600.0
SWEEP_S = 30.0


@dataclass(frozen=True)
class Kept:
    """A state, what it was made from, and when."""

    state: UserState
    user: UserInputs
    size: int
    made: float


class UserStates:
    """See the module docstring.

    Example:
        >>> states = UserStates(model, most_bytes=64 << 20)
        >>> states.of(12680, batch.user)   # encoded
        >>> states.of(12680, batch.user)   # known

    Args:
        model: whose states they are; a server has one of these for each bundle.
        most_bytes: of all that is kept; those unused longest go first.
        most_s: how long a state is kept.
    """

    def __init__(self, model: Ranker, most_bytes: int, most_s: float = STATE_S) -> None:
        self._model = model
        self._device = device_of(model)
        self._most_bytes = most_bytes
        self._most_s = most_s
        # How each state came about
        self.counts: Counter[Outcome] = Counter()
        self._kept: OrderedDict[Any, Kept] = OrderedDict()
        self._extends = model.can_extend
        self.bytes = 0
        self._swept = time.monotonic()

    def __len__(self) -> int:
        return len(self._kept)

    def of(self, key: Any, user: UserInputs) -> UserState:
        """The state of one user, as `encode_user` would make it of these inputs.

        Args:
            key: whose; states of other keys are never looked at.
            user: one user's inputs, on the host, where they are compared.
        """
        return self._taken_in(key, user)[1]

    def take_in(self, key: Any, user: UserInputs) -> Outcome:
        """Make or find the same state for a later call; returns how it came about."""
        return self._taken_in(key, user)[0]

    def _taken_in(self, key: Any, user: UserInputs) -> tuple[Outcome, UserState]:
        kept = self._kept.get(key)
        if kept is not None and time.monotonic() - kept.made >= self._most_s:
            kept = None
        outcome, state = self._made(kept, user)
        self.counts[outcome] += 1
        # What was extended is as old as what it was made from.
        made = time.monotonic() if kept is None or outcome == "encoded" else kept.made
        self._keep(key, state, user, made)
        return outcome, state

    def forget_old(self) -> None:
        """Drop states that are too old, of every user; at most every so often."""
        now = time.monotonic()
        if now - self._swept < SWEEP_S:
            return
        self._swept = now
        for key, kept in list(self._kept.items()):
            if now - kept.made >= self._most_s:
                self.bytes -= self._kept.pop(key).size

    def _made(self, kept: Kept | None, user: UserInputs) -> tuple[Outcome, UserState]:
        if kept is not None:
            if _equal(kept.user, user, [field.name for field in fields(user)]):
                return "known", kept.state
            if (state := self._extended(kept, user)) is not None:
                return "extended", state
        return "encoded", self._model.encode_user(user.to(self._device))

    def _extended(self, kept: Kept, user: UserInputs) -> UserState | None:
        """The kept state with what is new; None where the user must be encoded anew."""
        before = kept.user.item_BL.shape[1]
        now = user.item_BL.shape[1]
        if not self._extends or now < before or not bool(kept.user.mask_BL.all()):
            return None
        # Behind a full window the oldest event falls out: then these differ from the first on.
        if not _equal(kept.user, user.events(0, before), EVENTS):
            return None
        if not _equal(kept.user, user, ("tokens_BSX", "has_tokens_B")):
            return None
        try:
            new = user.events(before, now).to(self._device)
            state = self._model.extend_user(kept.state, new)
        except CannotExtendError:
            # This configuration cannot extend, whatever it says.
            self._extends = False
            return None
        return None if bool(self._model.must_refresh(state).any()) else state

    def _keep(self, key: Any, state: UserState, user: UserInputs, made: float) -> None:
        if (gone := self._kept.pop(key, None)) is not None:
            self.bytes -= gone.size
        size = sum(t.untyped_storage().nbytes() for t in (*_tensors(state), *_tensors(user)))
        if size > self._most_bytes:
            return
        self._kept[key] = Kept(state, user, size, made)
        self.bytes += size
        while self.bytes > self._most_bytes:
            _, dropped = self._kept.popitem(last=False)
            self.bytes -= dropped.size


def _equal(one: UserInputs, other: UserInputs, names: Iterable[str]) -> bool:
    """Return whether two users are the same in these fields, NaN included."""
    for name in names:
        a = getattr(one, name)
        b = getattr(other, name)
        if a is None or b is None:
            if a is not b:
                return False
        elif a.shape != b.shape or not torch.equal(_bits(a), _bits(b)):
            return False
    return True


def _bits(tensor: Tensor) -> Tensor:
    """Numbers as they are stored, so that a missing one equals a missing one."""
    return tensor.view(torch.int32) if tensor.dtype is torch.float32 else tensor


def _tensors(held: Any) -> Iterator[Tensor]:
    """Every tensor of a state, however it is nested."""
    if isinstance(held, Tensor):
        yield held
    elif is_dataclass(held):
        for field in fields(held):
            yield from _tensors(getattr(held, field.name))
    elif isinstance(held, list | tuple):
        for one in held:
            yield from _tensors(one)
