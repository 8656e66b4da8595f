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

from serving.routes.page import FILE, PAGE
from tests.browser import Tab, chromium, open_tab
from tests.conftest import server_environment

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
        environment = server_environment(road, **more)
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
    # Bars have numbers beside them, squares and colours say what they are.
    assert "popularity" in tab.text("#report")
    assert re.search(r"\d\.\d{3}–\d\.\d{3}", tab.text("#report"))
    scores = "[...document.querySelectorAll('#list .score')].map(e => parseFloat(e.textContent))"
    assert tab.run(scores) == sorted(tab.run(scores), reverse=True)
    assert tab.run(scores)[0] > 0
    assert tab.text("#squares").startswith("Summary tokens: ")
    assert "lowers it" in tab.text(".key")
    assert "PRODUCT" in tab.run(LIST)
    assert tab.run("document.querySelector('#key').checkVisibility()") is False
    # Whatever it loaded came from its own server.
    loaded = tab.run("performance.getEntriesByType('resource').map(e => e.name)")
    assert loaded
    assert all(name.startswith(address) for name in loaded)
    assert tab.complaints == []


def test_pointing_at_a_candidate_lights_up_what_it_rests_on(tab: Tab, address: str) -> None:
    opened(tab, address)
    before = tab.text("#words")
    tall = (
        "[...document.querySelectorAll('#strip button')].map(e => e.getBoundingClientRect().height)"
    )
    at_rest = max(tab.run(tall))
    tab.point("#list li:nth-child(2)")
    told = tab.until(
        f"document.querySelector('#words').textContent !== {before!r} && document.querySelector('#words').textContent"
    )
    assert "logit" not in tab.text("main")
    name = tab.run("document.querySelector('#list li[aria-selected=true] .name').textContent")
    assert told.startswith(f"{name}: ")
    # What the item, the tokens, the counts and the events are worth
    for part in (
        "nothing is known the item's odds are",
        "Without summary tokens the odds were ×",
        "without counts of the whole past ×",
        "without the newest events ×",
    ):
        assert part in told
    # Every event is as tall as it counts: one at least is taller than it was.
    tab.until(f"Math.max(...{tall}) > {at_rest}")


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
    second = "document.activeElement === document.querySelectorAll('#strip button')[1]"
    assert tab.run(second)
    tab.key("Enter")
    tab.until("document.querySelectorAll('#strip button[aria-pressed=true]').length === 1")
    assert tab.run(second)  # an answer takes no focus away
    assert tab.run("document.querySelectorAll('#strip button[tabindex=\"0\"]').length") == 1
    tab.key("ArrowRight")
    tab.key("Enter")
    tab.until("document.querySelectorAll('#strip button[aria-pressed=true]').length === 2")
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


def test_a_simulated_degradation_is_named_and_another_customer_has_another_list(
    tab: Tab, address: str
) -> None:
    opened(tab, address)
    first = tab.run(BARS)
    for name in ("store_unavailable", "no_tokens", "no_history", "no_scores"):
        tab.choose("#simulate", name)
        tab.until(f"{CHIP}.includes({name.replace('_', ' ')!r})")
    tab.choose("#simulate", "")
    tab.until(f"{BARS} === {first!r}")
    user = tab.text("#ranked")
    tab.run("document.querySelector('#another').click()")
    tab.until(f"{BARS} !== {first!r}")
    assert tab.text("#ranked") != user
    assert tab.run(CHIP) == "nothing was missing"
    assert tab.complaints == []


TARGETS = """[...document.querySelectorAll("a, button, input, select, textarea, summary, #list li")]
  .filter(one => one.checkVisibility()).map(one => [one, one.getBoundingClientRect()])
  .filter(([one, box]) => Math.min(box.width, box.height) < 24).map(([one]) => one.outerHTML)"""


@pytest.mark.parametrize("width", [1280, 390])
def test_nothing_that_can_be_pressed_is_too_small(tab: Tab, address: str, width: int) -> None:
    tab.call(
        "Emulation.setDeviceMetricsOverride",
        width=width,
        height=844,
        deviceScaleFactor=1,
        mobile=False,
    )
    opened(tab, address)
    assert tab.run("document.querySelectorAll('#strip button').length") > 3
    tab.run("document.querySelector('#circumstances').open = true")
    tab.run("pick(2)")
    tab.until("document.querySelectorAll('#strip .up, #strip .down').length > 0")
    assert tab.run(TARGETS) == []


def test_the_tab_key_goes_around_the_page_in_few_steps(tab: Tab, address: str) -> None:
    """However many events and candidates there are: each of the two is one stop, in which arrows go on."""
    opened(tab, address)
    stops = []
    while len(stops) < 60:
        tab.key("Tab")
        stops.append(tab.run("document.activeElement.id || document.activeElement.outerHTML"))
        if stops[-1].startswith("<body"):
            break
    assert len(stops) < 25, stops
    assert "list" in stops
    assert len(stops) == len(set(stops))


def test_a_phone_shows_all_of_it_without_scrolling_sideways(tab: Tab, address: str) -> None:
    tab.size(390, 844, phone=True)
    opened(tab, address)
    assert tab.run("document.documentElement.scrollWidth") <= 390
    # A finger is wider than a mouse.
    assert tab.run("document.querySelector('#strip button').getBoundingClientRect().width") > 16
    # An explanation is read where the finger is, however far down the list, and can be put away.
    tab.run("document.querySelector('#list li:last-child').scrollIntoView()")
    tab.run("document.querySelector('#list li:last-child').click()")
    tab.until("document.querySelector('#told').classList.contains('on')")
    where = "(e => { const r = e.getBoundingClientRect(); return [r.top, r.bottom]; })(document.querySelector('#told'))"
    top, bottom = tab.run(where)
    assert 0 <= top < bottom <= 844
    tab.run("document.querySelector('#close').click()")
    assert tab.run("getComputedStyle(document.querySelector('#told')).position") == "static"


def test_two_quick_presses_both_count_and_tokens_that_are_set_aside_are_said(
    tab: Tab, address: str
) -> None:
    opened(tab, address)
    assert "set aside" not in tab.text("#squares")
    tab.run(
        "document.querySelectorAll('#strip button').forEach((one, at) => { if (at < 2) one.click(); })"
    )
    tab.until("document.querySelectorAll('#strip button[aria-pressed=true]').length === 2")
    assert "set aside" in tab.text("#squares")
    tab.run(
        "{ const add = document.querySelector('#add'); add.requestSubmit(); add.requestSubmit() }"
    )
    tab.until("document.querySelectorAll('#strip button.added').length === 2")
    names = tab.run("[...document.querySelectorAll('#strip .added')].map(e => e.title).join()")
    assert "purchase" in names
    assert "undefined" not in names
    assert tab.text("#error") == ""


def test_a_circumstance_that_is_refused_goes_no_further(tab: Tab, address: str) -> None:
    opened(tab, address)
    first = tab.run(BARS)
    tab.run("document.querySelector('#circumstances').open = true")
    field = "#context [name=request_timestamp]"
    tab.choose(field, "2095-01-01T00:00")
    tab.until("document.querySelector('#error').textContent !== ''")
    assert tab.run(f"document.querySelector('{field}').getAttribute('aria-invalid')") == "true"
    assert tab.run(BARS) == first
    tab.run("document.querySelector('#strip button').click()")
    tab.until("document.querySelectorAll('#strip button[aria-pressed=true]').length === 1")
    assert tab.run(f"document.querySelector('{field}').value") == ""  # what the list is of
    assert tab.text("#error") == ""


def test_a_store_that_does_not_answer_is_no_user_without_a_past(tab: Tab, address: str) -> None:
    tab.before(
        "const real = window.fetch; window.away = true; window.fetch = async (path, ...more) => {"
        " const answer = await real(path, ...more); if (path !== '/v1/history' || !window.away) return answer;"
        " const found = await answer.json(); return new Response(JSON.stringify("
        "{...found, events: [], num_events: 0, degraded: ['store_unavailable']}));}"
    )
    tab.go(address)
    tab.until("document.querySelector('#error').textContent.includes('store did not answer')")
    assert "no events" not in tab.text("main")
    tab.run("window.away = false; document.querySelector('#again').click()")
    tab.until("document.querySelectorAll('#list li').length > 10")
    assert tab.text("#error") == ""


NOBODY = "99999999"


def test_a_refusal_is_said_and_leaves_the_list_as_it_was(tab: Tab, address: str) -> None:
    opened(tab, address)
    first, user, ranked = tab.run(LIST), tab.text("#ranked"), tab.run(BARS)
    # A user that cannot be.
    tab.choose("#user", "x")
    assert "user_id" in tab.until("document.querySelector('#error').textContent")
    assert tab.run("document.querySelector('#user').getAttribute('aria-invalid')") == "true"
    assert (tab.run(LIST), tab.text("#ranked")) == (first, user)
    # An event that the server refuses: the field's own limits are taken away to get it there.
    tab.run(
        "{ const f = document.querySelector('#fields input'); f.type = 'text'; f.value = 'many';"
        " f.dataset.kind = ''; f.removeAttribute('min'); document.querySelector('#add').requestSubmit() }"
    )
    tab.until("document.querySelector('#error').textContent.includes('quantity')")
    assert tab.run(LIST) == first
    assert tab.run("document.querySelectorAll('#strip .added').length") == 0
    # Every later click is as if nothing had been refused.
    tab.run("document.querySelector('#strip button:last-of-type').click()")
    tab.until("document.querySelectorAll('#strip button[aria-pressed=true]').length === 1")
    assert tab.text("#error") == ""
    tab.run("document.querySelector('#undo').click()")
    tab.until(f"{BARS} === {ranked!r}")
    tab.point("#list li:nth-child(3)")
    tab.until("document.querySelector('#told').classList.contains('on')")
    assert tab.text("#error") == ""


def test_a_user_without_events_has_no_one_elses_explanation(tab: Tab, address: str) -> None:
    opened(tab, address)
    tab.point("#list li:nth-child(2)")
    tab.until("document.querySelector('#told').classList.contains('on')")
    tab.choose("#user", NOBODY)
    tab.until(f"document.querySelector('#ranked').textContent.includes({NOBODY!r})")
    assert "no events of this user" in tab.text("#words")
    assert tab.text("#strip") == "No events."
    assert "No summary tokens" in tab.text("#squares")
    assert "unknown user" in tab.run(CHIP)
    # Theirs is an explanation too, and a first event can be added.
    tab.point("#list li:nth-child(4)")
    tab.until("document.querySelector('#words').textContent.includes('no event stands behind')")
    tab.run("document.querySelector('#add').requestSubmit()")
    tab.until("document.querySelectorAll('#strip button.added').length === 1")
    assert tab.text("#error") == ""
    assert tab.complaints == []


def test_candidates_of_ones_own_are_named_and_unknown_ones_marked(tab: Tab, address: str) -> None:
    opened(tab, address)
    assert "most frequent" in tab.text("#many")
    item = tab.run("document.querySelector('#item option:last-of-type').value")
    tab.choose("#many", "own")
    assert tab.run("document.querySelector('#own').checkVisibility()")
    tab.run("document.querySelector('#mine').requestSubmit()")
    assert "at least one" in tab.until("document.querySelector('#error').textContent")
    tab.run(f"document.querySelector('#own').value = {item + chr(10) + 'no such thing'!r}")
    tab.run("document.querySelector('#mine').requestSubmit()")
    tab.until("document.querySelectorAll('#list li').length === 2")
    assert tab.text("#error") == ""
    assert tab.text("#list li.unknown .name") == "no such thing"
    assert tab.text("#list li:not(.unknown) .name").startswith("PRODUCT")
    assert "candidates that nobody knows1" in tab.text("#freshness")
    # Another user ranks the same.
    ranked = tab.text("#ranked")
    tab.run("document.querySelector('#another').click()")
    tab.until(f"document.querySelector('#ranked').textContent !== {ranked!r}")
    assert tab.run("document.querySelectorAll('#list li').length") == 2
    tab.choose("#many", "50")
    tab.until("document.querySelectorAll('#list li').length > 2")
    assert not tab.run("document.querySelector('#mine').checkVisibility()")


def test_the_time_of_the_request_is_ones_own(tab: Tab, address: str) -> None:
    opened(tab, address)
    first, past = tab.run(BARS), tab.text("#strip .day:last-of-type")
    tab.run("document.querySelector('#circumstances').open = true")
    tab.choose("#context [name=request_timestamp]", f"{past}T00:00")
    tab.until(f"{BARS} !== {first!r}")
    # Events of that day come after such a request; none of them explains it.
    assert tab.run("document.querySelectorAll('#strip button.later').length") > 0
    tab.point("#list li:nth-child(2)")
    tab.until("document.querySelector('#told').classList.contains('on')")
    assert tab.text("#error") == ""
    assert not tab.run("document.querySelectorAll('#strip .later.up, #strip .later.down').length")
    tab.choose("#context [name=request_timestamp]", "")
    tab.until(f"{BARS} === {first!r}")


ANSWERS_ONCE = """
const real = window.fetch, failing = new Map(Object.entries(%s));
window.failing = failing;
window.fetch = (path, ...more) => failing.has(path) ? failing.get(path) === "away"
  ? Promise.reject(new TypeError("Failed to fetch"))
  : Promise.resolve(new Response(failing.get(path), {status: 502})) : real(path, ...more);
"""


def test_a_server_that_is_away_or_says_nonsense_is_said_and_can_be_asked_again(
    tab: Tab, address: str
) -> None:
    tab.before(ANSWERS_ONCE % '{"/v1/overview": "<html>bad gateway</html>"}')
    tab.go(address)
    assert "502" in tab.until("document.querySelector('#error').textContent")
    tab.run("failing.set('/v1/overview', 'away')")
    tab.run("document.querySelector('#again').click()")
    tab.until("document.querySelector('#error').textContent.includes('cannot be reached')")
    tab.run("failing.clear()")
    tab.run("document.querySelector('#again').click()")
    tab.until("document.querySelectorAll('#list li').length > 10")
    assert tab.text("#error") == ""
    assert not tab.run("document.querySelector('#again').checkVisibility()")
    # Away in the middle of it: the list stays, and goes on afterwards.
    first = tab.run(BARS)
    tab.run("failing.set('/v1/rank', 'away')")
    tab.choose("#simulate", "no_history")
    tab.until("document.querySelector('#error').textContent.includes('cannot be reached')")
    assert tab.run("document.querySelector('#simulate').value") == ""
    tab.run("failing.set('/v1/explain', 'away')")
    tab.point("#list li:nth-child(2)")
    tab.until("document.querySelector('#words').textContent.includes('no explanation')")
    tab.run("failing.clear()")
    tab.choose("#simulate", "no_history")
    tab.until(f"{BARS} !== {first!r}")
    assert tab.complaints == []


def test_where_the_tables_are_elsewhere_the_page_has_less_to_show(tab: Tab, address: str) -> None:
    bare = (
        "{...found, as_of: null, users: [], built: {}, coverage: null, report: [], degraded: [],"
        " items: found.items.map(item => ({...item, title: null}))}"
    )
    tab.before(
        "const real = window.fetch; window.fetch = async (path, ...more) => {"
        " const answer = await real(path, ...more); if (path !== '/v1/overview') return answer;"
        f" const found = await answer.json(); window.users = found.users; return new Response(JSON.stringify({bare}));}}"
    )
    tab.go(address)
    tab.until("document.querySelector('#words').textContent.includes('type the id of one')")
    assert "No report" in tab.text("#report")
    tab.choose("#many", "50")  # before anybody is chosen
    assert "user" in tab.until("document.querySelector('#error').textContent")
    tab.choose("#user", str(tab.run("users[0].user_id")))
    tab.until("document.querySelectorAll('#list li').length > 10")
    assert tab.text("#error") == ""
    assert tab.complaints == []


def test_where_callers_have_tokens_the_page_asks_for_one(tab: Tab, serve: Any) -> None:
    token = "a-token-of-the-page"
    address = serve(MEMOIR_SERVE_API_KEYS=f'{{"{token}": ["rank", "explain"]}}')
    tab.go(address)
    tab.until("document.querySelector('#key').checkVisibility()")
    assert "bearer" in tab.until("document.querySelector('#error').textContent").lower()
    tab.choose("#token", token)
    tab.until("document.querySelectorAll('#list li').length > 10")


def test_the_page_is_one_file_that_names_no_other_host() -> None:
    text = FILE.read_text()
    assert not re.search(r"https?://|//[a-z]", text.replace("http-equiv", ""))
    assert not re.search(r"\son[a-z]+=", text)  # no handlers that a policy would have to allow
    policy = PAGE.headers["Content-Security-Policy"]
    assert "unsafe" not in policy
    assert policy.startswith("default-src 'none'")
    assert Path(FILE).stat().st_size < 50_000
