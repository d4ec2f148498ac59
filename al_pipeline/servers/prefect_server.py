"""A Prefect server of the workspace's own, for those who have none: SQLite, loopback, a password, no telemetry.

The password is for the others on this machine: whoever reaches Prefect's API can make a worker run what they like.
"""

from __future__ import annotations

import os
import secrets
import sys
from pathlib import Path

from al_pipeline.files import write_text
from al_pipeline.servers import process
from al_pipeline.servers.process import LOOPBACK, Progress, Server, Service
from al_pipeline.workspace import Workspace

_START_SECONDS = 180.0


def start_prefect(workspace: Workspace, progress: Progress) -> Server:
    """The workspace's Prefect server; starts it where it does not run. Raises ServerFailed."""
    password_file(workspace)
    return process.start(_service(workspace), progress)


def stop_prefect(workspace: Workspace) -> bool:
    """End the workspace's Prefect server; False where none ran."""
    return process.stop(_service(workspace))


def prefect_status(workspace: Workspace) -> Server | None:
    """The workspace's Prefect server, if it runs and is well."""
    return process.status(_service(workspace))


def prefect_environment(workspace: Workspace) -> dict[str, str]:
    """What a Prefect client needs to reach the workspace's server; empty where it is not up."""
    server = prefect_status(workspace)
    return _environment(workspace, server.port) if server else {}


def password_file(workspace: Workspace) -> Path:
    """The file, for its owner alone, that holds what Prefect's page and API ask for; made where there is none."""
    file = process.private_folder(workspace.home / "prefect") / "password"
    if not file.exists():
        write_text(file, f"al:{secrets.token_urlsafe(18)}\n", mode=0o600)
    return file


def _service(workspace: Workspace) -> Service:
    return Service(
        name="Prefect",
        home=workspace.home / "prefect",
        # -P: a file in the current folder must not stand in for a module
        command=lambda port: (
            *(sys.executable, "-P", "-m", "prefect", "server", "start"),
            *("--host", LOOPBACK, "--port", str(port)),
        ),
        environment=lambda port: _environment(workspace, port),
        health="/api/health",
        timeout=_START_SECONDS,
    )


def _environment(workspace: Workspace, port: int) -> dict[str, str]:
    home = workspace.home / "prefect"
    password = password_file(workspace).read_text(encoding="utf-8").strip()
    return {
        "PREFECT_API_AUTH_STRING": password,
        "PREFECT_SERVER_API_AUTH_STRING": password,
        "PREFECT_SERVER_CORS_ALLOWED_ORIGINS": f"http://{LOOPBACK}:{port},http://localhost:{port}",
        "PREFECT_API_URL": f"http://{LOOPBACK}:{port}/api",
        "PREFECT_UI_URL": f"http://{LOOPBACK}:{port}",
        "PREFECT_HOME": str(home),
        "PREFECT_PROFILES_PATH": str(home / "profiles.toml"),
        "PREFECT_SERVER_DATABASE_CONNECTION_URL": f"sqlite+aiosqlite:///{home / 'prefect.db'}",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
        "PREFECT_CLOUD_ENABLE_ORCHESTRATION_TELEMETRY": "false",
        "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120",
        "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30",
        "DO_NOT_TRACK": "1",
        "NO_PROXY": ",".join(filter(None, (os.environ.get("NO_PROXY"), LOOPBACK))),
    }
