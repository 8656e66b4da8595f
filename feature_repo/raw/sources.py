"""Raw files → raw tables: any delimiter, encoding and compression, a block of rows at a time.

A file is cut into units that workers read by themselves: ranges of rows of a Parquet file, ranges
of bytes (between two lines) of a CSV or JSON file. A compressed file cannot be entered in the
middle, so it is one unit, read as a stream. Nothing is interpreted here: values of CSV files stay
bytes, so that ids keep their spelling; `raw.py` reads them as the types that a dataset declares.
"""

from __future__ import annotations

import codecs
import csv
import hashlib
import io
import itertools
import json
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal
from urllib.parse import unquote

import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from feature_repo.contract.schema import FILE_TIME, MAX_TEXT_BYTES, Source
from feature_repo.errors import RawDataError

# Bytes of a CSV or JSON file that one worker reads
UNIT_BYTES = 1 << 24
# Rows of a Parquet file that one worker reads
UNIT_ROWS = 200_000
# Rows of a Parquet file in memory at a time; fewer where rows are long
BATCH_ROWS = 16_384
# Bytes of a row on average, from where on rows are long
LONG_ROW = 4_096
# `raw.texts` says which texts are too long
csv.field_size_limit(sys.maxsize)
# Before the name of a file that lies in this package, wherever that is installed
SHIPPED = "shipped:"
BOM = b"\xef\xbb\xbf"
FORMATS = {
    ".csv": "csv",
    ".tsv": "csv",
    ".txt": "csv",
    ".dat": "csv",
    ".data": "csv",
    ".item": "csv",
    ".user": "csv",
    ".json": "json",
    ".jsonl": "json",
    ".ndjson": "json",
    ".parquet": "parquet",
    ".pq": "parquet",
}
CODECS = {".gz": "gzip", ".bz2": "bz2", ".zst": "zstd", ".lz4": "lz4"}
COMPRESSED = tuple(CODECS)
# Bytes of a text file in which its header stands
HEAD_BYTES = 1 << 20
# So far a first line is read that is longer
LONGEST_LINE = 1 << 26
# Marks at a file's beginning, and the encodings that they stand for; the longer ones first.
MARKS = (
    (b"\xff\xfe\x00\x00", "utf-32"), (b"\x00\x00\xfe\xff", "utf-32"),
    (b"\xff\xfe", "utf-16"), (b"\xfe\xff", "utf-16"),
)  # fmt: skip


@dataclass(frozen=True)
class RawUnit:
    """A piece of a raw source that one worker reads.

    Args:
        file: path or URI.
        start: number of its first row in the file.
        rows: how many it has; of a compressed file -1, which knows only its reader.
        kind: "events", "users" or "items".
        offset, size: where it lies in a text file, bytes; a size of -1 is the rest.
        encoding: of a text file.
        written: when the file was last written, microseconds; 0 where no source arrives by it.
    """

    file: str
    start: int
    rows: int
    kind: str = "events"
    offset: int = 0
    size: int = -1
    encoding: str = "utf-8"
    written: int = 0


@dataclass(frozen=True)
class RawBlock:
    """Rows of a unit as they stand.

    Args:
        rows: the asked columns; of CSV files as bytes.
        positions: of each row in its file, from 0.
        broken: positions of lines that are no rows, their text, and why.
    """

    rows: pa.Table
    positions: np.ndarray
    broken: tuple[tuple[int, str, str], ...] = ()

    @property
    def num_read(self) -> int:
        return len(self.positions) + len(self.broken)


def format_of(source: Source, file: str) -> str:
    """The format of a file: csv, json or parquet.

    Raises:
        RawDataError: neither the source nor the file's name says.
    """
    if source.format:
        return source.format
    name = file.lower()
    for suffix in COMPRESSED:
        name = name.removesuffix(suffix)
    for suffix, found in FORMATS.items():
        if name.endswith(suffix):
            return found
    raise RawDataError(
        f"{file}: its name does not say what it is; set Source.format to 'csv', 'json' or 'parquet'"
    )


def is_csv(source: Source, file: str) -> bool:
    """Return whether a file is a table of lines; a name without a known ending says yes."""
    try:
        return format_of(source, file) == "csv"
    except RawDataError:
        return True


def files_of(source: Source, data: str | None) -> list[str]:
    """List the files of a source, sorted by name: those of its first path that exists.

    Args:
        data: the folder that holds the raw data, a path or a URI.

    Raises:
        RawDataError: no file is there.
    """
    if data is None:
        raise RawDataError(
            f"MEMOIR_DATA is not set: set it to the folder that holds {_paths(source)[0]}"
        )
    for path in _paths(source):
        if found := _matching(data, path):
            return found
    wanted = " or ".join(_paths(source))
    raise RawDataError(f"expected {wanted} in {data}; found none")


def units_of(
    source: Source,
    data: str | None,
    kind: str,
    columns: Sequence[str],
    optional: Sequence[str] = (),
) -> list[RawUnit]:
    """A source in pieces.

    Args:
        columns: that are read.
        optional: those of them that a file may lack, and is null there; some file must have each.

    Raises:
        RawDataError: no file, only empty ones, one that cannot be read, or one without a column.
    """
    files = files_of(source, data)
    filled = [file for file in files if size_of(file)]
    if not filled:
        raise RawDataError(f"{files[0]} is empty: 0 bytes, where {kind} are expected")
    lacking = set(columns)
    units: list[RawUnit] = []
    for file in filled:
        found = _has(source, file, columns)
        lacking -= found
        # Objects of JSON leave out what is null.
        is_json = format_of(source, file) == "json"
        needed = [name for name in columns if not is_json and name not in optional]
        if not found.issuperset(needed):
            _refuse_missing(file, needed, columns_in(source, file))
        if format_of(source, file) == "parquet":
            units += _parquet_units(file, kind)
        else:
            units += _text_units(source, file, kind)
    if lacking:
        _refuse_missing(filled[-1], [c for c in columns if c in lacking], columns_in(source, file))
    if source.arrival == FILE_TIME:
        units = [replace(unit, written=written_at(unit.file)) for unit in units]
    return units


def written_at(file: str) -> int:
    """When a file was last written, microseconds.

    Raises:
        RawDataError: its store does not say.
    """
    filesystem, path = located(file)
    time_ns = filesystem.get_file_info(path).mtime_ns
    if time_ns is None:
        raise RawDataError(
            f"{file}: its store does not say when it was written; name a column by Source.arrival"
        )
    return int(time_ns // 1000)


def _has(source: Source, file: str, columns: Sequence[str]) -> set[str]:
    """Which of these columns a file has. In JSON lines a field may come late: they are searched."""
    found = set(columns) & set(columns_in(source, file))
    rest = set(columns) - found
    if rest and format_of(source, file) == "json":
        keys = {name: f'"{name.rsplit(".", 1)[-1]}"'.encode() for name in rest}
        before = b""
        with open_text(file, _encoding(source, file)) as stream:
            while rest and (data := stream.read(UNIT_BYTES)):
                seen = {name for name in rest if keys[name] in before + data}
                found |= seen
                rest -= seen
                before = data[-MAX_TEXT_BYTES:]
    return found


def path_columns(file: str) -> dict[str, str]:
    """Return the columns that a path gives to every row below it: event → view of `event=view/part-0.csv`."""
    parts = (part.split("=", 1) for part in file.split("/")[:-1] if "=" in part)
    return {name: unquote(value) for name, value in parts if name}


def blocks_of(source: Source, unit: RawUnit, columns: Sequence[str]) -> Iterator[RawBlock]:
    """The rows of a unit, a block at a time."""
    found = format_of(source, unit.file)
    names: Sequence[str] = ()
    if found == "json":
        # A field that an object lacks is null
        held = list(columns)
    else:
        names = (
            _leaves(unit.file) if found == "parquet" else _header(source, unit.file, unit.encoding)
        )
        held = [name for name in columns if name in names]
    if found == "parquet":
        for start, rows in _parquet_blocks(unit, held):
            yield _completed(RawBlock(rows, start + np.arange(rows.num_rows)), unit.file, columns)
        return
    read = _csv_block if found == "csv" else _json_block
    start = unit.start
    for data in _lines_of(unit, source.quoted_newlines):
        block = read(source, names, held, _as_utf8(data, unit.encoding), start)
        start += block.num_read
        yield _completed(block, unit.file, columns)


# A text file with more bytes is read at both ends instead of whole
END_BYTES = 1 << 21


def ends_of(source: Source, units: Sequence[RawUnit]) -> list[RawUnit]:
    """Both ends of every file of some units, as smaller units; of a packed file the whole."""
    by_file: dict[str, list[RawUnit]] = {}
    for unit in units:
        by_file.setdefault(unit.file, []).append(unit)
    ends: list[RawUnit] = []
    for several in by_file.values():
        first = several[0]
        last = several[-1]
        if format_of(source, first.file) == "parquet":
            ends.append(replace(first, rows=min(first.rows, BATCH_ROWS)))
            if last.start + last.rows > BATCH_ROWS:
                rows = min(last.rows, BATCH_ROWS)
                ends.append(replace(last, start=last.start + last.rows - rows, rows=rows))
        elif first.size < 0 or (first is last and first.size <= END_BYTES):
            ends.append(first)
        else:
            ends += [_beginning_of(first), _end_of(last)]
    return ends


def _beginning_of(unit: RawUnit) -> RawUnit:
    data = _bytes_of(unit)[: END_BYTES // 2]
    data = data[: data.rfind(b"\n") + 1] or _bytes_of(unit)
    return replace(unit, size=len(data), rows=_num_lines(data))


def _end_of(unit: RawUnit) -> RawUnit:
    data = _bytes_of(unit)
    skipped = data.find(b"\n", max(len(data) - END_BYTES // 2, 0)) + 1
    kept = data[skipped:] or data
    skipped = len(data) - len(kept)
    rows = _num_lines(kept)
    return replace(
        unit,
        start=unit.start + unit.rows - rows,
        rows=rows,
        offset=unit.offset + skipped,
        size=len(kept),
    )


def _bytes_of(unit: RawUnit) -> bytes:
    return next(_lines_of(unit, False))


def _completed(block: RawBlock, file: str, columns: Sequence[str]) -> RawBlock:
    """A block with the columns that its file says by its path, and nulls for those that it lacks."""
    rows = block.rows
    in_path = path_columns(file)
    for name in columns:
        lacks = name not in rows.column_names
        if lacks or (name in in_path and rows[name].null_count == len(rows)):
            value = in_path.get(name)
            values = pa.array([value] * len(block.positions), pa.string())
            at = rows.schema.get_field_index(name)
            rows = rows.append_column(name, values) if lacks else rows.set_column(at, name, values)
    return replace(block, rows=rows.select(list(columns)))


def columns_in(source: Source, file: str) -> list[str]:
    """Return the names of a file's columns, then of those in its path. A field inside an object is a
    column: `user.id`.
    """
    found = format_of(source, file)
    if found == "parquet":
        names = dict.fromkeys(_leaves(file))
    elif found == "csv":
        names = dict.fromkeys(_header(source, file, _encoding(source, file)))
    else:
        names = {}
        data = beginning_of(file, _encoding(source, file))
        for line in data.decode("utf-8", "replace").splitlines()[:1000]:
            try:
                row = json.loads(line)
            except ValueError:
                continue
            names |= dict.fromkeys(_keys_of(row) if isinstance(row, dict) else ())
    return list(names | dict.fromkeys(path_columns(file)))


def _keys_of(row: dict[str, Any], before: str = "") -> Iterator[str]:
    for key, value in row.items():
        if isinstance(value, dict) and value:
            yield from _keys_of(value, f"{before}{key}.")
        else:
            yield before + key


# --- Parquet


def _leaves(file: str) -> list[str]:
    """Columns of a Parquet file; of an object its fields, as `user.id`."""
    return list(_leaf_fields(_parquet(file).schema_arrow))


def _leaf_fields(fields: Iterable[pa.Field], before: str = "") -> Iterator[str]:
    for each in fields:
        if pa.types.is_struct(each.type):
            yield from _leaf_fields(each.type, f"{before}{each.name}.")
        else:
            yield before + each.name


def _parquet(file: str) -> pq.ParquetFile:
    filesystem, path = located(file)
    try:
        return pq.ParquetFile(path, filesystem=filesystem)
    except (pa.ArrowInvalid, OSError) as error:
        raise RawDataError(f"{file} is no Parquet file that can be read: {error}") from error


def _parquet_units(file: str, kind: str) -> list[RawUnit]:
    """Row groups, small ones together: what is read of a group is read from its beginning."""
    metadata = _parquet(file).metadata
    units = []
    start = 0
    rows = 0
    for number in range(metadata.num_row_groups):
        rows += metadata.row_group(number).num_rows
        if rows >= UNIT_ROWS or number + 1 == metadata.num_row_groups:
            units.append(RawUnit(file, start, rows, kind))
            start = start + rows
            rows = 0
    return units


def _parquet_blocks(unit: RawUnit, columns: Sequence[str]) -> Iterator[tuple[int, pa.Table]]:
    """Rows of a range, with the number of the first; longer texts cut just beyond what is allowed."""
    opened = _parquet(unit.file)
    # 1. Find the row groups that the range touches, and the row where the first begins.
    groups = []
    offset = None
    before = 0
    size = 0
    stop = unit.start + unit.rows
    for number in range(opened.num_row_groups):
        group = opened.metadata.row_group(number)
        if before < stop and before + group.num_rows > unit.start:
            groups.append(number)
            size += group.total_byte_size
            offset = before if offset is None else offset
        before += group.num_rows
    at = offset or 0
    # 2. Read fewer rows at a time where they are long: a batch is held in memory.
    long = size > LONG_ROW * max(unit.rows, 1)
    batch_rows = BATCH_ROWS >> 4 if long else BATCH_ROWS
    # 3. Read these groups, and cut each batch to the range.
    waiting: list[pa.Table] = []
    start = unit.start
    for batch in opened.iter_batches(batch_rows, row_groups=groups, columns=list(columns)):
        first = max(unit.start - at, 0)
        last = min(stop - at, batch.num_rows)
        at += batch.num_rows
        if last > first:
            table = pa.Table.from_batches([batch.slice(first, last - first)])
            # Objects may hold objects, and each pass opens one level: `user.id` is a column.
            while any(pa.types.is_struct(column.type) for column in table.schema):
                table = table.flatten()
            waiting.append(shortened(_without_views(table)))
        if sum(len(table) for table in waiting) >= UNIT_ROWS or (waiting and at >= stop):
            whole = pa.concat_tables(waiting, promote_options="permissive").select(list(columns))
            yield start, whole
            start = start + len(whole)
            waiting = []


def _without_views(rows: pa.Table) -> pa.Table:
    """Texts and bytes as arrays that Arrow can filter; of views it cannot yet."""
    for index, column in enumerate(rows.schema):
        if pa.types.is_string_view(column.type) or pa.types.is_binary_view(column.type):
            kind = pa.string() if pa.types.is_string_view(column.type) else pa.binary()
            rows = rows.set_column(index, column.name, rows[column.name].cast(kind))
    return rows


def shortened(rows: pa.Table) -> pa.Table:
    """Long texts cut, in bytes, to one more than what is allowed: they are refused later, and cost
    nothing until then.
    """
    import pyarrow.compute as pc

    for index, field in enumerate(rows.schema):
        kind = field.type.value_type if pa.types.is_dictionary(field.type) else field.type
        texts = (pa.string(), pa.large_string(), pa.binary(), pa.large_binary())
        if kind not in texts:
            continue
        column = rows[field.name].cast(kind) if kind != field.type else rows[field.name]
        if (pc.max(pc.binary_length(column)).as_py() or 0) > MAX_TEXT_BYTES:
            cut = pc.binary_slice(pc.cast(column, pa.binary()), 0, MAX_TEXT_BYTES + 1)
            rows = rows.set_column(index, field.name, cut)
    return rows


# --- text files


def _text_units(source: Source, file: str, kind: str) -> list[RawUnit]:
    encoding = _encoding(source, file)
    is_csv = format_of(source, file) == "csv"
    skipped = _head(source, file, encoding).size if is_csv else _bom_bytes(file, encoding)
    if file.lower().endswith(COMPRESSED) or source.quoted_newlines or _is_wide(encoding):
        return [RawUnit(file, 0, -1, kind, skipped, -1, encoding)]
    units = []
    start = 0
    offset = skipped
    with open_stream(file) as stream:
        stream.read(skipped)
        for data in _whole_lines(stream, UNIT_BYTES):
            rows = _num_lines(data)
            units.append(RawUnit(file, start, rows, kind, offset, len(data), encoding))
            start = start + rows
            offset = offset + len(data)
    return units


def _whole_lines(stream: Any, size: int) -> Iterator[bytes]:
    """Pieces of about so many bytes that end where a line does."""
    rest = b""
    while data := stream.read(size):
        end = data.rfind(b"\n") + 1
        if not end:
            rest += data
            continue
        yield rest + data[:end]
        rest = data[end:]
    if rest:
        yield rest


def _num_lines(data: bytes) -> int:
    ends = np.flatnonzero(np.frombuffer(data, np.uint8) == 10)
    if not data.endswith(b"\n"):
        ends = np.r_[ends, len(data)]
    lengths = np.diff(ends, prepend=-1) - 1
    number = int((lengths > 0).sum())
    if b"\r" in data:
        alone = lengths == 1
        starts = ends[alone] - 1
        number -= int((np.frombuffer(data, np.uint8)[starts] == 13).sum())
    return number


def _lines_of(unit: RawUnit, whole: bool) -> Iterator[bytes]:
    """A unit's bytes, in pieces that end where a line does, or whole."""
    filesystem, path = located(unit.file)
    if unit.size >= 0:
        with filesystem.open_input_file(path) as opened:
            opened.seek(unit.offset)
            yield opened.read(unit.size)
        return
    with open_text(unit.file, unit.encoding) as stream:
        stream.read(unit.offset)
        if whole:
            yield stream.read()
        else:
            yield from _whole_lines(stream, UNIT_BYTES)


def _as_utf8(data: bytes, encoding: str) -> bytes:
    if encoding in ("utf-8", "utf8", "ascii") or _is_wide(encoding):  # see `open_text`
        return data
    return data.decode(encoding, "replace").encode()


def _encoding(source: Source, file: str) -> str:
    """Return the encoding of the byte order mark; else the first declared one in which the
    whole file can be read; the last, if none can.
    """
    if marked := marked_encoding(file):
        return marked
    for encoding in source.encodings[:-1]:
        try:
            with open_stream(file) as stream:
                for data in _whole_lines(stream, UNIT_BYTES):
                    data.decode(encoding)
            return encoding
        except UnicodeDecodeError:
            continue
    return source.encodings[-1]


def marked_encoding(file: str) -> str:
    """Return the encoding of a wide byte order mark; "" without a mark."""
    with open_stream(file) as stream:
        first: bytes = stream.read(4)
    return next((encoding for mark, encoding in MARKS if first.startswith(mark)), "")


def beginning_of(file: str, encoding: str) -> bytes:
    """The first bytes of a text file, with the whole of its first line."""
    with open_text(file, encoding) as stream:
        data = stream.read(HEAD_BYTES)
        while b"\n" not in data[-HEAD_BYTES:] and len(data) < LONGEST_LINE:
            more = stream.read(HEAD_BYTES)
            if not more:
                break
            data += more
    return data


def _is_wide(encoding: str) -> bool:
    """Return whether a line end has more than one byte, so that a file cannot be cut there."""
    return encoding.lower().replace("_", "-").startswith(("utf-16", "utf-32", "utf16", "utf32"))


def _bom_bytes(file: str, encoding: str) -> int:
    with open_text(file, encoding) as stream:
        return len(BOM) if stream.read(len(BOM)) == BOM else 0


@dataclass(frozen=True)
class _Head:
    """The part of a CSV file before its rows: names of the columns, and its bytes."""

    names: tuple[str, ...]
    size: int


def _head(source: Source, file: str, encoding: str) -> _Head:
    size = _bom_bytes(file, encoding)
    with open_text(file, encoding) as stream:
        lines = stream.read(HEAD_BYTES)[size:].split(b"\n")
    above = source.skip + (not source.header)
    size += sum(len(line) + 1 for line in lines[:above])
    if source.header:
        return _Head(source.header, size)
    line = _as_utf8(lines[source.skip] if source.skip < len(lines) else b"", encoding)
    text = line.decode("utf-8", "replace").strip("\r\n")
    return _Head(named_once(fields_of(text, source)), size)


def _header(source: Source, file: str, encoding: str) -> tuple[str, ...]:
    return source.header or _head(source, file, encoding).names


def named_once(names: Iterable[str]) -> tuple[str, ...]:
    """Names of columns, each once: a blank one by its place, a second of one name with a number."""
    found: dict[str, None] = {}
    for place, name in enumerate(names, 1):
        base = name.strip() or f"column_{place}"
        numbers = (f"{base}_{number}" for number in itertools.count(2))
        found[next(n for n in itertools.chain([base], numbers) if n not in found)] = None
    return tuple(found)


def fields_of(line: str, source: Source) -> list[str]:
    """Fields of one line.

    Raises:
        csv.Error: no reader of CSV files would take it.
    """
    if len(source.delimiter) > 1:
        return line.split(source.delimiter)
    quoting: Literal[0, 3] = csv.QUOTE_MINIMAL if source.quote else csv.QUOTE_NONE
    reader = csv.reader(
        [line],
        delimiter=source.delimiter,
        quoting=quoting,
        quotechar=source.quote or None,
        escapechar=source.escape or None,
        doublequote=not source.escape,
    )
    return next(reader, [])


def _csv_block(
    source: Source, names: Sequence[str], columns: Sequence[str], data: bytes, start: int
) -> RawBlock:
    """Lines as a table of bytes; what is no row is set aside with its text."""
    # A return that ends no line is an end to Arrow and none to us.
    if len(source.delimiter) > 1 or data.count(b"\r") != data.count(b"\r\n"):
        return _split_by_hand(source, names, columns, data, start)
    broken: list[tuple[int, str, str]] = []

    def set_aside(row: pacsv.InvalidRow) -> str:
        why = f"has {row.actual_columns} fields, expected {row.expected_columns}"
        broken.append((row.number - 1, row.text, why))
        return "skip"

    try:
        rows = pacsv.read_csv(
            io.BytesIO(data),
            # Only without threads does Arrow know the number of a row that it refuses.
            read_options=pacsv.ReadOptions(
                use_threads=False, column_names=list(names), block_size=len(data) + 1
            ),
            parse_options=pacsv.ParseOptions(
                delimiter=source.delimiter,
                quote_char=source.quote or False,
                double_quote=not source.escape,
                escape_char=source.escape or False,
                invalid_row_handler=set_aside,
                newlines_in_values=source.quoted_newlines,
            ),
            # Values stay bytes: ids keep their spelling, and an invalid byte costs one value.
            convert_options=pacsv.ConvertOptions(
                column_types={name: pa.binary() for name in names},
                check_utf8=False,
                strings_can_be_null=False,
                include_columns=list(columns),
            ),
        )
    except pa.ArrowInvalid:
        return _split_by_hand(source, names, columns, data, start)
    lines = rows.num_rows + len(broken)
    # A quote that is never closed
    if not source.quoted_newlines and lines != _num_lines(data):
        return _split_by_hand(source, names, columns, data, start)
    positions = np.delete(np.arange(lines), [at for at, _, _ in broken])
    found = tuple((start + at, text, why) for at, text, why in broken)
    return RawBlock(rows, start + positions, found)


def _split_by_hand(
    source: Source, names: Sequence[str], columns: Sequence[str], data: bytes, start: int
) -> RawBlock:
    """Line by line, as Python's csv module or the delimiter alone reads each."""
    chosen = [names.index(column) for column in columns]
    values: list[list[bytes]] = [[] for _ in columns]
    positions: list[int] = []
    broken: list[tuple[int, str, str]] = []
    # Surrogates carry bytes that are no UTF-8 through; `raw.texts` says of them what they are.
    lines = data.decode("utf-8", "surrogateescape").split("\n")
    for at, line in enumerate(line for line in map(_without_return, lines) if line):
        try:
            fields = fields_of(line, source)
        except csv.Error as error:
            broken.append((start + at, _shown(line), str(error)))
            continue
        if len(fields) != len(names):
            why = f"has {len(fields)} fields, expected {len(names)}"
            broken.append((start + at, _shown(line), why))
            continue
        positions.append(start + at)
        for column, index in zip(values, chosen, strict=True):
            column.append(fields[index].encode("utf-8", "surrogateescape"))
    rows = pa.table([pa.array(column, pa.binary()) for column in values], names=list(columns))
    return RawBlock(rows, np.array(positions, np.int64), tuple(broken))


def _shown(line: str) -> str:
    """A line with a sign for each byte that is no UTF-8."""
    return line.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def _without_return(line: str) -> str:
    return line.removesuffix("\r")


def _json_block(
    source: Source, names: Sequence[str], columns: Sequence[str], data: bytes, start: int
) -> RawBlock:
    """One JSON object in a line. Numbers that are ids keep their digits."""
    values: list[list[Any]] = [[] for _ in columns]
    positions: list[int] = []
    broken: list[tuple[int, str, str]] = []
    lines = map(_without_return, data.decode("utf-8", "replace").split("\n"))
    for at, line in enumerate(line for line in lines if line):
        try:
            row = json.loads(line)
        except ValueError as error:
            broken.append((start + at, line, f"is no JSON: {error}"))
            continue
        if not isinstance(row, dict):
            broken.append((start + at, line, "is no JSON object"))
            continue
        positions.append(start + at)
        for name, column in zip(columns, values, strict=True):
            column.append(_value_of(row, name))
    rows = pa.table([_arrow_of(column) for column in values], names=list(columns))
    return RawBlock(rows, np.array(positions, np.int64), tuple(broken))


def _value_of(row: dict[str, Any], name: str) -> Any:
    """A field of an object, or of an object inside of it: `user.id`."""
    if name in row or "." not in name:
        return row.get(name)
    first, rest = name.split(".", 1)
    inner = row.get(first)
    return _value_of(inner, rest) if isinstance(inner, dict) else None


def _arrow_of(values: list[Any]) -> pa.Array:
    """Values of one type as they are; of several as text."""
    kinds = {type(value) for value in values if value is not None}
    if kinds <= {int, float} or (len(kinds) == 1 and kinds <= {str, bool, list}):
        try:
            return pa.array(values)
        except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError, UnicodeEncodeError):
            pass
    texts = [_text_of(value) for value in values]
    # Half an emoji is a text to JSON and none in UTF-8; as bytes it is found to be unreadable.
    data = [None if text is None else text.encode("utf-8", "surrogatepass") for text in texts]
    return pa.array(data, pa.binary())


def _text_of(value: Any) -> str | None:
    if value is None or isinstance(value, str):
        return value
    return json.dumps(value, ensure_ascii=False)


# --- where files are


def located(file: str) -> tuple[pafs.FileSystem, str]:
    """File system and path of a path, a URI, or a file that is shipped with this package."""
    if file.startswith(SHIPPED):
        file = str(Path(__file__).resolve().parent.parent / "data" / file.removeprefix(SHIPPED))
    if "://" in file:
        filesystem, path = pafs.FileSystem.from_uri(file)
        return filesystem, path
    return pafs.LocalFileSystem(), file


def sha256_of(file: str) -> str:
    """Digest of a file's bytes, or of the names and bytes of all files of a folder; hexadecimal."""
    filesystem, path = located(file)
    if filesystem.get_file_info(path).type == pafs.FileType.Directory:
        scheme = file.split("://")[0] + "://" if "://" in file else ""
        content = hashlib.sha256()
        for below in _below(filesystem, path, scheme):
            content.update(f"{below.removeprefix(file)} {sha256_of(below)}\n".encode())
        return content.hexdigest()
    with filesystem.open_input_stream(path, compression=None) as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


class _Bytes:
    """A file's bytes from its beginning, unpacked. What cannot be unpacked is said by file and byte."""

    def __init__(self, file: str) -> None:
        self._file = file
        filesystem, path = located(file)
        codec = CODECS.get(file[file.rfind(".") :].lower())
        try:
            self._packed = filesystem.open_input_file(path)
            self._stream = pa.CompressedInputStream(self._packed, codec) if codec else self._packed
        except OSError as error:
            raise RawDataError(f"{file} cannot be read: {error}") from error

    def read(self, size: int | None = None) -> bytes:
        """So many bytes, fewer at the end, or all that is left.

        Raises:
            RawDataError: the file is damaged, or ends before its end.
        """
        try:
            data: bytes = self._stream.read(size)
        except (OSError, pa.ArrowInvalid) as error:
            raise RawDataError(
                f"{self._file} cannot be unpacked around byte {self._packed.tell():,}: {error}. It is cut off, "
                "or something stands behind its end: fetch it again"
            ) from error
        return data

    def __enter__(self) -> _Bytes:
        return self

    def __exit__(self, *_: object) -> None:
        self._stream.close()


class _Transcoded:
    """The bytes of a text in UTF-16 or UTF-32 as UTF-8; invalid ones become a replacement character."""

    def __init__(self, stream: _Bytes, encoding: str) -> None:
        self._stream = stream
        self._decoder = codecs.getincrementaldecoder(encoding)("replace")
        self._ready = b""

    def read(self, size: int | None = None) -> bytes:
        """So many bytes, fewer at the end, or all that is left."""
        while size is None or len(self._ready) < size:
            data = self._stream.read(size if size is None else max(size, HEAD_BYTES))
            self._ready += self._decoder.decode(data, final=not data).encode("utf-8", "replace")
            if not data or size is None:
                break
        size = len(self._ready) if size is None else size
        given = self._ready[:size]
        self._ready = self._ready[size:]
        return given

    def __enter__(self) -> _Transcoded:
        return self

    def __exit__(self, *_: object) -> None:
        self._stream.__exit__()


def open_stream(file: str) -> _Bytes:
    """A file's bytes from its beginning, unpacked.

    Raises:
        RawDataError: it cannot be read.
    """
    return _Bytes(file)


def open_text(file: str, encoding: str) -> _Bytes | _Transcoded:
    """A file's bytes from its beginning, unpacked; of a wide encoding as UTF-8."""
    stream = open_stream(file)
    return _Transcoded(stream, encoding) if _is_wide(encoding) else stream


def size_of(file: str) -> int:
    """Bytes of a file as it lies."""
    filesystem, path = located(file)
    return int(filesystem.get_file_info(path).size or 0)


def _paths(source: Source) -> tuple[str, ...]:
    return (source.path,) if isinstance(source.path, str) else source.path


def _matching(data: str, pattern: str) -> list[str]:
    """List the files that a path names: the file itself, all below a folder, or all that match."""
    whole = (
        pattern if pattern.startswith("/") or "://" in pattern else f"{data.rstrip('/')}/{pattern}"
    )
    filesystem, path = located(whole)
    scheme = whole.split("://")[0] + "://" if "://" in whole else ""
    found = filesystem.get_file_info(path)
    if found.type == pafs.FileType.File:
        return [whole]
    if found.type == pafs.FileType.Directory:
        return _below(filesystem, path, scheme)
    if not any(sign in path for sign in "*?["):
        return []
    # The longest part of the path that has no pattern in it is where to look.
    parts = path.split("/")
    fixed = next(n for n, part in enumerate(parts) if any(sign in part for sign in "*?["))
    wanted = re.compile("/".join(_part_pattern(part) for part in parts))
    every = _below(filesystem, "/".join(parts[:fixed]), scheme)
    return [file for file in every if wanted.fullmatch(file.removeprefix(scheme))]


def _part_pattern(part: str) -> str:
    """A folder's or file's name in a glob as a regular expression; `**` is any number of folders."""
    if part == "**":
        return ".*"
    escaped = re.escape(part).replace(r"\*", "[^/]*").replace(r"\?", "[^/]")
    return re.sub(r"\\\[(.*?)\\\]", r"[\1]", escaped)


def _below(filesystem: pafs.FileSystem, folder: str, scheme: str) -> list[str]:
    """Data files of a folder, however deep; hidden ones are none."""
    selector = pafs.FileSelector(folder, recursive=True, allow_not_found=True)
    infos: Iterable[pafs.FileInfo] = filesystem.get_file_info(selector)
    files = [i.path for i in infos if i.type == pafs.FileType.File]
    below = len(folder.rstrip("/")) + 1

    def hidden(file: str) -> bool:
        return any(part.startswith((".", "_")) for part in file[below:].split("/"))

    return sorted(scheme + file for file in files if not hidden(file))


def _refuse_missing(file: str, columns: Sequence[str], found: Sequence[str]) -> None:
    missing = [name for name in columns if name not in found]
    if missing:
        raise RawDataError(f"{file}: columns {missing} are missing; the file has {list(found)}")
