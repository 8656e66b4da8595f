"""On an accelerator a model gives what it gives on the CPU, and a step waits for nothing: run on a device that
does not exist (`tests/elsewhere.py`), every read of a number by the host is caught.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from modeling.errors import DeviceError
from modeling.inputs.batch import Candidates, UserInputs
from modeling.layers import host
from modeling.layers.codes import ItemCodes
from modeling.layers.host import at_most, device_named, maybe_any, surely_all
from modeling.layers.per_token import PerTokenLinear
from modeling.training.optimizers import clip_gradients
from tests.elsewhere import ELSEWHERE, elsewhere
from tests.modeling import test_invariants as worlds

# Trees are walked on the host; sequence models pack their rows by length there, which `encode_user` alone has to ask for.
WAIT = ("trees", "blend", "sasrec", "bert4rec", "hydrarec", "hydrarec_bidirectional", "hstu")


def waits_by_design(name: str) -> bool:
    return name in WAIT or name.startswith("blend")


@pytest.mark.parametrize("name", list(worlds.CONFIGS))
def test_a_step_gives_the_same_and_waits_for_nothing(name: str) -> None:
    model = worlds.make(name)
    user = worlds.user_inputs([9, 5], 1)
    some = worlds.candidates(2, 4, 1)
    here = model.score(model.encode_user(user), some)
    if here.requires_grad:
        here.sum().backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    with elsewhere() as device:
        model = worlds.make(name).to(ELSEWHERE)
        user, some = user.to(ELSEWHERE), some.to(ELSEWHERE)
        device.waits.clear()
        scores = model.score(model.encode_user(user), some)
        if scores.requires_grad:
            scores.sum().backward()
        far_grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        if far_grads:
            clip_gradients(model, 1.0)
        waits = device.waits.copy()
        for parameter, grad in zip(
            (p for p in model.parameters() if p.grad is not None), far_grads, strict=True
        ):
            parameter.grad = grad
        far = {n: p.grad.cpu() for n, p in model.named_parameters() if p.grad is not None}
        assert scores.device.type == ELSEWHERE
        scores = scores.detach().cpu()
    torch.testing.assert_close(scores, here.detach(), rtol=1e-4, atol=1e-5)
    assert set(far) == set(grads)
    for parameter, grad in grads.items():
        torch.testing.assert_close(far[parameter], grad, rtol=1e-3, atol=1e-4)
    assert waits_by_design(name) or not waits


@pytest.mark.parametrize("name", [name for name in worlds.CONFIGS if name.endswith("extendable")])
def test_a_state_is_extended_elsewhere(name: str) -> None:
    model = worlds.make(name)
    user = worlds.user_inputs([9], 1)
    some = worlds.candidates(1, 4, 1)
    with torch.no_grad():
        here = model.score(model.encode_user(user), some)
        with elsewhere():
            model = model.to(ELSEWHERE)
            far = user.to(ELSEWHERE)
            state = model.extend_user(model.encode_user(far.events(0, 7)), far.events(7, 9))
            scores = model.score(state, some.to(ELSEWHERE)).cpu()
    torch.testing.assert_close(scores, here, rtol=1e-4, atol=1e-5)


# The five systems, and what others read a history by
COMPILED = (
    "hiformer",
    "amortised_dlrm",
    "vista",
    "vista_extendable",
    "ranker_hydrarec_extendable",
    "onetrans_extendable",
    "baseline_din",
)


@pytest.mark.parametrize("name", COMPILED)
def test_a_forward_is_one_graph(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the ways that an accelerator takes, walked here: `fullgraph` refuses whatever would break it."""
    monkeypatch.setattr(host, "HOST", "nowhere")
    model = worlds.make(name)
    user, some = worlds.user_inputs([9, 5], 1), worlds.candidates(2, 4, 1)

    def forward(user: UserInputs, some: Candidates) -> Tensor:
        scores: Tensor = model.score(model.encode_user(user), some)
        return scores

    torch._dynamo.reset()
    whole = torch.compile(forward, backend="eager", fullgraph=True)(user, some)
    torch.testing.assert_close(whole, forward(user, some), rtol=1e-4, atol=1e-5)


def test_a_wait_is_caught() -> None:
    """Else the tests above say nothing."""
    for ask in (
        lambda rows: bool((rows > 0).all()),
        lambda rows: rows.sum().item(),
        lambda rows: rows.cpu(),
        lambda rows: rows + torch.ones(3).to(ELSEWHERE),
        lambda rows: rows[rows > 0],
        lambda rows: rows.masked_select(rows > 0),
        lambda rows: rows.unique_consecutive(),
    ):
        with elsewhere() as device:
            rows = torch.ones(3).to(ELSEWHERE)
            device.waits.clear()
            ask(rows)
            assert device.waits
    with elsewhere(), pytest.raises(RuntimeError, match="are not"):
        torch.ones(3).to(ELSEWHERE) + torch.ones(3)


def test_the_host_knows_on_the_cpu_and_is_cautious_elsewhere() -> None:
    some = torch.tensor([True, False])
    assert (surely_all(some), surely_all(some[:1])) == (False, True)
    assert (maybe_any(some), maybe_any(some[1:])) == (True, False)
    assert at_most(torch.tensor([3, 5]), 9) == 5
    with elsewhere():
        assert not surely_all(some[:1].to(ELSEWHERE))
        assert maybe_any(some[1:].to(ELSEWHERE))
        assert at_most(torch.tensor([3, 5]).to(ELSEWHERE), 9) == 9


def test_a_device_that_is_not_here_is_refused() -> None:
    assert device_named("cpu") == torch.device("cpu")
    for name in ("gpu", "cuda:7", ""):
        with pytest.raises(DeviceError, match="cannot be used here"):
            device_named(name)


def test_the_ways_that_wait_for_nothing_give_the_same() -> None:
    """What an accelerator runs instead, run here beside what the CPU runs."""
    torch.manual_seed(0)
    layer = PerTokenLinear(3, 4, 5, bias=True)
    rows, which = torch.randn(2, 6, 4), torch.randint(0, 3, (2, 6))
    torch.testing.assert_close(layer._chosen_of_all(rows, which), layer.chosen(rows, which))
    codes = ItemCodes(worlds.SIZES, 8)
    items = torch.randint(0, worlds.SIZES.items, (2, 7))
    each, different = codes._of_each(items), codes.of_events(items)
    torch.testing.assert_close(each.codes_UW[each.which_BL], different.codes_UW[different.which_BL])
