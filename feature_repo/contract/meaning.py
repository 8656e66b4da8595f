"""Meanings of a dataset's columns: by column a digest of how it is declared and made, and how its
values are spread.

A name and a type stay when a price turns from pounds to pence; the numbers that a model learned from do
not. Where a column is declared or made otherwise than when a bundle learned from it, *and* its values
moved, the bundle would rank from numbers that mean something else. Values that move while the
declaration stays are the world's doing, and only said.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa

from feature_repo.contract.contract import Contract
from feature_repo.contract.distributions import Distribution, distribution_of
from feature_repo.contract.schema import Column, DatasetSpec, Source

# Values of a column that is declared otherwise have moved from this distance on.
MOVED = 0.2
# From here on a movement is worth a line.
WORTH_SAYING = 0.1
# Tables of the job `events`, and which source's files their columns are read from first
SOURCES_OF = {"events": "events", "user_profile": "users", "item_profile": "items"}


@dataclass(frozen=True)
class Meaning:
    """One column: the digest of its declaration, and the distribution of its values."""

    declared: str
    values: Distribution

    def to_json(self) -> dict[str, Any]:
        """As a manifest holds it."""
        return {"declared": self.declared, "values": self.values.to_json()}


Meanings = Mapping[str, Meaning]  # by table and column, such as `events.unit_price`


@dataclass(frozen=True)
class Moved:
    """How far the values of a column are from the values that a bundle learned from.

    Args:
        column: such as `events.unit_price`.
        distance: from 0, the same, to 1 (`Distribution.distance`).
        redeclared: whether it is declared or made otherwise than then.
    """

    column: str
    distance: float
    redeclared: bool

    @property
    def means_otherwise(self) -> bool:
        """True if a model that learned from the former values must not rank from these."""
        return self.redeclared and self.distance > MOVED

    @property
    def worth_saying(self) -> bool:
        """True if a person wants to know of it."""
        return self.distance > WORTH_SAYING

    def __str__(self) -> str:
        why = "declared or made otherwise since" if self.redeclared else "declared as then"
        return f"{self.column} ({why}, its values moved by {self.distance:.2f} of 1)"


def meanings_of(
    contract: Contract, code: str, read: Callable[[str, list[str]], pa.Table]
) -> dict[str, Meaning]:
    """The meanings of all columns that a ranker reads, of one run of the job `events`.

    Args:
        code: digest of the dataset module's own code; "" where it has none.
        read: rows, or a sample of them, of a table and some of its columns.
    """
    found = {}
    for table in SOURCES_OF:
        columns = list(_columns(contract, table))
        if not columns:
            continue
        rows = read(table, [column.name for column in columns])
        for column in columns:
            values = distribution_of(column, rows[column.name])
            if values is not None:
                declared = _declared(contract.spec, table, column, code)
                found[f"{table}.{column.name}"] = Meaning(declared, values)
    return found


def moved(learned: Meanings, now: Meanings) -> list[Moved]:
    """Compare each column that a bundle learned from with the same one now, the farthest first; columns that only one knows are left out."""
    every = [
        Moved(name, then.values.distance(now[name].values), then.declared != now[name].declared)
        for name, then in learned.items()
        if name in now
    ]
    return sorted(every, key=lambda one: (-one.distance, one.column))


def to_json(meanings: Meanings) -> dict[str, Any]:
    """As manifests hold them."""
    return {name: meaning.to_json() for name, meaning in meanings.items()}


def from_json(stored: Mapping[str, Any]) -> dict[str, Meaning]:
    """Read the result of `to_json`.

    Raises:
        TypeError, KeyError, ValueError: the text is no such thing.
    """
    return {
        name: Meaning(str(one["declared"]), Distribution.from_json(one["values"]))
        for name, one in stored.items()
    }


def _columns(contract: Contract, table: str) -> Iterator[Column]:
    """Columns of a table that say something to a ranker."""
    declared = contract.table(table)
    keys = {contract.item.join_key, "action"} if table == "events" else set()
    for column in declared.all_columns:
        if column.name in keys or column.kind is not None:
            yield column


def _declared(spec: DatasetSpec, table: str, column: Column, code: str) -> str:
    """Digest of all that decides about a column's values, but for Memoir's own code.

    A doc, and a limit, decide about no value that is kept.
    """
    kind = SOURCES_OF[table]
    source: Source = getattr(spec, kind) or spec.events
    of_column = {
        name: value
        for name, value in asdict(column).items()
        if name not in ("doc", "nullable", "minimum", "maximum", "pattern", "values", "is_key")
    }
    read_as = {
        "theirs": source.columns.get(column.name, column.name),
        "decimal": source.decimals.get(column.name, source.decimal),
        "separator": source.list_separator,
        "made": column.name in source.derived,
    }
    if column.name == "action":
        read_as |= {
            "actions": [list(spec.actions), source.action, source.actions, source.flags],
            "at_least": source.at_least,
        }
    content = json.dumps([of_column, read_as, code], sort_keys=True, default=str)
    return hashlib.sha256(content.encode()).hexdigest()[:16]
