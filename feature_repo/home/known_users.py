"""Users whom the newest run of `materialize` sent online: a store that lost one cannot say it itself.

Each part of users that `materialize` sends leaves their codes, sorted; a server that is told of an event and finds
no record looks here whether there should be one.
"""

from __future__ import annotations

import time

import numpy as np
import pyarrow as pa

from feature_repo.contract.arrow import arrow_type, value_codes
from feature_repo.contract.schema import Entity
from feature_repo.home.erased import ErasedList
from feature_repo.home.tables import DamagedPartError, JobFolder, Manifest, StaleTableError

# Tables of the job that sends users: which keys a run sends, and the codes of users among them
KEYS = "online_keys"
KNOWN_USERS = "known_users"
STATS = "user_stats"
# Users by whom one sees whether any are lost
NUM_SOME = 64
JOB = "materialize"
# Seconds for which the manifest that was read counts as the newest
FRESH_S = 5.0


def codes_file(users: pa.Array | pa.ChunkedArray) -> pa.Buffer:
    """The sorted codes of users as one file, which is searched where it lies."""
    table = pa.table({"code": np.sort(value_codes(users))})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue()


class SentUsers:
    """Some of the users whom a home's newest run of `materialize` sent, by whom one sees whether a store lost any.
    Erased ones are not among them.

    Args:
        home: the folder of the tables.

    Example:
        >>> SentUsers(home, contract.user).some()
        [12346, 12680, …]
    """

    def __init__(self, home: str, user: Entity) -> None:
        self._folder = JobFolder(home, JOB)
        self._key = user.join_key
        self._read_at = -FRESH_S
        # Whose users they are; a home may serve several stores, which hold different runs
        self.run: str | None = None
        self._users: list[int | str] = []
        self._erased = ErasedList(home)

    def some(self) -> list[int | str]:
        """`NUM_SOME` of them, from all over the table; none where the home cannot be read now."""
        try:
            if time.monotonic() >= self._read_at + FRESH_S:
                self._read_at = time.monotonic()
                self._read()
            erased = self._erased.now()
        except (OSError, ValueError, KeyError, DamagedPartError, StaleTableError):
            return []
        return [user for user in self._users if erased.hash_of(user) not in erased.users]

    def _read(self) -> None:
        """Read the parts of a newer run, if there is one."""
        found = self._folder.manifest()
        if found is None or found.run_id == self.run:
            return
        parts = [part for part in found.tables.get(KEYS, []) if f"/{STATS}-" in part.path]
        rows = np.cumsum([0, *(part.rows for part in parts)])
        chosen = np.unique(np.linspace(0, max(rows[-1] - 1, 0), NUM_SOME).astype(np.int64))
        users: list[int | str] = []
        for part, first, end in zip(parts, rows, rows[1:], strict=False):
            places = chosen[(chosen >= first) & (chosen < end)] - first
            if len(places):
                keys = self._folder.read_path(self._folder.verified(part), [self._key])[self._key]
                users += keys.take(pa.array(places)).to_pylist()
        self._users = users
        self.run = found.run_id


class KnownUsers:
    """The users whom a home's newest run of `materialize` sent.

    Args:
        home: the folder of the tables; None: there are none here.

    Example:
        >>> KnownUsers(home, contract.user).has(12680)
        True
    """

    def __init__(self, home: str | None, user: Entity) -> None:
        self._folder = None if home is None else JobFolder(home, JOB)
        self._type = arrow_type(user.dtype)
        self._read_at = -FRESH_S
        self._manifest: Manifest | None = None
        self._codes: list[np.ndarray] = []

    def has(self, user_id: int | str) -> bool | None:
        """True if the user was sent; None where nothing says it.

        Raises:
            OSError, DamagedPartError: the home cannot be read now.
        """
        self._refresh()
        if self._manifest is None or KNOWN_USERS not in self._manifest.tables:
            return None
        (code,) = value_codes(pa.array([user_id], self._type))
        return any(_holds(codes, code) for codes in self._codes)

    def _refresh(self) -> None:
        """Read the parts of a newer run, if there is one."""
        if self._folder is None or time.monotonic() < self._read_at + FRESH_S:
            return
        found = self._folder.manifest()
        if found is not None and found != self._manifest:
            paths = self._folder.paths(KNOWN_USERS, found) if KNOWN_USERS in found.tables else []
            self._codes = [_codes_of(self._folder, path) for path in paths]
        self._manifest = found
        self._read_at = time.monotonic()


def _codes_of(folder: JobFolder, path: str) -> np.ndarray:
    """The codes of a file; of a local one they stay there until they are asked for."""
    with folder.open(path) as source:
        column = pa.ipc.open_file(source).read_all()["code"].combine_chunks()
    codes: np.ndarray = column.to_numpy(zero_copy_only=False)
    return codes


def _holds(codes: np.ndarray, code: np.int64) -> bool:
    place = int(np.searchsorted(codes, code))
    return place < len(codes) and bool(codes[place] == code)
