"""Facts of the paper (arXiv 2412.06924) that the implementation must show, beyond the shared invariants."""

from __future__ import annotations

import torch
from torch.utils.flop_counter import FlopCounterMode

from modeling import models
from modeling.batch import Batch, Candidates, FeatureSizes, UserInputs
from modeling.models import amortised_dlrm

SIZES = FeatureSizes(
    items=50, actions=2, event_features=1, user_fields=(3,), categories=(), slots=(), dense=3, history_length=64
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
        torch.randint(1, 50, (1, number)), torch.zeros(1, number, 0).long(), torch.rand(1, number, 3), mask
    )


def model(**config: object) -> models.Ranker:
    torch.manual_seed(1)
    return models.build(
        "amortised_dlrm", {"width": 32, "num_layers": 2, "num_heads": 4, "dropout": 0.0, **config}, SIZES
    ).eval()


def test_history_states_are_bitwise_equal_with_and_without_candidates() -> None:
    made = model()
    user, some = world(20, 30)
    with torch.inference_mode():
        before = made.encode_user(user)
        kept = [tensor.clone() for tensor in (*before.keys, *before.values)]
        made.score(before, some)
        after = made.encode_user(user)
    for one, two, three in zip(kept, (*before.keys, *before.values), (*after.keys, *after.values), strict=True):
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
