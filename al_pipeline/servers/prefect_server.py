"""The workspace's own Prefect server: SQLite, loopback, a password, no telemetry.

The password keeps other users of the machine out: whoever reaches Prefect's API can run any code through a worker.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from al_pipeline.errors import ServerFailed
from al_pipeline.files import write_text
from al_pipeline.integrations.prefect_settings import API_URL, client_settings
from al_pipeline.logs import get_logger
from al_pipeline.sanitize import has_tls, on_this_machine, redact
from al_pipeline.servers import process
from al_pipeline.servers.process import LOOPBACK, Progress, Server, Service
from al_pipeline.workspace.home import private_folder
from al_pipeline.workspace.workspace import Workspace

_logger = get_logger(__name__)

FLOW = "al-round"

_LONGEST_NAME = 40

_START_SECONDS = 180.0
_REQUEST_SECONDS = 10.0
_FAR_SECONDS = 5.0
"""As `al status` waits for a server on another machine."""
_BUSY_SECONDS = (0.5, 1.0, 2.0, 4.0)
"""Pauses between repeated requests to a server that answers 503: its SQLite database is locked by another writer."""


@dataclass(frozen=True, slots=True)
class Deployment:
    """A workspace's deployment on its Prefect server."""

    schedules: tuple[tuple[str, str, bool], ...]
    """Cron expression, time zone, and whether it is active; other kinds of schedules as `Prefect's own`."""
    paused: bool
    """Whether all schedules of the deployment are paused (a switch on Prefect's page)."""
    root: str | None
    """The clone that is its runs' working directory."""
    next_run: str | None
    """When the next run is due, as ISO 8601 in UTC."""
    pool: str | None = None
    """Its work pool."""
    has_worker: bool = False
    """Whether a worker polls that pool, as far as the server knows."""


@dataclass(frozen=True, slots=True)
class PrefectApi:
    """Where a Prefect server's API is, and how a client logs in to it."""

    url: str
    """With `/api` at its end, as in PREFECT_API_URL."""
    login: tuple[str, str] | None = field(default=None, repr=False)
    key: str | None = field(default=None, repr=False)
    certificates: str | None = None
    """A file of certificate authorities, in place of the usual ones."""
    source: str = ""
    """What names the server: `PREFECT_API_URL`, or the profile that has it."""


def prefect_elsewhere() -> PrefectApi | None:
    """The Prefect server that the environment or the user's profile names, such as a team's; None if neither does."""
    found = client_settings()
    if found is None:
        return None
    user, colon, password = (found.auth_string or "").partition(":")
    login = (user, password) if colon else None
    source = f"Prefect's profile {found.profile!r}" if found.profile else API_URL
    return PrefectApi(found.url, login, found.key, found.certificates, source)


def start_prefect(workspace: Workspace, progress: Progress) -> Server:
    """Return the workspace's Prefect server; start it if it does not run. Raises ServerFailed."""
    password_file(workspace)
    return process.start(_service(workspace), progress)


def stop_prefect(workspace: Workspace) -> bool:
    """Stop the workspace's Prefect server; False if it did not run."""
    return process.stop(_service(workspace))


def prefect_status(workspace: Workspace) -> Server | None:
    """The workspace's Prefect server if it runs and is healthy, else None."""
    return process.status(_service(workspace))


def prefect_environment(workspace: Workspace) -> dict[str, str]:
    """Environment variables with which a Prefect client reaches the workspace's server; empty if it does not run."""
    server = prefect_status(workspace)
    return _environment(workspace, server.port) if server else {}


def password_file(workspace: Workspace) -> Path:
    """The file (0600) with the user name and password of Prefect's page and API; created if it does not exist."""
    file = private_folder(workspace.home / "prefect") / "password"
    if not file.exists():
        write_text(file, f"al:{secrets.token_urlsafe(18)}\n", mode=0o600)
    return file


def _password(workspace: Workspace) -> str:
    return password_file(workspace).read_text(encoding="utf-8").strip()


def pool_name(workspace: Workspace) -> str:
    """The work pool of a workspace: each has its own, since a pool fixes the working directory of its runs."""
    return f"al-{workspace.id}"


def deployment_name(workspace: Workspace) -> str:
    """The name of a workspace's deployment: its folder's name in plain characters, and its id.

    A renamed folder renames the deployment, so it is identified by its work pool and by the id at the end of the name.
    """
    name = re.sub(r"[^\w.]+", "-", workspace.layout.root.name.encode("utf-8", "replace").decode()).strip("-._")
    return f"{name[:_LONGEST_NAME].rstrip('-._') or 'workspace'}-{workspace.id}"


def is_our_deployment(name: str, workspace_id: str) -> bool:
    """Whether a deployment of this name belongs to a workspace; earlier versions used the id alone."""
    return name == workspace_id or name.endswith(f"-{workspace_id}")


def read_deployment(workspace: Workspace, server: Server | PrefectApi) -> Deployment | None:
    """The workspace's deployment on its own server, or on another one; None if it has none there.

    On another server it may be in any work pool. Raises ServerFailed if the server gives no valid response.
    """
    if isinstance(server, PrefectApi):
        api, pools = server, {}
    else:
        api, pools = _api(workspace, server), {"work_pools": {"name": {"any_": [pool_name(workspace)]}}}
    known = _send(api, "POST", "/deployments/filter", {"flows": {"name": {"any_": [FLOW]}}, **pools})
    if not isinstance(known, list):
        raise ServerFailed(f"{redact(api.url)} is not the address of a Prefect server's API, which ends with /api")
    try:
        known = [row for row in known if is_our_deployment(row["name"], workspace.id)]
        if not known:
            return None
        found = max(known, key=lambda row: row["name"] == deployment_name(workspace))
        pool = _send(api, "GET", f"/work_pools/{found['work_pool_name']}") if found["work_pool_name"] else None
        job = (pool or {}).get("base_job_template", {}).get("job_configuration", {})
        wanted = {
            "deployments": {"id": {"any_": [found["id"]]}},
            "flow_runs": {"state": {"type": {"any_": ["SCHEDULED"]}}},
            "sort": "EXPECTED_START_TIME_ASC",
            "limit": 1,
        }
        runs = _send(api, "POST", "/flow_runs/filter", wanted) or []
        return Deployment(
            tuple(
                (row["schedule"].get("cron", "Prefect's own"), row["schedule"].get("timezone") or "UTC", row["active"])
                for row in found["schedules"]
            ),
            found["paused"],
            (found.get("job_variables") or {}).get("working_dir") or job.get("working_dir"),
            runs[0]["expected_start_time"] if runs else None,
            found["work_pool_name"],
            (pool or {}).get("status") == "READY",
        )
    except (AttributeError, KeyError, TypeError, IndexError) as error:
        raise _unusable(api, error) from None


def crash_runs(workspace: Workspace, server: Server, before: float, why: str) -> int:
    """Mark the runs of the workspace's stopped worker that were active at `before` (seconds since 1970) as crashed.

    Returns their number. Prefect itself would notice a minute and a half later. Raises ServerFailed.
    """
    wanted = {
        "work_pools": {"name": {"any_": [pool_name(workspace)]}},
        "flow_runs": {"state": {"type": {"any_": ["PENDING", "RUNNING", "CANCELLING"]}}},
    }
    state, api = {"type": "CRASHED", "name": "Crashed", "message": why}, _api(workspace, server)
    found = [
        run
        for run in _send(api, "POST", "/flow_runs/filter", wanted) or []
        if datetime.fromisoformat(run["state"]["timestamp"]).timestamp() < before
    ]
    for run in found:
        _send(api, "POST", f"/flow_runs/{run['id']}/set_state", {"state": state})
    return len(found)


def write_table(
    workspace: Workspace,
    server: Server | PrefectApi,
    key: str,
    rows: Sequence[Mapping[str, str]],
    description: str,
    artifact: str | None = None,
) -> str | None:
    """Replace the table of an artifact by its id, or create one under `key`; returns its id. Raises ServerFailed."""
    api = server if isinstance(server, PrefectApi) else _api(workspace, server)
    told = {"data": json.dumps(rows), "description": description}  # as Prefect's own client encodes a table
    if artifact is not None and _send(api, "PATCH", f"/artifacts/{artifact}", told, answers=False) is not None:
        return artifact
    made = _send(api, "POST", "/artifacts/", {"key": key, "type": "table", **told})
    return str(made["id"]) if isinstance(made, dict) and "id" in made else None


def _api(workspace: Workspace, server: Server) -> PrefectApi:
    """The API of the workspace's own server."""
    user, _, password = _password(workspace).partition(":")
    return PrefectApi(f"{server.url}/api", (user, password))


def _send(api: PrefectApi, method: str, path: str, body: dict[str, Any] | None = None, *, answers: bool = True) -> Any:
    """Send one request to a server's API; None for a 404. Raises ServerFailed if it gives no valid response.

    `answers`: whether the response has a body; else True is returned.
    """
    import ssl

    import httpx

    verify: bool | ssl.SSLContext = has_tls(api.url)
    headers = {"Authorization": f"Bearer {api.key}"} if api.key else {}
    is_near = on_this_machine(api.url)
    try:
        if verify and api.certificates:
            verify = ssl.create_default_context(cafile=api.certificates)
        with httpx.Client(
            trust_env=not is_near,
            timeout=_REQUEST_SECONDS if is_near else _FAR_SECONDS,
            verify=verify,
            auth=None if api.key else api.login,
            headers=headers,
        ) as client:
            for seconds in (*_BUSY_SECONDS, None):
                begin = time.perf_counter()
                reply = client.request(method, f"{api.url}{path}", json=body)
                spent = time.perf_counter() - begin
                _logger.debug("%s %s: %d after %.3f s", method, path, reply.status_code, spent)
                if seconds is None or reply.status_code != httpx.codes.SERVICE_UNAVAILABLE:
                    break
                _logger.warning("Prefect is busy (503); the next attempt is in %.1f s", seconds)
                time.sleep(seconds)
            if reply.status_code in (401, 403):
                raise ServerFailed(
                    f"Prefect at {redact(api.url)} refuses the log-in ({reply.status_code}): set PREFECT_API_KEY, or "
                    "PREFECT_API_AUTH_STRING as USER:PASSWORD"
                )
            if reply.status_code == 404:
                return None
            reply.raise_for_status()
            return reply.json() if answers else True
    except (httpx.HTTPError, httpx.InvalidURL, OSError, ValueError) as error:
        raise _unusable(api, error) from None


def _unusable(api: PrefectApi, error: Exception) -> ServerFailed:
    return ServerFailed(
        f"Prefect at {redact(api.url)} gave no valid response ({type(error).__name__}); is it up, and is that the "
        "address of its API?"
        if not on_this_machine(api.url)
        else f"Prefect at {redact(api.url).removesuffix('/api')} gave no valid response ({type(error).__name__}); try "
        "again"
    )


def _service(workspace: Workspace) -> Service:
    return Service(
        name="Prefect",
        home=workspace.home / "prefect",
        # -P: files in the current folder must not shadow modules
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
    password = _password(workspace)
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
        # A run's log includes our package's; messages logged outside a run belong to none and are dropped.
        "PREFECT_LOGGING_EXTRA_LOGGERS": "al_pipeline",
        "PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW": "ignore",
        "DO_NOT_TRACK": "1",
        "NO_PROXY": ",".join(filter(None, (os.environ.get("NO_PROXY"), LOOPBACK))),
    }
