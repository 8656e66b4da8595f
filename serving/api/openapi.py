"""The OpenAPI document, made from the messages and the contract of the bundle in use."""

from __future__ import annotations

from typing import Any

from feature_repo.contract.contract import Contract
from serving.api.messages import JSON, MSGPACK, schemas

# Every POST can fail in these ways.
ERRORS = {
    "400": "no JSON, or no msgpack, or a body that ended before it was whole",
    "401": "no known API key (`Authorization: Bearer`), where keys are configured",
    "403": "an API key that may not do this; without keys a foreign Host, or a page of another site",
    "408": "the body did not arrive in time",
    "413": "body too large",
    "415": "neither JSON nor msgpack by Content-Type, which is required",
    "422": "wrong shape, type or size",
    "503": "not ready, or too many requests under way; Retry-After says when to try again",
}


def openapi_document(contract: Contract | None) -> dict[str, Any]:
    """OpenAPI 3.1, derived from the messages and the dataset's context features."""
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Memoir",
            "version": "0.1.0",
            "description": "Ranks candidates with a user's whole history in view.",
        },
        # Wherever the document was read from
        "servers": [{"url": "/"}],
        # Where no keys are configured, none is asked for.
        "security": [{}, {"api_key": []}],
        "paths": {
            **{path: {"post": described} for path, described in _posts(contract).items()},
            **_gets(),
        },
        "components": {
            "schemas": schemas(contract),
            "securitySchemes": {
                "api_key": {
                    "type": "http",
                    "scheme": "bearer",
                    "description": "one of MEMOIR_SERVE_API_KEYS, with the scope of the route",
                }
            },
        },
    }


def _posts(contract: Contract | None) -> dict[str, dict[str, Any]]:
    """The routes that take a body."""
    posts = {
        "/v1/rank": _post("rank", "Rank candidates for a user", "RankRequest", "RankResponse"),
        "/v1/rank:batch": _post(
            "rank_batch", "Rank for several requests", "RankBatch", "RankBatchResponse"
        ),
        "/v1/prepare": _post(
            "prepare", "Encode a user ahead of a ranking", "PrepareRequest", "PrepareResponse"
        ),
        "/v1/explain": _post(
            "explain", "Say why a candidate is where it is", "ExplainRequest", "ExplainResponse"
        ),
        "/v1/history": _post(
            "history", "What the store holds of a user", "HistoryRequest", "HistoryResponse"
        ),
    }
    # Without a contract no event type is known, so the route cannot be described.
    if contract is not None:
        erased = {"409": "the user was erased"}
        posts["/v1/events"] = _post(
            "events", "Remember a user's new events", "EventsRequest", "EventsResponse", **erased
        )
    return posts


def _gets() -> dict[str, dict[str, dict[str, Any]]]:
    """The routes that only answer."""
    some_json = {"description": "ok", "content": {JSON: {"schema": {"type": "object"}}}}
    text = {"description": "ok", "content": {"text/plain": {"schema": {"type": "string"}}}}
    not_ready = {"503": _reply("not ready", "ErrorBody")}
    plain: dict[str, dict[str, dict[str, Any]]] = {
        path: {"get": {"operationId": operation, "summary": summary, "responses": responses}}
        for path, operation, summary, responses in (
            ("/livez", "live", "the process runs", {"200": some_json}),
            (
                "/readyz",
                "ready",
                "a bundle is loaded and warm, and the online store holds something",
                {"200": some_json, **not_ready},
            ),
            ("/metrics", "metrics", "Prometheus metrics", {"200": text}),
            (
                "/v1/models",
                "models",
                "what ranks, what ranked before, what was refused",
                {"200": some_json},
            ),
            (
                "/v1/slow",
                "slow",
                "the slowest requests of the last hour, with their stages, of one process",
                {"200": _reply("done", "SlowResponse")},
            ),
            (
                "/v1/overview",
                "overview",
                "some users and items, how fresh the tables are, the last report",
                {"200": _reply("done", "OverviewResponse"), **not_ready},
            ),
        )
    }
    # Orchestrators and scrapers that have no key may ask for the first.
    plain["/livez"]["get"]["security"] = []
    return plain


def _post(operation: str, summary: str, asked: str, given: str, **more: str) -> dict[str, Any]:
    """A route that takes one message and answers by another.

    Args:
        more: further ways in which it can fail, by status.
    """
    schema = {"schema": {"$ref": f"#/components/schemas/{asked}"}}
    failures = {**ERRORS, **more}
    return {
        "operationId": operation,
        "summary": summary,
        "requestBody": {"required": True, "content": {JSON: schema, MSGPACK: schema}},
        "responses": {
            "200": _reply("done", given),
            **{status: _reply(text, "ErrorBody") for status, text in failures.items()},
        },
    }


def _reply(description: str, schema: str) -> dict[str, Any]:
    """An answer with a message's schema."""
    content = {JSON: {"schema": {"$ref": f"#/components/schemas/{schema}"}}}
    return {"description": description, "content": content}
