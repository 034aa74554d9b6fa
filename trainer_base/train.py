"""Train a GPT on a file of tokens until the clock or the step count runs out.

The harness runs this as `train.py JOB.json` on a clock of its own: whatever lies in the output
folder when the budget is over is what gets scored. So a first checkpoint is left early, and the
last one is finished a little before the end.

Reads: the job file named by the first argument; settings.json beside this file; the tokens that
the job names, little-endian unsigned integers without a header.
Writes: model.json, model.safetensors and progress.jsonl in the job's output folder.
Never: held-out text, the network, or a seed other than the job's.

Sizes in the comments: B sequences of T tokens each, V token ids.
"""

# mypy: allow-untyped-calls

from __future__ import annotations

import json
import math
import os
import sys
import time
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from model import build_model
from safetensors.torch import save_file
from torch import Tensor, nn

# --- 1. The job, which the harness decides, and the settings, which are ours ---------------------

started = time.monotonic()  # the harness's clock has been running since shortly before


@dataclass(frozen=True)
class Settings:
    """The content of settings.json: every one of these, and nothing else.

    Attributes:
        n_layers: transformer blocks.
        n_heads: attention heads a block.
        width: channels of the residual stream.
        dropout: share of activations dropped in training.
        bias: whether linear layers and norms have biases.
        tied_head: whether the output head is the token embedding.
        batch_size: sequences that go through the model at a time, B.
        accumulation_steps: such batches that one optimizer step sums up.
        learning_rate: the highest rate, reached when the warm-up is over.
        final_rate_fraction: the rate at the end, as a fraction of the highest.
        warmup_fraction: part of the schedule over which the rate rises.
        beta1: AdamW's memory of the gradient.
        beta2: AdamW's memory of its square.
        weight_decay: pull towards zero, on matrices only.
        gradient_clip: longest gradient, by its norm, that a step may use.
        precision: "float32", or "bfloat16" for automatic mixed precision.
        compile: whether to compile the model where there is a GPU.
    """

    n_layers: int
    n_heads: int
    width: int
    dropout: float
    bias: bool
    tied_head: bool
    batch_size: int
    accumulation_steps: int
    learning_rate: float
    final_rate_fraction: float
    warmup_fraction: float
    beta1: float
    beta2: float
    weight_decay: float
    gradient_clip: float
    precision: str
    compile: bool


def read_settings(path: Path) -> Settings:
    """Read the settings; end the program with one line if one is missing or unknown."""
    values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    names = {field.name for field in fields(Settings)}
    if missing := sorted(names - values.keys()):
        sys.exit(f"settings.json: missing {', '.join(missing)}")
    if unknown := sorted(values.keys() - names):
        sys.exit(f"settings.json: train.py has no setting {', '.join(unknown)}")
    return Settings(**values)


job_file = Path(sys.argv[1])
folder = job_file.parent
job: dict[str, Any] = json.loads(job_file.read_text(encoding="utf-8"))
settings = read_settings(Path(__file__).with_name("settings.json"))

context_length: int = job["context_length"]  # T
budget_seconds: float = job["budget_seconds"]
max_steps: int | None = job["max_steps"]
out = folder / job["out"]
out.mkdir(parents=True, exist_ok=True)  # the harness has made it; somebody at a shell may not have

device = torch.device(job["device"])
on_gpu = device.type == "cuda"
torch.manual_seed(job["seed"])  # the only source of chance: weights, batches and dropout
torch.set_num_threads(job["threads"])
if on_gpu:
    torch.set_float32_matmul_precision("high")  # TF32 wherever float32 matrices are multiplied

# --- 2. Data: random windows of one long row of tokens -------------------------------------------


def read_tokens() -> np.ndarray[Any, Any]:
    """Map the training tokens into memory; end the program if they are fewer than one window."""
    dtype = np.dtype(f"<u{job['token_bytes']}")
    names = [job["train"], *job["extra_train"]]
    rows = [np.memmap(folder / name, dtype=dtype, mode="r") for name in names]
    # One file stays on disk. Joining several reads them all, which small additions can afford.
    row = np.asarray(rows[0]) if len(rows) == 1 else np.concatenate(rows)
    if len(row) <= context_length:
        sys.exit(f"train: {len(row)} tokens, but one window takes {context_length + 1}")
    return row


tokens = read_tokens()
window = np.arange(context_length + 1)  # a window holds one token more, the last one's target


def next_batch() -> tuple[Tensor, Tensor]:
    """Draw inputs (B, T) and their targets (B, T), which are the same windows one token later."""
    starts = torch.randint(len(tokens) - context_length, (settings.batch_size, 1)).numpy()
    windows = torch.from_numpy(tokens[starts + window].astype(np.int64))  # (B, T + 1)
    if on_gpu:
        # From pinned memory the copy runs by itself while the GPU computes.
        windows = windows.pin_memory().to(device, non_blocking=True)
    return windows[:, :-1], windows[:, 1:]


# --- 3. Model and optimizer ----------------------------------------------------------------------


def build_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    """Build AdamW with decay on matrices only: norms and biases have no reason to be small."""
    matrices = [parameter for parameter in model.parameters() if parameter.dim() >= 2]
    vectors = [parameter for parameter in model.parameters() if parameter.dim() < 2]
    groups = [
        {"params": matrices, "weight_decay": settings.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    betas = (settings.beta1, settings.beta2)
    return torch.optim.AdamW(groups, lr=settings.learning_rate, betas=betas, fused=True)


def loss_of(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the mean cross-entropy in nats of logits (B, T, V) against targets (B, T)."""
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


arguments = {
    "vocab_size": job["vocab_size"],
    "context_length": context_length,
    "n_layers": settings.n_layers,
    "n_heads": settings.n_heads,
    "width": settings.width,
    "dropout": settings.dropout,
    "bias": settings.bias,
    "tied_head": settings.tied_head,
}
model = build_model(arguments).to(device)
parameters = list(model.parameters())
optimizer = build_optimizer(model)
# Compiling takes a minute, which only a GPU pays back. `model` keeps the plain weights' names.
network = torch.compile(model) if settings.compile and on_gpu else model
autocast = torch.autocast(device.type, torch.bfloat16, enabled=settings.precision == "bfloat16")

# --- 4. Schedule: how the learning rate follows progress, which runs from 0 to 1 ------------------


def learning_rate(progress: float) -> float:
    """Return the rate at a point of the schedule: a linear warm-up, then half a cosine down."""
    if progress < settings.warmup_fraction:
        return settings.learning_rate * progress / settings.warmup_fraction
    lowest = settings.learning_rate * settings.final_rate_fraction
    decayed = (progress - settings.warmup_fraction) / max(1e-9, 1.0 - settings.warmup_fraction)
    return lowest + 0.5 * (settings.learning_rate - lowest) * (1.0 + math.cos(math.pi * decayed))


# --- 5. What is left behind ----------------------------------------------------------------------


def save_arguments() -> None:
    """Write the constructor arguments, before any weights: a checkpoint is complete with both."""
    unfinished = out / "model.json.unfinished"
    unfinished.write_text(json.dumps(arguments, indent=2) + "\n", encoding="utf-8")
    os.replace(unfinished, out / "model.json")


def save_weights() -> float:
    """Write the weights, so that a reader finds all of them or the last ones; return seconds."""
    before = time.monotonic()
    unfinished = out / "model.safetensors.unfinished"
    save_file(model.state_dict(), unfinished)
    os.replace(unfinished, out / "model.safetensors")
    return time.monotonic() - before


def report(step: int, loss: Tensor) -> None:
    """Append a line to progress.jsonl and print one; a loss that is no number is null."""
    nats = loss.item()  # waits for the GPU, so this is called seldom
    line = {
        "step": step,
        "tokens": step * settings.accumulation_steps * settings.batch_size * context_length,
        "loss": nats if math.isfinite(nats) else None,
    }
    with (out / "progress.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
    print(f"step {step:6d}  loss {nats:.4f}  {time.monotonic() - started:.1f} s", flush=True)


# --- 6. Training ---------------------------------------------------------------------------------

SAVING_SHARE = 0.02  # of the budget, at most, goes into checkpoints
REPORTS = 25  # lines of progress a run
# Steps' worth of time to keep free: the next one, on a GPU also the one under way, and some slack.
STEPS_KEPT_FREE = 2.5 if on_gpu else 1.5

save_arguments()
inputs, targets = next_batch()
if network is not model:
    # Compile before the schedule starts, or a short run's warm-up would pass meanwhile.
    with autocast:
        loss_of(network(inputs), targets).backward()
    torch.cuda.synchronize()
    optimizer.zero_grad()

step = 0
progress = 0.0
reported = 0.0  # progress at the last report
saving_seconds = slowest_save = 0.0
step_done = torch.cuda.Event() if on_gpu else None
# The deadline leaves time for the imports above, for a last checkpoint and for a busy machine.
deadline = started + 0.99 * budget_seconds - 0.05
now = schedule_start = time.monotonic()
save_at = started + min(2.0, 0.1 * budget_seconds)

while True:
    # One optimizer step. The next batch is drawn while the GPU still works on this one.
    rate = learning_rate(progress)
    for group in optimizer.param_groups:
        group["lr"] = rate
    for _ in range(settings.accumulation_steps):
        with autocast:
            loss = loss_of(network(inputs), targets)
        (loss / settings.accumulation_steps).backward()
        inputs, targets = next_batch()
    nn.utils.clip_grad_norm_(parameters, settings.gradient_clip)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    step += 1

    # A GPU takes orders faster than it carries them out: stay one step ahead of it and no more,
    # so that the clock below means something.
    if step_done is not None:
        step_done.synchronize()
        step_done.record()

    # A checkpoint early, then whenever the time trained has doubled, as far as its share goes.
    before, now = now, time.monotonic()
    step_seconds = now - before
    if now >= save_at and saving_seconds + 2 * slowest_save <= SAVING_SHARE * budget_seconds:
        took = save_weights()
        slowest_save = max(slowest_save, took)
        saving_seconds += took
        now = time.monotonic()
        save_at = started + 2 * (now - started)

    # Where are we, and is there time for another step and the last checkpoint?
    end = deadline - 2 * slowest_save
    if max_steps is not None:
        progress = step / max_steps
    else:
        progress = min(1.0, (now - schedule_start) / max(1e-9, end - schedule_start))
    if step == max_steps or now + STEPS_KEPT_FREE * step_seconds >= end:
        break
    if progress - reported >= 1 / REPORTS:
        report(step, loss)
        reported = progress

save_weights()
report(step, loss)
