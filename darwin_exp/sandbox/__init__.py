"""Places where training code that nobody has vouched for can run.

A `Sandbox` belongs to one slot. `process.py` forks candidates from a warm interpreter, and
`bubblewrap.py` starts each in a house of namespaces. From the harness inwards, both share:

- `supervised.py` starts programs and owns the fork server; `group.py` is one started program.
- `forkserver.py` is the warm interpreter, which forks one supervisor per launch.
- `supervision.py` watches one group of processes, freezes it, kills it, and outlives the harness
  just long enough to do so; `processes.py` is what /proc tells it.
- `confinement.py` is what holds a candidate: limits, an unprivileged user, a house of its own.

`docker.py` has a container engine do all that. From the harness inwards:

- `trial.py` finds out beforehand whether the engine can hold a candidate as it shall.
- `container.py` is one started program; `stream.py` is what it prints and answers; `taking.py` is
  what it leaves, and `ending.py` how it ended.
- `engine.py` speaks with the engine, through `engine_calls.py`; `archive.py` reads the files that
  it hands out.
- `profile.py` is what holds a candidate; `cgroup.py` is what the kernel tells of it.
- `keeper.py` is the first program inside, which ends when the harness does.
- `reaping.py` removes what harnesses left that were killed before they could.

All three share `workfolder.py`, which knows the files (what a candidate is given, what is taken
from it), and `launcher.py`, which hands over to genome code.
"""
