"""Planted signal: what a user likes shows in events far back only; who reads them comes near a
bound that is known.

A streaming VISTA is trained on short histories that grow (`planted.py` draws them), then ranks
behind histories of any length: `whole` reads all events, `newest` the newest thousand only. A
ranker trained on the newest events alone learns nothing, since they hold nothing. `bound` is the
AUC of whoever knows what the user likes, on the same requests.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch

from feature_repo.benchmarks import parser, report
from modeling import models
from modeling.memory import keep_freed_memory
from modeling.metrics import auc
from modeling.models.base import Ranker
from modeling.planted import Planted
from modeling.trainer import masked_bce

VISTA: dict[str, Any] = {
    "width": 32,
    "num_heads": 2,
    "num_seeds": 8,
    "summary_layers": 1,
    "ranking_layers": 1,
    "reconstruction": 0.0,
    "causal": True,
    "seed_role": "target",
    "block": 64,
}
AMORTISED: dict[str, Any] = {"width": 32, "num_heads": 2, "num_layers": 1, "dropout": 0.0}
ROWS, NEWEST, CANDIDATES, HELD_OUT = 8192, 1000, 64, 1_000_000
SHORTEST, LONGEST = 64, 4096  # events of histories in training


def main() -> None:
    """Run."""
    flags = parser("modeling.benchmarks.planted", __doc__)
    flags.add_argument("--steps", type=int, help="of training (default 4,000; 1,200 with --quick)")
    flags.add_argument(
        "--events", type=int, help="of the longest histories (default 100,000; 8,000 with --quick)"
    )
    flags.add_argument("--users", type=int, default=64, help="of each evaluation (default 64)")
    flags.add_argument("--seed", type=int, default=0)
    arguments = flags.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    steps = arguments.steps or (1200 if arguments.quick else 4000)
    longest = arguments.events or (8000 if arguments.quick else 100_000)
    started = time.process_time()
    vista = _train("vista", VISTA, steps, arguments.seed)
    taken = time.process_time() - started
    truncated = _train("amortised_dlrm", AMORTISED, steps // 10, arguments.seed, newest=NEWEST)
    rows = []
    for events in (LONGEST, longest // 5, longest):
        spec = shop(events)
        bound, whole = _auc(vista, spec, arguments.users)
        rows.append(
            {
                "events": events,
                "bound": bound,
                "vista_whole": whole,
                "below_bound": bound - whole,
                "vista_newest": _auc(vista, spec, arguments.users, NEWEST)[1],
                "trained_on_newest": _auc(truncated, spec, arguments.users, NEWEST)[1],
            }
        )
    config = {
        "attainable": shop(1).attainable_auc,
        "steps": steps,
        "cpu_s": round(taken),
        "newest": NEWEST,
        "users": arguments.users,
        "seed": arguments.seed,
    }
    report("planted", config, rows, arguments.json)


def shop(events: int, planted: float = 0.5, strength: float = 0.5) -> Planted:
    """Histories of so many events, of 64 items in eight groups, two of them liked."""
    return Planted(events, items=64, groups=8, liked=2, planted=planted, strength=strength)


def lesson(done: float) -> Planted:
    """What is drawn when so large a share of training is done: first short and plain, then long and
    faint.
    """
    longer = min(max((done - 0.25) / 0.65, 0.0), 1.0)
    fainter = min(max((done - 0.35) / 0.35, 0.0), 1.0)
    return shop(int(SHORTEST * (LONGEST / SHORTEST) ** longer), 1 - fainter / 2, 1 - fainter / 2)


def _train(
    name: str, config: dict[str, Any], steps: int, seed: int, newest: int | None = None
) -> Ranker:
    torch.manual_seed(seed)
    model = models.build(name, config, shop(LONGEST).sizes)
    torch.nn.init.normal_(model.features.item.weight)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 1e-2, total_steps=steps, pct_start=0.05
    )
    for step in range(steps):
        spec = lesson(step / steps) if newest is None else shop(LONGEST)
        batch, _ = spec.draw(
            max(4, ROWS // spec.events), CANDIDATES, HELD_OUT * seed + step, newest
        )
        optimizer.zero_grad()
        loss = masked_bce(model(batch), batch.labels_BCT, batch.candidates.mask_BC)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return model.eval()


@torch.inference_mode()
def _auc(
    model: Ranker, spec: Planted, users: int, newest: int | None = None
) -> tuple[float, float]:
    """AUC of who knows, and of the model, over the same requests of users that training never
    drew.
    """
    labels, known, scores = [], [], []
    for number in range(users):
        batch, good = spec.draw(1, 400, 10**9 + number, newest)
        labels.append(batch.labels_BCT[0, :, 0].numpy())
        known.append(good[0].numpy())
        scores.append(model(batch)[0, :, 0].numpy())
    truth = np.concatenate(labels)
    return auc(truth, np.concatenate(known).astype(np.float32)), auc(truth, np.concatenate(scores))


if __name__ == "__main__":
    main()
