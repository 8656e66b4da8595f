"""MovieLens 1M (Harper and Konstan 2015), read from a folder that a person gives; it is never
shipped.

The folder holds `users.dat`, `movies.dat` and either `ratings.dat` or a Parquet table of the same
rows with columns user_id, movie_id, rating, timestamp. A request is up to 16 consecutive ratings of
one user; its time is the first rating's, so that none of the 16 is in the history.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from feature_repo import limits, raw
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
            Column("timestamp", DType.TIMESTAMP, "whole seconds since 1970"),
        ),
    ),
    raw_time_unit="seconds",
    max_bad_fraction=0.01,
    ranking_user_features=("gender", "age", "occupation"),
    ranking_item_features=("genres", "year"),
    event_identity=("user_id", "item_id", "event_timestamp"),
    items_repeat=False,
)
CONTRACT = contract(SPEC)
RAW_COLUMNS = [column.name for column in SPEC.raw.columns]
USERS = Table(
    "users.dat",
    "Users as GroupLens publishes them.",
    (
        Column("user_id", DType.INT64, "user"),
        Column("gender", DType.STRING, "F or M"),
        Column("age", DType.INT64, "lower end of the age band"),
        Column("occupation", DType.INT64, "occupation code"),
        Column("zip", DType.STRING, "not read", nullable=True),
    ),
)
MOVIES = Table(
    "movies.dat",
    "Movies as GroupLens publishes them.",
    (
        Column("item_id", DType.INT64, "movie"),
        Column("title", DType.STRING, "title and year"),
        Column("genres", DType.STRING, "genres, with | between them"),
    ),
)


def raw_units(data: str | None) -> list[RawUnit]:
    """Users, movies and row ranges of the ratings.

    Raises:
        RawDataError: no folder was given, or a file is missing.
    """
    if data is None:
        raise RawDataError(
            "MovieLens 1M is not shipped: download it from GroupLens and set MEMOIR_DATA to its folder"
        )
    folder = Path(data)
    for name in ("users.dat", "movies.dat"):
        if not (folder / name).exists():
            raise RawDataError(f"expected {name} in {folder}; found none")
    units = [
        RawUnit(str(folder / "users.dat"), 0, len(_lines(folder / "users.dat")), "users"),
        RawUnit(str(folder / "movies.dat"), 0, len(_lines(folder / "movies.dat")), "items"),
    ]
    ratings = _ratings_file(folder)
    rows = (
        raw.parquet_rows(ratings, RAW_COLUMNS)
        if ratings.suffix == ".parquet"
        else len(_lines(ratings))
    )
    units += [
        RawUnit(str(ratings), start, min(UNIT_ROWS, rows - start))
        for start in range(0, rows, UNIT_ROWS)
    ]
    return units


def read_raw(unit: RawUnit) -> pa.Table:
    """A range of ratings as text or, of a Parquet table, as it stands."""
    if Path(unit.file).suffix == ".parquet":
        return raw.read_parquet(unit.file, RAW_COLUMNS, unit.start, unit.rows)
    return _fields(_lines(Path(unit.file))[unit.start : unit.start + unit.rows], RAW_COLUMNS)


def parse(unit: RawUnit) -> Parsed:
    """One piece as events, users, items and dead letters."""
    if unit.kind == "events":
        return _parse_ratings(unit)
    lines = _lines(Path(unit.file))
    known = from_micros(np.full(len(lines), KNOWN_SINCE, np.int64))
    users, items = empty(SPEC, "user_profile"), empty(SPEC, "item_profile")
    if unit.kind == "users":
        read = raw.typed(USERS, _fields(lines, [c.name for c in USERS.columns]), unit.file)
        users = pa.table(
            [*(read[name] for name in read.column_names[:4]), known, known], schema=users.schema
        )
    else:
        read = raw.typed(MOVIES, _fields(lines, [c.name for c in MOVIES.columns]), unit.file)
        year = pc.extract_regex(read["title"], r"\((?P<year>[0-9]{4})\)\s*$")
        years = raw.whole_numbers(pc.struct_field(year.combine_chunks(), "year"))
        genres = pc.split_pattern(read["genres"], "|")
        items = pa.table(
            [read["item_id"], read["title"], genres, years, known, known], schema=items.schema
        )
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
    lines = read_raw(unit)
    read = raw.as_declared(SPEC, lines, unit.file)
    verdict = limits.check(SPEC.raw, read)
    alive = np.ones(lines.num_rows, bool)
    alive[verdict.dead] = False
    kept, good = np.flatnonzero(alive), verdict.kept
    rating = good["rating"].to_numpy()
    events = pa.table(
        {
            "user_id": good["user_id"],
            "item_id": good["movie_id"],
            "action": (rating < LIKED_FROM).astype(np.int8),
            "event_timestamp": good["timestamp"],
            "rating": rating.astype(np.float32),
            "source_position": unit.start + kept,
        }
    ).cast(arrow_schema(CONTRACT.table("events")))
    dead_letters = pa.table(
        {
            "source_file": [Path(unit.file).name] * len(verdict.dead),
            "source_row": unit.start + verdict.dead,
            "reason": [f"unreadable: {reason}" for reason in verdict.reasons],
            "raw": limits.raw_rows(lines, verdict.dead),
        },
        schema=arrow_schema(CONTRACT.table("dead_letters")),
    )
    return Parsed(
        events,
        empty(SPEC, "user_profile"),
        empty(SPEC, "item_profile"),
        dead_letters,
        lines.num_rows,
    )


def _ratings_file(folder: Path) -> Path:
    for name in ("ratings.dat", "ratings.parquet", "ratings_reconstructed.parquet"):
        if (folder / name).exists():
            return folder / name
    raise RawDataError(
        f"expected ratings.dat, or the same rows as ratings.parquet, in {folder}; found neither"
    )


def _lines(path: Path) -> list[str]:
    """Lines that are not blank, whether the file is in UTF-8 (with or without a BOM), Windows-1252
    or, as published, Latin-1.

    Lines end at line feeds alone: Python's own `splitlines` would also cut titles at U+0085.
    """
    data = path.read_bytes().removeprefix(b"\xef\xbb\xbf")
    for encoding in ("utf-8", "cp1252", "latin-1"):
        try:
            text = data.decode(encoding)
            break
        except UnicodeDecodeError:
            continue
    return [line for line in (line.rstrip("\r") for line in text.split("\n")) if line.strip()]


def _fields(lines: list[str], names: list[str]) -> pa.Table:
    """Fields of GroupLens's `::` separated lines as text; a line with fewer lacks the last ones."""
    rows = [line.split("::") for line in lines]
    columns = [
        [row[i] if i < len(row) and len(row) <= len(names) else None for row in rows]
        for i in range(len(names))
    ]
    return pa.table([pa.array(column, pa.string()) for column in columns], names=names)
