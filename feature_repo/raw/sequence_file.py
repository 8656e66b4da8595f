"""A plain sequence file becomes a history log, the same format as the Beam job's.

Two forms are read, gzipped or not, ids separated by blanks, tabs or several of them:

    user item            one line for each event, a user's lines in order of time
    user item item …     one line for each user, oldest first

Ids are whole numbers; or all of them are words, such as `u17 B00012`. A file of both is refused, for
one of its lines is no line of ids.

Where every line has two fields the file is of the first form, otherwise of the second. A byte-order
mark, blank lines and blanks around a line are no matter. Such a file knows order and no time: the
k-th event of a user is stamped k seconds after the epoch. Lines of one user need not stand together
(order within the user is the order of lines; how many users are torn apart is counted). Repeated
lines are events like any other.
"""

from __future__ import annotations

import gzip
import hashlib
import re
import zlib
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa

from feature_repo.contract.arrow import MICROS, arrow_schema, from_micros, micros_iso
from feature_repo.contract.contract import Contract, contract
from feature_repo.contract.counts import Counts
from feature_repo.contract.schema import DatasetSpec, DType, Examples, Requests, Source, Task
from feature_repo.errors import ExpectedError
from feature_repo.history.history import log_part, run_starts
from feature_repo.home.code import code_digest
from feature_repo.home.tables import JobFolder, Manifest, digest_of

SPEC = DatasetSpec(
    name="sequence_file",
    title="a plain sequence file",
    user_id=DType.INT64,
    item_id=DType.INT64,
    actions=("interaction",),
    tasks=(Task("label", "next", action="interaction"),),
    requests=Requests(Examples.ACTIONS, "", ""),
    events=Source(""),
)
JOB = "user_history"
# Seconds since 1970 of any log that has them
LIKE_A_TIME = 100_000_000


class SequenceFileError(ExpectedError, ValueError):
    """The file is no sequence file, or not all of one; the message names the line."""


@dataclass(frozen=True)
class Events:
    """Events in the order of the file: users and items, and what was noticed on the way."""

    users: np.ndarray
    items: np.ndarray
    counts: dict[str, int]


def sequence_contract(*, words: bool = False) -> Contract:
    """The contract of every sequence file: items in an order; ids are whole numbers, or words."""
    return contract(replace(SPEC, user_id=DType.STRING, item_id=DType.STRING) if words else SPEC)


def contract_of(folder: JobFolder) -> Contract:
    """The contract under which a file's log was written."""
    words = sequence_contract(words=True)
    return words if folder.require().fingerprint == words.fingerprint else sequence_contract()


def read(path: Path) -> Events:
    """All events of a file.

    Raises:
        SequenceFileError: missing, empty, a gzip that ends early, or a line that is not as the
            first line promises.
    """
    fields = _fields(path, _unpacked(path))
    counts = np.diff(np.r_[fields.starts, len(fields.values)])
    if (counts == 1).any():
        line = int(fields.lines[np.flatnonzero(counts == 1)[0]])
        user = fields.values[fields.starts[np.flatnonzero(counts == 1)[0]]]
        raise SequenceFileError(
            f"{path}, line {line}: user {user} has no item; expected 'user item' or 'user item item …'"
        )
    users = np.repeat(fields.values[fields.starts], counts - 1)
    items = np.delete(fields.values, fields.starts)
    if (counts != 2).any():
        _refuse_records(path, fields, counts)
        _refuse_second_lines(path, fields)
    # Runs beyond one for each user come of lines that do not stand together.
    torn = len(run_starts(pa.array(users))) - len(np.unique(users))
    counts = {
        "events": len(users),
        "users": len(np.unique(users)),
        "items": len(np.unique(items)),
        "torn": torn,
    }
    return Events(users, items, counts)


def write_log(path: Path, home: str) -> JobFolder:
    """The history log of a file, under `home`; nothing is done where it already stands.

    Raises:
        SequenceFileError: see `read`.
    """
    if not path.is_file():
        raise SequenceFileError(
            f"{path} is no file: expected lines of 'user item' or 'user item item …', gzipped or not"
        )
    with open(path, "rb") as stream:
        source = hashlib.file_digest(stream, "sha256").hexdigest()
    # Named by content and code, and published like any job's tables: a rerun finds it there.
    folder = JobFolder(home, JOB)
    run_id = digest_of([JOB, code_digest("feature_repo.raw.sequence_file"), source])
    # Of two processes with one file the second waits, and finds the log of the first.
    with folder.lock():
        published = folder.manifest()
        if published is not None and published.run_id == run_id:
            return folder
        events = read(path)
        made = sequence_contract(words=events.users.dtype.kind == "U")
        log = log_part(made, _table(made, events))
        sink = pa.BufferOutputStream()
        with pa.ipc.new_file(sink, log.schema) as writer:
            writer.write_batch(log)
        # A run that was killed may have left a part under this id.
        folder.discard(run_id)
        part = folder.write_part(
            run_id, "history_log", "part-00000.arrow", sink.getvalue(), log.num_rows
        )
        # The newest event is the last of the longest history; `as_of` lies behind it.
        longest = int(np.unique(events.users, return_counts=True)[1].max())
        folder.publish(
            Manifest(
                job=JOB,
                run_id=run_id,
                dataset=SPEC.name,
                fingerprint=made.fingerprint,
                as_of=micros_iso((longest + 1) * MICROS),
                options={},
                inputs={path.name: source},
                counts=Counts(events.counts),
                tables={"history_log": [part]},
            )
        )
    return folder


def _table(made: Contract, events: Events) -> pa.Table:
    """Columns of the events table, grouped by user, in order."""
    order = np.argsort(events.users, kind="stable")
    users = events.users[order]
    starts = run_starts(pa.array(users))
    nth = np.arange(len(users)) - np.repeat(starts, np.diff(np.r_[starts, len(users)]))
    columns = {
        "user_id": users,
        "item_id": events.items[order],
        "action": np.zeros(len(users), np.int8),
        "event_timestamp": from_micros(nth * MICROS),
        "source_position": order,
    }
    schema = arrow_schema(made.table("events"))
    # An order says nothing of when a line arrived.
    columns |= {f.name: pa.nulls(len(users), f.type) for f in schema if f.name not in columns}
    return pa.table(columns).select(schema.names).cast(schema)


def _unpacked(path: Path) -> bytes:
    raw = path.read_bytes()
    if raw[:2] == b"\x1f\x8b":
        try:
            raw = gzip.decompress(raw)
        except (EOFError, OSError, zlib.error) as error:
            raise SequenceFileError(
                f"{path} is a gzip that ends early or is damaged ({error}): fetch it again"
            ) from error
    if not raw.strip():
        raise SequenceFileError(
            f"{path} is empty: expected lines of 'user item' or 'user item item …'"
        )
    return raw


@dataclass(frozen=True)
class _Fields:
    """All ids of a file in a row; a line that has some begins at `starts` and is the
    file's `lines`-th, from 1.
    """

    values: np.ndarray
    starts: np.ndarray
    lines: np.ndarray


def _fields(path: Path, data: bytes) -> _Fields:
    """The file's fields.

    Raises:
        SequenceFileError: names the first line that holds something other than whole numbers of 64
            bits, unless all ids are words.
    """
    data = data.removeprefix(b"\xef\xbb\xbf")
    found = NOT_A_NUMBER.search(data)
    if found is not None and not _all_words(data):
        raise _located(path, data, found.start())
    raw = np.frombuffer(data, np.uint8)
    blank = (raw == 0x20) | (raw == 0x09) | (raw == 0x0D) | (raw == 0x0A)
    begins = np.flatnonzero(~blank & np.r_[True, blank[:-1]])
    line_of = np.r_[0, np.cumsum(raw == 0x0A)][begins]
    if found is not None:
        values = np.array(data.decode().split())
        return _by_line(values, line_of)
    try:
        values = np.array(data.split(), dtype="S").astype(np.int64)
    except (ValueError, OverflowError) as error:
        bad = next(at for at, word in enumerate(data.split()) if not -(2**63) <= int(word) < 2**63)
        raise _located(path, data, int(begins[bad])) from error
    return _by_line(values, line_of)


def _by_line(values: np.ndarray, line_of: np.ndarray) -> _Fields:
    starts = np.flatnonzero(np.r_[True, line_of[1:] != line_of[:-1]])
    return _Fields(values, starts, line_of[starts] + 1)


def _all_words(data: bytes) -> bool:
    """Return whether every id begins with a letter, and only blanks stand between them."""
    try:
        words = data.decode().split()
    except UnicodeDecodeError:
        return False
    # As many by blanks of ASCII alone, by which lines are cut; no sign that other formats have.
    alike = len(words) == len(data.split())
    return alike and all(word[0].isalpha() and not SIGNS.search(word) for word in words)


# Something that neither is a whole number nor separates two: hexadecimal, decimal points, names,
# other encodings.
SIGNS = re.compile(r"[,;|\"'\t:{}\[\]=]")
NOT_A_NUMBER = re.compile(rb"[^\s0-9-]|[0-9]-|-(?![0-9])|[\v\f]")


def _located(path: Path, data: bytes, position: int) -> SequenceFileError:
    number = data.count(b"\n", 0, position) + 1
    start = data.rfind(b"\n", 0, position) + 1
    line = data[start : data.find(b"\n", position) if b"\n" in data[position:] else len(data)]
    shown = line[:60].decode(errors="replace")
    return SequenceFileError(
        f"{path}, line {number}: expected whole numbers of 64 bits with blanks between, 'user item' or 'user item item …', "
        f"found {shown!r}"
    )


def _refuse_records(path: Path, fields: _Fields, counts: np.ndarray) -> None:
    """Refuse lines such as `user item rating time`, which would be read as lists of items.

    Raises:
        SequenceFileError: all lines have as many fields, and the last of each is as large as a time
            and none else is.
    """
    width = int(counts[0])
    if fields.values.dtype.kind == "U" or len(counts) < 2 or width > 5 or (counts != width).any():
        return
    rows = fields.values.reshape(-1, width)
    if (rows[:, -1] >= LIKE_A_TIME).all() and (rows[:, :-1] < LIKE_A_TIME).all():
        shown = " ".join(map(str, rows[0].tolist()))
        raise SequenceFileError(
            f"{path}, line {fields.lines[0]}: expected 'user item' or 'user item item …', found {shown!r}, whose last field looks "
            "like a time: keep user and item alone, lines in order of time"
        )


def _refuse_second_lines(path: Path, fields: _Fields) -> None:
    users = fields.values[fields.starts]
    _, first, inverse = np.unique(users, return_index=True, return_inverse=True)
    again = np.flatnonzero(first[inverse] != np.arange(len(users)))
    if len(again):
        at = int(again[0])
        raise SequenceFileError(
            f"{path}, line {fields.lines[at]}: user {users[at]} already stands on line {fields.lines[first[inverse[at]]]}; one line "
            "for each user, or 'user item' on every line"
        )
