"""Stored columns → numbers, by the kind that each declares: the one place where a kind is read.

Of a group of columns (a request's, a candidate's, an event's) come two arrays: **categories**,
int64 rows of embedding tables, 0 where nothing is known; and **dense** numbers, NaN where one is
missing: numbers and ages first, then the vectors.

| kind | categories | dense |
|---|---|---|
| category | one slot: its row in the vocabulary, or hashed | |
| bag | `max_length` slots | |
| number | one slot, with `buckets` | otherwise sign(x) · log1p(abs(x)) |
| age | | log1p days between it and the request (of an event: the event) |
| vector | | `max_length` numbers |

Models scale dense numbers by the training period's statistics (`layers/embedding.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from feature_repo.contract.arrow import NO_VALUE, arrow_type, value_codes
from feature_repo.contract.contract import Contract
from feature_repo.contract.key_index import KeyIndex
from feature_repo.contract.schema import Column, DType, Kind
from feature_repo.history.history import as_numbers
from feature_repo.history.transforms import MICROS_PER_DAY, squash

Columns = Mapping[str, pa.Array]


@dataclass(frozen=True)
class GroupSizes:
    """Sizes of one group of columns that a model is built for.

    Args:
        categories: rows of each embedding table.
        slots: values that each of them reads.
        numbers: single dense numbers.
        vectors: lengths of the vectors behind them.
    """

    categories: tuple[int, ...] = ()
    slots: tuple[int, ...] = ()
    numbers: int = 0
    vectors: tuple[int, ...] = ()

    @property
    def dense(self) -> int:
        """Dense numbers, those of vectors among them."""
        return self.numbers + sum(self.vectors)

    @property
    def num_slots(self) -> int:
        return sum(self.slots)


NO_COLUMNS = GroupSizes()


@dataclass(frozen=True)
class Vocabulary:
    """Known values of a column; a value's index starts at 1, everything else is 0."""

    values: pa.Array

    @property
    def size(self) -> int:
        """Embedding rows: the values and one for the unknown."""
        return len(self.values) + 1

    @cached_property
    def _index(self) -> KeyIndex:
        return KeyIndex(self.values)

    def indices_of(self, column: pa.Array | pa.ChunkedArray) -> np.ndarray:
        """Indices of a column's values, int64."""
        return self._index.places(column) + 1

    @staticmethod
    def of(column: pa.Array | pa.ChunkedArray, min_count: int = 1) -> Vocabulary:
        """Values that occur at least `min_count` times, sorted."""
        counts = pc.value_counts(
            column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
        )
        values = counts.field("values").filter(pc.greater_equal(counts.field("counts"), min_count))
        return Vocabulary(values.filter(values.is_valid()).sort())

    def plain(self) -> Any:
        return self.values.to_pylist()


@dataclass(frozen=True)
class Hashed:
    """So many rows that values share by their hash; 0 is nothing."""

    rows: int

    @property
    def size(self) -> int:
        return self.rows + 1

    def indices_of(self, column: pa.Array | pa.ChunkedArray) -> np.ndarray:
        """Rows of a column's values, or of their codes; int64."""
        codes = value_codes(column)
        # The codes of whole numbers are the numbers: mixed, or even ones would share half the rows.
        with np.errstate(over="ignore"):
            mixed = codes.view(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        row = (mixed >> np.uint64(33)) % np.uint64(self.rows)
        return np.where(codes == NO_VALUE, 0, row.astype(np.int64) + 1)

    def plain(self) -> Any:
        return {"hashed": self.rows}


@dataclass(frozen=True)
class Quantiles:
    """Numbers by the quantile that they lie in; 0 is a missing one."""

    edges: tuple[float, ...]

    @property
    def size(self) -> int:
        """Embedding rows: a bucket beyond the last edge, and one for nothing."""
        return len(self.edges) + 2

    def indices_of(self, column: pa.Array | pa.ChunkedArray) -> np.ndarray:
        """Buckets of a column's numbers, int64."""
        numbers = floats(column)
        return np.where(np.isnan(numbers), 0, np.searchsorted(self.edges, numbers, "right") + 1)

    @staticmethod
    def of(column: pa.Array | pa.ChunkedArray, buckets: int) -> Quantiles:
        """Edges that part the known numbers into so many like shares, fewer where many are equal."""
        numbers = floats(column)
        numbers = numbers[~np.isnan(numbers)]
        if not len(numbers):
            return Quantiles(())
        edges = np.unique(np.quantile(numbers, np.arange(1, buckets) / buckets))
        return Quantiles(tuple(edges.tolist()))

    def plain(self) -> Any:
        return {"edges": list(self.edges)}


Index = Vocabulary | Hashed | Quantiles


def index_of(stored: Any, kind: pa.DataType) -> Index:
    """The index that `plain` stored, its values of an Arrow type."""
    if isinstance(stored, dict):
        return Hashed(stored["hashed"]) if "hashed" in stored else Quantiles(tuple(stored["edges"]))
    return Vocabulary(pa.array(stored, kind))


def fitted(column: Column, values: pa.Array | pa.ChunkedArray) -> Index:
    """The index of a categorical column from the training period's values."""
    if column.buckets is not None:
        return Quantiles.of(values, column.buckets)
    if column.hashed is not None:
        return Hashed(column.hashed)
    lists = pa.types.is_list(values.type)
    return Vocabulary.of(pc.list_flatten(values) if lists else values)


@dataclass(frozen=True)
class ColumnGroup:
    """Columns that are read together, in the order of declaration.

    Args:
        columns: those with a kind.
        indices: of the categorical ones, by name.

    Example:
        >>> group = ColumnGroup((country,), {"country": Vocabulary(pa.array(["France"]))})
        >>> group.categories({"country": pa.array(["France", None])}, 2)
        array([[1], [0]])
    """

    columns: tuple[Column, ...]
    indices: Mapping[str, Index]

    @cached_property
    def categorical(self) -> tuple[Column, ...]:
        return tuple(c for c in self.columns if c.is_categorical)

    @cached_property
    def numbers(self) -> tuple[Column, ...]:
        """Columns that are one dense number."""
        wanted = (Kind.NUMBER, Kind.AGE)
        return tuple(c for c in self.columns if c.kind in wanted and not c.is_categorical)

    @cached_property
    def aging(self) -> tuple[Column, ...]:
        """Columns whose dense number is an age, which every request changes."""
        return tuple(c for c in self.numbers if c.kind is Kind.AGE)

    @cached_property
    def aging_places(self) -> tuple[int, ...]:
        """Places of their numbers among the dense ones."""
        return tuple(at for at, c in enumerate(self.numbers) if c.kind is Kind.AGE)

    @cached_property
    def vectors(self) -> tuple[Column, ...]:
        return tuple(c for c in self.columns if c.kind is Kind.VECTOR)

    @property
    def sizes(self) -> GroupSizes:
        """Sizes that a model is built for."""
        return GroupSizes(
            categories=tuple(self.indices[c.name].size for c in self.categorical),
            slots=tuple(c.slots for c in self.categorical),
            numbers=len(self.numbers),
            vectors=tuple(c.max_length or 0 for c in self.vectors),
        )

    @property
    def dense_names(self) -> tuple[str, ...]:
        """A name for each dense number."""
        parts = (f"{c.name}[{i}]" for c in self.vectors for i in range(c.max_length or 0))
        return (*(c.name for c in self.numbers), *parts)

    def categories(self, columns: Columns, rows: int) -> np.ndarray:
        """Category slots of stored columns, int64, rows × slots."""
        found = []
        for column in self.categorical:
            values = whole(columns[column.name])
            index = self.indices[column.name]
            if column.kind is not Kind.BAG:
                found.append(index.indices_of(values)[:, None])
                continue
            lengths = pc.fill_null(pc.list_value_length(values), 0).to_numpy(zero_copy_only=False)
            mask = np.arange(column.slots) < lengths[:, None]
            slots = np.zeros(mask.shape, np.int64)
            flat = index.indices_of(pc.list_flatten(values))
            slots[mask] = flat[within(lengths) < column.slots]
            found.append(slots)
        return np.concatenate(found, axis=1) if found else np.zeros((rows, 0), np.int64)

    def dense(self, columns: Columns, times: np.ndarray) -> np.ndarray:
        """Dense numbers of stored columns, float32, rows × dense.

        Args:
            times: of each row's request, microseconds; ages are taken from there.
        """
        found = [self._number(c, columns[c.name], times)[:, None] for c in self.numbers]
        found += [as_numbers(c, columns[c.name]) for c in self.vectors]
        if not found:
            return np.zeros((len(times), 0), np.float32)
        return np.concatenate(found, axis=1).astype(np.float32)

    def event_categories(self, events: Mapping[str, np.ndarray]) -> np.ndarray:
        """Category slots of events as `Histories` holds them, int64, events × slots."""
        found = []
        for column in self.categorical:
            codes = events[column.name]
            rows = codes if codes.ndim > 1 else codes[:, None]
            index = self.indices[column.name].indices_of(pa.array(rows.ravel()))
            found.append(index.reshape(rows.shape))
        return np.concatenate(found, axis=1)

    def event_dense(self, events: Mapping[str, np.ndarray], times: np.ndarray) -> np.ndarray:
        """Dense numbers of events as `Histories` holds them, float32, events × dense.

        Args:
            times: of the events, microseconds.
        """
        dense = np.empty((len(times), self.sizes.dense), np.float32)
        for place, column in enumerate(self.numbers):
            values = events[column.name]
            dense[:, place] = ages(values, times) if column.kind is Kind.AGE else squash(values)
        place = len(self.numbers)
        for column in self.vectors:
            values = events[column.name]
            dense[:, place : place + values.shape[1]] = values
            place += values.shape[1]
        return dense

    def _number(self, column: Column, values: pa.Array, times: np.ndarray) -> np.ndarray:
        if column.kind is Kind.AGE:
            return ages(as_numbers(column, values), times)
        return squash(floats(values))


def ages(moments: np.ndarray, times: np.ndarray) -> np.ndarray:
    """log1p days between moments and later times, both in microseconds; NaN where there is no
    moment, 0 where it is yet to come.
    """
    days = (times - moments.astype(np.float64)) / MICROS_PER_DAY
    return np.where(moments == NO_VALUE, np.nan, np.log1p(np.maximum(days, 0))).astype(np.float32)


def stored_type(column: Column) -> pa.DataType:
    """Arrow type of a column's vocabulary."""
    return pa.string() if column.dtype is DType.STRING_LIST else arrow_type(column.dtype)


def whole(column: pa.Array | pa.ChunkedArray) -> pa.Array:
    """A column in one chunk."""
    return column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column


def floats(column: pa.Array | pa.ChunkedArray) -> np.ndarray:
    """A number column as float64, NaN where it is null."""
    kind = column.type
    if pa.types.is_integer(kind) or pa.types.is_floating(kind):
        # A tenth of the cost of a cast by Arrow, which a request pays for each column
        return whole(column).to_numpy(zero_copy_only=False).astype(np.float64)
    return pc.fill_null(pc.cast(column, pa.float64(), safe=False), np.nan).to_numpy(
        zero_copy_only=False
    )


def within(lengths: np.ndarray) -> np.ndarray:
    """0, 1, …, n-1 for each length n, joined."""
    ends = np.cumsum(lengths)
    return np.arange(ends[-1] if len(ends) else 0) - np.repeat(ends - lengths, lengths)


def nothing_known(contract: Contract) -> dict[str, Index]:
    """Vocabularies of every column without a value, for models that are measured without data."""
    item = contract.item
    found: dict[str, Index] = {item.join_key: Vocabulary(pa.array([], arrow_type(item.dtype)))}
    for column in (*contract.request_features, *contract.candidate_features):
        if column.is_categorical:
            found[column.name] = fitted(column, pa.array([], stored_type(column)))
    for column in contract.event_features:
        if column.is_categorical:
            found[event_key(column.name)] = fitted(column, pa.array([], pa.int64()))
    return found


def event_key(name: str) -> str:
    """Under which an event column's index is kept: its name may be an item's too."""
    return f"event:{name}"


def group_of(
    columns: Sequence[Column], indices: Mapping[str, Index], *, events: bool = False
) -> ColumnGroup:
    """A group with its own indices out of all."""
    chosen = tuple(columns)
    key = event_key if events else str
    own = {c.name: indices[key(c.name)] for c in chosen if c.is_categorical}
    return ColumnGroup(chosen, own)
