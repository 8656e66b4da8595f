"""Text files of many shapes, read by our reader and by DuckDB's: which rows come out, and how fast.

The truth of a shape is the number of rows that were written; a file that was cut off has none, and is
to be refused. Both readers are given what `new` found of a file; DuckDB's is also let sniff for itself.
Floor beside the speed: the bytes of the file read once.
"""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa

from feature_repo.benchmarks import interleaved, parser, report
from feature_repo.contract.schema import Source
from feature_repo.errors import RawDataError
from feature_repo.raw import sources
from feature_repo.scaffold import sniff

ROWS = 900
HEADER = ["product", "customer", "at"]


def main() -> None:
    """Run."""
    arguments = parser("feature_repo.benchmarks.text_readers", __doc__).parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = [_compared(Path(folder), *shape) for shape in _shapes()]
        large = 200_000 if arguments.quick else 2_000_000
        rows += _speed(Path(folder), large, arguments.repeats)
    report("text_readers", {"rows": ROWS, "rows_of_speed": large}, rows, arguments.json)


def _table(delimiter: str = ",", header: bool = True) -> str:
    out = io.StringIO()
    writer = csv.writer(out, delimiter=delimiter, lineterminator="\n")
    if header:
        writer.writerow(HEADER)
    first = datetime(2024, 1, 1, tzinfo=UTC)
    for n in range(ROWS):
        at = first + timedelta(minutes=97 * n)
        writer.writerow([f"mug-{n % 61:03d}", 9000 + n % 40, at.strftime("%Y-%m-%d %H:%M:%S")])
    return out.getvalue()


def _shapes() -> Iterator[tuple[str, bytes, int | None]]:
    """File name, content, and how many rows it has; None where it is to be refused."""
    plain = _table().encode()
    yield "plain.csv", plain, ROWS
    yield "sep.csv", b"sep=;\n" + _table(";").encode(), ROWS
    yield "comment.csv", b"# exported\n" + plain, ROWS
    yield "colons.dat", _table("|", header=False).replace("|", "::").encode(), ROWS
    yield "utf16.txt", _table("\t").encode("utf-16"), ROWS
    yield "latin.csv", _table().replace("mug", "café").encode("latin-1"), ROWS
    yield "quotes.tsv", _table("\t").replace("mug-", '5" mug ').encode(), ROWS
    packers: dict[str, Callable[[bytes], bytes]] = {
        "gz": gzip.compress,
        "bz2": bz2.compress,
        "zst": lambda data: bytes(pa.compress(data, "zstd", asbytes=True)),
        "lz4": lambda data: bytes(pa.compress(data, "lz4", asbytes=True)),
    }
    for kind, pack in packers.items():
        packed = pack(plain)
        yield f"whole.csv.{kind}", packed, ROWS
        yield f"cut.csv.{kind}", packed[: len(packed) // 2], None


def _compared(folder: Path, name: str, content: bytes, truth: int | None) -> dict[str, Any]:
    (folder / name).write_bytes(content)
    told: dict[str, Callable[[], int]] = {
        "ours": lambda: _by_us(folder, name),
        "duckdb, sniffing": lambda: _by_duckdb(folder / name, "all_varchar=true"),
    }
    found = {reader: _said(read, truth) for reader, read in told.items()}
    return {"file": name, "rows": "none" if truth is None else truth, **found}


def _said(read: Callable[[], int], truth: int | None) -> str:
    try:
        number = read()
    except (RawDataError, duckdb.Error):
        return "refused" if truth is not None else "right: refused"
    return f"right: {number}" if number == truth else f"wrong: {number}"


def _by_us(folder: Path, name: str) -> int:
    source = sniff.sniff(name, str(folder / name), "event").source
    columns = sources.columns_in(source, str(folder / name))
    return _read(source, folder, columns)


def _read(source: Source, folder: Path, columns: list[str]) -> int:
    units = sources.units_of(source, str(folder), "events", columns)
    blocks = (block for unit in units for block in sources.blocks_of(source, unit, columns))
    return sum(len(block.positions) for block in blocks)


def _by_duckdb(file: Path, options: str) -> int:
    connection = duckdb.connect()
    connection.execute("SET threads = 1")
    found = connection.execute(f"SELECT * FROM read_csv('{file}', {options})")
    return sum(batch.num_rows for batch in found.to_arrow_reader(100_000))


def _speed(folder: Path, number: int, repeats: int) -> list[dict[str, Any]]:
    """Rows a CPU second, one thread each; of DuckDB also with lines that are no rows set aside."""
    rng = np.random.default_rng(0)
    users = rng.integers(0, 90_000, number)
    items = rng.integers(0, 9_000, number)
    file = folder / "large.csv"
    with file.open("w") as out:
        out.write("user_id,item_id,at,price\n")
        for user, item in zip(users, items, strict=True):
            out.write(f"{user},sku-{item},2024-03-{1 + user % 28:02d}T10:11:12Z,{item / 7:.2f}\n")
    source = replace(Source("large.csv"), format="csv")
    columns = ["user_id", "item_id", "at", "price"]
    told = "all_varchar=true, delim=',', header=true"
    taken = interleaved(
        {
            "floor: bytes": lambda: file.read_bytes(),
            "ours": lambda: _read(source, folder, columns),
            "duckdb": lambda: _by_duckdb(file, told),
            "duckdb, rejects": lambda: _by_duckdb(file, f"{told}, store_rejects=true"),
        },
        repeats,
    )
    return [
        {"file": f"large.csv, {name}", "rows": number, "rows a CPU second": number / times["cpu_s"]}
        for name, times in taken.items()
    ]


if __name__ == "__main__":
    main()
