"""Facts of the paper (arXiv 2412.06924) that the implementation must show, beyond the shared
invariants.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch.utils.flop_counter import FlopCounterMode

from modeling import models
from modeling.inputs.batch import Batch, Candidates, FeatureSizes, UserInputs
from modeling.inputs.columns import GroupSizes
from modeling.models import amortised_dlrm

SIZES = FeatureSizes(
    items=50,
    actions=2,
    history_length=64,
    request=GroupSizes((3,), (1,)),
    candidate=GroupSizes(numbers=3),
    event=GroupSizes(numbers=1),
)


def world(length: int, number: int) -> tuple[UserInputs, Candidates]:
    torch.manual_seed(0)
    user = UserInputs(
        item_BL=torch.randint(1, 50, (1, length)),
        action_BL=torch.randint(0, 2, (1, length)),
        age_BL=torch.rand(1, length),
        gap_BL=torch.rand(1, length),
        event_BLE=torch.rand(1, length, 1),
        mask_BL=torch.ones(1, length, dtype=torch.bool),
        field_BU=torch.zeros(1, 1, dtype=torch.long),
        dense_BG=torch.zeros(1, 0),
    )
    mask = torch.ones(1, number, dtype=torch.bool)
    return user, Candidates(
        torch.randint(1, 50, (1, number)),
        torch.zeros(1, number, 0).long(),
        torch.rand(1, number, 3),
        mask,
    )


def model(**config: object) -> models.Ranker:
    torch.manual_seed(1)
    return models.build(
        "amortised_dlrm",
        {"width": 32, "num_layers": 2, "num_heads": 4, "dropout": 0.0, **config},
        SIZES,
    ).eval()


def test_history_states_are_bitwise_equal_with_and_without_candidates() -> None:
    made = model()
    user, some = world(20, 30)
    with torch.inference_mode():
        before = made.encode_user(user)
        kept = [tensor.clone() for tensor in (*before.keys, *before.values)]
        made.score(before, some)
        after = made.encode_user(user)
    for one, two, three in zip(
        kept, (*before.keys, *before.values), (*after.keys, *after.values), strict=True
    ):
        assert torch.equal(one, two)
        assert torch.equal(one, three)


def test_no_gradient_reaches_keys_and_values_through_a_candidate_row() -> None:
    """Cross-attention: with an empty history, W_k and W_v are not used at all by candidates."""
    made = model()
    user, some = world(5, 4)
    empty = UserInputs(
        *(
            getattr(user, name) if name != "mask_BL" else torch.zeros(1, 5, dtype=torch.bool)
            for name in user.__dataclass_fields__
        )
    )
    made(Batch(empty, some, torch.zeros(1))).sum().backward()
    for layer in made.layers:  # type: ignore[union-attr]
        gradient = layer.key_value.weight.grad
        assert gradient is None or float(gradient.abs().max()) == 0.0
    made.zero_grad()
    made(Batch(user, some, torch.zeros(1))).sum().backward()
    assert float(made.layers[0].key_value.weight.grad.abs().max()) > 0  # type: ignore[index, union-attr]


def flops(made: models.Ranker, user: UserInputs, some: Candidates) -> int:
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        made(Batch(user, some, torch.zeros(1)))
    return counter.get_total_flops()


def test_the_saving_grows_with_history_and_with_candidates() -> None:
    made = model()

    def saving(length: int, number: int) -> float:
        user, some = world(length, number)
        return number * flops(made, user, some.select(slice(0, 1))) / flops(made, user, some)

    assert saving(32, 16) > saving(8, 16)
    assert saving(32, 64) > saving(32, 16) > 4


def test_causal_states_do_not_see_later_events() -> None:
    made = model(causal=True, positions="from_oldest")
    user, _ = world(12, 1)
    with torch.inference_mode():
        whole, cut = made.encode_user(user), made.encode_user(user.events(0, 7))
    for one, two in zip(whole.keys, cut.keys, strict=True):
        torch.testing.assert_close(one[:, :, :7], two, atol=1e-6, rtol=1e-6)


def test_an_unknown_config_value_is_named() -> None:
    import pytest

    with pytest.raises(ValueError, match="widht"):
        models.build("amortised_dlrm", {"widht": 3}, SIZES)
    with pytest.raises(ValueError, match="no multiple"):
        models.build("amortised_dlrm", {"width": 10, "num_heads": 4}, SIZES)
    with pytest.raises(ValueError, match="no model"):
        models.build("gpt", {}, SIZES)
    assert amortised_dlrm.Config().width == 64


def fused(fusion: str, **config: object) -> models.Ranker:
    made = model(fusion=fusion, **config)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return made


def scores(made: models.Ranker, user: UserInputs, some: Candidates) -> torch.Tensor:
    with torch.inference_mode():
        return made(Batch(user, some, torch.zeros(1)))


def test_a_candidate_that_attends_to_itself_uses_its_own_key() -> None:
    """Self-attention: even with an empty history W_k and W_v have gradients, unlike
    cross-attention's.
    """
    made = model(fusion="append_self")
    user, some = world(5, 4)
    empty = replace(user, mask_BL=torch.zeros(1, 5, dtype=torch.bool))
    made(Batch(empty, some, torch.zeros(1))).sum().backward()
    assert float(made.layers[0].key_value.weight.grad.abs().max()) > 0  # type: ignore[index, union-attr]


def test_plain_self_attention_with_a_causal_history_is_the_amortised_one() -> None:
    """A causal history never reads the candidate behind it; a bidirectional one does, which is why
    it cannot be shared.
    """
    user, some = world(9, 4)
    plain, shared = fused("append_self_plain", causal=True), fused("append_self", causal=True)
    shared.load_state_dict(plain.state_dict())
    torch.testing.assert_close(
        scores(plain, user, some), scores(shared, user, some), atol=1e-5, rtol=1e-5
    )
    plain, shared = fused("append_self_plain"), fused("append_self")
    shared.load_state_dict(plain.state_dict())
    assert float((scores(plain, user, some) - scores(shared, user, some)).abs().max()) > 1e-3


def test_cross_attention_differs_from_self_attention_by_the_candidates_own_key() -> None:
    user, some = world(9, 4)
    cross, own = fused("append_cross"), fused("append_self")
    own.load_state_dict(cross.state_dict())
    assert float((scores(cross, user, some) - scores(own, user, some)).abs().max()) > 1e-3


def test_concat_without_its_candidate_half_reads_the_same_for_every_candidate() -> None:
    user, _ = world(9, 4)
    made = fused("concat")
    assert isinstance(made, amortised_dlrm.AmortisedDLRM)
    with torch.inference_mode():
        state = made.encode_user(user)
        rows = torch.randn(1, 4, 32)
        assert float(made._concatenated(state, rows).std(1).max()) > 1e-3
        made.join_candidate.weight.zero_()
        read = made._concatenated(state, rows)
        torch.testing.assert_close(read, read[:, :1].expand_as(read))


def test_concat_pools_the_newest_rows_and_the_maximum() -> None:
    made = fused("concat", num_layers=1)
    assert isinstance(made, amortised_dlrm.AmortisedDLRM)
    user, _ = world(12, 1)
    seen: list[torch.Tensor] = []
    made.pool.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    layer = made.layers[0]
    outputs: list[torch.Tensor] = []
    layer.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    with torch.inference_mode():
        made._concatenated(made.encode_user(user), torch.randn(1, 1, 32))
    newest = outputs[0][0].flip(0)[: amortised_dlrm.NEWEST].flatten()
    torch.testing.assert_close(seen[0][0], torch.cat([newest, outputs[0][0].amax(0)]))


def test_only_amortised_fusions_cost_the_same_history_for_any_number_of_candidates() -> None:
    user, some = world(64, 8)
    for fusion, limit in (
        ("append_cross", 2.5),
        ("append_self", 2.5),
        ("concat", 9),
        ("append_self_plain", 9),
    ):
        made = model(fusion=fusion)
        ratio = flops(made, user, some) / flops(made, user, some.select(slice(0, 1)))
        assert ratio < limit
        if limit == 9:
            assert ratio > 6
