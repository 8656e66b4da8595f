"""Codes of items and attention that finds them: equal items are equal from the first step on."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modeling.inputs.batch import FeatureSizes
from modeling.inputs.columns import GroupSizes
from modeling.layers.attention import HistoryAttentionLayer
from modeling.layers.codes import ItemRows
from modeling.layers.embedding import QUANTILES, GaussianRank
from modeling.layers.matching import Matching

SIZES = FeatureSizes(
    items=200,
    actions=1,
    history_length=8,
    candidate=GroupSizes((30, 9), (1, 3)),
    item=GroupSizes((30, 9), (1, 3)),
)
WIDTH = 32


def rows() -> ItemRows:
    torch.manual_seed(0)
    made = ItemRows(SIZES, WIDTH)
    made.codes.item_IK.copy_(torch.randint(0, 9, made.codes.item_IK.shape))
    return made


def test_items_of_events_and_of_candidates_have_the_same_rows() -> None:
    made = rows()
    items = torch.randint(1, 200, (3, 7))
    slots = made.codes.item_IK[items]
    torch.testing.assert_close(made(items), made(items, slots))


def test_a_part_of_a_row_is_as_long_as_every_other() -> None:
    made = rows()
    parts = made.codes.parts(torch.arange(1, 200))
    there = made.codes.item_IK[1:, :1] > 0
    torch.testing.assert_close(parts[:, 0].norm(dim=-1), torch.ones(199))
    torch.testing.assert_close(parts[:, 1].norm(dim=-1)[there[:, 0]], torch.ones(int(there.sum())))


def test_an_item_that_nobody_knows_has_the_row_of_its_categories() -> None:
    made = rows()
    alike = torch.tensor([[0], [0]])
    one, other = made(alike, torch.tensor([[[3, 1, 0, 0]], [[4, 1, 0, 0]]]))
    assert not torch.allclose(one, other)


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_a_fresh_layer_finds_the_candidates_own_events(heads: int) -> None:
    """A candidate that is among the events reads them and hardly anything else; one that is not reads nothing."""
    torch.manual_seed(1)
    layer = HistoryAttentionLayer(WIDTH, heads, 0.0)
    made = ItemRows(replace(SIZES, item=GroupSizes()), WIDTH)
    events = made(torch.arange(1, 101)[None])
    candidates = made(torch.tensor([[7, 150]]))
    keys, _ = layer.keys_values(events)
    query = layer.matching.queries(layer._heads(layer.query(layer.norm(candidates))))
    weights = (query @ keys.transpose(-1, -2)).exp()
    share = weights / (
        weights.sum(-1, keepdim=True) + layer.matching.nothing_H.exp().view(1, -1, 1, 1)
    )
    found, absent = share[0].mean(0)
    assert found.argmax() == 6
    assert found[6] > 2 * absent.max()


@settings(max_examples=30, deadline=None)
@given(
    length=st.integers(1, 9),
    number=st.integers(1, 4),
    own=st.integers(0, 3),
    plain=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_reading_equals_one_softmax_over_events_own_rows_and_nothing(
    length: int, number: int, own: int, plain: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    matching = Matching(2, 4, plain=plain)
    for parameter in matching.parameters():
        torch.nn.init.normal_(parameter)
    group = max(own, 1)
    query = matching.queries(torch.randn(3, 2, number, group, 4))
    keys = matching.keys(torch.randn(3, 2, length, 4))
    values = torch.randn(3, 2, length, 4)
    own_keys = matching.keys(torch.randn(3, 2, number, group, 4)) if own else None
    own_values = torch.randn(3, 2, number, group, 4) if own else None
    mask = torch.rand(3, length) < 0.7
    mask[:, 0] = True
    found = matching.read(query, keys, values, mask, own_keys, own_values)
    for user, head, candidate, row in np.ndindex(3, 2, number, group):
        chosen = mask[user]
        all_keys = [keys[user, head][chosen]]
        all_values = [values[user, head][chosen]]
        if own_keys is not None and own_values is not None:
            all_keys.append(own_keys[user, head, candidate, : row + 1])
            all_values.append(own_values[user, head, candidate, : row + 1])
        scores = torch.cat(all_keys) @ query[user, head, candidate, row]
        read = torch.cat(all_values)
        if not plain:
            scores = torch.cat([scores, matching.nothing_H[head : head + 1]])
            read = torch.cat([read, matching.nothing_HK[head : head + 1]])
        expected = scores.softmax(0) @ read
        torch.testing.assert_close(
            found[user, head, candidate, row], expected, atol=1e-5, rtol=1e-4
        )


def test_ranks_are_normal_whatever_the_scale() -> None:
    rng = np.random.default_rng(0)
    values = torch.from_numpy(np.exp(3 * rng.normal(size=(20_000, 1)))).float()
    ranks = GaussianRank(1)
    ranks.fit(values)
    found = ranks(values)[:, 0]
    assert abs(float(found.mean())) < 0.01
    assert abs(float(found.std()) - 1) < 0.02
    order = values[:, 0].argsort()
    assert bool((found[order].diff() >= 0).all())


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=300), st.integers(0, 100))
def test_ranks_keep_the_order_and_lie_between_the_ends(numbers: list[float], seed: int) -> None:
    known = torch.tensor(numbers)[:, None]
    ranks = GaussianRank(1)
    ranks.fit(torch.cat([known, torch.full((3, 1), torch.nan)]))
    asked = torch.tensor(sorted([*numbers, -1e9, 0.0, 1e9]))[:, None]
    found = ranks(asked)[:, 0]
    assert bool(found.isfinite().all())
    assert bool((found.diff() >= -1e-6).all())
    assert found.abs().max() <= 3.3


def test_a_number_that_is_missing_or_was_never_known_is_in_the_middle() -> None:
    ranks = GaussianRank(3)
    ranks.fit(torch.tensor([[7.0, torch.nan, 1.0], [7.0, torch.nan, 2.0]]))
    assert ranks(torch.full((1, 3), torch.nan)).tolist() == [[0.0, 0.0, 0.0]]
    # One value alone tells nothing; what was never seen stands for itself.
    assert ranks(torch.tensor([[7.0, 1.5, 0.0]]))[0, 0] == 0
    assert ranks(torch.tensor([[7.0, 1.5, 0.0]]))[0, 1] == pytest.approx(1.5, abs=1e-5)
    assert QUANTILES % 2 == 1


def test_ranks_of_no_number_are_no_numbers() -> None:
    assert GaussianRank(0)(torch.zeros(3, 5, 0)).shape == (3, 5, 0)
