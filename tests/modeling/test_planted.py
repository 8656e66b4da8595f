"""Planted-signal requests: the bound is reached by who reads the past, and by nobody who does
not.
"""

from __future__ import annotations

import pytest
import torch

from modeling.metrics import auc
from modeling.planted import Planted

LONG = Planted(events=4000)


def by_counting(spec: Planted, newest: int | None) -> float:
    """AUC of scoring a candidate by how many events of its group the history holds."""
    batch, _ = spec.draw(200, 40, seed=1, newest=newest)
    group = torch.nn.functional.one_hot(batch.user.item_BL % spec.groups, spec.groups).sum(1)
    scores = group.gather(1, batch.candidates.item_BC % spec.groups)
    liked = scores > group.float().mean(
        1, keepdim=True
    )  # above the average: two values, as the bound's
    return auc(batch.labels_BCT.flatten().numpy(), liked.flatten().float().numpy())


def test_the_bound_is_reached_by_the_whole_history_and_chance_by_the_newest_events() -> None:
    batch, good = LONG.draw(200, 40, seed=1)
    labels = batch.labels_BCT.flatten().numpy()
    assert auc(labels, good.flatten().float().numpy()) == pytest.approx(
        LONG.attainable_auc, abs=0.01
    )
    assert by_counting(LONG, None) == pytest.approx(LONG.attainable_auc, abs=0.01)
    assert by_counting(LONG, 1000) == pytest.approx(0.5, abs=0.02)


def test_the_bound_is_what_its_formula_says() -> None:
    assert Planted(10, positive=(1.0, 0.0)).attainable_auc == 1
    assert Planted(10, positive=(0.3, 0.3)).attainable_auc == pytest.approx(0.5)


def test_draws_are_repeated_by_their_seed_and_by_no_other() -> None:
    first, again, other = (LONG.draw(3, 5, seed)[0] for seed in (7, 7, 8))
    assert torch.equal(first.user.item_BL, again.user.item_BL)
    assert torch.equal(first.labels_BCT, again.labels_BCT)
    assert not torch.equal(first.user.item_BL, other.user.item_BL)
    assert torch.equal(LONG.draw(3, 5, 7, newest=9)[0].user.item_BL, first.user.item_BL[:, -9:])
