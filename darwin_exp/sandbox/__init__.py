"""Places where training code that nobody has vouched for can run.

A `Sandbox` belongs to one slot. `process.py` forks candidates from a warm interpreter and
`bubblewrap.py` starts each in a container of its own; both share everything else:

- `launcher.py` is the first program inside, and hands over to genome code.
- `forkserver.py` is the warm interpreter, which forks one supervisor per launch.
- `supervision.py` watches one group of processes, freezes it, kills it, and outlives the harness
  just long enough to clean up.
- `confinement.py` is what holds a candidate: limits, an unprivileged user, a namespace.
- `workfolder.py` knows the files: what a candidate is given and what is taken from it.
- `group.py` is the harness's end of all this.
"""
