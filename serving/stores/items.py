"""Item features in the process, as numbers: what a request reads of its candidates is one look-up and
one gather, whatever is known of how many items.

Rows come from the tables that the last `materialize` sent online, read as columns, where this machine
has them (`published_rows`), and from the online store otherwise. A table is built beside the one in
use and swapped for it at once; no request waits for the store or for a refresh.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice, repeat

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from feature_repo.contract.arrow import arrow_schema, arrow_type, micros
from feature_repo.contract.contract import Contract
from feature_repo.contract.key_index import KeyIndex
from feature_repo.contract.schema import EVENT_TIMESTAMP, Column
from feature_repo.errors import ExpectedError
from feature_repo.history.history import newest_rows
from feature_repo.home.tables import JobFolder
from feature_repo.settings import Settings
from modeling.inputs.encoder import Encoder
from modeling.inputs.items import ItemNumbers, ReadShares, shares_among, with_shares

Id = int | str
ReadItems = Callable[[Sequence[Id]], pa.Table]
# Ids remembered as unknown to the store
MAX_ABSENT = 100_000
ABSENT_S = 10.0  # for so long
# Ids whose place is kept beside the index
MAX_HOT = 200_000
# Ids that wait to be looked up
MAX_SOUGHT = 10_000
# After the store could not be read
PAUSE_S = 1.0
# Ids of one look-up
LOOK_UP = 500
# Share of a processor for look-ups
LOOK_UP_SHARE = 0.05
# For a read that is under way, at the end
CLOSE_S = 10.0
BATCH_ROWS = 1 << 16
logger = logging.getLogger(__name__)

# Tables of items, and the jobs that build them
ITEM_TABLES = {"item_profile": "events", "item_stats": "item_stats"}


class NotYetError(LookupError):
    """The items of a run that is not online yet: an ordinary moment, and the last ones stay in use."""


def item_columns(contract: Contract) -> list[tuple[str, Column]]:
    """Every item feature with its view."""
    return [
        (view, column)
        for view in (*ITEM_TABLES, *contract.views_of("item"))
        for column in contract.table(view).columns
    ]


@dataclass(frozen=True)
class Loaded:
    """Rows of items, and as of when, microseconds; None where that is not known."""

    rows: pa.Table
    as_of: int | None = None


def published_rows(settings: Settings, contract: Contract) -> Loaded | None:
    """Every item's id and features as the last `materialize` sent them online, from its own tables.

    None where that cannot be said: the tables are not here or were rebuilt since, or items have views
    of a person's own, which may be pushed.
    """
    if contract.views_of("item"):
        return None
    # 1. Find the tables from which the last `materialize` was made.
    sent = JobFolder(settings.home, "materialize").manifest()
    if sent is None or sent.fingerprint != contract.fingerprint:
        return None
    key = contract.item.join_key
    tables: list[pa.Table] = []
    ids: list[pa.Array] = []
    for view, job in ITEM_TABLES.items():
        folder = JobFolder(settings.home, job)
        manifest = folder.manifest()
        # A table that was rebuilt since holds what the online store does not.
        if manifest is None or manifest.digest != sent.inputs.get(job):
            return None
        rows = newest_of(folder, contract, view, sent.as_of_micros)
        tables.append(rows)
        ids.append(rows[key].combine_chunks())
    # 2. Join the views by item; an item that a view lacks gets nulls.
    every = pc.unique(pa.concat_arrays(ids))
    columns = {key: every}
    for view, rows in zip(ITEM_TABLES, tables, strict=True):
        places = KeyIndex(rows[key].combine_chunks()).places(every)
        taken = rows.take(pa.array(places, mask=places < 0))
        for column in contract.table(view).columns:
            columns[column.name] = taken[column.name].cast(arrow_type(column.dtype))
    return Loaded(pa.table(columns), sent.as_of_micros)


def newest_of(folder: JobFolder, contract: Contract, view: str, until: int) -> pa.Table:
    """The newest row of each key up to a time, microseconds: read a batch at a time, since a table holds
    every snapshot of every item and one row of each stays.
    """
    key = contract.item.join_key
    kept = arrow_schema(contract.table(view)).empty_table()
    for path in folder.paths(view):
        with pq.ParquetFile(folder.open(path), pre_buffer=False) as file:
            pieces = [kept]
            for batch in file.iter_batches(BATCH_ROWS, use_threads=False):
                rows = pa.Table.from_batches([batch])
                known = pa.array(micros(rows[EVENT_TIMESTAMP]) <= until)
                pieces.append(newest_rows(rows.filter(known), key))
        kept = newest_rows(pa.concat_tables(pieces), key).combine_chunks()
    return kept


@dataclass(frozen=True)
class _Rows:
    index: KeyIndex
    numbers: ItemNumbers


class KnownItems:
    """All items at one time; nothing of it changes, but for what is remembered of look-ups.

    Places count through what was loaded, then through what was looked up since.
    """

    def __init__(self, base: _Rows, added: _Rows, shares: ReadShares) -> None:
        self.base = base
        self.added = added
        # As of when the items were loaded; what is looked up since is read with the same ones.
        self.shares = shares
        self._kind = base.index.keys.type
        # Ids that requests ask for, as they come: a tenth of the cost of hashing them into the index.
        self._hot: dict[Id, int] = {}

    def __len__(self) -> int:
        return len(self.base.index) + len(self.added.index)

    @property
    def nbytes(self) -> int:
        """Bytes of the items' numbers, ids and index; not of ids that were asked for lately."""
        rows = (self.base, self.added)
        return sum(one.numbers.nbytes + one.index.nbytes for one in rows)

    def places(self, item_ids: Sequence[Id]) -> np.ndarray:
        """Return the places of items, int64; -1 for one that is not here."""
        hot = self._hot
        found = np.fromiter(map(hot.get, item_ids, repeat(-2)), np.int64, len(item_ids))
        cold = np.flatnonzero(found == -2)
        if len(cold):
            asked = [item_ids[at] for at in cold.tolist()]
            found[cold] = self._indexed(pa.array(asked, self._kind))
            if len(hot) + len(asked) > MAX_HOT:
                hot.clear()
            # One that is not here may be any text that a caller makes up: it is not kept.
            hot.update(
                (key, at) for key, at in zip(asked, found[cold].tolist(), strict=True) if at >= 0
            )
        return found

    def numbers(self, places: np.ndarray) -> ItemNumbers:
        """Numbers of items by place; one at -1 gets arbitrary ones, for the caller to replace."""
        base = len(self.base.index)
        if not len(places) or places.max() < base:
            return self.base.numbers.take(np.maximum(places, 0))
        later = np.flatnonzero(places >= base)
        rows = self.base.numbers.take(np.where(places < base, np.maximum(places, 0), 0))
        return rows.with_rows(later, self.added.numbers.take(places[later] - base))

    @cached_property
    def vocabulary_row(self) -> np.ndarray:
        """Row of the vocabulary of each item, by place."""
        return _one_behind_the_other(
            self.base.numbers.vocabulary_row, self.added.numbers.vocabulary_row
        )

    @cached_property
    def relation_row(self) -> np.ndarray:
        """Row of the relations of each item, by place."""
        return _one_behind_the_other(
            self.base.numbers.relation_row, self.added.numbers.relation_row
        )

    def _indexed(self, ids: pa.Array) -> np.ndarray:
        places = self.base.index.places(ids)
        lacking = np.flatnonzero(places < 0)
        if len(lacking) and len(self.added.index):
            later = self.added.index.places(ids.take(pa.array(lacking)))
            places[lacking] = np.where(later >= 0, later + len(self.base.index), -1)
        return places


def _one_behind_the_other(rows: np.ndarray, added: np.ndarray) -> np.ndarray:
    return np.concatenate([rows, added]) if len(added) else rows


@dataclass(frozen=True)
class Taken:
    """Some items in order.

    Args:
        numbers: of each; of an unknown one those of an item without any features.
        places: in `known`; -1 of an unknown one.
        unknown: items that the table lacks.
        known: what they were taken from.
    """

    numbers: ItemNumbers
    places: np.ndarray
    unknown: list[Id]
    known: KnownItems


class ItemTable:
    """See the module docstring.

    Args:
        encoder: of the bundle that ranks with them.
        read: rows of items from the online store, a row for each id, nulls where it has none.
        load: all items that are known, called at start and for each refresh.
        refresh_s: seconds between refreshes; 0 for none.

    Raises:
        LookupError: there is no item.
    """

    def __init__(
        self,
        encoder: Encoder,
        read: ReadItems,
        load: Callable[[], Loaded],
        refresh_s: float = 0.0,
    ) -> None:
        self._encoder = encoder
        self._read = read
        self._load = load
        self._kind = arrow_type(encoder.contract.item.dtype)
        self._names = [column.name for _, column in item_columns(encoder.contract)]
        self._shown = {c.name: arrow_type(c.dtype) for c in encoder.contract.spec.shown_features}
        self._absent: dict[Id, float] = {}  # and until when
        self._sought: dict[Id, None] = {}
        self._changed = threading.Lock()
        self._wake = threading.Event()
        self._stop = threading.Event()
        self.known, self.as_of = self._loaded()
        self._refresh_s = refresh_s
        self._due = time.monotonic() + refresh_s if refresh_s else math.inf
        self._thread = threading.Thread(target=self._keep_up, daemon=True, name="items")
        self._thread.start()

    def __len__(self) -> int:
        return len(self.known)

    def take(self, item_ids: Sequence[Id]) -> Taken:
        """These items in order. One that the table lacks is unknown to this request, and is looked up
        in the store behind it.
        """
        known = self.known
        places = known.places(item_ids)
        numbers = known.numbers(places)
        lacking = np.flatnonzero(places < 0)
        if not len(lacking):
            return Taken(numbers, places, [], known)
        ids = [item_ids[at] for at in lacking.tolist()]
        # Its row of the vocabulary and its code are an unknown item's own all the same.
        bare = self._without_features(pa.array(ids, self._kind))
        unknown = list(dict.fromkeys(ids))
        self._seek(unknown)
        return Taken(numbers.with_rows(lacking, bare), places, unknown, known)

    def refresh(self) -> None:
        """Load every known item again and swap the table; what was looked up since is read again too.

        Raises:
            LookupError: there is no item any more; the last features stay in use.
        """
        loaded, as_of = self._loaded()
        added = self.known.added.index.keys
        lacking = np.flatnonzero(loaded.base.index.places(added) < 0)
        if len(lacking):
            rows = self._rows(self._read(added.take(pa.array(lacking)).to_pylist()))
            loaded = KnownItems(loaded.base, self._shared(rows, loaded.shares), loaded.shares)
        with self._changed:
            self.known = loaded
            self.as_of = as_of

    def look_up(self) -> None:
        """Look up in the store what requests asked for in vain, at most `LOOK_UP` at a time."""
        with self._changed:
            sought = list(islice(self._sought, LOOK_UP))
            for key in sought:
                del self._sought[key]
            # A request may ask for an id while its look-up runs.
            known = self.known.places(sought)
            sought = [key for key, at in zip(sought, known.tolist(), strict=True) if at < 0]
        if not sought:
            return
        rows = self._shared(self._rows(self._read(sought)), self.known.shares)
        now = time.monotonic()
        found = set(rows.index.keys.to_pylist())
        gone = [key for key in sought if key not in found]
        # Made before the lock is taken: requests wait for it. Only this thread changes `known`.
        base = self.known.base
        added = self.known.added
        keys = pa.concat_arrays([added.index.keys, rows.index.keys])
        numbers = ItemNumbers.joined([added.numbers, rows.numbers])
        known_now = KnownItems(base, _Rows(KeyIndex(keys), numbers), self.known.shares)
        absent = {key: until for key, until in self._absent.items() if until > now}
        # The bound keeps made-up ids from filling the memory.
        absent |= dict.fromkeys(gone[: MAX_ABSENT - len(absent)], now + ABSENT_S)
        with self._changed:
            self._absent = absent
            self.known = known_now

    def refresh_soon(self) -> None:
        """Load every item again now, rather than when it is due."""
        self._due = 0.0
        self._wake.set()

    def close(self) -> None:
        """Stop keeping up; what is under way ends first."""
        self._stop.set()
        self._wake.set()
        self._thread.join(timeout=CLOSE_S)

    def _seek(self, unknown: list[Id]) -> None:
        now = time.monotonic()
        new = [key for key in unknown if self._absent.get(key, 0.0) < now]
        if not new:
            return
        with self._changed:
            room = MAX_SOUGHT - len(self._sought)
            self._sought |= dict.fromkeys(new[:room])
        self._wake.set()

    def _loaded(self) -> tuple[KnownItems, int | None]:
        loaded = self._load()
        rows = self._rows(loaded.rows)
        # What tables took to be read
        pa.default_memory_pool().release_unused()
        if not len(rows.index):
            raise LookupError(
                "no item has any features: run `python -m beam_jobs materialize`; what was loaded before stays in use"
            )
        shares = shares_among(self._encoder.contract, rows.numbers)
        rows = self._shared(rows, shares)
        nothing = pa.array([], self._kind)
        added = _Rows(KeyIndex(nothing), rows.numbers.take(np.zeros(0, np.int64)))
        return KnownItems(rows, added, shares), loaded.as_of

    def _shared(self, rows: _Rows, shares: ReadShares) -> _Rows:
        """Rows with the shares of their values."""
        return _Rows(rows.index, with_shares(self._encoder.contract, rows.numbers, shares))

    def _rows(self, table: pa.Table) -> _Rows:
        """Those rows in which anything is known."""
        known = pa.array(np.zeros(table.num_rows, bool))
        for name in self._names:
            known = pc.or_(known, table[name].combine_chunks().is_valid())
        table = table.filter(known).combine_chunks()
        ids = table[self._encoder.contract.item.join_key].combine_chunks()
        columns = {name: table[name].combine_chunks() for name in self._names}
        return _Rows(KeyIndex(ids), self._numbers(columns, ids))

    def _without_features(self, ids: pa.Array) -> ItemNumbers:
        columns = {
            column.name: pa.nulls(len(ids), arrow_type(column.dtype))
            for _, column in item_columns(self._encoder.contract)
        }
        return self._numbers(columns, ids)

    def _numbers(self, columns: dict[str, pa.Array], ids: pa.Array) -> ItemNumbers:
        # Nothing is known of impressions that are yet to come.
        shown = {name: pa.nulls(len(ids), kind) for name, kind in self._shown.items()}
        return self._encoder.item_numbers({**columns, **shown}, ids)

    def _keep_up(self) -> None:
        """Look up what is sought as it comes, and refresh now and then."""
        while not self._stop.is_set():
            left = self._due - time.monotonic()
            self._wake.wait(None if math.isinf(left) else max(left, 0))
            self._wake.clear()
            if self._stop.is_set():
                return
            began = time.thread_time()
            self._try(self.look_up)
            # Made-up ids must not take the processor from rankings, however many are asked for.
            self._stop.wait((time.thread_time() - began) * (1 / LOOK_UP_SHARE - 1))
            if self._sought:
                self._wake.set()
            if time.monotonic() >= self._due:
                self._due = time.monotonic() + self._refresh_s if self._refresh_s else math.inf
                self._try(self.refresh)

    def _try(self, work: Callable[[], None]) -> None:
        try:
            work()
        except NotYetError as error:
            logger.info("items are not read yet: %s", error)
        except Exception as error:
            known = isinstance(error, ExpectedError | LookupError)
            logger.error(
                "items could not be read; the last features stay in use: %s",
                error,
                exc_info=None if known else error,
            )
            # What asks for an unknown item asks again; a store that fails is not asked at once.
            self._stop.wait(PAUSE_S)
