"""A past that was corrected: what is online equals a build from nothing, whatever was edited,
struck, deleted or added.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from feature_repo import datasets
from feature_repo.contract.arrow import arrow_type
from feature_repo.home.catalogue import Catalogue
from feature_repo.home.tables import JobFolder
from modeling.bundle import bundle as bundles
from serving.api.degraded import Degraded
from serving.stores.features import FeastReader, UserRow
from serving.stores.items import item_columns

CONTRACT = datasets.load_contract("online_retail")


def edited(frame: pd.DataFrame, rng: np.random.Generator) -> pd.DataFrame:
    """The raw lines after a correction of every kind: values, strikes, a customer who is gone, an
    item that is gone, late lines.
    """
    frame = frame.copy()
    corrected = rng.choice(len(frame), 40, replace=False)
    frame.loc[corrected[:20], "Quantity"] += np.sign(frame.loc[corrected[:20], "Quantity"])
    frame.loc[corrected[20:], "UnitPrice"] += 0.5
    customers = frame["CustomerID"].dropna().unique()
    gone = rng.choice(customers[customers > 12000], 2, replace=False)
    frame = frame[~frame["CustomerID"].isin(gone)]
    frame = frame[frame["StockCode"] != rng.choice(frame["StockCode"].unique())]
    frame = frame.drop(rng.choice(frame.index, 30, replace=False))
    late = frame.sample(10, random_state=int(rng.integers(1000))).assign(
        InvoiceDate=pd.Timestamp("2011-03-03 10:00")
    )
    late["InvoiceNo"] = "600001"
    return pd.concat([frame, late[late["Quantity"] > 0]], ignore_index=True)


def reader_of(road: Any) -> tuple[FeastReader, bundles.Bundle]:
    row = Catalogue(road.settings.catalogue_url).bundle("online_retail", "vista_tiny")
    bundle = bundles.load(road.settings.path(row.path), CONTRACT, row.digest)
    return FeastReader(
        road.store, CONTRACT, bundle.manifest["online_service"], bundle.tokens
    ), bundle


def users_of(home: str) -> set[Any]:
    return set(
        JobFolder(home, "user_history").read("user_stats", ["user_id"])["user_id"].to_pylist()
    )


def assert_same_user(one: UserRow, other: UserRow) -> None:
    assert (one.columns, one.problems) == (other.columns, other.problems)
    assert (one.history is None) == (other.history is None)
    assert one.history is None or other.history is None or one.history.equals(other.history)
    assert (one.tokens is None) == (other.tokens is None)
    if one.tokens is not None and other.tokens is not None:
        assert (one.tokens.num_events, one.tokens.digest) == (
            other.tokens.num_events,
            other.tokens.digest,
        )
        np.testing.assert_allclose(
            one.tokens.tokens_SD, other.tokens.tokens_SD, atol=2e-3, rtol=2e-3
        )


@pytest.mark.slow
def test_what_is_online_after_a_correction_equals_a_build_from_nothing(
    token_shop: Any, tmp_path: Path, helpers: Any
) -> None:
    road = helpers.copied(token_shop, tmp_path / "corrected")
    helpers.train_road(road, "vista_tiny")
    helpers.run_jobs(road.settings, "summary_tokens", bundle="vista_tiny")
    before = users_of(road.settings.home)
    items_before = (
        JobFolder(road.settings.home, "events")
        .read("item_profile", ["item_id"])["item_id"]
        .unique()
    )

    data = tmp_path / "data"
    data.mkdir()
    frame = edited(pd.read_parquet(road.data / "online_retail.parquet"), np.random.default_rng(0))
    frame.to_parquet(data / "online_retail.parquet", index=False)
    corrected = helpers.replace(
        road, settings=helpers.replace(road.settings, data=str(data)), data=data
    )
    helpers.run_jobs(corrected.settings, *helpers.table_jobs, num_partitions=3)

    # Between the rebuild and new tokens: those of the old past are noticed, and not used.
    helpers.run_jobs(corrected.settings, "materialize")
    reader, _ = reader_of(corrected)
    stats = {user: reader.read_user(user) for user in sorted(users_of(corrected.settings.home))}
    assert any(row.tokens_know_another_history for row in stats.values())
    outcome = helpers.run_jobs(corrected.settings, "summary_tokens", bundle="vista_tiny")[
        "summary_tokens"
    ]
    assert outcome.manifest.counts["corrected"] > 0
    assert outcome.manifest.counts["tombstones"] == 2

    fresh = helpers.walk(helpers.settings_in(tmp_path / "fresh", "online_retail", data), data)
    shutil.copytree(Path(road.settings.home, "bundles"), Path(fresh.settings.home, "bundles"))
    row = Catalogue(road.settings.catalogue_url).bundle("online_retail", "vista_tiny")
    names = ("digest", "dataset", "recipe", "fingerprint", "path", "metrics")
    Catalogue(fresh.settings.catalogue_url).add_bundle(
        **{name: getattr(row, name) for name in names}, tokens="t"
    )
    helpers.run_jobs(fresh.settings, "summary_tokens", bundle="vista_tiny")

    ours, theirs = reader_of(corrected)[0], reader_of(fresh)[0]
    after = users_of(fresh.settings.home)
    assert len(before - after) == 2
    for user in sorted(before | after):
        assert_same_user(ours.read_user(user), theirs.read_user(user))
        assert (Degraded.UNKNOWN_USER in ours.read_user(user).problems) == (user not in after)
        assert not ours.read_user(user).tokens_know_another_history
    items = items_before.to_pylist()
    assert ours.read_items(items).equals(theirs.read_items(items))
    assert arrow_type(CONTRACT.item.dtype) == ours.read_items(items)["item_id"].type
    assert len(item_columns(CONTRACT)) + 1 == ours.read_items(items).num_columns
