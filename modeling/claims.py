"""What may be said of two rankers: paired differences over users and seeds, corrected for how much is
claimed.

Both rankers score the same requests of the same users. A difference is drawn again many times: users
with replacement, the same for both, and for each ranker its seeds (a two-level bootstrap; Efron and
Tibshirani, 1993, chapter 16). Of a table's claims, p values are corrected by Holm's method (1979).
What is left undecided is called so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from modeling.metrics import auc_by_user, ndcg_at

PAIRED = ("ndcg@10", "gauc")  # metrics that are means over users
RESAMPLES = 2000
LEVEL = 0.05
Verdict = Literal["above", "below", "undecided"]


@dataclass(frozen=True)
class PerUser:
    """A metric as sums over each user's requests: the metric is total / weight.

    Args:
        total: for each seed and user, seeds × users.
        weight: the same; alike for rankers of the same requests.
    """

    total: np.ndarray
    weight: np.ndarray

    @property
    def value(self) -> float:
        """The metric, mean over seeds."""
        return float((self.total.sum(1) / self.weight.sum(1)).mean())


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


def per_user(
    labels: np.ndarray, scores: np.ndarray, offsets: np.ndarray, users: np.ndarray
) -> dict[str, PerUser]:
    """The paired metrics of one scoring, by user; one seed.

    Args:
        labels, scores: of all candidates.
        offsets: request b's candidates are `[offsets[b], offsets[b + 1])`.
        users: number of each request's user, 0 … U - 1.
    """
    number = int(users.max(initial=-1)) + 1
    ndcg = ndcg_at(labels, scores, offsets)
    defined = ~np.isnan(ndcg)
    owner = np.repeat(users, np.diff(offsets))
    auc, weight = auc_by_user(labels, scores, owner, number)
    return {
        "ndcg@10": PerUser(
            np.bincount(users, np.nan_to_num(ndcg), number)[None],
            np.bincount(users, defined, number)[None],
        ),
        "gauc": PerUser((np.nan_to_num(auc) * weight)[None], weight[None]),
    }


def of_seeds(runs: Sequence[Mapping[str, PerUser]]) -> dict[str, PerUser]:
    """Runs of several seeds as one."""
    return {
        metric: PerUser(
            np.concatenate([run[metric].total for run in runs]),
            np.concatenate([run[metric].weight for run in runs]),
        )
        for metric in runs[0]
    }


def difference(name: str, metric: str, ours: PerUser, theirs: PerUser, seed: int = 0) -> Difference:
    """Our metric less theirs, on the same requests.

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
        times = np.bincount(rng.integers(0, users, users), minlength=users).astype(np.float64)
        means = []
        for one in (ours, theirs):
            seeds = len(one.total)
            chosen = rng.integers(0, seeds, seeds) if seeds > 1 else np.zeros(1, np.int64)
            values = (one.total @ times) / (one.weight @ times)
            means.append(values[chosen].mean())
        drawn[number] = means[0] - means[1]
    low, high = np.percentile(drawn, [2.5, 97.5])
    tail = min((drawn <= 0).sum(), (drawn >= 0).sum())
    p = min(2 * (tail + 1) / (RESAMPLES + 1), 1.0)
    found = Difference(name, metric, ours.value - theirs.value, float(low), float(high), float(p))
    return replace(found, verdict=_verdict(found, p < LEVEL))


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
