"""Sequence models: packed rows equal sequences alone, and streaming equals training."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import pad, silu

from modeling import models
from modeling.inputs.batch import FeatureSizes, UserInputs
from modeling.layers.block import Place
from modeling.layers.packing import MAX_WASTE, SMALL_GROUP, Packing
from modeling.models.hstu import HSTULayer
from modeling.models.sequence import PackedEvents, SequenceRanker, gap_bucket

TOLERANCE = 1e-5
SIZES = FeatureSizes(31, 1, 20)
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "sasrec": ("sasrec", {"num_heads": 2}),
    "sasrec gated": ("sasrec", {"gated": True, "activation": "swiglu", "expansion": 2}),
    "bert4rec": ("bert4rec", {}),
    "hydrarec": ("hydrarec", {}),
    "hydrarec bidirectional": ("hydrarec", {"causal": False, "mixed_scale": "count"}),
    "hydrarec bidirectional decayed": (
        "hydrarec",
        {"causal": False, "operators": ("decayed_hydra",)},
    ),
    "hydrarec hybrid": ("hydrarec", {"operators": ("softmax", "decayed_hydra")}),
    "linrec": ("linrec", {"num_heads": 4}),
    "hstu": ("hstu", {"time_bias": True}),
}
STREAMING: dict[str, tuple[str, dict[str, Any]]] = {
    "hydra": ("hydrarec", {"positions": "none"}),
    "decayed, gaps": (
        "hydrarec",
        {"operators": ("decayed_hydra", "decayed_hydra"), "positions": "none", "time_gaps": True},
    ),
    "hydra from oldest": ("hydrarec", {"positions": "from_oldest", "mixed_scale": "count"}),
    "linrec": ("linrec", {"positions": "none", "num_heads": 4}),
    "sasrec": ("sasrec", {"positions": "from_oldest", "num_heads": 2}),
    "hstu": ("hstu", {"positions": "none", "time_bias": True}),
}


def build(name: str, config: dict[str, Any], sizes: FeatureSizes = SIZES) -> SequenceRanker:
    torch.manual_seed(5)
    model = models.build(name, {"width": 16, "dropout": 0.0, **config}, sizes)
    assert isinstance(model, SequenceRanker)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def packed(lengths: list[int], seed: int) -> PackedEvents:
    generator = torch.Generator().manual_seed(seed)
    number = sum(lengths)
    items = torch.randint(1, SIZES.items, (number,), generator=generator)
    gaps = torch.rand(number, generator=generator)
    return PackedEvents(items, torch.zeros_like(items), gaps, Packing(np.array(lengths)))


def alone(events: PackedEvents, index: int) -> PackedEvents:
    cut = slice(int(events.packing.offsets[index]), int(events.packing.offsets[index + 1]))
    length = np.array([cut.stop - cut.start])
    return PackedEvents(
        events.item_N[cut], events.action_N[cut], events.gap_N[cut], Packing(length)
    )


def as_user_inputs(events: PackedEvents) -> UserInputs:
    """The same events, padded on the right."""
    width = int(events.packing.lengths.max())

    def padded(rows: Tensor) -> Tensor:
        return torch.stack(
            [
                pad(part, (0, width - len(part)))
                for part in rows.split(events.packing.lengths.tolist())
            ]
        )

    real = padded(torch.ones_like(events.item_N)).bool()
    nothing = torch.zeros(*real.shape)
    return UserInputs(
        padded(events.item_N), nothing.long(), nothing, padded(events.gap_N), nothing[..., None], real,
        torch.zeros(len(real), 0).long(), torch.zeros(len(real), 0),
    )  # fmt: skip


lengths = st.lists(st.integers(1, 20), min_size=1, max_size=5).map(
    lambda some: sorted(some, reverse=True)
)
few = settings(max_examples=25, deadline=None)


@pytest.mark.parametrize("name", CONFIGS)
@few
@given(lengths=lengths, seed=st.integers(0, 1000))
def test_packed_rows_equal_each_sequence_alone(name: str, lengths: list[int], seed: int) -> None:
    model, events = build(*CONFIGS[name]), packed(lengths, seed)
    with torch.inference_mode():
        together, vectors = model.encode(events), model.encode_histories(events)
        for index in range(len(lengths)):
            one = alone(events, index)
            cut = slice(int(events.packing.offsets[index]), int(events.packing.offsets[index + 1]))
            torch.testing.assert_close(
                together[cut], model.encode(one), atol=TOLERANCE, rtol=TOLERANCE
            )
            torch.testing.assert_close(
                vectors[index : index + 1],
                model.encode_histories(one),
                atol=TOLERANCE,
                rtol=TOLERANCE,
            )


@pytest.mark.parametrize(
    "name", [name for name, (_, config) in CONFIGS.items() if build(*CONFIGS[name]).config.causal]
)
def test_a_causal_row_knows_nothing_of_later_events(name: str) -> None:
    """Without positions from the newest event, which count what comes later by design."""
    model_name, config = CONFIGS[name]
    model, events = build(model_name, {**config, "positions": "from_oldest"}), packed([20], 1)
    later = events.item_N.clone()
    later[13:] = 3
    with torch.inference_mode():
        before = model.encode(events)
        after = model.encode(PackedEvents(later, events.action_N, events.gap_N, events.packing))
    torch.testing.assert_close(after[:13], before[:13], atol=1e-6, rtol=1e-6)
    assert (after[13:] - before[13:]).abs().max() > 1e-3


def test_a_bidirectional_row_reads_both_ways() -> None:
    model, events = build(*CONFIGS["bert4rec"]), packed([20], 1)
    later = events.item_N.clone()
    later[13:] = 3
    with torch.inference_mode():
        changed = model.encode(PackedEvents(later, events.action_N, events.gap_N, events.packing))
        assert (changed[:13] - model.encode(events)[:13]).abs().max() > 1e-3


@pytest.mark.parametrize("name", [*CONFIGS, *STREAMING])
@few
@given(lengths=lengths, seed=st.integers(0, 1000))
def test_serving_reads_what_training_trained(name: str, lengths: list[int], seed: int) -> None:
    """`encode_user` on padded inputs (streaming where the model streams) equals the packed rows of
    training.
    """
    model, events = build(*(CONFIGS | STREAMING)[name]), packed(lengths, seed)
    with torch.inference_mode():
        served = model.encode_user(as_user_inputs(events)).history_BD
        torch.testing.assert_close(
            served, model.encode_histories(events), atol=TOLERANCE, rtol=TOLERANCE
        )


@pytest.mark.parametrize("name", STREAMING)
def test_event_by_event_equals_the_whole_history(name: str) -> None:
    """Fact 4 of the Hydra digest."""
    model, events = build(*STREAMING[name]), packed([20, 20], 3)
    user = as_user_inputs(events)
    with torch.inference_mode():
        state = model.encode_user(user.events(0, 1))
        for event in range(1, 20):
            state = model.extend_user(state, user.events(event, event + 1))
        torch.testing.assert_close(
            state.history_BD, model.encode_histories(events), atol=TOLERANCE, rtol=TOLERANCE
        )


def test_hydrarec_state_is_one_vector_a_layer() -> None:
    model = build(*STREAMING["hydra"])
    for length in (1, 20):
        state = model.encode_user(as_user_inputs(packed([length], 0)))
        assert [[t.shape for t in layer] for layer in state.layers] == [[(1, 16)], [(1, 16)]]


def test_hstus_normaliser_does_not_depend_on_the_pass() -> None:
    """The 1/N trap: padding a batch wider, or reading the history in pieces, divides by the same
    N.
    """
    model, events = build(*STREAMING["hstu"]), packed([6], 2)
    user = as_user_inputs(events)
    wide = UserInputs(
        *(pad(t, (0, 9)) for t in (user.item_BL, user.action_BL, user.age_BL, user.gap_BL)),
        pad(user.event_BLE, (0, 0, 0, 9)),
        pad(user.mask_BL, (0, 9)),
        user.field_BU,
        user.dense_BG,
    )
    with torch.inference_mode():
        expected = model.encode_histories(events)
        torch.testing.assert_close(
            model.encode_user(wide).history_BD, expected, atol=TOLERANCE, rtol=TOLERANCE
        )
    other = build(*STREAMING["hstu"], sizes=FeatureSizes(31, 1, 40))
    other.load_state_dict({
        name: torch.cat([tensor, tensor[-1:].expand(20)]) if name.endswith("distance") else tensor
        for name, tensor in model.state_dict().items()
    })  # fmt: skip
    with torch.inference_mode():  # guard: another N is another model
        assert (other.encode_histories(events) - expected).abs().max() > 1e-4


def test_hstu_is_its_formula() -> None:
    """One layer on one sequence, written down with its T × T matrices; times over years, to the
    second.
    """
    torch.manual_seed(0)
    layer = HSTULayer(8, 2, dropout=0.0, normaliser=20, num_distances=20, time_bias=True)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    rows = torch.randn(6, 8)
    seconds = torch.tensor([0.0, 5.0, 3e7, 3e7 + 3, 2e8, 2e8 + 1], dtype=torch.float64)
    out = layer(rows, Packing(np.array([6])), Place(torch.arange(6) + 1, seconds))
    gate, value, query, key = silu(layer.gate_value_query_key(layer.norm(rows))).chunk(4, dim=-1)
    mixed = torch.zeros(6, 8)
    for head in range(2):
        cut = slice(4 * head, 4 * head + 4)
        for t in range(6):
            for s in range(t + 1):
                bucket = min(127, int(math.log(max(1.0, float(seconds[t] - seconds[s]))) / 0.301))
                score = (
                    query[t, cut] @ key[s, cut] / 2 + layer.distance[t - s] + layer.duration[bucket]
                )
                mixed[t, cut] += silu(score) / 20 * value[s, cut]
    expected = rows + layer.out(layer.mixed_norm(mixed) * gate)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)


def test_hydras_pooled_vector_knows_order_only_through_positions() -> None:
    """Fact 6: without positions the summary of a history is the same for every order; with them it
    is not.
    """
    for positions, same in (("none", True), ("from_newest", False)):
        model = build("hydrarec", {"causal": False, "positions": positions})
        events = packed([15], 4)
        order = torch.randperm(15, generator=torch.Generator().manual_seed(1))
        shuffled = PackedEvents(events.item_N[order], events.action_N, events.gap_N, events.packing)
        with torch.inference_mode():
            difference = (
                (model.encode_histories(shuffled) - model.encode_histories(events)).abs().max()
            )
        assert (difference < 1e-5) == same


def test_times_are_refused_where_they_would_leak_or_say_nothing() -> None:
    with pytest.raises(ValueError, match="would tell what was masked"):
        build("bert4rec", {"time_gaps": True})
    with pytest.raises(ValueError, match="time_bias is of 'hstu' layers"):
        build("sasrec", {"time_bias": True})


def test_hstu_refuses_other_layers() -> None:
    with pytest.raises(ValueError, match="causal 'hstu' layers only"):
        build("hstu", {"causal": False})


def test_a_width_that_heads_do_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match="no multiple of num_heads"):
        build("sasrec", {"num_heads": 3})


@pytest.mark.parametrize(
    ("seconds", "bucket"), [(0, 0), (1, 0), (2, 2), (60, 13), (86_400, 37), (1e30, 127)]
)
def test_time_gaps_are_bucketed_as_hstu_does(seconds: float, bucket: int) -> None:
    gap = torch.log1p(torch.tensor(seconds / 86_400, dtype=torch.float64))
    assert int(gap_bucket(gap)) == bucket


@few
@given(lengths=st.lists(st.integers(1, 200), min_size=1, max_size=60), seed=st.integers(0, 100))
def test_packing_wastes_little_and_loses_nothing(lengths: list[int], seed: int) -> None:
    packing = Packing(np.array(sorted(lengths, reverse=True)))
    rows = torch.randn(
        packing.num_rows, 3, generator=torch.Generator().manual_seed(seed), requires_grad=True
    )
    seen: list[Tensor] = []

    def mix(mask: Tensor | None, padded: Tensor) -> Tensor:
        seen.append(padded)
        if mask is not None:
            assert (padded[~mask] == 0).all()
        return padded * 2

    out = packing.apply(mix, rows)
    torch.testing.assert_close(out, rows * 2)
    weight = torch.randn_like(out)
    torch.testing.assert_close(torch.autograd.grad((out * weight).sum(), rows)[0], weight * 2)
    for padded, group in zip(seen, packing.groups, strict=True):
        slots = padded.shape[0] * padded.shape[1]
        assert slots <= max(SMALL_GROUP, group.rows * (1 + MAX_WASTE))


def test_packing_says_what_is_wrong_with_an_empty_sequence() -> None:
    with pytest.raises(ValueError, match="leave it out of the batch"):
        Packing(np.array([3, 0]))


def test_packing_pads_in_double_precision_too() -> None:
    packing = Packing(np.array([700, 300, 5]))
    rows = torch.randn(packing.num_rows, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda r: packing.apply(lambda _, p: p.cumsum(1), r)[::100], (rows,)
    )
