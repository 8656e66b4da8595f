"""New events of a user, taken by the server into all that the online store holds of them: the next
answer knows them.

The history is written first, with the sketch that counts it; statistics and tokens are then brought
up to it, from whatever they hold. So a call that failed half-way is made whole by the next one, and a
caller may send the same events again: one that is there already (the same item, action and time) is
not added twice. One that is earlier than the newest that is known is refused: histories are in the
order of time, and the jobs put late events where they belong.

Two processes that take events of one user at the same moment can lose one of them until the jobs run.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

from feature_repo.contract import Contract
from feature_repo.erased import ErasedList
from feature_repo.online_tokens import OnlineTokens
from modeling.bundle import Bundle
from modeling.summary import Summariser
from serving.errors import ErasedUserError, LateEventError, StoreAwayError
from serving.items import Id
from serving.messages import EventsResponse
from serving.refresh import LateError, Refresher, UserMemory

if TYPE_CHECKING:
    from feast import FeatureStore


class EventTaker:
    """See the module docstring.

    Args:
        store: of its own; no request that ranks waits for it.
        bundle: whose tokens are taken further, where it makes some that stream.
        home: whose erased users are refused; default: nobody was erased.
    """

    def __init__(
        self, store: FeatureStore, contract: Contract, bundle: Bundle, home: str | None = None
    ) -> None:
        refresher = None
        if bundle.makes_tokens:
            summariser = Summariser(bundle.model, bundle.encoder)
            if summariser.streams:
                refresher = Refresher(summariser, OnlineTokens(store, contract), contract)
        self._memory, self._erased = UserMemory(store, contract, refresher), ErasedList(home)
        # To add is to read and to write: two at a time would each write what they read.
        self._one_at_a_time = threading.Lock()

    def take(self, user_id: Id, events: list[dict[str, Any]]) -> EventsResponse:
        """Add events, oldest first.

        Raises:
            LateEventError: one is earlier than what is known; none was added.
            ErasedUserError: the user was erased.
            StoreAwayError: whether they were cannot be told.
            HistoryError: what is stored of the user is damaged.
        """
        try:
            erased = self._erased.now()
        except (OSError, ValueError, KeyError) as error:
            raise StoreAwayError(
                f"the list of erased users cannot be read ({error}), so no events are taken: send them again"
            ) from error
        if erased and erased.hash_of(user_id) in erased.users:
            raise ErasedUserError(
                "this user was erased, and nothing is kept of them: `python -m serving erase --allow` lets them come back"
            )
        with self._one_at_a_time:
            try:
                added = self._memory.add(user_id, events)
            except LateError as error:
                raise LateEventError(str(error)) from error
        return EventsResponse(added, len(events) - added)
