"""The status page of the installed daemon, in a real browser."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count
from typing import Any
from urllib.parse import urlsplit

import pytest

from tests.support.browser import Browser
from tests.support.http import exchange, request_bytes
from tests.support.prometheus import ObservedDaemon
from tests.support.servers import RedisServer
from tests.support.webhooks import PATH, connected, post, webhook

PHONE: dict[str, Any] = {"viewport": {"width": 360, "height": 740}}
UNKNOWN = "\N{EN DASH}"
STATUS = "document.documentElement.dataset.status"
LINK = "document.documentElement.dataset.link"

# Records each change of the page's status, with its time in ms since 1970.
WATCH = f"""(() => {{
  window.changes = [];
  new MutationObserver(() => window.changes.push([{STATUS}, Date.now()]))
    .observe(document.documentElement, {{attributes: true, attributeFilter: ['data-status']}});
}})()"""


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with Browser() as browser:
        yield browser


@pytest.fixture
def daemon(redis: RedisServer) -> Iterator[ObservedDaemon]:
    # Its shutdown does not wait for a Redis that a test has killed.
    with ObservedDaemon("--redis", redis.url, "--drain-timeout", "0.1") as daemon:
        connected(daemon)
        yield daemon


def look(browser: Browser, daemon: ObservedDaemon, **settings: Any) -> None:
    """Open the page, and wait for its first figures."""
    browser.open(f"http://127.0.0.1:{daemon.ops_port}/", **settings)
    browser.wait(f"{LINK} === 'live'")


def text(browser: Browser, element: str) -> str:
    """Return the text of the element with an id."""
    return str(browser.evaluate(f"document.getElementById('{element}').textContent"))


def assert_clean(browser: Browser, daemon: ObservedDaemon) -> None:
    """Check that the console is empty, and that the page sent requests only to the daemon."""
    assert browser.errors == []
    assert {urlsplit(url).netloc for url in browser.requests} == {f"127.0.0.1:{daemon.ops_port}"}


def test_values_change_under_load(browser: Browser, daemon: ObservedDaemon) -> None:
    look(browser, daemon)
    browser.wait(f"{STATUS} === 'ok'")
    assert (text(browser, "word"), text(browser, "events")) == ("OK", "0")
    for number in range(30):
        post(daemon.port, webhook(number))
    post(daemon.port, webhook(1))
    exchange(daemon.port, request_bytes("POST", PATH, {"Content-Type": "application/json"}, b'["<b>"]'))
    for number in count(100):
        post(daemon.port, webhook(number))
        if text(browser, "events") != "0" and text(browser, "waiting") not in ("0", UNKNOWN):
            break
    assert float(text(browser, "p95").replace(",", "")) > 0
    outcomes = text(browser, "outcomes")
    assert "already queued" in outcomes
    assert "not_an_object" in text(browser, "refused")
    assert browser.evaluate("document.querySelector('.chart .trace').getAttribute('d').length") > 10
    assert_clean(browser, daemon)


def test_a_redis_that_is_killed(browser: Browser, redis: RedisServer, daemon: ObservedDaemon) -> None:
    look(browser, daemon)
    browser.wait(f"{STATUS} === 'ok'")
    browser.evaluate(WATCH)
    redis.kill()
    browser.wait("window.changes.length > 0")
    post(daemon.port, webhook())
    browser.wait("document.getElementById('disk').textContent === '1'")
    assert text(browser, "word") == "Degraded"
    assert "Redis cannot be reached" in text(browser, "meaning")
    assert "Degraded" in text(browser, "spoken")
    redis.start()
    browser.wait("window.changes.length > 1")
    assert [status for status, _ in browser.evaluate("window.changes")] == ["degraded", "ok"]
    assert_clean(browser, daemon)


def test_a_daemon_that_hangs_or_ends(browser: Browser, daemon: ObservedDaemon) -> None:
    look(browser, daemon)
    daemon.suspend()
    browser.wait(f"{LINK} === 'lost'")
    daemon.resume()
    browser.wait(f"{LINK} === 'live'")
    daemon.stop()
    browser.wait(f"{LINK} === 'lost'")
    assert text(browser, "word") == "No connection"
    daemon.start()
    browser.wait(f"{LINK} === 'live'")


def test_it_is_accessible(browser: Browser, redis: RedisServer, daemon: ObservedDaemon) -> None:
    exchange(daemon.port, request_bytes("POST", PATH, {"Content-Type": "text/plain"}, b""))
    look(browser, daemon, reducedMotion="reduce", **PHONE)
    browser.wait("document.getElementById('refused').rows.length === 1 && queuePanels.size === 1")
    assert_usable(browser)
    assert browser.evaluate("document.getAnimations().length") == 0
    assert_usable_without_a_mouse(browser)
    redis.kill()
    browser.wait(f"{STATUS} === 'degraded'")
    assert_usable(browser)
    daemon.kill()
    browser.wait(f"{LINK} === 'lost'")
    assert_usable(browser)


def assert_usable(browser: Browser) -> None:
    """Check the page with axe, in both colour schemes and with the width of a phone."""
    for scheme in ("light", "dark"):
        browser.prefer(colorScheme=scheme)
        assert browser.violations() == []
    assert browser.evaluate("document.documentElement.scrollWidth") == PHONE["viewport"]["width"]


def assert_usable_without_a_mouse(browser: Browser) -> None:
    reached = []
    for _ in range(3):
        browser.press("Tab")
        reached.append(browser.evaluate("document.activeElement.textContent"))
    assert reached == ["Pause", "Health as JSON", "Metrics"]
    browser.press("Shift+Tab")
    browser.press("Shift+Tab")
    browser.press("Enter")
    assert browser.evaluate(LINK) == "paused"
    browser.press("Enter")
    assert browser.evaluate(LINK) == "live"
