"""Stages as forks of one process that has imported them, in place of a Python each: five starts become one.

DVC decides which stage runs, and records it, as ever; this replaces the shell that would run its command. A fork runs
what the command would run, in the environment that DVC gives it, and ends: memory is given back, a crash is a crash,
and a kill of the group ends it. What is no stage of this installation goes to the shell.
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
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_STAGE = re.compile(r"python -m (al_pipeline\.stages\.[a-z_]+)")
_STAGES = "al_pipeline.stages"
_TAKEN = "taken\n"
"""What the server says of a request before it forks; the second line is the exit code."""
_PR_SET_PDEATHSIG = 1
_READ_AT_IMPORT = ("PYTHONPATH", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "OPENBLAS_CORETYPE", "MKL_NUM_THREADS")
"""Variables of the environment."""


def stage_module(command: str, environment: Mapping[str, str]) -> str | None:
    """The stage that `command` starts, where it would start it in this Python; None where a shell has to run it.

    Another Python comes first on the PATH where rounds are made again under another engine. What numpy reads when it
    is imported must be the same for the server.
    """
    found = _STAGE.fullmatch(command)
    python = shutil.which("python", path=environment.get("PATH"))
    if found is None or python is None or Path(python).parent != Path(sys.executable).parent:
        return None
    same = all(environment.get(name) == os.environ.get(name) for name in _READ_AT_IMPORT)
    return found[1] if same and "OMP_NUM_THREADS" in environment else None


class StageServer:
    """The process that forks stages. It starts with the first one, and ends with this process."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None

    def start(self, folder: str, *modules: str) -> None:
        """Start to import the stages that the `dvc.yaml` in `folder` names, and `modules`. Raises OSError without one.

        Does not wait: whoever needs a stage soon lets it import beside the work at hand.
        """
        text = (Path(folder) / "dvc.yaml").read_text(encoding="utf-8", errors="replace")
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", __name__, *sorted({*modules, *_STAGE.findall(text)})],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            encoding="utf-8",
        )

    def run(self, module: str, folder: str, environment: Mapping[str, str]) -> int:
        """Run the stage `module` in `folder`; returns its exit code, negative for a signal as in `subprocess`.

        Raises OSError where the server ended before it took the request. One that ends later ends the stage, too,
        and its exit code is the stage's.
        """
        if self._process is None:
            self.start(folder, module)
        assert self._process is not None
        assert self._process.stdin is not None and self._process.stdout is not None
        request = {"module": module, "folder": folder, "environment": dict(environment)}
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        if self._process.stdout.readline() != _TAKEN:
            raise BrokenPipeError("the stage server ended before it took the request")
        reply = self._process.stdout.readline()
        return int(reply) if reply else self._process.wait() or 1


def fork_stages(server: StageServer | None = None) -> None:
    """Have this process's DVC run stages as forks of `server`, or of one that starts with the first stage."""
    import dvc.stage.run as runner
    from dvc.stage.exceptions import StageCmdFailedError

    server, in_shell = server or StageServer(), runner._run

    def run(executable: Any, command: str, **given: Any) -> None:
        module = stage_module(command, given["env"])
        code = None
        with contextlib.suppress(OSError):  # no server took the request: the stage runs nowhere yet
            code = None if module is None else server.run(module, str(given["cwd"]), given["env"])
        if code is None:
            in_shell(executable, command, **given)
        elif code:
            raise StageCmdFailedError(command, code)

    runner._run = run


def main() -> None:
    """Import the modules that are named, then fork for each request on standard input. What stages print is stderr."""
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    for module in sys.argv[1:]:
        with contextlib.suppress(ImportError):  # dvc.yaml is the user's; what it names is reported when it runs
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
            _run(**json.loads(line))
        replies.write(f"{os.waitstatus_to_exitcode(os.waitpid(stage, 0)[1])}\n")
        replies.flush()


def _end_with(server: int) -> None:
    """Have the kernel kill this fork when `server` ends: nobody would know of its end, and the stage may run again."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != server:  # which ended before
            os._exit(1)


def _run(module: str, folder: str, environment: dict[str, str]) -> None:
    """What a fork does: the stage's `main` as `python -m` runs it, and the end of the process."""
    code = 1
    try:
        with contextlib.suppress(OSError):  # the name that `ps` and `top` show, where there is such a file
            Path("/proc/self/comm").write_text(f"al-{module.rpartition('.')[2]}", encoding="ascii")
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.environ.clear()
        os.environ.update(environment)
        os.chdir(folder)
        if importlib.util.find_spec(module) is None:
            sys.exit(f"No module named {module!r}")
        importlib.import_module(module).main()
        code = 0
    except SystemExit as stop:
        if isinstance(stop.code, str):
            print(stop.code, file=sys.stderr)  # noqa: T201
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    main()
