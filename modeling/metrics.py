"""Ranking and calibration metrics, each with a bootstrap interval over users. Ties keep candidate
order, stably.

Conventions: AUC counts ties as half; GAUC is AUC within each user, weighted by the user's
candidates, users with one kind of label left out; NDCG@k has gain 1 and discount 1/log2(rank + 1);
MRR is of the first positive; NE is log loss over the entropy of the mean label; calibration error
is expected |mean probability - mean label| over 20 bins of equal size. Requests without a positive
count for neither NDCG nor MRR. A metric that nothing defines, such as AUC where all labels are
alike, is NaN, and no number; scores that are NaN are refused, infinite ones are ordered and tie
like others.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from modeling.errors import ScoresError

NUM_BINS = 20
# Bins of scores, and users at a time, of an AUC's resamples
AUC_BINS = 1_024
AUC_USERS = 4_096
RANKING = ("auc", "gauc", "ndcg@10", "mrr")
PROBABILITY = ("log_loss", "ne", "calibration_error")


@dataclass(frozen=True)
class Estimate:
    """A metric and its 95 % bootstrap interval."""

    value: float
    low: float
    high: float

    def beats(self, other: Estimate) -> bool:
        """Higher, with intervals that do not overlap; False where one is undefined."""
        return self.low > other.high


def ranks_within(scores: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Rank of each candidate in its request, from 0 for the best; equal scores keep their order."""
    owner = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
    order = np.lexsort((np.arange(len(scores)), -scores, owner))
    ranks = np.empty(len(scores), np.int64)
    ranks[order] = np.arange(len(scores)) - np.repeat(offsets[:-1], np.diff(offsets))
    return ranks


def refuse_undefined(labels: np.ndarray) -> None:
    """Refuse labels that are undefined (NaN): `defined` leaves their candidates out.

    Raises:
        ScoresError: there are such.
    """
    number = int(np.isnan(labels).sum()) if labels.dtype.kind == "f" else 0
    if number:
        raise ScoresError(
            f"{number:,} of {len(labels):,} labels are undefined: leave their candidates out (`metrics.defined`)"
        )


def ndcg_at(labels: np.ndarray, scores: np.ndarray, offsets: np.ndarray, k: int = 10) -> np.ndarray:
    """NDCG@k of each request; NaN without a positive."""
    refuse_undefined(labels)
    ranks = ranks_within(scores, offsets)
    gain = np.where(ranks < k, labels / np.log2(ranks + 2), 0.0)
    ideal_of = np.concatenate([[0.0], np.cumsum(1 / np.log2(np.arange(k) + 2))])
    positives = _sum_by(labels, offsets)
    ideal = ideal_of[np.minimum(positives, k).astype(np.int64)]
    return np.where(positives > 0, _sum_by(gain, offsets) / np.maximum(ideal, 1e-12), np.nan)


def reciprocal_rank(labels: np.ndarray, scores: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """1 / rank of the first positive of each request; NaN without one."""
    refuse_undefined(labels)
    ranks = ranks_within(scores, offsets).astype(np.float64)
    best = (
        np.minimum.reduceat(np.where(labels > 0, ranks, np.inf), offsets[:-1])
        if len(offsets) > 1
        else np.zeros(0)
    )
    return np.where(np.isfinite(best), 1 / (best + 1), np.nan)


@dataclass(frozen=True)
class Defined:
    """Candidates with a defined label, and the requests that have some.

    Args:
        rows: places of the candidates among all.
        labels: of them.
        offsets: request b's candidates are `[offsets[b], offsets[b + 1])` among these.
        requests: which of all requests they are.
    """

    rows: np.ndarray
    labels: np.ndarray
    offsets: np.ndarray
    requests: np.ndarray


def defined(labels: np.ndarray, offsets: np.ndarray) -> Defined:
    """Leave out candidates whose label is undefined (NaN), and requests without another."""
    known = ~np.isnan(labels)
    counts = np.diff(np.r_[0, np.cumsum(known)][offsets])
    requests = np.flatnonzero(counts)
    rows = np.flatnonzero(known)
    return Defined(rows, labels[rows], np.r_[0, np.cumsum(counts[requests])], requests)


def log_loss(labels: np.ndarray, probabilities: np.ndarray) -> float:
    """Mean negative log likelihood; probabilities are kept away from 0 and 1 by 1e-7."""
    refuse_undefined(labels)
    clipped = np.clip(probabilities, 1e-7, 1 - 1e-7)
    return float(-(labels * np.log(clipped) + (1 - labels) * np.log1p(-clipped)).mean())


def mean_ndcg(labels: np.ndarray, scores: np.ndarray, offsets: np.ndarray) -> float:
    """NDCG@10 over requests with a positive; NaN where none has one."""
    found = ndcg_at(labels, scores, offsets)
    return float(np.nanmean(found)) if not np.isnan(found).all() else float("nan")


def auc(labels: np.ndarray, scores: np.ndarray, weights: np.ndarray | None = None) -> float:
    """Area under the ROC curve, weighted, ties as half; NaN with one kind of label."""
    refuse_undefined(labels)
    order = np.argsort(scores, kind="stable")
    return _auc_sorted(
        labels[order], _tie_groups(scores[order]), None if weights is None else weights[order]
    )


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
    def values(self) -> np.ndarray:
        """The metric of each seed; NaN where nothing defines it."""
        weight = self.weight.sum(1)
        return self.total.sum(1) / np.where(weight > 0, weight, np.nan)

    @property
    def value(self) -> float:
        return float(self.values.mean())


def per_user(
    labels: np.ndarray, scores: np.ndarray, offsets: np.ndarray, users: np.ndarray
) -> dict[str, PerUser]:
    """GAUC, NDCG@10 and MRR of one scoring as sums by user; one seed.

    Args:
        labels, scores: of all candidates.
        offsets: request b's candidates are `[offsets[b], offsets[b + 1])`.
        users: number of each request's user, 0 … U - 1.
    """
    number = int(users.max()) + 1
    auc_U, weight_U = auc_by_user(labels, scores, np.repeat(users, np.diff(offsets)), number)
    found = {"gauc": PerUser((np.nan_to_num(auc_U) * weight_U)[None], weight_U[None])}
    for name, values in (
        ("ndcg@10", ndcg_at(labels, scores, offsets)),
        ("mrr", reciprocal_rank(labels, scores, offsets)),
    ):
        total = np.bincount(users, np.nan_to_num(values), number)
        counted = np.bincount(users, ~np.isnan(values), number)
        found[name] = PerUser(total[None], counted[None])
    return found


@dataclass(frozen=True)
class _Calibration:
    """Sums that calibration metrics are made of, by user.

    Args:
        candidates, positives, loss: sums of each user.
        error: sums of probability - label by user and bin of probabilities, U × NUM_BINS.
    """

    candidates: np.ndarray
    positives: np.ndarray
    loss: np.ndarray
    error: np.ndarray

    @staticmethod
    def of(labels: np.ndarray, probabilities: np.ndarray, owner: np.ndarray) -> _Calibration:
        """Sum over all candidates; `owner` is the number of each one's user."""
        number = int(owner.max()) + 1
        clipped = np.clip(probabilities.astype(np.float64), 1e-7, 1 - 1e-7)
        loss = -(labels * np.log(clipped) + (1 - labels) * np.log1p(-clipped))
        rank = np.argsort(np.argsort(clipped, kind="stable"), kind="stable")
        cell = owner * NUM_BINS + rank * NUM_BINS // len(clipped)
        error = np.bincount(cell, clipped - labels, number * NUM_BINS)
        return _Calibration(
            np.bincount(owner, minlength=number),
            np.bincount(owner, labels, number),
            np.bincount(owner, loss, number),
            error.reshape(number, NUM_BINS),
        )

    def measure(self, weight: np.ndarray) -> dict[str, float]:
        """Log loss, NE and calibration error, each user counted so many times."""
        total = float(self.candidates @ weight)
        positive = float(self.positives @ weight)
        rate = min(max(positive / total, 1e-7), 1 - 1e-7)
        loss = float(self.loss @ weight) / total
        return {
            "log_loss": loss,
            "ne": loss / -(rate * np.log(rate) + (1 - rate) * np.log1p(-rate)),
            "calibration_error": float(np.abs(weight @ self.error).sum()) / total,
        }


def evaluate(
    labels: np.ndarray,
    scores: np.ndarray,
    offsets: np.ndarray,
    users: np.ndarray,
    probabilities: np.ndarray | None,
    *,
    resamples: int = 200,
    seed: int = 0,
) -> dict[str, Estimate]:
    """All metrics of one scoring of all requests.

    Args:
        labels, scores: N candidates.
        offsets: request b's candidates are `[offsets[b], offsets[b + 1])`.
        users: B user numbers, 0 … U - 1; the bootstrap draws users.
        probabilities: N; None for scores that are no probabilities, which then get no calibration
            metrics.

    Raises:
        ScoresError: scores or labels that are NaN, or no request at all.
    """
    refuse_undefined(labels)
    if not len(users):
        raise ScoresError("there is no request to measure on")
    if np.isnan(scores).any():
        raise ScoresError(
            f"{int(np.isnan(scores).sum()):,} of {len(scores):,} scores are NaN: no ranking has them"
        )
    # Summed by user once; a resample is then a weight for each user.
    labels = labels.astype(np.float64)
    owner = np.repeat(users, np.diff(offsets))
    sums = per_user(labels, scores, offsets, users)
    calibration = None if probabilities is None else _Calibration.of(labels, probabilities, owner)

    def measure(weight: np.ndarray) -> dict[str, float]:
        # Means over requests, from sums by user under the resample's weights.
        found = {
            name: _mean(one.total[0] @ weight, one.weight[0] @ weight) for name, one in sums.items()
        }
        return found if calibration is None else found | calibration.measure(weight)

    # Users are drawn, not requests: requests of one user depend on one another.
    number = int(users.max()) + 1
    rng = np.random.default_rng(seed)
    drawn = [rng.integers(0, number, number) for _ in range(resamples)]
    weights = np.array([np.bincount(one, minlength=number) for one in drawn], np.float64)
    value = {"auc": auc(labels, scores)} | measure(np.ones(number))
    of_auc = auc_of_resamples(labels, scores, owner, weights.reshape(resamples, number))
    draws = [
        {"auc": float(one)} | measure(weight) for one, weight in zip(of_auc, weights, strict=True)
    ]
    return {name: _interval(value[name], [draw[name] for draw in draws]) for name in value}


def auc_of_resamples(
    labels: np.ndarray, scores: np.ndarray, owner: np.ndarray, weight_RU: np.ndarray
) -> np.ndarray:
    """AUC under each resample's weights of users, from counts of each user's candidates in `AUC_BINS` bins of scores:
    what lies in one bin counts as a tie, so that a resample costs no pass over the candidates.

    Args:
        owner: number of each candidate's user.
    """
    rank = np.empty(len(scores), np.int64)
    by_score = np.argsort(scores, kind="stable")
    # Equal scores share a bin: that of the first of them.
    group = _tie_groups(scores[by_score])
    first = np.searchsorted(group, np.arange(group[-1] + 1 if len(group) else 0))
    rank[by_score] = np.repeat(first, np.diff(np.r_[first, len(scores)]))
    cell = owner * AUC_BINS + rank * AUC_BINS // max(len(scores), 1)
    positive_RB = np.zeros((len(weight_RU), AUC_BINS))
    negative_RB = np.zeros_like(positive_RB)
    by_owner = np.argsort(owner, kind="stable")
    users = weight_RU.shape[1]
    for start in range(0, users, AUC_USERS):
        end = min(start + AUC_USERS, users)
        within = np.searchsorted(owner[by_owner], [start, end])
        some = by_owner[slice(*within)]
        at = cell[some] - start * AUC_BINS
        shape = (end - start, AUC_BINS)
        positive = np.bincount(at, labels[some], shape[0] * shape[1]).reshape(shape)
        negative = np.bincount(at, 1 - labels[some], shape[0] * shape[1]).reshape(shape)
        positive_RB += weight_RU[:, start:end] @ positive
        negative_RB += weight_RU[:, start:end] @ negative
    below = np.cumsum(negative_RB, axis=1) - negative_RB / 2
    pairs = positive_RB.sum(1) * negative_RB.sum(1)
    found: np.ndarray = np.divide(
        (positive_RB * below).sum(1), pairs, out=np.full(len(pairs), np.nan), where=pairs > 0
    )
    return found


def _interval(centre: float, draws: list[float]) -> Estimate:
    """The 95 % interval around a value: resampling alone moves some metrics (calibration error grows
    with noise), so it is centred on the value.
    """
    drawn = np.array(draws)
    # A resample may leave a metric undefined that the whole defines.
    drawn = drawn[~np.isnan(drawn)]
    if not len(drawn) or np.isnan(centre):
        return Estimate(centre, np.nan, np.nan)
    low, high = np.maximum(centre + np.percentile(drawn - drawn.mean(), [2.5, 97.5]), 0.0)
    return Estimate(centre, float(low), float(high))


def _mean(total: float, weight: float) -> float:
    """A weighted mean; NaN where nothing has weight."""
    return float(total) / float(weight) if weight > 0 else float("nan")


def _sum_by(values: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    running = np.concatenate([[0.0], np.cumsum(values, dtype=np.float64)])
    return running[offsets[1:]] - running[offsets[:-1]]


def _tie_groups(sorted_scores: np.ndarray) -> np.ndarray:
    """Number of the group of equal scores that each position belongs to."""
    return np.cumsum(np.r_[False, sorted_scores[1:] != sorted_scores[:-1]][: len(sorted_scores)])


def _auc_sorted(labels: np.ndarray, groups: np.ndarray, weights: np.ndarray | None) -> float:
    weights = np.ones(len(labels)) if weights is None else weights
    positive = weights * labels
    negative = weights * (1 - labels)
    num_groups = int(groups[-1]) + 1 if len(groups) else 0
    positive = np.bincount(groups, positive, num_groups)
    negative = np.bincount(groups, negative, num_groups)
    below = np.cumsum(negative) - negative
    pairs = positive.sum() * negative.sum()
    return float((positive * (below + negative / 2)).sum() / pairs) if pairs > 0 else float("nan")


def auc_by_user(
    labels: np.ndarray, scores: np.ndarray, user_of: np.ndarray, num_users: int
) -> tuple[np.ndarray, np.ndarray]:
    """AUC of each user (NaN with one kind of label) and its weight, the user's candidates."""
    # 1. Sort by user, then by score; a group holds one user's candidates of equal score.
    order = np.lexsort((scores, user_of))
    label = labels[order]
    score = scores[order]
    user = user_of[order]
    group = np.cumsum(
        np.r_[False, (score[1:] != score[:-1]) | (user[1:] != user[:-1])][: len(score)]
    )
    num_groups = int(group[-1]) + 1
    positive = np.bincount(group, label, num_groups)
    negative = np.bincount(group, 1 - label, num_groups)
    owner = user[np.r_[0, np.flatnonzero(np.diff(group)) + 1]]
    # 2. Negatives below each group among the same user's; ties count half.
    running = np.cumsum(negative)
    total_negative = np.bincount(owner, negative, num_users)
    before_user = np.concatenate([[0.0], np.cumsum(total_negative)[:-1]])
    below = running - negative - before_user[owner]
    wins = np.bincount(owner, positive * (below + negative / 2), num_users)
    pairs = np.bincount(owner, positive, num_users) * total_negative
    weight = np.where(pairs > 0, np.bincount(user_of, minlength=num_users), 0).astype(np.float64)
    return np.where(pairs > 0, wins / np.maximum(pairs, 1), np.nan), weight
