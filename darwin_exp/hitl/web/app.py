"""The application behind the gate: which address shows which page, and what a form writes.

Reads: addresses and forms that the gate has checked.
Writes: entries of the inbox, each as the person who runs `serve`.
Never: writes an approval without the hash that its form was made with; shows a traceback.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from darwin_exp.hitl.concerns import check_replacement
from darwin_exp.hitl.inbox import Author, InboxError
from darwin_exp.hitl.requests import (
    ALL,
    Decision,
    NoSuchRequest,
    Standing,
    answer,
    check_budget,
    check_revocation,
    check_words,
    hash_of,
)
from darwin_exp.hitl.requests import Refused as DoesNotCount
from darwin_exp.hitl.web.pages import Pages, digest
from darwin_exp.hitl.web.security import ENTRANCE, STATIC, Door, Gate, Refused
from darwin_exp.hitl.web.shown import LARGEST_SHOWN
from darwin_exp.report import page as report_page

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import Response

LIVE_PARTS = ("state", "inbox", "run", "lineage", "lineage-whole")
MOST_NOTE = 4_000  # characters
MOST_WORDS = 100  # characters of a search
MARKS = ("pinned", "vetoed")
AGENT = re.compile(r"g[0-9]{2,6}-i[0-9]{2,6}")
REQUEST_ID = re.compile(r"[0-9a-f]{12}")
_WHOLE = re.compile(r"[0-9]{1,15}")
_DECIMAL = re.compile(r"[0-9]{1,15}[.][0-9]{1,9}")


def build_app(pages: Pages, door: Door, author: Author) -> Gate:
    """Return the whole ASGI application, gate included."""
    from starlette.applications import Starlette
    from starlette.exceptions import HTTPException
    from starlette.routing import Route

    site = _Site(pages, door, author)
    get, post = ["GET"], ["POST"]
    routes = [
        Route(ENTRANCE, site.enter, methods=get),
        Route(STATIC + "{name}", site.static, methods=get),
        Route("/", site.inbox, methods=get),
        Route("/requests/{request_id}", site.request, methods=get),
        Route("/requests/{request_id}", site.answer, methods=post),
        Route("/requests/{request_id}/revoke", site.revoke, methods=post),
        Route("/run", site.run, methods=get),
        Route("/lineage", site.lineage, methods=get),
        Route("/agents", site.agents, methods=get),
        Route("/agents/{name}", site.agent, methods=get),
        Route("/agents/{name}/mark", site.mark_one, methods=post),
        Route("/guidance", site.guidance, methods=get),
        Route("/guidance/note", site.note, methods=post),
        Route("/guidance/mark", site.mark, methods=post),
        Route("/guidance/pause", site.pause, methods=post),
        Route("/guidance/resume", site.resume, methods=post),
        Route("/guidance/stop", site.stop, methods=post),
        Route("/guidance/budget", site.budget, methods=post),
        Route("/audit", site.audit, methods=get),
        Route("/live/{name}", site.live, methods=get),
    ]
    app = Starlette(
        routes=routes,
        exception_handlers={
            HTTPException: site.no_page,
            Refused: site.refused,
            DoesNotCount: site.does_not_count,
            InboxError: site.not_written,
            Exception: site.our_fault,
        },
    )
    app.router.redirect_slashes = False  # an address is right or wrong
    return Gate(app, door)


class _Site:
    """What each address answers. All methods may run on several threads at once."""

    def __init__(self, pages: Pages, door: Door, author: Author) -> None:
        self._pages = pages
        self._door = door
        self._author = author
        here = Path(__file__).parent / "static"
        styles = Path(report_page.__file__).parent / "page.css"
        self._static = {  # by name, so that no name can lead anywhere else
            "report.css": (styles.read_bytes(), "text/css"),
            "web.css": ((here / "web.css").read_bytes(), "text/css"),
            "web.js": ((here / "web.js").read_bytes(), "text/javascript"),
        }

    # --- coming in -------------------------------------------------------------------------------

    def enter(self, request: Request) -> Response:
        """Let in a browser that has the link, and give it the session's cookie."""
        if request.method == "HEAD":
            raise Refused(405, "Only GET here.")  # a look at the link must not use it up
        headers = {}
        if not self._door.knows(request.headers.get("cookie", "")):
            cookie = self._door.enter(request.query_params.get("token", ""))
            if cookie is None:
                raise Refused(
                    403,
                    "This link is wrong or was used already; it works once. End serve and start "
                    "it again for another.",
                )
            headers["set-cookie"] = cookie
        # A page and not a redirect: a browser that came from another site would not send the new
        # cookie along with that.
        return _html(self._pages.entered(), headers=headers)

    def static(self, request: Request) -> Response:
        """Answer with a style sheet or the script."""
        from starlette.responses import Response

        found = self._static.get(request.path_params["name"])
        if found is None:
            raise _missing()
        return Response(found[0], media_type=found[1])

    # --- looking ---------------------------------------------------------------------------------

    def inbox(self, request: Request) -> Response:
        return _html(self._pages.inbox())

    def request(self, request: Request) -> Response:
        return _html(self._pages.request(self._standing(request)))

    def run(self, request: Request) -> Response:
        return _html(self._pages.run())

    def lineage(self, request: Request) -> Response:
        return _html(self._pages.lineage(whole=request.query_params.get("all") == "1"))

    def agents(self, request: Request) -> Response:
        asked = request.query_params
        words, status = asked.get("words", "")[:MOST_WORDS], asked.get("status", "")[:MOST_WORDS]
        return _html(self._pages.agents(words, status, _page_number(request)))

    def agent(self, request: Request) -> Response:
        page = self._pages.agent(_agent_name(request.path_params["name"]))
        if page is None:
            raise _missing("There is no such agent, or it has not ended yet.")
        return _html(page)

    def guidance(self, request: Request) -> Response:
        return _html(self._pages.guidance())

    def audit(self, request: Request) -> Response:
        return _html(self._pages.audit(_page_number(request)))

    def live(self, request: Request) -> Response:
        """Answer with a part of a page, or with nothing where it is what the browser has."""
        from starlette.responses import Response

        name = request.path_params["name"]
        if name not in LIVE_PARTS:
            raise _missing()
        part = self._pages.part(name)
        seen = digest(part)
        headers = {"x-seen": seen, "x-waiting": str(self._pages.n_waiting())}
        if request.query_params.get("seen") == seen:
            return Response(status_code=204, headers=headers)
        return _html(part, headers=headers)

    # --- answering -------------------------------------------------------------------------------

    def answer(self, request: Request) -> Response:
        """Write an answer, bound to the content that the form was made for."""
        form = _form(request, "decision", "content_hash", "content", "note")
        standing = self._bound(request, form)
        try:
            decision = Decision(form.get("decision", ""))
        except ValueError as error:
            raise Refused(400, "Approve, deny, change or ask: nothing was written.") from error
        content = None
        agreed = form["content_hash"]
        if decision is Decision.CHANGE:
            content = form.get("content", "")
            agreed = hash_of(content)
            if content.strip():  # a change to nothing is refused with words of its own
                check_replacement(standing.request, content, self._pages.surroundings(standing))
        elif "content" in form:
            raise Refused(400, "Only a change comes with a content: nothing was written.")
        if decision is Decision.APPROVE and len(standing.request.content) > LARGEST_SHOWN:
            raise Refused(409, "This content was not shown whole, so it cannot be approved here.")
        note = _note(form)
        answer(self._pages.desk.inbox, standing, decision, self._author, agreed, content, note)
        return _back_to(f"/requests/{standing.request.request_id}")

    def revoke(self, request: Request) -> Response:
        """Take a grant back."""
        form = _form(request, "revoke", "content_hash", "note")
        standing = self._bound(request, form)
        if form.get("revoke") != "yes":
            raise Refused(400, "Nothing was written.")
        check_revocation(standing)
        told = {"request_id": standing.request.request_id, "note": _note(form)}
        self._write("revoked", told)
        return _back_to(f"/requests/{standing.request.request_id}")

    # --- steering --------------------------------------------------------------------------------

    def note(self, request: Request) -> Response:
        form = _form(request, "to", "text")
        to, text = form.get("to", "").strip(), form.get("text", "")
        if to != ALL:
            self._known(to)
        check_words(text)
        self._write("guided", {"to": to, "text": text})
        return _back_to("/guidance")

    def mark(self, request: Request) -> Response:
        form = _form(request, "individual_id", "mark", "note")
        self._mark(form.get("individual_id", "").strip(), form)
        return _back_to("/guidance")

    def mark_one(self, request: Request) -> Response:
        form = _form(request, "mark", "note")
        name = request.path_params["name"]
        self._mark(name, form)
        return _back_to(f"/agents/{name}")

    def pause(self, request: Request) -> Response:
        _form(request)
        self._write("paused", {})
        return _back_to("/guidance")

    def resume(self, request: Request) -> Response:
        _form(request)
        self._write("resumed", {})
        return _back_to("/guidance")

    def stop(self, request: Request) -> Response:
        self._write("stop_after_generation", {"note": _note(_form(request, "note"))})
        return _back_to("/guidance")

    def budget(self, request: Request) -> Response:
        form = _form(request, "key", "value")
        key, text = form.get("key", "").strip(), form.get("value", "").strip()
        value: int | float
        if _WHOLE.fullmatch(text):
            value = int(text)
        elif _DECIMAL.fullmatch(text):
            value = float(text)
        else:
            raise Refused(400, "A budget is a number such as 5 or 2.50: nothing was written.")
        check_budget(key, value)
        self._write("budget", {"key": key, "value": value})
        return _back_to("/guidance")

    def _mark(self, name: str, form: Mapping[str, str]) -> None:
        self._known(name)
        kind = form.get("mark", "")
        if kind not in MARKS:
            raise Refused(400, "Pin or veto: nothing was written.")
        self._write(kind, {"individual_id": name, "note": _note(form)})

    def _known(self, name: str) -> None:
        """Refuse what is no agent of this run, before anybody waits for it to have an effect."""
        facts = self._pages.live.view().facts
        if facts is None or facts.chronicle.agent(_agent_name(name)) is None:
            raise Refused(400, "There is no such agent, or it has not ended yet.")

    def _standing(self, request: Request) -> Standing:
        name = request.path_params["request_id"]
        if not REQUEST_ID.fullmatch(name):
            raise _missing()
        try:
            return self._pages.desk.read().board.find(name)
        except NoSuchRequest as error:
            raise _missing("There is no such request.") from error

    def _bound(self, request: Request, form: Mapping[str, str]) -> Standing:
        """Return the request that a form is about, if it shows what the form showed."""
        standing = self._standing(request)
        if form.get("content_hash") != standing.request.content_hash:
            raise Refused(409, "The form showed another content: nothing was written.")
        return standing

    def _write(self, kind: str, payload: Mapping[str, Any]) -> None:
        self._pages.desk.inbox.append(kind, payload, self._author)

    # --- what went wrong -------------------------------------------------------------------------

    def no_page(self, request: Request, error: Any) -> Response:
        words = error.detail if error.status_code == 404 else "That cannot be done here."
        return self._say(request, "Not here", words, error.status_code, error.headers)

    def refused(self, request: Request, error: Any) -> Response:
        return self._say(request, "Not done", error.words, error.status)

    def does_not_count(self, request: Request, error: Any) -> Response:
        return self._say(request, "That does not count", f"Nothing was written: {error}.", 409)

    def not_written(self, request: Request, error: Any) -> Response:
        return self._say(request, "Nothing was written", str(error), 503)

    def our_fault(self, request: Request, error: Exception) -> Response:
        from starlette.responses import PlainTextResponse

        words = "Something is wrong with this page; the terminal that runs serve says what.\n"
        return PlainTextResponse(words, 500)

    def _say(
        self,
        request: Request,
        heading: str,
        words: str,
        status: int,
        headers: Mapping[str, str] | None = None,
    ) -> Response:
        """Answer in words: as a page, or bare to whoever may not see the run."""
        from starlette.responses import PlainTextResponse

        if not self._door.knows(request.headers.get("cookie", "")):
            return PlainTextResponse(f"{words}\n", status, headers)
        return _html(self._pages.message(heading, words), status, headers)


def _html(text: str, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    from starlette.responses import HTMLResponse

    # What a candidate printed may hold half of a character.
    return HTMLResponse(text.encode("utf-8", "replace"), status, headers)


def _back_to(address: str) -> Response:
    from starlette.responses import RedirectResponse

    return RedirectResponse(address, 303)


def _missing(words: str = "There is no such page.") -> Exception:
    from starlette.exceptions import HTTPException

    return HTTPException(404, words)


def _form(request: Request, *known: str) -> Mapping[str, str]:
    """Return a form's fields.

    Raises:
        Refused: it has one that its page has not.
    """
    form: Mapping[str, str] = request.scope["darwin.form"]
    if not form.keys() <= {*known}:
        raise Refused(400, "The form has a field that this page does not know.")
    return form


def _note(form: Mapping[str, str]) -> str:
    note = form.get("note", "").strip()
    if len(note) > MOST_NOTE:
        raise Refused(400, f"A note has at most {MOST_NOTE} characters: nothing was written.")
    return note


def _agent_name(name: str) -> str:
    if not AGENT.fullmatch(name):
        raise Refused(404, "There is no such agent: g03-i02 is how one is called.")
    return name


def _page_number(request: Request) -> int:
    text = request.query_params.get("page", "1")
    return int(text) if re.fullmatch("[0-9]{1,6}", text) else 1
