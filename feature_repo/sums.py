"""Running sums that are exact and so do not depend on their order: numbers as whole millionths, in
two int64 halves.

A number within `LARGEST_NUMBER` (1e12) has at most 1e18 millionths, which int64 holds, but ten of
them do not. The upper and the lower 32 bits are therefore summed apart: neither can overflow below
two thousand million numbers.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

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
        """The numbers, float64."""
        return (self.high.astype(np.float64) * (1 << _LOW_BITS) + self.low) / FIXED_POINT
