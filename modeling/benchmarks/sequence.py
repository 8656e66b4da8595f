"""Sequence models: training throughput, encoder cost against history length, and streaming; peers
beside them.

Each figure is taken in a process of its own with `--threads` threads, so that peak memory and CPU
seconds are those of one run. Peers are measured where `--rectools` and `--replay` name Python
interpreters that have them installed (each wants an environment of its own); the same events, shape
and loss for all. Without `--data` the events are drawn with MovieLens-1M's shape: 6,040 users,
3,416 items, log-normal lengths.

Floor of the encoder: what its matrix products alone would take at the rate of a large one (`gemm`).
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from feature_repo.benchmarks import parser, report
from feature_repo.raw.sequence_file import read
from feature_repo.settings import CHECKOUT
from modeling.comparison.processes import ask, ask_command, peak_mb
from modeling.comparison.scaling import encoder_cost

WIDTH = 64
LAYERS = 2
HISTORY = 200
BATCH = 128
SHAPE = {"width": WIDTH, "num_heads": 2, "dropout": 0.2}
PEERS = CHECKOUT / "modeling" / "benchmarks" / "peers.py"


def main() -> None:
    """Run."""
    flags = parser("modeling.benchmarks.sequence", __doc__)
    flags.add_argument(
        "--data",
        type=Path,
        help="a plain sequence file; default: synthetic, of MovieLens-1M's shape",
    )
    flags.add_argument("--rectools", type=Path, help="Python interpreter with RecTools 0.19")
    flags.add_argument("--replay", type=Path, help="Python interpreter with RePlay 0.22")
    flags.add_argument("--threads", type=int, default=1)
    flags.add_argument("--child", help=argparse.SUPPRESS)
    arguments = flags.parse_args()
    if arguments.child:
        print(json.dumps(_CHILDREN[arguments.child](json.loads(sys.stdin.read()))))
        return
    with tempfile.TemporaryDirectory() as folder:
        data = arguments.data or _synthetic(
            Path(folder) / "events.txt", 600 if arguments.quick else 6040
        )
        rows = (
            _training_rows(arguments, data, folder)
            + _encoder_rows(arguments)
            + _streaming_rows(arguments)
        )
    config = {
        "width": WIDTH,
        "layers": LAYERS,
        "history": HISTORY,
        "batch": BATCH,
        "threads": arguments.threads,
    }
    config["data"] = arguments.data.name if arguments.data else "synthetic"
    report("sequence", config, rows, arguments.json)


def _training_rows(arguments: argparse.Namespace, data: Path, folder: str) -> list[dict[str, Any]]:
    """Interleaved: every library once, then again."""
    seconds = 3 if arguments.quick else 30
    question = {"data": str(data), "seconds": seconds, "threads": arguments.threads, "home": folder}
    question |= {"width": WIDTH, "layers": LAYERS, "history": HISTORY, "batch": BATCH}
    libraries = {"memoir": None, "replay": arguments.replay, "rectools": arguments.rectools}
    prepared = _child("log", question)
    lines = Path(folder) / "peers.txt"
    if arguments.replay or arguments.rectools:
        events = read(data)
        np.savetxt(lines, np.stack([events.users, events.items], 1), fmt="%d")
    found: dict[str, list[dict[str, Any]]] = {}
    for _ in range(1 if arguments.quick else arguments.repeats):
        for library, python in libraries.items():
            if library == "memoir":
                found.setdefault(library, []).append(_child("training", question))
            elif python is not None:
                found.setdefault(library, []).append(
                    _peer(python, f"{library}_training", {**question, "data": str(lines)})
                )
    rows: list[dict[str, Any]] = [{"what": "history log of the file", "who": "memoir", **prepared}]
    own = float(np.median([run["targets_per_cpu_s"] for run in found["memoir"]]))
    for library, runs in found.items():
        rate = float(np.median([run["targets_per_cpu_s"] for run in runs]))
        rows.append(
            {
                "what": "train SASRec, full softmax",
                "who": library,
                "length": HISTORY,
                "per_cpu_s": rate,
                "unit": "targets",
                "peak_mb": max(run["peak_mb"] for run in runs),
                "memoir_over_it": own / rate,
                "runs": len(runs),
            }
        )
    return rows


def _encoder_rows(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    lengths = (512, 4096) if arguments.quick else (512, 2048, 8192, 65_536)
    common = {"width": WIDTH, "dropout": 0.0, "expansion": 4, "activation": "gelu"}
    # One cost each: LayerNorm, projections and feed-forward are the same, only the operator
    # differs.
    models = {
        "hydra": ("hydrarec", {**common, "operators": ("hydra",) * LAYERS}),
        "decayed hydra": ("hydrarec", {**common, "operators": ("decayed_hydra",) * LAYERS}),
        "linrec, 8 heads": ("linrec", {**common, "operators": ("linrec",) * LAYERS}),
        "softmax (SDPA), 2 heads": ("sasrec", {**common, "num_heads": 2}),
    }
    limit = 8192  # beyond it softmax takes minutes, which is the point of the others
    floor = _child("gemm", {"threads": arguments.threads})["flop_per_s"] / (
        LAYERS * 3 * 2 * 12 * WIDTH**2
    )
    rows: list[dict[str, Any]] = [
        {
            "what": "encoder, forward + backward",
            "who": "floor (gemm)",
            "per_cpu_s": floor,
            "unit": "tokens",
        }
    ]
    at: dict[int, float] = {}
    for length in lengths:
        runs: dict[str, list[dict[str, Any]]] = {}
        for _ in range(1 if arguments.quick else arguments.repeats):
            for name, (model, config) in models.items():
                if "softmax" in name and length > limit:
                    continue
                cost = encoder_cost(
                    model, config, length, arguments.threads, 0.5 if arguments.quick else 2.0
                )
                runs.setdefault(name, []).append(cost)
            if arguments.rectools is not None and length <= limit:
                question = {
                    "length": length,
                    "width": WIDTH,
                    "layers": LAYERS,
                    "threads": arguments.threads,
                }
                runs.setdefault("rectools", []).append(
                    _peer(arguments.rectools, "rectools_encoder", question)
                )
        rates = {
            name: float(np.median([run["tokens_per_cpu_s"] for run in many]))
            for name, many in runs.items()
        }
        at[length] = rates["hydra"]
        rows += [
            {
                "what": "encoder, forward + backward",
                "who": name,
                "length": length,
                "per_cpu_s": rates[name],
                "unit": "tokens",
                "peak_mb": max(run["peak_mb"] for run in many),
                "hydra_over_it": rates["hydra"] / rates[name],
                "of_its_512": rates["hydra"] / at[lengths[0]] if name == "hydra" else None,
                "runs": len(many),
            }
            for name, many in runs.items()
        ]
    return rows


def _streaming_rows(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    lengths = (1_000, 10_000) if arguments.quick else (1_000, 100_000)
    found = _child("streaming", {"lengths": lengths, "threads": arguments.threads, "repeats": 200})
    return [
        {
            "what": "one new event",
            "who": "hydra",
            "length": length,
            "ms": ms,
            "state_floats": found["state_floats"],
            "of_its_1000": ms / found["ms"][0],
        }
        for length, ms in zip(lengths, found["ms"], strict=True)
    ]


def _log(question: dict[str, Any]) -> dict[str, Any]:
    """What a file costs once: reading it and writing its history log."""
    from feature_repo.raw.sequence_file import write_log

    started = time.process_time()
    folder = write_log(Path(question["data"]), f"{question['home']}/log")
    spent = time.process_time() - started
    events = folder.require().counts["events"]
    return {"per_cpu_s": events / spent, "unit": "events", "peak_mb": peak_mb(), "runs": 1}


def _training(question: dict[str, Any]) -> dict[str, Any]:
    """Targets per CPU second of the training loop's own step, after a warm-up of one epoch's
    tenth.
    """
    import torch

    from feature_repo.home.tables import JobFolder
    from feature_repo.raw.sequence_file import JOB, sequence_contract
    from modeling.layers.memory import keep_freed_memory
    from modeling.next_item.next_item import NextItemTrainer, build_model
    from modeling.next_item.sequences import Sequences
    from modeling.recipes import NextItemRecipe, NextItemTraining

    torch.set_num_threads(question["threads"])
    folder = JobFolder(f"{question['home']}/log", JOB)
    sequences = Sequences.of(sequence_contract(), folder, has_times=False)
    recipe = NextItemRecipe(
        "benchmark", "sasrec", SHAPE, HISTORY, training=NextItemTraining(batch_sequences=BATCH)
    )
    trainer = NextItemTrainer(
        build_model(recipe, sequences),
        recipe,
        sequences,
        Path(question["home"]) / "run",
        "benchmark",
    )
    keep_freed_memory()
    trainer.model.train()
    targets = 0
    started = 0.0
    step = 0
    epoch = 0
    while True:
        for chosen in trainer.plan(epoch):
            if step == 5:
                started = time.process_time()
                targets = 0
            _, samples = trainer._train_step(chosen, 10_000)
            step = step + 1
            targets = targets + samples
            spent = time.process_time() - started
            if step > 8 and spent > question["seconds"]:
                return {"targets_per_cpu_s": targets / spent, "peak_mb": peak_mb(), "steps": step}
        epoch += 1


def _gemm(question: dict[str, Any]) -> dict[str, Any]:
    import torch

    from modeling.benchmarks.worlds import gemm_rate

    torch.set_num_threads(question["threads"])
    return {"flop_per_s": gemm_rate()}


def _streaming(question: dict[str, Any]) -> dict[str, Any]:
    import torch

    from modeling import models
    from modeling.inputs.batch import FeatureSizes, UserInputs
    from modeling.models.sequence import SequenceRanker

    torch.set_num_threads(question["threads"])
    sizes = FeatureSizes(1000, 1, HISTORY)
    model = models.build(
        "hydrarec", {"width": WIDTH, "dropout": 0.0, "positions": "none"}, sizes
    ).eval()
    assert isinstance(model, SequenceRanker)

    def events(number: int) -> UserInputs:
        items = torch.randint(1, 1000, (1, number))
        zeros = torch.zeros(1, number)
        return UserInputs(
            items,
            zeros.long(),
            zeros,
            zeros,
            zeros[..., None],
            zeros == 0,
            torch.zeros(1, 0, dtype=torch.long),
            zeros[:, :0],
        )

    with torch.inference_mode():
        states = [model.encode_user(events(length)) for length in question["lengths"]]
        new = events(1)
        times: list[list[float]] = [[] for _ in states]
        for _ in range(question["repeats"]):
            for number, state in enumerate(states):
                started = time.perf_counter()
                model.extend_user(state, new)
                times[number].append(1000 * (time.perf_counter() - started))
    floats = sum(tensor.numel() for layer in states[0].layers for tensor in layer)
    return {"ms": [float(np.median(taken)) for taken in times], "state_floats": floats}


_CHILDREN = {"log": _log, "training": _training, "gemm": _gemm, "streaming": _streaming}


def _child(name: str, question: dict[str, Any]) -> dict[str, Any]:
    return ask("modeling.benchmarks.sequence", name, question)


def _peer(python: Path, name: str, question: dict[str, Any]) -> dict[str, Any]:
    return ask_command([str(python), str(PEERS), name], question)


def _synthetic(path: Path, num_users: int) -> Path:
    """Events of MovieLens-1M's shape: 20 or more a user, median 96, mean about 165; popular items
    among 3,416.
    """
    rng = np.random.default_rng(0)
    lengths = np.minimum(20 + rng.lognormal(np.log(76), 1.15, num_users), 1500).astype(int)
    share = 1 / (np.arange(3416) + 50.0)
    with open(path, "w") as lines:
        for user, length in enumerate(lengths, 1):
            items = rng.choice(3416, length, replace=False, p=share / share.sum()) + 1
            lines.writelines(f"{user} {item}\n" for item in items)
    return path


if __name__ == "__main__":
    main()
