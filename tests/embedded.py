"""The real servers for tests, each with a home of its own, whatever `AL_HOME` the current test has."""

from __future__ import annotations

import os
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from importlib.metadata import version
from pathlib import Path

import psutil
from filelock import FileLock

from al_pipeline.servers import (
    Account,
    Invited,
    admin,
    invite,
    prefect_environment,
    process,
    reset_password,
    start_label_studio,
    start_prefect,
    stop_label_studio,
    stop_prefect,
)
from al_pipeline.servers.label_studio_server import template_database
from al_pipeline.servers.process import LOOPBACK, free_port, is_healthy
from al_pipeline.workspace.home import private_folder
from al_pipeline.workspace.layout import Layout
from al_pipeline.workspace.workspace import Workspace

REPOSITORY = Path(__file__).parents[1]
TEMPLATES = REPOSITORY / ".cache/tests"
"""Migrated databases of Label Studio and Prefect, kept between test runs; Label Studio's saves a minute."""


@contextmanager
def s3_server(port: int | None = None) -> Iterator[str]:
    """The address of an empty S3 server: a process of its own, as moto's servers in one process share their buckets."""
    port = port or free_port()
    url = f"http://{LOOPBACK}:{port}"
    command = [sys.executable, "-m", "moto.server", "--host", LOOPBACK, "--port", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 120
        while not is_healthy(f"{url}/moto-api/"):
            assert server.poll() is None, f"moto ended with {server.returncode}"
            assert time.monotonic() < deadline, "moto does not answer"
            time.sleep(0.1)
        yield url
    finally:
        server.kill()
        server.wait()


@contextmanager
def al_home_at(path: Path) -> Iterator[None]:
    """Set `AL_HOME` to `path` inside the block."""
    before = os.environ.get("AL_HOME")
    os.environ["AL_HOME"] = str(path)
    try:
        yield
    finally:
        if before is None:
            del os.environ["AL_HOME"]
        else:
            os.environ["AL_HOME"] = before


def silent(message: str) -> None:
    """A progress callback that does nothing."""


def seed_templates(home: Path) -> None:
    """Spare a test the migrations of Label Studio's database."""
    with al_home_at(TEMPLATES):
        template = template_database(Path(os.environ["AL_LABEL_STUDIO_VENV"]), silent)
    (home / "templates").mkdir(parents=True, exist_ok=True)
    shutil.copyfile(template, home / "templates" / template.name)


def seed_prefect(workspace: Workspace) -> None:
    """Spare a test the migrations of Prefect's database, four seconds of processor time."""
    TEMPLATES.mkdir(parents=True, exist_ok=True)
    template = TEMPLATES / f"prefect-{version('prefect')}.sqlite3"
    with FileLock(template.with_suffix(".lock")):
        if not template.exists():
            with tempfile.TemporaryDirectory(prefix="prefect-", dir=TEMPLATES) as folder:
                made, whole = Path(folder) / "prefect.db", Path(folder) / "whole.sqlite3"
                where = {
                    "PREFECT_HOME": folder,
                    "PREFECT_SERVER_DATABASE_CONNECTION_URL": f"sqlite+aiosqlite:///{made}",
                }
                command = [sys.executable, "-P", "-m", "prefect", "server", "database", "upgrade", "--yes"]
                subprocess.run(command, env={**os.environ, **where}, check=True, capture_output=True, timeout=600)
                with closing(sqlite3.connect(made)) as source, closing(sqlite3.connect(whole)) as target:
                    source.backup(target)  # with what is still in its journal
                whole.replace(template)
    shutil.copyfile(template, private_folder(workspace.home / "prefect") / "prefect.db")


class LabelStudioServer:
    """A real Label Studio with a home below `folder`. It starts when it is created."""

    def __init__(self, folder: Path) -> None:
        self._home = folder / "al-home"
        self._workspace = Workspace(Layout(folder / "workspace"), "0123456789ab")
        seed_templates(self._home)
        self.restart()

    @property
    def data_dir(self) -> Path:
        with al_home_at(self._home):
            return self._workspace.home / "label-studio/data"

    @property
    def admin(self) -> Account:
        with al_home_at(self._home):
            account = admin(self._workspace)
        assert account is not None
        return account

    @property
    def token(self) -> str:
        """The administrator's token."""
        return self.admin.token

    def restart(self) -> None:
        """Stop and start it. Users and data are kept; the address too, if its port is still free."""
        self.stop()
        with al_home_at(self._home):
            server = start_label_studio(self._workspace, silent)
        self.url, self.port, self.pid = server.url, server.port, server.pid

    def stop(self) -> None:
        with al_home_at(self._home):
            stop_label_studio(self._workspace)

    def kill(self) -> None:
        """kill -9 of all its processes."""
        with al_home_at(self._home):
            mark = str(self._workspace.home / "label-studio/server.json")
        found = [one for one in psutil.process_iter() if process.carries_mark(one, mark)]
        assert found, "Label Studio does not run"
        for one in found:
            one.kill()
        psutil.wait_procs(found, timeout=15)

    def invite(self, email: str) -> str:
        """Create an annotator; returns their token (`Authorization: Token …`)."""
        return self.account(email).token

    def account(self, email: str) -> Invited:
        """Create an annotator; returns their password and token."""
        with al_home_at(self._home):
            return invite(self._workspace, email)

    def reset_password(self, email: str) -> str:
        with al_home_at(self._home):
            return reset_password(self._workspace, email)


class PrefectServer:
    """A real Prefect server with a home below `folder`, started when created. `api_url` contains the password."""

    def __init__(self, folder: Path) -> None:
        self._home = folder / "al-home"
        self._workspace = Workspace(Layout(folder / "workspace"), "ba9876543210")
        with al_home_at(self._home):
            seed_prefect(self._workspace)
            server = start_prefect(self._workspace, silent)
            self.env = prefect_environment(self._workspace)
        with_password = server.url.replace("://", f"://{self.env['PREFECT_API_AUTH_STRING']}@")
        self.api_url, self.ui_url, self.pid = f"{with_password}/api", server.url, server.pid

    @property
    def log(self) -> Path:
        with al_home_at(self._home):
            return self._workspace.home / "prefect/server.log"

    def stop(self) -> None:
        with al_home_at(self._home):
            stop_prefect(self._workspace)
