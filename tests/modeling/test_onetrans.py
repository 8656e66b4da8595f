"""Facts of OneTrans (arXiv 2510.26104) that the implementation must show, beyond the shared
invariants.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from modeling import models
from modeling.benchmarks.worlds import flops
from modeling.inputs.batch import Batch, FeatureSizes, GroupSizes, UserInputs
from modeling.layers.features import BucketTokens
from modeling.layers.per_token import PerTokenLinear
from modeling.models.onetrans import ROUND_TO, MixedLayer, OneTrans, UserState, tail_lengths
from tests.modeling.test_invariants import SIZES, candidates, user_inputs

TOLERANCE = 1e-5
LONG = replace(SIZES, history_length=160)
few = settings(max_examples=12, deadline=None)
lengths = st.lists(st.integers(0, 160), min_size=1, max_size=3)


def build(sizes: FeatureSizes = LONG, **config: Any) -> OneTrans:
    torch.manual_seed(3)
    made = models.build(
        "onetrans", {"width": 16, "num_layers": 4, "num_heads": 2, **config}, sizes
    ).eval()
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    assert isinstance(made, OneTrans)
    return made


def batch_of(sizes: list[int], number: int, seed: int, width: int | None = None) -> Batch:
    return Batch(
        user_inputs(sizes, seed, width), candidates(len(sizes), number, seed), torch.zeros(1)
    )


def assert_close(first: Tensor, second: Tensor) -> None:
    scale = max(1.0, float(second.abs().max()))
    torch.testing.assert_close(first / scale, second / scale, atol=TOLERANCE, rtol=TOLERANCE)


VARIANTS: dict[str, dict[str, Any]] = {
    "pyramid": {},
    "plain stack": {"pyramid": False},
    "group-wise": {"tokeniser": "group_wise"},
    "one split": {"request_tokens": 0},
    "timestamp-agnostic": {"merge": "timestamp_agnostic"},
    "no separators": {"merge": "timestamp_agnostic", "separators": False},
    "shared weights": {"own_weights": False},
    "own output": {"own_output": True},
    "pooled sequences": {"pooled_sequences": True},
    "buckets": {"numbers": "buckets"},
}


@pytest.mark.parametrize("tokeniser", ["auto_split", "group_wise"])
def test_a_fresh_model_finds_the_candidates_own_event(tokeniser: str) -> None:
    """What stands beside an item, in an event and in a candidate, does not hide that both are of one item."""
    torch.manual_seed(1)
    sizes = replace(LONG, items=200, item=GroupSizes())
    config = {"width": 32, "num_layers": 1, "num_heads": 2, "tokeniser": tokeniser}
    model = models.build("onetrans", config, sizes).eval()
    user = replace(user_inputs([100], 0), item_BL=torch.arange(1, 101)[None])
    asked = replace(candidates(1, 2, 0), item_BC=torch.tensor([[7, 150]]))
    with torch.no_grad():
        state = model.encode_user(user)
        layer = model.layers[0]
        query, *_ = layer.project(model._candidate_tokens(asked, None), model.num_request)
        # H × candidates × events, of the first NS token
        scores = (query[0, :, :, 0] @ state.keys[0][0, :, :100].transpose(-1, -2)).exp()
    found, absent = (scores / layer.matching.nothing_H.exp().view(-1, 1, 1)).mean(0)
    assert found.argmax() == 6
    assert found[6] > 0.4
    assert found.sum() < 1.5 * found[6]
    assert absent.sum() < 0.5 * found[6]


@pytest.mark.parametrize("name", VARIANTS)
@few
@given(sizes=lengths, number=st.integers(1, 5), seed=st.integers(0, 1000))
def test_two_stages_equal_one_full_forward(
    name: str, sizes: list[int], number: int, seed: int
) -> None:
    """Cached S and request tokens, pyramid on: the same scores as [S; NS] for each candidate alone,
    all rows, masks.
    """
    model, batch = build(**VARIANTS[name]), batch_of(sizes, number, seed)
    with torch.inference_mode():
        assert_close(model(batch), model.forward_plain(batch))


@few
@given(sizes=lengths, data=st.data(), seed=st.integers(0, 1000))
def test_extension_equals_recomputation_while_no_tail_moves(
    sizes: list[int], data: Any, seed: int
) -> None:
    """And behind that, recomputation with tails that stay where they were."""
    model, new = build(), data.draw(st.integers(1, 20))
    cuts = [data.draw(st.integers(0, size)) for size in sizes]
    batch = batch_of(sizes, 3, seed, 160)
    early, late = split(batch.user, cuts, new)
    with torch.inference_mode():
        state = model.encode_user(early)
        extended = model.extend_user(state, late)
        added = torch.minimum(torch.tensor(sizes) - torch.tensor(cuts), torch.tensor(new))
        whole = keep(batch.user, torch.tensor(cuts) + added)
        scores = model.score(extended, batch.candidates)
        again = replace(batch, user=whole)
        assert_close(scores, model.forward_plain(again, model.starts(torch.tensor(cuts))))
        fresh = ~model.must_refresh(extended)
        if fresh.any():
            assert_close(scores[fresh], model(again)[fresh])
    assert extended.length_B.tolist() == (torch.tensor(cuts) + added).tolist()
    assert extended.added_B.tolist() == added.tolist()


def test_guard_sliding_tails_would_not_match_from_the_second_layer_on() -> None:
    """Were tails to slide, old rows would have read keys that a new encoding drops."""
    model, batch = build(), batch_of([160], 3, 1)
    with torch.inference_mode():
        state = model.extend_user(
            model.encode_user(batch.user.events(0, 140)), batch.user.events(140)
        )
        assert model.must_refresh(state).tolist() == [True]
        fresh = model.encode_user(batch.user)
        sliding = [state.keys[layer][:, :, -fresh.keys[layer].shape[2] :] for layer in range(4)]
    assert_close(sliding[0], fresh.keys[0])
    for layer in (2, 3):
        assert (
            float((sliding[layer] - fresh.keys[layer])[:, :, : -model.num_request].abs().max())
            > 1e-2
        )
    with torch.inference_mode():
        assert float((model.score(state, batch.candidates) - model(batch)).abs().max()) > 1e-4


def test_a_tail_whose_start_moves_asks_for_a_refresh() -> None:
    model = build()
    assert model.tails == (160, 128, 96, 32)
    # Tails of the first begin at 0, 0, 0 and 64; of the second at 0.
    user = user_inputs([100, 20], 1, 160)
    assert model.starts(torch.tensor([100, 20])).tolist() == [[0, 0, 0, 64], [0, 0, 0, 0]]
    with torch.inference_mode():
        state = model.encode_user(user)
        assert model.must_refresh(state).tolist() == [False, False]
        for events, expected in ((27, [False, False]), (1, [True, False])):
            state = model.extend_user(state, user_inputs([events, events], 2))
            assert model.must_refresh(state).tolist() == expected
    plain = build(pyramid=False)
    with torch.inference_mode():
        state = plain.extend_user(
            plain.encode_user(user), user_inputs([60, 60], 2)
        )  # 160 and 80 of 160
        assert plain.must_refresh(state).tolist() == [False, False]
        assert plain.must_refresh(plain.extend_user(state, user_inputs([40, 40], 3))).tolist() == [
            True,
            False,
        ]


@pytest.mark.parametrize("block", [32, 64])
def test_a_tail_holds_its_rows_and_up_to_a_block_more(block: int) -> None:
    model = build(tail_block=block)
    for length in (96, 97, 127, 128, 160):
        with torch.inference_mode():
            state = model.encode_user(user_inputs([length], 1))
        rows = [keys.shape[2] - model.num_request for keys in state.keys]
        expected = [min(length, tail + (length - tail) % block) for tail in model.tails]
        assert rows == expected


def test_history_states_do_not_depend_on_candidates_and_request_tokens_neither() -> None:
    model, batch = build(), batch_of([100, 30], 5, 1)
    with torch.inference_mode():
        state = model.encode_user(batch.user)
        kept = [tensor.clone() for tensor in (*state.keys, *state.values, state.request_BRD)]
        model.score(state, batch.candidates)
        again = model.encode_user(batch.user)
    for one, two, three in zip(kept, tensors(state), tensors(again), strict=True):
        assert torch.equal(one, two)
        assert torch.equal(one, three)


def test_causality_of_every_token() -> None:
    """No NS token feels a later one, no S row a later S row or any NS token; each feels the earlier
    ones.
    """
    model = build(pyramid=False)
    batch = batch_of([12], 1, 1)
    rows, mask = model._sequence(batch.user)
    nodes = torch.randn(1, 1, model.num_ns, 16)
    rows, nodes = (tensor.detach().requires_grad_() for tensor in (rows, nodes))
    cache, current = [], rows
    for layer in model.layers:
        query, keys, values = layer.project(current)  # type: ignore[operator]
        cache.append((keys, values, mask))
        visible = torch.ones(12, 12, dtype=torch.bool).tril()
        read = torch.nn.functional.scaled_dot_product_attention(
            query, keys, values, attn_mask=visible
        )
        current = layer.finish(current, read)  # type: ignore[operator]
    keys, values, masks = (tuple(kind) for kind in zip(*cache, strict=True))
    state = replace(model.encode_user(batch.user), keys=keys, values=values, masks=masks)
    final = model._through(nodes, state, 0)[0, 0]
    for token in range(model.num_ns):
        by_node, by_row = torch.autograd.grad(final[token].sum(), (nodes, rows), retain_graph=True)
        felt = by_node[0, 0].abs().amax(-1)
        assert bool((felt[: token + 1] > 0).all())
        assert bool((felt[token + 1 :] == 0).all())
        assert bool((by_row[0].abs().amax(-1) > 0).all())
    for row in (0, 5, 11):
        gradients = torch.autograd.grad(
            current[0, row].sum(), (rows, nodes), retain_graph=True, allow_unused=True
        )
        felt = gradients[0][0].abs().amax(-1)
        assert bool((felt[: row + 1] > 0).all())
        assert bool((felt[row + 1 :] == 0).all())
        assert gradients[1] is None


def test_a_pyramid_of_full_tails_is_the_plain_stack() -> None:
    short = replace(LONG, history_length=20)  # every tail rounds to at least the history
    batch = batch_of([20, 7], 4, 1)
    with torch.inference_mode():
        pyramid, plain = build(short), build(short, pyramid=False)
        assert pyramid.tails != plain.tails
        pyramid.__class__ = type("Flat", (OneTrans,), {"tails": property(lambda self: (20,) * 4)})
        assert_close(pyramid(batch), plain(batch))


def test_schedules_of_the_paper() -> None:
    """1,190 → 12 over 6 layers and 1,500 → 16 over 8, in multiples of 32."""
    small, large = tail_lengths(1190, 12, 6), tail_lengths(1500, 16, 8)
    assert small == (1190, 992, 800, 608, 416, 224)
    assert len(large) == 8
    assert large[0] == 1500
    for tails in (small, large):
        assert all(tail % ROUND_TO == 0 for tail in tails[1:])
        assert list(tails) == sorted(tails, reverse=True)
    assert tail_lengths(10, 4, 3) == (10, 4, 4)
    assert tail_lengths(7, 4, 3, pyramid=False) == (7, 7, 7)


def test_the_pyramid_of_the_published_schedule_costs_a_third() -> None:
    """Against every row through every layer, which is the paper's ablation: 8.08 against 2.64
    TFLOPs a batch, 3.06.
    """
    sizes = replace(LONG, history_length=1190)
    batch = batch_of([1190], 1, 1)
    model = build(sizes, width=64, num_layers=6, num_heads=4, request_tokens=6, candidate_tokens=6)
    with torch.inference_mode():
        whole, pyramid = flops(lambda: model.forward_plain(batch)), flops(lambda: model(batch))
    assert 2.6 < whole / pyramid < 3.5


def test_tied_weights_equal_a_vanilla_causal_transformer() -> None:
    """Each NS token's weights set to those of S: the same as sharing them, and as torch's own
    causal layers.
    """
    tied, shared = (build(own_weights=own, pyramid=False, matching=False) for own in (True, False))
    state = shared.state_dict()
    for name, parameter in tied.named_parameters():
        if ".own" in name and name.startswith("layers"):
            source = (
                name.replace(".own.weight", ".shared.weight")
                if name.endswith("weight")
                else name.replace(".own", ".shared")
            )
            value = state[source]
            parameter.data.copy_(value.T if value.ndim == 2 else value)
        else:
            parameter.data.copy_(state[name])
    batch = batch_of([30, 9], 3, 1)
    with torch.inference_mode():
        assert_close(tied(batch), shared(batch))

        layer, rows = shared.layers[0], torch.randn(2, 9, 16)
        assert isinstance(layer, MixedLayer)
        query, keys, values = layer.project(rows)
        ours = layer.finish(
            rows,
            torch.nn.functional.scaled_dot_product_attention(
                query, keys, values, is_causal=True, scale=1.0
            ),
        )
        reference = torch.nn.MultiheadAttention(16, 2, bias=False, batch_first=True)
        reference.in_proj_weight.copy_(
            torch.cat([layer.query.shared.weight, layer.key_value.shared.weight])
        )
        reference.out_proj.weight.copy_(layer.out.shared.weight)
        normed = torch.nn.functional.rms_norm(rows, (16,), layer.norm.shared, 1e-6)
        later = torch.ones(9, 9, dtype=torch.bool).triu(1)
        middle = rows + reference(normed, normed, normed, attn_mask=later, need_weights=False)[0]
        hidden = (
            torch.nn.functional.rms_norm(middle, (16,), layer.norm_out.shared, 1e-6)
            @ layer.up.shared.weight.T
        )
        assert_close(ours, middle + torch.nn.functional.gelu(hidden) @ layer.down.shared.weight.T)


@pytest.mark.parametrize("own_output", [False, True])
def test_token_specific_parameters_are_as_the_formula_says(own_output: bool) -> None:
    """n_layers · L_NS · (3 + 2r) d², and d² more where W_O is a token's own; beside them two gains
    of d.
    """
    layers, width, ratio = 4, 16, 4
    own, shared = (build(own_weights=own, own_output=own_output and own) for own in (True, False))

    def count(model: OneTrans) -> int:
        return sum(p.numel() for name, p in model.named_parameters() if name.startswith("layers"))

    squares = 3 + 2 * ratio + own_output
    assert count(own) - count(shared) == layers * own.num_ns * (squares * width**2 + 2 * width)


def test_the_last_layer_needs_queries_of_ns_tokens_only() -> None:
    """No S row goes through the last layer's output and feed-forward: nothing there has a gradient
    but through NS.
    """
    model = build(pyramid=False)
    seen: list[int] = []
    last = model.layers[-1]
    assert isinstance(last, MixedLayer)
    last.up.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].shape[-2]))
    batch = batch_of([30], 3, 1)
    with torch.inference_mode():
        assert_close(model(batch), model.forward_plain(batch))  # the plain twin runs all of them
    assert set(seen[:2]) == {model.num_request, model.num_candidate}


def test_tokenisers_give_tokens_of_one_width() -> None:
    batch = batch_of([5], 3, 1)
    split_model, group_model = build(split_layers=1), build(tokeniser="group_wise")
    request = split_model.features.request(batch.user)
    candidate = split_model.features.candidates(batch.candidates)
    with FlopCounterMode(display=False) as counter:
        assert split_model.request_nodes(request).shape == (1, 4, 16)  # type: ignore[misc]
    assert list(counter.get_flop_counts()["Global"].values()) == [
        2 * request[0].numel() * 4 * 16
    ]  # one product
    assert split_model.candidate_nodes(candidate).shape == (1, 3, 4, 16)
    request = group_model.features.request(batch.user)
    candidate = group_model.features.candidates(batch.candidates)
    # Categories, numbers, vectors; item, categories, numbers, vectors.
    assert group_model.request_nodes(request).shape == (1, 3, 16)  # type: ignore[misc]
    assert group_model.candidate_nodes(candidate).shape == (1, 3, 4, 16)
    pooled = build(pooled_sequences=True)
    assert pooled.features.num_request == split_model.features.num_request + SIZES.actions
    with FlopCounterMode(display=False) as counter:
        assert build().request_nodes(request).shape == (1, 4, 16)  # type: ignore[misc]
    assert len(counter.get_flop_counts()["Global"]) == 1
    assert sum(counter.get_flop_counts()["Global"].values()) == 2 * (
        request[0].numel() * 4 * 16 + (4 * 16) ** 2
    )  # two products


@pytest.mark.parametrize("tokeniser", ["auto_split", "group_wise"])
def test_a_request_without_features_has_no_tokens(tokeniser: str) -> None:
    """Items and nothing else."""
    bare = FeatureSizes(SIZES.items, SIZES.actions, 160)
    model, whole = build(bare, tokeniser=tokeniser), batch_of([9, 3], 3, 1)
    user = replace(
        whole.user,
        field_BU=torch.zeros(2, 0, dtype=torch.long),
        dense_BG=torch.zeros(2, 0),
        event_BLE=torch.zeros(*whole.user.item_BL.shape, 0),
        event_category_BLJ=None,
    )
    some = replace(
        whole.candidates,
        category_BCK=torch.zeros(2, 3, 0, dtype=torch.long),
        dense_BCF=torch.zeros(2, 3, 0),
    )
    batch = Batch(user, some, torch.zeros(2, 3, 1))
    assert model.num_request == 0
    with torch.inference_mode():
        assert_close(model(batch), model.forward_plain(batch))


def test_merges_order_events_as_they_say() -> None:
    """Aware: by time. Agnostic: all of the first action, a separator, all of the second, each by
    time.
    """
    user = user_inputs([6], 1)
    action = torch.tensor([[1, 0, 1, 1, 0, 0]])
    user = replace(user, action_BL=action)
    aware, agnostic = build(), build(merge="timestamp_agnostic")
    bare = build(merge="timestamp_agnostic", separators=False)
    with torch.inference_mode():
        events = agnostic._embed(user, torch.zeros(1, dtype=torch.long))[0]
        order = [1, 4, 5, 0, 2, 3]
        assert torch.equal(
            aware._sequence(user)[0], aware._embed(user, torch.zeros(1, dtype=torch.long))
        )
        assert torch.equal(
            bare._sequence(user)[0][0],
            bare._embed(user, torch.zeros(1, dtype=torch.long))[0][order],
        )
        merged = agnostic._sequence(user)[0][0]
        assert agnostic.separator is not None
        assert torch.equal(
            merged, torch.cat([events[order[:3]], agnostic.separator.weight, events[order[3:]]])
        )


def test_a_sequence_projection_is_its_own() -> None:
    """Zeroing the network of one action's sequence changes nothing for the other's events."""
    model = build()
    user = user_inputs([8], 1)
    with torch.inference_mode():
        before = model._embed(user, torch.zeros(1, dtype=torch.long))
        model.event_up.weight[1] = 0
        changed = (model._embed(user, torch.zeros(1, dtype=torch.long)) - before).abs().amax(-1) > 0
    assert torch.equal(changed, user.action_BL == 1)


@pytest.mark.parametrize("bias", [False, True])
def test_each_row_goes_through_its_own_map_alone(bias: bool) -> None:
    """Gathering first is the same as running every map and keeping one."""
    torch.manual_seed(0)
    maps = PerTokenLinear(5, 3, 4, bias=bias)
    rows, which = torch.randn(2, 7, 3, requires_grad=True), torch.randint(0, 4, (2, 7))
    every = maps(rows[:, :, None].expand(-1, -1, 5, -1))
    expected = every.gather(2, which[..., None, None].expand(-1, -1, 1, 4))[:, :, 0]
    found = maps.chosen(rows, which)
    torch.testing.assert_close(found, expected)
    (one,) = torch.autograd.grad(found.square().sum(), rows)
    (other,) = torch.autograd.grad(expected.square().sum(), rows)
    torch.testing.assert_close(one, other)
    assert maps.chosen(rows[:, :0], which[:, :0]).shape == (2, 0, 4)


def test_numbers_in_buckets_of_the_training_period() -> None:
    """Equally many known values in each bucket; what is missing has one of its own; five numbers'
    rows are one token's sum.
    """
    torch.manual_seed(0)
    tokens = BucketTokens(7, 4)
    values = torch.rand(6400, 7).exp()
    values[:, 2] = torch.nan
    tokens.fit(values)
    with torch.no_grad():
        tokens.rows.weight[:] = torch.arange(len(tokens.rows.weight))[:, None]
    one = torch.full((1, 7), torch.nan)
    missing = tokens(one)[0, :, 0]
    assert missing.tolist() == [0 + 33 + 66 + 99 + 132, 165 + 198]
    one[0, 6] = values[:, 6].median()
    assert tokens(one)[0, 1, 0] - missing[1] in (16, 17)
    bucket = tokens(torch.cat([torch.full((6400, 6), torch.nan), values[:, 6:]], 1))[:, 1, 0]
    assert torch.bincount((bucket - missing[1]).long())[1:].tolist() == [200] * 32


def test_nothing_new_changes_nothing() -> None:
    """An extension by no events, a history of no width, and no candidates."""
    model, batch = build(), batch_of([40, 7], 3, 1)
    with torch.inference_mode():
        state = model.encode_user(batch.user)
        same = model.extend_user(state, batch.user.events(40))
        assert_close(model.score(same, batch.candidates), model.score(state, batch.candidates))
        nobody = user_inputs([0, 0], 1)
        empty = model.score(model.encode_user(nobody.events(0, 0)), batch.candidates)
        assert_close(empty, model.score(model.encode_user(nobody), batch.candidates))
        assert model.score(state, batch.candidates.select(slice(0, 0))).shape == (2, 0, 2)


def tensors(state: UserState) -> tuple[Tensor, ...]:
    return (*state.keys, *state.values, state.request_BRD)


def keep(user: UserInputs, number: Tensor) -> UserInputs:
    """The same users with their first `number` events."""
    return replace(
        user, mask_BL=user.mask_BL & (torch.arange(user.mask_BL.shape[1]) < number[:, None])
    )


def split(user: UserInputs, cuts: list[int], new: int) -> tuple[UserInputs, UserInputs]:
    """Each user's events before its cut, and at most `new` after it, padded on the right."""
    at = (torch.tensor(cuts)[:, None] + torch.arange(new)).clamp(max=user.mask_BL.shape[1] - 1)
    inside = torch.tensor(cuts)[:, None] + torch.arange(new) < user.mask_BL.sum(1, keepdim=True)
    later = UserInputs(
        *(getattr(user, n).gather(1, at) for n in ("item_BL", "action_BL", "age_BL", "gap_BL")),
        user.event_BLE.gather(1, at[..., None].expand(-1, -1, user.event_BLE.shape[-1])),
        inside,
        user.field_BU,
        user.dense_BG,
        user.event_category_BLJ.gather(
            1, at[..., None].expand(-1, -1, user.event_category_BLJ.shape[-1])
        ),
    )
    return keep(user, torch.tensor(cuts)), later
