"""Parts are whole whoever writes them, verified when they are read, and made by the launcher's code alone."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from beam_jobs.engine import run
from beam_jobs.errors import RunnerError
from beam_jobs.registry import load_job
from feature_repo.errors import ExpectedError
from feature_repo.home.tables import DamagedPartError, JobFolder
from feature_repo.settings import Settings

PROCESSES = ["--runner=FnApiRunner", "--direct_running_mode=multi_processing"]


def run_item_stats(settings: Settings, flags: list[str]) -> None:
    job = load_job("item_stats")
    run.run(job, settings, job.options(num_partitions=2), flags, as_of=None, max_bad_fraction=None)


def test_attempts_at_one_part_never_tear_it(tmp_path: Path) -> None:
    """Beam starts an attempt anew while the one before may still write."""
    folder = JobFolder(str(tmp_path), "job")
    contents = [bytes([number]) * 200_000 for number in range(3)]
    path = Path(folder.write_part("run", "table", "part", contents[0], 1).path)
    stop = threading.Event()

    def attempt(content: bytes) -> None:
        while not stop.is_set():
            folder.write_part("run", "table", "part", content, 1)

    attempts = [threading.Thread(target=attempt, args=(content,)) for content in contents]
    for thread in attempts:
        thread.start()
    try:
        reads = [Path(folder.root, path).read_bytes() for _ in range(500)]
    finally:
        stop.set()
        for thread in attempts:
            thread.join()
    assert all(read in contents for read in reads)
    assert [entry.name for entry in Path(folder.root, "run", "table").iterdir()] == ["part"]


def _flip(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_flip, "is damaged"),
        (lambda data: data[:-1], "is damaged"),
        (lambda data: None, "is gone"),
    ],
    ids=["a bit", "its end", "all of it"],
)
def test_a_part_that_is_not_what_its_run_wrote_is_refused_by_name(
    shop: Any,
    tmp_path: Path,
    helpers: Any,
    damage: Callable[[bytes], bytes | None],
    message: str,
) -> None:
    road = helpers.copied(shop, tmp_path)
    folder = JobFolder(road.settings.home, "events")
    path = Path(folder.paths("events")[0])
    damaged = damage(path.read_bytes())
    if damaged is None:
        path.unlink()
    else:
        path.write_bytes(damaged)
    with pytest.raises(DamagedPartError, match=message) as found:
        folder.read("events")
    assert "python -m beam_jobs events --force" in str(found.value)
    # A worker refuses it as well, whatever Beam makes of the error.
    before = JobFolder(road.settings.home, "item_stats").require()
    with pytest.raises(Exception, match=message):
        helpers.run_jobs(road.settings, "item_stats", num_partitions=2)
    assert JobFolder(road.settings.home, "item_stats").require() == before


@pytest.mark.parametrize("flags", [PROCESSES[:1], PROCESSES], ids=["here", "in processes"])
def test_a_worker_with_other_code_than_the_launchers_ends_the_run(
    shop: Any, tmp_path: Path, helpers: Any, monkeypatch: pytest.MonkeyPatch, flags: list[str]
) -> None:
    road = helpers.copied(shop, tmp_path)
    before = JobFolder(road.settings.home, "item_stats").require()
    planned = run.plan_run

    def planned_elsewhere(*arguments: Any) -> run.Planned:
        found = planned(*arguments)
        plan = replace(found.plan, code="0" * 16, run_id="elsewhere")
        return replace(found, plan=plan)

    monkeypatch.setattr(run, "plan_run", planned_elsewhere)
    with pytest.raises(
        Exception, match=r"has other code .* than the machine that started it \(0000"
    ) as raised:
        run_item_stats(road.settings, flags)
    assert isinstance(raised.value, ExpectedError)
    assert JobFolder(road.settings.home, "item_stats").require() == before


@pytest.mark.parametrize("how", ["cannot start", "is killed"])
def test_a_run_ends_when_one_of_its_workers_does(
    shop: Any, tmp_path: Path, helpers: Any, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """Beam alone would wait for it for ever."""
    road = helpers.copied(shop, tmp_path)
    before = JobFolder(road.settings.home, "item_stats").require()
    if how == "cannot start":
        monkeypatch.setenv("PYTHONHOME", str(tmp_path / "nowhere"))
    else:
        # The worker meets a module that ends it as soon as it starts.
        tmp_path.joinpath("sitecustomize.py").write_text(
            "import os, sys\nif 'WORKER_ID' in os.environ:\n    os.kill(os.getpid(), 9)\n"
        )
        monkeypatch.setenv(
            "PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
        )
    with pytest.raises(RunnerError, match=r"exited with return code .*nothing was published"):
        run_item_stats(road.settings, [*PROCESSES, "--direct_num_workers=2"])
    assert JobFolder(road.settings.home, "item_stats").require() == before
