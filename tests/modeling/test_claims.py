"""Claims: what differs is seen, what does not is left undecided at the rate that was promised."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from modeling.claims import Difference, decided, difference, of_seeds, read_sums, write_sums
from modeling.metrics import PerUser, evaluate, per_user


def runs_of(mean: float, seeds: int, rng: np.random.Generator, users: np.ndarray) -> PerUser:
    """Metrics of users who differ, of seeds that differ a little."""
    noise = rng.normal(0, 0.05, (seeds, len(users))) + rng.normal(0, 0.01, (seeds, 1))
    return PerUser(users + mean + noise, np.ones((seeds, len(users))))


def test_a_users_sums_come_to_the_metric_and_are_kept(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    offsets = np.r_[0, np.cumsum(rng.integers(2, 9, 40))]
    labels = (rng.random(offsets[-1]) < 0.3).astype(np.float64)
    scores, users = rng.normal(size=offsets[-1]), np.sort(rng.integers(0, 7, 40))
    users = np.unique(users, return_inverse=True)[1]
    found = per_user(labels, scores, offsets, users)
    whole = evaluate(labels, scores, offsets, users, None, resamples=2)
    for metric, one in found.items():
        assert one.value == pytest.approx(whole[metric].value)
    assert of_seeds([found, found])["gauc"].value == pytest.approx(found["gauc"].value)
    write_sums(tmp_path / "sums.arrow", found)
    for metric, one in read_sums(tmp_path / "sums.arrow").items():
        assert np.array_equal(one.total, found[metric].total)
        assert np.array_equal(one.weight, found[metric].weight)


def test_a_real_difference_is_found_and_has_its_sign() -> None:
    rng = np.random.default_rng(1)
    users = rng.normal(0.5, 0.2, 400)
    better, worse = runs_of(0.05, 5, rng, users), runs_of(0.0, 5, rng, users)
    found = difference("better", "gauc", better, worse)
    assert found.verdict == "above"
    assert found.low < found.value < found.high
    assert difference("worse", "gauc", worse, better).verdict == "below"


def test_without_a_difference_one_claim_in_twenty_is_made_at_most() -> None:
    """Two-sided at 5 %, over users and seeds; of 100 pairs at most 12 (three deviations)."""
    rng, made = np.random.default_rng(2), 0
    for number in range(100):
        users = rng.normal(0.5, 0.2, 120)
        one, other = (runs_of(0.0, 5, rng, users) for _ in range(2))
        made += difference("none", "gauc", one, other, seed=number).verdict != "undecided"
    assert made <= 12


def test_holm_asks_more_of_many_claims() -> None:
    def claim(p: float) -> Difference:
        return Difference("x", "gauc", 0.1, 0.0, 0.2, p, "above")

    assert [c.verdict for c in decided([claim(0.03)])] == ["above"]
    assert [c.verdict for c in decided([claim(0.03), claim(0.04)])] == ["undecided"] * 2
    found = decided([claim(0.5), claim(0.001), claim(0.02)])
    assert [c.verdict for c in found] == ["undecided", "above", "above"]


def test_rankers_of_other_requests_cannot_be_paired() -> None:
    one = PerUser(np.ones((1, 3)), np.ones((1, 3)))
    for other in (
        PerUser(np.ones((1, 4)), np.ones((1, 4))),
        PerUser(np.ones((1, 3)), np.full((1, 3), 2)),
    ):
        with pytest.raises(ValueError, match="cannot be paired"):
            difference("x", "gauc", one, other)


def test_a_long_table_of_clear_differences_is_decided() -> None:
    """Holm's correction over eighty claims leaves what is clear beyond doubt."""
    ours, theirs = (PerUser(np.full((5, 40), value), np.ones((5, 40))) for value in (0.9, 0.1))
    noise = np.random.default_rng(0).normal(0, 0.05, (5, 40))
    ours = PerUser(ours.total + noise, ours.weight)
    claims = decided([difference(str(n), "gauc", ours, theirs, n) for n in range(80)])
    assert {claim.verdict for claim in claims} == {"above"}


def test_what_is_undefined_is_undecided() -> None:
    """A metric that no user has; and one that a single user has, whom some draws leave out."""
    nobody = PerUser(np.zeros((1, 5)), np.zeros((1, 5)))
    (claim,) = decided([difference("nobody", "gauc", nobody, nobody)])
    assert np.isnan(claim.value)
    assert claim.verdict == "undecided"
    weight = np.array([[1.0, 0, 0, 0, 0]])
    one = difference("one", "gauc", PerUser(weight, weight), PerUser(0 * weight, weight))
    assert (one.value, one.low, one.high) == (1, 1, 1)
