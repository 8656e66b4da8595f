"""Two stored forms of a user's history: the history log that training slices, and the packed
history that serving reads.

**History log**: one row per user, columns are lists of events, oldest first; one Arrow IPC file per
partition, read by memory map. Item ids are dictionary-encoded within a part; what a sketch counts of
an item besides (`schema.Memory`) stands beside it, as codes. A history is the slice
`[history_end - L, history_end)` of a user's row, where `history_end` comes from the feature view
`user_stats`: the point-in-time join carries eight bytes for each example, whatever L is. Of a user with events
that arrived late, or that a later line replaced, the log also holds from when and until when each was known
(`known.py`); there a history is what was known at the request's time, and `history_end` its length.

**Packed history**: the newest N events of one user as bytes, the value of the feature view
`user_history`:

    magic "MHIS" 4 | layout u8 | events u32 | Arrow IPC stream, columns by name | crc32 u32

Columns of more than some events are LZ4 frames; of fewer, and of what older versions packed, they are plain.

The checksum is seeded with the user's key, so another user's value under this key is noticed as
well. Columns are read by name and type: a reader of an older contract finds what it knows and
leaves the rest.

**Digest of a past**: `event_digests` gives each event a number that depends on all of its columns;
the sum over a history, modulo 2⁶⁴, is another one when any of its events was corrected, struck or
moved in time, and is the same in whatever order events became known.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from feature_repo.contract.arrow import (
    LATEST,
    NO_VALUE,
    hash_keys,
    history_schema,
    micros,
    value_codes,
)
from feature_repo.contract.contract import Contract
from feature_repo.contract.key_index import KeyIndex
from feature_repo.contract.schema import (
    CREATED_TIMESTAMP,
    EVENT_TIMESTAMP,
    MAX_BAG,
    Column,
    DType,
    Kind,
)
from feature_repo.history.known import NEVER, is_on_time, known_from, replaced_at
from feature_repo.home.tables import JobFolder

# Columns of a log part that holds events which arrived late or were replaced, in microseconds
KNOWN_FROM = "known_from"
REPLACED_AT = "replaced_at"
MAGIC = b"MHIS"
LAYOUT = 2
_HEADER = struct.Struct("<4sBI")
# Events up to which LZ4's frames cost more bytes than they save
PLAIN_EVENTS = 16
# Arrow would hand each small column to a thread: five times the time of decompressing it
_READ = pa.ipc.IpcReadOptions(use_threads=False)
_CRC = struct.Struct("<I")


class HistoryError(ValueError):
    """Stored bytes are no packed history of this user, or lack what is read of one; the message
    says what differs.
    """


def pack(contract: Contract, user_id: int | str, events: pa.Table) -> bytes:
    """Pack a user's events, oldest first.

    Args:
        events: columns of `contract.history_columns`.
    """
    # A copy: what is written of a slice is padded with bytes of the rows beside it, which may be
    # another user's.
    whole = events.cast(history_schema(contract)).combine_chunks()
    whole = whole.take(pa.array(np.arange(whole.num_rows)))
    sink = pa.BufferOutputStream()
    # Compression saves two fifths of the bytes of some hundreds of events.
    compression = "lz4" if whole.num_rows > PLAIN_EVENTS else None
    options = pa.ipc.IpcWriteOptions(compression=compression, use_threads=False)
    with pa.ipc.new_stream(sink, whole.schema, options=options) as writer:
        writer.write_table(whole)
    body = _HEADER.pack(MAGIC, LAYOUT, whole.num_rows) + sink.getvalue().to_pybytes()
    return body + _CRC.pack(checksum(user_id, body))


def unpack(contract: Contract, user_id: int | str, data: bytes) -> pa.RecordBatch:
    """The events of a packed history, oldest first; columns of `contract.history_columns`.

    Raises:
        HistoryError: damaged, truncated, in an unknown layout, stored for a different user, without a
            column that the contract has, or with a value that no event can have.
    """
    # 1. Read the header: a value of another kind or layout gets a message that says so.
    if len(data) < _HEADER.size + _CRC.size:
        raise HistoryError(
            f"packed history of user {user_id!r} has {len(data)} bytes: too short to be one"
        )
    magic, layout, count = _HEADER.unpack_from(data)
    if magic != MAGIC:
        raise HistoryError(
            f"value of user {user_id!r} starts with {magic!r}, not {MAGIC!r}: no packed history"
        )
    if layout != LAYOUT:
        raise HistoryError(
            f"packed history of user {user_id!r} has layout {layout}; this version reads {LAYOUT}"
        )
    # 2. Compare the checksum before any byte of the body is interpreted.
    body = data[: -_CRC.size]
    (crc,) = _CRC.unpack_from(data, len(data) - _CRC.size)
    if crc != checksum(user_id, body):
        raise HistoryError(
            f"packed history of user {user_id!r} fails its checksum: damaged, or another user's"
        )
    # 3. Read the events.
    try:
        # LZ4 makes of a byte 255 at most, so that what is stored bounds what is read.
        whole = pa.ipc.open_stream(pa.py_buffer(body[_HEADER.size :]), options=_READ).read_all()
        # Bytes that are not ours may point anywhere: unchecked, they end the process
        whole.validate(full=True)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise HistoryError(
            f"packed history of user {user_id!r} is no Arrow stream: {error}"
        ) from error
    if whole.num_rows != count:
        raise HistoryError(
            f"packed history of user {user_id!r} holds {whole.num_rows} events, its header says {count}"
        )
    return _checked(contract, user_id, whole)


def _checked(contract: Contract, user_id: int | str, whole: pa.Table) -> pa.RecordBatch:
    """Columns that the contract reads, of the right types, without nulls, numbers finite, times in
    order.
    """
    # 1. Check each column that the contract reads; further columns are left alone.
    schema = history_schema(contract)
    for field, declared in zip(schema, contract.history_columns, strict=True):
        position = whole.schema.get_field_index(field.name)
        if position < 0 or whole.schema.field(position).type != field.type:
            raise HistoryError(
                f"packed history of user {user_id!r} has no column {field.name} of type {field.type}: it was written under "
                "another contract; rebuild and materialise user_history"
            )
        column = whole.column(position)
        if column.null_count and not declared.nullable:
            raise HistoryError(f"packed history of user {user_id!r} holds nulls in {field.name}")
        values = pc.list_flatten(column) if pa.types.is_list(field.type) else column
        # One NaN in a history would make every score of the user NaN.
        if pa.types.is_floating(values.type) and pc.all(pc.is_finite(values)).as_py() is False:
            raise HistoryError(
                f"packed history of user {user_id!r} holds NaN or infinity in {field.name}"
            )
    # 2. Check the times: readers search in them and rely on their order.
    times = micros(whole[EVENT_TIMESTAMP])
    if (np.diff(times) < 0).any() or (times < 0).any() or (times >= LATEST).any():
        raise HistoryError(
            f"packed history of user {user_id!r} is not in the order of time, or of no year that there is"
        )
    chosen = whole.select(schema.names).cast(schema).combine_chunks()
    return (
        chosen.to_batches()[0] if chosen.num_rows else pa.RecordBatch.from_pylist([], schema=schema)
    )


def checksum(user_id: int | str, body: bytes) -> int:
    """CRC-32 seeded with a user's key: bytes stored for another user do not match."""
    return zlib.crc32(body, zlib.crc32(str(user_id).encode()))


def event_digests(item_hashes: np.ndarray, columns: Mapping[str, np.ndarray]) -> np.ndarray:
    """A number for each event that no other event has: int64.

    Args:
        item_hashes: `hash_keys` of each event's item.
        columns: the events' other columns by name, times in microseconds.
    """
    with np.errstate(over="ignore"):
        mixed = item_hashes.astype(np.uint64)
        for name in sorted(columns):
            for bits in np.atleast_2d(_bits(columns[name]).T):
                named = bits.astype(np.uint64) + np.uint64(zlib.crc32(name.encode()))
                mixed = _mix(mixed ^ named)
        # Once more, for a sum over events must not undo what the last column mixed.
        return _mix(mixed + np.uint64(0x9E3779B97F4A7C15)).view(np.int64)


def _bits(values: np.ndarray) -> np.ndarray:
    """Numbers as whole ones; every NaN is the same."""
    if not np.issubdtype(values.dtype, np.floating):
        return values
    one_nan = np.where(np.isnan(values), np.array(np.nan, values.dtype), values)
    return one_nan.view(np.uint32 if values.dtype == np.float32 else np.uint64)


def extended_digest(contract: Contract, digest: int, events: pa.Table | pa.RecordBatch) -> int:
    """Digest of a past with further events."""
    hashes = hash_keys(events[contract.item.join_key])
    with np.errstate(over="ignore"):
        return int(np.int64(digest) + event_digests(hashes, event_columns(contract, events)).sum())


def _mix(values: np.ndarray) -> np.ndarray:
    """Spread every bit over all 64 (the finaliser of MurmurHash3)."""
    values = (values ^ (values >> np.uint64(33))) * np.uint64(0xFF51AFD7ED558CCD)
    values = (values ^ (values >> np.uint64(33))) * np.uint64(0xC4CEB9FE1A85EC53)
    return values ^ (values >> np.uint64(33))


def event_columns(contract: Contract, events: pa.Table | pa.RecordBatch) -> dict[str, np.ndarray]:
    """An event's columns beside its item, as `Histories` holds them: numbers, NaN where one is
    missing; times in microseconds; texts as codes (`arrow.value_codes`); several categories or
    numbers of an event in a row of their own.
    """
    return {
        c.name: as_numbers(c, events[c.name])
        for c in contract.history_columns
        if c.name != contract.item.join_key
    }


def as_numbers(column: Column, values: pa.Array | pa.ChunkedArray) -> np.ndarray:
    """A column of events as `event_columns` says."""
    whole = values.combine_chunks() if isinstance(values, pa.ChunkedArray) else values
    if column.dtype is DType.TIMESTAMP:
        if not whole.null_count and pa.types.is_timestamp(whole.type):
            return whole.view(pa.int64()).to_numpy()
        return pc.fill_null(pc.cast(whole, pa.int64()), NO_VALUE).to_numpy(zero_copy_only=False)
    if column.dtype is DType.STRING or column.kind is Kind.CATEGORY:
        return value_codes(whole)
    if column.dtype is DType.STRING_LIST:
        codes = value_codes(pc.list_flatten(whole))
        return _in_rows(whole, codes, column.max_length or MAX_BAG, NO_VALUE)
    if column.dtype is DType.FLOAT32_LIST:
        numbers = pc.list_flatten(whole).to_numpy(zero_copy_only=False)
        return _in_rows(whole, numbers, column.max_length or 0, np.nan)
    if whole.null_count:
        kind = whole.type if pa.types.is_floating(whole.type) else pa.float64()
        return pc.fill_null(pc.cast(whole, kind, safe=False), np.nan).to_numpy(zero_copy_only=False)
    if column.nullable and not pa.types.is_floating(whole.type):
        whole = pc.cast(whole, pa.float64(), safe=False)
    return whole.to_numpy(zero_copy_only=False)


def _in_rows(lists: pa.Array, values: np.ndarray, width: int, missing: float) -> np.ndarray:
    """Lists as rows of one width: what is longer is cut, what is shorter filled up."""
    lengths = pc.fill_null(pc.list_value_length(lists), 0).to_numpy(zero_copy_only=False)
    place = np.arange(len(values)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    rows = np.full((len(lists), width), missing, values.dtype)
    rows[np.arange(width) < lengths[:, None]] = values[place < width]
    return rows


def sum_names(contract: Contract) -> tuple[str, str]:
    """Columns of the exact sum of the dataset's `stat_value`: its upper and its lower half."""
    value = contract.spec.stat_value
    return f"user_sum_{value}_high", f"user_sum_{value}_low"


def mean_names(contract: Contract) -> tuple[str, str]:
    """Columns of `user_stats` that keep the mean of the dataset's number, and of how many events."""
    value = contract.spec.stat_value
    return f"user_mean_{value}", f"user_num_{value}"


def log_part(
    contract: Contract, events: pa.Table, remembered: Sequence[np.ndarray] = ()
) -> pa.RecordBatch:
    """One partition's events as a log part: one row per user, list columns, item ids
    dictionary-encoded.

    Args:
        events: sorted by (user, time, source position); columns of the `events` table.
        remembered: codes of the items' remembered columns, as they were at each event.
    """
    user_column = events[contract.user.join_key].combine_chunks()
    starts = run_starts(user_column)
    offsets = pa.array(np.r_[starts, len(user_column)], pa.int64())
    arrays: list[pa.Array] = [user_column.take(pa.array(starts))]
    names = [contract.user.join_key]
    for column in contract.history_columns:
        values = events[column.name].combine_chunks()
        if column.name == contract.item.join_key:
            values = _sorted_dictionary(values)
        elif column.name != EVENT_TIMESTAMP:
            values = _stored(as_numbers(column, values))
        arrays.append(pa.LargeListArray.from_arrays(offsets, values))
        names.append(column.name)
    for column, codes in zip(contract.remembered, remembered, strict=True):
        arrays.append(pa.LargeListArray.from_arrays(offsets, _stored(codes)))
        names.append(remembered_name(column.name))
    # Most logs hold no late event, and none pays for those that do.
    if not is_on_time(events):
        for name, values in ((KNOWN_FROM, known_from(events)), (REPLACED_AT, replaced_at(events))):
            arrays.append(pa.LargeListArray.from_arrays(offsets, pa.array(values)))
            names.append(name)
    return pa.RecordBatch.from_arrays(arrays, names=names)


def remembered_name(column: str) -> str:
    """Under which a remembered column of items stands in the log: events may have one of its name."""
    return f"item:{column}"


def _stored(numbers: np.ndarray) -> pa.Array:
    """Numbers of events as a column of the log."""
    if numbers.ndim == 1:
        return pa.array(numbers)
    return pa.FixedSizeListArray.from_arrays(pa.array(numbers.ravel()), numbers.shape[1])


def _loaded(values: pa.Array) -> np.ndarray:
    """Read what `_stored` wrote, without a copy."""
    if not pa.types.is_fixed_size_list(values.type):
        return values.to_numpy()
    return values.flatten().to_numpy().reshape(len(values), values.type.list_size)


def run_starts(keys: pa.Array) -> np.ndarray:
    """Positions at which a new key starts, for keys that stand together."""
    if not len(keys):
        return np.zeros(0, np.int64)
    changed = pc.not_equal(keys.slice(1), keys.slice(0, len(keys) - 1)).to_numpy(
        zero_copy_only=False
    )
    return np.flatnonzero(np.r_[True, changed])


def run_ends(starts: np.ndarray, length: int) -> np.ndarray:
    """Ends of the runs that start at `starts` in a column of this length."""
    return np.r_[starts[1:], length].astype(np.int64)[: len(starts)]


def newest_rows(rows: pa.Table, key: str) -> pa.Table:
    """The newest row of each key of a table with event timestamps; of equal ones that made last."""
    made = [CREATED_TIMESTAMP] if CREATED_TIMESTAMP in rows.column_names else []
    rows = rows.sort_by([(name, "ascending") for name in (key, EVENT_TIMESTAMP, *made)])
    return rows.take(pa.array(run_ends(run_starts(rows[key].combine_chunks()), rows.num_rows) - 1))


def _sorted_dictionary(values: pa.Array) -> pa.DictionaryArray:
    encoded = values.dictionary_encode()
    order = pc.array_sort_indices(encoded.dictionary).to_numpy()
    rank = np.empty(len(order), np.int32)
    rank[order] = np.arange(len(order), dtype=np.int32)
    return pa.DictionaryArray.from_arrays(
        pa.array(rank[encoded.indices.to_numpy()]), encoded.dictionary.take(pa.array(order))
    )


@dataclass(frozen=True)
class Histories:
    """Events of several requests, flat: request b owns `[offsets[b], offsets[b + 1])`, oldest
    first.

    `item_keys` are integers; equal ones mean the same item (within this object and the
    `item_keys` of the candidates that came with it); `columns` hold the other event columns, times
    in microseconds.
    """

    offsets: np.ndarray
    item_keys: np.ndarray
    columns: dict[str, np.ndarray]

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.offsets)

    @property
    def times(self) -> np.ndarray:
        return self.columns[EVENT_TIMESTAMP]

    def digests(self, item_hash_of_key: np.ndarray) -> np.ndarray:
        """Digest of the events up to and including each one, int64; see `event_digests`."""
        each = event_digests(item_hash_of_key[self.item_keys], self.columns)
        running = np.cumsum(each)
        before = np.r_[0, running][self.offsets[:-1]]
        return running - np.repeat(before, self.lengths)

    def newest(self, length: int | np.ndarray) -> Histories:
        """The newest `length` events of each request, one number for all or one for each."""
        return self.take(np.maximum(self.offsets[1:] - length, self.offsets[:-1]), self.offsets[1:])

    def take(self, starts: np.ndarray, ends: np.ndarray) -> Histories:
        """Any slices `[starts[b], ends[b])` as the histories of new requests."""
        lengths = ends - starts
        offsets = np.r_[0, np.cumsum(lengths)]
        flat = np.arange(offsets[-1]) + np.repeat(starts - offsets[:-1], lengths)
        return Histories(
            offsets,
            self.item_keys[flat],
            {name: column[flat] for name, column in self.columns.items()},
        )


def _open_part(folder: JobFolder, path: str) -> pa.RecordBatch:
    try:
        part = pa.ipc.open_file(folder.open(path)).get_batch(0)
        # Offsets and codes that point elsewhere would end the process when they are followed
        part.validate(full=True)
    except (pa.ArrowException, OSError) as error:
        raise HistoryError(
            f"{path} is damaged: {error}. Run `python -m beam_jobs user_history` again"
        ) from error
    return part


class HistoryLog:
    """The history log, memory-mapped; item keys are row numbers of `items`, the sorted ids of all
    parts.

    Args:
        contract: the dataset's contract.
        folder: job folder of `user_history`.
        paths: only these parts; default: all.

    Raises:
        HistoryError: a part is damaged.
    """

    def __init__(
        self, contract: Contract, folder: JobFolder, paths: Sequence[str] | None = None
    ) -> None:
        self.contract = contract
        paths = folder.paths("history_log") if paths is None else paths
        parts = [_open_part(folder, path) for path in paths]
        # 1. Number the items through all parts: each part has a dictionary for itself.
        item = contract.item.join_key
        user = contract.user.join_key
        self.items: pa.Array = pc.unique(
            pa.concat_arrays([part[item].values.dictionary for part in parts])
        ).sort()
        self._item_key = [
            pc.index_in(part[item].values.dictionary, self.items).to_numpy() for part in parts
        ]
        self._codes = [part[item].values.indices.to_numpy() for part in parts]
        # 2. Map the other columns, one array for each part.
        self._columns = {
            c.name: [
                micros(part[c.name].values)
                if c.name == EVENT_TIMESTAMP
                else _loaded(part[c.name].values)
                for part in parts
            ]
            for c in contract.history_columns
            if c.name != item
        }
        # The names are noted before remembered columns join, which describe items, not events.
        self._of_events = tuple(self._columns)
        for column in contract.remembered:
            name = remembered_name(column.name)
            self._columns[name] = [_loaded(part[name].values) for part in parts]
        # 3. Note where the events of each user are: part, first event and number.
        self.users: pa.Array = pa.concat_arrays([part[user] for part in parts])
        self._start = np.concatenate([part[item].offsets.to_numpy()[:-1] for part in parts])
        self._count = np.concatenate([np.diff(part[item].offsets.to_numpy()) for part in parts])
        self._part = np.repeat(np.arange(len(parts)), [part.num_rows for part in parts])
        # 4. Note of which users somebody may have known something else than the log's beginning.
        self._known: dict[int, np.ndarray] = {}
        self._replaced: dict[int, np.ndarray] = {}
        self._late = np.zeros(len(self.users), bool)
        self.lengths: np.ndarray = self._count.copy()
        for number, part in enumerate(parts):
            if KNOWN_FROM in part.schema.names:
                self._known[number] = part[KNOWN_FROM].values.to_numpy()
                self._replaced[number] = part[REPLACED_AT].values.to_numpy()
                self._note_late(number)

    def _note_late(self, part: int) -> None:
        rows = np.flatnonzero(self._part == part)
        starts = self._start[rows]
        late = self._known[part] > self._columns[EVENT_TIMESTAMP][part]
        replaced = self._replaced[part] != NEVER
        self._late[rows] = np.logical_or.reduceat(late | replaced, starts)
        self.lengths[rows] -= np.add.reduceat(replaced.astype(np.int64), starts)

    def any_late(self, rows: np.ndarray) -> bool:
        """Return whether events of any of these users arrived late or were replaced."""
        return bool(self._late[rows[rows >= 0]].any())

    def rows_of(self, user_ids: pa.Array) -> np.ndarray:
        """Row of each user in the log, -1 where the log has none."""
        return self._index.places(user_ids)

    @cached_property
    def _index(self) -> KeyIndex:
        return KeyIndex(self.users)

    @cached_property
    def item_hashes(self) -> np.ndarray:
        """`hash_keys` of each item key, for digests."""
        return hash_keys(self.items)

    def gather(
        self,
        rows: np.ndarray,
        history_end: np.ndarray,
        length: int | None = None,
        columns: Sequence[str] | None = None,
        times: np.ndarray | None = None,
    ) -> Histories:
        """Late gather: events `[history_end - length, history_end)` of each row; all up to
        `history_end` without a length.

        Args:
            rows: of the users in the log, -1 for a user that it does not have.
            history_end: how many events are known of each.
            columns: only these beside the items; default: all that events have.
            times: of the requests, microseconds; default: the end of the log.

        Raises:
            HistoryError: `history_end` is not what the log says was known then; the log and the index
                are of different runs.
        """
        ends = np.where(rows >= 0, history_end, 0)
        if (beyond := ends > self._of_known(self._count, rows)).any():
            row = int(rows[np.flatnonzero(beyond)[0]])
            raise HistoryError(
                f"history_end {int(ends[beyond][0])} of user {self.users[row]} lies beyond the {int(self._count[row])} events in the "
                "log: index and log are of different runs; run `python -m beam_jobs user_history` and `feast apply` again"
            )
        # Places of the chosen events in their parts, all requests in one flat array.
        starts = np.zeros_like(ends) if length is None else np.maximum(ends - length, 0)
        lengths = ends - starts
        offsets = np.r_[0, np.cumsum(lengths)]
        base = self._of_known(self._start, rows) + starts
        flat = np.arange(offsets[-1]) + np.repeat(base - offsets[:-1], lengths)
        # Of some users the events that were known do not lie side by side.
        for place in np.flatnonzero((rows >= 0) & self._late[rows]) if len(self._known) else ():
            time = NEVER if times is None else int(times[place])
            known = self._known_places(int(rows[place]), time, int(ends[place]))
            flat[offsets[place] : offsets[place + 1]] = known[len(known) - lengths[place] :]
        owner = np.repeat(self._of_known(self._part, rows), lengths)
        item_keys = np.empty(len(flat), np.int64)
        names = self._of_events if columns is None else columns
        chosen = {name: self._columns[name] for name in names}
        found = {
            name: np.empty((len(flat), *parts[0].shape[1:]), parts[0].dtype)
            for name, parts in chosen.items()
        }
        # Part by part: a part is one memory-mapped file.
        for part in np.unique(owner):
            mine = owner == part
            at = flat[mine]
            item_keys[mine] = self._item_key[part][self._codes[part][at]]
            for name, parts in chosen.items():
                found[name][mine] = parts[part][at]
        return Histories(offsets, item_keys, found)

    def known_at(self, rows: np.ndarray, time: int) -> Histories:
        """All that was known of some users just before a time.

        Args:
            rows: of the users in the log, each there.
            time: microseconds.
        """
        ends = np.array([self._number_known(int(row), time) for row in rows], np.int64)
        return self.gather(rows, ends, times=np.full(len(rows), time))

    def number_known(self, rows: np.ndarray, times: np.ndarray) -> np.ndarray:
        """How many events of each user were known just before a time, int64.

        Args:
            rows: of the users in the log, -1 of a user that it does not have.
            times: microseconds, one for each.
        """
        low = self._of_known(self._start, rows)
        first = low.copy()
        high = low + self._of_known(self._count, rows)
        part = np.where(rows >= 0, self._of_known(self._part, rows), -1)
        # A binary search of all requests at once, in each part's times.
        for number, column in enumerate(self._columns[EVENT_TIMESTAMP]):
            open_ = np.flatnonzero(part == number)
            while len(open_ := open_[low[open_] < high[open_]]):
                middle = (low[open_] + high[open_]) // 2
                before = column[middle] < times[open_]
                low[open_[before]] = middle[before] + 1
                high[open_[~before]] = middle[~before]
        found = low - first
        late = np.flatnonzero((rows >= 0) & self._late[rows]) if self._known else ()
        for place in late:
            found[place] = self._number_known(int(rows[place]), int(times[place]))
        return found

    def _number_known(self, row: int, time: int) -> int:
        if self._late[row]:
            return int(self._are_known(row, time).sum())
        times = self._columns[EVENT_TIMESTAMP][int(self._part[row])][self._span(row)]
        return int(np.searchsorted(times, time))

    def _span(self, row: int) -> slice:
        """Where the events of a user lie in their part."""
        return slice(int(self._start[row]), int(self._start[row] + self._count[row]))

    def _are_known(self, row: int, time: int) -> np.ndarray:
        """For each event of a user of a part that notes it: whether it was known at a time."""
        part = int(self._part[row])
        span = self._span(row)
        known: np.ndarray = self._known[part][span] < time
        return known & (self._replaced[part][span] >= time)

    def _known_places(self, row: int, time: int, number: int) -> np.ndarray:
        """Places in its part of the events of a user that were known at a time.

        Raises:
            HistoryError: there are more or fewer than the index says.
        """
        found: np.ndarray = np.flatnonzero(self._are_known(row, time)) + self._span(row).start
        if len(found) != number:
            raise HistoryError(
                f"history_end {number} of user {self.users[row]} is not the {len(found)} events that the log says were known: "
                "index and log are of different runs; run `python -m beam_jobs user_history` and `feast apply` again"
            )
        return found

    @staticmethod
    def _of_known(values: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Values of the rows that the log has; 0 for the others."""
        found = np.zeros(len(rows), np.int64)
        found[rows >= 0] = values[rows[rows >= 0]]
        return found


def from_batches(
    contract: Contract, batches: Sequence[pa.RecordBatch | None], candidates: pa.Array
) -> tuple[Histories, np.ndarray]:
    """Unpacked histories beside the candidates of the same requests: `Histories`, and the
    candidates' item keys.
    """
    schema = history_schema(contract)
    whole = pa.Table.from_batches([batch for batch in batches if batch is not None], schema)
    item = contract.item.join_key
    ids = pa.concat_arrays([whole[item].combine_chunks(), candidates.cast(schema.field(item).type)])
    keys = ids.dictionary_encode().indices.to_numpy().astype(np.int64)
    offsets = np.r_[0, np.cumsum([0 if batch is None else batch.num_rows for batch in batches])]
    histories = Histories(offsets, keys[: whole.num_rows], event_columns(contract, whole))
    return histories, keys[whole.num_rows :]
