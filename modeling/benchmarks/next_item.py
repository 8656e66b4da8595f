"""Quality of one next-item recipe over seeds: metrics of every protocol, and what training cost.

Runs are kept and resumed, so an interrupted benchmark goes on where it stopped, and a finished one
only prints. The published figures to hold the rows against are in the result pages beside this
file.
"""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from feature_repo.benchmarks import parser, report
from feature_repo.settings import Settings


def main() -> None:
    """Run."""
    flags = parser("modeling.benchmarks.next_item", __doc__)
    flags.add_argument("--data", type=Path, help="a plain sequence file; default: a dataset's log")
    splits = ("leave_one_out", "global_time")
    flags.add_argument("--split", choices=splits, default=splits[0], help="the latter needs times")
    flags.add_argument(
        "--recipe",
        required=True,
        help="a next-item recipe, or a shape of next_item_shapes.py such as sasrec_ml1m",
    )
    flags.add_argument("--seeds", type=int, default=1, help="seeds 1 … N (default 1)")
    flags.add_argument("--epochs", type=int, help="default: the recipe's; 1 with --quick")
    flags.add_argument("--device", default="cpu")
    flags.add_argument("--threads", type=int, default=1)
    arguments = flags.parse_args()
    if arguments.quick and arguments.epochs is None:
        arguments.epochs = 1

    import torch

    from modeling.benchmarks.next_item_shapes import shaped
    from modeling.next_item.next_item import open_source, train_and_evaluate, variant

    torch.set_num_threads(arguments.threads)
    recipe = shaped(arguments.recipe)
    source = open_source(Settings.from_env(), arguments.data, arguments.split)
    results = [
        train_and_evaluate(source, variant(recipe, seed, arguments.epochs), arguments.device)
        for seed in range(1, arguments.seeds + 1)
    ]
    rows = [_row(result, protocol) for result in results for protocol in result["test"]]
    if len(results) > 1:
        rows += [
            _mean([row for row in rows if row["protocol"] == protocol])
            for protocol in results[0]["test"]
        ]
    config = {
        "recipe": recipe.name,
        "data": source.describe(),
        "threads": arguments.threads,
        "device": arguments.device,
    }
    report("next_item", config, rows, arguments.json)


def _row(result: dict[str, Any], protocol: str) -> dict[str, Any]:
    summary = result["summary"]
    return {
        "seed": result["seed"],
        "protocol": protocol,
        **result["test"][protocol],
        "validation_ndcg@10": summary["best_validation_ndcg@10"],
        "epochs": summary["epochs"],
        "cpu_s": summary["cpu_seconds"],
    }


def _mean(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over seeds, and the deviation of the headline metric."""
    found: dict[str, Any] = {"seed": "mean", "protocol": rows[0]["protocol"]}
    for name in rows[0]:
        if name not in found:
            found[name] = statistics.mean(row[name] for row in rows)
    found["ndcg@10_deviation"] = statistics.stdev(row["ndcg@10"] for row in rows)
    return found


if __name__ == "__main__":
    main()
