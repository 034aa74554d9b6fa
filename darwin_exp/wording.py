"""The words and figures in which a run is told: outcomes, times, and the table at its end.

Reads: individuals, and what `summary.json` holds.
Writes: nothing; the displays show what it returns.
Never: shows a zero for what was not measured, or touches the terminal itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from darwin_exp.individual import Individual
from darwin_exp.unseen import is_unseen

# --- the end --------------------------------------------------------------------------------------


def closing_table(summary: Mapping[str, Any]) -> RenderableType:
    """Return the end of a run from its `summary.json`; what was not measured is shown as '-'."""
    base: Mapping[str, Any] = summary.get("baseline") or {}
    best: Mapping[str, Any] = summary.get("champion") or {}
    gain: Mapping[str, Any] = summary.get("improvement") or {}
    at_steps: Mapping[str, Any] = gain.get("equal_steps") or {}
    run_id = clean(str(summary.get("run_id") or "-"))
    table = Table(
        title=f"run {run_id}: {summary.get('status') or '-'}",
        title_justify="left",
        title_style="bold",
    )
    table.add_column("", no_wrap=True)
    for heading in ("base", "selected", "change"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_row(
        "agent", *(clean(str(side.get("individual_id") or "-")) for side in (base, best)), ""
    )
    for label, key, digits, test_gain in (
        ("val perplexity", "val_perplexity", 4, None),
        ("val bits per byte", "val_bpb", 4, None),
        ("test perplexity", "test_perplexity", 4, gain.get("perplexity_percent")),
        ("mfu", "mfu", 3, gain.get("mfu_percent")),
    ):
        change = _change(base.get(key), best.get(key))
        if test_gain is not None:
            change = -test_gain if key != "mfu" else test_gain
        shown = "-" if change is None else f"{change:+.2f} %"
        table.add_row(label, number(base.get(key), digits), number(best.get(key), digits), shown)
    table.add_row("replicates", *(number(side.get("replicates"), 4) for side in (base, best)), "")
    return Group(
        table,
        *([] if gain.get("n_steps") else [_claim(gain, "equal time")]),
        _claim(at_steps, _steps(at_steps)),
        *_mfu_claim(gain),
        Text(),
        _counts(summary),
        _costs(summary),
        Text(),
        *_where_next(summary, run_id),
    )


def _mfu_claim(gain: Mapping[str, Any]) -> list[Text]:
    """Say the change of MFU with its interval, where it was timed often enough for one."""
    percent, interval, p_value = (gain.get(k) for k in ("mfu_percent", "mfu_ci95", "mfu_p_value"))
    if percent is None or interval is None or p_value is None:
        return []
    words = (
        f"mfu, timed again: {percent:+.2f} %, 95 % interval {interval[0]:+.2f} to "
        f"{interval[1]:+.2f} %, p = {p_value:.2g}"
    )
    return [Text(words, style="green" if p_value < 0.05 and percent > 0 else "")]


def _steps(at_steps: Mapping[str, Any]) -> str:
    n_steps = at_steps.get("n_steps")
    return "equal steps" if n_steps is None else f"equal steps ({n_steps})"


def _claim(gain: Mapping[str, Any], at: str) -> Text:
    percent, interval = gain.get("perplexity_percent"), gain.get("ci95")
    if percent is None:
        why = clean(gain.get("why_none") or "")
        return Text(f"at {at}, no claim: {why}" if why else f"at {at}: not measured", style="dim")
    direction = "lower" if percent >= 0 else "higher"
    words = f"at {at}: test perplexity {abs(percent):.2f} % {direction}"
    if interval is not None:
        words += f", 95 % interval of the gain {interval[0]:+.2f} to {interval[1]:+.2f} %"
    if gain.get("p_value") is not None:
        words += f", p = {gain['p_value']:.2g}"
    if earlier := gain.get("earlier_claims"):
        words += f" (claim {earlier + 1} on this test split, held to a stricter level)"
    significant = gain.get("significant")
    if significant is False:
        return Text(f"{words}: no significant progress", style="yellow")
    is_progress = significant and percent > 0
    return Text(
        words + (": significant" if significant else ""), style="green" if is_progress else ""
    )


def _counts(summary: Mapping[str, Any]) -> Text:
    failed: Mapping[str, int] = summary.get("failed") or {}
    n_failed = sum(failed.values())
    kinds = ", ".join(f"{count} {status}" for status, count in sorted(failed.items()) if count)
    parts = [
        f"{number(summary.get('ok'), 9)} ok",
        f"{n_failed} failed" + (f" ({kinds})" if kinds else ""),
        f"{number(summary.get('duplicates'), 9)} duplicates",
        f"{number(summary.get('lost'), 9)} lost",
        f"{number(summary.get('not_started'), 9)} not started",
    ]
    words = f"{number(summary.get('requested'), 9)} requested = " + " + ".join(parts)
    rates = [
        f"{number(summary.get('repaired'), 9)} repaired",
        f"error rate {_share(summary.get('error_rate'))}",
        f"resolution rate {_share(summary.get('resolution_rate'))}",
    ]
    return Text(f"{words}\n{', '.join(rates)}")


def _costs(summary: Mapping[str, Any]) -> Text:
    seconds: Mapping[str, float | None] = summary.get("seconds") or {}
    words = ", ".join(
        f"{label} {duration(seconds.get(name))}"
        for name, label in (
            ("total", "took"),
            ("per_generation", "per generation"),
            ("training", "training"),
            ("scoring", "scoring"),
            ("overhead", "overhead"),
        )
    )
    llm: Mapping[str, Any] = summary.get("llm") or {}
    if llm.get("calls"):
        words += (
            f"\nlanguage model: {llm['calls']} calls, {number(llm.get('usd'))} USD, tokens "
            f"{number(llm.get('tokens_in'), 12)} in, {number(llm.get('tokens_out'), 12)} out"
        )
    return Text(words)


def _where_next(summary: Mapping[str, Any], run_id: str) -> list[Text]:
    is_interrupted = summary.get("status") == "interrupted"  # then nobody waited for the page
    files = [] if is_interrupted else ["report.html"]
    files += ["champion/"] if summary.get("champion") else []
    page = "open report.html in a browser"
    if is_interrupted:
        page = f"python -m darwin_exp.report {run_id}"
    lines = [
        f"results     runs/{run_id}/",
        f"            {', '.join([*files, 'summary.json', 'individuals/', 'journal.sqlite'])}",
        f"look        {page}; make ui shows every agent in MLflow",
    ]
    if waiting := (summary.get("people") or {}).get("waiting"):
        lines.append(f"asked       {waiting} waiting for an answer: python -m darwin_exp.hitl list")
    names = [(summary.get(side) or {}).get("individual_id") for side in ("baseline", "champion")]
    if names[1] is not None and names[0] != names[1]:
        lines.append(f"take apart  python -m darwin_exp.ablate {run_id}")
    if summary.get("status") in ("interrupted", "stopped"):
        lines.append(f"go on       python -m darwin_exp resume={run_id}")
    return [Text(line) for line in lines]


# --- words and numbers ----------------------------------------------------------------------------


def clean(text: str) -> str:
    """Return text without line breaks, escape sequences or anything else that is not seen.

    Summaries and messages may come from a language model or from a candidate's output, and what
    a terminal obeys must come from nobody but this program.
    """
    return "".join(" " if is_unseen(c) else c for c in text)


def duration(seconds: float | None) -> str:
    """Return a time in words a person reads at a glance: 12 s, 3 min 05 s, 2 h 10 min."""
    if seconds is None:
        return "-"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def number(value: float | None, digits: int = 4) -> str:
    """Return a number to so many significant digits, or '-' where there is none."""
    if value is None:
        return "-"
    if isinstance(value, int) or abs(value) >= 10**digits:
        return f"{value:,.0f}"
    return f"{value:#.{digits}g}".rstrip(".")


def gain_percent(individual: Individual, base: Individual | None) -> float | None:
    """Return how much lower than the base's its perplexity is, in percent; None if unknown."""
    ours = individual.measured("val_perplexity")
    theirs = base.measured("val_perplexity") if base is not None else None
    change = _change(theirs, ours)
    is_base = base is not None and base.individual_id == individual.individual_id
    return None if change is None or is_base else -change


def _change(before: float | None, after: float | None) -> float | None:
    return None if not before or after is None else 100.0 * (after / before - 1.0)


def _share(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.0f} %"


def outcome_in_words(individual: Individual, base: Individual | None) -> str:
    """Return what was measured of an individual against the base, or why nothing was."""
    if not individual.is_ok:
        return failure_in_words(individual)
    words = f"perplexity {number(individual.measured('val_perplexity'))}"
    gain = gain_percent(individual, base)
    if gain is not None:
        words += f" ({-gain:+.1f} % vs base)"
    mfu = individual.measured("mfu")
    return words if mfu is None else f"{words}  mfu {number(mfu, 3)}"


def failure_in_words(individual: Individual) -> str:
    """Return why an individual failed; not yet cleaned for a terminal."""
    return f"{individual.reason.value}: {individual.message[:200]}".rstrip(": ")
