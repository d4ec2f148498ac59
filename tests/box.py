"""A workspace and its own servers as `al up` runs them, for the files of tests that kill them and send them away."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

import psutil
from annotating import ANN, ServerRig
from embedded import al_home_at, seed_prefect, seed_templates
from harness import ask_prefect, later_today, small_workspace

from al_pipeline.files import read_json
from al_pipeline.integrations import forks
from al_pipeline.integrations.git import Git
from al_pipeline.integrations.label_studio.client import LabelStudioOracle
from al_pipeline.integrations.oracle import ProjectRef
from al_pipeline.operations.history import read_plan
from al_pipeline.servers import invite, password_file
from al_pipeline.servers import process as servers
from al_pipeline.servers.prefect_server import deployment_name
from al_pipeline.workspace.lock import holder
from al_pipeline.workspace.workspace import Workspace, open_workspace

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


@contextmanager
def box_below(folder: Path) -> Iterator[Box]:
    """A new workspace with all servers running, which end with the block."""
    home = folder / "al-home"
    with al_home_at(home):
        workspace, _ = small_workspace(folder, changes=later_today())
        seed_templates(home)
        seed_prefect(workspace)
    made = Box(workspace.layout.root, home)
    try:
        made.al("up")
        yield made
    finally:
        made.run("-m", "al_pipeline.cli.app", "-C", str(made.root), "down")


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
