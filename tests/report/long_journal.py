"""A journal of as many individuals as wanted, written by the real Journal: no training behind it.

Events have the kinds, keys, payloads and sizes of real ones; outcomes are drawn, plausibly: some
edits help, some fail, and every generation works on the survivors of the last.
"""

from __future__ import annotations

import math
from pathlib import Path
from random import Random
from typing import Any

from darwin_exp.genome import Genome
from darwin_exp.journal import Journal

ROOT = Path(__file__).parents[2]
EDITS = {  # what each does to the loss in nats, and to the share of peak
    "peak_rate": (-0.05, 0.0),
    "rotary": (-0.14, -0.04),
    "rms_norm": (-0.004, 0.02),
    "squared_relu": (-0.03, 0.01),
    "wider": (0.04, 0.07),
    "deeper": (0.05, 0.02),
    "weight_decay": (0.0, 0.0),
    "qk_norm": (-0.06, -0.03),
    "bfloat16": (0.03, 0.12),
    "muon": (-0.11, -0.08),
    "batch_size": (0.02, 0.03),
    "warmup": (-0.01, 0.0),
}
FAILURES = (
    ("CRASHED", "exception", "RuntimeError: mat1 and mat2 shapes cannot be multiplied"),
    ("TIMED_OUT", "no_checkpoint", "no complete checkpoint when the budget ended"),
    ("OUT_OF_MEMORY", "memory", "went past 4096 MB"),
    ("INVALID", "contract", "model.py defines no build_model"),
    ("DUPLICATE", "seen_before", "the same code as g00-i01"),
    ("REJECTED", "causality", "losses differ where only the future does"),
    ("INFRA_LOST", "contention", "its threads waited for a CPU that other processes held"),
)


class LongJournal:
    """Writes a run's events into a folder.

    Args:
        n_individuals: rewrites, spread evenly over the generations.
        failing: the share of rewrites that fail.
        hostile: text to stand in every place that a candidate or a model can write to.
        with_mfu: whether rates were measured.
        mutator: "operators", or "none" for a control without edits.
    """

    def __init__(
        self,
        folder: Path,
        n_individuals: int = 1000,
        n_generations: int = 49,
        failing: float = 0.2,
        hostile: str = "",
        with_mfu: bool = True,
        mutator: str = "operators",
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.rng = folder, Random(0)
        self.failing, self.hostile, self.with_mfu = failing, hostile, with_mfu
        self.mutator, self.n_generations = mutator, n_generations
        self.size = max(2, round(n_individuals / (n_generations + 1)))
        self.n_individuals = n_individuals
        self.base = Genome.from_folder(ROOT / "trainer_base").with_files({"settings.json": "{}\n"})
        self.loss: dict[str, float] = {}
        self.mfu: dict[str, float] = {}
        self.edits: dict[str, list[dict[str, Any]]] = {"g00-i00": []}
        self.genome: dict[str, Genome] = {"g00-i00": self.base}
        self.best: list[str] = ["g00-i00"]

    def write(self, through: str = "end") -> Path:
        """Write as much as is wanted and return the folder.

        Args:
            through: "begun", "base failed", "search", "claim" or "end".
        """
        journal = Journal(self.folder)
        journal._database.execute("PRAGMA synchronous=OFF")  # nothing here is worth a disk's wait
        self.append = journal.append
        try:
            self._begin()
            if through == "base failed":
                self._job("g00-i00", "g00-i00/0", "base_repeat", "CRASHED", 0, 0, "exception", "no")
            elif through != "begun":
                self._search()
            if through in ("claim", "end"):
                self._close()
            if through == "end":
                self.append("end", "0", {"status": "finished", "exit_code": 0}, {"seconds": 9.0})
        finally:
            journal.close()
        return self.folder

    def _begin(self) -> None:
        command = "python -m darwin_exp +experiment=baseline"
        self.append("session", "0", {"what": "started"}, {"command": command, "pid": 1})
        config = {
            "population_size": self.size + 1,
            "n_survivors": 1,
            "n_generations": self.n_generations,
            "fitness.name": "perplexity",
            "mutator.name": self.mutator,
            "integrity.key": None,
            "workers": 2,
            "dataset.name": "shakespeare",
        }
        payload = {
            "base_genome_id": self.base.id,
            "config": config,
            "environment": {"torch": "2.13.0", "budget_seconds": 12.0},
            "environment_id": "abcdef123456",
            "files": self.base.as_dict,
            "integrity_key": "5e" * 32,
        }
        measured = {
            "run_id": self.folder.name,
            "command": command,
            "host": "a-host",
            "peak_flops": 1e11,
            "n_slots": 2,
            "sweep_id": None,
        }
        self.append("run", "run", payload, measured)

    def _search(self) -> None:
        self._job("g00-i00", "g00-i00/0", "base_repeat", "OK", 2.5, 0.3)
        self._individual("g00-i00", 0, 0, None, "the base", "OK", 2.5, 0.3)
        self._generation(0, ["g00-i00"])
        for repeat in range(1, 4):
            self._job("g00-i00", f"g00-i00/repeat-{repeat}", "base_repeat", "OK", 2.5, 0.3)
        written = 0
        for generation in range(self.n_generations + 1):
            survivors = self.best[:3]
            for slot in range(self.size):
                if written == self.n_individuals:
                    return
                self._one(generation, slot + (generation == 0), self.rng.choice(survivors))
                written += 1
            self.best.sort(key=lambda name: self.loss[name])
            if generation:
                self._generation(generation, survivors)

    def _one(self, generation: int, slot: int, parent: str) -> None:
        rng, name = self.rng, f"g{generation:02d}-i{slot:02d}"
        new = [] if self.mutator == "none" else rng.sample(sorted(EDITS), rng.choice((1, 1, 2)))
        self.edits[name] = [
            *self.edits[parent],
            *(
                {
                    "operator": operator + self.hostile,
                    "file": "train.py" + self.hostile,
                    "why": f"so that it learns more from a short budget {self.hostile}",
                    "parameters": {"factor": round(rng.uniform(0.5, 2), 3)},
                }
                for operator in new
            ),
        ]
        text = self.base.as_dict["train.py"] + f"\n# edited for {name}: {self.hostile}\n"
        changed = {"train.py": text}
        if self.hostile:
            changed |= {"notes.txt": self.hostile, "odd<b>.py": f"x = '{self.hostile}'\n"}
        self.genome[name] = self.genome[parent].with_files(changed)
        summary = ("; ".join(new) or "no edit (control)") + self.hostile
        made = {
            "individual_id": name,
            "parent_id": parent,
            "parent_genome": self.genome[parent].id,
            "editor_id": self.best[0],
            "mate_id": None,
            "genome_id": self.genome[name].id,
            "fingerprint": "0" * 64,
            "changed": changed,
            "removed": [],
            "edits": self.edits[name],
            "n_new": len(new),
            "summary": summary,
            "expected_effect": "lower loss",
        }
        self.append("proposal", f"{name}/0", made)
        status, reason, message = "OK", "none", ""
        if rng.random() < self.failing:
            status, reason, message = rng.choice(FAILURES)
            message += self.hostile
        depth = 0.93 ** len(self.edits[name])
        loss = self.loss[parent] + depth * 0.3 * sum(EDITS[one][0] for one in new)
        mfu = min(0.6, self.mfu[parent] * (1 + 0.3 * sum(EDITS[one][1] for one in new)))
        loss, mfu = loss + rng.gauss(0, 0.02), mfu * math.exp(rng.gauss(0, 0.03))
        self._job(name, f"{name}/0", "search", status, loss, mfu, reason, message)
        self._individual(
            name, generation, slot, parent, summary, status, loss, mfu, reason, message, len(new)
        )

    def _scores(self, split: str, loss: float) -> dict[str, float]:
        return {
            f"{split}_perplexity": math.exp(loss),
            f"{split}_bpb": loss / math.log(2),
            f"{split}_nats": loss,
            "n_parameters": 806016.0,
        }

    def _rates(self, mfu: float) -> dict[str, float]:
        if not self.with_mfu:
            return {"tokens_per_second": 25000 * mfu}
        return {"mfu": mfu, "mfu_claimed": mfu, "tokens_per_second": 25000 * mfu}

    def _times(self) -> dict[str, float]:
        return {
            "startup_seconds": 0.15,
            "training_seconds": 11.8,
            "scoring_seconds": 6.1,
            "overhead_seconds": 0.2,
            "total_seconds": 18.25,
        }

    def _job(
        self,
        name: str,
        key: str,
        purpose: str,
        status: str,
        loss: float,
        mfu: float,
        reason: str = "none",
        message: str = "",
        split: str = "val",
    ) -> None:
        is_ok = status == "OK"
        loss += self.rng.gauss(0, 0.01)
        log = "".join(f"step {k:6d}  loss {9 / (k + 1):.4f}  {k / 15:.1f} s\n" for k in range(40))
        payload = {
            "exit_code": 0 if is_ok else 1,
            "genome_id": self.genome[name].id,
            "individual_id": name,
            "max_steps": None,
            "message": message,
            "metrics": self._scores(split, loss) if is_ok else {},
            "purpose": purpose,
            "reason": reason,
            "trained": status,
            "scored": "OK" if is_ok else None,
            "seed": 1,
            "split": split,
            "status": status,
        }
        measured = {
            **self._times(),
            "rates": self._rates(mfu) if is_ok else {},
            "details": {"windows": 1638, "speed": {"flops_per_token": 5173248.0}},
            "log_tail": log + self.hostile,
            "log_truncated": False,
            "contended": False,
            "steps_claimed": 178,
        }
        self.append("job", key, payload, measured)

    def _individual(
        self,
        name: str,
        generation: int,
        slot: int,
        parent: str | None,
        summary: str,
        status: str,
        loss: float,
        mfu: float,
        reason: str = "none",
        message: str = "",
        n_new: int = 0,
    ) -> None:
        is_ok = status == "OK"
        self.loss[name], self.mfu[name] = loss, mfu
        if is_ok and parent is not None:
            self.best.append(name)
        payload = {
            "individual_id": name,
            "generation": generation,
            "slot": slot,
            "parent_ids": [parent] if parent else [],
            "editor_id": self.best[0] if parent else None,
            "edits": self.edits[name],
            "n_new_edits": n_new,
            "summary": summary,
            "expected_effect": "lower loss" if parent else "",
            "status": status,
            "reason": reason,
            "message": message,
            "metrics": self._scores("val", loss) if is_ok else {},
            "fitness": -loss if is_ok else None,
            "genome_id": self.genome[name].id,
            "attempts": 1,
            "repaired": False,
        }
        measured = {
            **self._times(),
            "rates": self._rates(mfu) if is_ok else {},
            "contended": False,
        }
        self.append("individual", name, payload, measured)

    def _generation(self, generation: int, survivors: list[str]) -> None:
        best = min(self.best, key=lambda name: self.loss[name])
        figures = self._scores("val", self.loss[best])
        payload = {
            "generation": generation,
            "population": self.best[: self.size],
            "survivors": survivors,
            "best_id": best,
            "best": {**figures, "fitness": -self.loss[best]},
            "mean": figures,
            "noise_sd": 0.02 if generation else None,
        }
        rates = self._rates(self.mfu[best])
        measured = {"best": rates, "mean": rates, "seconds": 1.0}
        self.append("generation", str(generation), payload, measured)

    def _close(self) -> None:
        best = min(self.best, key=lambda name: self.loss[name])
        for name in dict.fromkeys(("g00-i00", best)):
            again = {"mfu": self.mfu[name] * 0.98, "tokens_per_second": 25000 * self.mfu[name]}
            measured = again if self.with_mfu else {"why_none": "no peak is known"}
            self.append("retimed", name, {"individual_id": name}, measured)
            for k in range(4):
                key = f"{name}/claim-{self.n_generations:02d}-{k}"
                self.append("test_read", key, {"individual_id": name})
                self._job(name, key, "claim", "OK", self.loss[name], self.mfu[name], split="test")
        claim = {
            "n_base": 4,
            "n_selected": 4,
            "perplexity_percent": 100 * (1 - math.exp(self.loss[best] - 2.5)),
            "ci95": [20.0, 45.0],
            "p_value": 0.0001,
            "significant": True,
            "degrees_of_freedom": 5.0,
            "alpha": 0.05,
        }
        steps = {
            "baseline_id": "g00-i00",
            "selected_id": best,
            "n_steps": None if best == "g00-i00" else 150,
            "why_none": "no individual was better than the base" if best == "g00-i00" else None,
            "claim": None if best == "g00-i00" else {**claim, "perplexity_percent": 21.0},
        }
        self.append("equal_steps", f"after-g{self.n_generations:02d}", steps)
        payload = {
            "baseline_id": "g00-i00",
            "selected_id": best,
            "claim": None if best == "g00-i00" else claim,
            "why_none": "no individual was better than the base" if best == "g00-i00" else None,
            "earlier_claims": 0,
        }
        self.append("claim", f"after-g{self.n_generations:02d}", payload)
