"""Endpoints: whether a run's language models can be reached, found out before it begins.

Reads: keys of the environment, and each endpoint's list of models, which costs nothing.
Never: asks a model anything, or takes what an endpoint does not tell for a proof.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from difflib import get_close_matches
from urllib.parse import urlsplit

from darwin_exp.individual import ModelSpec
from darwin_exp.llm import keys
from darwin_exp.llm.failures import Failure, Fault, explained
from darwin_exp.llm.wire import Wire
from darwin_exp.protocols import ModelsUnavailable

_HAS_NO_LIST = (404, 405, 501)  # some servers answer questions only
_N_SHOWN = 5
_USUAL_END = "/v1"


def check(models: Sequence[ModelSpec], timeout_seconds: float) -> list[str]:
    """Make sure that every model's endpoint is there and takes the key.

    Args:
        timeout_seconds: longest wait for one endpoint's list.

    Returns:
        What people should know although it stops nothing, a line each.

    Raises:
        ModelsUnavailable: an address that is none, no key or a wrong one, an endpoint that is
            down or is something else, or one of this machine that has no such model.
    """
    check_addresses(models)
    wire = Wire(timeout_seconds)
    notes: list[str] = []
    listed: dict[tuple[str, str], tuple[str, ...]] = {}
    for model in models:
        problem = keys.problem_with_key(model)
        if problem is not None:
            raise ModelsUnavailable(f"{model.name} at {model.base_url}: {problem}")
        endpoint = (model.base_url, model.key_env)
        if endpoint not in listed:
            outcome = wire.names(model)
            if isinstance(outcome, Failure):
                _refuse_half_an_address(outcome, model, wire)
                notes += _judged(outcome, model)
                outcome = ()
            listed[endpoint] = outcome
        notes += _looked_up(model, listed[endpoint])
    return list(dict.fromkeys(notes))


def check_addresses(models: Iterable[ModelSpec]) -> None:
    """Make sure that every model's address can be one, without asking anybody.

    Raises:
        ModelsUnavailable: one of them is none, or holds a password.
    """
    for model in models:
        _refuse_bad_address(model)


def _refuse_half_an_address(failure: Failure, model: ModelSpec, wire: Wire) -> None:
    """Raise if what is asked for is not there, and is with the usual end of an address."""
    url = model.base_url.rstrip("/")
    if failure.status not in _HAS_NO_LIST or url.endswith(_USUAL_END):
        return
    whole = f"{url}{_USUAL_END}"
    outcome = wire.names(replace(model, base_url=whole))
    if outcome and not isinstance(outcome, Failure):
        raise ModelsUnavailable(
            f"{model.name}: base_url={model.base_url} leads nowhere, and models answer at {whole}; "
            "write that"
        )


def _refuse_bad_address(model: ModelSpec) -> None:
    try:
        address = urlsplit(model.base_url)
        is_address = address.scheme in ("http", "https") and bool(address.hostname)
        has_password = bool(address.password or address.username)
    except ValueError:
        is_address = has_password = False
    if has_password:
        raise ModelsUnavailable(
            "base_url must hold no user name or password, as it is written down; put the key into "
            f"the environment, as {model.key_env}"
        )
    if not is_address:
        raise ModelsUnavailable(
            f"{model.name}: base_url={model.base_url} is no address; write it like "
            "http://127.0.0.1:8000/v1"
        )


def _judged(failure: Failure, model: ModelSpec) -> list[str]:
    """Return what a list that could not be had means, as notes; raise where it settles things."""
    if failure.status in _HAS_NO_LIST:
        return []
    if failure.status == 403 and "scope" in failure.message.lower():
        return []  # the key may ask models, and not for their names
    gone = failure.fault in (Fault.CONNECTION, Fault.TIMEOUT) and failure.status is None
    if gone:
        raise ModelsUnavailable(
            f"{explained(failure, model)}; start the server, or check base_url and the network"
        )
    if failure.is_final:
        raise ModelsUnavailable(explained(failure, model))
    return [f"{explained(failure, model)}; the run begins all the same"]


def _looked_up(model: ModelSpec, names: Sequence[str]) -> list[str]:
    """Return a note where a model is not in its endpoint's list; raise if the list is complete."""
    if not names or model.name in names or f"{model.name}:latest" in names:
        return []
    close = get_close_matches(model.name, names, n=_N_SHOWN, cutoff=0.4)
    known = ", ".join(close or list(names[:_N_SHOWN]))
    told = f"{model.name} is not among the models that {model.base_url} lists ({known})"
    if keys.is_loopback(model.base_url):
        raise ModelsUnavailable(f"{told}; choose one of these, or load it into the server")
    return [f"{told}; the run begins all the same"]
