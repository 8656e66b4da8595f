"""A user's newest events as lists, one for each column: how Feast's users read a history.

    history_item_ids             items, oldest first
    history_event_timestamps     when, whole seconds: Feast's lists of times hold no more
    history_<column>             each other column of an event, such as `history_action`

Of a request at a time the lists hold what was known just before it; online they hold what is packed. Both ways give
the same values. A missing number is NaN, which is why a whole number that may be missing is a float here; a missing
text is "". Columns that are lists themselves are left out: Feast has no lists of lists.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from feature_repo.contract.arrow import MICROS, arrow_type, from_micros, value_codes
from feature_repo.contract.contract import Contract
from feature_repo.contract.schema import EVENT_TIMESTAMP, Column, DType
from feature_repo.history.envelope import Envelope
from feature_repo.history.history import HistoryError, HistoryLog, unpack
from feature_repo.home.tables import JobFolder

# Tag of a feature view whose values are made when they are read, and what of: `HISTORY` or `TOKENS`
MADE_OF = "made_of"
HISTORY = "history"
TOKENS = "tokens"
# Views of this kind
HISTORY_VIEW = "user_sequence"
TOKENS_VIEW = "summary_token_values"
# Summary tokens, all numbers in a row, and how many tokens these are
VALUES = "token_values"
NUMBER = "num_tokens"
LISTS_OF_THEIR_OWN = (DType.STRING_LIST, DType.FLOAT32_LIST)
WHOLE = (DType.INT8, DType.INT32, DType.INT64)


@dataclass(frozen=True)
class ListColumn:
    """A column of events as a list.

    Args:
        name: of the feature.
        kind: of a value in the list.
    """

    name: str
    column: Column
    kind: pa.DataType

    @property
    def type(self) -> pa.DataType:
        return pa.list_(self.kind)


def list_columns(contract: Contract) -> tuple[ListColumn, ...]:
    """The lists that a dataset's histories give.

    Example:
        >>> [column.name for column in list_columns(load_contract("online_retail"))][:3]
        ['history_item_ids', 'history_action', 'history_event_timestamps']
    """
    names = {
        contract.item.join_key: "history_item_ids",
        EVENT_TIMESTAMP: "history_event_timestamps",
    }
    return tuple(
        ListColumn(names.get(c.name, f"history_{c.name}"), c, _kind(c))
        for c in contract.history_columns
        if c.dtype not in LISTS_OF_THEIR_OWN
    )


def _kind(column: Column) -> pa.DataType:
    if column.dtype in WHOLE and column.nullable:
        return pa.float64()
    # Feast has no whole numbers of 8 bits.
    return pa.int32() if column.dtype is DType.INT8 else arrow_type(column.dtype)


def packed_lists(
    contract: Contract, user_id: int | str, packed: bytes, names: Collection[str]
) -> dict[str, list[Any]]:
    """Some lists of a packed history, a value for each event.

    Raises:
        HistoryError: it is damaged, or another user's.
    """
    events = unpack(contract, user_id, packed)
    return {
        c.name: _values(c, events[c.column.name]).to_pylist()
        for c in list_columns(contract)
        if c.name in names
    }


def token_values(stored: Envelope) -> dict[str, Any]:
    """Summary tokens as `TOKENS_VIEW` has them; nulls of a user who has none any more."""
    if stored.tokens_SD is None:
        return {VALUES: None, NUMBER: None}
    return {VALUES: stored.tokens_SD.ravel().tolist(), NUMBER: len(stored.tokens_SD)}


class HistoryLists:
    """Lists as of any time, from the history log.

    Example:
        >>> lists = HistoryLists(contract, "/data/shop")
        >>> lists.read(pa.array([12680]), np.array([1322000000000000]), ["history_item_ids"], 100)

    Args:
        home: the dataset's home.

    Raises:
        TableNotBuiltError: `user_history` has not run.
    """

    def __init__(self, contract: Contract, home: str) -> None:
        self._contract = contract
        self._log = HistoryLog(contract, JobFolder(home, "user_history"))
        self._events = JobFolder(home, "events")
        self._columns = {column.name: column for column in list_columns(contract)}
        self._texts: dict[str, _Texts] = {}

    @property
    def users(self) -> pa.DataType:
        """The type of users' ids."""
        return self._log.users.type

    def read(
        self, users: pa.Array, times: np.ndarray, names: Sequence[str], length: int
    ) -> dict[str, pa.Array]:
        """The newest events of each user known just before a time, as lists by name; null of a user without a known
        event.

        Args:
            users: ids; a null is no user.
            times: microseconds, one for each.
            names: of the lists.
            length: events of a list, at most.
        """
        rows = self._log.rows_of(users)
        ends = self._log.number_known(rows, times)
        item = self._contract.item.join_key
        columns = [self._columns[name].column.name for name in names]
        found = self._log.gather(
            rows, ends, length, [name for name in columns if name != item], times
        )
        offsets = pa.array(found.offsets, pa.int32(), mask=np.r_[ends == 0, False])
        lists = {}
        for name in names:
            column = self._columns[name]
            if column.column.name == item:
                values = self._log.items.take(pa.array(found.item_keys))
            else:
                values = self._decoded(column, found.columns[column.column.name])
            lists[name] = pa.ListArray.from_arrays(offsets, _values(column, values))
        return lists

    def _decoded(self, column: ListColumn, numbers: np.ndarray) -> pa.Array:
        """What the log holds of a column, as events had it."""
        name = column.column.name
        if name == EVENT_TIMESTAMP:
            return from_micros(numbers)
        if column.column.dtype is not DType.STRING:
            return pa.array(numbers)
        # The log has codes for texts.
        if name not in self._texts:
            self._texts[name] = _Texts.of(self._events, name)
        return self._texts[name].of_codes(numbers)


@dataclass(frozen=True)
class _Texts:
    """Texts of a column by their codes."""

    codes: np.ndarray
    texts: pa.Array

    @staticmethod
    def of(events: JobFolder, column: str) -> _Texts:
        parts = (events.read_path(path, [column]) for path in events.paths("events"))
        texts = pc.unique(
            pa.chunked_array([pc.unique(part[column]) for part in parts], pa.string())
        ).drop_null()
        codes = value_codes(texts)
        order = np.argsort(codes)
        return _Texts(codes[order], texts.take(pa.array(order)))

    def of_codes(self, codes: np.ndarray) -> pa.Array:
        place = np.minimum(np.searchsorted(self.codes, codes), max(len(self.codes) - 1, 0))
        missing = codes == self._null
        found = np.zeros(len(codes), bool) if len(self.codes) == 0 else self.codes[place] == codes
        if not (found | missing).all():
            raise HistoryError(
                "the history log holds a text that no event has: it and the table of events are of different runs; run "
                "`python -m beam_jobs user_history` again"
            )
        return self.texts.take(pa.array(place, mask=missing))

    @cached_property
    def _null(self) -> np.int64:
        return value_codes(pa.array([None], pa.string()))[0]


def _values(column: ListColumn, values: pa.Array) -> pa.Array:
    """Values of events as the lists hold them."""
    if column.column.dtype is DType.TIMESTAMP:
        seconds = pc.cast(values, pa.int64()).to_numpy(zero_copy_only=False) // MICROS
        return from_micros(seconds * MICROS)
    if pa.types.is_floating(column.kind):
        return pc.fill_null(pc.cast(values, column.kind, safe=False), np.nan)
    if pa.types.is_string(column.kind):
        return pc.fill_null(pc.cast(values, column.kind), "")
    return pc.cast(values, column.kind)
