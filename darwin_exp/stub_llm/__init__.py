"""A stand-in for language models: a server of hand-written answers on the loopback interface.

Every answer in this package was written by hand, by the people who wrote the harness. No language
model is behind any of them, and a run that uses them says nothing about what language models would
achieve. They are there to try a run with language models end to end without a key or a bill, and
to test the harness over the real wire protocol: good changes, useless ones, answers that cannot be
read, refusals, code that crashes, repairs that help and repairs that do not.

Reads: the prompts that it is sent.
Writes: answers, made from the files that stand in a prompt, so that they fit evolved code too.
Never: opens a connection of its own, runs code, or draws a random number of its own accord: an
answer depends on the messages, the model's name and the seed.

`python -m darwin_exp.stub_llm` starts it; tests use `StubServer`.
"""

from darwin_exp.stub_llm.answers import Answer, Completion, Kind
from darwin_exp.stub_llm.choosing import ANSWERS, MODELS, Author
from darwin_exp.stub_llm.faults import Fault
from darwin_exp.stub_llm.server import Received, StubServer

__all__ = [
    "ANSWERS",
    "MODELS",
    "Answer",
    "Author",
    "Completion",
    "Fault",
    "Kind",
    "Received",
    "StubServer",
]
