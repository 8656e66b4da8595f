"""`python -m serving erase USER`: a user out of everything that we hold, and a proof of it.

    1. on the list of erased users   from here on no job builds a row of theirs, no server takes their events
    2. online store                  at once, in every view and token version
    3. token tables                  their rows are cut out
    4. served logs, training sets    rewritten; dropped, since they are made again when they are needed
    5. the other tables              built again without them by the jobs; runs that nobody reads any more go
    6. online store again            a job that was under way may have written meanwhile
    7. the proof                     everything is searched, and what was found is written down

Each step may be repeated: a call that was stopped is made whole by the same call.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
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

from feature_repo import datasets, token_log
from feature_repo.catalogue import Catalogue
from feature_repo.contract import Contract
from feature_repo.erased import FOLDER, Erased, list_erased
from feature_repo.errors import ExpectedError
from feature_repo.online_erase import OnlineEraser
from feature_repo.parse import user_columns
from feature_repo.schema import DType
from feature_repo.settings import CHECKOUT, Settings
from feature_repo.store import open_store
from feature_repo.tables import JobFolder, JobRunningError
from serving.items import Id

# In the order in which they read each other.
JOBS = ("events", "user_history", "item_stats", "training_examples", "materialize")
# Made again whenever they are needed: whoever is in them, they go whole.
CACHES = ("training_sets", "expectations")
RAW = "raw"  # the column of dead letters that holds a row as it came
WAIT_S = 600.0  # for a job that is under way
RunJob = Callable[[str], None]
Answer = TypeVar("Answer")


class ErasureError(ExpectedError, RuntimeError):
    """Something of a user is still there, or nobody such can be erased."""


@dataclass(frozen=True)
class Searched:
    """One place that was searched, and how many rows or keys of the erased users it holds, of how many."""

    place: str
    theirs: int
    rows: int | None = None  # of anybody; None where nobody counted


@dataclass(frozen=True)
class Proof:
    """What was erased, and that nothing is left. Users stand here by their keyed hashes.

    Args:
        removed: rows or keys that went, by place; tables that were built again are only in `searched`.
        left: what holds traces that no search finds, or is not ours.
    """

    erased_at: str
    took_s: float
    users: list[str]
    removed: dict[str, int]
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
        return [int(user) for user in users]
    except ValueError as error:
        raise ErasureError(f"users of this dataset are whole numbers: {error}") from error


def erase(
    settings: Settings,
    users: Sequence[Id],
    logs: Sequence[Path],
    run_job: RunJob | None = None,
    tell: Callable[[str], None] = lambda step: None,
) -> tuple[Proof, Path]:
    """Erase users; returns the proof and where it was written.

    Args:
        logs: folders of served requests.
        run_job: runs one of the jobs to its end; default: each in a process of its own.
        tell: hears of each step as it begins.

    Raises:
        ErasureError: something is left; the message says where.
        JobRunningError: a job was under way for `WAIT_S`.
    """
    began, at = time.monotonic(), datetime.now(UTC)
    contract = datasets.load_contract(settings.dataset)
    run_job = run_job or _in_process_of_its_own(settings)
    removed: dict[str, int] = {}

    tell("listing them")
    _when_free(lambda: list_erased(settings.home, users))
    listed = list_erased(settings.home, [])
    theirs = Erased(listed.salt, frozenset(map(listed.hash_of, users)))

    tell("online store")
    online = OnlineEraser(open_store(settings), contract, _token_versions(settings))
    place = f"online store ({online.kind})"
    removed[place] = online.erase(users, at)

    tell("token tables")
    removed[token_log.JOB] = _when_free(lambda: token_log.erase(contract, settings.home, theirs))

    tell("served logs and caches")
    for log in logs:
        removed[str(log)] = sum(_rewrite(path, contract, theirs) for path in _parquet_of(log))
    for cache in CACHES:
        shutil.rmtree(settings.path(cache), ignore_errors=True)

    for job in JOBS:
        if JobFolder(settings.home, job).manifest() is not None:
            tell(f"building {job} again")
            _when_free(partial(_is_free, settings, job))
            run_job(job)
    for job in (*JOBS, token_log.JOB):
        JobFolder(settings.home, job).forget_earlier_runs()

    tell("online store again")
    removed[place] += online.erase(users, at)

    tell("searching")
    searched = [Searched(place, online.find(users)), *search(settings, contract, theirs, logs)]
    if kept := [one for one in searched if one.theirs]:
        where = ", ".join(f"{one.place} ({one.theirs:,} rows)" for one in kept)
        raise ErasureError(
            f"not all is gone: {where}. Run the same command again; what is left then was written by somebody else"
        )
    proof = Proof(
        at.isoformat(timespec="seconds"),
        round(time.monotonic() - began, 1),
        sorted(theirs.users),
        removed,
        searched,
        _left(settings),
    )
    path = settings.path(FOLDER, f"proof-{at:%Y%m%dT%H%M%S}.json")
    path.write_text(json.dumps(asdict(proof), indent=1))
    return proof, path


def search(
    settings: Settings, contract: Contract, theirs: Erased, logs: Sequence[Path]
) -> list[Searched]:
    """Every file that has a column of users, in the home and in the logs: how many rows are theirs."""
    home = JobFolder(settings.home, "")
    found: dict[str, Searched] = {}
    where = [(home.filesystem, home.root.rstrip("/"))]
    where += [(pafs.LocalFileSystem(), str(log.resolve())) for log in logs]
    for filesystem, root in where:
        chosen = pafs.FileSelector(root, recursive=True, allow_not_found=True)
        for info in filesystem.get_file_info(chosen):
            place = "/".join([root, *info.path.removeprefix(f"{root}/").split("/")[:1]])
            counted = _count(filesystem, info.path, contract, theirs)
            if counted is not None:
                before = found.get(place, Searched(place, 0, 0))
                found[place] = Searched(
                    place, before.theirs + counted.theirs, (before.rows or 0) + (counted.rows or 0)
                )
    return list(found.values())


def _count(
    filesystem: pafs.FileSystem, path: str, contract: Contract, theirs: Erased
) -> Searched | None:
    """The rows of one file; None of one that has no column of users, nor of raw rows."""
    user = contract.user.join_key
    if path.endswith(".parquet"):
        with filesystem.open_input_file(path) as file:
            names = pq.read_schema(file).names
            if RAW in names:
                raw = pq.read_table(file, columns=[RAW])[RAW].to_pylist()
                return Searched(
                    path, int(theirs.in_raw(raw, user_columns(contract.spec)).sum()), len(raw)
                )
            if user not in names:
                return None
            column = pq.read_table(file, columns=[user])[user]
    elif path.endswith(".arrow"):
        with filesystem.open_input_file(path) as file, pa.ipc.open_file(file) as read:
            if user not in read.schema.names:
                return None
            column = read.read_all()[user]
    else:
        return None
    return Searched(path, int(theirs.holds(column).sum()), len(column))


def _parquet_of(log: Path) -> list[Path]:
    return sorted(log.rglob("*.parquet"))


def _rewrite(path: Path, contract: Contract, theirs: Erased) -> int:
    """A file of a served log without them, replaced in one step; returns how many rows went."""
    user = contract.user.join_key
    rows = pq.read_table(path)
    if user not in rows.column_names:
        return 0
    kept = theirs.without(rows, user)
    gone: int = rows.num_rows - kept.num_rows
    if gone and kept.num_rows:
        draft = path.with_name(f".{path.name}.draft")
        pq.write_table(kept, draft, compression="zstd")
        draft.replace(path)
    elif gone:
        path.unlink()
    return gone


def _token_versions(settings: Settings) -> list[str]:
    """Every version of which tokens may be stored anywhere."""
    recorded = Catalogue(settings.catalogue_url).token_versions(settings.dataset)
    manifest = JobFolder(settings.home, token_log.JOB).manifest()
    published = manifest.options.get("versions", {}) if manifest else {}
    return sorted({row.fingerprint for row in recorded} | set(published))


def _left(settings: Settings) -> list[str]:
    """What was not touched, and why."""
    files = datasets.load(settings.dataset).files(settings.data)
    bundles = Catalogue(settings.catalogue_url).bundles(settings.dataset)
    named = sorted({f"{row.recipe}@{row.digest[:12]}" for row in bundles})
    return [
        f"{len(files):,} raw files, which are their owner's: {', '.join(sorted(files)[:3])}; whatever is read of them "
        "leaves these users out",
        "files of the online store's own, such as Redis' append-only file: rewritten by its own tools",
        f"weights that were trained before now ({', '.join(named) or 'none'}): they hold no id; the next training "
        "leaves these users out",
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


def _in_process_of_its_own(settings: Settings) -> RunJob:
    """Runs a job as it was run last."""
    catalogue = Catalogue(settings.catalogue_url)

    def run(job: str) -> None:
        last = catalogue.last_run(settings.dataset, job)
        asked = json.loads(last.details.get("argv", "{}")) if last else {}
        given = [f"--{name}={value}" for name, value in asked.items() if value not in (None, False)]
        given = [flag.removesuffix("=True") for flag in given]
        command = [sys.executable, "-m", "beam_jobs", job, *given]
        done = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, check=False)
        if done.returncode:
            raise ErasureError(
                f"`{' '.join(command[1:])}` failed, and the users are still in its tables: run the same command again "
                f"once it is mended.\n{done.stdout}{done.stderr}"
            )

    return run
