"""Prefect's process worker for the workspace's own Prefect server: it starts the flow runs that are due.

Its flow runs have the environment of the `al up` that started it (Label Studio's token, keys of the DVC remote), as a
typed `al round` would. None of that is stored.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping

import psutil

from al_pipeline.errors import Locked, ServerFailed
from al_pipeline.integrations import processes as child
from al_pipeline.servers import process
from al_pipeline.servers.fork_server import start_fork_servers, stop_fork_servers
from al_pipeline.servers.prefect_server import crash_runs, pool_name, prefect_environment, prefect_status
from al_pipeline.servers.process import LOOPBACK, MARK, Progress, Server, Service
from al_pipeline.workspace.home import private_folder
from al_pipeline.workspace.layout import Layout
from al_pipeline.workspace.lock import locked
from al_pipeline.workspace.workspace import Workspace

_START_SECONDS = 120.0
_FORK_SECONDS = 2.0
_RESUMED = "the next tick finishes its job"


def start_worker(workspace: Workspace, progress: Progress) -> Server:
    """Return the workspace's worker; start it if it does not run, restart it if it polls another Prefect server.

    Its work pool must exist (al_pipeline/flows/deployments.py). Raises ServerFailed.
    """
    environment = prefect_environment(workspace)
    if not environment:
        raise ServerFailed("the worker needs the workspace's Prefect server, which is not running; `al up` starts both")
    service = _service(workspace, environment)
    if worker_status(workspace) and not _polls(service, environment["PREFECT_API_URL"]):
        process.stop(service)

    def crash(ended: float) -> None:
        prefect = prefect_status(workspace)
        if prefect is not None:
            crash_runs(workspace, prefect, ended, f"its worker was ended, and it with it; {_RESUMED}")

    # Before the start: otherwise a dead run still counts as active, and Prefect cancels the next one that is due.
    before, server = process.remembered(service), process.start(service, progress, lambda: crash(time.time()))
    if server != before:
        crash(server.started)  # runs that the server only recorded after the worker had died
    start_fork_servers(workspace, environment)
    return server


def stop_worker(workspace: Workspace) -> bool:
    """Stop the worker and a tick that it runs (the next tick finishes the job); False if it did not run."""
    ran, prefect = process.stop(_service(workspace, {})), prefect_status(workspace)
    stop_fork_servers(workspace.home)
    _end_forks(workspace.layout)
    if ran and prefect is not None:
        crash_runs(workspace, prefect, time.time(), f"`al down` ended it; {_RESUMED}")
    return ran


def _end_forks(layout: Layout) -> None:
    """End what an ended tick left running: forks are not among the worker's processes. A running tick keeps its own.

    A tick of the worker is itself a fork and ends a moment after the process that the worker started.
    """
    deadline = time.monotonic() + _FORK_SECONDS
    while True:
        try:
            with locked(layout.lock, "al down"):
                for record in (layout.dvc_process, layout.encoding):
                    child.end_remembered(record)
                return
        except Locked:
            if time.monotonic() > deadline:
                return
            time.sleep(0.1)


def worker_status(workspace: Workspace) -> Server | None:
    """The workspace's worker if it runs and polls its server, else None."""
    return process.status(_service(workspace, {}))


def _service(workspace: Workspace, prefect: Mapping[str, str]) -> Service:
    def environment(port: int) -> Mapping[str, str]:
        ours = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_") and name != MARK}
        where = {"PREFECT_WORKER_WEBSERVER_HOST": LOOPBACK, "PREFECT_WORKER_WEBSERVER_PORT": str(port)}
        # Prefect creates a folder of a fixed name there, which in /tmp belongs to the first user who runs a worker.
        temporary = {"TMPDIR": str(private_folder(workspace.home / "worker/tmp"))}
        return {**ours, **prefect, **where, **temporary}

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


def _polls(service: Service, api_url: str) -> bool:
    """Whether the running worker polls the server at `api_url`; the server may have restarted on another port."""
    try:
        return any(found.environ().get("PREFECT_API_URL") == api_url for found in process.processes(service))
    except psutil.Error:
        return False
