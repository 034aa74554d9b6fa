"""Model FLOPs utilisation: the one rule for FLOPs, the rate of a re-timing, the peak of a machine.

Reads: tensor sizes from a checkpoint's header, claims of what is multiplied, harness timings.
Writes: peaks.json in a cache folder.
Never: compares utilisations that were measured against different peaks.

**The rule.** FLOPs per token of training =

    6 x the elements of every matrix that takes part in a matrix product,
        times the rows of activations per token that it is multiplied with (uses per token),
    + 3 x the forward FLOPs per token of the products of two activations (attention).

A product of m x k and k x n takes 2 m k n FLOPs; its backward pass takes two such products, which
makes 6 per element and row, and 3 times the forward pass. So:

- A tensor that takes part in no matrix product counts nothing: an embedding that is looked up,
  positions, norms, biases, whatever lies unused in the checkpoint. A tied head counts once.
- A matrix used twice per token counts twice, one used for every second token half.
- A matrix from which the logits have no gradient counts nothing, whatever it is multiplied with.
- A convolution's kernel counts as a matrix used once per output position.
- Attention counts with its whole score matrix at the job's context length, causal or not, as the
  published figures of language models do.
- Optimizer, norms, softmax and recomputation count nothing.

Sizes are taken from the checkpoint's header. How often a matrix is used is the model process's
word; a rate that this inflates is quarantined once it exceeds the peak.

Source: Chowdhery et al. 2022, "PaLM", appendix B, for MFU and for counting attention in full.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import platform
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from darwin_exp.evaluation.checkpoint import TensorEntry
from darwin_exp.individual import TrainingRun
from darwin_exp.protocols import InfrastructureFailure

# Per token; beyond these a claim is nonsense.
MAX_USES = 1e6
MAX_ACTIVATION_FLOPS = 1e18

# Dense peaks of tensor cores with float32 accumulation, in FLOP/s, without sparsity.
# Source: NVIDIA's data sheets of A100, H100, H200, HGX B200, L4, L40S, A10, T4 and V100, and its
# white papers on Ada (GeForce RTX 4090) and on GA102 (GeForce RTX 3090).
KNOWN_GPUS: tuple[tuple[str, str, float], ...] = (
    (r"\bB200\b", "bfloat16", 2250e12),
    (r"\bH200 NVL\b", "bfloat16", 835e12),
    (r"\bH200\b", "bfloat16", 989e12),
    (r"\bH100 PCIe\b", "bfloat16", 756e12),
    (r"\bH100 NVL\b", "bfloat16", 835e12),
    (r"\bH100\b", "bfloat16", 989e12),
    (r"\bA100\b", "bfloat16", 312e12),
    (r"\bA10\b", "bfloat16", 125e12),
    (r"\bL40S\b", "bfloat16", 362e12),
    (r"\bL4\b", "bfloat16", 121e12),
    (r"\bRTX 4090$", "bfloat16", 165.2e12),
    (r"\bRTX 3090$", "bfloat16", 71e12),
    (r"\bV100-PCIE\b", "float16", 112e12),
    (r"\bV100\b", "float16", 125e12),
    (r"\bT4\b", "float16", 65e12),
)


# --- FLOPs per token ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Uses:
    """What one forward pass multiplies, as the model's process tells it.

    Attributes:
        per_token: rows of activations per token that each weight is multiplied with.
        activation_flops: forward FLOPs per token of products of two activations.
    """

    per_token: Mapping[str, float]
    activation_flops: float

    @classmethod
    def parse(cls, content: Mapping[str, Any], n_tokens: int) -> Uses:
        """Read what the model server said of a pass over so many tokens.

        Raises:
            ValueError: it is not of the expected form, or not plausible.
        """
        rows: Any = content.get("rows")
        flops: Any = content.get("activation_flops")
        if not isinstance(rows, dict) or not _is_amount(flops, MAX_ACTIVATION_FLOPS * n_tokens):
            raise ValueError("the model's process told nothing usable about its products")
        if not all(_is_amount(count, MAX_USES * n_tokens) for count in rows.values()):
            raise ValueError("the model's process told an impossible number of uses")
        return cls({k: count / n_tokens for k, count in rows.items()}, flops / n_tokens)


def flops_per_token(tensors: Mapping[str, TensorEntry], uses: Uses) -> float:
    """Return the FLOPs that training takes per token, by the rule of this module."""
    matrices = sum(
        tensors[name].n_elements * count
        for name, count in uses.per_token.items()
        if name in tensors
    )
    return 6.0 * matrices + 3.0 * uses.activation_flops


def _is_amount(value: Any, limit: float) -> bool:
    # An integer may be beyond every float, which only comparisons survive.
    return type(value) in (int, float) and 0 <= value <= min(limit, sys.float_info.max)


# --- the rate of a re-timing ----------------------------------------------------------------------


def retimed_rate(short: TrainingRun, long: TrainingRun) -> float:
    """Return tokens per second from two runs of the same genome with different `max_steps`.

    The slope between them leaves out what both spent on starting, compiling and saving.

    Raises:
        ValueError: one left no count of its tokens, or the longer one did not train for longer.
    """
    if short.tokens_claimed is None or long.tokens_claimed is None:
        raise ValueError("a re-timing needs the token counts of both runs")
    tokens = long.tokens_claimed - short.tokens_claimed
    seconds = long.training_seconds - short.training_seconds
    if tokens <= 0 or seconds <= 0:
        raise ValueError(f"{tokens} more tokens in {seconds:.3f} more seconds give no rate")
    return tokens / seconds


# --- the peak of a machine ------------------------------------------------------------------------


@dataclass(frozen=True)
class Peak:
    """The highest rate of matrix products that one slot can reach.

    Attributes:
        dtype: the number type that reaches it.
        flops: FLOP/s.
        measured: here, on this machine; False where it comes from a data sheet.
    """

    dtype: str
    flops: float
    measured: bool = True


def measure_peak(
    threads: int,
    slots: Sequence[tuple[int, ...]],
    device: str = "cpu",
    seconds: float = 1.5,
) -> Peak:
    """Measure matrix products on all slots at once, as a run will load them; return the highest.

    Args:
        threads: compute threads of each slot.
        slots: the CPUs of each slot.
        device: "cpu" or "cuda"; a GPU in the table is not measured.
        seconds: how long each number type is measured.

    Raises:
        InfrastructureFailure: the measurement failed, or there is no such device or no slot.
        OSError: the probes could not be started or spoken to.
    """
    if not slots:
        raise InfrastructureFailure("the peak could not be measured: there is no slot")
    probes: list[_Probe] = []
    try:
        probes.extend(_Probe(threads, cpus, device, seconds) for cpus in slots)
        names = [probe.ready() for probe in probes]
        if (known := known_peak(names[0])) is not None:
            return known
        for probe in probes:
            probe.start()
        rates = [probe.rates() for probe in probes]
    finally:
        for probe in probes:
            probe.close()
    highest = max((flops, dtype) for rate in rates for dtype, flops in rate.items())
    if not 0 < highest[0] < math.inf:
        raise InfrastructureFailure(f"the peak could not be measured: {highest[0]} FLOP/s")
    return Peak(highest[1], highest[0])


def known_peak(device_name: str) -> Peak | None:
    """Return the data sheet's peak of a GPU by the name that its driver gives it."""
    for pattern, dtype, flops in KNOWN_GPUS:
        if re.search(pattern, device_name):
            return Peak(dtype, flops, measured=False)
    return None


def load_or_measure_peak(
    cache_folder: Path,
    threads: int,
    slots: Sequence[tuple[int, ...]],
    device: str = "cpu",
) -> Peak:
    """Return this machine's peak, measured once per machine, thread count and number of slots.

    Two runs that start together measure one after the other and not against each other.

    Raises:
        InfrastructureFailure: as `measure_peak`.
        OSError: as `measure_peak`, or the cache cannot be written.
    """
    cache_folder.mkdir(parents=True, exist_ok=True)
    key = " | ".join(
        [
            device,
            _cpu_model(),
            f"{os.cpu_count()} cores",
            f"torch {version('torch')}",
            f"{threads} threads",
            f"{len(slots)} slots",
        ]
    )
    path = cache_folder / "peaks.json"
    with (cache_folder / "peaks.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        peaks = _read_peaks(path)
        if key in peaks:
            return peaks[key]
        peaks[key] = measure_peak(threads, slots, device)
        text = json.dumps({name: asdict(peak) for name, peak in peaks.items()}, indent=2)
        with tempfile.NamedTemporaryFile(
            "w", dir=cache_folder, prefix="peaks.", suffix=".unfinished", delete=False
        ) as file:
            file.write(text + "\n")
        os.replace(file.name, path)
        return peaks[key]


def _read_peaks(path: Path) -> dict[str, Peak]:
    """Read the cache; one that is missing or damaged is measured again."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        peaks = {key: Peak(**entry) for key, entry in content.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}
    return {k: p for k, p in peaks.items() if _is_amount(p.flops, math.inf) and p.flops > 0}


def _cpu_model() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        text = ""
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return found.group(1).strip() if found else platform.processor() or platform.machine()


class _Probe:
    """One subprocess that multiplies matrices on one slot's CPUs."""

    def __init__(self, threads: int, cpus: tuple[int, ...], device: str, seconds: float) -> None:
        script = Path(__file__).with_name("peak_probe.py")
        wanted = json.dumps(
            {"threads": threads, "cpus": cpus, "device": device, "seconds": seconds}
        )
        self._process = subprocess.Popen(
            [sys.executable, "-I", str(script), wanted],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def ready(self) -> str:
        """Wait until it is warm and return the device's name."""
        return str(self._line()["device_name"])

    def start(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write("go\n")
        self._process.stdin.flush()

    def rates(self) -> dict[str, float]:
        """Return the FLOP/s of each number type."""
        return {str(dtype): float(flops) for dtype, flops in self._line().items()}

    def _line(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        assert self._process.stderr is not None
        line = self._process.stdout.readline()
        if not line:
            last = self._process.stderr.read().strip().splitlines()[-1:]
            raise InfrastructureFailure(f"the peak could not be measured: {' '.join(last)}")
        try:
            content: dict[str, Any] = json.loads(line)
        except ValueError:
            raise InfrastructureFailure("the peak's probe printed what is no JSON") from None
        return content

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()
