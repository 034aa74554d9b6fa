"""The lineage tree: who came of whom, by which edits, to what effect.

Reads: facts. Writes: markup.

Every agent has a row of its own, in depth-first order, and stands as far right as its generation
is late. What lies between two rows of one family belongs to that family, so neither lines nor
words ever cross, however large the tree is; a long one is scrolled, not squeezed.
"""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass

from markupsafe import Markup

from darwin_exp.chronicle import Agent
from darwin_exp.report.charts import GLYPHS, linked
from darwin_exp.report.effects import at_birth
from darwin_exp.report.facts import Facts, signed
from darwin_exp.report.svg import picture, tag

ROW = 19
WORDS = 470  # pixels that the words beside the last column may take


@dataclass(frozen=True)
class Row:
    """An agent's place in the tree."""

    agent: Agent
    row: int
    parent_row: int | None
    n_hidden: int  # children that are not drawn


def backbone(facts: Facts) -> set[str]:
    """Return who matters for the story: those with offspring, survivors, the selected one."""
    kept = {agent.individual_id for agent in facts.champions_line} | facts.survivors
    kept |= {name for name, children in facts.children.items() if children}
    if facts.chronicle.selected is not None:
        kept.add(facts.chronicle.selected.individual_id)
    return set(kept)


def rows(facts: Facts, shown: Set[str] | None = None) -> list[Row]:
    """Place the agents, or those of `shown`, in depth-first order.

    Nobody is left out for want of a parent: such an agent starts a tree of its own.
    """
    everyone = facts.chronicle.agents
    known = {agent.individual_id for agent in everyone}
    roots = [a for a in everyone if not a.parent_ids or a.parent_ids[0] not in known]
    placed: list[Row] = []
    waiting: list[tuple[Agent, int | None]] = [(agent, None) for agent in reversed(roots)]
    while waiting:
        agent, parent_row = waiting.pop()
        children = facts.children.get(agent.individual_id, ())
        drawn = [c for c in children if shown is None or c.individual_id in shown]
        row = len(placed)
        placed.append(Row(agent, row, parent_row, len(children) - len(drawn)))
        waiting += [(child, row) for child in reversed(drawn)]
    return placed


def tree(facts: Facts, shown: Set[str] | None = None) -> Markup:
    """Draw the tree, of everybody or of those in `shown`."""
    placed = rows(facts, shown)
    last = max((place.agent.generation for place in placed), default=0)
    column = max(14.0, min(84.0, 620 / (last + 1)))
    line = {agent.individual_id for agent in facts.champions_line}

    def x_of(agent: Agent) -> float:
        return 14 + (0 if agent.is_base else column * (agent.generation + 1))

    def y_of(row: int) -> float:
        return 40 + ROW * row

    marks = [
        tag("text", str(g), class_="tick", x=14 + column * (g + 1), y=16, text_anchor="middle")
        for g in range(0, last + 1, max(1, round(28 / column)))
    ]
    marks.append(tag("text", "generation", class_="tick", x=14 + column * (last + 1) + 16, y=16))
    # The champion's line is drawn last, on top of the others.
    for emphasised in (False, True):
        for place in placed:
            if place.parent_row is not None and emphasised is (place.agent.individual_id in line):
                parent = placed[place.parent_row]
                path = (
                    f"M{x_of(parent.agent):.1f} {y_of(parent.row)}"
                    f"V{y_of(place.row)}H{x_of(place.agent):.1f}"
                )
                kind = f"edge {direction_of(facts, place.agent)}"
                marks.append(tag("path", class_=kind + (" line" if emphasised else ""), d=path))
    marks += [_node(facts, one, x_of(one.agent), y_of(one.row), line) for one in placed]
    width = round(14 + column * (last + 1) + WORDS)
    n_ok = sum(place.agent.is_ok for place in placed)
    summary = (
        f"{len(placed)} agents drawn, {n_ok} of them OK; {len(line)} on the selected one's line"
    )
    return picture("Lineage", summary, marks, width, round(y_of(len(placed)) + 6), True)


def direction_of(facts: Facts, agent: Agent) -> str:
    """Return whether an agent's edits made it better, worse, or failed, or whether that is open."""
    if not agent.is_ok:
        return "failed"
    pair = at_birth(facts.chronicle, agent)
    child, parent = (None, None) if pair is None else (one.fitness for one in pair)
    if child is None or parent is None:
        return "open"
    return "better" if child > parent else "worse"


def effect_in_words(facts: Facts, agent: Agent) -> str:
    """Return an agent's effect against its parent: change of perplexity, and z where known."""
    effect = facts.effects.get(agent.individual_id)
    if effect is None or effect.perplexity_percent is None:
        return ""
    words = signed(effect.perplexity_percent)
    if effect.z is not None:
        words += f", z {effect.z:+.1f}".replace("-", "−")
    return words


def _node(facts: Facts, place: Row, x: float, y: float, line: Set[str]) -> Markup:
    agent = place.agent
    emphasised = " line" if agent.individual_id in line else ""
    if not agent.is_ok:
        glyph = GLYPHS[agent.status.value]
        mark = tag("text", glyph, class_="rug", x=x, y=y + 5, text_anchor="middle")
    elif agent.is_base:
        mark = tag("rect", class_="point base-point", x=x - 5, y=y - 5, width=10, height=10)
    else:
        kept = " kept" if agent.individual_id in facts.survivors else ""
        mark = tag("circle", class_=f"point{kept}{emphasised}", cx=x, cy=y, r=5)
    edits = " + ".join(edit.operator for edit in agent.new_edits)
    words = [agent.individual_id, "the base" if agent.is_base else edits or agent.summary]
    words.append(effect_in_words(facts, agent) if agent.is_ok else agent.status.value)
    if len(agent.parent_ids) > 1:
        words.append(f"crossed with {agent.parent_ids[1]}")
    if place.n_hidden:
        words.append(f"(+{place.n_hidden} without offspring)")
    told = "  ".join(word for word in words if word)
    shown = told if len(told) <= 84 else f"{told[:83]}…"
    direction = direction_of(facts, agent)
    text = tag("text", shown, class_=f"who {direction}{emphasised}", x=x + 10, y=y + 4)
    return linked(agent, mark, text)
