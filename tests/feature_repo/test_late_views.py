"""A history as lists and summary tokens as numbers: through Feast's own calls, as of any time and online, the same
values as an oracle reads from the table of events.
"""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from feature_repo.contract.arrow import EPOCH
from feature_repo.datasets import load_contract
from feature_repo.history.known import known_from, replaced_at
from feature_repo.history.lists import list_columns
from feature_repo.history.token_log import TokenLog
from feature_repo.home.tables import JobFolder
from feature_repo.settings import Settings
from feature_repo.store.entity_rows import EntityFrameError
from feature_repo.store.late_views import as_keys
from feature_repo.store.offline_store import NewestOnlyError
from tests.small_shop import at, declared, read, shop

CONTRACT = load_contract("online_retail")
REFS = [f"user_sequence:{column.name}" for column in list_columns(CONTRACT)]


def oracle(events: pa.Table, user: Any, time: datetime, length: int) -> list[dict[str, Any]] | None:
    """A user's events known just before a time, from the table of events, row by row."""
    when = (time - EPOCH) // timedelta(microseconds=1)
    known = (known_from(events) < when) & (replaced_at(events) >= when)
    mine = np.array([one == user for one in events["user_id"].to_pylist()])
    rows = events.filter(pa.array(known & mine)).to_pylist()
    rows.sort(key=lambda row: row["event_timestamp"])
    return rows[-length:] or None


def frame_of(events: pa.Table, number: int, seed: int = 0) -> pd.DataFrame:
    """Users and times, some before anything is known of them, one of nobody."""
    rng = np.random.default_rng(seed)
    picked = events.take(pa.array(rng.integers(0, events.num_rows, number)))
    times = pd.Series(picked["event_timestamp"].to_pandas()).dt.as_unit("us")
    shifts = pd.to_timedelta(rng.integers(-2, 3, number) * 3600, unit="s")
    frame = pd.DataFrame(
        {"user_id": picked["user_id"].to_pandas(), "event_timestamp": times + shifts}
    )
    return frame


def test_lists_are_what_was_known_at_each_time(shop: Any) -> None:
    events = JobFolder(shop.settings.home, "events").read("events")
    frame = frame_of(events, 60)
    frame.loc[0, "user_id"] = 999_999
    job = shop.store.get_historical_features(frame, [*REFS, "user_stats:history_end"])
    found = job.to_arrow()
    length = CONTRACT.spec.num_history_online
    seen = 0
    for row in found.to_pylist():
        expected = oracle(events, row["user_id"], row["event_timestamp"], length)
        if expected is None:
            assert row["history_item_ids"] is None
            assert not row["history_end"]
            continue
        seen += len(expected)
        assert row["history_item_ids"] == [event["item_id"] for event in expected]
        assert row["history_end"] == len(expected)
        stamps = [event["event_timestamp"].replace(microsecond=0) for event in expected]
        assert row["history_event_timestamps"] == stamps
        assert row["history_action"] == [event["action"] for event in expected]
        assert row["history_quantity"] == [event["quantity"] for event in expected]
    assert seen > 500
    # In the order of the frame, and by Feast's other ways to take a result.
    assert found["user_id"].to_pylist() == frame["user_id"].tolist()
    assert job.to_df()["history_item_ids"].map(
        lambda x: None if x is None else list(x)
    ).tolist() == (found["history_item_ids"].to_pylist())


def test_online_holds_the_same_lists(shop: Any) -> None:
    """Of the newest time, through the SDK, and as a server of Feast's asks."""
    events = JobFolder(shop.settings.home, "events").read("events")
    users = sorted(set(events["user_id"].to_pylist()))[:20]
    asked = [{"user_id": user} for user in [*users, 999_999]]
    refs = [*REFS, "user_stats:history_end", "user_history:history"]
    online = shop.store.get_online_features(refs, asked).to_dict()
    frame = pd.DataFrame(asked).assign(event_timestamp=pd.Timestamp("2012-06-01", tz="UTC"))
    offline = shop.store.get_historical_features(frame, REFS).to_arrow()
    for column in list_columns(CONTRACT):
        assert online[column.name] == offline[column.name].to_pylist(), column.name
    assert online["history_item_ids"][-1] is None
    assert [len(ids) for ids in online["history_item_ids"][:-1]] == online["history_end"][:-1]
    full = shop.store.get_online_features(REFS[:1], asked, full_feature_names=True).to_dict()
    assert full["user_sequence__history_item_ids"] == online["history_item_ids"]


def test_a_server_of_feasts_answers_with_lists(shop: Any) -> None:
    from feast.feature_server import get_app
    from starlette.testclient import TestClient

    events = JobFolder(shop.settings.home, "events").read("events")
    user = events["user_id"][0].as_py()
    with TestClient(get_app(shop.store)) as client:
        body = {"features": REFS[:2], "entities": {"user_id": [user]}}
        answer = client.post("/get-online-features", json=body).json()
    names = answer["metadata"]["feature_names"]
    values = dict(zip(names, (result["values"][0] for result in answer["results"]), strict=True))
    mine = [row["item_id"] for row in events.to_pylist() if row["user_id"] == user]
    length = CONTRACT.spec.num_history_online
    assert sorted(values["history_item_ids"]) == sorted(mine[-length:])


def test_tokens_are_numbers_as_of_each_time_and_online(token_shop: Any) -> None:
    settings, store = token_shop.settings, token_shop.store
    rows = JobFolder(settings.home, "summary_tokens").read("token_rows").to_pylist()
    version = rows[0]["token_version"]
    frame = pd.DataFrame(
        [
            {
                "user_id": row["user_id"],
                "token_version": version,
                "event_timestamp": row["event_timestamp"],
            }
            for row in rows[:40]
        ]
    )
    refs = [
        "summary_token_values:token_values",
        "summary_token_values:num_tokens",
        "token_rows:token_row",
    ]
    found = store.get_historical_features(frame, refs).to_arrow().to_pylist()
    log = TokenLog(CONTRACT, settings.home, version)
    for row in found:
        tokens = log.read(row["token_row"]).tokens_SD
        assert tokens is not None
        assert row["num_tokens"] == len(tokens)
        np.testing.assert_array_equal(np.array(row["token_values"], np.float32), tokens.ravel())
    newest = {row["user_id"]: row for row in rows}
    asked = [{"user_id": user, "token_version": version} for user in list(newest)[:10]]
    online = store.get_online_features(refs[:2], asked).to_dict()
    for place, one in enumerate(asked):
        row = max(
            (r for r in rows if r["user_id"] == one["user_id"]), key=lambda r: r["event_timestamp"]
        )
        tokens = log.read(row["token_row"]).tokens_SD
        assert tokens is not None
        np.testing.assert_allclose(online["token_values"][place], tokens.ravel(), atol=2e-3)
        assert online["num_tokens"][place] == len(tokens)


@pytest.fixture
def late_shop(modules: Any, helpers: Any) -> Settings:
    """Lines that arrive late, are corrected and struck; a text and a whole number of each event, some missing."""
    text = declared(
        "late_shop",
        '"log.csv", arrival="seen", deleted="gone"',
        event_identity='("event_id",)',
        num_history_online="3",
    ).replace(
        "event_features=(",
        'event_features=(Column("shop", DType.STRING, "", kind=CATEGORY, nullable=True), '
        'Column("pieces", DType.INT32, "", kind=NUMBER, nullable=True), ',
    )
    rng = np.random.default_rng(0)
    lines = ["event_id,user_id,item_id,event_timestamp,price,country,seen,gone,shop,pieces"]
    for number in range(120):
        name = f"e{rng.integers(90)}"
        day = float(rng.integers(1, 40)) / 2
        seen = day + float(rng.integers(0, 9)) / 2
        shop_name = ["", "north", "south"][int(rng.integers(3))]
        pieces = ["", "2", "7"][int(rng.integers(3))]
        lines.append(
            f"{name},u{rng.integers(6)},i{number % 7},{at(day)},{number},UK,{at(seen)},{int(rng.random() < 0.1)},{shop_name},{pieces}"
        )
    settings = shop(modules, helpers, "late_shop", text, {"log.csv": "\n".join(lines) + "\n"})
    helpers.run_jobs(settings, "events", "user_history", "item_stats", num_partitions=2)
    helpers.apply_in_process(settings)
    helpers.run_jobs(settings, "materialize")
    return settings


def test_late_corrected_and_struck_events_are_in_no_list_too_early(late_shop: Settings) -> None:
    from feature_repo.store.store import open_store

    events = read(late_shop, "events", "events")
    frame = pd.DataFrame(
        [
            {
                "user_id": f"u{user}",
                "event_timestamp": datetime.fromisoformat(at(day / 2)) + timedelta(hours=1),
            }
            for user in range(7)
            for day in range(1, 50)
        ]
    )
    refs = [f"user_sequence:history_{name}" for name in ("item_ids", "price", "shop", "pieces")]
    store = open_store(late_shop)
    found = store.get_historical_features(frame, refs).to_arrow().to_pylist()
    for row in found:
        expected = oracle(events, row["user_id"], row["event_timestamp"], 3)
        if expected is None:
            assert row["history_item_ids"] is None
            continue
        assert sorted(row["history_item_ids"]) == sorted(event["item_id"] for event in expected)
        assert sorted(row["history_price"]) == sorted(event["price"] for event in expected)
        assert sorted(row["history_shop"]) == sorted(event["shop"] or "" for event in expected)
        pieces = [np.nan if e["pieces"] is None else float(e["pieces"]) for e in expected]
        np.testing.assert_array_equal(np.sort(row["history_pieces"]), np.sort(pieces))
    # Online is the last of these.
    asked = [{"user_id": f"u{user}"} for user in range(6)]
    online = store.get_online_features(refs, asked).to_dict()
    last = pd.DataFrame(asked).assign(event_timestamp=pd.Timestamp("2026-06-01", tz="UTC"))
    offline = store.get_historical_features(last, refs).to_arrow()
    assert online["history_item_ids"] == offline["history_item_ids"].to_pylist()
    assert online["history_shop"] == offline["history_shop"].to_pylist()
    np.testing.assert_array_equal(
        np.concatenate(online["history_pieces"]),
        np.concatenate(offline["history_pieces"].to_pylist()),
    )


def test_lists_come_in_small_batches_and_no_row_is_no_list(
    shop: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    events = JobFolder(shop.settings.home, "events").read("events")
    frame = frame_of(events, 50)
    whole = shop.store.get_historical_features(frame, REFS).to_arrow()
    monkeypatch.setattr("feature_repo.store.late_views.MOST_VALUES", 4_000)
    job = shop.store.get_historical_features(frame, REFS)
    batches = list(job.to_batches())
    assert len(batches) > 5
    assert pa.Table.from_batches(batches).equals(whole)
    none = shop.store.get_historical_features(frame.iloc[:0], REFS).to_arrow()
    assert (none.num_rows, none.schema) == (0, whole.schema)


def test_what_cannot_be_asked_is_refused_by_name(shop: Any) -> None:
    frame = pd.DataFrame({"customer": [1], "event_timestamp": [datetime(2011, 6, 1, tzinfo=UTC)]})
    with pytest.raises((EntityFrameError, Exception), match="user_id"):
        shop.store.get_historical_features(frame, REFS).to_arrow()


def test_a_value_that_is_the_newest_alone_is_refused_of_the_past(shop: Any) -> None:
    """Null would say that nothing was known then."""
    frame = pd.DataFrame({"user_id": [1], "event_timestamp": [datetime(2011, 6, 1, tzinfo=UTC)]})
    with pytest.raises(NewestOnlyError, match="Ask for user_sequence"):
        shop.store.get_historical_features(frame, ["user_history:history"])
    with pytest.raises(NewestOnlyError, match="token_rows"):
        shop.store.get_historical_features(
            frame.assign(token_version="x"), ["summary_tokens:tokens", "user_stats:history_end"]
        )


def test_users_are_found_by_what_their_ids_spell() -> None:
    whole, text = pa.int64(), pa.string()
    assert as_keys(pa.array(["12", "012", "x", None]), whole).to_pylist() == [12, None, None, None]
    long = "1234567890123456789"
    assert as_keys(pa.array([long, "9" * 30, "-7"]), whole).to_pylist() == [int(long), None, -7]
    assert as_keys(pa.array([2**63, 5], pa.uint64()), whole).to_pylist() == [None, 5]
    assert as_keys(pa.array([12.0, 12.5, None]), whole).to_pylist() == [12, None, None]
    assert as_keys(pa.array([12, None], pa.int32()), text).to_pylist() == ["12", None]
    assert as_keys(pa.array(["a"]).dictionary_encode(), text).to_pylist() == ["a"]


def test_feasts_materialize_writes_nothing_of_them(shop: Any) -> None:
    store = shop.store
    store.materialize(
        datetime(2000, 1, 1, tzinfo=UTC),
        datetime.now(UTC),
        ["user_sequence", "summary_token_values"],
    )
    user = JobFolder(shop.settings.home, "user_history").read("user_history")["user_id"][0].as_py()
    found = store.get_online_features(REFS[:1], [{"user_id": user}]).to_dict()
    assert found["history_item_ids"][0]


def test_asynchronous_reads_are_the_same(shop: Any, request: pytest.FixtureRequest) -> None:
    """On Redis, whose store Feast reads asynchronously."""
    from feature_repo.store.provider import MadeWhenRead

    class Later:
        """A store that is read asynchronously."""

        def __init__(self, store: Any) -> None:
            self.store = store

        async def online_read_async(self, *given: Any) -> Any:
            return self.store.online_read(*given)

    store = shop.store
    view = store.get_feature_view("user_sequence")
    provider = store._get_provider()
    user = JobFolder(shop.settings.home, "user_history").read("user_history")["user_id"][0].as_py()
    from feast.protos.feast.types.EntityKey_pb2 import EntityKey
    from feast.protos.feast.types.Value_pb2 import Value

    keys = [EntityKey(join_keys=["user_id"], entity_values=[Value(int64_val=user)])]
    asked = ["history_item_ids"]
    now = provider.online_read(store.config, view, keys, asked)
    later = asyncio.run(
        MadeWhenRead(Later(provider.online_store)).online_read_async(
            store.config, view, keys, asked
        )
    )
    assert now == later
    assert now[0][1] is not None
