"""Items as numbers, and their shares of everybody's events."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace

import numpy as np

from feature_repo.contract.contract import Contract
from feature_repo.contract.schema import Kind
from feature_repo.history.shares import ItemEvents, Shares
from feature_repo.history.sketch import Layout

# (codes of items for each column that a sketch counts, events of each) → shares, N × `Layout.names`
ReadShares = Callable[[Sequence[np.ndarray], np.ndarray], np.ndarray]


@dataclass(frozen=True)
class ItemNumbers:
    """Items as numbers, a row for each: all that no request changes. Training makes them of its
    candidates, a server once of all items that it knows.

    Args:
        vocabulary_row: int64; 0 where the vocabulary has no such item.
        relation_row: int64; 0 where nothing is known of its relations.
        category: int32 slots, N × K.
        dense: float32, N × (statistics, then the columns' own); ages are the request's to fill in.
        moments: int64 microseconds, N × columns that count as ages.
        stats: float64, N × 3: events, other events, mean value; NaN where one is not known.
        known: bool; whether a store knows the item at all.
        codes: int64, N × values that sketches count: the id, then each remembered column's slots.
        shares: of everybody's events, N × what sketches count; NaN where it is not known.
    """

    vocabulary_row: np.ndarray
    relation_row: np.ndarray
    category: np.ndarray
    dense: np.ndarray
    moments: np.ndarray
    stats: np.ndarray
    known: np.ndarray
    codes: np.ndarray
    shares: np.ndarray

    def __len__(self) -> int:
        return len(self.vocabulary_row)

    @property
    def nbytes(self) -> int:
        return sum(int(getattr(self, f.name).nbytes) for f in fields(self))

    def take(self, rows: np.ndarray | slice) -> ItemNumbers:
        """Some of them, in this order."""
        return ItemNumbers(*(getattr(self, f.name)[rows] for f in fields(self)))

    def with_rows(self, rows: np.ndarray, of: ItemNumbers) -> ItemNumbers:
        """A copy in which these rows are those of others."""
        copies = [getattr(self, f.name).copy() for f in fields(self)]
        for copy, f in zip(copies, fields(self), strict=True):
            copy[rows] = getattr(of, f.name)
        return ItemNumbers(*copies)

    @staticmethod
    def joined(parts: Sequence[ItemNumbers]) -> ItemNumbers:
        """Rows of several, one behind the other."""
        return ItemNumbers(
            *(np.concatenate([getattr(part, f.name) for part in parts]) for f in fields(parts[0]))
        )


def with_shares(contract: Contract, items: ItemNumbers, read: ReadShares) -> ItemNumbers:
    """The same items with their shares of everybody's events; an unknown item has none."""
    shares = read(by_column(contract, items.codes), items.stats[:, 0])
    known = items.known[:, None]
    return replace(items, shares=np.where(known, shares, np.nan).astype(np.float32))


def shares_among(contract: Contract, items: ItemNumbers) -> ReadShares:
    """Shares of values as of now, by the statistics of all items there are."""
    remembered = by_column(contract, items.codes)[1:]
    shares = Shares(Layout.of(contract), ItemEvents.now(remembered, items.stats[:, 0]))
    return lambda codes, counts: shares.read(codes, np.zeros(len(counts), np.int64), counts)


def by_column(contract: Contract, codes: np.ndarray) -> list[np.ndarray]:
    """Codes of each column that sketches count: N, or N × slots of a bag."""
    bags = [c.kind is Kind.BAG for c in contract.remembered]
    ends = np.cumsum([1, *(c.slots for c in contract.remembered)])
    parts = np.split(codes, ends[:-1], axis=1)
    return [part if bag else part[:, 0] for part, bag in zip(parts, [False, *bags], strict=True)]
