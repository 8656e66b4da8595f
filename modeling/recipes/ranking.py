"""Ranking recipes: the systems and the baselines of their tables, for any data; and in the shapes
of a comparison.

Width, batch, epochs, learning rate and features are common to all; `*_retail` and `*_ml1m` differ
in history length and in what, in SIZES, brings a model to OneTrans's parameters beside embeddings.
Only the Transformer stays small: every token of a candidate would go through all of as many shared
weights, at twenty times the cost. `compare --learning_rates` gives each recipe the same trials.
`*_tiny` run in seconds, for tests. Torch is not imported here: a recipe is plain data.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from modeling.recipes import SERVICE, SERVICE_WITH_TOKENS, Recipe, Training

WIDTH = 32
HISTORY = {
    "retail": ("Online Retail", 96),
    "ml1m": ("MovieLens 1M", 128),
}  # title, and events that are read
OF_DATASET = {"online_retail": "retail", "movielens_1m": "ml1m"}  # whose shapes a dataset has
LENGTH = 128  # events that a recipe for any data reads
ONETRANS: dict[str, Any] = {
    "num_layers": 3,
    "num_heads": 2,
    "expansion": 2,
    "request_tokens": 3,
    "candidate_tokens": 3,
}
AMORTISED: dict[str, Any] = {
    "num_layers": 2,
    "num_heads": 2,
    "interaction": "cross",
    "cross_rank": 64,
    "bags": True,
}
HIFORMER: dict[str, Any] = {"num_heads": 2, "key_width": 16, "value_width": 16, "rank_key": 64}
APPEND: dict[str, Any] = {**AMORTISED, "fusion": "append_self", "bags": False, "causal": True}
VISTA: dict[str, Any] = {
    "num_heads": 2,
    "num_seeds": 32,
    "summary_layers": 2,
    "ranking_layers": 2,
    "cross_rank": 64,
}
STREAM: dict[str, Any] = {**VISTA, "causal": True, "seed_role": "target"}
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "onetrans": ("OneTrans, pyramid, Auto-Split", "onetrans", ONETRANS),
    "onetrans_group_wise": (
        "OneTrans with a token for each group of features",
        "onetrans",
        {**ONETRANS, "tokeniser": "group_wise"},
    ),
    "onetrans_agnostic": (
        "OneTrans, sequences merged by intent",
        "onetrans",
        {**ONETRANS, "merge": "timestamp_agnostic"},
    ),
    "onetrans_shared": (
        "OneTrans, one set of weights for all tokens",
        "onetrans",
        {**ONETRANS, "own_weights": False},
    ),
    "onetrans_no_pyramid": (
        "OneTrans, every row through every layer",
        "onetrans",
        {**ONETRANS, "pyramid": False},
    ),
    "amortised": ("Amortised DLRM, cross-attention", "amortised_dlrm", AMORTISED),
    "amortised_self": (
        "Amortised DLRM, self-attention",
        "amortised_dlrm",
        {**AMORTISED, "fusion": "append_self"},
    ),
    "concat": (
        "The same DLRM with CONCAT, not amortised",
        "amortised_dlrm",
        {**AMORTISED, "fusion": "concat"},
    ),
    "hiformer": ("Hiformer, low rank, pruned", "hiformer", HIFORMER),
    "hiformer_full_rank": (
        "Hiformer, full rank, pruned",
        "hiformer",
        {**HIFORMER, "kind": "composite"},
    ),
    "vista": ("VISTA, summary tokens", "vista", VISTA),
    "vista_softmax": ("VISTA with softmax in stage 1", "vista", {**VISTA, "attention": "softmax"}),
    "vista_stream": ("VISTA, causal: summary tokens that take new events", "vista", STREAM),
    "sasrec_rank": ("SASRec-style: causal softmax, candidate appended", "amortised_dlrm", APPEND),
    "hstu_rank": (
        "HSTU layers, candidate appended",
        "amortised_dlrm",
        {**APPEND, "attention": "pointwise"},
    ),
    "heteroatt": (
        "Heterogeneous attention",
        "hiformer",
        {**HIFORMER, "kind": "hetero", "num_layers": 2},
    ),
    "transformer": (
        "Transformer over features",
        "transformer",
        {**HIFORMER, "kind": "vanilla", "num_layers": 2},
    ),
    "din": ("DIN", "din", {}),
    "dcnv2": ("DCNv2 with target attention", "dcnv2", {}),
    "dlrm": ("DLRM with target attention", "dlrm", {}),
    "autoint": ("AutoInt with target attention", "autoint", {}),
    "rankmixer": (
        "RankMixer with a separate Transformer",
        "rankmixer",
        {"mixed_width": 32, "history": "transformer"},
    ),
    "wukong": ("Wukong with target attention", "wukong", {}),
    "mean_pool": (
        "Mean pool and a network: what any reading of a history must beat",
        "mean_pool",
        {},
    ),
    "sim": (
        "SIM, hard search: the candidate's category, then attention",
        "two_stage",
        {"rank": 64},
    ),
    "twin": (
        "As TWIN: the events of the largest scores, then attention",
        "two_stage",
        {"search": "score", "rank": 64},
    ),
    "persrec": (
        "As PerSRec: learned tokens for each segment of the history, then recent events",
        "persrec",
        {"rank": 64},
    ),
}
# Of any size: OneTrans's ablations, baselines, and peers of long histories.
BESIDE = (
    "onetrans_group_wise",
    "onetrans_agnostic",
    "onetrans_shared",
    "onetrans_no_pyramid",
    "mean_pool",
    "sim",
    "twin",
    "persrec",
)
SIZES: dict[str, dict[str, dict[str, int]]] = {  # within 5 % of OneTrans: 235,137 and 244,321
    "retail": {
        "amortised": {"head_hidden": 224},
        "amortised_self": {"head_hidden": 224},
        "concat": {"head_hidden": 192},
        "vista": {"head_hidden": 228},
        "vista_softmax": {"head_hidden": 236},
        "vista_stream": {"head_hidden": 228},
        "sasrec_rank": {"head_hidden": 312},
        "hstu_rank": {"head_hidden": 332},
        "hiformer": {"rank_value": 164},
        "hiformer_full_rank": {"key_width": 8, "value_width": 8},
        "heteroatt": {"hidden": 128},
        "din": {"hidden": 448},
        "dcnv2": {"rank": 78},
        "dlrm": {"head_hidden": 440},
        "autoint": {"head_hidden": 500},
        "rankmixer": {"head_hidden": 788},
        "wukong": {"hidden": 244},
    },
    "ml1m": {
        "amortised": {"head_hidden": 152},
        "amortised_self": {"head_hidden": 152},
        "concat": {"head_hidden": 128},
        "vista": {"head_hidden": 144},
        "vista_softmax": {"head_hidden": 152},
        "vista_stream": {"head_hidden": 144},
        "sasrec_rank": {"head_hidden": 212},
        "hstu_rank": {"head_hidden": 224},
        "hiformer": {"rank_value": 132},
        "hiformer_full_rank": {"key_width": 5, "value_width": 6, "hidden": 208},
        "heteroatt": {"hidden": 100},
        "din": {"hidden": 392},
        "dcnv2": {"rank": 58},
        "dlrm": {"head_hidden": 356},
        "autoint": {"head_hidden": 424},
        "rankmixer": {"head_hidden": 328},
        "wukong": {"hidden": 248},
    },
}
TOKENS: dict[
    str, tuple[str, dict[str, Any]]
] = {  # rankers that read the tokens of `vista_stream_*`, and what changes
    "amortised_tokens": ("amortised", {}),
    "onetrans_tokens": ("onetrans", {}),
    "vista_stage_2": ("vista", {"stored": True, "reconstruction": 0.0}),
}
PUBLISHED = {  # shapes of arXiv 2510.26104's table: history, NS tokens, layers, width
    "onetrans_s": (1190, 12, 6, 256),
    "onetrans_l": (1500, 16, 8, 384),
}
TINY = {
    "onetrans_tiny": ("onetrans", {**ONETRANS, "width": 16, "num_layers": 2, "num_heads": 2}),
    "hiformer_tiny": ("hiformer", {**HIFORMER, "width": 16}),
}


def for_dataset(name: str, dataset: str) -> Recipe:
    """A model of `MODELS`, under its bare name, in the shape that a comparison on a dataset has."""
    known = OF_DATASET.get(dataset)
    recipe = _anywhere(name) if known is None else _recipe(f"{name}_{known}")
    return replace(recipe, name=name)


def _anywhere(name: str) -> Recipe:
    """A model on whatever data there is, at the common width."""
    if name in TOKENS:
        base, changes = TOKENS[name]
        recipe = _anywhere(base)
        config = {**recipe.config, **changes}
        return replace(
            recipe, name=name, service=SERVICE_WITH_TOKENS, tokens="vista", config=config
        )
    _, model, config = MODELS[name]
    config = {"width": WIDTH, "dropout": 0.1, **config}
    return Recipe(name, model, SERVICE, config, LENGTH, training=Training(epochs=2))


def _recipe(name: str) -> Recipe:
    model_name, _, dataset = name.rpartition("_")
    _, model, config = MODELS[model_name]
    config = {"width": WIDTH, "dropout": 0.1, **config, **SIZES[dataset].get(model_name, {})}
    return Recipe(name, model, SERVICE, config, HISTORY[dataset][1], training=Training(epochs=2))


def _with_tokens(name: str) -> Recipe:
    model_name, _, dataset = name.rpartition("_")
    base, changes = TOKENS[model_name]
    recipe = _recipe(f"{base}_{dataset}")
    return replace(
        recipe,
        name=name,
        service=SERVICE_WITH_TOKENS,
        tokens=f"vista_stream_{dataset}",
        config={**recipe.config, **changes},
    )


def _published(name: str) -> Recipe:
    history, tokens, layers, width = PUBLISHED[name]
    config = {
        "width": width,
        "num_layers": layers,
        "num_heads": 4,
        "request_tokens": tokens // 2,
        "candidate_tokens": tokens // 2,
    }
    # As published; the learning rate of tables and clipping by parts are not (section 4.1).
    training = Training(
        optimizer="rmsprop_adagrad", learning_rate=0.005, weight_decay=0.0, clip_norm=90.0
    )
    return Recipe(name, "onetrans", SERVICE, config, history, training=training)


def _tiny(name: str) -> Recipe:
    model, config = TINY[name]
    training = Training(epochs=2, max_requests=16, max_candidates=1024, checkpoint_steps=5)
    return Recipe(
        name, model, SERVICE, config, history_length=16, min_item_count=2, training=training
    )


def _named(make: Callable[[str], Recipe], name: str, doc: str) -> Callable[[], Recipe]:
    def recipe() -> Recipe:
        return make(name)

    recipe.__name__ = name
    recipe.__doc__ = doc
    return recipe


# `vista` has a recipe of its own, and the amortised DLRM is called after its model there.
ELSEWHERE = ("vista", "vista_stream", "amortised")
_FUNCTIONS = {
    name: _named(_anywhere, name, f"{MODELS[name][0]}.") for name in MODELS if name not in ELSEWHERE
}
_FUNCTIONS |= {
    name: _named(_anywhere, name, f"{MODELS[base][0]}, with stored summary tokens.")
    for name, (base, _) in TOKENS.items()
}
_FUNCTIONS |= {
    f"{name}_{dataset}": _named(_recipe, f"{name}_{dataset}", f"{doc}, on {title}.")
    for name, (doc, _, _) in MODELS.items()
    for dataset, (title, _) in HISTORY.items()
    if name not in BESIDE
}
_FUNCTIONS |= {
    f"{name}_{dataset}": _named(
        _with_tokens,
        f"{name}_{dataset}",
        f"{MODELS[base][0]}, with stored summary tokens, on {title}.",
    )
    for name, (base, _) in TOKENS.items()
    for dataset, (title, _) in HISTORY.items()
}
_FUNCTIONS |= {
    name: _named(_published, name, "OneTrans in a published shape.") for name in PUBLISHED
}
_FUNCTIONS |= {name: _named(_tiny, name, "Seconds on any machine, for tests.") for name in TINY}
globals().update(_FUNCTIONS)
RECIPES = tuple(_FUNCTIONS)
