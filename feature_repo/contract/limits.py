"""Rows against what the contract allows: each row that breaks a limit is named with its reason, and
costs no other row.

What holds for a value that is kept holds for what is derived from it: a number that passed here is
finite and no larger than its column says (`LARGEST_NUMBER` at most), so that sums and means of it
are exact (`sums.py`).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from feature_repo.contract.arrow import LATEST, arrow_type
from feature_repo.contract.schema import (
    MAX_ID_BYTES,
    MAX_TEXT_BYTES,
    NUMBER_TYPES,
    Column,
    DType,
    Table,
)

# Characters of a value in a dead letter
MAX_SHOWN = 1000


@dataclass(frozen=True)
class Checked:
    """Rows of a table, split.

    Args:
        kept: rows within all limits, lists without their nulls.
        dead: positions of the others.
        reasons: why, one for each of `dead`; the first reason found.
        nulls_dropped: nulls that stood inside lists of kept rows.
    """

    kept: pa.Table
    dead: np.ndarray
    reasons: list[str]
    nulls_dropped: int


def check(table: Table, rows: pa.Table) -> Checked:
    """Split rows of a contract's table into those within its limits and the others."""
    reason = np.full(rows.num_rows, -1)
    texts: list[str] = []
    for column in table.all_columns:
        for broken, text in _broken(column, rows[column.name].combine_chunks()):
            fresh = broken & (reason < 0)
            if fresh.any():
                reason[fresh] = len(texts)
                texts.append(f"{column.name}: {text}")
    dead = np.flatnonzero(reason >= 0)
    kept = rows.filter(pa.array(reason < 0)) if len(dead) else rows
    kept, dropped = _without_nulls_in_lists(table, kept)
    return Checked(kept, dead, [texts[index] for index in reason[dead]], dropped)


def as_json(row: dict[str, Any]) -> str:
    """A raw row as a dead letter keeps it: long values cut, bytes that are no text shown as far as
    they can be.
    """
    return json.dumps(
        {name: shown(value) for name, value in row.items()}, default=str, ensure_ascii=False
    )


def shown(value: Any) -> Any:
    """A value of a raw row, cut where it is long."""
    if isinstance(value, bytes):
        value = value.decode(errors="replace")
    return (
        f"{value[:MAX_SHOWN]}… ({len(value):,} characters)"
        if isinstance(value, str) and len(value) > MAX_SHOWN
        else value
    )


def raw_rows(raw: pa.Table, positions: np.ndarray) -> list[str]:
    """Rows of a raw table as JSON, whatever bytes its text columns hold."""
    chosen = raw.take(pa.array(positions))
    for index, field in enumerate(chosen.schema):
        if pa.types.is_string(field.type) or pa.types.is_large_string(field.type):
            chosen = chosen.set_column(
                index, field.name, pc.cast(chosen[field.name], pa.large_binary())
            )
    return [as_json(row) for row in chosen.to_pylist()]


def _broken(column: Column, values: pa.Array) -> Iterator[tuple[np.ndarray, str]]:
    """For each limit of a column: which rows break it, and what to say."""
    # `check` keeps the first reason of a row, so the order here decides what a person reads.
    null = pc.is_null(values).to_numpy(zero_copy_only=False)
    if not column.nullable:
        yield null, "is missing"
    if column.dtype in NUMBER_TYPES:
        yield from _broken_numbers(column, values, null)
    if column.dtype is DType.FLOAT32_LIST:
        yield from _broken_vectors(column, values, null)
    if column.dtype is DType.STRING:
        # The server applies the limit of ids to requests as well.
        limit = MAX_ID_BYTES if column.is_key else MAX_TEXT_BYTES
        length = pc.fill_null(pc.binary_length(values), 0).to_numpy(zero_copy_only=False)
        yield length > limit, f"is longer than {limit:,} bytes"
        if column.is_key:
            yield (length == 0) & ~null, "is empty"
    if column.dtype is DType.TIMESTAMP:
        at = pc.fill_null(pc.cast(values, pa.int64()), 0).to_numpy(zero_copy_only=False)
        yield (at < 0) | (at >= LATEST), "is of no year from 1970 to 2099"
    # A null breaks no set of values: whether it may be there was decided above.
    if column.values is not None:
        allowed = pa.array(list(column.values)).cast(arrow_type(column.dtype))
        yield (
            ~pc.is_in(values, allowed).to_numpy(zero_copy_only=False) & ~null,
            f"is none of {column.values}",
        )
    if column.pattern is not None:
        fits = pc.fill_null(pc.match_substring_regex(values, column.pattern), True).to_numpy(
            zero_copy_only=False
        )
        yield ~fits, f"does not match {column.pattern}"


def _broken_numbers(
    column: Column, values: pa.Array, null: np.ndarray
) -> Iterator[tuple[np.ndarray, str]]:
    numbers = pc.fill_null(values, 0).to_numpy(zero_copy_only=False)
    if column.dtype is DType.FLOAT32:
        yield ~np.isfinite(numbers), "is no finite number"
    low, high = column.bounds
    if low is not None:
        yield (numbers < low) & ~null, f"is below {low:g}"
    if high is not None:
        yield (numbers > high) & ~null, f"is above {high:g}"


def _broken_vectors(
    column: Column, values: pa.Array, null: np.ndarray
) -> Iterator[tuple[np.ndarray, str]]:
    lengths = pc.fill_null(pc.list_value_length(values), 0).to_numpy(zero_copy_only=False)
    if column.max_length is not None:
        wrong = (lengths != column.max_length) & ~null
        yield wrong, f"has not the {column.max_length} numbers of the vector"
    numbers = pc.fill_null(pc.list_flatten(values), np.nan).to_numpy(zero_copy_only=False)
    bad = np.zeros(len(values), bool)
    bad[pc.list_parent_indices(values).to_numpy()[~np.isfinite(numbers)]] = True
    yield bad, "holds a value that is no finite number"


def _without_nulls_in_lists(table: Table, rows: pa.Table) -> tuple[pa.Table, int]:
    """Lists without the nulls inside them, and how many there were."""
    dropped = 0
    for column in table.all_columns:
        if column.dtype is not DType.STRING_LIST:
            continue
        lists = rows[column.name].combine_chunks()
        nulls = pc.list_flatten(lists).null_count
        if not nulls:
            continue
        dropped += nulls
        clean = [
            None if value is None else [v for v in value if v is not None]
            for value in lists.to_pylist()
        ]
        at = rows.column_names.index(column.name)
        rows = rows.set_column(at, column.name, pa.array(clean, lists.type))
    return rows, dropped
