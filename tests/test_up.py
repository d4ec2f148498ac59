"""One box, as `al up` runs it: its servers and its schedule, killed, moved, claimed by another clone.

The tests share one workspace with servers of its own (started once) and leave it running and at rest.
"""

from __future__ import annotations

import socket
import subprocess
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import get_args

import psutil
import pytest
from box import Box, begun, speechless, until
from embedded import al_home_at
from harness import NEVER, change_params

from al_pipeline.errors import ServerFailed
from al_pipeline.files import read_json
from al_pipeline.integrations.git import Git
from al_pipeline.operations.checks.finding import Finding
from al_pipeline.operations.doctor import examine
from al_pipeline.params import StrategyName
from al_pipeline.servers import process as servers
from al_pipeline.servers import start_worker, stop_worker
from al_pipeline.workspace.lock import holder

pytestmark = [pytest.mark.server, pytest.mark.slow, pytest.mark.usefixtures("at_home")]


def schedule_finding(box: Box) -> Finding:
    [finding] = [finding for finding in examine(box.workspace) if finding.check == "schedule"]
    return finding


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
        ({"strategy": 5}, "5 is not valid"),
        ({"close_now": "perhaps"}, "is not of type 'boolean'"),
        ({"workspace": str(tmp_path)}, "Additional properties are not allowed"),
    ):
        assert says in str(box.ask("POST", start, {"parameters": parameters}, code=409)), parameters
    for variables in ({"env": {"AL_WORKSPACE": str(tmp_path)}}, {"working_dir": str(tmp_path)}, {"command": "id"}):
        assert "not allowed" in str(box.ask("POST", start, {"job_variables": variables}, code=422)), variables
    assert box.runs("PENDING", "RUNNING") == []


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
    assert box.al("status")["state"] == "open", "from here on, round 0 is open"


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
