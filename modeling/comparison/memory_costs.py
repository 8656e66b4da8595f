"""What lengths of history cost, and what in a log makes them mislead."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from feature_repo.contract.arrow import value_codes
from feature_repo.contract.schema import EVENT_TIMESTAMP
from feature_repo.history.counts import UserCounts
from feature_repo.history.envelope import Identity
from feature_repo.history.history import HistoryLog, pack, remembered_name, unpack
from feature_repo.history.sketch import MICROS_PER_DAY, Layout
from feature_repo.home.tables import JobFolder
from modeling.training_set.dataset import Warehouse
from modeling.training_set.sample import Sample

# Of all events, had by 1 % of the users: a few own a log with more
FEW_OWN = 0.2


@dataclass(frozen=True)
class Trap:
    """Something in a log that makes lengths mislead."""

    name: str
    says: str


def name_of(length: int | None) -> str:
    """A length as tables spell it."""
    return "all" if length is None else "none" if length == 0 else f"{length:,}"


@dataclass(frozen=True)
class LengthCost:
    """What so many newest events of each user cost, and how much of a life they are.

    Args:
        request_ms: CPU milliseconds of a request: its numbers, and the trees' score.
        user_bytes: of the median user online: events as they are packed there, and counts.
        days: between the first and the last of the median user's.
        decisions: of the median user's: events whose item is not that of the event before.
    """

    request_ms: float
    user_bytes: float
    days: float
    decisions: float


def costs_of(
    warehouse: Warehouse, request_ms: Mapping[int | None, float], most: int = 200
) -> dict[str, LengthCost]:
    """Costs of each length, of users spread over a part of the log.

    Args:
        request_ms: by length.
    """
    users = JobFolder(warehouse.settings.home, "user_history")
    parts = (users.read_path(path) for path in users.paths("user_history"))
    part = next(part for part in parts if part.num_rows)
    chosen = np.unique(np.linspace(0, part.num_rows - 1, most).astype(np.int64))
    stored = part.take(pa.array(chosen))
    ids = stored[warehouse.contract.user.join_key]
    item_codes = value_codes(warehouse.log.items)
    medians = {}
    for length in request_ms:
        found = [
            _of_user(warehouse, item_codes, user, packed, length)
            for user, packed in zip(ids.to_pylist(), stored["history"].to_pylist(), strict=True)
        ]
        medians[length] = np.median(np.array(found, np.float64), axis=0).tolist()
    return {name_of(length): LengthCost(ms, *medians[length]) for length, ms in request_ms.items()}


def _of_user(
    warehouse: Warehouse,
    item_codes: np.ndarray,
    user: int | str,
    packed: bytes,
    length: int | None,
) -> tuple[float, float, float]:
    """Bytes, days and decisions of a user's newest events."""
    contract = warehouse.contract
    layout = Layout.of(contract)
    log = warehouse.log
    # 1. What is known of the newest.
    row = log.rows_of(pa.array([user], log.users.type))
    names = ["action", EVENT_TIMESTAMP, *map(remembered_name, layout.columns[1:])]
    history = log.gather(row, log.lengths[row], length, names)
    # 2. What is stored of it: events as far as they are kept, counts of them all.
    events = unpack(contract, user, packed)
    newest = events.slice(max(events.num_rows - len(history.times), 0))
    primary = history.columns["action"] == 0
    codes = [item_codes[history.item_keys], *(history.columns[name] for name in names[2:])]
    counts = UserCounts(layout)
    counts.add([column[primary] for column in codes], history.times[primary])
    as_of = int(history.times.max(initial=0))
    identity = Identity(layout.fingerprint, as_of, 0, len(history.times), 0)
    size = len(pack(contract, user, pa.Table.from_batches([newest])))
    size += len(counts.to_bytes(user, identity))
    # 3. How much of a life it is.
    if not len(history.times):
        return size, 0.0, 0.0
    days = float(history.times[-1] - history.times[0]) / MICROS_PER_DAY
    decisions = 1.0 + float((np.diff(history.item_keys) != 0).sum())
    return size, days, decisions


def share_of_few(log: HistoryLog) -> float:
    """The share of all events that 1 % of the users have, those of the longest histories."""
    lengths = np.sort(log.lengths)[::-1]
    return float(lengths[: max(len(lengths) // 100, 1)].sum() / max(lengths.sum(), 1))


def traps_of(log: HistoryLog, days: np.ndarray, sample: Sample) -> Iterator[Trap]:
    """Find what makes a length say something else in this log than it seems to.

    Args:
        days: between each test request and the newest event before it; NaN without one.
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
    top = share_of_few(log)
    if top > FEW_OWN or sample.of_user:
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
            f"{today:.0%} of the requests have an event of the day before them: would it be known in time? The row `what comes next` "
            "says what is at stake",
        )
    # 6. A log that arrives late.
    late = float(np.mean([log.any_late(np.array([row])) for row in rows.tolist()]))
    if late > 0.01:
        yield Trap(
            "late events",
            f"{late:.0%} of the users have events that arrived late or were corrected",
        )
