"""Users who were erased: the `events` job leaves them out, so that no table built from it knows them, and
the server takes no events of theirs, until they are allowed again.

The list is `<home>/erased/users.json`. It holds a keyed hash of each id, so that it recognises a user without
naming one.
"""

from __future__ import annotations

import hashlib
import json
import secrets
import time
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from feature_repo.home.tables import JobFolder, digest_of

FOLDER = "erased"
USERS = "users.json"
# Stands in place of a raw row
REDACTED = '{"erased": true}'
_BLANK = json.loads(REDACTED)


@dataclass(frozen=True)
class Erased:
    """The list, as it is now.

    >>> Erased("00", frozenset()).holds(pa.array([12680])).tolist()
    [False]
    """

    salt: str = ""
    users: frozenset[str] = field(default_factory=frozenset)

    def __bool__(self) -> bool:
        return bool(self.users)

    @property
    def digest(self) -> str:
        """A digest of the listed users."""
        return digest_of([self.salt, sorted(self.users)])

    def hash_of(self, user: Any) -> str:
        """Return the keyed hash by which the list holds a user."""
        key = bytes.fromhex(self.salt)
        text = str(user).encode(errors="surrogatepass")
        return hashlib.blake2b(text, key=key, digest_size=16).hexdigest()

    def holds(self, users: pa.Array | pa.ChunkedArray) -> np.ndarray:
        """Which of these ids are listed, bool."""
        if not self.users or not len(users):
            return np.zeros(len(users), bool)
        joined = users.combine_chunks() if isinstance(users, pa.ChunkedArray) else users
        coded = joined.dictionary_encode()
        listed = [self.hash_of(user) in self.users for user in coded.dictionary.to_pylist()]
        places = pc.fill_null(coded.indices, len(listed)).to_numpy(zero_copy_only=False)
        return np.array([*listed, False])[places]

    def without(self, rows: pa.Table, key: str) -> pa.Table:
        held = self.holds(rows[key])
        return rows.filter(pa.array(~held)) if held.any() else rows

    def in_raw(self, rows: Iterable[str], names: Collection[str], user: str) -> np.ndarray:
        """Which rows, as dead letters hold them, are of a listed user, bool.

        A raw row that does not say whose it is counts as one: a line that could not be split, and every row
        where code makes the ids of users.

        Args:
            names: of the raw columns that hold users; none where code makes them.
            user: the join key, which a row has that broke a limit only after it was read.
        """
        return np.array([self._in_row(json.loads(row), names, user) for row in rows], bool)

    def _in_row(self, row: dict[str, Any], names: Collection[str], user: str) -> bool:
        if row == _BLANK:
            return False
        if user in row:
            values = [row[user]]
        elif not names or "line" in row:
            return True
        else:
            values = [value for name, value in row.items() if name in names]
        return any(self.hash_of(form) in self.users for value in values for form in _forms(value))


def _forms(value: Any) -> set[str]:
    """How a raw value may read as an id: 12680.0 and " 12680 " are 12680."""
    text = str(value).strip()
    found = {str(value), text}
    try:
        number = float(text)
    except ValueError:
        return found
    return found | {str(int(number))} if number.is_integer() else found


def erased_of(home: str) -> Erased:
    """Return the list of a home; an empty one if no user was erased."""
    folder = JobFolder(home, FOLDER)
    stored = folder.read_bytes(f"{folder.root}/{USERS}")
    if stored is None:
        return Erased()
    read = json.loads(stored)
    return Erased(read["salt"], frozenset(read["users"]))


class ErasedList:
    """The list of a home for who asks often: read again after a second.

    >>> ErasedList(None).now().users
    frozenset()

    Args:
        home: None if no user was erased.
    """

    def __init__(self, home: str | None) -> None:
        self._home = home
        self._read = Erased()
        self._until = 0.0

    def now(self) -> Erased:
        """As it was at most a second ago.

        Raises:
            OSError, ValueError, KeyError: it cannot be read.
        """
        if self._home is not None and time.monotonic() >= self._until:
            self._read = erased_of(self._home)
            self._until = time.monotonic() + 1.0
        return self._read


def list_erased(home: str, users: Collection[Any], *, allow: bool = False) -> Erased:
    """Put users on the list, or with `allow` take them off; returns the list.

    Raises:
        JobRunningError: somebody else writes it.
    """
    folder = JobFolder(home, FOLDER)
    with folder.lock():
        now = erased_of(home)
        salted = Erased(now.salt or secrets.token_hex(32), now.users)
        named = frozenset(map(salted.hash_of, users))
        made = Erased(salted.salt, now.users - named if allow else now.users | named)
        listed = {"salt": made.salt, "users": sorted(made.users)}
        folder.write_bytes(f"{folder.root}/{USERS}", json.dumps(listed, indent=1).encode())
    return made
