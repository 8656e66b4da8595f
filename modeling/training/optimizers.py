"""Optimisers of training: AdamW by default, RMSProp with Adagrad as OneTrans trains.

Tables with sparse gradients (`layers/embedding.py`) are lazy under both: a step changes the rows that it touched, so
that its cost does not grow with the catalogue. Lazy Adam keeps the moments of other rows as they are, and weights of such
tables do not decay.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from modeling.layers.per_token import MixedRMSNorm, PerTokenLayerNorm
from modeling.recipes import Fit

NORMS = (nn.LayerNorm, nn.RMSNorm, MixedRMSNorm, PerTokenLayerNorm)
# Decay of the sum of squares (OneTrans, arXiv 2510.26104, section 4.1)
RMSPROP_DECAY = 0.99999


class Optimizer:
    """One or several of torch's optimisers, each over a part of the weights, as one.

    Args:
        parts: of them.

    Example:
        >>> optimizer = optimizer_of(model, Training())
        >>> optimizer.set_rate(0.5)  # half of each learning rate
        >>> optimizer.step()
    """

    def __init__(self, parts: Sequence[torch.optim.Optimizer]) -> None:
        self.parts = tuple(parts)
        for part in self.parts:
            for group in part.param_groups:
                group["whole_rate"] = group["lr"]

    def set_rate(self, share: float) -> None:
        """Let every group learn at a share of its learning rate."""
        for part in self.parts:
            for group in part.param_groups:
                group["lr"] = group["whole_rate"] * share

    def zero_grad(self) -> None:
        for part in self.parts:
            part.zero_grad(set_to_none=True)

    def step(self) -> None:
        """Change the weights by their gradients."""
        for part in self.parts:
            part.step()

    def state(self) -> list[dict[str, Any]]:
        """All that is kept between steps."""
        return [part.state_dict() for part in self.parts]

    def restore(self, state: Sequence[dict[str, Any]]) -> None:
        """Go on from a kept state."""
        for part, kept in zip(self.parts, state, strict=True):
            part.load_state_dict(kept)


def optimizer_of(model: nn.Module, training: Fit) -> Optimizer:
    """The optimiser that a recipe asks for.

    Raises:
        ValueError: no optimiser has that name, or it does not know a setting that was changed.

    "rmsprop_adagrad" is OneTrans's: Adagrad for embedding tables, RMSProp for all else, without
    weight decay. Its RMSProp sums squares, v ← α v + g², with α = 0.99999; torch's averages them, v ←
    α v + (1 - α) g², which is the same with the rate times √(1 - α).
    """
    rate = training.learning_rate
    if training.optimizer == "rmsprop_adagrad":
        if training.weight_decay:
            raise ValueError(
                f"rmsprop_adagrad has no weight decay (arXiv 2510.26104, section 4.1), and weight_decay is {training.weight_decay}: set 0"
            )
        tables = embedding_tables(model)
        rest = _without(tables, model)
        shrunk = math.sqrt(1 - RMSPROP_DECAY)
        rmsprop = torch.optim.RMSprop(
            rest, lr=rate * shrunk, alpha=RMSPROP_DECAY, eps=1e-8 * shrunk
        )
        return Optimizer([rmsprop, *([torch.optim.Adagrad(tables, lr=rate)] if tables else [])])
    if training.optimizer != "adamw":
        raise ValueError(f"optimizer must be adamw or rmsprop_adagrad, not {training.optimizer!r}")
    kept = undecayed(model)
    lazy = lazy_tables(model)
    groups = [
        {"params": _without([*kept, *lazy], model), "weight_decay": training.weight_decay},
        {"params": kept, "weight_decay": 0.0},
    ]
    betas = (0.9, training.beta2)
    adamw = torch.optim.AdamW(groups, lr=rate, betas=betas, fused=True)
    return Optimizer([adamw, *([torch.optim.SparseAdam(lazy, rate, betas)] if lazy else [])])


def embedding_tables(model: nn.Module) -> list[nn.Parameter]:
    """List the weights whose rows are rarely touched by a step."""
    found: list[nn.Parameter] = []
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            found.append(module.get_parameter("weight"))
    return found


def lazy_tables(model: nn.Module) -> list[nn.Parameter]:
    """List the tables whose gradients are sparse."""
    return [
        module.get_parameter("weight")
        for module in model.modules()
        if isinstance(module, nn.Embedding) and module.sparse
    ]


def clip_gradients(model: nn.Module, most: float) -> None:
    """Scale all gradients down to a norm of at most `most` together; of sparse ones what was touched counts."""
    values: list[Tensor] = []
    for parameter in model.parameters():
        if parameter.grad is None:
            continue
        if parameter.grad.is_sparse:
            # A row that several samples touched has several parts until they are added up.
            parameter.grad = parameter.grad.coalesce()
            values.append(parameter.grad._values())
        else:
            values.append(parameter.grad)
    norm = torch.nn.utils.get_total_norm(values)
    torch._foreach_mul_(values, (most / (norm + 1e-6)).clamp(max=1.0))


def undecayed(model: nn.Module) -> list[nn.Parameter]:
    """Weights that are no map: biases and gains, whether one for all tokens or a row for each."""
    found: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.ndim <= 1 or name == "bias" or isinstance(module, NORMS):
                found[id(parameter)] = parameter
    return list(found.values())


def _without(some: Sequence[nn.Parameter], model: nn.Module) -> list[nn.Parameter]:
    """The other weights of a model."""
    left_out = {id(parameter) for parameter in some}
    return [parameter for parameter in model.parameters() if id(parameter) not in left_out]
