"""Who finds declared crosses of wide categorical fields, where nothing else tells (`crosses_data.py`), and how near to a
bound that is known.

Hiformer's ladder (a plain Transformer, attention by token, composite projections), DCNv2, AutoInt, DLRM and trees learn from
the same samples, each with as many trials, chosen on samples of their own. `told` is a regression that is given
the crosses: what so few samples teach whoever knows where to look; `alone` is one on the fields, at chance.

Each run is of one seed, which draws its samples and its first weights; the crosses are the same for all.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from feature_repo.benchmarks import parser, report
from modeling import models
from modeling.benchmarks.crosses_data import Crosses
from modeling.inputs.batch import Batch
from modeling.inputs.tasks import sigmoid
from modeling.layers.memory import keep_freed_memory
from modeling.metrics import auc, log_loss
from modeling.trees.columns import TreeColumns

WIDTH = 32
HIFORMER: dict[str, Any] = {
    "num_heads": 2,
    "key_width": 16,
    "value_width": 16,
    "rank_key": 64,
    "history": "bags",
}
# Name → model, config
RANKERS: dict[str, tuple[str, dict[str, Any]]] = {
    "hiformer": ("hiformer", HIFORMER),
    "hiformer_full_rank": ("hiformer", {**HIFORMER, "kind": "composite"}),
    "heteroatt": ("hiformer", {**HIFORMER, "kind": "hetero", "num_layers": 2}),
    "transformer": ("hiformer", {**HIFORMER, "kind": "vanilla", "num_layers": 2}),
    "autoint": ("autoint", {"history": "bags"}),
    "dcnv2": ("dcnv2", {"history": "bags"}),
    "dlrm": ("dlrm", {"history": "bags"}),
}
RATES = (1e-3, 4e-3)
LEAVES = (63, 255)
REQUESTS = 64  # of a step
CANDIDATES = 16
TOLD = 0.1  # Adam's rate of regressions
Scorer = Callable[[Batch], np.ndarray]


def main() -> None:
    """Run."""
    flags = parser("modeling.benchmarks.crosses", __doc__)
    flags.add_argument("--seeds", type=int, default=5, help="of each run (default 5)")
    flags.add_argument("--steps", type=int, help="batches of distinct samples (default 200)")
    flags.add_argument("--epochs", type=int, help="over them, at most (default 6)")
    flags.add_argument("--only", nargs="+", choices=(*RANKERS, "trees", "told", "alone"))
    arguments = flags.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    quick = arguments.quick
    spec = Crosses(values=8) if quick else Crosses()
    steps = arguments.steps or (40 if quick else 200)
    epochs = arguments.epochs or (4 if quick else 6)
    seeds = 1 if quick else arguments.seeds
    rows = [{"ranker": "bound", **spec.bound._asdict()}]
    for name in arguments.only or (*RANKERS, "trees", "told", "alone"):
        runs = [_run(name, spec, steps, epochs, seed) for seed in range(1, seeds + 1)]
        rows.append(_row(name, runs))
    config = {
        "samples": steps * REQUESTS * CANDIDATES,
        "values": spec.values,
        "fields": spec.request_fields + spec.candidate_fields,
        "pairs": len(spec.pairs),
        "seeds": seeds,
    }
    report("crosses", config, rows, arguments.json)


def _row(name: str, runs: Sequence[dict[str, float]]) -> dict[str, Any]:
    """Means over seeds, and the deviation of the AUC."""
    means = {key: statistics.mean(run[key] for run in runs) for key in runs[0]}
    spread = statistics.stdev([run["auc"] for run in runs]) if len(runs) > 1 else 0.0
    return {"ranker": name, **means, "auc_deviation": spread, "seeds": len(runs)}


def _run(name: str, spec: Crosses, steps: int, epochs: int, seed: int) -> dict[str, float]:
    """The better of both trials by the validation samples, on the test samples."""
    train = [spec.draw(REQUESTS, CANDIDATES, 10_000 * seed + step).batch for step in range(steps)]
    held, tested = (
        [
            spec.draw(REQUESTS, CANDIDATES, 10_000_000 * kind + 1_000 * seed + n).batch
            for n in range(50)
        ]
        for kind in (1, 2)
    )
    began = time.process_time()
    if name == "trees":
        trials = [_trees(train, held, leaves, spec, seed) for leaves in LEAVES]
    elif name in RANKERS:
        trials = [_ranker(name, spec, train, held, rate, epochs, seed) for rate in RATES]
    else:
        trials = [_regression(spec, train, held, epochs, seed, told=name == "told")]
    took = time.process_time() - began
    best = min(trials, key=lambda score: _quality(score, held)["log_loss"])
    return {**_quality(best, tested), "cpu_s": took}


def _quality(score: Scorer, batches: Sequence[Batch]) -> dict[str, float]:
    labels = np.concatenate([batch.labels_BCT.numpy().ravel() for batch in batches])
    logits = np.concatenate([score(batch) for batch in batches])
    return {"auc": auc(labels, logits), "log_loss": log_loss(labels, sigmoid(logits))}


def _ranker(
    name: str,
    spec: Crosses,
    train: Sequence[Batch],
    held: Sequence[Batch],
    rate: float,
    epochs: int,
    seed: int,
) -> Scorer:
    torch.manual_seed(seed)
    model, config = RANKERS[name]
    network = models.build(model, {"width": WIDTH, **config}, spec.sizes)
    return _fitted(network, train, held, rate, epochs, seed)


class Regression(nn.Module):
    """A weight for each value of each field, and, where they are told, for each pair of values of the declared pairs."""

    def __init__(self, spec: Crosses, *, told: bool) -> None:
        super().__init__()
        self.spec = spec
        self.fields = nn.Parameter(
            torch.zeros(spec.request_fields + spec.candidate_fields, spec.values + 1)
        )
        self.crosses = nn.Parameter(
            torch.zeros(len(spec.pairs) if told else 0, spec.values + 1, spec.values + 1)
        )

    def forward(self, batch: Batch) -> Tensor:
        """logits_BCT."""
        number = batch.candidates.item_BC.shape[1]
        asked = batch.user.field_BU[:, None].expand(-1, number, -1)
        every = torch.cat([asked, batch.candidates.category_BCK], dim=2)
        logits = self.fields[torch.arange(every.shape[2]), every].sum(-1)
        for table, (first, second) in zip(self.crosses, self.spec.pairs, strict=False):
            logits = logits + table[every[..., first], every[..., second]]
        return logits[..., None]


def _regression(
    spec: Crosses,
    train: Sequence[Batch],
    held: Sequence[Batch],
    epochs: int,
    seed: int,
    *,
    told: bool,
) -> Scorer:
    return _fitted(Regression(spec, told=told), train, held, TOLD, epochs, seed)


def _fitted(
    network: nn.Module,
    train: Sequence[Batch],
    held: Sequence[Batch],
    rate: float,
    epochs: int,
    seed: int,
) -> Scorer:
    """A network as it was after its best epoch."""
    optimizer = torch.optim.Adam(network.parameters(), lr=rate)
    total = epochs * len(train)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total, rate / 10)
    rng = np.random.default_rng(seed)
    best = np.inf
    kept = copy.deepcopy(network.state_dict())
    for _ in range(epochs):
        network.train()
        for step in rng.permutation(len(train)):
            optimizer.zero_grad()
            loss = binary_cross_entropy_with_logits(network(train[step]), train[step].labels_BCT)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
            schedule.step()
        network.eval()
        now = _quality(_scores(network), held)["log_loss"]
        if now < best:
            best = now
            kept = copy.deepcopy(network.state_dict())
    network.load_state_dict(kept)
    return _scores(network.eval())


def _scores(network: nn.Module) -> Scorer:
    def score(batch: Batch) -> np.ndarray:
        with torch.inference_mode():
            logits: np.ndarray = network(batch)[..., 0].numpy().ravel()
        return logits

    return score


def _trees(
    train: Sequence[Batch], held: Sequence[Batch], leaves: int, spec: Crosses, seed: int
) -> Scorer:
    """LightGBM on the fields as categories, as many trees as the held samples say."""
    import lightgbm

    columns = TreeColumns.of(spec.sizes)

    def data(batches: Sequence[Batch]) -> lightgbm.Dataset:
        rows = np.concatenate([columns.of_batch(batch) for batch in batches])
        labels = np.concatenate([batch.labels_BCT.numpy().ravel() for batch in batches])
        return lightgbm.Dataset(rows, labels, categorical_feature=columns.categories)

    forest = lightgbm.train(
        {
            "objective": "binary",
            "num_leaves": leaves,
            "learning_rate": 0.1,
            "min_data_in_leaf": 20,
            "num_threads": 1,
            "seed": seed,
            "verbosity": -1,
        },
        data(train),
        num_boost_round=1000,
        valid_sets=[data(held)],
        callbacks=[lightgbm.early_stopping(30, verbose=False)],
    )

    def score(batch: Batch) -> np.ndarray:
        return np.asarray(forest.predict(columns.of_batch(batch), raw_score=True))

    return score


if __name__ == "__main__":
    main()
