"""What lengths of history cost, and what in a log makes them mislead."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from feature_repo.contract.arrow import value_codes
from feature_repo.contract.contract import Contract
from feature_repo.history.counts import UserCounts
from feature_repo.history.envelope import Identity
from feature_repo.history.history import HistoryLog, remembered_name
from feature_repo.history.sketch import MICROS_PER_DAY, Layout
from modeling.training_set.sample import Sample


@dataclass(frozen=True)
class Trap:
    """Something in a log that makes lengths mislead."""

    name: str
    says: str


def name_of(length: int | None) -> str:
    """A length as tables spell it."""
    return "all" if length is None else "none" if length == 0 else f"{length:,}"


def bytes_of_users(
    contract: Contract, log: HistoryLog, lengths: Sequence[int | None], most: int = 200
) -> dict[str, float]:
    """Bytes that the median user's events and counts take online, by length."""
    layout = Layout.of(contract)
    rows = np.unique(np.linspace(0, len(log.users) - 1, most).astype(np.int64))
    names = ["action", "event_timestamp", *map(remembered_name, layout.columns[1:])]
    item_codes = value_codes(log.items)
    an_event = 4 + 8 * len(contract.history_columns)
    found: dict[str, list[float]] = {name_of(length): [] for length in lengths}
    for row in rows.tolist():
        history = log.gather(np.array([row]), log.lengths[[row]], columns=names)
        for length in lengths:
            kept = len(history.times) if length is None else min(length, len(history.times))
            first = len(history.times) - kept
            primary = first + np.flatnonzero(history.columns["action"][first:] == 0)
            counts = UserCounts(layout)
            codes = [item_codes[history.item_keys], *(history.columns[n] for n in names[2:])]
            counts.add([c[primary] for c in codes], history.times[primary])
            identity = Identity(layout.fingerprint, int(history.times.max(initial=0)), 0, kept, 0)
            packed = min(kept, contract.spec.num_history_online) * an_event
            found[name_of(length)].append(packed + len(counts.to_bytes(row, identity)))
    return {name: statistics.median(values) for name, values in found.items()}


def traps_of(log: HistoryLog, days: np.ndarray, sample: Sample) -> Iterator[Trap]:
    """Find what makes a length say something else in this log than it seems to.

    Args:
        days: between each test candidate's request and the newest event before it; NaN without one.
        sample: which requests were looked at.
    """
    rows = np.unique(np.linspace(0, len(log.users) - 1, 2_000).astype(np.int64))
    history = log.gather(rows, log.lengths[rows], columns=["event_timestamp"])
    owner = np.repeat(rows, history.lengths)
    together = (owner[1:] == owner[:-1])[: max(len(owner) - 1, 0)]
    if not together.any():
        return
    # 1. Runs of one item.
    same = (history.item_keys[1:] == history.item_keys[:-1])[together].mean()
    if same > 0.1:
        yield Trap(
            "runs of one item",
            f"{same:.0%} of events are of the item before: the newest 50 events are about {50 * (1 - same):.0f} decisions",
        )
    # 2. Time behind a length.
    between = (history.times[1:] - history.times[:-1])[together] / MICROS_PER_DAY
    yield Trap("days", f"50 events are {50 * between.mean():,.0f} days of a user, on average")
    # 3. Ties in time.
    tied = (history.times[1:] == history.times[:-1])[together].mean()
    if tied > 0.1:
        yield Trap(
            "ties in time",
            f"{tied:.0%} of events have the time of the event before: which of them are the newest follows from the order of the file",
        )
    # 4. Few users who have most of the log.
    lengths = np.sort(log.lengths)[::-1]
    top = lengths[: max(len(lengths) // 100, 1)].sum() / max(lengths.sum(), 1)
    if top > 0.2 or sample.of_user:
        capped = (
            f"; of each user {sample.of_user} requests at most are looked at"
            if sample.of_user
            else ""
        )
        yield Trap("few users", f"1 % of the users have {top:.0%} of the events{capped}")
    # 5. What was known of the same day.
    today = float((days < 1).mean())
    if today > 0.2:
        yield Trap(
            "histories of the same day",
            f"{today:.0%} of the requests have an event of the day before them: see whether it would be known in time",
        )
    # 6. A log that arrives late.
    late = float(np.mean([log.any_late(np.array([row])) for row in rows.tolist()]))
    if late > 0.01:
        yield Trap(
            "late events",
            f"{late:.0%} of the users have events that arrived late or were corrected",
        )
