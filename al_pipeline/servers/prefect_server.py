"""A Prefect server of the workspace's own, for those who have none: SQLite, loopback, no telemetry."""

from __future__ import annotations

import os
import sys

from al_pipeline.servers import process
from al_pipeline.servers.process import LOOPBACK, Progress, Server, Service
from al_pipeline.workspace import Workspace

_START_SECONDS = 180.0


def start_prefect(workspace: Workspace, progress: Progress) -> Server:
    """The workspace's Prefect server; starts it where it does not run. Raises ServerFailed."""
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
    return {
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
