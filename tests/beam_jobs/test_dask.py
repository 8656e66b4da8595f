"""Beam's runner on Dask: two worker processes, one of them killed, and the same bytes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from beam_jobs.engine.options import Common
from beam_jobs.engine.pipeline import FULL_NAME, is_dask, with_dask
from beam_jobs.engine.run import run
from beam_jobs.engine.surroundings import refuse_own_hashes
from beam_jobs.errors import OtherPlaceError
from beam_jobs.registry import load_job
from feature_repo.settings import CHECKOUT, Settings
from tests.beam_jobs.test_runs import snapshot

TABLES = ("events", "user_history", "item_stats", "training_examples")


class Dask:
    """A scheduler, and workers that may be killed with all their processes."""

    def __init__(self, folder: Path, port: int) -> None:
        self.address = f"tcp://127.0.0.1:{port}"
        self._folder = folder
        self.scheduler = self._start(
            "scheduler", "--host", "127.0.0.1", "--port", str(port), "--no-dashboard"
        )
        self.workers = [self.worker() for _ in range(2)]

    def worker(self) -> subprocess.Popen[bytes]:
        memory = ["--nthreads", "1", "--memory-limit", "0", "--no-dashboard"]
        return self._start("worker", self.address, *memory)

    def kill(self, number: int) -> None:
        os.killpg(self.workers[number].pid, signal.SIGKILL)
        self.workers[number].wait()

    def stop(self) -> None:
        for process in (*self.workers, self.scheduler):
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def _start(self, what: str, *words: str) -> subprocess.Popen[bytes]:
        program = f"from distributed.cli.dask_{what} import main; main()"
        return subprocess.Popen(
            [sys.executable, "-c", program, *words],
            cwd=self._folder,
            env={**os.environ, "PYTHONPATH": str(CHECKOUT), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )


@pytest.fixture
def dask(tmp_path: Path, helpers: Any) -> Iterator[Dask]:
    """Two workers."""
    port = helpers.free_port()
    made = Dask(tmp_path, port)
    helpers.wait_for_port(port, made.scheduler)
    yield made
    made.stop()


def run_on(dask: Dask, settings: Settings, name: str, **options: Any) -> Any:
    job = load_job(name)
    chosen = job.resolve(settings, job.options(**options))
    flags = ["--runner=dask", f"--dask_client_address={dask.address}"]
    return run(job, settings, chosen, flags, as_of=None, max_bad_fraction=None)


@pytest.mark.slow
def test_every_job_gives_the_same_bytes_and_outlives_a_worker(
    token_shop: Any, dask: Dask, helpers: Any, tmp_path: Path
) -> None:
    settings = helpers.settings_in(tmp_path / "home", "online_retail", token_shop.data)
    (parts := Path(settings.home, "training_examples")).mkdir(parents=True)

    def kill_one_that_works() -> None:
        until = time.monotonic() + 60
        while not list(parts.rglob("*.parquet")) and time.monotonic() < until:
            time.sleep(0.01)
        dask.kill(0)

    # 1. Tables, while one of the workers is killed
    killing = threading.Thread(target=kill_one_that_works)
    killing.start()
    for name in TABLES:
        run_on(dask, settings, name, num_partitions=3)
    killing.join()
    assert dask.workers[0].poll() is not None
    dask.workers[0] = dask.worker()
    for name in TABLES:
        assert snapshot(settings.home, name) == snapshot(token_shop.settings.home, name), name
    # 2. What goes online
    helpers.apply_in_process(settings)
    run_on(dask, settings, "materialize")
    helpers.train_road(helpers.replace(token_shop, settings=settings), "vista_tiny")
    done = run_on(dask, settings, "summary_tokens", bundle="vista_tiny").manifest
    assert done.counts["covered"] == done.counts["users"] == done.counts["online_stored"]


def test_its_name_and_its_options_are_known() -> None:
    assert all(map(is_dask, ("dask", "DaskRunner", FULL_NAME)))
    assert Common(runner="dask").runner == "dask"
    given = ["--runner=dask", "--dask_client_address=tcp://a:1"]
    assert with_dask(given) == [f"--runner={FULL_NAME}", given[1], "--dask_partition_size=1"]
    assert with_dask([*given, "--dask_npartitions=4"])[-1] == "--dask_npartitions=4"
    assert with_dask(with_dask(given)) == with_dask(given)
    assert with_dask(["--runner=FnApiRunner", "--x"]) == ["--runner=FnApiRunner", "--x"]


def test_a_worker_with_hashes_of_its_own_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from distributed import worker

    refuse_own_hashes()
    monkeypatch.setattr(worker, "get_worker", lambda: "a worker")
    monkeypatch.setenv("PYTHONHASHSEED", "6640")
    refuse_own_hashes()
    monkeypatch.setenv("PYTHONHASHSEED", "random")
    with pytest.raises(OtherPlaceError, match="PYTHONHASHSEED"):
        refuse_own_hashes()
