"""The five papers' claims about cost, and about data of which the answer is known: each claim is read off a benchmark
that measures both ways in one run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Rows = Sequence[Mapping[str, Any]]

# Millions of weights outside the interaction that Hiformer's table counts too: of its one row for one layer of
# attention by token, 2.36
OUTSIDE_M = 0.631
# A cost that grows by less over a thousand times the events does not depend on them; and the same of one that is linear
FLAT = 0.1
LINEAR = 0.25
# Student's 97.5 % point at eight degrees of freedom: of a difference of two means over five seeds each
STUDENT = 2.306
# Slope of a logarithm up to which growth is called linear
SLOPE = 1.15


@dataclass(frozen=True)
class Judged:
    """The figure by which a benchmark judges a claim, and whether it holds."""

    figure: str
    holds: bool


@dataclass(frozen=True)
class Cost:
    """A claim, and what is run to see it.

    Args:
        paper: as `published.Paper.title`.
        says: the claim, and where the paper makes it.
        benchmark: module and arguments.
        judged: from the rows of the benchmark's JSON.
    """

    paper: str
    says: str
    benchmark: str
    judged: Callable[[Rows], Judged]


def _where(rows: Rows, **wanted: Any) -> list[Mapping[str, Any]]:
    return [row for row in rows if all(row.get(key) == value for key, value in wanted.items())]


def _low_rank(rows: Rows) -> Judged:
    (full,) = _where(rows, model="full rank, pruned")
    (low,) = _where(rows, model="low rank, pruned")
    share = low["parameters"] / full["parameters"]
    figure = f"1 / {full['ratio']:.1f} of the time, {share:.0%} of the parameters"
    return Judged(figure, full["ratio"] > 1)


def _parameters(rows: Rows) -> Judged:
    found = [
        OUTSIDE_M + _where(rows, model=name)[0]["parameters"] / 1e6
        for name in ("low rank, pruned", "full rank, pruned")
    ]
    holds = math.isclose(found[0], 16.68, abs_tol=0.02) and math.isclose(
        found[1], 59.95, abs_tol=0.02
    )
    return Judged(f"{found[0]:.2f} M and {found[1]:.2f} M", holds)


def _amortised(rows: Rows) -> Judged:
    (long,) = _where(rows, model="amortised_dlrm", L=4096)
    (short,) = [row for row in _where(rows, model="amortised_dlrm", C=500) if row["L"] == 256]
    figure = (
        f"{long['ratio']:.0f} × at 4,096 events and 256 candidates, {short['ratio']:.0f} × at 256 and 500; scores differ by "
        f"{max(long['max_difference'], short['max_difference']):.0e} at most"
    )
    same = max(long["max_difference"], short["max_difference"]) < 1e-3
    return Judged(figure, same and min(long["ratio"], short["ratio"]) > 1)


def _extended(name: str) -> Callable[[Rows], Judged]:
    def judged(rows: Rows) -> Judged:
        found = _where(rows, model=name)[-1]
        return Judged(
            f"1 / {found['ratio']:.1f} of encoding {found['L']:,} events anew, for 8 new ones",
            found["ratio"] > 1,
        )

    return judged


def _ranking(rows: Rows) -> Judged:
    of = _where(rows, case="ranking")
    worst = max(abs(row["to_shortest"] - 1) for row in of)
    events = [row["events"] for row in of]
    return Judged(
        f"within {worst:.0%} from {min(events):,} events to {max(events):,}", worst < FLAT
    )


def _stage_1(rows: Rows) -> Judged:
    found = [
        row for row in _where(rows, case="stage 1", what="bidirectional") if row["events"] >= 10_000
    ]
    rates = [row["events_per_s"] for row in found]
    worst = max(rates) / min(rates) - 1
    return Judged(
        f"time an event within {worst:.0%} from {found[0]['events']:,} events to {found[-1]['events']:,}",
        worst < LINEAR,
    )


def _growth(against: str) -> Callable[[Rows], Judged]:
    def judged(rows: Rows) -> Judged:
        slopes = {
            name: _where(rows, against=against, operator=name)[0]["slope"]
            for name in ("hydra", "hydra, both ways", "softmax", "linrec")
        }
        said = ", ".join(f"{name} {slope:.2f}" for name, slope in slopes.items())
        linear = max(slopes["hydra"], slopes["hydra, both ways"]) <= SLOPE
        return Judged(f"slope of the logarithm: {said}", linear)

    return judged


def _pyramid(rows: Rows) -> Judged:
    (row,) = [one for one in rows if "every row in every layer" in str(one.get("what"))]
    return Judged(
        f"{row['flop_ratio']:.1f} × fewer FLOPs, {row['ratio']:.1f} × the samples (published 3.1 × fewer)",
        row["flop_ratio"] > 1,
    )


def _made_crosses(ours: str, theirs: str) -> Callable[[Rows], Judged]:
    def judged(rows: Rows) -> Judged:
        (one,) = _where(rows, ranker=ours)
        (other,) = _where(rows, ranker=theirs)
        (bound,) = _where(rows, ranker="bound")
        if one["seeds"] < 2:
            # Of one seed nothing is claimed.
            return Judged("–", holds=False)
        gain = one["auc"] - other["auc"]
        error = math.hypot(one["auc_deviation"], other["auc_deviation"]) / math.sqrt(one["seeds"])
        figure = (
            f"AUC {one['auc']:.4f} against {other['auc']:.4f} (bound {bound['auc']:.4f}): {gain:+.4f} "
            f"[{gain - STUDENT * error:+.4f}, {gain + STUDENT * error:+.4f}]"
        )
        return Judged(figure, gain > STUDENT * error)

    return judged


HIFORMER = "Hiformer (arXiv 2311.05884)"
AMORTISED = "Amortised history inference (arXiv 2412.06924)"
VISTA = "VISTA (arXiv 2510.22049)"
ONETRANS = "OneTrans (arXiv 2510.26104)"
HYDRAREC = "HydraRec (arXiv 2501.01242)"
GROUPED = "modeling.benchmarks.grouped_training"
KV_CACHE = "modeling.benchmarks.kv_cache"
OPERATORS = "modeling.benchmarks.operators"
CROSSES = "modeling.benchmarks.crosses"
COSTS = (
    Cost(
        HIFORMER,
        "low rank and pruned costs a fraction of full rank (table 1: 1.52 against 3.35)",
        GROUPED,
        _low_rank,
    ),
    Cost(HIFORMER, "16.68 M parameters, 59.95 M without low rank (table 1)", GROUPED, _parameters),
    Cost(
        HIFORMER,
        "attention by token above a plain Transformer, made data of declared crosses",
        CROSSES,
        _made_crosses("heteroatt", "transformer"),
    ),
    Cost(
        HIFORMER,
        "composite projections above attention by token, the same",
        CROSSES,
        _made_crosses("hiformer_full_rank", "heteroatt"),
    ),
    Cost(HIFORMER, "above DCN, the same", CROSSES, _made_crosses("hiformer", "dcnv2")),
    Cost(HIFORMER, "(ours) above trees, the same", CROSSES, _made_crosses("hiformer", "trees")),
    Cost(
        AMORTISED,
        "the history is encoded once: the same scores in less time (30 % in production)",
        "modeling.benchmarks.amortised",
        _amortised,
    ),
    Cost(AMORTISED, "(ours) a cache across requests", KV_CACHE, _extended("amortised_dlrm")),
    Cost(
        VISTA,
        "ranking from tokens does not depend on the history's length (section 3.4)",
        "modeling.benchmarks.vista --only ranking stage_1",
        _ranking,
    ),
    Cost(
        VISTA,
        "stage 1 is linear in the history (section 3.2)",
        "modeling.benchmarks.vista --only ranking stage_1",
        _stage_1,
    ),
    Cost(HYDRAREC, "attention linear in the history (abstract)", OPERATORS, _growth("rows")),
    Cost(HYDRAREC, "and in the width (abstract)", OPERATORS, _growth("width")),
    Cost(
        ONETRANS,
        "the cache across requests makes a request cheap (section 3.5)",
        KV_CACHE,
        _extended("onetrans pyramid"),
    ),
    Cost(ONETRANS, "the pyramid cuts FLOPs (table 3: 8.08 to 2.64)", GROUPED, _pyramid),
)
