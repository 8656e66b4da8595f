"""Arrow types and schemas of the contract, and the stable hash that partitions keys."""

from __future__ import annotations

import hashlib
import zlib
from datetime import UTC, datetime, timedelta

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from feature_repo.contract.contract import Contract
from feature_repo.contract.schema import DType, Table

TIMESTAMP = pa.timestamp("us", tz="UTC")
# Stands in a column of codes or times for no value
NO_VALUE = -(2**63)
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
MICROS = 1_000_000  # of a second
# No row that we build is of another time: what lies beyond is a time that was read in the wrong
# unit.
LATEST = 4_102_444_800 * MICROS  # 2100-01-01

_TYPES: dict[DType, pa.DataType] = {
    DType.INT8: pa.int8(),
    DType.INT32: pa.int32(),
    DType.INT64: pa.int64(),
    DType.FLOAT32: pa.float32(),
    DType.STRING: pa.string(),
    DType.STRING_LIST: pa.list_(pa.string()),
    DType.FLOAT32_LIST: pa.list_(pa.float32()),
    DType.BYTES: pa.binary(),
    DType.TIMESTAMP: TIMESTAMP,
}


def arrow_type(dtype: DType) -> pa.DataType:
    """Arrow type of a contract type."""
    return _TYPES[dtype]


def arrow_schema(table: Table) -> pa.Schema:
    """Arrow schema of a table, columns in contract order.

    Every field may be null here: what a column may hold is for `limits.py` to check, row by row,
    and not for a writer, which could only refuse the whole table.
    """
    return pa.schema([pa.field(c.name, arrow_type(c.dtype)) for c in table.all_columns])


def history_schema(contract: Contract) -> pa.Schema:
    """Arrow schema of the events inside one history."""
    return pa.schema([pa.field(c.name, arrow_type(c.dtype)) for c in contract.history_columns])


def micros(column: pa.Array | pa.ChunkedArray) -> np.ndarray:
    """A timestamp column as int64 microseconds since the epoch."""
    return pc.cast(column, pa.int64()).to_numpy(zero_copy_only=False)


def from_micros(values: np.ndarray) -> pa.Array:
    """int64 microseconds since the epoch as a timestamp column."""
    return pa.array(values, pa.int64()).cast(TIMESTAMP)


def iso_micros(text: str) -> int:
    """An ISO time as microseconds since the epoch; without a zone it is UTC.

    Raises:
        ValueError: no ISO time.
    """
    time = datetime.fromisoformat(text)
    time = time.replace(tzinfo=UTC) if time.tzinfo is None else time
    return (time - EPOCH) // timedelta(microseconds=1)


def micros_iso(value: int) -> str:
    """Microseconds since the epoch as an ISO time, UTC."""
    return (EPOCH + timedelta(microseconds=value)).isoformat()


def value_codes(column: pa.Array | pa.ChunkedArray) -> np.ndarray:
    """An int64 for each value of a column, the same everywhere: whole numbers are their own, texts
    the first 64 bits of their BLAKE2b; `NO_VALUE` is null.
    """
    whole = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    if pa.types.is_integer(whole.type):
        return pc.fill_null(pc.cast(whole, pa.int64()), NO_VALUE).to_numpy(zero_copy_only=False)
    encoded = whole.dictionary_encode()
    digests = [
        hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=8).digest()
        for text in encoded.dictionary.to_pylist()
    ]
    codes = np.frombuffer(b"".join(digests), "<i8")
    place = pc.fill_null(encoded.indices, -1).to_numpy(zero_copy_only=False)
    return np.r_[codes, np.int64(NO_VALUE)][place]


def hash_keys(keys: pa.Array | pa.ChunkedArray) -> np.ndarray:
    """A stable uint64 hash of each key, the same in every process and version."""
    if isinstance(keys, pa.ChunkedArray):
        keys = keys.combine_chunks()
    if pa.types.is_integer(keys.type):
        hashed = keys.to_numpy(zero_copy_only=False).astype(np.uint64)
    else:
        encoded = keys.dictionary_encode()
        crc = np.array(
            [zlib.crc32(str(value).encode()) for value in encoded.dictionary.to_pylist()],
            dtype=np.uint64,
        )
        hashed = crc[encoded.indices.to_numpy()] if len(crc) else np.zeros(0, np.uint64)
    with np.errstate(over="ignore"):
        mixed = (hashed ^ (hashed >> np.uint64(33))) * np.uint64(0xFF51AFD7ED558CCD)
        return mixed ^ (mixed >> np.uint64(33))


def is_text(kind: pa.DataType) -> bool:
    """Return whether values of this type are texts or bytes."""
    tests = (
        pa.types.is_string,
        pa.types.is_large_string,
        pa.types.is_binary,
        pa.types.is_large_binary,
    )
    return any(test(kind) for test in tests)
