"""Files as strangers have them: every row comes out once, whatever delimiter, encoding, compression
or place the file has.
"""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from feature_repo.contract.schema import Source
from feature_repo.errors import RawDataError
from feature_repo.raw import sources

ROWS = [(f"0{n}", f"café {n}", f"{n},5") for n in range(50)]
NAMES = ("id", "name", "price")


def written(delimiter: str, end: str = "\n", header: bool = True) -> str:
    lines = [delimiter.join(NAMES)] * header
    lines += [delimiter.join(value.replace(",", ".") for value in row) for row in ROWS]
    return end.join(lines) + end


def read(source: Source, folder: Path) -> list[tuple[Any, ...]]:
    """Every row of a source as text, with its position."""
    found = []
    for unit in sources.units_of(source, str(folder), "events", NAMES):
        positions = []
        for block in sources.blocks_of(source, unit, NAMES):
            columns = [column.to_pylist() for column in block.rows.columns]
            found += [
                tuple(v.decode() if isinstance(v, bytes) else v for v in row)
                for row in zip(*columns, strict=True)
            ]
            positions += block.positions.tolist()
        assert unit.rows in (-1, len(positions))
        assert positions == list(range(unit.start, unit.start + len(positions)))
    return found


EXPECTED = [(a, b, c.replace(",", ".")) for a, b, c in ROWS]


@pytest.mark.parametrize("unit_bytes", [1 << 24, 100])
@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|", "::"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "latin-1"])
def test_text_files_of_every_kind_give_the_same_rows(
    delimiter: str,
    end: str,
    encoding: str,
    unit_bytes: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sources, "UNIT_BYTES", unit_bytes)
    data = written(delimiter, end).encode(encoding)
    (tmp_path / "log.csv").write_bytes(data)
    (tmp_path / "packed.csv.gz").write_bytes(gzip.compress(data))
    for path in ("log.csv", "packed.csv.gz"):
        source = Source(path, delimiter=delimiter, encodings=("utf-8", "latin-1"))
        assert read(source, tmp_path) == EXPECTED


def test_a_file_without_a_header_takes_the_names_that_are_declared(tmp_path: Path) -> None:
    (tmp_path / "log.dat").write_text(written("|", header=False))
    assert read(Source("log.dat", delimiter="|", header=NAMES), tmp_path) == EXPECTED


def test_json_lines_and_parquet_give_the_same_rows(tmp_path: Path) -> None:
    rows = [dict(zip(NAMES, row, strict=True)) for row in EXPECTED]
    (tmp_path / "log.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "log.parquet", row_group_size=7)
    for path in ("log.jsonl", "log.parquet"):
        assert read(Source(path), tmp_path) == EXPECTED


def test_ids_in_json_keep_their_spelling(tmp_path: Path) -> None:
    lines = ['{"id": 7, "name": "a"}', '{"id": "007", "name": "2011-01-01", "price": 1.50}', "no"]
    (tmp_path / "log.jsonl").write_text("\n".join(lines) + "\n")
    (unit,) = sources.units_of(Source("log.jsonl"), str(tmp_path), "events", NAMES)
    (block,) = sources.blocks_of(Source("log.jsonl"), unit, NAMES)
    assert block.rows["id"].to_pylist() == [b"7", b"007"]
    assert block.rows["name"].to_pylist() == ["a", "2011-01-01"]
    ((position, text, why),) = block.broken
    assert (position, text) == (2, "no")
    assert "is no JSON" in why


@pytest.mark.parametrize("scheme", ["", "file://"])
@pytest.mark.parametrize("path", ["log", "log/*.csv", "log/**", "*/part*"])
def test_a_folder_and_a_glob_are_all_their_files(path: str, scheme: str, tmp_path: Path) -> None:
    lines = written(",").splitlines()
    (tmp_path / "log").mkdir()
    (tmp_path / "log" / "_SUCCESS").write_text("")
    for number, part in enumerate((lines[1:20], lines[20:])):
        (tmp_path / "log" / f"part{number}.csv").write_text("\n".join([lines[0], *part]) + "\n")
    source, data = Source(path), f"{scheme}{tmp_path}"
    assert len(sources.files_of(source, data)) == 2
    found = [
        row
        for unit in sources.units_of(source, data, "events", NAMES)
        for block in sources.blocks_of(source, unit, NAMES)
        for row in block.rows["id"].to_pylist()
    ]
    assert [value.decode() for value in found] == [row[0] for row in ROWS]


def test_of_several_paths_the_first_that_there_is_is_read(tmp_path: Path) -> None:
    (tmp_path / "b.csv").write_text("id\n1\n")
    found = sources.files_of(Source(("a.csv", "b.csv")), str(tmp_path))
    assert found == [f"{tmp_path}/b.csv"]
    with pytest.raises(RawDataError, match=r"expected a\.csv or c\.csv in .*; found none"):
        sources.files_of(Source(("a.csv", "c.csv")), str(tmp_path))


def test_a_line_of_another_shape_is_set_aside_and_costs_no_other(tmp_path: Path) -> None:
    (tmp_path / "log.csv").write_text('id,name,price\n1,a,2\n2,b\n\n3,"c,d",4\n4,e,5,6\n5,"f,7\n')
    (unit,) = sources.units_of(Source("log.csv"), str(tmp_path), "events", NAMES)
    (block,) = sources.blocks_of(Source("log.csv"), unit, NAMES)
    assert unit.rows == block.num_read == 5
    assert block.rows["name"].to_pylist() == [b"a", b"c,d"]
    assert block.positions.tolist() == [0, 2]
    assert [(at, text) for at, text, _ in block.broken] == [
        (1, "2,b"),
        (3, "4,e,5,6"),
        (4, '5,"f,7'),
    ]


def test_quotes_may_hold_line_ends_where_it_is_declared(tmp_path: Path) -> None:
    (tmp_path / "log.csv").write_text('id,name,price\n1,"two\nlines",2\n2,b,3\n')
    source = Source("log.csv", quoted_newlines=True)
    (unit,) = sources.units_of(source, str(tmp_path), "events", NAMES)
    (block,) = sources.blocks_of(source, unit, NAMES)
    assert block.rows["name"].to_pylist() == [b"two\nlines", b"b"]


def test_a_missing_column_is_named_before_anything_is_read(tmp_path: Path) -> None:
    (tmp_path / "log.csv").write_text("id,name\n1,a\n")
    with pytest.raises(RawDataError, match=r"log\.csv: columns \['price'\] are missing"):
        sources.units_of(Source("log.csv"), str(tmp_path), "events", NAMES)
    with pytest.raises(RawDataError, match="does not say what it is"):
        sources.format_of(Source("log.xls"), "log.xls")


@pytest.mark.parametrize(
    ("lines", "kept"),
    [
        (b"1,a,2\n2,b,3,caf\xe9\n3,c,4\n", [b"1", b"3"]),  # too many fields, and no UTF-8
        (b"1,x\ry,2\n2,b,3\n", [b"2"]),  # a return that ends no line
        (
            b'1,"a\n2,b",2\n3,c,4\n4,q\rr,5\n',
            [b"2", b"3"],
        ),  # the same, and a quote that is not closed
    ],
)
def test_odd_bytes_cost_their_own_line_alone(
    lines: bytes, kept: list[bytes], tmp_path: Path
) -> None:
    (tmp_path / "log.csv").write_bytes(b"id,name,price\n" + lines)
    (unit,) = sources.units_of(Source("log.csv"), str(tmp_path), "events", NAMES)
    (block,) = sources.blocks_of(Source("log.csv"), unit, NAMES)
    assert block.rows["id"].to_pylist() == kept
    assert block.num_read == unit.rows
    for _, text, _ in block.broken:
        assert text.encode()


def test_half_an_emoji_and_a_line_of_blanks_cost_no_other(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_text('{"id": "u\\ud83d"}\n   \n{"id": "v"}\n')
    (unit,) = sources.units_of(Source("log.jsonl"), str(tmp_path), "events", ["id"])
    (block,) = sources.blocks_of(Source("log.jsonl"), unit, ["id"])
    assert unit.rows == block.num_read == 3
    assert [at for at, _, _ in block.broken] == [1]
    from feature_repo.raw import raw

    assert raw.texts(block.rows["id"]).to_pylist() == [None, "v"]


def test_hidden_folders_and_empty_files_hold_no_data(tmp_path: Path) -> None:
    for folder in ("log", "log/.checkpoints", "log/_temporary", "log/day"):
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / "a.csv").write_text("id,name,price\n1,a,2\n")
    (tmp_path / "log" / "empty.csv").write_text("")
    found = sources.units_of(Source("log"), str(tmp_path), "events", NAMES)
    assert [unit.file.removeprefix(str(tmp_path)) for unit in found] == [
        "/log/a.csv",
        "/log/day/a.csv",
    ]
    (flat,) = (f for f in sources.files_of(Source("log/a*.csv"), str(tmp_path)))
    assert flat.endswith("/log/a.csv")
