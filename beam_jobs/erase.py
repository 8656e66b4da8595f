"""`python -m beam_jobs erase USER`: a user out of everything that we hold, and a proof of it.

    1. on the list of erased users   `events` leaves them out from here on, no server takes their events
    2. online store                  at once, in every view and known token version, and in its log of events
    3. acknowledged events           files rewritten without them
    4. served logs                   the same
    5. tables                        built again without them by the jobs, each as it was run last
    6. training sets, reports        dropped: they are made again when they are needed
    7. token tables                  their rows are cut out
    8. what no manifest names        dropped, the runs before among it
    9. online store again            a job that was under way may have written meanwhile
    10. the proof                    every file is searched, by columns and by bytes, and what was found is
                                     written down

A job that is under way is waited for. Each step may be repeated: a call that was stopped is made whole by the
same call.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TypeVar

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from beam_jobs.errors import ErasureError
from feature_repo import datasets
from feature_repo.atomic import atomic_write
from feature_repo.contract.contract import Contract
from feature_repo.contract.schema import DType
from feature_repo.errors import ExpectedError
from feature_repo.history import token_log
from feature_repo.home.catalogue import Catalogue
from feature_repo.home.erased import FOLDER, Erased, list_erased
from feature_repo.home.tables import JobFolder, JobRunningError, locked
from feature_repo.home.traces import LEAST_BYTES, behind_nulls, mark_of, traces_in
from feature_repo.raw.parse import user_columns
from feature_repo.settings import Settings
from feature_repo.store.online_erase import OnlineEraser
from feature_repo.store.received import FOLDER as RECEIVED
from feature_repo.store.received import Received
from feature_repo.store.store import open_store

# In the order in which they read each other.
JOBS = ("events", "user_history", "item_stats", "training_examples", "materialize")
# Made again whenever they are needed: whoever is in them, they go whole.
CACHES = ("training_sets", "expectations")
# The column of dead letters that holds a row as it came
RAW = "raw"
# A file takes a server less to write
DRAFT_S = 60.0
# For a job that is under way
WAIT_S = 600.0
Id = int | str
RunJob = Callable[[str], None]
Answer = TypeVar("Answer")


@dataclass(frozen=True)
class Searched:
    """One place that was searched, and how many rows or keys of the erased users it holds, of how many."""

    place: str
    theirs: int
    # Rows or keys of all users; None where nobody counted
    of: int | None = None


@dataclass(frozen=True)
class Proof:
    """Proof of what was erased, and that nothing is left. It names users by their keyed hashes.

    Args:
        removed: rows or keys that went, by place, None where the place cannot say it; tables that were
            built again are only in `searched`.
        left: places that may hold traces which no search finds, or that are not ours.
    """

    erased_at: str
    took_s: float
    users: list[str]
    removed: dict[str, int | None]
    searched: list[Searched]
    left: list[str]


def ids_of(contract: Contract, users: Sequence[str]) -> list[Id]:
    """Users as their ids are typed.

    Raises:
        ErasureError: none is given, or one cannot be an id.
    """
    if not users:
        raise ErasureError("expected the id of a user, or several")
    if contract.user.dtype is DType.STRING:
        return list(users)
    try:
        ids: list[Id] = [int(user) for user in users]
        pa.array(ids, pa.int64())
    except (ValueError, OverflowError) as error:
        raise ErasureError(
            f"users of this dataset are whole numbers of 64 bits: {error}"
        ) from error
    return ids


def erase(
    settings: Settings,
    users: Sequence[Id],
    logs: Sequence[Path],
    run_job: RunJob,
    tell: Callable[[str], None] = lambda step: None,
) -> tuple[Proof, Path]:
    """Erase users; returns the proof and where it was written.

    Args:
        logs: folders of served requests.
        run_job: runs one of the jobs to its end, as it was run last.
        tell: is called with each step as it begins.

    Raises:
        ErasureError: something is left; the message says where.
        JobRunningError: a job was under way for `WAIT_S`.
    """
    began = time.monotonic()
    at = datetime.now(UTC)
    contract = datasets.load_contract(settings.dataset)
    home = settings.home
    if missing := [str(log) for log in logs if not log.is_dir()]:
        raise ErasureError(f"{missing[0]} is no folder that a server logged to")
    removed: dict[str, int | None] = {}

    # 1. List them first: from now on no job builds them in, and no server takes their events.
    tell("listing them")
    listed = _when_free(partial(list_erased, home, users))
    theirs = Erased(listed.salt, frozenset(map(listed.hash_of, users)))

    # 2. What serves, then what was built, each of its own kind.
    tell("online store")
    online = OnlineEraser(open_store(settings), contract, _token_versions(settings))
    place = f"online store ({online.kind})"
    removed[place] = online.erase(users, at)

    tell("acknowledged events")
    received = Received(home, contract)
    removed[RECEIVED] = _when_free(partial(received.erase, theirs))

    tell("served logs")
    for log in logs:
        removed[str(log)] = _out_of_log(log, contract, theirs)

    for job in JOBS:
        tell(f"building {job} again")
        _when_free(partial(_is_free, settings, job))
        if JobFolder(home, job).manifest() is not None:
            try:
                run_job(job)
            except ExpectedError as error:
                raise ErasureError(
                    f"`{job}` failed, and the users are still in its tables: run the same command again once it is "
                    f"mended. {error}"
                ) from error

    tell("training sets and reports")
    for cache in CACHES:
        for folder in (settings.path(cache), *settings.path(cache).glob("*")):
            if (folder / ".lock").exists():
                _when_free(partial(_drop, folder))
        shutil.rmtree(settings.path(cache), ignore_errors=True)

    tell("token tables")
    removed[token_log.JOB] = _when_free(partial(token_log.erase, contract, home, theirs))
    for job in (*JOBS, token_log.JOB):
        _when_free(JobFolder(home, job).forget_earlier_runs)

    # 3. A server or a job may have written meanwhile.
    tell("online store again")
    first = removed[place]
    again = online.sweep(users, at)
    removed[place] = None if first is None or again is None else first + again

    # 4. Prove it: search the bytes of every file.
    tell("searching")
    searched = [Searched(place, online.find(users))]
    searched += search(settings, contract, theirs, logs, users)
    if kept := [one for one in searched if one.theirs]:
        where = ", ".join(f"{one.place} ({one.theirs:,})" for one in kept)
        raise ErasureError(
            f"not all is gone: {where}. Run the same command again; what is left then is somebody else's file, or was "
            "written by somebody else"
        )
    proof = Proof(
        at.isoformat(timespec="seconds"),
        round(time.monotonic() - began, 1),
        sorted(theirs.users),
        removed,
        searched,
        _left(settings, users),
    )
    path = settings.path(FOLDER, f"proof-{at:%Y%m%dT%H%M%S}.json")
    path.write_text(json.dumps(asdict(proof), indent=1))
    return proof, path


def search(
    settings: Settings,
    contract: Contract,
    theirs: Erased,
    logs: Sequence[Path],
    users: Sequence[Id] = (),
) -> list[Searched]:
    """Every file of the home and of the logs: how many rows of tables are theirs, and how often their ids
    stand in whatever else it holds.

    Training sets hold users without their ids; those of before are gone, and later ones are of the tables
    that were built without them.

    Args:
        users: whose ids are searched by their bytes as well.
    """
    mark = mark_of(users)
    # An item may have the name that a user has as an id.
    of_items = {contract.item.join_key, *(c.name for c in contract.item_columns)}
    home = JobFolder(settings.home, "")
    found: dict[str, Searched] = {}
    where = [(home.filesystem, home.root.rstrip("/"))]
    where += [(pafs.LocalFileSystem(), str(log.resolve())) for log in logs]
    for filesystem, root in where:
        chosen = pafs.FileSelector(root, recursive=True, allow_not_found=True)
        for info in filesystem.get_file_info(chosen):
            if info.type != pafs.FileType.File:
                continue
            # Files are reported by the folder or file directly below the root.
            place = "/".join([root, *info.path.removeprefix(f"{root}/").split("/")[:1]])
            counted = _count(filesystem, info.path, contract, theirs) or Searched(place, 0, 0)
            traces = counted.theirs
            # One trace is enough: bytes are searched only in files where no row was found.
            if mark is not None and not traces:
                traces = traces_in(filesystem, info.path, mark, of_items)
            before = found.get(place, Searched(place, 0, 0))
            rows = (before.of or 0) + (counted.of or 0)
            found[place] = Searched(place, before.theirs + traces, rows)
    return list(found.values())


def _count(
    filesystem: pafs.FileSystem, path: str, contract: Contract, theirs: Erased
) -> Searched | None:
    """The rows of one file; None of one that has no column of users, nor of raw rows."""
    user = contract.user.join_key
    if path.endswith(".parquet"):
        with filesystem.open_input_file(path) as file:
            # A dead letter holds the whole raw row as text, ids included.
            names = pq.read_schema(file).names
            if RAW in names:
                raw = pq.read_table(file, columns=[RAW])[RAW].to_pylist()
                held = theirs.in_raw(raw, user_columns(contract.spec), user)
                return Searched(path, int(held.sum()), len(raw))
            if user not in names:
                return None
            column = pq.read_table(file, columns=[user])[user]
    elif path.endswith(".arrow"):
        with filesystem.open_input_file(path) as file, pa.ipc.open_file(file) as read:
            if user not in read.schema.names:
                return None
            column = read.read_all()[user]
            # A cleared value may still have its bytes in the file, behind the null.
            struck = theirs.holds(behind_nulls(column))
            number = int((theirs.holds(column) | struck).sum())
            return Searched(path, number, len(column))
    else:
        return None
    return Searched(path, int(theirs.holds(column).sum()), len(column))


def _drop(folder: Path) -> None:
    """Remove a folder.

    Raises:
        JobRunningError: another process reads it.
    """
    try:
        with locked(folder):
            shutil.rmtree(folder)
    except BlockingIOError as error:
        raise JobRunningError(
            f"a training still reads {folder}: wait for it, or stop it"
        ) from error


def _out_of_log(log: Path, contract: Contract, theirs: Erased) -> int:
    """Rewrite a log and remove abandoned drafts. Returns how many rows went."""
    for draft in log.rglob("*.draft"):
        if time.time() - draft.stat().st_mtime > DRAFT_S:
            draft.unlink()
    return sum(_rewrite(path, contract, theirs) for path in sorted(log.rglob("*.parquet")))


def _rewrite(path: Path, contract: Contract, theirs: Erased) -> int:
    """A file of a served log without them, replaced in one step; returns how many rows went."""
    user = contract.user.join_key
    rows = pq.read_table(path)
    if user not in rows.column_names:
        return 0
    kept = theirs.without(rows, user)
    gone: int = rows.num_rows - kept.num_rows
    if gone and kept.num_rows:
        with atomic_write(path) as draft:
            pq.write_table(kept, draft, compression="zstd")
    elif gone:
        path.unlink()
    return gone


def _token_versions(settings: Settings) -> list[str]:
    """List every token version that may be stored anywhere."""
    recorded = Catalogue(settings.catalogue_url).token_versions(settings.dataset)
    manifest = JobFolder(settings.home, token_log.JOB).manifest()
    published = manifest.options.get("versions", {}) if manifest else {}
    return sorted({row.fingerprint for row in recorded} | set(published))


def _left(settings: Settings, users: Sequence[Id]) -> list[str]:
    """List the places that were not touched or not searched, and why."""
    files = datasets.load(settings.dataset).files(settings.data)
    bundles = Catalogue(settings.catalogue_url).bundles(settings.dataset)
    named = sorted({f"{row.recipe}@{row.digest[:12]}" for row in bundles})
    return [
        f"{len(files):,} raw files, which are their owner's: {', '.join(sorted(files)[:3])}; whatever is read of them "
        "leaves these users out",
        "logs of servers that were not named by --logs, and requests that a server has not written yet: it leaves "
        "these users out",
        "files of the online store's own, such as Redis' append-only file: rewritten by its own tools",
        *_not_by_bytes(users),
        f"weights that were trained before now ({', '.join(named) or 'none'}): they hold no id; the next training "
        "leaves these users out",
    ]


def _not_by_bytes(users: Sequence[Id]) -> list[str]:
    """Which ids were searched in tables and keys alone."""
    short = [user for user in users if mark_of([user]) is None]
    if not short:
        return []
    return [
        f"{len(short):,} of the ids are numbers, or have fewer than {LEAST_BYTES} letters: they were searched in columns and "
        "keys of users, and not by their bytes, which stand in any file"
    ]


def _when_free(action: Callable[[], Answer]) -> Answer:
    """Do something for which a job's folder must be free; wait for the job where it is not.

    Raises:
        JobRunningError: it is not free after `WAIT_S`.
    """
    until = time.monotonic() + WAIT_S
    while True:
        try:
            return action()
        except JobRunningError:
            if time.monotonic() > until:
                raise
            time.sleep(0.5)


def _is_free(settings: Settings, job: str) -> None:
    with JobFolder(settings.home, job).lock():
        pass
