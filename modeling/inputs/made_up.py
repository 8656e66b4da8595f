"""Random requests of a given shape, for those who need no data: benchmarks of speed, and trials of a ranker."""

from __future__ import annotations

import torch
from torch import Tensor

from modeling.inputs.batch import Batch, Candidates, FeatureSizes, UserInputs
from modeling.inputs.columns import GroupSizes


def requests(
    sizes: FeatureSizes,
    number: int,
    length: int,
    candidates: int,
    seed: int = 0,
    missing: float = 0.0,
) -> Batch:
    """Requests with so many events and candidates each; labels are random.

    Args:
        missing: the share of dense numbers that are missing.
    """
    generator = torch.Generator().manual_seed(seed)

    def whole(limit: int, *shape: int) -> Tensor:
        return torch.randint(0, limit, shape, generator=generator)

    def real(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator)

    def dense(*shape: int) -> Tensor:
        values = real(*shape)
        return values.masked_fill(real(*shape) < missing, torch.nan) if missing else values

    def slots_of(group: GroupSizes, *shape: int) -> Tensor:
        pairs = zip(group.categories, group.slots, strict=True)
        slots = [whole(size, *shape, slots) for size, slots in pairs]
        return torch.cat(slots, dim=-1) if slots else torch.zeros(*shape, 0, dtype=torch.long)

    # 1. Users, each with a full history.
    user = UserInputs(
        item_BL=whole(sizes.items, number, length),
        action_BL=whole(sizes.actions, number, length),
        age_BL=real(number, length),
        gap_BL=real(number, length),
        event_BLE=dense(number, length, sizes.event.dense),
        mask_BL=torch.ones(number, length, dtype=torch.bool),
        field_BU=slots_of(sizes.request, number),
        dense_BG=dense(number, sizes.request.dense),
        event_category_BLJ=slots_of(sizes.event, number, length) if sizes.event.slots else None,
    )
    # 2. Their candidates.
    chosen = Candidates(
        item_BC=whole(sizes.items, number, candidates),
        category_BCK=slots_of(sizes.candidate, number, candidates),
        dense_BCF=dense(number, candidates, sizes.candidate.dense),
        mask_BC=torch.ones(number, candidates, dtype=torch.bool),
    )
    return Batch(user, chosen, (real(number, candidates, sizes.tasks) < 0.2).float())
