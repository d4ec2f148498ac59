"""A process that imports modules and then forks for each request: see `forks`, its client.

    python -P -m al_pipeline.integrations.fork_server FOLDER MODULE...

It listens on a socket in FOLDER, which only its user can reach, and ends when that socket is removed. A module's
`prepare`, if it has one, is called after its import. When code or packages have changed, it starts itself again. On
standard error it logs its starts and end, and each request that it refuses.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import logging
import os
import resource
import runpy
import signal
import socket
import sys
import sysconfig
import tempfile
import threading
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import NoReturn

import al_pipeline
from al_pipeline.integrations import forks
from al_pipeline.logs import get_logger
from al_pipeline.workspace.fingerprint import STAGE_ENVIRONMENT

_logger = get_logger(__name__)

_LOOK_SECONDS = 5.0
_MOST_BYTES = 64 << 20
_REQUEST_SECONDS = 10.0


def main() -> None:
    """Import, then fork for each connection until the socket is removed."""
    with contextlib.suppress(FileNotFoundError):  # the folder is gone
        serve(*sys.argv[1:])


def serve(folder: str, *modules: str) -> None:
    """Import `modules`, then fork for each connection until the socket in `folder` is removed."""
    _log_to_standard_error()
    found = _code()  # before the imports: a change during them makes this process outdated
    for name in modules:
        with contextlib.suppress(ImportError):  # an extra that is not installed
            getattr(importlib.import_module(name), "prepare", lambda: None)()
    gc.collect()
    gc.freeze()  # a fork does not search what was imported for garbage, and so does not copy its pages
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel removes a fork that has ended
    with socket.socket(socket.AF_UNIX) as listener:
        os.chdir(folder)  # a relative name is never too long for a socket
        with contextlib.suppress(FileNotFoundError):
            os.unlink("socket")
        listener.bind("socket")
        mine = os.stat("socket").st_ino
        listener.listen(16)
        os.chdir("/")
        _logger.info("starts, process %d, with %s", os.getpid(), ", ".join(modules))
        while _exists(f"{folder}/socket", mine):
            ready = forks.readable(listener, _LOOK_SECONDS)
            try:
                if ready:
                    _serve(listener, found)
            except (OSError, ValueError) as error:
                _logger.warning("a request came to nothing: %s", error)  # such as that of a client that went away
        _logger.info("ends: its socket was removed")


def _log_to_standard_error() -> None:
    """Log this module's messages, whatever AL_LOG_LEVEL is: they say why a tick started processes.

    Nothing of it is seen in a fork, which does not log here.
    """
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s: %(message)s"))
    _logger.addHandler(handler)
    _logger.setLevel(logging.INFO)
    _logger.propagate = False


def _exists(path: str, number: int) -> bool:
    """Whether the socket at `path` is still this server's; False also if its folder is gone."""
    try:
        return os.stat(path).st_ino == number
    except OSError:
        return False


def _serve(listener: socket.socket, found: list[tuple[str, int, int]]) -> None:
    """Take one request, and fork for it."""
    link, _ = listener.accept()
    files: list[int] = []
    try:
        link.settimeout(_REQUEST_SECONDS)
        if (owner := forks.peer(link)) not in (None, os.geteuid()):
            _logger.warning("refused: user %s asked", owner)
            return
        header, files, _, _ = socket.recv_fds(link, forks.HEADER.size, 3)
        if len(header) < forks.HEADER.size:
            return
        size = forks.HEADER.unpack(header)[0]
        text = b""
        while len(text) < size <= _MOST_BYTES and (part := link.recv(min(size - len(text), 1 << 20))):
            text += part
        request = json.loads(text)
        if _code() != found:
            link.sendall(b"other code\n")
            for file in files:  # they would stay open
                os.set_inheritable(file, False)
            _logger.info("starts again: code or packages have changed")
            os.execv(sys.executable, [sys.executable, "-P", "-m", forks.SERVER, *sys.argv[1:]])
        if request.pop("place") != forks.place():
            _refuse(link, "another place", "its interpreter, package, groups, root or namespaces are others")
        elif others := _read_otherwise(request["environment"]):
            _refuse(link, "other environment", f"it has other values of {', '.join(others)}")
        elif not _can_limit(request["limits"], request["nice"]):
            _refuse(link, "other limits", "it has higher limits or priority")
        elif os.fork() == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            listener.close()
            become(files, partial(_run, link, **request), link)
    finally:
        for file in files:
            os.close(file)
        link.close()


def _refuse(link: socket.socket, answer: str, why: str) -> None:
    link.sendall(f"{answer}\n".encode())
    _logger.warning("refused, so that a process starts: %s", why)


def _code() -> list[tuple[str, int, int]]:
    """What changes with the code of this package, and when a package is installed or removed."""
    paths = {sysconfig.get_path(name) for name in ("purelib", "platlib")}
    found = [(path, 0, os.stat(path).st_mtime_ns) for path in sorted(paths)]
    for folder, folders, _ in os.walk(Path(al_pipeline.__file__).parent):
        folders[:] = sorted(set(folders) - {"__pycache__"})
        with os.scandir(folder) as entries:
            for entry in sorted(entries, key=lambda entry: entry.name):
                if entry.name.endswith(".py"):
                    found.append((entry.path, (about := entry.stat()).st_size, about.st_mtime_ns))
    return found


def _read_otherwise(environment: Mapping[str, str]) -> list[str]:
    """The variables because of which a process with this environment might import other things than this one did.

    What stages need may be left out.
    """
    asked, here = forks.read_at_import(environment), forks.read_at_import(os.environ)
    asked = {name: here[name] for name in STAGE_ENVIRONMENT if name in here} | asked
    return sorted(name for name in here.keys() | asked.keys() if here.get(name) != asked.get(name))


def _can_limit(limits: Mapping[str, tuple[int, int]], nice: int) -> bool:
    """Whether a fork can have these resource limits and this niceness."""
    if os.geteuid() == 0:
        return True
    hard = {name: resource.getrlimit(int(name))[1] for name in limits}
    endless = resource.RLIM_INFINITY
    lower = all(hard[name] == endless or endless != wish <= hard[name] for name, (_, wish) in limits.items())
    return lower and nice >= os.nice(0)


def _run(
    link: socket.socket,
    *,
    words: list[str],
    folder: str,
    environment: dict[str, str],
    umask: int,
    nice: int,
    limits: dict[str, tuple[int, int]],
    tied: bool,
) -> None:
    """In a fork: become what was asked for, and run it; `words` are those behind `python -P`.

    `tied`: be killed when the client ends.
    """
    forks.State.forked = True
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in a server that was started in the background
    os.setsid()
    os.chdir(folder)
    os.umask(umask)
    os.setpriority(os.PRIO_PROCESS, 0, nice)
    for name, limit in limits.items():
        resource.setrlimit(int(name), limit)
    os.environ.clear()
    os.environ.update(environment)
    tempfile.tempdir = None  # chosen by the environment when it is first used
    link.sendall(f"{os.getpid()}\n".encode())
    if link.recv(3) != b"go\n":  # the client has given up, and starts another process
        return
    if tied:
        threading.Thread(target=_end_with, args=(link,), daemon=True).start()
    how, what, *arguments = words
    sys.argv = ["-c" if how == "-c" else what, *arguments]
    if how == "-c":
        exec(compile(what, "<string>", "exec"), {"__name__": "__main__"})
    elif what in sys.modules:
        sys.modules[what].main()
    else:
        runpy.run_module(what, run_name="__main__", alter_sys=True)


def _end_with(link: socket.socket) -> None:
    """Kill this process and its group when the other end of `link`, which sends no more, is closed."""
    with contextlib.suppress(OSError):
        link.settimeout(None)
        link.recv(1)
    os.killpg(0, signal.SIGKILL)


class Branch:
    """A fork of this process that runs `act`, in our process group; what is used of `subprocess.Popen`.

    Create it only while this process has one thread.
    """

    def __init__(self, act: Callable[[], None]) -> None:
        into, ours = os.pipe()
        theirs, out = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            become([into, out, 2], act)
        os.close(into)
        os.close(out)
        self.stdin, self.stdout = os.fdopen(ours, "w", encoding="utf-8"), os.fdopen(theirs, encoding="utf-8")

    def wait(self) -> int:
        """The exit code, negative for a signal."""
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


def become(files: list[int], act: Callable[[], None], link: socket.socket | None = None) -> NoReturn:
    """In a fork: have `files` as standard files and no others, and end after `act` as a process of its own would.

    Tells its exit code to `link`, which closes with it.
    """
    code = 1
    try:
        for place, file in enumerate(files):
            os.dup2(file, place)
        kept = 3 if link is None else link.fileno()
        os.closerange(3, kept)
        os.closerange(kept + (link is not None), os.sysconf("SC_OPEN_MAX"))
        gc.freeze()  # an object of before must not close a file that now has its number
        sys.stdin = os.fdopen(0, encoding="utf-8", closefd=False)
        sys.stdout = os.fdopen(1, "w", encoding="utf-8", closefd=False)
        sys.stderr = os.fdopen(2, "w", 1, encoding="utf-8", errors="backslashreplace", closefd=False)
        act()
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


if __name__ == "__main__":
    main()
