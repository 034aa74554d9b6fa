"""A tab of a real browser that was let in to a run's page."""

from __future__ import annotations

from typing import Any

from tests.browser import Browser
from tests.hitl.served import wait_for


class Tab:
    """One tab of a browser that was let in by the link."""

    def __init__(self, browser: Browser, link: str) -> None:
        self.browser = browser
        self.origin = "/".join(link.split("/")[:3])
        target = browser.call("Target.createTarget", url="about:blank")["targetId"]
        attached = browser.call("Target.attachToTarget", targetId=target, flatten=True)
        browser.session = attached["sessionId"]
        for domain in ("Page", "Network", "Runtime", "Log"):
            browser.call(f"{domain}.enable")
        browser.call("Page.navigate", url=link)
        wait_for(lambda: self.ask("location.pathname") == "/")

    def ask(self, expression: str) -> Any:
        return self.browser.ask(expression)

    def visit(self, path: str) -> None:
        """Open an address and wait until it is there, its script included."""
        self.browser.call("Page.navigate", url=self.origin + path)
        self.wait_until(f"location.pathname + location.search === {path!r}")

    def wait_until(self, condition: str) -> None:
        """Wait until an expression holds in a page that is loaded."""
        ready = "document.readyState === 'complete' && !document.getElementById('theme')?.hidden"
        wait_for(lambda: self.ask(f"Boolean({ready} && ({condition}))"))

    def click(self, selector: str) -> None:
        """Click on what a selector finds, with the mouse's own event."""
        self.wait_until(f"document.querySelector({selector!r})")
        self.ask(f"document.querySelector({selector!r}).click()")
