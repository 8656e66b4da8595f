"""Envelopes of summary tokens: what goes in comes out, and nothing else does."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from feature_repo.history import envelope
from feature_repo.history.envelope import Envelope, EnvelopeError, Kind, LayoutError

FINGERPRINT = "0123456789abcdef" * 2
ENVELOPE = Envelope(
    FINGERPRINT,
    1_300_000_000_000_000,
    1_300_000_000_000_001,
    1_000_000,
    np.ones((3, 4), np.float32),
)
shapes = st.tuples(st.integers(1, 9), st.integers(1, 70))


@settings(max_examples=60, deadline=None)
@given(
    shapes,
    st.integers(0, 2**32 - 1),
    st.floats(1e-3, 1e3),
    st.sampled_from(envelope.KINDS),
    st.one_of(st.text(max_size=20), st.integers(0, 2**60)),
)
def test_what_goes_in_comes_out(
    shape: tuple[int, int], seed: int, scale: float, kind: Kind, user: int | str
) -> None:
    tokens = (np.random.default_rng(seed).normal(size=shape) * scale).astype(np.float32)
    one = replace(ENVELOPE, tokens_SD=tokens)
    found = envelope.from_bytes(envelope.to_bytes(one, user, kind), user)
    assert replace(found, tokens_SD=None) == replace(one, tokens_SD=None)
    assert found.tokens_SD is not None
    largest = np.abs(tokens).max(axis=1, keepdims=True)
    bound = {"fp32": 0.0, "fp16": 2**-10, "int8": 0.5 / 127 + 2**-10}[kind]
    assert (np.abs(found.tokens_SD - tokens) <= bound * largest + 1e-7).all()


def test_a_tombstone_has_no_tokens() -> None:
    one = replace(ENVELOPE, tokens_SD=None, num_events=0)
    assert envelope.from_bytes(envelope.to_bytes(one, "u"), "u") == one
    assert one.tombstone


@pytest.mark.parametrize("kind", envelope.KINDS)
def test_every_flipped_bit_and_every_truncation_is_noticed(kind: Kind) -> None:
    data = envelope.to_bytes(ENVELOPE, "12346", kind)
    for bit in range(8 * len(data)):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        with pytest.raises(EnvelopeError):
            envelope.from_bytes(bytes(flipped), "12346")
    for length in range(len(data)):
        with pytest.raises(EnvelopeError):
            envelope.from_bytes(data[:length], "12346")
    with pytest.raises(EnvelopeError):
        envelope.from_bytes(data + b"\0", "12346")


def test_tokens_of_another_user_and_of_a_later_layout_are_refused() -> None:
    data = envelope.to_bytes(ENVELOPE, "12346")
    with pytest.raises(EnvelopeError, match="another user"):
        envelope.from_bytes(data, "12347")
    later = bytearray(data)
    later[4] = envelope.LAYOUT + 1
    with pytest.raises(LayoutError, match="update it, or build tokens anew"):
        envelope.from_bytes(bytes(later) + b"what a later layout may add", "12346")
    with pytest.raises(EnvelopeError, match="no envelope"):
        envelope.from_bytes(b"", "12346")


def test_int8_takes_half_of_fp16() -> None:
    tokens = np.random.default_rng(0).normal(size=(128, 64)).astype(np.float32)
    one = replace(ENVELOPE, tokens_SD=tokens)
    sizes: dict[Kind, int] = {
        kind: len(envelope.to_bytes(one, "u", kind)) for kind in envelope.KINDS
    }
    assert sizes["int8"] <= 0.53 * sizes["fp16"]
    assert sizes["fp16"] <= 0.51 * sizes["fp32"]


@pytest.mark.parametrize(
    ("change", "kind", "what"),
    [
        ({"tokens_SD": np.array([[np.nan]], np.float32)}, "fp16", "NaN or infinity"),
        ({"tokens_SD": np.full((1, 2), 1e6, np.float32)}, "fp16", "store them as fp32"),
        ({"tokens_SD": np.full((1, 2), 1e6, np.float32)}, "int8", "store them as fp32"),
        ({"tokens_SD": np.zeros((0, 4), np.float32)}, "fp32", "S × D"),
        ({"tokens_SD": np.zeros(4, np.float32)}, "fp32", "S × D"),
        ({"fingerprint": "abc"}, "fp32", "32 hexadecimal digits"),
        ({}, "fp8", "no kind of payload"),
    ],
)
def test_what_cannot_be_stored_is_refused(change: dict[str, Any], kind: Any, what: str) -> None:
    with pytest.raises(EnvelopeError, match=what):
        envelope.to_bytes(replace(ENVELOPE, **change), "u", kind)


def test_zeros_stay_zeros() -> None:
    one = replace(ENVELOPE, tokens_SD=np.zeros((2, 3), np.float32))
    found = envelope.from_bytes(envelope.to_bytes(one, "u", "int8"), "u")
    assert found.tokens_SD is not None
    assert not found.tokens_SD.any()
