"""`python -m modeling train | evaluate | export | compare <recipe>`: options only."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

DATA_HELP = "a plain sequence file, for next-item recipes; default: the history log of the dataset in force"


def parser() -> argparse.ArgumentParser:
    """The command line, without importing torch or Feast."""
    made = argparse.ArgumentParser(prog="python -m modeling", description=__doc__)
    commands = made.add_subparsers(dest="command", required=True)
    for name, text in (
        ("train", "train a recipe on the built tables; resumes where it stopped"),
        ("evaluate", "metrics of the trained recipe on the test period, baselines beside it, and a report"),
        ("export", "write the bundle of the trained recipe and make it live"),
    ):
        command = commands.add_parser(name, help=text)
        command.add_argument("recipe", nargs="?", default="amortised_dlrm", help="default: amortised_dlrm")
        if name != "export":
            command.add_argument("--data", type=Path, help=DATA_HELP)
        if name == "evaluate":
            command.add_argument("--seed", type=int, help="of a next-item run; default: the recipe's")
            command.add_argument("--epochs", type=int, help="of a next-item run; default: the recipe's")
        if name == "train":
            command.add_argument("--seed", type=int, help="seed of weights, dropout and order; default: the recipe's")
            command.add_argument("--epochs", type=int, help="default: the recipe's")
            command.add_argument("--device", default="cpu", help="where to train, such as cuda (default: cpu)")
        if name == "export":
            command.add_argument("--not_live", action="store_true", help="record the bundle without making it live")
    compare = commands.add_parser("compare", help="recipes × seeds side by side: table, plots, page")
    compare.add_argument("recipe", nargs="+", help="next-item recipes, or ranking recipes")
    compare.add_argument("--data", type=Path, help=DATA_HELP)
    compare.add_argument("--seeds", type=int, default=1, help="seeds 1 … N of each recipe (default 1)")
    compare.add_argument("--epochs", type=int, help="the same number for all; default: each recipe's own")
    rates_help = "ranking recipes: try each with seed 1, go on with the best on validation"
    compare.add_argument("--learning_rates", type=float, nargs="+", help=rates_help)
    compare.add_argument("--device", default="cpu", help="where to train (default: cpu)")
    compare.add_argument("--threads", type=int, default=1, help="threads of torch (default 1)")
    compare.add_argument("--no_scaling", action="store_true", help="leave out speed and memory against length")
    commands.add_parser("recipes", help="list recipes")
    return made


def main() -> int:
    """Dispatch."""
    arguments = parser().parse_args()
    if arguments.command == "recipes":
        from modeling import recipes

        for name, function in sorted(recipes.all_recipes().items()):
            print(f"{name:28} {(function.__doc__ or '').splitlines()[0]}")
        return 0
    from modeling.command import run_command

    return run_command(arguments)


if __name__ == "__main__":
    sys.exit(main())
