"""Metrics against scikit-learn and plain Python; ties and order are stable."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import log_loss, ndcg_score, roc_auc_score

from feature_repo import datasets
from feature_repo.contract.schema import Examples
from modeling import metrics
from modeling.errors import ScoresError
from modeling.evaluation.evaluate import (
    degraded_line,
    plain_metrics,
    undefined,
    without_telling_nothing,
)
from modeling.inputs.tasks import sampling_shift
from modeling.metrics import Estimate, auc, evaluate, ndcg_at, ranks_within, reciprocal_rank
from modeling.metrics import log_loss as our_log_loss
from modeling.training_set.simple_baselines import baselines_of

REQUESTS = st.lists(
    st.lists(st.tuples(st.integers(0, 1), st.integers(-3, 3)), min_size=1, max_size=15),
    min_size=1,
    max_size=8,
)


def flat(requests: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    pairs = [pair for request in requests for pair in request]
    return (
        np.array([p[0] for p in pairs], float),
        np.array([p[1] for p in pairs], float),
        np.cumsum([0, *map(len, requests)]),
    )


@settings(max_examples=200, deadline=None)
@given(REQUESTS)
def test_ranking_metrics_equal_plain_python(requests: Any) -> None:
    labels, scores, offsets = flat(requests)
    ndcg, rr = ndcg_at(labels, scores, offsets, 10), reciprocal_rank(labels, scores, offsets)
    for number, request in enumerate(requests):
        ranked = [
            label for label, _ in sorted(request, key=lambda pair: -pair[1])
        ]  # stable: ties keep their order
        if not any(ranked):
            assert np.isnan(ndcg[number])
            assert np.isnan(rr[number])
            continue
        gain = sum(label / np.log2(place + 2) for place, label in enumerate(ranked[:10]))
        ideal = sum(1 / np.log2(place + 2) for place in range(min(sum(ranked), 10)))
        assert ndcg[number] == pytest.approx(gain / ideal)
        assert rr[number] == pytest.approx(1 / (ranked.index(1) + 1))


def test_ndcg_equals_scikit_learn_without_ties() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        labels, scores = rng.integers(0, 2, 30), rng.permutation(30).astype(float)
        labels[0] = 1
        assert ndcg_at(labels, scores, np.array([0, 30]))[0] == pytest.approx(
            ndcg_score([labels], [scores], k=10)
        )


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 1), st.integers(-3, 3), st.integers(1, 4)), min_size=2, max_size=40
    )
)
def test_auc_equals_scikit_learn_with_ties_and_weights(rows: list[tuple[int, int, int]]) -> None:
    labels, scores, weights = (np.array(column, float) for column in zip(*rows, strict=True))
    if len(set(labels)) < 2:
        assert np.isnan(auc(labels, scores))
        return
    assert auc(labels, scores) == pytest.approx(roc_auc_score(labels, scores))
    assert auc(labels, scores, weights) == pytest.approx(
        roc_auc_score(labels, scores, sample_weight=weights)
    )


def test_the_whole_evaluation_equals_scikit_learn() -> None:
    rng = np.random.default_rng(1)
    sizes = rng.integers(2, 30, 60)
    offsets, users = np.cumsum([0, *sizes]), rng.integers(0, 25, 60)
    users[:25] = np.arange(25)
    probability = rng.random(offsets[-1]).round(2).clip(0.01, 0.99)
    labels = (rng.random(offsets[-1]) < probability).astype(float)
    found = evaluate(labels, probability, offsets, users, probability, resamples=50)
    user_of = np.repeat(users, sizes)
    assert found["auc"].value == pytest.approx(roc_auc_score(labels, probability))
    assert found["log_loss"].value == pytest.approx(log_loss(labels, probability))
    rate = labels.mean()
    assert found["ne"].value == pytest.approx(
        log_loss(labels, probability) / log_loss(labels, np.full(len(labels), rate))
    )
    mixed = [u for u in range(25) if 0 < labels[user_of == u].mean() < 1]
    weights = [np.sum(user_of == u) for u in mixed]
    by_user = [roc_auc_score(labels[user_of == u], probability[user_of == u]) for u in mixed]
    assert found["gauc"].value == pytest.approx(np.average(by_user, weights=weights))
    for estimate in found.values():
        assert estimate.low < estimate.value < estimate.high


def test_a_calibrated_score_has_a_small_error_and_a_shifted_one_a_large_one() -> None:
    rng = np.random.default_rng(2)
    probability = rng.random(40_000)
    labels = (rng.random(40_000) < probability).astype(float)
    offsets, users = np.arange(0, 40_001, 10), np.arange(4000) % 100
    good = evaluate(labels, probability, offsets, users, probability, resamples=5)[
        "calibration_error"
    ].value
    shifted = np.clip(probability + 0.2, 0, 1)
    bad = evaluate(labels, shifted, offsets, users, shifted, resamples=5)["calibration_error"].value
    assert good < 0.02
    assert bad > 0.15


def test_intervals_hold_the_truth_about_as_often_as_they_say() -> None:
    rng, inside = np.random.default_rng(3), 0
    for trial in range(60):
        labels = (rng.random(3000) < 0.3).astype(float)
        found = evaluate(
            labels,
            rng.random(3000),
            np.arange(0, 3001, 10),
            np.arange(300) % 100,
            None,
            resamples=60,
            seed=trial,
        )["auc"]
        inside += found.low <= 0.5 <= found.high
    assert inside >= 50


def test_equal_scores_keep_the_order_of_candidates() -> None:
    assert ranks_within(np.zeros(6), np.array([0, 4, 6])).tolist() == [0, 1, 2, 3, 0, 1]


def test_beating_means_intervals_that_do_not_overlap() -> None:
    assert Estimate(0.7, 0.68, 0.72).beats(Estimate(0.6, 0.58, 0.67))
    assert not Estimate(0.7, 0.66, 0.74).beats(Estimate(0.66, 0.64, 0.67))


def of_one_request(
    labels: list[float], scores: list[float], probability: bool = False
) -> dict[str, float]:
    offsets, users = np.array([0, len(labels)]), np.array([0])
    given = 1 / (1 + np.exp(-np.array(scores))) if probability else None
    found = evaluate(np.array(labels), np.array(scores), offsets, users, given, resamples=5)
    return {name: estimate.value for name, estimate in found.items()}


@pytest.mark.parametrize("label", [0.0, 1.0])
def test_what_one_kind_of_label_does_not_define_is_no_number(label: float) -> None:
    found = of_one_request([label] * 3, [0.2, 0.3, 0.1])
    assert np.isnan(found["auc"])
    assert np.isnan(found["gauc"])
    assert np.isnan(found["ndcg@10"]) == (label == 0.0)


def test_scores_that_are_nan_and_periods_without_requests_are_refused() -> None:
    with pytest.raises(ScoresError, match="1 of 2 scores are NaN"):
        of_one_request([1.0, 0.0], [float("nan"), 0.1])
    nothing = np.zeros(0)
    with pytest.raises(ScoresError, match="no request"):
        evaluate(nothing, nothing, np.array([0]), np.zeros(0, np.int64), None, resamples=2)


def test_infinite_scores_are_ordered_and_tie_like_others() -> None:
    labels, scores = np.array([1.0, 0, 0, 1]), np.array([np.inf, 0.3, -np.inf, -np.inf])
    found = evaluate(labels, scores, np.array([0, 2, 4]), np.array([0, 1]), None, resamples=2)
    assert found["auc"].value == (1 + 1 + 0 + 0.5) / 4
    assert found["gauc"].value == 0.75


@pytest.mark.parametrize(
    "measured",
    [
        lambda labels, scores: ndcg_at(labels, scores, np.array([0, 3])),
        lambda labels, scores: reciprocal_rank(labels, scores, np.array([0, 3])),
        lambda labels, scores: auc(labels, scores),
        lambda labels, scores: our_log_loss(labels, scores),
        lambda labels, scores: evaluate(
            labels, scores, np.array([0, 3]), np.zeros(1, np.int64), None
        ),
    ],
)
def test_an_undefined_label_is_refused_and_taken_for_nothing(measured: Any) -> None:
    labels, scores = np.array([1.0, np.nan, 0.0]), np.array([0.3, 0.2, 0.1])
    with pytest.raises(ScoresError, match="1 of 3 labels are undefined"):
        measured(labels, scores)


def test_a_baseline_that_orders_nothing_is_left_out() -> None:
    """Where nobody acts on an item twice, and where a window comes to all events."""
    rows, offsets = 6, np.array([0, 3, 6])
    labels = np.array([1, 0, 0, np.nan, 1, 0])
    rising, nothing = np.arange(rows, dtype=np.float32), np.zeros(rows, np.float32)
    scores = {f"popularity:{n}": rising for n in "ab"}
    own = {
        "own frequency, last 50": rising,
        "own frequency": rising,
        "own frequency, fading": nothing,
    }
    found = baselines_of({**scores, **own}, labels, offsets)
    assert list(found) == ["own frequency", "popularity, best window", "random"]


def test_probabilities_are_shifted_by_how_negatives_are_drawn() -> None:
    """Training draws four for each positive, evaluation a hundred for each request."""
    spec = datasets.load_contract("online_retail").spec
    rng = np.random.default_rng(0)
    train = (rng.random((50_000, 1)) < 1 / 5).astype(np.float32)
    later = (rng.random((50_000, 1)) < 1 / 101).astype(np.float32)
    (shift,) = sampling_shift(spec, train, later)
    assert shift == pytest.approx(np.log(4 / 100), abs=0.1)
    constant = np.full(len(later), np.log(1 / 4))  # the base rate of training
    offsets, users = np.arange(0, len(later) + 1, 50), np.zeros(len(later) // 50, np.int64)
    ne = [
        evaluate(later[:, 0], constant, offsets, users, 1 / (1 + np.exp(-(constant + by))))[
            "ne"
        ].value
        for by in (0.0, shift)
    ]
    assert ne[0] > 2
    assert ne[1] == pytest.approx(1.0, abs=0.01)
    shown = replace(spec, requests=replace(spec.requests, examples=Examples.IMPRESSIONS))
    assert sampling_shift(shown, train, later).tolist() == [0.0]


def test_an_order_of_one_candidate_tells_nothing() -> None:
    one = Estimate(1.0, 1.0, 1.0)
    rows = {name: {"ndcg@10": one, "mrr": one, "auc": one} for name in ("model", "random")}
    assert without_telling_nothing(rows, random=0.5) == rows
    found = without_telling_nothing(rows, random=1.0)
    assert np.isnan(found["model"]["ndcg@10"].value)
    assert found["model"]["auc"] == one
    assert plain_metrics(found["model"])["ndcg@10"] is None
    plain = {name: plain_metrics(row) for name, row in found.items()}
    assert "nothing to rank" in undefined(plain)
    assert degraded_line({"degraded": plain}).endswith("do without something: undefined")


@pytest.mark.parametrize("decimals", [1, 6])
def test_the_auc_of_a_resample_is_that_of_its_weights(
    decimals: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(3)
    owner = np.sort(rng.integers(0, 40, 5_000))
    scores = rng.normal(size=5_000).round(decimals)
    # Infinite scores tie like others.
    scores[rng.random(5_000) < 0.2] = -np.inf
    labels = (np.maximum(scores, -1) + rng.normal(size=5_000) > 1).astype(np.float64)
    weights = rng.multinomial(40, np.full(40, 1 / 40), 8).astype(np.float64)
    monkeypatch.setattr(metrics, "AUC_USERS", 7)
    found = metrics.auc_of_resamples(labels, scores, owner, weights)
    plain = [metrics.auc(labels, scores, weight[owner]) for weight in weights]
    # Where scores are few, no bin holds two of them.
    np.testing.assert_allclose(found, plain, atol=1e-12 if decimals == 1 else 2e-4)
