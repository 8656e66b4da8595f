"""A device that does not exist, on which torch computes all the same: its tensors hold others, on the CPU, and the
host's code cannot see these. A model that runs there, and gives what it gives here, would run on an accelerator: it
leaves no tensor behind, and what makes the host wait for a number is counted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

ELSEWHERE = "elsewhere"
# What makes the host wait for a number, or for a size that follows from numbers
WAITS = (
    "_local_scalar_dense",
    "nonzero",
    "masked_select",
    "bincount",
    "equal",
    "_unique2",
    "unique_consecutive",
    "unique_dim",
    "repeat_interleave",
)
# These too, where an index is a mask
INDEXED = ("index", "index_put", "index_put_", "_index_put_impl_")


class _Module(backend_registration._DummyBackendModule):
    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.float16, torch.bfloat16]


# When this module is imported, that is before any test runs: the first backward of a process counts the devices there
# are, and never again.
backend_registration._setup_privateuseone_for_python_backend(ELSEWHERE, backend_module=_Module())


class Far(Tensor):
    """A tensor that is elsewhere."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> Far:
        made: Far = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=torch.device(ELSEWHERE, 0),
        )
        made.held = held
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # Where no `Device` is on.
        return _computed(func, args, kwargs or {}, None)


class Device(TorchDispatchMode):
    """While it is on, tensors can be sent elsewhere.

    Attributes:
        waits: what made the host wait, or tensors of a forward come from the host, and how often.
    """

    def __init__(self) -> None:
        super().__init__()
        self.waits: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _computed(func, args, kwargs or {}, self.waits)


@contextmanager
def elsewhere() -> Iterator[Device]:
    """The device, for as long as the block runs."""
    # What a class in Python makes of a view is no tensor that inference mode knows.
    with Device() as device, mock.patch.object(torch, "inference_mode", torch.no_grad):
        yield device


def _computed(func: Any, args: Any, kwargs: Any, waits: Counter[str] | None) -> Any:
    """What an operator gives of what its arguments hold, wrapped where it is elsewhere.

    Raises:
        RuntimeError: arguments are on both devices, as torch says it of an accelerator.
    """
    name = func.name().removeprefix("aten::").partition(".")[0]
    given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    far = [tensor for tensor in given if isinstance(tensor, Far)]
    to = kwargs.get("device")
    wanted = to is not None and torch.device(to).type == ELSEWHERE
    if far and len(far) < len(given) and name != "copy_":
        # Numbers without dimensions may come from anywhere.
        near = [t.shape for t in given if not isinstance(t, Far) and t.dim()]
        if near:
            raise RuntimeError(f"{name}: some tensors are elsewhere, those of {near} are not")
    moved = name == "_to_copy" and to is not None and wanted != bool(far)
    by_mask = name in INDEXED and any(tensor.dtype is torch.bool for tensor in far[1:])
    if waits is not None and (moved or by_mask or (far and name in WAITS)):
        waits[name] += 1
    if wanted:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    found = func(*tree_map(_held, args), **tree_map(_held, kwargs))
    if not (wanted or far) or (moved and not wanted):
        return found
    # An operator that changes its argument gives that argument back.
    own = {id(tensor.held): tensor for tensor in far}

    def wrapped(one: Any) -> Any:
        if not isinstance(one, Tensor):
            return one
        return own[id(one)] if id(one) in own else Far(one)

    return tree_map(wrapped, found)


def _held(one: Any) -> Any:
    return one.held if isinstance(one, Far) else one
