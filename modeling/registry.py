"""Which models there are and where they live. Imports no torch, so that a run is named without
it.
"""

from __future__ import annotations

from feature_repo.errors import nearest
from feature_repo.home.code import code_digest
from modeling.errors import RecipeError
from modeling.recipes import AnyRecipe, Recipe

# Model → room and class; its module is `<room>.<model>`, the module's config is `Config`
CLASSES = {
    "amortised_dlrm": ("models", "AmortisedDLRM"),
    "autoint": ("baselines", "AutoInt"),
    "bert4rec": ("models", "BERT4Rec"),
    "dcnv2": ("baselines", "DCNv2"),
    "din": ("baselines", "DIN"),
    "dlrm": ("baselines", "DLRM"),
    "hiformer": ("models", "Hiformer"),
    "hstu": ("models", "HSTU"),
    "hydrarec": ("models", "HydraRec"),
    "hydrarec_ranker": ("models", "HydraRecRanker"),
    "linrec": ("models", "LinRec"),
    "mean_pool": ("baselines", "MeanPool"),
    "onetrans": ("models", "OneTrans"),
    "persrec": ("baselines", "PerSRec"),
    "rankmixer": ("baselines", "RankMixer"),
    "sasrec": ("models", "SASRec"),
    "transformer": ("baselines", "Transformer"),
    "trees": ("trees", "Trees"),
    "two_stage": ("baselines", "TwoStage"),
    "vista": ("models", "VISTA"),
    "vista_addressed": ("models", "AddressedVISTA"),
    "wukong": ("baselines", "Wukong"),
}
NAMES = tuple(CLASSES)
# Those whose stage 1 makes summary tokens of histories
TOKEN_MAKERS = ("vista", "vista_addressed")


def module_of(name: str) -> str:
    """The module of a model.

    Raises:
        RecipeError: no such model.
    """
    if name not in NAMES:
        raise RecipeError(f"no model {name!r}; there are {NAMES}{nearest(name, NAMES)}")
    return f"modeling.{CLASSES[name][0]}.{name}"


def makes_tokens(recipe: AnyRecipe) -> bool:
    """Return whether a job makes summary tokens with a recipe's model."""
    return isinstance(recipe, Recipe) and recipe.model in TOKEN_MAKERS and recipe.tokens is None


def training_code(recipe: Recipe, dataset: str) -> str:
    """Digest of the code that decides what a recipe learns: features, loop, its model, and all of
    ours that they import.
    """
    has_trees = recipe.model == "trees" or recipe.trees is not None
    beside = ("modeling.training.trees",) if has_trees else ()
    return code_digest(
        "modeling.training.trainer",
        "modeling.training_set.training_set",
        module_of(recipe.model),
        f"feature_repo.datasets.{dataset}",
        *beside,
    )
