"""Values online are the values offline: every dtype, nulls among them, beyond what a float holds,
tombstones included.
"""

from __future__ import annotations

import uuid
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from feature_repo.contract.arrow import EPOCH
from feature_repo.store.online_rows import write_rows
from feature_repo.store.online_users import plain_value

NUMBER = 10_000


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from feast import Entity, FeatureStore, FeatureView, Field, FileSource, ValueType
    from feast.data_format import ParquetFormat
    from feast.repo_config import RepoConfig
    from feast.types import Array, Bytes, Float32, Int32, Int64, String

    folder = tmp_path_factory.mktemp("online")
    made = FeatureStore(
        config=RepoConfig(
            project="p",
            provider="local",
            registry=str(folder / "r.db"),
            online_store={"type": "sqlite", "path": str(folder / "o.db")},
            entity_key_serialization_version=3,
        )
    )
    thing = Entity(name="thing", join_keys=["thing_id"], value_type=ValueType.INT64)
    source = FileSource(
        path=str(Path(folder, "none.parquet")),
        file_format=ParquetFormat(),
        timestamp_field="event_timestamp",
        created_timestamp_column="created_timestamp",
    )
    kinds = {"a": Int64, "b": Float32, "c": String, "d": Array(String), "e": Bytes, "f": Int32}
    fields = [Field(name=name, dtype=kind) for name, kind in kinds.items()]
    made.apply(
        [
            thing,
            FeatureView(name="v", entities=[thing], ttl=timedelta(0), schema=fields, source=source),
        ]
    )
    return made


def random_rows(seed: int) -> pa.Table:
    rng = np.random.default_rng(seed)

    def some(values: list[Any]) -> list[Any]:
        return [
            None if gone else value
            for value, gone in zip(values, rng.random(len(values)) < 0.2, strict=True)
        ]

    stamp = pa.array([datetime(2026, 1, 1, tzinfo=UTC)] * NUMBER, pa.timestamp("us", "UTC"))
    whole = rng.integers(-(2**63), 2**63 - 1, NUMBER, dtype=np.int64).tolist()
    words = [f"wörd {n}\u00a0" for n in range(NUMBER)]
    return pa.table(
        {
            "thing_id": pa.array(rng.permutation(NUMBER) + 2**60, pa.int64()),
            "a": pa.array(some(whole), pa.int64()),
            "b": pa.array(some(rng.normal(size=NUMBER).astype(np.float32).tolist()), pa.float32()),
            "c": pa.array(some(words), pa.string()),
            "d": pa.array(
                some([[w, "x"] if n % 3 else [] for n, w in enumerate(words)]),
                pa.list_(pa.string()),
            ),
            "e": pa.array(some([rng.bytes(5) for _ in range(NUMBER)]), pa.binary()),
            "f": pa.array(some(rng.integers(-(2**31), 2**31 - 1, NUMBER).tolist()), pa.int32()),
            "event_timestamp": stamp,
            "created_timestamp": stamp,
        }
    )


def read(store: Any, ids: list[int]) -> dict[str, list[Any]]:
    found = {name: [] for name in "abcdef"}
    for start in range(0, len(ids), 500):
        rows = [{"thing_id": i} for i in ids[start : start + 500]]
        part = store.get_online_features([f"v:{name}" for name in found], rows).to_dict()
        for name, column in found.items():
            column += part[name]
    return found


def test_ten_thousand_random_values_of_every_type_come_back_as_they_are(store: Any) -> None:
    rows = random_rows(0)
    assert write_rows(store, "v", rows) == NUMBER
    found = read(store, rows["thing_id"].to_pylist())
    for name in "abcef":
        differs = [
            (x, y) for x, y in zip(found[name], rows[name].to_pylist(), strict=True) if x != y
        ]
        assert not differs, (name, differs[:3])
    lists = rows["d"].to_pylist()
    assert [value or [] for value in found["d"]] == [
        value or [] for value in lists
    ]  # Feast stores no empty lists


def test_a_row_of_nulls_takes_the_values_of_its_key_away(store: Any) -> None:
    rows = random_rows(1).slice(0, 3)
    write_rows(store, "v", rows)
    nothing = pa.table(
        {
            f.name: rows[f.name] if f.name.endswith(("_id", "_timestamp")) else pa.nulls(3, f.type)
            for f in rows.schema
        }
    )
    write_rows(store, "v", nothing)
    assert read(store, rows["thing_id"].to_pylist()) == {name: [None] * 3 for name in "abcdef"}


def test_every_type_of_feasts_is_read_as_feast_reads_it() -> None:
    """Scalars, lists, sets, maps, texts of JSON, ids, decimals; missing times among them."""
    from feast.protos.feast.types.Value_pb2 import Value
    from feast.type_map import feast_value_type_to_python_type, python_values_to_proto_values
    from feast.value_type import ValueType

    when = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
    samples: dict[str, Any] = {
        "BYTES": b"\x00\xff",
        "STRING": "ü",
        "INT32": -3,
        "INT64": 2**60,
        "DOUBLE": 0.1,
        "FLOAT": 0.5,
        "BOOL": False,
        "UNIX_TIMESTAMP": when,
        "MAP": {"a": 1, "b": "c"},
        "JSON": '{"a": [1]}',
        "STRUCT": {"a": 1.5},
        "UUID": uuid.UUID(int=7),
        "TIME_UUID": uuid.UUID(int=8),
        "DECIMAL": Decimal("1.25"),
    }
    seen = 0
    for kind in ValueType:
        base, _, _shape = (
            kind.name.partition("_LIST") if "_LIST" in kind.name else kind.name.partition("_SET")
        )
        if base not in samples:
            continue
        values: list[Any] = [samples[base]]
        if kind.name.endswith("_LIST"):
            values = [[samples[base], samples[base]]]
        if kind.name.endswith("_SET"):
            values = [{samples[base]}]
        (proto,) = python_values_to_proto_values(values, kind)
        assert plain_value(proto) == feast_value_type_to_python_type(proto), kind
        seen += 1
    assert seen >= 30
    assert plain_value(Value()) is None
    lost = Value(unix_timestamp_val=-(2**63))
    assert plain_value(lost) is None
    times = Value()
    times.unix_timestamp_list_val.val.extend([0, -(2**63)])
    assert plain_value(times) == [EPOCH, None]
