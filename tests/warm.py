"""Forks in place of the processes that DVC's session and the encoder start, for ticks in a test's own process.

A tick starts Python processes for DVC, the stages and perhaps the encoder, whose imports take 1.5 to 4 s of processor
time, and the suite plays hundreds of ticks. Here one process imports once and forks for each start. A fork has the
arguments, environment, folder, files, session and process group that the real process would have, and runs the same
code. `al`, flows and their children start as in production, as does any process with another environment.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn, Self

from al_pipeline.integrations import processes
from al_pipeline.integrations.dvc import session, stage_server, worker
from al_pipeline.workspace.fingerprint import STAGE_ENVIRONMENT
from al_pipeline.workspace.home import own_environment
from al_pipeline.workspace.layout import STAGES

DVC, ENCODER = "dvc", "encoder"
MODULES = {worker.__name__: DVC, "al_pipeline.stages.encode": ENCODER}
"""The kinds of processes that are forked, and from which process; scripts (`-c`) use DVC."""
STAGE_MODULES = [f"al_pipeline.stages.{stage}" for stage in STAGES]
USED_LATER = {
    DVC: ("dvc_s3",),
    ENCODER: ("al_pipeline.features.encoder", "torch", "transformers"),
}
"""Modules that are imported only when they are used."""
STARTED_UNDER = {
    DVC: STAGE_ENVIRONMENT,
    ENCODER: {name: value for name, value in STAGE_ENVIRONMENT.items() if not name.endswith("_NUM_THREADS")},
}
"""The environment of the forking process, beside that of the tests."""
READ_AT_IMPORT = ("PYTHON", "LC_", "LANG", "LD_", "OMP_", "OPENBLAS_", "MKL_")
"""Prefixes of variables that matter while a process starts and imports."""


# In the tests' process ------------------------------------------------------------------------------------------------


class Parent:
    """A process that forks. It starts with the first request, and ends with this process."""

    def __init__(self, kind: str) -> None:
        self._kind = kind
        self._environment: dict[str, str] = {}
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = 0
        self._address = ""

    def take(self, environment: Mapping[str, str]) -> None:
        """Start it, when it is needed, under `environment`."""
        self._environment = {**environment, **own_environment(), **STARTED_UNDER[self._kind]}

    def fits(self, environment: Mapping[str, str]) -> bool:
        """Whether a fork would have imported under the same settings; variables missing in `environment` may differ."""
        asked = {**STARTED_UNDER[self._kind], **environment}
        return _read_at_import(asked) == _read_at_import(self._environment)

    def _start(self) -> None:
        self._address, self._owner = f"{tempfile.mkdtemp(prefix='al-warm-')}/socket", os.getpid()
        # The stages are on the command line, as for a stage server.
        command = [sys.executable, "-P", __file__, self._kind, self._address, *STAGE_MODULES]
        self._process = subprocess.Popen(
            command, env=self._environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
        )
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == b"ready\n"

    def ask(self, request: Mapping[str, Any], files: list[int]) -> socket.socket:
        """Request a fork with `files` as its standard files. It sends its process id, and at its end the exit code."""
        if self._process is None:
            self._start()
        asked = socket.socket(socket.AF_UNIX)
        asked.connect(self._address)
        text = json.dumps(request).encode()
        socket.send_fds(asked, [f"{len(text):12d}".encode()], files)
        asked.sendall(text)
        return asked

    def close(self) -> None:
        if self._process is not None and self._owner == os.getpid():
            self._process.communicate()
            Path(self._address).unlink(missing_ok=True)
            Path(self._address).parent.rmdir()
            self._process = None


class Fork:
    """The part of `subprocess.Popen` that the product uses."""

    def __init__(
        self,
        parent: Parent,
        words: Sequence[str],
        *,
        cwd: Any,
        env: Mapping[str, str],
        stdin: Any = None,
        stdout: Any = None,
        stderr: Any = None,
        encoding: str | None = None,
        start_new_session: bool = False,
    ) -> None:
        umask = os.umask(0)
        os.umask(umask)
        self.args, self.returncode, self.stdin, self.stdout = words, None, None, None
        request = {"words": list(words[2:]), "folder": str(cwd), "environment": dict(env), "umask": umask}
        with contextlib.ExitStack() as ours:
            theirs = []
            for place, given in enumerate((stdin, stdout, stderr)):
                if given == subprocess.PIPE:
                    out, into = os.pipe()
                    theirs.append(out if place == 0 else into)
                    if place == 0:
                        self.stdin = os.fdopen(into, "w", encoding=encoding)
                    else:
                        self.stdout = os.fdopen(out, encoding=encoding)
                    ours.callback(os.close, theirs[-1])
                elif given == subprocess.DEVNULL:
                    theirs.append(os.open(os.devnull, os.O_RDWR))
                    ours.callback(os.close, theirs[-1])
                else:
                    theirs.append(place if given is None else given.fileno())
            self._link = parent.ask({**request, "session": start_new_session}, theirs)
        self._heard = self._link.makefile("r", encoding="ascii")
        self.pid = int(self._heard.readline())

    def wait(self, timeout: float | None = None) -> int:
        """The exit code; that of a kill if the fork reported none."""
        if self.returncode is None:
            if not select.select([self._link], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(self.args, timeout or 0)
            self.returncode = int(self._heard.readline() or -signal.SIGKILL)
            self._heard.read()  # blocks until it ends
            self._heard.close()
            self._link.close()
            with contextlib.suppress(ProcessLookupError):
                while True:  # it is not left as a zombie either
                    os.kill(self.pid, 0)
                    time.sleep(0.001)
        return self.returncode

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            for stream in (self.stdout, self.stdin):
                if stream is not None:
                    stream.close()
        finally:
            self.wait()


PARENTS = {kind: Parent(kind) for kind in (DVC, ENCODER)}


def _kind(words: Sequence[str]) -> str | None:
    if list(words[:2]) != [sys.executable, "-P"]:
        return None
    return DVC if words[2] == "-c" else MODULES.get(words[3])


def _popen(words: Sequence[str], **given: Any) -> Any:
    """`subprocess.Popen`, or a fork that looks like it."""
    kind = _kind(words)
    if kind is None or not PARENTS[kind].fits(given["env"]):
        return subprocess.Popen(words, **given)
    return Fork(PARENTS[kind], words, **given)


def _run(words: Sequence[str], **given: Any) -> subprocess.CompletedProcess[str]:
    """`subprocess.run` as DVC's session calls it, with forks too."""
    if _kind(words) is None:
        return subprocess.run(words, **given)
    captured = partial(tempfile.TemporaryFile, "w+", encoding="utf-8", errors="replace")
    with captured() as out, captured() as err:
        with _popen(words, cwd=given["cwd"], env=given["env"], stdin=given["stdin"], stdout=out, stderr=err) as process:
            try:
                process.wait(given["timeout"])
            except subprocess.TimeoutExpired:
                os.kill(process.pid, signal.SIGKILL)
                raise
        out.seek(0)
        err.seek(0)
        return subprocess.CompletedProcess(words, process.returncode, out.read(), err.read())


WARM = SimpleNamespace(**{**vars(subprocess), "Popen": _popen, "run": _run})
"""Replaces `subprocess` where DVC and the encoder are started."""


def start_warm() -> None:
    """Have ticks of this process start forks, until `end_warm`."""
    for parent in PARENTS.values():
        parent.take(os.environ)
    session.subprocess = processes.subprocess = WARM


def end_warm() -> None:
    session.subprocess = processes.subprocess = subprocess
    for parent in PARENTS.values():
        parent.close()


def _read_at_import(environment: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in environment.items() if name.startswith(READ_AT_IMPORT)}


# In the process that forks --------------------------------------------------------------------------------------------


def main(kind: str, address: str) -> None:
    """Import, then fork for each connection until standard input ends."""
    if kind == DVC:
        _prepare_dvc()
    for name in USED_LATER[kind]:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # imported objects stay: a fork need not scan them, which would copy their pages
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for a fork: it disappears when it ends
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        listener.listen(16)
        os.write(1, b"ready\n")
        while True:
            ready, _, _ = select.select([listener, 0], [], [])
            if 0 in ready:
                return
            link, _ = listener.accept()
            with link:
                size, files, _, _ = socket.recv_fds(link, 12, 3)
                text = b""
                while len(text) < int(size):
                    text += link.recv(int(size) - len(text))
                if os.fork() == 0:
                    _become(files, partial(_serve, **json.loads(text)), link)
                for file in files:
                    os.close(file)


def _prepare_dvc() -> None:
    """Import what DVC's commands and the stages use, and build once what they build."""
    import dvc.cli  # noqa: F401
    from dvc.cli.parser import get_main_parser

    from al_pipeline import stages
    from al_pipeline.params import parse_params
    from al_pipeline.workspace.trust import template

    worker.keep_parsed_yaml()  # before DVC imports what this replaces
    worker.keep_parsed_yaml = lambda: None
    stage_server.subprocess = SimpleNamespace(**{**vars(subprocess), "Popen": StageFork})
    for name in (*STAGE_MODULES, *_imported_by_dvc()):
        with contextlib.suppress(Exception):
            importlib.import_module(name)
    stages.prepare()
    get_main_parser()
    parse_params(template("params.yaml"))


def _imported_by_dvc() -> list[str]:
    """The modules that DVC's commands import, some of them only when they run; a fork finds them out."""
    told, tell = os.pipe()
    with tempfile.TemporaryDirectory() as folder:
        if os.fork() == 0:
            _become([os.open(os.devnull, os.O_RDONLY), tell, os.dup(2)], partial(_try_dvc, folder))
        os.close(tell)
        with open(told, encoding="utf-8") as heard:
            names = heard.read().split()
        os.wait()
    return names


def _try_dvc(folder: str) -> None:
    from dvc.cli import main as dvc

    os.chdir(folder)
    os.environ.update(DVC_SITE_CACHE_DIR=f"{folder}/site", DVC_NO_ANALYTICS="1")
    subprocess.run(["git", "init", "-q"], check=True)
    Path("file").touch()
    with contextlib.redirect_stdout(sys.stderr):
        for words in ("init -q", "add -q file", "stage add -q -n copy -d file -o other cp file other", "repro -q"):
            dvc(words.split())
    sys.stdout.write(" ".join(sys.modules))


def _become(files: list[int], act: Callable[[], None], link: socket.socket | None = None) -> NoReturn:
    """In a fork: use `files` as the only standard files, run `act` and exit as a process of its own would.

    Sends its exit code to `link`, which ends with it.
    """
    code = 1
    try:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for place, file in enumerate(files):
            os.dup2(file, place)
        kept = 3 if link is None else link.fileno()
        os.closerange(3, kept)
        os.closerange(kept + (link is not None), os.sysconf("SC_OPEN_MAX"))
        # No earlier object may close a file of the same number: none is collected, and streams do not close files.
        gc.freeze()
        sys.stdin = os.fdopen(0, encoding="utf-8", closefd=False)
        sys.stdout = os.fdopen(1, "w", encoding="utf-8", closefd=False)
        sys.stderr = os.fdopen(2, "w", 1, encoding="utf-8", errors="backslashreplace", closefd=False)
        act() if link is None else act(link)
        code = 0
    except SystemExit as stop:
        if isinstance(stop.code, str):
            sys.stderr.write(f"{stop.code}\n")
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        if link is not None:
            with contextlib.suppress(OSError):
                link.sendall(f"{code}\n".encode())
        os._exit(code)


def _serve(
    link: socket.socket, *, words: list[str], folder: str, environment: dict[str, str], umask: int, session: bool
) -> None:
    """Do what the requested process would do; `words` are the arguments after `python -P`."""
    if session:
        os.setsid()
    os.chdir(folder)
    os.umask(umask)
    os.environ.clear()
    os.environ.update(environment)
    how, what, *arguments = words
    sys.argv = ["-c" if how == "-c" else what, *arguments]
    link.sendall(f"{os.getpid()}\n".encode())
    if what == worker.__name__:
        worker.main()
    elif how == "-m":
        runpy.run_module(what, run_name="__main__", alter_sys=True)
    else:
        exec(compile(what, "<string>", "exec"), {"__name__": "__main__"})


class StageFork:
    """The part of `subprocess.Popen` that DVC's process uses for the stage server: a fork of itself, in its group."""

    def __init__(self, words: list[str], **_: Any) -> None:
        assert words[:4] == [sys.executable, "-P", "-m", stage_server.__name__]
        into, self_in = os.pipe()
        self_out, out = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            sys.argv = words[3:]
            _become([into, out, 2], stage_server.main)
        os.close(into)
        os.close(out)
        self.stdin = os.fdopen(self_in, "w", encoding="utf-8")
        self.stdout = os.fdopen(self_out, "r", encoding="utf-8")

    def wait(self) -> int:
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
