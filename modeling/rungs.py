"""What a ranker's answers are worth when the server has to do without something: the test period ranked
anew with that withheld, under the names that answers give (`serving/degraded.py`).

Two rungs need no measuring: without scores (`no_scores`, `deadline`) the order is the caller's own, and of
`unknown_items` the report says where they stand. Features that are merely old are not measured here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pyarrow as pa

from feature_repo.contract import Contract
from feature_repo.history import Histories
from feature_repo.sketch import Layout, Sketch
from modeling.encoder import GatherTokens, ReadSketch, RequestColumns


def rungs(requests: RequestColumns, contract: Contract) -> dict[str, RequestColumns]:
    """By the name of a reason: the same requests without what it lacks.

    `no_tokens` is there only where requests carry tokens of a store; a model that makes its own is
    measured from the history that it reads anyway.
    """
    forgotten = without_events(requests)
    nothing, tokens = empty_sketch(contract), no_tokens(requests)
    user = [column.name for column in contract.user_columns]
    found = {
        "no_sketch": replace(requests, read_sketch=None),
        "no_history": replace(forgotten, read_sketch=nothing),
        "unknown_user": replace(nulled(forgotten, user), read_sketch=nothing, gather_tokens=tokens),
        "store_unavailable": replace(
            nulled(forgotten, user), read_sketch=None, gather_tokens=tokens
        ),
    }
    if requests.gather_tokens is not None:
        found["no_tokens"] = replace(requests, gather_tokens=tokens)
    if requests.read_sketch is None:
        del found["no_sketch"]
    return found


def without_events(requests: RequestColumns) -> RequestColumns:
    """The same requests with empty histories."""

    def gather(chosen: np.ndarray, length: int) -> Histories:
        histories = requests.gather(chosen, length)
        nothing = np.zeros(len(chosen), np.int64)
        return histories.take(nothing, nothing)

    return replace(requests, gather=gather)


def nulled(requests: RequestColumns, names: Sequence[str]) -> RequestColumns:
    """The same requests without these columns of their users."""
    columns = {
        name: pa.nulls(len(column), column.type) if name in names else column
        for name, column in requests.user_columns.items()
    }
    return replace(requests, user_columns=columns)


def empty_sketch(contract: Contract) -> ReadSketch:
    """What a sketch of no events says of candidates."""
    layout = Layout.of(contract)

    def read(chosen: np.ndarray, offsets: np.ndarray, codes: Sequence[np.ndarray]) -> np.ndarray:
        return Sketch(layout).read(layout.positions(codes), 0)

    return read


def no_tokens(requests: RequestColumns) -> GatherTokens | None:
    """Nobody's tokens, in the shape of these; None where requests carry none."""
    stored = requests.gather_tokens
    if stored is None:
        return None

    def gather(chosen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        tokens, has = stored(chosen)
        return np.zeros_like(tokens), np.zeros_like(has)

    return gather
