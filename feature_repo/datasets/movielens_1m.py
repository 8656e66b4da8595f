"""MovieLens 1M (Harper and Konstan 2015), read from a folder that a person gives; it is never shipped.

The folder holds `users.dat`, `movies.dat` and either `ratings.dat` or a Parquet table of the same rows with columns
user_id, movie_id, rating, timestamp. A request is up to 16 consecutive ratings of one user; its time is the first
rating's, so that none of the 16 is in the history.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from feature_repo.arrow import arrow_schema, from_micros, micros
from feature_repo.datasets import AssignedRequests, Parsed, RawDataError, RawUnit, empty
from feature_repo.schema import Column, DatasetSpec, DType, Requests, Table, contract

REQUEST_RATINGS = 16
LIKED_FROM = 4
UNIT_ROWS = 200_000
KNOWN_SINCE = 0  # demographics and titles carry no time: known from the start

SPEC = DatasetSpec(
    name="movielens_1m",
    title="MovieLens 1M",
    user_id=DType.INT64,
    item_id=DType.INT64,
    actions=("high_rating", "low_rating"),
    event_features=(Column("rating", DType.FLOAT32, "stars", unit="stars", minimum=1, maximum=5),),
    user_features=(
        Column("gender", DType.STRING, "as given", values=("F", "M")),
        Column("age", DType.INT64, "lower end of the age band", unit="years", minimum=1),
        Column("occupation", DType.INT64, "occupation code", minimum=0, maximum=20),
    ),
    item_features=(
        Column("title", DType.STRING, "title and year"),
        Column("genres", DType.STRING_LIST, "genres"),
        Column("year", DType.INT64, "of release, from the title", unit="years", nullable=True),
    ),
    item_title="title",
    stat_value="rating",
    requests=Requests(
        label="label_like",
        label_doc=f"the user rated it {LIKED_FROM} stars or more",
        validation_from="2000-12-02T00:00:00+00:00",
        test_from="2000-12-29T00:00:00+00:00",
        train_negatives_per_positive=0,
        eval_negatives=0,
    ),
    raw=Table(
        "raw_ratings",
        "Ratings as GroupLens publishes them.",
        (
            Column("user_id", DType.INT64, "user", minimum=1),
            Column("movie_id", DType.INT64, "movie", minimum=1),
            Column("rating", DType.INT64, "stars", unit="stars", minimum=1, maximum=5),
            Column("timestamp", DType.INT64, "Unix time", unit="s", minimum=1),
        ),
    ),
    max_bad_fraction=0.01,
    ranking_user_features=("gender", "age", "occupation"),
    ranking_item_features=("genres", "year"),
)
CONTRACT = contract(SPEC)


def raw_units(data: str | None) -> list[RawUnit]:
    """Users, movies and row ranges of the ratings.

    Raises:
        RawDataError: no folder was given, or a file is missing.
    """
    if data is None:
        raise RawDataError("MovieLens 1M is not shipped: download it from GroupLens and set MEMOIR_DATA to its folder")
    folder = Path(data)
    for name in ("users.dat", "movies.dat"):
        if not (folder / name).exists():
            raise RawDataError(f"expected {name} in {folder}; found none")
    units = [
        RawUnit(str(folder / "users.dat"), 0, len(_lines(folder / "users.dat")), "users"),
        RawUnit(str(folder / "movies.dat"), 0, len(_lines(folder / "movies.dat")), "items"),
    ]
    ratings = _ratings_file(folder)
    rows = pq.ParquetFile(ratings).metadata.num_rows if ratings.suffix == ".parquet" else len(_lines(ratings))
    units += [RawUnit(str(ratings), start, min(UNIT_ROWS, rows - start)) for start in range(0, rows, UNIT_ROWS)]
    return units


def read_raw(unit: RawUnit) -> pa.Table:
    """A range of ratings; fields that are no number are null."""
    path, names = Path(unit.file), [c.name for c in SPEC.raw.columns]
    if path.suffix == ".parquet":
        table = pq.read_table(path, columns=names, memory_map=True)
        return table.slice(unit.start, unit.rows).cast(pa.schema([(name, pa.int64()) for name in names]))
    rows = [line.split("::") for line in _lines(path)[unit.start : unit.start + unit.rows]]
    columns = [[_number(row[i]) if len(row) == len(names) else None for row in rows] for i in range(len(names))]
    return pa.table([pa.array(column, pa.int64()) for column in columns], names=names)


def parse(unit: RawUnit) -> Parsed:
    """One piece as events, users, items and dead letters."""
    if unit.kind == "events":
        return _parse_ratings(unit)
    rows = [line.split("::") for line in _lines(Path(unit.file))]
    known = from_micros(np.full(len(rows), KNOWN_SINCE, np.int64))
    users, items = empty(SPEC, "user_profile"), empty(SPEC, "item_profile")
    try:
        if unit.kind == "users":
            columns = [
                [int(r[0]) for r in rows],
                [r[1] for r in rows],
                [int(r[2]) for r in rows],
                [int(r[3]) for r in rows],
            ]
            users = pa.table([pa.array(c) for c in columns] + [known, known], schema=users.schema)
        else:
            columns = [[int(r[0]) for r in rows], [r[1] for r in rows], [r[2].split("|") for r in rows]]
            years = pa.array([_number(r[1][-5:-1]) for r in rows], pa.int64())
            items = pa.table([*(pa.array(c) for c in columns), years, known, known], schema=items.schema)
    except (ValueError, IndexError) as error:
        raise RawDataError(f"{unit.file}: expected GroupLens's '::' separated fields; {error}") from error
    return Parsed(empty(SPEC, "events"), users, items, empty(SPEC, "dead_letters"), 0)


def assign_requests(events: pa.Table) -> AssignedRequests:
    """Up to 16 consecutive ratings of one user are one request, at the time of the first."""
    user, time = events["user_id"].to_numpy(), micros(events["event_timestamp"])
    if not len(user):
        return AssignedRequests(np.zeros(0, np.int64), np.zeros(0, np.int8), np.zeros(0, np.int64))
    first_of_user = np.r_[True, np.diff(user) != 0]
    start = np.maximum.accumulate(np.where(first_of_user, np.arange(len(user)), 0))
    first = (np.arange(len(user)) - start) % REQUEST_RATINGS == 0
    label = (events["action"].to_numpy() == 0).astype(np.int8)
    return AssignedRequests(np.cumsum(first) - 1, label, time[first])


def _parse_ratings(unit: RawUnit) -> Parsed:
    raw = read_raw(unit).combine_chunks()
    readable = np.ones(raw.num_rows, bool)
    for column in SPEC.raw.columns:
        values = pc.fill_null(raw[column.name], -1).to_numpy()
        readable &= values >= column.minimum if column.minimum is not None else True
        readable &= values <= column.maximum if column.maximum is not None else True
    kept, dead = np.flatnonzero(readable), np.flatnonzero(~readable)
    good = raw.take(pa.array(kept))
    rating = good["rating"].to_numpy()
    events = pa.table(
        {
            "user_id": good["user_id"],
            "item_id": good["movie_id"],
            "action": (rating < LIKED_FROM).astype(np.int8),
            "event_timestamp": from_micros(good["timestamp"].to_numpy() * 1_000_000),
            "rating": rating.astype(np.float32),
            "source_position": unit.start + kept,
        }
    ).cast(arrow_schema(CONTRACT.table("events")))
    dead_letters = pa.table(
        {
            "source_file": [Path(unit.file).name] * len(dead),
            "source_row": unit.start + dead,
            "reason": ["unreadable: a field is missing, no number or out of range"] * len(dead),
            "raw": _as_they_stand(unit, raw, dead),
        },
        schema=arrow_schema(CONTRACT.table("dead_letters")),
    )
    return Parsed(events, empty(SPEC, "user_profile"), empty(SPEC, "item_profile"), dead_letters, raw.num_rows)


def _as_they_stand(unit: RawUnit, raw: pa.Table, rows: np.ndarray) -> list[str]:
    """Raw rows as JSON: the line of a text file, the fields of a Parquet row."""
    if Path(unit.file).suffix == ".parquet":
        return [json.dumps(row) for row in raw.take(pa.array(rows)).to_pylist()]
    lines = _lines(Path(unit.file)) if len(rows) else []
    return [json.dumps(lines[unit.start + row]) for row in rows]


def _ratings_file(folder: Path) -> Path:
    for name in ("ratings.dat", "ratings.parquet", "ratings_reconstructed.parquet"):
        if (folder / name).exists():
            return folder / name
    raise RawDataError(f"expected ratings.dat, or the same rows as ratings.parquet, in {folder}; found neither")


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="latin-1").splitlines()


def _number(text: str) -> int | None:
    try:
        return int(text)
    except ValueError:
        return None
