"""The laws that all edits keep, and that they fit code which nobody here has written."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Sequence
from pathlib import Path
from random import Random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from darwin_exp.individual import Edit, Genome
from darwin_exp.mutation import EDITS
from darwin_exp.protocols import EditFailed
from tests.mutation.edited import (
    ON_TRAINING,
    assert_keeps_the_contract,
    assert_parses,
    base_genome,
    edited,
    one_of_each_kind,
    trained,
)
from tests.tiny_run import progress_of


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Compute on one thread, as the jobs say."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# --- laws -----------------------------------------------------------------------------------------


def composed(names: Sequence[str], seed: int) -> tuple[Genome, list[Edit], list[str]]:
    """Apply those of some edits that fit, in order; return genome, recorded edits, descriptions."""
    genome, rng, recorded, told = base_genome(), Random(seed), [], []
    for name in names:
        edit = EDITS[name]
        try:
            parameters = edit.draw(genome, rng)
            after = edit.apply(genome, parameters)
        except EditFailed:
            continue
        told.append(edit.describe(genome, parameters))
        recorded.append(edit.recorded(parameters))
        genome = after
    return genome, recorded, told


def job_of(genome: Genome) -> set[str]:
    """Return what train.py reads of the job, calls its files, and does with the seed."""
    tree = ast.parse(genome.as_dict["train.py"])
    keys = {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Subscript)}
    files = {
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }
    seeding = {
        ast.unparse(node)
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and "seed" in ast.unparse(node.func)
    }
    return {
        *(key for key in keys if key.startswith("job[")),
        *(name for name in files if name.startswith(("model.", "progress."))),
        # A generator that is given the seed that torch has keeps to the job's.
        *(
            seeding
            - {"torch.initial_seed()", "torch.Generator().manual_seed(torch.initial_seed())"}
        ),
    }


lineages = st.lists(st.sampled_from(sorted(EDITS)), min_size=1, max_size=3, unique=True)


@given(names=lineages, seed=st.integers(0, 2**32))
@settings(deadline=None, max_examples=12)
def test_a_lineage_can_be_made_again_and_leaves_the_job_alone(names: list[str], seed: int) -> None:
    genome, recorded, told = composed(names, seed)
    again = base_genome()
    for line in recorded:
        again = EDITS[line.operator].apply(again, line.parameters)
    assert again == genome
    assert all(words and "\n" not in words for words in told)
    assert_parses(genome)
    assert job_of(genome) == job_of(base_genome())
    assert genome.as_dict.keys() == base_genome().as_dict.keys()


# --- a training script that somebody else wrote ---------------------------------------------------

# Other names, functions in another order, no annotations, batches drawn at the start of a step,
# the loss computed by the module's class, weights decaying by groups built in the call.
FOREIGN = '''
"""Somebody else's training loop."""
import json, os, sys, time
from math import cos, isfinite, pi
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
from safetensors.torch import save_file

from model import build_model

t0 = time.monotonic()
here = Path(sys.argv[1]).parent
job = json.loads(Path(sys.argv[1]).read_text())
cfg = json.loads(Path(__file__).with_name("settings.json").read_text())
block_size, limit = job["context_length"], job["budget_seconds"]
ctx = job["context_length"]
iters = job["max_steps"]
dest = here / job["out"]
seconds = job["budget_seconds"]
torch.manual_seed(job["seed"])
torch.set_num_threads(job["threads"])
data = np.fromfile(here / job["train"], dtype=f"<u{job['token_bytes']}").astype(np.int64)


def dump(net):
    save_file(net.state_dict(), dest / "model.tmp")
    os.replace(dest / "model.tmp", dest / "model.safetensors")


def log(it, value):
    entry = dict(step=it, loss=value if isfinite(value) else None)
    entry |= {"tokens": it * cfg["batch_size"] * cfg["accumulation_steps"] * ctx}
    with open(dest / "progress.jsonl", "a") as f:
        f.write(json.dumps(entry) + "\\n")


def lr_at(x):
    low, high, warm = cfg["final_rate_fraction"], 1.0, cfg["warmup_fraction"]
    if x < warm:
        return cfg["learning_rate"] * x / warm
    z = (x - warm) / (1 - warm)
    return cfg["learning_rate"] * (low + 0.5 * (high - low) * (cos(pi * z) + 1))


shape = {k: cfg[k] for k in ("n_layers", "n_heads", "width", "dropout", "bias", "tied_head")}
shape |= {"vocab_size": job["vocab_size"], "context_length": ctx}
(dest / "model.json").write_text(json.dumps(shape))
net = build_model(shape)


def make_opt(net):
    big = [p for p in net.parameters() if p.ndim > 1]
    small = [p for p in net.parameters() if p.ndim <= 1]
    return torch.optim.AdamW(
        [{"params": big, "weight_decay": cfg["weight_decay"]}, {"params": small}],
        lr=cfg["learning_rate"],
        betas=(cfg["beta1"], cfg["beta2"]),
        weight_decay=0.0,
    )


def sample():
    i = torch.randint(len(data) - ctx, (cfg["batch_size"],))
    rows = torch.stack([torch.from_numpy(data[j : j + ctx + 1]) for j in i])
    return rows[:, :-1], rows[:, 1:]


opt = make_opt(net)
done, it, saved = 0.0, 0, False
while True:
    for g in opt.param_groups:
        g["lr"] = lr_at(done)
    for _ in range(cfg["accumulation_steps"]):
        x, y = sample()
        scores = net(x)
        value = nn.functional.cross_entropy(scores.flatten(0, 1), y.flatten())
        (value / cfg["accumulation_steps"]).backward()
    torch.nn.utils.clip_grad_norm_(net.parameters(), max_norm=cfg["gradient_clip"])
    opt.step()
    opt.zero_grad()
    it += 1
    if iters is not None:
        done = it / iters
    else:
        done = min(1.0, (time.monotonic() - t0) / seconds)
    if not saved and time.monotonic() - t0 > 0.1 * seconds:
        dump(net)
        saved = True
    if it == iters or done >= 0.97:
        break
dump(net)
log(it, value.item())
'''


@pytest.fixture(scope="module")
def foreign() -> Genome:
    return base_genome().with_files({"train.py": FOREIGN})


def test_somebody_elses_training_keeps_the_contract(foreign: Genome, tmp_path: Path) -> None:
    assert_keeps_the_contract(trained(foreign, tmp_path), tmp_path)


@pytest.mark.parametrize("name", ON_TRAINING)
def test_an_edit_fits_a_training_loop_that_somebody_else_wrote(
    foreign: Genome, name: str, tmp_path: Path
) -> None:
    child = edited(foreign, name, seed=4)
    assert_keeps_the_contract(trained(child, tmp_path), tmp_path)


@pytest.mark.parametrize("seed", range(3))
def test_edits_compose_on_a_training_loop_that_somebody_else_wrote(
    foreign: Genome, seed: int, tmp_path: Path
) -> None:
    child, refused = foreign, []
    for name in one_of_each_kind(ON_TRAINING, Random(seed)):
        try:
            child = edited(child, name, seed)
        except EditFailed:
            refused.append(name)
    assert len(refused) <= 1, refused
    assert_keeps_the_contract(trained(child, tmp_path), tmp_path)
    assert progress_of(tmp_path)[-1]["tokens"] > 0
