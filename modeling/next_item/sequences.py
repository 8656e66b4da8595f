"""Next-item data: whole sequences from a history log, two splits, and packed batches.

Rules (counted in `Sequences.counts`): events of the dataset's first action count, since a returned
article is no target; the first event of each (user, item) counts, later repeats are dropped, since a
seen item is no target either.

| split | training | targets |
|---|---|---|
| leave one out | all but a user's last two items | the last item is the test target, the one before it the validation target; a user with fewer than three items has none, and is trained on where there are two |
| global time | events before the last fifth of all events | a user's first event of the last tenth is the test target, of the tenth before it the validation target; what the user did before it is read, also where training did not see it |

Leave-one-out trains on events that are later than other users' targets; what a model learns of them,
such as what becomes popular, no server can know.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from feature_repo.contract.contract import Contract
from feature_repo.history.history import HistoryLog
from feature_repo.home.tables import JobFolder
from modeling.errors import DataError
from modeling.inputs.batch import FeatureSizes
from modeling.layers.packing import Packing
from modeling.models.sequence import PackedEvents
from modeling.recipes import SplitName

Target = Literal["validation", "test"]
Windows = Literal["newest", "all"]
# Events from the target to the end
HELD_OUT: dict[Target, int] = {"validation": 2, "test": 1}
MIN_EVENTS = 3
# Share of all events before a period
CUTS: dict[Target, float] = {"validation": 0.8, "test": 0.9}
MICROS_PER_DAY = 86_400_000_000
# Users whose events are read together: temporaries stay small beside the sequences
USERS_AT_ONCE = 512


class LeakError(ValueError):
    """A target of the evaluation is in the training data."""


class VocabularyError(ValueError):
    """An item id that the model has no embedding for."""


@dataclass(frozen=True)
class Split:
    """The split of events into training events and targets.

    Args:
        ends: end of each user's training events in `Sequences.items`.
        rows: place of each user's target in `Sequences.items`; -1 without a target.
    """

    name: SplitName
    ends: np.ndarray
    rows: dict[Target, np.ndarray]


@dataclass(frozen=True)
class Sequences:
    """Each user's items, oldest first, each item once: user u owns `[offsets[u], offsets[u +
    1])`.
    """

    offsets: np.ndarray  # int64, U + 1
    # int32 vocabulary index, 1 … num_items; 0 is unknown
    items: np.ndarray
    # int64 microseconds; None where the source knows only order
    times: np.ndarray | None
    item_ids: pa.Array
    user_ids: pa.Array
    counts: dict[str, int]
    split: Split

    @staticmethod
    def of(contract: Contract, folder: JobFolder, *, has_times: bool) -> Sequences:
        """All sequences of a history log."""
        log = HistoryLog(contract, folder)
        items = []
        times = []
        lengths = []
        others = 0
        # 1. Read users in chunks, so that the log is never all in memory.
        for start in range(0, len(log.users), USERS_AT_ONCE):
            rows = np.arange(start, min(start + USERS_AT_ONCE, len(log.users)))
            histories = log.gather(rows, log.lengths[rows])
            # Action 0 is the one that is predicted; events of others are dropped.
            primary = np.flatnonzero(histories.columns["action"] == 0)
            owner = np.repeat(rows - start, histories.lengths)[primary]
            # Each pair of user and item as one number, of which the earliest event is kept.
            keys = owner * len(log.items) + histories.item_keys[primary]
            first = primary[np.sort(np.unique(keys, return_index=True)[1])]
            others += histories.offsets[-1] - len(primary)
            owner = np.searchsorted(histories.offsets, first, side="right") - 1
            items.append((histories.item_keys[first] + 1).astype(np.int32))
            times.append(histories.times[first] if has_times else np.zeros(0, np.int64))
            lengths.append(np.bincount(owner, minlength=len(rows)))
        # 2. Join the chunks and count what was dropped.
        length = np.concatenate(lengths)
        counts = {
            "users": len(length),
            "items": len(log.items),
            "events": int(length.sum()),
            "repeats_dropped": int(log.lengths.sum() - length.sum() - others),
            "other_actions_dropped": int(others),
            "users_not_evaluated": int((length < MIN_EVENTS).sum()),
        }
        offsets = np.r_[0, np.cumsum(length)]
        joined = np.concatenate(times) if has_times else None
        pa.default_memory_pool().release_unused()
        split = split_last_items(offsets)
        return Sequences(
            offsets, np.concatenate(items), joined, log.items, log.users, counts, split
        )

    def by_time(self) -> Sequences:
        """The same events under the global time split.

        Raises:
            DataError: the source knows order only, or a period is without a target.
        """
        if self.times is None:
            raise DataError(
                "a global time split needs times, and a sequence file knows order only: use a log that a Beam job built"
            )
        # 1. Split, and refuse a period without a target.
        split = split_by_time(self.offsets, self.times)
        found = replace(self, split=split)
        for target in CUTS:
            if not len(found.evaluated(target)):
                raise DataError(
                    f"a global time split leaves no {target} target: nobody who was there before acts in that tenth of the {len(self.items):,} "
                    "events; leave_one_out needs no times"
                )
        # 2. Count test targets whose user or item training does not see.
        targets = found.evaluated("test")
        ends = split.ends
        seen = np.zeros(self.num_items + 1, bool)
        seen[self.items[np.arange(len(self.items)) < np.repeat(ends, self.lengths)]] = True
        of_target = self.items[found.target_rows(targets, "test")]
        counts = {
            **self.counts,
            "users_not_evaluated": len(self) - len(targets),
            "targets": len(targets),
            "targets_of_users_not_trained_on": int((ends == self.offsets[:-1])[targets].sum()),
            "targets_not_trained_on": int((~seen[of_target]).sum()),
        }
        return replace(found, counts=counts)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def num_items(self) -> int:
        return len(self.item_ids)

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.offsets)

    def sizes(self, history_length: int) -> FeatureSizes:
        """Sizes that a model is built for."""
        return FeatureSizes(self.num_items + 1, 1, history_length)

    def evaluated(self, target: Target) -> np.ndarray:
        """Users who have such a target."""
        return np.flatnonzero(self.split.rows[target] >= 0)

    def target_rows(self, users: np.ndarray, target: Target) -> np.ndarray:
        """Return the places of users' targets in `items`."""
        return self.split.rows[target][users]

    def training_ends(self) -> np.ndarray:
        """End of each user's training events in `items`."""
        return self.split.ends

    def refuse_leaks(self, ends: np.ndarray) -> None:
        """Refuse to train on events up to `ends` if any target is among them.

        Raises:
            LeakError: a user's validation or test item is one of the user's training items.
        """
        lengths = self.lengths
        trained = np.arange(len(self.items)) < np.repeat(ends, lengths)
        for target in HELD_OUT:
            users = self.evaluated(target)
            # 0, which is no item of a sequence, stands for users without a target.
            wanted = np.zeros(len(self), np.int32)
            wanted[users] = self.items[self.target_rows(users, target)]
            leaked = trained & (self.items == np.repeat(wanted, lengths))
            if leaked.any():
                row = int(np.flatnonzero(leaked)[0])
                owner = int(np.searchsorted(self.offsets, row, side="right")) - 1
                user = self.user_ids[owner]
                item = self.item_ids[int(self.items[row]) - 1]
                raise LeakError(
                    f"{target} item {item} of user {user} is among the user's training events ({int(leaked.sum())} such "
                    "cases): its score would be remembered, not predicted; build sequences with Sequences.of"
                )

    def packed(
        self, starts: np.ndarray, stops: np.ndarray
    ) -> tuple[PackedEvents, np.ndarray, np.ndarray]:
        """Slices `[starts, stops)` as packed events, longest first.

        Returns:
            The events, the rows of `items` they are, and which slice each sequence is.

        Raises:
            VocabularyError: an item that the catalogue lacks.
        """
        lengths = stops - starts
        order = np.argsort(-lengths, kind="stable")
        starts = starts[order]
        lengths = lengths[order]
        packing = Packing(lengths)
        rows = packing.from_oldest + np.repeat(starts, lengths)
        items = self.items[rows].astype(np.int64)
        if len(items) and (int(items.min()) < 1 or int(items.max()) > self.num_items):
            bad = int(items[(items < 1) | (items > self.num_items)][0])
            raise VocabularyError(
                f"item index {bad} is outside the vocabulary, 1 … {self.num_items}: build sequences with Sequences.of"
            )
        gap = torch.zeros(len(rows))
        if self.times is not None:
            # The first event of a slice has no gap, even where older events stand before the slice.
            before = np.where(packing.from_oldest > 0, rows - 1, rows)
            days = (self.times[rows] - self.times[before]) / MICROS_PER_DAY
            gap = torch.from_numpy(np.log1p(np.maximum(days, 0)).astype(np.float32))
        index = torch.from_numpy(items)
        return PackedEvents(index, torch.zeros_like(index), gap, packing), rows, order


def split_last_items(offsets: np.ndarray) -> Split:
    """The last two items of every user with three or more."""
    has = np.diff(offsets) >= MIN_EVENTS
    rows = {target: np.where(has, offsets[1:] - n, -1) for target, n in HELD_OUT.items()}
    return Split("leave_one_out", offsets[1:] - np.where(has, HELD_OUT["validation"], 0), rows)


def split_by_time(offsets: np.ndarray, times: np.ndarray) -> Split:
    """Periods of time for all users alike.

    A user whose first event of all falls into a period has nothing to be read, and no target in it.
    """
    ordered = np.sort(times)
    cuts = {
        target: ordered[int(s * len(ordered))] if len(ordered) else 0 for target, s in CUTS.items()
    }
    owner = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
    users = len(offsets) - 1
    # The first event at or after a cut: a user's events stand in the order of time.
    first = {
        target: offsets[:-1] + np.bincount(owner[times < cut], minlength=users)
        for target, cut in cuts.items()
    }
    last = {"validation": first["test"], "test": offsets[1:]}
    rows: dict[Target, np.ndarray] = {
        target: np.where(
            (first[target] < last[target]) & (first[target] > offsets[:-1]), first[target], -1
        )
        for target in cuts
    }
    return Split("global_time", first["validation"], rows)


@dataclass(frozen=True)
class TrainingWindows:
    """Slices of training events; each gives its events but the last as inputs and but the
    first as targets.
    """

    starts: np.ndarray
    stops: np.ndarray


def training_windows(
    sequences: Sequences, history_length: int, windows: Windows, rng: np.random.Generator
) -> TrainingWindows:
    """Slices of at most `history_length` targets.

    Args:
        windows: "newest" takes each user's newest slice; "all" adds slices of what is older, the
            first of them overlapping the newest by a number that `rng` draws, up to half, so that
            cuts fall elsewhere each epoch.
    """
    starts = sequences.offsets[:-1]
    stops = sequences.training_ends()
    # Targets that the newest slice leaves out
    older = np.maximum(stops - starts - 1 - history_length, 0)
    number = (stops - starts >= 2).astype(np.int64)
    shift = np.zeros(len(starts), np.int64)
    if windows == "all":
        shift = np.where(older > 0, rng.integers(0, history_length // 2 + 1, len(starts)), 0)
        number = number + np.where(older > 0, -(-(older + shift) // history_length), 0)
    # All slices at once: slice 0 of a user is the newest, higher numbers are older.
    owner = np.repeat(np.arange(len(starts)), number)
    nth = np.arange(number.sum()) - np.repeat(np.cumsum(number) - number, number)
    last = stops[owner] - nth * history_length + np.where(nth > 0, shift[owner], 0)
    # One event more than targets, since the first event is an input only.
    first = np.maximum(last - history_length - 1, starts[owner])
    kept = last - first >= 2
    return TrainingWindows(first[kept], last[kept])


def causal_batch(
    sequences: Sequences, windows: TrainingWindows, chosen: np.ndarray
) -> tuple[PackedEvents, Tensor]:
    """Inputs, and for every row the catalogue row of the event after it."""
    events, rows, _ = sequences.packed(windows.starts[chosen], windows.stops[chosen] - 1)
    return events, torch.from_numpy(sequences.items[rows + 1].astype(np.int64) - 1)


def cloze_batch(
    sequences: Sequences,
    windows: TrainingWindows,
    chosen: np.ndarray,
    *,
    mask_item: int,
    probability: float,
    last_only: float,
    rng: np.random.Generator,
) -> tuple[PackedEvents, Tensor, Tensor]:
    """Sequences with some events replaced by [MASK]: inputs, the masked rows, and their catalogue
    rows.

    Args:
        probability: of each row to be masked; at least one row of a sequence is.
        last_only: share of sequences in which just the last event is masked, as inference will ask.
    """
    events, rows, _ = sequences.packed(windows.starts[chosen], windows.stops[chosen])
    packing = events.packing
    draw = rng.random(packing.num_rows)
    masked = draw < probability
    lowest = np.minimum.reduceat(draw, packing.offsets[:-1])
    masked |= draw == np.repeat(lowest, packing.lengths)
    only = np.repeat(rng.random(len(packing.lengths)) < last_only, packing.lengths)
    masked = np.where(only, packing.from_newest == 0, masked)
    at = torch.from_numpy(np.flatnonzero(masked))
    targets = torch.from_numpy(sequences.items[rows[masked]].astype(np.int64) - 1)
    return replace(events, item_N=events.item_N.index_fill(0, at, mask_item)), at, targets
