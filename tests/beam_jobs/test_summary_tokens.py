"""The job summary_tokens: whose tokens, of which events, stored where; skipped, extended, refused; same bytes always."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pytest
import torch

from feature_repo import datasets
from feature_repo.arrow import micros, micros_iso
from feature_repo.catalogue import Catalogue
from feature_repo.envelope import Envelope, decode
from feature_repo.history import HistoryLog
from feature_repo.online_tokens import OnlineTokens
from feature_repo.tables import JobFolder
from feature_repo.token_log import TokenLog
from modeling import bundle as bundles
from modeling.bundle import Bundle
from modeling.models.vista import VISTA
from modeling.summary import Summariser

CONTRACT = datasets.load_contract("online_retail")
COMPUTED_AT = "2011-12-20T00:00:00"


def live(road: Any) -> Bundle:
    row = Catalogue(road.settings.catalogue_url).live_bundle(road.settings.dataset)
    return bundles.load(Path(row.path), CONTRACT, row.digest)


def histories(road: Any) -> tuple[HistoryLog, list[Any]]:
    log = HistoryLog(CONTRACT, JobFolder(road.settings.home, "user_history"))
    return log, log.users.to_pylist()


def online(road: Any, users: list[Any]) -> list[Envelope]:
    stored = OnlineTokens(road.store, CONTRACT).read(live(road).tokens or "", users)
    return [decode(tokens or b"", user) for user, (tokens, _) in zip(users, stored, strict=True)]


def encoded_tokens(bundle: Bundle, log: HistoryLog, row: int, end: int, at: int) -> np.ndarray:
    """One user's tokens as the model makes them of a padded batch: another way than the job's."""
    encoder, found = bundle.encoder, log.gather(np.array([row]), np.array([end]))
    none = np.zeros((1, 0))
    item_of_key = encoder.vocabularies[encoder.item_key].encode(log.items)
    user = encoder.user_inputs(found, np.array([at]), none.astype(np.int64), none.astype(np.float32), item_of_key)
    with torch.inference_mode():
        tokens: np.ndarray = cast(VISTA, bundle.model).tokens_of(user)[0].numpy()
    return tokens


def test_every_users_tokens_are_those_of_the_model(token_shop: Any) -> None:
    bundle, (log, users) = live(token_shop), histories(token_shop)
    assert bundle.manifest["recipe"] == "vista_tiny"  # it went live with its tokens
    for row, envelope in enumerate(online(token_shop, users)):
        expected = encoded_tokens(bundle, log, row, int(log.lengths[row]), 0)
        assert envelope.fingerprint == bundle.tokens
        assert envelope.num_events == log.lengths[row]
        assert envelope.tokens_SD is not None
        np.testing.assert_allclose(envelope.tokens_SD, expected, atol=2e-3, rtol=2e-3)  # fp16
    counts = JobFolder(token_shop.settings.home, "summary_tokens").require().counts
    assert counts["users"] == counts["covered"] == counts["users_written"] == len(users)


def test_training_reads_the_tokens_of_the_time_and_never_later_ones(token_shop: Any) -> None:
    """Through Feast's join: a request sees the newest snapshot at or before it, made of events before that alone."""
    from modeling.dataset import Warehouse

    bundle, (log, _) = live(token_shop), histories(token_shop)
    warehouse = Warehouse(token_shop.settings)
    shape = bundle.token_shape
    split = warehouse.split(token_shop.store, "ranking_v1_tokens", "test", (bundle.tokens or "", shape))
    assert split.requests.gather_tokens is not None
    tokens, has = split.requests.gather_tokens(np.arange(len(split.requests)))
    pointers = JobFolder(token_shop.settings.home, "summary_tokens").read("token_rows")
    by_user: dict[Any, list[tuple[int, int]]] = {}
    for user, at, events in zip(
        pointers["user_id"].to_pylist(),
        micros(pointers["event_timestamp"]).tolist(),
        pointers["token_events"].to_pylist(),
        strict=True,
    ):
        by_user.setdefault(user, []).append((at, events))
    checked = 0
    for request in range(0, len(tokens), 7):
        user, at = split.users[request].as_py(), int(split.requests.times[request])
        before = [pair for pair in sorted(by_user.get(user, [])) if pair[0] <= at]
        assert has[request] == bool(before)
        if before:
            row = int(log.rows_of(pa.array([user]))[0])
            times = log.gather(np.array([row]), log.lengths[[row]]).times
            assert before[-1][1] == (times < before[-1][0]).sum()
            expected = encoded_tokens(bundle, log, row, before[-1][1], before[-1][0])
            np.testing.assert_allclose(tokens[request], expected, atol=2e-3, rtol=2e-3)
            checked += 1
    assert checked > 3


def test_reading_back_with_feast_gives_the_bytes_that_were_stored(token_shop: Any) -> None:
    rows = JobFolder(token_shop.settings.home, "summary_tokens").read("summary_tokens").to_pylist()
    version = live(token_shop).tokens or ""
    read = OnlineTokens(token_shop.store, CONTRACT).read(version, [row["user_id"] for row in rows])
    assert read == [(row["tokens"], row["state"]) for row in rows]
    log = TokenLog(CONTRACT, token_shop.settings.home, version)
    newest = JobFolder(token_shop.settings.home, "summary_tokens").read("token_rows").to_pylist()
    last = {row["user_id"]: row["token_row"] for row in sorted(newest, key=lambda row: row["event_timestamp"])}
    found, has = log.gather(np.array([last[row["user_id"]] for row in rows]), live(token_shop).token_shape)
    assert has.all()
    for row, tokens in zip(rows, found, strict=True):
        np.testing.assert_array_equal(tokens, decode(row["tokens"], row["user_id"]).tokens_SD)


@pytest.mark.parametrize("recipe", ["vista_tiny", "vista_bidirectional_tiny"])
def test_a_later_run_takes_up_new_events_and_skips_who_has_none(
    recipe: str, shop: Any, tmp_path: Path, helpers: Any
) -> None:
    road = helpers.copied(shop, tmp_path)
    helpers.train_road(road, recipe)
    bundle_row = Catalogue(road.settings.catalogue_url).bundle("online_retail", recipe)
    bundle = bundles.load(Path(bundle_row.path), CONTRACT, bundle_row.digest)
    log, users = histories(road)
    whole = log.gather(np.arange(len(users)), log.lengths)
    middle = int(np.quantile(whole.times, 0.8))
    first = helpers.run_jobs(road.settings, "summary_tokens", bundle=recipe, as_of=micros_iso(middle))["summary_tokens"]
    second = helpers.run_jobs(road.settings, "summary_tokens", bundle=recipe)["summary_tokens"]
    ends = np.array([(whole.times[a:b] < middle).sum() for a, b in zip(whole.offsets, whole.offsets[1:], strict=False)])
    new = log.lengths > ends
    assert first.manifest.counts["users"] == (ends > 0).sum()
    assert second.manifest.counts["users_written"] == new.sum() < len(users)
    assert second.manifest.counts["skipped"] == (~new).sum() > 0
    grown = (new & (ends > 0)).sum()
    assert second.manifest.counts.get("extended", 0) == (grown if recipe == "vista_tiny" else 0)
    end = second.manifest.as_of_micros
    for row, envelope in enumerate(online(road, users)):
        at = end if new[row] else middle
        expected = encoded_tokens(bundle, log, row, int(log.lengths[row]), at)
        if recipe != "vista_tiny":
            recent = log.gather(np.array([row]), log.lengths[[row]], bundle.encoder.history_length)
            expected = (
                Summariser(bundle.model, bundle.encoder)
                .whole(recent, bundle.encoder.vocabularies["item_id"].encode(log.items), np.array([at]))
                .tokens_BSD[0]
            )
        np.testing.assert_allclose(envelope.tokens_SD, expected, atol=2e-3, rtol=2e-3)
    assert not helpers.run_jobs(road.settings, "summary_tokens", bundle=recipe)["summary_tokens"].built
