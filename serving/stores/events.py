"""New events of a user, taken by the server into all that the online store holds of them: the next
answer knows them.

History, sketch, statistics and tokens are replaced together, and only if they are unchanged since
they were read; so any number of processes may take events of one user, and a caller may send the same
events again: one that is there already (the same item, action and time) is not added twice. In the same
step they enter the log from which the jobs read them (`feature_repo/store/event_log.py`): the next batch
forgets none. A late event takes its place by time; one that is older than all that the store holds of a longer
past enters the log alone, and the next batch knows it.
"""

from __future__ import annotations

import logging
import threading
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from feature_repo.contract import limits
from feature_repo.contract.arrow import history_schema
from feature_repo.contract.contract import Contract
from feature_repo.contract.schema import Table
from feature_repo.home.erased import ErasedList
from feature_repo.home.known_users import KnownUsers
from feature_repo.store.online_tokens import OnlineTokens
from modeling.summaries.summariser import Summariser
from serving.api.errors import ErasedUserError, InvalidRequestError, StoreAwayError
from serving.api.messages import EventsResponse
from serving.stores.items import Id
from serving.stores.refresh import BusyUserError, CannotTellError, Refresher, UserMemory

if TYPE_CHECKING:
    from feast import FeatureStore


logger = logging.getLogger(__name__)


class EventTaker:
    """See the module docstring.

    Args:
        store: apart from the ranking path's, so that no ranking request waits for it.
        summariser: stage 1 of the tokens that are served; where it streams, they take the events in.
        home: the users on its list of erased users are refused; default: no list.
    """

    def __init__(
        self,
        store: FeatureStore,
        contract: Contract,
        summariser: Summariser | None,
        home: str | None = None,
    ) -> None:
        refresher = None
        if summariser is not None and summariser.streams:
            refresher = Refresher(summariser, OnlineTokens(store, contract), contract)
        known = KnownUsers(home, contract.user)
        self._memory = UserMemory(store, contract, refresher, known)
        if not self._memory.has_log:
            logger.warning(
                "an online store of type %s keeps no log of events: the next batch forgets those that are in no file",
                store.config.online_store.type,
            )
        self._schema = history_schema(contract)
        self._limits = Table("events", "Events by HTTP.", contract.history_columns)
        self._erased = ErasedList(home)
        # Two threads of one process would only make each other begin again.
        self._one_at_a_time = threading.Lock()

    @property
    def without_tokens(self) -> dict[str, int]:
        """Events that summary tokens do not know, by why: the job makes these."""
        return dict(self._memory.without_tokens)

    def close(self) -> None:
        self._memory.close()

    def take(self, user_id: Id, events: list[dict[str, Any]]) -> EventsResponse:
        """Add events, in any order.

        Raises:
            InvalidRequestError: one breaks a limit of the contract: the next batch would set it aside.
            ErasedUserError: the user was erased.
            StoreAwayError: whether they were, or whether a user without a record is new, cannot be told.
            HistoryError: what is stored of the user is damaged.
        """
        self._refuse_broken(events)
        with self._one_at_a_time:
            try:
                taken = self._memory.add(user_id, events, lambda: self._refuse_erased(user_id))
            except (BusyUserError, CannotTellError) as error:
                raise StoreAwayError(f"{error}: send them again") from error
        known = len(events) - taken.added - taken.waiting
        return EventsResponse(taken.added, known, taken.waiting)

    def _refuse_broken(self, events: list[dict[str, Any]]) -> None:
        """Refuse what no batch would take, so that what is acknowledged is kept."""
        rows = pa.Table.from_pylist(events, schema=self._schema)
        if reasons := limits.check(self._limits, rows).reasons:
            raise InvalidRequestError(
                f"an event breaks the contract, {reasons[0]}; nothing was added"
            )

    def _refuse_erased(self, user_id: Id) -> None:
        """Refuse events of a user who was erased, also while they were on their way."""
        try:
            erased = self._erased.now()
        except (OSError, ValueError, KeyError) as error:
            raise StoreAwayError(
                f"the list of erased users cannot be read ({error}), so no events are taken: send them again"
            ) from error
        if erased and erased.hash_of(user_id) in erased.users:
            raise ErasedUserError(
                "this user was erased, and nothing is kept of them: `python -m beam_jobs erase --allow` lets them come back"
            )
