"""`POST /v1/events`: its places are apart, so that a slow store does not stop ranking."""

from __future__ import annotations

import asyncio
import logging

from starlette.requests import Request
from starlette.responses import Response

from feature_repo.errors import advice_on
from feature_repo.history.history import HistoryError
from serving.api.errors import InvalidRequestError, NotReadyError, ServingError, StoreAwayError
from serving.api.messages import decode_events
from serving.api.pools import run_in
from serving.routes.bodies import answered_with, media_of
from serving.routes.server import server_of

logger = logging.getLogger(__name__)


async def take_events(request: Request) -> Response:
    """Add new events of a user to all that the online store holds of them."""
    server = server_of(request)
    serving, body = await server.received(request, server.event_admission)
    settings = server.settings
    if serving.events is None:
        raise NotReadyError("this server takes no events: it has no online store of its own")
    user_id, events = decode_events(body, serving.ranker.contract, media_of(request))
    # An accepted event of the future would be the newest of its user for as long as that lasts.
    latest = server.latest()
    for event in events:
        if event["event_timestamp"] > latest:
            raise InvalidRequestError(
                f"an event lies in the future: {event['event_timestamp'].isoformat()}; nothing was added"
            )
    # The take goes on in its thread after a timeout, so that some events may be stored.
    with server.event_admission.admitted():
        taking = run_in(server.pools.events, serving.events.take, user_id, events)
        try:
            async with asyncio.timeout(settings.events_s):
                taken = await taking
        except ServingError as error:
            # This error carries its status and its message already.
            outcome = "failed" if error.status >= 500 else "rejected"
            server.metrics.events.labels(outcome).inc(len(events))
            raise
        except HistoryError as error:
            server.metrics.events.labels("rejected").inc(len(events))
            raise InvalidRequestError(
                f"what is stored of this user is damaged, and takes no events until the jobs ran: {error}"
            ) from error
        except Exception as error:
            # Whatever a store's client raises
            server.metrics.events.labels("failed").inc(len(events))
            logger.warning("events could not be taken: %s", advice_on(error) or error)
            raise StoreAwayError(
                f"the online store did not take the events within {settings.events_s:g} s "
                f"({type(error).__name__}); some may be there: send them again, which adds none twice"
            ) from error
    for outcome, number in (
        ("added", taken.added),
        ("known", taken.known),
        ("waiting", taken.waiting),
    ):
        server.metrics.events.labels(outcome).inc(number)
    return answered_with(request, taken)
