"""Requests of a period as a server reads them: with summary tokens of all events of a user, where the model's own
stage 1 streams. It is trained on the newest of them, and a store holds tokens of all.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np

from modeling.inputs.encoder import Encoded, Encoder
from modeling.models.base import Ranker
from modeling.summaries.summariser import Summariser

# Events of the histories that are read at a time; one longer history is read alone
EVENTS = 1 << 20


def as_served(
    model: Ranker,
    encoder: Encoder,
    encoded: Encoded,
    tell: Callable[[str], None] = lambda text: None,
) -> Encoded:
    """The same requests with the tokens that a store would hold just before each of them; the very same requests where a
    server reads of a history what the model reads.

    Example:
        >>> served = as_served(model, encoder, encodings.period(recipe, "test").encoded)
        >>> logits = predict(model, encoder, served)

    Args:
        tell: takes a line before the tokens are made.
    """
    lengths = encoded.history_lengths
    maker = model.token_maker
    if lengths is None or maker is None or maker.stage_1 is None or not maker.stage_1.streams:
        return encoded
    if lengths.max(initial=0) <= encoder.history_length:
        return encoded
    tell(f"evaluate: summary tokens of {lengths.sum():,} events, as a store holds them")
    summariser = Summariser(model, encoder)
    # On disk, as a period is.
    with tempfile.TemporaryFile() as file:
        tokens_BSD = np.memmap(
            file, np.float32, "w+", shape=(len(encoded), *maker.stage_1.token_shape)
        )
    for chosen in _pieces(lengths):
        histories = encoded.gather(chosen, max(int(lengths[chosen].max()), 1))
        made = summariser.whole(histories, encoded.item_of_key, encoded.times[chosen])
        tokens_BSD[chosen] = made.tokens_BSD
    has_B = lengths > 0
    return replace(encoded, gather_tokens=lambda chosen: (tokens_BSD[chosen], has_B[chosen]))


def _pieces(lengths: np.ndarray) -> Iterator[np.ndarray]:
    """Numbers of consecutive requests whose histories have so many events together."""
    start = 0
    while start < len(lengths):
        within = np.cumsum(lengths[start : start + EVENTS]) <= EVENTS
        stop = start + max(int(within.sum()), 1)
        yield np.arange(start, stop)
        start = stop
