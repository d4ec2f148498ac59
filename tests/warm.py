"""What makes a run of the tests fast: fork servers, and temporary files in memory.

Fork servers as `al up` starts one: hundreds of ticks need not import DVC and the encoder. A tick flushes some hundred
files to disk, which takes longer than all else that it does.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import psutil

from al_pipeline.integrations import forks
from al_pipeline.servers.fork_server import MODULES
from al_pipeline.workspace.fingerprint import STAGE_ENVIRONMENT
from al_pipeline.workspace.home import own_environment

_PR_SET_PDEATHSIG = 1
_MEMORY = Path("/dev/shm")
_FREE_BYTES = 8 << 30
"""Temporary files go to memory only if so much is free there, and twice as much of all memory."""
_IN_MEMORY = "al-tests-"
_LIBC = ctypes.CDLL(None)
SERVERS = {
    "dvc": ((*MODULES, "dvc_s3", "skops.io", "sklearn.ensemble"), STAGE_ENVIRONMENT),
    "encoder": (
        (
            *("al_pipeline.stages.encode", "torch", "pyarrow.parquet", "transformers", "transformers.modeling_utils"),
            *(f"transformers.models.auto.{name}_auto" for name in ("modeling", "tokenization")),
            *(f"transformers.models.bert.{name}_bert" for name in ("modeling", "tokenization")),
        ),
        {name: value for name, value in STAGE_ENVIRONMENT.items() if not name.endswith("_NUM_THREADS")},
    ),
}
"""The modules and settings of each server.

The product has no server for the encoder: it would take half a gigabyte. transformers imports most of itself only when
it is used, two seconds of processor time for each encoding. Nor do the product's forks find scikit-learn and skops
imported, which take each stage of a plug-in as long.
"""


def use_memory() -> None:
    """Have temporary files of this process and its children in memory where there is room, unless TMPDIR is set.

    Removes what earlier runs left there.
    """
    if "TMPDIR" in os.environ or not _MEMORY.is_dir():
        return
    for left in _MEMORY.glob(f"{_IN_MEMORY}*"):
        number = left.name.removeprefix(_IN_MEMORY)
        if number.isdecimal() and not psutil.pid_exists(int(number)) and left.lstat().st_uid == os.geteuid():
            shutil.rmtree(left, ignore_errors=True)
    runs_programs = not os.statvfs(_MEMORY).f_flag & os.ST_NOEXEC
    has_room = shutil.disk_usage(_MEMORY).free > _FREE_BYTES and psutil.virtual_memory().available > 2 * _FREE_BYTES
    if runs_programs and has_room and os.access(_MEMORY, os.W_OK):
        folder = _MEMORY / f"{_IN_MEMORY}{os.getpid()}"
        folder.mkdir()
        folder.chmod(0o711)  # the server of a test may be another user
        os.environ["TMPDIR"] = str(folder)
        tempfile.tempdir = None


def leave_memory() -> None:
    """Remove the temporary files of this run, if they are in memory."""
    if os.environ.get("TMPDIR") == str(folder := _MEMORY / f"{_IN_MEMORY}{os.getpid()}"):
        shutil.rmtree(folder, ignore_errors=True)
        del os.environ["TMPDIR"]
        tempfile.tempdir = None


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
