"""How often a kept state spares an encoding: the test period's requests of a dataset in the order of time, each user's state
kept from request to request (`serving/ranking/states.py`).

Of each user's later requests: `known`, the very same numbers; `extended`, by new events or by nothing; `encoded`, anew. Weights are
random, which changes no outcome. No state goes for its age or for want of memory: the trace is of months, and takes
seconds. The floor is what no model could spare: the share of later requests in whose window nothing is left of the
one before.
"""

from __future__ import annotations

import time
from typing import Any, cast

import numpy as np
import torch

from feature_repo.benchmarks import parser, report
from feature_repo.settings import Settings
from modeling import recipes
from modeling.recipes import SERVICE, Recipe
from modeling.training.training_run import build_model
from modeling.training_set.encodings import Encodings
from serving.ranking.states import OUTCOMES, UserStates

RECIPES = ("onetrans", "amortised_dlrm", "hydrarec", "vista_stream")
MOST_BYTES = 8 << 30


def main() -> None:
    """Run."""
    flags = parser("serving.benchmarks.trace", __doc__)
    flags.add_argument("--recipes", nargs="+", default=list(RECIPES))
    arguments = flags.parse_args()
    torch.set_num_threads(1)
    settings = Settings.from_env()
    rows = []
    for name in arguments.recipes:
        recipe = cast(Recipe, recipes.load(name))
        rows.append(_replayed(settings, recipe, 200 if arguments.quick else None))
    report("trace", {"dataset": settings.dataset}, rows, arguments.json)


def _replayed(settings: Settings, recipe: Recipe, most: int | None) -> dict[str, Any]:
    """Outcomes of the later requests of a recipe's trace, and what an encoding and an extension take."""
    encodings = Encodings(settings, SERVICE)
    encoder = encodings.encoder_of(recipe)
    period = encodings.period(recipe, "test")
    encoded = period.encoded
    torch.manual_seed(0)
    model = build_model(recipe, encoder, encodings.period(recipe, "train").encoded).eval()
    states = UserStates(model, MOST_BYTES, most_s=float("inf"))
    lengths = encoded.history_lengths
    assert lengths is not None
    before: dict[Any, int] = {}
    apart = 0
    found = dict.fromkeys(OUTCOMES, 0)
    spent = dict.fromkeys(OUTCOMES, 0.0)
    with torch.inference_mode():
        for request in np.argsort(encoded.times, kind="stable")[:most]:
            user = period.users[request]
            inputs = encoder.collate(encoded, np.array([request])).user
            counts = states.counts.copy()
            began = time.perf_counter()
            states.of(user, inputs)
            took = time.perf_counter() - began
            (outcome,) = states.counts - counts
            spent[outcome] += took
            if user in before:
                found[outcome] += 1
                apart += int(lengths[request]) - before[user] >= recipe.history_length
            before[user] = int(lengths[request])
    later = max(sum(found.values()), 1)
    all_of = {outcome: max(states.counts[outcome], 1) for outcome in OUTCOMES}
    return {
        "recipe": recipe.name,
        "requests": sum(states.counts.values()),
        "later": later,
        **{outcome: number / later for outcome, number in found.items()},
        "spared": 1 - found["encoded"] / later,
        "nothing left": apart / later,
        **{f"{outcome}_ms": 1000 * spent[outcome] / all_of[outcome] for outcome in OUTCOMES},
    }


if __name__ == "__main__":
    main()
