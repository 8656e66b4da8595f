"""What items have to do with each other: as plain counting has it, known before the request, the same when stored."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from feature_repo.contract.arrow import iso_micros
from modeling.inputs.relations import (
    ALWAYS,
    LATELY,
    RELATION_FEATURES,
    Relations,
    Slice,
    read_relations,
    write_relations,
)
from modeling.training_set import item_relations
from modeling.training_set.dataset import Warehouse
from modeling.training_set.item_relations import fit_relations

(
    NEAR_ALL,
    NEAR_MOST,
    NEAR_TASTE,
    NEAR_TEXT,
    NEAR_LATELY,
    TASTE_LATELY,
    NEAR_FACTORS,
    FACTORS_LATELY,
) = range(len(RELATION_FEATURES))


@pytest.fixture(scope="module")
def warehouse(shop: Any) -> Warehouse:
    return Warehouse(shop.settings)


@pytest.fixture(scope="module")
def fitted(warehouse: Warehouse) -> Relations:
    return fit_relations(warehouse.contract, warehouse.log, warehouse.profiles())


@pytest.fixture(scope="module")
def all_neighbours(warehouse: Warehouse) -> Relations:
    """With every neighbour there is."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(item_relations, "NEIGHBOURS", 1000)
        patch.setattr(item_relations, "STRONGEST", 1000)
        return fit_relations(warehouse.contract, warehouse.log, warehouse.profiles())


def baskets(warehouse: Warehouse, cut: int) -> list[set[str]]:
    """The items that each user had bought by a time."""
    log = warehouse.log
    found = []
    for row in range(len(log.users)):
        history = log.known_at(np.array([row]), cut)
        bought = history.item_keys[history.columns["action"] == 0]
        found.append({log.items[int(key)].as_py() for key in bought})
    return [items for items in found if items]


def test_strengths_are_those_of_plain_counting(
    warehouse: Warehouse, all_neighbours: Relations
) -> None:
    fitted = all_neighbours
    ids = fitted.ids.to_pylist()
    for one in (fitted.slices[1], fitted.slices[-1]):
        users = baskets(warehouse, one.known_from)
        had = {item: sum(item in own for own in users) for item in ids}
        often = {item for item in ids if had[item] >= item_relations.LEAST_USERS}
        users = [own & often for own in users]
        everybody = sum(bool(own) for own in users)
        together: dict[frozenset[str], int] = {}
        for own in users:
            for pair in combinations(sorted(own), 2):
                together[frozenset(pair)] = together.get(frozenset(pair), 0) + 1
        for place in range(0, len(one.neighbours_IK) - 1, 5):
            others, strengths = one.neighbours_IK[place + 1], one.strengths_IK[place + 1]
            found = {
                ids[row - 1]: s for row, s in zip(others.tolist(), strengths, strict=True) if row
            }
            expected = {}
            for other in ids:
                number = together.get(frozenset((ids[place], other)), 0)
                if other != ids[place] and number >= item_relations.LEAST_TOGETHER:
                    chance = had[ids[place]] * had[other] / everybody
                    strength = np.log((number + 1) / (chance + 1))
                    if strength > 0:
                        expected[other] = strength
            assert set(found) == set(expected)
            for other, strength in expected.items():
                assert found[other] == pytest.approx(strength, rel=1e-5)
            # Those first that say most of most users
            weight = [s * together[frozenset((ids[place], other))] for other, s in found.items()]
            assert (np.diff(weight) <= 1e-5).all()


def test_only_the_first_neighbours_stay(fitted: Relations, all_neighbours: Relations) -> None:
    for one, whole in zip(fitted.slices, all_neighbours.slices, strict=True):
        kept = one.neighbours_IK.shape[1]
        assert kept == item_relations.NEIGHBOURS
        np.testing.assert_array_equal(one.neighbours_IK, whole.neighbours_IK[:, :kept])
        np.testing.assert_array_equal(one.strengths_IK, whole.strengths_IK[:, :kept])


def test_vectors_are_the_leading_directions(all_neighbours: Relations) -> None:
    one = all_neighbours.slices[-1]
    items = len(one.neighbours_IK)
    matrix = np.zeros((items, items))
    for row in range(items):
        matrix[row, one.neighbours_IK[row]] = one.strengths_IK[row]
    matrix[:, 0] = 0
    matrix = np.maximum(matrix, matrix.T)
    size, vectors = np.linalg.eigh(matrix)
    rows = (vectors * np.sqrt(np.maximum(size, 0)))[:, -item_relations.WIDTH :]
    some = np.abs(matrix).sum(axis=1) > 0
    rows = rows[some] / np.linalg.norm(rows[some], axis=1, keepdims=True)
    ours = one.vectors_ID[some]
    np.testing.assert_allclose(ours @ ours.T, rows @ rows.T, atol=1e-4)
    assert not one.vectors_ID[~some].any()


def test_factors_are_the_leading_singular_vectors(warehouse: Warehouse, fitted: Relations) -> None:
    one = fitted.slices[-1]
    ids = fitted.ids.to_pylist()
    users = baskets(warehouse, one.known_from)
    had = np.zeros((len(users), len(one.factors_IF)))
    for row, item in enumerate(ids[: len(one.factors_IF) - 1], start=1):
        had[:, row] = [item in own for own in users]
    had[:, had.sum(axis=0) < item_relations.LEAST_USERS] = 0
    _, values, right = np.linalg.svd(had, full_matrices=False)
    number = one.factors_IF.shape[1]
    assert number == min(item_relations.FACTORS, (values > 1e-6 * values[0]).sum())
    ours = one.factors_IF @ one.factors_IF.T
    np.testing.assert_allclose(ours, right[:number].T @ right[:number], atol=1e-4)


def test_no_slice_knows_what_comes_after_it(warehouse: Warehouse, fitted: Relations) -> None:
    until = iso_micros(warehouse.contract.spec.requests.validation_from)
    times = [one.known_from for one in fitted.slices]
    assert times == sorted(times)
    assert times[-1] == until
    row = fitted.rows_of(fitted.ids)
    before = fitted.features(times[0] - 1, row[:9], row[9:12])
    assert np.isnan(before[:, [NEAR_ALL, NEAR_MOST, NEAR_TASTE, NEAR_FACTORS]]).all()
    assert not np.isnan(before[:, NEAR_TEXT]).any()
    for at, one in zip(times, fitted.slices, strict=True):
        alone = Relations(fitted.ids, fitted.text_IE, [one])
        np.testing.assert_array_equal(
            fitted.features(at, row[:9], row[9:12]), alone.features(at, row[:9], row[9:12])
        )
    # A bundle reads the newest at any time.
    np.testing.assert_array_equal(
        fitted.newest().features(0, row[:9], row[9:12]),
        fitted.features(until, row[:9], row[9:12]),
    )


def small() -> Relations:
    """Three items: a and b go together; c is nobody's neighbour, and has b's words."""
    neighbours = np.array([[0, 0], [2, 0], [1, 0], [0, 0]], np.int32)
    strengths = np.array([[0, 0], [1.5, 0], [1.5, 0], [0, 0]], np.float32)
    vectors = np.array([[0, 0], [1, 0], [0, 1], [0, 0]], np.float32)
    text = np.array([[0, 0], [1, 0], [0.6, 0.8], [0.6, 0.8]], np.float32)
    factors = np.array([[0], [0.8], [0.6], [0]], np.float32)
    one = Slice(ALWAYS, neighbours, strengths, vectors, factors)
    return Relations(pa.array(["a", "b", "c"]), text, [one])


def test_features_of_a_candidate_beside_a_history() -> None:
    relations = small()
    a, b, c = relations.rows_of(pa.array(["a", "b", "c"]))
    found = relations.features(0, np.array([a, a, 0]), np.array([b, c, 0, a]))
    strong = np.log1p(1.5)
    assert found[0] == pytest.approx([strong, strong, 0.0, 0.6, strong, 0.0, 0.48, 0.48], rel=1e-6)
    assert found[1] == pytest.approx([0.0, 0.0, 0.0, 0.6, 0.0, 0.0, 0.0, 0.0], rel=1e-6)
    assert np.isnan(found[2]).all()
    # An item of the history is not compared with itself.
    assert found[3] == pytest.approx([0.0, 0.0, 1.0, -1.0, 0.0, 1.0, 0.64, 0.64], rel=1e-6)
    # Of two items in the history: what each adds, over √2
    [both] = relations.features(0, np.array([b, a]), np.array([b]))
    assert both[NEAR_FACTORS] == pytest.approx((0.6 * 0.6 + 0.6 * 0.8) / 2**0.5, rel=1e-6)


def test_what_was_done_lately_stands_apart() -> None:
    relations = small()
    a, b, c = relations.rows_of(pa.array(["a", "b", "c"]))
    strong = np.log1p(1.5)
    for later, lately in ((LATELY - 1, strong), (LATELY, 0.0)):
        history = np.r_[a, np.full(later, c)]
        [found] = relations.features(0, history, np.array([b]))
        assert found[NEAR_ALL] == pytest.approx(strong)
        assert found[NEAR_LATELY] == pytest.approx(lately)
    # Nothing is known of the newest events alone.
    [found] = relations.features(0, np.r_[a, np.zeros(LATELY, np.int64)], np.array([b]))
    assert np.isnan(found[[NEAR_LATELY, TASTE_LATELY, FACTORS_LATELY]]).all()
    assert found[NEAR_ALL] == pytest.approx(strong)


@pytest.mark.parametrize("history", [[], [0, 0]])
def test_of_a_user_of_whom_no_item_is_known_there_is_nothing(history: list[int]) -> None:
    found = small().features(0, np.array(history, np.int64), np.array([1, 2]))
    assert np.isnan(found).all()


def test_repeats_and_order_of_a_history_make_no_difference(fitted: Relations) -> None:
    rows = fitted.rows_of(fitted.ids)
    asked = rows[5:15]
    once = fitted.features(2**62, rows[:8], asked)
    again = fitted.features(2**62, np.r_[rows[7::-1], rows[:8]], asked)
    np.testing.assert_array_equal(once, again)


def test_what_is_stored_comes_back(tmp_path: Path, fitted: Relations) -> None:
    for relations in (fitted, fitted.newest(), small(), Relations.none(pa.int64())):
        write_relations(relations, tmp_path / "relations.arrow")
        found = read_relations(tmp_path / "relations.arrow")
        assert found.to_bytes() == relations.to_bytes()
        assert found.ids.equals(relations.ids)
        assert [one.known_from for one in found.slices] == [
            one.known_from for one in relations.slices
        ]
        np.testing.assert_array_equal(found.text_IE, relations.text_IE)
    (tmp_path / "relations.arrow").write_bytes(b"torn")
    with pytest.raises(ValueError, match="Arrow"):
        read_relations(tmp_path / "relations.arrow")


def test_the_same_log_gives_the_same_relations(warehouse: Warehouse, fitted: Relations) -> None:
    again = fit_relations(warehouse.contract, warehouse.log, warehouse.profiles())
    assert again.to_bytes() == fitted.to_bytes()


def test_blocks_and_batches_make_no_difference(
    warehouse: Warehouse, fitted: Relations, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(item_relations, "BLOCK", 7)
    monkeypatch.setattr(item_relations, "EVENTS", 300)
    again = fit_relations(warehouse.contract, warehouse.log, warehouse.profiles())
    for one, other in zip(fitted.slices[-1:], again.slices[-1:], strict=True):
        np.testing.assert_array_equal(one.neighbours_IK, other.neighbours_IK)
        np.testing.assert_array_equal(one.strengths_IK, other.strengths_IK)


def test_of_too_many_pairs_users_are_sampled(
    warehouse: Warehouse, monkeypatch: pytest.MonkeyPatch
) -> None:
    until = iso_micros(warehouse.contract.spec.requests.validation_from)
    whole, _ = item_relations.items_by_user(warehouse.log, until)
    number = np.bincount(whole).astype(float)
    most = int((number**2).sum()) // 3
    monkeypatch.setattr(item_relations, "MOST_PAIRS", most)
    users, _ = item_relations.items_by_user(warehouse.log, until)
    kept = np.bincount(users, minlength=len(number))
    # Whole users
    assert ((kept == 0) | (kept == number)).all()
    assert 0.1 * most < (kept.astype(float) ** 2).sum() <= most


def test_words_that_two_items_share_make_them_alike(
    warehouse: Warehouse, fitted: Relations
) -> None:
    """The shop's texts are "PRODUCT <code>": all share a word, and no two a second one."""
    size = np.linalg.norm(fitted.text_IE[1:], axis=1)
    assert ((np.abs(size - 1) < 1e-5) | (size == 0)).all()
    profiles = pa.table(
        {
            "item_id": warehouse.log.items.take(pa.array([0, 1, 2, 3])),
            "event_timestamp": pa.array([0] * 4, pa.timestamp("us", "UTC")),
            "created_timestamp": pa.array([0] * 4, pa.timestamp("us", "UTC")),
            "description": ["red tea cup", "blue tea cup", "garden gnome", "red garden gnome"],
            "description_tokens": pa.nulls(4, pa.list_(pa.string())),
        }
    )
    text = item_relations._text_vectors(warehouse.contract, profiles, warehouse.log.items, 2**62)
    later = profiles.set_column(
        2, "created_timestamp", pa.array([9] * 4, pa.timestamp("us", "UTC"))
    )
    assert not item_relations._text_vectors(
        warehouse.contract, later, warehouse.log.items, 9
    ).shape[1]
    # Codes that no two items share say nothing, and stop nothing.
    alone = profiles.set_column(3, "description", pa.array(["x1", "x2", "x3", None]))
    assert not item_relations._text_vectors(
        warehouse.contract, alone, warehouse.log.items, 9
    ).shape[1]
    alike = text[:4] @ text[:4].T
    assert alike[0, 1] > 0.5 > alike[1, 2]
    assert alike[2, 3] > alike[0, 3] > alike[1, 2]
    assert not text[4:].any()
