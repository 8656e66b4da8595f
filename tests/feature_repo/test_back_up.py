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
from tests.conftest import apply_in_process, copied, run_jobs, settings_in, train_road

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
    # It published all the while.
    assert next(numbers) > 5


def test_two_publications_between_manifest_and_parts(
    home: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The parts that were named are gone then, and the job is read again; forever it is not."""
    folder = JobFolder(home.home, "job")
    publish(folder, 1)
    numbers = itertools.count(2)
    whole = copying._Copy._parts

    def late(self: Any, *asked: Any) -> bool:
        if restless or next(late_once, None) is not None:
            publish(folder, next(numbers))
            publish(folder, next(numbers))
        return whole(self, *asked)

    monkeypatch.setattr(copying._Copy, "_parts", late)
    restless, late_once = False, iter([1])
    assert back_up(home, tmp_path / "copy").jobs == ("job",)
    found = JobFolder(str(tmp_path / "copy"), "job").read("rows")["number"].unique().to_pylist()
    assert found == [3]
    restless = True
    with pytest.raises(RestlessHomeError, match="'job' published again"):
        back_up(home, tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_a_part_that_is_gone_is_no_back_up(home: Settings, tmp_path: Path) -> None:
    folder = JobFolder(home.home, "job")
    publish(folder, 1)
    Path(folder.paths("rows")[1]).unlink()
    with pytest.raises(DamagedPartError, match="is gone: run"):
        back_up(home, tmp_path / "copy")


def test_a_damaged_part_is_no_back_up(home: Settings, tmp_path: Path) -> None:
    folder = JobFolder(home.home, "job")
    publish(folder, 1)
    (path, *_) = folder.paths("rows")
    Path(path).write_bytes(b"x" * Path(path).stat().st_size)
    with pytest.raises(DamagedPartError, match="job --force"):
        back_up(home, tmp_path / "copy")
    assert not (tmp_path / "copy").exists()
    # What it left is in nobody's way.
    publish(folder, 2)
    assert back_up(home, tmp_path / "copy").jobs == ("job",)
    with pytest.raises(UsageError, match="there already"):
        back_up(home, tmp_path / "copy")


def test_a_database_is_as_of_one_moment(home: Settings, tmp_path: Path) -> None:
    """While a transaction that is larger than SQLite's memory of it is under way, and has its journal beside."""
    with closing(sqlite3.connect(home.path("catalogue.db"))) as busy:
        busy.execute("PRAGMA cache_size = 5")
        busy.execute("CREATE TABLE bundles (name)")
        busy.executemany("INSERT INTO bundles VALUES (?)", [("a" * 500,)] * 500)
        busy.commit()
        copied_one = copying._Copy.database

        def and_then(self: Any, source: Path) -> None:
            copied_one(self, source)
            busy.execute("UPDATE bundles SET name = 'b'")

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(copying._Copy, "database", and_then)
            back_up(home, tmp_path / "copy")
        assert home.path("catalogue.db-journal").exists()
    assert sorted(path.name for path in (tmp_path / "copy").iterdir()) == ["catalogue.db"]
    with closing(sqlite3.connect(tmp_path / "copy" / "catalogue.db")) as there:
        assert there.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        (found,) = there.execute("SELECT count(*) FROM bundles WHERE name LIKE 'aaa%'").fetchone()
        assert found == 500


@pytest.mark.parametrize("kind", ["local", "uri"])
def test_everything_that_is_not_made_again_is_in_it(
    home: Settings, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also of a home in an object store, and what lies beside the runs of a job."""
    if kind == "uri":
        monkeypatch.chdir(tmp_path)
        home = replace(home, home=Path(home.home).as_uri())
        monkeypatch.setattr(
            "feature_repo.settings._local", lambda home, dataset: str(tmp_path / "here")
        )
        (tmp_path / "here" / "bundles").mkdir(parents=True)
        (tmp_path / "here" / "bundles" / "weights").write_text("w")
    folder = JobFolder(home.home, "job")
    publish(folder, 1)
    root = Path(folder.root)
    more = ["job/sent-view.parquet", "job/run0/keys/view-00000.parquet", "job/run1/_parts/1.json",
        "received/part-1.parquet", "erased/users.json"]  # fmt: skip
    # Also the parts of the run before, which the manifest names no more
    left = [
        ".x.draft",
        "job/run0/rows/part-0.parquet",
        "job/run1/rows/.part.draft",
        "spill/x",
        "job/.lock",
        "half.draft/x",
    ]
    for name in (*more, *left):
        path = root.parent / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x")
    back_up(home, tmp_path / "copy")
    found = {
        str(path.relative_to(tmp_path / "copy"))
        for path in (tmp_path / "copy").rglob("*")
        if path.is_file()
    }
    parts = {f"job/run1/rows/part-{part}.parquet" for part in range(3)}
    own = {"bundles/weights"} if kind == "uri" else set()
    assert found == {*more, *parts, "job/manifest.json"} | own


def test_folders_that_come_and_go_are_nobodys_fault(home: Settings, tmp_path: Path) -> None:
    stop = threading.Event()

    def come_and_go() -> None:
        while not stop.is_set():
            home.path("runs", "a", "b").mkdir(parents=True, exist_ok=True)
            home.path("runs", "a", "file").write_text("x")
            shutil.rmtree(home.path("runs", "a"))

    thread = threading.Thread(target=come_and_go)
    thread.start()
    try:
        for attempt in range(100):
            assert back_up(home, tmp_path / f"copy{attempt}").jobs == ()
    finally:
        stop.set()
        thread.join()


def test_a_home_that_is_not_there(tmp_path: Path) -> None:
    nowhere = Settings("a", None, str(tmp_path / "nowhere"), "local", "sqlite://", False)
    with pytest.raises(UsageError, match="there is no home at"):
        back_up(nowhere, tmp_path / "copy")


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
    # What is trained is exported again into the copy's own catalogue.
    train_road(road)
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
