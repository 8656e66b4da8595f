"""Kept encodings: whatever a user's requests bring, the scores are those of encoding anew."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from feature_repo.home.tables import JobFolder
from modeling import models
from modeling.inputs.batch import UserInputs
from serving.api.messages import RankRequest
from serving.command import open_ranker
from serving.ranking.ranker import Clock, RankService
from serving.ranking.states import UserStates
from tests.modeling import test_invariants as worlds

CONFIGS = tuple(worlds.CONFIGS)
steps = st.lists(
    st.tuples(
        st.sampled_from(["again", "later", "events", "corrected", "another"]), st.integers(1, 4)
    ),
    min_size=1,
    max_size=6,
)


def later(user: UserInputs) -> UserInputs:
    """The same past at a later request, with other circumstances."""
    return replace(
        user,
        age_BL=user.age_BL + 0.25,
        field_BU=(user.field_BU + 1) % 3,
        dense_BG=user.dense_BG + 0.5,
    )


@pytest.mark.parametrize("name", CONFIGS)
@settings(max_examples=15, deadline=None)
@given(steps=steps, first=st.integers(1, 8), seed=st.integers(0, 10_000))
def test_scores_are_those_of_encoding_anew(
    name: str, steps: list[tuple[str, int]], first: int, seed: int
) -> None:
    model, some = worlds.make(name), worlds.candidates(1, 4, seed)
    states = UserStates(model, most_bytes=1 << 24)
    whole, length, at = worlds.user_inputs([12], seed), first, 0
    with torch.inference_mode():
        for step, number in [("again", 1), *steps]:
            if step == "later":
                whole = later(whole)
            elif step == "events":
                length, whole = min(length + number, 12), later(whole)
            elif step == "corrected":
                items = whole.item_BL.clone()
                items[0, min(number, length) - 1] = (items[0, min(number, length) - 1] + 1) % 50
                whole = replace(whole, item_BL=items)
            elif step == "another":
                whole, at = worlds.user_inputs([12], seed + number), number
            user = whole.events(0, length)
            worlds.assert_equal_scores(
                model.score(states.of(at, user), some), model.score(model.encode_user(user), some)
            )
    assert sum(states.counts.values()) == 1 + len(steps)


@pytest.mark.parametrize("name", ["amortised_dlrm_extendable", "onetrans_extendable"])
def test_what_can_be_taken_further_is_and_nothing_else(name: str) -> None:
    model = worlds.make(name)
    states = UserStates(model, most_bytes=1 << 24)
    whole = worlds.user_inputs([12], 5)

    def outcome(user: UserInputs, key: Any = 1) -> str:
        before = states.counts.copy()
        with torch.inference_mode():
            states.of(key, user)
        (found,) = states.counts - before
        return str(found)

    assert outcome(whole.events(0, 6)) == "encoded"
    assert outcome(whole.events(0, 6)) == "known"
    assert outcome(later(whole).events(0, 6)) == "extended"
    assert outcome(whole.events(0, 9)) == "extended"
    assert outcome(whole.events(0, 8)) == "encoded"  # fewer than before: another past
    assert outcome(whole.events(1, 12)) == "encoded"  # the window slid
    assert outcome(whole.events(1, 12), key="1") == "encoded"  # somebody else
    gone = replace(whole.events(0, 6), dense_BG=torch.full_like(whole.dense_BG, torch.nan))
    assert outcome(gone) == "encoded"
    assert outcome(gone) == "known"  # what is missing is as missing as before


def test_a_pyramid_grows_until_a_tail_moves() -> None:
    """Then what is cached is no longer what another process would encode."""
    config = {"width": 16, "num_layers": 2, "pyramid": True}
    model = models.build("onetrans", config, replace(worlds.SIZES, history_length=96)).eval()
    # The second layer reads all of 95 rows, and of 96 those from the 32nd on.
    assert model.tails == (96, 64)
    states, whole = UserStates(model, most_bytes=1 << 24), worlds.user_inputs([96], 5)
    counts = []
    with torch.inference_mode():
        for length in (60, 70, 95, 96):
            states.of(1, whole.events(0, length))
            counts.append(dict(states.counts))
    assert counts == [
        {"encoded": 1},
        {"encoded": 1, "extended": 1},
        {"encoded": 1, "extended": 2},
        {"encoded": 2, "extended": 2},
    ]


def test_bytes_are_bounded_and_the_least_used_go_first(monkeypatch: pytest.MonkeyPatch) -> None:
    model, whole = worlds.make("amortised_dlrm_extendable"), worlds.user_inputs([12], 5)
    states = UserStates(model, most_bytes=1 << 24)
    with torch.inference_mode():
        states.of(0, whole)
        one = states.bytes
        states = UserStates(model, most_bytes=3 * one)
        for key in (0, 1, 2, 0, 3):
            states.of(key, whole)
        assert len(states) == 3
        assert states.bytes == 3 * one
        assert states.counts == {"encoded": 4, "known": 1}
        states.of(0, whole)
        states.of(1, whole)  # which went for 3
        assert states.counts == {"encoded": 5, "known": 2}
        # What does not fit at all is not kept, and nothing else goes for it.
        small = UserStates(model, most_bytes=one - 1)
        small.of(0, whole)
        assert (len(small), small.bytes) == (0, 0)
        # Nor is anything kept for ever, however often it is asked for.
        now = time.monotonic()
        monkeypatch.setattr(time, "monotonic", lambda: now + 601)
        states.of(0, whole)
        assert states.counts["encoded"] == 6
        # And whoever is not asked for any more goes too.
        assert len(states) == 3
        states.forget_old()
        assert len(states) == 1
        assert states.bytes == one


def test_a_server_keeps_users_and_ranks_them_alike(trained_shop: Any) -> None:
    plain = open_ranker(trained_shop.settings, replay=True)
    keeps = RankService(
        plain.bundle, plain.reader, plain.items, plain.replay_from, state_bytes=1 << 24
    )
    items = plain.bundle.encoder.items.values.to_pylist()
    users = JobFolder(trained_shop.settings.home, "user_history").read("user_history")["user_id"]
    for turn in range(3):
        for user in (*users[:10].to_pylist(), 987_654_321):
            asked = RankRequest(user, items[turn : turn + 15])
            row = plain.reader.read_user(user)
            first = plain.answer(asked, row, Clock(), keep=True).response
            second = keeps.answer(asked, row, Clock(), keep=True).response
            assert second.item_ids == first.item_ids
            assert second.scores == pytest.approx(first.scores, abs=1e-6)
    assert keeps.states is not None
    assert keeps.states.counts["known"] == 20  # of nobody nothing is kept
    assert keeps.states.counts["encoded"] == 10
    assert plain.states is None
