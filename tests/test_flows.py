"""The tick as a Prefect flow, on a real Prefect server: what people see of it there, and what they must not see."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from annotating import ANN, ServerRig, leave
from embedded import LabelStudioServer, PrefectServer
from harness import NEVER, ask_prefect, small_workspace
from own_package import install, wheel

from al_pipeline.files import read_json, write_json
from al_pipeline.integrations.git import Git
from al_pipeline.integrations.label_studio.client import LabelStudioOracle
from al_pipeline.integrations.oracle import ProjectRef
from al_pipeline.operations.checks.services import check_schedule
from al_pipeline.operations.history import read_plan
from al_pipeline.operations.init import init
from al_pipeline.operations.schedule import read_schedule
from al_pipeline.operations.status import status
from al_pipeline.params import PluginName
from al_pipeline.plugins.references import find
from al_pipeline.servers import PrefectApi, prefect_status, read_deployment, write_table
from al_pipeline.workspace.layout import STAGES
from al_pipeline.workspace.trust import accept, accept_contents
from al_pipeline.workspace.workspace import Workspace, open_workspace

pytestmark = [pytest.mark.server, pytest.mark.slow]

ROOT = Path(__file__).parents[1]
WATCH = "al-round: a run without a heartbeat has crashed"


@pytest.fixture
def served(
    prefect_server: PrefectServer, label_studio: LabelStudioServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[Workspace, dict[str, str]]]:
    """A small workspace whose own Prefect server is the tests' one: it takes that one's home and id."""
    workspace, truth = small_workspace(tmp_path)
    home = prefect_server.log.parents[1]
    monkeypatch.setenv("AL_HOME", str(home.parent))
    write_json(workspace.layout.marker, {**read_json(workspace.layout.marker), "workspace_id": home.name})
    Git(workspace.layout.root).commit("Take another id", [workspace.layout.marker])
    workspace = open_workspace(workspace.layout.root)
    workspace.credentials_file.unlink(missing_ok=True)  # of another test in the same home
    yield workspace, truth
    leave(label_studio, workspace)


def al_round(workspace: Workspace, *words: str, code: int = 0, **environment: str) -> subprocess.CompletedProcess[str]:
    """`al round` in a process of its own; it must end with `code`."""
    done = subprocess.run(
        [sys.executable, "-m", "al_pipeline.cli.app", "-C", str(workspace.layout.root), "round", *words],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == code, f"{done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def ask(prefect_server: PrefectServer, what: str, **wanted: Any) -> list[dict[str, Any]]:
    reply = ask_prefect("POST", f"{prefect_server.api_url}/{what}/filter", wanted)
    found: list[dict[str, Any]] = reply.raise_for_status().json()
    return found


def run_of(prefect_server: PrefectServer, act: Callable[[], Any]) -> tuple[dict[str, Any], list[dict[str, Any]], Any]:
    """The one flow run that `act` makes, its task runs as they began, and what `act` returned."""
    ours = {"name": {"any_": ["al-round"]}}  # another test's deployment may be scheduled on the same server
    before = {run["id"] for run in ask(prefect_server, "flow_runs", flows=ours)}
    result = act()
    [run] = [run for run in ask(prefect_server, "flow_runs", flows=ours) if run["id"] not in before]
    tasks = ask(prefect_server, "task_runs", task_runs={"flow_run_id": {"any_": [run["id"]]}})
    return run, sorted(tasks, key=lambda task: str(task["start_time"])), result


def lines_of(prefect_server: PrefectServer, run: dict[str, Any]) -> list[str]:
    return [line["message"] for line in ask(prefect_server, "logs", logs={"flow_run_id": {"any_": [run["id"]]}})]


def files_that_hold(secret: str, *folders: Path) -> list[Path]:
    """Which files below the folders hold the secret in any of their bytes."""
    return [
        path
        for folder in folders
        for path in folder.rglob("*")
        if path.is_file() and secret.encode() in path.read_bytes()
    ]


def test_a_round_is_a_flow_run_with_a_task_for_each_step(
    prefect_server: PrefectServer, label_studio: LabelStudioServer, served: tuple[Workspace, dict[str, str]]
) -> None:
    workspace, truth = served
    layout, token = workspace.layout, label_studio.token
    access = {"AL_LABEL_STUDIO_URL": label_studio.url, "AL_LABEL_STUDIO_TOKEN": token}

    run, tasks, done = run_of(prefect_server, lambda: al_round(workspace, **access))
    assert "as a flow run at http://127.0.0.1" in done.stderr and "first build: train" in done.stderr
    assert run["state"]["type"] == "COMPLETED"
    assert [task["name"] for task in tasks][:2] == ["ingest", "close"]

    ref = ProjectRef(**read_json(layout.project))
    with LabelStudioOracle(label_studio.url, token) as oracle, ServerRig(label_studio, oracle) as rig:
        plan = read_plan(Git(layout.root), 0)
        for task in plan:
            rig.answer(ref, task.push_key, ANN, truth[task.item_id])

    run, tasks, done = run_of(prefect_server, lambda: al_round(workspace, "--json", **access))
    report = json.loads(done.stdout)
    assert report["published"] == [0] and report["state"] == "open"
    assert done.stderr == "", "with --json nothing else is printed"
    assert (run["state"]["type"], run["parameters"]) == (
        "COMPLETED",
        {"close_now": False, "accept_vanished": False, "size": None, "strategy": None},
    )
    names = [task["name"] for task in tasks]
    assert set(names) >= {"ingest", "push", "pull", "close", *STAGES, "decide", "publish", "tag"}
    assert set(names) == set(report["steps"])
    assert [name for name in names if name in STAGES] == list(STAGES), "in the order of dvc.yaml"
    assert names.index("pull") < names.index("close") < names.index("label") < names.index("publish")
    assert names.index("publish") < names.index("tag") < len(names) - 1 - names[::-1].index("push")
    assert {task["state"]["type"] for task in tasks} == {"COMPLETED"}
    lines = lines_of(prefect_server, run)
    assert "round 0: train" in lines
    assert any(line.startswith("round 0: train took ") for line in lines), "our log is a part of the run's"
    assert [line for line in lines if line.startswith("answers: ")][0] == f"answers: {len(plan)} label", lines
    assert not any("git " in line for line in lines), "requests and commands are there from DEBUG on"

    [artifact] = ask(prefect_server, "artifacts", artifacts={"flow_run_id": {"any_": [run["id"]]}})
    metrics = read_json(layout.record(0))["metrics"]
    assert artifact["key"] == f"workspace-{workspace.id}" and artifact["type"] == "table"
    assert "round 1 is open" in artifact["description"] and "al report" in artifact["description"]
    rows = {row["what"]: row["value"] for row in json.loads(artifact["data"])}
    assert rows["macro_f1"] == f"{metrics['macro_f1']['value']:.4f}" and rows["labelled"] == "10"
    assert float(rows["seconds: train"]) > 0

    prefect_home = prefect_server.log.parent
    assert list(prefect_home.glob("*.db")), "this is where Prefect keeps what it was told"
    assert files_that_hold(token, prefect_home, layout.root, workspace.home / "dvc-remote") == []
    assert files_that_hold("al-round", prefect_home), "the search can find something"


def test_the_state_of_al_live_is_one_artifact_that_is_replaced(
    prefect_server: PrefectServer, served: tuple[Workspace, dict[str, str]]
) -> None:
    workspace, _ = served
    user, _, password = prefect_server.env["PREFECT_API_AUTH_STRING"].partition(":")
    api, key = PrefectApi(prefect_server.env["PREFECT_API_URL"], (user, password)), f"live-{workspace.id}"
    first = write_table(workspace, api, key, [{"what": "labels", "value": "7"}], "round 0 is open")
    assert first is not None
    assert write_table(workspace, api, key, [{"what": "labels", "value": "8"}], "round 1 is open", first) == first
    [artifact] = ask(prefect_server, "artifacts", artifacts={"key": {"any_": [key]}})
    assert artifact["type"] == "table" and json.loads(artifact["data"]) == [{"what": "labels", "value": "8"}]
    gone = "00000000-0000-4000-8000-000000000000"
    assert write_table(workspace, api, key, [], "", gone) not in (None, gone), "one that was deleted comes back"


def test_an_error_fails_the_run_and_tells_its_exit_code(
    prefect_server: PrefectServer, label_studio: LabelStudioServer, served: tuple[Workspace, dict[str, str]]
) -> None:
    workspace, _ = served
    wrong = "a11ce0a11ce0a11ce0a11ce0a11ce0a11ce0a11c"
    access = {"AL_LABEL_STUDIO_URL": label_studio.url, "AL_LABEL_STUDIO_TOKEN": wrong}

    run, tasks, done = run_of(prefect_server, lambda: al_round(workspace, code=5, **access))
    assert run["state"]["type"] == "FAILED" and "refused the token (401)" in run["state"]["message"]
    assert [(task["name"], task["run_count"]) for task in tasks if task["state"]["type"] == "FAILED"] == [
        ("connect", 1)
    ], "what was refused is not tried again"
    assert "Traceback" not in done.stderr and "refused the token (401)" in done.stderr
    assert not done.stderr.splitlines()[-1].startswith("LabelStudioRefused")
    assert wrong not in done.stdout + done.stderr
    assert files_that_hold(wrong, prefect_server.log.parent, workspace.layout.root) == []

    plan = workspace.layout.plan(0)
    plan.write_text(plan.read_text() + "\n")
    run, tasks, done = run_of(prefect_server, lambda: al_round(workspace, "--json", code=6, **access))
    assert run["state"]["type"] == "FAILED" and "rounds/0000/plan.jsonl" in run["state"]["message"]
    assert tasks == []
    told = json.loads(done.stdout)
    assert (told["error"], told["exit_code"]) == ("UnexpectedChange", 6)


FLAKY = """
import json, os, sys
from al_pipeline import errors
from al_pipeline.integrations.simulated_oracle import SimulatedOracle
import al_pipeline.flows.rounds as rounds

failure, step = getattr(errors, sys.argv[1]), sys.argv[2]

class Flaky(SimulatedOracle):
    calls = 0
    def _once(self, name):
        if name == step:
            Flaky.calls += 1
            if Flaky.calls == 1:
                raise failure("this once")
    def ensure_project(self, *given, **named):
        self._once("connect")
        return super().ensure_project(*given, **named)
    def answered(self, *given, **named):
        self._once("pull")
        return super().answered(*given, **named)

oracle = Flaky()
rounds.connect = lambda workspace: oracle
try:
    report = rounds.al_round()
    print(json.dumps({"state": report.state, "calls": Flaky.calls}))
except errors.AlError as error:
    print(json.dumps({"error": type(error).__name__, "calls": Flaky.calls}))
"""


def test_only_what_may_come_right_is_tried_again(
    prefect_server: PrefectServer, served: tuple[Workspace, dict[str, str]], tmp_path: Path
) -> None:
    workspace, _ = served
    (tmp_path / "flaky.py").write_text(FLAKY)

    def flaky(failure: str, step: str) -> tuple[dict[str, Any], list[dict[str, Any]], Any]:
        def act() -> Any:
            done = subprocess.run(
                [sys.executable, str(tmp_path / "flaky.py"), failure, step],
                env={**os.environ, **prefect_server.env, "AL_WORKSPACE": str(workspace.layout.root)},
                capture_output=True,
                text=True,
                timeout=400,
                check=False,
            )
            assert done.returncode == 0, done.stderr
            return json.loads(done.stdout)

        return run_of(prefect_server, act)

    def attempts(tasks: list[dict[str, Any]], name: str) -> list[tuple[str, int]]:
        return [(task["state"]["type"], task["run_count"]) for task in tasks if task["name"] == name]

    run, tasks, told = flaky("LabelStudioDown", "connect")
    assert told == {"state": "open", "calls": 2} and run["state"]["type"] == "COMPLETED"
    assert attempts(tasks, "connect") == [("COMPLETED", 2)]

    run, tasks, told = flaky("WrongProject", "connect")
    assert told == {"error": "WrongProject", "calls": 1} and run["state"]["type"] == "FAILED"
    assert "this once" in run["state"]["message"]
    assert attempts(tasks, "connect") == [("FAILED", 1)]


def test_a_stage_that_fails_names_itself_in_the_run(
    prefect_server: PrefectServer, served: tuple[Workspace, dict[str, str]]
) -> None:
    """A stage's failure is nobody's network: one attempt, the stage's last words in the run's state."""
    workspace, _ = served
    dvc_yaml = workspace.layout.dvc_yaml
    dvc_yaml.write_text(dvc_yaml.read_text().replace("al_pipeline.stages.train", "al_pipeline.stages.nothing"))
    accept(workspace.layout.root)
    run, tasks, done = run_of(prefect_server, lambda: al_round(workspace, code=6))
    assert run["state"]["type"] == "FAILED" and "stage train failed" in run["state"]["message"]
    assert [(t["name"], t["state"]["type"], t["run_count"]) for t in tasks][-1] == ("train", "FAILED", 1)
    assert "stages.nothing" in done.stderr and done.stderr.count("Traceback") == 0


def test_without_a_server_it_runs_in_this_process_and_says_so(tmp_path: Path) -> None:
    workspace = init(tmp_path / "workspace", ["ham", "spam"], remote=str(tmp_path / "remote"))
    done = al_round(workspace, code=3)
    assert "Prefect server is not up, so the tick runs in this process" in done.stderr
    assert "al ingest FILE" in done.stdout
    assert json.loads(al_round(workspace, "--json", code=3).stdout)["state"] == "empty"


def check_seen_from_elsewhere(workspace: Workspace, server: PrefectServer) -> None:
    """Without a server of its own, the one that PREFECT_API_URL names is asked; it has no worker."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("al_pipeline.operations.schedule.prefect_status", lambda _: None)
        patch.setattr("al_pipeline.servers.prefect_status", lambda _: None)
        nothing = read_schedule(workspace)
        assert (nothing.server, nothing.elsewhere) == (None, False)
        for name in ("PREFECT_API_URL", "PREFECT_API_AUTH_STRING"):
            patch.setenv(name, server.env[name])
        found = read_schedule(workspace)
        assert (found.server, found.elsewhere, found.differs, found.worker) == (
            server.env["PREFECT_API_URL"],
            True,
            (),
            False,
        )
        assert found.deployment is not None and found.deployment.pool == f"al-{workspace.id}"
        [finding] = check_schedule(workspace)
        assert finding.level == "warning" and "--pool al-" in finding.fix
        assert status(workspace, ask=False).prefect_url == server.env["PREFECT_API_URL"]
        patch.setenv("PREFECT_API_AUTH_STRING", "al:wrong")
        refused = read_schedule(workspace)
        assert refused.deployment is None and "refuses the log-in" in refused.problem
        patch.delenv("PREFECT_API_AUTH_STRING")
        patch.setenv("PREFECT_API_URL", f"{server.env['PREFECT_API_URL']}/nothing")
        assert read_schedule(workspace).deployment is None


def test_the_deployment_bears_the_workspaces_name_and_is_there_once(
    prefect_server: PrefectServer, served: tuple[Workspace, dict[str, str]]
) -> None:
    """Whatever an earlier version called it, and whatever its folder is renamed to; what others put there stays."""
    workspace, _ = served
    pool = f"al-{workspace.id}"

    def apply(root: Path) -> None:
        code = "import os, sys; from pathlib import Path; "
        code += "from al_pipeline.workspace.workspace import open_workspace as o; "
        code += "from al_pipeline.flows.deployments import apply; apply(o(Path(sys.argv[1])), take_over=True)"
        command = [sys.executable, "-c", code, str(root)]
        subprocess.run(command, env={**os.environ, **prefect_server.env}, check=True, timeout=120, cwd=ROOT)

    def names() -> list[str]:
        return sorted(row["name"] for row in ask(prefect_server, "deployments", work_pools={"name": {"any_": [pool]}}))

    apply(workspace.layout.root)
    end = workspace.id
    assert names() == [f"workspace-{end}"]
    flow = ask_prefect("POST", f"{prefect_server.api_url}/flows/", {"name": "al-round"}).json()["id"]
    for name in (workspace.id, "a person's own"):
        body = {"name": name, "flow_id": flow, "work_pool_name": pool}
        ask_prefect("POST", f"{prefect_server.api_url}/deployments/", body).raise_for_status()
    server = prefect_status(workspace)
    assert server is not None
    before = read_deployment(workspace, server)
    assert before is not None and before.schedules, "the one that is named right, where there are two"
    apply(workspace.layout.root)
    assert names() == sorted(["a person's own", f"workspace-{end}"])
    check_seen_from_elsewhere(workspace, prefect_server)
    renamed = workspace.layout.root.rename(workspace.layout.root.with_name("spâm <b>/% 🐟".replace("/", "")))
    found = read_deployment(open_workspace(renamed), server)
    assert found is not None, "found by its pool until it is renamed too"
    apply(renamed)
    assert names() == sorted(["a person's own", f"spâm-b-{end}"])
    for row in ask(prefect_server, "deployments", work_pools={"name": {"any_": [pool]}}):
        httpx.delete(f"{prefect_server.api_url}/deployments/{row['id']}", timeout=60, trust_env=False)


def test_a_teams_own_prefect_runs_it_by_prefect_yaml(
    prefect_server: PrefectServer,
    served: tuple[Workspace, dict[str, str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    forget_packages: None,
) -> None:
    """Deployed by Prefect's own command, run by its own worker; a run that is given another workspace refuses."""
    workspace, _ = served
    root, layout = workspace.layout.root, workspace.layout
    install(wheel(tmp_path / "plug"), tmp_path / "site", monkeypatch)
    environment = {**os.environ, **prefect_server.env, "AL_WORKSPACE": str(root)}

    def prefect(*words: str, code: int = 0) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "prefect", "--no-prompt", *words],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == code, f"{done.stdout}\n{done.stderr}"
        return done.stdout

    def run(**given: Any) -> dict[str, Any]:
        """Have a worker run the deployment once."""
        body = {"state": {"type": "SCHEDULED"}, **given}
        start = f"{prefect_server.api_url}/deployments/{deployment['id']}/create_flow_run"
        made = ask_prefect("POST", start, body).raise_for_status().json()
        prefect("worker", "start", "--pool", "al", "--type", "process", "--run-once")
        [found] = ask(prefect_server, "flow_runs", flow_runs={"id": {"any_": [made["id"]]}})
        return found

    prefect("work-pool", "create", "al", "--type", "process", "--overwrite")
    flow = ask_prefect("POST", f"{prefect_server.api_url}/flows/", {"name": "al-round"}).json()["id"]
    older = {"name": workspace.id, "flow_id": flow, "work_pool_name": "al"}
    ask_prefect("POST", f"{prefect_server.api_url}/deployments/", older).raise_for_status()
    for _ in range(2):
        prefect("deploy", "--prefect-file", "prefect.yaml")
    [deployment] = ask(prefect_server, "deployments", work_pools={"name": {"any_": ["al"]}})
    assert deployment["name"] == f"workspace-{workspace.id}", "and none beside it, named as by earlier versions"
    assert (deployment["entrypoint"], deployment["work_pool_name"]) == ("al_pipeline.flows.rounds.al_round", "al")
    assert deployment["global_concurrency_limit"]["limit"] == 1
    assert deployment["concurrency_options"]["collision_strategy"] == "CANCEL_NEW"
    [schedule] = deployment["schedules"]
    assert (schedule["schedule"]["cron"], schedule["schedule"]["timezone"]) == (NEVER, "UTC")
    assert schedule["active"] is True
    [watch] = ask(prefect_server, "automations", automations={"name": {"any_": [WATCH]}})
    assert watch["enabled"] and watch["trigger"]["within"] == 90
    assert "strategy" in deployment["parameter_openapi_schema"]["properties"]
    failed = run(parameters={"strategy": "plug-first"})
    told = r"select.strategy 'plug-first' runs code of al-plug-test 1.0.0, which is not trusted .*`al trust`"
    assert failed["state"]["type"] == "FAILED" and re.search(told, failed["state"]["message"]), failed
    assert not layout.engine.exists(), "nothing was begun"
    accept_contents([find(PluginName("strategy", "plug-first"), root).claim])
    done = run(parameters={"close_now": True, "strategy": "plug-first"})
    assert done["state"]["type"] == "FAILED" and "of Label Studio are not known here" in done["state"]["message"], done
    assert read_json(layout.engine)["plugins"]["plug-first"].startswith("al-plug-test 1.0.0 (")
    assert read_json(workspace.layout.genesis), "it worked in its workspace until it needed Label Studio"

    other = init(tmp_path / "other", ["ham", "spam"], remote=str(tmp_path / "other-remote"))
    lost = run(job_variables={"env": {"AL_WORKSPACE": str(other.layout.root)}})
    assert lost["state"]["type"] == "FAILED" and "a run cannot choose its workspace" in lost["state"]["message"], lost
    httpx.delete(f"{prefect_server.api_url}/deployments/{deployment['id']}", timeout=60, trust_env=False)
