"""Checks of a request's origin, before any route.

A server without API keys trusts every caller. A browser reaches it on behalf of any page that
its user opens: by a cross-site request, whose answer the page cannot read but whose event would be
taken, or by a name of the page's own that resolves to this machine (DNS rebinding), with which it
could read histories. So without keys a request must call this server by a name that it has, and must
not come from another site.
"""

from __future__ import annotations

from ipaddress import ip_address
from urllib.parse import urlsplit

from starlette.types import Scope

from serving.api.errors import BadRequestError, ForbiddenError, ServingError
from serving.api.settings import ServeSettings

# Answered without a key, under any Host
OPEN = "/livez"


def why_refused(scope: Scope, settings: ServeSettings) -> ServingError | None:
    """Why a request is refused before it is read; None where it may go on."""
    hosts = _values(scope, b"host")
    if len(hosts) > 1 or (not hosts and scope.get("http_version", "1.1") == "1.1"):
        return BadRequestError(f"a request names one Host, this names {len(hosts)}")
    if settings.api_keys or scope["path"] == OPEN:
        return None
    host = hosts[0] if hosts else ""
    if host and not _is_ours(host, settings):
        return ForbiddenError(
            f"this server is not called {host!r}: MEMOIR_SERVE_HOSTS names what callers without an API key may call it"
        )
    for origin in _values(scope, b"origin"):
        if urlsplit(origin).netloc != host:
            return ForbiddenError(f"pages of {origin!r} may not ask here without an API key")
    for site in _values(scope, b"sec-fetch-site"):
        # A person who follows a link to the page, or types its address, navigates.
        opens_page = scope["method"] == "GET" and _values(scope, b"sec-fetch-mode") == ["navigate"]
        if site in ("cross-site", "same-site") and not opens_page:
            return ForbiddenError("pages of other sites may not ask here without an API key")
    return None


def _values(scope: Scope, name: bytes) -> list[str]:
    return [value.decode("latin-1") for key, value in scope["headers"] if key == name and value]


def _is_ours(host: str, settings: ServeSettings) -> bool:
    """Return whether a Host is an address, which no page can rebind, or a name of the server."""
    name = urlsplit(f"//{host}").hostname or ""
    try:
        ip_address(name)
    except ValueError:
        local = name == "localhost" or name.endswith(".localhost")
        return local or name in {known.lower() for known in (settings.host, *settings.hosts)}
    return True
