"""The training set on disk is the training set in memory."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from feature_repo.contract.expectations import GateError
from feature_repo.home.tables import JobFolder
from modeling import recipes
from modeling.evaluation.classic import CLASSICS, classic_scores
from modeling.inputs.augment import spread_rows
from modeling.inputs.encoder import Encoded, Encoder
from modeling.inputs.shards import (
    MANIFEST,
    MappedRows,
    ShardError,
    open_shards,
    read_shard,
    write_shard,
)
from modeling.metrics import mean_ndcg
from modeling.training.trainer import Trainer, read_metrics
from modeling.training.training_run import build_model
from modeling.training_set import training_set
from modeling.training_set.dataset import SPLITS
from modeling.training_set.item_relations import fit_relations
from modeling.training_set.sample import Sample
from modeling.training_set.simple_baselines import FREQUENCY, baseline_scores
from modeling.training_set.training_set import TrainingSet, TrainingSetOptions, open_training_set
from tests.periods import examples_of, joined_period, vocabularies

RECIPE = recipes.load("amortised_dlrm_tiny")
OPTIONS = TrainingSetOptions(
    RECIPE.service, RECIPE.min_item_count + 1
)  # a set that no other test makes


@pytest.fixture(scope="module")
def made(shop: Any, monkeypatch_module: pytest.MonkeyPatch) -> TrainingSet:
    """The shop's training set, in many shards."""
    monkeypatch_module.setattr(training_set, "SHARD_ROWS", 2_500)
    return open_training_set(shop.settings, lambda settings: shop.store, OPTIONS)


@pytest.fixture(scope="module")
def monkeypatch_module() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        yield patch


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=6), st.integers(0, 2**32 - 1))
def test_mapped_rows_are_their_parts_in_a_row(sizes: list[int], seed: int) -> None:
    rng = np.random.default_rng(seed)
    parts = [rng.normal(size=(size, 2)) for size in sizes]
    rows, plain = MappedRows(parts), np.concatenate(parts)
    assert (len(rows), rows.shape, rows.dtype) == (len(plain), plain.shape, plain.dtype)
    chosen = rng.integers(0, max(len(plain), 1), 7) if len(plain) else np.zeros(0, np.int64)
    assert np.array_equal(rows[chosen], plain[chosen])
    assert np.array_equal(rows[plain[:, 0] > 0], plain[plain[:, 0] > 0])
    assert np.array_equal(rows[1:], plain[1:])
    assert np.array_equal(np.asarray(rows), plain)
    assert len(spread_rows(rows, 3)) <= 3


def test_a_shard_keeps_types_shapes_and_rows_of_nothing(tmp_path: Path) -> None:
    arrays = {
        "numbers": np.arange(6, dtype=np.float32).reshape(3, 2),
        "flags": np.array([True, False, True]).astype(np.int8),
        "nothing": np.zeros((3, 0), np.int32),
    }
    write_shard(tmp_path / "one.arrow", arrays)
    for name, array in read_shard(tmp_path / "one.arrow").items():
        assert array.dtype == arrays[name].dtype
        assert np.array_equal(array, arrays[name])
    (tmp_path / "one.arrow").write_bytes(b"torn")
    with pytest.raises(ShardError, match="damaged or gone"):
        open_shards([tmp_path / "one.arrow"])


def test_shards_hold_what_one_table_in_memory_does(shop: Any, made: TrainingSet) -> None:
    """Parity with the plain twin: the whole period joined, and featurised at once."""
    assert made.counts["train"]["shards"] > 3
    warehouse = made.warehouse
    whole = {name: joined_period(warehouse, shop.store, RECIPE.service, name) for name in SPLITS}
    plain = vocabularies(warehouse.contract, whole["train"], OPTIONS.min_item_count)
    assert {n: i.plain() for n, i in made.vocabularies.items()} == {
        n: i.plain() for n, i in plain.items()
    }
    relations = fit_relations(warehouse.contract, warehouse.log, warehouse.profiles())
    encoder = Encoder(warehouse.contract, plain, RECIPE.history_length, relations=relations)
    assert made.relations.to_bytes() == relations.newest().to_bytes()
    for name in SPLITS:
        period, split = made.period(name), whole[name]
        expected = encoder.featurise(split.requests)
        for field in fields(Encoded):
            if field.name not in ("gather", "gather_tokens", "item_of_key", "history_lengths"):
                got = np.asarray(getattr(period.encoded, field.name))
                assert np.array_equal(got, getattr(expected, field.name), equal_nan=True), field
        chosen = np.arange(0, len(expected), 7)
        ours, theirs = (encoder.collate(one, chosen) for one in (period.encoded, expected))
        for field in fields(ours.user):
            one, other = (getattr(batch.user, field.name) for batch in (ours, theirs))
            assert one is None or torch.equal(one.nan_to_num(-9), other.nan_to_num(-9)), field
        assert np.array_equal(period.history_lengths, split.history_lengths)
        same = period.users[:, None] == period.users
        users = np.array(split.users.to_pylist())
        assert np.array_equal(same, users[:, None] == users)
        if name != "train":
            for baseline, scores in baseline_scores(split).items():
                assert np.array_equal(period.baselines[baseline], scores), baseline


def _never(settings: Any) -> Any:
    raise AssertionError("a set that is there needs no store")


def test_what_is_there_is_not_made_again(shop: Any, made: TrainingSet) -> None:
    again = open_training_set(shop.settings, _never, OPTIONS)
    assert again.folder == made.folder
    assert again.counts == made.counts


def test_training_from_disk_is_training_from_memory_to_the_bit(
    shop: Any, made: TrainingSet, tmp_path: Path
) -> None:
    encoder = made.encoder(RECIPE.history_length)
    warehouse = made.warehouse
    # Of training requests, only what was known by then
    over_time = fit_relations(warehouse.contract, warehouse.log, warehouse.profiles())
    plain = Encoder(warehouse.contract, made.vocabularies, 1, relations=over_time)
    in_memory = [
        plain.featurise(joined_period(made.warehouse, shop.store, RECIPE.service, name).requests)
        for name in ("train", "validation")
    ]
    on_disk = [made.period(name).encoded for name in ("train", "validation")]
    for name, (train, validation) in (("memory", in_memory), ("disk", on_disk)):
        model = build_model(RECIPE, encoder, train)
        trainer = Trainer(model, encoder, RECIPE.training, tmp_path / name, "same")
        # Stopped once, so that it also resumes.
        trainer.fit(train, validation, stop_after=3)
        trainer.fit(train, validation)
    assert list(read_metrics(tmp_path / "disk")) == list(read_metrics(tmp_path / "memory"))


def test_nothing_beyond_the_visible_events_is_known(shop: Any, made: TrainingSet) -> None:
    """Features of the newest two events are those of a past that has no others."""
    few = open_training_set(
        shop.settings, lambda settings: shop.store, replace(OPTIONS, sample=Sample(visible=2))
    )
    encoder, period = few.encoder(16), few.period("test")
    names = list(encoder.dense_names)
    dense = np.asarray(period.encoded.candidate_dense)
    bought = np.exp(dense[:, names.index("life_item")]) - 0.01
    assert bought.max() <= 2 + 1e-5
    assert np.expm1(dense[:, names.index("match_times")]).max() <= 2 + 1e-5
    batch = encoder.collate(period.encoded, np.arange(len(period.encoded)))
    assert batch.user.mask_BL.sum(1).max() == 2
    whole = made.period("test")
    assert period.baselines[FREQUENCY].max() <= 2 < whole.baselines[FREQUENCY].max()
    log = made.warehouse.log
    known = JobFolder(shop.settings.home, "user_history").read("user_stats").num_rows
    assert known >= len(log.users)


def test_a_longer_history_is_read_from_a_multiple_of_the_block(made: TrainingSet) -> None:
    encoded = made.period("test").encoded
    chosen = np.arange(len(encoded))
    whole = made.encoder(512).collate(encoded, chosen).user
    encoder = made.encoder(10, history_block=4)
    read = encoder.collate(encoded, chosen).user
    number = read.mask_BL.sum(1)
    assert encoded.history_lengths is not None
    known = torch.from_numpy(encoded.history_lengths)
    assert (known > 10).any()
    assert number.tolist() == encoder.events_read(encoded).tolist()
    assert (number[known <= 10] == known[known <= 10]).all()
    assert ((known - number)[known > 10] % 4 == 0).all()
    assert ((number > 6) & (number <= 10))[known > 10].all()
    for request, events in enumerate(number.tolist()):
        all_of_them = int(whole.mask_BL[request].sum())
        assert torch.equal(
            read.item_BL[request, :events],
            whole.item_BL[request, all_of_them - events : all_of_them],
        )
    with pytest.raises(ValueError, match="history_block is 11"):
        made.encoder(10, history_block=11)


def test_what_is_withheld_is_missing_and_the_rest_is_not(made: TrainingSet) -> None:
    encoded, chosen = made.period("test").encoded, np.arange(5)
    whole = made.encoder(16).collate(encoded, chosen)
    names = made.encoder(16).dense_names
    between = torch.tensor(
        [
            name.startswith(("match_", "life_", "near_", "value_ratio", "item_other"))
            for name in names
        ]
    )
    some = made.encoder(16, ablated=("matches",)).collate(encoded, chosen)
    assert some.candidates.dense_BCF[..., between].isnan().all()
    for one, other in (
        (some.candidates.dense_BCF, whole.candidates.dense_BCF),
        (some.user.dense_BG, whole.user.dense_BG),
    ):
        kept = one if one.shape[-1] != len(names) else one[..., ~between]
        expected = other if other.shape[-1] != len(names) else other[..., ~between]
        assert torch.equal(kept.nan_to_num(-9), expected.nan_to_num(-9))
    fewer = made.encoder(16, ablated=("matches", "user")).collate(encoded, chosen)
    slots = made.encoder(16).request.sizes.num_slots
    assert fewer.user.dense_BG.isnan().all()
    assert (fewer.user.field_BU[:, :slots] == 0).all()
    assert torch.equal(fewer.user.field_BU[:, slots:], whole.user.field_BU[:, slots:])
    assert torch.equal(fewer.user.item_BL, whole.user.item_BL)
    with pytest.raises(ValueError, match="no inputs"):
        made.encoder(16, ablated=("history",))


@pytest.mark.parametrize("kind", CLASSICS)
def test_a_trained_baseline_learns_from_what_is_not_withheld(made: TrainingSet, kind: Any) -> None:
    periods = [made.period(name).encoded for name in ("train", "validation", "test")]
    test = periods[-1]
    labels = np.asarray(test.labels)[:, 0]
    quality = {}
    for without in ((), ("matches", "user")):
        scores = classic_scores(kind, made.encoder(16, ablated=without), *periods, 0, 1)
        quality[without] = mean_ndcg(labels, scores, test.candidate_offsets)
        if kind == "trees":
            # Logits, by a period of as many negatives, whatever order they were fitted to
            assert abs((1 / (1 + np.exp(-scores))).mean() - labels.mean()) < 0.02
    assert quality[()] > quality["matches", "user"] + 0.05


@pytest.mark.parametrize("kind", CLASSICS)
def test_a_column_that_is_never_known_is_left_out_and_said(
    made: TrainingSet, kind: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    encoder, train = made.encoder(16), made.period("train").encoded
    later = [made.period(name).encoded for name in ("validation", "test")]
    dense = np.array(train.candidate_dense)
    unknown = encoder.dense_names.index("match_days_ago")
    dense[:, unknown] = np.nan
    scores = classic_scores(kind, encoder, replace(train, candidate_dense=dense), *later, 0, 1)
    assert np.isfinite(scores).all()
    assert f"{kind}: without match_days_ago, of which hardly anything is known" in " ".join(
        capsys.readouterr().out.split()
    )
    one = np.full_like(np.asarray(train.labels), np.nan)
    one[:40] = 0  # and no positive at all
    scores = classic_scores(kind, encoder, replace(train, labels=one), *later, 0, 1)
    assert not scores.any()
    assert "nothing to learn from" in capsys.readouterr().out


def test_sets_that_somebody_reads_stay_and_others_go(
    made: TrainingSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training_set, "KEPT", 1)
    unused, torn = (made.folder.parent / name for name in ("unused", "torn"))
    for folder in (unused, torn):
        folder.mkdir()
        (folder / "train-requests-00000.arrow").write_bytes(b"")
    (unused / MANIFEST).write_text("{}")
    newest = made.folder.parent / "newest"
    newest.mkdir()
    training_set._forget_others(newest)
    newest.rmdir()
    assert not unused.exists()
    assert not torn.exists()
    assert len(made.period("train").encoded)


def test_a_joined_row_outside_the_contract_is_refused_with_its_reason(
    shop: Any, made: TrainingSet
) -> None:
    warehouse = made.warehouse
    rows = examples_of(warehouse, "test").slice(0, 50)
    joined = warehouse.join(shop.store, RECIPE.service, "test", rows)
    warehouse.refuse_broken(joined, "test")
    at = joined.column_names.index("history_end")
    broken = joined.set_column(at, "history_end", pa.array([-5] * 50, pa.int64()))
    with pytest.raises(GateError, match=r"history_end.*50 rows"):
        warehouse.refuse_broken(broken, "test")
