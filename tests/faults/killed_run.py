"""An evolution with real exchanges and a fake trainer, in a process that can be killed.

`python killed_run.py FOLDER BASE_URL` starts the run in FOLDER, or goes on with it.
"""

import json
import sys
import threading
import time
from concurrent.futures import Future
from pathlib import Path

from darwin_exp.effects import Effects
from darwin_exp.evolution import Parts, Plan, evolve
from darwin_exp.fitness import PerplexityFitness
from darwin_exp.individual import (
    DataSpec,
    Evaluation,
    EvaluationSpec,
    Genome,
    Individual,
    Job,
    JobResult,
    ModelSpec,
    Reason,
    SandboxSpec,
    Status,
    TrainingRun,
    TrainingSpec,
)
from darwin_exp.journal import Journal
from darwin_exp.llm import Exchanges
from darwin_exp.llm.choosing import Own
from darwin_exp.llm.money import Money
from darwin_exp.llm.wire import Wire
from darwin_exp.means import Means
from darwin_exp.memory import JsonMemory
from darwin_exp.mutation import LanguageModelMutator
from darwin_exp.mutation.prompt import Surroundings
from darwin_exp.people import People
from darwin_exp.reviews import Reviews
from darwin_exp.selection import Truncation
from darwin_exp.tokens import TokenCounter
from darwin_exp.trials import Bench, Trials
from darwin_exp.turns import Turns

ROOT = Path(__file__).resolve().parents[2]
MAX_USD = 5.0
PRICE = (1.0, 4.0)  # USD for a million tokens in and out
SETTINGS = json.dumps(
    {"learning_rate": 0.004, "warmup_fraction": 0.1, "beta2": 0.95, "gradient_clip": 1.0}, indent=1
)
MISTAKE = "if progress < warmup_fraction:"  # of the stub's `name_error`
PLAN = Plan(
    seed=5,
    population_size=5,
    n_survivors=2,
    n_generations=3,
    reject_duplicates=False,  # which of two siblings has the same code first is a matter of luck
    keep_all_checkpoints=False,
    stagnation_generations=None,
    stuck_generations=None,
    pair_with_peers=True,
    crossover_probability=0.0,
    max_repairs=1,
    smoke_steps=0,
    n_base_repeats=3,
    n_claim_seeds=2,
    n_equal_steps=0,
    n_timings=1,
    has_test=True,
    max_steps=100,
)


class FakeTrainer:
    """Answers jobs at once: perplexity follows from the code; some code fails, as code does."""

    n_slots = 2

    def submit(self, job: Job) -> Future[JobResult]:
        future: Future[JobResult] = Future()
        digits = int(job.genome.fingerprint[:8], 16)
        train = job.genome.as_dict["train.py"]
        if MISTAKE in train:
            line = train[: train.index(MISTAKE)].count("\n") + 1
            log = (
                f'Traceback (most recent call last):\n  File "code/train.py", line {line}\n'
                "NameError: name 'warmup_fraction' is not defined"
            )
            training = TrainingRun(Status.CRASHED, Reason.EXCEPTION, "exit status 1", log_tail=log)
            future.set_result(JobResult(job.job_id, training))
            return future
        training = TrainingRun(Status.OK, steps_claimed=100, tokens_claimed=1000)
        scored = None
        if job.evaluation is not None:
            metrics = {f"{job.evaluation.split}_perplexity": 8.0 + digits / 2**31}
            scored = Evaluation(Status.OK, metrics=metrics)
        future.set_result(JobResult(job.job_id, training, scored))
        return future

    def close(self, cancel: bool = False) -> None:
        pass


class Nobody:
    """A watch that nobody looks at."""

    def generation_started(self, generation: int, n_generations: int) -> None:
        pass

    def individual_finished(self, individual: Individual, base: Individual | None) -> None:
        pass

    def progress(self, done: int, total: int) -> None:
        pass


def main(folder: Path, base_url: str, plan: Plan = PLAN) -> None:
    """Run the evolution to its end, or until somebody kills this process."""
    files = {name: (ROOT / "trainer_base" / name).read_text() for name in ("train.py", "model.py")}
    base = Genome.of({**files, "settings.json": SETTINGS})
    folder.mkdir(parents=True, exist_ok=True)
    journal = Journal(folder)
    # Where a run begins; `Exchanges` knows runs apart by their first event.
    journal.once("run", "run", lambda: ({"what": "killed now and then"}, {"run_id": folder.name}))
    executor = FakeTrainer()
    bench = Bench(
        seed=plan.seed,
        integrity_key=b"key",
        data=DataSpec(folder, "hash", 64),
        training=TrainingSpec(1.0, plan.max_steps, 0, 64),
        evaluation=EvaluationSpec("val"),
        sandbox=SandboxSpec("process"),
        run_folder=folder,
    )
    trials = Trials(bench, executor, journal)
    model = ModelSpec("stub-careful", base_url)
    counter = TokenCounter.estimating()
    exchanges = Exchanges(
        journal,
        Wire(timeout_seconds=20.0),
        Own(((model, 1.0),)),
        Money(MAX_USD, None, None, {model.name: PRICE}),
        counter.count,
        trials.stopping,
        lambda line: print(line, flush=True),
        outage="stop",
    )
    about = Surroundings(
        device="cpu, 1 thread(s), fake",
        budget_seconds=1.0,
        max_steps=plan.max_steps,
        memory_mb=1024,
        context_length=64,
        vocab_size=64,
        train_tokens=100_000,
        fitness="held-out perplexity, lower is better",
        contract="Keep the contract.",
        guidance="",
    )
    mutator = LanguageModelMutator(
        exchanges,
        about,
        form="edits",
        chunk_probability=0.4,
        max_drafts=2,
        prompt_tokens=20_000,
        answer_tokens=2_000,
        count=counter,
    )
    people = People(journal, folder.name, Turns(executor.n_slots), trials.stopping)
    parts = Parts(
        mutator=mutator,
        selector=Truncation(elitism=1),
        fitness=PerplexityFitness(),
        memory=JsonMemory(folder / "memory", "population", 100),
        trials=trials,
        journal=journal,
        people=people,
        reviews=Reviews(people, journal),
        effects=Effects(journal, Means(folder, folder)),
        watch=Nobody(),
        n_slots=executor.n_slots,
        run_folder=folder,
    )
    try:
        evolve(base, plan, parts)
    finally:
        journal.close()


if __name__ == "__main__":
    began = time.monotonic()
    main(Path(sys.argv[1]), sys.argv[2])
    print(f"finished in {time.monotonic() - began:.1f} s", flush=True)
    assert threading.active_count() < 20
