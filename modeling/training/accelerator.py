"""A recipe's wishes of an accelerator: cheaper products, and layers that are computed again instead of kept."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from modeling.recipes import Precision


def use_products(precision: Precision) -> None:
    """Let this process multiply matrices of float32 in TF32, where the accelerator has it; "fp32" takes that back."""
    torch.set_float32_matmul_precision("highest" if precision == "fp32" else "high")


def autocast(device: torch.device, precision: Precision) -> AbstractContextManager[Any]:
    """In which a forward runs: with "bf16" layers take and give bfloat16, where torch holds that to be safe. Weights,
    their gradients and sums over long histories stay float32.
    """
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def recompute_layers(model: nn.Module) -> None:
    """Let each layer of a stack keep its input alone, and compute the rest again in the backward pass (Chen et al., 2016,
    arXiv 1604.06174). Only `forward` is computed again: a layer's other methods keep what autograd asks of them.
    """
    for module in model.modules():
        if isinstance(module, nn.ModuleList):
            for layer in module:
                if not isinstance(layer, nn.Embedding | nn.Linear):
                    layer.forward = partial(_again, layer, layer.forward)


def _again(layer: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if not (layer.training and torch.is_grad_enabled()):
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, **kwargs)
