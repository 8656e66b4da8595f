"""Planted signals: what a user likes shows in events far back only; who reads them comes near a
bound that is known.

Two tasks (`modeling/benchmarks/planted_data.py`). *Groups*: liked groups of items are a little more frequent in the
old half of a history; a histogram tells. *Pairs*: what followed what, long ago, tells whether a
candidate is liked; counts tell nothing, in whatever window.

A ranker that reads whole histories is trained on short ones that grow, then ranks behind histories
of any length: `whole` reads all events, `newest` the newest thousand only. Beside it stand a ranker
trained on the newest thousand, a mean pool with the same lessons, and gradient-boosted trees on
shares of all kinds of items, of all events, the newest thousand, and fading. `bound` is the AUC of
whoever knows what the user likes, on the same requests.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn.functional import one_hot

from feature_repo.benchmarks import parser, report
from modeling import models
from modeling.benchmarks.planted_data import Planted, PlantedPairs
from modeling.inputs.batch import Batch
from modeling.layers.memory import keep_freed_memory
from modeling.metrics import auc
from modeling.models.base import Ranker
from modeling.training.trainer import masked_bce

Spec = Planted | PlantedPairs
Score = Callable[[Batch], np.ndarray]  # scores of all candidates
AMORTISED: dict[str, Any] = {"width": 32, "num_heads": 2, "num_layers": 1, "dropout": 0.0}
MEAN_POOL: dict[str, Any] = {"width": 32}
ROWS = 8192
NEWEST = 1000
CANDIDATES = 64
HELD_OUT = 1_000_000
LONGEST = 4096  # events of the histories that trees and rankers of the newest events train on
TREE_USERS = 600
FADING_DAYS = 100.0


@dataclass(frozen=True)
class Task:
    """A planted signal, and who is to find it.

    Args:
        spec: histories of so many events.
        lesson: what is drawn when so large a share of training is done.
        model: that reads whole histories; its config.
        rows: events of a training batch at most, and users at least.
        steps: of training; with --quick.
    """

    spec: Callable[[int], Spec]
    lesson: Callable[[float], Spec]
    model: str
    config: dict[str, Any]
    rows: int
    min_users: int
    steps: tuple[int, int]


def shop(events: int, planted: float = 0.5, strength: float = 0.5) -> Planted:
    """Histories of so many events, of 64 items in eight groups, two of them liked."""
    return Planted(events, items=64, groups=8, liked=2, planted=planted, strength=strength)


def lesson(done: float) -> Planted:
    """First short and plain, then long and faint."""
    longer = min(max((done - 0.25) / 0.65, 0.0), 1.0)
    fainter = min(max((done - 0.35) / 0.35, 0.0), 1.0)
    return shop(int(64 * (LONGEST / 64) ** longer), 1 - fainter / 2, 1 - fainter / 2)


def pairs_lesson(done: float) -> PlantedPairs:
    """First 512 events, then longer."""
    longer = min(max((done - 0.3) / 0.6, 0.0), 1.0)
    return PlantedPairs(int(512 * 16**longer))


TASKS = {
    "groups": Task(
        shop,
        lesson,
        "vista",
        {
            "width": 32,
            "num_heads": 2,
            "num_seeds": 8,
            "summary_layers": 1,
            "ranking_layers": 1,
            "reconstruction": 0.0,
            "causal": True,
            "seed_role": "target",
            "block": 64,
        },
        rows=ROWS,
        min_users=4,
        steps=(4000, 1200),
    ),
    "pairs": Task(
        PlantedPairs,
        pairs_lesson,
        "vista_addressed",
        {
            "width": 32,
            "code_width": 32,
            "num_slots": 16,
            "half_lives_days": (1e6,),
            "num_pairs": 32,
        },
        rows=2 * ROWS,
        min_users=16,
        steps=(1500, 600),
    ),
}


def main() -> None:
    """Run."""
    flags = parser("modeling.benchmarks.planted", __doc__)
    flags.add_argument("--task", choices=(*TASKS, "all"), default="all")
    flags.add_argument("--steps", type=int, help="of training (default: the task's own)")
    flags.add_argument(
        "--events", type=int, help="of the longest histories (default 100,000; 8,000 with --quick)"
    )
    flags.add_argument("--users", type=int, default=64, help="of each evaluation (default 64)")
    flags.add_argument("--seed", type=int, default=0)
    arguments = flags.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    longest = arguments.events or (8000 if arguments.quick else 100_000)
    rows = []
    config = {"newest": NEWEST, "users": arguments.users, "seed": arguments.seed}
    for name in TASKS if arguments.task == "all" else (arguments.task,):
        task = TASKS[name]
        steps = arguments.steps or task.steps[arguments.quick]
        started = time.process_time()
        whole = _scores(_train(task, task.model, task.config, steps, arguments.seed))
        taken = time.process_time() - started
        truncated = _scores(
            _train(task, "amortised_dlrm", AMORTISED, steps // 10, arguments.seed, NEWEST)
        )
        pool = _scores(_train(task, "mean_pool", MEAN_POOL, steps, arguments.seed))
        trees = _trees(task, arguments.seed)
        for events in (LONGEST, longest // 5, longest):
            spec = task.spec(events)
            bound, found = _auc(whole, spec, arguments.users)
            rows.append(
                {
                    "task": name,
                    "events": events,
                    "bound": bound,
                    "whole": found,
                    "below_bound": bound - found,
                    "newest": _auc(whole, spec, arguments.users, NEWEST)[1],
                    "trained_on_newest": _auc(truncated, spec, arguments.users, NEWEST)[1],
                    "mean_pool": _auc(pool, spec, arguments.users)[1],
                    "trees": _auc(trees, spec, arguments.users)[1],
                }
            )
        config[name] = {
            "ranker": task.model,
            "attainable": task.spec(LONGEST).attainable_auc,
            "steps": steps,
            "cpu_s": round(taken),
        }
    report("planted", config, rows, arguments.json)


def _train(
    task: Task,
    name: str,
    config: dict[str, Any],
    steps: int,
    seed: int,
    newest: int | None = None,
) -> Ranker:
    torch.manual_seed(seed)
    model = models.build(name, config, task.spec(LONGEST).sizes)
    # Nothing learns this from item rows of the usual small scale; codes have unit length as they are.
    if not any(part.startswith("codes.") for part in model.state_dict()):
        torch.nn.init.normal_(model.features.item.weight)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 1e-2, total_steps=steps, pct_start=0.05
    )
    for step in range(steps):
        spec = task.lesson(step / steps) if newest is None else task.spec(LONGEST)
        users = max(task.min_users, task.rows // spec.events)
        batch, _ = spec.draw(users, CANDIDATES, HELD_OUT * seed + step, newest)
        optimizer.zero_grad()
        loss = masked_bce(model(batch), batch.labels_BCT, batch.candidates.mask_BC)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return model.eval()


def _scores(model: Ranker) -> Score:
    def score(batch: Batch) -> np.ndarray:
        with torch.inference_mode():
            logits: np.ndarray = model(batch)[..., 0].numpy().ravel()
        return logits

    return score


def _trees(task: Task, seed: int) -> Score:
    """Trees on what counts of the whole history say, of users that no evaluation draws."""
    from sklearn.ensemble import HistGradientBoostingClassifier

    spec = task.spec(LONGEST)
    features = []
    labels = []
    for number in range(TREE_USERS):
        batch, _ = spec.draw(1, CANDIDATES, HELD_OUT * (seed + 1) - 1 - number)
        features.append(_shares(batch, spec.kinds))
        labels.append(batch.labels_BCT.numpy().ravel())
    model = HistGradientBoostingClassifier(max_iter=200, learning_rate=0.05, random_state=seed)
    model.fit(np.concatenate(features), np.concatenate(labels))

    def score(batch: Batch) -> np.ndarray:
        found: np.ndarray = model.decision_function(_shares(batch, spec.kinds))
        return found

    return score


def _shares(batch: Batch, kinds: int) -> np.ndarray:
    """Of each candidate of one request: its kind, and beside it the share that each kind has of the
    history, counted from its own; of all events, the newest, and fading.
    """
    member = one_hot(batch.user.item_BL[0] % kinds, kinds).double()
    fading = torch.exp2(-batch.user.age_BL[0].double().expm1() / FADING_DAYS)
    found = []
    for weight in (torch.ones_like(fading), (torch.arange(len(fading)).flip(0) < NEWEST), fading):
        share = weight.double() @ member
        found.append((share / share.sum() * kinds).numpy())
    own = batch.candidates.item_BC[0].numpy() % kinds
    turned = (own[:, None] + np.arange(kinds)) % kinds
    return np.concatenate([own[:, None], *(share[turned] for share in found)], axis=1)


def _auc(score: Score, spec: Spec, users: int, newest: int | None = None) -> tuple[float, float]:
    """AUC of who knows, and of a scoring, over the same requests of users that training never
    drew.
    """
    labels = []
    known = []
    scores = []
    for number in range(users):
        batch, good = spec.draw(1, 400, 10**9 + number, newest)
        labels.append(batch.labels_BCT[0, :, 0].numpy())
        known.append(good[0].numpy())
        scores.append(score(batch))
    truth = np.concatenate(labels)
    return auc(truth, np.concatenate(known).astype(np.float32)), auc(truth, np.concatenate(scores))


if __name__ == "__main__":
    main()
