"""Answers on the channel as the real model server would, but without a model."""

import json
import os
import time


def serve(job, folder, reader, writer):
    """Obey job["manner"]: echo, say where it is, be silent, raise, or end half-way."""
    manner = job["manner"]
    if manner == "raise":
        raise RuntimeError("the model would not load")
    if manner == "silent":
        time.sleep(600)
    if manner == "half":
        writer.write(b"12345")
        return
    if manner == "inputs":
        names = sorted(os.listdir(folder / "in"))
        writer.write(json.dumps({"in": names, "cwd": os.getcwd()}).encode().ljust(200))
        return
    while header := reader.read(8):
        length = int.from_bytes(header, "little")
        writer.write(reader.read(length))
        writer.flush()
