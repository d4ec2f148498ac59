"""Fork servers for a run of the tests, as `al up` starts one: hundreds of ticks need not import DVC and the encoder."""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from al_pipeline.integrations import forks
from al_pipeline.servers.fork_server import MODULES
from al_pipeline.workspace.fingerprint import STAGE_ENVIRONMENT
from al_pipeline.workspace.home import own_environment

_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None)
SERVERS = {
    "dvc": ((*MODULES, "dvc_s3"), STAGE_ENVIRONMENT),
    "encoder": (
        ("al_pipeline.stages.encode", "torch", "transformers"),
        {name: value for name, value in STAGE_ENVIRONMENT.items() if not name.endswith("_NUM_THREADS")},
    ),
}
"""The modules and settings of each server. The product has no server for the encoder: it would take half a gigabyte."""


def choose_folder() -> None:
    """Have ticks of this process and its children look for fork servers in a folder of this run."""
    os.environ[forks.FOLDER] = tempfile.mkdtemp(prefix="al-forks-")


def start_servers() -> None:
    """Start them, unless they run; they end with this process."""
    for name, (modules, settings) in SERVERS.items():
        folder = Path(os.environ[forks.FOLDER]) / name
        if not folder.exists():
            folder.mkdir(mode=0o700)
            with (folder / "server.log").open("ab") as log:
                server = subprocess.Popen(
                    [sys.executable, "-P", "-m", forks.SERVER, str(folder), *modules],
                    env={**os.environ, **own_environment(), **settings},
                    stdin=subprocess.DEVNULL,
                    stderr=log,
                    start_new_session=True,
                    preexec_fn=lambda: _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL),
                )
            server.returncode = 0  # nobody waits for it


def end_servers() -> None:
    shutil.rmtree(os.environ.pop(forks.FOLDER), ignore_errors=True)
