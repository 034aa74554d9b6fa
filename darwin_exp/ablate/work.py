"""The work of an ablation: trains every variant side by side and says what each part contributes.

Reads: the run's chronicle; the ablation's own journal, where an earlier process had begun.
Writes: runs/RUN_ID/ablation/: journal.sqlite, trainings/, summary.json and pruned/.
Never: touches the run's own journal, reads the test split, or repeats what is recorded.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from darwin_exp import parts as workshop_of
from darwin_exp.ablate.display import Display
from darwin_exp.ablate.dissection import Dissection, take_apart
from darwin_exp.ablate.rounds import BASE, Arm, Rounds
from darwin_exp.ablate.surroundings import fitness_of
from darwin_exp.ablate.verdicts import PERPLEXITY, Finding, Sample, advice, droppable, judge
from darwin_exp.champion import job_file, leave_product
from darwin_exp.chronicle import Agent, Chronicle
from darwin_exp.config import ConfigError
from darwin_exp.individual import Genome
from darwin_exp.journal import Journal
from darwin_exp.parts import Workshop
from darwin_exp.protocols import Executor
from darwin_exp.statistics import welch
from darwin_exp.summary import LOST, OK
from darwin_exp.trials import Bench, Trials
from darwin_exp.wording import clean
from data import read_meta

DEFAULT_SEEDS = 4
CHAMPION = "champion"
# What --drop may drop, from the most careful to the boldest.
KEEP_ALL, WORTHLESS, ALSO_UNCLEAR = "nothing", "worthless", "unclear"


class Ablation:
    """Takes one champion apart, in steps that are each journaled once.

    Args:
        asked_seeds: trainings of each variant; None takes what was asked for last, else 4.
        drop: what may be dropped, one of the three above. Only what is asked for now counts.
    """

    def __init__(
        self,
        chronicle: Chronicle,
        champion: Agent,
        workshop: Workshop,
        journal: Journal,
        folder: Path,
        display: Display,
        asked_seeds: int | None = None,
        drop: str = KEEP_ALL,
    ) -> None:
        self.chronicle, self.champion, self.workshop = chronicle, champion, workshop
        self.journal, self.folder, self.display = journal, folder, display
        self.name = champion.individual_id
        has_gate = (
            read_meta(workshop.data.folder).splits["gate"].tokens
            > workshop.config.trainer.context_length
        )
        # The champion was chosen on val, and test is read by the closing claim alone.
        self.split = "gate" if has_gate else "val"
        training, evaluation, box = workshop_of.build_specs(workshop.config, None)
        self.bench = Bench(
            seed=workshop.config.seed,
            integrity_key=bytes.fromhex(chronicle.begun.payload["integrity_key"]),
            data=workshop.data,
            training=training,
            evaluation=replace(evaluation, verify_rate=False),  # no MFU is asked for
            sandbox=box,
            run_folder=folder,
        )
        self.n_seeds = self._asked(asked_seeds)
        self.drop = drop
        self.fitness = fitness_of(chronicle)
        self.dissection = self._dissect()

    def work(self, executor: Executor) -> int:
        """Train what is missing, write and show the summary, and return the exit code.

        Raises:
            ConfigError: the champion does not train, so that nothing can be compared with it.
            Interrupted, KeyboardInterrupt: somebody stopped it; it can be gone on with.
            Broken: nothing can be trained here any more.
        """
        trials = Trials(self.bench, executor, self.journal)
        rounds = Rounds(
            trials,
            executor.n_slots,
            self.journal,
            self.name,
            self.split,
            self.n_seeds,
            self.display,
        )
        samples = rounds.train(self._arms())
        champion = samples[self.dissection.champion.id]
        if champion.n < 2 and champion.n_failed:
            raise ConfigError(f"{self.chronicle.run_id}: its champion: {champion.troubles}")
        findings = judge(self.dissection.parts, samples, champion)
        pruned, sentence, lost = self._prune(rounds, findings, samples)
        summary = self._summary(findings, samples, pruned)
        _write(self.folder / "summary.json", json.dumps(summary, indent=2) + "\n")
        sentences = [advice(findings, self.fitness), sentence]
        self.display.finished(summary, list(filter(None, sentences)))
        return LOST if lost or any(sample.n_lost for sample in samples.values()) else OK

    def title(self) -> list[str]:
        """Say what is about to be done."""
        config, parts = self.workshop.config, self.dissection.parts
        clock = f"{config.budget_seconds:g} s"
        if config.max_steps is not None:
            clock = f"{config.max_steps} steps (at most {clock})"
        n, kind = self.n_seeds * len(self._arms()), parts[0].kind
        done = len(self.journal.of_kind("job"))
        own = "in the environment that the run began in, without what people granted since"
        recorded = f"; {done} recorded already" if done else ""
        return [
            f"ablation of {self.chronicle.run_id}: champion {self.name} in {len(parts)} {kind}(s)",
            f"    {n} trainings of {clock} on {len(self.workshop.slots)} slot(s), "
            f"{self.n_seeds} fresh seed(s) each, scored on {self.split}{recorded}",
            *([f"    {own}"] if self.chronicle.claimed_in.index else []),
        ]

    # --- what was decided ------------------------------------------------------------------------

    def _asked(self, n_seeds: int | None) -> int:
        """Return the seeds asked for now, or else the last time, and record what is new."""
        earlier = [
            event.payload
            for event in self.journal.of_kind("asked")
            if event.payload["champion_id"] == self.name
        ]
        last: int | None = earlier[-1]["n_seeds"] if earlier else None
        wanted = n_seeds or last or DEFAULT_SEEDS
        if wanted != last:
            key = str(len(self.journal.of_kind("asked")))
            self.journal.append("asked", key, {"champion_id": self.name, "n_seeds": wanted})
        return wanted

    def _dissect(self) -> Dissection:
        base = self.chronicle.base_genome
        champion = self.chronicle.genome_of(self.name)
        dissection = take_apart(base, champion, self.champion.edits)
        parts = [
            {"name": part.name, "what": part.what, "file": part.file, "note": part.note}
            for part in dissection.parts
        ]
        self.journal.once(
            "dissection",
            self.name,
            lambda: ({"parts": parts}, {"run_id": self.chronicle.run_id}),
            given={
                "base_genome_id": base.id,
                "champion_genome_id": champion.id,
                "split": self.split,
                "without": {part.name: part.without.id for part in dissection.parts},
            },
        )
        return dissection

    def _arms(self) -> list[Arm]:
        """Return what is trained; variants with the same code are one."""
        dissection = self.dissection
        arms = {
            dissection.base.id: Arm(BASE, dissection.base),
            dissection.champion.id: Arm(CHAMPION, dissection.champion),
        }
        for k, part in enumerate(dissection.parts, start=1):
            if not part.same and not part.flaw:
                arms.setdefault(part.without.id, Arm(f"without-{k}", part.without))
        return list(arms.values())

    # --- the pruned champion ---------------------------------------------------------------------

    def _prune(
        self, rounds: Rounds, findings: Sequence[Finding], samples: Mapping[str, Sample]
    ) -> tuple[dict[str, Any] | None, str, bool]:
        """Train the champion without what could be dropped against the whole one.

        Returns:
            its part of the summary, a sentence, and whether trainings were lost.
        """
        dropped = droppable(findings, also_unclear=self.drop == ALSO_UNCLEAR)
        if self.drop == KEEP_ALL or not dropped:
            hint = "With --drop the same command trains the champion without them."
            return None, hint if dropped and self.fitness == PERPLEXITY else "", False
        dissection = self.dissection
        genome, taken = dissection.rebuild(dropped)
        dropped = [*dropped, *taken]
        if genome.fingerprint == dissection.base.fingerprint:
            return None, "Dropping all of these would leave the base, so none is dropped.", False
        pruned = Arm(f"pruned-{genome.id[:8]}", genome)
        self.journal.once(
            "pruned", f"{self.name}/{pruned.name}", lambda: ({}, {}), given={"dropped": dropped}
        )
        whole = Arm(f"{CHAMPION}-beside-{genome.id[:8]}", dissection.champion)
        if genome.fingerprint == dissection.champion.fingerprint:
            ours = theirs = samples[dissection.champion.id]  # the same program
        else:
            # With seeds of their own: those of the ablation have chosen what is dropped.
            fresh = rounds.train([whole, pruned])
            theirs, ours = fresh[dissection.champion.id], fresh[genome.id]
        claim = welch(theirs.log_perplexities, ours.log_perplexities)
        percent, interval = claim.perplexity_percent, claim.ci95
        if ours is theirs:
            percent, interval = 0.0, (0.0, 0.0)
        told = {
            "dropped": dropped,
            "perplexity": ours.perplexity,
            "n": ours.n,
            "percent_vs_champion": percent,
            "ci95": None if interval is None else list(interval),
        }
        sentence = _sentence(dropped, percent, interval, ours.failure)
        self._leave_pruned(genome, told, sentence)
        return told, sentence, bool(ours.n_lost or theirs.n_lost)

    def _leave_pruned(self, genome: Genome, told: Mapping[str, Any], sentence: str) -> None:
        kept = [part for part in self.dissection.parts if part.name not in told["dropped"]]
        lines = [
            f"# The pruned champion of run {self.chronicle.run_id}",
            "",
            f"`{self.name}` without {', '.join(told['dropped'])}; code `{genome.id[:12]}`.",
            "",
            sentence,
            "",
            "## What is left of the change",
            "",
            *(f"- {part.name}, in `{part.file}`: {clean(part.what)}" for part in kept),
            "",
            "`python train.py job.json` trains it in this folder, and `patch -p1` with",
            "`champion.patch` turns the run's base into it.",
        ]
        training = self.bench.training
        leave_product(
            self.folder / "pruned",
            genome,
            self.dissection.base,
            job_file(self.bench.data, training, training.seed),
            "\n".join(lines) + "\n",
        )

    def _summary(
        self,
        findings: Sequence[Finding],
        samples: Mapping[str, Sample],
        pruned: Mapping[str, Any] | None,
    ) -> dict[str, Any]:
        sides = {
            side: {"perplexity": one.perplexity, "n": one.n, "note": one.troubles}
            for side, one in (
                (BASE, samples[self.dissection.base.id]),
                (CHAMPION, samples[self.dissection.champion.id]),
            )
        }
        return {
            "run_id": self.chronicle.run_id,
            "champion_id": self.name,
            "fitness": self.fitness,
            "n_seeds": self.n_seeds,
            "split": self.split,
            **sides,
            "parts": [finding.as_json() for finding in findings],
            "pruned": None if pruned is None else dict(pruned),
        }


def _sentence(
    dropped: Sequence[str],
    percent: float | None,
    interval: tuple[float, float] | None,
    failure: str,
) -> str:
    without = f"without {', '.join(dropped)}"
    if percent is None or interval is None:
        return f"Pruned ({without}): not compared{f', it fails: {failure}' if failure else ''}."
    low, high = interval
    direction = "lower" if percent >= 0 else "higher"
    told = (
        f"Pruned ({without}): perplexity {abs(percent):.2f} % {direction} than the champion's "
        f"(95 % interval of the gain {low:+.2f} to {high:+.2f} %)"
    )
    if high < 0:
        return f"{told}: worse, so keep the champion whole."
    if low > 0:
        return f"{told}: better and simpler, so take the pruned one."
    return f"{told}: no difference was found, and the pruned one is simpler."


def _write(path: Path, text: str) -> None:
    """Write a file so that a power cut leaves the old one or the new one."""
    fresh = path.with_name(f".{path.name}.new")
    with fresh.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    fresh.replace(path)
