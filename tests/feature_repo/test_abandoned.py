"""Folders that killed processes left."""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from feature_repo.home.abandoned import remove_abandoned


def test_folders_of_the_dead_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    dead = subprocess.Popen([sys.executable, "-c", "pass"])
    dead.wait()
    files = {
        "feast_metrics_dead": f"counter_{dead.pid}.db",
        "feast_metrics_mine": f"counter_{os.getpid()}.db",
        "somebody_elses": f"counter_{dead.pid}.db",
    }
    for folder, file in files.items():
        (tmp_path / folder).mkdir()
        (tmp_path / folder / file).touch()
    for folder in ("feast_metrics_begun", "feast_metrics_empty"):
        (tmp_path / folder).mkdir()
    (tmp_path / "feast_metrics_ours").mkdir()
    (tmp_path / "feast_metrics_ours" / f"counter_{dead.pid}.db").touch()
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path / "feast_metrics_ours"))
    long_ago = time.time() - 8 * 86_400
    os.utime(tmp_path / "feast_metrics_empty", (long_ago, long_ago))
    assert remove_abandoned() == 2
    left = {folder.name for folder in tmp_path.iterdir()}
    assert left == {
        "feast_metrics_mine",
        "feast_metrics_begun",
        "feast_metrics_ours",
        "somebody_elses",
    }
    assert remove_abandoned() == 0
