"""A run that people took part in: a long journal, its inbox, and what the run did with both."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from darwin_exp.chronicle import Agent, Chronicle
from darwin_exp.hitl.inbox import FILE_NAME, Author, Inbox, as_json
from darwin_exp.hitl.requests import Decision, Request, RequestType, answer, ask, content_of, fold
from darwin_exp.journal import Journal
from tests.report.long_journal import LongJournal

ANN = Author("ann", "web")
POEMS = content_of(
    {"source": "textdir", "path": "/data/poems", "licence": "CC0 1.0", "most_mb": 40}
)


@dataclass
class Peopled:
    """Writes on in a run's journal and inbox, as the run itself would."""

    folder: Path
    n_taken: int = 0
    taken_at: int = 0
    inbox: Inbox = field(init=False)

    def __post_init__(self) -> None:
        self.inbox = Inbox(self.folder / FILE_NAME)

    @classmethod
    def make(cls, folder: Path, n_individuals: int = 32, n_generations: int = 3) -> Peopled:
        """Make a run of its own."""
        return cls(LongJournal(folder, n_individuals, n_generations, failing=0.1).write("search"))

    def add(
        self,
        kind: str,
        key: str,
        payload: dict[str, Any],
        measured: dict[str, Any] | None = None,
    ) -> None:
        """Write one event."""
        journal = Journal(self.folder)
        try:
            journal.append(kind, key, payload, measured or {})
        finally:
            journal.close()

    def ask(
        self,
        kind: RequestType,
        content: str,
        asked_by: str = "g02-i01",
        reason: str = "the text is short, and training has seen most of it twice",
        patch_of: str | None = None,
    ) -> Request:
        """Ask, as the run does."""
        told = (self.folder.name, kind, reason, "lower perplexity", content, asked_by, 2, patch_of)
        request = Request(*told)
        ask(self.inbox, request)
        return request

    def answer(self, request: Request, decision: Decision, note: str = "") -> None:
        """Answer as a person."""
        standing = fold(self.inbox.entries()).requests[request.request_id]
        answer(self.inbox, standing, decision, ANN, request.content_hash, note=note)

    def approved(self, kind: RequestType, content: str, asked_by: str = "g02-i01") -> Request:
        """Ask for something and approve it."""
        request = self.ask(kind, content, asked_by)
        self.answer(request, Decision.APPROVE)
        return request

    def take(self) -> None:
        """Take what is new in the inbox."""
        entries = self.inbox.entries(after=self.n_taken)
        self.n_taken += len(entries)
        self.taken_at += 1
        told = [as_json(entry) for entry in entries]
        self.add("inbox", f"point-{self.taken_at}", {"upto": self.n_taken, "entries": told})

    def effect(
        self,
        request: Request,
        message: str,
        outcome: str = "done",
        generation: int = 3,
        **details: Any,
    ) -> None:
        """Write what an approval came to."""
        payload = {
            "request_id": request.request_id,
            "type": request.type.value,
            "askers": [request.asked_by],
            "generation": generation,
            "outcome": outcome,
            "message": message,
            "details": details,
        }
        self.add("effect", request.request_id, payload)

    def withdrawn(self, request: Request, *carriers: str) -> None:
        """Write that an effect was taken back."""
        payload = {
            "request_id": request.request_id,
            "type": request.type.value,
            "generation": 4,
            "message": "revoked: it is in force no longer",
            "carriers": list(carriers),
        }
        self.add("withdrawn", request.request_id, payload)

    def review(self, request: Request, verdict: str, note: str = "") -> None:
        """Write how a review ended."""
        payload = {
            "individual_id": request.patch_of,
            "request_id": request.request_id,
            "verdict": verdict,
            "note": note,
            "by": "ann",
            "why": "every rewrite is reviewed",
        }
        measured = {"waited_seconds": 95.0, "idle_seconds": 40.0}
        self.add("review", f"{request.patch_of}/0-0", payload, measured)

    def open_environment(self, because: Request, gain: float = 0.9) -> None:
        """Open a second environment, in which everybody's perplexity is a share of what it was."""
        changed = {"extra_train": [{"file": "extra.bin", "content_hash": "ab" * 32}]}
        payload = {
            "index": 1,
            "generation": 3,
            "environment_id": "fedcba654321",
            "changed": changed,
        }
        self.add("environment", "1", payload, {"because": [because.request_id]})
        agents = Chronicle.read(self.folder).agents
        living = [agents[0], *(agent for agent in agents[1:] if agent.is_ok)][:5]
        for agent in living:
            self._measure_again(agent, gain)

    def _measure_again(self, agent: Agent, gain: float) -> None:
        metrics = {
            name: value * (gain if name == "val_perplexity" else 1.0)
            for name, value in agent.values.items()
            if name not in ("mfu", "mfu_claimed", "tokens_per_second")
        }
        told = {
            "individual_id": agent.individual_id,
            "genome_id": agent.genome_id,
            "environment": 1,
            "status": "OK",
            "reason": "none",
            "message": "",
            "metrics": metrics,
        }
        rates = {"mfu": agent.values["mfu"], "tokens_per_second": 9000.0}
        job = {
            "purpose": "base_repeat" if agent.is_base else "search",
            "trained": "OK",
            "scored": "OK",
            "seed": 1,
            "split": "val",
            "max_steps": None,
            "exit_code": 0,
        }
        key = f"e1/{agent.individual_id}"
        self.add("job", f"{key}/0", {**told, **job}, {"rates": rates})
        fitness = None if agent.fitness is None else agent.fitness + 0.1
        self.add("remeasured", key, {**told, "fitness": fitness}, {"rates": rates})
