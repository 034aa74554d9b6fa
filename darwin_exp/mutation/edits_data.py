"""Built-in edits of the batches: in which order the text is read, and in how large pieces.

Each leaves the count of tokens in progress.jsonl exact and draws from the job's seed alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from darwin_exp.mutation.builtin import BuiltInEdit, Parameters, does_not_apply
from darwin_exp.mutation.training import TrainingEdit

if TYPE_CHECKING:
    from darwin_exp.mutation.code import Code


class DataOrder(TrainingEdit):
    """Source: shuffling without replacement, as Shamir 2016 analyses it for gradient methods."""

    name = "data_order"
    about = "data order"
    title = "shuffled windows that do not overlap"
    why = "Random windows repeat some of the text and miss more than a third of it in a pass."
    hope = "lower loss where the run sees much of the text"

    def rewrite(self, code: Code, parameters: Parameters) -> None:
        context = code.job_value("context_length")
        if code.defines("next_starts"):
            raise does_not_apply(f"{self.name}: there already")
        if code.call_instead(["randint"], "next_starts", n_positional=2) != 1:
            raise does_not_apply(f"{self.name}: cannot tell where windows are drawn")
        code.define_before_use("next_starts", _NEXT_STARTS.format(context=context))
        code.need("torch", "math")
        code.reword("random windows of one long row", "shuffled windows of a long row")


_NEXT_STARTS = '''
starts_left = torch.empty(0, dtype=torch.long)


def next_starts(
    high: int, size: tuple[int, ...], generator: torch.Generator | None = None
) -> torch.Tensor:
    """Return starts below `high` of windows that cover the text once, in random order.

    Every pass over the text cuts it in other places.
    """
    global starts_left
    n = math.prod(size)
    while len(starts_left) < n:
        offset = int(torch.randint(min({context}, high), (1,), generator=generator))
        starts = torch.arange(offset, high, {context})
        order = torch.randperm(len(starts), generator=generator)
        starts_left = torch.cat((starts_left, starts[order]))
    drawn, starts_left = starts_left[:n], starts_left[n:]
    return drawn.view(size)
'''


class Prefetch(TrainingEdit):
    """Source: the worker processes of torch's DataLoader, here one thread."""

    name = "prefetch"
    about = "prefetch"
    title = "batches drawn ahead in a thread"
    why = "While the model computes, a thread can gather the next batch."
    hope = "slightly more steps where drawing a batch takes long"

    def rewrite(self, code: Code, parameters: Parameters) -> None:
        if code.defines("prefetched_batch"):
            raise does_not_apply(f"{self.name}: there already")
        drawing = [
            name
            for name in code.functions_calling("randint", "next_starts")
            if name != "next_starts"
        ]
        if len(drawing) != 1 or not code.call_at_top_instead(drawing[0], "prefetched_batch"):
            raise does_not_apply(f"{self.name}: cannot tell what draws a batch")
        # Dropout draws from torch's own generator meanwhile; which of two threads comes first is
        # chance, so that batches need a generator of their own.
        code.add_keyword(["randint", "randperm", "next_starts"], "generator", "batch_chance")
        code.define_before_use("prefetched_batch", _PREFETCHED_BATCH.format(draw=drawing[0]))
        code.need("torch", "ThreadPoolExecutor")


_PREFETCHED_BATCH = '''
batch_chance = torch.Generator().manual_seed(torch.initial_seed())
drawer = ThreadPoolExecutor(max_workers=1)
upcoming = drawer.submit({draw})


def prefetched_batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Return the batch that a thread has drawn, and let it draw the one after."""
    global upcoming
    batch = upcoming.result()
    upcoming = drawer.submit({draw})
    return batch
'''


class _InStages(TrainingEdit):
    """Divides something by a power of two at first, which halves until it is 1.

    With powers of two a compiled model meets few shapes.
    """

    choices: ClassVar = {"divisor": (2, 4), "until": (0.1, 0.2, 0.4)}
    function: ClassVar[str]
    source: ClassVar[str]

    def rewrite(self, code: Code, parameters: Parameters) -> None:
        halvings, until = int(parameters["divisor"]).bit_length() - 1, float(parameters["until"])
        if not (halvings > 0 and 0 < until <= 1):
            raise ValueError(f"cannot start from 1/{parameters['divisor']} until {until}")
        if code.defines(self.function):
            raise does_not_apply(f"{self.name}: there already")
        progress = code.progress()
        code.wrap_batches(
            lambda batch, begun: f"{self.function}({batch}, {progress if begun else 0.0})"
        )
        code.define_before_use(self.function, self.source.format(halvings=halvings, until=until))
        code.need("torch", "math")


class ContextWarmUp(_InStages):
    """Source: Li et al. 2022, "The Stability-Efficiency Dilemma"; Press et al. 2021, "Shortformer"
    has stages of two lengths.
    """

    name = "context_warm_up"
    about = "context warm-up"
    title = "short sequences first"
    why = "Letters are predicted from their neighbours first; short sequences are cheap and stable."
    hope = "a faster start, most of all with long contexts"
    choices: ClassVar = {"divisor": (2, 4, 8), "until": (0.1, 0.2, 0.4)}
    function = "shorter_sequences"
    source = '''
def shorter_sequences(
    batch: tuple[torch.Tensor, torch.Tensor], progress: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cut a batch (B, T) into more and shorter sequences, as many tokens as before, at first."""
    pieces = 2 ** max(0, math.ceil({halvings} * (1 - progress / {until})))
    inputs, targets = batch
    length, rest = divmod(inputs.size(1), pieces)
    if pieces == 1 or rest:
        return batch
    return inputs.reshape(-1, length), targets.reshape(-1, length)  # (B * pieces, T / pieces)
'''


class BatchWarmUp(_InStages):
    """Source: Smith et al. 2018, "Don't Decay the Learning Rate, Increase the Batch Size"."""

    name = "batch_warm_up"
    about = "batch warm-up"
    title = "small batches first"
    why = "Early on even few sequences point the right way, so more and cheaper steps learn more."
    hope = "a faster start within the same time"
    function = "fewer_sequences"
    source = '''
def fewer_sequences(
    batch: tuple[torch.Tensor, torch.Tensor], progress: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keep only the first sequences of a batch (B, T), fewer of them the earlier it is."""
    divisor = 2 ** max(0, math.ceil({halvings} * (1 - progress / {until})))
    inputs, targets = batch
    n = max(1, len(inputs) // divisor)
    return inputs[:n], targets[:n]  # (n, T)
'''

    def rewrite(self, code: Code, parameters: Parameters) -> None:
        super().rewrite(code, parameters)
        # Steps no longer hold the same number of tokens each, so they have to be counted.
        if code.replace_value("tokens", "tokens_trained") != 1:
            raise does_not_apply(f"{self.name}: cannot tell where tokens are counted")
        _, targets = code.batch_variables()
        code.before_training("tokens_trained = 0")
        code.after_backward(f"tokens_trained += {targets}.numel()")


DATA_EDITS: tuple[BuiltInEdit, ...] = (DataOrder(), Prefetch(), ContextWarmUp(), BatchWarmUp())
