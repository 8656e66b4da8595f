"""What each part of the best next-item recipe is worth: one change at a time, all else equal; and SASRec
with the same epochs, windows, averaging and learning rates tried.

Each run stands beside the recipe as it is, users paired (`modeling/claims.py`). Runs are kept below
MEMOIR_HOME, so the same command goes on where it stopped.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from feature_repo.benchmarks import parser, report
from feature_repo.settings import Settings

WHOLE = "gated_ml1m"
# What parts do together need not be the sum of what each does: the layers as a whole, then SASRec
# with all that the recipe has beside them, which is what a better architecture must be held against.
AS_SASREC = ("model.gated=False", "model.activation=relu", "model.expansion=1")
SASREC = (*AS_SASREC, "model.width=64", "model.num_heads=1", "model.dropout=0.1")
CHANGES: dict[str, tuple[str, ...]] = {
    "as it is": (),
    "no gates": ("model.gated=False",),
    "ReLU, not SwiGLU": ("model.activation=relu",),
    "width 64": ("model.width=64",),
    "one head": ("model.num_heads=1",),
    "dropout 0.1": ("model.dropout=0.1",),
    "newest window alone": ("windows=newest",),
    "no averaging": ("training.averaging=0.0",),
    "learning rate 2e-3": ("training.learning_rate=0.002",),
    "SASRec's layers": AS_SASREC,
    "SASRec, trained alike, 3e-3": SASREC,
    "SASRec, trained alike, 2e-3": (*SASREC, "training.learning_rate=0.002"),
    "SASRec, trained alike, 1e-3": (*SASREC, "training.learning_rate=0.001"),
}


def main() -> None:
    """Run."""
    flags = parser("modeling.benchmarks.ablation", __doc__)
    flags.add_argument("--data", type=Path, help="a plain sequence file; default: a dataset's log")
    flags.add_argument("--seeds", type=int, default=1, help="seeds 1 … N (default 1)")
    flags.add_argument("--epochs", type=int, help="default: the recipe's; 1 with --quick")
    flags.add_argument("--only", action="append", help="some of the changes, by name")
    arguments = flags.parse_args()
    if arguments.quick and arguments.epochs is None:
        arguments.epochs = 1

    import torch

    from modeling.benchmarks.next_item_shapes import shaped
    from modeling.claims import Sums, decided, difference, of_seeds
    from modeling.next_item.next_item import open_source, stored_sums, train_and_evaluate, variant
    from modeling.training.changes import Changes, changed

    torch.set_num_threads(1)
    source = open_source(Settings.from_env(), arguments.data)
    sums: dict[str, Sums] = {}
    rows: list[dict[str, Any]] = []
    for name, assignments in _chosen(arguments.only).items():
        recipe = changed(shaped(WHOLE), Changes(assignments=assignments))
        if assignments:
            recipe = replace(recipe, name=f"{WHOLE}-{_word(name)}")
        runs = [variant(recipe, seed, arguments.epochs) for seed in range(1, arguments.seeds + 1)]
        results = [train_and_evaluate(source, run) for run in runs]
        sums[name] = of_seeds([stored_sums(source, run) for run in runs])
        rows.append(
            {
                "change": name,
                **{metric: float(found.values.mean()) for metric, found in sums[name].items()},
                "parameters": results[0]["parameters"],
                "cpu_s": round(
                    sum(one["summary"]["cpu_seconds"] for one in results) / len(results)
                ),
            }
        )
    whole = sums["as it is"]
    claims = [
        difference(f"{name} − as it is", metric, found[metric], whole[metric])
        for name, found in sums.items()
        if found is not whole
        for metric in ("ndcg@10",)
    ]
    rows += [
        {
            "change": one.name,
            one.metric: one.value,
            "low": one.low,
            "high": one.high,
            "verdict": one.verdict,
        }
        for one in decided(claims)
    ]
    config = {
        "recipe": WHOLE,
        "data": source.describe(),
        "epochs": arguments.epochs,
        "seeds": arguments.seeds,
    }
    report("ablation", config, rows, arguments.json)


def _chosen(only: list[str] | None) -> dict[str, tuple[str, ...]]:
    """The changes that are asked for, and the recipe as it is, which they are held against.

    Raises:
        SystemExit: no such change; the message lists those that there are.
    """
    if only is None:
        return CHANGES
    unknown = sorted(set(only) - set(CHANGES))
    if unknown:
        raise SystemExit(f"no change {unknown}; there are {list(CHANGES)}")
    return {name: change for name, change in CHANGES.items() if name in {"as it is", *only}}


def _word(name: str) -> str:
    """A name as a folder can have it."""
    return "".join(letter if letter.isalnum() else "_" for letter in name.lower())


if __name__ == "__main__":
    main()
