"""The comparison of runs: settings side by side, with mean, spread and n.

Reads: journals, through `Chronicle`, and nothing else.
Writes: comparison.json, comparison.md and curves.png.
Never: pools runs that were measured in different environments, or shows what was not measured as
a number.

`settings.py` finds out what differs, `comparison.py` holds the numbers (tests of significance are
to be built on its `Comparison`), `tables.py` and `curves.py` show them, and `closing.py` is what
happens at the end of a sweep.
"""

from darwin_exp.compare.comparison import (
    MEASURES,
    Cohort,
    Comparison,
    Measure,
    RunValues,
    Setting,
    Spread,
    compare,
)

__all__ = [
    "MEASURES",
    "Cohort",
    "Comparison",
    "Measure",
    "RunValues",
    "Setting",
    "Spread",
    "compare",
]
