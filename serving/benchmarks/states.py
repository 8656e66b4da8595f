"""A user's encoding, kept between requests (`serving/ranking/states.py`), beside encoding anew: the same user in every
number, the same past at a later request, one event more. On one thread.

Models of the base size with random weights; those whose states grow, and one whose states do not, which is
known again only where nothing changed. Scores are compared. Floor: the comparison alone, which every kept user
costs.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from feature_repo.benchmarks import interleaved, parser, report
from modeling import models
from modeling.benchmarks.worlds import sizes_of
from modeling.inputs.batch import UserInputs
from modeling.inputs.made_up import requests
from modeling.models.base import Ranker
from serving.benchmarks.synthetic import SIZES
from serving.ranking.states import UserStates

CANDIDATES = 20  # to compare scores by
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "amortised, causal": ("amortised_dlrm", {"causal": True, "positions": "from_oldest"}),
    "OneTrans, no pyramid": ("onetrans", {"pyramid": False}),
    "OneTrans": ("onetrans", {}),
    "amortised": ("amortised_dlrm", {}),
}


def main() -> None:
    """Run."""
    arguments = parser("serving.benchmarks.states", __doc__).parse_args()
    torch.set_num_threads(1)
    size = SIZES["small" if arguments.quick else "base"]
    rows = []
    for name, (kind, own) in MODELS.items():
        torch.manual_seed(0)
        config = {"width": size.width, "num_layers": size.layers, "num_heads": 4, **own}
        model = models.build(kind, config, sizes_of(size.length)).eval()
        rows.append({"model": name} | _measure(model, size.length, arguments.repeats))
    about = {"width": size.width, "layers": size.layers, "events": size.length}
    report("states", about, rows, arguments.json)


def _measure(model: Ranker, length: int, repeats: int) -> dict[str, Any]:
    batch = requests(model.sizes, 1, length, CANDIDATES)
    whole = batch.user
    candidates = batch.candidates
    before = whole.events(0, length - 1)
    later = replace(before, dense_BG=before.dense_BG + 0.5, age_BL=before.age_BL + 0.1)
    with torch.inference_mode():
        known = model.encode_user(before)

    @torch.inference_mode()
    def kept(user: UserInputs) -> Any:
        """From what was kept of `before`."""
        states = UserStates(model, most_bytes=1 << 30)
        states._keep(0, known, before, time.monotonic())
        return states.of(0, user)

    @torch.inference_mode()
    def anew(user: UserInputs) -> Any:
        return model.encode_user(user)

    users = {"known": before, "later": later, "one event more": whole}
    calls: dict[str, Callable[[], Any]] = {"anew": partial(anew, whole)}
    calls |= {name: partial(kept, user) for name, user in users.items()}
    spent = interleaved(calls, 4 * repeats, 3)
    with torch.inference_mode():
        largest = max(
            float((model.score(kept(u), candidates) - model.score(anew(u), candidates)).abs().max())
            for u in users.values()
        )
    milliseconds = {f"{name}_ms": 1000 * of["wall_s"] for name, of in spent.items()}
    return {**milliseconds, "largest difference": largest}


if __name__ == "__main__":
    main()
