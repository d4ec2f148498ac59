"""The workspace's fork server, which spares ticks the imports of DVC and the stages (see `integrations.forks`).

It runs as long as the worker. It holds about 200 MB, uses no processor time between ticks, and a tick that does not
find it imports for itself.
"""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path

from al_pipeline.errors import AlError
from al_pipeline.integrations import forks
from al_pipeline.servers.process import inherited_environment, start_detached
from al_pipeline.workspace.fingerprint import STAGE_ENVIRONMENT
from al_pipeline.workspace.home import fork_servers, private_folder
from al_pipeline.workspace.layout import STAGES
from al_pipeline.workspace.workspace import Workspace

MODULES = ("al_pipeline.integrations.dvc.worker", *(f"al_pipeline.stages.{name}" for name in STAGES))
"""What its forks need."""


def start_fork_server(workspace: Workspace) -> None:
    """Start the workspace's fork server, unless it answers. Does not wait: it imports for some seconds."""
    folder = private_folder(fork_servers(workspace.id) / "dvc")
    with contextlib.suppress(OSError, AlError), forks.connect(folder):
        return
    command = [sys.executable, "-P", "-m", forks.SERVER, str(folder), *MODULES]
    environment = {**forks.read_at_import(os.environ), **inherited_environment(), **STAGE_ENVIRONMENT}
    start_detached(command, environment, folder, folder / "server.log")


def stop_fork_server(home: Path) -> bool:
    """End the fork server in a workspace's home; False if none ran. What it forked for a tick goes on."""
    folder = fork_servers(home.name) / "dvc"
    with contextlib.suppress(OSError, AlError), forks.connect(folder):  # when we hang up, it looks for its socket
        (folder / "socket").unlink()
        return True
    return False
