"""The token log's row numbers and refusals, and tokens in a real Redis through the job and Feast's
SDK.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from feature_repo import datasets
from feature_repo.history.token_log import PartName, TokenLog, TokenLogError
from feature_repo.home.catalogue import Catalogue
from feature_repo.home.tables import JobFolder
from feature_repo.store.online_tokens import OnlineTokens

CONTRACT = datasets.load_contract("online_retail")


@given(st.integers(0, 8191), st.integers(0, 65535), st.integers(0, 16383), st.integers(1, 50))
def test_row_numbers_name_run_part_piece_and_row_and_no_two_are_alike(
    run: int, part: int, piece: int, rows: int
) -> None:
    name = PartName(run, part, 65536, piece)
    assert PartName.of("x/token_log/" + name.file("arrow")) == name
    numbers = name.rows(rows)
    assert numbers.dtype == np.int64
    assert (numbers >= 0).all()
    assert (np.diff(numbers) == 1).all()
    for other in (
        replace(name, run=(run + 1) % 8192),
        replace(name, part=(part + 1) % 65536),
        replace(name, piece=(piece + 1) % 16384),
    ):
        assert not set(other.rows(rows).tolist()) & set(numbers.tolist())


@pytest.mark.parametrize(
    "name", [PartName(8192, 0, 1, 0), PartName(0, 65536, 1, 0), PartName(0, 0, 1, 16384)]
)
def test_what_a_row_number_cannot_name_is_refused(name: PartName) -> None:
    with pytest.raises(TokenLogError, match="beyond what row numbers can name"):
        name.rows(1)


def test_a_part_without_rows_names_nothing() -> None:
    assert PartName.of("run/token_rows/part-00000.parquet") is None


def test_rows_that_are_not_there_or_are_of_another_version_are_refused(token_shop: Any) -> None:
    rows = JobFolder(token_shop.settings.home, "summary_tokens").read("token_rows").to_pylist()
    version, some = rows[0]["token_version"], np.array([row["token_row"] for row in rows[:5]])
    log = TokenLog(CONTRACT, token_shop.settings.home, version)
    tokens, has = log.gather(np.array([-1, *some, -1]), (4, 16))
    np.testing.assert_array_equal(has, [False, True, True, True, True, True, False])
    assert not tokens[[0, -1]].any()
    with pytest.raises(TokenLogError, match="no part of the token log"):
        log.gather(np.array([1 << 55]), (4, 16))
    with pytest.raises(TokenLogError, match="beyond its part"):
        log.gather(some[:1] + 10**5, (4, 16))
    with pytest.raises(TokenLogError, match="expected"):
        log.gather(some, (4, 8))
    with pytest.raises(TokenLogError, match="not abab"):
        TokenLog(CONTRACT, token_shop.settings.home, "ab" * 16).gather(some, (4, 16))


def test_the_job_writes_redis_by_compare_and_set_and_feast_reads_the_same_bytes(
    token_shop: Any,
    tmp_path: Path,
    redis_address: str,
    postgres_url: str,
    monkeypatch: pytest.MonkeyPatch,
    helpers: Any,
) -> None:
    monkeypatch.setenv("MEMOIR_REGISTRY_URL", postgres_url)
    monkeypatch.setenv("MEMOIR_REDIS", redis_address)
    monkeypatch.setenv("MEMOIR_DATASET", "online_retail")
    copy = helpers.copied(token_shop, tmp_path)
    helpers.train_road(copy, "vista_tiny")
    production = replace(copy.settings, profile="production")
    store = helpers.apply_in_process(production)
    helpers.run_jobs(production, "materialize")
    options = {"bundle": "vista_tiny", "full": True}
    helpers.run_jobs(production, "summary_tokens", computed_at="2011-12-20T00:00:00", **options)
    catalogue = Catalogue(production.catalogue_url)
    version = (
        catalogue.accepted_tokens(catalogue.bundle("online_retail", "vista_tiny").digest) or ""
    )
    rows = JobFolder(production.home, "summary_tokens").read("summary_tokens").to_pylist()
    users, online = [row["user_id"] for row in rows], OnlineTokens(store, CONTRACT)
    assert online.read(version, users) == [(row["tokens"], row["state"]) for row in rows]
    helpers.run_jobs(
        production, "summary_tokens", computed_at="2011-12-19T00:00:00", **options
    )  # late, with old values
    assert online.read(version, users) == [(row["tokens"], row["state"]) for row in rows]
    other = "cd" * 16
    assert online.write(other, users[:3], [b"a", b"b", b"c"], [None, None, b"s"], 5) == 3
    assert online.remove(version) == len(users)
    assert online.read(version, users) == [(None, None)] * len(users)
    assert online.read(other, users[:3]) == [(b"a", None), (b"b", None), (b"c", b"s")]
    profile = store.get_online_features(
        ["user_profile:country"], [{"user_id": user} for user in users]
    ).to_dict()
    assert all(profile["country"])
    assert online.remove(version) == 0
