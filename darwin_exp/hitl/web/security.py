"""The gate of the local page: who may come in, from where, and with what.

Reads: a request's first line, headers and body.
Writes: the session's cookie, and security headers on every answer.
Never: lets a request through to a page or an action that it has not checked itself, so that no
page can forget to; writes a token into a log.

Web sites that the user visits can send requests to this machine too. They cannot read the session
(SameSite=Strict, HttpOnly), cannot name another host than the page's own (DNS rebinding), and
cannot make a form's seal. What stands against whom is tested in tests/hitl/test_web_security.py.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import ipaddress
import re
import secrets
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING
from urllib.parse import parse_qsl

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

LARGEST_BODY = 512 * 1024  # bytes, as they are sent; a script that people rewrite fits
LARGEST_QUERY = 1024
LARGEST_HEAD = 16 * 1024  # bytes of all headers
MOST_FIELDS = 12
BODY_SECONDS = 10.0
FORM_TYPE = "application/x-www-form-urlencoded"
METHODS = ("GET", "HEAD", "POST")
ENTRANCE = "/enter"
STATIC = "/static/"  # styles and a script, the same for everybody

_POLICY = (
    "default-src 'none'; style-src 'self'; script-src 'self'; connect-src 'self'; "
    "img-src 'self' data:; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "content-security-policy": _POLICY,
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "cache-control": "no-store",
    # Not no-referrer, under which browsers send "Origin: null" with the page's own forms.
    "referrer-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=(), payment=(), usb=()",
}
_FORBIDDEN_CHARACTERS = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")


class Refused(Exception):
    """A request is not answered; the words say why to whoever sent it.

    Args:
        status: HTTP status, 4xx.
    """

    def __init__(self, status: int, words: str) -> None:
        super().__init__(words)
        self.status = status
        self.words = words


def is_loopback(host: str) -> bool:
    """Tell whether an address is reached from this machine alone."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class Door:
    """The secrets of one `serve`, all of them random, none of them kept on disk.

    Args:
        host: name or address that the page is bound to.
        port: its port.

    Attributes:
        link_token: lets one browser in, once.
        cookie: name of the session's cookie; cookies are not told apart by port, so it is in it.
    """

    def __init__(self, host: str, port: int) -> None:
        shown = f"[{host}]" if ":" in host else host
        self.address = f"http://{shown}:{port}"
        names = {shown, "localhost"} if is_loopback(host) else {shown}
        self._hosts = {f"{name.lower()}:{port}" for name in names}
        if port == 80:
            self._hosts |= {name.lower() for name in names}
        self.link_token = secrets.token_urlsafe(32)
        self.cookie = f"darwin_{port}"
        self._session = secrets.token_urlsafe(32)
        self._key = secrets.token_bytes(32)
        self._mutex = threading.Lock()
        self._is_link_spent = False
        self._spent: set[str] = set()

    @property
    def link(self) -> str:
        """Return the address that is printed, with the token in it."""
        return f"{self.address}{ENTRANCE}?token={self.link_token}"

    def is_ours(self, host: str) -> bool:
        """Tell whether a Host header names this page."""
        return host.lower() in self._hosts

    def enter(self, token: str) -> str | None:
        """Return the session's cookie header for the link's token; None the second time."""
        fits = _equal(token, self.link_token)
        with self._mutex:
            if not fits or self._is_link_spent:
                return None
            self._is_link_spent = True
        return f"{self.cookie}={self._session}; Path=/; HttpOnly; SameSite=Strict"

    def knows(self, cookies: str) -> bool:
        """Tell whether a Cookie header holds the session."""
        found = [
            value
            for pair in cookies.split(";")
            for name, _, value in [pair.strip().partition("=")]
            if name == self.cookie
        ]
        return len(found) == 1 and _equal(found[0], self._session)

    def seal(self, path: str, content_hash: str = "") -> str:
        """Return a form's seal: it fits this path and this content, and is good for one use."""
        nonce = secrets.token_hex(16)
        return f"{nonce}.{self._mac(nonce, path, content_hash)}"

    def open(self, seal: str, path: str, content_hash: str) -> None:
        """Use up a form's seal.

        Raises:
            Refused: it is not ours, is another form's, or was used before.
        """
        nonce, _, mac = seal.partition(".")
        if not _equal(mac, self._mac(nonce, path, content_hash)):
            raise Refused(403, "This form is not one of this page's. Load it again.")
        with self._mutex:
            if nonce in self._spent:
                raise Refused(409, "This form was sent before, and counts once. Load it again.")
            self._spent.add(nonce)

    def give_back(self, seal: str) -> None:
        """Let a seal be used again, since what it was used for was turned down."""
        with self._mutex:
            self._spent.discard(seal.partition(".")[0])

    def _mac(self, nonce: str, path: str, content_hash: str) -> str:
        words = "\n".join((nonce, path, content_hash)).encode("utf-8", "surrogatepass")
        return hmac.new(self._key, words, hashlib.sha256).hexdigest()


def _equal(one: str, other: str) -> bool:
    """Compare in a time that does not tell how much of a guess is right."""
    return hmac.compare_digest(one.encode("utf-8", "surrogatepass"), other.encode())


@dataclass(frozen=True)
class Gate:
    """Checks every request before the application sees it; an ASGI application itself.

    What it lets through has "darwin.form" in its scope: the fields of a form, empty unless POST.
    """

    app: ASGIApp
    door: Door

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request.

        Raises:
            Exception: whatever the application raised, after it was answered.
        """
        if scope["type"] != "http":
            if scope["type"] == "websocket":
                await send({"type": "websocket.close", "code": 1008})
            return
        status = 500
        seal = ""

        async def sealed(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message = {**message, "headers": _with_ours(message.get("headers", []))}
            await send(message)

        try:
            headers = self._headers(scope)
            form: dict[str, str] = {}
            if scope["method"] == "POST":
                self._refuse_foreign(headers)
                form = parse_form(await _body(headers, receive))
                seal = form.pop("seal", "")
                self.door.open(seal, scope["path"], form.get("content_hash", ""))
            scope["darwin.form"] = form
        except Refused as refusal:
            await _answer(refusal, sealed)
            return
        try:
            await self.app(scope, receive, sealed)
        finally:
            if seal and status >= 400:
                self.door.give_back(seal)

    def _headers(self, scope: Scope) -> Mapping[str, str]:
        """Return a request's headers after checking everything that needs no body.

        Raises:
            Refused: it is not for this page, or from nobody whom it knows.
        """
        if sum(len(name) + len(value) for name, value in scope["headers"]) > LARGEST_HEAD:
            raise Refused(431, f"More than {LARGEST_HEAD} bytes of headers.")
        headers: dict[str, str] = {}
        alone = ("host", "origin", "cookie", "content-type", "content-length", "sec-fetch-site")
        for raw_name, raw_value in scope["headers"]:
            name = raw_name.decode("latin-1").lower()
            if name in headers and name in alone:
                raise Refused(400, f"Two {name} headers.")
            headers[name] = raw_value.decode("latin-1")
        if not self.door.is_ours(headers.get("host", "")):
            raise Refused(421, "This page answers to its own address only.")
        if scope["method"] not in METHODS:
            raise Refused(405, "Only GET, HEAD and POST.")
        if len(scope["query_string"]) > LARGEST_QUERY:
            raise Refused(414, "The address is too long.")
        path = scope["path"]
        if path != ENTRANCE and not path.startswith(STATIC):
            if not self.door.knows(headers.get("cookie", "")):
                raise Refused(
                    403,
                    "No session. Open the link that `python -m darwin_exp.hitl serve` printed; it "
                    "works once, in one browser. For another, end serve and start it again.",
                )
        elif scope["method"] == "POST":
            raise Refused(405, "Only GET and HEAD here.")
        if scope["method"] != "POST" and (
            headers.get("content-length", "0") != "0" or "transfer-encoding" in headers
        ):
            raise Refused(400, "A body without a form.")
        return headers

    def _refuse_foreign(self, headers: Mapping[str, str]) -> None:
        """Refuse a form that another site sent.

        Raises:
            Refused: its origin is not this page, or is not told.
        """
        if headers.get("origin", "").lower() != f"http://{headers['host'].lower()}":
            raise Refused(403, "This form came from elsewhere, and only this page's count.")
        if headers.get("sec-fetch-site", "same-origin") != "same-origin":
            raise Refused(403, "This form came from elsewhere, and only this page's count.")


def parse_form(body: bytes) -> dict[str, str]:
    """Return the fields of a form, with line ends as \\n.

    Raises:
        Refused: it is not a well-formed form of text, or has a field twice.
    """
    try:
        pairs = parse_qsl(
            body.decode("ascii"),
            keep_blank_values=True,
            strict_parsing=True,
            encoding="utf-8",
            errors="strict",
            max_num_fields=MOST_FIELDS,
        )
    except ValueError as error:  # UnicodeDecodeError is one
        raise Refused(400, "The form could not be read.") from error
    fields: dict[str, str] = {}
    for name, value in pairs:
        if name in fields:
            raise Refused(400, "The form has a field twice.")
        text = value.replace("\r\n", "\n").replace("\r", "\n")
        if _FORBIDDEN_CHARACTERS.search(name + text):
            raise Refused(400, "The form holds control characters.")
        fields[name] = text
    return fields


async def _body(headers: Mapping[str, str], receive: Receive) -> bytes:
    """Return a form's bytes, having read no more than it may have.

    Raises:
        Refused: it is no form, too large, of unknown length, or does not come.
    """
    kind, _, parameters = headers.get("content-type", "").partition(";")
    if kind.strip().lower() != FORM_TYPE:
        raise Refused(415, f"Only {FORM_TYPE}.")
    if parameters.strip().lower().replace('"', "") not in ("", "charset=utf-8"):
        raise Refused(415, "Only UTF-8.")
    length = headers.get("content-length", "")
    if "transfer-encoding" in headers or not re.fullmatch("[0-9]{1,12}", length):
        raise Refused(411, "A form says how long it is.")
    if int(length) > LARGEST_BODY:
        raise Refused(413, f"More than {LARGEST_BODY} bytes.")
    parts: list[bytes] = []
    n_bytes = 0
    try:
        async with asyncio.timeout(BODY_SECONDS):
            while True:
                message = await receive()
                if message["type"] != "http.request":
                    raise Refused(400, "The form was cut off.")
                parts.append(message.get("body", b""))
                n_bytes += len(parts[-1])
                if n_bytes > LARGEST_BODY:
                    raise Refused(413, f"More than {LARGEST_BODY} bytes.")
                if not message.get("more_body", False):
                    return b"".join(parts)
    except TimeoutError as error:
        raise Refused(408, "The form took too long to come.") from error


def _with_ours(headers: list[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    own = {name.encode(): value.encode() for name, value in HEADERS.items()}
    return [pair for pair in headers if pair[0].lower() not in own] + list(own.items())


async def _answer(refusal: Refused, send: Send) -> None:
    body = f"{refusal.words}\n".encode()
    headers = [
        (b"content-type", b"text/plain; charset=utf-8"),
        (b"content-length", str(len(body)).encode()),
        (b"connection", b"close"),  # part of the request may lie unread
    ]
    if refusal.status == 405:
        headers.append((b"allow", ", ".join(METHODS).encode()))
    await send({"type": "http.response.start", "status": refusal.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
