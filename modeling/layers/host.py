"""What the host asks of tensors to choose a shorter way. On an accelerator an answer has to be waited for, which
stalls it; there the cautious answer is given, and code that asks is right with it.
"""

from __future__ import annotations

from torch import Tensor


def surely_all(mask: Tensor) -> bool:
    """Whether all are true; on an accelerator False."""
    return mask.device.type == "cpu" and bool(mask.all())


def maybe_any(mask: Tensor) -> bool:
    """Whether any is true; on an accelerator True."""
    return mask.device.type != "cpu" or bool(mask.any())


def at_most(numbers: Tensor, bound: int) -> int:
    """The largest of some whole numbers; on an accelerator what none of them exceeds.

    Args:
        numbers: not empty.
    """
    return int(numbers.max()) if numbers.device.type == "cpu" else bound
