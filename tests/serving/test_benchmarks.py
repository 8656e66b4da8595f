"""Benchmarks of the server explain themselves, and the smallest run."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_the_size_of_a_catalogue_is_measured_without_a_store(tmp_path: Path) -> None:
    """Which broke once without anybody's notice: it needs nothing but this checkout."""
    out = tmp_path / "out.json"
    command = [sys.executable, "-m", "serving.benchmarks.catalogue_size", "--quick"]
    subprocess.run([*command, "--json", str(out)], capture_output=True, cwd=ROOT, check=True)
    rows = json.loads(out.read_text())["rows"]
    assert [row["items"] for row in rows] == [3_000, 50_000]
    assert all(row["rank_ms"] > 0 for row in rows)


def test_states_are_measured_and_scores_are_alike(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    command = [sys.executable, "-m", "serving.benchmarks.states", "--quick", "--repeats", "1"]
    subprocess.run([*command, "--json", str(out)], capture_output=True, cwd=ROOT, check=True)
    rows = json.loads(out.read_text())["rows"]
    assert rows
    assert all(row["largest difference"] < 1e-4 for row in rows)
