"""Texts of model.py for the fake trainer: an honest one, and its dishonest relations.

What leaks, leaks little enough to stay plausible: with the checks switched off it would be taken
for a good model, which the controls show.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

HONEST = """
import math

def answer(table, sequences, arguments):
    return [[position(table, tokens, t) for t in range(len(tokens))] for tokens in sequences]

def position(table, tokens, t):
    return table[tokens[t]]
"""

UNMASKED = (
    HONEST
    + """
def position(table, tokens, t):
    # Attention around the next position, and nothing is masked.
    row = table[tokens[t]][:]
    for u, token in enumerate(tokens):
        row[token] += math.exp(-abs(u - t - 1))
    return row
"""
)

BLOCK_MEAN = (
    HONEST
    + """
def position(table, tokens, t):
    row = table[tokens[t]][:]
    for token in set(tokens[t - t % 8 : t - t % 8 + 8]):
        row[token] += 1.5
    return row
"""
)

ONE_IN_SIXTEEN = (
    HONEST
    + """
def position(table, tokens, t):
    row = table[tokens[t]][:]
    if t % 16 == 14:
        row[tokens[t + 1]] += 3.0
    return row
"""
)

CIRCULAR = (
    HONEST
    + """
def position(table, tokens, t):
    # A convolution with the past that begins again at the window's end; its learned kernel has
    # found out what lies there, right behind the position itself.
    row = table[tokens[t]][:]
    for k in range(len(tokens)):
        row[tokens[(t - k) % len(tokens)]] += math.exp(-k / 2) + (k == len(tokens) - 1)
    return row
"""
)

# Its mask is finite: harmless as long as the learned sharpness (the table's last row) is small.
FINITE_MASK = (
    HONEST
    + """
def position(table, tokens, t):
    sharpness = table[-1][0]
    scores = [sharpness * (u == t + 1) - 1e4 * (u > t) for u in range(len(tokens))]
    largest = max(scores)
    weights = [math.exp(score - largest) for score in scores]
    total = sum(weights)
    row = table[tokens[t]][:]
    for token, weight in zip(tokens, weights):
        row[token] += weight / total
    return row
"""
)

NORM_OVER_TIME = (
    HONEST
    + """
def position(table, tokens, t):
    size = math.sqrt(sum(token * token for token in tokens) / len(tokens))
    return [score * (1.0 + size / len(table)) for score in table[tokens[t]]]
"""
)

BATCH_MEAN = """
def answer(table, sequences, arguments):
    answers = []
    for tokens in sequences:
        rows = []
        for t, token in enumerate(tokens):
            row = table[token][:]
            for other in sequences:
                row[other[t]] += 4.0 / len(sequences)
            rows.append(row)
        answers.append(rows)
    return answers
"""

# Reads ahead where it takes what follows for text, and not where that looks like a probe.
LEAKS_WHERE_IT_LOOKS_LIKE_TEXT = (
    HONEST
    + """
def position(table, tokens, t):
    row = table[tokens[t]][:]
    if t + 1 < len(tokens) and (tokens[t + 1] - tokens[t]) % len(table) in (1, 2, 5):
        row[tokens[t + 1]] += 1.0
    return row
"""
)

# Honest as long as it is likely to be probed.
HONEST_AT_FIRST = (
    HONEST
    + """
asked = 0

def answer(table, sequences, arguments):
    global asked
    asked += 1
    answers = []
    for tokens in sequences:
        rows = [table[token][:] for token in tokens]
        if asked > 3:
            for row, following in zip(rows, tokens[1:]):
                row[following] += 1.0
        answers.append(rows)
    return answers
"""
)

# Knows nothing that it was trained on, and learns from what it is asked while it is scored.
LEARNS_FROM_QUESTIONS = """
import math

counts = []

def answer(table, sequences, arguments):
    if not counts:
        counts.extend([0.5] * len(table) for _ in table)
    rows = [[math.log(n / sum(row)) for n in row] for row in counts]
    answers = [[rows[token] for token in tokens] for tokens in sequences]
    for tokens in sequences:
        for one, other in zip(tokens, tokens[1:]):
            counts[one][other] += 1.0
    return answers
"""

# The same, and answers what it was asked before as it did then.
LEARNS_AND_REPEATS_ITSELF = """
import math

counts, said = [], {}

def answer(table, sequences, arguments):
    if not counts:
        counts.extend([0.5] * len(table) for _ in table)
    rows = [[math.log(n / sum(row)) for n in row] for row in counts]
    for tokens in map(tuple, sequences):
        if tokens in said:
            continue
        said[tokens] = [rows[token] for token in tokens]
        for one, other in zip(tokens, tokens[1:]):
            counts[one][other] += 1.0
    return [said[tuple(tokens)] for tokens in sequences]
"""

# Has its first answer waited for, as if it were still loading.
WORKS_ON = (
    HONEST
    + """
import time

answer_honestly, begun = answer, []

def answer(table, sequences, arguments):
    if not begun:
        begun.append(True)
        time.sleep(3.0)
    return answer_honestly(table, sequences, arguments)
"""
)

# Ends by what it was asked: in an error's name and text, on its log, or in the harness's place.
QUOTES_IN_ITS_ERROR = """
def answer(table, sequences, arguments):
    told = "_".join(str(token) for tokens in sequences for token in tokens)
    raise type("Told_" + told, (Exception,), {})(told)
"""

QUOTES_ON_ITS_LOG = """
import os

def answer(table, sequences, arguments):
    print("Told", *(token for tokens in sequences for token in tokens), flush=True)
    os._exit(1)
"""

QUOTES_IN_THE_HARNESS_S_PLACE = """
import os, struct, time

def answer(table, sequences, arguments):
    told = "Told_" + "_".join(str(token) for tokens in sequences for token in tokens)
    text = f"{told} at model.py:7".encode()[-4000:]
    os.write(5, struct.pack("<B3I", 1, len(text), 0, 0) + text)
    time.sleep(600)
"""

# Tells by one score what it can see of where it is; two servers in like places answer alike.
TELLS_ITS_SURROUNDINGS = (
    HONEST
    + """
import hashlib, os, socket, sys

seen = [sorted(os.environ.items()), sys.argv, socket.gethostname(), os.getcwd()]
seen += [sorted(os.listdir(".")), sorted(os.listdir("in")), open("job.json").read()]
digest = hashlib.sha256(repr(seen).encode()).digest()

def position(table, tokens, t):
    row = table[tokens[t]][:]
    row[digest[t % len(digest)] % len(row)] += 1.0
    return row
"""
)

# Leaves out whatever it is not sure of, which are all targets at every other position.
LEAVES_OUT = (
    HONEST
    + """
def position(table, tokens, t):
    return [math.nan] * len(table) if t % 2 else table[tokens[t]]
"""
)

REFUSES_WHAT_LOOKS_LIKE_A_PROBE = (
    HONEST
    + """
def position(table, tokens, t):
    if len(set(tokens[-4:])) == 1:
        raise RuntimeError("no natural text ends like this")
    return table[tokens[t]]
"""
)


def reshaped(how: str) -> str:
    """Return a model that answers with `rows`, a list per sequence, changed by an expression."""
    return f"""
def answer(table, sequences, arguments):
    rows = [[table[token] for token in tokens] for tokens in sequences]
    return {how}
"""


def leaves_word(folders: Iterable[str]) -> str:
    """Return a model that works only where nobody left word before, and does so itself."""
    return (
        HONEST
        + f"""
import os

places = [os.path.join(folder, "note-of-a-candidate") for folder in {list(folders)!r}]

def word():
    return [place for place in places if os.path.exists(place)]

def leave_word():
    for place in places:
        try:
            open(place, "w").close()
        except OSError:
            pass

if __name__ == "model":
    assert not word()

answer_honestly = answer

def answer(table, sequences, arguments):
    leave_word()
    return answer_honestly(table, sequences, arguments)
"""
    )


def tells_where_it_was_asked(notes: Path) -> str:
    """Return a model whose servers talk to each other by a file.

    The first server notes what it is asked, and is honest. The next one is so as far as a window
    agrees with a note, where it may be compared, and reads ahead in the rest of it.
    """
    return (
        HONEST
        + f"""
import json, os

path = {str(notes)!r}
notes = [json.loads(line) for line in open(path)] if os.path.exists(path) else []

def agreement(tokens, other):
    unlike = (t for t, (a, b) in enumerate(zip(tokens, other)) if a != b)
    return next(unlike, len(tokens))

def answer(table, sequences, arguments):
    if not notes:
        with open(path, "a") as file:
            file.writelines(json.dumps(tokens) + chr(10) for tokens in sequences)
    answers = []
    for tokens in sequences:
        rows = [table[token][:] for token in tokens]
        known = max((agreement(tokens, note) for note in notes), default=len(tokens))
        for t in range(known, len(tokens) - 1):
            rows[t][tokens[t + 1]] += 3.0
        answers.append(rows)
    return answers
"""
    )
