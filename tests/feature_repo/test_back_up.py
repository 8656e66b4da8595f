"""A home that is copied while jobs publish is whole, and a road goes on from the copy."""

from __future__ import annotations

import itertools
import shutil
import sqlite3
import threading
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from feature_repo.contract.counts import Counts
from feature_repo.errors import UsageError
from feature_repo.home import back_up as copying
from feature_repo.home.back_up import RestlessHomeError, back_up
from feature_repo.home.tables import DamagedPartError, JobFolder, Manifest, parquet_bytes
from feature_repo.settings import Settings
from tests.conftest import apply_in_process, copied, run_jobs, settings_in

TABLES = ("events", "user_history", "item_stats", "training_examples")


@pytest.fixture
def home(tmp_path: Path) -> Settings:
    """An empty home."""
    return settings_in(tmp_path / "home", "online_retail", tmp_path)


def publish(folder: JobFolder, number: int) -> None:
    """A run of three parts, each of which holds its number."""
    run = f"run{number}"
    data = parquet_bytes(pa.table({"number": [number] * 100}))
    parts = [folder.write_part(run, "rows", f"part-{part}.parquet", data, 100) for part in range(3)]
    folder.publish(
        Manifest(folder.job, run, "online_retail", "", "2026-01-01T00:00:00+00:00", {}, {}, Counts(), {"rows": parts})
    )  # fmt: skip


def test_whatever_is_published_meanwhile_each_table_is_of_one_run(
    home: Settings, tmp_path: Path
) -> None:
    folder = JobFolder(home.home, "job")
    numbers = itertools.count()
    publish(folder, next(numbers))
    stop = threading.Event()

    def go_on() -> None:
        while not stop.is_set():
            publish(folder, next(numbers))
            stop.wait(0.003)

    publisher = threading.Thread(target=go_on)
    publisher.start()
    try:
        for attempt in range(20):
            back_up(home, target := tmp_path / f"copy{attempt}")
            found = JobFolder(str(target), "job").read("rows")["number"].unique().to_pylist()
            assert len(found) == 1
    finally:
        stop.set()
        publisher.join()
    assert next(numbers) > 20


def test_a_job_that_never_rests_is_said(
    home: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(JobFolder(home.home, "job"), 1)
    monkeypatch.setattr(copying, "_copied_parts", lambda *_: (tmp_path / ".x.draft/job").mkdir(parents=True))  # fmt: skip
    with pytest.raises(RestlessHomeError, match="'job' published again"):
        back_up(home, tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_a_damaged_part_is_no_back_up(home: Settings, tmp_path: Path) -> None:
    folder = JobFolder(home.home, "job")
    publish(folder, 1)
    (path, *_) = folder.paths("rows")
    Path(path).write_bytes(b"x" * Path(path).stat().st_size)
    with pytest.raises(DamagedPartError, match="job --force"):
        back_up(home, tmp_path / "copy")
    assert not (tmp_path / "copy").exists()
    # The next one goes where this one stopped.
    publish(folder, 2)
    assert back_up(home, tmp_path / "copy").jobs == ["job"]
    with pytest.raises(UsageError, match="there already"):
        back_up(home, tmp_path / "copy")


def test_a_database_is_as_of_one_moment(home: Settings, tmp_path: Path) -> None:
    with closing(sqlite3.connect(home.path("catalogue.db"))) as open_one:
        open_one.execute("CREATE TABLE bundles (name)")
        open_one.execute("INSERT INTO bundles VALUES ('a')")
        open_one.commit()
        open_one.execute("INSERT INTO bundles VALUES ('half')")
        back_up(home, tmp_path / "copy")
    with closing(sqlite3.connect(tmp_path / "copy" / "catalogue.db")) as there:
        assert there.execute("SELECT name FROM bundles").fetchall() == [("a",)]


def test_what_is_half_written_stays_behind(home: Settings, tmp_path: Path) -> None:
    bundles = home.path("bundles", "b")
    bundles.mkdir(parents=True)
    (bundles / "bundle.json").write_text("{}")
    (bundles.parent / ".c.draft").mkdir()
    (bundles.parent / ".c.draft" / "weights").write_text("half")
    (bundles / ".lock").write_text("")
    home.path("spill").mkdir()
    back_up(home, tmp_path / "copy")
    found = {str(path.relative_to(tmp_path / "copy")) for path in (tmp_path / "copy").rglob("*")}
    assert found == {"bundles", "bundles/b", "bundles/b/bundle.json"}


def test_a_road_goes_on_from_a_back_up(trained_shop: Any, tmp_path: Path) -> None:
    road = copied(trained_shop, tmp_path / "before")
    back_up(road.settings, tmp_path / "copy")
    shutil.rmtree(tmp_path / "before")
    # Restored: the folder in its place, what is of its place made anew, and the store filled.
    restored = settings_in(tmp_path / "after", "online_retail", road.data)
    shutil.rmtree(restored.home)
    shutil.move(tmp_path / "copy", restored.home)
    for name in TABLES:
        assert (
            JobFolder(restored.home, name).manifest()
            == JobFolder(trained_shop.settings.home, name).manifest()
        )
    outcomes = run_jobs(restored, *TABLES, num_partitions=3)
    assert not any(outcome.built for outcome in outcomes.values())
    (restored.path("registry.pb")).unlink()
    apply_in_process(restored)
    run_jobs(restored, "materialize", force=True)
    from serving.command import open_ranker

    name = open_ranker(restored, replay=True).bundle.name
    assert name == open_ranker(replace(trained_shop.settings), replay=True).bundle.name
