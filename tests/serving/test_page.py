"""The page at `/` in a real browser: it shows what it says, by mouse, by keyboard and on a phone, and asks
nobody but its server.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from serving.page import FILE, PAGE
from tests.browser import Tab, chromium, open_tab

LIST = "[...document.querySelectorAll('#list .name')].map(e => e.textContent).join()"
BARS = "[...document.querySelectorAll('#list .bar i')].map(e => e.style.width).join()"
CHIP = "document.querySelector('#state').textContent"


@pytest.fixture(scope="module")
def road(shop: Any, helpers: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A shop with tokens."""
    return helpers.token_road(shop, tmp_path_factory.mktemp("page"))


@pytest.fixture(scope="module")
def serve(road: Any, helpers: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Starts a server with some more environment; returns its address."""
    running: list[subprocess.Popen[bytes]] = []

    def start(**more: str) -> str:
        port = helpers.free_port()
        environment = {
            **{name: v for name, v in os.environ.items() if not name.startswith("MEMOIR_")},
            "MEMOIR_HOME": road.settings.root,
            "MEMOIR_DATASET": road.settings.dataset,
            "MEMOIR_DATA": str(road.data),
            "MEMOIR_SERVE_DEADLINE_MS": "10000",
            "MEMOIR_SERVE_STORE_MS": "5000",
            **more,
        }
        command = [sys.executable, "-m", "serving", "--port", str(port), "--replay"]
        log = tmp_path_factory.mktemp("log") / "server.log"
        process = subprocess.Popen(
            command,
            env=environment,
            cwd=helpers.checkout,
            stdout=log.open("wb"),
            stderr=subprocess.STDOUT,
        )
        running.append(process)
        helpers.wait_for_port(port, process, 90)
        return f"http://127.0.0.1:{port}/"

    yield start
    for process in running:
        process.terminate()
        process.wait(timeout=20)


@pytest.fixture(scope="module")
def address(serve: Any) -> str:
    found: str = serve()
    return found


@pytest.fixture
def tab() -> Iterator[Tab]:
    if chromium() is None:
        if os.environ.get("MEMOIR_REQUIRE_SERVICES") == "1":
            pytest.fail("chromium is not installed")
        pytest.skip("chromium is not installed")
    with open_tab() as opened:
        yield opened


def opened(tab: Tab, address: str) -> None:
    """The page with its first list."""
    tab.go(address)
    tab.until("document.querySelectorAll('#list li').length > 10")


def test_the_page_shows_a_customers_past_list_times_and_freshness(tab: Tab, address: str) -> None:
    opened(tab, address)
    assert tab.run(CHIP) == "nothing was missing"
    assert tab.run("document.querySelectorAll('#strip button').length") > 3
    assert tab.run("document.querySelectorAll('#tokens i').length") > 0
    assert tab.run("document.querySelectorAll('#stages i').length") == 8
    assert "up to" in tab.run("document.querySelector('#freshness').textContent")
    assert "popularity" in tab.run("document.querySelector('#report').textContent")
    assert "PRODUCT" in tab.run(LIST)
    assert tab.run("document.querySelector('#key').checkVisibility()") is False
    # Whatever it loaded came from its own server.
    loaded = tab.run("performance.getEntriesByType('resource').map(e => e.name)")
    assert loaded
    assert all(name.startswith(address) for name in loaded)
    assert tab.complaints == []


def test_pointing_at_a_candidate_lights_up_what_it_rests_on(tab: Tab, address: str) -> None:
    opened(tab, address)
    before = tab.run("document.querySelector('#told').textContent")
    tab.point("#list li:nth-child(2)")
    told = tab.until(
        f"document.querySelector('#told').textContent !== {before!r} && document.querySelector('#told').textContent"
    )
    name = tab.run("document.querySelector('#list li[aria-selected=true] .name').textContent")
    assert told.startswith(f"{name}: ")
    assert "summary token" in told
    # Every event is as tall as it counts: one at least is taller than it was.
    tall = (
        "[...document.querySelectorAll('#strip button')].map(e => parseFloat(e.style.height || 0))"
    )
    assert max(tab.run(tall)) > 1.4


def test_all_of_it_goes_by_keyboard(tab: Tab, address: str) -> None:
    opened(tab, address)
    tab.run("document.querySelector('#list').focus()")
    tab.key("ArrowDown")
    tab.key("ArrowDown")
    assert tab.run("document.querySelector('#list').getAttribute('aria-activedescendant')") == (
        "item-1"
    )
    tab.run("document.querySelector('#strip button').focus()")
    tab.key("ArrowRight")
    assert tab.run("document.activeElement === document.querySelectorAll('#strip button')[1]")
    tab.key("Enter")
    tab.until("document.querySelectorAll('#strip button[aria-pressed=true]').length === 1")
    assert tab.complaints == []


def test_an_event_left_out_or_added_moves_the_list_and_nothing_is_stored(
    tab: Tab, address: str
) -> None:
    opened(tab, address)
    first = tab.run(BARS)
    events = tab.run("document.querySelectorAll('#strip button').length")
    tab.run("document.querySelector('#strip button:last-of-type').click()")
    tab.until("document.querySelectorAll('#strip button[aria-pressed=true]').length === 1")
    tab.until(f"{BARS} !== {first!r}")
    tab.run("document.querySelector('#undo').click()")
    tab.until(f"{BARS} === {first!r}")
    tab.run("document.querySelector('#add').requestSubmit()")
    tab.until(f"document.querySelectorAll('#strip button').length === {events + 1}")
    tab.until(f"{BARS} !== {first!r}")
    assert tab.run("document.querySelector('#error').textContent") == ""
    opened(tab, address)
    assert tab.run(BARS) == first
    assert tab.complaints == []


def test_a_forced_rung_is_named_and_another_customer_has_another_list(
    tab: Tab, address: str
) -> None:
    opened(tab, address)
    first = tab.run(BARS)
    rung = "const r = document.querySelector('#rung'); r.value = {0!r}; r.dispatchEvent(new Event('change'))"
    for name in ("store_unavailable", "no_tokens", "no_history", "no_scores"):
        tab.run(f"{{ {rung.format(name)} }}")
        tab.until(f"{CHIP}.includes({name.replace('_', ' ')!r})")
    tab.run(f"{{ {rung.format('')} }}")
    tab.until(f"{BARS} === {first!r}")
    tab.run("document.querySelector('#another').click()")
    tab.until(f"{BARS} !== {first!r}")
    tab.run(
        "{ const u = document.querySelector('#user'); u.value = 'x'; u.dispatchEvent(new Event('change')) }"
    )
    assert "user_id" in tab.until("document.querySelector('#error').textContent")


def test_a_phone_shows_all_of_it_without_scrolling_sideways(tab: Tab, address: str) -> None:
    tab.size(390, 844, phone=True)
    opened(tab, address)
    assert tab.run("document.documentElement.scrollWidth") <= 390
    # A finger is wider than a mouse.
    assert tab.run("document.querySelector('#strip button').getBoundingClientRect().width") > 16


def test_where_callers_have_tokens_the_page_asks_for_one(tab: Tab, serve: Any) -> None:
    token = "a-token-of-the-page"
    address = serve(MEMOIR_SERVE_AUTH=f'{{"{token}": ["rank", "explain"]}}')
    tab.go(address)
    tab.until("document.querySelector('#key').checkVisibility()")
    assert "bearer" in tab.until("document.querySelector('#error').textContent").lower()
    tab.run(
        f"{{ const t = document.querySelector('#token'); t.value = {token!r}; t.dispatchEvent(new Event('change')) }}"
    )
    tab.until("document.querySelectorAll('#list li').length > 10")


def test_the_page_is_one_file_that_names_no_other_host() -> None:
    text = FILE.read_text()
    assert not re.search(r"https?://|//[a-z]", text.replace("http-equiv", ""))
    assert not re.search(r"\son[a-z]+=", text)  # no handlers that a policy would have to allow
    policy = PAGE.headers["Content-Security-Policy"]
    assert "unsafe" not in policy
    assert policy.startswith("default-src 'none'")
    assert Path(FILE).stat().st_size < 50_000
