"""One module per dataset: where its raw tables are, and how a raw row becomes an event, a user or
an item.

A dataset module declares `SPEC` (a `DatasetSpec`) and four pure functions:

- `raw_units(data) -> list[RawUnit]`: the raw source in independent pieces; `data` is a folder or
  None.
- `read_raw(unit) -> Table`: one piece as it stands, which the raw gate validates.
- `parse(unit) -> Parsed`: one piece as events, user rows, item rows and dead letters. Every raw row
  of the events source is counted as kept or dead; timestamps are UTC. Limits of the contract's
  columns are not for `parse` to check: the job checks every row that it returns, and sets aside
  what breaks one (`limits.py`).
- `assign_requests(events) -> AssignedRequests`: which events are asked about together, for events
  of whole users sorted by (user, time, position).

To add a dataset, write one such file here and set `MEMOIR_DATASET` to its name. No other file
changes.
"""

from __future__ import annotations

import importlib
import pkgutil
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Protocol, cast

import numpy as np
import pyarrow as pa

from feature_repo.arrow import arrow_schema
from feature_repo.errors import DeclarationError, ExpectedError, nearest
from feature_repo.schema import Contract, DatasetSpec, contract, problems

FUNCTIONS = ("raw_units", "read_raw", "parse", "assign_requests")


class RawDataError(ExpectedError, ValueError):
    """The raw data is missing or has another shape than its dataset module expects."""


@dataclass(frozen=True)
class RawUnit:
    """A piece of the raw source that one worker reads: `rows` rows of `file` from `start`. `kind`
    is the module's own.
    """

    file: str
    start: int
    rows: int
    kind: str = "events"


@dataclass(frozen=True)
class Parsed:
    """One raw piece, split: `events + dead letters = rows read` for pieces that hold events."""

    events: pa.Table
    users: pa.Table
    items: pa.Table
    dead_letters: pa.Table
    rows_read: int


@dataclass(frozen=True)
class AssignedRequests:
    """For events of one or more whole users: which request each belongs to, and its label.

    `request` is -1 where an event is no candidate; otherwise requests count up from 0 within the
    given events. Of several events of one item in one request the first is the candidate.
    `request_time` holds one time in microseconds for each request.
    """

    request: np.ndarray
    label: np.ndarray
    request_time: np.ndarray


class Dataset(Protocol):
    """What a dataset module offers; see the module docstring."""

    SPEC: DatasetSpec

    def raw_units(self, data: str | None) -> list[RawUnit]:
        """The raw source in pieces."""

    def read_raw(self, unit: RawUnit) -> pa.Table:
        """One piece as it stands, for validation."""

    def parse(self, unit: RawUnit) -> Parsed:
        """One piece, split."""

    def assign_requests(self, events: pa.Table) -> AssignedRequests:
        """Which events are asked about together."""


def names() -> list[str]:
    """Datasets that exist."""
    return sorted(m.name for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_"))


@cache
def load(name: str) -> Dataset:
    """The dataset module of that name.

    Raises:
        DeclarationError: no such module, or one that declares what cannot be; the message names
            each field.
    """
    if name not in names():
        raise DeclarationError(
            f"no dataset {name!r}; there are {names()}{nearest(name, names())} Set MEMOIR_DATASET, or add "
            f"feature_repo/datasets/{name}.py"
        )
    module: ModuleType = importlib.import_module(f"feature_repo.datasets.{name}")
    file = f"feature_repo/datasets/{name}.py"
    if not isinstance(getattr(module, "SPEC", None), DatasetSpec):
        raise DeclarationError(f"{file} declares no SPEC: expected SPEC = DatasetSpec(...)")
    # All slips at once: whoever mends one by one runs the same command for each.
    wrong = problems(module.SPEC)
    if module.SPEC.name != name:
        wrong.insert(0, f"name is {module.SPEC.name!r}; expected {name!r}, the name of the file")
    wrong += [
        f"no function {f}; see feature_repo/datasets/__init__.py"
        for f in FUNCTIONS
        if not hasattr(module, f)
    ]
    if wrong:
        raise DeclarationError("\n".join([f"{file}, SPEC:", *(f"  {line}" for line in wrong)]))
    return cast(Dataset, module)


@cache
def load_contract(name: str) -> Contract:
    """The contract of a dataset."""
    return contract(load(name).SPEC)


def empty(spec: DatasetSpec, table: str) -> pa.Table:
    """An empty table of the dataset's contract."""
    return arrow_schema(contract(spec).table(table)).empty_table()
