"""What deploy/compose.yaml starts, without containers: its scripts, commands and environments on a real PostgreSQL.

Everything runs as another user where the tests run as root, with a home of its own.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import boto3
import psutil
import pytest
import yaml
from annotating import ANN, ServerRig
from composed import DEPLOY, compose
from conftest import require
from embedded import TEMPLATES, s3_server
from harness import SMALL, ask_prefect, change_params, later_today, tools_first, write_pool

from al_pipeline.files import read_json
from al_pipeline.integrations.label_studio.client import LabelStudioOracle
from al_pipeline.integrations.oracle import ProjectRef
from al_pipeline.servers.label_studio_server import PREPARE
from al_pipeline.servers.process import free_port, is_healthy
from al_pipeline.workspace.layout import Layout
from al_pipeline.workspace.workspace import Workspace

pytestmark = [pytest.mark.server, pytest.mark.slow]

ROOT = Path(__file__).parents[1]
GUIDE = ROOT / "docs/how-to/servers.md"
NOBODY = 65534
AS_OTHER = (
    *("setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"),
    *("--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search", "--"),  # this Python may lie in root's home
)
NOT_PASSED_ON = ("AL_", "AWS_", "DVC_", "GIT_", "PG", "PREFECT_")
READY_SECONDS = 400


@dataclass
class Team:
    """The services' processes, and the files that their containers would have."""

    folder: Path
    programs: Path
    """Of PostgreSQL."""
    label_studio_venv: Path
    ports: Mapping[str, int] = field(default_factory=lambda: {name: free_port() for name in compose()["services"]})
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    @property
    def user(self) -> Sequence[str]:
        return AS_OTHER if os.geteuid() == 0 else ()

    def secret(self, name: str) -> str:
        return (self.folder / "secrets" / name).read_text(encoding="utf-8").strip()

    def environment(self, service: str, **more: str) -> dict[str, str]:
        """What the service's container would have, with the addresses and the secrets of this machine."""
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(NOT_PASSED_ON)}
        given = compose()["services"][service]["environment"]
        for word, ours in {
            "/run/secrets": str(self.folder / "secrets"),
            "http://prefect:4200": f"http://127.0.0.1:{self.ports['prefect']}",
            "http://store:8333": f"http://127.0.0.1:{self.ports['store']}",
        }.items():
            given = {name: value.replace(word, ours) for name, value in given.items()}
        places = {
            "POSTGRE_HOST": "127.0.0.1",
            "POSTGRE_PORT": str(self.ports["postgres"]),
            "PREFECT_SERVER_DATABASE_HOST": "127.0.0.1",
            "PREFECT_SERVER_DATABASE_PORT": str(self.ports["postgres"]),
            "PREFECT_WORKER_WEBSERVER_PORT": str(self.ports["worker"]),
            "PREFECT_HOME": str(self.folder / "tmp/prefect"),
            "PREFECT_SERVER_UI_STATIC_DIRECTORY": str(self.folder / "tmp/prefect-ui"),
        }
        home = self.folder / f"home-{service}"
        path = os.pathsep.join(map(str, (self.label_studio_venv / "bin", self.programs, tools_first()["PATH"])))
        if service != "label-studio":
            path = os.pathsep.join((str(self.programs), tools_first()["PATH"]))
        return {
            **inherited,
            **given,
            **{name: value for name, value in places.items() if name in given},
            "HOME": str(home),
            "PATH": path,
            "TMPDIR": str(self.folder / "tmp"),
            "PREFECT_WORKER_QUERY_SECONDS": "1",
            "LABEL_STUDIO_BASE_DATA_DIR": str(home),
            "PGHOST": str(self.folder),
            "PGPORT": str(self.ports["postgres"]),
            **more,
        }

    def command(self, service: str, words: Sequence[str] | None = None) -> list[str]:
        """The service's command, or another one in its container; its secrets are read before it starts."""
        ports = {"8080": str(self.ports["label-studio"]), "4200": str(self.ports["prefect"]), "0.0.0.0": "127.0.0.1"}
        own = [ports.get(word, word) for word in compose()["services"][service]["command"]] if words is None else words
        return [*self.user, "sh", str(DEPLOY / "with-secrets.sh"), *own]

    def start(self, service: str, words: Sequence[str] | None = None) -> None:
        with (self.folder / f"{service}.log").open("ab") as log:
            self.processes[service] = subprocess.Popen(
                self.command(service, words), stdout=log, stderr=log, env=self.environment(service), cwd=self.folder
            )

    def stop(self, *services: str) -> None:
        stopped = [self.processes.pop(service) for service in services]
        for process in stopped:
            process.send_signal(signal.SIGINT)  # by SIGTERM, PostgreSQL would wait for its clients
        for process in stopped:
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def run(self, service: str, *words: str, code: int = 0, given: str | None = None, **more: str) -> str:
        """What a command in the service's container prints; it must end with `code`."""
        done = subprocess.run(
            self.command(service, words),
            env=self.environment(service, **more),
            cwd=ROOT,
            input=given,
            capture_output=True,
            text=True,
            timeout=900,
            check=False,
        )
        assert done.returncode == code, f"{words}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def wait(self, service: str, path: str) -> str:
        """The service's address, once it answers at `path`, the one that compose.yaml asks."""
        assert any(path in word for word in compose()["services"][service]["healthcheck"]["test"])
        url, deadline = f"http://127.0.0.1:{self.ports[service]}", time.monotonic() + READY_SECONDS
        while not is_healthy(url + path):
            log = (self.folder / f"{service}.log").read_text(encoding="utf-8", errors="replace")[-3000:]
            assert self.processes[service].poll() is None, log
            assert time.monotonic() < deadline, log
            time.sleep(0.5)
        return url

    def sql(self, database: str, query: str, *more: str, code: int = 0) -> str:
        words = ("--no-psqlrc", "--tuples-only", "--no-align", f"--dbname={database}", f"--command={query}", *more)
        return self.run("postgres", "psql", "--username=postgres", *words, code=code).strip()

    def give(self, *paths: Path) -> None:
        """Let the services' user own the files."""
        if os.geteuid() == 0:
            subprocess.run(["chown", "-R", f"{NOBODY}:{NOBODY}", *map(str, paths)], check=True)


@pytest.fixture(scope="module")
def programs() -> Path:
    """The folder of PostgreSQL's programs: Debian puts them beside the PATH, by version."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: float(path.parts[4]))
    found += [Path(path) for path in [shutil.which("initdb")] if path]
    require(bool(found), "no PostgreSQL; on Debian: apt-get install postgresql")
    if os.geteuid() == 0:
        require(not subprocess.run([*AS_OTHER, "true"], capture_output=True).returncode, "setpriv may not change users")
    return found[0].parent


@pytest.fixture(scope="module")
def team(programs: Path, label_studio_venv: Path) -> Iterator[Team]:
    """PostgreSQL, Prefect and Label Studio run."""
    folder = Path(tempfile.mkdtemp(prefix="al-team-"))
    team = Team(folder, programs, label_studio_venv)
    try:
        for name in ("tmp", *(f"home-{service}" for service in compose()["services"])):
            (folder / name).mkdir(mode=0o700)
        shutil.copy(DEPLOY / "secrets.sh", folder)
        subprocess.run(["sh", str(folder / "secrets.sh")], check=True)
        team.give(folder)
        start_postgres(team)
        team.start("prefect")
        fill_from_template(team)
        team.start("label-studio")
        team.wait("prefect", "/api/health")
        team.wait("label-studio", "/health")
        yield team
    finally:
        team.stop(*team.processes)
        shutil.rmtree(folder)


def start_postgres(team: Team) -> None:
    """As its image does: a cluster whose roles need passwords by TCP, then the script of deploy/ by its socket."""
    data = team.folder / "data"
    options = ("--auth-local=trust", "--auth-host=scram-sha-256", "--encoding=UTF8", "--no-locale", "--no-sync")
    team.run("postgres", "initdb", "--username=postgres", *options, f"--pgdata={data}")
    quick = {"fsync": "off", "synchronous_commit": "off", "full_page_writes": "off"}  # no power loss is tested here
    settings = {"listen_addresses": "127.0.0.1", "unix_socket_directories": str(team.folder), **quick}
    words = [word for name, value in settings.items() for word in ("-c", f"{name}={value}")]
    team.start("postgres", ["postgres", "-D", str(data), *words])
    health = compose()["services"]["postgres"]["healthcheck"]["test"][1:]
    deadline = time.monotonic() + READY_SECONDS
    while subprocess.run(team.command("postgres", health), env=team.environment("postgres")).returncode:
        assert time.monotonic() < deadline, (team.folder / "postgres.log").read_text(encoding="utf-8")
        time.sleep(0.1)
    subprocess.run([*team.user, "sh", str(DEPLOY / "databases.sh")], env=team.environment("postgres"), check=True)


def fill_from_template(team: Team) -> None:
    """Spare Label Studio the migrations of its database: half a minute of processor time, kept as a dump."""
    version = team.run("postgres", "postgres", "--version").split()[2].partition(".")[0]
    [package] = team.label_studio_venv.glob("lib/python*/site-packages/label_studio-*.dist-info")
    template = TEMPLATES / f"{package.name.removesuffix('.dist-info')}-postgresql-{version}.dump"
    if not template.exists():
        team.run("label-studio", str(team.label_studio_venv / "bin/python"), "-c", PREPARE, "version")
        dump = team.folder / "template.dump"
        team.run("postgres", "pg_dump", "--username=postgres", "--format=custom", f"--file={dump}", "label_studio")
        TEMPLATES.mkdir(parents=True, exist_ok=True)
        shutil.copy(dump, template.with_suffix(".new"))
        template.with_suffix(".new").replace(template)
        return
    words = ("--dbname=label_studio", "--no-owner", "--role=label_studio", "--exit-on-error", str(template))
    team.run("postgres", "pg_restore", "--username=postgres", *words)


@dataclass
class Published:
    """A workspace of the team, whose round 0 the worker has published."""

    team: Team
    root: Path
    tasks: int
    ended: str
    """How the flow run ended."""

    def git(self, *words: str) -> str:
        return self.team.run("worker", "git", "-C", str(self.root), *words)


@pytest.fixture(scope="module")
def published(team: Team) -> Iterator[Published]:
    """The steps of the guide: a tick by hand, people's answers, and a tick of the worker."""
    with s3_server(team.ports["store"]):
        yield publish(team, team.folder / "spam")


def publish(team: Team, root: Path) -> Published:
    def al(*words: str, given: str | None = None) -> str:
        return team.run("worker", sys.executable, "-m", "al_pipeline.cli.app", *words, given=given)

    team.start("worker")
    team.run("worker", "sh", "-c", *[line for line in guide_lines() if "S3FileSystem" in line])
    al("init", str(root), "--labels", "ham,spam", "--remote", "s3://al-data/spam")
    change_params(
        Workspace(Layout(root), ""),
        {**SMALL, **later_today(), "test_size: 500": "test_size: 6", "seed_size: 40": "seed_size: 6"},
    )
    truth = write_pool(team.folder / "pool.jsonl", size=40)
    al("-C", str(root), "ingest", str(team.folder / "pool.jsonl"))
    labels, token = f"http://127.0.0.1:{team.ports['label-studio']}", team.secret("label_studio_token")
    al("-C", str(root), "labelstudio", "connect", labels, given=token)
    al("-C", str(root), "labelstudio", "invite", ANN)
    team.wait("worker", "/health")
    team.run("worker", "prefect", "--no-prompt", "deploy", "--prefect-file", "prefect.yaml", AL_WORKSPACE=str(root))

    al("-C", str(root), "round")
    layout = Layout(root)
    plan = [json.loads(line) for line in layout.plan(0).read_text(encoding="utf-8").splitlines()]
    server = SimpleNamespace(url=labels, token=token)
    with LabelStudioOracle(labels, token) as oracle, ServerRig(server, oracle) as rig:
        for task in plan:
            rig.answer(ProjectRef(**read_json(layout.project)), task["push_key"], ANN, truth[task["item_id"]])
    return Published(team, root, len(plan), flow_run(team))


def guide_lines() -> list[str]:
    """The guide's lines, those that a backslash continues as one."""
    return GUIDE.read_text(encoding="utf-8").replace("\\\n", "").splitlines()


def flow_run(team: Team) -> str:
    """Run the deployment once by the worker; the state in which it ends."""
    api = f"http://{team.secret('prefect_login')}@127.0.0.1:{team.ports['prefect']}/api"
    [deployment] = ask_prefect("POST", f"{api}/deployments/filter", {}).raise_for_status().json()
    start = f"{api}/deployments/{deployment['id']}/create_flow_run"
    run = ask_prefect("POST", start, {"state": {"type": "SCHEDULED"}}).raise_for_status().json()["id"]
    deadline = time.monotonic() + READY_SECONDS
    while True:
        state: dict[str, str] = ask_prefect("GET", f"{api}/flow_runs/{run}").raise_for_status().json()["state"]
        if state["type"] in ("COMPLETED", "FAILED", "CANCELLED", "CRASHED"):
            return f"{state['type']} {state['message'] or ''}".strip()
        assert time.monotonic() < deadline, (team.folder / "worker.log").read_text(encoding="utf-8")[-3000:]
        time.sleep(1)


def test_the_worker_publishes_a_round(published: Published) -> None:
    team = published.team
    assert published.ended.split()[0] == "COMPLETED", published.ended
    assert published.git("tag").split() == ["round-0000"]
    assert published.git("status", "--porcelain") == ""
    owners = {found.stat().st_uid for found in published.root.rglob("*")}
    assert owners == {NOBODY if os.geteuid() == 0 else os.geteuid()}
    stages = yaml.safe_load((published.root / "dvc.lock").read_text(encoding="utf-8"))["stages"].values()
    outs = [out for stage in stages for out in stage["outs"]]
    digests = [out["md5"] for out in outs if out["path"].startswith(("data/", "models/"))]
    assert len(digests) >= 4
    access = {"aws_access_key_id": "al", "aws_secret_access_key": team.secret("store"), "region_name": "us-east-1"}
    with closing(boto3.client("s3", endpoint_url=f"http://127.0.0.1:{team.ports['store']}", **access)) as s3:
        for digest in digests:
            s3.head_object(Bucket="al-data", Key=f"spam/files/md5/{digest[:2]}/{digest[2:]}")


def test_both_servers_keep_it_in_their_own_database(published: Published) -> None:
    team = published.team
    assert team.sql("label_studio", "SELECT count(*) FROM task_completion") == str(published.tasks)
    assert team.sql("prefect", "SELECT count(*) FROM flow_run WHERE state_type = 'COMPLETED'") == "1"
    deadline = time.monotonic() + 60
    while team.sql("prefect", "SELECT count(*) FROM flow_run WHERE auto_scheduled") == "0":
        assert time.monotonic() < deadline, "no scheduled run is ever created"
        time.sleep(0.5)
    for one, other in (("prefect", "label_studio"), ("label_studio", "prefect")):
        words = ("psql", "--host=127.0.0.1", f"--username={one}", "--command=SELECT 1", "--dbname")
        password = {"PGPASSWORD": team.secret(f"{one}_database")}
        team.run("postgres", *words, one, **password)
        team.run("postgres", *words, other, code=2, **password)


def test_no_secret_is_shown(published: Published) -> None:
    """Neither to who sees Prefect's page, nor to who lists the machine's processes."""
    team = published.team
    secrets = {team.secret(name) for name in compose()["secrets"]}
    assert len(secrets) == len(compose()["secrets"])
    in_prefect = team.run("postgres", "pg_dump", "--username=postgres", "prefect")
    assert published.root.name in in_prefect
    assert {secret for secret in secrets if secret in in_prefect} == set()
    tracked = published.git("grep", "--count", "s3://al-data", "--", ".dvc/config")
    assert tracked.strip() == ".dvc/config:1"
    for command in (word for process in team.processes.values() for word in psutil.Process(process.pid).cmdline()):
        assert {secret for secret in secrets if secret in command} == set()
    in_files = {
        path.relative_to(published.root).parts[0]
        for path in published.root.rglob("*")
        if path.is_file() and any(secret.encode() in path.read_bytes() for secret in secrets)
    }
    assert in_files == set()


def test_the_guides_dump_restores(published: Published) -> None:
    """Its commands in PostgreSQL's container, as they stand there."""
    team = published.team
    begin = "docker compose exec -T postgres "
    lines = [line for line in guide_lines() if line.startswith(begin)]
    [dump, restore] = [line for line in lines if "label_studio.dump" in line]
    run = lambda line: team.run("postgres", "sh", "-c", f"cd {team.folder} && {line.removeprefix(begin)}")  # noqa: E731
    run(dump)
    team.stop("label-studio")
    team.sql("label_studio", "DELETE FROM task_completion")
    run(restore)
    assert team.sql("label_studio", "SELECT count(*) FROM task_completion") == str(published.tasks)
    owner = "SELECT pg_get_userbyid(datdba) FROM pg_database WHERE datname = 'label_studio'"
    assert team.sql("postgres", owner) == "label_studio"
    words = ("--host=127.0.0.1", "--username=prefect", "--command=SELECT 1", "--dbname=label_studio")
    team.run("postgres", "psql", *words, code=2, PGPASSWORD=team.secret("prefect_database"))
