"""Trees as rankers: scored as LightGBM scores them, trained, exported, served, explained and blended like any other."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightgbm
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from feature_repo import datasets
from feature_repo.contract.contract import Contract
from feature_repo.home.catalogue import Catalogue
from feature_repo.home.tables import JobFolder
from modeling import recipes
from modeling.bundle import bundle
from modeling.bundle.bundle import BundleError
from modeling.errors import DataError, RecipeError
from modeling.metrics import mean_ndcg
from modeling.recipes.trees import TINY
from modeling.training import trees as of_training
from modeling.training.changes import Changes, changed
from modeling.training.training_run import load_trained, open_run, refuse_untrained
from modeling.training_set.encodings import Encodings
from modeling.trees.blend import Blend, best_share, deviations, tree_effects, trees_of
from modeling.trees.columns import TreeColumns, column_names
from modeling.trees.fitting import (
    TreeRows,
    TreesConfig,
    calibrated,
    fit_forest,
    fit_forests,
    tree_rows,
)
from modeling.trees.forest import Forest
from modeling.trees.text import ForestError
from modeling.trees.trees import Trees
from serving.api.messages import RankRequest
from serving.command import open_ranker
from serving.ranking.explain import explain
from tests.conftest import Road, copied, run_jobs, train_road
from tests.forests import forest_on
from tests.ranking import ranked

CATEGORIES = (4, 5)


def rows_of(number: int, seed: int) -> np.ndarray:
    """Numbers with gaps, infinities and repeated values; categories that training may not have seen."""
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(number, 6)).astype(np.float32)
    rows[:, 1] = np.round(rows[:, 1])
    rows[rng.random(rows.shape) < 0.15] = np.nan
    rows[:, 3] = rng.normal(size=number)
    rows[rng.random(number) < 0.05, 3] = np.inf
    rows[rng.random(number) < 0.05, 3] = -np.inf
    rows[:, 4] = rng.integers(-1, 70, number)
    rows[:, 5] = rng.integers(0, 3, number)
    rows[rng.random(number) < 0.1, 5] = np.nan
    return rows


@cache
def texts() -> dict[str, str]:
    rows = rows_of(3000, 0)
    finite = np.nan_to_num(rows, nan=0.0, posinf=5, neginf=-5)
    labels = finite[:, 0] + finite[:, 3] + 2 * (rows[:, 4] % 7 > 3) - (rows[:, 5] == 1) > 0.5
    trained = np.where(np.isinf(rows), 5, rows)
    whole = trained[~np.isnan(trained[:, :4]).any(axis=1)]
    return {
        "all kinds": forest_on(trained, labels, CATEGORIES, num_leaves=40, num_trees=60),
        "numbers alone": forest_on(trained[:, :4], labels, num_leaves=17),
        # Without a missing number in training, a missing one counts as 0
        "nothing missing": forest_on(whole[:, :4], labels[: len(whole)]),
        "one split": forest_on(trained, labels, CATEGORIES, num_leaves=2),
        "one leaf": forest_on(trained[:10], labels[:10], CATEGORIES, min_data_in_leaf=50),
        "one tree": forest_on(trained, labels, CATEGORIES, num_trees=1),
        # More leaves than a byte has numbers for
        "wide": forest_on(trained, labels, CATEGORIES, num_leaves=400, min_data_in_leaf=1),
    }


@pytest.mark.parametrize("name", texts())
@settings(max_examples=20, deadline=None)
@given(number=st.integers(1, 700), seed=st.integers(0, 1000))
def test_a_forest_scores_as_lightgbm_does_to_the_bit(name: str, number: int, seed: int) -> None:
    text = texts()[name]
    forest = Forest(text)
    rows = rows_of(number, seed)[:, : len(forest.names)]
    expected = lightgbm.Booster(model_str=text).predict(rows, raw_score=True, num_threads=1)
    assert np.array_equal(forest.scores(rows), np.asarray(expected))


def test_a_threshold_between_two_neighbouring_floats_parts_them() -> None:
    below = np.float32(0.1)
    above = np.nextafter(below, np.float32(1))
    rows = np.repeat(np.array([[below], [above]], np.float32), 50, axis=0)
    text = forest_on(rows, np.arange(100) >= 50, num_leaves=2)
    expected = lightgbm.Booster(model_str=text).predict(rows, raw_score=True)
    assert len(np.unique(np.asarray(expected))) == 2
    assert np.array_equal(Forest(text).scores(rows), np.asarray(expected))


def test_no_row_has_no_score() -> None:
    assert Forest(texts()["all kinds"]).scores(rows_of(0, 1)).shape == (0,)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda text: "", "no whole LightGBM model"),
        (lambda text: text[: len(text) // 2], "no whole LightGBM model"),
        (lambda text: text.replace("is_linear=0", "is_linear=1", 1), "linear leaves"),
        (lambda text: text.replace("num_tree_per_iteration=1", "num_tree_per_iteration=3"), "one tree"),
        (lambda text: text.replace("left_child=", "somewhere=", 1), "cannot be read"),
    ],
)  # fmt: skip
def test_a_text_that_cannot_be_scored_is_refused(change: Any, reason: str) -> None:
    with pytest.raises(ForestError, match=reason):
        Forest(change(texts()["all kinds"]))


def test_zero_as_missing_is_refused() -> None:
    rows = np.nan_to_num(rows_of(500, 0)[:, :4], posinf=3, neginf=-3)
    text = forest_on(rows, rows[:, 0] > 0, zero_as_missing=True)
    with pytest.raises(ForestError, match="zero_as_missing"):
        Forest(text)


def test_calibration_finds_the_scale_and_shift_of_the_logits() -> None:
    rng = np.random.default_rng(0)
    scores = rng.normal(3, 2, 200_000)
    labels = (rng.random(len(scores)) < 1 / (1 + np.exp(-(0.7 * scores - 4)))).astype(float)
    labels[:100] = np.nan
    scale, shift = calibrated(scores, labels)
    assert scale == pytest.approx(0.7, abs=0.02)
    assert shift == pytest.approx(-4, abs=0.1)


def test_calibration_of_scores_that_tell_nothing_is_the_rate() -> None:
    labels = np.r_[np.ones(10), np.zeros(90)]
    for scores in (np.full(100, 3.0), np.full(100, 3.0) + 1e-9 * np.arange(100), -labels):
        scale, shift = calibrated(scores, labels)
        assert scale == 0
        assert 1 / (1 + np.exp(-shift)) == pytest.approx(0.1, abs=0.01)


def test_calibration_of_scores_that_part_the_labels_is_finite() -> None:
    labels = np.r_[np.ones(10), np.zeros(90)]
    scale, shift = calibrated(labels * 2 - 1, labels)
    assert 0 < scale < 10
    assert abs(shift) < 10


def test_weights_of_two_scores_order_better_than_either() -> None:
    rng = np.random.default_rng(1)
    offsets = np.arange(0, 20_001, 20)
    one, other, noise = rng.normal(size=(3, 20_000))
    labels = np.zeros(20_000)
    appeal = one + other + 0.5 * rng.gumbel(size=20_000)
    labels[offsets[:-1] + appeal.reshape(-1, 20).argmax(1)] = 1
    scores = np.stack([one, 5 * other, -noise * 0 - one], axis=1)[:, :2]
    share = best_share(scores, labels, offsets)
    # The second is five times as large and says as much
    assert share == pytest.approx(0.5, abs=0.04)
    blended = mean_ndcg(labels, scores @ ([share, 1 - share] / deviations(scores)), offsets)
    assert blended > max(mean_ndcg(labels, column, offsets) for column in scores.T)


def test_a_score_that_misleads_has_no_weight() -> None:
    rng = np.random.default_rng(2)
    offsets = np.arange(0, 4001, 20)
    good = rng.normal(size=4000)
    labels = np.zeros(4000)
    labels[offsets[:-1] + good.reshape(-1, 20).argmax(1)] = 1
    scores = np.stack([good, -good], axis=1) + rng.normal(size=(4000, 2))
    assert best_share(scores, labels, offsets) == 1


def test_where_no_request_tells_trees_rank_alone() -> None:
    scores = np.random.default_rng(3).normal(size=(40, 2))
    assert best_share(scores, np.zeros(40), np.arange(0, 41, 20)) == 0


def test_a_metric_that_all_requests_gain_alike_by_has_no_say_beyond_its_size() -> None:
    """Its deviation is rounding, and divided by that it would decide alone."""
    alike = np.full((100, 1), 1 / np.log2(3))
    assert 0 < alike.std() < 1e-12
    assert deviations(alike).tolist() == [1.0]
    assert deviations(np.array([[0.0, 5.0], [2.0, 5.0]])).tolist() == [1.0, 1.0]


@pytest.fixture(scope="module")
def shop_of_trees(shop: Road, tmp_path_factory: pytest.TempPathFactory) -> Road:
    """A shop with trees trained, evaluated and live; and a blend, which is not live before its summary tokens are
    there.
    """
    road = copied(shop, tmp_path_factory.mktemp("trees"))
    train_road(road, "trees_tiny")
    train_road(road, "vista_trees_tiny")
    return road


def trained(road: Road, name: str) -> Any:
    return load_trained(refuse_untrained(open_run(road.settings, recipes.load(name))))


def test_each_half_is_summed_by_the_trees_that_the_other_half_stops(shop_of_trees: Road) -> None:
    run = open_run(shop_of_trees.settings, recipes.load("trees_tiny"))
    encodings = run.encodings()
    encoder = encodings.encoder_of(run.recipe)
    train, rows = (
        tree_rows(encoder, encodings.period(run.recipe, name).encoded)
        for name in ("train", "validation")
    )
    # As many trees in every run: where each set is ranked best is found among the same ones.
    config = TreesConfig(num_trees=30, num_leaves=5, smallest_leaf=5, learning_rate=0.3)
    config = replace(config, patience=config.num_trees)
    whole = fit_forest(config, encoder, train, rows, 0, 1, out_of_fold=True)
    assert whole.out_of_fold_N is not None
    middle = int(rows.candidates_R[: len(rows.candidates_R) // 2].sum())
    first = np.arange(len(rows.rows_NF)) < middle
    stopped = []
    for half in (first, ~first):
        labels = np.where(half[:, None], rows.labels_NT, np.nan)
        forest = Forest(
            fit_forest(config, encoder, train, replace(rows, labels_NT=labels), 0, 1).text
        )
        other = rows.rows_NF[~half].astype(np.float32)
        by_other = forest.scores(other)
        by_all = Forest(whole.text).scores(other)
        np.testing.assert_allclose(
            whole.out_of_fold_N[~half], by_other * (by_all.std() / by_other.std()), rtol=1e-12
        )
        stopped.append(forest.num_trees)
    # Else this says nothing.
    assert stopped[0] != stopped[1]


def test_a_blend_has_the_trees_that_stand_alone_and_weighs_them_out_of_fold(
    shop_of_trees: Road, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = open_run(shop_of_trees.settings, recipes.load("vista_trees_tiny"))
    model, encoder = load_trained(refuse_untrained(run))
    assert isinstance(model, Blend)
    periods = [run.encodings().period(run.recipe, name).encoded for name in ("train", "validation")]
    asked: dict[str, np.ndarray] = {}

    def weigh(scores: np.ndarray, labels_N: np.ndarray, offsets: np.ndarray) -> float:
        asked["scores"], asked["labels"] = scores, labels_N
        return best_share(scores, labels_N, offsets)

    monkeypatch.setattr(of_training, "best_share", weigh)
    summary = {"best_validation_ndcg@10": 0.0, "cpu_seconds": 0.0}
    again = of_training.fit_blend(
        model.network, summary, TINY, encoder, run.recipe.training, *periods
    )
    alone = of_training.fit_trees(TINY, encoder, run.recipe.training, *periods)
    assert again.blend.trees.texts == alone.trees.texts
    assert np.isnan(alone.out_of_fold_NT).all()
    apart = of_training.fit_trees(TINY, encoder, run.recipe.training, *periods, out_of_fold=True)
    np.testing.assert_array_equal(asked["labels"], np.asarray(periods[1].labels)[:, 0])
    np.testing.assert_array_equal(asked["scores"][:, 1], apart.out_of_fold_NT[:, 0])
    # The same trees and weights as the run's.
    assert again.blend.trees.texts == model.trees.texts
    torch.testing.assert_close(again.blend.weight_T2, model.weight_T2)


def test_a_bundle_of_trees_scores_as_the_run(shop_of_trees: Road, tmp_path: Path) -> None:
    settings = shop_of_trees.settings
    live = Catalogue(settings.catalogue_url).live_bundle("online_retail")
    assert live.recipe == "trees_tiny"
    contract = datasets.load_contract("online_retail")
    loaded = bundle.load(settings.path(live.path), contract, live.digest)
    model, _ = trained(shop_of_trees, "trees_tiny")
    assert isinstance(loaded.model, Trees)
    assert loaded.model.texts == model.texts
    assert loaded.model.state_dict() == model.state_dict()
    # Damaged or missing trees are refused.
    for change in ("", "flip"):
        copy = Path(shutil.copytree(settings.path(live.path), tmp_path / f"bundle{change}"))
        file = copy / "trees-0.txt"
        if change:
            file.write_text(file.read_text().replace("leaf_value=", "leaf_value=9", 1))
        else:
            file.unlink()
        with pytest.raises(BundleError, match="trees-0"):
            bundle.load(copy, contract)
    manifest = json.loads((settings.path(live.path) / "bundle.json").read_text())
    assert set(manifest["files"]) == {*bundle.FILES, "trees-0.txt"}


def test_effects_of_columns_sum_to_the_logit(shop_of_trees: Road) -> None:
    model, encoder = trained(shop_of_trees, "trees_tiny")
    run = open_run(shop_of_trees.settings, recipes.load("trees_tiny"))
    encoded = run.encodings().period(run.recipe, "test").encoded
    batch = encoder.collate(encoded, np.array([0]))
    effects = tree_effects(model, batch, column_names(encoder), task=0)
    assert len(effects) == len(column_names(encoder)) + 1
    assert sum(one.effect for one in effects) == pytest.approx(
        float(model(batch)[0, 0, 0]), abs=1e-5
    )


def test_trees_and_a_network_are_one_bundle_that_makes_tokens(shop_of_trees: Road) -> None:
    road = shop_of_trees
    run = open_run(road.settings, recipes.load("vista_trees_tiny"))
    model, encoder = load_trained(refuse_untrained(run))
    assert isinstance(model, Blend)
    assert (model.weight_T2 >= 0).all()
    assert model.token_maker is model.network
    assert trees_of(model) is model.trees
    contract = datasets.load_contract("online_retail")
    catalogue = Catalogue(road.settings.catalogue_url)
    [row] = [b for b in catalogue.bundles("online_retail") if b.recipe == "vista_trees_tiny"]
    loaded = bundle.load(road.settings.path(row.path), contract, row.digest)
    assert loaded.makes_tokens
    period = run.encodings().period(run.recipe, "test")
    batch = encoder.collate(period.encoded, np.arange(4))
    assert np.allclose(loaded.model(batch).detach(), model(batch).detach(), atol=1e-6)
    # The blend is the sum that it says it is.
    first, second = model.weight_T2[0]
    both = first * model.network(batch) + second * model.trees(batch) + model.shift_T
    assert np.allclose(both.detach(), model(batch).detach(), atol=1e-6)


def test_the_same_seed_gives_the_same_trees(shop_of_trees: Road) -> None:
    run = open_run(shop_of_trees.settings, recipes.load("trees_tiny"))
    encodings = run.encodings()
    encoder = encodings.encoder_of(run.recipe)
    rows = [
        tree_rows(encoder, encodings.period(run.recipe, name).encoded, hidden, 1)
        for name, hidden in (("train", 0.1), ("validation", 0.0))
    ]
    config = TreesConfig(num_trees=3, num_leaves=5, smallest_leaf=5)
    [one], [again] = (fit_forests(config, encoder, *rows, seed=1) for _ in range(2))
    [other] = fit_forests(config, encoder, *rows, seed=2)
    assert one.text == again.text != other.text


def test_training_without_a_positive_says_so(shop_of_trees: Road) -> None:
    run = open_run(shop_of_trees.settings, recipes.load("trees_tiny"))
    encodings = run.encodings()
    encoder = encodings.encoder_of(run.recipe)
    rows = tree_rows(encoder, encodings.period(run.recipe, "validation").encoded)
    nothing = replace(rows, labels_NT=np.zeros_like(rows.labels_NT))
    assert isinstance(nothing, TreeRows)
    with pytest.raises(DataError, match="2 positives and 2 negatives of label_purchase"):
        fit_forests(TreesConfig(), encoder, nothing, rows, seed=1)


def test_where_half_of_the_validation_period_has_no_positive_trees_rank_alone(
    shop_of_trees: Road,
) -> None:
    run = open_run(shop_of_trees.settings, recipes.load("vista_trees_tiny"))
    model, encoder = load_trained(refuse_untrained(run))
    assert isinstance(model, Blend)
    train, validation = (
        run.encodings().period(run.recipe, name).encoded for name in ("train", "validation")
    )
    labels = np.array(validation.labels)
    labels[validation.candidate_offsets[len(validation) // 2] :] = 0
    fitted = of_training.fit_blend(
        model.network,
        {"best_validation_ndcg@10": 0.0, "cpu_seconds": 0.0},
        TINY,
        encoder,
        run.recipe.training,
        train,
        replace(validation, labels=labels),
    )
    assert fitted.blend.weight_T2[0, 0] == 0
    assert fitted.blend.weight_T2[0, 1] > 0


@pytest.mark.parametrize("name", ["num_trees", "patience"])
def test_a_forest_without_trees_is_refused(name: str) -> None:
    with pytest.raises(RecipeError, match=f"{name} of trees is at least 1, not 0"):
        TreesConfig(**{name: 0})


def test_fields_of_trees_are_set_by_name() -> None:
    blend = changed(recipes.load("vista_trees"), Changes(assignments=("trees.num_leaves=20",)))
    assert blend.trees == {"num_leaves": 20}
    alone = changed(recipes.load("trees"), Changes(assignments=("model.objective=binary",)))
    assert alone.config == {"objective": "binary"}
    with pytest.raises(RecipeError, match="no such field"):
        changed(recipes.load("vista_trees"), Changes(assignments=("trees.leaves=20",)))
    with pytest.raises(RecipeError, match="trees"):
        changed(recipes.load("vista"), Changes(assignments=("trees.num_leaves=20",)))


def test_a_server_ranks_by_trees_and_explains_them_by_their_columns(shop_of_trees: Road) -> None:
    ranker = open_ranker(shop_of_trees.settings, replay=True)
    users = JobFolder(shop_of_trees.settings.home, "user_history").read("user_history")["user_id"]
    known = ranker.bundle.encoder.items.values.to_pylist()[:20]
    request = RankRequest(users[3].as_py(), known)
    answer = ranked(ranker, request)
    assert answer.bundle.startswith("trees_tiny@")
    assert answer.degraded == []
    best = answer.item_ids[0]
    user = ranker.reader.read_user(request.user_id)
    explained = explain(ranker, RankRequest(request.user_id, [best]), user, 3)
    assert explained.score == pytest.approx(answer.scores[0], abs=1e-6)
    logit = np.log(explained.score) - np.log1p(-explained.score)
    assert sum(one.effect for one in explained.columns) == pytest.approx(logit, abs=1e-4)
    effects = [abs(one.effect) for one in explained.columns]
    assert effects == sorted(effects, reverse=True)


def test_a_blend_is_promoted_with_its_tokens_and_rolled_back(shop_of_trees: Road) -> None:
    road = shop_of_trees
    catalogue = Catalogue(road.settings.catalogue_url)
    assert catalogue.live_bundle("online_retail").recipe == "trees_tiny"
    # The blend goes live with the tokens that its network makes.
    run_jobs(road.settings, "summary_tokens", bundle="vista_trees_tiny")
    catalogue.set_live("online_retail", bundle_of(catalogue, "vista_trees_tiny"))
    ranker = open_ranker(road.settings, replay=True)
    users = JobFolder(road.settings.home, "user_history").read("user_history")["user_id"]
    known = ranker.bundle.encoder.items.values.to_pylist()[:20]
    answer = ranked(ranker, RankRequest(users[3].as_py(), known))
    assert answer.bundle.startswith("vista_trees_tiny@")
    assert answer.tokens == ranker.bundle.tokens
    assert answer.degraded == []
    # And the trees come back: the bundle that was live before.
    before = catalogue.live_before("online_retail").digest
    assert before == bundle_of(catalogue, "trees_tiny")
    catalogue.set_live("online_retail", before)
    again = ranked(open_ranker(road.settings, replay=True), RankRequest(users[3].as_py(), known))
    assert again.bundle.startswith("trees_tiny@")


def bundle_of(catalogue: Catalogue, recipe: str) -> str:
    """Digest of a recipe's bundle."""
    [row] = [one for one in catalogue.bundles("online_retail") if one.recipe == recipe]
    return str(row.digest)


def test_trees_read_no_category_that_is_counted(shop: Any) -> None:
    """Its counts say more, and its values would be memorised; other categories are read."""
    encodings = Encodings(shop.settings, "ranking_v1")
    recipe = recipes.load("trees_tiny")
    encoder = encodings.encoder_of(recipe)
    rows = tree_rows(encoder, encodings.period(recipe, "train").encoded)
    # The label, as a category: whoever may read it reads nothing else.
    place = TreeColumns.of(encoder.sizes).categories[0]
    name = column_names(encoder)[place]
    told = rows.rows_NF.copy()
    told[:, place] = 1 + rows.labels_NT[:, 0]
    rows = replace(rows, rows_NF=told)
    config = TreesConfig("binary", num_trees=4, num_leaves=6, smallest_leaf=5)
    read = {}
    for counted in ((), (SimpleNamespace(name=name.removesuffix("_id")),)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Contract, "remembered", counted)
            forest = lightgbm.Booster(model_str=fit_forest(config, encoder, rows, rows, 0, 1).text)
        read[bool(counted)] = forest.feature_importance()[place]
    assert read[False] > 0
    assert read[True] == 0
