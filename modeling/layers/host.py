"""Questions of the host to tensors, to choose a shorter way. On an accelerator an answer has to be waited for, which
stalls it; there the cautious answer is given, and code that asks is right with it.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn

from modeling.errors import DeviceError


def device_named(name: str) -> torch.device:
    """The device of that name, such as `cpu` or `cuda`.

    Raises:
        DeviceError: torch knows none, or this machine has none.
    """
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        why = str(error).splitlines()[0]
        raise DeviceError(
            f"device {name!r} cannot be used here: {why}. `cpu` works everywhere; `cuda` needs a GPU and torch built for it"
        ) from error
    return device


def device_of(model: nn.Module) -> torch.device:
    """Return the device that holds a model's weights."""
    held = itertools.chain(model.parameters(), model.buffers())
    return next(held, torch.empty(0)).device


# Where numbers are at hand
HOST = "cpu"


def on_host(tensor: Tensor) -> bool:
    """Return whether the host can read a tensor without waiting for it: not while a program is written of what becomes of
    any tensor (`torch.export`).
    """
    return tensor.device.type == HOST and not torch.compiler.is_exporting()


def surely_all(mask: Tensor) -> bool:
    """Return whether all are true; on an accelerator False."""
    return on_host(mask) and bool(mask.all())


def maybe_any(mask: Tensor) -> bool:
    """Return whether any is true; on an accelerator True."""
    return not on_host(mask) or bool(mask.any())


def at_most(numbers: Tensor, bound: int) -> int:
    """The largest of some whole numbers; on an accelerator what none of them exceeds.

    Args:
        numbers: not empty.
    """
    return int(numbers.max()) if on_host(numbers) else bound
