"""The gates: what they find, what they say, and that nothing is published past them."""

from __future__ import annotations

import fcntl
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pytest

from feature_repo import datasets
from feature_repo.contract import expectations
from feature_repo.contract.expectations import GateError
from feature_repo.contract.schema import Column, DType, Table
from feature_repo.home.tables import JobFolder

TABLE = Table(
    "things",
    "for tests",
    (
        Column("key", DType.INT64, "key", minimum=1),
        Column("colour", DType.STRING, "colour", values=("red", "blue")),
        Column("code", DType.STRING, "code", pattern="^[0-9]+$", nullable=True),
        Column("day", DType.INT64, "day", maximum=31),
    ),
    unique=("key", "day"),
)
GOOD = {
    "key": [1, 2, 3, 4],
    "colour": ["red", "blue", "red", "red"],
    "code": ["1", "22", None, "4"],
    "day": [1, 1, 31, 2],
}


def batch(**changes: list[Any]) -> pa.Table:
    return pa.table({**GOOD, **changes})


def test_good_rows_pass_and_leave_data_docs(tmp_path: Path) -> None:
    verdict = expectations.gate(TABLE, [batch()], tmp_path, 0.0)
    assert (verdict.rows, verdict.bad_rows) == (4, 0)
    assert Path(verdict.docs).exists()
    assert "things" in Path(verdict.docs).read_text()


@pytest.mark.parametrize(
    ("changes", "column", "expectation"),
    [
        ({"key": [0, 2, 3, 4]}, "key", "expect_column_values_to_be_between"),
        ({"key": [None, 2, 3, 4]}, "key", "expect_column_values_to_not_be_null"),
        ({"colour": ["red", "green", "red", "red"]}, "colour", "expect_column_values_to_be_in_set"),
        ({"code": ["1", "x", None, "4"]}, "code", "expect_column_values_to_match_regex"),
        ({"day": [1, 1, 32, 2]}, "day", "expect_column_values_to_be_between"),
        ({"key": [1, 1, 3, 4]}, "day", "expect_compound_columns_to_be_unique"),
    ],
)
def test_each_limit_of_the_contract_is_checked(
    tmp_path: Path, changes: dict[str, list[Any]], column: str, expectation: str
) -> None:
    with pytest.raises(GateError) as caught:
        expectations.gate(TABLE, [batch(**changes)], tmp_path, 0.0)
    message = str(caught.value)
    for part in ("suite 'things'", column, expectation, "observed", "Nothing was published"):
        assert part in message
    assert message.count("{'key'") >= 1


@pytest.mark.parametrize("rows", [batch().drop_columns(["day"]), batch(day=["a", "b", "c", "d"])])
def test_an_expectation_that_cannot_run_stops_the_run(tmp_path: Path, rows: pa.Table) -> None:
    """A missing column, or text where a number belongs, is no pass."""
    with pytest.raises(GateError, match=r"day.* could not run"):
        expectations.gate(TABLE, [rows], tmp_path, 1.0)


def test_a_row_that_fails_twice_counts_once_and_batches_add_up(tmp_path: Path) -> None:
    bad = batch(key=[0, 2, 3, 4], colour=["green", "blue", "red", "red"])
    verdict = expectations.check(TABLE, [bad, batch(), bad], tmp_path)
    assert (verdict.rows, verdict.bad_rows) == (12, 2)
    assert {(f.column, f.bad) for f in verdict.findings} == {("key", 2), ("colour", 2)}
    expectations.gate(TABLE, [bad, batch(), bad], tmp_path, 2 / 12)
    with pytest.raises(GateError, match=r"2 of 12 rows are bad \(16\.7%\)"):
        expectations.gate(TABLE, [bad, batch(), bad], tmp_path, 0.16)


def test_too_much_dirt_stops_the_run_before_anything_is_published(
    tmp_path: Path, shop_data: Path, helpers: Any
) -> None:
    frame = pd.read_parquet(shop_data / "online_retail.parquet")
    frame.loc[frame.index % 2 == 0, "CustomerID"] = float("nan")
    (tmp_path / "data").mkdir()
    frame.to_parquet(tmp_path / "data" / "online_retail.parquet", index=False)
    settings = helpers.settings_in(tmp_path, "online_retail", tmp_path / "data")
    with pytest.raises(GateError) as caught:
        helpers.run_jobs(settings, "events")
    message = str(caught.value)
    for part in (
        "raw_events",
        "user_id",
        "expect_column_values_to_not_be_null",
        "max_bad_fraction",
    ):
        assert part in message
    assert message.count("'InvoiceNo'") >= 3
    assert JobFolder(settings.home, "events").manifest() is None


def test_a_second_run_waits_for_the_first(tmp_path: Path) -> None:
    """Two runs that wrote one project at once refused each other's suites."""
    found: list[expectations.Verdict] = []
    with open(tmp_path / ".lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        second = threading.Thread(
            target=lambda: found.append(expectations.check(TABLE, [batch()], tmp_path))
        )
        second.start()
        second.join(0.2)
        assert not found
        assert second.is_alive()
    second.join()
    assert found[0].rows == len(batch())


@pytest.mark.parametrize("name", datasets.names())
def test_every_declared_limit_becomes_an_expectation(name: str) -> None:
    for table in datasets.load_contract(name).tables:
        kinds = [type(e).__name__ for e, _ in expectations.expectations_of(table)]
        assert kinds.count("ExpectColumnValuesToNotBeNull") == sum(
            not c.nullable for c in table.all_columns
        )
        assert kinds.count("ExpectCompoundColumnsToBeUnique") == bool(table.unique)


KILLED = """
import sys
import pyarrow as pa
from tests.feature_repo.test_expectations import TABLE, batch
from feature_repo.contract import expectations
print("begun", flush=True)
while True:
    expectations.check(TABLE, [batch()], sys.argv[1])
"""


@pytest.mark.slow
def test_a_check_that_was_killed_hinders_no_later_one(tmp_path: Path) -> None:
    other = Table("others", "for tests", (Column("key", DType.INT64, "key"),))
    expectations.check(other, [pa.table({"key": [1]})], tmp_path)
    root = Path(__file__).resolve().parents[2]
    for seconds in (0.05, 0.15, 0.25, 0.4):
        running = subprocess.Popen(
            [sys.executable, "-c", KILLED, str(tmp_path)], cwd=root, stdout=subprocess.PIPE
        )
        assert running.stdout is not None
        assert running.stdout.readline() == b"begun\n"
        time.sleep(seconds)
        running.kill()
        running.wait()
        running.stdout.close()
        verdict = expectations.check(TABLE, [batch()], tmp_path)
        assert verdict.bad_rows == 0
    index = Path(verdict.docs).read_text()
    assert "others" in index  # pages of other suites stay
    assert "things" in index
    assert not any(path.stat().st_size == 0 for path in tmp_path.rglob("*.html"))


def test_what_an_older_version_left_half_written_is_never_read(tmp_path: Path) -> None:
    for name in ("great_expectations.yml", "expectations/things.json"):
        path = tmp_path / "gx" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")
    assert expectations.check(TABLE, [batch()], tmp_path).bad_rows == 0
