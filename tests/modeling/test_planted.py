"""Planted-signal requests: the bound is reached by who reads the past, and by nobody who does
not.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.ensemble import HistGradientBoostingClassifier

from modeling.benchmarks.planted_data import Planted, PlantedPairs
from modeling.metrics import auc

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


PAIRS = PlantedPairs(events=4000)


def pair_scores(
    spec: PlantedPairs, newest: int | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Labels; how often each candidate's A was followed by its own B; and a regression on counts of
    all kinds beside the candidate's, which is all that a pool of items can tell.
    """
    batch, _ = spec.draw(400, 40, seed=1, newest=newest)
    kind = batch.user.item_BL.numpy() % (3 * spec.habits)
    habit = batch.candidates.item_BC.numpy() % (3 * spec.habits) - 2 * spec.habits
    followed = np.zeros((len(kind), spec.habits))
    for own in range(spec.habits):
        after = (kind[:, :-1] == own) & (kind[:, 1:] == spec.habits + own)
        followed[:, own] = after.sum(1) / np.maximum((kind[:, :-1] == own).sum(1), 1)
    counts = np.stack([(kind == one).sum(1) for one in range(2 * spec.habits)], axis=1)
    labels = batch.labels_BCT[..., 0].numpy()
    by_pairs = np.take_along_axis(followed, habit, axis=1) > 1.5 / spec.habits
    mine = np.eye(spec.habits)[habit]
    features = np.concatenate(
        [mine, np.stack([np.take_along_axis(counts, habit + s, 1) for s in (0, spec.habits)], 2)], 2
    )
    model = HistGradientBoostingClassifier(max_iter=50, random_state=0)
    half = len(labels) // 2
    model.fit(features[:half].reshape(-1, features.shape[2]), labels[:half].ravel())
    by_counts = model.decision_function(features[half:].reshape(-1, features.shape[2]))
    return labels, by_pairs.astype(np.float64), by_counts


def test_who_reads_the_order_reaches_the_bound_and_who_counts_is_at_chance() -> None:
    labels, by_pairs, by_counts = pair_scores(PAIRS, None)
    assert auc(labels.ravel(), by_pairs.ravel()) == pytest.approx(PAIRS.attainable_auc, abs=0.01)
    assert auc(labels[len(labels) // 2 :].ravel(), by_counts) == pytest.approx(0.5, abs=0.03)
    labels, by_pairs, _ = pair_scores(PAIRS, 1000)
    assert auc(labels.ravel(), by_pairs.ravel()) == pytest.approx(0.5, abs=0.02)


def test_every_kind_comes_once_in_as_many_sessions_of_every_user() -> None:
    batch, _ = PAIRS.draw(50, 1, seed=3)
    kind = batch.user.item_BL.numpy() % (3 * PAIRS.habits)
    blocks = np.sort(kind.reshape(50, -1, 2 * PAIRS.habits), axis=2)
    assert (blocks == np.arange(2 * PAIRS.habits)).all()
