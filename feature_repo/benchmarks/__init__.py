"""What every benchmark shares: flags, interleaved timing, the table, and the closing JSON line."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from feature_repo.settings import CHECKOUT


def parser(name: str, doc: str | None) -> argparse.ArgumentParser:
    """Flags that all benchmarks take."""
    made = argparse.ArgumentParser(
        prog=f"python -m {name}", description=(doc or "").splitlines()[0]
    )
    made.add_argument("--json", type=Path, help="also write the figures to this file")
    made.add_argument("--quick", action="store_true", help="smaller sizes: under a minute")
    made.add_argument(
        "--repeats",
        type=int,
        default=5,
        help="interleaved repeats; medians are reported (default 5)",
    )
    return made


def interleaved(
    calls: dict[str, Callable[[], Any]], repeats: int, warm_up: int = 1
) -> dict[str, dict[str, float]]:
    """Median wall and CPU seconds of each call, taken in turns, so that a slow moment meets all of
    them.
    """
    wall: dict[str, list[float]] = {name: [] for name in calls}
    cpu: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(warm_up + repeats):
        for name, call in calls.items():
            started = time.perf_counter()
            started_cpu = time.process_time()
            call()
            if turn >= warm_up:
                wall[name].append(time.perf_counter() - started)
                cpu[name].append(time.process_time() - started_cpu)
    return {
        name: {"wall_s": statistics.median(wall[name]), "cpu_s": statistics.median(cpu[name])}
        for name in calls
    }


def report(
    name: str, config: dict[str, Any], rows: list[dict[str, Any]], file: Path | None
) -> None:
    """Print a table of rows, write the file if one is wanted, end with one JSON line."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    cells = [[_show(row.get(column)) for column in columns] for row in rows]
    widths = [max(len(column), *(len(row[i]) for row in cells)) for i, column in enumerate(columns)]
    facts = {"benchmark": name, "commit": commit(), "hardware": hardware(), "config": config}
    print(f"{name}, commit {facts['commit']}, {facts['hardware']}")
    print(", ".join(f"{key} {value}" for key, value in config.items()))
    print("  ".join(column.ljust(width) for column, width in zip(columns, widths, strict=True)))
    for row in cells:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)))
    line = json.dumps({**facts, "rows": rows})
    if file:
        file.write_text(line + "\n")
    print(line)


def _show(value: Any) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def commit() -> str:
    """The commit of this checkout, and whether it is changed."""
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        capture_output=True,
        text=True,
        cwd=CHECKOUT,
        check=False,
    )
    return done.stdout.strip() or "unknown"


def hardware() -> str:
    """The machine, in a few words."""
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [
            line.split(":", 1)[1].strip()
            for line in info.read_text().splitlines()
            if line.startswith("model name")
        ]
        model = names[0] if names else model
    return f"{os.cpu_count()} × {model}, load {os.getloadavg()[0]:.1f}"
