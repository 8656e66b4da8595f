"""Next-item data, evaluation and training: the split leaks nothing, ranks are right, runs resume to
the bit.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import ir_measures
import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from feature_repo.raw.sequence_file import sequence_contract, write_log
from modeling import recipes
from modeling.errors import DataError
from modeling.evaluation.item_graphs import EASE
from modeling.models.sequence import SequenceRanker
from modeling.next_item import leave_one_out, next_item
from modeling.next_item.baselines import (
    FOLLOWERS,
    POPULARITY,
    Followers,
    Popularity,
    baseline_metrics,
)
from modeling.next_item.leave_one_out import (
    ScoreError,
    metrics_of_ranks,
    ranks_of,
    sample_negatives,
)
from modeling.next_item.next_item import NextItemTrainer, build_model
from modeling.next_item.sequences import (
    LeakError,
    Sequences,
    TrainingWindows,
    VocabularyError,
    causal_batch,
    cloze_batch,
    split_by_time,
    split_last_items,
    training_windows,
)
from modeling.recipes import NextItemRecipe
from modeling.training.trainer import LossError, read_metrics


def sequences_of(users: list[list[int]], tmp_path: Path) -> Sequences:
    """Sequences of users 1, 2, … from a file of lines."""
    lines = [f"{user} {item}\n" for user, items in enumerate(users, 1) for item in items]
    (tmp_path / "some.txt").write_text("".join(lines))
    return Sequences.of(
        sequence_contract(), write_log(tmp_path / "some.txt", str(tmp_path)), has_times=False
    )


def planted(tmp_path: Path, num_users: int = 120, num_items: int = 130) -> Sequences:
    """Users who walk around a circle of items: the next item follows from the last."""
    rng = np.random.default_rng(0)
    starts, lengths = rng.integers(0, num_items, num_users), rng.integers(3, 25, num_users)
    users = [
        ((start + np.arange(length)) % num_items + 1).tolist()
        for start, length in zip(starts, lengths, strict=True)
    ]
    return sequences_of(users, tmp_path)


def recipe(name: str, **training: Any) -> NextItemRecipe:
    loaded = recipes.load(name)
    assert isinstance(loaded, NextItemRecipe)
    return replace(loaded, training=replace(loaded.training, **training))


def items_of(sequences: Sequences, start: int, stop: int) -> list[int]:
    return sequences.item_ids.take(pa.array(sequences.items[start:stop] - 1)).to_pylist()


def test_repeats_are_dropped_and_short_users_are_trained_on_only(tmp_path: Path) -> None:
    sequences = sequences_of([[5, 6, 5, 7, 6, 8], [9, 5], [6]], tmp_path)
    assert sequences.counts == {
        "users": 3, "items": 5, "events": 7, "repeats_dropped": 2, "other_actions_dropped": 0, "users_not_evaluated": 2,
    }  # fmt: skip
    assert items_of(sequences, 0, 4) == [5, 6, 7, 8]
    assert sequences.evaluated("test").tolist() == [0]
    assert [
        items_of(sequences, row, row + 1) for row in sequences.target_rows(np.array([0]), "test")
    ] == [[8]]
    assert [
        items_of(sequences, row, row + 1)
        for row in sequences.target_rows(np.array([0]), "validation")
    ] == [[7]]
    windows = training_windows(sequences, 10, "newest", np.random.default_rng(0))
    trained = [
        items_of(sequences, a, b) for a, b in zip(windows.starts, windows.stops, strict=True)
    ]
    assert trained == [[5, 6], [9, 5]]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.integers(0, 40), max_size=8), min_size=2, max_size=9))
def test_a_global_time_split_knows_nothing_later_than_its_cuts(users: list[list[int]]) -> None:
    """Against the definition, user by user."""
    times = [sorted(found) for found in users]
    flat = np.array([time for found in times for time in found], np.int64)
    if not len(flat):
        return
    offsets = np.r_[0, np.cumsum([len(found) for found in times])]
    split = split_by_time(offsets, flat)
    first, second = (np.sort(flat)[int(share * len(flat))] for share in (0.8, 0.9))
    for user, found in enumerate(times):
        start = int(offsets[user])
        assert split.ends[user] == start + sum(time < first for time in found)
        for target, low, high in (("validation", first, second), ("test", second, np.inf)):
            of_period = [n for n, time in enumerate(found) if low <= time < high]
            known = bool(of_period) and of_period[0] > 0
            wanted = start + of_period[0] if known else -1
            assert split.rows[target][user] == wanted  # type: ignore[index]


def test_targets_of_a_time_split_are_counted(tmp_path: Path) -> None:
    """Users whom training did not see are ranked from what they did since; items that it did not see
    are targets all the same.
    """
    file = sequences_of([[1, 2, 3, 4], [1, 2, 4, 5], [6, 2], [1, 3]], tmp_path)
    with pytest.raises(DataError, match="needs times"):
        file.by_time()
    times = np.array([0, 1, 2, 30, 3, 4, 20, 31, 30, 32, 5, 6], np.int64)
    found = replace(file, times=times).by_time()
    # Of twelve events the tenth in time, at 30, begins the validation period, that at 31 the test's.
    assert found.evaluated("test").tolist() == [1, 2]
    assert found.evaluated("validation").tolist() == [0]
    assert found.training_ends().tolist() == [3, 7, 8, 12]
    assert found.counts["targets"] == 2
    assert found.counts["targets_of_users_not_trained_on"] == 1
    assert found.counts["targets_not_trained_on"] == 1  # item 5
    found.refuse_leaks(found.training_ends())
    assert not leave_one_out.supports(found, "U100")
    with pytest.raises(ValueError, match="U100 is defined for leave_one_out"):
        sample_negatives(found, np.array([1]), "test", "U100", np.random.default_rng(0))
    with pytest.raises(DataError, match="no validation target"):
        replace(file, times=np.full(12, 7, np.int64)).by_time()


def test_training_on_a_target_is_refused(tmp_path: Path) -> None:
    """One event too many, and a repeat that the split would have dropped."""
    sequences = sequences_of([[1, 2, 3, 4, 5]], tmp_path)
    sequences.refuse_leaks(sequences.training_ends())
    with pytest.raises(LeakError, match="validation item 4 of user 1 is among"):
        sequences.refuse_leaks(sequences.training_ends() + 1)
    repeated = replace(sequences, items=np.array([1, 5, 3, 4, 5], np.int32))
    with pytest.raises(LeakError, match="test item 5 of user 1"):
        NextItemTrainer(
            build_model(recipe("sasrec_tiny"), repeated),
            recipe("sasrec_tiny"),
            repeated,
            tmp_path,
            "x",
        )


def test_an_item_outside_the_vocabulary_is_refused(tmp_path: Path) -> None:
    sequences = sequences_of([[1, 2, 3, 4, 5]], tmp_path)
    bad = replace(sequences, items=np.array([1, 2, 9, 4, 5], np.int32))
    with pytest.raises(VocabularyError, match="item index 9 is outside the vocabulary, 1 … 5"):
        bad.packed(np.array([0]), np.array([4]))


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=8),
    history_length=st.integers(2, 20),
    windows=st.sampled_from(["newest", "all"]),
    seed=st.integers(0, 100),
)
def test_windows_cover_training_events_and_nothing_else(
    lengths: list[int], history_length: int, windows: Any, seed: int
) -> None:
    offsets = np.r_[0, np.cumsum(lengths)]
    items = np.concatenate([np.arange(1, n + 1) for n in lengths]).astype(np.int32)
    sequences = Sequences(
        offsets,
        items,
        None,
        pa.array(range(60)),
        pa.array(range(len(lengths))),
        {},
        split_last_items(offsets),
    )
    made = training_windows(sequences, history_length, windows, np.random.default_rng(seed))
    owner = np.searchsorted(offsets, made.starts, side="right") - 1
    assert (made.stops - made.starts >= 2).all()
    assert (made.stops - made.starts <= history_length + 1).all()
    assert (made.stops <= sequences.training_ends()[owner]).all()
    targets = {row for a, b in zip(made.starts, made.stops, strict=True) for row in range(a + 1, b)}
    wanted = set()
    for user in range(len(lengths)):
        stop = int(sequences.training_ends()[user])
        first = int(offsets[user]) + 1
        wanted |= set(range(first if windows == "all" else max(first, stop - history_length), stop))
    assert targets == wanted


def test_causal_targets_are_the_next_events(tmp_path: Path) -> None:
    sequences = planted(tmp_path)
    windows = training_windows(sequences, 10, "all", np.random.default_rng(0))
    events, targets = causal_batch(sequences, windows, np.arange(20))
    assert (targets == events.item_N % sequences.num_items).all()  # around the circle
    assert events.packing.num_rows == (windows.stops - windows.starts - 1)[:20].sum()


def test_cloze_masks_what_it_asks_for(tmp_path: Path) -> None:
    """At least one row of each sequence, a fifth in the mean, just the last in some."""
    sequences = planted(tmp_path)
    windows = training_windows(sequences, 10, "all", np.random.default_rng(0))
    chosen = np.arange(len(windows.starts))
    plain, _, _ = sequences.packed(windows.starts, windows.stops)

    def masked(last_only: float) -> Any:
        return cloze_batch(
            sequences,
            windows,
            chosen,
            mask_item=999,
            probability=0.2,
            last_only=last_only,
            rng=np.random.default_rng(1),
        )

    events, at, targets = masked(0.0)
    assert (events.item_N[at] == 999).all()
    assert int((events.item_N == 999).sum()) == len(at)
    assert (plain.item_N[at] - 1 == targets).all()
    per_sequence = np.add.reduceat((events.item_N == 999).numpy(), plain.packing.offsets[:-1])
    assert per_sequence.min() >= 1
    assert 0.15 < len(at) / plain.packing.num_rows < 0.3
    _, at, _ = masked(1.0)
    assert (at == plain.packing.last_rows).all()


def test_metrics_of_known_ranks() -> None:
    found = metrics_of_ranks(np.array([0, 4, 9, 19, 50]))
    assert found["hr@5"] == pytest.approx(2 / 5)
    assert found["hr@20"] == pytest.approx(4 / 5)
    assert found["ndcg@10"] == pytest.approx((1 + 1 / np.log2(6) + 1 / np.log2(11)) / 5)
    assert found["mrr@20"] == pytest.approx((1 + 1 / 5 + 1 / 10 + 1 / 20) / 5)


def test_metrics_equal_ir_measures_on_random_scores() -> None:
    rng = np.random.default_rng(0)
    scores = rng.permuted(np.tile(np.arange(60.0), (40, 1)), axis=1)
    wanted = rng.integers(0, 60, 40)
    candidates = torch.arange(60).expand(40, 60)
    found = metrics_of_ranks(
        ranks_of(torch.from_numpy(scores), candidates, torch.from_numpy(wanted)).numpy()
    )
    qrels = [ir_measures.Qrel(str(u), str(item), 1) for u, item in enumerate(wanted)]
    run = [
        ir_measures.ScoredDoc(str(u), str(i), scores[u, i]) for u in range(40) for i in range(60)
    ]
    for k in leave_one_out.CUTOFFS:
        for ours, theirs in (
            ("hr", ir_measures.R),
            ("ndcg", ir_measures.nDCG),
            ("mrr", ir_measures.RR),
        ):
            expected = ir_measures.calc_aggregate([theirs @ k], qrels, run)[theirs @ k]
            assert found[f"{ours}@{k}"] == pytest.approx(expected), (ours, k)


def test_equal_scores_rank_in_catalogue_order() -> None:
    scores = torch.tensor([[1.0, 2.0, 2.0, 2.0, 0.0]])
    candidates = torch.arange(5)[None]
    ranks = [int(ranks_of(scores, candidates, torch.tensor([wanted]))) for wanted in range(5)]
    assert ranks == [3, 0, 1, 2, 4]
    shuffled = torch.tensor([4, 2, 0, 3, 1])
    again = [
        int(ranks_of(scores[:, shuffled], shuffled[None], torch.tensor([column])))
        for column in range(5)
    ]
    assert again == [ranks[item] for item in shuffled]


class Fixed(SequenceRanker):
    """A model whose scores are written down: history vectors are one-hot users, the catalogue holds
    their scores.
    """

    def __init__(self, sequences: Sequences, scores: np.ndarray) -> None:
        super().__init__(build_model(recipe("sasrec_tiny"), sequences).config, sequences.sizes(12))
        self.scores, self.order = torch.from_numpy(scores).float(), iter(())
        self.asked: list[list[int]] = []

    @property
    def catalogue(self) -> torch.Tensor:
        return self.scores.T

    def encode_histories(self, events: Any) -> torch.Tensor:
        rows = torch.eye(len(self.scores))
        firsts = events.item_N[torch.from_numpy(events.packing.offsets[:-1])] - 1
        self.asked += [
            part.tolist() for part in events.item_N.split(events.packing.lengths.tolist())
        ]
        return rows[firsts // 4]


def world_of_four(tmp_path: Path) -> tuple[Sequences, np.ndarray]:
    """Three users with items 1-4, 5-8, 9-12; a user is recognised by the first item."""
    sequences = sequences_of([[1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 11, 12]], tmp_path)
    scores = np.zeros((3, 12))
    scores[0] = [
        90,
        91,
        92,
        5,
        6,
        0,
        0,
        0,
        0,
        0,
        0,
        0,
    ]  # seen items outrank, but are removed: target 4 behind 5
    scores[1] = [3, 2, 1, 0, 99, 99, 99, 50, 0, 0, 0, 0]  # target 8 first
    scores[2] = [
        7,
        7,
        7,
        0,
        0,
        0,
        0,
        0,
        9,
        9,
        9,
        7,
    ]  # target 12 ties with 1, 2, 3, which stand earlier
    return sequences, scores


def test_full_protocol_removes_seen_items_and_reads_the_validation_item(tmp_path: Path) -> None:
    sequences, scores = world_of_four(tmp_path)
    model = Fixed(sequences, scores)
    ranks = leave_one_out.target_ranks(
        model, sequences, np.arange(3), "test", "FULL", np.random.default_rng(0)
    )
    assert ranks.tolist() == [1, 0, 3]
    assert sorted(model.asked) == [[1, 2, 3], [5, 6, 7], [9, 10, 11]]
    model.asked.clear()
    ranks = leave_one_out.target_ranks(
        model, sequences, np.arange(3), "validation", "FULL", np.random.default_rng(0)
    )
    assert sorted(model.asked) == [[1, 2], [5, 6], [9, 10]]
    assert ranks.tolist() == [0, 0, 0]  # at validation time the test item is one among the others


def test_baselines_are_what_their_names_say(tmp_path: Path) -> None:
    """Counts of training events, without the two held-out items of each user."""
    users = [[1, 2, 3, 4, 5], [2, 3, 6, 4, 1], [3, 2, 1, 6, 4], [5, 2, 3, 1, 6]]
    sequences = sequences_of(users, tmp_path)
    of_item = {int(item): place for place, item in enumerate(sequences.item_ids.to_pylist())}
    stops = sequences.target_rows(np.arange(4), "test")
    starts = sequences.offsets[:-1]
    popular = Popularity(sequences).scores(sequences, starts, stops)
    assert [float(popular[0, of_item[item]]) for item in (1, 2, 3, 4, 5, 6)] == [2, 4, 4, 0, 1, 1]
    followed = Followers(sequences).scores(sequences, starts, stops)
    # Behind 4, the first user's last item, nothing came in training; behind 6 neither.
    assert followed[0].max() < 0.001
    # Of a history that ends in 2, 3 followed three times and 1 once.
    ending_in_2 = Followers(sequences).scores(sequences, starts[:1], starts[:1] + 2)[0]
    assert float(ending_in_2[of_item[3]]) == pytest.approx(3, abs=0.001)
    assert float(ending_in_2[of_item[1]]) == pytest.approx(1, abs=0.001)
    found = baseline_metrics(sequences)
    assert set(found) == {POPULARITY, FOLLOWERS, EASE}
    assert all(0 < metrics["hr@20"] <= 1 for metrics in found.values())


def test_scores_that_are_no_numbers_are_refused(tmp_path: Path) -> None:
    sequences, scores = world_of_four(tmp_path)
    scores[1, 2] = np.nan
    with pytest.raises(ScoreError, match="NaN or infinity"):
        leave_one_out.evaluate(Fixed(sequences, scores), sequences, "test")


@pytest.mark.parametrize("protocol", ["U100", "P100"])
def test_negatives_leave_out_what_the_protocol_says(tmp_path: Path, protocol: Any) -> None:
    rng = np.random.default_rng(3)
    users = [(rng.permutation(130)[: rng.integers(3, 20)] + 1).tolist() for _ in range(60)]
    sequences = sequences_of(users, tmp_path)
    everyone = sequences.evaluated("test")
    drawn = sample_negatives(sequences, everyone, "test", protocol, np.random.default_rng(0))
    assert drawn.shape == (len(everyone), 100)
    validation_drawn = 0
    for row, user in enumerate(everyone):
        own = sequences.items[sequences.offsets[user] : sequences.offsets[user + 1]] - 1
        training, validation, test = own[:-2], own[-2], own[-1]
        assert not set(training) & set(drawn[row])
        assert test not in drawn[row]
        validation_drawn += int(validation in drawn[row])
        if protocol == "P100":
            assert len(set(drawn[row])) == 100
    assert (validation_drawn > 0) == (protocol == "U100")
    again = sample_negatives(sequences, everyone, "test", protocol, np.random.default_rng(0))
    assert (again == drawn).all()


def test_popular_negatives_are_drawn_more_often(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    share = np.linspace(1, 20, 400) / np.linspace(1, 20, 400).sum()
    users = [(rng.choice(400, 12, replace=False, p=share) + 1).tolist() for _ in range(300)]
    sequences = sequences_of(users, tmp_path)
    count = {
        protocol: np.bincount(
            sample_negatives(
                sequences, sequences.evaluated("test"), "test", protocol, np.random.default_rng(0)
            ).ravel(),
            minlength=sequences.num_items,
        )
        for protocol in ("U100", "P100")
    }
    upper = sequences.num_items * 3 // 4
    assert count["P100"][upper:].mean() > 1.3 * count["U100"][upper:].mean()


def test_sampled_protocols_need_enough_unknown_items(tmp_path: Path) -> None:
    sequences, scores = world_of_four(tmp_path)
    with pytest.raises(
        ValueError, match="needs 100 items that a user does not know; the catalogue has 12"
    ):
        leave_one_out.evaluate(Fixed(sequences, scores), sequences, "test", "U100")


@pytest.mark.parametrize("name", ["sasrec_tiny", "hydrarec_next_tiny", "bert4rec_tiny"])
def test_an_interrupted_run_gives_the_same_weights(tmp_path: Path, name: str) -> None:
    """Stopped between checkpoints, dropout, negatives, masks, windows and averages included."""
    sequences = planted(tmp_path)
    some = recipe(name)

    def trainer(folder: str) -> NextItemTrainer:
        return NextItemTrainer(
            build_model(some, sequences), some, sequences, tmp_path / folder, "same"
        )

    whole, stopped = trainer("whole"), trainer("stopped")
    summary = whole.run()
    assert stopped.run(stop_after=5)["steps"] == 5
    resumed = trainer("stopped")
    assert resumed.run()["steps"] == summary["steps"]
    for one, other in zip(
        whole.evaluated_model.parameters(), resumed.evaluated_model.parameters(), strict=True
    ):
        assert torch.equal(one, other)
    assert list(read_metrics(tmp_path / "whole")) == list(read_metrics(tmp_path / "stopped"))


@pytest.mark.parametrize("objective", ["softmax", "sampled_softmax", "gbce", "cloze"])
def test_a_step_in_parts_has_the_gradient_of_the_whole(tmp_path: Path, objective: Any) -> None:
    """Parts of unequal numbers of targets, over the same negatives."""
    sequences = planted(tmp_path)
    some = recipe("bert4rec_tiny" if objective == "cloze" else "sasrec_tiny")
    some = replace(
        some,
        objective=objective,
        last_only=1.0,
        num_negatives=40,
        config={**some.config, "dropout": 0.0},
    )
    found = []
    for rows_at_once in (10_000, 60):
        trainer = NextItemTrainer(
            build_model(some, sequences), some, sequences, tmp_path / "x", "x"
        )
        trainer.rows_at_once = rows_at_once
        torch.manual_seed(7)
        parts = []
        for loss, targets in trainer.losses(trainer.plan(0)[0]):
            loss.backward()
            parts.append((float(loss), targets))
        gradients = [p.grad for p in trainer.model.parameters() if p.grad is not None]
        found.append((parts, gradients))
    (whole, gradients), (parts, in_parts) = found
    assert len(whole) == 1
    assert len({targets for _, targets in parts}) > 1
    assert len(parts) >= 3
    assert sum(targets for _, targets in parts) == whole[0][1]
    assert sum(loss for loss, _ in parts) == pytest.approx(whole[0][0], rel=1e-6)
    torch.testing.assert_close(in_parts, gradients, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("name", "objective"),
    [
        ("sasrec_tiny", "softmax"),
        ("sasrec_tiny", "sampled_softmax"),
        ("sasrec_tiny", "gbce"),
        ("hydrarec_next_tiny", "softmax"),
    ],
)
def test_training_finds_the_planted_order(tmp_path: Path, name: str, objective: Any) -> None:
    """Users walk around a circle: a model that learns ranks the next item high, one that cannot
    read ranks it anywhere.
    """
    sequences = planted(tmp_path, num_users=250)
    epochs = 45 if objective == "gbce" else 20  # two logits of forty-one teach less than all
    some = replace(
        recipe(name, epochs=epochs, learning_rate=2e-2, validate_epochs=epochs, averaging=0.0),
        objective=objective,
        num_negatives=40,
    )
    source = next_item.SequenceSource(sequences, "planted", "planted", tmp_path / "runs")
    untrained = leave_one_out.evaluate(build_model(some, sequences), sequences, "test")
    result = next_item.train_and_evaluate(source, some)
    assert untrained["hr@10"] < 0.3
    assert result["test"]["FULL"]["hr@10"] > 0.8
    assert set(result["test"]) == {"FULL", "U100", "P100"}
    (result_file,) = (tmp_path / "runs").glob(f"{name}-seed1-*/result.json")
    stored = json.loads(result_file.read_text())
    assert stored == result
    assert next_item.train_and_evaluate(source, some) == result  # read, not repeated


def test_cloze_training_learns_too(tmp_path: Path) -> None:
    sequences = planted(tmp_path, num_users=250)
    some = recipe("bert4rec_tiny", epochs=30, learning_rate=2e-2, validate_epochs=30, averaging=0.0)
    source = next_item.SequenceSource(sequences, "planted", "planted", tmp_path / "runs")
    assert next_item.train_and_evaluate(source, some)["test"]["FULL"]["hr@10"] > 0.5


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", ["sasrec_tiny", "hydrarec_next_tiny", "bert4rec_tiny"])
def test_a_gpu_gives_the_same_losses(tmp_path: Path, name: str) -> None:
    """Without dropout and draws: the first steps agree with the CPU's."""
    sequences = planted(tmp_path)
    some = recipes.replace_config(recipe(name, averaging=0.0), dropout=0.0)
    found = []
    for device in ("cpu", "cuda"):
        trainer = NextItemTrainer(
            build_model(some, sequences), some, sequences, tmp_path / device, device, device
        )
        trainer.run()
        found.append(
            [line["loss"] for line in read_metrics(tmp_path / device) if line["kind"] == "step"]
        )
    assert found[0] == pytest.approx(found[1], rel=1e-3)


def test_a_loss_that_is_no_number_stops_the_run(tmp_path: Path) -> None:
    sequences = planted(tmp_path)
    model = build_model(recipe("sasrec_tiny"), sequences)
    with torch.no_grad():
        model.item.weight[7] = torch.nan
    trainer = NextItemTrainer(model, recipe("sasrec_tiny"), sequences, tmp_path / "nan", "x")
    with pytest.raises(LossError, match="loss is nan at step 0"):
        trainer.run()


def test_objective_and_mask_must_fit(tmp_path: Path) -> None:
    sequences = planted(tmp_path)
    for name, objective in (("sasrec_tiny", "cloze"), ("bert4rec_tiny", "softmax")):
        some = replace(recipe(name), objective=objective)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="Cloze needs a bidirectional model"):
            NextItemTrainer(build_model(some, sequences), some, sequences, tmp_path / "x", "x")


def test_a_run_with_nothing_to_train_is_refused(tmp_path: Path) -> None:
    """Users of three events have no pair of training events; zero epochs train nothing."""
    short = sequences_of([[1, 2, 3], [4, 5, 6]], tmp_path)
    for sequences, some in (
        (short, recipe("sasrec_tiny")),
        (planted(tmp_path), recipe("sasrec_tiny", epochs=0)),
    ):
        with pytest.raises(ValueError, match="nothing to train"):
            NextItemTrainer(build_model(some, sequences), some, sequences, tmp_path / "x", "x")


def test_time_gaps_need_times(tmp_path: Path) -> None:
    sequences = planted(tmp_path)
    some = recipe("hydrarec_next_tiny")
    for timed in (
        recipes.replace_config(some, time_gaps=True),
        replace(some, model="hstu", config={"width": 16, "time_bias": True}),
    ):
        with pytest.raises(ValueError, match="a sequence file knows order only"):
            NextItemTrainer(build_model(timed, sequences), timed, sequences, tmp_path / "x", "x")


def test_a_batch_of_one_long_window_is_a_batch(tmp_path: Path) -> None:
    """The edge of packing: one sequence, full length."""
    sequences = planted(tmp_path)
    windows = TrainingWindows(np.array([0]), np.array([2]))
    events, targets = causal_batch(sequences, windows, np.array([0]))
    assert events.packing.num_rows == len(targets) == 1
