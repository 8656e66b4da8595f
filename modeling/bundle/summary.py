"""Summary tokens as they are stored: envelopes of a user's tokens and streams, and the stage 1 of a bundle."""

from __future__ import annotations

from pathlib import Path
from threading import Lock

import numpy as np

from feature_repo.contract.contract import Contract
from feature_repo.history import envelope
from feature_repo.history.envelope import Envelope, Kind
from modeling.bundle import bundle
from modeling.layers.host import device_named
from modeling.summaries.summariser import Summariser, Summary


def envelopes(
    summary: Summary,
    row: int,
    user_id: int | str,
    fingerprint: str,
    computed_at: int,
    kind: Kind,
    digest: int,
) -> tuple[bytes, bytes | None]:
    """A user's tokens and streams as stored bytes; streams are always fp32, since they are added to
    for years.

    Args:
        digest: of the events behind them.

    Raises:
        EnvelopeError: tokens that are not finite, or too large for the kind.
    """
    about = (fingerprint, int(summary.as_of[row]), computed_at, int(summary.num_events[row]))
    tokens = envelope.to_bytes(Envelope(*about, summary.tokens_BSD[row], digest), user_id, kind)
    if summary.streams_BRK is None:
        return tokens, None
    return tokens, envelope.to_bytes(
        Envelope(*about, summary.streams_BRK[row], digest), user_id, "fp32"
    )


def stored_summary(tokens: Envelope, state: Envelope) -> Summary:
    """One user's stored tokens and streams, to be extended."""
    assert tokens.tokens_SD is not None
    assert state.tokens_SD is not None
    number = np.array([state.num_events])
    as_of = np.array([state.as_of])
    return Summary(tokens.tokens_SD[None], state.tokens_SD[None].copy(), number, as_of)


_loaded: dict[tuple[str, str, str], Summariser] = {}
_loading = Lock()


def load_summariser(path: str, contract: Contract, digest: str, device: str = "cpu") -> Summariser:
    """The summariser of a bundle, loaded once for each process and device, however many threads ask.

    Raises:
        DeviceError: there is no such device.
        BundleError: the bundle must not be used.
        ValueError: it makes no tokens.
    """
    with _loading:
        if (path, digest, device) not in _loaded:
            loaded = bundle.load(Path(path), contract, digest).on(device_named(device))
            _loaded[path, digest, device] = Summariser(loaded.model, loaded.encoder)
        return _loaded[path, digest, device]
