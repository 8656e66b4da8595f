"""The token log: summary tokens of every user and snapshot, stored once; training reads rows of it
by number.

One row per user and snapshot, in Arrow IPC parts that are memory-mapped. The feature view
`token_rows` says which row holds a user's tokens as they were at an instant: the point-in-time join
carries eight bytes for each example, and `TokenLog.gather` reads the tokens late. A row number
names run, log part, piece and row, so that the parts of later runs stand beside earlier ones and no
number ever changes.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa

from feature_repo.contract.arrow import arrow_type
from feature_repo.contract.contract import Contract
from feature_repo.errors import ExpectedError
from feature_repo.history import envelope
from feature_repo.home.erased import Erased
from feature_repo.home.tables import JobFolder, Manifest, Part, digest_of, parquet_bytes
from feature_repo.home.traces import behind_nulls

JOB = "summary_tokens"
TABLE = "token_log"
# Bits of run, log part, piece and row: 63 in all
BITS = (13, 16, 14, 20)
_NAME = re.compile(r"run-(\d+)-part-(\d+)of(\d+)-piece-(\d+)\.\w+$")


class TokenLogError(ExpectedError, ValueError):
    """Rows that the log does not have, or tokens that are not of the version asked for."""


@dataclass(frozen=True)
class PartName:
    """The parts of a file's name: the run that wrote it, the log part and their number, and which
    piece of that.
    """

    run: int
    part: int
    parts: int
    piece: int

    def file(self, extension: str) -> str:
        return f"run-{self.run:05d}-part-{self.part:05d}of{self.parts:05d}-piece-{self.piece:05d}.{extension}"

    @staticmethod
    def of(path: str) -> PartName | None:
        """Read a path's file name; None for a part without rows, which names nothing."""
        found = _NAME.search(path)
        return PartName(*(int(number) for number in found.groups())) if found else None

    def rows(self, number: int) -> np.ndarray:
        """Row numbers of the first `number` rows, int64.

        Raises:
            TokenLogError: a number does not fit.
        """
        base = 0
        for value, bits in zip(
            (self.run, self.part, self.piece, max(number - 1, 0)), BITS, strict=True
        ):
            if value >= 1 << bits:
                raise TokenLogError(
                    f"{self.file('arrow')} with {number:,} rows is beyond what row numbers can name: build with --full, or "
                    "choose other partitions"
                )
            base = (base << bits) | value
        return (base >> BITS[-1] << BITS[-1]) + np.arange(number, dtype=np.int64)


def versions_of(contract: Contract, folder: JobFolder, manifest: Manifest) -> dict[PartName, str]:
    """The token version of every part."""
    found = {}
    for part in manifest.tables.get("token_rows", []):
        name = PartName.of(part.path)
        if name is not None and part.rows:
            column = contract.table("token_rows").join_keys[1]
            found[name] = folder.read_path(folder.verified(part), [column])[column][0].as_py()
    return found


def drop_version(contract: Contract, home: str, version: str) -> int:
    """Publish the tables of `summary_tokens` without a version; its files go. Returns the rows that
    went.

    Raises:
        JobRunningError: the job is under way.
        TableNotBuiltError: the job has never run.
    """
    folder = JobFolder(home, JOB)
    # A run that goes on meanwhile would publish the version again, hence the lock.
    with folder.lock():
        manifest = folder.require()
        gone = {
            name for name, of in versions_of(contract, folder, manifest).items() if of == version
        }

        def stays(path: str) -> bool:
            return PartName.of(path) not in gone

        dropped = [part for part in manifest.tables.get(TABLE, []) if not stays(part.path)]
        tables = {
            name: [p for p in parts if stays(p.path)] for name, parts in manifest.tables.items()
        }
        # 1. Publish a manifest without the version.
        if dropped:
            options = dict(manifest.options)
            options["versions"] = {
                of: how for of, how in options.get("versions", {}).items() if of != version
            }
            run_id = digest_of([manifest.run_id, "without", version])
            folder.publish(replace(manifest, run_id=run_id, options=options, tables=tables))
        # 2. Delete the files only then: a crash in between leaves files that no manifest names.
        for parts in manifest.tables.values():
            for part in parts:
                if not stays(part.path):
                    folder.filesystem.delete_file(f"{folder.root}/{part.path}")
    return sum(part.rows for part in dropped)


def erase(contract: Contract, home: str, erased: Erased) -> int:
    """Publish the tables of `summary_tokens` without erased users; the files that held them go. Returns
    the rows that went.

    In the token log a row stays where it is, since others' row numbers count it, and loses what it holds.

    Raises:
        JobRunningError: the job is under way.
    """
    folder = JobFolder(home, JOB)
    user = contract.user.join_key
    with folder.lock():
        manifest = folder.manifest()
        if manifest is None:
            return 0
        # The manifest keeps its run, which the online store names: what it holds is still that run's.
        folder_of_these = digest_of([manifest.digest, "without", erased.digest])
        gone = 0
        replaced = []
        tables: dict[str, list[Part]] = {table: [] for table in manifest.tables}
        for table, part in [(of, part) for of, parts in manifest.tables.items() for part in parts]:
            path = folder.verified(part)
            rows = _rows_of(folder, path)
            if rows is None or user not in rows.column_names:  # counts alone
                tables[table].append(part)
                continue
            # A row that was struck and kept its bytes is rebuilt as well.
            held = erased.holds(rows[user]) | erased.holds(behind_nulls(rows[user]))
            if not held.any():
                tables[table].append(part)
                continue
            kept = rows.filter(pa.array(~held))
            data = _blanked(rows, held) if table == TABLE else parquet_bytes(kept)
            number = rows.num_rows if table == TABLE else kept.num_rows
            name = part.path.rsplit("/", 1)[-1]
            made = folder.write_part(folder_of_these, table, name, data, number)
            tables[table].append(made)
            replaced.append(path)
            gone += int(held.sum())
        if replaced:
            folder.publish(replace(manifest, tables=tables))
        for path in replaced:
            folder.filesystem.delete_file(path)
    return gone


def _rows_of(folder: JobFolder, path: str) -> pa.Table | None:
    """A part's rows; None of a part that is no table."""
    if path.endswith(".arrow"):
        return pa.ipc.open_file(folder.open(path)).read_all()
    return folder.read_path(path) if path.endswith(".parquet") else None


def _blanked(rows: pa.Table, held: np.ndarray) -> pa.Buffer:
    """A part of the log whose chosen rows are blank: built anew, because to clear the bit of a
    value keeps its bytes.
    """
    places = pa.array(np.arange(rows.num_rows), mask=held)
    batch = rows.combine_chunks().take(places).combine_chunks().to_batches()[0]
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, batch.schema) as writer:
        writer.write_batch(batch)
    return sink.getvalue()


def log_part(contract: Contract, users: pa.Array, envelopes: list[bytes]) -> pa.RecordBatch:
    """Rows of one part."""
    return pa.RecordBatch.from_arrays(
        [users.cast(arrow_type(contract.user.dtype)), pa.array(envelopes, pa.large_binary())],
        names=[contract.user.join_key, "tokens"],
    )


class TokenLog:
    """The token log of one version, memory-mapped.

    Args:
        contract: the dataset's contract.
        home: the dataset's home.
        version: token fingerprint; other versions' rows are refused.
    """

    def __init__(self, contract: Contract, home: str, version: str) -> None:
        self._folder = JobFolder(home, JOB)
        self._user = contract.user.join_key
        self.version = version
        self._parts: dict[int, Part] = {}
        for part in self._folder.require().tables[TABLE]:
            if (name := PartName.of(part.path)) is not None:
                self._parts[int(name.rows(1)[0]) >> BITS[-1]] = part
        self._open: dict[int, pa.RecordBatch] = {}

    def gather(self, rows: np.ndarray, shape: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
        """Tokens of rows.

        Args:
            rows: B row numbers; -1 where there are no tokens.
            shape: S, D of the version's tokens.

        Returns:
            tokens_BSD, float32, zeros where there are none; and which have tokens, bool B.

        Raises:
            TokenLogError: a row that the log does not have, or tokens of a different version or shape.
        """
        tokens = np.zeros((len(rows), *shape), np.float32)
        has = np.zeros(len(rows), bool)
        for place, row in enumerate(rows.tolist()):
            if row < 0:
                continue
            stored = self.read(row)
            # A tombstone has no tokens, and its row stays zero.
            if stored.tokens_SD is not None:
                if stored.tokens_SD.shape != shape:
                    raise TokenLogError(
                        f"row {row} holds tokens of shape {stored.tokens_SD.shape}, expected {shape}"
                    )
                tokens[place] = stored.tokens_SD
                has[place] = True
        return tokens, has

    def read(self, row: int) -> envelope.Envelope:
        """The tokens of a row.

        Raises:
            TokenLogError: the log does not have it, or holds tokens of a different version.
        """
        part = self._part(row)
        at = row & ((1 << BITS[-1]) - 1)
        if at >= part.num_rows:
            raise TokenLogError(
                f"row {row} lies beyond its part of the token log: index and log are of different runs"
            )
        # The envelope is sealed with the user's key, so tokens of another user are refused.
        stored = envelope.from_bytes(part["tokens"][at].as_py(), part[self._user][at].as_py())
        if stored.fingerprint != self.version:
            raise TokenLogError(
                f"row {row} holds tokens of version {stored.fingerprint}, not {self.version}"
            )
        return stored

    def _part(self, row: int) -> pa.RecordBatch:
        number = row >> BITS[-1]
        if number not in self._open:
            if number not in self._parts:
                raise TokenLogError(
                    f"row {row} is of no part of the token log: index and log are of different runs; run summary_tokens again"
                )
            path = self._folder.verified(self._parts[number])
            try:
                self._open[number] = pa.ipc.open_file(self._folder.open(path)).get_batch(0)
                self._open[number].validate(full=True)
            except (pa.ArrowException, OSError) as error:
                raise TokenLogError(
                    f"{path} is damaged: {error}. Run summary_tokens with --full"
                ) from error
        return self._open[number]
