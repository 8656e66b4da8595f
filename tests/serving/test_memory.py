"""Freed memory stays with a server's process."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from modeling.layers.memory import keep_freed_memory
from tests.conftest import server_environment

# Page faults a ranking of 50,000: before memory is kept, and after
FAULTS = """
import json, resource
from unittest import mock
from feature_repo.settings import Settings
from modeling.layers.memory import keep_freed_memory
from serving.api.messages import RankRequest
from serving.live.live import BundleSource
from serving.ranking.ranker import Clock

with mock.patch("serving.live.live.keep_freed_memory") as asked:
    ranker = BundleSource(Settings.from_env(), replay=True).load().ranker
items = ranker.bundle.encoder.items.values.to_pylist()
request = RankRequest(user_id=0, candidates=(items * 50_000)[:50_000])

def faults():
    for _ in range(5):
        ranker.answer(request, ranker.nobody(), Clock())
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    scores = [ranker.answer(request, ranker.nobody(), Clock()).response.scores for _ in range(10)]
    return (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / 10, scores[-1]

given_back, first = faults()
kept = keep_freed_memory()
spared, second = faults()
print(json.dumps([asked.called, kept, given_back, spared, first == second]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc alone")
def test_a_ranking_faults_in_no_page_anew(trained_shop: Any) -> None:
    if not keep_freed_memory():
        pytest.skip("the C library is another one")
    done = subprocess.run(
        [sys.executable, "-c", FAULTS],
        env=server_environment(trained_shop, OMP_NUM_THREADS="1"),
        capture_output=True,
        text=True,
        check=True,
    )
    asked, kept, given_back, spared, same = json.loads(done.stdout.splitlines()[-1])
    assert asked
    assert kept
    assert given_back > 100
    assert spared < 0.2 * given_back, (spared, given_back)
    # Bit by bit
    assert same
