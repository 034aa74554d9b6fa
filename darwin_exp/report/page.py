"""The page of a report: facts and charts laid out as one self-contained HTML file.

Reads: facts; page.html, page.css and page.js beside this module.
Writes: text.
Never: lets text of a genome, a model or a candidate through unescaped, or loads from anywhere: the
page forbids both by its own policy, which knows its one script by hash.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as version_of
from pathlib import Path
from typing import Any

from markupsafe import Markup

from darwin_exp.chronicle import Agent, environment_of
from darwin_exp.report import bars, charts, lineage
from darwin_exp.report.boundaries import name_of
from darwin_exp.report.effects import Effect, noise_floor
from darwin_exp.report.facts import (
    STATUS_IN_WORDS,
    Facts,
    settings,
    signed,
)
from darwin_exp.report.patch import FilePatch, patches
from darwin_exp.report.people import MOST_ROWS, in_words
from darwin_exp.unseen import visible
from darwin_exp.wording import duration, number

HERE = Path(__file__).parent
LARGEST_OPEN_TABLE = 12  # rows; a longer table of reviews is folded
LARGEST_WHOLE_TREE = 60  # agents; of a larger tree those who matter are shown first
SECTIONS = (
    ("result", "Result"),
    ("generations", "Generations"),
    ("trade-offs", "Trade-offs"),
    ("lineage", "Lineage"),
    ("patch", "Patch"),
    ("edits", "Edits"),
    ("models", "Models"),
    ("people", "People"),
    ("failures", "Failures"),
    ("time", "Time"),
    ("individuals", "Agents"),
    ("run", "Run"),
)
COLUMNS = (
    ("agent", False),
    ("gen.", True),
    ("parents", False),
    ("children", True),
    ("editor", False),
    ("what", False),
    ("status", False),
    ("perplexity", True),
    ("vs parent", True),
    ("z", True),
    ("MFU", True),
    ("fitness", True),
)
ABLATION_KEYS = ("champion_id", "n_seeds", "split", "pruned")
PART_KEYS = (
    *("name", "what", "file", "kind", "n", "contribution_percent", "ci95", "p_value", "verdict"),
    "note",
)
STAGE_WORDS = {"startup": "start-up"}


def render(facts: Facts) -> str:
    """Return the page."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(HERE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_finalised,
    )
    environment.filters["visible"] = visible
    environment.filters["tojson_text"] = lambda value: json.dumps(value, ensure_ascii=False)
    script = (HERE / "page.js").read_text(encoding="utf-8").strip()
    digest = hashlib.sha256(script.encode()).digest()
    return environment.get_template("page.html").render(
        style=Markup((HERE / "page.css").read_text(encoding="utf-8")),
        script=Markup(script),
        script_hash=Markup(base64.b64encode(digest).decode()),
        facts=facts,
        sections=[one for one in SECTIONS if _is_there(facts, one[0])],
        columns=COLUMNS,
        charts=_charts(facts),
        signed=signed,
        number=number,
        duration=duration,
        change=_change,
        change_interval=_change_interval,
        p_value=lambda value: number(value, 2) if isinstance(value, int | float) else "–",
        z=_z,
        cell=_cell,
        percent_cell=lambda value: _cell(value, 3, signed(value)),
        z_cell=lambda value: _cell(value, 3, _z(value)),
        **_result(facts),
        **_champion(facts),
        **_time(facts),
        **_record(facts),
        **_models(facts),
        **_people(facts),
    )


def _is_there(facts: Facts, section: str) -> bool:
    """Tell whether a section has anything to say; most always have."""
    return bool({"models": facts.asked, "people": facts.people}.get(section, True))


def _charts(facts: Facts) -> dict[str, Any]:
    small = len(facts.chronicle.agents) <= LARGEST_WHOLE_TREE
    return {
        "perplexity": charts.by_generation(facts, "val_perplexity"),
        "mfu": charts.by_generation(facts, "mfu"),
        "best_so_far": charts.best_so_far(facts),
        "trade_offs": charts.trade_offs(facts),
        "tree": lineage.tree(facts, None if small else lineage.backbone(facts)),
        "whole_tree": None if small else lineage.tree(facts),
        "operators": bars.operator_effects(facts, "perplexity"),
        "operators_mfu": bars.operator_effects(facts, "mfu"),
        "time": bars.time_by_stage(facts),
    }


def _result(facts: Facts) -> dict[str, Any]:
    chronicle, summary = facts.chronicle, facts.summary
    base, selected = chronicle.base, chronicle.selected
    here = chronicle.claimed_in.index
    sides = []
    if base is not None:
        for name, digits, key in (
            ("test perplexity", 4, "test_perplexity"),
            ("validation perplexity", 4, "val_perplexity"),
            ("validation bits per byte", 4, "val_bpb"),
            ("MFU", 3, "mfu"),
        ):
            values = [(summary[s] or {}).get(key) for s in ("baseline", "champion")]
            sides.append(_side(name, digits, values))
        for name, digits, key in (
            ("tokens per second", 4, "tokens_per_second"),
            ("parameters", 12, "n_parameters"),
        ):
            chosen = selected if chronicle.closing is not None else None
            compared = (one.seen_in(here) if one else None for one in (base, chosen))
            values = [one.value(key) if one else None for one in compared]
            sides.append(_side(name, digits, values))
    seen = {agent.status.value for agent in chronicle.agents}
    return {
        "run_id": chronicle.run_id,
        "status_in_words": STATUS_IN_WORDS.get(facts.status, facts.status),
        "n_failed": sum(summary["failed"].values()),
        "sides": sides,
        "statuses": sorted(seen),
        "failed_glyphs": [(s, glyph) for s, glyph in charts.GLYPHS.items() if s in seen],
        "generations": [_generation(event) for event in chronicle.of_kind("generation")],
        "effects": facts.effects,
        "no_effect": Effect(),
        "noise": noise_floor(chronicle),
        "several_environments": len(chronicle.environments) > 1,
        "current": name_of(chronicle, chronicle.current),
        "claimed_in": name_of(chronicle, chronicle.claimed_in),
    }


def _side(name: str, digits: int, values: list[float | None]) -> dict[str, str]:
    change = None
    before, after = values
    if before and after is not None:
        change = 100 * (after / before - 1)
    words = [number(int(v) if digits > 9 and v is not None else v, digits) for v in values]
    return {"name": name, "base": words[0], "selected": words[1], "change": signed(change)}


def _generation(event: Any) -> dict[str, Any]:
    payload, measured = event.payload, event.measured
    best, mean = payload.get("best") or {}, payload.get("mean") or {}
    return {
        "generation": payload["generation"],
        "environment": environment_of(event),
        "best_id": payload["best_id"],
        "best": best.get("val_perplexity"),
        "mean": mean.get("val_perplexity"),
        "best_mfu": (measured.get("best") or {}).get("mfu"),
        "mean_mfu": (measured.get("mean") or {}).get("mfu"),
        "n": len(payload.get("population") or ()),
        "survivors": ", ".join(payload.get("survivors") or ()),
    }


def _champion(facts: Facts) -> dict[str, Any]:
    chronicle, selected = facts.chronicle, facts.chronicle.selected
    changed: list[FilePatch] = []
    why = "Nothing was selected: no agent was measured."
    if chronicle.current.index and not chronicle.compared:
        where = name_of(chronicle, chronicle.current)
        why = f"Nothing was selected: no agent was measured in {where} yet."
    if selected is not None and selected.is_base:
        why = "Nothing: the base itself is the fittest."
    elif selected is not None:
        try:
            changed = patches(chronicle.base_genome, chronicle.genome_of(selected.individual_id))
            why = "Nothing: its code is the base's."
        except KeyError:
            why = "Its code cannot be rebuilt: the journal holds no rewrite of it."
    ablation = facts.ablation if _is_of(facts.ablation, selected) else None
    parts = [
        {**dict.fromkeys(PART_KEYS), **part}
        for part in (ablation or {}).get("parts", ())
        if isinstance(part, dict)
    ]
    return {
        "selected": selected,
        "is_closed": chronicle.closing is not None,
        "patches": changed,
        "why_no_patch": why,
        "line": [
            {
                "agent": agent,
                "edits": agent.new_edits,
                "effect": facts.effects.get(agent.individual_id, Effect()),
            }
            for agent in facts.champions_line[1:]
        ],
        "ablation": ablation and {**dict.fromkeys(ABLATION_KEYS), **ablation, "parts": parts},
        "ablated": {side: _trained((ablation or {}).get(side)) for side in ("base", "champion")},
    }


def _trained(side: Any) -> str:
    """Say what a side of an ablation came to, and what of its trainings went wrong."""
    found = side if isinstance(side, dict) else {}
    perplexity, note = found.get("perplexity"), found.get("note")
    words = number(perplexity) if isinstance(perplexity, int | float) else "–"
    return f"{words} ({note})" if note else words


def _is_of(ablation: Mapping[str, Any] | None, selected: Agent | None) -> bool:
    """Tell whether an ablation took apart whom the run has selected: a resumed run may differ."""
    return bool(ablation and selected and ablation.get("champion_id") == selected.individual_id)


def _time(facts: Facts) -> dict[str, Any]:
    stages = [
        stage
        for stage in bars.STAGE_NAMES
        if any(stage in phase.slot_seconds for phase in facts.phases)
    ]
    return {
        "stages": stages,
        "stage_names": {stage: STAGE_WORDS.get(stage, stage) for stage in stages},
        "total": lambda stage: sum(p.slot_seconds.get(stage, 0.0) for p in facts.phases),
        "n_slots": facts.n_slots,
    }


def _record(facts: Facts) -> dict[str, Any]:
    chronicle = facts.chronicle
    begun = chronicle.begun
    environment = {
        "run id": chronicle.run_id,
        "environment id": begun.payload.get("environment_id"),
        **begun.payload.get("environment", {}),
        "host": begun.measured.get("host"),
        "peak FLOP/s": begun.measured.get("peak_flops"),
        "slots": begun.measured.get("n_slots"),
        "base genome": begun.payload.get("base_genome_id"),
        "sweep": chronicle.sweep_id,
    }
    resumed = [
        str(event.measured.get("command", ""))
        for event in chronicle.of_kind("session")
        if event.payload.get("what") == "resumed"
    ]
    last = max((agent.generation for agent in chronicle.agents), default=0)
    return {
        "environment": [
            (key, value if isinstance(value, str) else json.dumps(value))
            for key, value in environment.items()
            if value is not None
        ],
        "settings": list(settings(chronicle)),
        "resumed": resumed,
        "next_generations": last + 3,
        "began": _moment(chronicle.events[0].written_at),
        "ended": _moment(chronicle.events[-1].written_at),
        "version": _version(),
    }


def _version() -> str:
    try:
        return version_of("darwin-exp")
    except PackageNotFoundError:  # run from a checkout that was never installed
        return "(not installed)"


def _moment(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S")


def _models(facts: Facts) -> dict[str, Any]:
    """Say in words how often a first attempt failed and was mended, and what models cost."""
    if facts.asked is None:
        return {}
    first, spent = facts.asked.first_attempts, facts.summary["llm"]
    failed = "No first attempt has ended yet."
    if first.n:
        failed = f"Error rate {100 * first.n_not_ok / first.n:.0f} %: "
        failed += f"of {_count(first.n, 'first attempt')}, {first.n_not_ok} not OK."
    mended = "Nothing failed."
    if first.n_not_ok:
        mended = f"Resolution rate {100 * first.n_repaired / first.n_not_ok:.0f} %: "
        mended += f"{first.n_repaired} of {first.n_not_ok} mended in the same generation."
    cost = "" if spent["usd"] is None else f", {_dollars(spent['usd'])}"
    return {
        "error_rate": failed,
        "resolution_rate": mended,
        "spent": f"{_count(spent['calls'], 'answer')}: {spent['tokens_in']:,} tokens in, "
        f"{spent['tokens_out']:,} out{cost}.",
        "n_unsettled": spent.get("unsettled") or 0,
        "dollars": _dollars,
    }


def _people(facts: Facts) -> dict[str, Any]:
    """Return what the section on people needs; marks are of its agents."""
    people = facts.people
    if people is None:
        return {"marks": {}}
    return {
        "marks": people.marks,
        "asked_in_words": in_words(people, facts.summary["people"]),
        "known_requests": {one.request_id for one in people.asked[:MOST_ROWS]},
        "most_rows": MOST_ROWS,
        "largest_open_table": LARGEST_OPEN_TABLE,
        "moment": lambda seconds: _moment(seconds)[: -len(":00")],
    }


def _count(n: int, what: str) -> str:
    return f"{n:,} {what}" if n == 1 else f"{n:,} {what}s"


def _dollars(usd: float | None) -> str:
    """Return an amount to three digits; a dash where it is not known."""
    if usd is None:
        return "–"
    return f"${usd:,.2f}" if usd >= 10 or usd == 0 else f"${number(usd, 3)}"


# --- cells ----------------------------------------------------------------------------------------


def _cell(value: float | None, digits: int, shown: str | None = None) -> Markup:
    exact = "" if value is None or not math.isfinite(value) else f"{value:.6g}"
    words = number(value, digits) if shown is None else shown
    return Markup('<td class="num" data-v="{}">{}</td>').format(exact, words)


def _z(value: float | None) -> str:
    return "–" if value is None else f"{value:+.1f}".replace("-", "−")


def _change(gain: Any) -> str:
    """Show a gain of perplexity, positive where it is lower, as the change that it is."""
    return signed(0.0 - gain) if isinstance(gain, int | float) else "–"


def _change_interval(ends: Any) -> str:
    if not isinstance(ends, list | tuple) or len(ends) != 2:
        return "–"
    return f"{_change(ends[1])} to {_change(ends[0])}"


def _finalised(value: Any) -> Any:
    """Return what a template shows of a value: nothing for None, and no invisible characters."""
    if value is None:
        return ""
    if type(value) is str:  # Markup was made, and cleaned, by this project
        return visible(value)
    return value
