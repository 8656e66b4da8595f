"""`python -m modeling train | evaluate | export | compare | bundles | recipes | about | road`: options only."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter

from feature_repo import cli
from feature_repo.errors import UsageError

app = cli.app(
    "modeling",
    """Train, evaluate, export and compare rankers.

    Example: `python -m modeling train vista --set model.width=64`, then `evaluate vista` and `export vista`.""",
)
Data = Annotated[
    Path | None,
    Parameter(help="a plain sequence file, for next-item recipes; default: the built log"),
]
Seed = Annotated[
    int | None, Parameter(help="seed of weights, dropout and order; default: the recipe's")
]
Epochs = Annotated[int | None, Parameter(help="epochs at most; default: the recipe's")]
Force = Annotated[bool, Parameter(help="start again, even if the result is up to date")]
Device = Annotated[str, Parameter(help="where the model runs, such as cuda")]
Threads = Annotated[
    int, Parameter(help="threads of torch and scikit-learn; one is safest beside other load")
]
Set = Annotated[
    tuple[str, ...],
    Parameter(
        name="--set", help="change a field, such as model.width=64; may be repeated", negative=()
    ),
]
DEFAULT = "vista_trees"


@app.command
def train(
    recipe: str = DEFAULT,
    *,
    data: Data = None,
    seed: Seed = None,
    epochs: Epochs = None,
    device: Device = "cpu",
    threads: Threads = 1,
    changes: Set = (),
    force: Force = False,
) -> None:
    """Train a recipe on the built tables; resumes where it stopped."""
    from modeling.commands.train import run_train

    _refuse_below_one(threads=threads)
    run_train(recipe, data, _changes(seed, epochs, changes), device, force, threads)


@app.command
def evaluate(
    recipe: str = DEFAULT,
    *,
    data: Data = None,
    seed: Seed = None,
    epochs: Epochs = None,
    device: Device = "cpu",
    threads: Threads = 1,
    changes: Set = (),
    force: Force = False,
) -> None:
    """Metrics of a trained recipe on the test period, baselines beside it, and a report; by default
    of the newest run.
    """
    from modeling.commands.evaluate import run_evaluate

    _refuse_below_one(threads=threads)
    run_evaluate(recipe, data, _changes(seed, epochs, changes), device, force, threads)


@app.command
def export(
    recipe: str = DEFAULT,
    *,
    seed: Seed = None,
    epochs: Epochs = None,
    changes: Set = (),
    live: bool = False,
    not_live: bool = False,
    force: Force = False,
) -> None:
    """Write the bundle of an evaluated run; it goes live where it is no worse than the live one and
    the baselines.

    Args:
        live: go live whatever the comparison says.
        not_live: record the bundle without making it live.
    """
    from modeling.commands.export import run_export

    if live and not_live:
        raise UsageError("--live and --not_live exclude each other")
    chosen = True if live else False if not_live else None
    run_export(recipe, _changes(seed, epochs, changes), chosen, force)


@app.command
def bundles(*, promote: str | None = None, rollback: bool = False) -> None:
    """List bundles with their metrics; make one live, or the one before it again.

    Args:
        promote: recipe, or digest, of the bundle to make live.
        rollback: make the bundle live that was so before the present one.
    """
    from modeling.commands.bundles import run_bundles

    if promote and rollback:
        raise UsageError("--promote and --rollback exclude each other")
    run_bundles(promote, rollback)


@app.command
def compare(
    recipe: Annotated[tuple[str, ...], Parameter(help="next-item recipes, or ranking recipes")],
    /,
    *,
    data: Data = None,
    seeds: int = 1,
    epochs: Epochs = None,
    learning_rates: Annotated[
        tuple[float, ...], Parameter(consume_multiple=True, negative=())
    ] = (),
    device: Device = "cpu",
    threads: Threads = 1,
    changes: Set = (),
    no_scaling: bool = False,
    split: Literal["leave_one_out", "global_time"] = "leave_one_out",
) -> None:
    """Recipes × seeds side by side: table, plots, page.

    Args:
        seeds: seeds 1 … N of each recipe.
        learning_rates: ranking recipes: try each with seed 1, go on with the best NDCG@10 and GAUC on validation; trees, alone or in a blend, try as many configurations.
        no_scaling: leave out speed and memory against length.
        split: next-item recipes: the last item of each user, or periods of time for all users alike.
    """
    from modeling.commands.compare import run_compare
    from modeling.training.changes import Comparison

    # A comparison numbers its seeds, so that every recipe has the same.
    _refuse_below_one(seeds=seeds, threads=threads)
    if any(word.startswith("training.seed=") for word in changes):
        raise UsageError("--set training.seed: compare numbers its seeds; --seeds says how many")
    run_compare(
        Comparison(
            recipe,
            data,
            seeds,
            epochs,
            learning_rates,
            device,
            threads,
            not no_scaling,
            split,
            changes,
        )
    )


@app.command
def memory(
    *, effort: Literal["full", "quick", "small"] = "full", quick: bool = False, threads: Threads = 1
) -> None:
    """Say what a long history is worth on the dataset in force, and how many events to keep.

    Args:
        effort: full takes ten minutes at a million events, quick two at half of them; small is the picture that ends
            `make demo`.
        quick: the same as `--effort quick`.
    """
    from modeling.commands.memory import run_memory

    _refuse_below_one(threads=threads)
    if quick and effort == "small":
        raise UsageError("--quick and --effort small contradict one another: give one of them")
    run_memory("quick" if quick else effort, threads)


@app.command
def recipes(*, all: bool = False) -> None:
    """Say which recipe to begin with, and list those for one's own data.

    Args:
        all: list also those for comparisons, tests and plain files.
    """
    from modeling import recipes as found

    groups = list(found.grouped().items())
    print(found.ADVICE)
    shown = groups if all else groups[: found.FOR_ANYBODY]
    width = max(len(name) for _, group in shown for name in group)
    for title, group in shown:
        print(f"\n{title}")
        for name, line in group.items():
            print(f"  {name:{width}}  {line}")
    if left := sum(len(group) for _, group in groups[len(shown) :]):
        print(f"\n{left} more, for comparisons, tests and plain files: --all")


@app.command
def about(recipe: str = DEFAULT) -> None:
    """Say what training a recipe leads to, and which paper it walks, before it is trained."""
    from modeling import recipes as found

    chosen = found.load(recipe)
    print(found.about(chosen))
    if line := found.walks(chosen):
        print(line)


@app.command
def road(recipe: str = DEFAULT, *, runner: str = "FnApiRunner") -> None:
    """Say which commands lead from built tables to a recipe that can be served, one a line; `make demo` runs them.

    Args:
        runner: of Beam, for the jobs among them.
    """
    from modeling import recipes as found
    from modeling.commands import road as roads

    for command in roads.road(found.load(recipe), runner):
        print(command)


def _refuse_below_one(**options: int) -> None:
    for name, value in options.items():
        if value < 1:
            raise UsageError(f"--{name} expects 1 or more, not {value}")


def _changes(seed: int | None, epochs: int | None, assignments: tuple[str, ...]) -> Any:
    from modeling.training.changes import Changes

    if seed is not None and seed < 0:
        raise UsageError(f"--seed expects 0 or more, not {seed}")
    if epochs is not None and epochs < 1:
        raise UsageError(f"--epochs expects 1 or more, not {epochs}")
    return Changes(seed, epochs, assignments)


def main() -> int:
    """Dispatch."""
    from modeling.comparison.processes import wait_passively

    wait_passively()
    return cli.run(app)


if __name__ == "__main__":
    sys.exit(main())
