"""A plain sequence file becomes a history log, the same format as the Beam job's.

Two forms are read, gzipped or not, whole numbers separated by blanks:

    user item            one line for each event, a user's lines in order of time
    user item item …     one line for each user, oldest first

The first line's count of fields decides. Such a file knows order and no time: the k-th event of a user is stamped k
seconds after the epoch. Lines of one user need not stand together (order within the user is the order of lines; how
many users are torn apart is counted). Repeated lines are events like any other.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv

from feature_repo.arrow import arrow_schema, from_micros, micros_iso
from feature_repo.history import log_part, run_starts
from feature_repo.schema import Contract, DatasetSpec, DType, Requests, Table, contract
from feature_repo.tables import JobFolder, Manifest, digest_of

SPEC = DatasetSpec(
    name="sequence_file",
    title="a plain sequence file",
    user_id=DType.INT64,
    item_id=DType.INT64,
    actions=("interaction",),
    event_features=(),
    user_features=(),
    item_features=(),
    item_title="",
    stat_value="",
    requests=Requests("label", "", "", "", 0, 0),
    raw=Table("raw_sequences", "Lines of a sequence file.", ()),
    max_bad_fraction=0.0,
)
JOB = "user_history"
VERSION = 1
MICROS = 1_000_000


class SequenceFileError(ValueError):
    """The file is no sequence file, or not all of one; the message names the line."""


@dataclass(frozen=True)
class Events:
    """Events in the order of the file: users and items, and what was noticed on the way."""

    users: np.ndarray
    items: np.ndarray
    counts: dict[str, int]


def sequence_contract() -> Contract:
    """The contract of every sequence file: items in an order."""
    return contract(SPEC)


def read(path: Path) -> Events:
    """All events of a file.

    Raises:
        SequenceFileError: missing, empty, a gzip that ends early, or a line that is not as the first line promises.
    """
    data = _unpacked(path)
    first = data[: data.find(b"\n") if b"\n" in data else len(data)].split()
    if len(first) < 2:
        raise SequenceFileError(f"{path}, line 1: expected 'user item' or 'user item item …', found {first!r}")
    users, items = _pairs(path, data) if len(first) == 2 else _lists(path, data)
    torn = len(run_starts(pa.array(users))) - len(np.unique(users))
    counts = {"events": len(users), "users": len(np.unique(users)), "items": len(np.unique(items)), "torn": torn}
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
    made, folder = sequence_contract(), JobFolder(home, JOB)
    run_id = digest_of([JOB, VERSION, source, made.fingerprint])
    with folder.lock():
        published = folder.manifest()
        if published is not None and published.run_id == run_id:
            return folder
        events = read(path)
        log = log_part(made, _table(made, events))
        sink = pa.BufferOutputStream()
        with pa.ipc.new_file(sink, log.schema) as writer:
            writer.write_batch(log)
        folder.discard(run_id)
        part = folder.write_part(run_id, "history_log", "part-00000.arrow", sink.getvalue(), log.num_rows)
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
                counts=events.counts,
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
    return pa.table(columns).cast(arrow_schema(made.table("events")))


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
        raise SequenceFileError(f"{path} is empty: expected lines of 'user item' or 'user item item …'")
    return raw


def _pairs(path: Path, data: bytes) -> tuple[np.ndarray, np.ndarray]:
    head = data[: data.find(b"\n") if b"\n" in data else len(data)]
    delimiter = "\t" if b"\t" in head else " "
    try:
        table = pa_csv.read_csv(
            io.BytesIO(data),
            pa_csv.ReadOptions(column_names=["user", "item"], use_threads=False),
            pa_csv.ParseOptions(delimiter=delimiter),
            pa_csv.ConvertOptions(column_types={"user": pa.int64(), "item": pa.int64()}),
        )
    except pa.ArrowInvalid as error:
        raise _located(path, data, error) from error
    if table["user"].null_count or table["item"].null_count:
        raise _located(path, data, ValueError("a field is empty"))
    return table["user"].to_numpy(), table["item"].to_numpy()


def _located(path: Path, data: bytes, error: Exception) -> SequenceFileError:
    """The first line that is no pair of whole numbers."""
    for number, line in enumerate(data.splitlines(), 1):
        fields = line.split()
        if line.strip() and (len(fields) != 2 or not all(f.lstrip(b"-").isdigit() for f in fields)):
            shown = line[:60].decode(errors="replace")
            return SequenceFileError(f"{path}, line {number}: expected 'user item', two whole numbers, found {shown!r}")
    return SequenceFileError(f"{path}: expected lines of 'user item'; {error}")


def _lists(path: Path, data: bytes) -> tuple[np.ndarray, np.ndarray]:
    rows: list[np.ndarray] = []
    owners: dict[int, int] = {}
    for number, line in enumerate(data.splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = np.array(line.split(), dtype=np.int64)
        except (ValueError, OverflowError) as error:
            raise SequenceFileError(f"{path}, line {number}: expected whole numbers; {error}") from error
        if len(row) < 2:
            raise SequenceFileError(f"{path}, line {number}: user {row[0]} has no item")
        if row[0] in owners:
            raise SequenceFileError(
                f"{path}, line {number}: user {row[0]} already stands on line {owners[int(row[0])]}; one line for each user"
            )
        owners[int(row[0])] = number
        rows.append(row)
    lengths = [len(row) - 1 for row in rows]
    return np.repeat([row[0] for row in rows], lengths), np.concatenate([row[1:] for row in rows])
