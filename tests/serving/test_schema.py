"""Whatever the OpenAPI document allows, and what it does not: no answer is a fault of ours, and each is as
the document says.
"""

from __future__ import annotations

from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis.generation import GenerationMode

from serving.app import create_app
from serving.command import open_ranker

HURRIED, WHOLE = 60, 5_000  # examples of each operation and mode


@pytest.fixture(scope="module")
def operations(trained_shop: Any) -> dict[str, Any]:
    """Every operation of a server over the shop."""
    ranker = open_ranker(trained_shop.settings, replay=True)
    schema = schemathesis.openapi.from_asgi("/openapi.json", create_app(ranker))
    return {found.ok().label: found.ok() for found in schema.get_all_operations()}


OPERATIONS = (
    "POST /v1/rank",
    "POST /v1/rank:batch",
    "POST /v1/explain",
    "POST /v1/events",
    "GET /livez",
    "GET /readyz",
    "GET /metrics",
    "GET /v1/models",
)


def check(operation: Any, mode: Any, examples: int) -> None:
    """Ask so many times; every answer is declared."""
    asked = 0

    @settings(max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck))
    @given(case=operation.as_strategy(generation_mode=mode))
    def run(case: Any) -> None:
        nonlocal asked
        asked += 1
        response = case.call()
        # This server has no store of its own for events: it says so with a 503, which is declared.
        assert response.status_code < 500 or response.status_code == 503, response.text
        operation.validate_response(response)

    run()
    assert asked


def test_the_document_names_every_route(operations: dict[str, Any]) -> None:
    assert set(operations) == set(OPERATIONS)


@pytest.mark.parametrize("label", OPERATIONS)
def test_what_the_document_allows_is_answered_as_it_says(
    operations: dict[str, Any], label: str
) -> None:
    check(operations[label], GenerationMode.POSITIVE, HURRIED)


@pytest.mark.parametrize("label", OPERATIONS[:4])
def test_what_it_does_not_allow_is_refused_as_it_says(
    operations: dict[str, Any], label: str
) -> None:
    check(operations[label], GenerationMode.NEGATIVE, HURRIED)


@pytest.mark.whole
@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE])
@pytest.mark.parametrize("label", OPERATIONS[:4])
def test_the_same_many_times_over(operations: dict[str, Any], label: str, mode: Any) -> None:
    check(operations[label], mode, WHOLE)
