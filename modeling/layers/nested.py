"""Tensors of nested dataclasses, as a list and back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any

from torch import Tensor


def tensors_of(held: Any) -> list[Tensor]:
    """Every tensor of dataclasses, lists and tuples, in order.

    >>> [tensor.item() for tensor in tensors_of((torch.tensor(1), [torch.tensor(2)], None))]
    [1, 2]
    """
    if isinstance(held, Tensor):
        return [held]
    if is_dataclass(held):
        return [t for field in fields(held) for t in tensors_of(getattr(held, field.name))]
    if isinstance(held, list | tuple):
        return [tensor for one in held for tensor in tensors_of(one)]
    return []


def others_of(held: Any) -> list[Any]:
    """All that is no tensor, in order, with None in the places of tensors: what code that was traced took for constants.

    >>> others_of((torch.tensor(1), True, [None]))
    [None, True, 'nothing']
    """
    if isinstance(held, Tensor):
        return [None]
    if is_dataclass(held):
        return [other for field in fields(held) for other in others_of(getattr(held, field.name))]
    if isinstance(held, list | tuple):
        return [other for one in held for other in others_of(one)]
    return ["nothing" if held is None else held]


def with_tensors(held: Any, tensors: Sequence[Tensor]) -> Any:
    """The same structure with other tensors, in the order of `tensors_of`."""
    left = iter(tensors)
    return mapped(held, lambda tensor: next(left))


def mapped(held: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The same structure with each tensor changed, in order."""
    if isinstance(held, Tensor):
        return change(held)
    if is_dataclass(held) and not isinstance(held, type):
        values = {f.name: mapped(getattr(held, f.name), change) for f in fields(held)}
        return replace(held, **values)
    if isinstance(held, list | tuple):
        parts = [mapped(one, change) for one in held]
        # A named tuple takes its parts one by one.
        return type(held)(*parts) if hasattr(held, "_fields") else type(held)(parts)
    return held
