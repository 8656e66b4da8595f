"""Declared rows: every raw row is events or one dead letter, every line of a table counts, and a
declaration that its code does not keep is refused.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from feature_repo import datasets
from feature_repo.contract.arrow import NO_VALUE, from_micros, iso_micros
from feature_repo.contract.contract import contract
from feature_repo.contract.schema import (
    BAG,
    CATEGORY,
    NUMBER,
    Column,
    DatasetSpec,
    DType,
    Examples,
    Requests,
    Source,
    Task,
)
from feature_repo.datasets import Dataset
from feature_repo.errors import DeclarationError
from feature_repo.raw import parse
from feature_repo.raw.examples import UNDEFINED, requests_of

SHOP = DatasetSpec(
    name="shop",
    title="a shop",
    user_id=DType.STRING,
    item_id=DType.STRING,
    actions=("buy", "click", "see"),
    shown="see",
    tasks=(Task("label_click", "", "click"), Task("label_buy", "", "buy", given="label_click")),
    requests=Requests(
        Examples.IMPRESSIONS, "2025-02-01T00:00:00Z", "2025-03-01T00:00:00Z", by="request_id"
    ),
    events=Source(
        "log.csv",
        columns={"user_id": "u", "item_id": "i", "event_timestamp": "t", "request_id": "r"},
        flags={"click": "c", "buy": "b"},
    ),
    items=Source("items.csv"),
    event_features=(Column("price", DType.FLOAT32, "", kind=NUMBER, nullable=True),),
    item_features=(
        Column("name", DType.STRING, "", nullable=True),
        Column("tags", DType.STRING_LIST, "", kind=BAG, max_length=2, nullable=True),
    ),
    item_title="name",
)
LOG = """u,i,t,r,c,b,price
 a,x,2025-01-01T10:00:00+02:00,s1,1,true,2.5
 a,y,2025-01-01T08:00:01Z,s1,0,no,
b,007,2025-01-02T00:00:00Z,s1,yes,0,1
b,x,2025-01-02T00:00:00Z,s2,perhaps,0,1
,x,2025-01-02T00:00:00Z,s2,0,0,1
"""
ITEMS = "item_id,name,tags\nx,plain,a|b|c\n007,The Good, the Bad and, the Ugly\ny,,\n"


def written(folder: Path, log: str = LOG, items: str = ITEMS) -> str:
    (folder / "log.csv").write_text(log)
    (folder / "items.csv").write_text(items)
    return str(folder)


def parsed(spec: DatasetSpec, data: str) -> dict[str, parse.Parsed]:
    dataset = Dataset(spec)
    return {unit.kind: next(dataset.parse(unit)) for unit in dataset.raw_units(data)}


def test_a_wide_row_is_an_impression_and_an_event_for_each_flag(tmp_path: Path) -> None:
    found = parsed(SHOP, written(tmp_path))["events"]
    rows = [
        (e["user_id"], e["item_id"], SHOP.actions[e["action"]]) for e in found.events.to_pylist()
    ]
    assert rows == [
        (" a", "x", "see"),
        (" a", "x", "click"),
        (" a", "x", "buy"),
        (" a", "y", "see"),
        ("b", "007", "see"),
        ("b", "007", "click"),
    ]
    assert found.events["price"].to_pylist() == [2.5, 2.5, 2.5, None, 1.0, 1.0]
    reasons = dict(
        zip(
            found.dead_letters["source_row"].to_pylist(),
            found.dead_letters["reason"].to_pylist(),
            strict=True,
        )
    )
    assert reasons == {3: "c: unreadable", 4: "u: is missing"}
    numbers = {"rows_read": 5, "rows_used": 3, "rows_dead": 2, "events_made": 6}
    assert {name: found.counts[name] for name in numbers} == numbers
    times = found.events["event_timestamp"].to_pylist()
    assert times[0].hour == times[3].hour == 8


def test_a_line_of_the_items_that_is_no_row_is_a_dead_letter(tmp_path: Path) -> None:
    found = parsed(SHOP, written(tmp_path))["items"]
    assert found.items["item_id"].to_pylist() == ["x", "y"]
    assert found.items["name"].to_pylist() == ["plain", None]
    assert found.dead_letters["source_row"].to_pylist() == [1]
    assert "has 4 fields, expected 3" in found.dead_letters["reason"][0].as_py()
    assert (found.counts["dead_item_profile"], found.counts["read_item_profile"]) == (1, 1)
    assert found.counts.cut["tags"] == 1


def test_labels_are_actions_seen_in_a_request_of_one_user(tmp_path: Path) -> None:
    made = contract(SHOP)
    events = parsed(SHOP, written(tmp_path))["events"].events
    found = requests_of(
        made, events.sort_by([("user_id", "ascending"), ("event_timestamp", "ascending")])
    )
    assert len(found.first_event) == 2  # s1 of two users is two requests
    assert found.labels.tolist() == [[1, 1], [0, UNDEFINED], [1, 0]]


def test_one_unreadable_value_in_a_small_file_is_a_dead_letter(tmp_path: Path) -> None:
    log = "u,i,t,r,c,b,price\na,x,N/A,s1,0,0,1\n"
    found = parsed(SHOP, written(tmp_path, log))["events"]
    assert found.dead_letters["reason"].to_pylist() == ["t: is missing"]  # N/A is a mark of nothing


def test_what_derive_forgets_is_refused(tmp_path: Path) -> None:
    spec = replace(SHOP, items=Source("items.csv", derived=("tags",)))
    dataset = Dataset(spec, lambda kind, read, given: parse.Derived())
    (unit,) = [u for u in dataset.raw_units(written(tmp_path)) if u.kind == "items"]
    with pytest.raises(DeclarationError, match=r"items\.derived of 'shop' names \['tags'\]"):
        next(dataset.parse(unit))


def test_ratings_of_one_request_lie_in_one_period() -> None:
    made = datasets.load_contract("movielens_1m")
    rules = made.spec.requests
    days = [iso_micros(t) for t in (rules.validation_from, rules.test_from)]
    times = [days[0] - 2, days[0] - 1, days[0], days[1] - 1, days[1], days[1] + 1]
    events = pa.table(
        {
            "user_id": [1] * 6,
            "item_id": list(range(6)),
            "action": pa.array([0] * 6, pa.int8()),
            "event_timestamp": from_micros(np.array(times)),
        }
    )
    assert requests_of(made, events).request.tolist() == [0, 0, 1, 1, 2, 2]


def test_events_that_nobody_has_are_encoded_whatever_they_carry() -> None:
    """A new user's empty history, with every kind of column among the events."""
    from feature_repo.contract.schema import AGE, VECTOR
    from feature_repo.history.history import as_numbers
    from modeling.inputs.columns import ColumnGroup, Hashed, Quantiles, Vocabulary

    columns = (
        Column("device", DType.STRING, "", kind=CATEGORY),
        Column("city", DType.STRING, "", kind=CATEGORY, hashed=16),
        Column("tags", DType.STRING_LIST, "", kind=BAG, max_length=3),
        Column("dwell", DType.FLOAT32, "", kind=NUMBER, buckets=4),
        Column("price", DType.FLOAT32, "", kind=NUMBER, nullable=True),
        Column("made", DType.TIMESTAMP, "", kind=AGE, nullable=True),
        Column("cover", DType.FLOAT32_LIST, "", kind=VECTOR, max_length=2),
    )
    stored = {
        "device": pa.array(["phone", None]),
        "city": pa.array(["Paris", "Rome"]),
        "tags": pa.array([["a", "b", "c", "d"], None], pa.list_(pa.string())),
        "dwell": pa.array([1.0, 9.0], pa.float32()),
        "price": pa.array([1.0, None], pa.float32()),
        "made": from_micros(np.array([0, 86_400_000_000])),
        "cover": pa.array([[1.0, 2.0], None], pa.list_(pa.float32())),
    }
    numbers = {c.name: as_numbers(c, stored[c.name]) for c in columns}
    codes = {
        name: pa.array(numbers[name][numbers[name] != NO_VALUE]) for name in ("device", "tags")
    }
    group = ColumnGroup(
        columns,
        {
            "device": Vocabulary.of(codes["device"]),
            "city": Hashed(16),
            "tags": Vocabulary.of(codes["tags"]),
            "dwell": Quantiles((2.0, 5.0)),
        },
    )
    for rows in (2, 0):
        events = {name: values[:rows] for name, values in numbers.items()}
        times = np.full(rows, 2 * 86_400_000_000)
        assert group.event_categories(events).shape == (rows, 1 + 1 + 3 + 1)
        assert group.event_dense(events, times).shape == (rows, 2 + 2)
    dense = group.event_dense(numbers, np.full(2, 2 * 86_400_000_000))
    assert np.isnan(dense[1, [0, 2, 3]]).all()
    np.testing.assert_allclose(dense[:, 1], np.log1p([2, 1]), rtol=1e-6)
    slots = group.event_categories(numbers)
    assert (slots[0] > 0).all()
    assert (slots[1, 2:5] == 0).all()
    assert slots[:, 5].tolist() == [1, 3]
