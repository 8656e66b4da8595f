"""Item graphs that nothing trained: as their formulas have it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa

from modeling import recipes
from modeling.evaluation.item_graphs import EASE, TWO_STEPS, Ease, graph_baselines, two_steps
from modeling.inputs.relations import ALWAYS, Relations, Slice
from modeling.training_set.encodings import Encodings
from modeling.training_set.simple_baselines import FREQUENCY, GRAPH, PERSONAL, baselines_of


def test_ease_is_the_least_squares_of_its_paper() -> None:
    """Each item regressed on the others with a ridge: the closed form has the same weights."""
    rng = np.random.default_rng(0)
    had = rng.random((60, 8)) < 0.3
    user, item = np.nonzero(had)
    ease = Ease.fit(user, item, 8, l2=3.0)
    assert (ease.place >= 0).all()
    for target in range(8):
        others = [n for n in range(8) if n != target]
        given = had[:, others].astype(float)
        ridge = np.linalg.solve(
            given.T @ given + 3.0 * np.eye(7), given.T @ had[:, target].astype(float)
        )
        weights = ease.weights[ease.place[others], ease.place[target]]
        np.testing.assert_allclose(weights, ridge, rtol=1e-4, atol=1e-6)
    [scores] = ease.scores([np.array([1, 4])], [np.arange(8)])
    rows = ease.place[[1, 4]]
    np.testing.assert_allclose(scores, ease.weights[rows].sum(axis=0)[ease.place], rtol=1e-5)


def test_ease_knows_the_items_of_most_users_and_scores_the_others_nothing() -> None:
    ease = Ease.fit(np.array([0, 1, 2, 0, 1, 0]), np.array([1, 1, 1, 2, 2, 3]), 5, most=2)
    assert (ease.place >= 0).tolist() == [False, True, True, False, False]
    [scores] = ease.scores([np.array([1, 3])], [np.array([2, 3, 4])])
    assert scores[0] > 0
    assert scores[1:].tolist() == [0, 0]


def test_two_steps_are_a_walk_along_the_neighbours() -> None:
    rng = np.random.default_rng(1)
    items = 9
    neighbours = np.zeros((items, 3), np.int32)
    strengths = np.zeros((items, 3), np.float32)
    for row in range(1, items):
        neighbours[row] = rng.choice([n for n in range(1, items) if n != row], 3, replace=False)
        strengths[row] = rng.random(3) + 0.1
    one = Slice(ALWAYS, neighbours, strengths, *np.zeros((2, items, 2), np.float32))
    relations = Relations(
        pa.array([str(n) for n in range(1, items)]), np.zeros((items, 0), np.float32), [one]
    )
    step = np.zeros((items, items))
    for row in range(1, items):
        step[row, neighbours[row]] = strengths[row] / strengths[row].sum()
    history = [np.array([1, 5]), np.zeros(0, np.int64)]
    found = two_steps(relations, history, [np.arange(items)] * 2)
    begun = step[[1, 5]].sum(axis=0)
    np.testing.assert_allclose(found[0], begun + begun @ step, rtol=1e-5)
    assert not found[1].any()


def test_they_stand_beside_the_shops_own_frequencies(shop: Any) -> None:
    recipe = recipes.load("amortised_dlrm_tiny")
    encodings = Encodings(shop.settings, recipe.service)
    test = encodings.period(recipe, "test")
    found = encodings.set_of(recipe)
    scores = graph_baselines(found.warehouse, found.relations, test)
    assert set(scores) == {TWO_STEPS, EASE}
    for values in scores.values():
        assert len(values) == len(test.encoded.candidate_item)
        assert values.max() > 0
    labels = np.asarray(test.encoded.labels)[:, 0]
    shown = baselines_of(test.baselines, labels, test.encoded.candidate_offsets)
    assert {FREQUENCY, PERSONAL, GRAPH} <= set(shown)
    # Popularity decides between equal frequencies alone.
    assert np.array_equal(np.floor(shown[PERSONAL]), shown[FREQUENCY])
