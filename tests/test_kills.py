"""Rounds that are killed at every step, made twice, or lose their memory: the bytes come out the same."""

from __future__ import annotations

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
from harness import Killed, Played, answer_all, copy_workspace, go_on, killing, play, results, tools_first

from al_pipeline.data.ledger import read_events
from al_pipeline.files import TEMPORARY_PREFIX, read_json, write_json
from al_pipeline.integrations.git import Git
from al_pipeline.integrations.simulated_oracle import SimulatedOracle
from al_pipeline.operations.tick import TickReport, tick
from al_pipeline.workspace.layout import STAGES
from al_pipeline.workspace.trust import accept
from al_pipeline.workspace.workspace import Workspace, open_workspace

pytestmark = pytest.mark.slow


def test_the_same_answers_give_the_same_bytes(template: Any, undisturbed: Workspace, tmp_path: Path) -> None:
    again = copy_workspace(template, tmp_path)
    play(again, SimulatedOracle(), template[1], 2)
    for number in (0, 1):
        assert results(again, number) == results(undisturbed, number)


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
    workspace, oracle, truth = copy_workspace(template, tmp_path), SimulatedOracle(), template[1]
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
    from al_pipeline.integrations.oracle import ProjectRef

    return ProjectRef(**read_json(workspace.layout.project))


@pytest.mark.parametrize("rest", [0.0, 0.6])
def test_records_of_dvc_that_a_kill_tore_are_put_back(
    started: Played, undisturbed: Workspace, tmp_path: Path, rest: float
) -> None:
    """DVC writes dvc.lock and *.dvc in place: killed then, it leaves a part of them, or nothing."""
    workspace, oracle, truth = go_on(started, tmp_path)
    layout = workspace.layout
    answer_all(oracle, truth)

    def tear(path: Path) -> None:
        text = path.read_text()
        path.write_text(text[: int(len(text) * rest)])

    for step, path in (("close", layout.root / "data/events.dvc"), ("train", layout.dvc_lock)):

        def tearing(name: str, action: Callable[[], Any], /, step: str = step, path: Path = path) -> Any:
            if name != step:
                return action()
            write_json(layout.closing, {"selects_for": 1}) if step == "close" else action()
            tear(path)
            raise Killed

        with pytest.raises(Killed):
            tick(open_workspace(layout.root), lambda: oracle, run=tearing)
    assert tick(open_workspace(layout.root), lambda: oracle).published == (0,)
    assert results(workspace, 0) == results(undisturbed, 0)


BUILD_STEPS = ("close", "encoder", *STAGES, "decide", "publish", "tag")


@pytest.mark.usefixtures("cold")
@pytest.mark.parametrize("moment", ["before", "after"])
def test_sigkill_at_every_step_of_a_build(started: Played, undisturbed: Workspace, tmp_path: Path, moment: str) -> None:
    """The real thing, for the steps that touch disk, git and DVC: the ticking process gets a SIGKILL."""
    workspace, oracle, truth = go_on(started, tmp_path)
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
    workspace = copy_workspace(template, tmp_path)
    script = f"""
import sys
from pathlib import Path
from al_pipeline.operations.facts import open_dvc
from al_pipeline.workspace.workspace import open_workspace
with open_dvc(open_workspace(Path({str(workspace.layout.root)!r})).layout) as dvc:
    dvc.repro("label")
"""
    stage = workspace.layout.root / "dvc.yaml"
    text = stage.read_text()
    stage.write_text(text.replace("python -m al_pipeline.stages.label", "sleep 600 # al_pipeline.stages.label", 1))
    accept(workspace.layout.root)
    tick_files(workspace)
    parent = subprocess.Popen([sys.executable, "-c", script], env=tools_first())
    pid = _wait_for(lambda: read_json(workspace.layout.private / "dvc.json", {}).get("pid"))
    _wait_for(lambda: _sleepers(pid))
    parent.kill()
    parent.wait()
    assert _sleepers(pid)
    stage.write_text(text)
    workspace.layout.engine.unlink()
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


def leave_temporary_files(workspace: Workspace) -> None:
    """What a kill in the middle of an atomic write leaves, in every folder that a tick may write to."""
    for folder, inner, _ in os.walk(workspace.layout.root):
        inner[:] = [name for name in inner if name not in (".git", ".dvc")]
        if Path(folder) == workspace.layout.rounds:
            inner[:] = sorted(inner)[-2:]
        (Path(folder) / f"{TEMPORARY_PREFIX}x1.json").write_text('{"torn', encoding="utf-8")
    for folder in (workspace.layout.private, workspace.layout.features, workspace.layout.private / "published"):
        (folder / f"{TEMPORARY_PREFIX}x2" / "inner").mkdir(parents=True, exist_ok=True)


def test_a_temporary_file_of_a_killed_writer_stops_no_round(
    once: Played, undisturbed: Workspace, tmp_path: Path
) -> None:
    workspace, oracle, truth = go_on(once, tmp_path)
    leave_temporary_files(workspace)
    tick(open_workspace(workspace.layout.root), lambda: oracle)
    answer_all(oracle, truth)
    for step in ("close", "train", "decide", "publish"):
        with pytest.raises(Killed):
            tick(open_workspace(workspace.layout.root), lambda: oracle, run=killing(step, "after"))
        leave_temporary_files(workspace)
    assert tick(open_workspace(workspace.layout.root), lambda: oracle).published == (1,)
    assert results(workspace, 1) == results(undisturbed, 1)
    git = Git(workspace.layout.root)
    assert not [name for name in git.files("HEAD", ".") if TEMPORARY_PREFIX in name]
    assert not git.changed(workspace.layout.owned)
    for folder in (*workspace.layout.sources, workspace.layout.private):
        assert not list(folder.rglob(f"{TEMPORARY_PREFIX}*"))


def test_a_lost_memory_changes_nothing(template: Any, undisturbed: Workspace, tmp_path: Path) -> None:
    """Everything below .al/ can be deleted between ticks."""
    workspace, oracle, truth = copy_workspace(template, tmp_path), SimulatedOracle(), template[1]
    for _ in range(3):
        clone = read_json(workspace.layout.clone)
        shutil.rmtree(workspace.layout.private)
        write_json(workspace.layout.clone, clone)
        tick(open_workspace(workspace.layout.root), lambda: oracle)
        answer_all(oracle, truth)
    for number in (0, 1):
        assert results(workspace, number) == results(undisturbed, number)
