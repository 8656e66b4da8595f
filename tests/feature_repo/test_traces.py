"""Bytes of ids are found wherever they stand, and where a value was struck and its bytes were kept."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.fs as pafs
import pyarrow.parquet as pq
import pytest

from feature_repo import datasets
from feature_repo.contract.arrow import history_schema
from feature_repo.history import history, token_log
from feature_repo.home.traces import behind_nulls, mark_of, traces_in

NEEDLE = "needle-8c41"
MARK = mark_of([NEEDLE, "other-9"])
HERE = pafs.LocalFileSystem()


def found(path: Path, without: tuple[str, ...] = ()) -> int:
    assert MARK is not None
    return traces_in(HERE, str(path), MARK, without)


def test_ids_are_found_in_every_kind_of_file(tmp_path: Path) -> None:
    rows = pa.table({"user": [NEEDLE, "x"], "title": ["a", NEEDLE], "n": [1, 2]})
    pq.write_table(rows, tmp_path / "a.parquet", compression="zstd")
    assert found(tmp_path / "a.parquet") == 2
    assert found(tmp_path / "a.parquet", ("user", "title")) == 0
    with pa.ipc.new_file(str(tmp_path / "b.arrow"), rows.schema) as writer:
        struck = pc.if_else(
            pc.equal(rows["user"], NEEDLE), pa.scalar(None, pa.string()), rows["user"]
        )
        writer.write_table(rows.set_column(0, "user", struck))
    assert found(tmp_path / "b.arrow") == 2  # behind the null as well
    (tmp_path / ".c.draft").write_text(f'{{"id": "{NEEDLE}"}}')
    assert found(tmp_path / ".c.draft") == 1
    with sqlite3.connect(tmp_path / "d.db") as connection:
        connection.execute("PRAGMA secure_delete = OFF")
        connection.execute("CREATE TABLE t (v TEXT)")
        connection.execute("INSERT INTO t VALUES (?)", (NEEDLE,))
        connection.commit()
        connection.execute("DELETE FROM t")
    connection.close()
    assert found(tmp_path / "d.db") == 1  # on a page that nothing names
    (tmp_path / "e.txt").write_text(f"pre{NEEDLE} {NEEDLE}9 {NEEDLE.upper()}")
    assert found(tmp_path / "e.txt") == 0  # another id
    (tmp_path / "empty").write_text("")
    assert found(tmp_path / "empty") == 0


def test_numbers_and_short_ids_are_told_by_no_bytes() -> None:
    assert mark_of([12680, "ab"]) is None


@pytest.mark.parametrize("values", [["a", NEEDLE, "c"], [5, 12680, 7]])
@pytest.mark.parametrize("cut", [(0, 3), (1, 2)])
def test_what_stands_behind_a_null_is_seen(values: list[object], cut: tuple[int, int]) -> None:
    whole = pa.array(values)
    struck = pc.if_else(pa.array([False, True, False]), pa.scalar(None, whole.type), whole)
    column = pa.chunked_array([struck.slice(*cut)])
    assert behind_nulls(column).drop_null().to_pylist() == [values[1]]
    rebuilt = whole.take(pa.array([0, None, 2], pa.int64()))
    assert behind_nulls(pa.chunked_array([rebuilt])).null_count == 3


@pytest.mark.parametrize("user", [NEEDLE, 12680])
def test_a_row_that_is_struck_from_the_token_log_keeps_no_byte(user: object) -> None:
    envelopes = [b"somebody's tokens" * 40, b"the needle's tokens" * 40]
    rows = pa.table({"user_id": ["x", user] if isinstance(user, str) else [1, user]})
    rows = rows.append_column("tokens", pa.array(envelopes, pa.large_binary()))
    data = token_log._blanked(rows, np.array([False, True])).to_pybytes()
    assert envelopes[0] in data
    assert b"needle" not in data
    assert (12680).to_bytes(8, "little") not in data
    kept = pa.ipc.open_file(pa.py_buffer(data)).read_all()
    assert kept["tokens"].to_pylist() == [envelopes[0], None]


def test_a_packed_history_holds_no_byte_of_its_neighbour() -> None:
    contract = datasets.load_contract("online_retail")
    schema = history_schema(contract)
    values = {field.name: pa.nulls(3, field.type) for field in schema}
    values["item_id"] = pa.array(["mine", "neighbour-secret-item", "third"])
    values |= {
        n: pa.array([1, 2, 3]).cast(schema.field(n).type) for n in ("action", "event_timestamp")
    }
    both = pa.table(values, schema=schema)
    assert b"neighbour" not in history.pack(contract, 7, both.slice(0, 1))
