"""The bytes of erased users' ids, wherever they stand in a file: in values, behind an Arrow null, on a
page of a database that nothing names any more, in a draft, in a log.

Looks at what a search of tables by their columns cannot: an id as it is written. Only text ids can be
told so, and only those of `LEAST_BYTES` and more: the digits of a number, or `ab`, stand in any file.
Numbers are decided by the type of a column, also where its value was struck and its bytes were kept.
"""

from __future__ import annotations

import mmap
import re
from collections.abc import Collection, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from feature_repo.contract.arrow import is_text

# Bytes of the shortest id that is searched by its bytes
LEAST_BYTES = 6
# Bytes that are read at a time of a file that is not local
PIECE = 1 << 24


def mark_of(users: Sequence[int | str]) -> re.Pattern[bytes] | None:
    """Return a pattern for the bytes of these ids; None if their bytes are too few to tell."""
    ids = [user.encode() for user in users if isinstance(user, str)]
    texts = [re.escape(one) for one in ids if len(one) >= LEAST_BYTES]
    if not texts:
        return None
    return re.compile(rb"(?<![0-9A-Za-z_])(?:" + b"|".join(texts) + rb")(?![0-9A-Za-z_])")


def traces_in(
    filesystem: pafs.FileSystem, path: str, mark: re.Pattern[bytes], without: Collection[str] = ()
) -> int:
    """How often ids stand in a file.

    Args:
        without: columns of Parquet files that may hold the same text and mean somebody else.
    """
    if path.endswith(".parquet"):
        with filesystem.open_input_file(path) as opened, pq.ParquetFile(opened) as file:
            return sum(_in_columns(batch, mark, without) for batch in file.iter_batches())
    if path.endswith(".arrow"):
        with filesystem.open_input_file(path) as opened, pa.ipc.open_file(opened) as read:
            batches = (read.get_batch(number) for number in range(read.num_record_batches))
            return sum(_in_columns(batch, mark, ()) for batch in batches)
    if isinstance(filesystem, pafs.LocalFileSystem):
        if not Path(path).stat().st_size:
            return 0
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return sum(1 for _ in mark.finditer(data))
    with filesystem.open_input_stream(path, compression=None) as stream:
        return _in_stream(stream, mark)


def _in_stream(stream: pa.NativeFile, mark: re.Pattern[bytes]) -> int:
    """The same of a file that comes in pieces; an id may lie across two of them."""
    found = 0
    before = b""
    while data := stream.read(PIECE):
        known = sum(1 for _ in mark.finditer(before))
        found += sum(1 for _ in mark.finditer(before + data)) - known
        before = data[-1024:]
    return found


def _in_columns(batch: pa.RecordBatch, mark: re.Pattern[bytes], without: Collection[str]) -> int:
    """The same of a table's columns: value by value, for in a file they stand wall to wall."""
    found = 0
    for field, column in zip(batch.schema, batch.columns, strict=True):
        if field.name in without or not _holds_text(field.type):
            continue
        if pa.types.is_nested(field.type):
            column = pc.list_flatten(column)
        struck = behind_nulls(pa.chunked_array([column]))
        for values in (column, *struck.chunks):
            texts = values.drop_null().cast(pa.large_binary()).to_pylist()
            found += sum(1 for _ in mark.finditer(b"\n".join(texts)))
    return found


def _holds_text(kind: pa.DataType) -> bool:
    """Return whether a column holds text or bytes, or lists of them."""
    nested = pa.types.is_list(kind) or pa.types.is_large_list(kind)
    return is_text(kind.value_type if nested else kind)


def behind_nulls(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Return the bytes behind nulls: values whose bit was cleared and whose bytes were kept. Null
    where nothing does, and where the column is not null.
    """
    chunks = []
    for chunk in column.chunks:
        shown = pa.Array.from_buffers(
            chunk.type, len(chunk), [None, *chunk.buffers()[1:]], offset=chunk.offset
        )
        nothing = pa.scalar(_empty(chunk.type), chunk.type)
        struck = pc.and_(pc.is_null(chunk), pc.not_equal(shown, nothing))
        chunks.append(pc.if_else(struck, shown, pa.scalar(None, chunk.type)))
    return pa.chunked_array(chunks, column.type)


def _empty(kind: pa.DataType) -> object:
    """Return the bytes behind a null that was never a value."""
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return ""
    return b"" if is_text(kind) else 0
