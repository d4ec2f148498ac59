"""Secrets are planted in each place where a user may have one; after whole rounds, good and bad, each is looked for
everywhere: git's objects, DVC's cache and remote, logs, Prefect's database, what was printed, command lines."""

from __future__ import annotations

import base64
import contextlib
import http.server
import io
import json
import os
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import psutil
import pyarrow.parquet as pq
import pytest
from annotating import ServerRig, leave
from embedded import LabelStudioServer, PrefectServer
from harness import change_params, small_workspace, tools_first

from al_pipeline.files import read_json, write_json
from al_pipeline.integrations import environment
from al_pipeline.integrations.dvc import process as dvc_process
from al_pipeline.integrations.git import Git
from al_pipeline.integrations.label_studio.client import LabelStudioOracle
from al_pipeline.integrations.oracle import ProjectRef
from al_pipeline.operations.history import read_plan
from al_pipeline.workspace.workspace import Workspace, open_workspace

pytestmark = [pytest.mark.server, pytest.mark.slow]

SEEN = "SEEN-c0ffee-in-plain-sight"
"""No secret: text of the pool and a word of a command line, by which each search proves that it can find something."""

GIT_PASSWORD = "git-p4ss-0a1b2c3d4e"
CLOUD_SECRET = "S3CR3T/cloud+key/9f8e7d6c5b4a"
WRONG_TOKEN = "bad0bad0bad0bad0bad0bad0bad0bad0bad0bad0"
SERVICE_SECRET = "h00k-t0ken-5a4b3c2d1e0f"
OTHER_VARIABLE = "environment-s3cret-77665544"


def forms(secret: str) -> list[bytes]:
    """A secret as it is and as it travels: in addresses, in a log-in, in base64."""
    encoded = [base64.b64encode(text.encode()) for text in (secret, f"al:{secret}")]
    return [secret.encode(), quote(secret, safe="").encode(), *(whole.rstrip(b"=") for whole in encoded)]


class Watch:
    """Reads every process's command line on the machine, as anybody can, again and again."""

    def __init__(self) -> None:
        self.seen: set[bytes] = set()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._end.wait(0.02):
            for pid in psutil.pids():
                with contextlib.suppress(OSError):
                    self.seen.add(Path(f"/proc/{pid}/cmdline").read_bytes())


@contextlib.contextmanager
def git_server() -> Iterator[tuple[str, list[str]]]:
    """A git host that asks for a log-in, takes its time and refuses; yields its address and the log-ins it was sent."""
    sent: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            login = self.headers.get("Authorization")
            if login is None:
                self.send_response(401)
                self.send_header("WWW-Authenticate", 'Basic realm="git"')
            else:
                sent.append(base64.b64decode(login.split()[1]).decode())
                time.sleep(1.0)
                self.send_response(403)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None: ...

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"127.0.0.1:{server.server_address[1]}", sent
        server.shutdown()


@pytest.fixture
def planted(
    prefect_server: PrefectServer, label_studio: LabelStudioServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[Workspace, dict[str, str]]]:
    """A workspace on the tests' own servers with a secret in each place where a user may keep one."""
    workspace, truth = small_workspace(tmp_path / "w", 40)
    layout, home = workspace.layout, prefect_server.log.parents[1]
    monkeypatch.setenv("AL_HOME", str(home.parent))
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", OTHER_VARIABLE)
    write_json(layout.marker, {**read_json(layout.marker), "workspace_id": home.name})
    change_params(workspace, {"Which label fits this text?": f"Which label fits? {SEEN}"})
    truth |= {f"seen-{number}": "ham" for number in range(8)}
    rows = [{"id": f"seen-{number}", "text": f"{number} meeting {SEEN}"} for number in range(8)]
    (tmp_path / "seen.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    local = layout.root / ".dvc/config.local"
    local.write_text(f"['remote \"cold\"']\n    url = s3://bucket/x\n    secret_access_key = {CLOUD_SECRET}\n")
    local.chmod(0o600)
    (layout.root / ".env").write_text(f"PREFECT_LOGGING_SETTINGS_PATH={tmp_path}/logging.yml\n", encoding="utf-8")
    (tmp_path / "logging.yml").write_text(
        f"version: 1\nformatters:\n  x:\n    '()': os.mkdir\n    path: {tmp_path}/prefect-ran-this\n", encoding="utf-8"
    )
    Git(layout.root).commit("Take another id", [layout.marker, layout.params])
    workspace = open_workspace(layout.root)
    workspace.store_credentials(label_studio.url, label_studio.token)
    workspace.store_services({"1": f"json://al:{SERVICE_SECRET}@127.0.0.1:9/{SERVICE_SECRET}"})
    yield workspace, truth
    leave(label_studio, workspace)


def test_no_secret_is_anywhere_but_where_it_was_put(
    planted: tuple[Workspace, dict[str, str]], label_studio: LabelStudioServer, prefect_server: PrefectServer,
    tmp_path: Path,
) -> None:  # fmt: skip
    workspace, truth = planted
    layout, root = workspace.layout, workspace.layout.root
    ann = label_studio.account("ann.secrets@example.com")
    secrets = {
        "Label Studio's token": label_studio.token,
        "the administrator's password": label_studio.admin.password,
        "an annotator's password": ann.password,
        "an annotator's token": ann.token,
        "the git remote's password": GIT_PASSWORD,
        "the cloud's secret": CLOUD_SECRET,
        "a wrong token": WRONG_TOKEN,
        "another variable": OTHER_VARIABLE,
        "a notification service's token": SERVICE_SECRET,
        "Prefect's password": prefect_server.env["PREFECT_API_AUTH_STRING"].partition(":")[2],
    }
    assert all(len(secret) >= 15 for secret in secrets.values())
    printed: dict[str, str] = {}

    def al(*words: str, code: int | None = 0, feed: str = "", **environment: str) -> str:
        """`al` as a user would type it inside the workspace; keeps what it printed."""
        done = subprocess.run(
            [sys.executable, "-P", "-m", "al_pipeline.cli.app", *words], cwd=root, env={**tools_first(), **environment},
            input=feed, capture_output=True, text=True, timeout=600, check=False,
        )  # fmt: skip
        printed[" ".join(words) + str(environment)] = done.stdout + done.stderr
        assert code is None or done.returncode == code, f"{words}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        assert "Traceback" not in done.stderr, done.stderr
        return done.stdout

    with git_server() as (host, logins), Watch() as watch:
        config, plain = root / ".git/config", (root / ".git/config").read_text()  # not by git, whose words all can read
        remote = plain + '[remote "origin"]\n\tfetch = +refs/heads/*:refs/remotes/origin/*\n\turl = '
        config.write_text(f"{remote}http://al:{GIT_PASSWORD}@{host}/x.git\n")
        subprocess.run([sys.executable, "-c", "import time; time.sleep(1)", SEEN], check=True)
        al("ingest", str(tmp_path / "seen.jsonl"))
        first = al("round", "--json")
        assert logins and set(logins) == {f"al:{GIT_PASSWORD}"}, "git gave the password, and by itself"
        assert any("403" in warning for warning in json.loads(first)["warnings"]), first
        ref = ProjectRef(**read_json(layout.project))
        with LabelStudioOracle(label_studio.url, label_studio.token) as oracle, ServerRig(label_studio, oracle) as rig:
            for task in read_plan(Git(root), 0):
                rig.answer(ref, task.push_key, "ann.secrets@example.com", truth[task.item_id])
        assert json.loads(al("round", "--json"))["published"] == [0]
        al("round", code=5, AL_LABEL_STUDIO_TOKEN=WRONG_TOKEN)
        al("round", code=5, AL_LABEL_STUDIO_URL="http://127.0.0.1:9")
        al("labelstudio", "connect", label_studio.url, code=5, feed=f"{WRONG_TOKEN}\n")
        al("doctor", code=None)
        al("status", "--json")
        al("rounds")
        al("report")
        al("predict", str(tmp_path / "seen.jsonl"), "--round", "0")
        al("trust", code=3)
        config.write_text(f"{remote}https://al:{GIT_PASSWORD}@127.0.0.1:9/x.git\n")
        al("round", code=3)
    al("labelstudio", "connect", f"http://al:{GIT_PASSWORD}@127.0.0.1:9", code=5, feed=f"{label_studio.token}\n")
    assert "notification service 1 (JSON) did not take a message" in "".join(printed.values()), "it was tried"
    assert "origin contains a password" in printed["doctor{}"]
    assert read_json(workspace.credentials_file)["token"] == label_studio.token, "what was refused was not stored"
    assert not (tmp_path / "prefect-ran-this").exists(), "settings of Prefect in the workspace are not obeyed"

    home, ours = (
        workspace.home,
        {workspace.credentials_file, workspace.services_file, workspace.home / "prefect/password"},
    )
    known, objects = {root / ".git/config", root / ".dvc/config.local"}, ["git", "cat-file", "--batch-all-objects"]
    places: dict[str, bytes] = {
        "git": subprocess.run([*objects, "--batch"], cwd=root, capture_output=True, check=True).stdout,
        "the workspace": held(root, {*known, *(root / ".git/objects").rglob("*")}),
        "DVC's remote": held(tmp_path / "w/remote", set()),
        "al's home": held(home, ours),
        "Prefect's database": held(home / "prefect/prefect.db", set()),
        "Label Studio's logs": b"".join(log.read_bytes() for log in label_studio.data_dir.parent.glob("*.log*")),
        "what was printed": "\n".join(printed.values()).encode(),
        "command lines": b"\n".join(watch.seen),
    }
    for place in ("git", "the workspace", "DVC's remote", "command lines"):
        assert SEEN.encode() in places[place], f"the search can find something in {place}"
    assert b"round 0: train" in places["Prefect's database"] and b"round 0: train" in places["al's home"]
    assert b"Published round-0000" in places["what was printed"] or b'"published"' in places["what was printed"]
    for name, secret in secrets.items():
        for place, content in places.items():
            found = [line for form in forms(secret) for line in content.split(b"\n") if form in line]
            assert not found, f"{name} is in {place}: {found[0][:300]!r}"


def held(path: Path, but: set[Path]) -> bytes:
    """All that lies in a file or below a folder, unpacked: Parquet as text, databases as SQL, the rest as it is."""
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file() and file not in but)
    out = io.BytesIO()
    for file in files:
        data = file.read_bytes()
        out.write(data + b"\n")
        if data[:4] == b"PAR1":
            out.write(json.dumps(pq.read_table(io.BytesIO(data)).to_pylist(), ensure_ascii=False).encode() + b"\n")
        elif data[:15] == b"SQLite format 3":
            with contextlib.closing(sqlite3.connect(file)) as database:
                out.write("\n".join(database.iterdump()).encode("utf-8", "replace") + b"\n")
    return out.getvalue()


def test_a_file_with_secrets_is_for_its_owner_alone(planted: tuple[Workspace, dict[str, str]]) -> None:
    workspace, _ = planted
    for file in (workspace.credentials_file, workspace.services_file, workspace.home / "prefect/password"):
        assert file.stat().st_mode & 0o777 == 0o600 and file.parent.stat().st_mode & 0o777 == 0o700
    assert not workspace.home.is_relative_to(workspace.layout.root)


def test_prefect_answers_nobody_without_the_password(prefect_server: PrefectServer) -> None:
    import httpx

    bare = f"{prefect_server.ui_url}/api/flows/filter"
    for headers in ({}, {"Authorization": "Basic YWw6d3Jvbmc="}):
        assert httpx.post(bare, json={}, headers=headers, timeout=60, trust_env=False).status_code == 401
    assert httpx.post(f"{prefect_server.api_url}/flows/filter", json={}, timeout=60, trust_env=False).status_code == 200
    page = httpx.options(
        bare, headers={"Origin": "https://evil.example", "Access-Control-Request-Method": "POST"}, timeout=60,
        trust_env=False,
    )  # fmt: skip
    assert "evil.example" not in str(page.headers) and page.headers.get("access-control-allow-origin") != "*"


def test_label_studio_serves_no_files_and_no_other_name(label_studio: LabelStudioServer, tmp_path: Path) -> None:
    """Whoever has an account may do everything there; so what reaches this machine is switched off."""
    import httpx

    token = label_studio.invite("mallory@example.com")
    (tmp_path / "precious.txt").write_text("precious", encoding="utf-8")
    with httpx.Client(
        base_url=label_studio.url, headers={"Authorization": f"Token {token}"}, timeout=60, trust_env=False
    ) as client:
        project = client.post("/api/projects/", json={"title": "mine"}).json()["id"]
        storage = {"project": project, "path": str(tmp_path), "use_blob_urls": True, "title": "x"}
        assert client.post("/api/storages/localfiles", json=storage).status_code in (404, 405)
        assert client.post("/api/storages/localfiles/", json=storage).status_code in (404, 405)
        assert "precious" not in client.get(f"/data/local-files/?d={tmp_path}/precious.txt").text
        inner = f"{label_studio.url}/api/current-user/token"
        assert client.post(f"/api/projects/{project}/import", data={"url": inner}).status_code >= 400
        assert client.get("/api/projects/", headers={"Host": "evil.example"}).status_code == 400
        assert (
            "access-control-allow-origin"
            not in client.get("/health", headers={"Origin": "https://evil.example"}).headers
        )
    assert os.environ.get("AL_LABEL_STUDIO_TOKEN") is None


def test_the_code_of_others_gets_none_of_our_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("AL_LABEL_STUDIO_TOKEN", "AL_NOTIFY_URLS", "AL_SERVE_TOKEN", "AL_VECTORS_KEY")
    for name in names:
        monkeypatch.setenv(name, "a secret")
    for found in (environment._inherited(), dvc_process._inherited()):
        assert not found.keys() & set(names)
