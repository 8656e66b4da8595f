"""A recipe is a function that returns one run's full config; one module per model."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

from feature_repo.errors import nearest
from modeling.errors import RecipeError

# Feature services that rankers train on.
SERVICE = "ranking_v1"
SERVICE_WITH_TOKENS = "ranking_v1_tokens"


# Of products of matrices: see modeling/training/accelerator.py
Precision = Literal["fp32", "tf32", "bf16"]


@dataclass(frozen=True)
class Fit:
    """Settings of every training loop. One seed controls initial weights, dropout, order and
    negatives.
    """

    epochs: int = 4
    learning_rate: float = 2e-3
    # Share of the learning rate at the end of its cosine; 1 keeps it
    final_learning_rate: float = 0.1
    beta2: float = 0.99  # of adamw
    # For adamw: decays maps and embeddings, not biases and gains
    weight_decay: float = 1e-5
    # See modeling/training/optimizers.py
    optimizer: Literal["adamw", "rmsprop_adagrad"] = "adamw"
    warmup_steps: int = 50
    clip_norm: float = 1.0
    # Epochs from one validation to the next
    validate_epochs: int = 1
    # Validations without a better NDCG@10 before the run stops
    patience: int = 2
    # Decay of the moving average of weights that is validated and kept; 0 keeps the weights
    averaging: float = 0.0
    checkpoint_steps: int = 100
    precision: Precision = "fp32"
    # Layers are computed again in the backward pass instead of kept: less memory, a third more time
    recompute: bool = False
    # Threads that make batches ahead
    loaders: int = 1
    seed: int = 1

    def __post_init__(self) -> None:
        if self.precision not in get_args(Precision):
            raise RecipeError(
                f"precision is one of {', '.join(get_args(Precision))}, not {self.precision!r}"
            )
        if self.loaders < 1:
            raise RecipeError(f"loaders is at least 1, not {self.loaders}")


@dataclass(frozen=True)
class Training(Fit):
    """How a ranking run trains."""

    # Requests in a batch
    max_requests: int = 64
    # Padded candidates in a batch
    max_candidates: int = 6144
    # Padded events in a batch
    max_events: int = 1 << 16
    # Share of candidates that a step makes unknown, and as many that lose their statistics
    hidden: float = 0.02


@dataclass(frozen=True)
class NextItemTraining(Fit):
    """How a next-item run trains."""

    epochs: int = 50
    learning_rate: float = 1e-3
    beta2: float = 0.98
    weight_decay: float = 0.0
    warmup_steps: int = 100
    clip_norm: float = 10.0
    validate_epochs: int = 5
    patience: int = 10
    checkpoint_steps: int = 500
    batch_sequences: int = 64


@dataclass(frozen=True)
class Recipe:
    """A run: which model, with which config, on which features, trained how."""

    name: str
    model: str
    service: str
    config: dict[str, Any]
    # Events that the encoder reads
    history_length: int
    # Rarer items share one embedding
    min_item_count: int = 5
    # The recipe whose stored summary tokens it reads; its service must join them
    tokens: str | None = None
    training: Training = field(default_factory=Training)
    # Inputs withheld in a comparison: see `inputs/augment.py`
    ablated: tuple[str, ...] = ()
    # Config of trees whose logits are blended with the model's; None: the model alone
    trees: dict[str, Any] | None = None
    # What is read of a longer history begins at a multiple of so many events, so that a kept state can take new ones
    # until it moves; 1 reads the newest `history_length`
    history_block: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.history_block <= self.history_length:
            raise RecipeError(
                f"{self.name}: history_block is {self.history_block}; it is at least 1, and at most history_length, "
                f"{self.history_length}"
            )
        if self.model == "trees" and self.trees is not None:
            raise RecipeError(f"{self.name}: trees are blended with a network, not with trees")


# See modeling/next_item/sequences.py
SplitName = Literal["leave_one_out", "global_time"]
Objective = Literal["softmax", "sampled_softmax", "gbce", "cloze"]


@dataclass(frozen=True)
class NextItemRecipe:
    """A next-item run: which sequence model, with which config and objective, trained how."""

    name: str
    model: str
    config: dict[str, Any]
    # Events that the model reads
    history_length: int = 200
    objective: Objective = "softmax"
    # For sampled_softmax and gbce, shared by a batch's rows
    num_negatives: int = 0
    calibration: float = 0.75  # gbce's t
    mask_probability: float = 0.2  # cloze
    # Cloze: share of sequences in which just the last event is masked
    last_only: float = 0.1
    # Which windows of users with more events than the model reads
    windows: Literal["newest", "all"] = "newest"
    training: NextItemTraining = field(default_factory=NextItemTraining)


AnyRecipe = Recipe | NextItemRecipe


def replace_config(recipe: NextItemRecipe, **changes: Any) -> NextItemRecipe:
    """The recipe with some values of its model's config changed."""
    return replace(recipe, config={**recipe.config, **changes})


def load(name: str) -> AnyRecipe:
    """The recipe of that name.

    Raises:
        RecipeError: no such recipe; the message lists those that exist.
    """
    found = all_recipes()
    if name not in found:
        near = nearest(name, found) or "."
        raise RecipeError(
            f"no recipe {name!r}{near} `python -m modeling recipes --all` lists those that there are"
        )
    return found[name]()


def all_recipes() -> dict[str, Callable[[], AnyRecipe]]:
    """Every recipe function by name."""
    found: dict[str, Callable[[], AnyRecipe]] = {}
    for module_info in pkgutil.iter_modules(__path__):
        module = importlib.import_module(f"modeling.recipes.{module_info.name}")
        found |= {name: getattr(module, name) for name in module.RECIPES}
    return found


def grouped() -> dict[str, dict[str, str]]:
    """Every recipe's first line by name, grouped by what it needs."""
    groups: dict[str, dict[str, str]] = {
        "rank on your data, after the jobs (RECIPE=… make demo)": {},
        "predict next items: need the order of items alone, of a log or of --data; nothing is served": {},
        "published sizes of OneTrans, for a GPU": {},
        "seconds on any machine, for tests": {},
    }
    anywhere, next_item, large, tiny = groups.values()
    for name, function in sorted(all_recipes().items()):
        if name.endswith("_tiny"):
            group = tiny
        elif name in ("onetrans_s", "onetrans_l"):
            group = large
        else:
            group = next_item if isinstance(function(), NextItemRecipe) else anywhere
        first = (function.__doc__ or "").partition("\n\n")[0]
        group[name] = " ".join(first.split())
    return groups


# benchmarks/bundles_xeon2_2026-11-30.md
ADVICE = """Where to begin:
  trees        minutes to train, and the bar: above every network here on Online Retail (NDCG@10 0.684)
  vista_trees  the default: trees, and histories as summary tokens, which a server reads and events refresh
  vista_stream the same without trees, and a larger network; vista is the paper's, whose tokens a job makes
  mean_pool    the quickest network, in seconds, and what a sequence model has to beat
Trees on the same numbers stand beside every `evaluate`."""
# Groups that are listed unasked
FOR_ANYBODY = 1


# Model → the paper that it is of
PAPERS = {
    "amortised_dlrm": "amortised history inference (arXiv 2412.06924)",
    "hiformer": "Hiformer (arXiv 2311.05884)",
    "hydrarec": "HydraRec (arXiv 2501.01242)",
    "hydrarec_ranker": "HydraRec (arXiv 2501.01242)",
    "onetrans": "OneTrans (arXiv 2510.26104)",
    "vista": "VISTA (arXiv 2510.22049)",
}


def walks(recipe: AnyRecipe) -> str:
    """Say in a line which of the five papers a recipe walks, and where it departs from it; "" for none of them."""
    if recipe.model not in PAPERS:
        return ""
    departs = {
        "hydrarec_ranker": "as a ranker beside feature tokens, which is ours",
        "vista": _of_vista(recipe.config),
    }.get(recipe.model, "")
    comma = f", {departs}" if departs else ""
    return (
        f"it walks {PAPERS[recipe.model]}{comma}; what else differs from the paper stands at the head of "
        f"modeling/models/{recipe.model}.py"
    )


def _of_vista(config: dict[str, Any]) -> str:
    if config.get("stored"):
        return "stage 2 alone"
    if config.get("causal"):
        return "as a stream, which is ours: events read the blocks before their own, so that tokens take new ones"
    return ""


def about(recipe: AnyRecipe) -> str:
    """Say in a line what training a recipe leads to."""
    if isinstance(recipe, NextItemRecipe):
        return (
            f"{recipe.name} is a next-item recipe: it is trained and evaluated on the order of items, and nothing is exported or "
            "served; there will be no ranked list at the end"
        )
    tokens = (
        f", from the summary tokens of {recipe.tokens}, which must be there"
        if recipe.tokens
        else ""
    )
    trees = "" if recipe.trees is None else ", its logits blended with those of trees"
    return f"{recipe.name} ranks candidates with model {recipe.model}, {recipe.history_length} events of each user{tokens}{trees}"
