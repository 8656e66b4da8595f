"""API keys: which scope a caller has. A route declares the scope that it needs (`app.py`)."""

from __future__ import annotations

import hmac
from collections.abc import Awaitable, Callable

from starlette.requests import Request
from starlette.responses import Response

from serving.api.errors import ForbiddenError, UnauthorizedError
from serving.api.settings import Scope, ServeSettings
from serving.routes.server import server_of

Handler = Callable[[Request], Awaitable[Response]]


def check(request: Request, settings: ServeSettings, scope: Scope) -> None:
    """Check the caller's API key. Without configured keys every caller may do everything.

    Raises:
        UnauthorizedError: there is no key, or it is unknown.
        ForbiddenError: it lacks `scope`.
    """
    if not settings.api_keys:
        return
    kind, _, given = request.headers.get("authorization", "").partition(" ")
    found: tuple[Scope, ...] | None = None
    # All of them, in the same time
    for key, scopes in settings.api_keys.items():
        if hmac.compare_digest(key.encode(), given.encode()) and kind.lower() == "bearer":
            found = scopes
    if found is None:
        raise UnauthorizedError(
            "expected `Authorization: Bearer` with an API key that is known here"
        )
    if scope not in found:
        raise ForbiddenError(f"this API key may do {', '.join(found) or 'nothing'}, not {scope}")


def may(request: Request, settings: ServeSettings, scope: Scope) -> bool:
    """Return whether a caller has a scope."""
    try:
        check(request, settings, scope)
    except (UnauthorizedError, ForbiddenError):
        return False
    return True


def requires(scope: Scope, handler: Handler) -> Handler:
    """The handler, for callers whose API key has a scope."""

    async def checked(request: Request) -> Response:
        check(request, server_of(request).settings, scope)
        return await handler(request)

    return checked
