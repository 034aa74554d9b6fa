"""The comparison: what makes a setting, what its numbers are, and what is said beside them."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from darwin_exp.chronicle import Chronicle
from darwin_exp.compare import Comparison, Setting, compare
from darwin_exp.compare.__main__ import main
from darwin_exp.compare.closing import Reading, leave
from darwin_exp.compare.settings import THE_ONLY_ONE, group
from darwin_exp.compare.tables import HEADINGS, as_json, csv, markdown, rich_table, row_of
from darwin_exp.journal import Journal

JSON = {"memory.name": "json", "memory.scope": "population", "memory.capacity": 200}
OFF = {"memory.name": "off"}
N = {"n_base": 2, "n_selected": 2}
CONFIG = {
    "seed": 0,
    "experiment": "baseline",
    "population_size": 3,
    "n_survivors": 1,
    "n_generations": 1,
    "workers": 2,
    "selection.name": "truncation",
    "tracking.name": "none",
    "paths.runs": "runs",
}


def _run(
    folder: Path,
    name: str,
    config: dict[str, Any],
    perplexities: Sequence[float | str] = (),
    claim: tuple[float, float] | None = None,
    status: str | None = "finished",
    environment: str = "e1",
    peak: float | None = 1e11,
    mfu: tuple[float, float] | None = None,
    equal_steps: float | None = None,
) -> Path:
    """Write the journal of a run through the real Journal.

    Args:
        perplexities: on validation, of the base and each rewrite, or a status that is not OK.
        claim: test perplexity of base and selected, who is the best of the search.
        status: how it ended; None for a run that was killed.
        mfu: re-timed, of base and selected.
    """
    place = folder / name
    place.mkdir(parents=True)
    journal = Journal(place)
    journal.append("session", "0", {"what": "started"})
    journal.append(
        "run",
        "run",
        {
            "config": {**CONFIG, **config},
            "environment": {"data": environment},
            "environment_id": environment,
            "files": {},
        },
        {"run_id": name, "command": "", "peak_flops": peak, "n_slots": 2, "sweep_id": None},
    )
    for k, value in enumerate(perplexities):
        _individual(journal, k, value)
    numbers = [value for value in perplexities if isinstance(value, float)]
    if claim is not None:
        selected = f"g00-i{perplexities.index(min(numbers)):02d}"
        for which, test, rate in zip(("g00-i00", selected), claim, mfu or (0, 0), strict=True):
            _claim_job(journal, which, test)
            if mfu:
                journal.append("retimed", which, {"individual_id": which}, {"mfu": rate})
        gain = 100 * (1 - claim[1] / claim[0])
        sides = {"baseline_id": "g00-i00", "selected_id": selected, "why_none": None}
        if equal_steps is not None:
            told = {"claim": {**N, "perplexity_percent": equal_steps}, "n_steps": 9}
            journal.append("equal_steps", "after-g01", {**sides, **told})
        journal.append(
            "claim",
            "after-g01",
            {**sides, "claim": {**N, "perplexity_percent": gain}, "earlier_claims": 0},
        )
    elif status == "finished":
        journal.append(
            "claim",
            "after-g01",
            {
                "baseline_id": "g00-i00",
                "selected_id": "g00-i00",
                "why_none": "no individual was better than the base",
                "claim": None,
                "earlier_claims": 0,
            },
        )
    if status is not None:
        journal.append("end", "0", {"status": status, "exit_code": 0}, {"seconds": 1.0})
    journal.close()
    return place


def _individual(journal: Journal, k: int, value: float | str) -> None:
    is_ok = isinstance(value, float)
    journal.append(
        "individual",
        f"g00-i{k:02d}",
        {
            "individual_id": f"g00-i{k:02d}",
            "generation": 0,
            "slot": k,
            "parent_ids": ["g00-i00"] if k else [],
            "editor_id": "g00-i00" if k else None,
            "edits": [],
            "n_new_edits": 0,
            "summary": "",
            "status": "OK" if is_ok else value,
            "reason": "none",
            "message": "",
            "metrics": {"val_perplexity": value} if is_ok else {},
            "fitness": -math.log(value) if isinstance(value, float) else None,
            "genome_id": f"genome {k}",
            "attempts": 1,
            "repaired": False,
        },
        {"rates": {"mfu": 0.1} if is_ok else {}, "contended": False},
    )


def _claim_job(journal: Journal, which: str, test: float) -> None:
    seconds = dict.fromkeys(
        ("startup_seconds", "training_seconds", "scoring_seconds", "overhead_seconds"), 1.0
    )
    journal.append(
        "job",
        f"{which}/claim-01-0",
        {
            "individual_id": which,
            "genome_id": f"genome {int(which[-2:])}",
            "purpose": "claim",
            "status": "OK",
            "split": "test",
            "max_steps": None,
            "metrics": {"test_perplexity": test},
        },
        {**seconds, "total_seconds": 4.0},
    )


def _compared(*runs: Path) -> Comparison:
    return compare([Chronicle.read(run) for run in runs], "a title")


def _settings(comparison: Comparison) -> dict[str, Setting]:
    (cohort,) = comparison.cohorts
    return {setting.label: setting for setting in cohort.settings}


# --- the numbers ---------------------------------------------------------------------------------


@pytest.fixture
def memory_sweep(tmp_path: Path) -> Comparison:
    runs = [
        _run(tmp_path, "r0", {**JSON, "seed": 0}, [10.0, 9.0, "CRASHED", 8.0], (20.0, 16.0),
             mfu=(0.10, 0.11), equal_steps=5.0),
        _run(tmp_path, "r1", {**JSON, "seed": 1}, [10.0, 10.5, 9.5, "DUPLICATE"], (20.0, 18.0),
             mfu=(0.10, 0.12)),
        _run(tmp_path, "r2", {**OFF, "seed": 0}, [12.0, 13.0, 12.5, 14.0]),
        _run(tmp_path, "r3", {**OFF, "seed": 1}, [11.0, 5.0], status="interrupted"),
    ]  # fmt: skip
    return _compared(*runs)


def test_mean_and_spread_are_those_of_the_runs(memory_sweep: Comparison) -> None:
    remembering = _settings(memory_sweep)["memory=json"]
    gain = remembering.spread("improvement_percent")
    assert gain.mean == pytest.approx((20.0 + 10.0) / 2)
    assert gain.sd == pytest.approx(math.sqrt(50.0))
    assert gain.n == 2
    assert remembering.spread("test_perplexity").mean == pytest.approx(17.0)
    assert remembering.spread("mfu_percent").mean == pytest.approx(15.0)
    assert remembering.spread("best_val_perplexity").mean == pytest.approx((8.0 + 9.5) / 2)
    assert remembering.spread("best_val_perplexity").sd == pytest.approx(statistics.stdev([8, 9.5]))
    counts = [remembering.spread(name).mean for name in ("ok", "failed", "duplicates", "lost")]
    assert counts == [2.0, 0.5, 0.5, 0.0]


def test_what_was_measured_once_has_no_spread_and_says_so(memory_sweep: Comparison) -> None:
    remembering = _settings(memory_sweep)["memory=json"]
    steps = remembering.spread("equal_steps_percent")
    assert (steps.mean, steps.sd, steps.n) == (5.0, None, 1)
    assert row_of(remembering)[HEADINGS.index("gain at equal steps %")] == "+5.0 (n=1)"


def test_what_was_not_measured_is_a_dash_and_never_zero(memory_sweep: Comparison) -> None:
    forgetting = _settings(memory_sweep)["memory=off"]
    cells = dict(zip(HEADINGS, row_of(forgetting), strict=True))
    assert cells["test perplexity"] == "–"


def test_a_search_that_kept_the_base_gained_nothing_and_that_counts(
    memory_sweep: Comparison,
) -> None:
    """Left out, it would flatter the setting in which it happened."""
    forgetting = _settings(memory_sweep)["memory=off"]
    cells = dict(zip(HEADINGS, row_of(forgetting), strict=True))
    assert forgetting.known("improvement_percent") == [0.0]
    assert cells["test perplexity, gain %"].startswith("+0.0")
    assert any("counts as a gain of 0" in note for note in memory_sweep.notes)


def test_an_unfinished_run_is_named_and_not_counted(memory_sweep: Comparison) -> None:
    forgetting = _settings(memory_sweep)["memory=off"]
    assert row_of(forgetting)[1] == "1 of 2"
    assert forgetting.spread("best_val_perplexity").mean == 12.0
    assert any("r3 (interrupted)" in note for note in memory_sweep.notes)


def test_a_killed_run_counts_as_running(tmp_path: Path) -> None:
    comparison = _compared(_run(tmp_path, "r0", JSON, [10.0], status=None))
    assert any("r0 (running)" in note for note in comparison.notes)


def test_the_curve_is_the_geometric_mean_of_the_best_so_far(memory_sweep: Comparison) -> None:
    curve = _settings(memory_sweep)["memory=json"].curve()
    # r0: 10, 9, 9, 8; r1: 10, 10, 9.5, 9.5
    expected = [(10, 10), (9, 10), (9, 9.5), (8, 9.5)]
    for point, (one, other) in zip(curve, expected, strict=True):
        assert point.mean == pytest.approx(math.sqrt(one * other))
        ratio = math.exp(statistics.stdev([math.log(one), math.log(other)]))
        assert point.low == pytest.approx(point.mean / ratio)
        assert point.high == pytest.approx(point.mean * ratio)


def test_a_curve_goes_no_further_than_the_shortest_of_its_runs(tmp_path: Path) -> None:
    comparison = _compared(
        _run(tmp_path, "r0", {"seed": 0}, [10.0, 9.0, 8.0]),
        _run(tmp_path, "r1", {"seed": 1}, [10.0, 9.0]),
    )
    assert len(_settings(comparison)[THE_ONLY_ONE].curve()) == 2


def test_other_environments_and_other_peaks_are_never_pooled(tmp_path: Path) -> None:
    runs = [
        _run(tmp_path, "r0", {"seed": 0}, [10.0]),
        _run(tmp_path, "r1", {"seed": 1}, [20.0], environment="e2"),
        _run(tmp_path, "r2", {"seed": 2}, [30.0], peak=2e11),
    ]
    comparison = _compared(*runs)
    means = [cohort.settings[0].spread("best_val_perplexity").mean for cohort in comparison.cohorts]
    assert means == [10.0, 20.0, 30.0]
    (note,) = (note for note in comparison.notes if "environments" in note)
    assert "3 environments (data, the peak that MFU is measured against)" in note


def test_more_generations_of_a_resumed_run_are_another_setting(tmp_path: Path) -> None:
    run = _run(tmp_path, "r0", {"seed": 0}, [10.0], status=None)
    journal = Journal(run)
    event = journal.find("individual", "g00-i00")
    assert event is not None
    later = {**event.payload, "individual_id": "g05-i00", "generation": 5, "editor_id": "g00-i00"}
    journal.append("individual", "g05-i00", later, event.measured)
    journal.append("end", "0", {"status": "finished", "exit_code": 0})
    journal.close()
    comparison = _compared(run, _run(tmp_path, "r1", {"seed": 1}, [10.0]))
    assert list(_settings(comparison)) == ["n_generations=5", "n_generations=1"]


# --- what makes a setting ------------------------------------------------------------------------


def test_a_group_is_told_by_its_name_alone() -> None:
    found = group([{**CONFIG, **JSON}, {**CONFIG, **OFF}])
    assert found.labels == ("memory=json", "memory=off")
    assert found.along == ()


def test_seeds_and_operational_keys_make_no_setting() -> None:
    found = group([CONFIG, {**CONFIG, "seed": 5, "workers": 1, "tracking.name": "mlflow"}])
    assert set(found.labels) == {THE_ONLY_ONE}


def test_a_population_is_told_by_all_that_makes_it() -> None:
    sizes = [(4, 2, 10), (8, 4, 4), (24, 1, 0)]
    configs = [
        {**CONFIG, "population_size": size, "n_survivors": kept, "n_generations": rounds}
        for size, kept, rounds in sizes
    ]
    assert group(configs).labels[0] == "population_size=4 n_survivors=2 n_generations=10"


def test_a_key_of_another_group_that_varies_along_is_said_not_hidden() -> None:
    found = group([{**CONFIG, **JSON, "dedup": "reject"}, {**CONFIG, **OFF, "dedup": "replicate"}])
    assert found.labels == ("memory=json", "memory=off")
    assert found.along == ("dedup",)


def test_settings_of_the_same_variant_are_told_by_what_differs() -> None:
    tournament = {**CONFIG, "selection.name": "tournament"}
    found = group(
        [CONFIG, {**tournament, "selection.size": 3}, {**tournament, "selection.size": 5}]
    )
    assert found.labels == (
        "selection=truncation",
        "selection=tournament selection.size=3",
        "selection=tournament selection.size=5",
    )


KEYS = ["memory.name", "memory.scope", "selection.name", "dedup", "n_survivors", "eval.n_prefixes"]
VALUES = st.one_of(st.integers(0, 2), st.sampled_from(["a", "b", "1", "null"]), st.none())
CONFIGS = st.lists(
    st.dictionaries(st.sampled_from([*KEYS, "seed", "workers"]), VALUES), min_size=1, max_size=6
)


@settings(max_examples=50)
@given(CONFIGS)
def test_runs_share_a_label_exactly_when_all_that_counts_is_the_same(
    configs: list[dict[str, Any]],
) -> None:
    labels = group(configs).labels
    counted = [{key: config[key] for key in KEYS if key in config} for config in configs]
    for one, label in zip(counted, labels, strict=True):
        for other, its in zip(counted, labels, strict=True):
            assert (label == its) == (one == other), (one, other)


@settings(max_examples=50)
@given(CONFIGS, st.randoms())
def test_the_order_of_the_runs_changes_no_label(configs: list[dict[str, Any]], rng: Any) -> None:
    order = list(range(len(configs)))
    rng.shuffle(order)
    labels = group(configs).labels
    assert group([configs[k] for k in order]).labels == tuple(labels[k] for k in order)


@settings(max_examples=50)
@given(CONFIGS, VALUES)
def test_what_is_the_same_everywhere_changes_no_label(
    configs: list[dict[str, Any]], value: Any
) -> None:
    more = [{**config, "budget_seconds": value} for config in configs]
    assert group(more).labels == group(configs).labels


# --- what people get -----------------------------------------------------------------------------


def test_table_markdown_csv_and_json_say_the_same(memory_sweep: Comparison, tmp_path: Path) -> None:
    from rich.console import Console

    for width in (80, 150):
        console = Console(width=width, record=True, file=(tmp_path / "out").open("w"))
        with console.file:
            console.print(rich_table(memory_sweep, console.width))
        shown = console.export_text()
        for words in ("memory=json", "+15.0 ± 7.1", "1 of 2", "–", "r3 (interrupted)"):
            assert words in shown, (width, words)
        assert max(map(len, shown.splitlines())) <= width
    text = markdown(memory_sweep)
    assert "| memory=json | 2 | +15.0 ± 7.1 | 17.00 ± 1.41 | +5.0 (n=1) | +15.0 ± 7.1 |" in text
    table = csv(memory_sweep).splitlines()
    assert len(table) == 3
    told = json.loads(json.dumps(as_json(memory_sweep), allow_nan=False))
    (json_setting, _) = told["cohorts"][0]["settings"]
    assert json_setting["measures"]["improvement_percent"]["mean"] == pytest.approx(15.0)
    assert [run["run_id"] for run in json_setting["runs"]] == ["r0", "r1"]


def test_a_picture_is_drawn_whatever_there_is(memory_sweep: Comparison, tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    unfinished = _compared(_run(tmp_path / "runs", "x", {}, [10.0], status="failed"))
    for k, comparison in enumerate((memory_sweep, unfinished, Comparison("none", (), ()))):
        files = leave(comparison, tmp_path / str(k))
        assert [path.name for path in files][-1] == "curves.png"
        assert all(path.stat().st_size > 0 for path in files)
        assert files[-1].read_bytes().startswith(b"\x89PNG")


def test_runs_that_cannot_be_read_are_named_and_the_others_compared(tmp_path: Path) -> None:
    good = _run(tmp_path, "good", {}, [10.0])
    bad = _run(tmp_path, "bad", {}, [10.0])
    (bad / "journal.sqlite").write_bytes(b"not a database" * 100)
    empty = tmp_path / "empty"
    empty.mkdir()
    Journal(empty).close()
    reading = Reading.of([good, bad, empty, good])
    assert [one.run_id for one in reading.chronicles] == ["good"]
    assert len(reading.remarks) == 2
    assert reading.remarks[0].startswith("bad is left out:")


def test_the_command_compares_runs_and_leaves_its_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _run(tmp_path, "r0", JSON, [10.0])
    _run(tmp_path, "r1", OFF, [11.0])
    assert main(["r0", "r1", "--runs", str(tmp_path)]) == 0
    assert "memory=json" in capsys.readouterr().out
    (folder,) = (tmp_path / "comparisons").iterdir()
    assert {path.name for path in folder.iterdir()} == {
        "comparison.json", "comparison.md", "comparison.csv", "curves.png",
    }  # fmt: skip
    assert main(["r1", "r0", "--runs", str(tmp_path), "--output", str(tmp_path / "x")]) == 0
    assert (tmp_path / "x" / "comparison.md").is_file()


@pytest.mark.parametrize("name", ["nope", "latest"])
def test_an_unknown_name_is_one_clear_line(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([name, "--runs", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1
    assert said.startswith("darwin: ")
    assert name in said
    assert "there are none yet" in said
