"""What answers are worth without something, measured offline, is what the server itself would answer."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from feature_repo.contract.contract import Contract
from feature_repo.datasets import load_contract
from feature_repo.history.counts import UserCounts
from feature_repo.history.history import Histories
from feature_repo.history.sketch import Layout
from modeling.evaluation.evaluate import EMPTY_HISTORY
from modeling.inputs.degradations import REASONS, degraded, without
from modeling.inputs.encoder import RequestColumns
from serving.api.degraded import Degraded
from serving.api.messages import RankRequest
from serving.command import open_ranker
from serving.ranking.ranker import RankService
from serving.ranking.request import context_columns
from serving.ranking.what_if import as_asked
from tests.conftest import Road
from tests.periods import joined_period


@pytest.fixture(scope="module")
def ranker(token_shop: Road) -> RankService:
    return open_ranker(token_shop.settings, replay=True)


@pytest.fixture(scope="module")
def contract(token_shop: Road) -> Contract:
    return load_contract(token_shop.settings.dataset)


def test_every_reason_changes_what_it_says_and_nothing_else(
    ranker: RankService, token_shop: Road, contract: Contract
) -> None:
    user = some_user(token_shop)
    row = ranker.reader.read_user(user)
    items = ranker.bundle.encoder.items.values.to_pylist()[:10]
    asked = RankRequest(user, items)
    at = ranker.replay_from
    assert at is not None
    taken, context = ranker.items.take(items), context_columns(contract, None)

    def numbers(seen: Any) -> Any:
        return ranker.requests.encoded(seen, items, at, taken, context)

    whole = numbers(row)
    assert whole.gather_tokens is not None
    # What the report withholds, and what the server lacks when that happens, are the same numbers.
    faults = {
        "no_sketch": replace(row, sketch=None),
        "no_history": as_asked(contract, row, simulated(asked, "no_history")),
        "store_unavailable": ranker.nobody(Degraded.STORE_UNAVAILABLE),
        "no_tokens": replace(row, tokens=None),
    }
    withheld = degraded(ranker.bundle.encoder, whole)
    assert set(withheld) == {*faults, "unknown_user"}
    for name, fault in faults.items():
        offline = withheld[name]
        online = numbers(fault)
        for part in ("field_BU", "dense_BG", "candidate_dense", "candidate_category"):
            np.testing.assert_array_equal(
                np.asarray(getattr(offline, part)), np.asarray(getattr(online, part)), name
            )
        changed = any(
            not np.array_equal(
                np.asarray(getattr(online, part)), np.asarray(getattr(whole, part)), equal_nan=True
            )
            for part in ("dense_BG", "candidate_dense")
        )
        assert changed == (name != "no_tokens")


def some_user(road: Road) -> Any:
    from feature_repo.home.tables import JobFolder

    users = JobFolder(road.settings.home, "user_history").read("user_history")["user_id"]
    return users[3].as_py()


def simulated(asked: RankRequest, reason: Any) -> RankRequest:
    """The same request with a simulated degradation."""
    return RankRequest(asked.user_id, asked.candidates, simulate=reason)


def test_a_period_without_something_is_what_its_columns_would_be_without_it(
    trained_shop: Road,
) -> None:
    """The plain twin withholds columns, events and sketches before anything is a number."""
    from modeling import recipes
    from modeling.training import training_run
    from modeling.training_set.dataset import Warehouse

    run = training_run.open_run(trained_shop.settings, recipes.load("amortised_dlrm_tiny"))
    _, encoder = training_run.load_trained(run)
    warehouse = Warehouse(trained_shop.settings)
    requests = joined_period(warehouse, trained_shop.store, "ranking_v1", "test").requests
    whole = encoder.featurise(requests)
    contract = encoder.contract
    user = [column.name for column in contract.user_columns]
    stats = [column.name for column in contract.table("user_stats").columns]
    empty = empty_sketch(contract)
    plain = {
        "no_sketch": replace(requests, read_sketch=None),
        "no_history": replace(without_events(requests), read_sketch=empty),
        "unknown_user": replace(nulled(without_events(requests), user), read_sketch=empty),
        "store_unavailable": replace(nulled(without_events(requests), user), read_sketch=None),
        "empty history": replace(nulled(without_events(requests), stats), read_sketch=empty),
    }
    for name, lost in {**REASONS, "empty history": EMPTY_HISTORY}.items():
        fast = without(encoder, whole, lost)
        slow = encoder.featurise(plain[name])
        for part in ("field_BU", "dense_BG", "candidate_dense", "candidate_category"):
            np.testing.assert_array_equal(
                np.asarray(getattr(fast, part)), np.asarray(getattr(slow, part)), f"{name}: {part}"
            )
        chosen = np.arange(min(len(whole), 40))
        for ours, theirs in zip(*(histories_of(e, chosen) for e in (fast, slow)), strict=True):
            np.testing.assert_array_equal(ours, theirs)


def histories_of(encoded: Any, chosen: np.ndarray) -> list[np.ndarray]:
    histories = encoded.gather(chosen, 16)
    return [histories.offsets, histories.item_keys, *histories.columns.values()]


def without_events(requests: RequestColumns) -> RequestColumns:
    def gather(chosen: np.ndarray, length: int) -> Histories:
        nothing = np.zeros(len(chosen), np.int64)
        return requests.gather(chosen, length).take(nothing, nothing)

    return replace(requests, gather=gather)


def nulled(requests: RequestColumns, names: list[str]) -> RequestColumns:
    columns = {
        name: pa.nulls(len(column), column.type) if name in names else column
        for name, column in requests.user_columns.items()
    }
    return replace(requests, user_columns=columns)


def empty_sketch(contract: Contract) -> Any:
    layout = Layout.of(contract)

    def read(chosen: np.ndarray, offsets: np.ndarray, codes: Any) -> np.ndarray:
        return UserCounts(layout).read(codes, 0)

    return read


def test_absent_tokens_keep_their_shape(ranker: RankService, token_shop: Road) -> None:
    user = ranker.bundle.encoder.items.values.to_pylist()[:2]
    at = ranker.replay_from
    assert at is not None
    row = ranker.reader.read_user(some_user(token_shop))
    whole = ranker.requests.encoded(row, user, at)
    assert whole.gather_tokens is not None
    stored, has = whole.gather_tokens(np.array([0]))
    assert has.all()
    gather = degraded(ranker.bundle.encoder, whole)["no_tokens"].gather_tokens
    assert gather is not None
    found, has = gather(np.array([0]))
    assert found.shape == stored.shape
    assert not found.any()
    assert not has.any()


def test_the_report_names_every_degradation(trained_shop: Road) -> None:
    from modeling import recipes
    from modeling.training import training_run

    run = training_run.open_run(trained_shop.settings, recipes.load("amortised_dlrm_tiny"))
    found = json.loads((run.folder / "evaluation.json").read_text())
    assert set(found["degraded"]) == {
        "no_sketch",
        "no_history",
        "unknown_user",
        "store_unavailable",
    }
    assert all(0 <= row["ndcg@10"]["value"] <= 1 for row in found["degraded"].values())
    page = (run.folder / "report.html").read_text()
    assert "store_unavailable" in page
