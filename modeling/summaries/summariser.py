"""Summary tokens of whole histories, and of stored states with new events, outside a request.

The Beam job, the refresh of one user and the evaluation share this. Stage 1 reads events only, so neither
request nor candidates are needed. A bidirectional stage 1 reads as many newest events as its recipe
says and takes their age at the snapshot; a streaming one reads all of them, and keeps what it needs
to take more.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from threading import Lock

import numpy as np
import torch
from torch import Tensor

from feature_repo.history.history import Histories
from modeling.inputs.batch import UserInputs
from modeling.inputs.encoder import Encoder
from modeling.layers.host import device_of
from modeling.models.base import Ranker
from modeling.summaries.token_identity import token_fingerprint

# Events, padding counted, that stage 1 reads at a time
PADDED_EVENTS = 1 << 12


@dataclass(frozen=True)
class Summary:
    """Tokens of several users, and what their streams keep.

    Args:
        tokens_BSD: float32.
        streams_BRK: float32; None where stage 1 does not stream.
        num_events: int64, events behind them.
        as_of: time of the newest of those, microseconds; 0 without one.
    """

    tokens_BSD: np.ndarray
    streams_BRK: np.ndarray | None
    num_events: np.ndarray
    as_of: np.ndarray

    def select(self, chosen: np.ndarray) -> Summary:
        """Some of the users, in the given order."""
        streams = None if self.streams_BRK is None else self.streams_BRK[chosen]
        return Summary(
            self.tokens_BSD[chosen], streams, self.num_events[chosen], self.as_of[chosen]
        )


class Summariser:
    """Stage 1 of one bundle, by itself. Calls may come from several threads; the model runs for one
    at a time.

    Args:
        model: with a stage 1, in evaluation mode.
        encoder: the bundle's.

    Raises:
        ValueError: the model makes no summary tokens.
    """

    def __init__(self, model: Ranker, encoder: Encoder) -> None:
        fingerprint = token_fingerprint(model, encoder)
        maker = model.token_maker
        if fingerprint is None or maker is None or maker.stage_1 is None:
            raise ValueError(
                f"{type(model).__name__} makes no summary tokens: choose a VISTA bundle with a stage 1"
            )
        self.stage_1 = maker.stage_1
        self.encoder = encoder
        self.fingerprint = fingerprint
        self.streams = self.stage_1.streams
        self._device = device_of(self.stage_1)
        self._lock = Lock()

    def bytes_of_user(self, snapshots: int = 1) -> int:
        """Return the fp32 bytes of one user's streams, and of tokens of so many snapshots."""
        tokens = snapshots * math.prod(self.stage_1.token_shape)
        return 4 * (tokens + math.prod(self.stage_1.stream_shape))

    def whole(self, histories: Histories, item_of_key: np.ndarray, at: np.ndarray) -> Summary:
        """Tokens of whole histories, batched by length; one that is longer than a batch goes
        through in chunks.

        Args:
            histories: of B users.
            item_of_key: vocabulary index of each of their item keys.
            at: B times, microseconds; ages are taken from here.
        """
        number = histories.lengths.astype(np.int64)
        if not self.streams:
            histories = histories.newest(self.encoder.window(histories.lengths))
        return replace(self._run(histories, item_of_key, at, None), num_events=number)

    def extended(self, before: Summary, new_events: Histories, item_of_key: np.ndarray) -> Summary:
        """Stored streams with new events: the same as `whole` of all events, at a cost that their
        number does not decide.

        Args:
            before: with streams; its tokens are not read.
            new_events: of the same users, later than those behind `before`.

        Raises:
            ValueError: stage 1 does not stream.
        """
        if not self.streams or before.streams_BRK is None:
            raise ValueError(
                "only a streaming stage 1 (causal=True) takes new events: summarise whole histories"
            )
        return self._run(new_events, item_of_key, before.as_of, before)

    def _run(
        self, events: Histories, item_of_key: np.ndarray, at: np.ndarray, before: Summary | None
    ) -> Summary:
        """Batch by batch; `before` holds what the streams have seen, None where they begin."""
        number = len(events.lengths)
        tokens = np.empty((number, *self.stage_1.token_shape), np.float32)
        kept: np.ndarray | None = None
        for chosen in _batches(events.lengths):
            part = events.take(events.offsets[:-1][chosen], events.offsets[1:][chosen])
            with self._lock, torch.inference_mode():
                seen = None if before is None else before.select(chosen)
                found, streams = self._batch(part, item_of_key, at[chosen], seen)
            tokens[chosen] = found.cpu().numpy()
            if streams is not None:
                kept = np.empty((number, *streams.shape[1:]), np.float32) if kept is None else kept
                kept[chosen] = streams.cpu().numpy()
        newest = np.zeros(number, np.int64) if before is None else before.as_of.copy()
        some = events.lengths > 0
        newest[some] = events.times[events.offsets[1:][some] - 1]
        seen_events = 0 if before is None else before.num_events
        return Summary(tokens, kept, seen_events + events.lengths, newest)

    def _batch(
        self, events: Histories, item_of_key: np.ndarray, at: np.ndarray, before: Summary | None
    ) -> tuple[Tensor, Tensor | None]:
        # 1. Chunks of so many events that a batch of them fits, in whole pieces of stage 1.
        length = int(events.lengths.max(initial=0))
        step = max(PADDED_EVENTS // max(len(events.lengths), 1), 1)
        step = max(step // self.stage_1.piece, 1) * self.stage_1.piece

        def chunks() -> Iterator[UserInputs]:
            none = np.full(len(at), -1, np.int64)
            # Time of the event before each chunk, from which its first gap counts.
            last = none if before is None else np.where(before.num_events > 0, before.as_of, none)
            for start in range(0, max(length, 1), step):
                starts = np.minimum(events.offsets[:-1] + start, events.offsets[1:])
                part = events.take(starts, np.minimum(starts + step, events.offsets[1:]))
                yield self._inputs(part, item_of_key, at, last)
                some = part.lengths > 0
                last = last.copy()
                last[some] = part.times[part.offsets[1:][some] - 1]

        # 2. Without streams: one pass, or several over all chunks.
        if not self.streams:
            if length <= step:
                return self.stage_1(next(chunks())), None
            return self.stage_1.summarise(chunks), None
        # 3. With streams: go on from the stored ones, where there are some.
        restored = None
        if before is not None and before.streams_BRK is not None:
            streams_BRK = torch.from_numpy(before.streams_BRK).to(self._device)
            seen = torch.from_numpy(before.num_events).to(self._device)
            restored = self.stage_1.restored_streams(streams_BRK, seen)
        tokens, streams = self.stage_1.stream(chunks(), restored)
        return tokens, self.stage_1.stored_streams(streams)

    def _inputs(
        self, events: Histories, item_of_key: np.ndarray, at: np.ndarray, before: np.ndarray
    ) -> UserInputs:
        """Events without a request: no fields, no dense features."""
        none = np.zeros((len(at), 0))
        inputs = self.encoder.user_inputs(
            events, at, none.astype(np.int64), none.astype(np.float32), item_of_key, before
        )
        return inputs.to(self._device)


def _batches(lengths: np.ndarray) -> Iterator[np.ndarray]:
    """Rows in groups of like length, so that little is padding and none holds more than fits."""
    order = np.argsort(lengths, kind="stable")
    start = 0
    while start < len(order):
        stop = start + 1
        while (
            stop < len(order)
            and (stop - start + 1) * max(int(lengths[order[stop]]), 1) <= PADDED_EVENTS
        ):
            stop += 1
        yield order[start:stop]
        start = stop
