"""What must hold for every ranker behind the two-step interface, whatever its name (design: one
interface).
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from modeling import models
from modeling.inputs.batch import Batch, Candidates, FeatureSizes, UserInputs
from modeling.inputs.columns import GroupSizes
from modeling.models.base import CannotExtendError, Ranker
from modeling.trees.blend import build_ranker
from modeling.trees.columns import TreeColumns
from tests.forests import forest_on

TOLERANCE = 4e-5  # fp32 sums in another order; scores are of order 1, and 2e-5 was seen
SIZES = FeatureSizes(
    items=50,
    actions=2,
    history_length=12,
    # Every kind of column in every group: categories, bags, numbers, vectors.
    request=GroupSizes((5, 3, 6), (1, 1, 2), numbers=3, vectors=(4,)),
    candidate=GroupSizes((7, 5), (3, 1), numbers=4, vectors=(3, 2)),
    event=GroupSizes((4, 6), (1, 2), numbers=2, vectors=(3,)),
    item=GroupSizes((7, 5), (3, 1)),
    tasks=2,
)
RANKING = (
    "trees",
    "blend",
    "amortised",
    "vista",
    "onetrans",
    "hiformer",
    "baseline",
    "ranker",
)
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "trees": ("trees", {}),
    # Beside trees
    "blend_extendable": (
        "vista",
        {"width": 16, "num_seeds": 5, "seed_role": "target", "causal": True, "block": 4},
    ),
    "amortised_dlrm": ("amortised_dlrm", {"width": 16, "num_layers": 2, "num_heads": 4}),
    "amortised_dlrm_causal": (
        "amortised_dlrm",
        {"width": 16, "num_layers": 3, "num_heads": 2, "causal": True},
    ),
    "amortised_dlrm_extendable": (
        "amortised_dlrm",
        {"width": 16, "num_layers": 2, "num_heads": 4, "causal": True, "positions": "from_oldest"},
    ),
    "amortised_cross": (
        "amortised_dlrm",
        {"width": 16, "interaction": "cross", "cross_rank": 8, "bags": True},
    ),
    "amortised_cross_extendable": (
        "amortised_dlrm",
        {
            "width": 16,
            "interaction": "cross",
            "bags": True,
            "causal": True,
            "positions": "from_oldest",
        },
    ),
    "amortised_concat": ("amortised_dlrm", {"width": 16, "fusion": "concat"}),
    "amortised_self_plain": ("amortised_dlrm", {"width": 16, "fusion": "append_self_plain"}),
    "amortised_self": ("amortised_dlrm", {"width": 16, "fusion": "append_self"}),
    "amortised_self_extendable": (
        "amortised_dlrm",
        {"width": 16, "fusion": "append_self", "causal": True, "positions": "from_oldest"},
    ),
    "amortised_pointwise": (
        "amortised_dlrm",
        {"width": 16, "attention": "pointwise", "fusion": "append_self"},
    ),
    "amortised_pointwise_extendable": (
        "amortised_dlrm",
        {
            "width": 16,
            "attention": "pointwise",
            "fusion": "append_self",
            "causal": True,
            "positions": "from_oldest",
        },
    ),
    "onetrans_extendable": ("onetrans", {"width": 16, "num_layers": 2, "pyramid": False}),
    "onetrans_group_wise_extendable": (
        "onetrans",
        {"width": 16, "tokeniser": "group_wise", "own_output": True, "pyramid": False},
    ),
    "onetrans_one_split_extendable": (
        "onetrans",
        {"width": 16, "request_tokens": 0, "pyramid": False},
    ),
    "onetrans_pooled_extendable": (
        "onetrans",
        {
            "width": 16,
            "num_layers": 2,
            "pyramid": False,
            "pooled_sequences": True,
            "numbers": "buckets",
        },
    ),
    "onetrans_agnostic": (
        "onetrans",
        {"width": 16, "merge": "timestamp_agnostic", "own_weights": False},
    ),
    "hiformer": ("hiformer", {"width": 16, "rank_key": 8, "rank_value": 12}),
    "hiformer_deep": (
        "hiformer",
        {"width": 16, "num_layers": 3, "rank_key": 8, "rank_value": 12, "history": "transformer"},
    ),
    "hiformer_full_rank": (
        "hiformer",
        {"width": 16, "kind": "composite", "prune": False, "history": "bags"},
    ),
    "hiformer_hetero": (
        "hiformer",
        {"width": 16, "kind": "hetero", "num_layers": 2, "shared_output": True},
    ),
    **{
        f"baseline_{name}": (name, {"width": 16})
        for name in ("din", "dlrm", "autoint", "transformer", "wukong")
    },
    "baseline_mean_pool": ("mean_pool", {"width": 16, "hidden": 24}),
    "baseline_sim": ("two_stage", {"width": 16, "rank": 8, "slot": 3, "retrieved": 2}),
    "baseline_twin": ("two_stage", {"width": 16, "rank": 8, "search": "score", "retrieved": 3}),
    "baseline_persrec": (
        "persrec",
        {"width": 16, "rank": 8, "segment": 3, "num_tokens": 2, "recent": 2},
    ),
    "baseline_dcnv2": ("dcnv2", {"width": 16, "num_layers": 3, "rank": 8}),
    "baseline_rankmixer": (
        "rankmixer",
        {"width": 16, "num_tokens": 4, "mixed_width": 16, "history": "transformer"},
    ),
    "vista": (
        "vista",
        {"width": 16, "num_seeds": 5, "summary_layers": 2, "ranking_layers": 2, "cross_rank": 8},
    ),
    "vista_target": (
        "vista",
        {"width": 16, "num_seeds": 5, "seed_role": "target", "divide": False},
    ),
    "vista_dot": ("vista", {"width": 16, "num_seeds": 5, "interaction": "dot"}),
    "vista_softmax": (
        "vista",
        {"width": 16, "num_seeds": 5, "attention": "softmax", "ranking_layers": 1},
    ),
    "vista_addressed_extendable": (
        "vista_addressed",
        {"width": 16, "code_width": 8, "num_slots": 3, "half_lives_days": (30.0, 2.0)},
    ),
    "vista_addressed_pairs_extendable": (
        "vista_addressed",
        {
            "width": 16,
            "code_width": 8,
            "num_slots": 3,
            "half_lives_days": (30.0,),
            "num_pairs": 4,
            "session_days": 2.0,
        },
    ),
    "vista_addressed_forever_extendable": (
        "vista_addressed",
        {"width": 16, "code_width": 8, "num_slots": 4, "half_lives_days": (float("inf"),)},
    ),
    "vista_extendable": (
        "vista",
        {
            "width": 16,
            "num_seeds": 5,
            "seed_role": "target",
            "causal": True,
            "block": 4,
            "ranking_layers": 2,
        },
    ),
    # Attention as the papers have it
    "amortised_papers": ("amortised_dlrm", {"width": 16, "matching": False}),
    "amortised_pointwise_papers_extendable": (
        "amortised_dlrm",
        {
            "width": 16,
            "attention": "pointwise",
            "fusion": "append_self",
            "causal": True,
            "positions": "from_oldest",
            "matching": False,
        },
    ),
    "onetrans_papers_extendable": (
        "onetrans",
        {"width": 16, "num_layers": 2, "pyramid": False, "matching": False},
    ),
    "baseline_din_papers": ("din", {"width": 16, "matching": False}),
    "baseline_twin_papers": (
        "two_stage",
        {"width": 16, "rank": 8, "search": "score", "retrieved": 3, "matching": False},
    ),
    "baseline_persrec_papers": (
        "persrec",
        {"width": 16, "rank": 8, "segment": 3, "num_tokens": 2, "recent": 2, "matching": False},
    ),
    "vista_papers": ("vista", {"width": 16, "num_seeds": 5, "matching": False}),
    "sasrec": ("sasrec", {"width": 16, "num_heads": 2}),
    "sasrec_extendable": (
        "sasrec",
        {"width": 16, "gated": True, "activation": "swiglu", "positions": "from_oldest"},
    ),
    "bert4rec": ("bert4rec", {"width": 16, "expansion": 2}),
    "hydrarec": ("hydrarec", {"width": 16, "mixed_scale": "count"}),
    "hydrarec_bidirectional": ("hydrarec", {"width": 16, "causal": False}),
    "hydrarec_extendable": (
        "hydrarec",
        {
            "width": 16,
            "operators": ("hydra", "decayed_hydra"),
            "positions": "none",
            "time_gaps": True,
        },
    ),
    "hydrarec_hybrid_extendable": (
        "hydrarec",
        {
            "width": 16,
            "operators": ("softmax", "hydra", "kernel_linear"),
            "num_heads": 2,
            "positions": "from_oldest",
        },
    ),
    "ranker_hydrarec_extendable": ("hydrarec_ranker", {"width": 16, "expansion": 1}),
    "ranker_hydrarec_cross_extendable": (
        "hydrarec_ranker",
        {"width": 16, "operators": ("hydra",), "interaction": "cross", "cross_rank": 8},
    ),
    "linrec_extendable": ("linrec", {"width": 16, "num_heads": 4, "positions": "none"}),
    "hstu": ("hstu", {"width": 16, "num_heads": 2}),
    "hstu_extendable": ("hstu", {"width": 16, "positions": "none", "time_bias": True}),
}
EVENT_FIELDS = (
    "item_BL",
    "action_BL",
    "age_BL",
    "gap_BL",
    "event_BLE",
    "event_category_BLJ",
    "mask_BL",
)
POOLED = ("hiformer_full_rank", "baseline_mean_pool")  # they read pooled items only
EXTENDABLE = [name for name in CONFIGS if name.endswith("extendable")]
NOT_READ = {
    "event_BLE",
    "event_category_BLJ",
    "field_BU",
    "dense_BG",
}  # by sequence models: they know items, actions and times


def make(name: str) -> Ranker:
    torch.manual_seed(3)
    model_name, config = CONFIGS[name]
    model = build_ranker(model_name, config, SIZES, {} if name.startswith("blend") else None)
    if model.text_names:
        model.take_texts({file: forest_text() for file in model.text_names})
    for (
        parameter
    ) in model.parameters():  # far from initial values, where many things hold by chance
        torch.nn.init.normal_(parameter, std=0.3)
    for buffer_name, buffer in model.named_buffers():
        if buffer_name.endswith("item_IK"):  # categories of the events' items
            buffer.copy_(torch.randint(1, 5, buffer.shape))
    return model.eval()


@cache
def forest_text() -> str:
    """A forest over every column of `SIZES`, which learned numbers, missing ones and categories."""
    number = 400
    user = user_inputs([3] * number, 1)
    rows = TreeColumns.of(SIZES).rows(user, candidates(number, 1, 1)).flatten(0, 1).numpy()
    target = np.nansum(rows, axis=1) + 3 * (rows[:, -1] == 2)
    return forest_on(rows, target > np.median(target), TreeColumns.of(SIZES).categories)


def user_inputs(lengths: list[int], seed: int, width: int | None = None) -> UserInputs:
    generator = torch.Generator().manual_seed(seed)
    batch, width = len(lengths), width or max([*lengths, 1])
    mask = torch.arange(width) < torch.tensor(lengths)[:, None]

    def real(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    def number(limit: int, *shape: int) -> Tensor:
        return torch.randint(0, limit, shape, generator=generator)

    def slots_of(group: GroupSizes, *shape: int) -> Tensor:
        pairs = zip(group.categories, group.slots, strict=True)
        return torch.cat([number(size, *shape, slots) for size, slots in pairs], dim=-1)

    def with_gaps(values: Tensor) -> Tensor:
        gone = torch.rand(values.shape, generator=generator) < 0.2
        return values.masked_fill(gone, torch.nan)

    made = UserInputs(
        item_BL=number(SIZES.items, batch, width),
        action_BL=number(SIZES.actions, batch, width),
        age_BL=real(batch, width).abs(),
        gap_BL=real(batch, width).abs(),
        event_BLE=with_gaps(real(batch, width, SIZES.event.dense)),
        mask_BL=mask,
        field_BU=slots_of(SIZES.request, batch),
        dense_BG=with_gaps(real(batch, SIZES.request.dense)),
        event_category_BLJ=slots_of(SIZES.event, batch, width),
    )
    return blank_padding(made)


def blank_padding(user: UserInputs) -> UserInputs:
    names = ("item_BL", "action_BL", "age_BL", "gap_BL")
    changed = {name: getattr(user, name) * user.mask_BL for name in names}
    assert user.event_category_BLJ is not None
    real = user.mask_BL[..., None]
    return replace(
        user,
        **changed,
        event_BLE=user.event_BLE.masked_fill(~real, 0),
        event_category_BLJ=user.event_category_BLJ * real,
    )


def candidates(batch: int, number: int, seed: int) -> Candidates:
    generator = torch.Generator().manual_seed(seed + 1000)
    pairs = zip(SIZES.candidate.categories, SIZES.candidate.slots, strict=True)
    slots = [
        torch.randint(0, size, (batch, number, slots), generator=generator) for size, slots in pairs
    ]
    dense = torch.randn(batch, number, SIZES.candidate.dense, generator=generator)
    gone = torch.rand(dense.shape, generator=generator) < 0.2
    return Candidates(
        item_BC=torch.randint(0, SIZES.items, (batch, number), generator=generator),
        category_BCK=torch.cat(slots, dim=-1),
        dense_BCF=dense.masked_fill(gone, torch.nan),
        mask_BC=torch.ones(batch, number, dtype=torch.bool),
    )


def assert_equal_scores(first: Tensor, second: Tensor) -> None:
    assert torch.isfinite(first).all()
    scale = max(
        1.0, float(second.abs().max())
    )  # networks without norms reach hundreds with such weights
    torch.testing.assert_close(first / scale, second / scale, atol=TOLERANCE, rtol=TOLERANCE)


every_model = pytest.mark.parametrize("name", CONFIGS)
worlds = st.tuples(
    st.lists(st.integers(0, 12), min_size=1, max_size=4), st.integers(1, 9), st.integers(0, 10_000)
)
few = settings(max_examples=25, deadline=None)


@every_model
@few
@given(world=worlds)
def test_scores_equal_one_candidate_at_a_time(name: str, world: Any) -> None:
    lengths, number, seed = world
    model = make(name)
    user = user_inputs(lengths, seed)
    some = candidates(len(lengths), number, seed)
    with torch.inference_mode():
        together = model.score(model.encode_user(user), some)
        alone = [
            model(Batch(user, some.select(slice(i, i + 1)), torch.zeros(1))) for i in range(number)
        ]
    assert together.shape == (len(lengths), number, SIZES.tasks if name.startswith(RANKING) else 1)
    assert_equal_scores(together, torch.cat(alone, dim=1))


@every_model
@few
@given(world=worlds)
def test_requests_in_a_batch_equal_requests_alone(name: str, world: Any) -> None:
    lengths, number, seed = world
    model = make(name)
    user = user_inputs(lengths, seed)
    some = candidates(len(lengths), number, seed)
    with torch.inference_mode():
        together = model(Batch(user, some, torch.zeros(1)))
        for row, length in enumerate(lengths):
            one = user._map(lambda tensor, row=row: tensor[row : row + 1]).events(0, max(length, 1))
            assert_equal_scores(
                together[row : row + 1],
                model(Batch(one, some._map(lambda t, row=row: t[row : row + 1]), torch.zeros(1))),
            )


@every_model
@few
@given(world=worlds)
def test_permuting_candidates_permutes_scores(name: str, world: Any) -> None:
    lengths, number, seed = world
    model = make(name)
    user = user_inputs(lengths, seed)
    some = candidates(len(lengths), number, seed)
    order = torch.randperm(number, generator=torch.Generator().manual_seed(seed))
    with torch.inference_mode():
        state = model.encode_user(user)
        assert_equal_scores(
            model.score(state, some)[:, order], model.score(state, some.select(order))
        )


@every_model
@few
@given(world=worlds)
def test_adding_removing_or_replacing_candidates_changes_no_other_score(
    name: str, world: Any
) -> None:
    lengths, number, seed = world
    model = make(name)
    user = user_inputs(lengths, seed)
    some = candidates(len(lengths), number + 1, seed)
    other = candidates(len(lengths), number + 1, seed + 5)
    replaced = Candidates(
        *(
            torch.cat([getattr(some, f)[:, :number], getattr(other, f)[:, number:]], dim=1)
            for f in ("item_BC", "category_BCK", "dense_BCF", "mask_BC")
        )
    )
    with torch.inference_mode():
        state = model.encode_user(user)
        expected = model.score(state, some)[:, :number]
        assert_equal_scores(model.score(state, some.select(slice(0, number))), expected)
        assert_equal_scores(model.score(state, replaced)[:, :number], expected)


@every_model
@few
@given(world=worlds, size=st.integers(1, 10))
def test_micro_batches_of_any_size_give_the_same_scores(name: str, world: Any, size: int) -> None:
    lengths, number, seed = world
    model = make(name)
    user = user_inputs(lengths, seed)
    some = candidates(len(lengths), number, seed)
    with torch.inference_mode():
        state = model.encode_user(user)
        pieces = [model.score(state, piece) for piece in some.micro_batches(size)]
        assert_equal_scores(torch.cat(pieces, dim=1), model.score(state, some))


@every_model
@few
@given(world=worlds, padding=st.integers(1, 6))
def test_padding_is_inert(name: str, world: Any, padding: int) -> None:
    """More padding, and padding with any content, changes no score."""
    lengths, number, seed = world
    model = make(name)
    user = user_inputs(lengths, seed)
    some = candidates(len(lengths), number, seed)
    wide = user_inputs(lengths, seed + 1, max([*lengths, 1]) + padding)
    width = user.mask_BL.shape[1]
    for field in EVENT_FIELDS[:-1]:
        fresh = torch.full_like(getattr(wide, field), 1)
        several = field in ("event_BLE", "event_category_BLJ")
        mask = user.mask_BL[..., None] if several else user.mask_BL
        fresh[:, :width] = torch.where(mask, getattr(user, field), fresh[:, :width])
        wide = replace(wide, **{field: fresh})
    wide = replace(wide, field_BU=user.field_BU, dense_BG=user.dense_BG)
    with torch.inference_mode():
        assert_equal_scores(
            model(Batch(wide, some, torch.zeros(1))), model(Batch(user, some, torch.zeros(1)))
        )


@every_model
def test_an_empty_history_gives_finite_scores_that_no_event_could_change(name: str) -> None:
    model, some = make(name), candidates(1, 5, 0)
    with torch.inference_mode():
        one, two = (
            model(
                Batch(
                    replace(
                        user_inputs([0], seed, 4),
                        field_BU=torch.zeros(1, SIZES.request.num_slots).long(),
                        dense_BG=torch.ones(1, SIZES.request.dense),
                    ),
                    some,
                    torch.zeros(1),
                )
            )
            for seed in (1, 2)
        )
    assert_equal_scores(one, two)


# Trees read no event
@pytest.mark.parametrize("name", [name for name in CONFIGS if name != "trees"])
def test_history_changes_scores(name: str) -> None:
    """The opposite of the invariants: without it they would hold for a model that ignores its
    inputs.
    """
    model, some = make(name), candidates(1, 5, 0)
    with torch.inference_mode():
        user = user_inputs([6], 1)
        base = model(Batch(user, some, torch.zeros(1)))
        for change in (
            {"item_BL": (user.item_BL + 1) % SIZES.items},
            {"action_BL": 1 - user.action_BL},
            {"event_BLE": user.event_BLE + 1},
            {"event_BLE": torch.full_like(user.event_BLE, torch.nan)},
            {"event_category_BLJ": (user.event_category_BLJ + 1) % 4},
            {"field_BU": (user.field_BU + 1) % 3},
            {"dense_BG": user.dense_BG + 1},
            {"dense_BG": torch.full_like(user.dense_BG, torch.nan)},
        ):
            if not name.startswith(RANKING) and NOT_READ & set(change):
                continue
            limit = (
                1e-4 if name == "baseline_rankmixer" else 1e-3
            )  # its norms and mean leave less of a change
            if name in POOLED and set(change) & {"event_BLE", "event_category_BLJ"}:
                continue
            assert (
                model(Batch(replace(user, **change), some, torch.zeros(1))) - base
            ).abs().max() > limit
        if name in ("hydrarec_extendable", "hstu_extendable"):
            change = replace(user, gap_BL=user.gap_BL + 1)
            assert (model(Batch(change, some, torch.zeros(1))) - base).abs().max() > 1e-3
        assert base.std() > 1e-3


@pytest.mark.parametrize("name", EXTENDABLE)
@few
@given(
    lengths=st.lists(st.integers(0, 8), min_size=1, max_size=3),
    data=st.data(),
    seed=st.integers(0, 10_000),
)
def test_extended_states_score_as_recomputed_ones(
    name: str, lengths: list[int], data: Any, seed: int
) -> None:
    """Any split of a history, extended in any number of steps, ragged batches included."""
    model, some = make(name), candidates(len(lengths), 4, seed)
    user = user_inputs(lengths, seed, 9)
    cuts = sorted(data.draw(st.lists(st.integers(1, 8), min_size=1, max_size=3, unique=True)))
    with torch.inference_mode():
        state = model.encode_user(user.events(0, cuts[0]))
        for start, stop in zip(cuts, [*cuts[1:], 9], strict=True):
            state = model.extend_user(state, user.events(start, stop))
        assert_equal_scores(model.score(state, some), model.score(model.encode_user(user), some))


@pytest.mark.parametrize("name", EXTENDABLE)
def test_a_state_extended_by_nothing_is_of_the_new_request(name: str) -> None:
    """The past is what it was; features of user and context are the new request's."""
    model, some, user = make(name), candidates(2, 4, 1), user_inputs([5, 9], 1)
    other = replace(user, field_BU=(user.field_BU + 1) % 3, dense_BG=user.dense_BG + 1)
    with torch.inference_mode():
        state = model.extend_user(model.encode_user(user), other.events(9, 9))
        assert_equal_scores(model.score(state, some), model.score(model.encode_user(other), some))


@every_model
def test_models_that_cannot_extend_say_so(name: str) -> None:
    model = make(name)
    user = user_inputs([6], 1)
    assert model.can_extend == (name in EXTENDABLE)
    if not model.can_extend:
        with pytest.raises(CannotExtendError, match="Encode the user again"):
            model.extend_user(model.encode_user(user), user)


@pytest.mark.parametrize(
    "config",
    [{"causal": False, "positions": "from_oldest"}, {"causal": True, "positions": "from_newest"}],
)
def test_guard_extension_would_not_match_where_it_is_refused(config: dict[str, Any]) -> None:
    """If these were equal, the refusal would be needless: old rows do change."""
    torch.manual_seed(3)
    model = models.build(
        "amortised_dlrm", {"width": 16, "num_layers": 2, "num_heads": 4, **config}, SIZES
    ).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    user = user_inputs([8], 1)
    with torch.inference_mode():
        before, after = model.encode_user(user.events(0, 6)), model.encode_user(user)
    # The mask of the shorter history makes the same rows; only what the last layers hold differs.
    assert (after.keys[-1][:, :, :6] - before.keys[-1]).abs().max() > 1e-3
