"""Embedding tables for category slots, and scales of dense features."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding, embedding_bag

from modeling.inputs.columns import GroupSizes


class CategorySlots(nn.Module):
    """Mean embedding of each column's slots: … × slots → a … × D for each column.

    Empty slots (0) add nothing; a column without a known value has a separate learned row, which
    says so.
    """

    def __init__(self, sizes: GroupSizes, width: int) -> None:
        super().__init__()
        self.slots = sizes.slots
        self.tables = nn.ModuleList(
            nn.Embedding(size, width, padding_idx=0) for size in sizes.categories
        )
        for table in self.tables:
            assert isinstance(table, nn.Embedding)
            nn.init.normal_(table.weight, std=0.05)
            with torch.no_grad():
                table.weight[0] = 0
        self.nothing = nn.Parameter(torch.zeros(len(sizes.categories), width))

    def forward(self, slots: Tensor) -> list[Tensor]:
        """One … × D tensor for each column."""
        groups = slots.split(self.slots, dim=-1) if self.slots else ()
        shape = slots.shape[:-1]
        found = []
        for number, (table, group) in enumerate(zip(self.tables, groups, strict=True)):
            assert isinstance(table, nn.Embedding)
            if group.shape[-1] == 1:
                mean = embedding(group[..., 0], table.weight, padding_idx=0)
            else:
                rows = group.reshape(-1, group.shape[-1])
                mean = embedding_bag(rows, table.weight, mode="mean", padding_idx=0)
                mean = mean.view(*shape, table.embedding_dim)
            found.append(torch.where((group > 0).any(-1, keepdim=True), mean, self.nothing[number]))
        return found


class Standardise(nn.Module):
    """Shift and scale dense features by statistics of the training set, kept with the weights."""

    mean: Tensor
    scale: Tensor

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(num_features))
        self.register_buffer("scale", torch.ones(num_features))

    def fit(self, values_NF: Tensor) -> None:
        """Take mean and deviation of what is known in the training set; a constant feature keeps
        scale 1.
        """
        values = values_NF.double()
        known = ~values.isnan()
        number = known.sum(0).clamp(min=1)
        mean = values.nan_to_num(0.0).sum(0) / number
        deviation = (((values - mean).nan_to_num(0.0) ** 2).sum(0) / number).sqrt()
        self.mean.copy_(mean)
        self.scale.copy_(torch.where(deviation > 1e-6, deviation, torch.ones_like(deviation)))

    def forward(self, values: Tensor) -> Tensor:
        """Standardised values, clipped to ±10; a missing one (NaN) is 0, the mean."""
        return ((values - self.mean) / self.scale).clamp(-10, 10).nan_to_num(0.0)


def sinusoids(position: Tensor, width: int) -> Tensor:
    """Sinusoidal encodings of integer positions: … → … × width. Unbounded, so a growing history
    never runs out.
    """
    rate = torch.exp(
        torch.arange(0, width, 2, device=position.device) * (-math.log(10_000.0) / width)
    )
    angle = position[..., None] * rate
    return torch.cat([angle.sin(), angle.cos()], dim=-1)[..., :width]
