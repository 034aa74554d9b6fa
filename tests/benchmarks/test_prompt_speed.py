"""How long it takes to build the prompt of a rewrite in a large archive: `make bench` prints it."""

from __future__ import annotations

from pathlib import Path
from random import Random
from typing import Any

from darwin_exp.individual import Edit, Genome, Individual, Status
from darwin_exp.mutation import Surroundings
from darwin_exp.mutation.prompt import draft_prompt
from darwin_exp.protocols import EditRequest, Lesson
from darwin_exp.tokens import TokenCounter
from data import DatasetRequest

ROOT = Path(__file__).parents[2]
WORDS = ["learning", "rate", "warm", "attention", "norm", "wider", "layers", "momentum", "decay"]


def lessons(n: int) -> tuple[Lesson, ...]:
    """Return outcomes of rewrites by language models, one in five failed."""
    rng = Random(0)
    made = []
    for number in range(n):
        summary = f"idea {number}: {' '.join(rng.choices(WORDS, k=20))}"
        failed = rng.random() < 0.2
        made.append(
            Lesson(
                f"g{number // 20:02d}-i{number % 20:02d}",
                number // 20,
                f"g{max(0, number // 20 - 1):02d}-i{rng.randrange(20):02d}",
                f"g{max(0, number // 20 - 1):02d}-i{rng.randrange(20):02d}",
                (Edit("a-model", "train.py", summary, {"exchange": f"{number}"}),),
                summary,
                Status.CRASHED if failed else Status.OK,
                "a lower loss",
                None if failed else rng.gauss(0, 0.1),
                None if failed else rng.gauss(0, 2),
                "exception: RuntimeError: shapes do not fit" if failed else "",
            )
        )
    return tuple(made)


def test_the_prompt_of_a_rewrite_among_a_thousand_individuals(benchmark: Any) -> None:
    """Time a prompt with nothing remembered of it: other code, other lessons each round."""
    base = Genome.from_folder(ROOT / "trainer_base")
    base = base.with_files({"settings.json": '{"learning_rate": 0.003}\n'})
    known = lessons(1_000)
    about = Surroundings(
        "cpu, 1 thread",
        60.0,
        None,
        4096,
        64,
        80,
        1_000_000,
        "validation perplexity, the lower the better.",
        (ROOT / "trainer_base" / "CONTRACT.md").read_text(),
    )
    count = TokenCounter.load(DatasetRequest("shakespeare").root, print)
    rounds = iter(range(10**6))

    def asked() -> tuple[tuple[Any, ...], dict[str, Any]]:
        number = next(rounds)

        def rewritten(text: str) -> Genome:
            train = base.as_dict["train.py"].replace("import json\n", f"import json\n{text}\n")
            return base.with_files({"train.py": train})

        parent = Individual("g49-i01", 49, 1, rewritten(f"fewer_{number} = {number}"))
        editor = Individual("g49-i02", 49, 2, rewritten(f"more_{number} = {number}"))
        mate = Individual("g49-i03", 49, 3, rewritten(f"other_{number} = {number}"))
        request = EditRequest(
            parent,
            editor,
            mate,
            known[number % 7 :],
            ordinal=number,
            individual_id="g50-i00",
            generation=50,
            base=Individual("g00-i00", 0, 0, base),
            noise=0.02,
        )
        return (request, about, "edits", 32_000, count), {}

    prompt = benchmark.pedantic(draft_prompt, setup=asked, rounds=20)
    benchmark.extra_info["tokens"] = prompt.n_tokens
    assert "What is known already" in prompt.messages[1].text
