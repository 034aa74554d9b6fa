"""A harness that starts a candidate with a daemon, says so, and waits to be killed.

Run as `lone_harness.py KIND`; when the candidate is ready, prints the fork server's id and the
folder in which all happens.
"""

import sys
import time

from darwin_exp.individual import Genome
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

kind = {"process": ProcessSandbox, "bubblewrap": BubblewrapSandbox}[sys.argv[1]]
sandbox = kind(0, (0,), 64_000, modules=())
genome = Genome.of({"train.py": TRAIN, "model.py": ""})
group = sandbox.start(Launch("orphan", Zone.TRAIN, genome, {}, {}, Limits()))
time.sleep(0.3)
print(sandbox._fork_server.pid, sandbox._root.path, flush=True)
time.sleep(600)
