"""`python -m serving size`."""

from __future__ import annotations

import asyncio
import math
from typing import Any

import pytest

from feature_repo.errors import UsageError
from serving.live.live import BundleSource
from serving.size import BUSY, Size, _measured, run_size


def size(**fields: Any) -> Size:
    return Size(**{
        "bundle": "b", "process_bytes": 1 << 30, "bundle_bytes": 1 << 28, "items": 10, "item_bytes": 150.0, "users": 4, "user_bytes": 1000.0,
        "state_bytes": 10.0, "first_ms": [8.0, 12.0], "again_ms": [5.0, 5.0], **fields,
    })  # fmt: skip


@pytest.mark.parametrize(("asked", "processes"), [(1, 1), (59, 1), (61, 2), (600, 10)])
def test_processes_are_busy_no_more_than_they_should(asked: float, processes: int) -> None:
    assert size().processes(asked) == processes
    assert asked * 0.010 / processes <= BUSY + 1e-9


def test_a_bundle_is_measured_over_its_own_store(trained_shop: Any) -> None:
    source = BundleSource(trained_shop.settings, replay=True)
    found = asyncio.run(_measured(source, candidates=20, sample=5))
    assert len(found.first_ms) == len(found.again_ms) == 5
    assert all(0 < ms < math.inf for ms in (*found.first_ms, *found.again_ms))
    assert found.users >= 5
    assert found.state_bytes > 0
    assert found.process_bytes > 100 << 20
    assert found.most_bytes >= found.process_bytes + (64 << 20)
    # Numbers of an item: codes, categories, statistics; far from a megabyte
    assert 50 < found.item_bytes < 5000
    store = trained_shop.settings.path("online_store.db").stat().st_size
    assert found.user_bytes == store / found.users


@pytest.mark.parametrize("wrong", [{"candidates": 0}, {"sample": 0}, {"users": -1}])
def test_a_plan_of_nothing_is_refused(wrong: dict[str, int]) -> None:
    asked: dict[str, Any] = {"candidates": 500, "sample": 10, "users": None} | wrong
    with pytest.raises(UsageError, match=next(iter(wrong))):
        run_size(None, requests_per_s=None, replay=True, **asked)


def test_it_says_what_a_plan_takes(
    trained_shop: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setenv("MEMOIR_HOME", trained_shop.settings.root)
    monkeypatch.setenv("MEMOIR_DATA", str(trained_shop.data))
    run_size(None, 20, 5, users=1_000_000, requests_per_s=500.0, replay=True)
    said = capsys.readouterr().out
    for part in ("1,000,000 users", "500 requests a second", "processes", "a user in the online"):
        assert part in said
