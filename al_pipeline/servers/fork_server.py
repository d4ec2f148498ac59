"""The workspace's fork server, which spares ticks the imports of DVC and the stages (see `integrations.forks`).

It runs as long as the worker. It holds about 200 MB, uses no processor time between ticks, and a tick that does not
find it imports for itself.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from pathlib import Path

from al_pipeline.errors import AlError
from al_pipeline.integrations import forks
from al_pipeline.servers.process import inherited_environment
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
    log = os.open(folder / "server.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600)
    try:
        child = subprocess.Popen(
            [sys.executable, "-P", "-m", forks.SERVER, str(folder), *MODULES],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            cwd=folder,
            env={**_read_at_import(), **inherited_environment(), **STAGE_ENVIRONMENT},
            start_new_session=True,
        )
    finally:
        os.close(log)
    child.returncode = 0  # it outlives this process: suppress Popen's warning that it still runs


def stop_fork_server(home: Path) -> bool:
    """End the fork server in a workspace's home; False if none ran. What it forked for a tick goes on."""
    folder = fork_servers(home.name) / "dvc"
    with contextlib.suppress(OSError, AlError), forks.connect(folder):  # when we hang up, it looks for its socket
        (folder / "socket").unlink()
        return True
    return False


def _read_at_import() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name.startswith(forks.READ_AT_IMPORT)}
