"""A home copied while jobs, training and servers go on: whole, as of one moment of each table and of the catalogue.

What names other things is read first and written last, so that all it names is in the copy: databases, then the manifests of
all jobs at once, then the parts that they name, each checked by its sha256, then everything else. A manifest's parts
outlive the next publication; where two came meanwhile, that job is read again.
"""

from __future__ import annotations

import hashlib
import shutil
import sqlite3
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow.fs as pafs

from feature_repo.errors import ExpectedError, UsageError
from feature_repo.home.tables import DRAFT, MANIFEST, DamagedPartError, JobFolder, Manifest
from feature_repo.settings import Settings

ATTEMPTS = 5
# Made anew from the rest, and large; or of a process that runs
LEFT_OUT = ("spill", "training_sets")


class RestlessHomeError(ExpectedError, RuntimeError):
    """A job published faster than its tables could be copied."""


@dataclass
class BackUp:
    """A count of all that was copied."""

    jobs: list[str] = field(default_factory=list)
    files: int = 0
    bytes: int = 0

    def __str__(self) -> str:
        return f"{self.files:,} files, {self.bytes / 1e6:,.1f} MB, tables of {len(self.jobs)} jobs"


def back_up(settings: Settings, target: Path) -> BackUp:
    """Copy the home of a dataset, other than what is made anew from the rest.

    Args:
        target: a folder that is not there yet; nothing is in it until all is.

    Raises:
        UsageError: the target is there already.
        DamagedPartError: a part of a table is not what its run wrote.
        RestlessHomeError: a job published five times meanwhile.
    """
    if target.exists():
        raise UsageError(f"{target} is there already: a back-up goes into a folder of its own")
    draft = target.with_name(f".{target.name}{DRAFT}")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    found = BackUp()
    # Where the home is an object store, this machine's files of it: bundles, runs, catalogue.
    local = settings.path("catalogue.db").parent
    for database in sorted(local.glob("*.db")):
        _copy_database(database, draft / database.name, found)
    jobs = _jobs(settings.home)
    manifests = {job.job: manifest for job in jobs if (manifest := job.manifest()) is not None}
    for job in jobs:
        if job.job in manifests:
            _copy_tables(job, manifests[job.job], draft / job.job, found)
            found.jobs.append(job.job)
    for entry in sorted(local.iterdir()):
        known = entry.name in manifests or entry.suffix == ".db" or entry.name.startswith(".")
        if not known and entry.name not in LEFT_OUT:
            _copy_rest(entry, draft / entry.name, found)
    draft.rename(target)
    return found


def _jobs(home: str) -> list[JobFolder]:
    """The folders of a home that a job has published in."""
    root = JobFolder(home, "")
    selector = pafs.FileSelector(root.root.rstrip("/"), allow_not_found=True)
    folders = [
        JobFolder(home, info.base_name)
        for info in root.filesystem.get_file_info(selector)
        if info.type == pafs.FileType.Directory
    ]
    return sorted(
        (one for one in folders if one.read_bytes(f"{one.root}/{MANIFEST}") is not None),
        key=lambda one: one.job,
    )


def _copy_tables(job: JobFolder, manifest: Manifest, target: Path, found: BackUp) -> None:
    for _ in range(ATTEMPTS):
        copied = _copied_parts(job, manifest, target)
        if copied is not None:
            break
        shutil.rmtree(target)
        manifest = job.manifest() or manifest
    else:
        raise RestlessHomeError(
            f"job {job.job!r} published again and again while it was copied: back up when it rests"
        )
    target.mkdir(exist_ok=True)
    (target / MANIFEST).write_text(manifest.to_json())
    found.files += copied.files + 1
    found.bytes += copied.bytes


def _copied_parts(job: JobFolder, manifest: Manifest, target: Path) -> BackUp | None:
    """Copy what a manifest names, and the notes beside it; None where some of it is gone by now."""
    sums = {part.path: part.sha256 for parts in manifest.tables.values() for part in parts}
    copied = BackUp()
    try:
        notes = [
            info.path.removeprefix(f"{job.root}/")
            for run in sorted(manifest.runs)
            for info in job.filesystem.get_file_info(
                pafs.FileSelector(f"{job.root}/{run}/_parts", recursive=True, allow_not_found=True)
            )
            if info.type == pafs.FileType.File and not info.path.endswith(DRAFT)
        ]
        for path in (*sums, *notes):
            with job.filesystem.open_input_stream(f"{job.root}/{path}") as stream:
                data = stream.read()
            if path in sums and hashlib.sha256(data).hexdigest() != sums[path]:
                raise DamagedPartError(
                    f"{job.root}/{path} is damaged: run `python -m beam_jobs {job.job} --force`, which builds it again"
                )
            (target / path).parent.mkdir(parents=True, exist_ok=True)
            (target / path).write_bytes(data)
            copied.files += 1
            copied.bytes += len(data)
    except FileNotFoundError:
        return None
    return copied


def _copy_database(source: Path, target: Path, found: BackUp) -> None:
    """As of one moment, by SQLite's own means: a plain copy may meet a transaction half-written."""
    with closing(sqlite3.connect(source)) as here, closing(sqlite3.connect(target)) as there:
        here.backup(there)
    found.files += 1
    found.bytes += target.stat().st_size


def _copy_rest(source: Path, target: Path, found: BackUp) -> None:
    """Files that appear whole or not at all; drafts and locks of who writes now are left out."""
    if source.name.endswith((DRAFT, ".lock")):
        return
    if source.is_dir():
        target.mkdir()
        for entry in sorted(source.iterdir()):
            _copy_rest(entry, target / entry.name, found)
        return
    try:
        shutil.copy2(source, target)
    except FileNotFoundError:
        # A run that began anew took its files away meanwhile.
        return
    found.files += 1
    found.bytes += target.stat().st_size
