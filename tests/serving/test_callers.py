"""Who may call a server without API keys: programs by its own names, and no page of another site."""

from __future__ import annotations

from typing import Any

import pytest

from serving.api.settings import ServeSettings
from serving.routes.callers import why_refused

PLAIN = ServeSettings()
NAMED = ServeSettings(hosts=("ranker.shop.internal",))
KEYS = ServeSettings(api_keys={"a" * 16: ("rank",)})


def scope(host: str | None = "localhost:8000", method: str = "POST", **headers: str) -> Any:
    """A request's beginning, as an ASGI server gives it."""
    found = [(b"host", host.encode())] if host is not None else []
    found += [(n.replace("_", "-").encode(), v.encode()) for n, v in headers.items()]
    path = "/v1/events" if method == "POST" else "/"
    return {"type": "http", "method": method, "path": path, "headers": found, "http_version": "1.1"}


@pytest.mark.parametrize(
    ("asked", "settings", "status"),
    [
        (scope(), PLAIN, None),
        (scope("127.0.0.1:8000"), PLAIN, None),
        (scope("[::1]:8000"), PLAIN, None),
        (scope("10.0.0.7"), PLAIN, None),  # an address cannot be rebound
        (scope("app.localhost"), PLAIN, None),
        (scope("evil.example"), PLAIN, 403),  # a name that resolves to this machine
        (scope("ranker.shop.internal"), PLAIN, 403),
        (scope("Ranker.Shop.Internal:80"), NAMED, None),
        (scope(None), PLAIN, 400),
        (scope(""), PLAIN, 400),
        (scope(origin="https://evil.example"), PLAIN, 403),
        (scope(origin="null"), PLAIN, 403),
        (scope(origin="http://localhost:8000"), PLAIN, None),
        (scope(origin="http://localhost:9000"), PLAIN, 403),  # another port is another site's page
        (scope(sec_fetch_site="cross-site", sec_fetch_mode="no-cors"), PLAIN, 403),
        (scope(sec_fetch_site="same-site"), PLAIN, 403),
        (scope(sec_fetch_site="same-origin", origin="http://localhost:8000"), PLAIN, None),
        (scope(sec_fetch_site="cross-site", sec_fetch_mode="navigate"), PLAIN, 403),
        (scope(method="GET", sec_fetch_site="cross-site", sec_fetch_mode="navigate"), PLAIN, None),
        (scope(method="GET", sec_fetch_site="cross-site", sec_fetch_mode="cors"), PLAIN, 403),
        (scope("evil.example", origin="https://evil.example"), KEYS, None),  # the key decides
    ],
)
def test_pages_of_other_sites_and_foreign_names_are_refused(
    asked: Any, settings: ServeSettings, status: int | None
) -> None:
    error = why_refused(asked, settings)
    assert (None if error is None else error.status) == status


def test_health_is_open_and_two_hosts_are_none() -> None:
    health = {**scope("lb.example", "GET"), "path": "/livez"}
    assert why_refused(health, PLAIN) is None
    twice = scope()
    twice["headers"].append((b"host", b"evil.example"))
    error = why_refused(twice, KEYS)
    assert error is not None
    assert error.status == 400
    old = {**scope(None), "http_version": "1"}  # a balancer that speaks HTTP/1.0
    assert why_refused(old, PLAIN) is None
