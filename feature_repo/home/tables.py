"""Built tables on disk or in an object store: parts first, a manifest last; what no manifest names
does not exist.

A job's folder is `<home>/<job>/`. A run writes `<run_id>/<table>/part-….parquet` and then replaces
`manifest.json` in one step. The run id is a digest of the job, its options and its inputs, so the
same work has the same place and the same bytes, and a finished run is recognised without reading
it.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TextIO

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from feature_repo.contract.arrow import iso_micros
from feature_repo.contract.contract import Contract
from feature_repo.contract.counts import Counts
from feature_repo.errors import ExpectedError

MANIFEST = "manifest.json"
LAYOUT = 1
READ_BYTES = 1 << 22
DRAFT = ".draft"
# Path → size, time and sha256 of a part that this process has read and found whole
_VERIFIED: dict[str, tuple[int, int, str]] = {}


class TableNotBuiltError(ExpectedError, LookupError):
    """A table was asked for that no finished run has written."""


class StaleTableError(ExpectedError, RuntimeError):
    """A table was built under another contract than the one in force, or is no longer what a run
    named.
    """


class DamagedPartError(ExpectedError, RuntimeError):
    """A part is gone, or its bytes are not those that the run wrote."""


class JobRunningError(ExpectedError, RuntimeError):
    """Another run of the same job holds its folder."""


@dataclass(frozen=True)
class Part:
    """One file of a table: path below the job's folder, rows, bytes and sha256."""

    path: str
    rows: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """The outcome of a finished run: the commit mark of all its tables at once."""

    job: str
    run_id: str
    dataset: str
    fingerprint: str
    # ISO time; the run knows no event at or after it
    as_of: str
    options: dict[str, Any]
    # Job or raw source → digest
    inputs: dict[str, str]
    counts: Counts
    tables: dict[str, list[Part]] = field(default_factory=dict)
    # How many files of acknowledged events its rows know (store/received.py)
    received: int = 0
    # Microseconds; of these files they know no event that became known at or after it
    received_before: int = 0
    # What columns mean and how their values are spread (contract/meaning.py), of the job `events`
    columns: dict[str, Any] = field(default_factory=dict)
    layout: int = LAYOUT

    @property
    def digest(self) -> str:
        """sha256 over everything in the manifest."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    @property
    def runs(self) -> set[str]:
        """Every run that wrote a part of it: this one, and those whose parts it carries on."""
        return {self.run_id} | {
            part.path.split("/")[0] for parts in self.tables.values() for part in parts
        }

    @property
    def as_of_micros(self) -> int:
        """`as_of` as microseconds since the epoch."""
        return iso_micros(self.as_of)

    def to_json(self) -> str:
        """The manifest as it is written."""
        return json.dumps(asdict(self), indent=1, sort_keys=True)

    @staticmethod
    def from_json(text: str) -> Manifest:
        """Read a manifest.

        Raises:
            StaleTableError: it is no manifest, or in a layout that this version does not know.
        """
        try:
            raw = json.loads(text)
            layout = raw["layout"]
        except (ValueError, KeyError, TypeError) as error:
            raise StaleTableError(
                f"a manifest is damaged ({error}): rebuild with beam_jobs"
            ) from error
        if layout != LAYOUT:
            raise StaleTableError(
                f"manifest layout {layout!r} is not {LAYOUT}: made by another version; rebuild with beam_jobs"
            )
        raw["tables"] = {
            name: [Part(**part) for part in parts] for name, parts in raw["tables"].items()
        }
        counts = raw["counts"]
        # Runs of before there were groups of counts hold plain numbers.
        raw["counts"] = Counts(**counts) if "numbers" in counts else Counts(counts)
        return Manifest(**raw)


class JobFolder:
    """One job's folder: write parts, publish, resolve and read its tables.

    Args:
        home: the dataset's home, a local path or an object-store URI that Arrow knows (`gs://`,
            `s3://`).
        job: the job's name.
    """

    def __init__(self, home: str, job: str) -> None:
        self.home = home
        self.job = job
        self.filesystem, root = (
            pafs.FileSystem.from_uri(home) if "://" in home else (pafs.LocalFileSystem(), home)
        )
        self.root = f"{root}/{job}"

    @property
    def local(self) -> bool:
        """True if files can be memory-mapped."""
        return isinstance(self.filesystem, pafs.LocalFileSystem)

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Keep other runs of this job out. On one machine; an object store has no lock, so start a
        job there once.

        Raises:
            JobRunningError: another run holds it.
        """
        if not self.local:
            yield
            return
        try:
            with locked(Path(self.root)):
                yield
        except BlockingIOError as error:
            raise JobRunningError(
                f"another run of {self.job!r} is under way in {self.root}: wait for it, or stop it"
            ) from error

    def manifest(self) -> Manifest | None:
        """The published manifest, or None where no run has finished."""
        stored = self.read_bytes(f"{self.root}/{MANIFEST}")
        return None if stored is None else Manifest.from_json(stored.decode())

    def require(self, contract: Contract | None = None) -> Manifest:
        """The published manifest.

        Args:
            contract: under which it must have been built.

        Raises:
            TableNotBuiltError: no run has finished.
            StaleTableError: it was built under another contract.
        """
        manifest = self.manifest()
        if manifest is None:
            raise TableNotBuiltError(
                f"nothing is built under {self.root}: run `python -m beam_jobs {self.job} --runner=FnApiRunner` first"
            )
        if contract is not None and manifest.fingerprint != contract.fingerprint:
            raise StaleTableError(
                f"job {self.job!r} ran under contract {manifest.fingerprint}, the code declares {contract.fingerprint}: run "
                f"`python -m beam_jobs {self.job}` again"
            )
        return manifest

    def paths(self, table: str, manifest: Manifest | None = None) -> list[str]:
        """Absolute paths of a table's parts, each verified.

        Args:
            manifest: of which run; default: the published one.

        Raises:
            TableNotBuiltError: no run has finished, or the job writes no such table.
            DamagedPartError: a part is not what the run wrote.
        """
        manifest = manifest or self.require()
        if table not in manifest.tables:
            raise TableNotBuiltError(
                f"job {self.job!r} wrote {sorted(manifest.tables)}, not {table!r}"
            )
        return [self.verified(part) for part in manifest.tables[table]]

    def verified(self, part: Part) -> str:
        """Return the absolute path of a part whose bytes are the ones that its run wrote. A process reads a
        file for this once, and again when the file has changed since.

        Raises:
            DamagedPartError: they are not.
        """
        path = f"{self.root}/{part.path}"
        info = self.filesystem.get_file_info(path)
        if info.type == pafs.FileType.NotFound:
            raise DamagedPartError(
                f"{path} is gone: run `python -m beam_jobs {self.job} --force`, which builds it again"
            )
        seen = (info.size, info.mtime_ns, part.sha256)
        if _VERIFIED.get(path) != seen:
            found = self.sha256(path) if info.size == part.bytes else "of another length"
            if found != part.sha256:
                raise DamagedPartError(
                    f"{path} is damaged: expected {part.bytes:,} bytes with sha256 {part.sha256[:12]}, found "
                    f"{info.size:,} with {found[:12]}. Run `python -m beam_jobs {self.job} --force`, which builds it again"
                )
            _VERIFIED[path] = seen
        return path

    def sha256(self, path: str) -> str:
        """Digest of a file's bytes, hexadecimal."""
        digest = hashlib.sha256()
        with self.filesystem.open_input_stream(path) as stream:
            while block := stream.read(READ_BYTES):
                digest.update(block)
        return digest.hexdigest()

    def read(self, table: str, columns: list[str] | None = None) -> pa.Table:
        """A whole table, parts in order."""
        return pa.concat_tables([self.read_path(path, columns) for path in self.paths(table)])

    def open(self, path: str) -> pa.NativeFile:
        """A part for reading: memory-mapped where the file is local."""
        return pa.memory_map(path) if self.local else self.filesystem.open_input_file(path)

    def read_path(self, path: str, columns: list[str] | None = None) -> pa.Table:
        """One part by the path that `paths` gives."""
        return pq.read_table(path, columns=columns, filesystem=self.filesystem)

    def read_bytes(self, path: str) -> bytes | None:
        """A small file's content, None where there is no such file."""
        if self.filesystem.get_file_info(path).type == pafs.FileType.NotFound:
            return None
        with self.filesystem.open_input_stream(path) as stream:
            return bytes(stream.read())

    def write_bytes(self, path: str, data: bytes | pa.Buffer) -> None:
        """Write a file in one visible step; writers of one path at the same time do not meet."""
        folder, name = path.rsplit("/", 1)
        self.filesystem.create_dir(folder, recursive=True)
        # A name for each attempt: two that shared a draft would move each other's half.
        draft = f"{folder}/.{name}.{uuid.uuid4().hex}{DRAFT}"
        with self.filesystem.open_output_stream(draft) as stream:
            stream.write(data)
        self.filesystem.move(draft, path)

    def discard(self, run_id: str) -> None:
        """Remove what an unfinished run left."""
        if self.filesystem.get_file_info(f"{self.root}/{run_id}").type == pafs.FileType.Directory:
            self.filesystem.delete_dir(f"{self.root}/{run_id}")

    def write_part(
        self, run_id: str, table: str, name: str, data: bytes | pa.Buffer, rows: int
    ) -> Part:
        """Write one part in one visible step: a retry or a rerun leaves the same file."""
        self.write_bytes(f"{self.root}/{run_id}/{table}/{name}", data)
        return Part(f"{run_id}/{table}/{name}", rows, len(data), hashlib.sha256(data).hexdigest())

    def publish(self, manifest: Manifest) -> None:
        """Make a run visible, all its tables at once, then drop the folders of runs that no longer
        are.
        """
        previous = self.manifest()
        self.write_bytes(f"{self.root}/{MANIFEST}", manifest.to_json().encode())
        self._keep_only(manifest.runs | (previous.runs if previous else set()))

    def forget_earlier_runs(self) -> None:
        """Drop every file that the published manifest does not name: the run before it, which readers may
        still have open, and what earlier runs left in folders that are kept for their other parts.

        Raises:
            JobRunningError: the job is under way.
        """
        with self.lock():
            manifest = self.manifest()
            if manifest is None:
                return
            self._keep_only(manifest.runs)
            named = {f"{self.root}/{part.path}" for of in manifest.tables.values() for part in of}
            for run in manifest.runs:
                folder = pafs.FileSelector(
                    f"{self.root}/{run}", recursive=True, allow_not_found=True
                )
                for info in self.filesystem.get_file_info(folder):
                    # Notes of parts hold counts and name nobody.
                    counts = "/_parts/" in info.path
                    if info.type == pafs.FileType.File and info.path not in named and not counts:
                        self.filesystem.delete_file(info.path)

    def _keep_only(self, keep: set[str]) -> None:
        for info in self.filesystem.get_file_info(pafs.FileSelector(self.root)):
            if info.type == pafs.FileType.Directory and info.base_name not in keep:
                self.filesystem.delete_dir(info.path)
            # Of attempts that were killed: nobody else publishes now
            if info.type == pafs.FileType.File and info.base_name.endswith(DRAFT):
                self.filesystem.delete_file(info.path)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a folder on this machine, for as long as the process lives.

    Raises:
        BlockingIOError: another process holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield


def held(folder: Path) -> TextIO:
    """Hold a folder together with its other readers; no process can have it `locked` meanwhile.

    Returns:
        A file that holds the folder until it is closed.

    Raises:
        BlockingIOError: another process has it locked.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = open(folder / ".lock", "a")  # noqa: SIM115 - whoever holds the folder closes it
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise
    return file


def parquet_bytes(table: pa.Table) -> pa.Buffer:
    """A table as one Parquet file: zstd, the same bytes for the same rows."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd", write_statistics=True)
    return sink.getvalue()


def digest_of(content: Any) -> str:
    """16 hex digits of a JSON-able value."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[
        :16
    ]
