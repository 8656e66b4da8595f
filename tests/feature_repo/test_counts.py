"""Counts of a history: exact while few items are in it, a sketch beyond, the same whatever way the events came in."""

from __future__ import annotations

import zlib
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from feature_repo.contract.arrow import NO_VALUE
from feature_repo.history.counts import EXACT, MAGIC, UserCounts, from_bytes
from feature_repo.history.envelope import Identity, Sealed, seal
from feature_repo.history.sketch import MICROS_PER_DAY, Sketch, SketchError, beside
from tests.feature_repo.test_sketch import LAYOUT, START, assert_alike, drawn, truth

EXACTLY = replace(LAYOUT, most_rows=10_000)


def counts_of(codes: list[Any], times: np.ndarray, layout: Any = EXACTLY) -> UserCounts:
    counts = UserCounts(layout)
    counts.add(codes, times)
    return counts


def wanted() -> list[np.ndarray]:
    """All keys there are, some that never were, some rows without a key."""
    items = np.arange(70)
    brands = np.where(items % 11 == 0, NO_VALUE, items % 12)
    genres = np.c_[items % 6, np.where(items % 2, NO_VALUE, items % 5), np.full(70, NO_VALUE)]
    genres[3] = NO_VALUE
    return [items, brands, genres]


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(0, 300))
def test_exact_counts_are_the_truth(seed: int, events: int) -> None:
    codes, times = drawn(seed, events)
    now = START + 400 * MICROS_PER_DAY
    keys = wanted()
    read = counts_of(codes, times).read(keys, now)
    for row in range(0, 70, 7):
        for column in (0, 1):
            key = int(keys[column][row])
            expected = truth(codes[column], times, key, now, EXACTLY)
            if key == NO_VALUE:
                assert np.isnan(read.counts_NCK[row, column]).all()
                assert np.isnan(read.days_NC[row, column])
                continue
            np.testing.assert_allclose(read.counts_NCK[row, column], expected, rtol=1e-9)
            own = times[codes[column] == key]
            days = (now - own[-1]) / MICROS_PER_DAY if len(own) else np.nan
            np.testing.assert_allclose(read.days_NC[row, column], days)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(0, 200), st.sampled_from([0, 10_000]))
def test_a_pair_is_counted_as_one_value(seed: int, events: int, most_rows: int) -> None:
    """Exactly and in a sketch of enough cells: as if the two values were written in one column."""
    layout = replace(EXACTLY, most_rows=most_rows, width=4096, pairs=((0, 1),))
    codes, times = drawn(seed, events)
    now = START + 400 * MICROS_PER_DAY
    keys = wanted()
    read = counts_of(codes, times, layout).read(keys, now)
    assert layout.names == ("item_id", "brand", "genres", "item_id_brand")
    written, asked = (
        np.where(c[1] == NO_VALUE, NO_VALUE, 1000 * c[0] + c[1]) for c in (codes, keys)
    )
    plain = replace(layout, pairs=(), slots=(1, 1, 3, 1), columns=layout.names)
    other = counts_of([*codes, written], times, plain).read([*keys, asked], now)
    np.testing.assert_allclose(read.counts_NCK, other.counts_NCK, rtol=1e-9)
    np.testing.assert_array_equal(read.days_NC, other.days_NC)
    np.testing.assert_allclose(read.totals_NK[:, 0], events)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 200), st.sampled_from([0, 10_000]))
def test_totals_are_of_all_events(seed: int, events: int, most_rows: int) -> None:
    """Whole, faded, as stored, and of two parts."""
    layout = replace(EXACTLY, most_rows=most_rows)
    codes, times = drawn(seed, events)
    now = START + 400 * MICROS_PER_DAY
    counts = counts_of(codes, times, layout)
    faded = np.exp2(-(now - times[:, None]) / MICROS_PER_DAY / np.array(layout.half_lives_days))
    expected = np.r_[events, faded.sum(axis=0)]
    identity = Identity(layout.fingerprint, int(times[-1]), 2, 3, 4)
    stored, _ = from_bytes(layout, counts.to_bytes(7, identity), 7)
    half = events // 2
    merged = counts_of([c[:half] for c in codes], times[:half], layout)
    merged.merge(counts_of([c[half:] for c in codes], times[half:], layout))
    for one in (counts, stored, merged):
        np.testing.assert_allclose(one.read(wanted(), now).totals_NK[0], expected, rtol=1e-5)


def test_a_bag_reads_the_mean_of_its_values_and_the_latest_time() -> None:
    codes = [
        np.array([1, 2]),
        np.array([NO_VALUE, 5]),
        np.array([[7, 8, NO_VALUE], [7, NO_VALUE, 9]]),
    ]
    counts = counts_of(codes, np.array([START, START + MICROS_PER_DAY]))
    asked = [np.array([1]), np.array([NO_VALUE]), np.array([[7, 8, 10]])]
    read = counts.read(asked, START + 3 * MICROS_PER_DAY)
    assert read.counts_NCK[0, 2, 0] == pytest.approx((2 + 1 + 0) / 3)
    assert read.days_NC[0].tolist() == [3.0, pytest.approx(np.nan, nan_ok=True), 2.0]


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 2**32 - 1),
    st.integers(1, 200),
    st.integers(1, 12),
    st.sampled_from([0, 5, 20, 60, 10_000]),
)
def test_the_order_and_the_parts_of_events_make_no_difference(
    seed: int, events: int, parts: int, most_rows: int
) -> None:
    """Whether counts stay exact, become a sketch on the way, or are one from the start."""
    layout = replace(LAYOUT, most_rows=most_rows)
    codes, times = drawn(seed, events, years=30.0)
    whole = counts_of(codes, times, layout)
    rng = np.random.default_rng(seed)
    one_by_one = UserCounts(layout)
    merged = UserCounts(layout)
    shuffled = rng.permutation(events)
    for chosen in np.array_split(shuffled, parts):
        one_by_one.add([c[chosen] for c in codes], times[chosen])
        merged.merge(counts_of([c[chosen] for c in codes], times[chosen], layout))
    different = len(np.unique(beside(codes), axis=0))
    now = int(times.max())
    expected = whole.read(codes, now)
    for other in (whole, one_by_one, merged):
        assert other.is_exact == (different <= most_rows)
        assert_alike(other.read(codes, now), expected)
        np.testing.assert_array_equal(
            other.read(codes, now).counts_NCK[..., 0], expected.counts_NCK[..., 0]
        )


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 300))
def test_beyond_the_rows_it_is_the_sketch_of_the_same_events(seed: int, events: int) -> None:
    codes, times = drawn(seed, events)
    layout = replace(LAYOUT, most_rows=3)
    counts = UserCounts(layout)
    for chosen in np.array_split(np.arange(events), 5):
        counts.add([c[chosen] for c in codes], times[chosen])
    sketch = Sketch(layout)
    sketch.add(layout.positions(codes), times)
    if counts.is_exact:
        return
    keys = wanted()
    now = int(times[-1])
    found = counts.read(keys, now)
    np.testing.assert_allclose(
        found.counts_NCK, sketch.read(layout.positions(keys), now), rtol=1e-9, atol=1e-12
    )


@pytest.mark.parametrize("most_rows", [0, 10_000])
@pytest.mark.parametrize("events", [0, 1, 3, 4000])
def test_what_is_stored_comes_back(events: int, most_rows: int) -> None:
    layout = replace(LAYOUT, most_rows=most_rows)
    codes, times = drawn(1, events, items=3000)
    counts = counts_of(codes, times, layout)
    now = int(times[-1]) if events else START
    identity = Identity(layout.fingerprint, now, now + 1, events, 17)
    data = counts.to_bytes("u1", identity)
    found, known = from_bytes(layout, data, "u1")
    assert known == identity
    assert found.is_exact == counts.is_exact
    later = now + 50 * MICROS_PER_DAY
    assert_alike(found.read(codes, later), counts.read(codes, later))
    # What comes after is added to the stored counts as to those that were never stored.
    more = drawn(2, 5)[0]
    for one in (counts, found):
        one.add(more, np.full(5, later))
    assert_alike(found.read(codes, later), counts.read(codes, later))


def test_a_short_history_costs_little() -> None:
    """Forty-two events, the median of Online Retail, and 623, that of a household of The Complete Journey."""
    for events, items, most in ((42, 3_000, 1_000), (623, 60_000, 10_000)):
        codes, times = drawn(4, events, items=items)
        data = counts_of(codes, times).to_bytes(
            1, Identity(EXACTLY.fingerprint, int(times[-1]), 0, 0)
        )
        assert len(data) < most


def test_damage_and_other_owners_are_noticed() -> None:
    codes, times = drawn(3, 20)
    identity = Identity(EXACTLY.fingerprint, int(times[-1]), 0, 20)
    data = counts_of(codes, times).to_bytes(7, identity)
    with pytest.raises(SketchError, match="another user"):
        from_bytes(EXACTLY, data, 8)
    with pytest.raises(SketchError, match="rebuild and materialise"):
        from_bytes(replace(EXACTLY, width=500), data, 7)
    for at in range(0, 8 * len(data), 37):
        flipped = bytearray(data)
        flipped[at // 8] ^= 1 << at % 8
        with pytest.raises(SketchError):
            from_bytes(EXACTLY, bytes(flipped), 7)
    for length in (0, 3, 20, len(data) - 1):
        with pytest.raises(SketchError):
            from_bytes(EXACTLY, data[:length], 7)


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"not compressed",
        zlib.compress(b""),
        zlib.compress((7).to_bytes(4, "little")),
        zlib.compress((10_001).to_bytes(4, "little") + bytes(100)),
        zlib.compress(bytes(1 << 24)),
        zlib.compress(bytes(24) + b"behind"),
    ],
    ids=["nothing", "no zlib", "empty", "short", "too many rows", "a bomb", "goes on"],
)
def test_bytes_that_no_version_wrote_are_refused(payload: bytes) -> None:
    """Even where the checksum vouches for them."""
    sealed = Sealed(EXACT, 0, (1, 5), Identity(EXACTLY.fingerprint, START, 0, 1), payload)
    with pytest.raises(SketchError, match="no version wrote"):
        from_bytes(EXACTLY, seal(MAGIC, sealed, 7), 7)


def test_an_item_that_nobody_knows_was_never_there() -> None:
    codes, times = drawn(3, 200)
    read = counts_of(codes, times).read(codes, int(times[-1]))
    known = np.arange(200) % 2 == 0
    found = read.of_known(known)
    assert (found.counts_NCK[~known, 0] == 0).all()
    assert np.isnan(found.days_NC[~known, 0]).all()
    np.testing.assert_array_equal(found.counts_NCK[known], read.counts_NCK[known])
    np.testing.assert_array_equal(found.counts_NCK[:, 1:], read.counts_NCK[:, 1:])
