"""Training: grouped loss, resume to the bit, point-in-time training sets in which the future does
not exist.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pytest
import torch

from beam_jobs.jobs.training_examples import ItemTables, example_rows
from feature_repo.contract.arrow import micros
from feature_repo.home.tables import JobFolder, StaleTableError
from modeling import models, recipes
from modeling.evaluation.evaluate import EMPTY_HISTORY
from modeling.inputs.augment import training_sample
from modeling.inputs.batch import Batch
from modeling.inputs.columns import Vocabulary
from modeling.inputs.degradations import without
from modeling.inputs.encoder import Encoded, Encoder
from modeling.models.base import Ranker
from modeling.recipes import Training
from modeling.training.trainer import (
    LossError,
    Most,
    Trainer,
    batches,
    masked_bce,
    predict,
    read_metrics,
)
from modeling.training_set.dataset import (
    JoinError,
    Warehouse,
    check_rows,
    refuse_nothing_positive,
)
from tests.elsewhere import ELSEWHERE, elsewhere
from tests.periods import examples_of, joined_period, vocabularies

RECIPE = recipes.load("amortised_dlrm_tiny")


@pytest.fixture(scope="module")
def warehouse(shop: Any) -> Warehouse:
    return Warehouse(shop.settings)


@pytest.fixture(scope="module")
def encoded(shop: Any, warehouse: Warehouse) -> tuple[Encoder, Encoded, Encoded]:
    split, validation = (
        joined_period(warehouse, shop.store, RECIPE.service, name)
        for name in ("train", "validation")
    )
    encoder = Encoder(
        warehouse.contract,
        vocabularies(warehouse.contract, split, RECIPE.min_item_count),
        RECIPE.history_length,
    )
    return encoder, encoder.featurise(split.requests), encoder.featurise(validation.requests)


def fresh_model(encoder: Encoder, train: Encoded, **config: Any) -> Ranker:
    torch.manual_seed(5)
    model = models.build(RECIPE.model, {**RECIPE.config, **config}, encoder.sizes)
    model.fit_statistics(training_sample(encoder, train))
    return model


def test_grouped_loss_equals_one_candidate_per_row(encoded: Any) -> None:
    encoder, train, _ = encoded
    model = fresh_model(encoder, train).eval()
    batch = encoder.collate(train, np.arange(12))
    grouped = masked_bce(model(batch), batch.labels_BCT, batch.candidates.mask_BC)
    losses = []
    for request in range(12):
        alone = encoder.collate(train, np.array([request]))
        for c in range(int(alone.candidates.mask_BC.sum())):
            one = Batch(
                alone.user, alone.candidates.select(slice(c, c + 1)), alone.labels_BCT[:, c : c + 1]
            )
            losses.append(masked_bce(model(one), one.labels_BCT, one.candidates.mask_BC))
    torch.testing.assert_close(grouped, torch.stack(losses).mean(), atol=1e-6, rtol=1e-6)
    gradient = torch.autograd.grad(grouped, model.features.item.weight)[0]
    torch.testing.assert_close(
        gradient,
        torch.autograd.grad(torch.stack(losses).mean(), model.features.item.weight)[0],
        atol=1e-6,
        rtol=1e-4,
    )


def test_every_request_is_in_one_batch_of_an_epoch_and_batches_are_bounded() -> None:
    sizes = np.random.default_rng(0).integers(1, 400, 1000)
    training = Training(max_requests=32, max_candidates=2000)
    for epoch in (0, 1):
        grouped = batches(sizes, training, epoch)
        assert sorted(np.concatenate(grouped).tolist()) == list(range(1000))
        assert all(
            len(g) <= 32 and (len(g) == 1 or len(g) * sizes[g].max() <= 2000) for g in grouped
        )
    first = batches(sizes, training, 0)
    again = batches(sizes, training, 0)
    second = batches(sizes, training, 1)
    assert all(np.array_equal(one, two) for one, two in zip(first, again, strict=True))
    assert not np.array_equal(first[0], second[0])


@pytest.mark.parametrize("stops", [[3], [5, 7], [1, 1, 20]])
def test_an_interrupted_run_continues_the_same_curve_to_the_bit(
    encoded: Any, tmp_path: Path, stops: list[int]
) -> None:
    """With dropout, so that the random state matters; stops fall between checkpoints, on them, and
    in another epoch.
    """
    encoder, train, validation = encoded
    training = replace(RECIPE.training, epochs=2, checkpoint_steps=5)

    def trainer(folder: str) -> Trainer:
        return Trainer(
            fresh_model(encoder, train, dropout=0.3), encoder, training, tmp_path / folder, "same"
        )

    whole = trainer("whole")
    whole.fit(train, validation)
    for stop in stops:
        trainer("stopped").fit(train, validation, stop_after=stop)
    resumed = trainer("stopped")
    resumed.fit(train, validation)
    assert list(read_metrics(tmp_path / "stopped")) == list(read_metrics(tmp_path / "whole"))
    for name, weight in whole.model.state_dict().items():
        assert torch.equal(weight, resumed.model.state_dict()[name]), name
    best = [
        json.loads(line)["validation_ndcg@10"]
        for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()
        if "epoch" in json.loads(line)["kind"]
    ]
    assert resumed.best == max(best)


def test_a_checkpoint_of_another_run_is_not_resumed(encoded: Any, tmp_path: Path) -> None:
    encoder, train, validation = encoded
    training = replace(RECIPE.training, epochs=1)
    Trainer(fresh_model(encoder, train), encoder, training, tmp_path, "one").fit(train, validation)
    other = Trainer(fresh_model(encoder, train), encoder, training, tmp_path, "two")
    other.fit(train, validation, stop_after=1)
    assert other.step == 1
    assert len(list(read_metrics(tmp_path))) == 1


def test_an_interrupted_retraining_leaves_nothing_to_export(encoded: Any, tmp_path: Path) -> None:
    """A new run clears the folder first: weights of one run can never stand beside the metrics of
    another.
    """
    encoder, train, validation = encoded
    training = replace(RECIPE.training, epochs=1)
    Trainer(fresh_model(encoder, train), encoder, training, tmp_path, "one").fit(train, validation)
    (tmp_path / "run.json").write_text("{}")
    (tmp_path / "evaluation.json").write_text("{}")
    Trainer(fresh_model(encoder, train), encoder, training, tmp_path, "two").fit(
        train, validation, stop_after=1
    )
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_periods_without_a_positive_are_refused_before_training(warehouse: Warehouse) -> None:
    refuse_nothing_positive(warehouse.contract, "validation", np.array([1]))
    with pytest.raises(ValueError, match="validation period has no positive"):
        refuse_nothing_positive(warehouse.contract, "validation", np.array([0]))


def test_tables_rebuilt_while_they_were_read_are_noticed(shop: Any) -> None:
    from modeling.training.training_run import open_run, refuse_if_rebuilt

    run = open_run(shop.settings, RECIPE)
    refuse_if_rebuilt(run)
    with pytest.raises(RuntimeError, match="rebuilt while"):
        refuse_if_rebuilt(replace(run, identity="before"))


def test_a_loss_that_is_no_number_stops_with_a_reason(encoded: Any, tmp_path: Path) -> None:
    encoder, train, validation = encoded
    model = fresh_model(encoder, train)
    with torch.no_grad():
        next(model.parameters()).fill_(float("nan"))
    with pytest.raises(LossError, match="learning_rate"):
        Trainer(model, encoder, RECIPE.training, tmp_path, "nan").fit(train, validation)


def test_training_stops_early_without_improvement(encoded: Any, tmp_path: Path) -> None:
    encoder, train, validation = encoded
    training = replace(RECIPE.training, epochs=9, patience=1, learning_rate=0.0)
    summary = Trainer(fresh_model(encoder, train), encoder, training, tmp_path, "early").fit(
        train, validation
    )
    assert summary["epochs"] == 2  # the first sets the best, the second is no better


def test_training_learns(encoded: Any, tmp_path: Path) -> None:
    encoder, train, validation = encoded
    trainer = Trainer(
        fresh_model(encoder, train), encoder, replace(RECIPE.training, epochs=4), tmp_path, "learn"
    )
    trainer.fit(train, validation)
    losses = [line["loss"] for line in read_metrics(tmp_path) if line["kind"] == "step"]
    assert np.mean(losses[-10:]) < 0.8 * np.mean(losses[:5])


def test_training_on_another_device_learns_the_same(
    encoded: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its steps and validations; what it left is loaded on the CPU."""
    # torch itself writes checkpoints, and knows nothing of a device that does not exist.
    monkeypatch.setattr(Trainer, "_save", lambda self: None)
    encoder, train, validation = encoded
    training = replace(RECIPE.training, epochs=1)
    losses = []
    scores = []
    with elsewhere():
        for device in ("cpu", ELSEWHERE):
            folder = tmp_path / device
            model = fresh_model(encoder, train, dropout=0.0)
            trainer = Trainer(model, encoder, training, folder, "somewhere", device)
            trainer.fit(train, validation)
            losses.append([one["loss"] for one in read_metrics(folder) if one["kind"] == "step"])
            best = trainer.load_best()
            scores.append(predict(best.to("cpu"), encoder, validation))
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-3)
    np.testing.assert_allclose(scores[1], scores[0], atol=1e-2)


def test_prediction_in_batches_equals_prediction_alone(encoded: Any) -> None:
    encoder, train, validation = encoded
    model = fresh_model(encoder, train)
    together = predict(model, encoder, validation, most=Most(7, 900, 10**6))
    np.testing.assert_allclose(
        together, predict(model, encoder, validation, most=Most(1, 10**6, 10**6)), atol=1e-5
    )


def joined_rows(settings: Any, store: Any, request: pa.Table) -> tuple[pa.Table, Any]:
    """The training row of a request under some built tables: joined features, match features,
    history.
    """
    warehouse = Warehouse(settings)
    from modeling.training_set.dataset import point_in_time_join

    keys = request.select(["user_id", "item_id", "event_timestamp"])
    joined = point_in_time_join(store, RECIPE.service, keys)
    joined = joined.append_column("label_purchase", request["label_purchase"])
    split = warehouse.assemble(joined, request["request_id"].combine_chunks())
    vocabulary = {
        "item_id": Vocabulary(
            pa.array(sorted({f"{20000 + i}{'' if i % 3 else 'A'}" for i in range(220)}))
        ),
        "country": Vocabulary(pa.array(["France"])),
        "description_tokens": Vocabulary(pa.array(["thing"])),
    }
    encoder = Encoder(warehouse.contract, vocabulary, 512)
    made = encoder.featurise(split.requests)
    return joined, encoder.collate(made, np.arange(len(made)))


def earlier(examples: pa.Table, at: Any) -> pa.Table:
    """Examples of requests before a time, negatives included, in one order."""
    rows = examples.filter(
        pc.less(
            examples["event_timestamp"],
            pa.scalar(at, examples.schema.field("event_timestamp").type),
        )
    )
    return rows.sort_by([("request_id", "ascending"), ("item_id", "ascending")]).combine_chunks()


@pytest.mark.parametrize("change", ["delete", "permute", "add"])
def test_a_future_event_changes_nothing(
    change: str, shop: Any, shop_data: Path, tmp_path: Path, helpers: Any
) -> None:
    """Rebuild everything from raw rows whose future is deleted, shuffled among customers, or added
    to: rows stay bit-identical.
    """
    examples = JobFolder(shop.settings.home, "training_examples").read("training_examples")
    at = sorted(
        set(
            examples.filter(pc.equal(examples["split"], "validation"))[
                "event_timestamp"
            ].to_pylist()
        )
    )[3]
    request = examples.filter(
        pc.equal(
            examples["event_timestamp"],
            pa.scalar(at, examples.schema.field("event_timestamp").type),
        )
    )
    assert request.num_rows > 100
    raw = pd.read_parquet(shop_data / "online_retail.parquet")
    local = raw["InvoiceDate"].dt.tz_localize("Europe/London").dt.tz_convert("UTC")
    future = (local >= at).to_numpy()
    assert future.sum() > 50
    if change == "delete":
        raw = raw[~future]
    elif change == "permute":
        rng = np.random.default_rng(0)
        for column in ("CustomerID", "StockCode", "Country", "Description", "UnitPrice"):
            raw.loc[future, column] = rng.permutation(raw.loc[future, column])
    else:
        extra = raw[future].assign(UnitPrice=99.0, Country="Mars", Description="FUTURE")
        raw = pd.concat([raw, extra])
    data = tmp_path / "data"
    data.mkdir()
    raw.to_parquet(data / "online_retail.parquet", index=False)
    changed = helpers.settings_in(tmp_path, "online_retail", data)
    # Deleting the future means that now is the request's time; otherwise the end of the data says
    # what is knowable.
    now = {"as_of": at.isoformat()} if change == "delete" else {}
    helpers.run_jobs(changed, "events", "user_history", "item_stats", num_partitions=2, **now)
    # Examples are those of the original: the request is the same, only what surrounds it changed.
    source = JobFolder(shop.settings.home, "training_examples")
    target = JobFolder(changed.home, "training_examples")
    Path(target.root).mkdir(parents=True)
    Path(target.root, "manifest.json").write_text(Path(source.root, "manifest.json").read_text())
    store = helpers.apply_in_process(changed)
    own = JobFolder(changed.home, "events").read("events")
    folders = JobFolder(changed.home, "item_stats"), JobFolder(changed.home, "events")
    known = ItemTables(folders[0].read("item_stats"), folders[1].read("item_profile"))
    rebuilt, _ = example_rows("online_retail", own, known, 17)
    assert earlier(rebuilt, at).equals(earlier(examples, at))
    before, batch = joined_rows(shop.settings, shop.store, request)
    after, batch_after = joined_rows(changed, store, request)
    assert after.equals(before)
    for part in ("user", "candidates"):
        for name in getattr(batch, part).__dataclass_fields__:
            one = getattr(getattr(batch, part), name)
            other = getattr(getattr(batch_after, part), name)
            assert one is other is None or torch.equal(
                one.nan_to_num(-9.0), other.nan_to_num(-9.0)
            ), name
    assert bool(batch.user.mask_BL.any())


def test_an_event_at_the_requests_own_time_is_not_in_its_history(
    shop: Any, warehouse: Warehouse
) -> None:
    split = joined_period(warehouse, shop.store, RECIPE.service, "test")
    requests = split.requests
    histories = requests.gather(np.arange(len(requests)), 512)
    owner = np.repeat(np.arange(len(requests)), histories.lengths)
    assert (histories.times < requests.times[owner]).all()
    events = JobFolder(shop.settings.home, "events").read("events").to_pylist()
    times = {}
    for event in events:
        times.setdefault(event["user_id"], []).append(event["event_timestamp"])
    asked = pa.array(requests.times).cast(pa.timestamp("us", "UTC")).to_pylist()
    for user, at, length in zip(split.users.to_pylist(), asked, split.history_lengths, strict=True):
        assert length == sum(t < at for t in times[user])


def test_the_empty_history_baseline_knows_no_statistics_of_the_user_either(
    shop: Any, warehouse: Warehouse, encoded: Any
) -> None:
    encoder, _, _ = encoded
    requests = joined_period(warehouse, shop.store, RECIPE.service, "test").requests
    known = encoder.featurise(requests)
    blank = without(encoder, known, EMPTY_HISTORY)
    assert np.isnan(np.asarray(blank.dense_BG)).all()
    assert (known.dense_BG[:, 0] > 0).any()
    for name in (
        "field_BU",
        "candidate_item",
        "candidate_category",
    ):  # the rest of the request is the same
        assert (np.asarray(getattr(blank, name)) == getattr(known, name)).all()


def test_the_join_returns_every_row_in_order(shop: Any, warehouse: Warehouse) -> None:
    examples = examples_of(warehouse, "test")
    split = joined_period(warehouse, shop.store, RECIPE.service, "test")
    assert split.requests.candidate_offsets[-1] == examples.num_rows
    items = split.requests.items.take(pa.array(split.requests.candidate_keys))
    assert items.to_pylist() == examples["item_id"].to_pylist()
    assert (
        micros(examples["event_timestamp"])[split.requests.candidate_offsets[:-1]].tolist()
        == split.requests.times.tolist()
    )


def test_lost_added_or_moved_rows_are_noticed() -> None:
    asked = pa.table(
        {"user_id": [1, 2, 3], "event_timestamp": pa.array([1, 2, 3], pa.timestamp("us", "UTC"))}
    )
    check_rows(asked, asked)
    with pytest.raises(JoinError, match="returned 2 rows for 3"):
        check_rows(asked, asked.slice(0, 2))
    with pytest.raises(JoinError, match="order"):
        check_rows(asked, asked.take(pa.array([0, 2, 1])))


def test_tables_of_another_contract_are_refused(shop: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from feature_repo import datasets

    other = datasets.load_contract("movielens_1m")
    monkeypatch.setattr("feature_repo.datasets.load_contract", lambda name: other)
    with pytest.raises(StaleTableError, match="ran under contract"):
        Warehouse(shop.settings)


def test_vocabularies_hold_what_training_saw_often_enough() -> None:
    vocabulary = Vocabulary.of(pa.array(["b", "a", "b", None, "c", "a"]), 2)
    assert vocabulary.values.to_pylist() == ["a", "b"]
    assert vocabulary.indices_of(pa.array(["b", "c", None, "a"])).tolist() == [2, 0, 0, 1]
    assert vocabulary.size == 3


def test_the_second_dataset_trains_on_the_same_road(film_club: Any, tmp_path: Path) -> None:
    """MovieLens: rating labels, demographics and genres, no negatives; not a line of code of its
    own.
    """
    warehouse = Warehouse(film_club.settings)
    split, validation = (
        joined_period(warehouse, film_club.store, RECIPE.service, name)
        for name in ("train", "validation")
    )
    encoder = Encoder(warehouse.contract, vocabularies(warehouse.contract, split, 1), 16)
    train = encoder.featurise(split.requests)
    assert encoder.sizes.candidate.categories[0] == 4
    assert encoder.sizes.candidate.slots == (8, 1)
    assert int(split.requests.candidate_offsets[1]) <= 16
    assert 0.2 < train.labels.mean() < 0.9
    genres, years = (split.requests.candidate_columns[name] for name in ("genres", "year"))
    slots = encoder.collate(train, np.array([0])).candidates.category_BCK[0]
    for row, names in enumerate(genres.to_pylist()[: len(slots)]):
        found = [
            encoder.vocabularies["genres"].values[int(i) - 1].as_py() for i in slots[row, :8] if i
        ]
        assert found == names
        assert encoder.vocabularies["year"].values[int(slots[row, 8]) - 1] == years[row]
    trainer = Trainer(
        fresh_model(encoder, train), encoder, replace(RECIPE.training, epochs=1), tmp_path, "films"
    )
    assert trainer.fit(train, encoder.featurise(validation.requests))["epochs"] == 1


@pytest.mark.parametrize(
    "damage", ["half", "nothing", "no log", "a folder beside it", "other bytes"]
)
def test_what_is_left_of_a_damaged_run_is_trained_anew_and_said(
    damage: str, encoded: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    encoder, train, validation = encoded
    training = replace(RECIPE.training, epochs=1)
    Trainer(fresh_model(encoder, train), encoder, training, tmp_path, "one").fit(train, validation)
    lines = (tmp_path / "metrics.jsonl").read_text()
    checkpoint = tmp_path / "checkpoint.pt"
    whole = checkpoint.read_bytes()
    if damage == "no log":
        (tmp_path / "metrics.jsonl").unlink()
    elif damage == "a folder beside it":
        (tmp_path / ".ipynb_checkpoints").mkdir()
        checkpoint.unlink()
    else:
        checkpoint.write_bytes(
            {"half": whole[: len(whole) // 2], "nothing": b"", "other bytes": b"\x80\x04x" * 99}[
                damage
            ]
        )
    capsys.readouterr()
    Trainer(fresh_model(encoder, train), encoder, training, tmp_path, "one").fit(train, validation)
    said = " ".join(capsys.readouterr().out.split())
    assert damage == "a folder beside it" or "training begins anew" in said
    assert (tmp_path / "metrics.jsonl").read_text() == lines
