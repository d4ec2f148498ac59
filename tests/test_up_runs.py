"""One box, as `al up` runs it: ticks by a real worker of a real Prefect, killed, cancelled, slept through, sent away.

The tests share one workspace with servers of its own (started once) and leave it running and at rest.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from subprocess import PIPE
from typing import Any

import psutil
import pytest
from box import ROOT, Box, answer_everything, begun, speechless, until
from embedded import al_home_at

from al_pipeline.files import read_json
from al_pipeline.integrations.git import Git
from al_pipeline.servers import start_worker, stop_worker
from al_pipeline.servers.prefect_server import crash_runs
from al_pipeline.workspace.lock import holder, locked
from al_pipeline.workspace.trust import accept

pytestmark = [pytest.mark.server, pytest.mark.slow, pytest.mark.usefixtures("at_home")]


def slow_stage(box: Box, seconds: float) -> None:
    """Make the first stage of a build take so long (0: as before)."""
    path = box.root / "dvc.yaml"
    text = path.read_text(encoding="utf-8").replace("cmd: sleep 30 && ", "cmd: ")
    command = "cmd: python -m al_pipeline.stages.label"
    assert command in text
    if seconds:
        text = text.replace(command, f"cmd: sleep {seconds:.0f} && {command.removeprefix('cmd: ')}")
    path.write_text(text, encoding="utf-8")
    with al_home_at(box.home):
        accept(box.root)


def test_the_one_who_comes_second_is_told_who_works_here(box: Box) -> None:
    with locked(box.workspace.layout.lock, "a long tick"):
        run = box.wait_for(box.start_run())
        told = box.al("round", code=4)
    says = f"a long tick, process {os.getpid()} on "
    assert run["state"]["type"] == "CANCELLED", "nothing went wrong: it is no failure"
    assert says in run["state"]["message"] and ", since 20" in run["state"]["message"]
    assert told["error"] == "Locked" and says in told["message"]


def test_a_run_by_hand_makes_the_first_plan_as_asked(box: Box) -> None:
    """`prefect deployment run`, through the worker, into the real Label Studio."""
    where = {
        "PREFECT_API_URL": f"{box.url}/api",
        "PREFECT_API_AUTH_STRING": box.password,
        "PREFECT_HOME": str(box.home / "client"),
    }
    name = f"al-round/workspace-{box.workspace.id}"
    words = ("-m", "prefect", "deployment", "run", name, "-p", "close_now=true", "-p", "size=4", "--watch")
    done = box.run(*words, **where)
    assert "Completed" in done.stdout
    status = box.al("status")
    assert (status["round"], status["state"], status["pending"]) == (0, "open", 4)
    assert read_json(box.workspace.layout.genesis)["overrides"] == {"size": 4}

    run = box.wait_for(box.start_run(size=3))
    assert run["state"]["type"] == "FAILED" and "selected no batch" in run["state"]["message"]
    told = box.al("round", "--strategy", "entropy", code=3)
    assert told["error"] == "NothingToDo" and "selected no batch, so strategy had no effect" in told["message"]
    assert "'margin', 'entropy'" in box.al("round", "--strategy", "best", code=2)["message"]


def test_a_worker_that_slept_through_three_ticks_runs_one(box: Box) -> None:
    """The runs are due an hour apart, as an hourly schedule leaves them: none is due while the worker starts."""
    assert stop_worker(box.workspace)
    now = datetime.now(UTC)
    late = [box.start_run(due=now - timedelta(hours=hours)) for hours in (3, 2, 1)]
    start_worker(box.workspace, lambda _: None)
    runs = [box.wait_for(run) for run in late]
    states = sorted(run["state"]["type"] for run in runs)
    assert states == ["CANCELLED", "CANCELLED", "COMPLETED"], "one tick does the work of all"
    lost = [run["state"]["message"] for run in runs if run["state"]["type"] == "CANCELLED"]
    assert all("concurrency limit" in message for message in lost)


def test_a_run_is_a_fork_and_can_be_cancelled(box: Box) -> None:
    box.al("up")
    with speechless(box):
        run = begun(box, "connect")
        pid = holder(box.workspace.layout.lock)["pid"]
        assert pid in box.forking()
        box.ask("POST", f"/flow_runs/{run}/set_state", {"state": {"type": "CANCELLING"}})
        assert box.wait_for(run)["state"]["type"] == "CANCELLED"
        until(lambda: not psutil.pid_exists(pid) or None, 60)
    assert holder(box.workspace.layout.lock) == {}
    assert box.wait_for(box.start_run())["state"]["type"] == "COMPLETED"


def test_a_run_that_was_killed_with_its_worker_has_ended_before_a_worker_is_back(
    box: Box, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A new worker asks for work at once: what is due would be cancelled if the dead run still had its place."""
    workers: list[int] = []

    def watched(*words: Any) -> int:
        workers.append(len(box.processes("worker")))
        return crash_runs(*words)

    monkeypatch.setattr("al_pipeline.servers.worker.crash_runs", watched)
    box.al("up")
    with speechless(box):
        run = begun(box, "connect")
        for found in box.processes("worker"):
            found.kill()
        start_worker(box.workspace, lambda _: None)
    assert workers[0] == 0
    ended = box.wait_for(run, seconds=1)
    assert ended["state"]["type"] == "CRASHED" and "next tick finishes" in ended["state"]["message"], ended["state"]
    assert box.wait_for(box.start_run())["state"]["type"] == "COMPLETED", "its place is free"


def test_down_in_the_middle_of_a_tick_leaves_nothing_behind(box: Box) -> None:
    box.al("up")
    with speechless(box):
        run = begun(box, "connect")
        box.run("-m", "al_pipeline.cli.app", "-C", str(box.root), "down")
    assert not any(box.processes(service) for service in ("worker", "prefect", "label-studio"))
    assert not box.forking()
    assert holder(box.workspace.layout.lock) == {}
    box.al("up")
    assert box.wait_for(run, seconds=1)["state"]["type"] == "CRASHED"
    assert box.wait_for(box.start_run())["state"]["type"] == "COMPLETED"


def test_a_prefect_server_that_is_started_again_in_the_middle_costs_no_work(box: Box) -> None:
    """The tick goes on without it, or ends and says so; the next one finishes the job either way."""
    workspace, git = box.workspace, Git(box.root)
    box.al("up")
    answer_everything(box)
    slow_stage(box, 30)
    run = begun(box, "label")
    for found in box.processes("prefect"):
        found.kill()
    box.al("up")
    ended = box.wait_for(run, seconds=200)
    slow_stage(box, 0)
    box.al("round", code=3)  # the run went on to its end
    assert "round-0000" in git.tags()
    assert len(read_json(workspace.layout.record(0))["counts"]["labels"]) == 2
    assert ended["state"]["type"] == "COMPLETED", ended["state"]


def test_a_round_by_hand_does_its_work_although_its_prefect_server_went_away(box: Box) -> None:
    """`al round` is a flow of its own process; the server goes away under it for good."""
    box.al("up")
    slow_stage(box, 0)
    with speechless(box):
        words = [sys.executable, "-m", "al_pipeline.cli.app", "-C", str(box.root), "round"]
        hasty = {**box.environment, "PREFECT_CLIENT_MAX_RETRIES": "1"}
        with subprocess.Popen(words, cwd=ROOT, env=hasty, stderr=PIPE, stdout=PIPE, text=True) as process:
            assert process.stderr is not None
            while "connect" not in (line := process.stderr.readline()):
                assert line, "it ended before it connected"
            for found in box.processes("prefect"):
                found.kill()
            for found in box.processes("label-studio"):
                found.resume()
            out, err = process.communicate(timeout=200)
    assert process.returncode in (0, 3), err  # it did something, or found nothing to do
    assert "Traceback" not in err
    assert "Prefect server does not answer" in out and "`al up`" in out and "is open" in out


def test_a_round_by_hand_is_a_fork_and_ends_with_what_was_called(box: Box) -> None:
    box.al("up")
    lock = box.workspace.layout.lock
    words = [sys.executable, "-m", "al_pipeline.cli.app", "-C", str(box.root), "round"]
    for number, code in ((signal.SIGINT, 130), (signal.SIGKILL, -signal.SIGKILL)):
        with speechless(box), subprocess.Popen(words, cwd=ROOT, env=box.environment, stderr=PIPE, text=True) as process:
            assert process.stderr is not None
            while "connect" not in (line := process.stderr.readline()):
                assert line, "it ended before it connected"
            pid = holder(lock)["pid"]
            assert pid in box.forking()
            process.send_signal(number)
            assert process.wait(60) == code
            until(lambda: holder(lock) == {} or None, 10)
            assert not psutil.pid_exists(pid)
    box.al("round", code=3)  # there was nothing to do
