"""Ranking recipes for any data: the five systems, and the baselines of their tables. Torch is not imported
here: a recipe is plain data.

Width, batch, epochs and learning rate are common to all; `--set` changes any of them, and
`compare --learning_rates` gives each recipe the same trials.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from modeling.recipes import SERVICE, SERVICE_WITH_TOKENS, Recipe, Training

WIDTH = 32
# Events that are read
LENGTH = 128
# Events that are read where a kept state is to take new ones
LONGER = 256
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
HYDRAREC: dict[str, Any] = {"interaction": "cross", "cross_rank": 64}
STREAM: dict[str, Any] = {**VISTA, "causal": True, "seed_role": "target"}


def _ranker(name: str, model: str, config: dict[str, Any]) -> Recipe:
    """A model on whatever data there is, at the common width."""
    config = {"width": WIDTH, "dropout": 0.1, **config}
    return Recipe(name, model, SERVICE, config, LENGTH, training=Training(epochs=2))


def _growing(recipe: Recipe, block: int) -> Recipe:
    """A ranker with a longer window that begins at a multiple of so many events, so that a kept state takes new ones."""
    return replace(recipe, history_length=LONGER, history_block=block)


def _reading_tokens(recipe: Recipe, name: str, **changes: Any) -> Recipe:
    """A ranker that reads the stored summary tokens of `vista_stream`, which take events as they come, beside its own
    inputs.
    """
    config = {**recipe.config, **changes}
    return replace(
        recipe, name=name, service=SERVICE_WITH_TOKENS, tokens="vista_stream", config=config
    )


def onetrans() -> Recipe:
    """OneTrans, pyramid, Auto-Split; its window and its tails stay for 128 events, so that a kept state takes these."""
    return _growing(_ranker("onetrans", "onetrans", {**ONETRANS, "tail_block": 128}), block=128)


def onetrans_group_wise() -> Recipe:
    """OneTrans with a token for each group of features."""
    return _ranker("onetrans_group_wise", "onetrans", {**ONETRANS, "tokeniser": "group_wise"})


def onetrans_agnostic() -> Recipe:
    """OneTrans, sequences merged by intent."""
    return _ranker("onetrans_agnostic", "onetrans", {**ONETRANS, "merge": "timestamp_agnostic"})


def onetrans_shared() -> Recipe:
    """OneTrans, one set of weights for all tokens."""
    return _ranker("onetrans_shared", "onetrans", {**ONETRANS, "own_weights": False})


def onetrans_no_pyramid() -> Recipe:
    """OneTrans, every row through every layer."""
    return _ranker("onetrans_no_pyramid", "onetrans", {**ONETRANS, "pyramid": False})


def amortised_self() -> Recipe:
    """Amortised DLRM, self-attention."""
    return _ranker("amortised_self", "amortised_dlrm", {**AMORTISED, "fusion": "append_self"})


def concat() -> Recipe:
    """The same DLRM with CONCAT, not amortised."""
    return _ranker("concat", "amortised_dlrm", {**AMORTISED, "fusion": "concat"})


def hydrarec() -> Recipe:
    """HydraRec as a ranker: a decayed sum a layer, which takes new events exactly."""
    return _growing(_ranker("hydrarec", "hydrarec_ranker", HYDRAREC), block=64)


def hiformer() -> Recipe:
    """Hiformer, low rank, pruned."""
    return _ranker("hiformer", "hiformer", HIFORMER)


def hiformer_full_rank() -> Recipe:
    """Hiformer, full rank, pruned."""
    return _ranker("hiformer_full_rank", "hiformer", {**HIFORMER, "kind": "composite"})


def vista_softmax() -> Recipe:
    """VISTA with softmax in stage 1."""
    return _ranker("vista_softmax", "vista", {**VISTA, "attention": "softmax"})


def sasrec_rank() -> Recipe:
    """SASRec-style: causal softmax, candidate appended."""
    return _ranker("sasrec_rank", "amortised_dlrm", APPEND)


def hstu_rank() -> Recipe:
    """HSTU layers, candidate appended."""
    return _ranker("hstu_rank", "amortised_dlrm", {**APPEND, "attention": "pointwise"})


def heteroatt() -> Recipe:
    """Heterogeneous attention."""
    return _ranker("heteroatt", "hiformer", {**HIFORMER, "kind": "hetero", "num_layers": 2})


def transformer() -> Recipe:
    """Transformer over features."""
    return _ranker("transformer", "transformer", {**HIFORMER, "kind": "vanilla", "num_layers": 2})


def din() -> Recipe:
    """DIN."""
    return _ranker("din", "din", {})


def dcnv2() -> Recipe:
    """DCNv2 with target attention."""
    return _ranker("dcnv2", "dcnv2", {})


def dlrm() -> Recipe:
    """DLRM with target attention."""
    return _ranker("dlrm", "dlrm", {})


def autoint() -> Recipe:
    """AutoInt with target attention."""
    return _ranker("autoint", "autoint", {})


def rankmixer() -> Recipe:
    """RankMixer with a separate Transformer."""
    return _ranker("rankmixer", "rankmixer", {"mixed_width": 32, "history": "transformer"})


def wukong() -> Recipe:
    """Wukong with target attention."""
    return _ranker("wukong", "wukong", {})


def mean_pool() -> Recipe:
    """Mean pool and a network: what any reading of a history must beat."""
    return _ranker("mean_pool", "mean_pool", {})


def sim() -> Recipe:
    """SIM, hard search: the candidate's category, then attention."""
    return _ranker("sim", "two_stage", {"rank": 64})


def twin() -> Recipe:
    """As TWIN: the events of the largest scores, then attention."""
    return _ranker("twin", "two_stage", {"search": "score", "rank": 64})


def persrec() -> Recipe:
    """As PerSRec: learned tokens for each segment of the history, then recent events."""
    return _ranker("persrec", "persrec", {"rank": 64})


def amortised_tokens() -> Recipe:
    """Amortised DLRM, cross-attention, with stored summary tokens."""
    amortised = _ranker("amortised_tokens", "amortised_dlrm", AMORTISED)
    return _reading_tokens(amortised, "amortised_tokens")


def onetrans_tokens() -> Recipe:
    """OneTrans, pyramid, Auto-Split, with stored summary tokens."""
    return _reading_tokens(onetrans(), "onetrans_tokens")


def vista_stage_2() -> Recipe:
    """VISTA's stage 2 alone, with stored summary tokens."""
    vista = _ranker("vista_stage_2", "vista", VISTA)
    return _reading_tokens(vista, "vista_stage_2", stored=True, reconstruction=0.0)


def onetrans_s() -> Recipe:
    """OneTrans in a published shape, the small one."""
    return _published("onetrans_s", history=1190, tokens=12, layers=6, width=256)


def onetrans_l() -> Recipe:
    """OneTrans in a published shape, the large one."""
    return _published("onetrans_l", history=1500, tokens=16, layers=8, width=384)


def _published(name: str, history: int, tokens: int, layers: int, width: int) -> Recipe:
    """A shape of arXiv 2510.26104's table."""
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


def onetrans_tiny() -> Recipe:
    """Seconds on any machine, for tests."""
    return _tiny("onetrans_tiny", "onetrans", {**ONETRANS, "width": 16, "num_layers": 2})


def hydrarec_tiny() -> Recipe:
    """Seconds on any machine."""
    recipe = _tiny("hydrarec_tiny", "hydrarec_ranker", {**HYDRAREC, "width": 16})
    return replace(recipe, history_block=8)


def hiformer_tiny() -> Recipe:
    """Seconds on any machine, for tests."""
    return _tiny("hiformer_tiny", "hiformer", {**HIFORMER, "width": 16})


def _tiny(name: str, model: str, config: dict[str, Any]) -> Recipe:
    training = Training(epochs=2, max_requests=16, max_candidates=1024, checkpoint_steps=5)
    return Recipe(
        name, model, SERVICE, config, history_length=16, min_item_count=2, training=training
    )


RECIPES = (
    "amortised_self",
    "amortised_tokens",
    "autoint",
    "concat",
    "dcnv2",
    "din",
    "dlrm",
    "heteroatt",
    "hiformer",
    "hiformer_full_rank",
    "hiformer_tiny",
    "hstu_rank",
    "hydrarec",
    "hydrarec_tiny",
    "mean_pool",
    "onetrans",
    "onetrans_agnostic",
    "onetrans_group_wise",
    "onetrans_l",
    "onetrans_no_pyramid",
    "onetrans_s",
    "onetrans_shared",
    "onetrans_tiny",
    "onetrans_tokens",
    "persrec",
    "rankmixer",
    "sasrec_rank",
    "sim",
    "transformer",
    "twin",
    "vista_softmax",
    "vista_stage_2",
    "wukong",
)
