"""VISTA: the facts of its digest that the invariants of the interface do not already hold."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import silu

from modeling import models
from modeling.inputs.batch import Batch, FeatureSizes, UserInputs
from modeling.layers.quasi_linear import QuasiLinearLayer, Stream, quasi_linear_plain
from modeling.models.vista import VISTA
from tests.modeling.test_invariants import EVENT_FIELDS, SIZES, candidates, user_inputs

LONG = replace(SIZES, history_length=200)


def build(sizes: FeatureSizes = LONG, **config: Any) -> VISTA:
    torch.manual_seed(1)
    made = models.build(
        "vista", {"width": 16, "num_seeds": 6, "ranking_layers": 2, **config}, sizes
    )
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return cast(VISTA, made.eval())


def made_by(model: VISTA) -> Any:
    """The stage 1 that makes a model's tokens, of whatever kind."""
    assert model.stage_1 is not None
    return model.stage_1


STREAMING: dict[str, Any] = {"causal": True, "seed_role": "target", "block": 8}


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 3), st.integers(1, 20), st.integers(0, 5), st.integers(0, 1000))
def test_without_the_outer_activation_it_is_masked_linear_attention(
    batch: int, sources: int, targets: int, seed: int
) -> None:
    torch.manual_seed(seed)
    layer = QuasiLinearLayer(8, 2, divide=False, outer=False)
    rows = torch.randn(batch, sources + targets, 8)
    normed = layer.norm(rows)
    keys, values = layer.key_value(normed).chunk(2, dim=-1)
    expected = quasi_linear_plain(
        *(layer._heads(x) for x in (layer.query(normed), keys, values)), targets
    )
    total, _ = layer.sums(rows[:, :sources], torch.ones(batch, sources, dtype=torch.bool))
    query = silu(layer._heads(layer.query(normed)))
    own = (query * silu(layer._heads(keys))).sum(-1, keepdim=True) * layer._heads(values)
    own[:, :, :sources] = 0
    torch.testing.assert_close(
        query @ layer.matrix(total, torch.ones(batch)) + own, expected, atol=1e-5, rtol=1e-5
    )
    for target, part in ((False, slice(0, sources)), (True, slice(sources, None))):
        found = layer(rows[:, part], layer.matrix(total, torch.ones(batch)), target=target)
        wanted = layer._finish(rows[:, part], expected[:, :, part])
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


def test_the_paper_divides_nothing_and_appendix_b_by_the_rows() -> None:
    total, count = torch.randn(1, 2, 4, 4), torch.tensor([7])
    torch.testing.assert_close(QuasiLinearLayer(8, 2).matrix(total, count), silu(total / 7))
    torch.testing.assert_close(
        QuasiLinearLayer(8, 2, divide=False).matrix(total, count), silu(total)
    )


@pytest.mark.parametrize("target", [False, True])
def test_gradients_equal_finite_differences_and_the_closed_form(target: bool) -> None:
    """DZ = dW ⊙ φ'(Z) and what follows from it (section 3.3 of the digest), through autograd."""
    torch.manual_seed(0)
    layer = QuasiLinearLayer(4, 2, divide=False).double()
    rows, reading = (torch.randn(1, n, 4, dtype=torch.double, requires_grad=True) for n in (5, 3))
    mask = torch.ones(1, 5, dtype=torch.bool)

    def read(sources: Tensor, readers: Tensor) -> Tensor:
        return layer(readers, layer.matrix(*layer.sums(sources, mask)), target=target)

    assert torch.autograd.gradcheck(read, (rows, reading))
    total = torch.randn(1, 2, 2, 2, dtype=torch.double, requires_grad=True)
    out = torch.randn(1, 2, 3, 2, dtype=torch.double)
    query = silu(layer._heads(layer.query(layer.norm(reading)))).detach()
    (found,) = torch.autograd.grad((query @ layer.matrix(total, mask.sum(1)) * out).sum(), total)
    slope = torch.sigmoid(total) * (1 + total * (1 - torch.sigmoid(total)))
    torch.testing.assert_close(found, (query.transpose(-1, -2) @ out) * slope)


@pytest.mark.parametrize("attention", ["quasi_linear", "softmax"])
@pytest.mark.parametrize("role", ["source", "target"])
def test_tokens_do_not_know_the_order_of_events(attention: str, role: str) -> None:
    model, user = build(attention=attention, seed_role=role), user_inputs([30, 30], 4)
    order = torch.randperm(30)
    names = EVENT_FIELDS
    shuffled = replace(user, **{name: getattr(user, name)[:, order] for name in names})
    with torch.inference_mode():
        first, second = model.encode_user(user).tokens_BSD, model.encode_user(shuffled).tokens_BSD
    torch.testing.assert_close(first, second, atol=1e-5, rtol=1e-5)


def test_tokens_are_the_same_to_the_bit_whatever_the_candidates() -> None:
    model, user = build(), user_inputs([40, 3], 2)
    with torch.inference_mode():
        states = []
        for number in (1, 9):
            state = model.encode_user(user)
            model.score(state, candidates(2, number, number))
            states.append(state)
    assert torch.equal(states[0].tokens_BSD, states[1].tokens_BSD)


def test_scores_from_stored_tokens_equal_the_whole_forward() -> None:
    model, user, chosen = build(), user_inputs([60, 12, 0], 3), candidates(3, 7, 3)
    labels = torch.zeros(3, 7, 2)
    with torch.inference_mode():
        tokens = model.encode_user(user).tokens_BSD.clone()
        cached = model.score(model.state_of(tokens, user.events(0, 0)), chosen)
        torch.testing.assert_close(cached, model(Batch(user, chosen, labels)), atol=1e-5, rtol=1e-5)


@settings(max_examples=12, deadline=None)
@given(
    st.lists(st.integers(0, 90), min_size=1, max_size=3), st.integers(1, 40), st.integers(0, 1000)
)
@pytest.mark.parametrize(
    "config",
    [{}, {"seed_role": "target", "divide": False}, STREAMING],
    ids=["source", "target", "causal"],
)
def test_a_summary_in_chunks_equals_the_whole(
    config: dict[str, Any], lengths: list[int], size: int, seed: int
) -> None:
    model, user = build(**config), user_inputs(lengths, seed)
    width = user.mask_BL.shape[1]

    def chunks() -> list[UserInputs]:
        return [user.events(start, start + size) for start in range(0, width, size)]

    with torch.inference_mode():
        whole = model.encode_user(user).tokens_BSD
    assert torch.isfinite(whole).all()
    torch.testing.assert_close(made_by(model).summarise(chunks), whole, atol=1e-5, rtol=1e-4)


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.integers(0, 12), min_size=1, max_size=6), st.integers(1, 9), st.integers(0, 1000)
)
def test_a_stream_in_any_pieces_equals_one_piece(pieces: list[int], block: int, seed: int) -> None:
    model = build(**{**STREAMING, "block": block})
    user = user_inputs([sum(pieces)], seed, max(sum(pieces), 1))
    ends = list(itertools.accumulate(pieces))
    with torch.inference_mode():
        state = model.encode_user(user.events(0, ends[0]))
        for start, end in itertools.pairwise(ends):
            state = model.extend_user(state, user.events(start, end))
        whole = model.encode_user(user.events(0, ends[-1]))
    for one, other in zip(state.streams, whole.streams, strict=True):
        for name, part, expected in zip(Stream._fields, one, other, strict=True):
            torch.testing.assert_close(part, expected, atol=1e-5, rtol=1e-4, msg=name)
    torch.testing.assert_close(state.tokens_BSD, whole.tokens_BSD, atol=1e-5, rtol=1e-4)


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.integers(0, 40), min_size=1, max_size=3),
    st.integers(1, 9),
    st.integers(0, 3),
    st.integers(0, 99),
)
def test_all_blocks_at_once_equal_block_by_block(
    lengths: list[int], block: int, before: int, seed: int
) -> None:
    """The fast path and its plain twin, from the beginning and behind some full blocks; gradients
    too.
    """
    torch.manual_seed(seed)
    layer, width = QuasiLinearLayer(8, 2, block=block).double(), max(*lengths, 1)
    start = layer.start(len(lengths), torch.zeros(1, dtype=torch.double))
    every = torch.ones(len(lengths), before * block, dtype=torch.bool)
    _, start = layer.advance_blocks(
        torch.randn(len(lengths), before * block, 8, dtype=torch.double), every, start
    )
    rows = torch.randn(len(lengths), width, 8, dtype=torch.double, requires_grad=True)
    mask = torch.arange(width) < torch.tensor(lengths)[:, None]
    fast, fast_stream = layer.advance_blocks(rows, mask, start)
    parts, stream = [], start
    for first in range(0, width, block):
        part, stream = layer.advance(
            rows[:, first : first + block], mask[:, first : first + block], stream
        )
        parts.append(part)
    plain = torch.cat(parts, dim=1)
    for one, other in zip(
        (*fast_stream, fast * mask[..., None]), (*stream, plain * mask[..., None]), strict=True
    ):
        torch.testing.assert_close(one, other, atol=1e-9, rtol=1e-9)
    gradients = [
        torch.autograd.grad((out * mask[..., None]).square().sum(), rows)[0]
        for out in (fast, plain)
    ]
    torch.testing.assert_close(*gradients, atol=1e-9, rtol=1e-9)


def test_an_event_adds_its_own_product_to_one_layers_sum() -> None:
    model = build(**STREAMING, summary_layers=1)
    user = user_inputs([9], 5)
    with torch.inference_mode():
        before, after = model.encode_user(user.events(0, 8)), model.encode_user(user)
        layer = cast(QuasiLinearLayer, made_by(model).layers[0])
        added, _ = layer.sums(made_by(model).rows(user.events(8)), user.mask_BL[:, 8:])
    torch.testing.assert_close(
        after.streams[0].total, before.streams[0].total + added, atol=1e-6, rtol=1e-6
    )


def test_a_streaming_row_never_changes_once_it_is_computed() -> None:
    model, user = build(**STREAMING), user_inputs([40], 6)
    layer = cast(QuasiLinearLayer, made_by(model).layers[0])
    rows, mask = torch.randn(1, 40, 16), user.mask_BL

    def through(number: int) -> Tensor:
        stream, found = layer.start(1, rows), []
        for start in range(0, number, 8):
            part = slice(start, min(start + 8, number))
            out, stream = layer.advance(rows[:, part], mask[:, part], stream)
            found.append(out)
        return torch.cat(found, dim=1)

    with torch.inference_mode():
        torch.testing.assert_close(through(21), through(40)[:, :21], atol=1e-6, rtol=1e-6)


def test_the_decoder_reads_seeds_and_the_past_only() -> None:
    model, user = build(reconstructed=8), user_inputs([12], 7)
    tokens = torch.randn(1, 6, 16, requires_grad=True)
    table = model.features.item.weight
    for row in range(7):
        assert model.decoder is not None
        found = model.decoder(tokens, user, model.features.item)
        predicted, items = found.predicted_BMD, found.items_BMD
        assert found.real_BM.all()
        items.retain_grad()
        to_tokens, to_items = torch.autograd.grad(predicted[0, row].square().sum(), (tokens, items))
        assert (to_tokens.abs().sum(-1) > 0).all()
        assert not to_items[0, row + 1 :].any()
        assert to_items[0, : row + 1].abs().sum(-1).gt(0).all()
    assert table.requires_grad


def test_the_reconstruction_learns_and_its_targets_carry_no_gradient() -> None:
    model, user = build().train(), user_inputs([30, 18], 8)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = model.reconstruction_loss(model.encode_user(user).tokens_BSD, user)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]
    last = user.item_BL[0, 29]
    first_only = user_inputs([2], 8)
    only = replace(first_only, item_BL=torch.tensor([[1, int(last)]]))
    (gradient,) = torch.autograd.grad(
        model.reconstruction_loss(torch.zeros(1, 6, 16), only), model.features.item.weight
    )
    assert gradient[1].any()
    assert not gradient[int(last)].any()


def test_padding_is_no_part_of_a_reconstruction() -> None:
    model, user = build(), user_inputs([5], 9, 5)
    padded = user_inputs([5], 9, 5)
    wide = replace(
        padded,
        **{
            name: torch.cat([getattr(padded, name), torch.zeros_like(getattr(padded, name))], dim=1)
            for name in EVENT_FIELDS
        },
    )
    tokens = torch.randn(1, 6, 16)
    with torch.inference_mode():
        torch.testing.assert_close(
            model.reconstruction_loss(tokens, user), model.reconstruction_loss(tokens, wide)
        )
        assert float(model.reconstruction_loss(tokens, user.events(0, 1))) == 0  # no pair of events


def test_streams_and_softmax_or_source_seeds_do_not_go_together() -> None:
    for config in ({"seed_role": "source"}, {"attention": "softmax", "seed_role": "target"}):
        with pytest.raises(ValueError, match="causal=True wants"):
            build(causal=True, **config)
    with pytest.raises(ValueError, match="no summary in parts"):
        made_by(build(attention="softmax")).summarise(lambda: [])
    with pytest.raises(ValueError, match="no chunk"):
        made_by(build()).summarise(lambda: [])


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("causal", [False, True])
def test_a_hundred_thousand_events_add_up_in_half_precision(
    kind: torch.dtype, causal: bool
) -> None:
    """Sums are float32 whatever the rows are: float16 has no number beyond 65,504, and bfloat16 stands
    still where a sum is 256 times what is added.
    """
    torch.manual_seed(0)
    role = {"causal": True, "seed_role": "target"} if causal else {}
    model = models.build("vista", {"width": 16, "num_seeds": 4, "divide": True, **role}, SIZES)
    assert isinstance(model, VISTA)
    model = model.eval()
    chunks = [user_inputs([2048], seed, 2048) for seed in range(3)] * 16  # 98,304 events
    with torch.inference_mode():
        exact = made_by(model).summarise(lambda: iter(chunks))
        with torch.autocast("cpu", kind):
            rounded = made_by(model).summarise(lambda: iter(chunks))
    assert rounded.isfinite().all()
    apart = (rounded.float() - exact).norm() / exact.norm()
    assert apart < 0.02
    rows, mask = torch.full((1, 1 << 17, 16), 3.0, dtype=kind), torch.ones(1, 1 << 17).bool()
    layer = made_by(model).layers[0].to(kind)
    whole, number = layer.sums(rows[:, :1024], mask[:, :1024])
    for start in range(1024, 1 << 17, 1024):
        part = layer.sums(rows[:, start : start + 1024], mask[:, start : start + 1024])
        whole, number = whole + part[0], number + part[1]
    first = layer.sums(rows[:, :1], mask[:, :1])[0]
    torch.testing.assert_close(whole, first * (1 << 17), rtol=1e-3, atol=1.0)
