"""A journal with people's part in it: requests, answers, reviews, effects and two environments.

What they wrote is written by the real inbox, and taken from it as a run takes it. Outcomes are
drawn as in `LongJournal`, in a second environment with a lower loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from darwin_exp.hitl.inbox import FILE_NAME, Author, Inbox, as_json
from darwin_exp.hitl.requests import (
    Decision,
    Request,
    RequestType,
    Standing,
    answer,
    ask,
    content_of,
    edit_content,
    expire,
    fold,
    hash_of,
)
from tests.report.long_journal import LongJournal

MIRA = Author("mira", "web")
OTTO = Author("otto", "terminal")
OPENED_IN = 2  # the generation from which more text is trained on
GAIN = 0.22  # nats that the additional text is worth to everybody
WISH = {"source": "textdir", "path": "/books/sea", "licence": "CC0-1.0", "most_mb": 8}
TEXT_HASH = "ab12cd34ef56" + "0" * 52


class PeopledJournal(LongJournal):
    """Writes the journal of a run that people took part in.

    Args:
        words: what agents and people write beside what is fixed.
        falls: whether one of the living fails when it is measured again.
        is_revoked: whether the text is taken back later on, which opens a third environment.
    """

    def __init__(
        self, *args: Any, words: str = "", falls: bool = True, is_revoked: bool = False, **more: Any
    ) -> None:
        super().__init__(*args, **more)
        self.words, self.falls, self.is_revoked = words, falls, is_revoked
        self.environment = 0
        self.fallen = ""
        self.upto = 0
        self.asked: dict[str, Request] = {}
        self.inbox = Inbox(self.folder / FILE_NAME)

    # --- what people do --------------------------------------------------------------------------

    def take(self, point: str) -> None:
        """Journal what has come in since the last point."""
        entries = self.inbox.entries(after=self.upto)
        self.upto += len(entries)
        told = {"upto": self.upto, "entries": [as_json(entry) for entry in entries]}
        self.append("inbox", point, told)

    def ask(self, name: str, kind: RequestType, content: str, by: str, **more: Any) -> Request:
        """Ask for something, and remember it under a name."""
        reason = f"{name}: it should help, as far as I can tell {self.words}\nand more lines"
        request = Request(self.folder.name, kind, reason, "lower loss", content, by, 1, **more)
        ask(self.inbox, request)
        self.asked[name] = request
        return request

    def decide(self, name: str, decision: Decision, by: Author, content: str | None = None) -> None:
        """Answer a request."""
        request = self.asked[name]
        agreed = hash_of(request.content if content is None else content)
        answer(self.inbox, self._standing(name), decision, by, agreed, content, self.words or "ok")

    def _standing(self, name: str) -> Standing:
        board = fold(self.inbox.entries(), self.folder.name)
        return board.requests[self.asked[name].request_id]

    def review(
        self, individual: str, verdict: str, by: str, waited: float, idle: float, key: str = ""
    ) -> None:
        """Journal a review of a patch, with the request that it was."""
        content = edit_content(individual, "g00-i00", "f" * 64, f"+{self.words}\n")
        name = f"review of {individual} {key}"
        self.ask(name, RequestType.EDIT, content, "harness", patch_of=individual)
        if verdict == "approved":
            self.decide(name, Decision.APPROVE, MIRA)
        elif verdict == "denied":
            self.decide(name, Decision.DENY, MIRA)
        else:
            expire(self.inbox, self.asked[name].request_id)
        told = {
            "individual_id": individual,
            "request_id": self.asked[name].request_id,
            "verdict": verdict,
            "note": f"mira said so {self.words}" if by else "nobody answered in time",
            "by": by,
            "why": "it deletes a file",
        }
        times = {"waited_seconds": waited, "idle_seconds": idle}
        self.append("review", key or f"{individual}/0-0", told, times)

    def effect(self, name: str, is_done: bool, message: str, details: dict[str, Any]) -> None:
        """Journal what an approval came to."""
        request = self.asked[name]
        told = {
            "request_id": request.request_id,
            "type": request.type.value,
            "askers": [request.asked_by],
            "generation": OPENED_IN,
            "outcome": "done" if is_done else "failed",
            "message": f"{message} {self.words}".strip(),
            "details": details,
        }
        self.append("effect", request.request_id, told)

    # --- what the run does -----------------------------------------------------------------------

    def _one(self, generation: int, slot: int, parent: str) -> None:
        if (generation, slot) == (1, 0):
            self._speak()
        if (generation, slot) == (OPENED_IN, 0):
            self._open()
            parent = self._first_living()
        if (generation, slot) == (OPENED_IN + 1, 0) and self.is_revoked:
            self._revoke()
        super()._one(generation, slot, self._first_living() if parent == self.fallen else parent)

    def _speak(self) -> None:
        agent = self.best[1]
        self.take("g01")
        self.ask("books", RequestType.DATASET, content_of(WISH), agent)
        self.ask("einops", RequestType.LIBRARY, "einops==0.8.0\n", agent)
        self.ask("tools", RequestType.SCRIPT, content_of({"path": "t.py", "text": "x=1"}), agent)
        self.ask("longer", RequestType.RESOURCES, content_of({"key": "budget_seconds"}), "g00-i00")
        self.ask("why", RequestType.QUESTION, f"May I look at val? {self.words}", agent)
        self.review("g01-i01", "approved", "mira", 95.0, 31.0)
        self.review("g01-i02", "denied", "mira", 60.0, 22.5)
        self.review("g01-i03", "expired", "", 37.0, 10.5)
        self.decide("books", Decision.CHANGE, MIRA, content_of({**WISH, "most_mb": 4}))
        self.decide("einops", Decision.APPROVE, OTTO)
        self.decide("tools", Decision.APPROVE, MIRA)
        self.decide("longer", Decision.DENY, OTTO)
        for kind, told, who in (
            ("guided", {"to": "all", "text": f"Try the schedule first. {self.words}"}, MIRA),
            ("guided", {"to": agent, "text": "Leave the optimizer alone."}, OTTO),
            ("pinned", {"individual_id": agent, "note": ""}, MIRA),
            ("vetoed", {"individual_id": "g01-i01", "note": "too clever"}, MIRA),
            ("budget", {"key": "max_hours", "value": 8}, OTTO),
            ("stop_after_generation", {"note": "at noon"}, OTTO),
            ("vetoed", {"individual_id": "g00-i00", "note": "by nobody"}, Author("x", "run")),
        ):
            self.inbox.append(kind, told, who)
        self.append("paused", "0", {}, {"seconds": 75.0})

    def _open(self) -> None:
        """Carry out what was approved, and measure everybody again."""
        self.take("g02")
        details = {
            "file": "/data/prepared/extra-ab12/train.bin",
            "content_hash": TEXT_HASH,
            "tokens": 1_234_567,
            "removed_blocks": 3,
            **{key: WISH[key] for key in ("source", "path", "licence")},
        }
        self.effect("books", True, "extra training text of 1,234,567 tokens", details)
        self.effect("einops", False, "a library goes into a new image, and this run has none", {})
        made = {"individual_id": "g02-i00"}
        self.effect("tools", True, "script: made into g02-i00", made)
        file = {"file": details["file"], "content_hash": TEXT_HASH}
        self._environment(OPENED_IN, {"extra_train": [file]}, ["books"])
        self._again(-GAIN)

    def _revoke(self) -> None:
        told = {"request_id": self.asked["books"].request_id, "note": "the licence is wrong"}
        self.inbox.append("revoked", told, OTTO)
        self.take("g03")
        withdrawn = {
            "request_id": self.asked["books"].request_id,
            "type": "dataset",
            "generation": OPENED_IN + 1,
            "message": "revoked: it is in force no longer",
            "carriers": [],
        }
        self.append("withdrawn", self.asked["books"].request_id, withdrawn)
        self._environment(OPENED_IN + 1, {}, ["books"])
        self._again(GAIN)

    def _environment(
        self, generation: int, changed: dict[str, Any], because: Sequence[str]
    ) -> None:
        self.environment += 1
        told = {
            "index": self.environment,
            "generation": generation,
            "environment_id": f"{self.environment}{self.environment}" * 6,
            "changed": changed,
        }
        ids = [self.asked[name].request_id for name in because]
        self.append("environment", str(self.environment), told, {"because": ids})

    def _again(self, shift: float) -> None:
        living = ["g00-i00", *[name for name in self.best[:4] if name != "g00-i00"]]
        for name in living:
            self.loss[name] += shift
            is_base, falls = name == "g00-i00", self.falls and name == living[-1]
            where = f"e{self.environment}/{name}"
            status = ("CRASHED", "exception", "no such file") if falls else ("OK", "none", "")
            purpose = "base_repeat" if is_base else "search"
            keys = ("0", "repeat-1", "repeat-2") if is_base else ("0",)
            for key in keys:
                self._job(
                    name, f"{where}/{key}", purpose, status[0], self.loss[name], self.mfu[name]
                )
            told: dict[str, Any] = {
                "individual_id": name,
                "environment": self.environment,
                "genome_id": self.genome[name].id,
                "status": status[0],
                "reason": status[1],
                "message": f"{status[2]} {self.words}".strip(),
                "metrics": {} if falls else self._scores("val", self.loss[name]),
                "fitness": None if falls else -self.loss[name],
            }
            rates = {} if falls else self._rates(self.mfu[name])
            measured = {**self._times(), "rates": rates, "contended": False}
            self.append("remeasured", where, told, measured)
            if falls:
                self.fallen = name
        self.best = [name for name in living if name != self.fallen]

    def _first_living(self) -> str:
        return min(self.best, key=lambda name: self.loss[name])

    def _close(self) -> None:
        last = f"after-g{self.n_generations:02d}"
        self.review(
            self._first_living(),
            "approved",
            "mira",
            12.0,
            0.0,
            f"champion/{last}/{self._first_living()}",
        )
        self.take(f"closing-{last.removeprefix('after-')}")
        super()._close()

    # --- where it is told ------------------------------------------------------------------------

    def write(self, through: str = "end") -> Any:
        """Write as much as is wanted and return the folder; see `LongJournal.write`."""
        plain = LongJournal.write

        def located(append: Any) -> Any:
            def told(kind: str, key: str, payload: dict[str, Any], measured: Any = None) -> Any:
                if kind in ("job", "individual", "generation") and self.environment:
                    payload = {**payload, "environment": self.environment}
                return append(kind, key, payload, measured or {})

            return told

        self._located = located
        return plain(self, through)

    def _begin(self) -> None:
        self.append = self._located(self.append)
        super()._begin()
