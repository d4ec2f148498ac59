"""Ticks and schedules on the workspace's own Prefect server, for the command line.

Prefect reads its settings on import, so functions set them first and then import it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

from al_pipeline.errors import NothingToDo
from al_pipeline.integrations import forks

if TYPE_CHECKING:
    from al_pipeline.operations.tick import Options, TickReport
    from al_pipeline.workspace.workspace import Workspace

_SETTINGS = {
    # the run's log is on the server; the terminal gets the steps from the engine
    "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL",
    "PREFECT_INTERNAL_LOGGING_LEVEL": "CRITICAL",
    "PREFECT_CLIENT_MAX_RETRIES": "3",  # 14 s, since a person waits
}
"""Settings of Prefect's client, applied unless the environment sets them."""


class _Client:
    """State of Prefect's client in this process."""

    server_gone: bool = False


def server_gone() -> bool:
    """Whether the server went away during a run: at Python's exit, Prefect's client would try for minutes to reach it.

    Never in a fork, which ends without what Python does at its exit.
    """
    return _Client.server_gone and not forks.State.forked


def run_tick(workspace: Workspace, options: Options, on_progress: Callable[[str], None]) -> TickReport:
    """Run one tick: as a flow run if the workspace's Prefect server is up, else in this process, reporting that."""
    if (workspace.home / "prefect").exists():  # if it never started, import nothing of servers
        from al_pipeline.servers import prefect_environment

        if environment := prefect_environment(workspace):
            return _run_as_flow(workspace, environment, options, on_progress)
    from al_pipeline.operations.connect import connect
    from al_pipeline.operations.tick import tick

    on_progress("the workspace's Prefect server is not up, so the tick runs in this process")
    return tick(workspace, lambda: connect(workspace), options=options, on_progress=on_progress)


def apply_schedule(workspace: Workspace, *, take_over: bool) -> bool:
    """Apply the schedule to the workspace's own Prefect server; return whether that changed anything.

    Raises NothingToDo if that server is not up, UsageError if ticks run in another clone, unless `take_over`.
    """
    from al_pipeline.servers import prefect_environment

    environment = prefect_environment(workspace)
    if not environment:
        raise NothingToDo(
            "the workspace's own Prefect server is not up; `al up` starts it and applies the schedule "
            "(for your team's Prefect server, use `prefect deploy`: see prefect.yaml)"
        )
    _configure_client(workspace, environment)
    from al_pipeline.flows.deployments import apply

    return apply(workspace, take_over=take_over)


def _run_as_flow(
    workspace: Workspace, environment: dict[str, str], options: Options, on_progress: Callable[[str], None]
) -> TickReport:
    _configure_client(workspace, environment)
    on_progress(f"as a flow run at {environment['PREFECT_UI_URL']}")
    from al_pipeline.flows.rounds import run_round
    from al_pipeline.servers import prefect_environment

    try:
        return run_round(options, on_progress)
    finally:
        _Client.server_gone = not prefect_environment(workspace)


def _configure_client(workspace: Workspace, environment: dict[str, str]) -> None:
    """Set the environment and current folder that Prefect reads on import."""
    os.environ.update(environment)
    os.environ["AL_WORKSPACE"] = str(workspace.layout.root)
    # Prefect reads `.env`, `prefect.toml` and `pyproject.toml` of the current folder, which may be anybody's
    os.chdir(workspace.home)
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)
    if "prefect" in sys.modules:  # in a fork
        from al_pipeline.flows.engine import read_settings_again

        read_settings_again()
