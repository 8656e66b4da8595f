"""Events that came by HTTP, as files of the home: what the log of the online store held (`store/event_log.py`), for
good.

    <home>/received/part-000003-1764402060000000.parquet    user, number, when it was known, the event as text

Files are numbered without gaps and never removed, so that "the first n" says what a run of `events` has read. The
second number is the latest moment, microseconds, from which one of a file's events is known: a run that knows
nothing at or after some time has read the file whole only if that time is later.

A file is written before its entries leave the log, so that a kill between the two loses nothing; what is in both is
one event, by its user and number.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from feature_repo.contract.arrow import arrow_type
from feature_repo.contract.contract import Contract
from feature_repo.contract.schema import EVENT_TIMESTAMP
from feature_repo.home.erased import Erased, erased_of
from feature_repo.home.tables import DRAFT, JobFolder, JobRunningError, digest_of, parquet_bytes
from feature_repo.raw.acknowledged import EVENT, KNOWN, NUMBER
from feature_repo.settings import Settings
from feature_repo.store.event_log import Entry, EventLog, SqliteEventLog, UserId, log_of
from feature_repo.store.online_erase import OnlineEraser
from feature_repo.store.store import ONLINE, local_file, open_store

FOLDER = "received"
# Says how many of the files have left the log
TRIMMED = "trimmed.json"
NAME = re.compile(r"part-(\d+)-(\d+)\.parquet")
# Entries of a file
MAX_ROWS = 1_000_000
# Users whose entries are read at once
PIECE = 1000
# A log is trimmed in less, seconds
TRIM_S = 60.0


@dataclass(frozen=True)
class ReceivedFile:
    """A file of events.

    Args:
        number: counted from 0.
        known: microseconds; every event of it is known by then.
    """

    file: str
    number: int
    known: int


class Received:
    """The files of a home.

    Example:
        >>> received = Received("/data/shop", contract)
        >>> received.collect(log)
        []
        >>> [file.number for file in received.files()]
        [0, 1]
    """

    def __init__(self, home: str, contract: Contract) -> None:
        self._home = home
        self._contract = contract
        self._folder = JobFolder(home, FOLDER)
        self._trimming = JobFolder(home, f"{FOLDER}/.trim")
        self._schema = pa.schema(
            [
                (contract.user.join_key, arrow_type(contract.user.dtype)),
                (NUMBER, pa.int64()),
                (KNOWN, pa.int64()),
                (EVENT, pa.string()),
            ]
        )

    def files(self) -> list[ReceivedFile]:
        """All files, in order."""
        named = ((info.path, NAME.fullmatch(info.base_name)) for info in self._infos())
        files = [ReceivedFile(path, int(m[1]), int(m[2])) for path, m in named if m]
        return sorted(files, key=lambda file: file.number)

    def _infos(self) -> list[pafs.FileInfo]:
        chosen = pafs.FileSelector(self._folder.root, allow_not_found=True)
        found: list[pafs.FileInfo] = self._folder.filesystem.get_file_info(chosen)
        return found

    def digest(self) -> str:
        """A digest of what the files hold."""
        return digest_of([self._folder.sha256(file.file) for file in self.files()])

    def state(self) -> tuple[int, int]:
        """How many files there are, and how many of them have left the log."""
        return len(self.files()), self.num_trimmed()

    def users(self) -> pa.Array:
        """Everybody of whom there is an event."""
        user = self._contract.user.join_key
        columns = [self._folder.read_path(file.file, [user])[user] for file in self.files()]
        found = pa.chunked_array(
            [pc.unique(c).cast(self._schema.field(0).type) for c in columns],
            self._schema.field(0).type,
        )
        return pc.unique(found)

    def num_rows(self, file: ReceivedFile) -> int:
        with self._folder.filesystem.open_input_file(file.file) as opened:
            return int(pq.read_metadata(opened).num_rows)

    def read(self, file: ReceivedFile) -> pa.Table:
        """A file's rows."""
        return self._folder.read_path(file.file).cast(self._schema)

    def collect(self, log: EventLog) -> list[UserId]:
        """Write what the log holds and no file has. Returns erased users of whom it held something, which is gone
        from it now: a server may have taken their events at the moment of the erasure.

        Raises:
            JobRunningError: another process collects.
        """
        with self._folder.lock():
            self._drop_drafts()
            here = self._not_trimmed()
            erased = erased_of(self._home)
            waiting: list[Entry] = []
            struck: list[UserId] = []
            for entries in _by_piece(log):
                if gone := _users_of(entries, erased):
                    log.erase(gone)
                    struck += gone
                waiting += [
                    entry
                    for entry in entries
                    if entry.number > here.get(entry.user_id, 0) and entry.user_id not in gone
                ]
                while len(waiting) >= MAX_ROWS:
                    self._write(waiting[:MAX_ROWS])
                    waiting = waiting[MAX_ROWS:]
            if waiting:
                self._write(waiting)
            return struck

    def trim(self, log: EventLog, files: int) -> None:
        """Drop the entries of the first so many files from the log; nothing where somebody merges.

        Raises:
            JobRunningError: another process collects.
        """
        with self._folder.lock():
            first = self.num_trimmed()
            if files <= first:
                return
            try:
                with self._trimming.lock():
                    until: dict[UserId, int] = {}
                    for file in self.files()[first:files]:
                        until |= self._last_of(self.read(file))
                    log.trim(until)
                    done = json.dumps({"files": files}).encode()
                    self._folder.write_bytes(f"{self._folder.root}/{TRIMMED}", done)
            except JobRunningError:
                # What is in both places is one event: the next run trims it.
                return

    @contextmanager
    def merging(self) -> Iterator[None]:
        """Keep entries in the log while somebody reads both it and the files; what trims it now is waited for.

        Raises:
            JobRunningError: somebody else does so as well.
        """
        until = time.monotonic() + TRIM_S
        with ExitStack() as stack:
            while True:
                try:
                    stack.enter_context(self._trimming.lock())
                    break
                except JobRunningError:
                    if time.monotonic() > until:
                        raise
                    time.sleep(0.1)
            yield

    def beyond(self, files: int, before: int) -> Beyond:
        """What a table does not know that has read the first so many files, and of these the events that were known
        before a time, microseconds.
        """
        known: dict[UserId, int] = {}
        lacking: list[Entry] = []
        trimmed = self.num_trimmed()
        for file in self.files():
            if file.number < files and file.known < before:
                if file.number >= trimmed:
                    known |= self._last_of(self.read(file))
                continue
            rows = self.read(file)
            known |= self._last_of(rows)
            if file.number < files:
                rows = rows.filter(pc.greater_equal(rows[KNOWN], before))
            lacking += entries_in(rows)
        return Beyond(known, _by_user(lacking))

    def erase(self, erased: Erased) -> int:
        """Rewrite files without erased users; returns how many events went."""
        gone = 0
        with self._folder.lock():
            self._drop_drafts()
            for file in self.files():
                rows = self.read(file)
                kept = erased.without(rows, self._contract.user.join_key)
                if kept.num_rows < rows.num_rows:
                    gone += rows.num_rows - kept.num_rows
                    self._folder.write_bytes(file.file, parquet_bytes(kept))
        return gone

    def _drop_drafts(self) -> None:
        """Remove what a killed process left half-written; the folder is locked now."""
        for info in self._infos():
            if info.base_name.endswith(DRAFT):
                self._folder.filesystem.delete_file(info.path)

    def _write(self, entries: Sequence[Entry]) -> None:
        known = [_known_from(entry) for entry in entries]
        columns = [
            pa.array([entry.user_id for entry in entries], self._schema.field(0).type),
            pa.array([entry.number for entry in entries]),
            pa.array(known),
            pa.array([entry.event for entry in entries]),
        ]
        name = f"part-{len(self.files()):06d}-{max(known)}.parquet"
        data = parquet_bytes(pa.table(columns, schema=self._schema))
        self._folder.write_bytes(f"{self._folder.root}/{name}", data)

    def num_trimmed(self) -> int:
        """How many of the files have left the log."""
        stored = self._folder.read_bytes(f"{self._folder.root}/{TRIMMED}")
        return 0 if stored is None else int(json.loads(stored)["files"])

    def _not_trimmed(self) -> dict[UserId, int]:
        """The last number of each user in files whose entries may still be in the log."""
        found: dict[UserId, int] = {}
        for file in self.files()[self.num_trimmed() :]:
            found |= self._last_of(self.read(file))
        return found

    def _last_of(self, rows: pa.Table) -> dict[UserId, int]:
        """The last number of each user of a file; later files have larger ones."""
        user = self._contract.user.join_key
        last = rows.group_by(user).aggregate([(NUMBER, "max")])
        return dict(zip(last[user].to_pylist(), last[f"{NUMBER}_max"].to_pylist(), strict=True))


def open_log(settings: Settings) -> EventLog | None:
    """The log of a home's online store; None of a store that can have no log. Opens the local
    profile's without Feast.
    """
    if settings.profile == "production":
        return log_of(open_store(settings).config)
    file = local_file(settings, ONLINE)
    return SqliteEventLog(file) if file.exists() else None


def collect(settings: Settings, contract: Contract) -> str:
    """Bring what the log holds into files, and drop from it what a published run has. Returns a line where that
    failed: what the log holds stays there.

    Raises:
        JobRunningError: another process collects.
    """
    published = JobFolder(settings.home, "events").manifest()
    received = Received(settings.home, contract)

    def use(log: EventLog) -> None:
        received.trim(log, published.received if published else 0)
        if struck := received.collect(log):
            OnlineEraser(open_store(settings), contract, []).sweep(struck, datetime.now(UTC))

    return _told(settings, use)


def trim(settings: Settings, contract: Contract, files: int) -> str:
    """Drop what the first so many files hold from the log. Returns a line where that failed: the next run does it."""
    # A run that calls this is published, and must not fail because somebody else has the folder.
    with suppress(JobRunningError):
        return _told(settings, lambda log: Received(settings.home, contract).trim(log, files))
    return ""


def _told(settings: Settings, use: Callable[[EventLog], None]) -> str:
    try:
        log = open_log(settings)
        if log is not None:
            with closing(log):
                use(log)
    except JobRunningError:
        raise
    except Exception as error:
        # Whatever a store's client raises
        return (
            f"events that came by HTTP could not be brought from the online store's log into files, or dropped from it "
            f"({type(error).__name__}: {error}); they stay there, and a later run does both"
        )
    return ""


@dataclass(frozen=True)
class Beyond:
    """What came beside what a table knows.

    Args:
        known: the last number of each user of whom files say something that may still be in the log.
        lacking: entries of files that the table does not know, by user, in order.
    """

    known: Mapping[UserId, int]
    lacking: Mapping[UserId, tuple[Entry, ...]]

    def of(self, user_id: UserId, logged: Sequence[Entry]) -> tuple[Entry, ...]:
        """All that the table lacks of a user.

        Args:
            logged: the user's entries in the log.
        """
        last = self.known.get(user_id, 0)
        later = tuple(entry for entry in logged if entry.number > last)
        return (*self.lacking.get(user_id, ()), *later)


def entries_in(rows: pa.Table) -> list[Entry]:
    """The entries of a file's rows."""
    user = rows.column(0).to_pylist()
    columns = (user, rows[NUMBER].to_pylist(), rows[EVENT].to_pylist())
    return [Entry(*row) for row in zip(*columns, strict=True)]


def _known_from(entry: Entry) -> int:
    """Microseconds at which an event has both happened and arrived."""
    happened: int = json.loads(entry.event)[EVENT_TIMESTAMP]
    return max(entry.number, happened)


def _users_of(entries: Sequence[Entry], erased: Erased) -> list[UserId]:
    """The erased users among those of some entries."""
    if not erased:
        return []
    users = dict.fromkeys(entry.user_id for entry in entries)
    return [user for user in users if erased.hash_of(user) in erased.users]


def _by_user(entries: Sequence[Entry]) -> dict[UserId, tuple[Entry, ...]]:
    found: dict[UserId, list[Entry]] = {}
    for entry in entries:
        found.setdefault(entry.user_id, []).append(entry)
    return {user: tuple(own) for user, own in found.items()}


def _by_piece(log: EventLog) -> Iterator[list[Entry]]:
    """The entries of all users, some users at a time; of each the ones that lie in the past."""
    users: list[UserId] = []
    for user in log.users():
        users.append(user)
        if len(users) == PIECE:
            yield _happened(log.entries(users))
            users = []
    yield _happened(log.entries(users))


def _happened(entries: Sequence[Entry]) -> list[Entry]:
    """Each user's entries up to the first one that is yet to happen, by a clock that runs ahead: a run
    refuses an event of the future.
    """
    now = time.time_ns() // 1000
    found = []
    ahead: set[UserId] = set()
    for entry in entries:
        if _known_from(entry) >= now:
            ahead.add(entry.user_id)
        if entry.user_id not in ahead:
            found.append(entry)
    return found
