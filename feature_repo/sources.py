"""Raw files → raw tables: any delimiter, encoding and compression, a block of rows at a time.

A file is cut into units that workers read by themselves: ranges of rows of a Parquet file, ranges
of bytes (between two lines) of a CSV or JSON file. A compressed file cannot be entered in the
middle, so it is one unit, read as a stream. Nothing is interpreted here: values of CSV files stay
bytes, so that ids keep their spelling; `raw.py` reads them as the types that a dataset declares.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from feature_repo.errors import RawDataError
from feature_repo.schema import MAX_TEXT_BYTES, Source

UNIT_BYTES = 1 << 24  # of a CSV or JSON file that one worker reads
UNIT_ROWS = 200_000  # of a Parquet file
BATCH_ROWS = 16_384  # of a Parquet file in memory at a time; fewer where rows are long
LONG_ROW = 4_096  # bytes of a row on average, from where on rows are long
csv.field_size_limit(sys.maxsize)  # `raw.texts` says which texts are too long
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
COMPRESSED = (".gz", ".bz2", ".zst", ".lz4")


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
    """

    file: str
    start: int
    rows: int
    kind: str = "events"
    offset: int = 0
    size: int = -1
    encoding: str = "utf-8"


@dataclass(frozen=True)
class Block:
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
        """Rows, broken ones included."""
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


def files_of(source: Source, data: str | None) -> list[str]:
    """Files of a source, sorted by name: of its paths the first that there is.

    Args:
        data: the folder that holds the raw data, a path or a URI.

    Raises:
        RawDataError: there is none.
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


def units_of(source: Source, data: str | None, kind: str, columns: Sequence[str]) -> list[RawUnit]:
    """A source in pieces.

    Args:
        columns: that every file must have.

    Raises:
        RawDataError: no file, one that cannot be read, or one without a column.
    """
    units: list[RawUnit] = []
    for file in files_of(source, data):
        filesystem, path = located(file)
        if filesystem.get_file_info(path).size == 0:
            continue
        if format_of(source, file) == "parquet":
            parquet_rows(file, columns)
            units += _parquet_units(file, kind)
        else:
            units += _text_units(source, file, kind, columns)
    return units


def blocks_of(source: Source, unit: RawUnit, columns: Sequence[str]) -> Iterator[Block]:
    """The rows of a unit, a block at a time."""
    found = format_of(source, unit.file)
    if found == "parquet":
        for start, rows in _parquet_blocks(unit, columns):
            yield Block(rows, start + np.arange(rows.num_rows))
        return
    read = _csv_block if found == "csv" else _json_block
    names = _header(source, unit.file, unit.encoding) if found == "csv" else ()
    start = unit.start
    for data in _lines_of(unit, source.quoted_newlines):
        block = read(source, names, columns, _as_utf8(data, unit.encoding), start)
        start += block.num_read
        yield block


def columns_in(source: Source, file: str) -> list[str]:
    """Names of the columns of a file."""
    found = format_of(source, file)
    if found == "parquet":
        return list(_parquet(file).schema_arrow.names)
    encoding = _encoding(source, file)
    if found == "csv":
        return list(_header(source, file, encoding))
    with open_stream(file) as stream:
        lines = stream.read(1 << 20).decode(encoding, "replace").splitlines()[:100]
    names: dict[str, None] = {}
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        names |= dict.fromkeys(row if isinstance(row, dict) else ())
    return list(names)


# --- Parquet


def parquet_rows(file: str, columns: Sequence[str]) -> int:
    """Rows of a Parquet file that has these columns.

    Raises:
        RawDataError: it is no Parquet file, or lacks a column.
    """
    opened = _parquet(file)
    _refuse_missing(file, columns, opened.schema_arrow.names)
    rows: int = opened.metadata.num_rows
    return rows


def _parquet(file: str) -> pq.ParquetFile:
    filesystem, path = located(file)
    try:
        return pq.ParquetFile(path, filesystem=filesystem)
    except (pa.ArrowInvalid, OSError) as error:
        raise RawDataError(f"{file} is no Parquet file that can be read: {error}") from error


def _parquet_units(file: str, kind: str) -> list[RawUnit]:
    """Row groups, small ones together: what is read of a group is read from its beginning."""
    metadata = _parquet(file).metadata
    units, start, rows = [], 0, 0
    for number in range(metadata.num_row_groups):
        rows += metadata.row_group(number).num_rows
        if rows >= UNIT_ROWS or number + 1 == metadata.num_row_groups:
            units.append(RawUnit(file, start, rows, kind))
            start, rows = start + rows, 0
    return units


def _parquet_blocks(unit: RawUnit, columns: Sequence[str]) -> Iterator[tuple[int, pa.Table]]:
    """Rows of a range, with the number of the first; longer texts cut just beyond what is allowed."""
    opened = _parquet(unit.file)
    groups, offset, before, size = [], None, 0, 0
    stop = unit.start + unit.rows
    for number in range(opened.num_row_groups):
        group = opened.metadata.row_group(number)
        if before < stop and before + group.num_rows > unit.start:
            groups.append(number)
            size += group.total_byte_size
            offset = before if offset is None else offset
        before += group.num_rows
    at = offset or 0
    long = size > LONG_ROW * max(unit.rows, 1)
    batch_rows = BATCH_ROWS >> 4 if long else BATCH_ROWS
    waiting: list[pa.Table] = []
    start = unit.start
    for batch in opened.iter_batches(batch_rows, row_groups=groups, columns=list(columns)):
        first, last = max(unit.start - at, 0), min(stop - at, batch.num_rows)
        at += batch.num_rows
        if last > first:
            waiting.append(shortened(pa.Table.from_batches([batch.slice(first, last - first)])))
        if sum(len(table) for table in waiting) >= UNIT_ROWS or (waiting and at >= stop):
            whole = pa.concat_tables(waiting, promote_options="permissive").select(list(columns))
            yield start, whole
            start, waiting = start + len(whole), []


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


def _text_units(source: Source, file: str, kind: str, columns: Sequence[str]) -> list[RawUnit]:
    encoding = _encoding(source, file)
    is_csv = format_of(source, file) == "csv"
    if is_csv:
        _refuse_missing(file, columns, _header(source, file, encoding))
    skipped = _header_bytes(source, file) if is_csv else _bom_bytes(file)
    if file.lower().endswith(COMPRESSED) or source.quoted_newlines:
        return [RawUnit(file, 0, -1, kind, skipped, -1, encoding)]
    units, start, offset = [], 0, skipped
    with open_stream(file) as stream:
        stream.read(skipped)
        for data in _whole_lines(stream, UNIT_BYTES):
            rows = _num_lines(data)
            units.append(RawUnit(file, start, rows, kind, offset, len(data), encoding))
            start, offset = start + rows, offset + len(data)
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
    """Lines that are not empty."""
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
    with open_stream(unit.file) as stream:
        stream.read(unit.offset)
        if whole:
            yield stream.read()
        else:
            yield from _whole_lines(stream, UNIT_BYTES)


def _as_utf8(data: bytes, encoding: str) -> bytes:
    if encoding in ("utf-8", "utf8", "ascii"):
        return data
    return data.decode(encoding, "replace").encode()


def _encoding(source: Source, file: str) -> str:
    """The first of the declared encodings in which the whole file can be read; the last, if none
    can.
    """
    for encoding in source.encodings[:-1]:
        try:
            with open_stream(file) as stream:
                for data in _whole_lines(stream, UNIT_BYTES):
                    data.decode(encoding)
            return encoding
        except UnicodeDecodeError:
            continue
    return source.encodings[-1]


def _bom_bytes(file: str) -> int:
    with open_stream(file) as stream:
        return len(BOM) if stream.read(len(BOM)) == BOM else 0


def _first_line(file: str) -> bytes:
    with open_stream(file) as stream:
        data: bytes = stream.read(1 << 16)
    return data.split(b"\n", 1)[0] + b"\n"


def _header_bytes(source: Source, file: str) -> int:
    """Bytes before the first row."""
    return _bom_bytes(file) if source.header else len(_first_line(file))


def _header(source: Source, file: str, encoding: str) -> tuple[str, ...]:
    if source.header:
        return source.header
    line = _first_line(file).removeprefix(BOM).decode(encoding, "replace").strip("\r\n")
    names = fields_of(line, source.delimiter)
    return tuple(name.strip() for name in names)


def fields_of(line: str, delimiter: str) -> list[str]:
    """Fields of one line.

    Raises:
        csv.Error: no reader of CSV files would take it.
    """
    if len(delimiter) > 1:
        return line.split(delimiter)
    return next(csv.reader([line], delimiter=delimiter), [])


def _csv_block(
    source: Source, names: Sequence[str], columns: Sequence[str], data: bytes, start: int
) -> Block:
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
            read_options=pacsv.ReadOptions(
                use_threads=False, column_names=list(names), block_size=len(data) + 1
            ),
            parse_options=pacsv.ParseOptions(
                delimiter=source.delimiter,
                invalid_row_handler=set_aside,
                newlines_in_values=source.quoted_newlines,
            ),
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
    if not source.quoted_newlines and lines != _num_lines(data):  # a quote that is never closed
        return _split_by_hand(source, names, columns, data, start)
    positions = np.delete(np.arange(lines), [at for at, _, _ in broken])
    found = tuple((start + at, text, why) for at, text, why in broken)
    return Block(rows, start + positions, found)


def _split_by_hand(
    source: Source, names: Sequence[str], columns: Sequence[str], data: bytes, start: int
) -> Block:
    """Line by line, as Python's csv module or the delimiter alone reads each."""
    chosen = [names.index(column) for column in columns]
    values: list[list[bytes]] = [[] for _ in columns]
    positions: list[int] = []
    broken: list[tuple[int, str, str]] = []
    # Surrogates carry bytes that are no UTF-8 through; `raw.texts` says of them what they are.
    lines = data.decode("utf-8", "surrogateescape").split("\n")
    for at, line in enumerate(line for line in map(_without_return, lines) if line):
        try:
            fields = fields_of(line, source.delimiter)
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
    return Block(rows, np.array(positions, np.int64), tuple(broken))


def _shown(line: str) -> str:
    """A line with a sign for each byte that is no UTF-8."""
    return line.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def _without_return(line: str) -> str:
    return line.removesuffix("\r")


def _json_block(
    source: Source, names: Sequence[str], columns: Sequence[str], data: bytes, start: int
) -> Block:
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
            column.append(row.get(name))
    rows = pa.table([_arrow_of(column) for column in values], names=list(columns))
    return Block(rows, np.array(positions, np.int64), tuple(broken))


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
    """File system and path of a path or a URI."""
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


def open_stream(file: str) -> Any:
    """A file's bytes from its beginning, unpacked.

    Raises:
        RawDataError: it cannot be read.
    """
    filesystem, path = located(file)
    try:
        return filesystem.open_input_stream(path, compression="detect")
    except OSError as error:
        raise RawDataError(f"{file} cannot be read: {error}") from error


def _paths(source: Source) -> tuple[str, ...]:
    return (source.path,) if isinstance(source.path, str) else source.path


def _matching(data: str, pattern: str) -> list[str]:
    """Files that a path names: itself, all below it where it is a folder, or those that match."""
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
