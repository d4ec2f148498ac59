"""One box, as `al up` runs it: scheduled ticks by a real worker of a real Prefect, killed, slept through, sent away.

The tests share one workspace with servers of its own (started once) and leave it running and at rest.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from subprocess import PIPE
from types import SimpleNamespace
from typing import Any, TypeVar, get_args

import psutil
import pytest
from annotating import ANN, ServerRig
from embedded import al_home_at, seed_templates
from harness import NEVER, ask_prefect, change_params, later_today, small_workspace

from al_pipeline.errors import ServerFailed
from al_pipeline.files import read_json
from al_pipeline.integrations import forks
from al_pipeline.integrations.git import Git
from al_pipeline.integrations.label_studio.client import LabelStudioOracle
from al_pipeline.integrations.oracle import ProjectRef
from al_pipeline.operations.checks.finding import Finding
from al_pipeline.operations.doctor import examine
from al_pipeline.operations.history import read_plan
from al_pipeline.params import StrategyName
from al_pipeline.servers import invite, password_file, start_worker, stop_worker
from al_pipeline.servers import process as servers
from al_pipeline.servers.prefect_server import crash_runs, deployment_name
from al_pipeline.workspace.lock import holder, locked
from al_pipeline.workspace.trust import accept
from al_pipeline.workspace.workspace import Workspace, open_workspace

pytestmark = [pytest.mark.server, pytest.mark.slow]

T = TypeVar("T")
ROOT = Path(__file__).parents[1]
ENDED = {"COMPLETED", "FAILED", "CANCELLED", "CRASHED"}


@dataclass
class Box:
    """A workspace and what `al` says of it; every call is a process of its own."""

    root: Path
    home: Path

    @property
    def workspace(self) -> Workspace:
        return open_workspace(self.root)

    @property
    def environment(self) -> dict[str, str]:
        ours = {**os.environ, "AL_HOME": str(self.home)}
        ours.pop(forks.FOLDER, None)  # `al up` starts a fork server of its own
        return ours

    def al(self, *words: str, code: int = 0) -> Any:
        """What `al WORDS --json` prints; it must end with `code`."""
        done = self.run("-m", "al_pipeline.cli.app", "-C", str(self.root), *words, "--json", code=code)
        return json.loads(done.stdout)

    def run(self, *words: str, code: int = 0, **more: str) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [sys.executable, *words],
            cwd=ROOT,
            env={**self.environment, **more},
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )
        assert done.returncode == code, f"{done.returncode}\n{done.stdout}\n{done.stderr}"
        assert "Traceback" not in done.stderr, done.stderr
        return done

    @property
    def url(self) -> str:
        with al_home_at(self.home):
            return str(read_json(self.workspace.home / "prefect/server.json")["url"])

    @property
    def password(self) -> str:
        """What the box's Prefect server asks for."""
        with al_home_at(self.home):
            return password_file(self.workspace).read_text("utf-8").strip()

    def ask(self, method: str, path: str, body: Any = None, code: int | None = None) -> Any:
        """One request to the box's Prefect server."""
        user, _, word = self.password.partition(":")
        reply = ask_prefect(method, f"{self.url}/api{path}", body, auth=(user, word))
        if code is not None:
            assert reply.status_code == code, reply.text
            return reply.json()
        return reply.raise_for_status().json() if reply.content else None

    def deployment(self) -> dict[str, Any]:
        found: dict[str, Any] = self.ask("GET", f"/deployments/name/al-round/{deployment_name(self.workspace)}")
        return found

    def start_run(self, due: datetime | None = None, **parameters: Any) -> str:
        """Have the server start a run of the deployment, now as the button in its page does, or one that was `due`; its
        id."""
        body: dict[str, Any] = {"parameters": parameters}
        if due:
            body["state"] = {"type": "SCHEDULED", "state_details": {"scheduled_time": due.isoformat()}}
        made = self.ask("POST", f"/deployments/{self.deployment()['id']}/create_flow_run", body)
        return str(made["id"])

    def runs(self, *states: str) -> list[dict[str, Any]]:
        wanted = {"flow_runs": {"state": {"type": {"any_": list(states)}}}} if states else {}
        found: list[dict[str, Any]] = self.ask("POST", "/flow_runs/filter", wanted)
        return found

    def wait_for(self, run: str, *states: str, seconds: float = 120) -> dict[str, Any]:
        """The run, once it is in one of the states (default: has ended)."""

        def found() -> dict[str, Any] | None:
            now: dict[str, Any] = self.ask("GET", f"/flow_runs/{run}")
            return now if now["state"]["type"] in (states or ENDED) else None

        return until(found, seconds)

    def processes(self, service: str) -> list[psutil.Process]:
        """The living processes of `label-studio`, `prefect` or `worker`, their children too."""
        with al_home_at(self.home):
            mark = str(self.workspace.home / service / "server.json")
        return [found for found in psutil.process_iter() if servers.carries_mark(found, mark)]

    def forking(self) -> set[int]:
        """The box's fork server and its forks."""
        found = set()
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                words = process.cmdline()
                if forks.SERVER in words and any(word.startswith(str(self.home)) for word in words):
                    found.add(process.pid)
        return found


def until(look: Callable[[], T | None], seconds: float) -> T:
    """What `look` returns as soon as it is something."""
    deadline = time.monotonic() + seconds
    while not (found := look()):
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.5)
    return found


@pytest.fixture(scope="module")
def box(label_studio_venv: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Box]:
    folder = tmp_path_factory.mktemp("box")
    home = folder / "al-home"
    with al_home_at(home):
        workspace, _ = small_workspace(folder, changes=later_today())
        seed_templates(home)
    made = Box(workspace.layout.root, home)
    try:
        made.al("up")
        yield made
    finally:
        made.run("-m", "al_pipeline.cli.app", "-C", str(made.root), "down")


@pytest.fixture(autouse=True)
def at_home(box: Box, al_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is called in this process sees the box's home too."""
    monkeypatch.setenv("AL_HOME", str(box.home))


def schedule_finding(box: Box) -> Finding:
    [finding] = [finding for finding in examine(box.workspace) if finding.check == "schedule"]
    return finding


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


def test_up_is_safe_to_repeat_and_shows_everything(box: Box) -> None:
    first = box.al("up")
    server = box.forking()
    again = box.al("up")
    assert first == again
    assert len(server) == 2 and box.forking() == server, "one for stages, one for flow runs"
    rows = {row["service"]: row for row in again["services"]}
    assert set(rows) == {"Label Studio", "Prefect", "worker"}
    assert {row["state"] for row in rows.values()} == {"running"}
    assert again["schedule"]["applied"] and again["schedule"]["worker"]
    for service in ("label-studio", "prefect", "worker"):
        for found in box.processes(service):
            assert {c.laddr.ip for c in found.net_connections("tcp") if c.status == psutil.CONN_LISTEN} <= {"127.0.0.1"}
    with al_home_at(box.home):
        own = box.workspace.home / "worker/tmp"
    assert (own / "runner_storage").is_dir() and own.stat().st_mode & 0o077 == 0, "in /tmp it may be another user's"
    due = datetime.fromisoformat(again["schedule"]["next_run"])
    assert due.minute == 0 and timedelta(hours=9) < due - datetime.now(UTC) <= timedelta(hours=12), "daily, in UTC"
    assert box.al("status")["next_run"] == again["schedule"]["next_run"]
    shown = box.run("-m", "al_pipeline.cli.app", "-C", str(box.root), "up").stdout
    assert all(row["address"] in shown and str(row["pid"]) in shown for row in rows.values())
    assert schedule_finding(box).level == "ok"


def test_a_run_has_described_parameters_and_no_say_in_its_workspace(box: Box, tmp_path: Path) -> None:
    deployment = box.deployment()
    properties = deployment["parameter_openapi_schema"]["properties"]
    assert set(properties) == {"close_now", "accept_vanished", "size", "strategy"}
    assert all(len(value["description"]) > 20 for value in properties.values())
    assert properties["strategy"]["anyOf"][0]["enum"] == list(get_args(StrategyName))
    assert "Args:" not in deployment["description"]
    start = f"/deployments/{deployment['id']}/create_flow_run"
    for parameters, says in (
        ({"size": 0}, "less than the minimum of 1"),
        ({"strategy": "best"}, "'best' is not valid"),
        ({"close_now": "perhaps"}, "is not of type 'boolean'"),
        ({"workspace": str(tmp_path)}, "Additional properties are not allowed"),
    ):
        assert says in str(box.ask("POST", start, {"parameters": parameters}, code=409)), parameters
    for variables in ({"env": {"AL_WORKSPACE": str(tmp_path)}}, {"working_dir": str(tmp_path)}, {"command": "id"}):
        assert "not allowed" in str(box.ask("POST", start, {"job_variables": variables}, code=422)), variables
    assert box.runs("PENDING", "RUNNING") == []


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


def test_the_doctor_reports_drift_and_apply_ends_it(box: Box) -> None:
    git = Git(box.root)
    head = git.head()
    assert box.al("schedule", "--cron", "*/20 6-20 29 2 *", "--timezone", "Europe/Berlin")["applied"]
    assert git.run("log", "--format=%s", f"{head}..HEAD").stdout == "Schedule ticks: */20 6-20 29 2 * Europe/Berlin\n"
    assert schedule_finding(box).level == "ok"
    change_params(box.workspace, {"active: true": "active: false"})
    finding = schedule_finding(box)
    assert finding.level == "warning" and "Europe/Berlin, off, the server has */20" in finding.message
    assert "al schedule apply" in finding.fix
    assert box.al("schedule", "apply")["changed"] and not box.al("schedule", "apply")["changed"]
    assert schedule_finding(box).message == "off, as in Prefect"
    until(lambda: box.runs("SCHEDULED") == [] or None, 30)
    assert box.al("schedule", "--on", "--cron", NEVER, "--timezone", "UTC")["applied"]

    box.ask("POST", f"/deployments/{box.deployment()['id']}/pause_deployment")
    assert "paused" in schedule_finding(box).message
    box.al("up")
    assert schedule_finding(box).level == "ok" and not box.deployment()["paused"]
    assert stop_worker(box.workspace)
    assert "no worker" in schedule_finding(box).message
    box.al("up")


def test_another_clone_does_not_take_the_schedule_by_accident(box: Box, tmp_path: Path) -> None:
    clone = Box(tmp_path / "clone", box.home)
    subprocess.run(["git", "clone", "-q", str(box.root), str(clone.root)], check=True)
    assert f"{box.root}, but this is {clone.root}" in schedule_finding(clone).message
    assert clone.al("up")["schedule"]["applied"] is False
    assert clone.al("schedule", "--off")["applied"] is False
    said = clone.run("-m", "al_pipeline.cli.app", "-C", str(clone.root), "schedule", "--on").stderr
    assert f"another clone of this workspace, {box.root}" in said
    assert box.al("up")["schedule"]["applied"]
    assert clone.al("schedule", "apply")["applied"]
    assert str(clone.root) in schedule_finding(box).message
    assert box.al("schedule", "apply")["applied"]


def test_what_was_killed_comes_back_where_it_was(box: Box) -> None:
    before, deployment = box.al("up"), box.deployment()
    for service in ("worker", "label-studio", "prefect"):
        for found in box.processes(service):
            found.kill()
    with pytest.raises(ServerFailed, match="al up"):
        start_worker(box.workspace, lambda _: None)
    after = box.al("up")
    was, now = ({row["service"]: row for row in found["services"]} for found in (before, after))
    assert {row["state"] for row in now.values()} == {"running"}
    assert all(was[name]["address"] == now[name]["address"] and was[name]["pid"] != now[name]["pid"] for name in was)
    assert box.deployment()["id"] == deployment["id"]
    assert box.wait_for(box.start_run())["state"]["type"] == "COMPLETED"


def test_a_worker_of_a_server_that_moved_is_started_again(box: Box) -> None:
    [row] = [row for row in box.al("up")["services"] if row["service"] == "worker"]
    for found in box.processes("prefect"):
        found.kill()
    record = box.workspace.home / "prefect/server.json"
    old = read_json(record)
    with socket.socket() as taken:
        until(lambda: servers.port_is_free(old["port"]) or None, 30)
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        taken.bind(("127.0.0.1", old["port"]))
        taken.listen()
        after = box.al("up")
    assert box.url != old["url"]
    [moved] = [row for row in after["services"] if row["service"] == "worker"]
    assert moved["pid"] != row["pid"]
    assert box.wait_for(box.start_run())["state"]["type"] == "COMPLETED"


@contextmanager
def speechless(box: Box) -> Iterator[None]:
    """Label Studio takes connections and answers none: whoever asks waits."""
    stopped = box.processes("label-studio")
    for found in stopped:
        found.suspend()
    try:
        yield
    finally:
        for found in stopped:
            if found.is_running():
                found.resume()


def begun(box: Box, task: str, **parameters: Any) -> str:
    """Start a run by the worker and wait until it is in the middle of `task`; its id."""
    run = box.start_run(**parameters)

    def there() -> bool | None:
        wanted = {"task_runs": {"flow_run_id": {"any_": [run]}}}
        found = box.ask("POST", "/task_runs/filter", wanted)
        return any(one["name"] == task and (one["state"] or {}).get("type") == "RUNNING" for one in found) or None

    until(there, 120)
    assert "Prefect flow run" in holder(box.workspace.layout.lock)["purpose"]
    return run


def test_a_run_whose_processes_all_vanished_is_marked_as_crashed(box: Box) -> None:
    box.al("up")
    with speechless(box):
        run = begun(box, "connect")
        for found in box.processes("worker"):
            found.kill()
    until(lambda: holder(box.workspace.layout.lock) == {} or None, 10)
    assert box.ask("GET", f"/flow_runs/{run}")["state"]["type"] == "RUNNING"
    crashed = box.wait_for(run, "CRASHED", seconds=300)
    assert "no heartbeat" in crashed["state"]["message"]
    box.al("up")
    assert box.wait_for(box.start_run())["state"]["type"] == "COMPLETED", "its place is free again"


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


def answer_everything(box: Box) -> None:
    """Answer all of round 0 rightly, in Label Studio."""
    workspace = box.workspace
    truth = {
        row["id"]: "spam" if "win money" in row["text"] or "free offer" in row["text"] else "ham"
        for row in map(json.loads, (box.root.parent / "pool.jsonl").read_text().splitlines())
    }
    known = workspace.credentials()
    ref = ProjectRef(**read_json(workspace.layout.project))
    server = SimpleNamespace(**known, invite=lambda email: invite(workspace, email))
    with LabelStudioOracle(known["url"], known["token"]) as oracle, ServerRig(server, oracle) as rig:
        for task in read_plan(Git(box.root), 0):
            rig.answer(ref, task.push_key, ANN, truth[task.item_id])
