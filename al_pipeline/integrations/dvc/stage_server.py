"""Run stages as forks of one process that has imported them, instead of starting Python for each of them.

DVC still decides which stage runs, and records it; this only replaces the shell that would run its command. A fork runs
what the command would run, in the environment that DVC gives it, and exits: its memory is freed, a crash ends only the
fork, and killing the group ends it too. Commands that are not stages of this installation go to the shell.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from al_pipeline.integrations.fork_server import Branch, become
from al_pipeline.workspace.layout import STAGES

_STAGE = re.compile(r"python -m (al_pipeline\.stages\.[a-z_]+)")
_STAGES = "al_pipeline.stages"
_TAKEN = "taken\n"
"""The server's reply when it accepts a request, before it forks; a second line has the exit code."""
_PR_SET_PDEATHSIG = 1
_READ_AT_IMPORT = ("PYTHONPATH", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "OPENBLAS_CORETYPE", "MKL_NUM_THREADS")
"""Environment variables that Python or numpy reads only once."""


def stage_module(command: str, environment: Mapping[str, str]) -> str | None:
    """The stage module that `command` would run in this Python; None if a shell has to run it.

    When rounds are reproduced with another engine, another Python comes first on the PATH. Variables that numpy reads
    at import must be the same as the server's.
    """
    found = _STAGE.fullmatch(command)
    python = shutil.which("python", path=environment.get("PATH"))
    if found is None or python is None or Path(python).parent != Path(sys.executable).parent:
        return None
    same = all(environment.get(name) == os.environ.get(name) for name in _READ_AT_IMPORT)
    return found[1] if same and "OMP_NUM_THREADS" in environment else None


class StageServer:
    """The process that forks stages. It starts with the first stage, unless `start` was called, and ends with ours."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | Branch | None = None

    def start(self, folder: str, *modules: str) -> None:
        """Start importing the stages in `folder`'s `dvc.yaml`, and `modules`. Raises OSError if that file is missing.

        Does not wait, so that the imports run in parallel with the caller's work.
        """
        text = (Path(folder) / "dvc.yaml").read_text(encoding="utf-8", errors="replace")
        names = sorted({*modules, *_STAGE.findall(text)})
        if has_stages():
            self._process = Branch(partial(main, *names))
            return
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", __name__, *names],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            encoding="utf-8",
        )

    def run(self, module: str, folder: str, environment: Mapping[str, str]) -> int:
        """Run the stage `module` in `folder`; returns its exit code, negative for a signal as in `subprocess`.

        Raises OSError if the server ends before it accepts the request. If it ends later, the stage ends too, and the
        server's exit code is returned (1 if that is 0).
        """
        if self._process is None:
            self.start(folder, module)
        assert self._process is not None
        assert self._process.stdin is not None and self._process.stdout is not None
        request = {"module": module, "folder": folder, "environment": dict(environment)}
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        if self._process.stdout.readline() != _TAKEN:
            raise BrokenPipeError("the stage server ended before it accepted the request")
        reply = self._process.stdout.readline()
        return int(reply) if reply else self._process.wait() or 1


def fork_stages(server: StageServer | None = None) -> None:
    """Make DVC in this process run stages as forks of `server`, or of one that starts with the first stage."""
    import dvc.stage.run as runner
    from dvc.stage.exceptions import StageCmdFailedError

    server, in_shell = server or StageServer(), runner._run

    def run(executable: Any, command: str, **given: Any) -> None:
        module = stage_module(command, given["env"])
        code = None
        with contextlib.suppress(OSError):  # no server accepted the request, so the stage has not started
            code = None if module is None else server.run(module, str(given["cwd"]), given["env"])
        if code is None:
            in_shell(executable, command, **given)
        elif code:
            raise StageCmdFailedError(command, code)

    runner._run = run


def has_stages() -> bool:
    """Whether this process has imported the stages already: it is a fork of a server that did."""
    return all(f"{_STAGES}.{name}" in sys.modules for name in STAGES)


def main(*modules: str) -> None:
    """Import `modules`, then fork for each request on standard input. Stages print to standard error."""
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    for module in modules:
        with contextlib.suppress(ImportError):  # dvc.yaml is the user's; a wrong module is reported when it runs
            importlib.import_module(module)
    importlib.import_module(_STAGES).prepare()
    for line in sys.stdin:
        replies.write(_TAKEN)
        replies.flush()
        server = os.getpid()
        stage = os.fork()
        if stage == 0:
            _end_with(server)
            replies.close()
            become([os.open(os.devnull, os.O_RDONLY), 1, 2], partial(_run, **json.loads(line)))
        replies.write(f"{os.waitstatus_to_exitcode(os.waitpid(stage, 0)[1])}\n")
        replies.flush()


def _end_with(server: int) -> None:
    """Make the kernel kill this fork when `server` ends: its exit code would be lost, and the stage may run again."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != server:  # the server has ended already
            os._exit(1)


def _run(module: str, folder: str, environment: dict[str, str]) -> None:
    """Run the stage's `main` in a fork, as `python -m` would."""
    with contextlib.suppress(OSError):  # the name that `ps` and `top` show; Linux only
        Path("/proc/self/comm").write_text(f"al-{module.rpartition('.')[2]}", encoding="ascii")
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    if importlib.util.find_spec(module) is None:
        sys.exit(f"No module named {module!r}")
    importlib.import_module(module).main()


if __name__ == "__main__":
    main(*sys.argv[1:])
