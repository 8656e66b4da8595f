"""Arrow batches between Beam steps: hash-partition by key, ship as IPC bytes, join again in source
order.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from feature_repo.contract.arrow import hash_keys, micros
from feature_repo.contract.schema import EVENT_TIMESTAMP

# Table, partition
Key = tuple[str, int]
# Number of the unit it came from, Arrow IPC stream
Piece = tuple[int, bytes]


def to_ipc(table: pa.Table) -> bytes:
    """A table as Arrow IPC stream bytes; compressed, for a runner copies them several times."""
    sink = pa.BufferOutputStream()
    options = pa.ipc.IpcWriteOptions(compression="lz4")
    with pa.ipc.new_stream(sink, table.schema, options=options) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


def from_ipc(data: bytes) -> pa.Table:
    """The table behind `to_ipc` bytes."""
    return pa.ipc.open_stream(data).read_all()


def join_pieces(pieces: Iterable[Piece]) -> pa.Table:
    """Pieces of one partition in source order, whatever order they arrived in."""
    return pa.concat_tables([from_ipc(data) for _, data in sorted(pieces)]).combine_chunks()


def split_by_key(
    table: pa.Table, key_column: str, num_partitions: int
) -> Iterator[tuple[int, pa.Table]]:
    """Rows by hash of their key; within a partition rows keep their order."""
    if table.num_rows:
        yield from split_by_hash(table, hash_keys(table[key_column]), num_partitions)


def split_by_hash(
    table: pa.Table, hashes: np.ndarray, num_partitions: int
) -> Iterator[tuple[int, pa.Table]]:
    """Rows by a uint64 of each; within a partition rows keep their order."""
    partition = (hashes % np.uint64(num_partitions)).astype(np.int64)
    order = np.argsort(partition, kind="stable")
    ordered = table.take(pa.array(order))
    sizes = np.bincount(partition, minlength=num_partitions)
    start = 0
    for number, size in enumerate(sizes):
        if size:
            yield number, ordered.slice(start, size)
        start += int(size)


def sort_by_key_and_time(table: pa.Table, key_column: str, ties: tuple[str, ...] = ()) -> pa.Table:
    """Sort by key, then time, then `ties`; equal ones keep their order."""
    columns = [_ranks(table[name]) for name in (key_column, EVENT_TIMESTAMP)]
    # One at a time, for hardly any rows are equal in what stands before.
    for name in ties:
        columns.append(_ranks(table[name]))
        order = np.lexsort(columns[::-1])
        if not _any_equal(columns, order):
            break
    else:
        order = np.lexsort(columns[::-1])
    return table.take(pa.array(order)).combine_chunks()


def _ranks(column: pa.ChunkedArray) -> np.ndarray:
    """Numbers in the order of a column's values; nulls last."""
    if pa.types.is_timestamp(column.type):
        return micros(column)
    if pa.types.is_integer(column.type) and not column.null_count:
        return column.to_numpy()
    encoded = column.combine_chunks().dictionary_encode()
    order = pc.sort_indices(encoded.dictionary).to_numpy()
    rank = np.empty(len(order) + 1, np.int64)
    rank[order] = np.arange(len(order))
    rank[-1] = len(order)
    return rank[pc.fill_null(encoded.indices, -1).to_numpy(zero_copy_only=False)]


def _any_equal(columns: list[np.ndarray], order: np.ndarray) -> bool:
    """Return whether two neighbours in this order are equal in all columns."""
    equal = np.ones(max(len(order) - 1, 0), bool)
    for values in columns:
        ordered = values[order]
        equal &= ordered[1:] == ordered[:-1]
    return bool(equal.any())
