"""Sketches of a million events: what they cost, how far their readings are off, and what was promised.

Events are of items in a Zipf distribution, each with three further columns, over ten years. Floors
beside an update: hashing the keys, which any reader must do, and adding to a plain dictionary, which
grows without bound.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import numpy as np

from feature_repo.benchmarks import parser, report
from feature_repo.history.sketch import DEPTH, MICROS_PER_DAY, Layout, Sketch

HALF_LIVES = (7.0, 30.0, 180.0)
START = 1_300_000_000_000_000
YEARS = 10
KEYS = 20_000  # whose readings are compared with the truth
BATCH = 1_000  # events that are added at a time


def main() -> None:
    """Run."""
    flags = parser("feature_repo.benchmarks.sketch", __doc__)
    flags.add_argument("--events", type=int, help="default 1,000,000; 100,000 with --quick")
    arguments = flags.parse_args()
    events = arguments.events or (100_000 if arguments.quick else 1_000_000)
    rng = np.random.default_rng(0)
    codes = [rng.zipf(1.2, events) % 200_000, *(rng.zipf(1.3, events) % 500 for _ in range(3))]
    times = START + np.sort(rng.integers(0, YEARS * 365 * MICROS_PER_DAY, events))
    rows = [_measured(kibibytes, codes, times) for kibibytes in (64, 8)]
    plain = _spent(lambda: _plain(codes, times)) / events * 1e6
    config = {"events": events, "half_lives_days": HALF_LIVES, "dictionary_us": round(plain, 2)}
    report("sketch", config, rows, arguments.json)


def _measured(kibibytes: int, codes: list[np.ndarray], times: np.ndarray) -> dict[str, Any]:
    # 1. All events, a batch at a time; hashing and adding timed apart.
    width = kibibytes * 1024 // (4 * (2 + len(HALF_LIVES))) // (2 * DEPTH)
    layout = Layout(("item", "a", "b", "c"), (1, 1, 1, 1), HALF_LIVES, width)
    events = len(times)
    now = int(times[-1])
    sketch = Sketch(layout)
    other = Sketch(layout)
    spent = {"hash": 0.0, "add": 0.0}
    for start in range(0, events, BATCH):
        chosen = slice(start, start + BATCH)
        started = time.process_time()
        cells = layout.positions([c[chosen] for c in codes])
        hashed = time.process_time()
        sketch.add(cells, times[chosen])
        spent["hash"] += hashed - started
        spent["add"] += time.process_time() - hashed
    # 2. One event alone, which pays for every call by itself; and the sum of two halves.
    one = layout.positions([c[-1:] for c in codes])

    def add_alone() -> None:
        for _ in range(1000):
            other.add(one, times[-1:])

    alone = _spent(add_alone) / 1000
    merged = Sketch(layout)
    for part in _halves(layout, codes, times):
        merged.merge(part)
    # 3. Readings against the truth.
    keys = np.unique(codes[0])[:KEYS]
    others = np.zeros(len(keys), np.int64)
    cells = layout.positions([keys, others, others, others])
    read, added = (s.read(cells, now)[:, 0] for s in (sketch, merged))
    error = read - _truth(codes[0], times, keys, now)
    bound = sketch.bounds(now)[0]
    data = sketch.payload(now)
    row: dict[str, Any] = {
        "kibibytes": kibibytes,
        "bytes": len(data),
        "hash_us": spent["hash"] / events * 1e6,
        "add_us": spent["add"] / events * 1e6,
        "add_alone_us": alone * 1e6,
        "counts_equal_after_merge": bool((read[:, 0] == added[:, 0]).all()),
        "merge_apart": float(np.abs(read / np.maximum(added, 1e-300) - 1).max()),
        "smallest_error": float(error.min()),
        "promised_above_bound": float(np.exp(-DEPTH)),
    }
    for number, name in enumerate(("ever", *(f"{days:g}d" for days in HALF_LIVES))):
        row[f"mean_error_{name}"] = float(error[:, number].mean())
        row[f"bound_{name}"] = float(bound[number])
        row[f"above_{name}"] = float((error[:, number] > bound[number]).mean())
    return row


def _halves(layout: Layout, codes: list[np.ndarray], times: np.ndarray) -> list[Sketch]:
    """Sketches of the even and of the odd events."""
    found = []
    for first in range(2):
        sketch = Sketch(layout)
        sketch.add(layout.positions([c[first::2] for c in codes]), times[first::2])
        found.append(sketch)
    return found


def _truth(codes: np.ndarray, times: np.ndarray, keys: np.ndarray, now: int) -> np.ndarray:
    """Counts of each key and half-life, by plain counting."""
    place = np.searchsorted(keys, codes)
    place[place == len(keys)] = 0
    mine = keys[place] == codes
    half = np.array([np.inf, *HALF_LIVES]) * MICROS_PER_DAY
    weights = np.exp2((times[mine] - now) / half[:, None])
    return np.stack([np.bincount(place[mine], w, len(keys)) for w in weights], axis=1)


def _plain(codes: list[np.ndarray], times: np.ndarray) -> dict[tuple[int, int], int]:
    """A dictionary of counts, without any that fades."""
    found: dict[tuple[int, int], int] = defaultdict(int)
    for column, values in enumerate(codes):
        for value in values.tolist():
            found[column, value] += 1
    return found


def _spent(call: Callable[[], Any]) -> float:
    started = time.process_time()
    call()
    return time.process_time() - started


if __name__ == "__main__":
    main()
