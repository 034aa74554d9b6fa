"""The loop: who lives, who is written down, and that a resumed run is the uninterrupted one."""

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest

from darwin_exp import summary
from darwin_exp.fitness import MfuFitness
from darwin_exp.individual import Genome, Job, JobResult, Purpose, Reason, Status
from darwin_exp.journal import Journal, comparable, load
from darwin_exp.measuring import BaseFailed
from darwin_exp.protocols import InfrastructureFailure, Stopped
from darwin_exp.trials import CHECKPOINT, Broken

Rehearse = Callable[..., Any]


def _individuals(journal: Journal) -> dict[str, Any]:
    return {event.key: event for event in journal.of_kind("individual")}


def test_as_many_individuals_are_made_as_the_plan_requests(rehearse: Rehearse) -> None:
    rehearsal = rehearse()
    made = _individuals(rehearsal.run())
    assert rehearsal.the_plan.n_requested == 4 + 3 * 3
    assert len(made) == 1 + rehearsal.the_plan.n_requested
    assert made["g00-i00"].payload["editor_id"] is None


def test_a_child_carries_its_parents_code_and_one_more_edit(rehearse: Rehearse) -> None:
    journal = rehearse(plan={"n_generations": 4}).run()
    made = _individuals(journal)
    genomes = {"g00-i00": None}
    for event in journal.of_kind("proposal"):
        genomes[event.payload["individual_id"]] = event.payload["genome_id"]
    for name, event in made.items():
        if event.payload["editor_id"] is None:
            continue
        parent = made[event.payload["parent_ids"][0]].payload
        assert event.payload["edits"][:-1] == parent["edits"]
        assert event.payload["genome_id"] == genomes[name] != parent["genome_id"]


def test_the_editor_is_another_living_agent_wherever_two_exist(rehearse: Rehearse) -> None:
    made = _individuals(rehearse().run())
    for event in made.values():
        payload = event.payload
        if payload["generation"] > 0:
            assert payload["editor_id"] != payload["parent_ids"][0]


def test_an_agent_edits_itself_where_pairing_says_so(rehearse: Rehearse) -> None:
    made = _individuals(rehearse(plan={"pair_with_peers": False}).run())
    for event in made.values():
        if event.payload["generation"] > 0:
            assert event.payload["editor_id"] == event.payload["parent_ids"][0]


def test_selection_makes_the_best_no_worse_from_generation_to_generation(
    rehearse: Rehearse,
) -> None:
    journal = rehearse(plan={"n_generations": 6}).run()
    best = [event.payload["best"]["val_perplexity"] for event in journal.of_kind("generation")]
    assert best == sorted(best, reverse=True)
    assert best[-1] < best[0]


def test_the_same_seed_gives_the_same_journal_and_another_seed_another(rehearse: Rehearse) -> None:
    one = comparable(rehearse("one").run().events())
    two = comparable(rehearse("two").run().events())
    assert one == two
    other = rehearse("other", plan={"seed": 4})
    assert comparable(other.run().events()) != one


def test_d2_a_run_cut_anywhere_and_resumed_is_the_uninterrupted_one(
    rehearse: Rehearse, executor_with: Callable[..., Any]
) -> None:
    class Cut(Exception):
        pass

    whole = rehearse("whole").run()
    n_jobs = len(whole.of_kind("job")) + len(whole.of_kind("timing"))
    assert n_jobs > 20

    for cut_at in range(0, n_jobs, 6):
        answered = 0

        def rule(_: Job, cut_at: int = cut_at) -> None:
            nonlocal answered
            answered += 1
            if answered > cut_at:
                raise Cut

        with pytest.raises(Cut):
            rehearse(f"cut{cut_at}", executor=executor_with(rule=rule)).run()
        resumed = rehearse(f"cut{cut_at}")
        journal = resumed.run()
        assert comparable(journal.events()) == comparable(whole.events())
        assert len(resumed.executor.jobs) == n_jobs - cut_at, "what was done is not done again"


def test_a_finished_run_resumed_trains_nothing(rehearse: Rehearse) -> None:
    first = rehearse().run()
    again = rehearse()
    assert comparable(again.run().events()) == comparable(first.events())
    assert again.executor.jobs == []
    assert again.watch.finished == []


def test_a_longer_run_continues_a_finished_one(rehearse: Rehearse) -> None:
    rehearse("long", plan={"n_generations": 2}).run()
    more = rehearse("long", plan={"n_generations": 4})
    longer = _individuals(more.run())
    assert len(longer) == 1 + more.the_plan.n_requested
    assert longer.keys() == _individuals(rehearse("fresh", plan={"n_generations": 4}).run()).keys()


def test_two_slots_make_the_same_individuals_as_one(
    rehearse: Rehearse, executor_with: Callable[..., Any]
) -> None:
    one = _individuals(rehearse("one").run())
    two = _individuals(rehearse("two", executor=executor_with(n_slots=3)).run())
    assert {name: event.payload for name, event in one.items()} == {
        name: event.payload for name, event in two.items()
    }


def test_a_crashed_individual_is_mended_and_trained_again_in_its_generation(
    rehearse: Rehearse, executor_with: Callable[..., Any], fail: Callable[..., JobResult]
) -> None:
    def rule(job: Job) -> JobResult | None:
        broken = job.job_id == "g01-i00/0"
        return fail(job, Status.CRASHED, Reason.EXCEPTION) if broken else None

    journal = rehearse(executor=executor_with(rule=rule)).run()
    mended = _individuals(journal)["g01-i00"].payload
    assert mended["status"] == "OK"
    assert mended["repaired"]
    assert mended["attempts"] == 2
    assert mended["summary"].endswith("mended")
    told = summary.summarise(load_sessioned(journal), 13, summary.FINISHED)
    assert told["repaired"] == 1
    assert told["error_rate"] == pytest.approx(1 / 13)
    assert told["resolution_rate"] == 1.0


def test_one_that_cannot_be_mended_dies_with_its_reason(
    rehearse: Rehearse, executor_with: Callable[..., Any], fail: Callable[..., JobResult]
) -> None:
    def rule(job: Job) -> JobResult | None:
        broken = job.individual_id == "g01-i01"
        why = "this cannot be mended"
        return fail(job, Status.TIMED_OUT, Reason.NO_CHECKPOINT, why) if broken else None

    rehearsal = rehearse(executor=executor_with(rule=rule))
    dead = _individuals(rehearsal.run())["g01-i01"].payload
    assert dead["status"] == "TIMED_OUT"
    assert dead["fitness"] is None
    assert dead["message"] == "this cannot be mended"
    error = rehearsal.folder / "individuals" / "g01-i01" / "error.txt"
    assert "Traceback: boom" in error.read_text()


def test_a_lost_trial_is_repeated_and_not_held_against_the_individual(
    rehearse: Rehearse, executor_with: Callable[..., Any]
) -> None:
    def rule(job: Job) -> JobResult | None:
        if job.job_id in ("g01-i00/0", "g01-i00/0.1"):
            raise InfrastructureFailure("the machine hiccuped")
        return None

    journal = rehearse(executor=executor_with(rule=rule)).run()
    assert _individuals(journal)["g01-i00"].payload["status"] == "OK"
    lost = [e.payload["status"] for e in journal.of_kind("job") if e.key.startswith("g01-i00/0")]
    assert lost == ["INFRA_LOST", "INFRA_LOST", "OK"]


def test_one_lost_three_times_is_counted_as_lost_and_never_repaired(
    rehearse: Rehearse, executor_with: Callable[..., Any]
) -> None:
    def rule(job: Job) -> JobResult | None:
        if job.individual_id == "g01-i00":
            raise InfrastructureFailure("the machine is broken")
        return None

    journal = rehearse(executor=executor_with(rule=rule)).run()
    assert _individuals(journal)["g01-i00"].payload["status"] == "INFRA_LOST"
    told = summary.summarise(load_sessioned(journal), 13, summary.FINISHED)
    assert (told["lost"], told["exit_code"]) == (1, summary.LOST)
    assert told["error_rate"] == 0.0


def test_where_nothing_gets_through_the_run_stops_and_resuming_tries_again(
    rehearse: Rehearse, executor_with: Callable[..., Any]
) -> None:
    def broken_from(job_id: str) -> Callable[[Job], JobResult | None]:
        broken = False

        def rule(job: Job) -> JobResult | None:
            nonlocal broken
            broken = broken or job.job_id == job_id
            if broken:
                raise InfrastructureFailure("no space left on device")
            return None

        return rule

    whole = rehearse("whole").run()
    for job_id in ("g00-i00/0", "g02-i01/0"):
        name = job_id.replace("/", "-")
        with pytest.raises(Broken, match="no space left"):
            rehearse(name, executor=executor_with(rule=broken_from(job_id))).run()
        mended = rehearse(name).run()
        statuses = {event.payload["status"] for event in mended.of_kind("individual")}
        assert statuses <= {"OK", "INFRA_LOST"}
        assert len(mended.of_kind("individual")) == len(whole.of_kind("individual"))


def test_fewer_generations_than_were_begun_still_count_all_individuals(rehearse: Rehearse) -> None:
    rehearse("run", plan={"n_generations": 3}).run()
    again = rehearse("run", plan={"n_generations": 3, "stagnation_generations": 1}).run()
    assert len(again.of_kind("generation")) == 4


def test_a_contended_trial_is_repeated_and_the_last_is_kept_and_marked(
    rehearse: Rehearse, executor_with: Callable[..., Any]
) -> None:
    from dataclasses import replace

    from tests.evolution.conftest import answer

    def rule(job: Job) -> JobResult | None:
        return replace(answer(job), contended=True) if job.individual_id == "g01-i00" else None

    journal = rehearse(executor=executor_with(rule=rule)).run()
    event = _individuals(journal)["g01-i00"]
    assert event.payload["status"] == "OK"
    assert event.measured["contended"]
    tries = [e.payload["reason"] for e in journal.of_kind("job") if e.key.startswith("g01-i00/0")]
    assert tries == ["contention", "contention", "none"]


def test_code_that_was_seen_is_never_trained_twice(
    rehearse: Rehearse, mutator_with: Callable[..., Any]
) -> None:
    journal = rehearse(mutator=mutator_with(numbers=2, max_drafts=3)).run()
    trained = [e.payload["genome_id"] for e in journal.of_kind("job") if e.key.endswith("/0")]
    assert len(trained) == len(set(trained))
    told = summary.summarise(load_sessioned(journal), 13, summary.FINISHED)
    assert told["duplicates"] > 0
    total = told["ok"] + sum(told["failed"].values()) + told["lost"] + told["duplicates"]
    assert total + told["not_started"] == told["requested"] == 13


def test_copies_are_trained_where_duplicates_are_replicated(
    rehearse: Rehearse, mutator_with: Callable[..., Any]
) -> None:
    rehearsal = rehearse(mutator=mutator_with(numbers=1), plan={"reject_duplicates": False})
    made = _individuals(rehearsal.run())
    fill = [event for event in made.values() if event.payload["generation"] == 0]
    assert len({event.payload["genome_id"] for event in fill[1:]}) == 1
    assert len({event.payload["metrics"]["val_perplexity"] for event in fill[1:]}) == 4


def test_an_edit_that_only_changes_a_comment_or_a_seed_is_no_edit() -> None:
    base = Genome.of({"train.py": "seed = 1\nmanual_seed(3)\nx = 1\n", "model.py": ""})
    same = base.with_files({"train.py": '"""Doc."""\nseed = 7\nmanual_seed(9)  # luck\nx = 1\n'})
    other = base.with_files({"train.py": "seed = 1\nmanual_seed(3)\nx = 2\n"})
    assert same.fingerprint == base.fingerprint != other.fingerprint
    assert same.id != base.id


def test_a_base_that_does_not_train_ends_the_run_with_its_traceback(
    rehearse: Rehearse, executor_with: Callable[..., Any], fail: Callable[..., JobResult]
) -> None:
    def rule(job: Job) -> JobResult:
        return fail(job, Status.CRASHED, Reason.EXCEPTION)

    with pytest.raises(BaseFailed, match="Traceback: boom"):
        rehearse(executor=executor_with(rule=rule)).run()


def test_a_cap_stops_the_run_and_resuming_finishes_it(rehearse: Rehearse) -> None:
    whole = rehearse("whole").run()
    with pytest.raises(Stopped, match="max_hours"):
        rehearse("capped", max_hours=1e-9).run()
    assert comparable(rehearse("capped").run().events()) == comparable(whole.events())


def test_a_run_that_stands_still_finishes_early(
    rehearse: Rehearse, executor_with: Callable[..., Any], fail: Callable[..., JobResult]
) -> None:
    def rule(job: Job) -> JobResult | None:
        late = not job.individual_id.startswith("g00")
        return fail(job, Status.CRASHED, Reason.EXCEPTION, "cannot be mended") if late else None

    rehearsal = rehearse(
        executor=executor_with(rule=rule),
        plan={"n_generations": 9, "stagnation_generations": 2},
    )
    journal = rehearsal.run()
    assert len(journal.of_kind("generation")) == 1 + 2
    told = summary.summarise(load_sessioned(journal), rehearsal.the_plan.n_requested, "finished")
    assert told["not_started"] == 7 * 3


def test_memory_of_a_generation_is_not_told_to_siblings(rehearse: Rehearse) -> None:
    rehearsal = rehearse()
    rehearsal.run()
    for request in rehearsal.mutator.requests:
        told = {lesson.generation for lesson in request.lessons}
        generations = {0 if request.ordinal < 4 else 1 + (request.ordinal - 4) // 3}
        assert all(generation < min(generations) for generation in told)
    assert len(rehearsal.mutator.requests[-1].lessons) == 10


def test_the_base_is_repeated_among_the_others_and_gives_the_noise_floor(
    rehearse: Rehearse,
) -> None:
    journal = rehearse().run()
    order = [event.key for event in journal.of_kind("job")]
    assert order.index("g00-i03/0") > order.index("g00-i00/repeat-1") > order.index("g00-i02/0")
    assert "g00-i00/repeat-2" in order
    noise = [event.payload["noise_sd"] for event in journal.of_kind("generation")]
    assert all(sd is not None and 0 < sd < 0.01 for sd in noise)


def test_the_closing_claim_is_made_on_test_with_fresh_seeds_interleaved(
    rehearse: Rehearse,
) -> None:
    journal = rehearse().run()
    claims = [event for event in journal.of_kind("job") if event.payload["purpose"] == "claim"]
    selected = journal.of_kind("claim")[0].payload["selected_id"]
    sides = [event.payload["individual_id"] for event in claims]
    assert sides == ["g00-i00", selected, selected, "g00-i00"] * 2
    assert all(event.payload["split"] == "test" for event in claims)
    others = [event for event in journal.of_kind("job") if event.payload["purpose"] != "claim"]
    assert {e.payload["purpose"] for e in others if e.payload["split"] == "test"} == {"equal_steps"}
    seeds = [event.payload["seed"] for event in [*claims, *others] if event.payload["split"]]
    assert len(set(seeds)) == len(seeds)
    assert len(journal.of_kind("test_read")) == 8 + 6
    claim = journal.of_kind("claim")[0].payload["claim"]
    assert claim["n_base"] == claim["n_selected"] == 4
    assert claim["ci95"][0] < claim["perplexity_percent"] < claim["ci95"][1]


def _at_rates(
    answer: Callable[[Job], JobResult],
    seconds_a_step: dict[str, float],
    frozen: frozenset[str] = frozenset(),
) -> Callable[[Job], JobResult]:
    """Answer as ever, each at a rate of its own, and frozen at its clock where told to be."""

    def rule(job: Job) -> JobResult:
        result = answer(job)
        rate = seconds_a_step.get(job.individual_id, 0.01)
        steps = job.training.max_steps or round(job.training.budget_seconds / rate)
        training = replace(
            result.training,
            steps_claimed=steps,
            training_seconds=min(job.training.budget_seconds, steps * rate),
            stopped_at_budget=job.job_id in frozen,
        )
        return replace(result, training=training)

    return rule


def test_the_closing_claim_is_also_made_at_equal_steps(
    rehearse: Rehearse,
    executor_with: Callable[..., Any],
    answered: Callable[[Job], JobResult],
) -> None:
    """Both sides get most of what the slower one did in the search, and time enough for it."""
    executor = executor_with(rule=_at_rates(answered, {"g00-i00": 0.005}))
    journal = rehearse(executor=executor).run()
    told = journal.of_kind("equal_steps")[0].payload
    assert told["n_steps"] == 80
    assert told["claim"]["n_base"] == told["claim"]["n_selected"] == 3
    jobs = [job for job in executor.jobs if job.purpose is Purpose.EQUAL_STEPS]
    assert {job.training.max_steps for job in jobs} == {80}
    patience = {job.individual_id: job.training.budget_seconds for job in jobs}
    assert patience == {"g00-i00": pytest.approx(1.75), told["selected_id"]: pytest.approx(2.5)}
    improvement = summary.summarise(load_sessioned(journal), 13, "finished")["improvement"]
    at_steps = improvement["equal_steps"]
    assert at_steps["n_steps"] == 80
    assert at_steps["perplexity_percent"] == told["claim"]["perplexity_percent"]
    assert at_steps["perplexity_percent"] != improvement["perplexity_percent"]


def test_no_slot_time_is_spent_on_the_rates_of_a_claim(
    rehearse: Rehearse,
    executor_with: Callable[..., Any],
    answered: Callable[[Job], JobResult],
) -> None:
    executor = executor_with(rule=answered)
    rehearse(executor=executor).run()
    asked: dict[Purpose, set[bool]] = {}
    for job in executor.jobs:
        if job.evaluation is not None:
            asked.setdefault(job.purpose, set()).add(job.evaluation.verify_rate)
    assert asked == {
        Purpose.BASE_REPEAT: {True},
        Purpose.SEARCH: {True},
        Purpose.CLAIM: {False},
        Purpose.EQUAL_STEPS: {False},
        Purpose.RETIME: {True},
    }
    slopes = [job for job in executor.jobs if job.evaluation and job.evaluation.shorter_run]
    assert {job.purpose for job in slopes} == {Purpose.RETIME}
    shorter = {job.evaluation.shorter_run for job in slopes}
    assert shorter == {(80, 0.08)}  # eight steps of ten tokens


def test_a_run_that_was_frozen_before_its_steps_does_not_count_as_equal(
    rehearse: Rehearse,
    executor_with: Callable[..., Any],
    answered: Callable[[Job], JobResult],
) -> None:
    frozen = frozenset({"g00-i00/steps-03-0", "g00-i00/steps-03-1"})
    journal = rehearse(executor=executor_with(rule=_at_rates(answered, {}, frozen))).run()
    claim = journal.of_kind("equal_steps")[0].payload["claim"]
    assert (claim["n_base"], claim["n_selected"]) == (1, 3)
    assert claim["perplexity_percent"] is None
    assert journal.of_kind("claim")[0].payload["claim"]["n_base"] == 4


@pytest.mark.parametrize("status", [Status.CRASHED, Status.TIMED_OUT, Status.OUT_OF_MEMORY])
def test_b25_code_that_fails_when_it_is_unlucky_makes_no_claim(
    rehearse: Rehearse,
    executor_with: Callable[..., Any],
    fail: Callable[..., JobResult],
    status: Status,
) -> None:
    """Three of four good trainings are no fair sample of what the code does."""
    plain = rehearse("plain").run().of_kind("claim")[0].payload
    failed = f"{plain['selected_id']}/claim-03-1"

    def rule(job: Job) -> JobResult | None:
        return fail(job, status, Reason.EXCEPTION) if job.job_id == failed else None

    journal = rehearse("unlucky", executor=executor_with(rule=rule)).run()
    closing = journal.of_kind("claim")[0].payload
    assert closing["selected_id"] == plain["selected_id"]
    assert closing["claim"] is None
    assert closing["why_none"] == (
        f"a fresh training of the selected failed ({failed}: {status.value})"
    )
    told = summary.summarise(load_sessioned(journal), 13, summary.FINISHED)["improvement"]
    assert told["perplexity_percent"] is told["significant"] is None
    # What the base does only makes the claim harder; and a later claim remembers this look.
    later = rehearse("unlucky", plan={"n_generations": 4}).run().of_kind("claim")[-1].payload
    assert later["earlier_claims"] == 1


def test_a_training_of_a_claim_that_we_lost_is_left_out(
    rehearse: Rehearse, executor_with: Callable[..., Any]
) -> None:
    selected = rehearse("plain").run().of_kind("claim")[0].payload["selected_id"]

    def rule(job: Job) -> JobResult | None:
        if job.job_id.startswith(f"{selected}/claim-03-1"):
            raise InfrastructureFailure("no sandbox")
        return None

    journal = rehearse("lost", executor=executor_with(rule=rule)).run()
    claim = journal.of_kind("claim")[0].payload["claim"]
    assert (claim["n_base"], claim["n_selected"]) == (4, 3)


def test_training_that_stops_short_of_its_steps_does_not_count_as_equal(
    rehearse: Rehearse, executor_with: Callable[..., Any], answered: Callable[[Job], JobResult]
) -> None:
    """A trainer that watches its clock ends by itself, before anybody has to freeze it."""

    def rule(job: Job) -> JobResult:
        result = _at_rates(answered, {})(job)
        if job.job_id == "g00-i00/steps-03-2":
            return replace(result, training=replace(result.training, steps_claimed=99))
        return result

    journal = rehearse(executor=executor_with(rule=rule)).run()
    claim = journal.of_kind("equal_steps")[0].payload["claim"]
    assert (claim["n_base"], claim["n_selected"]) == (2, 3)


def test_a_closed_run_that_is_resumed_reads_the_test_split_no_more(rehearse: Rehearse) -> None:
    closed = rehearse().run().events()
    assert rehearse().run().events() == closed


def test_later_claims_are_held_to_half_the_level_of_the_one_before(rehearse: Rehearse) -> None:
    rehearse().run()
    rehearse(plan={"n_generations": 4}).run()
    journal = rehearse(plan={"n_generations": 5}).run()
    levels = [event.payload["claim"]["alpha"] for event in journal.of_kind("claim")]
    assert levels == [0.05, 0.025, 0.0125]
    timed = [e.key for e in journal.of_kind("retimed") if e.key.startswith("g00-i00/")]
    assert timed == [f"g00-i00/retime-after-g0{last}" for last in (3, 4, 5)]


def test_where_steps_are_counted_the_claim_itself_is_at_equal_steps(rehearse: Rehearse) -> None:
    journal = rehearse(max_steps=50).run()
    told = journal.of_kind("equal_steps")[0].payload
    assert told["claim"] is None
    assert told["why_none"] == "every training of this run has 50 steps already"
    improvement = summary.summarise(
        load_sessioned(journal, {"max_steps": 50}), 13, summary.FINISHED
    )["improvement"]
    same = improvement["equal_steps"]
    assert same["n_steps"] == 50
    assert same["perplexity_percent"] == improvement["perplexity_percent"] is not None


def test_rates_of_base_and_selected_are_timed_again(rehearse: Rehearse) -> None:
    journal = rehearse().run()
    timed = {event.payload["individual_id"] for event in journal.of_kind("retimed")}
    assert {"g00-i00", journal.of_kind("claim")[0].payload["selected_id"]} <= timed
    steps = [event.payload["max_steps"] for event in journal.of_kind("timing")]
    assert set(steps) == {8, 30}


def test_rates_that_are_timed_several_times_are_timed_by_turns_and_get_an_interval(
    rehearse: Rehearse, executor_with: Callable[..., Any], answered: Callable[[Job], JobResult]
) -> None:
    def rule(job: Job) -> JobResult:
        slowness = 1.0 + 0.1 * (job.training.seed % 7)  # the machine is never twice the same
        return _at_rates(answered, {job.individual_id: 0.01 * slowness})(job)

    journal = rehearse(plan={"n_timings": 3}, executor=executor_with(rule=rule)).run()
    timed = [event.key.split("/") for event in journal.of_kind("timing")]
    searched = [(name, what) for name, what in timed if "claim" not in what]
    everybody = list(dict.fromkeys(name for name, _ in searched))
    assert [name for name, what in searched if what.endswith("long")] == everybody * 3
    # Those timings chose the selected one; what is claimed of it rests on others.
    selected = journal.of_kind("claim")[0].payload["selected_id"]
    claimed = [name for name, what in timed if "claim" in what and what.endswith("long")]
    assert claimed == ["g00-i00", selected] * 3
    base = [e for e in journal.of_kind("retimed") if e.payload["individual_id"] == "g00-i00"]
    assert [event.key for event in base] == [
        "g00-i00/retime-after-g03",
        "g00-i00/retime-claim-after-g03",
    ]
    assert len(base[-1].measured["mfus"]) == 3
    assert base[-1].measured["mfu"] == sorted(base[-1].measured["mfus"])[1]
    told = summary.summarise(load_sessioned(journal), 13, "finished")
    assert told["baseline"]["mfu"] == base[-1].measured["mfu"]
    gain = told["improvement"]
    assert gain["mfu_ci95"][0] < gain["mfu_percent"] < gain["mfu_ci95"][1]


@pytest.mark.parametrize(("factor", "believed"), [(1.3, 1100.0), (2.0, None)])
def test_a_count_of_tokens_that_grows_in_the_re_timing_is_not_believed(
    rehearse: Rehearse,
    executor_with: Callable[..., Any],
    answered: Callable[[Job], JobResult],
    factor: float,
    believed: float | None,
) -> None:
    """What the harness times of the model that was timed bounds it, and double is not believed."""

    def rule(job: Job) -> JobResult:
        result = _at_rates(answered, {})(job)
        scored = result.evaluation
        if scored is not None:
            speed = {**scored.details["speed"], "tokens_per_second_bound": 1100.0, "verified": True}
            result = replace(result, evaluation=replace(scored, details={"speed": speed}))
        if job.purpose is Purpose.RETIME and job.individual_id != "g00-i00":
            tokens = round(factor * (result.training.tokens_claimed or 0))
            return replace(result, training=replace(result.training, tokens_claimed=tokens))
        return result

    journal = rehearse(executor=executor_with(rule=rule)).run()
    found = {e.payload["individual_id"]: e.measured for e in journal.of_kind("retimed")}
    assert found.pop("g00-i00")["tokens_per_second"] == pytest.approx(1000)
    assert found
    rates = [rate["tokens_per_second"] for rate in found.values()]
    assert rates == [believed and pytest.approx(believed)] * len(found)
    champion = summary.summarise(load_sessioned(journal), 13, "finished")["champion"]
    assert (champion["mfu"] is None) == (believed is None)
    assert champion["mfu_retimed"] == (believed is not None)


def test_a_fitness_of_rates_is_decided_by_rates_that_were_timed_again(
    rehearse: Rehearse, executor_with: Callable[..., Any], answered: Callable[[Job], JobResult]
) -> None:
    """Whoever met a quiet machine in the search is not selected for it."""
    plain = rehearse("plain", fitness=MfuFitness(None)).run()
    lucky = plain.of_kind("claim")[0].payload["selected_id"]

    def rule(job: Job) -> JobResult:
        slow = job.purpose is Purpose.RETIME and job.individual_id == lucky
        return _at_rates(answered, {lucky: 0.05 if slow else 0.01})(job)

    rehearsal = rehearse(
        "again",
        fitness=MfuFitness(None),
        executor=executor_with(rule=rule),
        plan={"n_timings": 2},
    )
    journal = rehearsal.run()
    assert lucky in {event.payload["individual_id"] for event in journal.of_kind("retimed")}
    assert journal.of_kind("claim")[0].payload["selected_id"] != lucky


def test_without_a_test_split_no_claim_is_made_and_it_is_said_why(rehearse: Rehearse) -> None:
    journal = rehearse(plan={"has_test": False}).run()
    closing = journal.of_kind("claim")[0].payload
    assert closing["claim"] is None
    assert closing["why_none"] == "the data set has no test split"
    told = summary.summarise(load_sessioned(journal), 13, summary.FINISHED)
    assert told["improvement"]["perplexity_percent"] is None


def test_every_individual_leaves_its_code_patch_and_memory(rehearse: Rehearse) -> None:
    rehearsal = rehearse()
    made = _individuals(rehearsal.run())
    for name, event in made.items():
        folder = rehearsal.folder / "individuals" / name
        assert Genome.from_folder(folder / "code").id == event.payload["genome_id"]
        patch = (folder / "change.patch").read_text()
        assert ("+step = " in patch) == (event.payload["editor_id"] is not None)
        json.loads((folder / "memory.json").read_text())


def test_only_the_living_the_base_and_the_best_keep_their_checkpoints(rehearse: Rehearse) -> None:
    class Leaving:
        def __init__(self, inner: Any) -> None:
            self.inner, self.n_slots = inner, 1

        def submit(self, job: Job) -> Any:
            (job.folder / "artefacts").mkdir(parents=True, exist_ok=True)
            (job.folder / CHECKPOINT).write_bytes(b"weights")
            return self.inner.submit(job)

        def close(self, cancel: bool = False) -> None:
            pass

    rehearsal = rehearse()
    rehearsal.executor = Leaving(rehearsal.executor)
    journal = rehearsal.run()
    living = set(journal.of_kind("generation")[-1].payload["population"])
    kept = {
        str(path.parent.parent.relative_to(rehearsal.folder / "individuals"))
        for path in rehearsal.folder.rglob("model.safetensors")
    }
    assert living <= kept <= living | {"g00-i00"}


def load_sessioned(journal: Journal, config: Mapping[str, Any] | None = None) -> list[Any]:
    """Return a rehearsal's events as a run would have them, with what its session adds."""
    from darwin_exp.protocols import Event

    events = load(journal.path.parent)
    start = events[0].written_at
    session = Event(0, "session", "0", {"what": "started"}, {}, start)
    run = Event(0, "run", "run", {"config": config or {}}, {"run_id": "rehearsal"}, start)
    return [session, run, *events]
