"""A mutator that asks language models: any that speak the interface, a different one per agent.

Reads: edit requests, failed rewrites, and the answers of `LanguageModels`.
Writes: nothing; questions and answers are remembered where they are asked.
Never: uses a part of an answer, keeps a state of its own, or pays for a question twice. A draft
that follows an objection asks the earlier questions again, which are remembered, and goes on from
there; so a resumed run walks the same way.
"""

from __future__ import annotations

from collections.abc import Mapping
from random import Random
from typing import Any

from darwin_exp.individual import Edit, Genome, JobResult, ModelSpec, Proposal, Reason
from darwin_exp.mutation.answer import MOST_SUMMARY, Answer, read_answer, schema_of
from darwin_exp.mutation.chunks import Chunk, chunks_of, replaced
from darwin_exp.mutation.fitting import Tokens
from darwin_exp.mutation.prompt import (
    Surroundings,
    chunk_prompt,
    draft_prompt,
    objection_messages,
    repair_prompt,
)
from darwin_exp.mutation.quoting import one_line
from darwin_exp.mutation.rewriting import FileEdit, apply
from darwin_exp.protocols import (
    EditFailed,
    EditRequest,
    Finish,
    LanguageModels,
    Message,
    Query,
    Reply,
)

MUTATOR_FORMS = ("edits", "rewrite", "chunks", "text")
_MOST_OLD_SUMMARY = 120  # characters of it that a repair's summary begins with


class LanguageModelMutator:
    """Has language models rewrite code, and mend what they broke.

    Args:
        models: chooses a model for each rewrite, and asks it.
        about: what is the same for every rewrite of the run.
        form: "edits" (search and replace), "rewrite" (whole files), "chunks" (classes, functions
            and statements one by one) or "text" (edits without JSON). Repairs are always edits.
        chunk_probability: with which each chunk is edited; imports never are, and at least one
            other chunk always is.
        max_drafts: drafts for one individual, objections included.
        prompt_tokens: of the first question. An objection adds up to about 4,000 for the earlier
            answer and what was wrong with it.
        answer_tokens: longest answer.
        count: counts tokens.

    Raises:
        ValueError: the form is unknown, or one of the numbers is impossible; it names which.
    """

    trusted = False

    def __init__(
        self,
        models: LanguageModels,
        about: Surroundings,
        form: str,
        chunk_probability: float,
        max_drafts: int,
        prompt_tokens: int,
        answer_tokens: int,
        count: Tokens,
    ) -> None:
        if form not in MUTATOR_FORMS:
            raise ValueError(f"mutator.form is one of {', '.join(MUTATOR_FORMS)}, not {form!r}")
        if not 0 <= chunk_probability <= 1:
            raise ValueError(
                f"mutator.chunk_probability lies between 0 and 1, not at {chunk_probability}"
            )
        for name, number in (
            ("max_drafts", max_drafts),
            ("prompt_tokens", prompt_tokens),
            ("answer_tokens", answer_tokens),
        ):
            if number < 1:
                raise ValueError(f"mutator.{name} must be at least 1, not {number}")
        self.max_drafts = max_drafts
        self._models = models
        self._about = about
        self._form = form
        self._chunk_probability = chunk_probability
        self._prompt_tokens = prompt_tokens
        self._answer_tokens = answer_tokens
        self._count = count

    def propose(self, request: EditRequest, rng: Random) -> Proposal:
        """Have a model rewrite the parent's code.

        Raises:
            EditFailed: the answer cannot be used, or the code is too long to be asked about.
            Stopped, ModelsUnavailable, Interrupted: as `LanguageModels.ask` says.
        """
        model = self._models.choose(request)
        if self._form == "chunks":
            return self._propose_chunks(request, model, rng)
        prompt = draft_prompt(request, self._about, self._form, self._prompt_tokens, self._count)
        key, answer = self._converse(request, "draft", model, prompt.messages, self._form)
        genome = apply(request.parent.genome, answer.changes)
        parameters = {"exchange": key}
        return _proposal(request, model, genome, [answer], parameters)

    def repair(
        self, request: EditRequest, failed: Proposal, failure: JobResult, rng: Random
    ) -> Proposal:
        """Have a model mend code that failed, by edits of it.

        Raises:
            EditFailed: the answer cannot be used, or the code is too long to be asked about.
            Stopped, ModelsUnavailable, Interrupted: as `LanguageModels.ask` says.
        """
        model = self._models.choose(request)
        form = "text" if self._form == "text" else "edits"
        prompt = repair_prompt(
            request, failed, failure, self._about, form, self._prompt_tokens, self._count
        )
        key, answer = self._converse(request, "repair", model, prompt.messages, form)
        genome = apply(failed.genome, answer.changes)
        why = f"repair: {answer.summary}"
        edit = Edit(model.name, _changed(failed.genome, genome), why, {"exchange": key})
        old = one_line(failed.summary, _MOST_OLD_SUMMARY)
        return Proposal(
            genome,
            (*failed.edits, edit),
            failed.n_new + 1,
            one_line(f"{old}; {why}", MOST_SUMMARY),
            failed.expected_effect or answer.expected_effect,
            failed.model or request.parent.model or model,
            (*failed.requests, *answer.requests),
        )

    def _propose_chunks(self, request: EditRequest, model: ModelSpec, rng: Random) -> Proposal:
        """Ask for one chunk after the other; each question tells what was changed before it."""
        chunks = [chunk for chunk in chunks_of(request.parent.genome) if chunk.is_editable]
        if not chunks:
            raise EditFailed(Reason.NOTHING_TO_EDIT, "the code holds nothing but imports")
        chosen = [chunk for chunk in chunks if rng.random() < self._chunk_probability]
        chosen = chosen or [rng.choice(chunks)]
        # An objected draft may have taken any number of calls up to that of all chunks.
        first_call = len(request.objections) * len(chunks)
        answers: list[tuple[Chunk, Answer]] = []
        for call, chunk in enumerate(chosen, start=first_call):
            told = [f"{done.name} ({done.kind}): {answer.summary}" for done, answer in answers]
            prompt = chunk_prompt(
                request, chunk, told, self._about, self._prompt_tokens, self._count
            )
            reply = self._ask(request, "draft", model, prompt.messages, "chunk", call)
            answers.append((chunk, _read(reply, "chunk", self._answer_tokens)))
        genome = request.parent.genome
        try:
            for chunk, answer in reversed(answers):
                genome = replaced(genome, chunk, answer.text or "")
        except ValueError as error:  # too large
            raise EditFailed(Reason.DOES_NOT_APPLY, str(error), again=True) from error
        before = request.parent.genome.as_dict
        whole = [FileEdit(path, "", text) for path, text in genome.files if text != before[path]]
        genome = apply(request.parent.genome, whole)
        parameters = {"exchange": _key(request, first_call), "calls": len(chosen)}
        return _proposal(request, model, genome, [answer for _, answer in answers], parameters)

    def _converse(
        self,
        request: EditRequest,
        purpose: str,
        model: ModelSpec,
        messages: tuple[Message, ...],
        form: str,
    ) -> tuple[str, Answer]:
        """Ask, tell what was objected to, ask again; return the last call's key and its answer."""
        for call, objection in enumerate(request.objections):
            earlier = self._ask(request, purpose, model, messages, form, call)
            messages = (*messages, *objection_messages(earlier.text, objection))
        call = len(request.objections)
        reply = self._ask(request, purpose, model, messages, form, call)
        return _key(request, call), _read(reply, form, self._answer_tokens)

    def _ask(
        self,
        request: EditRequest,
        purpose: str,
        model: ModelSpec,
        messages: tuple[Message, ...],
        form: str,
        call: int,
    ) -> Reply:
        return self._models.ask(
            Query(
                _key(request, call),
                request.individual_id,
                purpose,
                model,
                messages,
                schema_of(form),
                self._answer_tokens,
            )
        )


def _key(request: EditRequest, call: int) -> str:
    return f"{request.individual_id}/{request.attempt}/{call}"


def _read(reply: Reply, form: str, answer_tokens: int) -> Answer:
    """Read an answer that came to its end.

    Raises:
        EditFailed: it did not, or it is not of that form.
    """
    if reply.finish is Finish.LENGTH:
        raise EditFailed(
            Reason.TRUNCATED,
            f"the answer was cut off at {answer_tokens:,} tokens, and nothing of it is used: "
            "make a smaller change, or write less about it",
            again=True,
        )
    if reply.finish is Finish.REFUSED or not reply.text.strip():
        raise EditFailed(
            Reason.REFUSED,
            "there was no answer: the question is about code that trains a small language model, "
            "and a change of that code is all that is asked for",
            again=True,
        )
    return read_answer(reply.text, form)


def _proposal(
    request: EditRequest,
    model: ModelSpec,
    genome: Genome,
    answers: list[Answer],
    parameters: Mapping[str, Any],
) -> Proposal:
    summary = one_line("; ".join(answer.summary for answer in answers), MOST_SUMMARY)
    hopes = [answer.expected_effect for answer in answers if answer.expected_effect]
    files = _changed(request.parent.genome, genome)
    return Proposal(
        genome,
        (*request.parent.edits, Edit(model.name, files, summary, parameters)),
        n_new=1,
        summary=summary,
        expected_effect=one_line("; ".join(hopes), MOST_SUMMARY),
        model=request.parent.model or model,
        requests=tuple(asked for answer in answers for asked in answer.requests),
    )


def _changed(before: Genome, after: Genome) -> str:
    """Return the files in which two genomes differ, as one line."""
    old, new = before.as_dict, after.as_dict
    paths = sorted(path for path in old.keys() | new.keys() if old.get(path) != new.get(path))
    return ", ".join(paths)
