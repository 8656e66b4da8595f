"""Packing: sequences of different lengths laid end to end, so that padding costs nothing worth
naming.

Row-wise layers (projections, norms, feed-forward) see only the N real rows of a batch. What mixes
rows along time sees groups of sequences of nearly equal length; a group of equal lengths is a view
and copies nothing. A group is padded on the right, so a causal operator needs no mask: padding
stands after every real row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

# Padded rows in a group over its real rows
MAX_WASTE = 0.08
# Rows; below that one operator call costs more than its padding
SMALL_GROUP = 512


@dataclass(frozen=True)
class Group:
    """Consecutive sequences that are padded together to `width` rows each."""

    rows: int
    count: int
    width: int
    # Slot of each real row among count × width; None where every slot is real
    slots: Tensor | None
    # True where a slot is real; None likewise
    mask_BT: Tensor | None

    def pad(self, rows: Tensor) -> Tensor:
        """Rows × … → count × width × …, zeros in the padding."""
        if self.slots is not None:
            rows = _Pad.apply(rows, self.slots, self.count * self.width)  # type: ignore[no-untyped-call]
        return rows.view(self.count, self.width, *rows.shape[1:])

    def unpad(self, padded: Tensor) -> Tensor:
        """The real rows of a padded group."""
        flat = padded.reshape(self.count * self.width, *padded.shape[2:])
        if self.slots is not None:
            flat = _Unpad.apply(flat, self.slots)  # type: ignore[no-untyped-call]
        return flat


class Packing:
    """How sequences of the given lengths lie end to end, and in which groups they are padded.

    Args:
        lengths: rows of each sequence, in the order of the flat rows, each at least 1. Sorted
            lengths, in either order, make the fewest and fullest groups.
        device: where the index tensors live.
    """

    def __init__(self, lengths: np.ndarray, device: torch.device | str = "cpu") -> None:
        if len(lengths) and int(lengths.min()) < 1:
            raise ValueError("an empty sequence cannot be packed: leave it out of the batch")
        self.lengths = lengths
        self.offsets = np.r_[0, np.cumsum(lengths)]
        self.groups = [self._group(first, last, device) for first, last in _group_bounds(lengths)]
        self.sizes = [group.rows for group in self.groups]
        self.last_rows = torch.as_tensor(self.offsets[1:] - 1, device=device)

    @property
    def num_rows(self) -> int:
        return int(self.offsets[-1])

    @property
    def from_newest(self) -> np.ndarray:
        """Distance of each row from the newest of its sequence, N."""
        return np.repeat(self.offsets[1:], self.lengths) - 1 - np.arange(self.num_rows)

    @property
    def from_oldest(self) -> np.ndarray:
        """Distance of each row from the oldest of its sequence, N."""
        return np.arange(self.num_rows) - np.repeat(self.offsets[:-1], self.lengths)

    def apply(self, mix: Callable[..., Tensor], *rows: Tensor) -> Tensor:
        """Run `mix(mask_BT, *padded)` on every group and lay the results end to end.

        Args:
            rows: one or more tensors of N rows; `mix` gets each as B × T × ….
        """
        parts = zip(*(tensor.split(self.sizes) for tensor in rows), strict=True)
        mixed = [
            group.unpad(mix(group.mask_BT, *map(group.pad, part)))
            for group, part in zip(self.groups, parts, strict=True)
        ]
        return torch.cat(mixed) if len(mixed) > 1 else mixed[0]

    def _group(self, first: int, last: int, device: torch.device | str) -> Group:
        lengths = self.lengths[first:last]
        width = int(lengths.max())
        rows = int(lengths.sum())
        if rows == width * len(lengths):
            return Group(rows, len(lengths), width, None, None)
        mask = np.arange(width) < lengths[:, None]
        slots = torch.as_tensor(np.flatnonzero(mask), device=device)
        return Group(rows, len(lengths), width, slots, torch.as_tensor(mask, device=device))


def _group_bounds(lengths: np.ndarray) -> list[tuple[int, int]]:
    """Greedy: a sequence joins the group before it while the group wastes little or is small.

    A long run of equal lengths stays alone, so that it is a view.
    """
    bounds: list[tuple[int, int]] = []
    first = longest = rows = 0
    for index, length in enumerate(lengths.tolist()):
        padded = max(longest, length) * (index - first + 1)
        total = rows + length
        whole = rows == longest * (index - first) and rows > SMALL_GROUP and length != longest
        if index > first and (
            whole or (padded > SMALL_GROUP and padded - total > MAX_WASTE * total)
        ):
            bounds.append((first, index))
            first = index
            longest = 0
            rows = 0
        longest = max(longest, length)
        rows = rows + length
    if len(lengths):
        bounds.append((first, len(lengths)))
    return bounds


class _Pad(torch.autograd.Function):
    """Rows to slots of zeros; the gradient reads the slots back. Cheaper than indexing, whose
    gradient adds.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, slots: Tensor, total: int) -> Tensor:
        ctx.save_for_backward(slots)
        return rows.new_zeros(total, *rows.shape[1:]).index_copy_(0, slots, rows)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (slots,) = ctx.saved_tensors
        return grad.index_select(0, slots), None, None


class _Unpad(torch.autograd.Function):
    """The inverse of `_Pad`."""

    @staticmethod
    def forward(ctx: Any, padded: Tensor, slots: Tensor) -> Tensor:
        ctx.save_for_backward(slots)
        ctx.total = len(padded)
        return padded.index_select(0, slots)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (slots,) = ctx.saved_tensors
        return grad.new_zeros(ctx.total, *grad.shape[1:]).index_copy_(0, slots, grad), None
