"""Several labels: masks, chains of probabilities, what is ranked by, and figures that are undefined."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from feature_repo import datasets
from feature_repo.contract.schema import Task
from modeling.evaluation.evaluate import MODEL, measure, plain_metrics, undefined
from modeling.inputs.encoder import Encoded
from modeling.inputs.tasks import probabilities, ranking_logits, sigmoid, weighted
from modeling.metrics import defined
from modeling.training.trainer import masked_bce

SPEC = replace(
    datasets.load("online_retail").spec,
    tasks=(
        Task("label_click", "", "purchase"),
        Task("label_buy", "", "purchase", given="label_click"),
        Task("label_keep", "", "return", given="label_buy", weight=2.0),
    ),
)
LOGITS = np.random.default_rng(0).normal(size=(40, 3)).astype(np.float32)


def test_a_given_task_has_the_product_along_its_chain() -> None:
    click, buy, keep = sigmoid(LOGITS).T
    found = probabilities(SPEC, LOGITS)
    np.testing.assert_allclose(found, np.stack([click, click * buy, click * buy * keep], 1))


def test_one_task_is_ranked_by_its_own_logit() -> None:
    np.testing.assert_array_equal(ranking_logits(SPEC, LOGITS), LOGITS[:, 0].astype(np.float64))


def test_a_combination_is_the_weighted_mean_of_probabilities() -> None:
    spec = replace(SPEC, rank_by=(("label_click", 1.0), ("label_keep", 3.0)))
    each = probabilities(spec, LOGITS)
    np.testing.assert_allclose(
        sigmoid(ranking_logits(spec, LOGITS)), (each[:, 0] + 3 * each[:, 2]) / 4, atol=1e-9
    )
    only = replace(SPEC, rank_by=(("label_buy", 1.0),))
    np.testing.assert_allclose(sigmoid(ranking_logits(only, LOGITS)), each[:, 1], atol=1e-9)


def test_weighted_figures_leave_out_what_is_undefined() -> None:
    spec = replace(SPEC, rank_by=(("label_click", 1.0), ("label_buy", 3.0)))
    assert weighted(spec, [0.4, 0.8, 0.0]) == pytest.approx(0.7)
    assert weighted(spec, [0.4, math.nan, 0.0]) == pytest.approx(0.4)
    assert math.isnan(weighted(spec, [math.nan, math.nan, 0.5]))


def test_an_undefined_label_adds_nothing_to_the_loss() -> None:
    logits = torch.tensor([[[0.3, -1.0], [2.0, 9.0]]])
    labels = torch.tensor([[[1.0, 0.0], [0.0, torch.nan]]])
    mask = torch.ones(1, 2, dtype=torch.bool)
    weights = torch.tensor([1.0, 3.0])
    each = torch.nn.functional.binary_cross_entropy_with_logits
    expected = each(logits[0, 0, 0], labels[0, 0, 0]) + each(logits[0, 1, 0], labels[0, 1, 0])
    expected = expected + 3 * each(logits[0, 0, 1], labels[0, 0, 1])
    found = masked_bce(logits, labels, mask, weights)
    torch.testing.assert_close(found, expected / (2 * 4))
    logits.requires_grad_()
    masked_bce(logits, labels, mask).backward()
    assert logits.grad is not None
    assert logits.grad[0, 1, 1] == 0
    assert torch.isfinite(logits.grad).all()


def test_requests_without_a_defined_label_are_left_out() -> None:
    labels = np.array([1, np.nan, np.nan, np.nan, 0, 1])
    found = defined(labels, np.array([0, 2, 4, 6]))
    assert found.rows.tolist() == [0, 4, 5]
    assert found.offsets.tolist() == [0, 1, 3]
    assert found.requests.tolist() == [0, 2]


@pytest.mark.parametrize("label", [0.0, 1.0, math.nan])
def test_what_nothing_defines_is_null_and_said(label: float) -> None:
    nothing = np.zeros((4, 0))
    encoded = Encoded(
        times=np.zeros(2, np.int64),
        field_BU=nothing[:2],
        dense_BG=nothing[:2],
        candidate_offsets=np.array([0, 2, 4]),
        candidate_item=np.zeros(4, np.int64),
        candidate_category=nothing,
        candidate_dense=nothing,
        labels=np.full((4, 1), label, np.float32),
        item_of_key=np.zeros(1, np.int64),
        gather=lambda chosen, length: None,  # type: ignore[arg-type, return-value]
    )
    found = plain_metrics(measure(encoded, np.array([0, 1]), np.zeros(4), 0))
    assert found["auc"] is None
    assert found["gauc"] is None
    assert (found["ndcg@10"] is None) == (label != 1.0)
    assert "auc" in undefined({MODEL: found})
