"""What can go wrong with one try to ask a language model, and how it is told apart.

Reads: statuses, headers and bodies of answers; exceptions of the transport.
Never: decides whether there is another try, or repeats a key.
"""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC
from email.utils import parsedate_to_datetime
from enum import Enum
from typing import Any

from darwin_exp.individual import ModelSpec

MESSAGE_LENGTH = 300
LONGEST_WAIT_SECONDS = 86_400.0  # a server that says more has not meant it


class Fault(Enum):
    """How a try failed; the value stands in the journal."""

    RATE_LIMITED = "rate_limited"  # asked to come back later
    SERVER = "server"  # a failure of its own, which will pass
    TIMEOUT = "timeout"
    CONNECTION = "connection"  # refused, reset, or cut while it answered
    UNREADABLE = "unreadable"  # no chat completion, or one without an answer
    FORMAT_REFUSED = "format_refused"  # a part of the request that this server does not know
    TURNED_DOWN = "turned_down"  # this question, for what it says or how long it is
    FATAL = "fatal"  # it would be refused again


@dataclass(frozen=True)
class Failure:
    """One try that brought no answer.

    Attributes:
        message: one line, without the key.
        status: of the HTTP answer; None where there was none.
        retry_after_seconds: before which the server wants no other try.
        is_final: another try would end the same way.
        unknown: the server may have answered, and may charge for it.
        refused: which part of the request the server does not know, if that is what it said.
    """

    fault: Fault
    message: str
    status: int | None = None
    retry_after_seconds: float | None = None
    is_final: bool = False
    unknown: bool = False
    refused: str = ""


def of_status(status: int, headers: Mapping[str, str], body: str) -> Failure:
    """Tell what an HTTP status other than success means."""
    said = _complaint(body)
    message = f"HTTP {status}: {one_line(said.message)}" if said.message else f"HTTP {status}"
    if status == 401:
        # What is wrong is clear, and the server's sentence may show half the key.
        return Failure(Fault.FATAL, "HTTP 401: it does not accept the key", status, is_final=True)
    if status == 429:
        if said.code == "insufficient_quota":
            return Failure(Fault.FATAL, message, status, is_final=True)
        after = retry_after_seconds(headers)
        return Failure(Fault.RATE_LIMITED, message, status, after)
    if status in (400, 413, 422) and _is_about_the_question(said):
        return Failure(Fault.TURNED_DOWN, message, status)
    if refused := _refused(status, said):
        return Failure(Fault.FORMAT_REFUSED, message, status, refused=refused)
    if status == 408:
        return Failure(Fault.TIMEOUT, message, status, retry_after_seconds(headers))
    if status in (409, 425) or (status >= 500 and status != 501):
        return Failure(Fault.SERVER, message, status, retry_after_seconds(headers))
    return Failure(Fault.FATAL, message, status, is_final=True)


def of_transport(error: BaseException) -> Failure:
    """Tell what an exception of the HTTP client means; it is known by the name of its class."""
    name = type(error).__name__
    if name in ("ConnectTimeout", "PoolTimeout"):
        return Failure(Fault.TIMEOUT, "no connection within the time allowed")
    if name == "WriteTimeout":
        return Failure(Fault.TIMEOUT, "it did not take the question in within the time allowed")
    if name == "ReadTimeout":
        return too_slow()
    if name == "ConnectError":
        # The system's own words, such as "Connection refused". Trust is not a matter of patience.
        untrusted = "CERTIFICATE_VERIFY_FAILED" in str(error)
        return Failure(Fault.CONNECTION, one_line(str(error)), is_final=untrusted)
    if name == "UnsupportedProtocol":
        return Failure(Fault.FATAL, "base_url is no http:// or https:// address", is_final=True)
    if name == "TooManyRedirects":
        return Failure(Fault.FATAL, "base_url leads round in circles", is_final=True)
    if name in ("ProxyError", "WriteError", "LocalProtocolError"):
        return Failure(Fault.CONNECTION, f"the question could not be sent ({name})")
    return Failure(
        Fault.CONNECTION,
        f"the connection broke before the answer was complete ({name})",
        unknown=True,
    )


def too_slow() -> Failure:
    """Return the failure of a server that took the question and did not answer in time."""
    return Failure(Fault.TIMEOUT, "no complete answer within the time allowed", unknown=True)


def not_a_completion(body: str) -> Failure:
    """Return the failure of a success that holds something else: a page, or other JSON."""
    what = _page(body) or ("nothing" if not body.strip() else "something else")
    return Failure(
        Fault.UNREADABLE,
        f"it answered with {what}, and not as an OpenAI-compatible endpoint does; check base_url "
        "(it usually ends in /v1) and any proxy in between",
        200,
        is_final=True,
    )


def explained(failure: Failure, model: ModelSpec) -> str:
    """Return one line that says which model failed, how, and what may mend it."""
    cures = {
        401: f"export {model.key_env}=YOUR_KEY with one that it accepts",
        403: f"check what the key in {model.key_env} may be used for",
        404: "check the model's name, and base_url (it usually ends in /v1)",
    }
    cure = cures.get(failure.status or 0)
    told = f"{model.name} at {model.base_url}: {failure.message.rstrip('.')}"
    return f"{told}; {cure}" if cure else told


def retry_after_seconds(headers: Mapping[str, str]) -> float | None:
    """Return how long a server asks to be left alone, given in any of three forms, or None.

    Source: RFC 9110, section 10.2.3, for seconds and dates; `retry-after-ms` is OpenAI's own.
    """
    for name, per_second in (("retry-after-ms", 1000.0), ("retry-after", 1.0)):
        try:
            seconds = float(headers.get(name, "")) / per_second
        except ValueError:
            continue
        if not math.isnan(seconds):
            return min(max(0.0, seconds), LONGEST_WAIT_SECONDS)
    try:
        date = parsedate_to_datetime(headers.get("retry-after", ""))
    except (ValueError, TypeError, IndexError, OverflowError):
        return None
    if date.tzinfo is None:
        date = date.replace(tzinfo=UTC)
    return min(max(0.0, date.timestamp() - time.time()), LONGEST_WAIT_SECONDS)


def one_line(text: str) -> str:
    """Return a text of others as one short line that no terminal acts upon."""
    # More would be dropped anyway, and a proxy's page may be long.
    printable = "".join(c if c.isprintable() else " " for c in text[: 20 * MESSAGE_LENGTH])
    line = " ".join(printable.split())
    return line if len(line) <= MESSAGE_LENGTH else f"{line[: MESSAGE_LENGTH - 1]}…"


@dataclass(frozen=True)
class _Complaint:
    message: str
    code: str = ""
    parameter: str = ""


def _complaint(body: str) -> _Complaint:
    """Read what an error says; servers that call themselves compatible have many forms for it."""
    try:
        content: Any = json.loads(body)
    except (ValueError, RecursionError):
        return _Complaint(_page(body) or body)
    error = content.get("error", content) if isinstance(content, dict) else content
    if not isinstance(error, dict):
        return _Complaint(str(error))
    words = error.get("message") or error.get("detail") or error
    return _Complaint(
        words if isinstance(words, str) else json.dumps(words),
        str(error.get("code") or error.get("type") or ""),
        str(error.get("param") or ""),
    )


def _page(body: str) -> str:
    """Return what to call a body that is an HTML page; empty where it is none."""
    start = body[:5000]
    if not start.lstrip().startswith("<"):
        return ""
    title = re.search(r"<title[^>]*>(.*?)</title>", start, re.IGNORECASE | re.DOTALL)
    return f"an HTML page ({one_line(title[1])})" if title else "an HTML page"


# What is wrong with one question says nothing about the next: the run goes on without its answer.
_ABOUT_THE_QUESTION = (
    "content_filter",
    "content_policy",
    "invalid_prompt",
    "context_length",
    "maximum context",
    "context window",
    "string_above_max_length",
)


def _is_about_the_question(said: _Complaint) -> bool:
    told = f"{said.code} {said.message}".casefold()
    return any(sign in told for sign in _ABOUT_THE_QUESTION)


_SPEAKS_OF_FORMATS = re.compile(
    r"\b(response_format|json_schema|json_object|schema|structured|guided|grammar|format)\b",
    re.IGNORECASE,
)
# Not enough by itself: "temperature is too high" or a prompt that is too long end the run.
_DOES_NOT_KNOW = re.compile(
    r"not support|unsupported|only the default|deprecated|unrecogni|unknown|not permitted"
    r"|not allowed|unexpected|extra (inputs|fields)",
    re.IGNORECASE,
)


def _refused(status: int, said: _Complaint) -> str:
    """Return which part of a request a server does not know: a parameter, or empty."""
    if status not in (400, 404, 415, 422, 501):
        return ""
    for parameter in ("max_tokens", "temperature"):
        named = parameter in (said.parameter, *re.findall(r"\w+", said.message))
        if named and (_DOES_NOT_KNOW.search(said.message) or "unsupported" in said.code):
            return parameter
    if said.parameter.startswith("response_format") or _SPEAKS_OF_FORMATS.search(said.message):
        return "response_format"
    return ""
