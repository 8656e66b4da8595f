"""Operators: every fast and streaming form equals its plain twin, and each shows the facts of its
paper.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from modeling.layers import hydra
from modeling.layers.hydra import DecayedHydra, Hydra, hydra_plain
from modeling.layers.linear_attention import (
    LinearAttention,
    LinRecAttention,
    linear_attention,
    linear_attention_plain,
)
from modeling.layers.operator import Operator
from modeling.layers.softmax import Softmax, softmax_attention_plain

TOLERANCE = 1e-5  # fp32 sums in another order, of values of order 1
WIDTH = 16
few = settings(max_examples=25, deadline=None)
shapes = st.tuples(st.integers(1, 3), st.integers(1, 150), st.integers(0, 10_000))


def rows(
    batch: int, length: int, seed: int = 0, width: int = WIDTH
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    made = torch.randn(3, batch, length, width, generator=generator)
    return made[0], made[1], made[2] / 4


def heads(tensor: Tensor, number: int) -> Tensor:
    return tensor.unflatten(-1, (number, -1)).transpose(1, 2)


def operators() -> dict[str, Operator]:
    torch.manual_seed(1)
    decayed = DecayedHydra(WIDTH)
    both_ways = DecayedHydra(WIDTH, causal=False)
    for operator in (decayed, both_ways):
        torch.nn.init.normal_(operator.decay_logit, mean=2.0)
    return {
        "softmax causal": Softmax(4, causal=True),
        "softmax": Softmax(4, causal=False),
        "hydra causal": Hydra(causal=True),
        "hydra": Hydra(causal=False),
        "hydra of elu causal": Hydra(causal=True, feature_map="elu"),
        "decayed hydra of relu": DecayedHydra(WIDTH, feature_map="relu"),
        "decayed hydra": decayed,
        "decayed hydra both ways": both_ways,
        "linrec causal": LinRecAttention(4, causal=True),
        "linrec": LinRecAttention(4, causal=False),
        "kernel linear causal": LinearAttention(4, causal=True, denominator=True),
        "kernel linear": LinearAttention(2, causal=False, denominator=True),
        "kernel linear without denominator": LinearAttention(2, causal=True),
    }


def plain(operator: Operator, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    causal = operator.causal
    if isinstance(operator, Softmax):
        twin = softmax_attention_plain(
            *(heads(t, operator.num_heads) for t in (query, key, value)), causal=causal
        )
        return twin.transpose(1, 2).flatten(2)
    if isinstance(operator, LinearAttention):
        query, key, value = (heads(t, operator.num_heads) for t in (query, key, value))
        query, key = operator.kernel(query), operator.kernel(key)
        twin = linear_attention_plain(
            query, key, value, causal=causal, denominator=operator.denominator
        )
        return twin.transpose(1, 2).flatten(2) * operator.scale(query.shape[-1])
    assert isinstance(operator, Hydra | DecayedHydra)
    return hydra_plain(
        query,
        key,
        value,
        causal=causal,
        decay_D=getattr(operator, "decay_D", None),
        feature_map=operator.feature_map,
    )


every = pytest.mark.parametrize("name", operators())
causal = pytest.mark.parametrize(
    "name", [name for name, operator in operators().items() if operator.causal]
)


@every
@few
@given(shape=shapes)
def test_fast_form_equals_plain_twin_gradients_included(name: str, shape: Any) -> None:
    """Facts 1 and 2 of the Hydra digest, and the same for every operator."""
    operator, inputs = operators()[name], rows(*shape)
    results = []
    for form in (lambda *args: operator(*args, None), lambda *args: plain(operator, *args)):
        leaves = [t.clone().requires_grad_() for t in inputs]
        out = form(*leaves)
        weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(shape[2]))
        parameters = list(operator.parameters())
        results.append([out, *torch.autograd.grad((out * weight).sum(), leaves + parameters)])
    for fast, slow in zip(*results, strict=True):
        scale = max(1.0, float(slow.detach().abs().max()))
        torch.testing.assert_close(fast / scale, slow / scale, atol=TOLERANCE, rtol=TOLERANCE)


@causal
@few
@given(shape=shapes, data=st.data())
def test_streaming_form_equals_the_whole_sequence(name: str, shape: Any, data: Any) -> None:
    """Any cuts, and steps in which some sequences of the batch get no new row."""
    operator, (query, key, value) = operators()[name], rows(*shape)
    batch, length = query.shape[:2]
    counts = [
        data.draw(st.lists(st.integers(0, length), max_size=3).map(sorted), label="cuts")
        for _ in range(batch)
    ]
    steps = max(len(c) for c in counts) + 1
    cuts = [[0, *c, *[length] * (steps - len(c))] for c in counts]
    whole, streamed = operator(query, key, value, None), torch.zeros_like(query)
    state = operator.initial_state(query[:, 0])
    for step in range(steps):
        pieces = [slice(c[step], c[step + 1]) for c in cuts]
        widths = [piece.stop - piece.start for piece in pieces]
        if not max(widths):
            continue
        mask = torch.arange(max(widths)) < torch.tensor(widths)[:, None]
        padded = [torch.full((batch, max(widths), WIDTH), 9.0) for _ in range(3)]
        for row, piece in enumerate(pieces):
            for target, source in zip(padded, (query, key, value), strict=True):
                target[row, : widths[row]] = source[row, piece]
        out, state = operator.extend(state, *padded, mask)
        for row, piece in enumerate(pieces):
            streamed[row, piece] = out[row, : widths[row]]
    scale = max(1.0, float(whole.abs().max()))
    torch.testing.assert_close(streamed / scale, whole / scale, atol=TOLERANCE, rtol=TOLERANCE)


@causal
def test_the_future_has_no_gradient(name: str) -> None:
    """Fact 3: exact zeros."""
    operator, inputs = operators()[name], [t.requires_grad_() for t in rows(2, 70)]
    out = operator(*inputs, None)
    query, key, value = torch.autograd.grad((out[:, 40] * torch.arange(WIDTH)).sum(), inputs)
    for gradient in (query, key, value):
        assert (gradient[:, 41:] == 0).all()
        assert (gradient[:, 40] != 0).any()
    assert (key[:, :40] != 0).any()
    assert (value[:, :40] != 0).any()


@every
def test_padding_is_inert(name: str) -> None:
    """Fact 5: rows of padding, whatever they hold, change no real row."""
    operator, (query, key, value) = operators()[name], rows(2, 40)
    mask = torch.arange(40) < torch.tensor([40, 23])[:, None]
    noisy = [torch.where(mask[..., None], t, torch.full_like(t, 7.0)) for t in (query, key, value)]
    out = operator(*noisy, mask)
    alone = operator(query[1:, :23], key[1:, :23], value[1:, :23], None)
    torch.testing.assert_close(out[1:, :23], alone, atol=TOLERANCE, rtol=TOLERANCE)
    assert torch.isfinite(out).all()


def test_hydra_is_kernel_linear_attention_with_as_many_heads_as_features() -> None:
    """Fact 2: the same φ, taken before the split into D heads."""
    query, key, value = rows(2, 50)
    unit = [heads(hydra.unit_rows(t), WIDTH) for t in (query, key)]
    for causal in (True, False):
        generic = (
            linear_attention(*unit, heads(value, WIDTH), causal=causal).transpose(1, 2).flatten(2)
        )
        torch.testing.assert_close(
            Hydra(causal=causal)(query, key, value, None), generic, atol=1e-6, rtol=1e-5
        )


def test_linrec_is_its_formula() -> None:
    """ρ(elu(Q)) (ρ(elu(K))^T V) / √K head by head, written down without the layer's own
    functions.
    """
    query, key, value = rows(1, 30)
    out = LinRecAttention(4, causal=False)(query, key, value, None)
    for head in range(4):
        cut = slice(4 * head, 4 * head + 4)
        q, k = (torch.where(t > 0, t, t.exp() - 1)[0, :, cut] for t in (query, key))
        q, k = (t / t.pow(2).sum(-1, keepdim=True).sqrt() for t in (q, k))
        torch.testing.assert_close(
            out[0, :, cut], q @ (k.T @ value[0, :, cut]) / 2, atol=1e-6, rtol=1e-5
        )


def test_the_linear_kernel_with_denominator_is_a_weighted_mean() -> None:
    """Katharopoulos: weights (elu(q) + 1)·(elu(k) + 1) over rows up to t, divided by their sum."""
    query, key, value = rows(1, 70)
    out = LinearAttention(2, causal=True, denominator=True)(query, key, value, None)
    for head in range(2):
        cut = slice(8 * head, 8 * head + 8)
        q, k = (torch.where(t > 0, t + 1, t.exp())[0, :, cut] for t in (query, key))
        weight = q[69] @ k.T
        expected = (weight[:, None] * value[0, :, cut]).sum(0) / weight.sum()
        torch.testing.assert_close(out[0, 69, cut], expected, atol=1e-6, rtol=1e-5)


def test_hydra_pools_without_regard_to_order() -> None:
    """Fact 6: bidirectional Hydra permutes with its rows; the causal form does not."""
    query, key, value = rows(1, 30)
    order = torch.randperm(30, generator=torch.Generator().manual_seed(0))
    permuted = [t[:, order] for t in (query, key, value)]
    both, causal = Hydra(causal=False), Hydra(causal=True)
    torch.testing.assert_close(
        both(*permuted, None), both(query, key, value, None)[:, order], atol=1e-6, rtol=1e-5
    )
    assert (causal(*permuted, None) - causal(query, key, value, None)[:, order]).abs().max() > 1e-2


@pytest.mark.parametrize("name", ["hydra", "hydra causal", "decayed hydra"])
def test_hydra_ignores_the_scale_of_queries_and_keys(name: str) -> None:
    """Fact 7."""
    operator, (query, key, value) = operators()[name], rows(2, 30)
    expected = operator(query, key, value, None)
    torch.testing.assert_close(
        operator(query * 8, key / 32, value, None), expected, atol=1e-6, rtol=1e-5
    )
    torch.testing.assert_close(operator(query, key, value * 2, None), expected * 2)


def test_a_row_of_zeros_stays_zero() -> None:
    query, key, value = rows(1, 5)
    key[:, 2] = 0
    out = Hydra(causal=True)(query, key, value, None)
    assert torch.isfinite(out).all()
    torch.testing.assert_close(hydra.unit_rows(key)[:, 2], torch.zeros(1, WIDTH))


def test_decay_one_is_plain_hydra_and_decay_zero_reads_only_the_row_itself() -> None:
    """Fact 9, at both ends exactly."""
    query, key, value = rows(2, 70)
    decayed, both = DecayedHydra(WIDTH), DecayedHydra(WIDTH, causal=False)
    with torch.no_grad():
        decayed.decay_logit.fill_(200.0)
        both.decay_logit.fill_(200.0)
    torch.testing.assert_close(
        both(query, key, value, None),
        Hydra(causal=False)(query, key, value, None),
        atol=1e-5,
        rtol=1e-5,
    )
    torch.testing.assert_close(
        decayed(query, key, value, None),
        Hydra(causal=True)(query, key, value, None),
        atol=1e-5,
        rtol=1e-5,
    )
    with torch.no_grad():
        decayed.decay_logit.fill_(-200.0)
    own = hydra.unit_rows(query) * hydra.unit_rows(key) * value
    torch.testing.assert_close(decayed(query, key, value, None), own, atol=1e-6, rtol=1e-6)


@few
@given(length=st.integers(1, 600), seed=st.integers(0, 1000))
def test_prefix_sums_equal_their_definitions(length: int, seed: int) -> None:
    some = rows(2, length, seed)[0].double()
    torch.testing.assert_close(hydra.prefix_sum(some), some.cumsum(1))
    decay = torch.rand(WIDTH, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    torch.testing.assert_close(
        hydra.decayed_prefix_sum(some, decay), hydra.decayed_prefix_sum_plain(some, decay)
    )


def test_decayed_sum_gradient_by_finite_differences() -> None:
    some = torch.randn(2, 37, 3, dtype=torch.float64, requires_grad=True)
    decay = torch.tensor([0.0, 0.5, 0.999], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(hydra.decayed_prefix_sum, (some, decay), atol=1e-6)


class LargestTensor(TorchDispatchMode):
    """Notes the largest tensor that any operation makes."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, Tensor):
                self.largest = max(self.largest, tensor.numel())
        return out


@pytest.mark.parametrize("name", [name for name in operators() if name != "softmax"])
def test_no_tensor_grows_with_the_square_of_the_length(name: str) -> None:
    """Fact 8: forward and backward; PyTorch's softmax kernel included."""

    def largest(length: int, width: int = WIDTH) -> int:
        inputs = [t.requires_grad_() for t in rows(1, length, width=width)]
        operator = (
            DecayedHydra(width, causal=name == "decayed hydra")
            if "decayed" in name
            else operators()[name]
        )
        with LargestTensor() as seen:
            operator(*inputs, None).sum().backward()
        return seen.largest

    short, long = largest(1024), largest(4096)
    if "hydra" in name:
        assert largest(1024, 4 * WIDTH) <= 4.2 * short  # linear in the width, too
    assert long <= 4.2 * short
    assert long <= 4096 * 4096 / 16


@pytest.mark.parametrize(
    "name", ["hydra causal", "decayed hydra", "linrec causal", "kernel linear causal"]
)
def test_states_of_linear_operators_do_not_grow(name: str) -> None:
    operator = operators()[name]
    sizes = []
    for length in (1, 500):
        state = operator.initial_state(torch.zeros(2, WIDTH))
        _, state = operator.extend(state, *rows(2, length), torch.ones(2, length, dtype=torch.bool))
        sizes.append(sum(t.numel() for t in state))
    assert sizes[0] == sizes[1]
    if "hydra" in name:
        assert sizes[0] == 2 * WIDTH
