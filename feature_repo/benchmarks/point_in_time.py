"""The ASOF offline store beside Feast's DuckDB store: the same call, the same rows, seconds and
ratio.

The floor is DuckDB's own time to read the features once. Below it histories as lists (`histories.py`).
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pandas as pd
import pyarrow as pa

from feature_repo.benchmarks import histories, interleaved, parser, report
from feature_repo.benchmarks.retrieval import feature_view, join

START = datetime(2024, 1, 1, tzinfo=UTC)
NUM_FEATURES = 6


def main() -> None:
    """Run."""
    arguments = parser("feature_repo.benchmarks.point_in_time", __doc__).parse_args()
    warnings.simplefilter("ignore")
    rows, keys, versions = (20_000, 5_000, 10) if arguments.quick else (500_000, 50_000, 20)
    with tempfile.TemporaryDirectory() as folder:
        views = [
            _features(Path(folder), name, keys, versions, seed)
            for seed, name in enumerate(("user_id", "item_id"))
        ]
        rng = np.random.default_rng(9)
        entity_df = pd.DataFrame({
            "row": np.arange(rows),
            "user_id": rng.integers(0, keys, rows),
            "item_id": rng.integers(0, keys, rows),
            "event_timestamp": _stamps(rng, rows),
        })  # fmt: skip
        files = [view.batch_source.path for view in views]
        calls: dict[str, Callable[[], Any]] = {
            "asof": lambda: join("asof", views, entity_df, filter_by_created_timestamp=True),
            "feast duckdb": lambda: join(
                "duckdb", views, entity_df, filter_by_created_timestamp=True
            ),
            "floor: read once": lambda: [
                duckdb.sql(f"select * from read_parquet('{file}')").to_arrow_table()
                for file in files
            ],
        }
        # A speed beside rows that differ would compare two different joins.
        ours = calls["asof"]()
        theirs = calls["feast duckdb"]().sort_by("row")
        identical = all(
            ours[c].cast(pa.float64()).equals(theirs[c].cast(pa.float64()))
            for c in ours.column_names
            if c.startswith("f")
        )
        seconds = interleaved(calls, arguments.repeats, warm_up=0)
    table = [
        {
            "store": name,
            **times,
            "times slower than asof": times["wall_s"] / seconds["asof"]["wall_s"],
        }
        for name, times in seconds.items()
    ]
    sizes = (
        histories.Sizes(200, 150, 2_000)
        if arguments.quick
        else histories.Sizes(2_000, 150, 200_000)
    )
    with tempfile.TemporaryDirectory() as folder:
        more, facts = histories.measured(Path(folder), sizes, arguments.repeats)
    table += more
    config = {
        "entity rows": rows,
        "features": 2 * NUM_FEATURES,
        "feature rows": 2 * keys * versions,
        "rows identical": identical,
        **facts,
    }
    report("point_in_time", config, table, arguments.json)


def _stamps(rng: np.random.Generator, rows: int) -> pd.Series:
    return pd.Series(
        pd.to_datetime(START) + pd.to_timedelta(rng.integers(0, 86_400 * 365, rows), unit="s")
    ).astype("datetime64[us, UTC]")


def _features(folder: Path, key: str, keys: int, versions: int, seed: int) -> Any:
    from feast.types import Float32

    rng = np.random.default_rng(seed)
    rows = keys * versions
    names = [f"f{seed}_{i}" for i in range(NUM_FEATURES)]
    frame = pd.DataFrame(
        {key: np.repeat(np.arange(keys), versions), "event_timestamp": _stamps(rng, rows)}
    )
    frame["created_timestamp"] = frame["event_timestamp"]
    for column in names:
        frame[column] = rng.random(rows).astype(np.float32)
    path = folder / f"{key}.parquet"
    frame.drop_duplicates([key, "event_timestamp"]).to_parquet(path, index=False)
    return feature_view(f"{key}_view", path, key, dict.fromkeys(names, Float32), timedelta(days=90))


if __name__ == "__main__":
    main()
