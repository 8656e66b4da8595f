"""Operator: what mixes the rows of a sequence along time, and all that differs between the sequence
models.

An operator sees queries, keys and values of padded sequences, each B × T × D, padded on the right.
Three forms agree: the plain twin (a function that writes the formula down, T × T where the formula
has it), `forward` (fast), and `extend` (streaming: the same rows from a state and the new rows
only).
"""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor, nn

# B × … each; what an operator must remember of the rows before
State = tuple[Tensor, ...]


class Operator(nn.Module, ABC):
    """See the module docstring. `causal` operators let a row read itself and the rows before it."""

    causal: bool
    can_extend: bool = False

    @abstractmethod
    def forward(self, query: Tensor, key: Tensor, value: Tensor, mask_BT: Tensor | None) -> Tensor:
        """Mix rows: B × T × D. Rows of padding come out finite and mean nothing.

        Args:
            mask_BT: bool, True where a row is real; None where all are.
        """

    @abstractmethod
    def initial_state(self, like_BD: Tensor) -> State:
        """The state before the first row, for as many sequences, on the device of `like_BD`."""

    @abstractmethod
    def extend(
        self, state: State, query: Tensor, key: Tensor, value: Tensor, mask_BT: Tensor
    ) -> tuple[Tensor, State]:
        """`forward` for rows that follow those the state has seen, and the state after them; causal
        operators only.
        """

    def read(self, state: State, query: Tensor) -> Tensor:
        """Read the state for rows behind the rows it has seen, B × C × D: they read neither themselves nor one
        another.

        Raises:
            TypeError: this operator's state is not read so.
        """
        raise TypeError(f"{type(self).__name__} has no state that candidates read")
