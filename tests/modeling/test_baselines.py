"""Baselines: each does what its paper says, where that can be said in a line."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modeling import models
from modeling.baselines import autoint, dcnv2, rankmixer, wukong
from modeling.baselines.persrec import PerSRec
from modeling.baselines.two_stage import TwoStage, plain_search
from modeling.inputs.batch import Candidates, FeatureSizes, TrainingSample, UserInputs
from modeling.inputs.columns import GroupSizes
from modeling.layers import target_attention
from modeling.layers.embedding import CategorySlots
from modeling.layers.interaction import DotInteraction
from modeling.layers.target_attention import TargetAttention

WIDTH = 8


def tokens(request: int, candidate: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(2, request, WIDTH, generator=generator),
        torch.randn(2, 3, candidate, WIDTH, generator=generator),
    )


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.integers(0, 9), min_size=1, max_size=4),
    st.integers(1, 6),
    st.integers(0, 1000),
    st.booleans(),
)
def test_target_attention_equals_its_plain_twin(
    lengths: list[int], number: int, seed: int, matching: bool
) -> None:
    torch.manual_seed(seed)
    attention = TargetAttention(WIDTH, 12, matching=matching)
    for parameter in attention.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    items = torch.randn(len(lengths), 9, WIDTH)
    rows, candidates = torch.randn(len(lengths), 9, WIDTH), torch.randn(len(lengths), number, WIDTH)
    mask = torch.arange(9) < torch.tensor(lengths)[:, None]
    with torch.inference_mode():
        fast = attention(rows, items, mask, candidates)
        plain = attention.plain(rows, items, mask, candidates)
        torch.testing.assert_close(fast, plain, atol=1e-5, rtol=1e-5)
        for row, length in enumerate(lengths):
            if not length:
                assert not fast[row].any()


@pytest.mark.parametrize("block", [1, 40, 200, 1 << 18])
def test_target_attention_has_the_gradient_of_its_plain_twin(
    block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether a block holds several requests, one, or some of its candidates."""
    monkeypatch.setattr(target_attention, "BLOCK", block)
    torch.manual_seed(block)
    attention = TargetAttention(5, 7).double()
    with torch.no_grad():
        for parameter in attention.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    rows, items, candidates = (
        torch.randn(4, n, 5, dtype=torch.double, requires_grad=True) for n in (6, 6, 3)
    )
    mask, direction = torch.rand(4, 6) < 0.7, torch.randn(4, 3, 5, dtype=torch.double)
    inputs = [rows, items, candidates, *attention.parameters()]
    fast = attention(rows, items, mask, candidates)
    plain = attention.plain(rows, items, mask, candidates)
    torch.testing.assert_close(fast, plain)
    for one, other in zip(
        *(torch.autograd.grad((x * direction).sum(), inputs) for x in (fast, plain)), strict=True
    ):
        torch.testing.assert_close(one, other)


def test_target_attention_keeps_its_precision_under_autocast() -> None:
    torch.manual_seed(0)
    attention = TargetAttention(WIDTH, 12)
    rows = torch.randn(2, 9, WIDTH)
    items = torch.randn(2, 9, WIDTH)
    candidates = torch.randn(2, 3, WIDTH)
    mask = torch.ones(2, 9, dtype=torch.bool)
    found = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            read = attention(rows, items, mask, candidates)
        found.append(
            [read, *torch.autograd.grad(read.square().sum(), list(attention.parameters()))]
        )
    for plain, mixed in zip(*found, strict=True):
        torch.testing.assert_close(mixed, plain)


def test_a_long_history_does_not_drown_the_events_like_a_candidate() -> None:
    """However sure the network is of every event, its read does not grow with their number; what one
    event of the candidate's own item adds does not shrink with it.
    """
    torch.manual_seed(0)
    attention = TargetAttention(WIDTH, 12)
    torch.nn.init.ones_(attention.out.bias)
    candidate = torch.nn.functional.one_hot(torch.tensor([[0]]), WIDTH).float()
    other = torch.nn.functional.one_hot(torch.tensor([1]), WIDTH).float()
    added = []
    with torch.inference_mode():
        for number in (10, 1000):
            rows = torch.ones(1, number, WIDTH)
            mask = torch.ones(1, number, dtype=torch.bool)
            items = other.expand(1, number, -1).clone()
            without = attention(rows, items, mask, candidate)
            torch.testing.assert_close(without[0, 0], torch.ones(WIDTH), atol=1e-4, rtol=0)
            items[:, 0] = candidate[0, 0]
            added.append(attention(rows, items, mask, candidate) - without)
    torch.testing.assert_close(*added, atol=1e-4, rtol=0)
    # A mean of one like event and as much of nothing, and log(1 + 1) of how many there are
    expected = 0.5 + torch.log(torch.tensor(2.0)) * attention.sum
    torch.testing.assert_close(added[0][0, 0], expected, atol=1e-4, rtol=0)


def test_one_category_slot_is_read_as_several_with_the_rest_empty() -> None:
    sizes = GroupSizes((7, 7), (1, 3))
    one, several = tables = CategorySlots(sizes, WIDTH).tables
    for table in tables:
        torch.nn.init.normal_(table.weight, std=0.05)
    several.weight = one.weight
    slots = CategorySlots(sizes, WIDTH)
    slots.tables = tables
    with torch.no_grad():
        one.weight[0] = 0
    values = torch.tensor([0, 1, 6])
    alone, padded = slots(torch.stack([values, values, values * 0, values * 0], dim=-1)[None])
    torch.testing.assert_close(alone, padded)


def test_dot_interaction_takes_every_pair_once() -> None:
    request, candidate = tokens(3, 2)
    within, across = DotInteraction(3, 2)(request, candidate)
    for b in range(2):
        for c in range(3):
            fields = torch.cat([request[b], candidate[b, c]])
            pairs = sorted(float(fields[i] @ fields[j]) for i in range(5) for j in range(i))
            found = sorted([*within[b].tolist(), *across[b, c].tolist()])
            torch.testing.assert_close(
                torch.tensor(found), torch.tensor(pairs), atol=1e-5, rtol=1e-5
            )


def test_cross_layers_are_x0_times_wx_plus_b_plus_x() -> None:
    for rank in (0, 4):
        made = dcnv2.CrossAndDeep(
            2, 2, dcnv2.Config(width=WIDTH, num_layers=3, rank=rank, hidden=5)
        )
        request, candidate = tokens(2, 2)
        out = made(request, candidate)[1][..., : 4 * WIDTH]
        for b in range(2):
            for c in range(3):
                start = torch.cat([request[b], candidate[b, c]]).flatten()
                first = made.cross.first(
                    request[b : b + 1].flatten(1), candidate[b : b + 1, c : c + 1].flatten(2)
                )[0, 0]
                crossed = (
                    start * (first if made.cross.first_up is None else made.cross.first_up(first))
                    + start
                )
                for cross in made.cross.crosses:
                    crossed = start * cross(crossed) + crossed
                torch.testing.assert_close(out[b, c], crossed, atol=1e-5, rtol=1e-5)


def test_token_mixing_gives_token_h_head_h_of_every_token() -> None:
    config = rankmixer.Config(width=WIDTH, num_tokens=4, mixed_width=8, num_layers=1)
    made = rankmixer.Mixer(2 * WIDTH, WIDTH, config)
    made.norms[1] = torch.nn.Identity()
    made.networks[0] = Nothing()
    seen: list[torch.Tensor] = []
    made.norms[0].register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    request, candidate = tokens(2, 1)
    made(request, candidate)
    rows = made.split(request.flatten(1), candidate.flatten(2)).unflatten(-1, (4, 8))
    for head in range(4):
        mixed = torch.cat([rows[0, 0, token, 2 * head : 2 * head + 2] for token in range(4)])
        torch.testing.assert_close(seen[0][0, 0, head], mixed + rows[0, 0, head])


class Nothing(torch.nn.Module):
    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(rows)


def test_autoint_does_not_scale_its_scores() -> None:
    config = autoint.Config(width=WIDTH, num_layers=1, num_heads=1)
    made = autoint.FieldAttention(5, config)
    request, candidate = tokens(3, 2)
    rows = torch.cat([request[0], candidate[0, 0]])
    query, key, value, residual = (rows @ part.T for part in made.layers[0].weight.chunk(4))
    expected = torch.relu((query @ key.T).softmax(-1) @ value + residual)
    torch.testing.assert_close(
        made(request, candidate)[1][0, 0], expected.flatten(), atol=1e-5, rtol=1e-5
    )


def test_wukong_crosses_and_compresses_side_by_side() -> None:
    config = wukong.Config(width=WIDTH, fm_tokens=3, linear_tokens=2, fm_rank=4, hidden=10)
    layer = wukong.Layer(5, config)
    rows = torch.randn(1, 1, 5, WIDTH)
    crossed = (rows[0, 0] @ rows[0, 0].T @ layer.project).flatten()
    interacted = torch.relu(layer.machine(crossed)).view(3, WIDTH)
    joined = (
        torch.cat([interacted, layer.compress @ rows[0, 0]]) + rows[0, 0]
    )  # as many tokens: residual as it is
    assert layer.residual is None
    torch.testing.assert_close(layer(rows)[0, 0], layer.norm(joined), atol=1e-5, rtol=1e-5)
    assert wukong.Layer(9, config)(torch.randn(2, 3, 9, WIDTH)).shape == (2, 3, 5, WIDTH)


@pytest.mark.parametrize("search", ["category", "score"])
def test_two_stage_attends_to_what_plain_search_finds(search: str) -> None:
    """And to nothing else: an event that was not found changes no score."""
    torch.manual_seed(0)
    sizes = FeatureSizes(
        items=30,
        actions=1,
        history_length=40,
        candidate=GroupSizes((5,), (1,)),
        item=GroupSizes((5,), (1,)),
    )
    config = {"width": 16, "rank": 8, "search": search, "retrieved": 4}
    model = models.build("two_stage", config, sizes).eval()
    assert isinstance(model, TwoStage)
    categories = torch.randint(0, 5, (30, 1))
    categories[0] = 0
    nothing = torch.zeros(1, 0)
    model.fit_statistics(TrainingSample(nothing, nothing, nothing, categories))
    user = _some_user(25)
    some = Candidates(
        item_BC=torch.arange(1, 9)[None],
        category_BCK=categories[1:9][None],
        dense_BCF=torch.zeros(1, 8, 0),
        mask_BC=torch.ones(1, 8, dtype=torch.bool),
    )
    state = model.encode_user(user)
    tokens = model.features.candidates(some)[:, :, 0]
    scores = model.query(tokens) @ state.keys_BLD.transpose(1, 2) / 4
    found = model._search(scores, state, some)[0]
    for candidate in range(8):
        plain = plain_search(
            model, scores[0, candidate], state.category_BL[0], int(categories[candidate + 1])
        )
        assert torch.nonzero(found[candidate])[:, 0].tolist() == plain


def test_a_full_segments_tokens_do_not_change_with_newer_events() -> None:
    """So that they can be kept: PerSRec's segments count from the oldest event."""
    torch.manual_seed(0)
    sizes = FeatureSizes(items=30, actions=1, history_length=40)
    config = {"width": 16, "rank": 8, "segment": 4, "num_tokens": 2, "recent": 5}
    model = models.build("persrec", config, sizes).eval()
    assert isinstance(model, PerSRec)
    user = _some_user(25)
    of_all = model.encode_user(user)
    before = model.encode_user(user.events(0, 20))
    kept = (20 - 5) // 4 * 2  # three full segments
    for layer in range(2):
        torch.testing.assert_close(of_all.keys[layer][:, :, :kept], before.keys[layer][:, :, :kept])
    assert of_all.mask_BL.sum() == 25 // 5 * 2 + 5


def _some_user(length: int) -> UserInputs:
    """A user of so many events of thirty items."""
    items = torch.randint(1, 30, (1, length))
    return UserInputs(
        item_BL=items,
        action_BL=torch.zeros_like(items),
        age_BL=torch.rand(1, length),
        gap_BL=torch.rand(1, length),
        event_BLE=torch.zeros(1, length, 0),
        mask_BL=torch.ones(1, length, dtype=torch.bool),
        field_BU=torch.zeros(1, 0, dtype=torch.long),
        dense_BG=torch.zeros(1, 0),
    )
