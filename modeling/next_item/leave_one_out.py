"""Next-item evaluation by named protocols, one target a user. Results are comparable only within one
data set, one split (`sequences.py`) and one protocol.

| protocol | candidates of a user |
|---|---|
| FULL | the whole catalogue, items seen before the target removed |
| U100 | the target and 100 items drawn uniformly, with replacement, outside the user's training items (SASRec; the validation item may be drawn) |
| P100 | the target and 100 distinct items drawn by popularity in training, outside all items of the user (BERT4Rec) |

The model reads everything before the target: for the test target that includes the validation item.
Of equal scores the item that stands earlier in the catalogue ranks first, so that a rank never
depends on the sort. U100 and P100 use all users up to `MAX_SAMPLED_USERS`, else so many drawn by
the seed, as SASRec did.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from modeling.layers.host import device_of
from modeling.metrics import PerUser
from modeling.models.sequence import SequenceRanker
from modeling.next_item.sequences import Sequences, Target

Protocol = Literal["FULL", "U100", "P100"]
PROTOCOLS: tuple[Protocol, ...] = ("FULL", "U100", "P100")
CUTOFFS = (5, 10, 20)
NUM_NEGATIVES = 100
MAX_SAMPLED_USERS = 10_000
# Rows of histories in one forward pass
ROWS = 16_384
# Users × catalogue in one forward pass
SCORES = 8_000_000


class ScoreError(ArithmeticError):
    """Scores that cannot be ranked."""


class Scorer(ABC):
    """Gives every item of the catalogue a score for each of some histories."""

    # Newest events that it reads of a history; None: all of them
    history_length: int | None = None

    @abstractmethod
    def scores(self, sequences: Sequences, starts: np.ndarray, stops: np.ndarray) -> Tensor:
        """Scores, B × items.

        Args:
            starts, stops: of each history in `sequences.items`; none is empty.
        """


class ModelScorer(Scorer):
    """History vectors times the catalogue."""

    def __init__(self, model: SequenceRanker) -> None:
        self.history_length = model.sizes.history_length
        self._model = model

    def scores(self, sequences: Sequences, starts: np.ndarray, stops: np.ndarray) -> Tensor:
        model = self._model
        was_training = model.training
        model.eval()
        found: Tensor = history_vectors(model, sequences, starts, stops) @ model.catalogue.T
        model.train(was_training)
        return found


def evaluate(
    model: SequenceRanker | Scorer,
    sequences: Sequences,
    target: Target,
    protocol: Protocol = "FULL",
    *,
    seed: int = 0,
) -> dict[str, float]:
    """HR, NDCG and MRR at 5, 10 and 20, means over users with targets.

    Args:
        seed: of the sampled protocols' negatives.
    """
    return metrics_of_ranks(evaluated_ranks(model, sequences, target, protocol, seed=seed))


def evaluated_ranks(
    model: SequenceRanker | Scorer,
    sequences: Sequences,
    target: Target,
    protocol: Protocol = "FULL",
    *,
    seed: int = 0,
) -> np.ndarray:
    """Rank of each evaluated user's target, from 0 for the best.

    Raises:
        ValueError: no user has a target.
    """
    users = sequences.evaluated(target)
    if not len(users):
        raise ValueError(f"no user has a {target} target to evaluate on")
    rng = np.random.default_rng(seed)
    if protocol != "FULL" and len(users) > MAX_SAMPLED_USERS:
        users = np.sort(rng.choice(users, MAX_SAMPLED_USERS, replace=False))
    return target_ranks(model, sequences, users, target, protocol, rng)


def supports(sequences: Sequences, protocol: Protocol) -> bool:
    """Return whether the catalogue is large enough for the protocol's negatives of every user; the sampled
    protocols are defined for leave-one-out alone.
    """
    longest = int(sequences.lengths.max(initial=0))
    large = sequences.num_items - longest >= NUM_NEGATIVES
    return protocol == "FULL" or (large and sequences.split.name == "leave_one_out")


def metrics_of_ranks(ranks: np.ndarray) -> dict[str, float]:
    """Metrics of the targets' ranks, from 0 for the best. One target a user: HR equals recall."""
    found = {}
    for name, gain in (
        ("hr", np.ones(len(ranks))),
        ("ndcg", 1 / np.log2(ranks + 2)),
        ("mrr", 1 / (ranks + 1.0)),
    ):
        for k in CUTOFFS:
            found[f"{name}@{k}"] = float(np.where(ranks < k, gain, 0.0).mean())
    return found


def sums_of_ranks(ranks: np.ndarray) -> dict[str, PerUser]:
    """NDCG@10 and HR@10 by user, one target each: what paired differences are made of."""
    each = np.ones((1, len(ranks)))
    hit = (ranks < 10)[None]
    gain = np.where(hit, 1 / np.log2(ranks + 2.0), 0.0)
    return {"ndcg@10": PerUser(gain, each), "hr@10": PerUser(hit.astype(np.float64), each)}


def target_ranks(
    model: SequenceRanker | Scorer,
    sequences: Sequences,
    users: np.ndarray,
    target: Target,
    protocol: Protocol,
    rng: np.random.Generator,
) -> np.ndarray:
    """Rank of each user's target among the protocol's candidates, from 0, in the order of
    `users`.
    """
    scorer = ModelScorer(model) if isinstance(model, SequenceRanker) else model
    stops = sequences.target_rows(users, target)
    starts = sequences.offsets[users]
    if scorer.history_length is not None:
        starts = np.maximum(stops - scorer.history_length, starts)
    sampled = (
        None if protocol == "FULL" else sample_negatives(sequences, users, target, protocol, rng)
    )
    # Longest histories first, so that memory runs out at once or never.
    ranks = np.empty(len(users), np.int64)
    order = np.argsort(starts - stops, kind="stable")
    most = max(1, SCORES // sequences.num_items)
    with torch.inference_mode():
        first = 0
        while first < len(order):
            longest = int(stops[order[first]] - starts[order[first]])
            chosen = order[first : first + min(most, max(1, ROWS // longest))]
            first += len(chosen)
            scores = scorer.scores(sequences, starts[chosen], stops[chosen])
            device = scores.device
            if not torch.isfinite(scores).all():
                raise ScoreError(
                    "scores hold NaN or infinity: the model's weights are damaged or its training diverged"
                )
            wanted = torch.from_numpy(sequences.items[stops[chosen]].astype(np.int64) - 1).to(
                device
            )
            # Whole catalogue: items that the user has seen cannot be the target.
            if sampled is None:
                seen = np.concatenate(
                    [
                        sequences.items[sequences.offsets[u] : stop]
                        for u, stop in zip(users[chosen], stops[chosen], strict=True)
                    ]
                )
                owner = np.repeat(
                    np.arange(len(chosen)), stops[chosen] - sequences.offsets[users[chosen]]
                )
                scores[
                    torch.from_numpy(owner), torch.from_numpy(seen.astype(np.int64) - 1)
                ] = -torch.inf
                candidates = torch.arange(sequences.num_items, device=device).expand_as(scores)
                column = wanted
            else:
                candidates = torch.from_numpy(sampled[chosen]).to(device)
                # The target's column is first; ties go by place in the catalogue, not by column.
                scores, own = scores.gather(1, candidates), scores.gather(1, wanted[:, None])
                scores = torch.cat([own, scores], 1)
                candidates = torch.cat([wanted[:, None], candidates], 1)
                column = torch.zeros_like(wanted)
            ranks[chosen] = ranks_of(scores, candidates, column).cpu().numpy()
    return ranks


def ranks_of(scores: Tensor, candidates: Tensor, column_B: Tensor) -> Tensor:
    """Rank of the target in each row: how many score higher, or equal and stand earlier in the
    catalogue.

    Args:
        scores, candidates: users × candidates.
        column_B: where among its candidates each user's target stands.
    """
    own = scores.gather(1, column_B[:, None])
    wanted = candidates.gather(1, column_B[:, None])
    return ((scores > own) | ((scores == own) & (candidates < wanted))).sum(1)


def history_vectors(
    model: SequenceRanker, sequences: Sequences, starts: np.ndarray, stops: np.ndarray
) -> Tensor:
    """History vectors of slices, B × D: the last row, or [MASK]'s in a bidirectional model."""
    events, _, order = sequences.packed(starts, stops)
    encoded = model.encode_histories(events.to(device_of(model)))
    return encoded[torch.from_numpy(np.argsort(order)).to(encoded.device)]


def sample_negatives(
    sequences: Sequences,
    users: np.ndarray,
    target: Target,
    protocol: Protocol,
    rng: np.random.Generator,
) -> np.ndarray:
    """Catalogue rows of the protocol's negatives, users × 100.

    Raises:
        ValueError: a user has interacted with so many items that fewer than 100 are left.
    """
    num_items = sequences.num_items
    ends = sequences.training_ends()
    if sequences.split.name != "leave_one_out":
        raise ValueError(f"{protocol} is defined for leave_one_out, not {sequences.split.name}")
    if not supports(sequences, protocol):
        raise ValueError(
            f"{protocol} needs {NUM_NEGATIVES} items that a user does not know; the catalogue has {num_items}"
        )
    # 1. Popularity in training events alone; 1e-9 keeps the logarithm finite for all others.
    owner = np.repeat(np.arange(len(sequences)), sequences.lengths)
    trained = sequences.items[np.arange(len(sequences.items)) < ends[owner]]
    popularity = np.log(np.maximum(np.bincount(trained - 1, minlength=num_items), 1e-9))
    # 2. U100 excludes training items, P100 all items of the user; both exclude the target.
    stops = ends if protocol == "U100" else sequences.offsets[1:]
    own = sequences.items[sequences.target_rows(users, target)] - 1
    drawn = np.empty((len(users), NUM_NEGATIVES), np.int64)
    for row, user in enumerate(users):
        known = np.append(sequences.items[sequences.offsets[user] : stops[user]] - 1, own[row])
        if protocol == "U100":
            # Duplicates may stay: only items that the user knows are drawn again.
            drawn[row] = rng.integers(0, num_items, NUM_NEGATIVES)
            while (bad := np.isin(drawn[row], known)).any():
                drawn[row, bad] = rng.integers(0, num_items, int(bad.sum()))
        else:
            # The largest of log-popularity plus Gumbel noise are a draw without replacement
            keys = popularity + rng.gumbel(size=num_items)
            keys[known] = -np.inf
            drawn[row] = np.argpartition(-keys, NUM_NEGATIVES)[:NUM_NEGATIVES]
    return drawn
