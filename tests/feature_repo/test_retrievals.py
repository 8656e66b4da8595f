"""Random retrievals through the offline store against an oracle that goes row by row: views of none, one or two keys,
ttl, ties, created times that are late or null, mapped and odd names, aliases, renamed keys, time kinds, folders.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from feature_repo.benchmarks.retrieval import retrieval
from feature_repo.store.source_files import SourceError

START_NS = 1_700_000_000_000_000_000
HOUR_NS = 3_600_000_000_000
# A few instants, so that many are equal; some lie within one microsecond.
INSTANTS = [START_NS + n * HOUR_NS for n in range(6)] + [
    START_NS + HOUR_NS + n for n in (1, 400, 999, 1000)
]
ODD_NAMES = (
    "__time",
    "__order",
    "v.k0",
    "t",
    "o",
    "Price",
    "price",
    "e0",
    "select",
    'qu"ote',
    "日付",
)


@dataclass
class View:
    """A feature view, its rows in Python, and how they lie in files."""

    name: str
    keys: tuple[str, ...]
    features: dict[str, str]
    ttl_s: int
    time: str
    created: str
    mapping: dict[str, str]
    kind: str
    rows: list[dict[str, Any]] = field(default_factory=list)
    alias: str = ""
    renamed: dict[str, str] = field(default_factory=dict)

    @property
    def shown(self) -> str:
        return self.alias or self.name

    @property
    def is_cut(self) -> bool:
        """True if DuckDB would cut some of its times: it reads nanoseconds with a zone as microseconds."""
        names = ("at", "created") if self.created else ("at",)
        between = any(
            row[name] is not None and row[name] % 1000 for row in self.rows for name in names
        )
        return self.kind == "ns" and between


TIME_KINDS = {
    "us": pa.timestamp("us", "UTC"),
    "naive": pa.timestamp("us"),
    "ns": pa.timestamp("ns", "UTC"),
    "ns naive": pa.timestamp("ns"),
    "elsewhere": pa.timestamp("us", "Asia/Tokyo"),
}


def stamps(values: list[int | None], kind: str) -> pa.Array:
    """Instants in nanoseconds as a column; whole microseconds where the kind holds no more."""
    made = TIME_KINDS[kind]
    if made.unit == "us":
        values = [None if value is None else value // 1000 for value in values]
    return pa.array(values, pa.int64()).cast(made)


def held(value: int, kind: str) -> int:
    """What a column of a kind holds of an instant."""
    return value if TIME_KINDS[kind].unit == "ns" else value // 1000 * 1000


def random_view(
    rng: np.random.Generator, number: int, folder: Path, texts: set[str]
) -> tuple[View, str]:
    """A view and the path of its files."""
    keys = tuple(
        sorted(rng.choice(["user_id", "shop_id"], rng.integers(0, 3), replace=False).tolist())
    )
    names = rng.choice(ODD_NAMES, rng.integers(1, 4), replace=False).tolist()
    features = {name: str(rng.choice(["int64", "string"])) for name in names}
    kind = str(rng.choice(list(TIME_KINDS)))
    has_created = rng.random() < 0.7
    view = View(
        name=f"view{number}",
        keys=keys,
        features=features,
        ttl_s=int(rng.choice([0, 0, 3600, 7200, 90_000])),
        time="when" if rng.random() < 0.4 else "event_timestamp",
        created="made" if has_created else "",
        mapping={},
        kind=kind,
    )
    if view.time == "when":
        view.mapping["when_in_file"] = "when"
    if has_created and rng.random() < 0.3:
        view.mapping["made_in_file"] = "made"
    if rng.random() < 0.3:
        view.mapping[f"{names[0]} in file"] = names[0]
    for place in range(int(rng.integers(1, 25))):
        at = held(int(rng.choice(INSTANTS)), kind)
        late = int(rng.choice([0, 0, 2 * HOUR_NS]))
        created = None if rng.random() < 0.15 else held(int(rng.choice(INSTANTS)) + late, kind)
        values = {
            name: None if rng.random() < 0.2 else place + 2**60 if dtype == "int64" else f"t{place}"
            for name, dtype in features.items()
        }
        row = {
            "at": at,
            "created": created,
            **{f"f:{name}": value for name, value in values.items()},
        }
        view.rows.append(row | {f"k:{key}": int(rng.integers(0, 4)) for key in keys})
    # Of rows that are equal in keys and both times nobody says which is the newest.
    seen: set[tuple[Any, ...]] = set()
    kept = []
    for row in view.rows:
        same = (
            *(row[f"k:{key}"] for key in keys),
            row["at"],
            row["created"] if has_created else None,
        )
        if same not in seen:
            kept.append(row)
        seen.add(same)
    view.rows = kept
    path = write(rng, view, folder, kind, texts)
    if rng.random() < 0.3:
        view.alias = f"as{number}"
    if keys and rng.random() < 0.3:
        view.renamed = {keys[0]: f"other_{keys[0]}"}
    return view, path


def write(rng: np.random.Generator, view: View, folder: Path, kind: str, texts: set[str]) -> str:
    in_file = {new: old for old, new in view.mapping.items()}
    columns: dict[str, Any] = {}
    for key in view.keys:
        ids = [row[f"k:{key}"] for row in view.rows]
        columns[key] = pa.array([str(i) for i in ids] if key in texts else ids)
    for name, dtype in view.features.items():
        kinds = {"int64": pa.int64(), "string": pa.string()}
        columns[in_file.get(name, name)] = pa.array(
            [row[f"f:{name}"] for row in view.rows], kinds[dtype]
        )
    columns[in_file.get(view.time, view.time)] = stamps([row["at"] for row in view.rows], kind)
    if view.created:
        columns[in_file.get(view.created, view.created)] = stamps(
            [row["created"] for row in view.rows], kind
        )
    table = pa.table(columns)
    root = folder / view.name
    layout = str(rng.choice(["file", "folder", "hive", "pattern", "uri"]))
    cut = int(rng.integers(0, len(table) + 1))
    parts = [table.slice(0, cut), table.slice(cut)]
    if layout in ("file", "uri"):
        root.mkdir(parents=True)
        pq.write_table(table, root / "rows.parquet")
        return f"{'file://' if layout == 'uri' else ''}{root}/rows.parquet"
    for number, part in enumerate(parts):
        where = root / (f"day=2026-01-0{number + 1}" if layout == "hive" else ".")
        where.mkdir(parents=True, exist_ok=True)
        pq.write_table(part, where / f"part-{number}.parquet")
    (root / "_SUCCESS").write_text("")
    return f"{root}/part-*.parquet" if layout == "pattern" else str(root)


def as_feast(view: View, path: str, texts: set[str]) -> Any:
    from feast import Entity, FeatureView, Field, FileSource, ValueType
    from feast.data_format import ParquetFormat
    from feast.types import Int64, String

    source = FileSource(
        name=f"{view.name}_source",
        path=path,
        file_format=ParquetFormat(),
        timestamp_field=view.time,
        created_timestamp_column=view.created,
        field_mapping=view.mapping,
    )
    kinds = {"int64": Int64, "string": String}
    entities = [
        Entity(
            name=key,
            join_keys=[key],
            value_type=ValueType.STRING if key in texts else ValueType.INT64,
        )
        for key in view.keys
    ]
    fields = [Field(name=name, dtype=kinds[dtype]) for name, dtype in view.features.items()]
    keys = [Field(name=key, dtype=String if key in texts else Int64) for key in view.keys]
    made = FeatureView(
        name=view.name,
        entities=entities,
        ttl=timedelta(seconds=view.ttl_s),
        schema=[*keys, *fields],
        source=source,
    )
    made.entity_columns = keys
    made.features = fields
    if view.alias:
        made = made.with_name(view.alias)
    return made.with_join_key_map(view.renamed) if view.renamed else made


def newest(
    view: View, asked: dict[str, Any], at: int, *, by_created: bool
) -> dict[str, Any] | None:
    """The oracle: the row that an entity row finds."""
    found = None
    for row in view.rows:
        if any(asked.get(view.renamed.get(key, key)) != row[f"k:{key}"] for key in view.keys):
            continue
        created = row["created"]
        if row["at"] > at or (by_created and view.created and (created is None or created > at)):
            continue
        rank = (row["at"], -1 if created is None else created) if view.created else (row["at"], 0)
        if found is None or rank > found[0]:
            found = (rank, row)
    if found is None or (view.ttl_s and found[1]["at"] < at - view.ttl_s * 1_000_000_000):
        return None
    return found[1]


def retrieve(folder: Path, seed: int) -> int:
    """Compare one random retrieval with the oracle; returns the number of values that are there."""
    rng = np.random.default_rng(seed)
    texts = {name for name in ("user_id", "shop_id") if rng.random() < 0.4}
    made = [random_view(rng, n, folder, texts) for n in range(int(rng.integers(1, 4)))]
    views = [view for view, _ in made]
    full = bool(rng.random() < 0.5)
    refs: list[str] = []
    shown: set[str] = set()
    for view in views:
        # Feast itself refuses two features of one name.
        own = [name for name in view.features if full or name not in shown]
        own = own[: max(1, int(rng.integers(0, len(own) + 1)))] if own else []
        shown |= set(own)
        refs += [f"{view.shown}:{name}" for name in own]
    by_created = bool(rng.random() < 0.5)
    # Entity rows: some keys that no view has, some nulls, times of any kind.
    number = int(rng.integers(0, 30))
    names = sorted({view.renamed.get(key, key) for view in views for key in view.keys})
    asked = [
        {name: None if rng.random() < 0.1 else int(rng.integers(0, 5)) for name in names}
        for _ in range(number)
    ]
    kind = str(rng.choice(list(TIME_KINDS)))
    times = [
        held(int(rng.choice(INSTANTS)) + int(rng.choice([0, 1, 3 * HOUR_NS])), kind)
        for _ in range(number)
    ]
    columns: dict[str, Any] = {"place": pa.array(np.arange(number))}
    for name in names:
        ids = [row[name] for row in asked]
        as_text = name.removeprefix("other_") in texts
        columns[name] = pa.array(
            [None if i is None else str(i) for i in ids] if as_text else ids,
            pa.string() if as_text else pa.int64(),
        )
    columns["event_timestamp"] = stamps(list(times), kind)
    frame: Any = pa.table(columns)
    frame = frame.to_pandas() if rng.random() < 0.5 else frame

    def ask() -> Any:
        return retrieval(
            "asof",
            [as_feast(view, path, texts) for view, path in made],
            refs,
            frame,
            full_feature_names=full,
            filter_by_created_timestamp=by_created,
        ).to_arrow()

    if any(view.is_cut for view in views):
        with pytest.raises(SourceError, match="between two microseconds"):
            ask()
        return 0
    got = ask()
    assert got["place"].to_pylist() == list(range(number))
    there = 0
    for view in views:
        for ref in refs:
            prefix, name = ref.split(":", 1)
            if prefix != view.shown:
                continue
            rows = [
                newest(view, row, at, by_created=by_created)
                for row, at in zip(asked, times, strict=True)
            ]
            expected = [None if row is None else row[f"f:{name}"] for row in rows]
            found = got[f"{prefix}__{name}" if full else name].to_pylist()
            assert found == expected, (seed, ref)
            there += sum(value is not None for value in expected)
    return there


@pytest.mark.parametrize("seed", range(0, 150, 10))
def test_retrievals_are_what_the_oracle_finds(tmp_path: Path, seed: int) -> None:
    assert sum(retrieve(tmp_path / str(n), seed + n) for n in range(10)) > 0


@pytest.mark.whole
def test_2000_retrievals_are_what_the_oracle_finds(tmp_path: Path, promises: Any) -> None:
    found = [retrieve(tmp_path / str(seed), 1000 + seed) for seed in range(2000)]
    promises.note(
        "2,000 random retrievals from the offline store",
        "equal to an oracle that goes row by row",
        f"{sum(found):,} values, none other; {sum(n > 0 for n in found):,} retrievals found some",
        held=sum(found) > 10_000,
        seed=1000,
    )
    # Each retrieval asserts for itself; together they must have found something to compare.
    assert sum(found) > 10_000
