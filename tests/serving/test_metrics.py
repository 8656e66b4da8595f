"""Metrics of several processes, of which some are killed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from serving.api.metrics import Metrics
from serving.api.settings import SHARED

WORKER = """
import sys
from serving.api.metrics import Metrics

metrics = Metrics()
metrics.bundle.labels("trees@0").set(1)
metrics.ready.set(int(sys.argv[1]))
metrics.state_bytes.set(1000)
metrics.requests.labels("rank", "200").inc(7)
print("counted", flush=True)
sys.stdin.read()
print(metrics.text().decode() if sys.argv[1] == "1" else "")
"""


@pytest.fixture
def shared(tmp_path: Path) -> dict[str, str]:
    return {**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(tmp_path), SHARED: "1"}


def worker(shared: dict[str, str], ready: int) -> subprocess.Popen[str]:
    """A process that counted, and waits; one that is ready tells of all once its input ends."""
    made = subprocess.Popen(
        [sys.executable, "-c", WORKER, str(ready)],
        env=shared,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert made.stdout is not None
    assert made.stdout.readline() == "counted\n"
    return made


def test_ten_workers_that_were_killed_are_neither_ready_nor_counted(
    shared: dict[str, str],
) -> None:
    for _ in range(10):
        killed = worker(shared, ready=0)
        killed.kill()
        killed.communicate()
    alive = [worker(shared, ready=1) for _ in range(2)]
    told, _ = alive[0].communicate("")
    alive[1].communicate("")
    assert "memoir_ready 1.0" in told
    assert 'memoir_bundle_info{bundle="trees@0"} 2.0' in told
    assert "memoir_user_state_bytes 2000.0" in told
    # What they answered was answered.
    assert 'memoir_requests_total{route="rank",status="200"} 84.0' in told


def test_a_counter_follows_totals_of_several_bundles() -> None:
    metrics = Metrics()
    for bundle, total in (("a", 60), ("a", 100), ("b", 5), ("a", 100), ("a", 103), ("b", 6)):
        metrics.advance(metrics.states.labels("encoded"), total, bundle)
    assert metrics.states.labels("encoded")._value.get() == 103 + 6
    # A total that begins anew counts on from there.
    metrics.advance(metrics.swaps, 3)
    metrics.advance(metrics.swaps, 1)
    metrics.advance(metrics.swaps, 2)
    assert metrics.swaps._value.get() == 4
