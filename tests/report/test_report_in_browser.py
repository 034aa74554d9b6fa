"""The report in a real browser: no error, no request, charts drawn, the table sorts and filters."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from darwin_exp.chronicle import Chronicle
from darwin_exp.report.facts import gather
from darwin_exp.report.page import render
from tests.report.long_journal import LongJournal

CHROMIUM = shutil.which("chromium")
HOSTILE = "</script><script>document.title='owned'</script><img src=//a.test/x onerror=alert(1)>"
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    "--remote-debugging-pipe",
)

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="Debian's chromium is not installed"),
]


class Browser:
    """Chromium on a pipe: messages of its DevTools protocol, each ended by a zero byte."""

    def __init__(self, profile: Path) -> None:
        to_browser, self._write = os.pipe()
        self._read, from_browser = os.pipe()
        redirected = f'exec "$@" 3<&{to_browser} 4>&{from_browser}'
        self.process = subprocess.Popen(
            ["bash", "-c", redirected, "bash", str(CHROMIUM), *FLAGS, f"--user-data-dir={profile}"],
            pass_fds=(to_browser, from_browser),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(to_browser)
        os.close(from_browser)
        self._answers = os.fdopen(self._read, "rb")
        self._waiting = b""
        self._n = 0
        self.session: str | None = None
        self.heard: list[dict[str, Any]] = []

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Call a method and return its result, keeping the events heard meanwhile."""
        self._n += 1
        message = {"id": self._n, "method": method, "params": params}
        if self.session:
            message["sessionId"] = self.session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self._n:
                assert "error" not in answer, answer
                result: dict[str, Any] = answer["result"]
                return result
            self.heard.append(answer)

    def open(self, page: Path) -> None:
        """Open a file in a tab of its own and wait until it is loaded."""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self.session = attached["sessionId"]
        for domain in ("Page", "Network", "Runtime", "Log"):
            self.call(f"{domain}.enable")
        self.call("Page.navigate", url=page.as_uri())
        while not any(event.get("method") == "Page.loadEventFired" for event in self.heard):
            self.heard.append(self._next())

    def ask(self, expression: str) -> Any:
        """Return the value of an expression in the page."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def close(self) -> None:
        """End the browser."""
        os.close(self._write)  # it exits when nobody holds the pipe any more
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self._answers.close()

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._waiting:
            more = os.read(self._read, 1 << 16)
            assert more, "the browser ended"
            self._waiting += more
        message, _, self._waiting = self._waiting.partition(b"\0")
        answer: dict[str, Any] = json.loads(message)
        return answer


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    folder = tmp_path_factory.mktemp("browser")
    run = LongJournal(folder / "run", 120, 5, hostile=HOSTILE).write()
    page = folder / "report.html"
    page.write_text(render(gather(Chronicle.read(run), run)), encoding="utf-8")
    chromium = Browser(folder / "profile")
    try:
        chromium.open(page)
        yield chromium
    finally:
        chromium.close()


def test_the_page_asks_the_network_for_nothing_and_has_no_errors(browser: Browser) -> None:
    requests = [
        event["params"]["request"]["url"]
        for event in browser.heard
        if event.get("method") == "Network.requestWillBeSent"
    ]
    assert [url for url in requests if not url.startswith("data:")] == [
        browser.ask("location.href")
    ]
    complaints = [
        event
        for event in browser.heard
        if event.get("method") in ("Runtime.exceptionThrown", "Log.entryAdded")
        or event.get("method") == "Runtime.consoleAPICalled"
    ]
    assert complaints == []
    assert browser.ask("document.title") == "run – DARWIN"


def test_every_chart_is_drawn_and_described(browser: Browser) -> None:
    charts = "[...document.querySelectorAll('svg.chart')]"
    assert browser.ask(f"{charts}.length") == 9
    assert browser.ask(f"{charts}.every(one => one.getAttribute('aria-label').length > 20)")
    visible = f"{charts}.filter(one => one.checkVisibility() && one.clientHeight > 40).length"
    assert browser.ask(visible) == 8, "all but the whole tree, which is folded away"


def test_the_table_filters_sorts_and_is_reached_from_the_charts(browser: Browser) -> None:
    shown = "[...document.querySelectorAll('#individuals tbody tr')].filter(row => !row.hidden)"

    def type_in(words: str) -> int:
        browser.ask(
            f"document.getElementById('filter').value = {words!r};"
            "document.getElementById('filter').dispatchEvent(new Event('input'))"
        )
        return int(browser.ask(f"{shown}.length"))

    assert type_in("") == 121
    assert type_in("g02-i03") < 121
    assert type_in("no such words at all") == 0
    browser.ask(
        "document.querySelector('svg a[href=\"#g02-i03\"]').dispatchEvent("
        "new MouseEvent('click', {bubbles: true, cancelable: true}))"
    )
    assert browser.ask("document.querySelector('tr.found').id") == "g02-i03"
    assert browser.ask(f"{shown}.length") == 121, "a filter does not hide where a mark leads"

    sort = "document.querySelectorAll('#individuals th button')[7].click()"
    column = f"{shown}.map(row => row.cells[7].dataset.v).filter(v => v !== '').map(Number)"
    browser.ask(sort)
    rising = browser.ask(column)
    browser.ask(sort)
    assert len(rising) > 50
    assert rising == sorted(rising)
    assert browser.ask(column) == rising[::-1]
    assert browser.ask(f"{shown}.at(-1).cells[7].dataset.v") == "", "unknown comes last"


def test_the_theme_can_be_chosen(browser: Browser) -> None:
    colour = "getComputedStyle(document.body).backgroundColor"
    before = browser.ask(colour)
    browser.ask("document.getElementById('theme').click()")
    assert browser.ask(colour) != before
    browser.ask("document.getElementById('theme').click()")
    assert browser.ask(colour) == before


def test_a_phone_scrolls_within_charts_and_tables_only(browser: Browser) -> None:
    browser.call(
        "Emulation.setDeviceMetricsOverride",
        width=390,
        height=800,
        deviceScaleFactor=2,
        mobile=True,
    )
    overflow = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
    assert browser.ask(overflow) == 0
