"""What a long memory is worth: rankers with the first 10, 50, … and all events of each user visible.

Of the dataset in force (The Complete Journey is where long histories pay). For each number of visible
events all inputs, features and baselines among them, know so many newest events and no more. Then requests
for items that a user never had, where counting the item says nothing (`training_set/never_had.py`). What
readers of a history are worth without features that count is `reading.py`.

Users are parted by how long their histories are. Requests are thinned out, events never are. Every
row stands beside baselines that need no training, and trees on the same numbers; differences are paired
over users and seeds (`modeling/claims.py`).

Each run is kept below MEMOIR_HOME and not repeated: stop it, and the same command goes on.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import torch

from feature_repo.benchmarks import parser, report
from feature_repo.settings import Settings
from modeling.benchmarks.request_cost import cost_of
from modeling.claims import PAIRED, Difference, Sums, decided, difference, of_seeds
from modeling.comparison.ranking import finish, ranking_recipe
from modeling.console import console
from modeling.evaluation.trained_baselines import TrainedBaseline, sums_by_user, trained_baselines
from modeling.evaluation.untrained import untrained_scores
from modeling.inputs.tasks import primary_number
from modeling.metrics import PerUser, defined
from modeling.recipes import SERVICE, Recipe, Training
from modeling.recipes.vista import FOREVER, STREAM, WHOLE_HISTORY
from modeling.training_set.encodings import Encodings
from modeling.training_set.sample import NeverHad, Sample

EVERY = (4, 2)  # each fourth training request, each second test request
QUICK = (120, 60)  # the same with --quick
CURVE_VISIBLE: tuple[int | None, ...] = (10, 50, 200, 500, 1000, None)
CURVE_QUICK: tuple[int | None, ...] = (50, None)
TRAINING = Training(epochs=1, learning_rate=4e-3)
COMMON: dict[str, Any] = {"width": 32, "dropout": 0.1}
RANKERS: dict[str, tuple[str, int, dict[str, Any]]] = {  # model, events read, config
    "vista_addressed": (
        "vista_addressed",
        WHOLE_HISTORY,
        {"code_width": 64, "num_slots": 64, "half_lives_days": (FOREVER,), "cross_rank": 64},
    ),
    "mean_pool": ("mean_pool", WHOLE_HISTORY, {}),
    "attention_1000": ("din", 1000, {}),
    "sim": ("two_stage", WHOLE_HISTORY, {"rank": 64, "slot": 1}),
    "twin": ("two_stage", WHOLE_HISTORY, {"rank": 64, "search": "score"}),
    "persrec": ("persrec", WHOLE_HISTORY, {"rank": 64}),
    "vista_stream": (
        "vista",
        1000,
        {**STREAM, "num_seeds": 64, "cross_rank": 64, "block": 128, "reconstruction": 0.0},
    ),
    "din_256": ("din", 256, {}),
}
# Of whose curve something is claimed, with all seeds
CURVE = ("vista_addressed", "mean_pool")
ARMS: dict[str, tuple[str, ...]] = {
    "all features": (),
    "no match features": ("matches",),
    "history alone": ("matches", "user"),
    "own counts": ("all but own counts",),
}
OF_HISTORY = (
    "mean_pool",
    "attention_1000",
    "sim",
    "twin",
    "persrec",
    "vista_stream",
    "vista_addressed",
)
# Requests for items never had: each sixteenth in training, each fourth of the others; with --quick fewer
NEVER_HAD_EVERY = (16, 4)
NEVER_HAD_QUICK = (200, 60)
NEVER_HAD_VISIBLE: tuple[int | None, ...] = (50, 500, None)
NEVER_HAD_RANKERS = ("trees", "amortised_trees")
# Events of a user with a long history
LONG = 1000
Place = tuple[str, int | None]  # a ranker, and how many events it saw


def main() -> None:
    """Run."""
    flags = parser("modeling.benchmarks.memory", __doc__)
    flags.add_argument("--seeds", type=int, default=5, help="of each run (default 5)")
    flags.add_argument(
        "--curve_seeds",
        type=int,
        help="of visible numbers between the ends, and of rankers of whose curve nothing is claimed",
    )
    flags.add_argument("--part", choices=("curve", "never_had", "cost", "all"), default="all")
    flags.add_argument(
        "--every",
        type=int,
        nargs=2,
        help="each n-th training request, each m-th of those that evaluate; default: of each part its own",
    )
    flags.add_argument(
        "--blocks",
        action="store_true",
        help="`never_had` of the ends of all users' histories, for logs whose late users are new",
    )
    flags.add_argument(
        "--visible",
        type=int,
        nargs="+",
        help="newest events, beside all of them (default: of each part its own)",
    )
    flags.add_argument(
        "--rankers",
        nargs="+",
        help="recipes, and of `curve` its own too (default: of each part its own)",
    )
    flags.add_argument(
        "--drawn_by",
        default=NeverHad().by,
        help="statistic of items that negatives of `never_had` are drawn by",
    )
    arguments = flags.parse_args()
    torch.set_num_threads(1)
    settings = Settings.from_env()
    asked = tuple(arguments.every) if arguments.every else None
    every = asked or (QUICK if arguments.quick else EVERY)
    visible = (*arguments.visible, None) if arguments.visible else None
    seeds = 1 if arguments.quick else arguments.seeds
    between = seeds if arguments.curve_seeds is None else arguments.curve_seeds
    rows: list[dict[str, Any]] = []
    config: dict[str, Any] = {"dataset": settings.dataset, "seeds": seeds}
    if arguments.part in ("curve", "all"):
        lengths = visible or (CURVE_QUICK if arguments.quick else CURVE_VISIBLE)
        rankers = tuple(arguments.rankers or (CURVE if arguments.quick else OF_HISTORY))
        of_whom = tuple(arguments.rankers or CURVE)
        rows += curve(settings, every, lengths, rankers, of_whom, seeds, between)
        config["curve"] = {"every": every, "seeds_between": between, "epochs": TRAINING.epochs}
    if arguments.part in ("never_had", "all"):
        thinned = asked or (NEVER_HAD_QUICK if arguments.quick else NEVER_HAD_EVERY)
        protocol = NeverHad(by=arguments.drawn_by, blocks=arguments.blocks)
        lengths = visible or NEVER_HAD_VISIBLE
        rankers = tuple(arguments.rankers or NEVER_HAD_RANKERS)
        rows += never_had(settings, thinned, protocol, seeds, lengths, rankers)
        config["never_had"] = {"every": thinned, **asdict(protocol)}
    if arguments.part in ("cost", "all"):
        rows += _costs(settings, every)
        config["cost"] = {"every": every}
    report("memory", config, rows, arguments.json)


def recipe_of(name: str, arm: str, seed: int = 1) -> Recipe:
    """A ranker of the bench, in an arm."""
    model, length, config = RANKERS[name]
    return Recipe(
        f"memory_{name}",
        model,
        SERVICE,
        {**COMMON, **config},
        length,
        training=replace(TRAINING, seed=seed),
        ablated=ARMS[arm],
    )


def curve(
    settings: Settings,
    every: tuple[int, int],
    visible: tuple[int | None, ...],
    rankers: tuple[str, ...],
    of_whom: tuple[str, ...],
    seeds: int,
    between: int,
) -> list[dict[str, Any]]:
    """Quality against the events that are visible, and what is claimed of it.

    Args:
        visible: the last are all.
        rankers: of this bench, or recipes; among the latter, `trees` stand in for those beside every evaluation.
        of_whom: rankers of which something is claimed, with all seeds.
        between: seeds of the others, and of lengths of which nothing is claimed.
    """
    rows: list[dict[str, Any]] = []
    sums: dict[Place, Sums] = {}
    # 1. Every ranker at every length; all seeds only where something is claimed.
    ends = (50, 500, None)
    for number in visible:
        encodings = Encodings(settings, SERVICE, sample=Sample(number, every))
        runs = seeds if number in ends else between
        for name, one in untrained(encodings).items():
            rows.append(row_of("curve", number, name, one))
        beside: list[TrainedBaseline] = []
        if "trees" not in rankers:
            pool = recipe_of(CURVE[0], "all features")
            beside = trained_baselines(settings, encodings, pool, min(runs, 3))
        for baseline in beside:
            rows.append(row_of("curve", number, baseline.name, baseline.sums, baseline.cpu_seconds))
            if baseline.name == "trees":
                sums["trees", number] = baseline.sums
        for name in rankers:
            many = runs if name in of_whom else between
            found, cost = _trained(settings, encodings, name, "all features", many)
            sums[name, number] = found
            rows.append(row_of("curve", number, name, found, cost))
    # 2. What is claimed of some, decided as one table.
    networks = [name for name in of_whom if name != "trees"]
    claims = []
    for metric in PAIRED:
        for name in (*networks, "trees"):
            pairs: list[tuple[str, Place, Place]] = [
                (f"{name}: all − {number} events", (name, None), (name, number))
                for number in (50, 500)
                if number in visible
            ]
            if name != "trees":
                pairs.insert(0, (f"{name} − trees, all events", (name, None), ("trees", None)))
            claims += [
                difference(said, metric, sums[a][metric], sums[b][metric]) for said, a, b in pairs
            ]
    first = of_whom[0]
    lengths = _user_lengths(
        Encodings(settings, SERVICE, sample=Sample(every=every)),
        recipe_of(CURVE[0], "all features"),
    )
    if 50 in visible:
        claims += _by_length(lengths, first, sums[first, None], sums[first, 50], "all − 50 events")
    if first != "trees":
        claims += _by_length(lengths, first, sums[first, None], sums["trees", None], "− trees")
    return rows + claimed("curve", claims)


def never_had(
    settings: Settings,
    every: tuple[int, int],
    protocol: NeverHad,
    seeds: int,
    visible: Sequence[int | None],
    rankers: Sequence[str],
) -> list[dict[str, Any]]:
    """Quality on items that the user never had, by visible events; and what a longer history is worth there.

    Args:
        visible: the last are all.
        rankers: recipes; all after the first are claimed against it.
    """
    rows: list[dict[str, Any]] = []
    sums: dict[Place, Sums] = {}
    recipes = {name: ranking_recipe(name) for name in rankers}
    # 1. Each ranker at each length.
    for number in visible:
        encodings = Encodings(settings, SERVICE, sample=Sample(number, every, protocol))
        for name, one in untrained(encodings).items():
            rows.append(row_of("never had", number, name, one))
        for name, recipe in recipes.items():
            found, cost = runs_of(settings, encodings, recipe, seeds)
            sums[name, number] = found
            rows.append(row_of("never had", number, name, found, cost))
    # 2. What longer histories are worth, for all users and for those of a thousand events.
    whole = Encodings(settings, SERVICE, sample=Sample(None, every, protocol))
    lengths = _user_lengths(whole, recipes[rankers[0]])
    long = np.flatnonzero(lengths >= LONG)
    claims = []
    for metric in PAIRED:
        for name in rankers:
            for number in visible[:-1]:
                ours, theirs = sums[name, None][metric], sums[name, number][metric]
                said = f"{name}: all − {number} events"
                claims.append(difference(said, metric, ours, theirs))
                if len(long):
                    of_long = f"{said}, users of {LONG:,} and more"
                    few = _of_users(ours, long), _of_users(theirs, long)
                    claims.append(difference(of_long, metric, *few))
        first = sums[rankers[0], None][metric]
        for name in rankers[1:]:
            said = f"{name} − {rankers[0]}"
            claims.append(difference(said, metric, sums[name, None][metric], first))
    return rows + claimed("never had", claims)


def _user_lengths(encodings: Encodings, recipe: Recipe) -> np.ndarray:
    """Events that each user of the test period has, mean over requests; users as `sums_by_user`
    numbers them.
    """
    test = encodings.period(recipe, "test")
    spec = encodings.encoder_of(recipe).contract.spec
    labels = np.asarray(test.encoded.labels)[:, primary_number(spec)]
    requests = defined(labels, test.encoded.candidate_offsets).requests
    known = test.encoded.history_lengths
    assert known is not None
    _, numbered = np.unique(test.users[requests], return_inverse=True)
    return np.bincount(numbered, known[requests]) / np.bincount(numbered)


def _by_length(
    lengths: np.ndarray, ranker: str, ours: Sums, theirs: Sums, said: str
) -> list[Difference]:
    """A difference for each quarter of the users, from short histories to long ones."""
    bounds = np.quantile(lengths, [0, 0.25, 0.5, 0.75, 1])
    quarter = np.clip(np.searchsorted(bounds, lengths, side="right") - 1, 0, 3)
    found = []
    for number in range(4):
        chosen = np.flatnonzero(quarter == number)
        if not len(chosen):
            continue
        name = f"{ranker}, users of {bounds[number]:.0f} to {bounds[number + 1]:.0f} events: {said}"
        for metric in PAIRED:
            a, b = (_of_users(one[metric], chosen) for one in (ours, theirs))
            found.append(difference(name, metric, a, b))
    return found


def _of_users(sums: PerUser, chosen: np.ndarray) -> PerUser:
    return PerUser(sums.total[:, chosen], sums.weight[:, chosen])


def _costs(settings: Settings, every: tuple[int, int]) -> list[dict[str, Any]]:
    """What each reading of the history costs."""
    encodings = Encodings(settings, SERVICE, sample=Sample(every=every))
    rows = []
    for name in OF_HISTORY:
        cost = cost_of(settings, encodings, recipe_of(name, "no match features"))
        rows.append({"case": "cost", "ranker": name, **asdict(cost)})
    return rows


def untrained(encodings: Encodings, recipe: Recipe | None = None) -> dict[str, Sums]:
    """Scorings without training on the test requests."""
    recipe = recipe or recipe_of(CURVE[0], "all features")
    test = encodings.period(recipe, "test")
    number = primary_number(encodings.encoder_of(recipe).contract.spec)
    return {
        name: sums_by_user(test, scores, number)
        for name, scores in untrained_scores(encodings, recipe).items()
    }


def _trained(
    settings: Settings, encodings: Encodings, name: str, arm: str, seeds: int
) -> tuple[Sums, float]:
    """Runs of a ranker in an arm, or of a recipe, over seeds, and the CPU seconds of one."""
    console.print(f"memory: {arm}", highlight=False)
    recipe = recipe_of(name, arm) if name in RANKERS else ranking_recipe(name)
    return runs_of(settings, encodings, recipe, seeds)


def runs_of(
    settings: Settings, encodings: Encodings, recipe: Recipe, seeds: int
) -> tuple[Sums, float]:
    """Runs of a recipe over seeds, and the CPU seconds of one."""
    found = []
    spent = []
    for seed in range(1, seeds + 1):
        console.print(f"memory: {recipe.name}, seed {seed}", highlight=False)
        training = replace(recipe.training, seed=seed)
        run = finish(settings, encodings, replace(recipe, training=training))
        spent.append(run.result["summary"]["cpu_seconds"])
        found.append(run.sums)
    return of_seeds(found), statistics.mean(spent)


def row_of(
    case: str, visible: int | None, name: str, sums: Sums, cost: float | None = None
) -> dict[str, Any]:
    """A line of a table: each metric's mean over seeds, and its deviation."""
    row: dict[str, Any] = {"case": case, "visible": visible or "all", "ranker": name}
    for metric in PAIRED:
        of_seed = sums[metric].values
        row[metric] = float(of_seed.mean())
        if len(of_seed) > 1:
            row[f"{metric} ±"] = float(of_seed.std(ddof=1))
    row["seeds"] = len(sums[PAIRED[0]].total)
    return row | ({} if cost is None else {"train_cpu_s": round(cost)})


def claimed(case: str, claims: list[Difference]) -> list[dict[str, Any]]:
    """Lines of the differences, after Holm's correction over all of this table."""
    return [
        {
            "case": f"{case}: difference",
            "ranker": claim.name,
            claim.metric: claim.value,
            "low": claim.low,
            "high": claim.high,
            "p": claim.p,
            "verdict": claim.verdict,
        }
        for claim in decided(claims)
    ]


if __name__ == "__main__":
    main()
