"""A slice of the fault-injection suite (`make chaos` plays all of it), and how the suite keeps its books."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path

import pytest
from annotating import SCHEMA
from chaos.lab import Lab
from chaos.reference import Reference, make_reference
from chaos.sites import said
from chaos.suite import Outcome, append_outcome, figures, play, read_outcomes, scenarios, summary
from chaos.twin import TwinOracle, TwinServer

from al_pipeline.integrations.oracle import ProjectSpec
from al_pipeline.integrations.simulated_oracle import SimulatedOracle

SLICE = (
    "tick 1-?? after tag",
    "tick 1-?? after push",
    "dvc in publish 0.15",
    "tick in train",
    "edited in the middle",
    "foreign commit in the middle",
    "two at once",
)

SLICE_WITH_SERVERS = ("tick with Label Studio 3",)


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    return make_reference(tmp_path_factory.mktemp("reference"), phases=2)


@pytest.fixture(scope="module")
def lab(reference: Reference, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    lab = Lab(reference, tmp_path_factory.mktemp("lab"))
    yield lab
    lab.close()


@pytest.mark.slow
@pytest.mark.parametrize("name", SLICE)
def test_the_fault_is_survived(lab: Lab, name: str) -> None:
    survives(lab, name)


@pytest.mark.slow
@pytest.mark.server
@pytest.mark.parametrize("name", SLICE_WITH_SERVERS)
def test_the_fault_is_survived_with_real_servers(label_studio_venv: Path, lab: Lab, name: str) -> None:
    survives(lab, name)


def survives(lab: Lab, name: str) -> None:
    scenario = [one for one in scenarios(lab.reference) if fnmatch(one.name, name)][-1]
    outcome = play(scenario, lab, "")
    assert outcome.why == ""
    assert outcome.injected == outcome.survived > 0


@pytest.mark.slow
def test_the_suite_is_as_large_as_it_says(reference: Reference) -> None:
    every = scenarios(reference)
    assert sum(one.strikes for one in every if one.kills) >= 220
    assert sum(one.strikes for one in every if one.kills and one.real) >= 50
    assert sum(one.strikes for one in every if one.name.startswith("worker of")) >= 36
    for name in (*SLICE, *SLICE_WITH_SERVERS):
        assert any(fnmatch(one.name, name) for one in every), name


# Its books -----------------------------------------------------------------------------------------------------------

GOOD = Outcome("a", "kill", True, True, 2, 2, (1.0, 3.0), (1, 2), "", 9.0, "p")


def test_outcomes_are_kept_and_those_of_another_product_are_not_counted(tmp_path: Path) -> None:
    path = tmp_path / "outcomes.jsonl"
    assert read_outcomes(path, "p") == {}
    for outcome in (GOOD, replace(GOOD, name="b", product="q"), replace(GOOD, name="c")):
        append_outcome(path, outcome)
    assert read_outcomes(path, "p") == {"a": GOOD, "c": replace(GOOD, name="c")}


def test_the_newest_outcome_counts_and_a_torn_line_does_not(tmp_path: Path) -> None:
    path = tmp_path / "outcomes.jsonl"
    append_outcome(path, replace(GOOD, survived=0, why="lost"))
    append_outcome(path, GOOD)
    whole = path.read_text()
    path.write_text(whole + whole[:40])
    assert read_outcomes(path, "p") == {"a": GOOD}
    append_outcome(path, replace(GOOD, name="b"))
    assert set(read_outcomes(path, "p")) == {"a", "b"}


def test_the_table_adds_up_by_kind() -> None:
    lost = replace(GOOD, name="b", survived=0, recover_seconds=(), ticks=(), why="lost")
    other = replace(GOOD, name="c", kind="disk full", kills=False, real=False, injected=1, survived=1)
    told = figures([GOOD, lost, other])
    assert (told["faults"], told["survived"], told["kills"], told["kills_with_label_studio"]) == (5, 3, 4, 4)
    assert told["failed"] == ["b"]
    assert list(summary([other, lost, GOOD])) == ["kill", "disk full"], "kills first"
    assert told["kinds"]["kill"] == {
        "scenarios": 2,
        "injected": 4,
        "survived": 2,
        "recover_seconds": {"median": 2.0, "max": 3.0},
        "ticks_until_quiet": {"median": 1.5, "max": 2},
    }


def test_a_twin_that_ended_cannot_answer_for_the_next_one() -> None:
    """Its thread would: woken up, it may look for callers where another twin listens by now."""
    threads = threading.active_count()
    with TwinServer(SimulatedOracle()) as server, closing(TwinOracle(str(server.address))) as oracle:
        project = oracle.ensure_project(ProjectSpec("w", "c", SCHEMA))
        assert list(oracle.task_states(project)) == []
    deadline = time.monotonic() + 10
    while threading.active_count() > threads:
        assert time.monotonic() < deadline, threading.enumerate()
        time.sleep(0.01)


def test_answers_depend_on_the_task_alone() -> None:
    truth = {f"mail-{number:03d}": "ham" for number in range(80)}
    mine = [said(f"one:0000:{item}", truth) for item in truth]
    assert mine == [said(f"two:0000:{item}", truth) for item in truth]
    kinds = {label for answers in mine for _, label in answers}
    assert kinds == {"ham", "spam", None}, "right, wrong and skipped"
