"""Facts of Hiformer (arXiv 2311.05884) that the implementation must show, beyond the shared
invariants.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from modeling import models
from modeling.inputs.batch import Batch
from modeling.layers.heterogeneous import ByToken, Composite, HeterogeneousLayer, Kind, LayerShape
from modeling.layers.per_token import PerTokenFeedForward, PerTokenLayerNorm
from modeling.models.hiformer import Hiformer
from tests.modeling.test_invariants import SIZES, candidates, user_inputs

SHAPE = LayerShape(num_tokens=7, width=12, num_heads=2, key_width=4, value_width=6, hidden=20)
PAPER = LayerShape(38, 128, 4, 16, 64, 512, rank_key=128, rank_value=1024)
few = settings(max_examples=15, deadline=None)


def layer(
    kind: Kind, queries: int | None = None, shape: LayerShape = SHAPE, **flags: Any
) -> HeterogeneousLayer:
    torch.manual_seed(1)
    made = HeterogeneousLayer(shape, kind, queries, **flags)
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.3)
    return made.eval()


def rows(shape: LayerShape = SHAPE, seed: int = 0) -> Tensor:
    return torch.randn(
        2, 3, shape.num_tokens, shape.width, generator=torch.Generator().manual_seed(seed)
    )


def tie(hetero: nn.Module, vanilla: nn.Module) -> None:
    """Give every token of `hetero` the weights of `vanilla`."""
    with torch.no_grad():
        for name, part in hetero.named_modules():
            same = vanilla.get_submodule(name) if name in dict(vanilla.named_modules()) else None
            if isinstance(part, ByToken) and not part.shared:
                assert isinstance(same, ByToken)
                part.map.weight.copy_(same.map.weight.T)
            if isinstance(part, PerTokenLayerNorm):
                assert isinstance(same, nn.LayerNorm)
                part.gain.copy_(same.weight)
                part.bias.copy_(same.bias)
            if isinstance(part, PerTokenFeedForward):
                assert isinstance(same, nn.Sequential)
                for own, shared in ((part.up, same[0]), (part.down, same[2])):
                    own.weight.copy_(shared.weight.T)
                    assert own.bias is not None
                    own.bias.copy_(shared.bias)


@pytest.mark.parametrize("queries", [None, 2])
def test_tied_heterogeneous_attention_is_vanilla_attention(queries: int | None) -> None:
    vanilla, hetero = layer("vanilla", queries), layer("hetero", queries)
    with torch.inference_mode():
        assert float((hetero(None, rows()) - vanilla(None, rows())).abs().max()) > 1e-2
        tie(hetero, vanilla)
        torch.testing.assert_close(
            hetero(None, rows()), vanilla(None, rows()), atol=1e-6, rtol=1e-6
        )


def test_vanilla_attention_is_torchs() -> None:
    shape = LayerShape(5, 12, 2, 6, 6, 20)  # heads that split the width, as torch's must
    ours = layer("vanilla", None, shape)
    reference = nn.MultiheadAttention(12, 2, bias=False, batch_first=True)
    tokens = rows(shape)
    with torch.inference_mode():
        weights = [getattr(ours, name).map.weight for name in ("query", "key", "value")]
        reference.in_proj_weight.copy_(torch.cat(weights))
        reference.out_proj.weight.copy_(ours.output.map.weight)  # type: ignore[union-attr, arg-type]
        normed = ours.norm(tokens).flatten(0, 1)
        middle = tokens + reference(normed, normed, normed, need_weights=False)[0].view_as(tokens)
        expected = middle + ours.feed_forward(ours.norm_out(middle))
        torch.testing.assert_close(ours(None, tokens), expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("queries", [None, 1])
def test_block_diagonal_composite_projections_are_heterogeneous_attention(
    queries: int | None,
) -> None:
    hetero, composite = layer("hetero", queries), layer("composite", queries)
    with torch.inference_mode():
        state = {n: t for n, t in hetero.state_dict().items() if n in composite.state_dict()}
        composite.load_state_dict(state, strict=False)
        for name in ("query", "key", "value"):
            to, own = getattr(composite, name), getattr(hetero, name)
            if isinstance(to, Composite):
                to.down.copy_(torch.block_diag(*own.map.weight))
        torch.testing.assert_close(
            composite(None, rows()), hetero(None, rows()), atol=1e-6, rtol=1e-5
        )


def test_low_rank_factors_of_an_svd_are_the_full_rank_layer() -> None:
    full = layer("composite")
    low = layer("low_rank", shape=replace(SHAPE, rank_key=56, rank_value=84))
    with torch.inference_mode():
        low.load_state_dict(
            {n: t for n, t in full.state_dict().items() if not n.endswith(".down")}, strict=False
        )
        for name in ("query", "key", "value"):
            to = getattr(low, name)
            left, values, right = torch.linalg.svd(getattr(full, name).down, full_matrices=False)
            assert to.up is not None
            rank = len(values)
            to.down.zero_()[:, :rank] = left * values
            to.up.zero_()[:rank] = right
        torch.testing.assert_close(low(None, rows()), full(None, rows()), atol=1e-5, rtol=1e-5)


def parameters(module: nn.Module, *names: str) -> int:
    return sum(p.numel() for name in names for p in module.get_submodule(name).parameters())


def test_parameter_counts_of_the_papers_shape() -> None:
    """L = 38, d = 128, H = 4, d_k = 16, d_v = 64, d_f = 512: closed forms, and the two headline
    integers.
    """
    with torch.device("meta"):
        hetero, pruned = HeterogeneousLayer(PAPER, "hetero"), HeterogeneousLayer(PAPER, "hetero", 1)
        full = HeterogeneousLayer(PAPER, "composite", 1)
        low = HeterogeneousLayer(PAPER, "low_rank", 1)
    length, d, heads, d_k, d_v, d_f = 38, 128, 4, 16, 64, 512
    asked = d * heads * d_k + heads * d_v * d + 2 * d * d_f + d_f + d
    all_parts = ("query", "key", "value", "output", "feed_forward")
    assert parameters(pruned, *all_parts) == length * d * heads * (d_k + d_v) + asked
    assert parameters(hetero, *all_parts) == length * (
        d * heads * (2 * d_k + d_v) + heads * d_v * d + 2 * d * d_f + d_f + d
    )
    assert parameters(full, "key", "value") == 59_146_240
    assert parameters(low, "key", "value") == 15_876_096
    assert parameters(full, *all_parts) == 59_146_240 + asked
    assert parameters(low, *all_parts) == 15_876_096 + asked
    fitted = 2.36e6 - parameters(
        pruned, *all_parts
    )  # what lies outside the interaction, from one published row
    rest = ((full, 59.95), (low, 16.68))
    assert all(
        round((parameters(m, *all_parts) + fitted) / 1e6, 2) == published for m, published in rest
    )
    assert 0.265 < parameters(low, "key", "value") / parameters(full, "key", "value") < 0.28


@pytest.mark.parametrize("kind", ["vanilla", "hetero", "composite", "low_rank"])
def test_a_pruned_layer_gives_the_task_tokens_of_the_unpruned_one(kind: Kind) -> None:
    shape = replace(SHAPE, rank_key=8, rank_value=10)
    whole, pruned = layer(kind, None, shape, composite_query=False), layer(kind, 2, shape)
    with torch.inference_mode():
        state = {
            name: tensor[: pruned.state_dict()[name].shape[0]]
            if name in pruned.state_dict()
            else tensor
            for name, tensor in whole.state_dict().items()
        }
        pruned.load_state_dict(state)
        torch.testing.assert_close(
            pruned(None, rows()), whole(None, rows())[:, :, :2], atol=1e-6, rtol=1e-6
        )
    counts = []
    for made in (whole, pruned):
        with FlopCounterMode(display=False) as counter, torch.inference_mode():
            made(None, rows(shape))
        counts.append(counter.get_total_flops())
    assert counts[1] < counts[0]
    assert pruned.num_queries == 2


def test_heterogeneous_flops_equal_vanilla_and_parameters_grow_with_the_tokens() -> None:
    counts = []
    for kind in ("vanilla", "hetero"):
        with FlopCounterMode(display=False) as counter, torch.inference_mode():
            layer(kind)(None, rows())  # type: ignore[arg-type]
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1]
    parts = ("query", "key", "value", "output")
    assert parameters(layer("hetero"), *parts) == SHAPE.num_tokens * parameters(
        layer("vanilla"), *parts
    )


@pytest.mark.parametrize("kind", ["hetero", "composite"])
def test_tokens_are_told_apart_by_their_parameters_alone(kind: Kind) -> None:
    """Permuted with the tokens' parameters (composite: blocks of rows and columns) nothing changes;
    without, all does.
    """
    made, order = layer(kind), torch.randperm(7, generator=torch.Generator().manual_seed(2))
    permuted = layer(kind)
    with torch.inference_mode():
        for name, tensor in made.state_dict().items():
            if name.endswith(".down") and kind == "composite":
                blocks = tensor.view(7, SHAPE.width, 7, -1)[order][:, :, order]
                permuted.get_parameter(name).copy_(blocks.reshape(tensor.shape))
            else:
                permuted.get_parameter(name).copy_(tensor[order])
        torch.testing.assert_close(
            permuted(None, rows()[:, :, order]),
            made(None, rows())[:, :, order],
            atol=1e-6,
            rtol=1e-5,
        )
        assert (
            float((made(None, rows()[:, :, order]) - made(None, rows())[:, :, order]).abs().max())
            > 1e-2
        )


def test_a_token_reaches_its_own_key_or_every_key() -> None:
    """Heterogeneous: a changed token changes its own key and value; composite: all."""
    tokens, changed = rows(), rows()
    changed[:, :, 3] = 0
    for kind, expected in (("hetero", [3]), ("composite", list(range(7)))):
        made = layer(kind)  # type: ignore[arg-type]
        with torch.inference_mode():
            for part in (made.key, made.value):
                before, after = (part.join(None, part.part(some, 0)) for some in (tokens, changed))
                moved = (before - after).abs().amax((0, 1, 3)) > 0
                assert moved.nonzero().flatten().tolist() == expected


@pytest.mark.parametrize("kind", ["vanilla", "hetero", "composite", "low_rank"])
@pytest.mark.parametrize("prune", [True, False])
@few
@given(
    sizes=st.lists(st.integers(0, 12), min_size=1, max_size=3),
    number=st.integers(1, 5),
    seed=st.integers(0, 1000),
)
def test_the_request_half_computed_once_gives_the_scores_of_the_unsplit_forward(
    kind: str, prune: bool, sizes: list[int], number: int, seed: int
) -> None:
    torch.manual_seed(3)
    config = {
        "width": 16,
        "num_layers": 2,
        "kind": kind,
        "prune": prune,
        "rank_key": 8,
        "rank_value": 12,
    }
    for layers in (1, 2):
        made = models.build("hiformer", {**config, "num_layers": layers}, SIZES).eval()
        assert isinstance(made, Hiformer)
        for parameter in made.parameters():
            nn.init.normal_(parameter, std=0.3)
        user, some = user_inputs(sizes, seed), candidates(len(sizes), number, seed)
        with torch.inference_mode():
            state = made.encode_user(user)
            torch.testing.assert_close(
                made.score(state, some), made.score_unsplit(state, some), atol=1e-5, rtol=1e-5
            )


def test_the_request_half_is_not_multiplied_again_for_every_candidate() -> None:
    config = {"width": 32, "kind": "composite", "history": "bags"}
    made = models.build("hiformer", config, SIZES).eval()
    assert isinstance(made, Hiformer)
    some = candidates(1, 64, 0)
    with torch.inference_mode():
        state = made.encode_user(user_inputs([12], 0))
        counts = []
        for scored in (made.score, made.score_unsplit):
            with FlopCounterMode(display=False) as counter:
                scored(state, some)
            counts.append(counter.get_total_flops())
    share = made.features.num_candidate / (
        made.features.num_candidate + made.features.num_request + SIZES.tasks
    )
    assert counts[0] < (share + 0.15) * counts[1]


def test_only_task_tokens_reach_the_heads() -> None:
    made = models.build(
        "hiformer", {"width": 16, "num_layers": 2, "prune": False, "history": "bags"}, SIZES
    ).eval()
    assert isinstance(made, Hiformer)
    batch = Batch(user_inputs([4], 0), candidates(1, 3, 0), torch.zeros(1))
    made(batch).sum().backward()
    last = made.layers[-1].feed_forward
    assert isinstance(last, PerTokenFeedForward)
    assert last.up.weight.grad is not None
    felt = last.up.weight.grad.abs().amax((1, 2)) > 0
    assert felt.tolist() == [index < SIZES.tasks for index in range(len(felt))]
