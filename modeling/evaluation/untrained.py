"""Every scoring of the test candidates that needs no training."""

from __future__ import annotations

import numpy as np

from modeling.evaluation.item_graphs import graph_baselines
from modeling.inputs.tasks import primary_number
from modeling.recipes import Recipe
from modeling.training_set.encodings import Encodings
from modeling.training_set.simple_baselines import baselines_of


def untrained_scores(encodings: Encodings, recipe: Recipe) -> dict[str, np.ndarray]:
    """Scores of all test candidates by name: counts, popularity, item graphs, EASE.

    Args:
        recipe: whose encoding of the period is read.
    """
    test = encodings.period(recipe, "test")
    number = primary_number(encodings.encoder_of(recipe).contract.spec)
    labels = np.asarray(test.encoded.labels)[:, number]
    scores = baselines_of(test.baselines, labels, test.encoded.candidate_offsets)
    protocol = encodings.sample.protocol
    # Item graphs are fitted until the validation period, which the ends of users' histories mostly lie before.
    if protocol is None or not protocol.blocks:
        found = encodings.set_of(recipe)
        scores |= graph_baselines(found.warehouse, found.relations, test)
    return scores
