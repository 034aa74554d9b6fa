"""Scores a trained model on held-out text, in a process where no byte of a genome ever runs.

Reads: held_out/<split>.bin, token_byte_lengths.npy, the start of train.bin, a collected checkpoint,
the logits that two fresh model servers answer with.
Writes: nothing; it returns an Evaluation.
Never: imports or unpickles anything of a candidate, lets it see a target, or takes its word for
a metric.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from darwin_exp.evaluation.checkpoint import Checkpoint, CheckpointRefused, read_checkpoint
from darwin_exp.evaluation.exchange import ModelServer, Refused
from darwin_exp.evaluation.integrity import (
    check_alone,
    check_causality,
    check_order,
    check_repeats,
    check_unprobed,
    require_evidence,
)
from darwin_exp.evaluation.likelihood import negative_log_likelihood
from darwin_exp.evaluation.questions import (
    MAX_DONOR_TOKENS,
    Ints,
    Nats,
    Schedule,
    Tokens,
    draw_prefixes,
    draw_second_pass,
    secret_generator,
)
from darwin_exp.evaluation.rate import Known, Speed, known_rows, measure_speed
from darwin_exp.evaluation.told import told_text
from darwin_exp.individual import DataSpec, Evaluation, Job, Reason, Status, TrainingRun
from darwin_exp.protocols import InfrastructureFailure, Sandbox

# Below this nobody's language model predicts text, least of all one trained for seconds: the
# strongest published ones need more than 0.5 bits per byte of English. Text that repeats itself, as
# logs do, may honestly allow less: there this bound is wrong, and the base is the first to show it.
PLAUSIBLE_BPB = 0.3
N_ALONE = 2  # windows that are also sent as a batch of one
MAX_BATCH_BYTES = 256 << 20  # float32 logits that are held at a time
LONGEST_FIRST_SECONDS = 120.0  # until a model is loaded and has answered, where steps are counted


class Scorer:
    """The Evaluator: two fresh model servers, held-out tokens, and arithmetic of its own."""

    def evaluate(self, job: Job, training: TrainingRun, sandbox: Sandbox) -> Evaluation:
        """Return perplexity, bits per byte and speed of a trained model, or a typed refusal.

        Metrics are named by the split: `val_perplexity`, `val_bpb` (bits per byte of raw text) and
        `val_nats` (per token); `n_parameters` is read from the checkpoint.

        Raises:
            InfrastructureFailure: the scoring itself could not be carried out.
        """
        if job.evaluation is None or training.artefacts is None:
            raise InfrastructureFailure("there is nothing to score: no evaluation or no artefacts")
        times = _Times()
        details: dict[str, Any] = {}
        try:
            return self._score(job, training, training.artefacts, sandbox, times, details)
        except Refused as refusal:
            return Evaluation(
                refusal.status,
                refusal.reason,
                str(refusal),
                details=details,
                startup_seconds=times.startup_seconds,
                scoring_seconds=times.scoring_seconds,
            )

    def _score(
        self,
        job: Job,
        training: TrainingRun,
        artefacts: Path,
        sandbox: Sandbox,
        times: _Times,
        details: dict[str, Any],
    ) -> Evaluation:
        spec = job.evaluation
        assert spec is not None
        seconds, first_seconds = patience(job)
        deadline = time.monotonic() + seconds

        def server_of_model() -> ModelServer:
            return ModelServer(job, artefacts, sandbox, "model", deadline, first_seconds)

        T, V = job.training.context_length, job.data.vocab_size
        checkpoint = _checkpoint(artefacts, job.training.file_mb << 20)

        window_bytes = 4 * T * V
        rows = max(1, min(spec.batch_tokens // T, MAX_BATCH_BYTES // window_bytes))
        windows, n_available = sample_windows(
            job.data, spec.split, T, max(1, spec.max_logits_bytes // window_bytes)
        )
        schedule = Schedule.draw(len(windows), rows, secret_generator(job.secret, "order"))
        second_pass = draw_second_pass(
            schedule, spec.second_pass, secret_generator(job.secret, "second pass")
        )
        prefixes = draw_prefixes(
            windows,
            schedule,
            spec.n_prefixes,
            V,
            secret_generator(job.secret, "prefixes"),
            donors=told_text(job.data, MAX_DONOR_TOKENS),
            cuts_per_window=spec.cuts_per_window,
        )
        details |= {
            "split": spec.split,
            "windows": len(windows),
            "windows_available": n_available,
            "context_length": T,
            "prefixes": prefixes.n,
            "second_pass": second_pass.size,
            "checkpoint_bytes": checkpoint.n_bytes,
        }

        rows_of = np.arange(schedule.windows.shape[1])
        again = schedule.windows[second_pass, rows_of]
        prefix_nats = second_nats = np.empty((0, len(rows_of), T))
        known: Known | None = None
        if prefixes.n or second_pass.size or spec.verify_rate:
            with times.of(server_of_model()) as server:
                prefix_nats = _costs(server, windows, prefixes.windows, prefixes.tokens)
                # Every prefix is answered: from here on it may see what followed.
                second_nats = _costs(server, windows, again)
                if spec.verify_rate and training.tokens_claimed is not None:
                    known = known_rows(server, job, len(rows_of))

        with times.of(server_of_model()) as server:
            full_nats = _costs(server, windows, schedule.windows)
            nats = schedule.by_window(full_nats)  # (n_windows, T)
            alone = schedule.windows[-1, :N_ALONE]
            alone_nats = _costs(server, windows, alone[:, None])[:, 0]

            # What answers differently every time would look as if it read ahead: so that is last.
            details["order"] = asdict(check_order(second_pass, second_nats, full_nats))
            details["repeats"] = asdict(check_repeats(schedule, full_nats))
            details["alone"] = asdict(check_alone(nats[alone], alone_nats))
            details["causality"] = asdict(check_causality(prefixes, prefix_nats, full_nats))
            shuffles = secret_generator(job.secret, "unprobed")
            details["unprobed"] = asdict(check_unprobed(prefixes, again, nats, shuffles))
            metrics = _metrics(job.data, spec.split, windows, nats)
            metrics["n_parameters"] = float(checkpoint.n_parameters)
            speed = measure_speed(server, job, training, checkpoint, deadline, known)

        due = ["repeats", "alone"]
        due += ["order"] if spec.second_pass > 0 else []
        due += ["causality"] if spec.n_prefixes > 0 and T > 1 else []
        # Where text is short, the first server may have got every window that it was probed in.
        due += ["unprobed"] if set(prefixes.windows[prefixes.cuts > 0]) - set(again.flat) else []
        require_evidence(details, due, nats)
        details["speed"] = speed.details()
        status, reason, message = _plausible(spec.split, metrics, speed)
        return Evaluation(
            status,
            reason,
            message,
            metrics=metrics,
            rates=speed.rates(),
            details=details,
            startup_seconds=times.startup_seconds,
            scoring_seconds=times.scoring_seconds,
        )


def patience(job: Job) -> tuple[float, float]:
    """Return how many seconds the whole scoring may take, and each server's first answer.

    Under the clock both are bounded by the budget, so that a hang costs little. Whether the model
    used that time to go on training is judged by what its later answers take (`ModelServer`).
    """
    spec, training = job.evaluation, job.training
    assert spec is not None
    if training.max_steps is not None:
        return spec.seconds, min(spec.seconds, LONGEST_FIRST_SECONDS)
    budget = training.budget_seconds
    return min(spec.seconds, 60.0 + 4.0 * budget), max(10.0, 0.5 * budget)


@dataclass
class _Times:
    """Adds up the start-up of every model server, and what followed until its last answer."""

    startup_seconds: float = 0.0
    scoring_seconds: float = field(default=0.0)

    @contextmanager
    def of(self, server: ModelServer) -> Iterator[ModelServer]:
        with server:
            self.startup_seconds += server.startup_seconds
            try:
                yield server
            finally:
                self.scoring_seconds += time.monotonic() - server.ready_at


def sample_windows(
    data: DataSpec, split: str, context_length: int, at_most: int
) -> tuple[Tokens, int]:
    """Cut a split into windows and return them, or a fixed sample, and how many there are.

    Windows do not overlap: each holds `context_length` inputs and the token after them, which is
    the next window's first input, so that every target is scored once. The sample depends on
    data, split and length alone: all individuals of an environment are scored on the same text.

    Returns:
        Windows (n, context_length + 1) in the order of the text, and the number in the split.

    Raises:
        InfrastructureFailure: the split cannot be read, or is shorter than one window.
    """
    T = context_length
    path = data.folder / "held_out" / f"{split}.bin"
    try:
        tokens = np.fromfile(path, dtype=f"<u{data.token_bytes}")
    except OSError as error:
        raise InfrastructureFailure(f"{path}: {error.strerror}") from error
    n_windows = (len(tokens) - 1) // T
    if n_windows < 1:
        raise InfrastructureFailure(f"{path} holds {len(tokens)} tokens; one window takes {T + 1}")
    if tokens.max() >= data.vocab_size:
        raise InfrastructureFailure(f"{path} holds token {tokens.max()} of {data.vocab_size}")
    chosen = np.arange(n_windows)
    if n_windows > at_most:
        key = f"{data.content_hash} {split} {T}".encode()
        rng = np.random.default_rng(int.from_bytes(hashlib.sha256(key).digest(), "big"))
        chosen = np.sort(rng.choice(n_windows, size=at_most, replace=False))
    places = chosen[:, None] * T + np.arange(T + 1)
    return tokens[places].astype(np.int32), n_windows


def _costs(server: ModelServer, windows: Tokens, which: Ints, tokens: Tokens | None = None) -> Nats:
    """Return what each target of some windows costs (n_batches, B, T), by a server's answers.

    Args:
        which: the windows of every batch (n_batches, B).
        tokens: what is sent in their place (n_batches, B, T); None sends the windows themselves.
    """
    nats = np.full((*which.shape, windows.shape[1] - 1), np.nan)
    sent = (windows[batch, :-1] for batch in which) if tokens is None else iter(tokens)
    for batch, logits in enumerate(server.logits(sent)):
        nats[batch] = negative_log_likelihood(logits, windows[which[batch], 1:])
    return nats


def _checkpoint(artefacts: Path, max_bytes: int) -> Checkpoint:
    try:
        return read_checkpoint(artefacts / "model.safetensors", max_bytes)
    except CheckpointRefused as refusal:
        raise Refused(Status.REJECTED, refusal.reason, str(refusal)) from None


def _metrics(data: DataSpec, split: str, windows: Tokens, nats: Nats) -> dict[str, float]:
    """Return what the targets cost, per token and per byte of the raw text that they stand for."""
    lengths = np.load(data.folder / "token_byte_lengths.npy", allow_pickle=False)
    n_bytes = int(lengths[windows[:, 1:]].sum(dtype=np.int64))
    if len(lengths) != data.vocab_size or n_bytes <= 0:
        raise InfrastructureFailure(f"{data.folder}: token_byte_lengths.npy does not fit the data")
    total = math.fsum(nats.sum(axis=1))
    mean = total / nats.size
    return {
        # Whoever is this bad (a thousand nats a token) is not told apart from the even worse.
        f"{split}_perplexity": math.exp(min(mean, 700.0)),
        f"{split}_bpb": total / math.log(2) / n_bytes,
        f"{split}_nats": mean,
    }


def _plausible(split: str, metrics: dict[str, float], speed: Speed) -> tuple[Status, Reason, str]:
    """Quarantine what is too good to be true: some check of ours has been got around.

    Only what no honest model can reach is quarantined: a bound taken from the population would
    stop the very finding that a search is for. A score worse than chance is merely bad.
    """
    bpb, mfu = metrics[f"{split}_bpb"], speed.rates().get("mfu")
    if bpb < PLAUSIBLE_BPB:
        message = f"{bpb:.3f} bits per byte is not plausible (below {PLAUSIBLE_BPB})"
        return Status.QUARANTINED, Reason.IMPLAUSIBLE, message
    if mfu is not None and mfu > 1.0:
        message = f"an MFU of {mfu:.2f} is above what the hardware can do"
        return Status.QUARANTINED, Reason.IMPLAUSIBLE, message
    return Status.OK, Reason.NONE, ""
