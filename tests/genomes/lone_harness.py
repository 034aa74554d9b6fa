"""A harness that starts a candidate with a daemon, says so, and waits to be killed.

Run as `lone_harness.py KIND`; when the candidate is ready, prints the fork server's id and the
folder in which all happens. As `lone_harness.py docker IMAGE ZONE`, the container's name and the
folder.
"""

import sys
import time
from pathlib import Path

from darwin_exp.individual import Genome, SandboxSpec
from darwin_exp.protocols import Launch, Limits, Zone
from darwin_exp.sandbox.bubblewrap import BubblewrapSandbox
from darwin_exp.sandbox.process import ProcessSandbox

TRAIN = """
import os, signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
if os.fork() == 0:
    os.setsid()
    if os.fork() != 0:
        os._exit(0)
while True:
    time.sleep(0.1)
"""

kind, zone = sys.argv[1], Zone.TRAIN
if kind == "docker":
    from darwin_exp.sandbox.docker import DockerSandbox

    zone = Zone(sys.argv[3])
    server = Path(__file__).with_name("echo_server.py")
    sandbox = DockerSandbox(0, (0,), SandboxSpec(kind, image=sys.argv[2]), server, modules=())
else:
    chosen = {"process": ProcessSandbox, "bubblewrap": BubblewrapSandbox}[kind]
    sandbox = chosen(0, (0,), 64_000, modules=())
genome = Genome.of({"train.py": TRAIN, "model.py": ""})
group = sandbox.start(Launch("orphan", zone, genome, {}, {"manner": "silent"}, Limits()))
time.sleep(0.3)
print(group.name if kind == "docker" else sandbox._fork_server.pid, sandbox._root.path, flush=True)
time.sleep(600)
