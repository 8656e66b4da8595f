"""How the values of a column are spread, in a few hundred numbers: enough to say that they moved,
small enough for a manifest.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from feature_repo.contract.arrow import hash_keys
from feature_repo.contract.schema import NUMBER_TYPES, Column, DType, Kind

# Quantiles of a number, of 0 to 100 %
NUM_QUANTILES = 101
# Values of a category share so many places, by their hash
NUM_PLACES = 256
DIGITS = 6


@dataclass(frozen=True)
class Distribution:
    """The spread of one column's values. Two of one column are compared by `distance`.

    Args:
        missing: share of rows without a value.
        quantiles: of numbers, in per cent steps; empty of anything else.
        shares: of categories and of the values of bags, by hashed place.
        means, deviations: of each component of vectors.

    Example:
        >>> pounds = distribution_of(price, pa.array([1.0, 2.5, 9.0]))
        >>> pounds.distance(distribution_of(price, pa.array([100.0, 250.0, 900.0])))
        1.0
    """

    missing: float
    quantiles: tuple[float, ...] = ()
    shares: tuple[float, ...] = ()
    means: tuple[float, ...] = ()
    deviations: tuple[float, ...] = ()

    def distance(self, other: Distribution) -> float:
        """How far apart two are, from 0, the same, to 1, nothing in common.

        Of numbers: the largest difference of their cumulative distributions (Kolmogorov, Smirnov).
        Of categories and bags: half the sum of differences of shares (total variation). Of vectors:
        the mean over components of the means' difference, in the sum of both deviations, at most 1.
        Rows without a value count as one more value.
        """
        absent = abs(self.missing - other.missing)
        here, there = 1 - self.missing, 1 - other.missing
        if not here or not there:
            return absent
        if self.quantiles and other.quantiles:
            points = np.union1d(self.quantiles, other.quantiles)
            below = here * _cumulative(self.quantiles, points)
            below_other = there * _cumulative(other.quantiles, points)
            return float(max(absent, np.abs(below - below_other).max()))
        if self.shares and other.shares:
            apart = np.abs(here * np.array(self.shares) - there * np.array(other.shares))
            return float((apart.sum() + absent) / 2)
        if len(self.means) == len(other.means) > 0:
            gap = np.abs(np.subtract(self.means, other.means))
            width = np.add(self.deviations, other.deviations)
            far = np.divide(gap, width, out=(gap > 0).astype(np.float64), where=width > 0)
            return float(max(absent, np.minimum(far, 1).mean()))
        # One of them is of another kind of values.
        return 1.0

    def to_json(self) -> dict[str, Any]:
        """As a manifest holds it."""
        return {name: value for name, value in asdict(self).items() if value not in ((), [])}

    @staticmethod
    def from_json(stored: Mapping[str, Any]) -> Distribution:
        """Read the result of `to_json`.

        Raises:
            TypeError, KeyError, ValueError: the object is no such thing.
        """
        known = {name: tuple(map(float, stored.get(name, ()))) for name in _LISTS}
        return Distribution(float(stored["missing"]), **known)


_LISTS = ("quantiles", "shares", "means", "deviations")


def distribution_of(column: Column, values: pa.Array | pa.ChunkedArray) -> Distribution | None:
    """The distribution of a column's values; None of no rows, and of types that have none: times, bytes."""
    whole = values.combine_chunks() if isinstance(values, pa.ChunkedArray) else values
    if not len(whole):
        return None
    if column.dtype is DType.STRING_LIST:
        missing = pc.mean(pc.equal(pc.fill_null(pc.list_value_length(whole), 0), 0)).as_py()
        return Distribution(_short(missing), shares=_shares(pc.list_flatten(whole)))
    missing = _short(whole.null_count / len(whole))
    found = whole.drop_null()
    if column.dtype is DType.FLOAT32_LIST:
        return _of_vectors(missing, found, column.max_length)
    if column.dtype is DType.STRING or column.kind is Kind.CATEGORY:
        return Distribution(missing, shares=_shares(found))
    if column.dtype not in NUMBER_TYPES:
        return None
    return Distribution(missing, quantiles=_quantiles(found)) if len(found) else Distribution(1.0)


def _quantiles(numbers: pa.Array) -> tuple[float, ...]:
    sorted_values = np.sort(numbers.to_numpy(zero_copy_only=False).astype(np.float64))
    # Values that occur, none between two: a step of the distribution stays one.
    at = np.linspace(0, len(sorted_values) - 1, NUM_QUANTILES).round().astype(np.int64)
    return tuple(float(f"{value:.7g}") for value in sorted_values[at])


def _cumulative(quantiles: tuple[float, ...], points: np.ndarray) -> np.ndarray:
    """The share of values that are at most as large as each point."""
    return np.searchsorted(quantiles, points, side="right") / len(quantiles)


def _shares(values: pa.Array) -> tuple[float, ...]:
    places = (hash_keys(values.drop_null()) % np.uint64(NUM_PLACES)).astype(np.int64)
    counted = np.bincount(places, minlength=NUM_PLACES) / max(len(places), 1)
    return tuple(_short(share) for share in counted)


def _of_vectors(missing: float, vectors: pa.Array, length: int | None) -> Distribution | None:
    if not len(vectors):
        return Distribution(1.0)
    rows = pc.list_flatten(vectors).to_numpy(zero_copy_only=False).reshape(len(vectors), -1)
    if length is not None and rows.shape[1] != length:
        return None
    means = tuple(_short(mean) for mean in rows.mean(axis=0))
    deviations = tuple(_short(deviation) for deviation in rows.std(axis=0))
    return Distribution(missing, means=means, deviations=deviations)


def _short(number: float) -> float:
    return round(float(number), DIGITS)
