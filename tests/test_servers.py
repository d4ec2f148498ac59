"""The embedded servers: started once, found again, ended alone, open to nobody else; and schedules that really fire."""

from __future__ import annotations

import contextlib
import http.server
import os
import signal
import socket
import ssl
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import psutil
import pytest
from embedded import LabelStudioServer, PrefectServer, silent
from harness import ask_prefect

from al_pipeline.errors import BadInput, LabelStudioRefused, ServerFailed, UsageError
from al_pipeline.files import read_json, write_json
from al_pipeline.servers import (
    admin,
    install,
    invite,
    prefect_environment,
    reset_password,
    start_label_studio,
    stop_label_studio,
)
from al_pipeline.servers import prefect_server as prefects
from al_pipeline.servers import process as servers
from al_pipeline.servers.process import MARK, Server, Service
from al_pipeline.workspace.layout import Layout
from al_pipeline.workspace.workspace import Workspace

HONEST = """
import http.server, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self): self.send_response(200); self.end_headers()
    def log_message(self, *args): pass
print("hello from the server", flush=True)
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return Workspace(Layout(tmp_path / "workspace"), "abcdefabcdef")


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Callable[..., Service]]:
    """A service of a few lines; if it `moves`, it takes another port than it is told, as Label Studio may."""
    made: list[Service] = []

    def build(code: str = HONEST, moves: bool = False, timeout: float = 30.0) -> Service:
        service = Service(
            name="toy",
            home=tmp_path / "toy",
            command=lambda port: (sys.executable, "-c", code, "0" if moves else str(port)),
            environment=lambda port: {"TOY_SECRET": "hush"},
            health="/health",
            timeout=timeout,
        )
        made.append(service)
        return service

    yield build
    for service in made:
        servers.stop(service)


@contextlib.contextmanager
def neighbour() -> Iterator[int]:
    """Somebody else's web server, which answers 200 to everything; yields its port."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None: ...

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_address[1]
        server.shutdown()


def addresses(pid: int) -> set[str]:
    """Where a process listens."""
    return {c.laddr.ip for c in psutil.Process(pid).net_connections("tcp") if c.status == psutil.CONN_LISTEN}


class TestProcess:
    """The generic part, on a server of four lines."""

    pytestmark = pytest.mark.slow

    def test_start_is_idempotent_and_stop_ends_it(self, make: Callable[..., Service]) -> None:
        service = make()
        first = servers.start(service, silent)
        assert servers.start(service, silent) == first == servers.status(service)
        assert servers.stop(service)
        assert servers.status(service) is None
        assert not servers.processes(service)
        assert not servers.stop(service)

    def test_the_port_is_kept_between_starts(self, make: Callable[..., Service]) -> None:
        service = make()
        first = servers.start(service, silent)
        servers.stop(service)
        assert servers.start(service, silent).url == first.url

    def test_a_taken_port_is_given_up(self, make: Callable[..., Service]) -> None:
        service = make()
        first = servers.start(service, silent)
        servers.stop(service)
        with neighbour() as port:
            write_json(service.record, {**read_json(service.record), "port": port})
            second = servers.start(service, silent)
            assert second.port not in (port, 0)
            assert servers.status(service) == second
        assert first.pid != second.pid

    def test_a_server_that_moves_to_another_port_is_not_believed(self, make: Callable[..., Service]) -> None:
        service = make(moves=True)
        with pytest.raises(ServerFailed, match="no free port"):
            servers.start(service, silent)
        assert not servers.processes(service)

    def test_a_neighbour_at_the_recorded_port_is_not_taken_for_ours(self, make: Callable[..., Service]) -> None:
        service = make()
        started = servers.start(service, silent)
        with neighbour() as port:
            write_json(service.record, {**read_json(service.record), "port": port, "url": f"http://127.0.0.1:{port}"})
            assert servers.status(service) is None
        assert psutil.pid_exists(started.pid)

    def test_a_killed_server_is_started_again(self, make: Callable[..., Service]) -> None:
        service = make()
        first = servers.start(service, silent)
        os.kill(first.pid, signal.SIGKILL)
        second = servers.start(service, silent)
        assert second.pid != first.pid
        assert servers.status(service) == second

    def test_a_server_that_was_never_written_down_is_found_and_ended(self, make: Callable[..., Service]) -> None:
        service = make()
        lost = servers.start(service, silent)
        service.record.unlink()
        assert servers.status(service) is None
        found = servers.start(service, silent)
        assert found.pid != lost.pid
        assert {p.pid for p in servers.processes(service)} == {found.pid}

    @pytest.mark.parametrize("content", ["", "{", "[]", '{"name": "toy"}', "null"])
    def test_a_record_that_cannot_be_read_is_as_none(self, make: Callable[..., Service], content: str) -> None:
        service = make()
        service.home.mkdir()
        service.record.write_text(content)
        assert servers.status(service) is None

    def test_another_process_under_the_recorded_id_is_left_alone(self, make: Callable[..., Service]) -> None:
        service = make()
        servers.private_folder(service.home)
        with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as stranger:
            try:
                record = {"name": "toy", "pid": stranger.pid, "started": 1.0, "port": 1, "url": "http://127.0.0.1:1"}
                write_json(service.record, record)
                assert servers.status(service) is None
                assert not servers.stop(service)
                assert stranger.poll() is None
            finally:
                stranger.kill()

    def test_children_are_ended_too(self, make: Callable[..., Service]) -> None:
        child = "import subprocess, sys\nsubprocess.Popen([sys.executable, '-c', 'import time; time.sleep(99)'])\n"
        service = make(child + HONEST)
        servers.start(service, silent)
        assert len(servers.processes(service)) == 2
        servers.stop(service)
        assert not servers.processes(service)

    def test_one_that_ends_at_once_is_told_with_its_last_words(self, make: Callable[..., Service]) -> None:
        with pytest.raises(ServerFailed, match="no such dish"):
            servers.start(make("raise SystemExit('no such dish')"), silent)

    def test_one_that_never_gets_well_is_ended(self, make: Callable[..., Service]) -> None:
        service = make("import time; time.sleep(99)", timeout=2)
        with pytest.raises(ServerFailed, match="not healthy after 2 s"):
            servers.start(service, silent)
        assert not servers.processes(service)

    def test_two_starts_at_once_make_one_server(self, make: Callable[..., Service]) -> None:
        service = make()
        found: list[object] = []
        threads = [threading.Thread(target=lambda: found.append(servers.start(service, silent))) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(found) == 3
        assert len(set(found)) == 1
        assert len(servers.processes(service)) == 1

    def test_record_log_and_folder_are_private(self, make: Callable[..., Service]) -> None:
        service = make()
        server = servers.start(service, silent)
        assert stat.S_IMODE(service.home.stat().st_mode) == 0o700
        assert {stat.S_IMODE(path.stat().st_mode) for path in (service.record, service.log)} == {0o600}
        assert service.log.read_text() == "hello from the server\n"
        assert os.getsid(server.pid) == server.pid, "a session of its own, so that closing the terminal does not end it"

    def test_settings_for_another_server_are_not_inherited(
        self, make: Callable[..., Service], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("LABEL_STUDIO_HOST", "https://example.org")
        monkeypatch.setenv("PREFECT_API_URL", "https://example.org/api")
        monkeypatch.setenv("SECRET_KEY", "shared")
        monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
        service = make()
        seen = psutil.Process(servers.start(service, silent).pid).environ()
        assert seen["TOY_SECRET"] == "hush"
        assert seen[MARK] == str(service.record)
        assert not seen.keys() & {"LABEL_STUDIO_HOST", "PREFECT_API_URL", "SECRET_KEY", "HTTP_PROXY"}


def test_an_environment_without_label_studio_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AL_LABEL_STUDIO_VENV", str(tmp_path / "nothing"))
    with pytest.raises(UsageError, match="no Label Studio in"):
        install(silent)


@pytest.mark.slow
def test_an_environment_is_made_once_and_believed_only_when_complete(
    al_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a lock of no packages, so that nothing is fetched."""
    monkeypatch.delenv("AL_LABEL_STUDIO_VENV")
    monkeypatch.setattr(sys, "prefix", str(al_home))  # else what `make setup` made would do
    monkeypatch.setattr("al_pipeline.servers.label_studio_server._lock", lambda: "# nothing\n")
    said: list[str] = []
    venv = install(said.append)
    assert venv == al_home / "label-studio-1.23.2"
    assert said
    footprint = venv / "footprint"
    footprint.touch()
    said.clear()
    assert install(said.append) == venv
    assert footprint.exists() and not said, "made already"
    monkeypatch.setattr("al_pipeline.servers.label_studio_server._lock", lambda: "not a requirement!\n")
    with pytest.raises(ServerFailed, match="exited with code"):
        install(silent)
    assert not footprint.exists(), "another lock: made again"
    assert not (venv / ".ready").exists(), "and not believed, since its making failed"


def test_invite_without_a_server_says_what_to_do(workspace: Workspace) -> None:
    with pytest.raises(LabelStudioRefused, match="al labelstudio start"):
        invite(workspace, "ann@example.com")


def test_a_password_is_reset_only_where_the_accounts_are_ours(workspace: Workspace) -> None:
    with pytest.raises(UsageError, match="al labelstudio start"):
        reset_password(workspace, "ann@example.com")
    workspace.store_credentials("https://labels.example.org", "f" * 40)
    with pytest.raises(UsageError, match=r"labels\.example\.org"):
        reset_password(workspace, "ann@example.com")


@pytest.mark.parametrize("busy", [2, 99])
def test_a_prefect_that_is_busy_is_asked_again_for_a_while(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, busy: int
) -> None:
    """SQLite has one writer; while it is held, Prefect's server says 503."""
    answers: list[int] = []

    class Busy(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            answers.append(503 if len(answers) < busy else 200)
            self.send_response(answers[-1])
            self.end_headers()
            self.wfile.write(b"[]")

        def log_message(self, *args: object) -> None:
            """Say nothing."""

    monkeypatch.setattr(prefects, "_BUSY_SECONDS", (0.0, 0.0, 0.0))
    with http.server.HTTPServer(("127.0.0.1", 0), Busy) as listener:
        threading.Thread(target=listener.serve_forever, args=(0.01,), daemon=True).start()
        port = listener.server_port
        server = Server("Prefect", os.getpid(), 0.0, port, f"http://127.0.0.1:{port}")
        if busy == 2:
            assert prefects.read_deployment(workspace, server) is None
            assert answers == [503, 503, 200]
        else:
            with pytest.raises(ServerFailed, match="try again"):
                prefects.read_deployment(workspace, server)
            assert answers == [503] * 4, "and no more"
        listener.shutdown()


def test_prefect_environment_is_empty_without_a_server(workspace: Workspace) -> None:
    assert prefect_environment(workspace) == {}


def test_the_lock_names_exact_versions_and_no_place() -> None:
    lines = (Path(servers.__file__).parents[1] / "locks/label-studio.lock").read_text().splitlines()
    pins = [line for line in lines if not line.startswith("#")]
    assert "label-studio==1.23.2" in pins
    assert all(line.count("==") == 1 and "/" not in line and "@" not in line for line in pins)


@pytest.mark.server
class TestLabelStudio:
    def test_only_loopback_listens(self, label_studio: LabelStudioServer) -> None:
        assert addresses(label_studio.pid) == {"127.0.0.1"}

    def test_strangers_cannot_sign_up(self, label_studio: LabelStudioServer) -> None:
        with httpx.Client(base_url=label_studio.url, trust_env=False, timeout=60) as client:
            page = client.get("/user/signup/").text
            csrf = page.split('csrfmiddlewaretoken" value="')[1].split('"')[0]
            form = {"csrfmiddlewaretoken": csrf, "email": "eve@example.com", "password": "long enough 1"}
            reply = client.post("/user/signup/", data=form, headers={"Referer": f"{label_studio.url}/user/signup/"})
            assert reply.status_code == 403
            assert client.get("/api/current-user/whoami").status_code == 401

    def test_an_invited_annotator_can_work(self, label_studio: LabelStudioServer) -> None:
        invited = label_studio.account("worker@example.com")
        reply = httpx.get(
            f"{label_studio.url}/api/current-user/whoami",
            headers={"Authorization": f"Token {invited.token}"},
            timeout=60,
            trust_env=False,
        )
        assert reply.json()["email"] == "worker@example.com"
        assert invited.password not in repr(label_studio.admin)
        with pytest.raises(BadInput, match="already"):
            label_studio.account("worker@example.com")

    def test_what_is_no_address_is_refused(self, label_studio: LabelStudioServer) -> None:
        with pytest.raises(BadInput, match="does not accept"):
            label_studio.account("not an address")

    def test_secrets_are_private_and_appear_nowhere_else(self, label_studio: LabelStudioServer) -> None:
        account, home = label_studio.admin, label_studio.data_dir.parent
        credentials = home.parent / "credentials.json"
        assert read_json(credentials) == {"url": label_studio.url, "token": account.token}
        assert {stat.S_IMODE(path.stat().st_mode) for path in (credentials, account.file)} == {0o600}
        command = " ".join(psutil.Process(label_studio.pid).cmdline())
        for secret in (account.token, account.password):
            assert len(secret) >= 20
            assert secret not in command
            assert secret not in repr(account)
            assert all(secret not in log.read_text(errors="replace") for log in home.glob("*.log*"))

    @pytest.mark.slow
    def test_two_servers_share_no_secret(
        self, label_studio: LabelStudioServer, other_label_studio: LabelStudioServer
    ) -> None:
        other = other_label_studio
        key, other_key = ((server.data_dir / ".env").read_text() for server in (label_studio, other))
        assert "SECRET_KEY" in key and key != other_key
        assert {label_studio.token, label_studio.admin.password}.isdisjoint({other.token, other.admin.password})
        for token, expected in ((other.token, 200), (label_studio.token, 401)):
            reply = httpx.get(
                f"{other.url}/api/projects", headers={"Authorization": f"Token {token}"}, timeout=60, trust_env=False
            )
            assert reply.status_code == expected

    @pytest.mark.slow
    def test_a_lost_password_is_replaced(self, other_label_studio: LabelStudioServer) -> None:
        server = other_label_studio
        token = server.invite("ann@example.com")
        with pytest.raises(BadInput, match="al labelstudio password"):
            server.invite("ann@example.com")
        password = server.reset_password("ann@example.com")
        with httpx.Client(base_url=server.url, timeout=60, trust_env=False) as client:
            for given, expected in (("not this one", 200), (password, 302)):
                page = client.get("/user/login/").text
                key = page.split('csrfmiddlewaretoken" value="')[1].split('"')[0]
                form = {"csrfmiddlewaretoken": key, "email": "ann@example.com", "password": given}
                assert client.post("/user/login/", data=form, headers={"Referer": server.url}).status_code == expected
            reply = client.get("/api/projects", headers={"Authorization": f"Token {token}"})
        assert reply.is_success, "the token stays"
        with pytest.raises(BadInput, match="no account"):
            server.reset_password("bob@example.com")
        with pytest.raises(UsageError, match=r"account\.json"):
            server.reset_password(server.admin.email)

    @pytest.mark.slow
    def test_users_survive_a_kill_and_a_start_again(self, other_label_studio: LabelStudioServer) -> None:
        server = other_label_studio
        token, before = server.invite("bea@example.com"), server.pid
        os.kill(before, signal.SIGKILL)
        url = server.url
        server.restart()
        assert server.pid != before
        assert server.url == url
        assert httpx.get(
            f"{url}/api/projects", headers={"Authorization": f"Token {token}"}, timeout=60, trust_env=False
        ).is_success
        server.stop()
        assert not psutil.pid_exists(server.pid)

    @pytest.mark.slow
    def test_a_first_start_that_was_killed_is_begun_again(
        self, label_studio_template: None, workspace: Workspace
    ) -> None:
        """Killed after the account was written and a user half made: the next start has a token that works."""
        home = workspace.home / "label-studio"
        (home / "data").mkdir(parents=True)
        (home / "data/label_studio.sqlite3").write_bytes(b"half a database")
        write_json(home / "account.json", {"email": "x@y.zz", "password": "p" * 20, "token": "f" * 40, "proven": False})
        try:
            server = start_label_studio(workspace, silent)
            assert start_label_studio(workspace, silent) == server
            assert workspace.credentials() == {"url": server.url, "token": "f" * 40}
            account = admin(workspace)
            assert account is not None and account.email == "x@y.zz"
        finally:
            assert stop_label_studio(workspace)

    def test_a_database_without_its_account_is_left_alone(self, label_studio_venv: Path, workspace: Workspace) -> None:
        database = workspace.home / "label-studio/data/label_studio.sqlite3"
        database.parent.mkdir(parents=True)
        database.write_bytes(b"precious")
        with pytest.raises(LabelStudioRefused, match=r"account\.json"):
            start_label_studio(workspace, silent)
        assert database.read_bytes() == b"precious"

    def test_a_workspace_connected_elsewhere_stays_so(self, label_studio_venv: Path, workspace: Workspace) -> None:
        workspace.store_credentials("https://labels.example.org", "a-token")
        with pytest.raises(UsageError, match=r"labels\.example\.org"):
            start_label_studio(workspace, silent)
        assert workspace.credentials()["token"] == "a-token"


FLOW = """
import datetime, prefect
@prefect.flow
def tick(): ...
async def main():
    deployment = await tick.to_deployment(name="canary", interval=datetime.timedelta(minutes=5))
    print(await deployment.apply())
import asyncio
asyncio.run(main())
"""


@pytest.mark.server
@pytest.mark.slow
class TestPrefect:
    def test_only_loopback_listens_and_clients_reach_it(self, prefect_server: PrefectServer) -> None:
        assert addresses(prefect_server.pid) == {"127.0.0.1"}
        assert prefect_server.env["PREFECT_API_URL"] == f"{prefect_server.ui_url}/api"

    def test_an_interval_deployment_gets_scheduled_runs(self, prefect_server: PrefectServer, tmp_path: Path) -> None:
        """One bad version of SQLAlchemy stops all schedules while everything else looks well (see pyproject.toml)."""
        script = tmp_path / "canary.py"
        script.write_text(FLOW)
        made = subprocess.run(
            [sys.executable, str(script)],
            env={**os.environ, **prefect_server.env},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=180,
        )
        assert made.returncode == 0, made.stderr
        wanted = {"deployments": {"id": {"any_": [made.stdout.split()[-1]]}}}
        deadline = time.monotonic() + 120
        runs: list[dict[str, object]] = []
        while not runs and time.monotonic() < deadline:
            reply = ask_prefect("POST", f"{prefect_server.api_url}/flow_runs/filter", wanted).raise_for_status()
            runs = [run for run in reply.json() if run["state_type"] == "SCHEDULED" and run["auto_scheduled"]]
            time.sleep(1)
        log = servers.last_lines(prefect_server.log, 30)
        assert runs, f"the scheduler made no run in 120 s; the server says:\n{log}"
        assert "bulk DML" not in log


def test_a_free_port_is_free_and_a_busy_one_is_not() -> None:
    assert servers.port_is_free(servers.free_port())
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        assert not servers.port_is_free(busy.getsockname()[1])


def test_a_start_is_waited_for_and_free_when_its_process_was_killed(tmp_path: Path) -> None:
    lock = tmp_path / "home/start.lock"
    hold = "import sys, time, pathlib\nfrom al_pipeline.servers.process import exclusive\n"
    hold += "with exclusive(pathlib.Path(sys.argv[1]), 9): print(flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", hold, str(lock)], stdout=subprocess.PIPE) as other:
        assert other.stdout is not None and other.stdout.readline() == b"\n"
        with pytest.raises(ServerFailed, match=f"another process has held {lock}"), servers.exclusive(lock, 0.3):
            pytest.fail("two at once")
        other.kill()
    with servers.exclusive(lock, 5):
        assert stat.S_IMODE(lock.stat().st_mode) == 0o600
    (tmp_path / "home/other.lock").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError), servers.exclusive(tmp_path / "home/other.lock", 0.3):
        pytest.fail("a link could lead to any file")
    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.parametrize(("scheme", "healthy"), [("http", True), ("https", False)])
def test_authorities_are_loaded_only_where_there_are_certificates(
    scheme: str, healthy: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Loading them takes longer than a request to a server of this machine."""
    loaded: list[object] = []
    load = ssl.SSLContext.load_verify_locations
    monkeypatch.setattr(ssl.SSLContext, "load_verify_locations", lambda *a, **k: (loaded.append(a), load(*a, **k)))
    monkeypatch.chdir(tmp_path)
    with http.server.HTTPServer(("127.0.0.1", 0), http.server.SimpleHTTPRequestHandler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        assert servers.is_healthy(f"{scheme}://127.0.0.1:{server.server_port}/") is healthy
        server.shutdown()
    assert bool(loaded) is not healthy
