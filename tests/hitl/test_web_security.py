"""Attacks on the web door. Each is a request that would count, with one thing wrong about it."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

from darwin_exp.hitl.web import security
from darwin_exp.hitl.web.security import HEADERS, LARGEST_BODY, Door, Gate, Refused, parse_form
from tests.hitl.served import FORM, Answer, Served, wait_for
from tests.report.long_journal import LongJournal

NOTE = "/guidance/note"


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return LongJournal(tmp_path_factory.mktemp("web") / "run", 8, 1).write("search")


@pytest.fixture
def served(run_folder: Path) -> Iterator[Served]:
    for left in run_folder.glob("inbox.*"):
        left.unlink()
    with Served(run_folder) as page:
        yield page.enter()


def fields(page: Served) -> dict[str, str]:
    return {**page.get("/guidance").fields(NOTE), "to": "all", "text": "a word"}


def written(page: Served) -> int:
    return len(page.inbox.entries())


def test_control_the_request_that_the_attacks_vary_does_count(served: Served) -> None:
    assert served.post(NOTE, fields(served)).status == 303
    assert written(served) == 1


@pytest.mark.parametrize(
    ("defence", "broken", "headers", "changed"),
    [
        ("_refuse_foreign", lambda *_: None, {"Origin": "http://evil.example"}, {}),
        ("is_ours", lambda *_: True, {"Host": "evil.example", "Origin": "http://evil.example"}, {}),
        ("knows", lambda *_: True, {"Cookie": None}, {}),
        ("open", lambda *_: None, {}, {"seal": "forged"}),
    ],
)
def test_control_each_attack_succeeds_where_its_defence_is_off(
    served: Served,
    monkeypatch: pytest.MonkeyPatch,
    defence: str,
    broken: Callable[..., object],
    headers: Mapping[str, str | None],
    changed: Mapping[str, str],
) -> None:
    sent = {**fields(served), **changed}
    with monkeypatch.context() as patch:
        patch.setattr(Gate if hasattr(Gate, defence) else Door, defence, broken)
        assert served.post(NOTE, sent, headers).status == 303
    assert written(served) == 1
    again = {**fields(served), **changed}
    assert served.post(NOTE, again, headers).status in (403, 421)
    assert written(served) == 1


# --- who comes in ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "cookie",
    [
        None,
        "",
        "darwin_{port}=",
        "darwin_{port}=guessed",
        "darwin_1={value}",
        "other={value}",
        "darwin_{port}={value}x",
        "darwin_{port}={value}; darwin_{port}={value}",
        "darwin_{port}={value}; darwin_{port}=other",
        "darwin_{port}=é",
    ],
)
def test_without_the_sessions_cookie_nothing_is_shown_or_written(
    served: Served, cookie: str | None
) -> None:
    sent = fields(served)
    value = served.cookie.partition("=")[2]
    wrong = None if cookie is None else cookie.format(port=served.port, value=value)
    headers = {"Cookie": wrong}
    for path in ("/", "/run", "/agents/g00-i00", "/audit", "/live/run", "/no-such-page"):
        answer = served.send("GET", path, headers=headers)
        assert answer.status == 403, path
        assert answer.text.startswith("No session."), "nothing is told of the run"
    assert served.post(NOTE, sent, headers).status == 403
    assert written(served) == 0


def test_the_link_lets_one_browser_in_once(run_folder: Path) -> None:
    with Served(run_folder) as page:
        link = page.door.link.removeprefix(page.origin)
        for wrong in ("/enter", "/enter?token=", f"{link}x", link[:-1], link.upper()):
            assert page.get(wrong).status == 403, wrong
        assert page.send("HEAD", link).status == 405, "a look at it does not use it up"
        first = page.get(link)
        assert first.status == 200
        cookie = first.headers["set-cookie"]
        assert cookie.endswith("; Path=/; HttpOnly; SameSite=Strict")
        assert page.door.link_token not in cookie, "the link is no way in once it was used"
        assert page.get(link).status == 403
        assert page.enter_again(cookie).get(link).status == 200, "whoever is in stays in"


def test_links_sessions_and_seals_of_another_serve_are_worth_nothing(run_folder: Path) -> None:
    with Served(run_folder) as first:
        first.enter()
        sent, cookie = fields(first), first.cookie.partition("=")[2]
        link = first.door.link.removeprefix(first.origin)
    with Served(run_folder) as second:
        assert second.get(link).status == 403
        stolen = {"Cookie": f"darwin_{second.port}={cookie}"}
        assert second.send("GET", "/", headers=stolen).status == 403
        assert second.enter().post(NOTE, sent).status == 403


# --- from where -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "host",
    [
        None,
        "",
        "evil.example",
        "evil.example:{port}",
        "127.0.0.1",
        "127.0.0.1:1",
        "127.0.0.1.evil.example:{port}",
        "127.0.0.1:{port}.evil.example",
        "2130706433:{port}",
        "0.0.0.0:{port}",
        "user@127.0.0.1:{port}",
        "localhost.:{port}",
    ],
)
def test_a_request_under_another_name_is_refused_as_dns_rebinding_makes_them(
    served: Served, host: str | None
) -> None:
    sent = fields(served)
    told = None if host is None else host.format(port=served.port)
    # HTTP itself wants a Host, so without one the server refuses before the gate sees it.
    expected = (400, 421)
    assert served.send("GET", "/", headers={"Host": told}).status in expected
    headers = {"Host": told, "Origin": f"http://{told}"}
    assert served.post(NOTE, sent, headers).status in expected
    assert written(served) == 0


def test_the_page_answers_to_localhost_too(served: Served) -> None:
    name = f"localhost:{served.port}"
    assert served.send("GET", "/", headers={"Host": name}).status == 200
    headers = {"Host": name, "Origin": f"http://{name}"}
    assert served.post(NOTE, fields(served), headers).status == 303


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": None},
        {"Origin": "null"},
        {"Origin": ""},
        {"Origin": "http://evil.example"},
        {"Origin": "http://127.0.0.1"},
        {"Origin": "http://127.0.0.1:1"},
        {"Origin": "https://127.0.0.1:{port}"},
        {"Origin": "http://localhost:{port}"},
        {"Origin": "http://127.0.0.1:{port}.evil.example"},
        {"Origin": "http://127.0.0.1:{port} http://evil.example"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
        {"Sec-Fetch-Site": "none"},
    ],
)
def test_a_form_from_elsewhere_is_refused_though_cookie_and_seal_are_right(
    served: Served, headers: Mapping[str, str | None]
) -> None:
    told = {name: value and value.format(port=served.port) for name, value in headers.items()}
    assert served.post(NOTE, fields(served), told).status == 403
    assert written(served) == 0


# --- with what ------------------------------------------------------------------------------------


def test_a_form_without_its_own_seal_is_refused(served: Served) -> None:
    good = fields(served)
    other = served.get("/guidance").fields("/guidance/stop")["seal"]
    nonce, _, mac = good["seal"].partition(".")
    for seal in ("", ".", other, f"{nonce}.", f".{mac}", f"{'0' * 32}.{mac}", f"{nonce}.{mac}0"):
        assert served.post(NOTE, {**good, "seal": seal}).status == 403, seal
    assert served.post(NOTE, {k: v for k, v in good.items() if k != "seal"}).status == 403
    assert written(served) == 0
    assert served.post(NOTE, good).status == 303, "refusals do not use a seal up"


def test_the_seal_of_one_request_is_refused_on_another(served: Served) -> None:
    one, other = (f"/requests/{served.ask(words).request_id}" for words in ("a", "b"))
    sent = {**served.get(one).fields(one), "decision": "approve"}
    assert served.post(other, sent).status == 403
    assert written(served) == 2, "the two that ask"


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"", 403),
        (b"&", 400),
        (b"seal", 400),
        (b"to=all&to=g00-i00&text=a", 400),
        (b"to=all&text=%ff%fe", 400),
        (b"to=all&text=%C0%AF", 400),
        (b"to=all&text=\xc3\xa9", 400),
        (b"to=all&text=a%00b", 400),
        (b"to=all&text=%1b%5b2J", 400),
        (b"to=all&te%07xt=a", 400),
        (b"&".join(b"f%d=1" % k for k in range(40)), 400),
        (b'{"to": "all", "text": "a"}', 400),
    ],
)
def test_a_malformed_body_is_refused(served: Served, body: bytes, status: int) -> None:
    assert served.send("POST", NOTE, body).status == status
    assert written(served) == 0


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Content-Type": None}, 415),
        ({"Content-Type": "application/json"}, 415),
        ({"Content-Type": "text/plain"}, 415),
        ({"Content-Type": "multipart/form-data; boundary=x"}, 415),
        ({"Content-Type": f"{FORM}; charset=utf-7"}, 415),
        ({"Content-Type": f"{FORM}; charset=utf-8"}, 303),
    ],
)
def test_only_a_forms_own_type_is_read(
    served: Served, headers: Mapping[str, str | None], status: int
) -> None:
    assert served.post(NOTE, fields(served), headers).status == status


def head(page: Served, *lines: str, method: str = "POST", path: str = NOTE) -> bytes:
    told = (f"{method} {path} HTTP/1.1", f"Host: {page.host}", f"Cookie: {page.cookie}", *lines)
    return ("\r\n".join(told) + "\r\n\r\n").encode("latin-1")


def status_of(answer: bytes) -> int:
    return int(answer.split(b" ", 2)[1])


def test_an_oversized_body_is_refused_before_it_is_read(served: Served) -> None:
    lines = (f"Origin: {served.origin}", f"Content-Type: {FORM}")
    for n_bytes in (LARGEST_BODY + 1, 10**11):
        answer = served.raw(head(served, *lines, f"Content-Length: {n_bytes}"))
        assert status_of(answer) == 413
    assert served.post(NOTE, {**fields(served), "text": "x" * 4001}).status == 409
    assert written(served) == 0


@pytest.mark.parametrize(
    "lines",
    [
        ("Transfer-Encoding: chunked",),
        ("Transfer-Encoding: chunked", "Content-Length: 4"),
        ("Content-Length: 4", "Content-Length: 5"),
        ("Content-Length: -1",),
        ("Content-Length: 0x10",),
        (),
    ],
)
def test_a_body_of_unclear_length_is_refused_as_smugglers_send_them(
    served: Served, lines: tuple[str, ...]
) -> None:
    told = (f"Origin: {served.origin}", f"Content-Type: {FORM}", "Connection: close", *lines)
    answer = served.raw(head(served, *told) + b"4\r\nto=a\r\n0\r\n\r\n")
    assert status_of(answer) in (400, 411)
    assert written(served) == 0


def test_a_body_that_does_not_come_is_not_waited_for(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(security, "BODY_SECONDS", 0.2)
    lines = (f"Origin: {served.origin}", f"Content-Type: {FORM}", "Content-Length: 100")
    assert status_of(served.raw(head(served, *lines) + b"to=all")) == 408
    with socket.create_connection(("127.0.0.1", served.port)) as line:  # and one that hangs up
        line.sendall(head(served, *lines) + b"to=all")
    wait_for(lambda: served.get("/").status == 200)
    assert written(served) == 0


def test_looking_takes_no_body(served: Served) -> None:
    answer = served.raw(head(served, "Content-Length: 3", method="GET", path="/") + b"abc")
    assert status_of(answer) == 400


@pytest.mark.parametrize("name", ["Origin", "Cookie", "Content-Type", "Sec-Fetch-Site"])
def test_a_header_that_decides_comes_once(served: Served, name: str) -> None:
    told = {
        "Origin": served.origin,
        "Content-Type": FORM,
        "Cookie": served.cookie,
        "Sec-Fetch-Site": "same-origin",
    }
    lines = [f"{key}: {value}" for key, value in told.items() if key != "Cookie"]
    again = f"{name}: {told[name]}"
    answer = served.raw(head(served, *lines, again, "Content-Length: 0"))
    assert status_of(answer) == 400


# --- methods and addresses ------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "BREW"])
def test_other_methods_are_refused(served: Served, method: str) -> None:
    for path in ("/", NOTE, "/static/web.css"):
        answer = served.send(method, path)
        assert answer.status == 405
        assert "GET" in answer.headers["allow"]


def test_a_page_takes_no_form_and_a_form_has_no_page(served: Served) -> None:
    assert served.get(NOTE).status == 405
    assert served.send("HEAD", "/").status == 200
    assert served.post("/", fields(served)).status == 403, "no seal fits it"
    assert served.post("/static/web.css", fields(served)).status == 405
    assert served.post("/enter", fields(served)).status == 405


@pytest.mark.parametrize(
    "path",
    [
        "/static",
        "/static/",
        "/static/../app.py",
        "/static/..%2fapp.py",
        "/static/%2e%2e/app.py",
        "/static/..\\app.py",
        "/static//etc/passwd",
        "/static/web.css%00.js",
        "/static/layout.html",
        "/templates/layout.html",
        "/journal.sqlite",
        "/agents/../journal.sqlite",
        "/agents/%2e%2e",
        "/agents/g00-i00%2f..%2f..",
        "/agents/g00-i00/memory.json",
        "/requests/..",
        "/requests/%27%20OR%201=1",
        "/live/../audit",
        "//evil.example/",
        "/run/",
        "http://evil.example/",
    ],
)
def test_no_address_leads_to_a_file_or_to_a_list_of_files(served: Served, path: str) -> None:
    answer = served.get(path)
    assert answer.status == 404
    assert "root:" not in answer.text
    assert "SQLite" not in answer.text
    assert "location" not in answer.headers


def test_long_addresses_and_heads_are_refused(served: Served) -> None:
    assert served.get("/agents?words=" + "x" * 2000).status == 414
    assert served.send("GET", "/", headers={"X-Filler": "x" * 20_000}).status in (400, 431)
    assert served.get("/").status == 200


def test_a_websocket_is_not_opened(served: Served) -> None:
    lines = ("Upgrade: websocket", "Connection: Upgrade", "Sec-WebSocket-Version: 13")
    key = "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ=="
    answer = served.raw(head(served, *lines, key, "Connection: close", method="GET", path="/"))
    assert status_of(answer) != 101


# --- what is answered -----------------------------------------------------------------------------


def answers(page: Served) -> list[Answer]:
    return [
        page.get("/"),
        page.get("/run"),
        page.get("/live/run"),
        page.get("/static/web.js"),
        page.get("/no-such-page"),
        page.get("/enter"),
        page.get(NOTE),
        page.send("PUT", "/"),
        page.send("GET", "/", headers={"Cookie": None}),
        page.send("GET", "/", headers={"Host": "evil.example"}),
        page.post(NOTE, {}),
        page.post(NOTE, fields(page)),
    ]


def test_every_answer_carries_the_security_headers(served: Served) -> None:
    for answer in answers(served):
        assert HEADERS.items() <= dict(answer.headers).items(), answer
        assert "server" not in answer.headers
        assert "access-control-allow-origin" not in answer.headers
    assert "'unsafe" not in HEADERS["content-security-policy"]


def test_pages_hold_no_script_or_style_of_their_own(served: Served) -> None:
    request = served.ask()
    for path in ("/", "/run", "/lineage", "/guidance", f"/requests/{request.request_id}"):
        text = served.get(path).text
        assert text.count("<script") == text.count('<script src="/static/web.js" defer></script>')
        assert "<style" not in text
        assert " style=" not in text
        assert " onclick=" not in text


def test_a_failure_of_ours_shows_no_traceback(
    served: Served, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail() -> str:
        raise RuntimeError("a secret of the house")

    monkeypatch.setattr(served.pages, "run", fail)
    answer = served.get("/run")
    assert answer.status == 500
    assert "Traceback" not in answer.text
    assert "secret" not in answer.text
    assert HEADERS.items() <= dict(answer.headers).items()
    wait_for(lambda: "a secret of the house" in caplog.text)  # what the terminal is told


def test_neither_link_nor_cookie_is_printed(
    run_folder: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    with Served(run_folder) as page:
        page.enter()
        page.get("/")
        page.get(f"/enter?token={page.door.link_token}")
        said = "".join(capfd.readouterr()) + caplog.text
        assert page.door.link_token not in said
        assert page.cookie.partition("=")[2] not in said


def test_secrets_are_long_and_new_each_time() -> None:
    doors = [Door("127.0.0.1", 8787) for _ in range(50)]
    assert len({door.link_token for door in doors}) == 50
    assert min(len(door.link_token) for door in doors) >= 43, "256 bits"


def test_a_field_may_hold_any_language_and_line_breaks() -> None:
    assert parse_form(b"a=%E4%BD%A0+%C3%A9%0D%0Ab%09c") == {"a": "你 é\nb\tc"}
    with pytest.raises(Refused):
        parse_form(b"a=%0b")
