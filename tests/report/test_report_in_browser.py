"""The report in a real browser: no error, no request, charts drawn, the table sorts and filters."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from darwin_exp.chronicle import Chronicle
from darwin_exp.report.facts import gather
from darwin_exp.report.page import render
from tests.browser import CHROMIUM, Browser
from tests.report.long_journal import LongJournal

HOSTILE = "</script><script>document.title='owned'</script><img src=//a.test/x onerror=alert(1)>"

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="Debian's chromium is not installed"),
]


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
