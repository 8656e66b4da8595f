"""One user's summary tokens after new events, without reading the old ones: stored state in, stored state out.

What a stream of events would call for each user. The value is written at a newer time, so on Redis two that refresh the
same user at once cannot leave the older one.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pyarrow as pa

from feature_repo.arrow import history_schema
from feature_repo.envelope import Envelope, EnvelopeError, Kind, decode
from feature_repo.history import from_batches
from feature_repo.online_tokens import OnlineTokens
from feature_repo.schema import Contract
from modeling.summary import Summariser, envelopes, stored_summary


class NoStateError(LookupError):
    """A user has no stored state of this token version to go on from."""


class RefusedError(RuntimeError):
    """The store holds newer tokens by now."""


class Refresher:
    """Takes new events into stored tokens.

    Args:
        summariser: of the bundle whose tokens they are; its stage 1 must stream.
        online: where tokens are stored.
        kind: how tokens are stored.

    Raises:
        ValueError: stage 1 does not stream.
    """

    def __init__(self, summariser: Summariser, online: OnlineTokens, contract: Contract, kind: Kind = "fp16") -> None:
        if not summariser.streams:
            raise ValueError(
                "only a streaming stage 1 (causal=True) takes new events: run the summary_tokens job instead"
            )
        self._summariser, self._online, self._contract, self._kind = summariser, online, contract, kind

    def refresh(self, user_id: int | str, new_events: list[dict[str, Any]], computed_at: int | None = None) -> Envelope:
        """Add a user's new events, oldest first, and store what comes of it.

        Args:
            new_events: columns of `contract.history_columns`, all later than those in the tokens.
            computed_at: microseconds; the clock unless given.

        Raises:
            NoStateError: nothing is stored for the user.
            EnvelopeError: what is stored is damaged, or of another token version.
            RefusedError: somebody wrote newer tokens meanwhile; nothing was stored.
            ValueError: no new event, one that is not later than the last, or a value of the wrong type.
        """
        version = self._summariser.fingerprint
        ((tokens, state),) = self._online.read(version, [user_id])
        if tokens is None or state is None:
            raise NoStateError(
                f"user {user_id!r} has no stored state of token version {version}: run the summary_tokens job"
            )
        before, kept = decode(tokens, user_id), decode(state, user_id)
        if before.tombstone or kept.tombstone:
            raise NoStateError(f"user {user_id!r} has no tokens of version {version} any more")
        if not before.fingerprint == kept.fingerprint == version or before.num_events != kept.num_events:
            raise EnvelopeError(
                f"user {user_id!r}: tokens are of version {before.fingerprint} with {before.num_events} events, their state of "
                f"{kept.fingerprint} with {kept.num_events}; expected both of {version}: run the summary_tokens job"
            )
        batch = pa.RecordBatch.from_pylist(new_events, schema=history_schema(self._contract))
        histories, _ = from_batches(self._contract, [batch], pa.array([], batch.schema.field(0).type))
        times = histories.times
        if not len(times) or times[0] <= kept.as_of or (np.diff(times) < 0).any():
            raise ValueError(
                f"new events of user {user_id!r} must be later than {kept.as_of} µs and in the order of time, got {times.tolist()}"
            )
        item = self._contract.item.join_key
        vocabulary = self._summariser.encoder.vocabularies[item]
        codes = vocabulary.encode(batch[item].unique())  # in the order of the item keys: of first occurrence
        summary = self._summariser.extended(stored_summary(before, kept), histories, codes)
        at = time.time_ns() // 1000 if computed_at is None else computed_at
        at = max(at, before.computed_at + 1)
        stored, streams = envelopes(summary, 0, user_id, version, at, self._kind)
        if not self._online.write(version, [user_id], [stored], [streams], at):
            raise RefusedError(
                f"tokens of user {user_id!r} were replaced by newer ones meanwhile: refresh again from those"
            )
        return decode(stored, user_id)
