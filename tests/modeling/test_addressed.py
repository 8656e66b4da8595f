"""Slots that items address: sums that are exact however the events come, and tokens that say what they
held.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from feature_repo.history.envelope import KINDS, Envelope, Kind, from_bytes, to_bytes
from modeling import models
from modeling.inputs.batch import FeatureSizes, TrainingSample, UserInputs
from modeling.inputs.columns import GroupSizes
from modeling.layers.addressed import slot_memory_plain
from modeling.metrics import auc
from modeling.models.vista_addressed import FOREVER, AddressedVISTA, Config, UserState

SIZES = FeatureSizes(items=40, actions=2, history_length=64, item=GroupSizes((6, 4), (2, 1)))
CONFIG = Config(
    width=16,
    code_width=12,
    num_slots=5,
    half_lives_days=(float("inf"), 20.0, 1.0),
    num_pairs=6,
    session_days=4.0,
)


def made(seed: int = 0) -> AddressedVISTA:
    torch.manual_seed(seed)
    model = models.build("vista_addressed", CONFIG, SIZES).eval()
    assert isinstance(model, AddressedVISTA)
    generator = torch.Generator().manual_seed(seed)
    slots = [torch.randint(0, size, (40, n), generator=generator) for size, n in ((6, 2), (4, 1))]
    empty = torch.zeros(1, 0)
    model.fit_statistics(TrainingSample(empty, empty, empty, torch.cat(slots, dim=1)))
    torch.nn.init.normal_(model.stage_1.memory.action)
    return model


def history(length: int, seed: int, width: int | None = None) -> UserInputs:
    """One user's events; days between them, none before the first. A wider one has more padding."""
    rng = np.random.default_rng(seed)
    item, action = rng.integers(0, 40, (1, length)), rng.integers(0, 2, (1, length))
    gap = np.r_[0.0, rng.exponential(3.0, length)][:length].astype(np.float32)
    width = width or max(length, 1)

    def padded(values: np.ndarray) -> torch.Tensor:
        rows = torch.zeros(1, width, dtype=torch.from_numpy(values).dtype)
        rows[0, :length] = torch.from_numpy(values.reshape(-1))
        return rows

    return UserInputs(
        item_BL=padded(item),
        action_BL=padded(action),
        age_BL=torch.zeros(1, width),
        gap_BL=padded(np.log1p(gap)),
        event_BLE=torch.zeros(1, width, 0),
        mask_BL=(torch.arange(width) < length)[None],
        field_BU=torch.zeros(1, 0, dtype=torch.long),
        dense_BG=torch.zeros(1, 0),
    )


@pytest.mark.parametrize("length", [0, 1, 7, 60])
def test_sums_equal_their_plain_twin_and_padding_is_inert(length: int) -> None:
    model, user = made(), history(length, 1)
    state = model.encode_user(user)
    days = user.gap_BL[0].expm1()
    age = days.sum() - days.cumsum(0)
    codes = model.stage_1.codes(model.stage_1.codes.parts(user.item_BL))[0]
    plain = slot_memory_plain(
        model.stage_1.memory, codes[:length], user.action_BL[0, :length], age[:length]
    )
    torch.testing.assert_close(state.total_BAHW, plain.total_BAHW, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(state.mass_BAH, plain.mass_BAH, atol=1e-5, rtol=1e-4)
    assert model.stage_1.pairs is not None
    address, total = model.stage_1.pairs.address(codes), torch.zeros(6, 12)
    for at in range(1, length):
        total += torch.outer(address[at - 1], codes[at]) * 2 ** (-days[at] / 4.0)
    torch.testing.assert_close(state.pair_total_BFW[0], total, atol=1e-5, rtol=1e-4)
    padded = model.encode_user(history(length, 1, width=length + 9))
    torch.testing.assert_close(padded.tokens_BSD, state.tokens_BSD, atol=1e-5, rtol=1e-4)
    assert state.tokens_BSD.isfinite().all()


@pytest.mark.parametrize("step", [1, 7, 25])
def test_chunks_and_stored_streams_add_up_to_the_whole(step: int) -> None:
    model, user = made(), history(50, 2)
    whole = model.stage_1(user)
    torch.testing.assert_close(
        model.stage_1.summarise(lambda: [user.events(at, at + step) for at in range(0, 50, step)]),
        whole,
    )
    _, streams = model.stage_1.stream([user.events(0, 20)])
    kept = model.stage_1.stored_streams(streams)
    assert kept.shape[1:] == model.stage_1.stream_shape
    restored = model.stage_1.restored_streams(kept, torch.tensor([20]))
    tokens, _ = model.stage_1.stream([user.events(20, 50)], restored)
    torch.testing.assert_close(tokens, whole, atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError, match="expected"):
        model.stage_1.restored_streams(kept[:, 1:], torch.tensor([20]))


@pytest.mark.parametrize("kind", KINDS)
def test_stored_tokens_score_as_fresh_ones(kind: Kind) -> None:
    from modeling.inputs.batch import Candidates

    model, user = made(), history(50, 3)
    candidates = Candidates(
        item_BC=torch.arange(40)[None],
        category_BCK=model.stage_1.codes.item_IK[None],
        dense_BCF=torch.zeros(1, 40, 0),
        mask_BC=torch.ones(1, 40, dtype=torch.bool),
    )
    fresh: UserState = model.encode_user(user)
    one = Envelope("0" * 32, 0, 0, 50, fresh.tokens_BSD[0].detach().numpy())
    stored = from_bytes(to_bytes(one, 1, kind), 1).tokens_SD
    assert stored is not None
    given = replace(
        user, tokens_BSX=torch.from_numpy(stored)[None], has_tokens_B=torch.tensor([True])
    )
    apart = (
        model.score(model.encode_user(given), candidates) - model.score(fresh, candidates)
    ).abs()
    assert apart.max() < {"fp32": 1e-4, "fp16": 0.02, "int8": 0.5}[kind]


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_a_hundred_thousand_events_add_up_in_half_precision(kind: torch.dtype) -> None:
    """Products may be rounded; sums are float32, or a slot would stop counting at 256 events."""
    model, number = made(), 100_000
    user = history(number, 4)
    user = replace(user, gap_BL=torch.zeros_like(user.gap_BL))
    exact = model.encode_user(user)
    with torch.autocast("cpu", kind):
        rounded = model.encode_user(user)
    torch.testing.assert_close(rounded.mass_BAH, exact.mass_BAH, rtol=0.01, atol=1.0)
    assert rounded.tokens_BSD.isfinite().all()


def test_a_slot_tells_which_items_were_there() -> None:
    """What the design promises of codes as they begin, at random: of 500 items, the 225 that were
    bought come before those that were not.
    """
    torch.manual_seed(0)
    config = replace(
        CONFIG, code_width=64, num_slots=64, half_lives_days=(FOREVER,), sharpness=30.0
    )
    model = models.build("vista_addressed", config, FeatureSizes(500, 1, 300)).eval()
    assert isinstance(model, AddressedVISTA)
    items = np.random.default_rng(0).integers(0, 500, 300)
    user = replace(history(300, 0), item_BL=torch.from_numpy(items)[None])
    user = replace(user, action_BL=torch.zeros_like(user.action_BL))
    with torch.inference_mode():
        state = model.encode_user(user)
        codes = model.stage_1.codes(model.stage_1.codes.parts(torch.arange(500)[None]))
        address = model.stage_1.memory.address(codes)
        own = torch.einsum("bca,bahw->bchw", address, state.total_BAHW)[:, :, 0]
        pooled = state.total_BAHW.sum(1)[:, 0]
    bought = (np.bincount(items, minlength=500) > 0).astype(np.float64)
    by_slot = auc(bought, (own * codes).sum(-1)[0].numpy())
    by_pool = auc(bought, (pooled[:, None] * codes).sum(-1)[0].numpy())
    assert by_slot > 0.85 > 0.75 > by_pool
