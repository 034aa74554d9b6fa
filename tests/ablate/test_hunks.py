"""Hunks put together make the champion, and none of them the base."""

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from darwin_exp.ablate.hunks import Hunk, hunks_between, with_hunks
from darwin_exp.individual import Genome

NEEDED = {"train.py": "", "model.py": ""}
LINES = st.lists(st.sampled_from(["a\n", "b\n", "c\n", "\n", "\f\n"]), max_size=30)
TEXTS = st.builds(lambda lines, end: "".join(lines) + end, LINES, st.sampled_from(["", "end"]))
TREES = st.dictionaries(
    st.sampled_from(["train.py", "model.py", "new.py", "empty.py"]), TEXTS, max_size=4
).map(lambda files: Genome.of({**NEEDED, **files}))


@settings(max_examples=60, deadline=None)
@given(base=TREES, champion=TREES, seed=st.integers(0, 99))
def test_all_hunks_make_the_champion_in_any_order_and_none_the_base(
    base: Genome, champion: Genome, seed: int
) -> None:
    hunks = hunks_between(base, champion)
    random.Random(seed).shuffle(hunks)
    assert with_hunks(base, hunks) == champion
    assert with_hunks(base, []) == base
    assert (hunks == []) == (base == champion)


@settings(max_examples=60, deadline=None)
@given(base=TREES, champion=TREES)
def test_every_hunk_makes_a_difference_of_its_own(base: Genome, champion: Genome) -> None:
    hunks = hunks_between(base, champion)
    for hunk in hunks:
        assert with_hunks(base, [one for one in hunks if one != hunk]) != champion
        assert with_hunks(base, [hunk]) != base


@settings(max_examples=60, deadline=None)
@given(base=TREES, champion=TREES)
def test_a_patch_is_cut_where_the_patch_of_the_champion_is(base: Genome, champion: Genome) -> None:
    cut = [hunk.header for hunk in hunks_between(base, champion) if not hunk.whole_file]
    patch = champion.patch_from(base).splitlines()
    headers = [line for line in patch if line.startswith("@@ ")]
    whole = [hunk for hunk in hunks_between(base, champion) if hunk.whole_file and _size(hunk)]
    assert len(headers) == len(cut) + len(whole)
    assert set(cut) <= set(headers)


def test_a_file_that_comes_or_goes_is_one_hunk() -> None:
    base = Genome.of({**NEEDED, "old.py": "x = 1\n"})
    champion = Genome.of({**NEEDED, "new.py": ""})
    hunks = {hunk.whole_file: hunk for hunk in hunks_between(base, champion)}
    assert set(hunks) == {"new", "deleted"}
    assert "new.py" in with_hunks(base, [hunks["new"]]).as_dict
    assert "old.py" not in with_hunks(base, [hunks["deleted"]]).as_dict


def _size(hunk: Hunk) -> int:
    return len(hunk.lines) + hunk.end - hunk.start
