"""What a reader would not see is spelt out, and what can be read stays as it is."""

from __future__ import annotations

import unicodedata

import pytest

from darwin_exp.unseen import is_unseen, spelt_out, visible

HIDDEN = (
    *(0x00A0, 0x00AD, 0x034F, 0x115F, 0x1160, 0x1680, 0x17B4, 0x180B, 0x180F, 0x2003, 0x200B),
    *(0x2028, 0x2029, 0x202E, 0x202F, 0x2060, 0x2800, 0x3000, 0x3164, 0xFE00, 0xFE0F, 0xFEFF),
    *(0xFFA0, 0x1D159, 0x1D173, 0xE0001, 0xE0100, 0xE01EF, 0x0000, 0x001B, 0x007F, 0x0085),
)
SEEN = "x = 'é e\u0301 漢字 한글 ß Ω ж 🙂 ⟨ … €'  # и так далее"


@pytest.mark.parametrize("number", HIDDEN, ids=lambda number: f"{number:04X}")
def test_g5_what_would_not_be_seen_is_spelt_out(number: int) -> None:
    shown = visible(f"a{chr(number)}b")
    assert shown == f"a⟨U+{number:04X}⟩b"
    assert visible(shown) == shown


def test_g5_every_space_but_the_plain_one_is_spelt_out() -> None:
    spaces = [chr(n) for n in range(0x110000) if unicodedata.category(chr(n))[0] == "Z"]
    assert [one for one in spaces if not is_unseen(one)] == [" "]


def test_g5_control_what_can_be_read_stays() -> None:
    assert visible(SEEN) == SEEN
    assert visible("if x:\n\treturn 1\n") == "if x:\n\treturn 1\n"


def test_g5_a_gap_that_hides_what_follows_it_is_counted() -> None:
    assert spelt_out("x = 1" + 400 * " " + "; evil()") == "x = 1⟨400 spaces⟩; evil()"
    assert spelt_out("x" + 8 * "\t" + "y") == "x⟨8 tabs⟩y"
    assert spelt_out("x" + 8 * "\t " + "y") == "x⟨16 spaces and tabs⟩y"
    assert spelt_out("\n" + 90 * " " + "y") == "\n ⟨89 spaces⟩y", "the first may be a patch's sign"
    assert spelt_out("x" + 60 * "\u00a0") == "x" + 60 * "⟨U+00A0⟩"


def test_g5_control_an_indented_line_stays() -> None:
    text = "def f(a,\n" + 30 * " " + "b):\n\t\t\treturn a + b" + 30 * " " + "# why\n"
    assert spelt_out(text) == text
