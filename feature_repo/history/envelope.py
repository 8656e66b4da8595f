"""Envelopes of a user's summary tokens and sketches: bytes that say what
they are, of whom, made by which model or layout, and how old.

    magic 4 | layout u8 | kind u8 | flags u16 | rows u16 | width u16 | fingerprint 16
    | as_of i64 µs | computed_at i64 µs | events u64 | digest i64 | payload | crc32 u32

The checksum is seeded with the user's key, so another user's bytes under this key are noticed as
well. `seal` and `unseal` are the envelope; `to_bytes` and `from_bytes` put summary tokens into one
(magic "MTOK"), `sketch.py` counts ("MSKT"). Kinds of tokens: fp32, fp16, and int8 with a scale for
each token (symmetric, rounded to nearest; scales are fp16 and come first). A tombstone says that
the user has no tokens any more; its payload is empty.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Literal

import numpy as np

from feature_repo.history.history import checksum

MAGIC = b"MTOK"
LAYOUT = 2
Kind = Literal["fp32", "fp16", "int8"]
KINDS: tuple[Kind, ...] = ("fp32", "fp16", "int8")
_HEADER = struct.Struct("<4sBBHHH16sqqQq")
_CRC = struct.Struct("<I")
_TOMBSTONE = 1
# The largest int8 used, so that a token and its negative are stored alike
_LARGEST = 127


class EnvelopeError(ValueError):
    """Bytes are no envelope of this user, or tokens cannot be stored as asked; the message says
    what differs.
    """


class LayoutError(EnvelopeError):
    """An envelope of a layout that this version does not read; a newer version wrote it."""


@dataclass(frozen=True)
class Envelope:
    """Summary tokens and their identity.

    Args:
        fingerprint: of the stage 1 that made them, 32 hexadecimal digits; tokens of
            a different stage 1 are never scored.
        as_of: events up to this time are in them, microseconds.
        computed_at: when they were made, microseconds.
        num_events: events behind them.
        tokens_SD: float32; None in a tombstone.
        digest: of those events (`history.event_digests`): the same number of events with another
            digest is a different history.
    """

    fingerprint: str
    as_of: int
    computed_at: int
    num_events: int
    tokens_SD: np.ndarray | None
    digest: int = 0

    @property
    def tombstone(self) -> bool:
        """True if the envelope says that there are no tokens any more."""
        return self.tokens_SD is None


@dataclass(frozen=True)
class Identity:
    """Whose and of what time sealed bytes are.

    Args:
        fingerprint: of what made them, 32 hexadecimal digits.
        as_of: events up to this time are in them, microseconds.
        computed_at: when they were made, microseconds.
        num_events: events behind them.
        digest: of those events (`history.event_digests`).
    """

    fingerprint: str
    as_of: int
    computed_at: int
    num_events: int
    digest: int = 0


@dataclass(frozen=True)
class Sealed:
    """An envelope's header, and a payload that the checksum has vouched for."""

    kind: int
    flags: int
    shape: tuple[int, int]
    identity: Identity
    payload: bytes


def seal(magic: bytes, sealed: Sealed, user_id: int | str) -> bytes:
    """An envelope's bytes, for this user's key alone.

    Raises:
        EnvelopeError: the fingerprint has not 16 bytes.
    """
    identity = sealed.identity
    try:
        fingerprint = bytes.fromhex(identity.fingerprint)
    except ValueError:
        fingerprint = b""
    if len(fingerprint) != 16:
        raise EnvelopeError(
            f"a token fingerprint has 32 hexadecimal digits, got {identity.fingerprint!r}"
        )
    header = _HEADER.pack(
        magic,
        LAYOUT,
        sealed.kind,
        sealed.flags,
        *sealed.shape,
        fingerprint,
        identity.as_of,
        identity.computed_at,
        identity.num_events,
        identity.digest,
    )
    body = header + sealed.payload
    return body + _CRC.pack(checksum(user_id, body))


def unseal(magic: bytes, data: bytes, user_id: int | str, what: str = "tokens") -> Sealed:
    """Open an envelope once it is known to be whole and this user's.

    Args:
        what: the payload's name in error messages.

    Raises:
        LayoutError: of a layout that this version does not read.
        EnvelopeError: damaged, truncated, no such envelope, or sealed for another user.
    """
    if data[:4] != magic:
        raise EnvelopeError(
            f"{what} of user {user_id!r} start with {data[:4]!r}, expected {magic!r}: no envelope"
        )
    if len(data) > 4 and data[4] != LAYOUT:
        raise LayoutError(
            f"{what} of user {user_id!r} have layout {data[4]}, this version reads {LAYOUT}: update it, or build {what} anew"
        )
    if len(data) < _HEADER.size + _CRC.size:
        raise EnvelopeError(
            f"{what} of user {user_id!r} have {len(data)} bytes: too short to be an envelope"
        )
    body = data[: -_CRC.size]
    (stored,) = _CRC.unpack(data[-_CRC.size :])
    if checksum(user_id, body) != stored:
        raise EnvelopeError(
            f"{what} of user {user_id!r} are damaged, or were stored for another user: checksum differs"
        )
    _, _, kind, flags, rows, width, fingerprint, as_of, computed_at, events, digest = (
        _HEADER.unpack_from(body)
    )
    identity = Identity(fingerprint.hex(), as_of, computed_at, events, digest)
    return Sealed(kind, flags, (rows, width), identity, body[_HEADER.size :])


def to_bytes(envelope: Envelope, user_id: int | str, kind: Kind = "fp16") -> bytes:
    """The bytes to store under the user's key.

    Raises:
        EnvelopeError: tokens that are no finite S × D array, or that fp16 cannot hold; a
            fingerprint that has not 16 bytes.
    """
    if kind not in KINDS:
        raise EnvelopeError(f"no kind of payload {kind!r}; there are {KINDS}")
    tokens = envelope.tokens_SD
    shape = (0, 0)
    payload = b""
    if tokens is not None:
        if tokens.ndim != 2 or not all(0 < size < 1 << 16 for size in tokens.shape):
            raise EnvelopeError(
                f"tokens are an S × D array with sizes from 1 to 65,535, got shape {tokens.shape}"
            )
        if not np.isfinite(tokens).all():
            raise EnvelopeError(f"tokens of user {user_id!r} hold NaN or infinity")
        shape = tokens.shape
        payload = _payload(tokens.astype(np.float32), kind, user_id)
    flags = _TOMBSTONE if tokens is None else 0
    identity = Identity(
        envelope.fingerprint,
        envelope.as_of,
        envelope.computed_at,
        envelope.num_events,
        envelope.digest,
    )
    return seal(MAGIC, Sealed(KINDS.index(kind), flags, shape, identity, payload), user_id)


def from_bytes(data: bytes, user_id: int | str) -> Envelope:
    """Decode the bytes under a user's key.

    Raises:
        LayoutError: of a layout that this version does not read.
        EnvelopeError: damaged, truncated, no envelope at all, or stored for another user.
    """
    sealed = unseal(MAGIC, data, user_id)
    tokens = None
    if sealed.kind >= len(KINDS) or sealed.flags & ~_TOMBSTONE:
        raise EnvelopeError(
            f"tokens of user {user_id!r} have kind {sealed.kind} and flags {sealed.flags}, which no version wrote"
        )
    if not sealed.flags & _TOMBSTONE:
        tokens = _tokens(sealed.payload, KINDS[sealed.kind], *sealed.shape, user_id)
    elif sealed.payload:
        raise EnvelopeError(
            f"tombstone of user {user_id!r} holds {len(sealed.payload)} bytes of tokens"
        )
    found = sealed.identity
    return Envelope(
        found.fingerprint, found.as_of, found.computed_at, found.num_events, tokens, found.digest
    )


def _payload(tokens: np.ndarray, kind: Kind, user_id: int | str) -> bytes:
    if kind == "fp32":
        return tokens.astype("<f4").tobytes()
    largest = float(np.abs(tokens).max())
    if largest > np.finfo(np.float16).max:
        raise EnvelopeError(
            f"tokens of user {user_id!r} reach {largest:.3g}, more than {kind} can hold: store them as fp32"
        )
    if kind == "fp16":
        return tokens.astype("<f2").tobytes()
    scale = (np.abs(tokens).max(axis=1) / _LARGEST).astype("<f2")
    # What the reader will multiply by
    rounded = scale.astype(np.float32)[:, None]
    steps = np.divide(tokens, rounded, out=np.zeros_like(tokens), where=rounded > 0)
    return scale.tobytes() + np.rint(steps).clip(-_LARGEST, _LARGEST).astype(np.int8).tobytes()


def _tokens(payload: bytes, kind: Kind, number: int, width: int, user_id: int | str) -> np.ndarray:
    size = {"fp32": 4 * number * width, "fp16": 2 * number * width, "int8": number * (2 + width)}[
        kind
    ]
    if len(payload) != size or not size:
        raise EnvelopeError(
            f"tokens of user {user_id!r} have {len(payload)} bytes; {number} × {width} of {kind} take {size}"
        )
    if kind == "int8":
        scale = np.frombuffer(payload, "<f2", number).astype(np.float32)
        steps = np.frombuffer(payload, np.int8, offset=2 * number).reshape(number, width)
        tokens = steps * scale[:, None]
    else:
        tokens = (
            np.frombuffer(payload, "<f4" if kind == "fp32" else "<f2")
            .reshape(number, width)
            .astype(np.float32)
        )
    if not np.isfinite(tokens).all():
        raise EnvelopeError(f"tokens of user {user_id!r} hold NaN or infinity")
    return tokens
