"""The pages: what the inbox and the running evolution look like in a browser.

Reads: the desk, the live view, templates/ beside this module, individuals/*/memory.json.
Writes: text.
Never: lets text of an agent, a model or a candidate through unescaped, or with characters that
cannot be seen; shows the integrity key.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from markupsafe import Markup

from darwin_exp.hitl.audit import lost
from darwin_exp.hitl.concerns import Surroundings, concern_about
from darwin_exp.hitl.inbox import Author, Entry, canonical
from darwin_exp.hitl.outcomes import in_words
from darwin_exp.hitl.requests import BUDGETS, Standing
from darwin_exp.hitl.web import portrait, shown
from darwin_exp.hitl.web.desk import Desk, Desktop
from darwin_exp.hitl.web.live import Live, View, is_worked_at
from darwin_exp.hitl.wishes import FORMS
from darwin_exp.report import charts, lineage
from darwin_exp.report.effects import MFU, PERPLEXITY, log_ratio, percent_of
from darwin_exp.report.facts import STATUS_IN_WORDS, Facts, signed, slots
from darwin_exp.report.people import people
from darwin_exp.unseen import visible
from darwin_exp.wording import number

HERE = Path(__file__).parent
PAGES = (
    ("/", "Inbox"),
    ("/run", "Run"),
    ("/lineage", "Lineage"),
    ("/agents", "Agents"),
    ("/guidance", "Guidance"),
    ("/audit", "Audit"),
)
STEERING = frozenset(
    {"guided", "pinned", "vetoed", "paused", "resumed", "stop_after_generation", "budget"}
)
AGENTS_PER_PAGE = 100
ENTRIES_PER_PAGE = 100
LATEST = 20
MOST_SETTLED = 30
SMALL_TREE = 60  # agents; of a larger one those who matter are shown first
LARGEST_PAYLOAD = 2_000  # characters of one, on the audit page


class Pages:
    """Makes pages of a run.

    Args:
        run_folder: the run's folder.
        author: whom the page writes as.
        seal: makes a form's seal from its path and its content's hash.
    """

    def __init__(self, run_folder: Path, author: Author, seal: Callable[[str, str], str]) -> None:
        from jinja2 import Environment, FileSystemLoader, StrictUndefined

        self.run_folder = run_folder
        self.live = Live(
            run_folder,
            {
                "run": self._run,
                "lineage": lambda view: _tree(view, whole=False),
                "lineage-whole": lambda view: _tree(view, whole=True),
            },
        )
        self.desk = Desk(run_folder)
        self._templates = Environment(
            loader=FileSystemLoader(HERE / "templates"),
            autoescape=True,
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
            finalize=_finalised,
            auto_reload=False,
        )
        self._templates.globals.update(
            run_id=run_folder.name,
            author=author.name,
            pages=PAGES,
            seal_for=lambda path, content_hash="": seal(path, content_hash),
            number=number,
            signed=signed,
            signed_z=portrait.signed_z,
            clock=_clock,
            iso=_iso,
        )

    # --- whole pages -----------------------------------------------------------------------------

    def inbox(self) -> str:
        """Return the page of what waits."""
        live = self.part("inbox")
        return self._page("inbox.html", "Inbox", "/", live=Markup(live), seen=digest(live))

    def run(self) -> str:
        """Return the page of the running evolution."""
        live = self.part("run")
        return self._page("run.html", "Run", "/run", live=Markup(live), seen=digest(live))

    def lineage(self, whole: bool) -> str:
        """Return the page of who came of whom, of everybody or of those who matter."""
        live = self.part("lineage-whole" if whole else "lineage")
        facts = self.live.view().facts
        return self._page(
            "lineage.html",
            "Lineage",
            "/lineage",
            live=Markup(live),
            seen=digest(live),
            is_whole=whole,
            is_folded=facts is not None and len(facts.chronicle.agents) > SMALL_TREE,
        )

    def agents(self, words: str, status: str, page: int) -> str:
        """Return a page of the table of agents, the latest first."""
        facts = self.live.view().facts
        everyone = facts.chronicle.agents[::-1] if facts else ()
        wanted = words.lower().split()
        found = [
            agent
            for agent in everyone
            if status in ("", agent.status.value)
            and all(word in portrait.told_of(agent) for word in wanted)
        ]
        n_pages = max(1, -(-len(found) // AGENTS_PER_PAGE))
        page = min(max(1, page), n_pages)
        return self._page(
            "agents.html",
            "Agents",
            "/agents",
            shown=found[(page - 1) * AGENTS_PER_PAGE : page * AGENTS_PER_PAGE],
            effects=facts.effects if facts else {},
            statuses=sorted({agent.status.value for agent in everyone}),
            words=words,
            status=status,
            n_found=len(found),
            n_all=len(everyone),
            n_environments=len(facts.chronicle.environments) if facts else 1,
            page=page,
            n_pages=n_pages,
            turned=lambda k: "/agents?" + urlencode({"words": words, "status": status, "page": k}),
        )

    def agent(self, name: str) -> str | None:
        """Return the page of one agent; None where there is no such agent, or not yet."""
        view = self.live.view()
        facts = view.facts
        one = facts.chronicle.agent(name) if facts else None
        if facts is None or one is None:
            return None
        board = self.desk.read().board
        changed, against, why = portrait.change_of(facts, one)
        return self._page(
            "agent.html",
            f"Agent {name}",
            "/agents",
            one=one,
            n_environments=len(facts.chronicle.environments),
            children=facts.children.get(name, ()),
            model=portrait.model_of(facts, name),
            is_pinned=name in board.pins,
            is_vetoed=name in board.vetoes,
            scores=portrait.scores(facts, one),
            patches=changed,
            against=against,
            why_no_patch=why,
            asked=[
                shown.Row.of(standing, view.outcomes)
                for standing in board.requests.values()
                if name in standing.askers
            ],
            lessons=portrait.lessons(self.run_folder / "individuals" / name / "memory.json"),
            log=portrait.log_of(facts, name),
        )

    def request(self, standing: Standing) -> str:
        """Return the page of one request, with forms for the answers that would still count."""
        view, request, granted = self.live.view(), standing.request, standing.granted_content
        row, facts = shown.Row.of(standing, view.outcomes), view.facts
        is_other = granted is not None and granted != request.content
        return self._page(
            "request.html",
            f"{row.kind_in_words}: {row.headline}",
            "/",
            one=row,
            worry=concern_about(standing, view.outcomes, lambda: self.surroundings(standing)),
            content=shown.parts(request.type, request.content[: shown.LARGEST_SHOWN]),
            content_as_text=request.content,
            is_spelt_out=visible(request.content) != request.content,
            form=FORMS.get(request.type, ""),
            is_shown_whole=len(request.content) <= shown.LARGEST_SHOWN,
            granted=shown.parts(request.type, granted) if is_other and granted else (),
            entries=shown.told(standing.history),
            has_ended=bool(facts and request.patch_of and facts.chronicle.agent(request.patch_of)),
        )

    def surroundings(self, standing: Standing) -> Surroundings:
        """Return what a request is judged against, as far as the run has recorded it."""
        facts = self.live.view().facts
        return Surroundings.of(facts.chronicle if facts else None, standing.askers)

    def guidance(self) -> str:
        """Return the page of what people tell agents and the run."""
        desktop = self.desk.read()
        board = desktop.board
        return self._page(
            "guidance.html",
            "Guidance",
            "/guidance",
            is_paused=board.is_paused,
            is_stopping=bool(board.stops),
            pins=tuple(board.pins),
            vetoes=tuple(board.vetoes),
            budgets=[in_words(*cap) for cap in sorted(board.budgets.items())],
            budget_keys=sorted(BUDGETS),
            entries=shown.told(e for e in desktop.entries[::-1] if e.kind in STEERING),
        )

    def audit(self, page: int) -> str:
        """Return a page of all entries, after verifying the whole chain once more."""
        view = self.live.view()  # first, so that it cannot tell of entries that are newer
        desktop = self.desk.read(anew=True)
        entries = desktop.entries[::-1]
        events = view.facts.chronicle.events if view.facts and not desktop.damage else ()
        n_pages = max(1, -(-len(entries) // ENTRIES_PER_PAGE))
        page = min(max(1, page), n_pages)
        return self._page(
            "audit.html",
            "Audit",
            "/audit",
            damage=desktop.damage,
            n_entries=len(entries),
            lost=lost(entries, events),
            last_hash=entries[0].hash if entries else "",
            journal_problem=view.problem,
            journal_hash=view.last_hash if view.n_events else "",
            n_events=view.n_events,
            refused=[f"Entry {one.entry.sequence}: {one.why}" for one in desktop.board.refused],
            shown=entries[(page - 1) * ENTRIES_PER_PAGE : page * ENTRIES_PER_PAGE],
            payload=_payload,
            page=page,
            n_pages=n_pages,
        )

    def message(self, heading: str, words: str) -> str:
        """Return a page that only says something."""
        return self._page("message.html", heading, "", words=words)

    def entered(self) -> str:
        """Return what the link shows: the way to the inbox."""
        return self._templates.get_template("entered.html").render()

    # --- parts that are refreshed ----------------------------------------------------------------

    def part(self, name: str) -> str:
        """Return the markup of a part that pages fetch again.

        Raises:
            KeyError: there is none of that name.
        """
        if name == "inbox":
            return self._inbox()
        if name == "state":
            return self._state()
        return self.live.made(name, self.live.view())

    def n_waiting(self) -> int:
        """Return how many requests wait."""
        return len(self.desk.read().board.waiting)

    def _inbox(self) -> str:
        board, outcomes = self.desk.read().board, self.live.view().outcomes
        settled = sorted(
            (one for one in board.requests.values() if not one.waits),
            key=lambda one: -one.history[-1].sequence,
        )
        return self._templates.get_template("inbox_live.html").render(
            waiting=[shown.Row.of(one, outcomes) for one in board.waiting],
            settled=[shown.Row.of(one, outcomes) for one in settled[:MOST_SETTLED]],
            n_more=max(0, len(settled) - MOST_SETTLED),
        )

    def _state(self) -> str:
        view, board = self.live.view(), self.desk.read().board
        words = "not begun"
        if view.facts is not None:
            words = STATUS_IN_WORDS.get(view.facts.status, view.facts.status)
            is_alive = is_worked_at(self.run_folder)
            if view.facts.status == "running" and is_alive is not None:
                words = "going on" if is_alive else "no process works at it"
        agents = view.facts.chronicle.agents if view.facts else ()
        n_ok = sum(agent.is_ok for agent in agents)
        told = [Markup('<span class="pill">{}</span>').format(words)]
        if board.is_paused:
            told.append(Markup('<span class="pill waiting">paused by a person</span>'))
        elif board.stops:
            told.append(Markup('<span class="pill">asked to stop after a generation</span>'))
        told.append(Markup("{} agents finished, {} of them OK").format(len(agents), n_ok))
        return Markup(" ").join(told)

    def _run(self, view: View) -> str:
        facts = view.facts
        told: dict[str, Any] = {"facts": facts, "n_events": view.n_events}
        if facts is not None:
            told |= _progress(facts, view)
        return self._templates.get_template("run_live.html").render(**told)

    def _page(self, template: str, heading: str, here: str, **told: Any) -> str:
        desktop = self.desk.read()
        state = self.part("state")
        return self._templates.get_template(template).render(
            heading=heading,
            here=here,
            state=Markup(state),
            state_seen=digest(state),
            n_waiting=len(desktop.board.waiting),
            problem=_problem(desktop, self.live.view()),
            **told,
        )


def digest(part: str) -> str:
    """Return what tells two states of a part apart."""
    return hashlib.sha256(part.encode("utf-8", "replace")).hexdigest()[:16]


def _problem(desktop: Desktop, view: View) -> str:
    if desktop.damage:
        return f"The inbox cannot be trusted, so nothing can be approved: {desktop.damage}"
    return f"The journal cannot be trusted: {view.problem}" if view.problem else ""


# --- the run --------------------------------------------------------------------------------------


def _progress(facts: Facts, view: View) -> dict[str, Any]:
    chronicle = facts.chronicle
    best, base = chronicle.selected, chronicle.base
    change = None
    if best is not None and base is not None and best is not base:
        change = percent_of(log_ratio(best.value(PERPLEXITY), base.value(PERPLEXITY)))
    failed = Counter(agent.status.value for agent in chronicle.rewrites if not agent.is_ok)
    begun = [agent.generation for agent in chronicle.agents]
    generation = max([*begun, *(life.generation for life in view.under_way)], default=0)
    has_mfu = any(agent.value(MFU) is not None for agent in chronicle.agents)
    told = people(chronicle) if len(chronicle.environments) > 1 else None
    drawn = {
        "perplexity": charts.by_generation(facts, PERPLEXITY),
        "best_so_far": charts.best_so_far(facts),
        "mfu": charts.by_generation(facts, MFU) if has_mfu else None,
    }
    return {
        "best": best,
        "base": base,
        "environments": told.environments if told else (),
        "best_change": change,
        "mfu": best.value(MFU) if best else None,
        "n_finished": len(chronicle.rewrites),
        "n_requested": facts.summary["requested"],
        "n_ok": sum(agent.is_ok for agent in chronicle.rewrites),
        "failed": sorted(failed.items()),
        "generation": generation,
        "n_generations": max(generation, int(chronicle.config["n_generations"])),
        "n_slots": slots(chronicle),
        "under_way": view.under_way,
        "charts": {name: _linked(chart) for name, chart in drawn.items()},
        "latest": chronicle.agents[-LATEST:][::-1],
        "effect": lambda agent: lineage.effect_in_words(facts, agent) or "–",
    }


def _tree(view: View, whole: bool) -> str:
    if view.facts is None:
        return "<p>Nobody lives yet.</p>"
    some = not whole and len(view.facts.chronicle.agents) > SMALL_TREE
    drawn = lineage.tree(view.facts, lineage.backbone(view.facts) if some else None)
    frame = Markup(
        '<div class="tree" tabindex="0" role="region" aria-label="Lineage tree">{}</div>'
    )
    return frame.format(_linked(drawn))


def _linked(chart: Markup | None) -> Markup | None:
    """Let a chart's marks lead to agents' pages, and not to rows of a report."""
    # Quotes in text are escaped, so that this can stand in an attribute only.
    return None if chart is None else Markup(str(chart).replace('href="#', 'href="/agents/'))


# --- words ----------------------------------------------------------------------------------------


def _payload(entry: Entry) -> str:
    text = canonical(entry.payload)
    if len(text) <= LARGEST_PAYLOAD:
        return text
    return f"{text[:LARGEST_PAYLOAD]}… ({len(text):,} characters in all)"


def _clock(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S")


def _iso(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _finalised(value: Any) -> Any:
    """Return what a template shows of a value: nothing for None, and no invisible characters."""
    if value is None:
        return ""
    return visible(value) if type(value) is str else value
