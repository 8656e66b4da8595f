"""A person's own feature views: over files that no job of ours writes, point-in-time correct in
training, and read online with the user or item.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pytest

from beam_jobs.jobs.materialize import write_own_views
from feature_repo import datasets
from feature_repo.contract.schema import AGE, CATEGORY, NUMBER, Column, DType, OwnView
from feature_repo.settings import Settings
from serving.stores.features import FeastReader, as_known
from serving.stores.redis_reader import RedisReader

NAME = "shop_with_views"
VIEWS = (
    OwnView(
        "loyalty",
        "user",
        (
            Column("points", DType.INT64, "of the loyalty card", kind=NUMBER),
            Column("card_since", DType.TIMESTAMP, "of the card", kind=AGE, nullable=True),
        ),
        "loyalty.parquet",
        timestamp="known_at",
        push=True,
    ),
    OwnView(
        "shelf",
        "item",
        (Column("aisle", DType.STRING, "where it stands", kind=CATEGORY),),
        "shelf.parquet",
        timestamp="known_at",
    ),
)
JUNE, DECEMBER = pd.Timestamp("2011-06-01", tz="UTC"), pd.Timestamp("2011-12-01", tz="UTC")


@dataclass(frozen=True)
class Shop:
    """The synthetic shop, with two views of a person's own."""

    settings: Settings
    store: Any
    user: int
    item: str


@pytest.fixture(scope="module")
def shop_with_views(
    tmp_path_factory: pytest.TempPathFactory, shop_data: Path, helpers: Any
) -> Iterator[Shop]:
    folder = tmp_path_factory.mktemp("views")
    frame = pd.read_parquet(shop_data / "online_retail.parquet")
    frame.to_parquet(folder / "online_retail.parquet", index=False)
    users = frame["CustomerID"].dropna().astype("int64").unique()
    items = frame["StockCode"].dropna().unique()
    rows = [
        (user, points, at, JUNE) for user in users for points, at in ((10, JUNE), (70, DECEMBER))
    ]
    loyalty = pd.DataFrame(rows, columns=["user_id", "points", "known_at", "card_since"])
    loyalty.to_parquet(folder / "loyalty.parquet", index=False)
    shelf = pd.DataFrame({"item_id": items, "aisle": [f"aisle {n % 4}" for n in range(len(items))]})
    shelf.assign(known_at=JUNE).to_parquet(folder / "shelf.parquet", index=False)
    (folder / "modules").mkdir()
    (folder / "modules" / f"{NAME}.py").write_text(
        "from dataclasses import replace\n"
        "from feature_repo.datasets.online_retail import SPEC, derive\n"
        "from tests.feature_repo.test_own_views import VIEWS\n"
        f"SPEC = replace(SPEC, name={NAME!r}, views=VIEWS)\n"
    )
    patch = pytest.MonkeyPatch()
    patch.setattr(datasets, "__path__", [*datasets.__path__, str(folder / "modules")])
    settings = helpers.settings_in(folder / "home", NAME, folder)
    patch.setenv("MEMOIR_DATA", str(folder))  # as it is when a person walks the road
    road = helpers.walk(settings, folder)
    yield Shop(settings, road.store, int(users[3]), str(items[0]))
    patch.undo()
    sys.modules.pop(f"feature_repo.datasets.{NAME}", None)
    datasets.load.cache_clear()
    datasets.load_contract.cache_clear()


@pytest.mark.parametrize(
    ("at", "points", "aisle"),
    [("2011-05-31", None, None), ("2011-07-01", 10, "aisle 0"), ("2011-12-05", 70, "aisle 0")],
)
def test_training_joins_what_was_known_then(
    shop_with_views: Shop, at: str, points: int | None, aisle: str | None
) -> None:
    from modeling.training_set.dataset import point_in_time_join

    when = pa.array([datetime.fromisoformat(f"{at}T00:00:00+00:00")], pa.timestamp("us", "UTC"))
    asked = pa.table(
        {
            "user_id": [shop_with_views.user],
            "item_id": [shop_with_views.item],
            "event_timestamp": when,
        }
    )
    (row,) = point_in_time_join(shop_with_views.store, "ranking_v1", asked).to_pylist()
    assert row["points"] == points
    assert row["aisle"] == aisle
    assert (row["card_since"] is None) == (points is None)


def test_a_request_reads_them_online_with_user_and_item(shop_with_views: Shop) -> None:
    contract = datasets.load_contract(NAME)
    reader = FeastReader(shop_with_views.store, contract, "ranking_v1_online")
    user = reader.read_user(shop_with_views.user)
    assert user.columns["points"] == 70
    assert pd.Timestamp(user.columns["card_since"]).tz_convert("UTC") == JUNE
    assert reader.read_items([shop_with_views.item])["aisle"].to_pylist() == ["aisle 0"]


def test_a_pushed_row_is_read_at_once(shop_with_views: Shop) -> None:
    at = pd.Timestamp("2011-12-08", tz="UTC")
    row = {
        "user_id": [shop_with_views.user],
        "points": [99],
        "known_at": [at],
        "card_since": [JUNE],
    }
    shop_with_views.store.push("loyalty_push", pd.DataFrame(row))
    reader = FeastReader(shop_with_views.store, datasets.load_contract(NAME), "ranking_v1_online")
    assert reader.read_user(shop_with_views.user).columns["points"] == 99


def test_a_ranker_reads_them_by_their_kinds(shop_with_views: Shop) -> None:
    from modeling.inputs.encoder import Encoder
    from modeling.training_set.dataset import Warehouse
    from tests.periods import joined_period, vocabularies

    warehouse = Warehouse(shop_with_views.settings)
    train = joined_period(warehouse, shop_with_views.store, "ranking_v1", "train")
    encoder = Encoder(warehouse.contract, vocabularies(warehouse.contract, train, 1), 8)
    assert [c.name for c in encoder.request.numbers] == ["points", "card_since"]
    assert "aisle" in {c.name for c in encoder.candidate.categorical}
    made = encoder.featurise(train.requests)
    column = list(encoder.candidate.categorical).index(
        next(c for c in encoder.candidate.categorical if c.name == "aisle")
    )
    slot = sum(c.slots for c in encoder.candidate.categorical[:column])
    assert set(made.candidate_category[:, slot].tolist()) == {0, 1, 2, 3, 4}


def test_a_changed_file_is_another_input_of_jobs_and_training(
    shop_with_views: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    from beam_jobs.engine.inputs import current_inputs
    from beam_jobs.registry import MODULES
    from modeling import recipes
    from modeling.training import training_run

    settings, recipe = shop_with_views.settings, recipes.load("amortised_dlrm_tiny")
    before = current_inputs(MODULES["materialize"], ["views"], settings)
    run = training_run.open_run(settings, recipe).identity
    other = replace(settings, data=f"{settings.data}/other")
    Path(str(other.data)).mkdir()
    for name in ("loyalty", "shelf"):
        frame = pd.read_parquet(f"{settings.data}/{name}.parquet")
        frame.iloc[:-1].to_parquet(f"{other.data}/{name}.parquet", index=False)
    assert current_inputs(MODULES["materialize"], ["views"], other) != before
    assert training_run.open_run(other, recipe).identity != run


@pytest.fixture(params=["sqlite", "redis"])
def either(request: pytest.FixtureRequest, shop_with_views: Shop, helpers: Any) -> Iterator[Shop]:
    """The shop's views on either online store."""
    if request.param == "sqlite":
        yield shop_with_views
        return
    patch = pytest.MonkeyPatch()
    patch.setenv("MEMOIR_REGISTRY_URL", request.getfixturevalue("postgres_url"))
    patch.setenv("MEMOIR_REDIS", request.getfixturevalue("redis_address"))
    patch.setenv("MEMOIR_DATASET", NAME)
    production = replace(shop_with_views.settings, profile="production")
    store = helpers.apply_in_process(production)
    helpers.run_jobs(production, "materialize")
    yield replace(shop_with_views, settings=production, store=store)
    patch.undo()


def points_of(shop: Shop, user: int, at: datetime | None = None) -> int | None:
    """Points of a user as a server reads them, at a moment."""
    contract = datasets.load_contract(NAME)
    service = "ranking_v1_online"
    if shop.settings.profile == "production":

        async def read() -> Any:
            reader = RedisReader(shop.store, contract, service)
            row = await reader.read_user(user, 5.0)
            await reader.close()
            return row

        row = asyncio.run(read())
    else:
        row = FeastReader(shop.store, contract, service).read_user(user)
    moment = at or datetime(2012, 1, 1, tzinfo=UTC)
    found: int | None = as_known(contract, row, int(moment.timestamp() * 1e6)).columns["points"]
    return found


def push(shop: Shop, user: int, points: int, day: str) -> None:
    row = {
        "user_id": [user],
        "points": [points],
        "known_at": [pd.Timestamp(day, tz="UTC")],
        "card_since": [JUNE],
    }
    shop.store.push("loyalty_push", pd.DataFrame(row))


def test_the_newest_row_stays_whoever_writes_it_and_when(either: Shop) -> None:
    user = 13_005
    push(either, user, 80, "2011-12-10")
    push(either, user, 1, "2011-12-09")  # late
    assert points_of(either, user) == 80
    push(either, user, 81, "2011-12-10")  # corrected
    assert points_of(either, user) == 81
    write_own_views(plan_of(either), either.settings)  # the file's row is of December 1
    assert points_of(either, user) == 81
    both = pd.DataFrame(
        {
            "user_id": [user, user],
            "points": [90, 85],
            "known_at": [
                pd.Timestamp("2011-12-12", tz="UTC"),
                pd.Timestamp("2011-12-11", tz="UTC"),
            ],
            "card_since": [JUNE, JUNE],
        }
    )
    either.store.push("loyalty_push", both)  # out of order in one batch
    assert points_of(either, user) == 90


def plan_of(shop: Shop) -> Any:
    from beam_jobs.engine.run import plan_run
    from beam_jobs.registry import load_job

    job = load_job("materialize")
    return plan_run(job, shop.settings, job.options(), None).plan


def test_a_row_that_is_too_old_or_yet_to_come_is_missing_as_in_training(
    either: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    contract = datasets.load_contract(NAME)
    user = 13_007
    push(either, user, 50, "2011-12-20")
    month = replace(VIEWS[0], ttl_days=30.0)
    short = replace(contract, spec=replace(contract.spec, views=(month, VIEWS[1])))
    monkeypatch.setattr(datasets, "load_contract", lambda name: short)
    for day, points in (
        ("2011-12-19", None),
        ("2011-12-20", 50),
        ("2012-01-19", 50),
        ("2012-01-20", None),
    ):
        at = datetime.fromisoformat(f"{day}T00:00:00+00:00")
        assert points_of(either, user, at) == points, day


def test_items_rows_expire_when_items_are_read(shop_with_views: Shop) -> None:
    contract = datasets.load_contract(NAME)
    views = (VIEWS[0], replace(VIEWS[1], ttl_days=30.0))
    short = replace(contract, spec=replace(contract.spec, views=views))
    for day, aisle in (("2011-06-20", "aisle 0"), ("2011-08-01", None), ("2011-05-01", None)):
        at = datetime.fromisoformat(f"{day}T00:00:00+00:00")
        reader = FeastReader(
            shop_with_views.store, short, "ranking_v1_online", now=lambda at=at: at
        )
        assert reader.read_items([shop_with_views.item])["aisle"].to_pylist() == [aisle]


def test_a_key_that_was_struck_loses_its_values_unless_they_are_newer(either: Shop) -> None:
    folder = Path(str(either.settings.data))
    whole = (folder / "loyalty.parquet").read_bytes()
    frame = pd.read_parquet(folder / "loyalty.parquet")
    struck, pushed = 13_009, 13_010
    try:
        write_own_views(plan_of(either), either.settings)
        assert points_of(either, struck) == 70
        push(either, pushed, 75, "2011-12-15")
        kept = frame[~frame["user_id"].isin([struck, pushed])]
        kept.to_parquet(folder / "loyalty.parquet", index=False)
        write_own_views(plan_of(either), either.settings)
        assert points_of(either, struck) is None
        assert points_of(either, pushed) == 75
        frame.iloc[:0].to_parquet(folder / "loyalty.parquet", index=False)  # emptied
        write_own_views(plan_of(either), either.settings)
        assert points_of(either, 13_011) is None
    finally:
        (folder / "loyalty.parquet").write_bytes(whole)
        write_own_views(plan_of(either), either.settings)
    assert points_of(either, struck) == 70
