"""What answers are worth without something, measured offline, is what the server itself would answer."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from feature_repo.contract import Contract
from feature_repo.datasets import load_contract
from modeling.rungs import empty_sketch, no_tokens, rungs
from serving.command import open_ranker
from serving.degraded import Degraded
from serving.messages import RankRequest
from serving.pretended import as_asked
from serving.ranker import RankService, context_columns
from tests.conftest import Road


@pytest.fixture(scope="module")
def ranker(token_shop: Road) -> RankService:
    return open_ranker(token_shop.settings, replay=True)


@pytest.fixture(scope="module")
def contract(token_shop: Road) -> Contract:
    return load_contract(token_shop.settings.dataset)


def test_every_rung_changes_what_it_says_and_nothing_else(
    ranker: RankService, token_shop: Road, contract: Contract
) -> None:
    from feature_repo.tables import JobFolder

    user = JobFolder(token_shop.settings.home, "user_history").read("user_history")["user_id"][3]
    row = ranker.reader.read_user(user.as_py())
    items = ranker.bundle.encoder.items.values.to_pylist()[:10]
    asked = RankRequest(user.as_py(), items)
    at = ranker.replay_from
    assert at is not None
    taken, context = ranker.items.take(items), context_columns(contract, None)

    def numbers(seen: Any) -> Any:
        return ranker.encoded(seen, items, at, taken, context)

    whole = numbers(row)
    requests = ranker.prepared(row, items, at, taken, context).requests
    assert requests.read_sketch is not None
    assert requests.gather_tokens is not None
    # What the report withholds, and what the server lacks when that happens, are the same numbers.
    faults = {
        "no_sketch": replace(row, sketch=None),
        "no_history": as_asked(contract, row, replace_force(asked, "no_history")),
        "store_unavailable": ranker.nobody(Degraded.STORE_UNAVAILABLE),
        "no_tokens": replace(row, tokens=None),
    }
    withheld = rungs(requests, contract)  # type: ignore[arg-type]  # no column of candidates is asked for
    assert set(withheld) == {*faults, "unknown_user"}
    prepared = ranker.prepared(row, items, at, taken, context)
    for name, fault in faults.items():
        offline = ranker.bundle.encoder.encode(
            withheld[name], prepared.numbers, prepared.item_of_key
        )
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


def replace_force(asked: RankRequest, rung: Any) -> RankRequest:
    """The same request with a forced rung."""
    return RankRequest(asked.user_id, asked.candidates, force=rung)


def test_tokens_that_nobody_has_keep_their_shape(ranker: RankService, contract: Contract) -> None:
    tokens = np.ones((2, 3, 4), np.float32)

    class Requests:
        gather_tokens = staticmethod(lambda chosen: (tokens[chosen], np.ones(len(chosen), bool)))

    gather = no_tokens(Requests())  # type: ignore[arg-type]
    assert gather is not None
    found, has = gather(np.array([0, 1]))
    assert found.shape == tokens.shape
    assert not found.any()
    assert not has.any()
    codes = [np.zeros(3, np.int64)] * (1 + len(contract.remembered))
    assert not np.nan_to_num(empty_sketch(contract)(np.array([0]), np.array([0, 3]), codes)).any()


def test_the_report_names_every_rung(trained_shop: Road) -> None:
    from modeling import command, recipes

    run = command.open_run(trained_shop.settings, recipes.load("amortised_dlrm_tiny"))
    found = json.loads((run.folder / "evaluation.json").read_text())
    assert set(found["rungs"]) == {"no_sketch", "no_history", "unknown_user", "store_unavailable"}
    assert all(0 <= row["ndcg@10"]["value"] <= 1 for row in found["rungs"].values())
    page = (run.folder / "report.html").read_text()
    assert "store_unavailable" in page
