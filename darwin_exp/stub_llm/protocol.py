"""Bodies of OpenAI's wire protocol: completions, errors, models, and what a request asks for.

Reads: parsed requests.
Writes: bodies to be sent as JSON.
Never: opens a connection.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import Any

from darwin_exp.stub_llm.answers import Completion
from darwin_exp.stub_llm.prompts import text_of

Body = dict[str, Any]

FORMATS = ("json_schema", "json_object", "text")
CHARACTERS_A_TOKEN = 4  # close enough to count by, and the same on every machine
_FORMS = ("edits", "rewrite", "chunk")


def completion_body(completion: Completion, request: Mapping[str, Any], digest: str) -> Body:
    text, finish_reason = completion.text, completion.finish_reason
    if text is not None and completion.is_data and format_of(request) == "text":
        text = f"Here is the change that I would make.\n\n```json\n{text}"
        if finish_reason == "stop":
            text += "\n```\n\nI kept it small, so that its effect can be told from noise.\n"
    most = request.get("max_completion_tokens") or request.get("max_tokens")
    if text is not None and isinstance(most, int) and _tokens(text) > most:
        text, finish_reason = text[: most * CHARACTERS_A_TOKEN], "length"
    tokens_in = 3 + sum(4 + _tokens(text_of(message)) for message in request["messages"])
    tokens_out = _tokens(text or completion.refusal or "")
    return {
        "id": f"chatcmpl-stub-{digest[:24]}",
        "object": "chat.completion",
        "created": int(time.time()),
        "model": request["model"],
        "choices": [
            {
                "index": 0,
                "message": {
                    "role": "assistant",
                    "content": text,
                    "refusal": completion.refusal,
                },
                "logprobs": None,
                "finish_reason": finish_reason,
            }
        ],
        "usage": {
            "prompt_tokens": tokens_in,
            "completion_tokens": tokens_out,
            "total_tokens": tokens_in + tokens_out,
        },
    }


def _tokens(text: str) -> int:
    return math.ceil(len(text) / CHARACTERS_A_TOKEN)


def format_of(body: Mapping[str, Any]) -> str:
    asked = body.get("response_format")
    return str(asked.get("type", "text")) if isinstance(asked, dict) else "text"


def form_of(body: Mapping[str, Any]) -> str:
    """Return the form that the schema asks for, by its title or name."""
    asked = body.get("response_format")
    given = asked.get("json_schema") if isinstance(asked, dict) else None
    if isinstance(given, dict):
        schema = given.get("schema")
        title = schema.get("title") if isinstance(schema, dict) else None
        for name in (title, given.get("name")):
            if name in _FORMS:
                return str(name)
    return "edits"


def error_body(
    status: int, message: str, code: str | None = None, param: str | None = None
) -> Body:
    """Return an error as OpenAI's protocol words it."""
    types = {429: "rate_limit_error", 401: "invalid_request_error"}
    kind = types.get(status, "server_error" if status >= 500 else "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def model_body(name: str) -> Body:
    return {"id": name, "object": "model", "created": 0, "owned_by": "hand-written"}
