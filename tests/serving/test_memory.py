"""Freed memory stays with a server's process."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any
from unittest import mock

import pytest

from modeling.layers.memory import keep_freed_memory
from serving.live.live import BundleSource

# Page faults of a call that makes matrices of tens of megabytes: before memory is kept, and after
FAULTS = """
import json, resource, torch
from modeling.layers.memory import keep_freed_memory

torch.set_num_threads(1)
rows, weights = torch.ones(50_000, 96), torch.ones(96, 192)

def faults():
    # The heap grows for at most five calls, until the blocks that it keeps fit.
    for _ in range(10):
        torch.relu(rows @ weights)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        torch.relu(rows @ weights)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / 10

given_back = faults()
kept = keep_freed_memory()
print(json.dumps([kept, given_back, faults()]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc alone")
def test_a_call_faults_in_no_page_anew() -> None:
    if not keep_freed_memory():
        pytest.skip("the C library is another one")
    done = subprocess.run(
        [sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True
    )
    kept, given_back, spared = json.loads(done.stdout)
    assert kept
    assert given_back > 1_000
    assert spared < 10


def test_a_server_asks_for_it_before_it_loads_a_bundle(trained_shop: Any) -> None:
    with mock.patch("serving.live.live.keep_freed_memory") as asked:
        serving = BundleSource(trained_shop.settings, replay=True).load()
    asked.assert_called_once_with()
    serving.ranker.items.close()
