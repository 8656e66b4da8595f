"""Optimisers: what is decayed, and OneTrans's RMSProp with Adagrad."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from modeling import models
from modeling.inputs.batch import Batch
from modeling.layers import embedding
from modeling.layers.embedding import item_table
from modeling.recipes import Training
from modeling.training import optimizers
from modeling.training.optimizers import clip_gradients, optimizer_of, undecayed
from tests.modeling import test_invariants as worlds
from tests.modeling.test_invariants import SIZES


class Network(nn.Module):
    """A table and a map."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.map = nn.Embedding(5, 3), nn.Linear(3, 1)

    def loss(self, items: list[int]) -> torch.Tensor:
        """Of the items."""
        found: torch.Tensor = self.map(self.table(torch.tensor(items))).square().sum()
        return found


@pytest.mark.parametrize(
    ("name", "free", "decayed"),
    [
        (
            "onetrans",
            ["layers.0.norm.own", "layers.0.norm.shared", "final_norm.own", "event_up.bias"],
            ["layers.0.query.own.weight", "layers.0.query.shared.weight", "event_up.weight"],
        ),
        (
            "hiformer",
            ["layers.0.norm.gain", "layers.0.norm.bias"],
            ["features.item.codes.item.weight"],
        ),
        (
            "vista",
            ["stage_1.layers.0.norm.weight"],
            ["stage_1.layers.0.query.weight", "stage_1.seeds"],
        ),
    ],
)
def test_gains_and_biases_of_tokens_are_decayed_no_more_than_shared_ones(
    name: str, free: list[str], decayed: list[str]
) -> None:
    model = models.build(name, {"width": 16}, SIZES)
    kept = {id(parameter) for parameter in undecayed(model)}
    named = dict(model.named_parameters())
    assert [id(named[part]) in kept for part in free] == [True] * len(free)
    assert [id(named[part]) in kept for part in decayed] == [False] * len(decayed)
    groups = optimizer_of(model, Training(weight_decay=0.1)).parts[0].param_groups
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))


def test_rmsprop_sums_squares_and_tables_have_adagrad(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten steps by torch's optimisers equal v <- a v + g^2 and Adagrad, written out; with a decay that
    is felt in ten steps.
    """
    monkeypatch.setattr(optimizers, "RMSPROP_DECAY", 0.7)
    network, twin = Network(), Network()
    training = Training(optimizer="rmsprop_adagrad", learning_rate=0.01, weight_decay=0.0)
    optimizer = optimizer_of(network, training)
    squares = [torch.zeros_like(parameter) for parameter in twin.parameters()]
    for step in range(10):
        items, share = [step % 5, 1], 1 / (1 + step)
        optimizer.set_rate(share)
        optimizer.zero_grad()
        network.loss(items).backward()
        optimizer.step()
        gradients = torch.autograd.grad(twin.loss(items), list(twin.parameters()))
        with torch.no_grad():
            for number, (parameter, gradient) in enumerate(
                zip(twin.parameters(), gradients, strict=True)
            ):
                decay = 1.0 if number == 0 else 0.7  # the table is the first
                squares[number] = decay * squares[number] + gradient**2
                parameter -= share * 0.01 * gradient / (squares[number].sqrt() + 1e-8)
    for parameter, expected in zip(network.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(parameter, expected, rtol=1e-4, atol=1e-6)


def test_two_optimisers_go_on_from_a_kept_state() -> None:
    training = Training(optimizer="rmsprop_adagrad", learning_rate=0.01, weight_decay=0.0)
    network, other = Network(), Network()
    optimizer = optimizer_of(network, training)
    for steps in (3, 2):
        for step in range(steps):
            optimizer.zero_grad()
            network.loss([step]).backward()
            optimizer.step()
        if steps == 3:
            other.load_state_dict(network.state_dict())
            again = optimizer_of(other, training)
            again.restore(copy.deepcopy(optimizer.state()))
    for step in range(2):
        again.zero_grad()
        other.loss([step]).backward()
        again.step()
    for parameter, expected in zip(other.parameters(), network.parameters(), strict=True):
        assert torch.equal(parameter, expected)


def test_what_an_optimiser_does_not_know_is_refused() -> None:
    with pytest.raises(ValueError, match="adamw or rmsprop_adagrad, not 'adamW'"):
        optimizer_of(Network(), Training(optimizer="adamW"))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no weight decay"):
        optimizer_of(Network(), Training(optimizer="rmsprop_adagrad", weight_decay=0.1))


@pytest.fixture
def lazy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every table of items is a large one."""
    monkeypatch.setattr(embedding, "LAZY_ROWS", 0)


class Shop(nn.Module):
    """A table of items and a map."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.map = item_table(5, 3), nn.Linear(3, 1)

    def loss(self, items: list[int]) -> torch.Tensor:
        """Of the items."""
        found: torch.Tensor = self.map(self.table(torch.tensor(items))).square().sum()
        return found


@pytest.mark.parametrize("name", ["adamw", "rmsprop_adagrad"])
def test_a_step_changes_what_it_touched_of_a_large_table(name: str, lazy: None) -> None:
    network = Shop()
    training = Training(optimizer=name, learning_rate=0.1, weight_decay=0.0)  # type: ignore[arg-type]
    optimizer = optimizer_of(network, training)
    before = network.table.weight.detach().clone()
    network.loss([1, 3, 3]).backward()
    assert network.table.weight.grad is not None
    assert network.table.weight.grad.is_sparse
    optimizer.step()
    changed = (network.table.weight != before).any(1)
    assert changed.tolist() == [False, True, False, True, False]


def test_lazy_adam_is_adam_where_every_row_is_touched(monkeypatch: pytest.MonkeyPatch) -> None:
    tables = []
    for rows in (0, 1 << 20):
        monkeypatch.setattr(embedding, "LAZY_ROWS", rows)
        network = Shop()
        optimizer = optimizer_of(network, Training(weight_decay=0.0))
        for _ in range(5):
            optimizer.zero_grad()
            network.loss([0, 1, 2, 3, 4, 4]).backward()
            clip_gradients(network, 0.5)
            optimizer.step()
        assert network.table.sparse == (rows == 0)
        tables.append(network.table.weight.detach())
    torch.testing.assert_close(tables[0], tables[1], rtol=1e-5, atol=1e-6)


def test_gradients_are_clipped_alike_whether_sparse_or_not(monkeypatch: pytest.MonkeyPatch) -> None:
    grads = []
    for rows in (0, 1 << 20):
        monkeypatch.setattr(embedding, "LAZY_ROWS", rows)
        network = Shop()
        network.loss([1, 3, 3]).backward()
        network.loss([3, 4]).backward()  # a second part of the batch
        clip_gradients(network, 0.1)
        grads.append([p.grad.to_dense() for p in network.parameters() if p.grad is not None])
    for sparse, dense in zip(*grads, strict=True):
        torch.testing.assert_close(sparse, dense)
    norm = torch.cat([grad.flatten() for grad in grads[0]]).norm()
    torch.testing.assert_close(norm, torch.tensor(0.1), rtol=1e-4, atol=0)


RANKERS = [
    name
    for name, (model, _) in worlds.CONFIGS.items()
    if not name.startswith("blend")
    and model not in ("trees", "sasrec", "bert4rec", "hstu", "hydrarec", "linrec")
]


@pytest.mark.parametrize("name", RANKERS)
def test_every_ranker_trains_with_a_large_table(name: str, lazy: None) -> None:
    """None asks for the whole table, whose gradient would then be as large."""
    model = worlds.make(name).train()
    optimizer = optimizer_of(model, Training())
    some = worlds.candidates(2, 4, 1)
    batch = Batch(worlds.user_inputs([9, 5], 1), some, torch.zeros(*some.item_BC.shape, 1))
    logits, more = model.training_forward(batch)
    (logits.sum() + (0 if more is None else more)).backward()
    tables = [m for m in model.modules() if isinstance(m, nn.Embedding) and m.sparse]
    assert tables
    for table in tables:
        assert table.weight.grad is None or table.weight.grad.is_sparse
    clip_gradients(model, 1.0)
    optimizer.step()
