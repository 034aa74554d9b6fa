"""The web door in a real browser: what is asked appears, is read and approved, on a phone too."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from darwin_exp.hitl.requests import RequestType, State, content_of, fold
from tests.browser import CHROMIUM, Browser
from tests.hitl.peopled import POEMS, Peopled
from tests.hitl.served import PATCH, Served, wait_for
from tests.hitl.tab import Tab
from tests.report.long_journal import LongJournal

HOSTILE = "</script><script>document.title='owned'</script><img src=//a.test/x onerror=alert(1)>"
PAGES = ("/", "/run", "/lineage", "/agents", "/agents/g01-i02", "/guidance", "/audit")

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="Debian's chromium is not installed"),
]


class ServedTab(Tab):
    """A tab on a page that this process serves."""

    def __init__(self, browser: Browser, page: Served) -> None:
        self.page = page
        super().__init__(browser, page.door.link)


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedTab]:
    folder = tmp_path_factory.mktemp("browser")
    run = LongJournal(folder / "run", 80, 4, failing=0.1, hostile=HOSTILE).write("search")
    with Served(run) as page:
        chromium = Browser(folder / "profile")
        try:
            yield ServedTab(chromium, page)
        finally:
            chromium.close()


def test_g2_a_request_appears_is_read_and_approved_by_its_hash(tab: ServedTab) -> None:
    tab.visit("/")
    request = tab.page.ask("wikitext-103\nlicence CC BY-SA", reason=f"more text {HOSTILE}")
    address = f"/requests/{request.request_id}"
    link = f"a.what[href='{address}']"
    tab.wait_until(f"document.querySelector({link!r})")  # by itself: the page was open before
    tab.wait_until("document.title.startsWith('(1) ')")
    tab.click(link)
    tab.wait_until(f"location.pathname === {address!r}")
    shown = "[...document.querySelectorAll('.exact pre')].map(one => one.textContent)"
    assert tab.ask(shown) == ["wikitext-103\nlicence CC BY-SA"]
    assert request.content_hash in tab.ask("document.body.textContent")
    tab.click("button[value='approve']")
    tab.wait_until("document.querySelector('.pill.yes')?.textContent === 'approved'")
    standing = fold(tab.page.inbox.entries(), tab.page.run_folder.name).requests[request.request_id]
    assert standing.state is State.APPROVED
    assert standing.granted_content == request.content
    assert standing.history[-1].payload["content_hash"] == request.content_hash
    assert standing.history[-1].author.door == "web"


def test_what_came_of_an_approval_appears_by_itself(tab: ServedTab) -> None:
    run = Peopled(tab.page.run_folder)
    request = run.approved(RequestType.DATASET, POEMS)
    tab.visit("/")
    tab.wait_until("document.body.textContent.includes('takes effect at the next generation')")
    run.effect(request, f"12,000 tokens more {HOSTILE}")
    tab.wait_until("document.body.textContent.includes('done in generation 3: 12,000 tokens')")
    tab.visit(f"/requests/{request.request_id}")
    assert "12,000 tokens more" in tab.ask("document.getElementById('outcome').textContent")
    assert tab.ask("document.getElementById('concern')") is None


def test_g3_a_warning_stands_above_the_buttons_and_shows_the_path(tab: ServedTab) -> None:
    content = content_of({"path": "../run.py", "text": HOSTILE})
    request = tab.page.ask(content, RequestType.SCRIPT)
    tab.visit(f"/requests/{request.request_id}")
    assert "'../run.py'" in tab.ask("document.getElementById('concern').textContent")
    above = "document.getElementById('concern').getBoundingClientRect().bottom"
    button = "document.querySelector('button[value=approve]').getBoundingClientRect().top"
    assert tab.ask(f"{above} < {button}")
    tab.click("button[value='deny']")
    tab.wait_until("document.querySelector('.pill.no')?.textContent === 'denied'")


def test_another_content_is_granted_as_it_was_typed(tab: ServedTab) -> None:
    request = tab.page.ask("\nfirst line is empty\n  500 MB", RequestType.QUESTION)
    address = f"/requests/{request.request_id}"
    tab.visit(address)
    tab.click("#change summary")
    typed = "document.querySelector('textarea[name=content]')"
    assert tab.ask(f"{typed}.value") == request.content
    tab.ask(f"{typed}.value = {typed}.value.replace('500', '50')")
    tab.click("button[value='change']")
    tab.wait_until("document.querySelector('.pill.yes')")
    standing = fold(tab.page.inbox.entries(), tab.page.run_folder.name).requests[request.request_id]
    assert standing.state is State.CHANGED
    assert standing.granted_content == "\nfirst line is empty\n  50 MB"


def test_a_rewrite_is_read_as_a_coloured_patch(tab: ServedTab) -> None:
    request = tab.page.ask(PATCH, RequestType.EDIT)
    tab.visit(f"/requests/{request.request_id}")
    colour = "getComputedStyle(document.querySelector('tr.{}')).backgroundColor"
    assert tab.ask(colour.format("added")) != tab.ask(colour.format("removed"))
    tab.click("button[value='deny']")
    tab.wait_until("document.querySelector('.pill.no')?.textContent === 'denied'")


@pytest.mark.parametrize("kind", [RequestType.EDIT, RequestType.SCRIPT])
def test_g5_no_end_of_a_line_leaves_the_screen(tab: ServedTab, kind: RequestType) -> None:
    line = f"x = 1{30 * ' '}{'; '.join(f'y{k} = {k}' for k in range(90))}; evil(){200 * 'z'}"
    request = tab.page.ask(f"@@ -1 +1 @@\n-x = 1\n+{line}\n", kind)
    tab.visit(f"/requests/{request.request_id}")
    wide = "[...document.querySelectorAll('.exact, .exact *')].filter(one => {})"
    assert (
        tab.ask(f"{wide.format('one.scrollWidth > one.clientWidth && one.clientWidth')}.length")
        == 0
    )
    edge = "document.documentElement.clientWidth"
    assert tab.ask(f"{wide.format(f'one.getBoundingClientRect().right > {edge}')}.length") == 0
    assert "evil()" in tab.ask("document.querySelector('.exact').innerText")
    typed = "document.querySelector('textarea.code')"
    assert tab.ask(f"{typed}.closest('details').open = true; {typed}.scrollWidth") == tab.ask(
        f"{typed}.clientWidth"
    )
    tab.click("button[value='deny']")
    tab.wait_until("document.querySelector('.pill.no')?.textContent === 'denied'")


def test_g5_control_without_the_rule_for_patches_the_end_leaves_it(tab: ServedTab) -> None:
    request = tab.page.ask(f"@@ -1 +1 @@\n-x\n+{300 * 'x '}; evil()\n", RequestType.EDIT)
    tab.visit(f"/requests/{request.request_id}")
    scroll = "document.querySelector('.exact .scroll')"
    assert tab.ask(f"{scroll}.scrollWidth <= {scroll}.clientWidth")
    tab.ask(
        "for (const one of document.querySelectorAll('.patch td')) one.style.whiteSpace = 'pre'"
    )
    assert tab.ask(f"{scroll}.scrollWidth > {scroll}.clientWidth")
    tab.click("button[value='deny']")
    tab.wait_until("document.querySelector('.pill.no')?.textContent === 'denied'")


def test_everything_is_reached_by_keys_alone(tab: ServedTab) -> None:
    request = tab.page.ask("by keys", RequestType.QUESTION)
    tab.visit("/")
    tab.wait_until("document.querySelector('.requests a.what')")
    for kind in ("keyDown", "keyUp"):
        tab.browser.call("Input.dispatchKeyEvent", type=kind, key="j", text="j", code="KeyJ")
    tab.wait_until("document.activeElement.matches('a.what')")
    for kind in ("keyDown", "keyUp"):
        tab.browser.call(
            "Input.dispatchKeyEvent",
            type=kind,
            key="Enter",
            text="\r",
            code="Enter",
            windowsVirtualKeyCode=13,
        )
    tab.wait_until(f"location.pathname === '/requests/{request.request_id}'")
    unlabelled = (
        "[...document.querySelectorAll('input:not([type=hidden]), textarea, select')]"
        ".filter(one => !one.labels.length && !one.ariaLabel).length"
    )
    assert tab.ask(unlabelled) == 0


def test_a_note_typed_while_the_page_refreshes_is_not_lost(tab: ServedTab) -> None:
    tab.visit("/guidance")
    typed = "document.querySelector('textarea[name=text]')"
    tab.ask(f"{typed}.focus(); {typed}.value = 'half a tho'")
    answers = len(tab.browser.heard)
    wait_for(lambda: tab.ask("1") and heard_live(tab, answers) >= 2)
    assert tab.ask(f"{typed}.value") == "half a tho"


def heard_live(tab: ServedTab, since: int) -> int:
    return sum(
        event.get("method") == "Network.responseReceived"
        and "/live/" in event["params"]["response"]["url"]
        for event in tab.browser.heard[since:]
    )


def test_no_page_asks_another_host_or_has_errors(tab: ServedTab) -> None:
    for path in PAGES:
        tab.visit(path)
        assert tab.ask("document.title").endswith("– DARWIN")
    requests = [
        event["params"]["request"]["url"]
        for event in tab.browser.heard
        if event.get("method") == "Network.requestWillBeSent"
    ]
    assert {url.split("/")[2] for url in requests if not url.startswith("data:")} == {tab.page.host}
    complaints = [
        event
        for event in tab.browser.heard
        if event.get("method")
        in ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded")
    ]
    assert complaints == []


def test_charts_are_drawn_and_lead_to_agents(tab: ServedTab) -> None:
    tab.visit("/run")
    charts = "[...document.querySelectorAll('svg.chart')]"
    assert tab.ask(f"{charts}.length") == 3
    assert tab.ask(f"{charts}.every(one => one.clientHeight > 40)")
    tab.ask(
        "document.querySelector('svg a').dispatchEvent(new MouseEvent('click', {bubbles: true}))"
    )
    tab.wait_until("location.pathname.startsWith('/agents/g')")


def test_light_and_dark_can_be_chosen(tab: ServedTab) -> None:
    tab.visit("/")
    colour = "getComputedStyle(document.body).backgroundColor"
    before = tab.ask(colour)
    tab.click("#theme")
    assert tab.ask(colour) != before
    tab.visit("/run")
    assert tab.ask(colour) != before, "it is remembered"
    tab.click("#theme")
    assert tab.ask(colour) == before


def test_a_phone_scrolls_within_charts_and_tables_only(tab: ServedTab) -> None:
    request = tab.page.ask("on a phone", RequestType.LIBRARY)
    tab.browser.call(
        "Emulation.setDeviceMetricsOverride",
        width=390,
        height=800,
        deviceScaleFactor=2,
        mobile=True,
    )
    try:
        for path in (*PAGES, f"/requests/{request.request_id}"):
            tab.visit(path)
            overflow = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
            assert tab.ask(overflow) == 0, path
    finally:
        tab.browser.call("Emulation.clearDeviceMetricsOverride")


def test_the_end_of_serve_is_told(tab: ServedTab) -> None:
    tab.visit("/")
    tab.page.server.should_exit = True
    tab.wait_until("document.getElementById('connection').textContent.includes('does not answer')")
