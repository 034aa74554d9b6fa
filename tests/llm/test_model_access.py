"""What a run is told of its language models before it begins, and what it may cost."""

from __future__ import annotations

import math

import pytest

from darwin_exp import model_access, schema
from darwin_exp.config import PROJECT, ConfigError
from darwin_exp.genome import Genome
from darwin_exp.mutation.chunks import chunks_of
from darwin_exp.stub_llm.server import StubServer

BASE = Genome.from_folder(PROJECT / "trainer_base")


def config_of(form: schema.Form, base_url: str) -> schema.DarwinConfig:
    mutator = schema.OpenaiConfig(model="stub-careful", base_url=base_url, form=form)
    return schema.DarwinConfig(mutator=mutator)


def told_of(form: schema.Form) -> str:
    """Return what is announced before a run of ten individuals."""
    lines: list[str] = []
    with StubServer() as server:
        config = config_of(form, server.base_url)
        model_access.check(config, 10, BASE, lines.append, is_new=True)
    (line,) = lines
    return line


def test_the_estimate_of_a_rewrite_in_chunks_counts_every_chunk_that_is_to_be_expected() -> None:
    n_chunks = sum(chunk.is_editable for chunk in chunks_of(BASE))
    expected = math.ceil(0.4 * n_chunks)
    assert expected > 3
    assert f" {10 * expected} to {10 * 2 * (expected + 1)} calls, " in told_of(schema.Form.chunks)
    # A control: one call for each draft, and for each of a repair.
    assert " 10 to 40 calls, " in told_of(schema.Form.edits)


def test_a_mistyped_address_is_said_to_be_none_and_not_asked_for_a_price() -> None:
    config = config_of(schema.Form.edits, "127.0.0.1:8765/v1")
    config.llm.max_usd = 1.0
    with pytest.raises(ConfigError, match="is no address; write it like http://"):
        model_access.check(config, 10, BASE, print, is_new=True)
