"""What a reader would not see: told apart from what can be seen, and spelt out.

Reads: text of anybody. Writes: nothing.
Never: leaves a letter as it is that a computer heeds and a reader would miss.
"""

from __future__ import annotations

import re
import unicodedata
from functools import lru_cache

MOST_BLANKS = 40  # columns that a line may leave empty at one place
TAB_WIDTH = 8
_HOLLOW = (  # letters and marks by their category, but drawn as nothing, or as a gap
    (0x034F, 0x034F),
    (0x115F, 0x1160),
    (0x17B4, 0x17B5),
    (0x180B, 0x180F),
    (0x2800, 0x2800),
    (0x3164, 0x3164),
    (0xFE00, 0xFE0F),
    (0xFFA0, 0xFFA0),
    (0x16FE4, 0x16FE4),
    (0x1D159, 0x1D159),
    (0xE0100, 0xE01EF),
)
# The first letter of a line stays: in a patch it is the sign, which may be a space.
_BLANKS = re.compile(rf"(?<=.)[ \t]{{{MOST_BLANKS // TAB_WIDTH + 1},}}")


def is_unseen(letter: str) -> bool:
    """Tell whether a letter is drawn as nothing, as a gap, or moves others about.

    The plain space is seen; every other space would be taken for it.
    """
    kind = unicodedata.category(letter)
    if kind[0] in "CZ":
        return letter != " "
    return any(first <= ord(letter) <= last for first, last in _HOLLOW)


def visible(text: str) -> str:
    """Return text in which what a reader would not see, or see out of order, is spelt out.

    Line feeds and tabs stay. Control characters, marks of direction, fillers and odd spaces can
    make code read as something else than it is.
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(map(_spelt, text))


def spelt_out(text: str) -> str:
    """Return visible text in which no run of blanks is so long that it hides what follows it."""
    return _BLANKS.sub(_counted, visible(text))


@lru_cache(maxsize=4096)
def _spelt(letter: str) -> str:
    return f"⟨U+{ord(letter):04X}⟩" if letter not in "\n\t" and is_unseen(letter) else letter


def _counted(blanks: re.Match[str]) -> str:
    run = blanks[0]
    if len(run.expandtabs(TAB_WIDTH)) <= MOST_BLANKS:
        return run
    kinds = [name for blank, name in ((" ", "spaces"), ("\t", "tabs")) if blank in run]
    return f"⟨{len(run)} {' and '.join(kinds)}⟩"
