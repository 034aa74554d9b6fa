"""Multiplies matrices for a while and says how fast: harness code, run as a script by `mfu`.

Reads: one JSON argument (threads, cpus, device, seconds), and a line that says go.
Writes: one JSON line with the device's name once it is warm, one with FLOP/s by number type.
Never: runs while a candidate trains.
"""

from __future__ import annotations

import json
import os
import sys
import time

SIZES = {"cpu": (256, 512, 1024, 2048), "cuda": (2048, 4096, 8192)}
LONGEST_PRODUCT_SECONDS = 0.1  # larger sizes are left out where one product takes longer


def main() -> None:
    """Measure float32 and bfloat16, each at several sizes, and print the highest rate of each."""
    wanted = json.loads(sys.argv[1])
    os.sched_setaffinity(0, wanted["cpus"])
    import torch

    torch.set_num_threads(wanted["threads"])
    torch.set_float32_matmul_precision("high")
    device = wanted["device"]
    name = torch.cuda.get_device_name() if device == "cuda" else "cpu"

    def wait() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    def rate(size: int, dtype: torch.dtype, repeats: int) -> float:
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        torch.mm(a, b)
        wait()
        before = time.perf_counter()
        for _ in range(repeats):
            torch.mm(a, b)
        wait()
        return 2.0 * size**3 * repeats / (time.perf_counter() - before)

    rate(256, torch.float32, 1)
    print(json.dumps({"device_name": name}), flush=True)
    if not sys.stdin.readline():
        return
    highest: dict[str, float] = {}
    for dtype in (torch.float32, torch.bfloat16):
        end = time.perf_counter() + wanted["seconds"]
        sizes, best = list(SIZES[device]), 0.0
        while time.perf_counter() < end:
            for size in list(sizes):
                found = rate(size, dtype, repeats=3)
                best = max(best, found)
                if 2.0 * size**3 / found > LONGEST_PRODUCT_SECONDS:
                    del sizes[sizes.index(size) :]
                    sizes = sizes or [SIZES[device][0]]
                    break
        highest[str(dtype).removeprefix("torch.")] = best
    print(json.dumps(highest), flush=True)


if __name__ == "__main__":
    main()
