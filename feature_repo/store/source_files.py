"""Where a batch source's rows lie: a table of one of our jobs through its manifest, a Parquet file, a folder of
them (`key=value` folders among them), or a pattern.

Whatever else a source may be is refused by name, since to read a part of it, or more than belongs to it, would
be a wrong answer that shows nowhere.
"""

from __future__ import annotations

import glob
import os
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import unquote, urlsplit

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from feast.data_format import ParquetFormat
from feast.data_source import DataSource
from feast.infra.offline_stores.file_source import FileSource

from feature_repo.contract.arrow import hash_keys
from feature_repo.errors import ExpectedError
from feature_repo.home.tables import MANIFEST, JobFolder, TableNotBuiltError

PATTERN = "*?["


class SourceError(ExpectedError, ValueError):
    """A source that this store does not read, or in which nothing is; the message names it."""


@dataclass(frozen=True)
class SourceFiles:
    """The Parquet files of a source.

    Args:
        paths: as DuckDB takes them.
        hive: whether folders such as `day=2026-01-02` give columns.
        partitioned: whether the file of each row follows from its key, as in tables of our jobs.
    """

    paths: tuple[str, ...]
    hive: bool = False
    partitioned: bool = False

    def of_keys(self, keys: pa.ChunkedArray) -> SourceFiles:
        """The files that may hold rows of these keys; all where nothing tells."""
        if not self.partitioned or len(self.paths) < 2:
            return self
        hashed = hash_keys(pc.unique(keys).drop_null())
        wanted = np.unique(hashed % np.uint64(len(self.paths))).tolist()
        return replace(self, paths=tuple(self.paths[int(n)] for n in wanted) or self.paths[:1])


def files_of(source: DataSource | None, repo: str | Path | None, view: str) -> SourceFiles:
    """The files of a feature view's batch source.

    Args:
        repo: the folder that relative paths begin at.
        view: whose source it is, for messages.

    Raises:
        SourceError: a source that is not Parquet in files, or without a file.
        TableNotBuiltError: a table of a job that no finished run has written.
    """
    if not isinstance(source, FileSource):
        kind = "none" if source is None else f"a {type(source).__name__}"
        raise SourceError(
            f"feature view {view!r} has {kind} as its batch source; this offline store reads FileSource of Parquet"
        )
    if source.file_format is not None and not isinstance(source.file_format, ParquetFormat):
        raise SourceError(
            f"the source of feature view {view!r} is of {type(source.file_format).__name__}; this offline store reads "
            "Parquet alone: a table that keeps removed files beside others would come back whole"
        )
    # Feast would join the URI of a file to the folder of the definitions.
    named = unquote(urlsplit(source.path).path) if source.path.startswith("file:") else source.path
    path: str = FileSource.get_uri_for_file_path(repo, named)
    if "://" in path:
        return _remote(path)
    return _local(path, view)


def _local(path: str, view: str) -> SourceFiles:
    if Path(path).is_file():
        return SourceFiles((path,))
    if any(sign in path for sign in PATTERN):
        found = sorted(p for p in glob.glob(path, recursive=True) if Path(p).is_file())
        return _some(found, path, view)
    folder = Path(path)
    if folder.is_dir() and not folder.parent.joinpath(MANIFEST).exists():
        if (folder / "_delta_log").exists():
            raise SourceError(
                f"{path}, of feature view {view!r}, is a Delta table: this offline store reads Parquet alone, and would "
                "read removed files as well"
            )
        return _some(sorted(_below(folder)), path, view)
    return _of_job(path)


def _below(folder: Path) -> list[str]:
    """Parquet files below a folder; names that begin with a dot or an underscore hold no data."""
    found = []
    for root, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith((".", "_"))]
        shown = [name for name in files if not name.startswith((".", "_"))]
        found += [f"{root}/{name}" for name in shown if name.endswith((".parquet", ".pq"))]
    return found


def _some(found: list[str], path: str, view: str) -> SourceFiles:
    if not found:
        raise SourceError(f"{path}, the source of feature view {view!r}, holds no Parquet file")
    below = {str(Path(file).relative_to(Path(path).anchor).parent) for file in found}
    hive = any("=" in part for folder in below for part in Path(folder).parts)
    return SourceFiles(tuple(found), hive)


def _remote(path: str) -> SourceFiles:
    """A URI; the table of a job where a manifest lies beside it."""
    if path.endswith((".parquet", ".pq")) or any(sign in path for sign in PATTERN):
        return SourceFiles((path,), hive="=" in path)
    scheme = path.split("://")[0]
    found = _of_job(path)
    return replace(found, paths=tuple(f"{scheme}://{file}" for file in found.paths))


def _of_job(path: str) -> SourceFiles:
    job_folder, _, table = path.rpartition("/")
    home, _, job = job_folder.rpartition("/")
    folder = JobFolder(home, job)
    manifest = folder.require()
    files = folder.paths(table, manifest)
    if not files:
        raise TableNotBuiltError(
            f"table {table!r} of job {job!r} has no parts any more: run `python -m beam_jobs {job}`"
        )
    # A job cuts its tables by the hash of their key, and names each part by its number.
    number = manifest.options.get("num_partitions")
    named = [f"part-{n:05d}.parquet" for n in range(len(files))]
    partitioned = number == len(files) and [Path(file).name for file in files] == named
    return SourceFiles(tuple(files), partitioned=partitioned)
