"""Studies of next-item recipes, in which each run stands beside one recipe as it is, users paired
(`modeling/claims.py`):

- `parts`: what each part of the best recipe is worth, one change at a time; and SASRec with the same epochs, windows,
  averaging and learning rates tried;
- `causal`: HydraRec's operators and other linear ones beside softmax, in one net;
- `bidirectional`: the same with the Cloze objective, beside BERT4Rec: decay, feature maps, gates, a softmax layer.

With `--rates`, each change and the recipe as it is try the same learning rates with seed 1, and take for all seeds
the one whose NDCG@10 of the validation targets is best. Runs are kept below MEMOIR_HOME, so the same command goes on
where it stopped; processes that share a home may each do some of the changes (`--only`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any

from feature_repo.benchmarks import parser, report
from feature_repo.settings import Settings

if TYPE_CHECKING:
    from modeling.next_item.next_item import SequenceSource
    from modeling.recipes import NextItemRecipe

# What parts do together need not be the sum of what each does: the layers as a whole, then SASRec
# with all that the recipe has beside them, which is what a better architecture must be held against.
AS_SASREC = ("model.gated=False", "model.activation=relu", "model.expansion=1")
SASREC = (*AS_SASREC, "model.width=64", "model.num_heads=1", "model.dropout=0.1")
AS_IT_IS = "as it is"
RATE = "training.learning_rate="


@dataclass(frozen=True)
class Change:
    """One change of a study: the recipe that its runs train.

    Args:
        shape: of `next_item_shapes.py`.
        assignments: as `--set` has them.

    >>> Change("gated_ml1m", ("model.width=64",)).shape
    'gated_ml1m'
    """

    shape: str
    assignments: tuple[str, ...] = ()


def _parts() -> dict[str, Change]:
    changes: dict[str, tuple[str, ...]] = {
        AS_IT_IS: (),
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
    return {name: Change("gated_ml1m", assignments) for name, assignments in changes.items()}


def _causal() -> dict[str, Change]:
    return {
        AS_IT_IS: Change("sasrec_ml1m"),
        "Hydra": Change("hydrarec_ml1m"),
        "Hydra, decay 0.99": Change("hydrarec_decayed_ml1m"),
        "Hydra, decay 0.8": Change("hydrarec_decayed_ml1m", ("model.initial_decay=0.8",)),
        "LinRec": Change("linrec_ml1m"),
        "kernel linear": Change("kernel_linear_ml1m"),
    }


def _bidirectional() -> dict[str, Change]:
    def decayed(decay: float, *more: str) -> Change:
        shape = "hydrarec_decayed_bidirectional_ml1m"
        return Change(shape, (f"model.initial_decay={decay}", *more))

    gates = ("model.gated=True",)
    hybrid = "hydrarec_hybrid_bidirectional_ml1m"
    return {
        AS_IT_IS: Change("bert4rec_ml1m"),
        "Hydra": Change("hydrarec_bidirectional_ml1m"),
        **{f"Hydra, decay {decay}": decayed(decay) for decay in DECAYS},
        "Hydra, decay 0.8, ReLU map": decayed(0.8, "model.feature_map=relu"),
        "Hydra, decay 0.8, ELU map": decayed(0.8, "model.feature_map=elu"),
        "Hydra, decay 0.8, gates": decayed(0.8, *gates),
        "Hydra, decay 0.8, after a softmax layer": Change(hybrid, ("model.initial_decay=0.8",)),
    }


DECAYS = (0.99, 0.95, 0.9, 0.8, 0.7, 0.5)
STUDIES = {"parts": _parts, "causal": _causal, "bidirectional": _bidirectional}


def main() -> None:
    """Run."""
    flags = parser("modeling.benchmarks.ablation", __doc__)
    flags.add_argument("--data", type=Path, help="a plain sequence file; default: a dataset's log")
    flags.add_argument("--seeds", type=int, default=1, help="seeds 1 … N (default 1)")
    flags.add_argument("--epochs", type=int, help="default: the recipe's; 1 with --quick")
    flags.add_argument("--study", choices=tuple(STUDIES), default="parts")
    flags.add_argument("--only", action="append", help="some of the changes, by name")
    flags.add_argument("--rates", type=float, nargs="+", default=[], help="learning rates to try")
    arguments = flags.parse_args()
    if arguments.quick and arguments.epochs is None:
        arguments.epochs = 1

    import torch

    from modeling.claims import Sums, decided, difference, of_seeds
    from modeling.next_item.next_item import open_source, stored_sums, train_and_evaluate, variant

    torch.set_num_threads(1)
    source = open_source(Settings.from_env(), arguments.data)
    sums: dict[str, Sums] = {}
    rows: list[dict[str, Any]] = []
    for name, change in _chosen(STUDIES[arguments.study](), arguments.only).items():
        recipe, rate = _best(source, _trials(name, change, arguments.rates), arguments.epochs)
        runs = [variant(recipe, seed, arguments.epochs) for seed in range(1, arguments.seeds + 1)]
        results = [train_and_evaluate(source, run) for run in runs]
        summaries = [one["summary"] for one in results]
        sums[name] = of_seeds([stored_sums(source, run) for run in runs])
        rows.append(
            {
                "change": name,
                **{metric: float(found.values.mean()) for metric, found in sums[name].items()},
                "validation_ndcg@10": mean(one["best_validation_ndcg@10"] for one in summaries),
                "learning_rate": rate,
                "parameters": results[0]["parameters"],
                "cpu_s": round(mean(one["cpu_seconds"] for one in summaries)),
            }
        )
    whole = sums[AS_IT_IS]
    claims = [
        difference(f"{name} − {AS_IT_IS}", metric, found[metric], whole[metric])
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
        "study": arguments.study,
        "data": source.describe(),
        "epochs": arguments.epochs,
        "seeds": arguments.seeds,
    }
    report("ablation", config, rows, arguments.json)


def _trials(name: str, change: Change, rates: Sequence[float]) -> list[NextItemRecipe]:
    """The recipe of a change, at each learning rate."""
    from modeling.benchmarks.next_item_shapes import shaped
    from modeling.training.changes import Changes, changed

    if rates and any(one.startswith(RATE) for one in change.assignments):
        raise SystemExit(
            f"--rates cannot try rates of {name!r}, which is a rate: --only leaves it out"
        )
    recipe = changed(shaped(change.shape), Changes(assignments=change.assignments))
    if change.assignments:
        recipe = replace(recipe, name=f"{change.shape}-{_word(name)}")
    return [
        replace(recipe, training=replace(recipe.training, learning_rate=rate))
        for rate in rates or [recipe.training.learning_rate]
    ]


def _best(
    source: SequenceSource, trials: Sequence[NextItemRecipe], epochs: int | None
) -> tuple[NextItemRecipe, float]:
    """The trial whose validation is best with seed 1, and its learning rate."""
    from modeling.next_item.next_item import train_and_evaluate, variant

    def validation(trial: NextItemRecipe) -> float:
        result = train_and_evaluate(source, variant(trial, 1, epochs))
        return float(result["summary"]["best_validation_ndcg@10"])

    best = trials[0] if len(trials) == 1 else max(trials, key=validation)
    return best, best.training.learning_rate


def _chosen(changes: dict[str, Change], only: list[str] | None) -> dict[str, Change]:
    """The changes that are asked for, and the recipe as it is, which they are held against.

    Raises:
        SystemExit: no such change; the message lists those that there are.
    """
    if only is None:
        return changes
    unknown = sorted(set(only) - set(changes))
    if unknown:
        raise SystemExit(f"no change {unknown}; there are {list(changes)}")
    return {name: change for name, change in changes.items() if name in {AS_IT_IS, *only}}


def _word(name: str) -> str:
    """A name as a folder can have it."""
    return "".join(letter if letter.isalnum() else "_" for letter in name.lower())


if __name__ == "__main__":
    main()
