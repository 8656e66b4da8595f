"""A request as training encodes it: the user's columns, history, sketch and tokens as of its time, and the
candidates' numbers from the item table.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from feature_repo.contract.arrow import EPOCH, arrow_type, history_schema, micros
from feature_repo.contract.contract import Contract
from feature_repo.contract.schema import EVENT_TIMESTAMP
from feature_repo.history import user_stats
from feature_repo.history.history import (
    Histories,
    event_columns,
    from_batches,
)
from modeling.bundle.bundle import Bundle
from modeling.inputs.encoder import Encoded, GatherTokens, ReadSketch, RequestInputs
from modeling.inputs.items import ItemNumbers
from serving.api.degraded import Degraded
from serving.api.messages import RankContext
from serving.stores.features import UserRow
from serving.stores.items import Id, ItemTable, Taken


@dataclass(frozen=True)
class Prepared:
    """One request in the shape that training encodes: its numbers, but for what is between history
    and candidates.

    Args:
        numbers: of the candidates.
        item_of_key: row of the vocabulary of each item key.
        relation_of_key: row of the relations of each item key.
        history_length: events of the user that are known, packed or not.
    """

    requests: RequestInputs
    numbers: ItemNumbers
    item_of_key: np.ndarray
    relation_of_key: np.ndarray
    history_length: int


class RequestEncoder:
    """Makes the numbers of one request at a time.

    Args:
        bundle: whose model reads them.
        items: item features.
    """

    def __init__(self, bundle: Bundle, items: ItemTable) -> None:
        self._bundle = bundle
        self._encoder = bundle.encoder
        self._items = items
        self._contract: Contract = bundle.encoder.contract

    def encoded(
        self,
        user: UserRow,
        candidates: Sequence[Id],
        at: datetime,
        items: Taken | None = None,
        context: dict[str, pa.Array] | None = None,
    ) -> Encoded:
        """This one request as training encodes it; see `prepared`."""
        made = self.prepared(user, candidates, at, items, context)
        encoded = self._encoder.encode(
            made.requests, made.numbers, made.item_of_key, made.relation_of_key
        )
        return replace(encoded, history_lengths=np.array([made.history_length]))

    def prepared(
        self,
        user: UserRow,
        candidates: Sequence[Id],
        at: datetime,
        items: Taken | None = None,
        context: dict[str, pa.Array] | None = None,
    ) -> Prepared:
        """Prepare the request's columns as of its time, without events at or after it.

        Args:
            items: the candidates' features; default: as the table has them.
            context: the request's context; default: nothing is known.
        """
        items = self._items.take(candidates) if items is None else items
        # 1. Events and statistics as they were before the request.
        keyed = self._keyed(user.history, candidates, items)
        micros = (at - EPOCH) // timedelta(microseconds=1)
        histories = keyed.histories
        known = user.columns
        kept = int(np.searchsorted(histories.times, micros, side="left"))
        if user.history is not None:
            known = known | _stats_before(self._contract, known, user.history, kept)
        if kept < len(histories.times):
            histories = histories.take(np.array([0]), np.array([kept]))

        def gather(chosen: np.ndarray, length: int) -> Histories:
            return histories.newest(length)

        # 2. Columns of one row, as the training set has them.
        user_columns = {
            c.name: pa.array([known[c.name]], arrow_type(c.dtype))
            for c in self._contract.user_columns
        }
        user_columns |= context_columns(self._contract, None) if context is None else context
        requests = RequestInputs(
            times=np.array([micros]),
            user_columns=user_columns,
            candidate_offsets=np.array([0, len(candidates)]),
            candidate_keys=keyed.candidate_keys,
            gather=gather,
            gather_tokens=self._tokens_of(user),
            read_sketch=self._sketch_of(user, micros),
        )
        packed = int(histories.lengths[0])
        return Prepared(
            requests,
            items.numbers,
            keyed.item_of_key,
            keyed.relation_of_key,
            max(packed, known["history_end"] or 0),
        )

    def _keyed(
        self, history: pa.RecordBatch | None, candidates: Sequence[Id], items: Taken
    ) -> _Keyed:
        """Keys under which equal items of the history and the candidates are equal: their places in
        the item table, where all of them are there.
        """
        contract = self._contract
        vocabulary = self._encoder.items
        # Without a history there is nothing to compare, so that candidates are just numbered.
        if history is None:
            nothing = pa.Table.from_batches([], history_schema(contract))
            empty = Histories(
                np.zeros(2, np.int64), np.zeros(0, np.int64), event_columns(contract, nothing)
            )
            keys = np.arange(len(candidates))
            numbers = items.numbers
            return _Keyed(empty, keys, numbers.vocabulary_row, numbers.relation_row)
        events = history[contract.item.join_key]
        places = items.known.places(events.to_pylist())
        # Places serve as keys only where every item has one; otherwise the ids are compared.
        if items.unknown or places.min(initial=0) < 0:
            ids = pa.array(candidates, arrow_type(contract.item.dtype))
            histories, keys = from_batches(contract, [history], ids)
            largest = max(histories.item_keys.max(initial=-1), keys.max(initial=-1))
            rows = np.zeros((2, largest + 1), np.int64)
            rows[0, histories.item_keys] = vocabulary.indices_of(events)
            rows[1, histories.item_keys] = self._encoder.relations.rows_of(events)
            rows[:, keys] = items.numbers.vocabulary_row, items.numbers.relation_row
            return _Keyed(histories, keys, rows[0], rows[1])
        columns = event_columns(contract, pa.Table.from_batches([history]))
        histories = Histories(np.array([0, len(places)]), places, columns)
        known = items.known
        return _Keyed(histories, items.places, known.vocabulary_row, known.relation_row)

    def _sketch_of(self, user: UserRow, micros: int) -> ReadSketch | None:
        """Read the user's sketch for candidates at the request's time; nothing where it counts
        events that came later, which cannot be taken out.
        """
        if user.sketch is None or user.sketch.as_of >= micros:
            return None
        sketch = user.sketch.sketch
        return lambda chosen, offsets, codes: sketch.read(codes, micros)

    def _tokens_of(self, user: UserRow) -> GatherTokens | None:
        """The user's stored tokens for the model; without any, a model with a stage 1 reads the
        short history.

        Raises:
            ValueError: the tokens' version or shape is wrong; the reader lets none through, so this is
                a fault of ours.
        """
        bundle = self._bundle
        if bundle.tokens is None or (user.tokens is None and bundle.makes_tokens):
            return None
        if user.tokens is None or user.tokens.tokens_SD is None:
            nothing = np.zeros((1, *bundle.token_shape), np.float32)
            return lambda chosen: (nothing, np.array([False]))
        found = user.tokens.tokens_SD
        if (user.tokens.fingerprint, found.shape) != (bundle.tokens, bundle.token_shape):
            raise ValueError(
                f"tokens of version {user.tokens.fingerprint} and shape {found.shape} came to bundle {bundle.name}, which "
                f"accepts {bundle.tokens} of shape {bundle.token_shape}"
            )
        return lambda chosen: (found[None], np.array([True]))


class _Keyed(NamedTuple):
    """A request's history and candidates by item key, and each key's rows of vocabulary and relations."""

    histories: Histories
    candidate_keys: np.ndarray
    item_of_key: np.ndarray
    relation_of_key: np.ndarray


def why_unfit(user: UserRow, at: int) -> Degraded | None:
    """Why a user's stored tokens must not be ranked with at this time, microseconds; None where they may,
    or where there are none.
    """
    if user.tokens is not None and user.tokens.as_of >= at:
        # They know what comes after the request
        return Degraded.NEWER_TOKENS
    return Degraded.TOKENS_OF_ANOTHER_HISTORY if user.tokens_know_another_history else None


def as_of(contract: Contract, user: UserRow, at: int) -> UserRow:
    """The user with the history and the statistics of before a time, microseconds."""
    if user.history is None:
        return user
    times = micros(user.history[EVENT_TIMESTAMP])
    kept = int(np.searchsorted(times, at, side="left"))
    columns = user.columns | _stats_before(contract, user.columns, user.history, kept)
    return replace(user, columns=columns, history=user.history.slice(0, kept))


def _stats_before(
    contract: Contract, stats: dict[str, Any], history: pa.RecordBatch, kept: int
) -> dict[str, Any]:
    """Return what changes in a user's statistics when the events at or after the request are taken back.

    Where no packed event is earlier than the request, nothing is known: older ones are not packed, and
    may be later too.
    """
    later = history.slice(kept)
    if not later.num_rows or stats["history_end"] is None:
        return {}
    return user_stats.subtract(contract, stats, later) if kept else user_stats.unknown(contract)


def context_columns(contract: Contract, context: RankContext | None) -> dict[str, pa.Array]:
    """Return a request's context as columns of one row; a feature that it leaves out is
    missing.
    """
    return {
        c.name: pa.array([getattr(context, c.name, None)], arrow_type(c.dtype))
        for c in contract.spec.context_features
    }
