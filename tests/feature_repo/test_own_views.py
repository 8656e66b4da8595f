"""A person's own feature views: over files that no job of ours writes, point-in-time correct in
training, and read online with the user or item.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pytest

from feature_repo import datasets
from feature_repo.schema import AGE, CATEGORY, NUMBER, Column, DType, OwnView
from feature_repo.settings import Settings

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
    from modeling.dataset import point_in_time_join

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
    from serving.features import FeastReader

    contract = datasets.load_contract(NAME)
    reader = FeastReader(shop_with_views.store, contract, "ranking_v1_online")
    user = reader.read_user(shop_with_views.user)
    assert user.columns["points"] == 70
    assert pd.Timestamp(user.columns["card_since"]).tz_convert("UTC") == JUNE
    assert reader.read_items([shop_with_views.item])["aisle"].to_pylist() == ["aisle 0"]


def test_a_pushed_row_is_read_at_once(shop_with_views: Shop) -> None:
    from serving.features import FeastReader

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
    from modeling.dataset import Warehouse, vocabularies
    from modeling.encoder import Encoder

    warehouse = Warehouse(shop_with_views.settings)
    train = warehouse.split(shop_with_views.store, "ranking_v1", "train")
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
    from beam_jobs.inputs import current_inputs
    from modeling import command, recipes

    settings, recipe = shop_with_views.settings, recipes.load("amortised_dlrm_tiny")
    before = current_inputs("materialize", ["views"], settings)
    run = command.open_run(settings, recipe).identity
    other = replace(settings, data=f"{settings.data}/other")
    Path(str(other.data)).mkdir()
    for name in ("loyalty", "shelf"):
        frame = pd.read_parquet(f"{settings.data}/{name}.parquet")
        frame.iloc[:-1].to_parquet(f"{other.data}/{name}.parquet", index=False)
    assert current_inputs("materialize", ["views"], other) != before
    assert command.open_run(other, recipe).identity != run
