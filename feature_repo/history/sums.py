"""Running sums that are exact and so do not depend on their order: numbers as whole millionths, in
two int64 halves.

A number within `LARGEST_NUMBER` (1e12) has at most 1e18 millionths, which int64 holds, but ten of
them do not. The upper and the lower 32 bits are therefore summed apart: neither can overflow below
two thousand million numbers.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from feature_repo.contract.contract import Contract

FIXED_POINT = 1_000_000
_LOW_BITS = 32


@dataclass(frozen=True)
class Exact:
    """Numbers as whole millionths: `high · 2³² + low`, each int64; `low` of one number is within 0
    … 2³² - 1.
    """

    high: np.ndarray
    low: np.ndarray

    @staticmethod
    def of(values: np.ndarray) -> Exact:
        """Numbers of at most 1e12 in size, rounded to millionths."""
        fixed = np.round(np.asarray(values, np.float64) * FIXED_POINT).astype(np.int64)
        return Exact(fixed >> _LOW_BITS, fixed & ((1 << _LOW_BITS) - 1))

    def floats(self) -> np.ndarray:
        return (self.high.astype(np.float64) * (1 << _LOW_BITS) + self.low) / FIXED_POINT


@dataclass(frozen=True)
class StatValues:
    """The number of each event whose mean is kept: 0 if it has no number, and whether it has one."""

    numbers: np.ndarray
    there: np.ndarray


def stat_values(contract: Contract, events: pa.Table | pa.RecordBatch) -> StatValues:
    """The values of the dataset's `stat_value`; without one every event lacks it."""
    name = contract.spec.stat_value
    if not name:
        return StatValues(np.zeros(events.num_rows), np.zeros(events.num_rows, bool))
    column = events[name]
    column = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    numbers = pc.fill_null(column, 0).to_numpy(zero_copy_only=False)
    return StatValues(numbers, pc.is_valid(column).to_numpy(zero_copy_only=False))
