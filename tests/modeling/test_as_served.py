"""What `evaluate` measures is what a server would answer: with tokens of a user's whole history."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from modeling import recipes
from modeling.evaluation.evaluate import evaluate_run
from modeling.models.base import Ranker
from modeling.summaries.as_served import as_served
from modeling.training import training_run
from modeling.training.trainer import predict
from modeling.training.training_run import TrainingRun
from tests.conftest import Road


@pytest.fixture(scope="module")
def run(token_shop: Road) -> TrainingRun:
    return training_run.open_run(token_shop.settings, recipes.load("vista_tiny"))


@pytest.fixture(scope="module")
def loaded(run: TrainingRun) -> tuple[Ranker, Any]:
    return training_run.load_trained(run)


def test_scores_are_those_of_a_model_that_reads_all_events(
    run: TrainingRun, loaded: tuple[Ranker, Any]
) -> None:
    model, encoder = loaded
    test = run.encodings().period(run.recipe, "test").encoded
    assert test.history_lengths.max() > encoder.history_length
    served = as_served(model, encoder, test)
    # Nothing in a stage 1 that streams depends on the length that it was trained on.
    longer = replace(run.recipe, history_length=int(test.history_lengths.max()))
    whole = run.encodings().encoder_of(longer)
    found = predict(model, encoder, served)
    np.testing.assert_allclose(found, predict(model, whole, test), atol=1e-4)
    newest = predict(model, encoder, test)
    assert np.abs(found - newest).max() > 1e-3


def test_both_are_reported_where_they_differ(run: TrainingRun, loaded: tuple[Ranker, Any]) -> None:
    model, encoder = loaded
    lines: list[str] = []
    found = evaluate_run(
        model, encoder, run.encodings().period(run.recipe, "test"), tell=lines.append
    )
    newest = found.metrics["model, newest 16 events"]["log_loss"]
    assert newest.value != found.metrics["model"]["log_loss"].value
    assert any("as a store holds them" in line for line in lines)


def test_a_model_that_reads_whole_histories_is_left_alone(run: TrainingRun) -> None:
    test = run.encodings().period(run.recipe, "test").encoded
    model, _ = training_run.load_trained(run)
    whole = run.encodings().encoder_of(replace(run.recipe, history_length=1 << 20))
    assert as_served(model, whole, test) is test
