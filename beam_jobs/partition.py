"""Arrow batches between Beam steps: hash-partition by key, ship as IPC bytes, join again in source
order.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from feature_repo.arrow import hash_keys
from feature_repo.schema import EVENT_TIMESTAMP

Key = tuple[str, int]  # table, partition
Piece = tuple[int, bytes]  # number of the unit it came from, Arrow IPC stream


def to_ipc(table: pa.Table) -> bytes:
    """A table as Arrow IPC stream bytes."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
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
    if not table.num_rows:
        return
    partition = (hash_keys(table[key_column]) % np.uint64(num_partitions)).astype(np.int64)
    order = np.argsort(partition, kind="stable")
    ordered, sizes = table.take(pa.array(order)), np.bincount(partition, minlength=num_partitions)
    start = 0
    for number, size in enumerate(sizes):
        if size:
            yield number, ordered.slice(start, size)
        start += int(size)


def sort_by_key_and_time(table: pa.Table, key_column: str, ties: tuple[str, ...] = ()) -> pa.Table:
    """Sort by key, then time, then `ties`; equal ones keep their order."""
    row = pa.array(np.arange(table.num_rows))
    names = (key_column, EVENT_TIMESTAMP, *ties, "__row")
    keys = table.select(list(names[:-1])).append_column("__row", row)
    order = pc.sort_indices(keys, sort_keys=[(name, "ascending") for name in names])
    return table.take(order).combine_chunks()
