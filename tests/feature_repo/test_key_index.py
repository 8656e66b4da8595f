"""Look-ups: the same places as by hashing everything anew, whatever the keys; and sums that no
order changes.
"""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from hypothesis import given
from hypothesis import strategies as st

from feature_repo.contract.key_index import KeyIndex
from feature_repo.history.sums import Exact

NUMBERS = st.integers(-(2**63), 2**63 - 1)


def assert_same(keys: pa.Array, wanted: pa.Array) -> None:
    expected = pc.fill_null(pc.index_in(wanted, keys), -1).to_pylist()
    if wanted.null_count:
        expected = [
            -1 if value is None else place
            for value, place in zip(wanted.to_pylist(), expected, strict=True)
        ]
    assert KeyIndex(keys).places(wanted).tolist() == expected


@given(st.lists(NUMBERS, unique=True), st.lists(st.one_of(st.none(), NUMBERS)))
def test_whole_numbers_are_found_where_they_stand(
    keys: list[int], others: list[int | None]
) -> None:
    assert_same(pa.array(keys, pa.int64()), pa.array([*keys[::2], *others], pa.int64()))


@given(st.lists(st.text(), unique=True), st.lists(st.one_of(st.none(), st.text())))
def test_texts_are_found_where_they_stand(keys: list[str], others: list[str | None]) -> None:
    assert_same(pa.array(keys, pa.string()), pa.array([*keys[::2], *others], pa.string()))


def test_texts_of_one_hash_are_told_apart(monkeypatch: object) -> None:
    from feature_repo.contract import key_index

    keys, wanted = pa.array(["a", "b", "c"]), pa.array(["c", "a", "z", "b"])
    monkeypatch.setattr(key_index, "_hashes", lambda column: np.zeros(len(column), np.uint64))  # type: ignore[attr-defined]
    assert KeyIndex(keys).places(wanted).tolist() == [2, 0, -1, 1]


@given(st.lists(st.floats(-1e12, 1e12), min_size=1), st.randoms())
def test_sums_of_numbers_of_any_size_are_exact_in_any_order(
    values: list[float], random: object
) -> None:
    exact = Exact.of(np.array(values))
    total = Exact(np.cumsum(exact.high)[-1:], np.cumsum(exact.low)[-1:]).floats()[0]
    true = sum(Fraction(round(Fraction(np.float64(v) * 1e6))) for v in values)
    assert abs(Fraction(float(total)) * 1_000_000 - true) <= abs(true) / 2**51 + 1
    shuffled = list(values)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    again = Exact.of(np.array(shuffled))
    assert Exact(np.cumsum(again.high)[-1:], np.cumsum(again.low)[-1:]).floats()[0] == total
