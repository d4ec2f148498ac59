"""What a growing history costs: the steps of a tick that ask Label Studio, at several numbers of answers.

    python -m benchmarks.history [--answers 500 2000 8000] [--repeats 3]      writes benchmarks/results/history.json

On a real Label Studio, with one answer to each task, imported in bulk. At each size: the audit that reads everything,
as the first one in a clone does; then, after each of `--repeats` rounds of 40 new answers, the retirement of open
tasks, the pull and the audit of a round that closes. Beside them, as the limit, one request for the totals of all
tasks, the cheapest question about the whole project. Processor seconds are our process's and the server's; tasks are
those in the replies. A pull looks back over ten minutes before the newest change; here it does not, since the whole
history is a few minutes old.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from statistics import median
from typing import Any

import httpx
import psutil

from al_pipeline.integrations.label_studio.client import LabelStudioOracle
from al_pipeline.integrations.label_studio.payloads import choice_result, task_json
from al_pipeline.integrations.oracle import ProjectRef, ProjectSpec
from al_pipeline.operations import pull as pulling
from al_pipeline.operations.push import RetirePolicy, retire
from al_pipeline.params import Schema
from al_pipeline.records import PlannedTask, Task, push_key
from al_pipeline.servers import admin, start_label_studio, stop_label_studio
from al_pipeline.workspace.layout import Layout
from al_pipeline.workspace.workspace import Workspace
from benchmarks.record import ROOT, record
from benchmarks.round import homes, tell

WORKSPACE = "0123456789ab"
SCHEMA = Schema(version=1, question="Which label fits?", labels=["ham", "spam"], fields=["text"])
ROUND = 40
CHUNK = 500
LATER = "2100-01-01T00:00:00.000000Z"

Figures = dict[str, float]


class History:
    """A project in Label Studio with answered tasks, and the ledger of what was pulled from it."""

    def __init__(self, workspace: Workspace, oracle: LabelStudioOracle, http: httpx.Client, server: int) -> None:
        self.layout, self.oracle, self._http = workspace.layout, oracle, http
        self._server = psutil.Process(server)
        self.ref: ProjectRef = oracle.ensure_project(ProjectSpec(workspace.id, "clone", SCHEMA))
        self.plans: dict[str, PlannedTask] = {}
        self.round = 0
        self.requests = self.tasks = 0
        oracle._transport.http.event_hooks["response"].append(self._count)

    def grow(self, answers: int) -> None:
        """Import one more round of answered tasks."""
        self.round += 1
        for start in range(0, answers, CHUNK):
            tasks = [self._task(len(self.plans)) for _ in range(min(CHUNK, answers - start))]
            said = {"annotations": [{"result": choice_result("ham"), "lead_time": 5.0}]}
            rows = [{**task_json(task), **said} for task in tasks]
            self._http.post(f"/api/projects/{self.ref.project_id}/import", json=rows).raise_for_status()

    def pull(self, *, audit: bool) -> int:
        """Pull; return the number of new answers."""
        now = datetime.now(UTC).isoformat(timespec="seconds")
        request = pulling.PullRequest(self.ref, self.plans, SCHEMA, (), now, max_vanished=0, audit=audit)
        return pulling.pull(self.layout, self.oracle, request).events.total()

    def measured(self, work: Callable[[], Any]) -> Figures:
        """What a step costs."""
        self.requests = self.tasks = 0
        ours, theirs, begin = time.process_time(), self._server_seconds(), time.perf_counter()
        work()
        return {
            "wall_seconds": time.perf_counter() - begin,
            "cpu_seconds": time.process_time() - ours,
            "server_cpu_seconds": self._server_seconds() - theirs,
            "requests": self.requests,
            "tasks": self.tasks,
        }

    def _task(self, number: int) -> Task:
        item = f"item-{number}"
        key = push_key(WORKSPACE, self.round, item)
        self.plans[key] = PlannedTask(key, item, f"hash {item}", "pool", self.round, number, 0.5, "margin", 0.25)
        return Task(self.plans[key], {"text": f"{number} {'some words of a mail ' * 8}"})

    def _count(self, reply: httpx.Response) -> None:
        self.requests += 1
        if reply.request.method == "GET" and reply.request.url.path == "/api/tasks/":
            reply.read()
            self.tasks += len(reply.json()["tasks"])

    def _server_seconds(self) -> float:
        times = [one.cpu_times() for one in (self._server, *self._server.children(recursive=True))]
        return sum(one.user + one.system for one in times)


def main() -> None:
    """Measure and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--answers", type=int, nargs="+", default=[500, 2000, 8000], help="sizes of the history")
    parser.add_argument("--repeats", type=int, default=3, help="rounds at each size")
    options = parser.parse_args()
    pulling.OVERLAP = timedelta(0)
    with tempfile.TemporaryDirectory(prefix="al-benchmark-") as folder, homes(Path(folder)):
        workspace = Workspace(Layout(Path(folder) / "workspace"), WORKSPACE)
        for path in (workspace.layout.events, workspace.layout.inbox_events, workspace.layout.private):
            path.mkdir(parents=True)
        try:
            server = start_label_studio(workspace, tell)
            account = admin(workspace)
            assert account is not None
            headers = {"Authorization": f"Token {account.token}"}
            with (
                httpx.Client(base_url=server.url, headers=headers, timeout=600) as http,
                LabelStudioOracle(server.url, account.token, timeout=600) as oracle,
            ):
                history = History(workspace, oracle, http, server.pid)
                rows = [_at(history, answers, options.repeats) for answers in options.answers]
        finally:
            stop_label_studio(workspace)
    figures = {"round": ROUND, "rolling": pulling.ROLLING, "repeats": options.repeats, "sizes": rows}
    print(json.dumps(figures, indent=2))  # noqa: T201
    print(record("history", figures).relative_to(ROOT))  # noqa: T201


def _at(history: History, answers: int, repeats: int) -> dict[str, Any]:
    """All figures with `answers` answers."""
    history.grow(answers - len(history.plans))
    history.layout.pull_state.unlink(missing_ok=True)
    everything = history.measured(lambda: history.pull(audit=True))
    tell(f"{answers} answers: everything is read in {everything['wall_seconds']:.1f} s")
    steps: dict[str, list[Figures]] = {name: [] for name in ("retire", "pull", "audit", "limit")}
    for _ in range(repeats):
        history.grow(ROUND)
        work: dict[str, Callable[[], Any]] = {
            "retire": lambda: retire(history.oracle, history.ref, RetirePolicy(history.round)),
            "pull": lambda: history.pull(audit=False),
            "audit": lambda: history.pull(audit=True),
            "limit": lambda: history.oracle.totals(history.ref, LATER),
        }
        for name, step in work.items():
            steps[name].append(history.measured(step))
    found = {"everything": _rounded([everything]), **{name: _rounded(runs) for name, runs in steps.items()}}
    tell(f"{answers} answers: the audit of a round {found['audit']['wall_seconds']:.1f} s")
    return {"answers": answers, **found}


def _rounded(runs: Sequence[Figures]) -> Figures:
    return {name: round(median(run[name] for run in runs), 3) for name in runs[0]}


if __name__ == "__main__":
    main()
