"""A home copied while jobs, training and servers go on: whole, each table and each database as of one moment.

What names other things is read first and written last, so that all it names is in the copy: SQLite's databases, then the
manifests of all jobs at once, then the parts that they name, each checked by its sha256, then everything else. A manifest's
parts outlive the next publication; where two came meanwhile, the job is read again.
"""

from __future__ import annotations

import hashlib
import shutil
import sqlite3
import time
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import pyarrow.fs as pafs

from feature_repo.errors import ExpectedError, UsageError
from feature_repo.home.tables import (
    DRAFT,
    MANIFEST,
    READ_BYTES,
    DamagedPartError,
    JobFolder,
    Manifest,
)
from feature_repo.settings import Settings

ATTEMPTS = 5
PAUSE_S = 0.2
# Made anew from the rest, and large; or of a process that runs
LEFT_OUT = ("spill", "training_sets")
DATABASE = ".db"
# A copy of a database is whole without them, and with those of another moment it is damaged.
BESIDE_A_DATABASE = (".db-journal", ".db-wal", ".db-shm")


class RestlessHomeError(ExpectedError, RuntimeError):
    """A job published faster than its tables could be copied."""


@dataclass(frozen=True)
class BackUp:
    """A back-up that was made.

    Args:
        jobs: whose tables are in it.
        files, bytes: in all.
    """

    jobs: tuple[str, ...]
    files: int
    bytes: int

    def __str__(self) -> str:
        return f"{self.files:,} files, {self.bytes / 1e6:,.1f} MB, tables of {len(self.jobs)} jobs"


def back_up(settings: Settings, target: Path) -> BackUp:
    """Copy the home of a dataset, other than what is made anew from the rest.

    Args:
        target: a folder that is not there yet; nothing is in it until all is.

    Raises:
        UsageError: the target is there already, or the home is not.
        DamagedPartError: a part of a table is not what its run wrote.
        RestlessHomeError: a job published five times meanwhile.
    """
    if target.exists():
        raise UsageError(f"{target} is there already: a back-up goes into a folder of its own")
    home = JobFolder(settings.home, "")
    if home.filesystem.get_file_info(home.root.rstrip("/")).type == pafs.FileType.NotFound:
        raise UsageError(f"there is no home at {settings.home}: MEMOIR_HOME says where it is")
    draft = target.with_name(f".{target.name}{DRAFT}")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    copy = _Copy(settings.home, draft)
    # This machine's files: where the home is an object store, bundles, runs and the catalogue lie here.
    here = settings.path("catalogue.db").parent
    for database in sorted(here.glob(f"*{DATABASE}")):
        copy.database(database)
    copy.tables()
    copy.rest(home)
    if str(here) != home.root.rstrip("/"):
        copy.rest(JobFolder(str(here), ""))
    sizes = [path.stat().st_size for path in draft.rglob("*") if path.is_file()]
    draft.rename(target)
    return BackUp(tuple(copy.jobs), len(sizes), sum(sizes))


class _Copy:
    """A back-up under way."""

    def __init__(self, home: str, target: Path) -> None:
        self.home = home
        self.target = target
        self.jobs: list[str] = []

    def database(self, source: Path) -> None:
        """As of one moment, by SQLite's own means: a plain copy may meet a transaction half-written."""
        target = self.target / source.name
        with closing(sqlite3.connect(source)) as here, closing(sqlite3.connect(target)) as there:
            here.backup(there)

    def tables(self) -> None:
        """Everything of the jobs that have published."""
        root = JobFolder(self.home, "")
        folders = root.filesystem.get_file_info(pafs.FileSelector(root.root.rstrip("/")))
        jobs = [JobFolder(self.home, one.base_name) for one in folders if _is_folder(one)]
        manifests = [(job, manifest) for job in jobs if (manifest := job.manifest()) is not None]
        for job, manifest in manifests:
            self._job(job, manifest)

    def rest(self, home: JobFolder) -> None:
        """Files that appear whole or not at all; drafts and locks of who writes now are left out."""
        for info in self._listed(home, home.root.rstrip("/")):
            if info.base_name in (*LEFT_OUT, *self.jobs):
                continue
            if _is_folder(info) and home.read_bytes(f"{info.path}/{MANIFEST}") is not None:
                # Its first publication came meanwhile.
                job = JobFolder(self.home, info.base_name)
                self._job(job, job.require())
            elif not info.base_name.endswith(DATABASE):
                self._tree(home, info, home.root.rstrip("/"), self.target)

    def _job(self, job: JobFolder, manifest: Manifest) -> None:
        target = self.target / job.job
        for _ in range(ATTEMPTS):
            if self._parts(job, manifest, target):
                break
            shutil.rmtree(target, ignore_errors=True)
            now = job.require()
            if now.digest == manifest.digest:
                raise DamagedPartError(
                    f"a part of {job.root} is gone: run `python -m beam_jobs {job.job} --force`, which builds it again"
                )
            manifest = now
            time.sleep(PAUSE_S)
        else:
            raise RestlessHomeError(
                f"job {job.job!r} published again and again while it was copied: back up when it rests"
            )
        # Beside tables: notes of parts, lists of keys that were sent, also of runs that did not end.
        for info in self._listed(job, job.root, recursive=True):
            path = info.path.removeprefix(f"{job.root}/")
            of_a_table = len(parts := PurePosixPath(path).parts) > 2 and parts[1] in manifest.tables
            if not of_a_table and path != MANIFEST:
                self._tree(job, info, job.root, target)
        target.mkdir(parents=True, exist_ok=True)
        (target / MANIFEST).write_text(manifest.to_json())
        self.jobs.append(job.job)

    def _parts(self, job: JobFolder, manifest: Manifest, target: Path) -> bool:
        """Copy the parts that a manifest names; False where some of it is gone."""
        for part in (part for parts in manifest.tables.values() for part in parts):
            try:
                digest = self._file(job, f"{job.root}/{part.path}", target / part.path)
            except FileNotFoundError:
                return False
            if digest != part.sha256:
                raise DamagedPartError(
                    f"{job.root}/{part.path} is damaged: run `python -m beam_jobs {job.job} --force`, which builds it again"
                )
        return True

    def _tree(self, home: JobFolder, info: pafs.FileInfo, root: str, target: Path) -> None:
        """Copy a file, or a folder with all that is in it; what vanishes meanwhile is somebody's who began anew."""
        if info.base_name.endswith((DRAFT, ".lock", *BESIDE_A_DATABASE)):
            return
        if _is_folder(info):
            for entry in self._listed(home, info.path):
                self._tree(home, entry, root, target)
        elif info.type == pafs.FileType.File and not _is_within_a_draft(info.path, root):
            try:
                self._file(home, info.path, target / info.path.removeprefix(f"{root}/"))
            except FileNotFoundError:
                return

    def _listed(
        self, home: JobFolder, folder: str, *, recursive: bool = False
    ) -> list[pafs.FileInfo]:
        selector = pafs.FileSelector(folder, recursive=recursive, allow_not_found=True)
        try:
            found = home.filesystem.get_file_info(selector)
        except FileNotFoundError:
            return []
        # Files alone where all of them are asked for
        return sorted(
            (one for one in found if not (recursive and _is_folder(one))), key=lambda one: one.path
        )

    def _file(self, home: JobFolder, source: str, target: Path) -> str:
        """Copy a file; returns the sha256 of its bytes."""
        digest = hashlib.sha256()
        with home.filesystem.open_input_stream(source) as stream:
            target.parent.mkdir(parents=True, exist_ok=True)
            with target.open("wb") as file:
                while block := stream.read(READ_BYTES):
                    digest.update(block)
                    file.write(block)
        return digest.hexdigest()


def _is_folder(info: pafs.FileInfo) -> bool:
    return info.type == pafs.FileType.Directory


def _is_within_a_draft(path: str, root: str) -> bool:
    parents = PurePosixPath(path.removeprefix(f"{root}/")).parts[:-1]
    return any(name.endswith(DRAFT) for name in parents)
