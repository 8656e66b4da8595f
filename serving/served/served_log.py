"""The log of served requests, with the very numbers that the model saw: a sample of users, in Parquet.

`audit.py` computes the same numbers anew from the tables, as of each request, and says where they differ;
it can rank logged requests with another bundle. Sampled by a hash of the user, so a user is in the log
with all requests or with none.

No answer waits for the log: rows go through a bounded queue to a thread that writes whole files; what does
not fit is dropped and counted.
"""

from __future__ import annotations

import json
import logging
import queue
import threading
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from feature_repo.atomic import atomic_write
from feature_repo.contract.arrow import TIMESTAMP, arrow_type, hash_keys
from feature_repo.contract.contract import Contract
from feature_repo.errors import ExpectedError
from feature_repo.home.erased import ErasedList
from modeling.inputs.encoder import Encoded, Encoder
from serving.api.messages import RankRequest, RankResponse
from serving.stores.items import Id

MAX_WAITING = 10_000  # rows
# Rows of a file, at most
PART_ROWS = 1_000
logger = logging.getLogger(__name__)


class NoLogError(ExpectedError, FileNotFoundError):
    """There is no log of what was served."""


@dataclass(frozen=True)
class Served:
    """One answer and what it was made from.

    Args:
        at: the request's time.
        encoded: the one request as numbers.
    """

    asked: RankRequest
    answer: RankResponse
    at: datetime
    encoded: Encoded


def log_schema(contract: Contract) -> pa.Schema:
    """Columns of the log; lists run over the candidates in the request's order."""
    item = arrow_type(contract.item.dtype)
    context = [pa.field(c.name, arrow_type(c.dtype)) for c in contract.spec.context_features]
    return pa.schema(
        [
            ("request_id", pa.string()),
            ("request_timestamp", TIMESTAMP),
            ("served_at", TIMESTAMP),
            (contract.user.join_key, arrow_type(contract.user.dtype)),
            ("candidates", pa.list_(item)),
            ("ranked", pa.list_(item)),
            ("scores", pa.list_(pa.float64())),
            ("bundle", pa.string()),
            ("tokens", pa.string()),
            ("degraded", pa.list_(pa.string())),
            ("user_dense", pa.list_(pa.float32())),
            # Candidate by candidate
            ("candidate_dense", pa.list_(pa.float32())),
            *context,
        ]
    )


class ServedLog:
    """Writes a share of the users' requests.

    Args:
        folder: of this bundle's parts, because its features are named in them; a folder a day.
        share: of the users.
        every_s: the longest that a row waits for its file.
        home: the users on its list of erased users are left out; default: no list.
    """

    def __init__(
        self,
        folder: Path,
        encoder: Encoder,
        share: float = 0.01,
        every_s: float = 30.0,
        home: str | None = None,
    ) -> None:
        self._erased = ErasedList(home)
        self._folder = folder
        self._encoder = encoder
        self._share = share
        self._kind = arrow_type(encoder.contract.user.dtype)
        self.schema = log_schema(encoder.contract).with_metadata(
            {
                "dense_names": json.dumps(encoder.dense_names),
                "dataset": encoder.contract.spec.name,
            }
        )
        self._waiting: queue.Queue[dict[str, Any]] = queue.Queue(MAX_WAITING)
        self._every_s = every_s
        self._stop = threading.Event()
        self.written = 0
        self.dropped = 0
        self._thread = threading.Thread(target=self._write_for_ever, daemon=True, name="served")
        self._thread.start()

    def samples(self, user_id: Id) -> bool:
        """Return whether a user's requests are logged."""
        hashed = int(hash_keys(pa.array([user_id], self._kind))[0])
        return hashed < self._share * 2**64

    def add(self, served: Served) -> None:
        """Log an answer, later; where too many wait, it is dropped and counted."""
        try:
            self._waiting.put_nowait(self._row(served))
        except queue.Full:
            self.dropped += 1

    def close(self) -> None:
        self._stop.set()
        self._thread.join(timeout=10)

    def _row(self, served: Served) -> dict[str, Any]:
        asked = served.asked
        answer = served.answer
        contract = self._encoder.contract
        return {
            "request_id": answer.request_id or uuid.uuid4().hex,
            "request_timestamp": served.at,
            "served_at": datetime.now(UTC),
            contract.user.join_key: asked.user_id,
            "candidates": asked.candidates,
            "ranked": answer.item_ids,
            "scores": answer.scores,
            "bundle": answer.bundle,
            "tokens": answer.tokens,
            "degraded": list(answer.degraded),
            "user_dense": np.asarray(served.encoded.dense_BG)[0].tolist(),
            "candidate_dense": np.asarray(served.encoded.candidate_dense).ravel().tolist(),
            **{
                c.name: getattr(asked.context, c.name, None) for c in contract.spec.context_features
            },
        }

    def _write_for_ever(self) -> None:
        rows: list[dict[str, Any]] = []
        due = time.monotonic() + self._every_s
        while True:
            stopping = self._stop.is_set()
            try:
                rows.append(self._waiting.get(timeout=0.05 if stopping else 0.2))
            except queue.Empty:
                if stopping:
                    self._write(rows)
                    return
            if len(rows) >= PART_ROWS or (rows and time.monotonic() >= due):
                self._write(rows)
                rows = []
                due = time.monotonic() + self._every_s

    def _write(self, rows: Sequence[dict[str, Any]]) -> None:
        """One file, visible when it is whole."""
        if not rows:
            return
        try:
            folder = self._folder / f"{datetime.now(UTC):%Y-%m-%d}"
            folder.mkdir(parents=True, exist_ok=True)
            table = pa.Table.from_pylist(list(rows), schema=self.schema)
            table = self._erased.now().without(table, self._encoder.contract.user.join_key)
            if not table.num_rows:
                return
            with atomic_write(folder / f"part-{uuid.uuid4().hex}.parquet") as draft:
                pq.write_table(table, draft)
            self.written += table.num_rows
        except Exception:
            # Whatever it was, the next file is tried again
            self.dropped += len(rows)
            logger.exception("%d served requests could not be logged", len(rows))


def newest_of(folder: Path, number: int, user_key: str) -> list[dict[str, Any]]:
    """Users and candidates of the newest logged requests of any bundle, at most so many; none where there is no log that can
    be read.

    Args:
        user_key: the column of users.
    """
    # A folder a bundle, in it a folder a day
    days = sorted(folder.glob("*/*/"), key=lambda day: day.name)
    try:
        parts = [part for day in days[-3:] for part in day.glob("part-*.parquet")]
        newest = max(parts, key=lambda part: part.stat().st_mtime, default=None)
        if newest is None:
            return []
        rows = pq.read_table(newest, columns=[user_key, "candidates"])
    except (OSError, pa.ArrowException) as error:
        logger.warning("the newest logged requests cannot be read: %s", error)
        return []
    found: list[dict[str, Any]] = rows.slice(max(rows.num_rows - number, 0)).to_pylist()
    return found


def read_log(folder: Path) -> pa.Table:
    """Read all parts of a log.

    Raises:
        NoLogError: there is no part.
    """
    parts = sorted(folder.rglob("part-*.parquet"))
    if not parts:
        held = sorted(one.name for one in folder.parent.glob("*") if one.is_dir())
        raise NoLogError(
            f"{folder} holds no part of a log of served requests; beside it are {held}"
        )
    tables = [pq.read_table(part) for part in parts]
    return pa.concat_tables(tables, promote_options="permissive")
