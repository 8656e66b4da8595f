"""Tokens that earlier runs of `summary_tokens` stored: their users, the number and digest of their
events, and the states of streams.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from beam_jobs.engine.plan import RunPlan
from beam_jobs.summary_tokens.token_options import prepared
from feature_repo.contract.arrow import arrow_schema, from_micros
from feature_repo.contract.contract import TOKEN_VERSION
from feature_repo.contract.key_index import KeyIndex
from feature_repo.contract.schema import EVENT_TIMESTAMP
from feature_repo.history import token_log
from feature_repo.history.envelope import EnvelopeError, from_bytes
from feature_repo.history.history import Histories, newest_rows
from feature_repo.history.token_log import PartName

# Envelopes of a user's tokens and of their state
Stored = tuple[bytes, bytes | None]


@dataclass(frozen=True)
class StoredStream:
    """A stage 1 that can go on: its state, R × K, and the time of the last event in it, microseconds."""

    state: np.ndarray
    as_of: int


@dataclass(frozen=True)
class KnownTokens:
    """The events behind each user's newest tokens; zeros without tokens."""

    num_events: np.ndarray
    digests: np.ndarray


class Earlier:
    """Tokens of one version that earlier runs stored for the users of one log part, or, with no part
    named, for all users.
    """

    def __init__(self, plan: RunPlan, part: int | None) -> None:
        self._plan = plan
        self._user = plan.contract.user.join_key
        manifest = plan.folder.manifest()
        self._tables = manifest.tables if manifest else {}
        self._part = part

    @property
    def users(self) -> pa.Array:
        """Everybody of whom there are tokens, or a tombstone."""
        return self._rows[self._user].combine_chunks()

    @property
    def all_events(self) -> np.ndarray:
        """Events behind the newest tokens of `users`; 0 for a tombstone."""
        return self._rows["token_events"].to_numpy()

    def newest_of(self, users: pa.Array) -> KnownTokens:
        """Return the events behind these users' newest tokens."""
        place = self._index.places(users)
        found = {}
        for name in ("token_events", "token_digest"):
            # Place -1, of a user without tokens, finds the zero.
            values = np.r_[self._rows[name].to_numpy(), 0]
            found[name] = values[place].astype(np.int64)
        return KnownTokens(found["token_events"], found["token_digest"])

    def streams(
        self, ids: list[Any], known: np.ndarray, histories: Histories, rows: list[int]
    ) -> dict[int, StoredStream]:
        """Stored streams of these rows, with the time of their last event.

        The digest says that the events behind them are still the first of the history. Events that
        came since with the time of the last one, or before it, cannot be added to what a stream has
        seen: then the history is read anew.
        """
        found: dict[int, StoredStream] = {}
        stored = self.stored([ids[row] for row in rows]) if rows else {}
        for row in rows:
            _, kept = stored.get(ids[row], (b"", None))
            if kept is None:
                continue
            try:
                state = from_bytes(kept, ids[row])
            except EnvelopeError:
                # Damaged: the whole history is read instead
                continue
            following = int(histories.offsets[row] + known[row])
            followed = (
                following < histories.offsets[row + 1] and histories.times[following] <= state.as_of
            )
            ours = (
                state.fingerprint == prepared(self._plan).version and state.num_events == known[row]
            )
            if ours and not followed and state.tokens_SD is not None:
                found[row] = StoredStream(state.tokens_SD, state.as_of)
        return found

    def stored(self, ids: list[Any]) -> dict[Any, Stored]:
        places = self._stored_index.places(pa.array(ids, self._stored_index.keys.type))
        rows = (
            self._stored.take(pa.array(places[places >= 0]))
            .select([self._user, "tokens", "state"])
            .to_pylist()
        )
        return {row[self._user]: (row["tokens"], row["state"]) for row in rows}

    @cached_property
    def _index(self) -> KeyIndex:
        return KeyIndex(self.users)

    @cached_property
    def _stored_index(self) -> KeyIndex:
        return KeyIndex(self._stored[self._user].combine_chunks())

    @cached_property
    def _rows(self) -> pa.Table:
        """The newest pointer of each user: of the newest run, and of that the newest snapshot."""
        rows = self._read("token_rows", ["token_row", "token_events", "token_digest"])
        run = pc.shift_right(rows["token_row"], sum(token_log.BITS[1:]))
        rows = rows.append_column("__run", run).sort_by(
            [(self._user, "ascending"), ("__run", "ascending"), (EVENT_TIMESTAMP, "ascending")]
        )
        # The order that was just made, as `newest_rows` reads it
        stamps = from_micros(np.arange(rows.num_rows))
        at = rows.column_names.index(EVENT_TIMESTAMP)
        return (
            newest_rows(rows.set_column(at, EVENT_TIMESTAMP, stamps), self._user)
            if rows.num_rows
            else rows
        )

    @cached_property
    def _stored(self) -> pa.Table:
        rows = self._read("summary_tokens", ["tokens", "state"])
        return newest_rows(rows, self._user) if rows.num_rows else rows

    def _read(self, table: str, columns: list[str]) -> pa.Table:
        keys = [self._user, TOKEN_VERSION.join_key, EVENT_TIMESTAMP]
        folder = self._plan.folder
        rows = [arrow_schema(self._plan.contract.table(table)).empty_table()]
        for part in self._tables.get(table, []):
            name = PartName.of(part.path)
            if name is None or not self._may_hold(name):
                continue
            read = folder.read_path(folder.verified(part), [*keys, *columns])
            rows.append(
                read.filter(pc.equal(read[TOKEN_VERSION.join_key], prepared(self._plan).version))
            )
        return pa.concat_tables([row.select([*keys, *columns]) for row in rows]).combine_chunks()

    def _may_hold(self, name: PartName) -> bool:
        """Return whether a part may hold users of this one: they keep their log part as long as the number of
        parts stays.

        Tombstones stand in a part behind the last one, for users of all.
        """
        if self._part is None or name.parts != prepared(self._plan).log_parts:
            return True
        return name.part in (self._part, name.parts)
