"""What nobody knows ranks by a prior: never first more often than chance, for every ranker and
baseline, on both datasets.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from modeling.benchmarks.shapes import shaped
from modeling.evaluation.evaluate import unknown_first
from modeling.inputs.augment import hide, unknown_dense
from modeling.inputs.encoder import Encoder
from modeling.recipes import Recipe, Training
from modeling.training.trainer import Trainer, predict
from modeling.training.training_run import build_model
from modeling.training_set.dataset import Warehouse
from tests.periods import joined_period, vocabularies

SMALL = {"width": 16}
STEPS = 90
# One of each model and fusion; what differs in size or kernel alone is left out.
NAMES = (
    *("amortised", "onetrans", "hiformer", "vista", "vista_stream", "sasrec_rank", "hstu_rank"),
    "hydrarec",
    *("transformer", "din", "dcnv2", "dlrm", "autoint", "rankmixer", "wukong"),
)
RECIPES = {name: shaped(name, "any data") for name in NAMES}
MODELS: dict[str, dict[str, Any]] = {
    name: {
        **recipe.config,
        **SMALL,
        "dropout": 0.0,
        **({"num_layers": 1} if "num_layers" in recipe.config else {}),
    }
    for name, recipe in RECIPES.items()
}


@pytest.fixture(scope="module", params=["shop", "film_club"])
def world(request: pytest.FixtureRequest) -> Any:
    """Encoder, and training and test requests."""
    road = request.getfixturevalue(request.param)
    warehouse = Warehouse(road.settings)
    train, test = (
        joined_period(warehouse, road.store, "ranking_v1", name) for name in ("train", "test")
    )
    encoder = Encoder(warehouse.contract, vocabularies(warehouse.contract, train, 2), 16)
    return encoder, encoder.featurise(train.requests), encoder.featurise(test.requests)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(MODELS))
def test_an_unknown_item_comes_first_no_more_often_than_chance(
    name: str, world: Any, tmp_path: Any
) -> None:
    encoder, train, test = world
    epochs = max(3, STEPS * 16 // len(train))  # what is untrained ranks at random, and says nothing
    training = Training(
        epochs=epochs, max_requests=16, max_candidates=1024, warmup_steps=10, patience=epochs
    )
    recipe = Recipe(
        name,
        RECIPES[name].model,
        "ranking_v1",
        MODELS[name],
        16,
        min_item_count=2,
        training=training,
    )
    torch.set_num_threads(1)
    model = build_model(recipe, encoder, train)
    Trainer(model, encoder, recipe.training, tmp_path, "unknown").fit(train, test)
    logits = predict(model, encoder, test)[:, 0]
    assert np.isfinite(logits).all()
    found = unknown_first(model, encoder, test, logits)
    assert found.first <= found.most, found


def test_hidden_candidates_lose_everything_and_bare_ones_their_statistics(world: Any) -> None:
    encoder, train, _ = world
    batch = encoder.collate(train, np.arange(min(len(train), 20)))
    hidden = hide(encoder, batch, 0.25, np.random.default_rng(0))
    gone = (hidden.candidates.item_BC == 0) & (batch.candidates.item_BC != 0)
    dense = hidden.candidates.dense_BCF[gone].numpy()
    np.testing.assert_array_equal(dense, np.tile(unknown_dense(encoder), (len(dense), 1)))
    assert not hidden.candidates.category_BCK[gone].any()
    column = encoder.dense_names.index("count_total")
    bare = (
        hidden.candidates.dense_BCF[..., column].isnan()
        & ~batch.candidates.dense_BCF[..., column].isnan()
        & ~gone
    )
    assert 0.1 < bare.float().mean() < 0.4
    assert (hidden.candidates.item_BC[bare] == batch.candidates.item_BC[bare]).all()
    same = hide(encoder, batch, 0.25, np.random.default_rng(0))
    assert (same.candidates.item_BC == hidden.candidates.item_BC).all()
    assert hide(encoder, batch, 0.0, np.random.default_rng(0)).candidates.item_BC.equal(
        batch.candidates.item_BC
    )
    assert replace(hidden, candidates=batch.candidates).labels_BCT is batch.labels_BCT
