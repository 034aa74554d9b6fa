"""Keys of endpoints: read from the environment when they are needed, and taken out of any text."""

from __future__ import annotations

import ipaddress
import os
from urllib.parse import urlsplit

from darwin_exp.individual import ModelSpec

UNUSED = "unused"  # what a server on this machine, which asks for no key, is sent
_SHORTEST_SECRET = 8  # "EMPTY" and the like guard nothing, and are words that answers may hold


def is_loopback(base_url: str) -> bool:
    """Tell whether an endpoint is on this machine: it costs nothing and may need no key."""
    try:
        host = urlsplit(base_url).hostname or ""
    except ValueError:
        return False
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    return address.is_loopback or address.is_unspecified


def key_of(model: ModelSpec) -> str:
    """Return the key that the environment holds for a model's endpoint; empty where it has none."""
    key = os.environ.get(model.key_env, "").strip()
    return UNUSED if not key and is_loopback(model.base_url) else key


def problem_with_key(model: ModelSpec) -> str | None:
    """Say what is wrong with the key before anything is sent, or None."""
    key = key_of(model)
    if not key:
        return f"it needs a key, and {model.key_env} is not set; export {model.key_env}=YOUR_KEY"
    if not (key.isascii() and key.isprintable()):
        return (
            f"{model.key_env} holds characters that no key has (a typographic quote, a line "
            f"break?); export {model.key_env}=YOUR_KEY again"
        )
    return None


def scrubbed(text: str, model: ModelSpec) -> str:
    """Return a text of the endpoint without the key, which some servers repeat."""
    key = key_of(model)
    return text.replace(key, "[key]") if len(key) >= _SHORTEST_SECRET else text
