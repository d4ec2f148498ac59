"""The process that starts the ticks which the workspace's own Prefect server has due, by schedule or by hand.

It is Prefect's own process worker. A tick that it starts works as one typed here would: with the environment of whoever
called `al up` (Label Studio's token, the DVC remote's keys), of which nothing is written down anywhere.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping

import psutil

from al_pipeline.errors import ServerFailed
from al_pipeline.servers import process
from al_pipeline.servers.prefect_server import crash_runs, pool_name, prefect_environment, prefect_status
from al_pipeline.servers.process import LOOPBACK, MARK, Progress, Server, Service
from al_pipeline.workspace.workspace import Workspace

_START_SECONDS = 120.0
_GOES_ON = "the next tick finishes its job"


def start_worker(workspace: Workspace, progress: Progress) -> Server:
    """The workspace's worker; starts it where it does not run, or asks a Prefect server that is no longer there.

    Its work pool must be there (al_pipeline/flows/deployments.py). Raises ServerFailed.
    """
    environment = prefect_environment(workspace)
    if not environment:
        raise ServerFailed("the worker needs the workspace's Prefect server, and that is not up; `al up` starts both")
    service = _service(workspace, environment)
    if worker_status(workspace) and not _asks(service, environment["PREFECT_API_URL"]):
        process.stop(service)

    def crash(ended: float) -> None:
        prefect = prefect_status(workspace)
        if prefect is not None:
            crash_runs(workspace, prefect, ended, f"its worker was ended, and it with it; {_GOES_ON}")

    # First: else a run that is due finds its place taken by one that is dead, and is cancelled.
    before, server = process.remembered(service), process.start(service, progress, lambda: crash(time.time()))
    if server != before:
        crash(server.started)  # what the server was still being told when the worker died
    return server


def stop_worker(workspace: Workspace) -> bool:
    """End the worker, and a tick that it runs (the next tick finishes the job); False where none ran."""
    ran, prefect = process.stop(_service(workspace, {})), prefect_status(workspace)
    if ran and prefect is not None:
        crash_runs(workspace, prefect, time.time(), f"`al down` ended it; {_GOES_ON}")
    return ran


def worker_status(workspace: Workspace) -> Server | None:
    """The workspace's worker, if it runs and asks its server for work."""
    return process.status(_service(workspace, {}))


def _service(workspace: Workspace, prefect: Mapping[str, str]) -> Service:
    def environment(port: int) -> Mapping[str, str]:
        ours = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_") and name != MARK}
        where = {"PREFECT_WORKER_WEBSERVER_HOST": LOOPBACK, "PREFECT_WORKER_WEBSERVER_PORT": str(port)}
        return {**ours, **prefect, **where}

    pool = pool_name(workspace)
    return Service(
        name="worker",
        home=workspace.home / "worker",
        command=lambda _: (
            *(sys.executable, "-P", "-m", "prefect", "worker", "start", "--type", "process"),
            *("--pool", pool, "--name", pool, "--with-healthcheck", "--no-create-pool-if-not-found"),
        ),
        environment=environment,
        health="/health",
        timeout=_START_SECONDS,
    )


def _asks(service: Service, api_url: str) -> bool:
    """Whether the running worker asks the server at `api_url`: one that was moved to another port is asked in vain."""
    try:
        return any(found.environ().get("PREFECT_API_URL") == api_url for found in process.processes(service))
    except psutil.Error:
        return False
