"""The job `events` on a CSV and a Parquet file, beside a Polars script that parses the same.

`polars` reads, types, filters, sorts by user and time and writes one Parquet file, in an
environment of its own: `--polars PYTHON`, such as one made by `python3.11 -m venv /tmp/polars &&
/tmp/polars/bin/pip install polars`. `job` is the whole command on the local runner, gates and
imports included; `job, imports apart` is without the seconds that Beam and Great Expectations take
to load, whatever the number of rows. Peaks are of resident memory: the local runner holds what
passes between two steps, so the job's grows with the rows; a worker of a real runner holds a unit.

Rows are read as plain events, with the time at which each arrived (5 % up to a day late), and with an identity beside
it: one user's own, or an id that a later line may move to another user, for which lines are gathered twice.
"""

from __future__ import annotations

import importlib
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv
import pyarrow.parquet as pq

from feature_repo.benchmarks import parser, report
from feature_repo.settings import CHECKOUT, Settings

MODULE = "beam_jobs.benchmarks.events"
NAME = "benchmark_log"
DECLARED = """
from feature_repo.contract.schema import *
SPEC = DatasetSpec(
    name="{name}", title="a log", user_id=DType.STRING, item_id=DType.STRING, actions=("purchase",),
    tasks=(Task("label", "", action="purchase"),),
    requests=Requests(Examples.ACTIONS, "2024-09-01T00:00:00Z", "2024-10-01T00:00:00Z", 4, 100),
    events=Source("{file}", columns=dict(user_id="user", item_id="item", event_timestamp="at", event_id="id"){more}),
    event_identity={identity},
    event_features=(
        Column("price", DType.FLOAT32, "", kind=NUMBER, minimum=0),
        Column("quantity", DType.INT64, "", kind=NUMBER),
        Column("device", DType.STRING, "", kind=CATEGORY),
    ),
    stat_value="price",
)
"""
# What is declared of the rows beside their columns: further arguments of the source, and the identity
DECLARATIONS = {
    "plain": ("", "()"),
    "arrival": (', arrival="seen"', "()"),
    "arrival, identity of a user": (', arrival="seen"', '("user_id", "event_id")'),
    "arrival, identity across users": (', arrival="seen"', '("event_id",)'),
}
POLARS = """
import polars as pl, resource, sys, time
started, file = time.time(), sys.argv[1]
rows = pl.scan_csv(file) if file.endswith("csv") else pl.scan_parquet(file)
rows = rows.with_columns(
    pl.col("at").str.to_datetime("%Y-%m-%dT%H:%M:%S%.fZ", time_unit="us"), pl.col("price").cast(pl.Float32)
)
rows = rows.filter(pl.col("user").is_not_null() & pl.col("at").is_not_null() & (pl.col("price") >= 0))
rows = rows.collect().with_row_index("position").sort(["user", "at", "position"])
rows.write_parquet(sys.argv[2], compression="zstd")
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
print(len(rows), time.time() - started, peak)
"""


def main() -> None:
    """Run."""
    flags = parser(MODULE, __doc__)
    flags.add_argument("--rows", type=int, help="default five million; 200,000 with --quick")
    flags.add_argument("--polars", help="an interpreter that has Polars; without one no floor")
    flags.add_argument("--child", help="internal")
    arguments = flags.parse_args()
    if arguments.child:
        print(json.dumps(_job(**json.loads(arguments.child))))
        return
    rows = arguments.rows or (200_000 if arguments.quick else 5_000_000)
    table = []
    with tempfile.TemporaryDirectory() as folder:
        for number in (rows // 4, rows):
            files = write_log(Path(folder), number)
            table += [_measured(file, number, arguments.polars) for file in files]
        table += _declared(files[1], rows, arguments.repeats)
    config = {"rows": rows, "polars": bool(arguments.polars)}
    report("events", config, table, arguments.json)


def write_log(folder: Path, rows: int) -> list[Path]:
    """The same rows as CSV and as Parquet; a few users have many of them."""
    rng = np.random.default_rng(0)
    seconds = 1_700_000_000 + rng.integers(0, 365 * 86_400, rows)
    at = pa.array(seconds * 1_000_000).cast(pa.timestamp("us", "UTC"))
    late = np.where(rng.random(rows) < 0.05, rng.integers(0, 86_400_000_000, rows), 0)
    late = pa.array(late).cast(pa.duration("us"))
    table = pa.table(
        {
            "user": pa.array([f"u{n}" for n in rng.zipf(1.3, rows) % 200_000]),
            "item": pa.array([f"i{n}" for n in rng.integers(0, 50_000, rows)]),
            "at": pc.strftime(at, "%Y-%m-%dT%H:%M:%SZ"),
            "seen": pc.strftime(pc.add(at, late), "%Y-%m-%dT%H:%M:%SZ"),
            "id": pa.array([f"event-{n}" for n in rng.permutation(rows)]),
            "price": np.round(rng.lognormal(2, 1, rows), 2),
            "quantity": rng.integers(1, 9, rows),
            "device": pa.array(np.array(["phone", "desktop", "tablet"])[rng.integers(0, 3, rows)]),
        }
    )
    pacsv.write_csv(table, folder / "log.csv")
    pq.write_table(table, folder / "log.parquet")
    return [folder / "log.csv", folder / "log.parquet"]


def _declared(file: Path, rows: int, repeats: int) -> list[dict[str, Any]]:
    """The same rows under each declaration, in turn; medians, beside the plain one."""
    found: dict[str, list[dict[str, float]]] = {name: [] for name in DECLARATIONS}
    for _ in range(repeats):
        for name, runs in found.items():
            runs.append(_in_a_child(file, rows, name))
    plain = _median(found["plain"], "job, imports apart s")
    return [
        {
            "file": file.name,
            "declared": name,
            "rows": rows,
            **{figure: _median(runs, figure) for figure in runs[0]},
            "against plain": _median(runs, "job, imports apart s") / plain,
        }
        for name, runs in found.items()
    ]


def _median(runs: list[dict[str, float]], figure: str) -> float:
    return float(np.median([run[figure] for run in runs]))


def _in_a_child(file: Path, rows: int, declared: str) -> dict[str, float]:
    question = json.dumps({"file": str(file), "rows": rows, "declared": declared})
    started = time.perf_counter()
    command = [sys.executable, "-m", MODULE, "--child", question]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=CHECKOUT)
    taken = time.perf_counter() - started
    figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return {"job s": taken, **figures}


def _measured(file: Path, rows: int, polars: str | None) -> dict[str, Any]:
    row: dict[str, Any] = {"file": file.name, "declared": "plain", "rows": rows}
    row |= _in_a_child(file, rows, "plain")
    if polars:
        started = time.perf_counter()
        script = [polars, "-c", POLARS, str(file), str(file.with_suffix(".out"))]
        floor = subprocess.run(script, capture_output=True, text=True, check=True)
        row["polars s"] = time.perf_counter() - started
        row["polars peak MB"] = float(floor.stdout.split()[-1])
        row["ratio"] = row["job s"] / row["polars s"]
        row["ratio, imports apart"] = row["job, imports apart s"] / row["polars s"]
    return row


def _job(file: str, rows: int, declared: str) -> dict[str, float]:
    """One run of the job in this process, under a home of its own."""
    importlib.import_module("great_expectations")  # what the gates take to load is not the job's
    from beam_jobs.engine.run import run
    from beam_jobs.registry import load_job
    from feature_repo import datasets

    with tempfile.TemporaryDirectory() as folder:
        module = Path(folder, f"{NAME}.py")
        more, identity = DECLARATIONS[declared]
        module.write_text(
            DECLARED.format(name=NAME, file=Path(file).name, more=more, identity=identity)
        )
        datasets.__path__.append(folder)
        catalogue = f"sqlite:///{folder}/catalogue.db"
        settings = Settings(
            NAME, str(Path(file).parent), f"{folder}/home", "local", catalogue, False
        )
        job = load_job("events")
        started = time.perf_counter()
        outcome = run(
            job,
            settings,
            job.options(),
            ["--runner=FnApiRunner"],
            as_of=None,
            max_bad_fraction=None,
        )
        taken = time.perf_counter() - started
        assert outcome.manifest.counts["rows_events"] == rows
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"job, imports apart s": taken, "job peak MB": peak}


if __name__ == "__main__":
    main()
