"""How far the values of a column moved."""

import json

import hypothesis.strategies as st
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given

from feature_repo.contract.distributions import Distribution, distribution_of
from feature_repo.contract.schema import BAG, CATEGORY, NUMBER, VECTOR, Column, DType

PRICE = Column("price", DType.FLOAT32, "", kind=NUMBER)
BRAND = Column("brand", DType.STRING, "", kind=CATEGORY)
WORDS = Column("words", DType.STRING_LIST, "", kind=BAG)
COVER = Column("cover", DType.FLOAT32_LIST, "", kind=VECTOR, max_length=2)
NUMBERS = st.lists(st.none() | st.floats(0, 1e6, width=32), min_size=1, max_size=50)
TEXTS = st.lists(st.none() | st.text(max_size=3), min_size=1, max_size=50)


def found(column: Column, values: list) -> Distribution:
    kinds = {PRICE: pa.float32(), BRAND: pa.string(), WORDS: pa.list_(pa.string())}
    made = distribution_of(column, pa.array(values, kinds.get(column, pa.list_(pa.float32()))))
    assert made is not None
    return made


@given(NUMBERS, NUMBERS)
def test_distances_of_numbers(one: list, other: list) -> None:
    a, b = found(PRICE, one), found(PRICE, other)
    assert a.distance(a) == 0
    assert a.distance(b) == pytest.approx(b.distance(a))
    assert 0 <= a.distance(b) <= 1
    assert Distribution.from_json(json.loads(json.dumps(a.to_json()))) == a


@given(TEXTS, TEXTS)
def test_distances_of_categories(one: list, other: list) -> None:
    a, b = found(BRAND, one), found(BRAND, other)
    assert a.distance(a) == 0
    assert a.distance(b) == pytest.approx(b.distance(a))
    assert 0 <= a.distance(b) <= 1 + 1e-4
    assert Distribution.from_json(json.loads(json.dumps(a.to_json()))) == a


def test_numbers_against_the_exact_distance() -> None:
    """The largest difference of the cumulative distributions, to the step of a quantile."""
    rng = np.random.default_rng(0)
    a, b = rng.normal(0, 1, 5000), rng.normal(0.5, 1, 5000)
    points = np.sort(np.r_[a, b])
    exact = np.abs(
        np.searchsorted(np.sort(a), points, "right") / 5000
        - np.searchsorted(np.sort(b), points, "right") / 5000
    ).max()
    assert found(PRICE, a.tolist()).distance(found(PRICE, b.tolist())) == pytest.approx(
        exact, abs=0.02
    )


@pytest.mark.parametrize(
    ("column", "before", "after", "distance"),
    [
        # Pounds in pence
        (PRICE, [1.0, 2.5, 9.0], [100.0, 250.0, 900.0], 1.0),
        # A quarter of the values has no value any more
        (PRICE, [1.0, 1.0, 1.0, 1.0], [1.0, 1.0, 1.0, None], 0.25),
        (BRAND, ["a", "a", "b", "b"], ["a", "a", "a", "b"], 0.25),
        # Spelled otherwise
        (BRAND, ["Coke", "Pepsi"], ["coke", "pepsi"], 1.0),
        (WORDS, [["red", "cup"], ["cup"]], [["red", "cup"], ["cup"]], 0.0),
        (WORDS, [["red"], ["red"]], [["red"], []], 0.5),
        # Another model's vectors
        (COVER, [[0.0, 1.0], [0.1, 1.1]], [[1.0, 0.0], [1.1, 0.1]], 1.0),
    ],
)
def test_what_moves_a_column(column: Column, before: list, after: list, distance: float) -> None:
    assert found(column, before).distance(found(column, after)) == pytest.approx(distance, abs=0.02)


def test_another_kind_of_values_has_nothing_in_common() -> None:
    assert found(PRICE, [1.0]).distance(found(BRAND, ["1.0"])) == 1.0


def test_more_rows_of_the_same_do_not_move_a_column() -> None:
    """A log that grows is not a log that changes."""
    rng = np.random.default_rng(0)
    values = rng.lognormal(1, 1, 20_000)
    names = [f"brand {n}" for n in rng.zipf(1.5, 20_000) % 5_000]
    assert found(PRICE, values[:8000].tolist()).distance(found(PRICE, values.tolist())) < 0.03
    assert found(BRAND, names[:8000]).distance(found(BRAND, names)) < 0.05


def test_no_rows_have_no_distribution() -> None:
    assert distribution_of(PRICE, pa.array([], pa.float32())) is None
    times = Column("at", DType.TIMESTAMP, "")
    assert distribution_of(times, pa.array([1], pa.timestamp("us", "UTC"))) is None
