"""Reading a chat completion, whoever wrote it: servers that call themselves compatible differ."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from darwin_exp.llm import failures
from darwin_exp.llm.failures import Failure, Fault
from darwin_exp.protocols import Finish


@dataclass(frozen=True)
class Completion:
    """What stands in a chat completion.

    Attributes:
        tokens_in: as the server counted; None where it did not say.
        tokens_out: likewise.
    """

    text: str
    finish: Finish
    tokens_in: int | None = None
    tokens_out: int | None = None


def read_completion(body: str, headers: Mapping[str, str]) -> Completion | Failure:
    """Return what a successful HTTP answer holds, or why it is no chat completion."""
    content = _json(body)
    if not isinstance(content, dict):
        return failures.not_a_completion(body)
    choices = content.get("choices")
    if not choices and isinstance(content.get("error"), dict):
        # Some gateways report the failure of the server behind them as a success.
        code = content["error"].get("code")
        status = code if isinstance(code, int) and 400 <= code < 600 else 502
        return failures.of_status(status, headers, body)
    if not isinstance(choices, list):
        return failures.not_a_completion(body)
    if not choices:
        return Failure(
            Fault.UNREADABLE, "it answered with an empty list of choices", 200, unknown=True
        )
    choice = choices[0]
    message = choice.get("message") if isinstance(choice, dict) else None
    if not isinstance(message, dict):
        return failures.not_a_completion(body)
    text, refusal = _text(message.get("content")), _text(message.get("refusal"))
    usage = content.get("usage")
    counted = usage if isinstance(usage, dict) else {}
    return Completion(
        text or refusal,
        _finish(choice.get("finish_reason"), text, refusal),
        _count(counted.get("prompt_tokens")),
        _count(counted.get("completion_tokens")),
    )


def read_names(body: str) -> tuple[str, ...] | Failure:
    """Return the names in a list of models, none where it has another form than OpenAI's."""
    content = _json(body)
    if not isinstance(content, dict | list):
        return failures.not_a_completion(body)
    models = content.get("data") if isinstance(content, dict) else None
    if not isinstance(models, list):
        return ()
    return tuple(str(model["id"]) for model in models if isinstance(model, dict) and "id" in model)


def _finish(reason: Any, text: str, refusal: str) -> Finish:
    if refusal or reason == "content_filter":
        return Finish.REFUSED
    if reason in ("length", "max_tokens"):
        return Finish.LENGTH
    return Finish.COMPLETE if text.strip() else Finish.REFUSED


def _text(content: Any) -> str:
    """Return a message's content, which may come in parts, as text that can be written down."""
    if isinstance(content, list):
        parts = [part.get("text") for part in content if isinstance(part, dict)]
        content = "".join(part for part in parts if isinstance(part, str))
    if not isinstance(content, str):
        return ""
    # JSON may name half a surrogate pair, which no file can hold.
    return content.encode("utf-8", "replace").decode("utf-8")


def _count(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None


def _json(body: str) -> Any:
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        return None
