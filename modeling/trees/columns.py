"""The columns that trees read: every number of a candidate and of its request, those of vectors
among them, and every category that is one value.

Bags stay out, which have no single value, and so does the item's own id, whose thousands of values
are memorised rather than learned from.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from feature_repo.history.transforms import CONTEXT_FIELDS
from modeling.inputs.batch import Batch, Candidates, FeatureSizes, UserInputs
from modeling.inputs.columns import GroupSizes
from modeling.inputs.encoder import Encoder

# What LightGBM's text format takes in a name
PLAIN = re.compile(r"[^A-Za-z0-9_.]+")


@dataclass(frozen=True)
class TreeColumns:
    """Columns of a forest, in order: numbers of candidates, of requests, categories of candidates, of requests.

    Example:
        >>> columns = TreeColumns.of(encoder.sizes)
        >>> columns.rows(batch.user, batch.candidates).shape
        torch.Size([64, 105, 47])

    Args:
        candidate_slots, request_slots: category slots that are read.
        numbers: how many columns are numbers.
    """

    candidate_slots: tuple[int, ...]
    request_slots: tuple[int, ...]
    numbers: int

    @staticmethod
    def of(sizes: FeatureSizes) -> TreeColumns:
        return TreeColumns(
            _single(sizes.candidate),
            _single(sizes.request),
            sizes.candidate.dense + sizes.request.dense,
        )

    @property
    def categories(self) -> list[int]:
        """Numbers of the columns that are categories."""
        many = len(self.candidate_slots) + len(self.request_slots)
        return list(range(self.numbers, self.numbers + many))

    def rows(self, user: UserInputs, candidates: Candidates) -> Tensor:
        """One row for each candidate, float32, B × C × columns; NaN where a number is missing, 0 for no
        known category.
        """
        number = candidates.item_BC.shape[1]

        def repeated(of_request: Tensor) -> Tensor:
            return of_request.float()[:, None].expand(-1, number, -1)

        return torch.cat(
            [
                candidates.dense_BCF,
                repeated(user.dense_BG),
                candidates.category_BCK[..., list(self.candidate_slots)].float(),
                repeated(user.field_BU[:, list(self.request_slots)]),
            ],
            dim=-1,
        )

    def of_batch(self, batch: Batch) -> np.ndarray:
        """Rows of a batch's candidates without padding, N × columns."""
        rows = self.rows(batch.user, batch.candidates)
        return rows[batch.candidates.mask_BC].numpy()


def column_names(encoder: Encoder) -> list[str]:
    """A name for each column, as LightGBM's text can hold it; a category's ends in `_id`."""
    columns = TreeColumns.of(encoder.sizes)
    candidate = [c.name for c in encoder.candidate.categorical for _ in range(c.slots)]
    request = [c.name for c in encoder.request.categorical for _ in range(c.slots)]
    request += list(CONTEXT_FIELDS)
    names = [
        *encoder.dense_names,
        *(f"user.{name}" for name in encoder.user_dense_names),
        *(f"{candidate[slot]}_id" for slot in columns.candidate_slots),
        *(f"user.{request[slot]}_id" for slot in columns.request_slots),
    ]
    return [PLAIN.sub("_", name) for name in names]


def _single(group: GroupSizes) -> tuple[int, ...]:
    """Category slots of the columns that have one."""
    starts = np.cumsum([0, *group.slots])
    return tuple(
        int(start) for start, slots in zip(starts, group.slots, strict=False) if slots == 1
    )
