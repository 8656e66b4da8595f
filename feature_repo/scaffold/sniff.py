"""How a text file is written: encoding, delimiter, quotes, and what stands above its rows.

DuckDB's sniffer decides about delimiter, quotes and lines to skip; it is right about more shapes
than rules of ours were. It reads neither UTF-16 nor Latin-1, no `::`, and believes the first line of
a file of words alone to be a header; these are decided here. Files are read by `sources.py`, whose
speed is the same and which refuses a packed file that was cut off, where DuckDB's reader gives the
rows until then (`benchmarks/text_readers_epyc2_2026-11-28.md`).
"""

from __future__ import annotations

import csv
import io
import json
import re
import tempfile
from dataclasses import dataclass, field, replace
from typing import Literal, cast

import numpy as np

from feature_repo.contract.schema import Source
from feature_repo.errors import RawDataError
from feature_repo.raw import sources
from feature_repo.scaffold.names import KNOWN_WORDS, parts_of

DELIMITERS = ("::", "\t", ";", "|", ",")
ENCODINGS = ("utf-8", "cp1252", "latin-1")
# Lines at a file's beginning that decide
LINES = 2000
# Encodings by the place of the zero byte in most pairs
WIDE = {0: "utf-16-be", 1: "utf-16-le"}
SQL = "statements of SQL"
# How files begin that are no lines of a table, whatever their name says.
BEGINNINGS = {
    b"PK\x03\x04": "a zip archive or an Excel workbook",
    b"\xd0\xcf\x11\xe0": "an Excel workbook of before 2007",
    b"PAR1\x15": "a Parquet file under another name",
    b"ARROW1\0": "an Arrow file",
    b"Obj\x01": "an Avro file",
    b"\x1f\x8b": "packed by gzip under another name",
    b"BZh": "packed by bzip2 under another name",
    b"\x28\xb5\x2f\xfd": "packed by Zstandard under another name",
    b"\xfd7zXZ": "packed by xz",
    b"7z\xbc\xaf": "a 7-Zip archive",
    b"Rar!": "a RAR archive",
    b"SQLite format 3": "an SQLite database",
    b"version https://git-lfs": "a pointer of Git LFS, not the file it stands for",
    b"%PDF-": "a PDF document",
    b"<!doctype html": "a web page",
    b"<html": "a web page",
    b"<?xml": "an XML document",
    b"-- mysql dump": SQL,
    b"-- mariadb dump": SQL,
    b"--\n-- postgresql": SQL,
    b"create table": SQL,
    b"insert into": SQL,
    b"pragma foreign_keys": SQL,
}
NUMBER = re.compile(r"\s*[+-]?[0-9][0-9.,:T/ -]*([+-][0-9:]+|Z|UTC)?\s*")
UUID = re.compile(r"[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}")


@dataclass(frozen=True)
class Sniffed:
    """The dialect of a text file, and the doubts about it.

    Args:
        source: with the file's delimiter, quotes, encodings, header and lines to skip.
        lines: of its beginning, without skipped ones; the header is among them.
        doubts: field of the source → why it may be otherwise.
    """

    source: Source
    lines: tuple[str, ...]
    doubts: dict[str, str] = field(default_factory=dict)


def sniff(path: str, file: str, prefix: str) -> Sniffed:
    """How a file is written.

    Args:
        path: of the source that is made.
        prefix: of the names of columns where the file has no header: event_1, event_2.

    Raises:
        RawDataError: it is no table of lines.
    """
    # 1. Find encoding, lines and dialect.
    text, encodings = _text_of(file)
    if "\n" not in text and "\r" in text:
        raise RawDataError(
            f"{file}: its lines end in carriage returns alone; convert them, for example by `tr '\\r' '\\n'`"
        )
    lines = [line.rstrip("\r") for line in text.split("\n")][:LINES]
    source = replace(Source(path, format="csv"), encodings=encodings)
    source = _with_line_above(_dialect(source, lines), lines)
    lines = lines[source.skip :]
    filled = [line for line in lines if line.strip()]
    if not filled:
        raise RawDataError(f"{path} has no row")
    try:
        first, *below = [sources.fields_of(line, source) for line in filled]
    except csv.Error as error:
        raise RawDataError(f"{file} is no table of lines: {error}") from error
    doubts = _of_encoding(text, encodings)
    if source.skip:
        above = text.split("\n")[source.skip - 1].strip()
        doubts["skip"] = f"left out, {above[:60]!r} being the last"
    # 2. Names of the columns, with a doubt wherever the lines do not decide.
    header = _header_of(first, below)
    if header is None:
        names = tuple(f"{prefix}_{number}" for number in range(1, len(first) + 1))
        source = replace(source, header=names)
        doubts["header"] = "no line names the columns"
    elif header != sources.named_once(first):
        # A column that only the rows have
        source = replace(source, header=header, skip=source.skip + 1)
        doubts["header"] = f"its own names {len(first)} of {len(header)} columns"
    elif not _says_roles(first) and all(
        _is_word(row, at) for row in below[:50] for at in range(len(first))
    ):
        doubts["header"] = "the first line is taken for names, though all are words"
    return Sniffed(_with_quotes(source, text), tuple(lines), doubts)


def refuse_other_json(file: str) -> None:
    """Refuse what is called JSON and holds no object in a line.

    Raises:
        RawDataError: it is an array, or its first line is no object.
    """
    text, _ = _text_of(file)
    if text.lstrip().startswith("["):
        raise RawDataError(
            f"{file} is a JSON array; write an object in a line, as `jq -c '.[]'` does"
        )
    first = next((line for line in text.split("\n") if line.strip()), "")
    try:
        found = json.loads(first)
    except ValueError as error:
        whole = text.strip().endswith("}") and text.count("\n") > 2 and len(first) < 3
        hint = "an object over several lines" if whole else f"{first[:60]!r}"
        raise RawDataError(
            f"{file}: expected a JSON object in each line, not {hint} ({error}); `jq -c .` writes them so"
        ) from error
    if not isinstance(found, dict):
        raise RawDataError(f"{file}: expected a JSON object in each line, not {first[:60]!r}")


def same_dialect(declared: Source, file: str) -> str:
    """Return how a file's beginning contradicts a declaration, in a line; "" if it does not."""
    if declared.format not in ("", "csv") or not sources.is_csv(declared, file):
        return ""
    text, _ = _text_of(file)
    lines = [line.rstrip("\r") for line in text.split("\n")][:LINES]
    lines = [line for line in lines[declared.skip :] if line.strip()][not declared.header :]
    if declared.quote and '"' in "".join(lines):
        plain = replace(declared, quote="", escape="", quoted_newlines=False)
        found = _dialect(replace(plain, skip=0), lines)
        odd = sum(_is_odd(line, declared) for line in lines)
        if not found.quote and odd:
            return f'{odd:,} of its first {len(lines):,} lines hold quotes that enclose no field: is quote="" meant?'
        if found.escape and not declared.escape and any(found.escape in line for line in lines):
            return f"its quotes are escaped by {found.escape!r}: is escape={found.escape!r} meant?"
    return ""


def _is_odd(line: str, source: Source) -> bool:
    """Return whether a quote stands where a reader of CSV files would change the text."""
    if '"' not in line:
        return False
    sign = re.escape(source.delimiter)
    well = rf'("([^"]|"")*"|[^"]*?)({sign}|$)'
    return re.fullmatch(f"({well})+", line) is None


def _text_of(file: str) -> tuple[str, tuple[str, ...]]:
    """The beginning of a file as text, whole lines, and the encodings in which it was read."""
    marked = sources.marked_encoding(file)
    data = sources.beginning_of(file, marked or "utf-8")
    _refuse_other_kinds(file, data)
    if marked:
        return data.decode("utf-8", "replace").removeprefix("\ufeff"), ("utf-8",)
    zeros = np.flatnonzero(np.frombuffer(data[:4096], np.uint8) == 0) % 2
    if len(zeros) > len(data[:4096]) // 4:
        wide = WIDE[int(zeros.mean() > 0.5)]
        return data.decode(wide, "replace"), (wide,)
    data = data.removeprefix(sources.BOM)
    cut = len(data) >= sources.HEAD_BYTES - len(sources.BOM)
    whole = (data[: data.rfind(b"\n") + 1] if cut else data) or data
    for number, encoding in enumerate(ENCODINGS):
        try:
            return whole.decode(encoding), ENCODINGS[: number + 1]
        except UnicodeDecodeError:
            continue
    raise AssertionError("latin-1 reads every byte")


def _of_encoding(text: str, encodings: tuple[str, ...]) -> dict[str, str]:
    """A doubt with a word to look at, where the bytes were no UTF-8: every text of one byte a letter can
    be read as another such.
    """
    foreign = re.search(r"[^\s,;|\"]*[^\x00-\x7f][^\s,;|\"]*", text)
    if len(encodings) < 2 or foreign is None:
        return {}
    shown = foreign.group()[:40]
    return {
        "encodings": f"no UTF-8; is {shown!r} spelt right? Else name the file's, such as 'cp1251' or 'shift_jis'"
    }


def _refuse_other_kinds(file: str, data: bytes) -> None:
    """Refuse what is no text by how it begins.

    Raises:
        RawDataError: it names what the file is.
    """
    begins = data[:64].lstrip()
    tar = "a tar archive" if data[257:262] == b"ustar" else ""
    kinds = (
        kind
        for mark, kind in BEGINNINGS.items()
        if begins.startswith(mark) or begins.lower().startswith(mark)
    )
    if kind := tar or next(kinds, ""):
        raise RawDataError(
            f"{file} is {kind}: unpack or export it, and name a text or Parquet file"
        )


def _dialect(source: Source, lines: list[str]) -> Source:
    """A source with delimiter, quotes and lines to skip as DuckDB's sniffer sees them."""
    import duckdb

    # 1. Look for a delimiter of two signs, which DuckDB does not try.
    if _agreement(lines, "::") > 0.8:
        return replace(source, delimiter="::")
    # 2. Ask DuckDB's sniffer, which reads files alone: the first lines become one.
    with tempfile.NamedTemporaryFile("w", suffix=".csv", encoding="utf-8", newline="") as head:
        head.write("\n".join(lines) + "\n")
        head.flush()
        try:
            found = duckdb.sql(
                f"SELECT Delimiter, Quote, Escape, SkipRows, len(Columns) FROM sniff_csv('{head.name}', sample_size=-1)"
            ).fetchone()
        except duckdb.Error:
            found = None
    if found is not None and found[4] > 1:
        delimiter, quote, escape, skip, _ = ("" if v == "(empty)" else v for v in found)
        escape = "" if escape == quote else escape
        used = quote and any(_begins_field(line, quote, delimiter) for line in lines)
        quote = quote if used else ""
        if not quote and not any('"' in line for line in lines):
            # A quote comes later.
            quote = '"'
        return replace(
            source,
            delimiter=delimiter,
            quote=cast(Literal['"', "'", ""], quote),
            escape=escape if used else "",
            skip=int(skip),
        )
    # 3. Take the delimiter on which the lines agree best, where DuckDB finds none.
    best = max(DELIMITERS, key=lambda sign: _agreement(lines, sign))
    return replace(source, delimiter=best if _agreement(lines, best) else ",")


def _begins_field(line: str, quote: str, delimiter: str) -> bool:
    """Return whether a quote begins a field of a line."""
    return line.startswith(quote) or delimiter + quote in line


def _with_line_above(source: Source, lines: list[str]) -> Source:
    """A skipped line that names all columns but one, such as R writes, is the header."""
    if not source.skip or len(source.delimiter) > 1 or source.skip >= len(lines):
        return source
    above, first = (sources.fields_of(line, source) for line in lines[source.skip - 1 :][:2])
    is_header = len(above) > 1 and len(above) == len(first) - 1
    words = not any(NUMBER.fullmatch(name) or not name.strip() for name in above)
    return replace(source, skip=source.skip - 1) if is_header and words else source


def _agreement(lines: list[str], delimiter: str) -> float:
    """Share of the lines that have the commonest number of fields above one, a little more for a
    delimiter that cuts finer; 0 where that is less than 0.8.
    """
    counts = [line.count(delimiter) + 1 for line in lines if line.strip()]
    numbers, times = np.unique([c for c in counts if c > 1], return_counts=True)
    if not len(numbers):
        return 0.0
    share = times.max() / len(counts)
    return float(share + min(numbers[times.argmax()], 50) / 1000) if share > 0.8 else 0.0


def _with_quotes(source: Source, text: str) -> Source:
    """Let values in quotes hold line ends, if rows are then fewer than lines, and no worse."""
    if not source.quote or source.quote not in text or len(source.delimiter) > 1:
        return source
    lines = [line for line in text.split("\n")[source.skip :] if line.strip()]
    width = len(source.header) or len(sources.fields_of(lines[0], source))
    reader = csv.reader(
        io.StringIO("\n".join(lines)),
        delimiter=source.delimiter,
        quotechar=source.quote,
        escapechar=source.escape or None,
        doublequote=not source.escape,
    )
    try:
        rows = [len(row) for row in reader]
    except csv.Error:
        return source
    fit = sum(length == width for length in rows)
    alone = sum(len(sources.fields_of(line, source)) == width for line in lines)
    inside = len(rows) < len(lines) and fit >= 0.9 * (len(rows) - 1) and fit + alone > 0
    return replace(source, quoted_newlines=True) if inside and alone < len(lines) else source


def _header_of(first: list[str], below: list[list[str]]) -> tuple[str, ...] | None:
    """Names of the columns by a file's first line; None where that is a row like those below it."""
    if any(NUMBER.fullmatch(name) or UUID.fullmatch(name.strip()) for name in first):
        return None
    if not any(name.strip() for name in first):
        return None
    widths = [len(row) for row in below[:500]]
    common = max(set(widths), key=widths.count) if widths else len(first)
    if not _says_roles(first):
        recurs = [
            any(len(row) > at and row[at] == name for row in below)
            for at, name in enumerate(first)
            if name.strip()
        ]
        if any(recurs):
            return None
    if common == len(first) + 1:
        # A delimiter behind every row, or names of rows before them, as R and pandas write.
        behind = all(not row[-1].strip() for row in below[:500] if len(row) == common)
        return sources.named_once([*first, ""] if behind else ["", *first])
    return sources.named_once(first)


def _says_roles(names: list[str]) -> bool:
    """Return whether a line holds words that columns are called by."""
    known = sum(bool(set(parts_of(name)) & KNOWN_WORDS) for name in names)
    return known >= 2 or (known > 0 and len(names) <= 3)


def _is_word(row: list[str], at: int) -> bool:
    return at >= len(row) or not NUMBER.fullmatch(row[at])
