"""Calls of language models as MLflow traces, made from what the journal holds of them.

Reads: the events "llm_reserved", "llm_failed" and "llm_answered"; the prices in the "run" event.
Writes: traces, each tied to the run of the individual that it was asked for.
Never: goes through MLflow's tracer, which exports from threads of its own and looks up prices on
the network; what is written here is all finished, and has its price or none.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from darwin_exp.protocols import Event

RESERVED, FAILED, ANSWERED = "llm_reserved", "llm_failed", "llm_answered"
KINDS = frozenset({RESERVED, FAILED, ANSWERED})
TRACES_AT_A_TIME = 500  # the most that MLflow finds at once
LONGEST_TAG = 4000  # characters that every store takes, and a little less
# Something that is there and is no price: where nothing is, MLflow fetches a price list.
NO_PRICE = "unknown"


@dataclass(frozen=True)
class Trace:
    """One call of a language model, answered or failed.

    Attributes:
        key: the query's; of a failed try with the try's number.
        name: what a list of traces shows.
        session: what groups the calls that one individual took; unique beyond this evolution.
        began: seconds since the epoch.
        ended: seconds since the epoch.
        model: its name at the endpoint.
        host: of the endpoint.
        inputs: the request.
        outputs: the answer; None where there was none.
        problem: why there was none.
        tokens: in and out; None where there was no answer.
        usd: parts of the price by MLflow's names; None where it is not known.
    """

    key: str
    name: str
    session: str
    began: float
    ended: float
    model: str
    host: str
    inputs: Mapping[str, Any]
    outputs: Mapping[str, Any] | None
    problem: str
    tokens: tuple[int, int] | None
    usd: Mapping[str, float] | None
    tags: Mapping[str, Any]

    @property
    def digest(self) -> bytes:
        """Return what its ids are made of, the same whenever it is written."""
        return hashlib.sha256(f"{self.session} {self.key}".encode()).digest()

    @property
    def trace_id(self) -> str:
        return f"tr-{self.digest[:16].hex()}"

    @property
    def usage(self) -> dict[str, int] | None:
        """Return the tokens by MLflow's names."""
        if self.tokens is None:
            return None
        n_in, n_out = self.tokens
        return {"input_tokens": n_in, "output_tokens": n_out, "total_tokens": n_in + n_out}


# --- from the journal -----------------------------------------------------------------------------


def traces_of(individual: Event, history: Sequence[Event], run_id: str) -> list[Trace]:
    """Return the calls that an individual took, in order; most often there are none.

    Args:
        individual: its "individual" event, which follows all of them.
        history: the journal so far.
        run_id: the evolution's.
    """
    name = str(individual.payload.get("individual_id", individual.key))
    ours = [event for event in history if event.kind in KINDS and event.key.startswith(f"{name}/")]
    return list(_traces(individual, name, ours, history, run_id)) if ours else []


def _traces(
    individual: Event, name: str, ours: Sequence[Event], history: Sequence[Event], run_id: str
) -> Iterator[Trace]:
    answers = {event.key: event.payload for event in ours if event.kind == ANSWERED}
    reserved = {event.key: event.payload for event in ours if event.kind == RESERVED}
    begun = next((event for event in history if event.kind == "run"), None)
    config: Mapping[str, Any] = begun.payload.get("config", {}) if begun else {}
    for event in ours:
        if event.kind == RESERVED:
            continue
        is_answer = event.kind == ANSWERED
        query = event.key if is_answer else event.key.rpartition(".")[0]
        told = answers.get(query) or reserved.get(event.key) or {}
        model = told.get("model") or {}
        purpose = told.get("purpose") or _purpose(query)
        seconds = float(event.measured.get("seconds") or 0.0)
        price = config.get(f"llm.prices.{model.get('name')}")
        tags = {
            "darwin.run_id": run_id,
            "individual_id": name,
            "generation": individual.payload.get("generation"),
            "editor_id": individual.payload.get("editor_id"),
            "model": model.get("name"),
            "model_endpoint": model.get("base_url"),
            "purpose": purpose,
            "query": query,
            "latency_seconds": f"{seconds:.3f}",
            **(_of_answer(event) if is_answer else _of_failure(event)),
        }
        yield Trace(
            key=event.key,
            name=f"{purpose} {name}",
            session=f"{run_id}/{name}",
            began=event.written_at - seconds,
            ended=event.written_at,
            model=str(model.get("name", "")),
            host=urlsplit(str(model.get("base_url", ""))).hostname or "",
            inputs=_inputs(told),
            outputs=_outputs(told) if is_answer else None,
            problem="" if is_answer else _problem(event),
            tokens=(int(told["tokens_in"]), int(told["tokens_out"])) if is_answer else None,
            usd=_parts(told, price) if is_answer else None,
            tags={key: value for key, value in tags.items() if value is not None},
        )


def _purpose(query: str) -> str:
    """Return what a call was for by its key, which says whether it belongs to the first attempt."""
    return "draft" if query.split("/")[1:2] == ["0"] else "repair"


def _of_answer(event: Event) -> dict[str, Any]:
    usd = event.payload.get("usd")
    return {
        "finish": event.payload.get("finish"),
        "usd": None if usd is None else f"{usd:.8g}",
        "tries": event.measured.get("tries"),
    }


def _of_failure(event: Event) -> dict[str, Any]:
    return {
        "finish": event.payload.get("kind"),
        "http_status": event.payload.get("status"),
        "outcome": "unknown: counted as spent" if event.payload.get("unknown") else None,
    }


def _problem(event: Event) -> str:
    kind = str(event.payload.get("kind", "failed")).replace("_", " ")
    return f"{kind}: {event.payload.get('message') or 'no message'}"


def _inputs(told: Mapping[str, Any]) -> dict[str, Any]:
    """Return the request in the shape that MLflow shows as a conversation.

    Of a failed try nothing but the hash of the prompt is known, unless a later one was answered.
    """
    model = told.get("model") or {}
    known = {
        "model": model.get("name"),
        "temperature": model.get("temperature"),
        **{
            key: told.get(key)
            for key in ("max_tokens", "response_format", "schema", "prompt_sha256")
        },
    }
    found: dict[str, Any] = {key: value for key, value in known.items() if value is not None}
    if "messages" in told:
        found["messages"] = [
            {"role": role, "content": storable(text)} for role, text in told["messages"]
        ]
    return found


def _outputs(told: Mapping[str, Any]) -> dict[str, Any]:
    # Within a choice, as the endpoint sent it: MLflow takes a bare text that is JSON apart.
    message = {"role": "assistant", "content": storable(told.get("text", ""))}
    return {"choices": [{"index": 0, "message": message, "finish_reason": told.get("finish")}]}


def _parts(told: Mapping[str, Any], price: Any) -> dict[str, float] | None:
    """Split what an answer cost, where the price list that the run began with explains the sum.

    Args:
        price: USD for a million tokens in and out; None where the list has no such model.
    """
    if told.get("usd") is None:
        return None
    total = float(told["usd"])
    if isinstance(price, list | tuple) and len(price) == 2:
        of_input = float(price[0]) * told["tokens_in"] / 1e6
        of_output = float(price[1]) * told["tokens_out"] / 1e6
        if math.isclose(of_input + of_output, total, rel_tol=1e-6, abs_tol=1e-12):
            return {"input_cost": of_input, "output_cost": of_output, "total_cost": total}
    return {"total_cost": total}


# --- to MLflow ------------------------------------------------------------------------------------


def write_traces(client: Any, experiment_id: str, run: str, traces: Sequence[Trace]) -> None:
    """Write those traces of a run that it does not have yet.

    Ids are made from the query's key, so that a trace which was cut off while it was written, or
    belongs to a run that was deleted since, is written over and not beside.

    Args:
        client: an MlflowClient.
        run: MLflow's id of the individual's run.
    """
    from mlflow.tracing.client import TracingClient

    tracing = TracingClient(client.tracking_uri)
    written = _written(client, experiment_id, run)
    for trace in traces:
        if trace.trace_id not in written:
            tracing.start_trace(_info(trace, experiment_id, run))
            try:
                tracing.log_spans(experiment_id, [_span(trace)])
            except NotImplementedError:
                return  # a remote server of a version that keeps no spans: runs must do


def _written(client: Any, experiment_id: str, run: str) -> set[str]:
    """Return the ids of those traces of a run that were written to their end."""
    from mlflow.tracing.constant import TraceTagKey

    found: set[str] = set()
    token = None
    while True:
        page = client.search_traces(
            locations=[experiment_id],
            run_id=run,
            include_spans=False,
            max_results=TRACES_AT_A_TIME,
            page_token=token,
        )
        found |= {one.info.trace_id for one in page if TraceTagKey.SPANS_LOCATION in one.info.tags}
        token = page.token
        if not token:
            return found


def _info(trace: Trace, experiment_id: str, run: str) -> Any:
    from mlflow.entities import TraceInfo, TraceLocation, TraceState
    from mlflow.tracing import constant

    key = constant.TraceMetadataKey
    metadata = {
        key.SOURCE_RUN: run,
        key.TRACE_SESSION: trace.session,
        constant.TRACE_SCHEMA_VERSION_KEY: str(constant.TRACE_SCHEMA_VERSION),
        "mlflow.source.name": "darwin_exp",
        "mlflow.source.type": "LOCAL",
    }
    if trace.usage is not None:
        metadata[key.TOKEN_USAGE] = json.dumps(trace.usage)
    if trace.usd is not None:
        metadata[key.COST] = json.dumps(dict(trace.usd))
    tags = {name: storable(str(value))[:LONGEST_TAG] for name, value in trace.tags.items()}
    return TraceInfo(
        trace_id=trace.trace_id,
        trace_location=TraceLocation.from_experiment_id(experiment_id),
        request_time=int(1000 * trace.began),
        execution_duration=int(1000 * (trace.ended - trace.began)),
        state=TraceState.ERROR if trace.problem else TraceState.OK,
        trace_metadata=metadata,
        tags={**tags, constant.TraceTagKey.TRACE_NAME: trace.name},
    )


def _span(trace: Trace) -> Any:
    """Return the one span of a trace, in the form in which MLflow itself reads spans back."""
    from mlflow.entities import Span, SpanType
    from mlflow.tracing.constant import SpanAttributeKey

    attributes = {
        SpanAttributeKey.REQUEST_ID: trace.trace_id,
        SpanAttributeKey.SPAN_TYPE: SpanType.CHAT_MODEL,
        SpanAttributeKey.MESSAGE_FORMAT: "openai",
        SpanAttributeKey.MODEL: trace.model,
        SpanAttributeKey.MODEL_PROVIDER: trace.host,
        SpanAttributeKey.INPUTS: trace.inputs,
        SpanAttributeKey.OUTPUTS: trace.outputs,
        SpanAttributeKey.CHAT_USAGE: trace.usage,
        SpanAttributeKey.LLM_COST: None if trace.usd is None else dict(trace.usd),
    }
    spelled = {
        name: json.dumps(value, ensure_ascii=False)
        for name, value in attributes.items()
        if value is not None
    }
    if trace.usage is not None:
        spelled.setdefault(SpanAttributeKey.LLM_COST, NO_PRICE)
    return Span.from_dict(
        {
            "trace_id": base64.b64encode(trace.digest[:16]).decode(),
            "span_id": base64.b64encode(trace.digest[16:24]).decode(),
            "parent_span_id": None,
            "name": trace.name,
            "start_time_unix_nano": int(1e9 * trace.began),
            "end_time_unix_nano": int(1e9 * trace.ended),
            "status": {
                "code": f"STATUS_CODE_{'ERROR' if trace.problem else 'OK'}",
                "message": storable(trace.problem),
            },
            "attributes": spelled,
            "events": _events(trace),
            "links": [],
        }
    )


def _events(trace: Trace) -> list[dict[str, Any]]:
    """Return what went wrong as an exception: MLflow's pages show no other reason of an error."""
    if not trace.problem:
        return []
    kind, _, message = trace.problem.partition(": ")
    told = {"exception.type": storable(kind), "exception.message": storable(message)}
    ended = int(1e9 * trace.ended)
    return [{"name": "exception", "time_unix_nano": ended, "attributes": told}]


def storable(text: str) -> str:
    """Return text that every store can hold: no half characters, and no zeros."""
    return text.encode("utf-8", "replace").decode("utf-8").replace("\0", "�")
