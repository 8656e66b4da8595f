"""Data of declared crosses: no field alone tells anything, and the bound is what its formula says."""

from __future__ import annotations

import numpy as np
import pytest

from modeling.benchmarks.crosses import CANDIDATES, REQUESTS, _quality, _regression
from modeling.benchmarks.crosses_data import PAIRS, Crosses
from modeling.inputs.tasks import sigmoid
from modeling.metrics import auc, log_loss

SPEC = Crosses(values=8)


def test_no_value_alone_says_anything() -> None:
    for axis in (1, 2):
        assert (SPEC.signs.sum(axis=axis) == 0).all()
    assert len(np.unique(SPEC.signs)) == 2
    assert not (SPEC.signs[0] == SPEC.signs[1]).all()


def test_pairs_form_no_circle() -> None:
    """Else their signs would not be independent, and the bound another one."""
    joined = {field: field for pair in PAIRS for field in pair}

    def root(field: int) -> int:
        return field if joined[field] == field else root(joined[field])

    for first, second in PAIRS:
        assert root(first) != root(second)
        joined[root(first)] = root(second)


@pytest.mark.parametrize("strength", [0.3, 1.0, 3.0])
def test_the_bound_is_reached_by_who_knows_the_signs(strength: float) -> None:
    spec = Crosses(strength=strength)
    drawn = spec.draw(4000, 20, seed=1)
    labels = drawn.batch.labels_BCT.numpy().ravel()
    logits = drawn.logits_BC.numpy().ravel()
    assert auc(labels, logits) == pytest.approx(spec.bound.auc, abs=0.004)
    assert log_loss(labels, sigmoid(logits)) == pytest.approx(spec.bound.log_loss, abs=0.004)


def test_a_regression_that_is_told_the_crosses_comes_near_it_and_one_that_is_not_is_at_chance() -> (
    None
):
    train, held, tested = (
        [SPEC.draw(REQUESTS, CANDIDATES, 1000 * kind + n).batch for n in range(20)]
        for kind in range(3)
    )
    told, alone = (
        _quality(_regression(SPEC, train, held, 3, 1, told=told), tested)["auc"]
        for told in (True, False)
    )
    assert told == pytest.approx(SPEC.bound.auc, abs=0.02)
    assert alone == pytest.approx(0.5, abs=0.02)
