"""DARWIN evolves GPT training code and measures what it gained."""

import sys
from pathlib import Path

# People keep a folder called data where they work; this checkout's package of that name must win.
_CHECKOUT = str(Path(__file__).resolve().parent.parent)
if sys.path[:1] != [_CHECKOUT]:
    sys.path.insert(0, _CHECKOUT)
