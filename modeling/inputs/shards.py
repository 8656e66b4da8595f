"""Rows of numbers on disk, in shards that are read by memory map: what is asked for is copied, the rest
stays where it is.

A shard is one Arrow IPC file with a column for each array; an array of several dimensions is a list
of fixed size. Files of a folder are named in its manifest, which is written last.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from feature_repo.atomic import atomic_write
from feature_repo.errors import ExpectedError

MANIFEST = "manifest.json"


class ShardError(ExpectedError, RuntimeError):
    """A shard is damaged or gone."""


class DerivedRows:
    """Rows that a function makes of others when they are taken.

    Args:
        rows: what it is made of.
        change: changes a copy of some rows and returns it, of the same shape and type.

    Example:
        >>> derived = DerivedRows(np.arange(3), lambda rows: rows * 2)
        >>> len(derived), derived[np.array([2])].tolist()
        (3, [4])
    """

    def __init__(self, rows: Rows, change: Callable[[np.ndarray], np.ndarray]) -> None:
        self._rows = rows
        self._change = change
        self.shape: tuple[int, ...] = rows.shape
        self.dtype: np.dtype = rows.dtype

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, rows: np.ndarray | slice) -> np.ndarray:
        return self._change(np.array(self._rows[rows]))

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self[slice(None)].astype(dtype or self.dtype, copy=False)


class MappedRows:
    """Rows of several arrays as those of one; indexing copies what it takes, and nothing else.

    Args:
        parts: arrays that differ in their number of rows alone; at least one.

    Example:
        >>> rows = MappedRows([np.arange(3), np.arange(3, 9)])
        >>> len(rows), rows[np.array([8, 0])].tolist(), rows[2:4].tolist()
        (9, [8, 0], [2, 3])
    """

    def __init__(self, parts: Sequence[np.ndarray]) -> None:
        self._parts = list(parts)
        self._first = np.r_[0, np.cumsum([len(part) for part in parts])]
        self.shape = (int(self._first[-1]), *parts[0].shape[1:])
        self.dtype = parts[0].dtype

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: np.ndarray | slice) -> np.ndarray:
        if isinstance(rows, slice):
            return self[np.arange(*rows.indices(len(self)))]
        if rows.dtype == bool:
            rows = np.flatnonzero(rows)
        found = np.empty((len(rows), *self.shape[1:]), self.dtype)
        part = np.searchsorted(self._first, rows, side="right") - 1
        for number in np.unique(part):
            mine = part == number
            found[mine] = self._parts[number][rows[mine] - self._first[number]]
        return found

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.concatenate(self._parts).astype(dtype or self.dtype, copy=False)


Rows = np.ndarray | MappedRows | DerivedRows


def write_shard(path: Path, arrays: Mapping[str, Rows]) -> None:
    """Write arrays of one number of rows as a shard, visible once it is whole."""
    columns = []
    widths = {}
    for name, rows in arrays.items():
        array = np.asarray(rows)
        flat = pa.array(np.ascontiguousarray(array).reshape(-1))
        width = int(np.prod(array.shape[1:]))
        if array.ndim > 1 and width:
            columns.append(pa.FixedSizeListArray.from_arrays(flat, width))
        elif array.ndim > 1:
            # Arrow has no rows of nothing: their number is in the other columns
            columns.append(pa.nulls(len(array)))
        else:
            columns.append(flat)
        widths[name] = json.dumps([array.dtype.str, *array.shape[1:]])
    schema = pa.schema([pa.field(n, c.type) for n, c in zip(widths, columns, strict=True)])
    batch = pa.RecordBatch.from_arrays(columns, schema=schema.with_metadata(widths))
    with (
        atomic_write(path) as draft,
        pa.OSFile(str(draft), "wb") as sink,
        pa.ipc.new_file(sink, batch.schema) as writer,
    ):
        writer.write_batch(batch)


def read_shard(path: Path) -> dict[str, np.ndarray]:
    """Arrays of a shard over the file itself.

    Raises:
        ShardError: no shard, damaged, or gone.
    """
    try:
        batch = pa.ipc.open_file(pa.memory_map(str(path))).get_batch(0)
    except (pa.ArrowException, OSError) as error:
        raise ShardError(
            f"{path} is damaged or gone ({error}): remove {path.parent}, it is made anew"
        ) from error
    found = {}
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        kind, *rest = json.loads(batch.schema.metadata[name.encode()])
        if pa.types.is_null(column.type):
            found[name] = np.zeros((len(column), *rest), kind)
            continue
        flat = column.flatten() if pa.types.is_fixed_size_list(column.type) else column
        found[name] = flat.to_numpy().reshape(len(column), *rest)
    return found


def open_shards(paths: Sequence[Path]) -> dict[str, MappedRows]:
    """Arrays of several shards, each as one.

    Raises:
        ShardError: there is no shard, or one is damaged.
    """
    if not paths:
        raise ShardError("there is no shard to open")
    shards = [read_shard(path) for path in paths]
    return {name: MappedRows([shard[name] for shard in shards]) for name in shards[0]}
