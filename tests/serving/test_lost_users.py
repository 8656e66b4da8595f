"""An event of a user whose record the store has lost."""

import shutil
import sqlite3
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from feature_repo import datasets
from feature_repo.contract.contract import Contract
from feature_repo.contract.schema import DType, Entity
from feature_repo.home.known_users import KnownUsers, codes_file
from feature_repo.home.tables import JobFolder
from feature_repo.store.store import open_store
from serving.api.errors import StoreAwayError
from serving.stores.events import EventTaker
from serving.stores.features import FeastReader, UserRow

NEW_USER = 99_000_001


@pytest.fixture
def road(shop: Any, tmp_path: Path, helpers: Any) -> Any:
    return helpers.copied(shop, tmp_path)


@pytest.fixture
def contract(road: Any) -> Contract:
    return datasets.load_contract(road.settings.dataset)


def read(road: Any, contract: Contract, user: int) -> UserRow:
    reader = FeastReader(open_store(road.settings), contract, "ranking_v1_online")
    return reader.read_user(user)


def forget(road: Any, user: int) -> None:
    """What an eviction does: all rows of a user go, and nobody is told."""
    text = user.to_bytes(8, "little")
    with sqlite3.connect(Path(road.settings.home, "online_store.db")) as connection:
        for view in ("user_history", "user_stats", "user_profile"):
            removed = connection.execute(
                f"DELETE FROM memoir_{view} WHERE instr(entity_key, ?) > 0", (text,)
            ).rowcount
            assert removed, view
    connection.close()


def an_event(item: str, minutes: int = 0) -> dict[str, Any]:
    at = datetime(2012, 1, 1, 10, minutes, tzinfo=UTC)
    return {
        "item_id": item,
        "action": 0,
        "event_timestamp": at,
        "quantity": 1.0,
        "unit_price": 2.5,
    }


def of_some(road: Any, name: str, column: str) -> list[Any]:
    return JobFolder(road.settings.home, "events").read(name)[column].unique().to_pylist()


@pytest.fixture
def taker(road: Any, contract: Contract) -> EventTaker:
    return EventTaker(open_store(road.settings), contract, None, road.settings.home)


def test_a_lost_past_is_said_until_the_job_has_run(
    road: Any, contract: Contract, taker: EventTaker, helpers: Any
) -> None:
    user = of_some(road, "events", "user_id")[0]
    items = of_some(road, "events", "item_id")[:3]
    whole = read(road, contract, user)
    assert whole.problems == ()
    forget(road, user)
    assert "unknown_user" in read(road, contract, user).problems
    # 1. The events count, and the answer says that they are not all.
    for minute, item in enumerate(items):
        assert taker.take(user, [an_event(item, minute)]).added == 1
    assert taker.take(user, [an_event(items[0])]).added == 0
    found = read(road, contract, user)
    assert found.problems == ("history_incomplete",)
    assert found.history is not None
    assert found.history["item_id"].to_pylist() == items
    assert found.sketch is None
    assert found.columns["history_end"] is None
    # 2. The job brings the past back, and forgets none of them.
    helpers.run_jobs(road.settings, "materialize", force=True)
    found = read(road, contract, user)
    assert found.problems == ()
    assert found.columns["history_end"] == whole.columns["history_end"] + 3
    assert found.history["item_id"].to_pylist()[-3:] == items


def test_a_new_user_is_new(road: Any, contract: Contract, taker: EventTaker) -> None:
    items = of_some(road, "events", "item_id")[:2]
    assert taker.take(NEW_USER, [an_event(items[0])]).added == 1
    found = read(road, contract, NEW_USER)
    assert found.problems == ()
    assert found.columns["history_end"] == 1


def test_a_new_user_who_was_lost_is_made_of_the_log(
    road: Any, contract: Contract, taker: EventTaker
) -> None:
    items = of_some(road, "events", "item_id")[:3]
    for minute, item in enumerate(items[:2]):
        taker.take(NEW_USER, [an_event(item, minute)])
    before = read(road, contract, NEW_USER)
    text = NEW_USER.to_bytes(8, "little")
    with sqlite3.connect(Path(road.settings.home, "online_store.db")) as connection:
        for view in ("user_history", "user_stats"):
            connection.execute(f"DELETE FROM memoir_{view} WHERE instr(entity_key, ?) > 0", (text,))
    connection.close()
    assert taker.take(NEW_USER, [an_event(items[2], 2)]).added == 1
    found = read(road, contract, NEW_USER)
    assert found.problems == ()
    assert found.history["item_id"].to_pylist() == items
    assert found.columns["history_end"] == before.columns["history_end"] + 1
    assert found.sketch is not None
    assert found.sketch.num_events == 3


def test_without_tables_nobody_is_taken_for_new(road: Any, contract: Contract) -> None:
    taker = EventTaker(open_store(road.settings), contract, None, None)
    taker.take(NEW_USER, [an_event(of_some(road, "events", "item_id")[0])])
    assert read(road, contract, NEW_USER).problems == ("history_incomplete",)


def test_a_home_that_cannot_be_read_takes_no_event_of_them(
    road: Any, contract: Contract, taker: EventTaker
) -> None:
    (path, *_) = JobFolder(road.settings.home, "materialize").paths("known_users")
    Path(path).write_bytes(b"damaged")
    with pytest.raises(StoreAwayError, match=r"cannot be read .* send them again"):
        taker.take(NEW_USER, [an_event(of_some(road, "events", "item_id")[0])])


@pytest.mark.parametrize("kind", [DType.INT64, DType.STRING])
def test_known_users_of_a_newer_run_are_known(
    shop: Any, tmp_path: Path, kind: DType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("feature_repo.home.known_users.FRESH_S", 0.0)
    make: Callable[[int], Any] = int if kind is DType.INT64 else "user {}".format
    known = KnownUsers(str(tmp_path), Entity("user", "user_id", kind, ""))
    assert known.has(make(1)) is None
    folder = JobFolder(str(tmp_path), "materialize")
    published = JobFolder(shop.settings.home, "materialize").require()
    for run, users in (("a", [1, 2, 3]), ("b", [3, 4])):
        data = codes_file(pa.array([make(n) for n in users]))
        part = folder.write_part(run, "known_users", "00000.arrow", data, len(users))
        folder.publish(replace(published, run_id=run, tables={"known_users": [part]}))
        for n in range(6):
            assert known.has(make(n)) is (n in users)
    shutil.rmtree(tmp_path / "materialize")
    assert known.has(make(3)) is None
