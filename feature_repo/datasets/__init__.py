"""One module per dataset: a declaration, `SPEC`, of where its raw tables are and what is in them.

Most logs need no code. Where one is odd, its module may define

- `derive(kind, read, given) -> Derived`: columns that no file has, and rows that are no event, for
  the rows of "events", "users" or "items". `read` holds the declared columns, null where a value
  cannot be read; `given` the rows as they stand.

Limits of columns are checked by the job, row by row (`limits.py`); which events are asked about
together follows from `SPEC.requests` (`examples.py`).

To add a dataset, run `python -m feature_repo new NAME --events PATH`, correct what it writes, and
set `MEMOIR_DATASET` to its name. No other file changes. A declaration may as well lie in a package of
your own: `MEMOIR_DATASET=my_package.my_module`, or the path of its file; workers of a pipeline need
the variable and the module too.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import pkgutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from types import ModuleType

import pyarrow as pa

from feature_repo.contract.contract import Contract, contract
from feature_repo.contract.declarations import problems
from feature_repo.contract.schema import FILE_TIME, DatasetSpec, OwnView, Source
from feature_repo.errors import DeclarationError, RawDataError, nearest
from feature_repo.home.code import own_digest
from feature_repo.raw import parse, sources
from feature_repo.raw.parse import Derive, Derived, Parsed
from feature_repo.raw.sources import RawBlock, RawUnit
from feature_repo.settings import declared_dataset

__all__ = ["Dataset", "Derived", "Parsed", "RawDataError", "RawUnit", "load", "names"]

# Raw data of the sample dataset
SHIPPED = Path(__file__).resolve().parent.parent / "data"


@dataclass(frozen=True)
class Dataset:
    """A declaration, and the code beside it where there is some.

    Example:
        >>> shop = datasets.load("online_retail")
        >>> parsed = next(shop.parse(shop.raw_units(None)[0]))
    """

    spec: DatasetSpec
    derive: Derive | None = None
    shipped: bool = False

    @property
    def code(self) -> str:
        """Digest of what the module does beside declaring `SPEC`; "" where that is nothing."""
        if self.derive is None:
            return ""
        return own_digest(f"feature_repo.datasets.{self.spec.name}", without=("SPEC", "SHIPPED"))

    @property
    def contract(self) -> Contract:
        """The tables that follow from the declaration."""
        return contract(self.spec)

    def raw_units(self, data: str | None) -> list[RawUnit]:
        """The raw sources in pieces.

        Args:
            data: the folder that holds them; None: the shipped sample, where the dataset has one.

        Raises:
            RawDataError: a source is missing, or lacks a column.
        """
        units: list[RawUnit] = []
        for kind, source in self.sources.items():
            columns = parse.theirs(self.spec, kind)
            optional = parse.optional(self.spec, kind)
            units += sources.units_of(source, self._folder(data), kind, columns, optional)
        if data is None and self.shipped:
            # A worker may have them elsewhere.
            shown = len(f"{SHIPPED}/")
            units = [replace(u, file=f"{sources.SHIPPED}{u.file[shown:]}") for u in units]
        return units

    @property
    def sources(self) -> dict[str, Source]:
        found = {kind: getattr(self.spec, kind) for kind in parse.KINDS}
        return {kind: source for kind, source in found.items() if source is not None}

    def files(self, data: str | None) -> list[str]:
        """Raw files of all sources.

        Raises:
            RawDataError: a source has none.
        """
        folder = self._folder(data)
        every = (sources.files_of(source, folder) for source in self.sources.values())
        return list(dict.fromkeys(file for found in every for file in found))

    def written(self, data: str | None) -> dict[str, int]:
        """When each raw file was last written, microseconds; of those whose rows arrive then."""
        folder = self._folder(data)
        of_files = [source for source in self.sources.values() if source.arrival == FILE_TIME]
        files = [file for source in of_files for file in sources.files_of(source, folder)]
        return {file: sources.written_at(file) for file in sorted(files)}

    def path_of(self, view: OwnView, data: str | None) -> str:
        """Return the path of a custom feature view's file."""
        folder = self._folder(data)
        if view.path.startswith("/") or "://" in view.path or folder is None:
            return view.path
        return f"{folder.rstrip('/')}/{view.path}"

    def views_digest(self, data: str | None) -> str:
        """Digest of the files of a person's own views."""
        files = [self.path_of(view, data) for view in self.spec.views]
        content = [
            [view.name, sources.sha256_of(file)]
            for view, file in zip(self.spec.views, files, strict=True)
        ]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]

    def _folder(self, data: str | None) -> str | None:
        return str(SHIPPED) if data is None and self.shipped else data

    def read_raw(self, unit: RawUnit) -> Iterator[pa.Table]:
        """One piece as the declared columns, a block at a time, for validation."""
        for block in self.blocks(unit):
            yield parse.typed(self.spec, unit, block.rows)

    def parse(self, unit: RawUnit) -> Iterator[Parsed]:
        """One piece as events, users, items and dead letters, a block at a time."""
        for block in self.blocks(unit):
            yield self.parse_block(unit, block)

    def parse_block(self, unit: RawUnit, block: RawBlock) -> Parsed:
        """One block of a piece as events, users, items and dead letters."""
        return parse.parse(self.contract, unit, block, self.derive)

    def blocks(self, unit: RawUnit) -> Iterator[RawBlock]:
        """One piece as it stands, a block at a time."""
        source = getattr(self.spec, unit.kind)
        return sources.blocks_of(source, unit, parse.theirs(self.spec, unit.kind))


def names() -> list[str]:
    """Datasets that exist, that of `MEMOIR_DATASET` among them wherever it lies."""
    folder = declared_dataset().folder
    if folder and folder not in __path__:
        __path__.append(folder)
        importlib.invalidate_caches()
    return sorted(m.name for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_"))


@cache
def load(name: str) -> Dataset:
    """The dataset of that name.

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
    file = _shown(module, name)
    if not isinstance(getattr(module, "SPEC", None), DatasetSpec):
        raise DeclarationError(f"{file} declares no SPEC: expected SPEC = DatasetSpec(...)")
    wrong = problems(module.SPEC)
    if module.SPEC.name != name:
        wrong.insert(0, f"name is {module.SPEC.name!r}; expected {name!r}, the name of the file")
    derive = getattr(module, "derive", None)
    wrong += [
        f"{kind}.derived is {source.derived}, and the module has no function derive"
        for kind in parse.KINDS
        if (source := getattr(module.SPEC, kind)) and source.derived and derive is None
    ]
    if wrong:
        raise DeclarationError("\n".join([f"{file}, SPEC:", *(f"  {line}" for line in wrong)]))
    return Dataset(module.SPEC, derive, getattr(module, "SHIPPED", False))


def _shown(module: ModuleType, name: str) -> str:
    """The file of a declaration, as a person names it.

    Raises:
        DeclarationError: `MEMOIR_DATASET` names a file of the name of one of ours.
    """
    declared = declared_dataset()
    file = Path(module.__file__ or "")
    if declared.name == name and declared.folder and str(file.parent) != declared.folder:
        raise DeclarationError(
            f"{declared.folder}/{name}.py has the name of {file}: rename it, and its SPEC.name"
        )
    inside = file.is_relative_to(SHIPPED.parent)
    return f"feature_repo/{file.relative_to(SHIPPED.parent)}" if inside else str(file)


@cache
def load_contract(name: str) -> Contract:
    """The contract of a dataset."""
    return load(name).contract
