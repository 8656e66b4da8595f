"""The cost of a training step against the number of items: with lazy tables, and with dense gradients beside (the plain
twin).

The same requests are drawn from catalogues of different sizes: of as many different items as the smallest has ("few"), or
of all items alike ("all"), whose rows are then mostly read once. The floor is the step of the smallest catalogue, with a
dense table.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from feature_repo.benchmarks import interleaved, parser, report
from modeling import models
from modeling.benchmarks.worlds import sizes_of
from modeling.inputs.batch import Batch
from modeling.inputs.made_up import requests
from modeling.layers import embedding
from modeling.layers.memory import keep_freed_memory
from modeling.models.base import Ranker
from modeling.recipes import Training
from modeling.training.optimizers import clip_gradients, optimizer_of
from modeling.training.trainer import masked_bce

MODELS: dict[str, dict[str, Any]] = {
    "din": {},
    "amortised_dlrm": {"num_layers": 2, "num_heads": 2},
}
WIDTH = 32
SMALLEST = 3_000
CATALOGUES = (SMALLEST, 200_000, 4_000_000)
QUICK = (SMALLEST, 200_000)
LENGTH = 128
REQUESTS = 64
CANDIDATES = 96
NEVER = 1 << 62


def main() -> None:
    """Run."""
    flags = parser("modeling.benchmarks.catalogue", __doc__)
    arguments = flags.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    catalogues = QUICK if arguments.quick else CATALOGUES
    rows = []
    for name in MODELS:
        for drawn in ("few", "all"):
            rows += _measured(name, catalogues, drawn, arguments.repeats)
    config = {"width": WIDTH, "L": LENGTH, "B": REQUESTS, "C": CANDIDATES}
    report("catalogue", config, rows, arguments.json)


def _measured(
    name: str, catalogues: tuple[int, ...], drawn: str, repeats: int
) -> list[dict[str, Any]]:
    """Steps at every size, lazy and dense, side by side."""
    steps = {
        (number, kind): _Steps(name, number, drawn, kind)
        for number in catalogues
        for kind in ("lazy", "dense")
        if number > SMALLEST or kind == "dense"
    }
    for one in steps.values():
        # Optimisers make their state at the first step.
        one.step()
    seconds = interleaved({f"{n} {k}": one.step for (n, k), one in steps.items()}, repeats)
    floor = seconds[f"{SMALLEST} dense"]["wall_s"]
    return [
        {
            "model": name,
            "drawn": drawn,
            "items": number,
            "table": kind,
            "wall_ms": 1000 * seconds[f"{number} {kind}"]["wall_s"],
            "of_smallest": seconds[f"{number} {kind}"]["wall_s"] / floor,
        }
        for number, kind in steps
    ]


class _Steps:
    """A model over a catalogue, and steps of its training."""

    def __init__(self, name: str, items: int, drawn: str, kind: str) -> None:
        torch.manual_seed(0)
        sizes = replace(sizes_of(LENGTH), items=items)
        rows = embedding.LAZY_ROWS if kind == "lazy" else NEVER
        with mock.patch.object(embedding, "LAZY_ROWS", rows):
            config = {"width": WIDTH, **MODELS[name]}
            self.model: Ranker = models.build(name, config, sizes).train()
        self.optimizer = optimizer_of(self.model, Training())
        asked = replace(sizes, items=SMALLEST if drawn == "few" else items)
        self.batch = _spread(requests(asked, REQUESTS, LENGTH, CANDIDATES), items // asked.items)

    def step(self) -> None:
        self.optimizer.zero_grad()
        logits = self.model(self.batch)
        masked_bce(logits, self.batch.labels_BCT, self.batch.candidates.mask_BC).backward()
        clip_gradients(self.model, 1.0)
        self.optimizer.step()


def _spread(batch: Batch, apart: int) -> Batch:
    """The same items, so far apart in a larger table."""

    def moved(items: Tensor) -> Tensor:
        return items * apart

    return replace(
        batch,
        user=replace(batch.user, item_BL=moved(batch.user.item_BL)),
        candidates=replace(batch.candidates, item_BC=moved(batch.candidates.item_BC)),
    )


if __name__ == "__main__":
    main()
