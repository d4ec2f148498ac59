"""Child processes in their own process group, recorded in a file so that a tick after a kill can find and end them.

psutil is imported only when a process is examined: most ticks find and start none.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

from al_pipeline.files import read_object, write_json
from al_pipeline.integrations import forks
from al_pipeline.logs import get_logger, shown

_logger = get_logger(__name__)

_PATIENCE = 10.0


def remember(record: Path, process: int) -> None:
    """Record a process that leads a group of its own (`pid`, `started`) in the file `record`."""
    import psutil

    write_json(record, {"pid": process, "started": psutil.Process(process).create_time()})


def end_group(leader: int) -> None:
    """Kill the process group of `leader`, and wait until all of it is gone: it holds files and locks until then."""
    try:
        os.killpg(leader, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        return
    deadline = time.monotonic() + _PATIENCE
    while _has_living(leader) and time.monotonic() < deadline:
        time.sleep(0.002)


def _has_living(group: int) -> bool:
    """Whether a process of a group lives; one that has ended and that its parent has not seen yet does not."""
    import psutil

    for pid in psutil.pids():
        with contextlib.suppress(ProcessLookupError, PermissionError, psutil.NoSuchProcess):
            if os.getpgid(pid) == group and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
                return True
    return False


def end_remembered(record: Path) -> None:
    """Kill the process group that `record` names; delete `record`. Call only while holding the workspace's lock."""
    left = read_object(record)
    pid, started = left.get("pid"), left.get("started")
    if isinstance(pid, int) and isinstance(started, int | float) and 0 < pid < 2**31:
        import psutil

        with contextlib.suppress(psutil.NoSuchProcess):
            if abs(psutil.Process(pid).create_time() - started) < 1:
                _logger.warning("ending process %d, which a killed command left behind", pid)
                end_group(pid)
                _wait_for_end(pid, started)
        _end_orphans(pid)
    record.unlink(missing_ok=True)


def lives(pid: int, before: float) -> bool:
    """Whether process `pid` runs and started no later than `before` (seconds since 1970).

    False for a zombie, and for a later process that was given the same pid.
    """
    import psutil

    try:
        process = psutil.Process(pid)
        return process.status() != psutil.STATUS_ZOMBIE and process.create_time() < before + 1
    except psutil.NoSuchProcess:
        return False


def run(
    command: Sequence[str],
    folder: Path,
    environment: Mapping[str, str],
    record: Path,
    timeout: float,
    log: IO[bytes] | None = None,
    server: str = "",
) -> int | None:
    """Run `command` in its own process group; return its exit code, or None after a timeout.

    A fork server named `server` may start it (see `forks`). The group is killed at the end, also if we are interrupted.
    Output goes to `log`, if given.
    """
    begin = time.perf_counter()
    with forks.popen(
        command,
        server,
        None,
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=log,
        start_new_session=True,
    ) as process:
        try:
            remember(record, process.pid)
            code = process.wait(timeout)
            _logger.debug("%s ended with %d after %.3f s", shown(command), code, time.perf_counter() - begin)
            return code
        except subprocess.TimeoutExpired:
            _logger.warning("%s was stopped: it did not end within %.0f s", shown(command), timeout)
            return None
        finally:
            end_group(process.pid)
            record.unlink(missing_ok=True)


def _wait_for_end(pid: int, started: float) -> None:
    """Wait until a killed process is gone: it holds its files and locks until then."""
    deadline = time.monotonic() + _PATIENCE
    while lives(pid, before=started) and time.monotonic() < deadline:
        time.sleep(0.01)


def _end_orphans(group: int) -> None:
    """Kill stages of a group whose leader is gone; its pid cannot be reused while they live."""
    import psutil

    for process in psutil.process_iter():
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied, ProcessLookupError):
            if os.getpgid(process.pid) == group and any("al_pipeline.stages" in word for word in process.cmdline()):
                end_group(group)
