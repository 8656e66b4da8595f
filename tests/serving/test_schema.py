"""Whatever the OpenAPI document allows, and what it does not: no answer is a fault of ours, and each is as
the document says.
"""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis.generation import GenerationMode

from serving.api.messages import EventsResponse
from serving.api.settings import ServeSettings
from serving.command import open_ranker
from serving.live.live import Live, Serving
from serving.routes.app import app_of
from serving.routes.server import Server
from serving.stores.guarded import GuardedReader, ThreadedReader

REFUSALS = {400, 405, 413, 415, 422}
HURRIED, WHOLE = 60, 5_000  # examples of each operation and mode


class TakesAll:
    """Events of anybody, into nothing."""

    without_tokens: ClassVar[dict[str, int]] = {}

    def take(self, user_id: Any, events: list[Any]) -> EventsResponse:
        return EventsResponse(len(events), 0)


@pytest.fixture(scope="module")
def operations(trained_shop: Any) -> dict[str, Any]:
    """Every operation of a server over the shop."""
    ranker = open_ranker(trained_shop.settings, replay=True)
    live = Live(load=lambda digest: pytest.fail("nothing is loaded here"))
    taker: Any = TakesAll()
    live.current = Serving(ranker, GuardedReader(ThreadedReader(ranker.reader)), taker)
    # The tests' client calls every server so.
    named = ServeSettings(deadline_ms=10_000, store_ms=5_000, hosts=("testserver",))
    server = Server(live, named)
    schema = schemathesis.openapi.from_asgi("/openapi.json", app_of(server))
    return {found.ok().label: found.ok() for found in schema.get_all_operations()}


OPERATIONS = (
    "POST /v1/rank",
    "POST /v1/rank:batch",
    "POST /v1/prepare",
    "POST /v1/explain",
    "POST /v1/history",
    "POST /v1/events",
    "GET /v1/overview",
    "GET /livez",
    "GET /readyz",
    "GET /metrics",
    "GET /v1/models",
    "GET /v1/slow",
)


def check(operation: Any, mode: Any, examples: int) -> None:
    """Ask so many times; every answer is declared."""
    statuses: set[int] = set()

    @settings(max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck))
    @given(case=operation.as_strategy(generation_mode=mode))
    def run(case: Any) -> None:
        response = case.call()
        assert response.status_code < 500, response.text
        statuses.add(response.status_code)
        operation.validate_response(response)

    run()
    # What is allowed is mostly answered; what is not is never.
    assert 200 in statuses if mode is GenerationMode.POSITIVE else statuses <= REFUSALS


def test_the_document_names_every_route(operations: dict[str, Any]) -> None:
    assert set(operations) == set(OPERATIONS)


@pytest.mark.parametrize("label", OPERATIONS)
def test_what_the_document_allows_is_answered_as_it_says(
    operations: dict[str, Any], label: str
) -> None:
    check(operations[label], GenerationMode.POSITIVE, HURRIED)


@pytest.mark.parametrize("label", OPERATIONS[:6])
def test_what_it_does_not_allow_is_refused_as_it_says(
    operations: dict[str, Any], label: str
) -> None:
    check(operations[label], GenerationMode.NEGATIVE, HURRIED)


@pytest.mark.whole
@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE])
@pytest.mark.parametrize("label", OPERATIONS[:6])
def test_the_same_many_times_over(
    operations: dict[str, Any], label: str, mode: Any, promises: Any
) -> None:
    check(operations[label], mode, WHOLE)
    promises.note(
        f"{label}, {mode.value} requests drawn from the OpenAPI document",
        "no 5xx, each answer as declared",
        f"{WHOLE:,} requests, none",
        held=True,
    )
