"""`al live` as a service of `al up`: a process beside the worker, found again and ended like the servers."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping

from al_pipeline.servers import process
from al_pipeline.servers.process import MARK, Progress, Server, Service
from al_pipeline.workspace.workspace import Workspace

_START_SECONDS = 120.0


def start_live(workspace: Workspace, progress: Progress) -> Server:
    """Return the workspace's `al live`; start it if it does not run. Raises ServerFailed.

    It has the environment of the `al up` that starts it: Label Studio's token, keys of the DVC remote. None is stored.
    """
    return process.start(_service(workspace), progress)


def stop_live(workspace: Workspace) -> bool:
    """End it after the step that it is in, as SIGTERM does; False if it did not run."""
    return process.stop(_service(workspace))


def live_status(workspace: Workspace) -> Server | None:
    """The running and healthy `al live` of `al up`; None if there is none."""
    return process.status(_service(workspace))


def _service(workspace: Workspace) -> Service:
    def environment(_: int) -> Mapping[str, str]:
        return {name: value for name, value in os.environ.items() if name != MARK}

    root = str(workspace.layout.root)
    return Service(
        name="live",
        home=workspace.home / "live",
        command=lambda port: (
            *(sys.executable, "-P", "-m", "al_pipeline.cli.app", "-C", root, "live"),
            *("--port", str(port)),
        ),
        environment=environment,
        health="/health",
        timeout=_START_SECONDS,
    )
