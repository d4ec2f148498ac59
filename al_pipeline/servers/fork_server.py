"""The workspace's fork servers, which spare ticks their imports (see `integrations.forks`).

One has imported DVC and the stages, the other Prefect's engine. They run as long as the worker. Each holds about 100 MB
and uses no processor time between ticks; a tick that does not find one imports for itself.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from al_pipeline.errors import AlError
from al_pipeline.integrations import forks
from al_pipeline.servers.process import inherited_environment, start_detached
from al_pipeline.workspace.fingerprint import STAGE_ENVIRONMENT
from al_pipeline.workspace.home import fork_servers, private_folder
from al_pipeline.workspace.layout import STAGES
from al_pipeline.workspace.workspace import Workspace

MODULES = (
    *("al_pipeline.integrations.dvc.worker", "al_pipeline.stages"),
    *(f"al_pipeline.stages.{name}" for name in STAGES),
)
"""What its forks need."""


def start_fork_servers(workspace: Workspace, prefect: Mapping[str, str] | None = None) -> None:
    """Start the workspace's fork servers, unless they answer. Does not wait: they import for some seconds.

    `prefect`: the settings of Prefect's client; None: not the one for flow runs.
    """
    _start(workspace, forks.DVC, MODULES, STAGE_ENVIRONMENT)
    if prefect is not None:
        _start(workspace, forks.FLOWS, [forks.FLOW_ENGINE], prefect)


def _start(workspace: Workspace, name: str, modules: Sequence[str], settings: Mapping[str, str]) -> None:
    folder = private_folder(fork_servers(workspace.id) / name)
    with contextlib.suppress(OSError, AlError), forks.connect(folder):
        return
    command = [sys.executable, "-P", "-m", forks.SERVER, str(folder), *modules]
    environment = {**forks.read_at_import(os.environ), **inherited_environment(), **settings}
    start_detached(command, environment, folder, folder / "server.log")


def stop_fork_servers(home: Path) -> bool:
    """End the fork servers in a workspace's home; False if none ran. What they forked for a tick goes on."""
    return any([_stop(fork_servers(home.name) / name) for name in (forks.DVC, forks.FLOWS)])


def _stop(folder: Path) -> bool:
    with contextlib.suppress(OSError, AlError), forks.connect(folder):  # when we hang up, it looks for its socket
        (folder / "socket").unlink()
        return True
    return False
