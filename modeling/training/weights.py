"""Weights on disk."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save
from torch import Tensor


def save_weights(weights: Mapping[str, Tensor], path: Path) -> None:
    """Write weights as safetensors, with the permissions of the files beside them: the library's
    writer keeps them from everybody else.
    """
    path.write_bytes(save({name: tensor.contiguous() for name, tensor in weights.items()}))
