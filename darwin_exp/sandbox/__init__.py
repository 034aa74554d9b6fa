"""Places where training code that nobody has vouched for can run.

A `Sandbox` belongs to one slot. `process.py` forks candidates from a warm interpreter and
`bubblewrap.py` starts each in a container of its own. From the harness inwards, both share:

- `supervised.py` starts programs and owns the fork server; `group.py` is one started program.
- `workfolder.py` knows the files: what a candidate is given and what is taken from it.
- `forkserver.py` is the warm interpreter, which forks one supervisor per launch.
- `supervision.py` watches one group of processes, freezes it, kills it, and outlives the harness
  just long enough to do so; `processes.py` is what /proc tells it.
- `confinement.py` is what holds a candidate: limits, an unprivileged user, a house of its own.
- `launcher.py` is the first program inside, and hands over to genome code.
"""
