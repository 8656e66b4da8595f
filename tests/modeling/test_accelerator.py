"""On an accelerator a forward waits for nothing: run on a device that does not exist, under fake tensors, every read of
a number by the host is caught.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode

from modeling.layers.codes import ItemCodes
from modeling.layers.host import at_most, maybe_any, surely_all
from modeling.layers.per_token import PerTokenLinear
from tests.modeling import test_invariants as worlds

DEVICE = "nowhere"
# What makes the host wait for a number, or for a size that follows from numbers
WAITS = ("_local_scalar_dense", "nonzero", "_unique2", "masked_select", "bincount")
# Trees are walked on the host; sequence models pack their rows by length there, which `encode_user` alone has to ask for.
EXCEPTIONS = ("trees", "blend", "sasrec", "bert4rec", "hydrarec", "hydrarec_bidirectional", "hstu")
NAMES = [name for name in worlds.CONFIGS if name not in EXCEPTIONS and not name.startswith("blend")]


class _Module(backend_registration._DummyBackendModule):
    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.float16, torch.bfloat16]


@pytest.fixture(scope="module")
def device() -> str:
    """A device without memory or kernels."""
    if torch._C._get_privateuse1_backend_name() != DEVICE:
        backend_registration._setup_privateuseone_for_python_backend(
            DEVICE, backend_module=_Module()
        )
    return DEVICE


class Waits(TorchDispatchMode):
    """Counts what makes the host wait, and lets a forward go on behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.name().removeprefix("aten::").partition(".")[0]
        there = any(isinstance(a, Tensor) and a.device.type == DEVICE for a in args)
        to = kwargs.get("device")
        copied = (
            name == "_to_copy" and to is not None and (torch.device(to).type == DEVICE) != there
        )
        if (there and name in WAITS) or copied:
            self.found[name] += 1
        if there and name == "_local_scalar_dense":
            return args[0].dtype.is_floating_point or 1
        return func(*args, **kwargs)


def moved(held: Any) -> Any:
    """The same shapes on the device."""
    if isinstance(held, Tensor):
        return torch.empty_strided(held.shape, held.stride(), dtype=held.dtype, device=DEVICE)
    if dataclasses.is_dataclass(held):
        names = [field.name for field in dataclasses.fields(held)]
        return dataclasses.replace(held, **{name: moved(getattr(held, name)) for name in names})  # type: ignore[type-var]
    return held


def move(model: nn.Module) -> None:
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(moved(parameter.detach()))
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = moved(buffer)


@pytest.mark.parametrize("name", NAMES)
def test_a_forward_waits_for_nothing(name: str, device: str) -> None:
    model = worlds.make(name)
    user = worlds.user_inputs([9, 5], 1)
    some = worlds.candidates(2, 4, 1)
    waits = Waits()
    with FakeTensorMode(allow_non_fake_inputs=True):
        move(model)
        user, some = moved(user), moved(some)
        with waits:
            scores = model.score(model.encode_user(user), some)
            scores.sum().backward()
    assert scores.device.type == device
    assert scores.shape[:2] == (2, 4)
    assert not waits.found


def test_a_wait_is_caught(device: str) -> None:
    """Else the test above says nothing."""
    for ask in (
        lambda rows: bool((rows > 0).all()),
        lambda rows: rows.sum().item(),
        lambda rows: rows.cpu(),
        lambda rows: rows + torch.ones(3).to(device),
    ):
        waits = Waits()
        with FakeTensorMode(allow_non_fake_inputs=True):
            rows = torch.empty(3, device=device)
            with waits:
                ask(rows)
        assert waits.found


def test_the_host_knows_on_the_cpu_and_is_cautious_elsewhere(device: str) -> None:
    some = torch.tensor([True, False])
    assert (surely_all(some), surely_all(some[:1])) == (False, True)
    assert (maybe_any(some), maybe_any(some[1:])) == (True, False)
    assert at_most(torch.tensor([3, 5]), 9) == 5
    with FakeTensorMode(allow_non_fake_inputs=True):
        far = torch.empty(2, dtype=torch.bool, device=device)
        assert not surely_all(far)
        assert maybe_any(far)
        assert at_most(torch.empty(2, dtype=torch.int64, device=device), 9) == 9


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
