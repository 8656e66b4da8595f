"""Claims about two rankers: paired differences over users and seeds, corrected for how much is
claimed.

Both rankers score the same requests of the same users. A difference is drawn again many times: users
with replacement, the same for both, and for each ranker its seeds (a two-level bootstrap; Efron and
Tibshirani, 1993, chapter 16). Intervals are percentiles of the draws; p values come from their
standard deviation (chapter 12), since the share of draws beyond 0 is never below one in so many, which
no correction for a long table leaves significant. Of a table's claims, p values are corrected by
Holm's method (1979). What is left undecided is called so.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np

from modeling.inputs.shards import read_shard, write_shard
from modeling.metrics import PerUser

# Metrics that are means over users
PAIRED = ("ndcg@10", "gauc")
RESAMPLES = 2000
LEVEL = 0.05
Sums = dict[str, PerUser]  # by metric
Verdict = Literal["above", "below", "undecided"]


@dataclass(frozen=True)
class Difference:
    """One ranker's metric less another's, with its 95 % interval and two-sided p value.

    Args:
        value: of the difference.
        verdict: after Holm's correction (`decided`); before it, by this difference alone.
    """

    name: str
    metric: str
    value: float
    low: float
    high: float
    p: float
    verdict: Verdict = "undecided"

    def __str__(self) -> str:
        return f"{self.value:+.4f} [{self.low:+.4f}, {self.high:+.4f}], {self.verdict}"


def write_sums(path: Path, sums: Mapping[str, PerUser]) -> None:
    """Keep a run's sums by user."""
    kept = {}
    for metric, one in sums.items():
        kept[f"{metric} total"] = one.total[0]
        kept[f"{metric} weight"] = one.weight[0]
    write_shard(path, kept)


def read_sums(path: Path) -> Sums:
    """Read what `write_sums` wrote.

    Raises:
        ShardError: the file is damaged or gone.
    """
    kept = read_shard(path)
    metrics = [name.removesuffix(" total") for name in kept if name.endswith(" total")]
    return {
        metric: PerUser(kept[f"{metric} total"][None], kept[f"{metric} weight"][None])
        for metric in metrics
    }


def of_seeds(runs: Sequence[Mapping[str, PerUser]]) -> Sums:
    """Runs of several seeds as one."""
    return {
        metric: PerUser(
            np.concatenate([run[metric].total for run in runs]),
            np.concatenate([run[metric].weight for run in runs]),
        )
        for metric in runs[0]
    }


def difference(name: str, metric: str, ours: PerUser, theirs: PerUser, seed: int = 0) -> Difference:
    """Our metric less theirs, on the same requests; where one is undefined, NaN and undecided.

    Raises:
        ValueError: they are of other users or requests.
    """
    same = ours.weight.shape[1] == theirs.weight.shape[1]
    if not same or not np.array_equal(ours.weight[0], theirs.weight[0]):
        raise ValueError(f"{name}: rankers of different requests cannot be paired")
    rng = np.random.default_rng(seed)
    users = ours.total.shape[1]
    drawn = np.empty(RESAMPLES)
    for number in range(RESAMPLES):
        # The same users for both rankers, so that what is hard for all cancels; seeds by ranker.
        times = np.bincount(rng.integers(0, users, users), minlength=users).astype(np.float64)
        means = []
        for one in (ours, theirs):
            seeds = len(one.total)
            chosen = rng.integers(0, seeds, seeds) if seeds > 1 else np.zeros(1, np.int64)
            # A draw of users none of whom has weight
            with np.errstate(invalid="ignore"):
                values = (one.total @ times) / (one.weight @ times)
            means.append(values[chosen].mean())
        drawn[number] = means[0] - means[1]
    value = ours.value - theirs.value
    known = drawn[~np.isnan(drawn)]
    if math.isnan(value) or not len(known):
        return Difference(name, metric, math.nan, math.nan, math.nan, 1.0)
    low, high = np.percentile(known, [2.5, 97.5])
    deviation = float(known.std())
    p = math.erfc(abs(value) / deviation / math.sqrt(2)) if deviation else float(value == 0)
    found = Difference(name, metric, value, float(low), float(high), p)
    return replace(found, verdict=_verdict(found, p < LEVEL))


def differences(
    pairs: Iterable[tuple[str, str]], sums: Mapping[str, Sums], metrics: Sequence[str] = PAIRED
) -> list[Difference]:
    """One scoring less another for each pair of names and each metric, decided as one table.

    Args:
        sums: by name.
    """
    return decided(
        [
            difference(pair_name(ours, theirs), metric, sums[ours][metric], sums[theirs][metric])
            for ours, theirs in pairs
            for metric in metrics
        ]
    )


def pair_name(ours: str, theirs: str) -> str:
    """How the difference of two is called."""
    return f"{ours} − {theirs}"


def decided(claims: Sequence[Difference]) -> list[Difference]:
    """The claims of one table with their verdicts after Holm's correction, in the same order."""
    order = np.argsort([claim.p for claim in claims], kind="stable")
    found = list(claims)
    holds = True
    for rank, at in enumerate(order.tolist()):
        holds = holds and claims[at].p <= LEVEL / (len(claims) - rank)
        found[at] = replace(claims[at], verdict=_verdict(claims[at], holds))
    return found


def _verdict(claim: Difference, holds: bool) -> Verdict:
    if not holds:
        return "undecided"
    return "above" if claim.value > 0 else "below"
