"""Rankers that read another model's summary tokens beside their own events."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from modeling import models
from modeling.inputs.batch import Batch, UserInputs
from modeling.models.base import Ranker
from tests.modeling.test_invariants import SIZES, candidates, user_inputs

WITH_TOKENS = replace(SIZES, tokens=(3, 5))
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "amortised": ("amortised_dlrm", {"width": 16, "bags": True, "interaction": "cross"}),
    "amortised_extendable": (
        "amortised_dlrm",
        {"width": 16, "causal": True, "positions": "from_oldest"},
    ),
    "onetrans_extendable": ("onetrans", {"width": 16, "num_layers": 2, "pyramid": False}),
    "onetrans": ("onetrans", {"width": 16, "num_layers": 2, "merge": "timestamp_agnostic"}),
    "vista_stage_2": (
        "vista",
        {"width": 16, "num_seeds": 4, "stored": True, "reconstruction": 0.0},
    ),
}


def build(name: str) -> Ranker:
    torch.manual_seed(0)
    model, config = CASES[name]
    made = models.build(model, config, WITH_TOKENS)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return made.eval()


def users(lengths: list[int], seed: int = 0, has: list[bool] | None = None) -> UserInputs:
    torch.manual_seed(seed)
    tokens = torch.randn(len(lengths), 3, 5)
    known = torch.tensor([True] * len(lengths) if has is None else has)
    return replace(user_inputs(lengths, seed), tokens_BSX=tokens, has_tokens_B=known)


@pytest.mark.parametrize("name", CASES)
@torch.inference_mode()
def test_tokens_change_scores_and_missing_ones_are_nobodys(name: str) -> None:
    model, chosen = build(name), candidates(2, 6, 1)
    user = users([7, 4])
    score = model.score(model.encode_user(user), chosen)
    assert user.tokens_BSX is not None
    other = replace(user, tokens_BSX=user.tokens_BSX + 1)
    assert (model.score(model.encode_user(other), chosen) - score).abs().max() > 1e-4
    missing = [
        model.score(model.encode_user(replace(u, has_tokens_B=torch.tensor([True, False]))), chosen)
        for u in (user, other)
    ]
    torch.testing.assert_close(
        missing[0][1], missing[1][1]
    )  # what stands there for a user without tokens is not read
    torch.testing.assert_close(missing[0][0], score[0])


@pytest.mark.parametrize("name", CASES)
@torch.inference_mode()
def test_one_candidate_at_a_time_gives_the_same_scores(name: str) -> None:
    model, chosen, user = build(name), candidates(2, 5, 2), users([9, 2], 3, [True, False])
    whole = model(Batch(user, chosen, torch.zeros(2, 5, SIZES.tasks)))
    for index in range(5):
        one = Batch(user, chosen.select(slice(index, index + 1)), torch.zeros(2, 1, SIZES.tasks))
        torch.testing.assert_close(model(one)[:, 0], whole[:, index], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", [name for name in CASES if name.endswith("extendable")])
@torch.inference_mode()
def test_extended_states_score_as_recomputed_ones(name: str) -> None:
    model, chosen, user = build(name), candidates(1, 4, 4), users([10], 5)
    state = model.extend_user(model.encode_user(user.events(0, 7)), user.events(7, 10))
    torch.testing.assert_close(
        model.score(state, chosen),
        model.score(model.encode_user(user), chosen),
        atol=1e-5,
        rtol=1e-5,
    )


def test_a_batch_without_tokens_is_refused() -> None:
    with pytest.raises(ValueError, match="reads stored summary tokens of shape"):
        build("amortised").encode_user(user_inputs([3], 0))
    with pytest.raises(ValueError, match="reads no stored summary tokens"):
        models.build("amortised_dlrm", {"width": 16, "fusion": "concat"}, WITH_TOKENS)


def test_no_gradient_goes_to_whoever_made_the_tokens() -> None:
    model, user = build("vista_stage_2"), users([3])
    assert user.tokens_BSX is not None
    assert not user.tokens_BSX.requires_grad
    logits, further = model.training_forward(
        Batch(user, candidates(1, 2, 0), torch.zeros(1, 2, SIZES.tasks))
    )
    assert further is None
    logits.sum().backward()
    trained = {
        name
        for name, p in model.named_parameters()
        if p.grad is not None and p.grad.abs().sum() > 0
    }
    assert any(name.startswith("stored.project") for name in trained)
