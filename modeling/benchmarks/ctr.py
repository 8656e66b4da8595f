"""DCNv2 and DIN beside those of FuxiCTR, torch-rechub and DeepCTR-Torch, on the same rows.

Rows are drawn: requests of a user with candidates in a row, seven fields and up to 50 history
items; labels follow from the candidate's brand and from whether it is of a kind that the user
likes, as four in five events of the history are. Every library trains one epoch by its own `fit`
with its own loader; then one user's 512 candidates are scored, from columns to scores, the history
repeated for each by those that need it. Ours is trained with the candidates of a request together,
and with every row a request of its own, as in the others. All run with the same allocator settings.

Width, tower, attention and cross layers are alike. Not alike: our models also read the pooled
history, and of an event its action, age and rating; the second layer of our DCNv2's tower reads the
crosses too; activations are each library's. A peer is measured where its option names a Python
interpreter that has it. Floor: what the matrix products of our scoring take at the rate of a large
one.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from feature_repo.benchmarks import parser, report
from feature_repo.settings import CHECKOUT
from modeling.comparison.processes import ask, ask_command

WIDTH = 16
TOWER = (256, 128)
ATTENTION = (64,)
CROSS_LAYERS = 2
BATCH = 1024
HISTORY = 50
CANDIDATES = 512
KINDS = 20  # of items; a user likes a few
SIZES = {
    "country": 50,
    "hour": 24,
    "weekday": 7,
    "item": 4_000,
    "brand": 200,
    "shelf": 50,
    "colour": 20,
}
REQUEST_FIELDS = ("country", "hour", "weekday")
ITEM_FIELDS = ("brand", "shelf", "colour")
SHARED: dict[str, Any] = {"width": WIDTH, "hidden": TOWER[0], "head_hidden": TOWER[1]}
MODELS: dict[str, dict[str, Any]] = {
    "din": {**SHARED, "history_hidden": ATTENTION[0]},
    "dcnv2": {**SHARED, "history": "bags", "num_layers": CROSS_LAYERS},
}
PEERS = {
    "fuxictr": "FuxiCTR 2.3.10",
    "rechub": "torch-rechub 0.9.0",
    "deepctr": "DeepCTR-Torch 0.3.0",
}


def main() -> None:
    """Run."""
    flags = parser("modeling.benchmarks.ctr", __doc__)
    for name, title in PEERS.items():
        flags.add_argument(f"--{name}", type=Path, help=f"Python interpreter with {title}")
    flags.add_argument("--threads", type=int, default=1)
    flags.add_argument("--group", type=int, default=8, help="candidates of a request (default 8)")
    flags.add_argument("--child", help=argparse.SUPPRESS)
    arguments = flags.parse_args()
    if arguments.child:
        print(json.dumps(_ours(json.loads(sys.stdin.read()))))
        return
    number = 20_000 if arguments.quick else 100_000
    group = arguments.group
    question = {
        "threads": arguments.threads,
        "rows": number // group * group,
        "group": group,
        "width": WIDTH,
        "tower": TOWER,
        "attention": ATTENTION,
        "cross_layers": CROSS_LAYERS,
        "batch": BATCH,
        "history": HISTORY,
        "sizes": SIZES,
        "of_request": [*REQUEST_FIELDS, "history", "length"],
        "score_repeats": 10 if arguments.quick else 50,
    }
    runs: dict[tuple[str, str], list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        draw(Path(folder), question["rows"] // group, group)
        question["folder"] = folder
        for seed in range(1 if arguments.quick else arguments.repeats):
            question["seed"] = seed
            for model in MODELS:
                for label, one in (("ours, by request", group), ("ours, row by row", 1)):
                    asked = {**question, "model": model, "group": one}
                    runs.setdefault((model, label), []).append(
                        ask("modeling.benchmarks.ctr", "ours", asked)
                    )
                for name, title in PEERS.items():
                    if python := getattr(arguments, name):
                        command = [
                            str(python),
                            str(CHECKOUT / "modeling" / "benchmarks" / "peers.py"),
                        ]
                        answer = ask_command([*command, f"{name}_{model}"], question)
                        runs.setdefault((model, title), []).append(answer)
    config = {
        "rows": question["rows"],
        "history": HISTORY,
        "width": WIDTH,
        "tower": "-".join(map(str, TOWER)),
    }
    config |= {"batch": BATCH, "group": group, "threads": arguments.threads}
    report("ctr", config, _rows(runs), arguments.json)


def _rows(runs: dict[tuple[str, str], list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Medians, and how many times the fastest peer of the same model."""
    figures = ("samples_per_cpu_s", "auc", "score_ms", "score_mflop", "floor_ms")
    rows = []
    for (model, label), found in runs.items():
        row: dict[str, Any] = {"model": model, "library": label}
        row |= {
            name: float(np.median([run[name] for run in found]))
            for name in figures
            if name in found[0]
        }
        rows.append(row)
    for row in rows:
        peers = [r for r in rows if r["model"] == row["model"] and r["library"] in PEERS.values()]
        if peers and row["library"] not in PEERS.values():
            row["training_ratio"] = row["samples_per_cpu_s"] / max(
                r["samples_per_cpu_s"] for r in peers
            )
            if "score_ms" in row:
                row["scoring_ratio"] = min(r["score_ms"] for r in peers) / row["score_ms"]
    return rows


def draw(folder: Path, requests: int, group: int) -> None:
    """`train.npz`, `test.npz` (an eighth as many requests) and `one_user.npz`: a column for each
    field, histories padded on the right with 0, and labels.
    """
    rng = np.random.default_rng(0)
    popular = 1 / (np.arange(1, SIZES["item"]) + 50.0)
    items = np.arange(1, SIZES["item"])
    liking = rng.normal(0, 1, SIZES["brand"])
    field_of = {name: rng.integers(1, SIZES[name], SIZES["item"]) for name in ITEM_FIELDS}

    def rows(number: int, candidates: int) -> dict[str, np.ndarray]:
        liked = rng.integers(0, KINDS, (number, 3))
        drawn = rng.choice(items, (number, HISTORY), p=popular / popular.sum())
        of_a_kind = drawn // KINDS * KINDS + np.take_along_axis(
            liked, rng.integers(0, 3, (number, HISTORY)), 1
        )
        history = np.where(
            rng.random((number, HISTORY)) < 0.8, np.clip(of_a_kind, 1, SIZES["item"] - 1), drawn
        )
        if number > 1:  # the one user that is scored has a whole history
            history[np.arange(HISTORY) >= rng.integers(HISTORY // 2, HISTORY + 1, (number, 1))] = 0
        columns = {
            name: np.repeat(rng.integers(0, SIZES[name], number), candidates).astype(np.int64)
            for name in REQUEST_FIELDS
        }
        half = rng.random((number, candidates)) < 0.5
        candidate = rng.choice(items, (number, candidates), p=popular / popular.sum())
        kind = np.take_along_axis(liked, rng.integers(0, 3, (number, candidates)), 1)
        candidate = np.where(
            half, np.clip(candidate // KINDS * KINDS + kind, 1, SIZES["item"] - 1), candidate
        )
        matches = (candidate[..., None] % KINDS == liked[:, None]).any(-1)
        item = candidate.reshape(-1)
        chance = 1 / (1 + np.exp(2 - liking[field_of["brand"][item]] - 1.5 * matches.reshape(-1)))
        label = rng.random(len(item)) < chance
        columns |= {"item": item, **{name: values[item] for name, values in field_of.items()}}
        columns |= {"history": np.repeat(history, candidates, axis=0)}
        return {**columns, "label": label.astype(np.int64)}

    for part, number, candidates in (
        ("train", requests, group),
        ("test", max(requests // 8, 1), group),
        ("one_user", 1, CANDIDATES),
    ):
        np.savez(folder / f"{part}.npz", **rows(number, candidates))  # type: ignore[arg-type]


def _ours(asked: dict[str, Any]) -> dict[str, Any]:
    """One epoch of our trainer, and one user's candidates."""
    import torch

    from feature_repo.datasets import load_contract
    from modeling import models
    from modeling.benchmarks.peers import ranker_answer
    from modeling.benchmarks.worlds import flops, gemm_rate
    from modeling.inputs.columns import nothing_known
    from modeling.inputs.encoder import Encoder
    from modeling.layers.memory import keep_freed_memory
    from modeling.recipes import Training
    from modeling.training.trainer import Trainer, predict

    torch.set_num_threads(asked["threads"])
    keep_freed_memory()
    torch.manual_seed(asked["seed"])
    group = asked["group"]
    train, test, one_user = (
        _encoded(Path(asked["folder"], f"{part}.npz"), number)
        for part, number in (("train", group), ("test", group), ("one_user", CANDIDATES))
    )
    contract = load_contract("movielens_1m")
    encoder = Encoder(contract, nothing_known(contract), HISTORY)
    model = models.build(asked["model"], MODELS[asked["model"]], _sizes())
    training = Training(
        epochs=1,
        max_requests=BATCH // group,
        max_candidates=BATCH,
        learning_rate=1e-3,
        warmup_steps=1,
        final_learning_rate=1.0,
    )
    one = encoder.collate(one_user, np.arange(1))
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(model, encoder, training, Path(folder), "ctr")
        answer = ranker_answer(
            asked,
            model,
            lambda: trainer.fit(train, one_user),
            lambda: predict(model, encoder, test),
            lambda: model(encoder.collate(one_user, np.arange(1))),
            test.labels[:, 0],
        )
    if group == 1:  # scoring knows no rows: a user's candidates are one request
        return {name: answer[name] for name in ("samples_per_cpu_s", "auc")}
    work = flops(lambda: model(one))
    return {**answer, "score_mflop": work / 1e6, "floor_ms": 1000 * work / gemm_rate()}


def _sizes() -> Any:
    """The rows' fields as our models know them."""
    from modeling.inputs.batch import FeatureSizes
    from modeling.inputs.columns import GroupSizes

    return FeatureSizes(
        items=SIZES["item"],
        actions=1,
        history_length=HISTORY,
        request=GroupSizes(
            tuple(SIZES[name] for name in REQUEST_FIELDS), (1,) * len(REQUEST_FIELDS)
        ),
        candidate=GroupSizes(tuple(SIZES[name] for name in ITEM_FIELDS), (1,) * len(ITEM_FIELDS)),
        event=GroupSizes(numbers=1),
    )


def _encoded(path: Path, group: int) -> Any:
    """Rows as requests of `group` candidates."""
    from feature_repo.contract.schema import EVENT_TIMESTAMP
    from feature_repo.history.history import Histories
    from modeling.inputs.encoder import Encoded

    columns = np.load(path)
    history = columns["history"][::group]
    number = len(columns["label"])
    lengths = (history > 0).sum(1)
    offsets = np.r_[0, np.cumsum(lengths)]
    flat = history[history > 0]
    nothing = {name: np.zeros(len(flat), np.float32) for name in ("rating", "action")}
    events = Histories(offsets, flat, {**nothing, EVENT_TIMESTAMP: np.zeros(len(flat), np.int64)})
    requests = number // group
    return Encoded(
        times=np.zeros(requests, np.int64),
        field_BU=np.stack([columns[name][::group] for name in REQUEST_FIELDS], axis=1),
        dense_BG=np.zeros((requests, 0), np.float32),
        candidate_offsets=np.arange(requests + 1) * group,
        candidate_item=columns["item"],
        candidate_category=np.stack([columns[name] for name in ITEM_FIELDS], axis=1).astype(
            np.int32
        ),
        candidate_dense=np.zeros((number, 0), np.float32),
        labels=columns["label"].astype(np.float32)[:, None],
        item_of_key=np.arange(SIZES["item"]),
        gather=lambda chosen, length: events.take(offsets[chosen], offsets[chosen + 1]).newest(
            length
        ),
    )


if __name__ == "__main__":
    main()
