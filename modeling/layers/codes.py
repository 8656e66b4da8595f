"""Codes of items: what a model knows an item by, the sum of its own row and those of its
categories, each made of unit length.

Attention looks for events like a candidate. Where item rows begin small, what else an event
carries drowns them (DECISIONS, 2026-11-29, has the figures). So rows begin at random and at full
length, equal items are equal from the first step on, and an item that training hardly saw has a
code by its categories.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding, embedding_bag, normalize

from modeling.inputs.batch import FeatureSizes
from modeling.layers.embedding import item_table
from modeling.layers.host import on_host


class Items(NamedTuple):
    """The different items of some events, and which of them each event is of: what is computed of
    items is computed once, however often they come.
    """

    codes_UW: Tensor
    which_BL: Tensor


class ItemCodes(nn.Module):
    """Codes of items: weighted sums of their own rows and their categories', each of unit length.

    Rows begin at random, so that even an item that training hardly saw has a distinct code.

    Args:
        width: of a code, W.
    """

    item_IK: Tensor

    def __init__(self, sizes: FeatureSizes, width: int) -> None:
        super().__init__()
        self.slots = sizes.item.slots
        self.item = item_table(sizes.items, width)
        self.categories = nn.ModuleList(
            nn.Embedding(size, width, padding_idx=0) for size in sizes.item.categories
        )
        self.mix = nn.Parameter(torch.full((1 + len(self.slots),), 0.5))
        self.register_buffer(
            "item_IK", torch.zeros(sizes.items, sizes.item.num_slots, dtype=torch.long)
        )

    @property
    def num_parts(self) -> int:
        """The item and its category columns."""
        return 1 + len(self.slots)

    def parts(self, item: Tensor, category_K: Tensor | None = None) -> Tensor:
        """… × parts × W, each of unit length, or nothing where an item has no such category.

        Args:
            item: vocabulary indices.
            category_K: category slots, the items' own first; default: those known from training.
        """
        # Not `CategorySlots`: its learned row of nothing begins at zero, where a vector has no
        # direction and a normalised one no gradient; here an absent category adds nothing.
        slots = self.item_IK[item] if category_K is None else category_K
        found = [self.item(item)]
        groups = slots[..., : sum(self.slots)].split(self.slots, dim=-1) if self.slots else ()
        for table, group in zip(self.categories, groups, strict=True):
            if group.shape[-1] == 1:
                found.append(embedding(group[..., 0], table.weight, padding_idx=0))  # type: ignore[arg-type]
                continue
            rows = group.reshape(-1, group.shape[-1])
            mean = embedding_bag(rows, table.weight, mode="mean", padding_idx=0)  # type: ignore[arg-type]
            found.append(mean.view(*group.shape[:-1], mean.shape[-1]))
        return normalize(torch.stack(found, dim=-2), dim=-1)

    def of_events(self, item_BL: Tensor) -> Items:
        """Codes of each different item once; on an accelerator, where their number would have to be waited for, of each
        event.
        """
        if not on_host(item_BL):
            return self._of_each(item_BL)
        items, which = torch.unique(item_BL, return_inverse=True)
        return Items(self(self.parts(items)), which)

    def _of_each(self, item_BL: Tensor) -> Items:
        each = torch.arange(item_BL.numel(), device=item_BL.device)
        return Items(self(self.parts(item_BL.flatten())), each.view_as(item_BL))

    def forward(self, parts: Tensor) -> Tensor:
        """Codes, … × W."""
        return (parts * self.mix[:, None]).sum(-2)


class ItemRows(nn.Module):
    """Items as rankers embed them: their codes, times a learned size that begins at √D, the length
    of D numbers of size 1.

    Example:
        >>> rows = ItemRows(sizes, 32)
        >>> rows(user.item_BL).shape, rows(candidates.item_BC, candidates.category_BCK).shape
        (torch.Size([64, 128, 32]), torch.Size([64, 105, 32]))
    """

    def __init__(self, sizes: FeatureSizes, width: int) -> None:
        super().__init__()
        self.width = width
        self.codes = ItemCodes(sizes, width)
        self.size = nn.Parameter(torch.tensor(float(width)).sqrt())

    @property
    def weight(self) -> Tensor:
        """Items' own rows, before they are made of unit length."""
        return self.codes.item.weight

    def forward(self, item: Tensor, category_K: Tensor | None = None) -> Tensor:
        """… × D.

        Args:
            item: vocabulary indices.
            category_K: category slots, the items' own first; default: those known from training,
                and each different item is computed once, however often it comes.
        """
        if category_K is not None:
            rows: Tensor = self.codes(self.codes.parts(item, category_K)) * self.size
            return rows
        items = self.codes.of_events(item)
        return embedding(items.which_BL, items.codes_UW * self.size)
