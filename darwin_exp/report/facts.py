"""The facts of a report, as its page words them: claims, counts, failures, times, settings.

Reads: a chronicle, its summary and, where there is one, the ablation's summary.
Writes: nothing.
Never: shows the integrity key, or a figure that was not measured.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from darwin_exp import summary as summaries
from darwin_exp.chronicle import Agent, Chronicle
from darwin_exp.protocols import Event
from darwin_exp.report.boundaries import name_of
from darwin_exp.report.effects import Effect, OperatorRecord, effects, operator_records
from darwin_exp.report.exchanges import Exchanges, exchanges
from darwin_exp.report.people import People, people
from darwin_exp.report.phases import Phase, phases_of

LOG_LINES = 24
LOGS_PER_REASON = 12  # of a run with hundreds of failures, some logs of each kind say it all
STATUS_IN_WORDS = {
    "finished": "finished",
    "stopped": "stopped at a cap",
    "interrupted": "interrupted",
    "failed": "ended with an error",
    "running": "going on, or killed: no end was recorded",
}


@dataclass(frozen=True)
class Statement:
    """One claim in words.

    Attributes:
        tone: good, bad or plain; for people who see it, never the only carrier of the meaning.
        figure: the headline number, empty where there is none.
        verdict: what it means.
        detail: interval, p-value and what it rests on.
    """

    about: str
    figure: str
    verdict: str
    detail: str
    tone: str = "plain"


@dataclass(frozen=True)
class FailureGroup:
    """Agents that failed in the same way.

    Attributes:
        agents: those shown in full.
        logs: the end of what each of them printed, by individual id.
        others: the rest.
    """

    status: str
    reason: str
    agents: tuple[Agent, ...]
    logs: Mapping[str, str]
    others: tuple[Agent, ...]

    @property
    def n(self) -> int:
        return len(self.agents) + len(self.others)


@dataclass(frozen=True)
class Facts:
    """Everything that page and pictures show of a run.

    Attributes:
        next_command: begins an evolution from the champion; None unless a closed run has one.
        ablate_command: takes that champion apart.
        n_unclaimed: rewrites that were finished after the last claim, and so have no part in it.
        asked: what language models did; None where none was asked.
        people: what people had to do with it; None where they had nothing.
    """

    chronicle: Chronicle
    summary: Mapping[str, Any]
    status: str
    effects: Mapping[str, Effect]
    operators: Sequence[OperatorRecord]
    statements: Sequence[Statement]
    failures: Sequence[FailureGroup]
    phases: Sequence[Phase]
    survivors: frozenset[str]
    champions_line: Sequence[Agent]
    base_failure: Event | None = None
    ablation: Mapping[str, Any] | None = None
    next_command: str | None = None
    ablate_command: str | None = None
    n_unclaimed: int = 0
    children: Mapping[str, Sequence[Agent]] = field(default_factory=dict)
    asked: Exchanges | None = None
    people: People | None = None

    @property
    def n_slots(self) -> int | None:
        return slots(self.chronicle)

    @property
    def fitness_name(self) -> str:
        return str(self.chronicle.config.get("fitness.name", "perplexity"))


def gather(chronicle: Chronicle, run_folder: Path, status: str | None = None) -> Facts:
    """Fold a chronicle into the facts of its report.

    Args:
        run_folder: where an ablation may have left its summary.
        status: how the run ended, where its journal does not hold that yet.
    """
    status = status or chronicle.status
    summary = summaries.summarise(chronicle.events, n_requested(chronicle), status)
    children: dict[str, list[Agent]] = {}
    for agent in chronicle.rewrites:
        children.setdefault(agent.parent_ids[0] if agent.parent_ids else "", []).append(agent)
    for siblings in children.values():
        siblings.sort(key=lambda agent: (agent.generation, agent.slot))
    kept = (event.payload.get("survivors") or () for event in chronicle.of_kind("generation"))
    changes, line = effects(chronicle), line_of(chronicle, chronicle.selected)
    n_slots = slots(chronicle)
    phases = phases_of(chronicle, n_slots)
    slot_seconds = n_slots * sum(one.wall_seconds for one in phases) if n_slots else None
    return Facts(
        chronicle,
        summary,
        status,
        changes,
        operator_records(chronicle),
        statements(chronicle, summary),
        _failures(chronicle),
        phases,
        frozenset(str(name) for names in kept for name in names),
        line,
        _base_failure(chronicle),
        _ablation(run_folder),
        *_commands(chronicle, run_folder),
        _n_unclaimed(chronicle),
        children,
        exchanges(chronicle, changes, line, summary),
        people(chronicle, slot_seconds),
    )


def _commands(chronicle: Chronicle, run_folder: Path) -> tuple[str | None, str | None]:
    """Return what can be done with a run's champion; nothing where it is the base or not chosen."""
    from darwin_exp.champion import ablate_command, next_command

    selected = chronicle.selected
    if chronicle.closing is None or selected is None:
        return None, None
    if selected.genome_id == chronicle.base_genome.id:
        return None, None
    folder = run_folder / "champion"
    return next_command(chronicle, folder), ablate_command(chronicle, run_folder)


def _n_unclaimed(chronicle: Chronicle) -> int:
    """Count the rewrites after the last claim, of a run that was gone on with once closed."""
    claims = [k for k, event in enumerate(chronicle.events) if event.kind == "claim"]
    if not claims:
        return 0
    return sum(event.kind == "individual" for event in chronicle.events[claims[-1] :])


def n_requested(chronicle: Chronicle) -> int:
    """Return how many rewrites the plan asks for, further generations of a resumed run included."""
    config = chronicle.config
    planned = int(config["n_generations"])
    for session in chronicle.of_kind("session"):
        typed = re.search(r"\bn_generations=(\d+)", str(session.measured.get("command", "")))
        if session.payload.get("what") == "resumed" and typed:
            planned = int(typed[1])
    planned = max([planned, *(agent.generation for agent in chronicle.agents)])
    size = int(config["population_size"])
    return size - 1 + planned * (size - int(config["n_survivors"]))


def line_of(chronicle: Chronicle, agent: Agent | None) -> list[Agent]:
    """Return an agent's ancestors by first parents, the base first and itself last."""
    line: list[Agent] = []
    while agent is not None and agent not in line:
        line.append(agent)
        agent = chronicle.agent(agent.parent_ids[0]) if agent.parent_ids else None
    return line[::-1]


def steps_of(chronicle: Chronicle) -> int:
    """Return how many steps a training took where the last claim was made, of a run by steps."""
    return int(chronicle.claimed_in.changed.get("max_steps") or chronicle.config["max_steps"])


# --- what may be claimed --------------------------------------------------------------------------


def statements(chronicle: Chronicle, summary: Mapping[str, Any]) -> list[Statement]:
    """Return the claims in words, the one that the run was made for first."""
    gain = summary["improvement"]
    steps, by_steps = gain.get("equal_steps"), chronicle.config.get("max_steps") is not None
    if by_steps:  # then both are one claim, and the clock decided nothing
        gain = {**gain, "n_steps": steps_of(chronicle)}
    if chronicle.claimed_in.index:
        within = f"both in {name_of(chronicle, chronicle.claimed_in)}"
        gain, steps = {**gain, "within": within}, steps and {**steps, "within": within}
    words = [
        _perplexity_statement(
            "at equal steps" if by_steps else "at equal time", gain, _last_claim(chronicle, "claim")
        )
    ]
    if steps and not by_steps:
        claim = _last_claim(chronicle, "equal_steps")
        words.append(_perplexity_statement("at equal steps", steps, claim))
    n_timings = len((summary.get("champion") or {}).get("mfus_retimed") or ())
    words.append(_mfu_statement(gain, n_timings))
    if chronicle.config.get("fitness.name") == "mfu":
        words.insert(0, words.pop())
    return words


def _last_claim(chronicle: Chronicle, kind: str) -> Mapping[str, Any]:
    """Return the figures of the last comparison of a kind; empty where there is none."""
    found: Mapping[str, Any] = {}
    for event in chronicle.of_kind(kind):
        found = event.payload.get("claim") or {}
    return found


def _perplexity_statement(at: str, gain: Mapping[str, Any], claim: Mapping[str, Any]) -> Statement:
    about = f"Test perplexity {at}"
    percent, interval, p_value = (gain.get(k) for k in ("perplexity_percent", "ci95", "p_value"))
    if percent is None:
        why = gain.get("why_none") or "it takes two scored trainings of each side at least"
        return Statement(about, "", "No claim", sentence(str(why)))
    rests = [gain["within"]] if gain.get("within") else []
    if interval is not None:
        rests.append(f"95 % interval of the change {_range(interval)}")
    if p_value is not None:
        rests.append("p < 0.0001" if p_value < 0.0001 else f"p = {p_value:.2g}")
    if claim.get("n_base") is not None:
        rests.append(f"{claim['n_base']} + {claim['n_selected']} fresh trainings")
    if gain.get("n_steps") is not None:
        rests.append(f"{gain['n_steps']} steps each")
    if gain.get("earlier_claims"):
        rests.append(
            f"claim {gain['earlier_claims'] + 1} on this test split, so held to p < "
            f"{claim.get('alpha') or 0.05 / 2 ** gain['earlier_claims']:.3g}"
        )
    figure = signed(-percent)
    detail = sentence("; ".join(rests))
    if gain.get("significant") and percent > 0:
        return Statement(about, figure, "Significant progress", detail, "good")
    if gain.get("significant"):
        return Statement(about, figure, "No progress: significantly worse", detail, "bad")
    return Statement(
        about, figure, "No significant progress", f"{detail} Chance alone can explain it."
    )


def _mfu_statement(gain: Mapping[str, Any], n_timings: int) -> Statement:
    about = "Model FLOPs utilisation"
    percent, interval, p_value = (gain.get(k) for k in ("mfu_percent", "mfu_ci95", "mfu_p_value"))
    if percent is None:
        return Statement(about, "", "No claim", "It was not timed again on both sides.")
    if interval is None or p_value is None:
        verdict = "higher than the base's" if percent > 0 else "not higher than the base's"
        detail = "Both timed again by runs of fixed length; one measurement each, so no interval."
        return Statement(about, signed(percent), verdict, detail)
    detail = (
        f"95 % interval of the change {signed(interval[0])} to {signed(interval[1])}; p = "
        f"{p_value:.2g}; both timed again {n_timings} times by turns, by runs of fixed length."
    )
    if p_value >= 0.05:
        return Statement(about, signed(percent), "No significant change", detail)
    good = percent > 0
    verdict = "Significantly higher" if good else "Significantly lower"
    return Statement(about, signed(percent), verdict, detail, "good" if good else "bad")


def _range(interval: Sequence[float]) -> str:
    """Say an interval of an improvement as one of the change, low end first."""
    return f"{signed(-interval[1])} to {signed(-interval[0])}"


def signed(percent: float | None, digits: int = 1) -> str:
    """Return a percentage with its sign; a dash where there is none."""
    if percent is None or not math.isfinite(percent):
        return "–"
    return f"{percent:+.{digits}f} %".replace("-", "−")


def sentence(words: str) -> str:
    """Return words with a capital and a full stop."""
    words = words.strip()
    return words[:1].upper() + words[1:] + ("" if words.endswith((".", "!", "?")) else ".")


# --- failures, slots, settings --------------------------------------------------------------------


def _failures(chronicle: Chronicle) -> list[FailureGroup]:
    """Group the failed by status and reason, the most frequent first."""
    logs: dict[str, str] = {}
    for event in chronicle.of_kind("job"):
        if event.payload["purpose"] in ("search", "base_repeat"):
            printed = str(event.measured.get("log_tail") or "")
            logs[event.payload["individual_id"]] = printed.replace("\r\n", "\n").replace("\r", "\n")
    groups: dict[tuple[str, str], list[Agent]] = {}
    for agent in chronicle.agents:
        if not agent.is_ok:
            groups.setdefault((agent.status.value, agent.reason), []).append(agent)
    found = []
    for (status, reason), agents in groups.items():
        shown, others = agents[:LOGS_PER_REASON], agents[LOGS_PER_REASON:]
        tails = {
            agent.individual_id: "\n".join(
                logs.get(agent.individual_id, "").rstrip().split("\n")[-LOG_LINES:]
            )[-4000:]
            for agent in shown
            if agent.attempts
        }
        found.append(FailureGroup(status, reason, tuple(shown), tails, tuple(others)))
    return sorted(found, key=lambda group: (-group.n, group.status, group.reason))


def _base_failure(chronicle: Chronicle) -> Event | None:
    """Return the training after which the base was given up; None if it is there, or under way."""
    jobs = [event for event in chronicle.of_kind("job") if event.payload["status"] != "OK"]
    return jobs[-1] if jobs and chronicle.base is None else None


def slots(chronicle: Chronicle) -> int | None:
    """Return how many candidates may train at once; None where an old journal does not say."""
    found = chronicle.begun.measured.get("n_slots") or chronicle.config.get("workers")
    return None if found is None else int(found)


def settings(chronicle: Chronicle) -> Iterator[tuple[str, str]]:
    """Yield every configuration key with its value as text; the integrity key stays hidden."""
    for key, value in sorted(chronicle.config.items()):
        if key == "integrity.key" and value is not None:
            yield key, "(set; not shown here)"
        else:
            yield key, value if isinstance(value, str) else json.dumps(value)


def _ablation(run_folder: Path) -> Mapping[str, Any] | None:
    """Return what an ablation of the champion found; None where there is none that can be read."""
    try:
        found = json.loads((run_folder / "ablation" / "summary.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and isinstance(found.get("parts"), list) else None
