"""Whole rounds on real git and DVC: killed at every step, made twice, cloned and checked out."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from harness import answer_all, change_params, play, small_workspace, write_pool

from al_pipeline.errors import EngineChanged, ForeignEdit, LabelStudioDown, Locked, StageFailed
from al_pipeline.files import read_json, sha256_tree, write_json
from al_pipeline.layout import STAGES
from al_pipeline.ledger import read_events
from al_pipeline.lifecycle import Step
from al_pipeline.lock import locked
from al_pipeline.operations.close import bring_sources, check_sources
from al_pipeline.operations.history import read_history, read_plan
from al_pipeline.operations.ingest import ingest
from al_pipeline.operations.status import status
from al_pipeline.operations.tick import Options, TickReport, open_dvc, tick
from al_pipeline.oracle import SimulatedOracle
from al_pipeline.repository import Git
from al_pipeline.results import read_labeled
from al_pipeline.workspace import Workspace, open_workspace

pytestmark = pytest.mark.slow


class Killed(BaseException):
    """Stands for a process that ends between two steps."""


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """A workspace with items and no round; tests work on copies, so that all share its id."""
    folder = tmp_path_factory.mktemp("template")
    _, truth = small_workspace(folder)
    return folder, truth


@pytest.fixture(scope="module")
def undisturbed(template: tuple[Path, dict[str, str]], tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """Two rounds, nothing went wrong."""
    workspace = copy(template, tmp_path_factory.mktemp("undisturbed"))
    play(workspace, SimulatedOracle(), template[1], 2)
    return workspace


def copy(template: tuple[Path, dict[str, str]], folder: Path) -> Workspace:
    shutil.copytree(template[0], folder / "copy")
    root = folder / "copy" / "workspace"
    subprocess.run(
        ["dvc", "remote", "modify", "store", "url", str(folder / "copy" / "remote")], cwd=root, check=True, env=_path()
    )
    subprocess.run(["git", "commit", "-qam", "Use another remote"], cwd=root, check=True, env=_path())
    return open_workspace(root)


def _path() -> dict[str, str]:
    return {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}


def results(workspace: Workspace, number: int) -> dict[str, str]:
    """The digests that must not depend on what went wrong on the way."""
    record = read_json(workspace.layout.record(number))
    return {
        name: record["hashes"][name] for name in ("labeled", "test_labels", "unresolved", "model", "queries", "plan")
    }


def test_rounds_are_published_complete_and_clean(undisturbed: Workspace) -> None:
    git = Git(undisturbed.layout.root)
    assert sorted(git.tags()) == ["round-0000", "round-0001"]
    assert git.run("status", "--porcelain").stdout == ""
    with open_dvc(undisturbed.layout) as dvc:
        assert dvc.changed() == {}
        assert dvc.missing_in_remote() == []
    found = status(undisturbed)
    assert (found["round"], found["state"], found["labelled"]) == (2, "open", 18)
    assert found["labelled"] + found["pending"] + found["ignored"] + found["unlabelled"] == found["pool"] == 68
    assert found["promoted"] in git.tags()


def test_plans_never_repeat_an_item_and_test_items_are_never_queried(undisturbed: Workspace) -> None:
    git = Git(undisturbed.layout.root)
    plans = [read_plan(git, number) for number in range(3)]
    asked = [task.item_id for plan in plans for task in plan]
    assert len(set(asked)) == len(asked)
    assert [task.part for task in plans[0]] == ["test"] * 12 + ["pool"] * 10
    assert {task.part for plan in plans[1:] for task in plan} == {"pool"}
    labeled = {row.item_id for row in read_labeled(undisturbed.layout.labeled)}
    assert labeled == {task.item_id for plan in plans[:2] for task in plan if task.part == "pool"}


def test_the_same_answers_give_the_same_bytes(template: Any, undisturbed: Workspace, tmp_path: Path) -> None:
    again = copy(template, tmp_path)
    play(again, SimulatedOracle(), template[1], 2)
    for number in (0, 1):
        assert results(again, number) == results(undisturbed, number)


def test_a_fresh_clone_goes_back_to_a_tag_and_makes_it_again(undisturbed: Workspace, tmp_path: Path) -> None:
    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "-q", str(undisturbed.layout.root), str(clone)], check=True)
    for tag in ("round-0000", "round-0001"):
        subprocess.run(["git", "checkout", "-q", tag], cwd=clone, check=True)
        workspace = open_workspace(clone)
        with open_dvc(workspace.layout) as dvc:
            dvc.pull()
            assert dvc.changed() == {}
        number = int(tag[-4:])
        before = read_json(workspace.layout.record(number))["hashes"]
        assert sha256_tree(workspace.layout.labeled) == before["labeled"]
        assert sha256_tree(workspace.layout.model) == before["model"]
    shutil.rmtree(workspace.layout.features, ignore_errors=True)
    shutil.rmtree(workspace.layout.pool)
    with open_dvc(workspace.layout) as dvc:
        bring_sources(workspace.layout, dvc)
        check_sources(workspace.layout, dvc)
    with open_dvc(workspace.layout) as dvc:
        for stage in STAGES:
            dvc.repro(stage, force=True, run_cache=False)
    hashes = {"labeled": workspace.layout.labeled, "model": workspace.layout.model, "queries": workspace.layout.queries}
    assert {name: sha256_tree(path) for name, path in hashes.items()} == {name: before[name] for name in hashes}
    assert subprocess.run(["git", "diff", "--quiet", "HEAD"], cwd=clone, check=False).returncode == 0


def interrupted(workspace: Workspace, oracle: SimulatedOracle, after: int) -> TickReport | None:
    """A tick that ends like a killed process once `after` steps have been taken; None where it was killed."""
    taken = 0

    def run(_name: str, action: Callable[[], Any], /) -> Any:
        nonlocal taken
        result = action()
        taken += 1
        if taken == after:
            raise Killed
        return result

    try:
        return tick(open_workspace(workspace.layout.root), lambda: oracle, run=run)
    except Killed:
        return None


def test_killed_after_every_step(template: Any, undisturbed: Workspace, tmp_path: Path) -> None:
    """The first tick is killed after one step, the next after two, and so on, before it can note the last of them."""
    workspace, oracle, truth = copy(template, tmp_path), SimulatedOracle(), template[1]
    killed = 0
    for published in (0, 1):
        for attempt in range(60):
            report = interrupted(workspace, oracle, 1 + attempt)
            killed += report is None
            if report is not None and report.round == published:
                break
        else:
            pytest.fail("the round never came to an end")
        answer_all(oracle, truth)
    while (report := interrupted(workspace, oracle, 100)) is None or report.round != 2:
        answer_all(oracle, truth)
    assert killed > 10
    for number in (0, 1):
        assert results(workspace, number) == results(undisturbed, number)
    keys = [state.push_key for state in oracle.task_states(_project(workspace))]
    assert len(keys) == len(set(keys)) == 12 + 10 + 8 + 8
    answers = [event.annotation_key for event in read_events(workspace.layout.events)]
    assert len(answers) == len(set(answers)) == 12 + 10 + 8


def _project(workspace: Workspace) -> Any:
    from al_pipeline.oracle import ProjectRef

    return ProjectRef(**read_json(workspace.layout.project))


BUILD_STEPS = ("close", "encoder", *STAGES, "decide", "publish", "tag")


@pytest.mark.parametrize("moment", ["before", "after"])
def test_sigkill_at_every_step_of_a_build(template: Any, undisturbed: Workspace, tmp_path: Path, moment: str) -> None:
    """The real thing, for the steps that touch disk, git and DVC: the ticking process gets a SIGKILL."""
    workspace, oracle, truth = copy(template, tmp_path), SimulatedOracle(), template[1]
    tick(workspace, lambda: oracle)
    answer_all(oracle, truth)
    for name in BUILD_STEPS:
        child = multiprocessing.get_context("fork").Process(
            target=_die_at, args=(workspace.layout.root, oracle, name, moment)
        )
        child.start()
        child.join(120)
        assert child.exitcode == -signal.SIGKILL, name
    report = tick(open_workspace(workspace.layout.root), lambda: oracle)
    assert report.round == 1
    assert results(workspace, 0) == results(undisturbed, 0)
    git = Git(workspace.layout.root)
    assert git.run("status", "--porcelain").stdout == ""
    assert list(git.tags()) == ["round-0000"]


def _die_at(root: Path, oracle: SimulatedOracle, name: str, moment: str) -> None:
    def run(step: str, action: Callable[[], Any], /) -> Any:
        if step == name and moment == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        result = action()
        if step == name:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    tick(open_workspace(root), lambda: oracle, run=run)


def test_a_stage_that_a_killed_tick_left_running_is_ended(template: Any, tmp_path: Path) -> None:
    workspace = copy(template, tmp_path)
    script = f"""
import sys
from pathlib import Path
from al_pipeline.operations.tick import open_dvc
from al_pipeline.workspace import open_workspace
with open_dvc(open_workspace(Path({str(workspace.layout.root)!r})).layout) as dvc:
    dvc.repro("label")
"""
    stage = workspace.layout.root / "dvc.yaml"
    text = stage.read_text()
    stage.write_text(text.replace("python -m al_pipeline.stages.label", "sleep 600 # al_pipeline.stages.label", 1))
    tick_files(workspace)
    parent = subprocess.Popen([sys.executable, "-c", script], env=_path())
    pid = _wait_for(lambda: read_json(workspace.layout.private / "dvc.json", {}).get("pid"))
    _wait_for(lambda: _sleepers(pid))
    parent.kill()
    parent.wait()
    assert _sleepers(pid)
    stage.write_text(text)
    tick(open_workspace(workspace.layout.root), SimulatedOracle)
    assert not _sleepers(pid)


def tick_files(workspace: Workspace) -> None:
    """What the label stage needs, without a tick."""
    workspace.layout.events.mkdir(parents=True)
    write_json(workspace.layout.engine, {})


def _wait_for(found: Callable[[], Any], seconds: float = 60) -> Any:
    import time

    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if value := found():
            return value
        time.sleep(0.1)
    pytest.fail("waited in vain")


def _sleepers(group: int) -> list[int]:
    import psutil

    found = []
    for process in psutil.process_iter(["cmdline", "status"]):
        try:
            if os.getpgid(process.pid) == group and "600" in (process.info["cmdline"] or []):
                found.append(process.pid)
        except ProcessLookupError:
            continue
    return found


def test_two_ticks_at_once_cannot_be(template: Any, tmp_path: Path) -> None:
    workspace = copy(template, tmp_path)
    with locked(workspace.layout.lock, "a test"), pytest.raises(Locked, match="a test, process"):
        tick(workspace, SimulatedOracle)


def test_what_goes_wrong_and_comes_right(template: Any, tmp_path: Path) -> None:
    """One workspace through a row of mishaps; each stops the tick with a clear word and leaves the round whole."""
    workspace, oracle, truth = copy(template, tmp_path), SimulatedOracle(), template[1]
    root = workspace.layout.root

    def down() -> SimulatedOracle:
        raise LabelStudioDown("not there")

    with pytest.raises(LabelStudioDown):
        tick(workspace, down)
    assert status(workspace)["state"] == "open", "the first build needs no Label Studio"
    tick(workspace, lambda: oracle)
    answer_all(oracle, truth)

    ledger = workspace.layout.events / "part-000001.jsonl"
    ledger.write_text("")
    with pytest.raises(ForeignEdit, match="data/events"):
        tick(open_workspace(root), lambda: oracle)
    ledger.unlink()

    record = workspace.layout.plan(0)
    text = record.read_text()
    record.write_text(text + "\n")
    with pytest.raises(ForeignEdit, match="plan.jsonl"):
        tick(open_workspace(root), lambda: oracle)
    assert record.read_text() == text + "\n", "somebody's edit is not overwritten"
    record.write_text(text)

    change_params(workspace, {"strategy: margin": "strategy: entropy"})
    dvc_yaml = workspace.layout.dvc_yaml.read_text()
    workspace.layout.dvc_yaml.write_text(dvc_yaml.replace("al_pipeline.stages.train", "al_pipeline.stages.nothing"))
    with pytest.raises(StageFailed, match="stages.nothing"):
        tick(open_workspace(root), lambda: oracle)
    found = status(open_workspace(root))
    assert (found["state"], found["labelled"]) == ("closed", 0), "status tells of the last commit"
    workspace.layout.dvc_yaml.write_text(dvc_yaml)

    write_json(workspace.layout.engine, {"version": "another"})
    report = tick(open_workspace(root), lambda: oracle)
    assert report.published == (0,)
    assert read_history(workspace.layout, Git(root)).record(0)["params"]["select"]["strategy"] == "entropy"
    plan = read_plan(Git(root), 1)
    assert {task.strategy for task in plan} == {"entropy", "random_slice"}


def test_params_edited_in_the_middle_of_a_build_start_it_over(template: Any, tmp_path: Path) -> None:
    workspace, oracle, truth = copy(template, tmp_path), SimulatedOracle(), template[1]
    tick(workspace, lambda: oracle)
    answer_all(oracle, truth)

    def stop_before_publish(name: str, action: Callable[[], Any], /) -> Any:
        if name == "publish":
            raise Killed
        return action()

    with pytest.raises(Killed):
        tick(open_workspace(workspace.layout.root), lambda: oracle, run=stop_before_publish)
    change_params(workspace, {"batch_size: 8": "batch_size: 5"})
    report = tick(open_workspace(workspace.layout.root), lambda: oracle)
    names = [name for name, _ in report.steps]
    assert "select" in names and "decide" in names
    assert len(read_plan(Git(workspace.layout.root), 1)) == 5


def test_new_items_wait_for_the_close_and_late_answers_count(template: Any, tmp_path: Path) -> None:
    workspace, oracle, truth = copy(template, tmp_path), SimulatedOracle(), dict(template[1])
    tick(workspace, lambda: oracle)
    keys = oracle.queue("ann@example.org")
    for key in keys[:20]:
        oracle.answer(key, "ann@example.org", truth[key.rsplit(":", 1)[1]])
    truth |= write_pool(tmp_path / "more.jsonl", 30, seed=9, start=500)
    ingest(workspace, [tmp_path / "more.jsonl"])
    assert Git(workspace.layout.root).run("status", "--porcelain").stdout == "", "clean while people label"
    found = status(workspace)
    assert (found["incoming"], found["pool"]) == (30, 98)
    report = tick(open_workspace(workspace.layout.root), lambda: oracle)
    assert report.published == (0,)
    late = keys[-1]
    oracle.answer(late, "ann@example.org", truth[late.rsplit(":", 1)[1]])
    for key in oracle.queue("bob@example.org"):
        oracle.answer(key, "bob@example.org", truth[key.rsplit(":", 1)[1]])
    tick(open_workspace(workspace.layout.root), lambda: oracle)
    rows = {row.item_id: row for row in read_labeled(workspace.layout.labeled)}
    assert rows[late.rsplit(":", 1)[1]].round == 0
    found = status(workspace)
    assert found["pool"] == 98 and found["incoming"] == 0


def test_close_now_closes_with_what_there_is(template: Any, tmp_path: Path) -> None:
    workspace, oracle, truth = copy(template, tmp_path), SimulatedOracle(), template[1]
    tick(workspace, lambda: oracle)
    key = oracle.queue("ann@example.org")[-1]
    oracle.answer(key, "ann@example.org", truth[key.rsplit(":", 1)[1]])
    assert tick(open_workspace(workspace.layout.root), lambda: oracle).published == ()
    report = tick(open_workspace(workspace.layout.root), lambda: oracle, options=Options(close_now=True))
    assert report.published == (0,)


def test_a_lost_memory_changes_nothing(template: Any, undisturbed: Workspace, tmp_path: Path) -> None:
    """Everything below .al/ can be deleted between ticks."""
    workspace, oracle, truth = copy(template, tmp_path), SimulatedOracle(), template[1]
    for _ in range(3):
        clone = read_json(workspace.layout.clone)
        shutil.rmtree(workspace.layout.private)
        write_json(workspace.layout.clone, clone)
        tick(open_workspace(workspace.layout.root), lambda: oracle)
        answer_all(oracle, truth)
    for number in (0, 1):
        assert results(workspace, number) == results(undisturbed, number)


def test_the_record_says_what_the_round_was(undisturbed: Workspace) -> None:
    record = read_json(undisturbed.layout.record(1))
    assert record["answers"]["answered"] == record["answers"]["tasks"] == 8
    assert record["decision"]["verdict"] in ("promoted", "refused", "held")
    assert record["counts"]["labels"].keys() <= {"ham", "spam"}
    assert record["engine"]["sources"] and record["parent"]
    assert json.dumps(record, allow_nan=False)


def test_a_stage_refuses_another_engine(undisturbed: Workspace, tmp_path: Path) -> None:
    from al_pipeline.layout import Layout
    from al_pipeline.stages.label import main

    layout = Layout(tmp_path)
    write_json(layout.engine, {"version": "0"})
    with pytest.raises(EngineChanged, match="version: was 0"):
        main(layout)


def test_steps_have_the_names_of_the_stages() -> None:
    assert {str(step) for step in Step} >= set(STAGES)


def test_guesses_are_shown_only_where_asked_for_and_never_on_test_items(template: Any, tmp_path: Path) -> None:
    workspace, oracle, truth = copy(template, tmp_path), SimulatedOracle(), template[1]
    change_params(workspace, {"show_guess: false": "show_guess: true"})
    play(open_workspace(workspace.layout.root), oracle, truth, 1)
    held = oracle.projects[read_json(workspace.layout.project)["project_id"]].tasks.values()
    guessed = {task.data["push_key"] for task in held if task.data.get("al_prelabel")}
    plan = read_plan(Git(workspace.layout.root), 1)
    assert guessed == {task.push_key for task in plan}, "round 0 had no model to guess with"


def test_a_notebook_sees_the_rounds_the_labels_and_the_predictions(undisturbed: Workspace) -> None:
    from al_pipeline import frames

    root = undisturbed.layout.root
    rounds = frames.rounds(root)
    assert rounds["round"].tolist() == [0, 1] and rounds["labelled"].tolist() == [10, 18]
    labels = frames.labeled(root)
    assert len(labels) == 18 and labels["text"].notna().all() and set(labels["label"]) <= {"ham", "spam"}
    predicted = frames.predictions(root)
    assert len(predicted) == 12
    assert ((predicted["p_ham"] + predicted["p_spam"]) - 1).abs().max() < 1e-6
