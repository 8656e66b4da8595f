"""New events of a user, taken by the server into all that the online store holds of them: the next
answer knows them.

An event that is there already (the same item, action and time) changes nothing, so a caller may send it
again. One that is older than the newest that is known is refused: histories are in the order of time, and
the jobs put late events where they belong. Two processes that take events of one user at the same moment
can lose one of them until the jobs run; a balancer that sends a user to one process prevents it.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

from feature_repo.contract import Contract
from feature_repo.history import HistoryError, unpack
from feature_repo.online_tokens import OnlineTokens
from modeling.bundle import Bundle
from modeling.summary import Summariser
from serving.errors import LateEventError
from serving.items import Id
from serving.messages import EventsResponse
from serving.refresh import NoStateError, Refresher, UserMemory

if TYPE_CHECKING:
    from feast import FeatureStore


class EventTaker:
    """See the module docstring.

    Args:
        store: of its own; no request that ranks waits for it.
        bundle: whose tokens are taken further, where it makes some that stream.
    """

    def __init__(self, store: FeatureStore, contract: Contract, bundle: Bundle) -> None:
        self._contract = contract
        self._plain = UserMemory(store, contract)
        self._whole = self._plain
        if bundle.makes_tokens:
            summariser = Summariser(bundle.model, bundle.encoder)
            if summariser.streams:
                refresher = Refresher(summariser, OnlineTokens(store, contract), contract)
                self._whole = UserMemory(store, contract, refresher)
        self._one_at_a_time = threading.Lock()

    def take(self, user_id: Id, events: list[dict[str, Any]]) -> EventsResponse:
        """Add events, oldest first.

        Raises:
            LateEventError: one is older than what is known; none was added.
            HistoryError: what is stored of the user is damaged.
        """
        with self._one_at_a_time:
            known = self._known(user_id)
            new, seen = [], set(known)
            for event in events:
                if (key := self._key(event)) not in seen:
                    seen.add(key)
                    new.append(event)
            if new:
                self._add(user_id, new)
            return EventsResponse(len(new), len(events) - len(new))

    def _add(self, user_id: Id, new: list[dict[str, Any]]) -> None:
        try:
            try:
                self._whole.add(user_id, new)
            except NoStateError:  # a user whose tokens the job has not made yet
                self._plain.add(user_id, new)
        except HistoryError:
            raise
        except ValueError as error:
            raise LateEventError(str(error)) from error

    def _known(self, user_id: Id) -> list[tuple[Any, ...]]:
        """Events of the stored history."""
        packed = self._plain.read(user_id)["user_history"]["history"]
        if packed is None:
            return []
        return [self._key(event) for event in unpack(self._contract, user_id, packed).to_pylist()]

    def _key(self, event: dict[str, Any]) -> tuple[Any, ...]:
        return event[self._contract.item.join_key], event["action"], event["event_timestamp"]
