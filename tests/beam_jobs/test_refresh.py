"""One command takes new raw rows to the online store, and skips what is up to date."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from beam_jobs.__main__ import refresh
from feature_repo import datasets
from serving.stores.features import FeastReader


def test_new_rows_are_online_after_a_refresh(
    shop: Any,
    tmp_path: Path,
    helpers: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    data = tmp_path / "raw"
    shutil.copytree(shop.data, data)
    copy = helpers.copied(type(shop)(shop.settings, data), tmp_path / "home")
    for name, value in (("DATASET", "online_retail"), ("HOME", copy.settings.root), ("DATA", data)):
        monkeypatch.setenv(f"MEMOIR_{name}", str(value))

    def events_online(user: int) -> int:
        reader = FeastReader(
            copy.store, datasets.load_contract("online_retail"), "ranking_v1_online"
        )
        return int(reader.read_user(user).columns["history_end"])

    before = events_online(13001)
    frame = pd.read_parquet(data / "online_retail.parquet")
    line = (
        frame[frame["CustomerID"] == 13001.0]
        .iloc[[-1]]
        .assign(InvoiceNo="599999", Quantity=1.0, InvoiceDate=pd.Timestamp("2011-12-09 12:00"))
    )
    pd.concat([frame, line]).astype({"InvoiceDate": "datetime64[us]"}).to_parquet(
        data / "online_retail.parquet", index=False
    )
    assert refresh() == 0
    assert events_online(13001) == before + 1
    told = capsys.readouterr().out
    assert "no bundle is live" in told
    assert re.search(r"^20\d\d-\d\d-\d\dT[\d:]{8}Z refresh: events$", told, re.MULTILINE)
    assert refresh() == 0
    assert capsys.readouterr().out.count("up to date") == 4
